"""Which published version serves: the live one, those before it, and a canary beside it.

    versions/
      LIVE              JSON: the versions that were live, the present one last, and the canary
      promotions.jsonl  gate verdicts, promotions and rollbacks with their times; only appended to

Writers take turns under the registry's lock, and a change becomes visible by one rename. After a
crash a reader sees the state before or after it. Knows names and shares; no models, no processes
that serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from s2t_shared.errors import VersionError
from s2t_shared.files import write_atomically
from s2t_shared.versions.registry import Registry, writer_lock

if TYPE_CHECKING:
    from s2t_shared.model.local_selector import LocalSelector
    from s2t_shared.versions.weights import SLM

LIVE = "LIVE"
LEFTOVERS = f".{LIVE}.*.tmp"
EVENTS = "promotions.jsonl"
HISTORY = 100  # versions that rollbacks can go back to


class Canary(BaseModel):
    """A version on trial. It serves `share`, in (0, 1), of the requests that name no version."""

    model_config = ConfigDict(frozen=True)

    version: str
    share: Annotated[float, Field(gt=0, lt=1)]


class Live(BaseModel):
    """The versions that serve. history: those that were live, the present one last."""

    model_config = ConfigDict(frozen=True)

    history: tuple[str, ...]
    canary: Canary | None = None

    @property
    def version(self) -> str | None:
        """The live version."""
        return self.history[-1] if self.history else None

    def share(self, version: str) -> float:
        """The share of requests that `version` gets, among those that name no version."""
        canary_share = self.canary.share if self.canary is not None else 0.0
        if self.canary is not None and version == self.canary.version:
            return canary_share
        if version == self.version:
            return 1.0 - canary_share
        return 0.0

    def choose(self, request_id: str) -> str | None:
        """The version of a request that names none; None when none is live.

        The same id gets the same version, on every replica and on a retry.
        """
        canary = self.canary
        if canary is not None and _hash_fraction(request_id) < canary.share:
            return canary.version
        return self.version


NOTHING_LIVE = Live(history=())


class LiveVersions:
    """Reads and changes which versions of a registry serve."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.registry = Registry(root)

    def state(self, if_damaged: Live | None = None) -> Live:
        """What serves now.

        if_damaged: returned in place of a pointer file whose content is damaged.

        Raises:
            VersionError: the file cannot be read; or it is damaged, and `if_damaged` is None.
        """
        try:
            return Live.model_validate_json((self.root / LIVE).read_bytes())
        except FileNotFoundError:
            return NOTHING_LIVE
        except OSError as error:  # says nothing about the content, which may be sound
            raise VersionError(
                f"the registry's {LIVE} file cannot be read ({error.strerror or error}); "
                "check the registry's storage"
            ) from error
        except ValueError as error:
            if if_damaged is not None:
                return if_damaged
            raise VersionError(
                f"the registry's {LIVE} file is damaged; "
                "promote a version again (s2t versions promote VERSION)"
            ) from error

    def live(self) -> str | None:
        """The live version, or None.

        Raises:
            VersionError: the pointer file is damaged or cannot be read.
        """
        return self.state().version

    def resolve(self, name: str) -> str:
        """The version that a command line names; "live" stands for the live one.

        Raises:
            VersionError: `name` is "live" and no version is, or the pointer file is damaged.
        """
        if name != "live":
            return name
        live = self.live()
        if live is None:
            raise VersionError(
                "no version is live; promote one (s2t versions promote VERSION), or name a version"
            )
        return live

    # -- changes ----------------------------------------------------------------------------------

    def promote(self, version: str, share: float | None = None) -> None:
        """Make `version` live and end a canary; or make it the canary.

        share: None or 1 for live; a number in (0, 1) for a canary with that share of the requests.
        A damaged LIVE file is replaced; its history is lost.

        Raises:
            VersionNotFoundError: there is no such version.
            VersionError: the version is not sound, the share is out of range, a canary has no
                live version beside it, or the pointer file cannot be read.
        """
        if share is not None and not 0.0 < share <= 1.0:
            raise VersionError(f"share={share}: must be above 0 and at most 1 (all requests)")
        self.registry.verify(version)
        with writer_lock(self.root, LEFTOVERS):
            state = self.state(if_damaged=NOTHING_LIVE)
            if share is not None and share < 1.0:
                _check_canary(state, version, share)
                canary = Canary(version=version, share=share)
                trial = Live(history=state.history, canary=canary)
                self._replace(state, trial, "canary", version, share=share)
                return
            history = state.history
            if version != state.version:
                history = (*history, version)[-HISTORY:]
            self._replace(state, Live(history=history), "live", version)

    def rollback(self) -> str | None:
        """End the canary; without one, make the version before the live one live again.

        Returns the live version, None if none is live any more.

        Raises:
            VersionError: nothing is live, the version before is not sound, or the pointer file
                is damaged or cannot be read.
        """
        with writer_lock(self.root, LEFTOVERS):
            state = self.state()
            if state.canary is not None:
                without = Live(history=state.history)
                self._replace(state, without, "canary ended", state.canary.version)
                return state.version
            if state.version is None:
                raise VersionError("nothing to roll back: no version is live")
            before = Live(history=state.history[:-1])
            if before.version is not None:
                self.registry.verify(before.version)
            destination = before.version or ""
            self._replace(state, before, "rolled back", state.version, to=destination)
            return before.version

    def _replace(self, old: Live, new: Live, event: str, version: str, **details: Any) -> None:
        if new != old:
            write_atomically(self.root / LIVE, new.model_dump_json())
            self._append(event, version, details)

    # -- events -----------------------------------------------------------------------------------

    def record(self, event: str, version: str, **details: Any) -> None:
        """Append an event of `version` to the registry's log. details: JSON values."""
        with writer_lock(self.root, LEFTOVERS):
            self._append(event, version, details)

    def events(self, version: str | None = None) -> list[dict[str, Any]]:
        """What happened to all versions or to one, oldest first.

        Each event is {"at": Unix seconds, "event": name, "version": name, ...}.
        """
        try:
            text = (self.root / EVENTS).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line of a writer that died
            if not isinstance(event, dict):
                continue
            if version is None or event.get("version") == version:
                found.append(event)
        return found

    def _append(self, event: str, version: str, details: dict[str, Any]) -> None:
        content = {"at": time.time(), "event": event, "version": version, **details}
        with (self.root / EVENTS).open("ab+") as stream:
            if stream.tell():  # a dead writer's half line must not swallow this one
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(json.dumps(content).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def open_version(name: str, versions: Path, slm: SLM, tokenizer_digest: str) -> LocalSelector:
    """Load a version by what a person calls it.

    name: a version of the registry `versions`, "live", or the folder of a version.

    Raises:
        VersionNotFoundError: there is no such version.
        VersionError: it is damaged or made for another model, or none is live.
    """
    from s2t_shared.versions.weights import load_version

    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_version(folder, slm, tokenizer_digest)
    live_versions = LiveVersions(versions)
    version = live_versions.resolve(name)
    return live_versions.registry.load(version, slm, tokenizer_digest)


def _check_canary(state: Live, version: str, share: float) -> None:
    if state.version is None:
        raise VersionError(
            f"share={share:g}: no version is live that the other requests could get; "
            f"promote {version!r} without a share"
        )
    if version == state.version:
        raise VersionError(
            f"version {version!r} is live already, so it cannot be its own canary; "
            "choose another, or promote it without a share to end the canary"
        )


def _hash_fraction(request_id: str) -> float:
    """A hash of the request id in [0, 1), spread evenly."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
