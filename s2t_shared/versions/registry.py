"""Published local selectors on disk: written aside, synced, renamed, checked before every use; and
which is live.

    versions/
      v0001-prefix-base-3f2a9c1d/
        adapter_config.json  adapter_model.safetensors    PEFT's files
        bins.safetensors                                  [16, hidden] deltas of the reserved rows, unless kind prefix
        README.md                                         the model card; beside it what training adds (curve, plot)
        manifest.json                                     written last; names and hashes every other file
      LIVE                                                which version is live, the ones before it, and the canary
      promotions.jsonl                                    what the gate said, what went live and when; only appended to

One lock serialises writers and dies with its holder, and every change becomes visible by one
rename: whatever process dies when, a reader sees the state before or after, and the next writer
sweeps what was left half done. Put the folder on storage that all proposers see. Knows files and
manifests; not who serves them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import locked, publish_folder, sha256_file, sync, write_atomically
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.lora import load_adapter, save_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.gate import Verdict
from s2t_shared.versions.manifest import (
    BINS,
    CARD,
    DATA_SUFFIXES,
    MANIFEST,
    Manifest,
    read_manifest,
    verify_files,
    verify_weights,
)
from s2t_shared.versions.model_card import model_card

LIVE = "LIVE"
EVENTS = "promotions.jsonl"
LEFTOVERS = (
    ".publishing-*",
    f".{LIVE}.*.tmp",
)  # of writers that died; only looked for under the lock
NAME = re.compile(r"v(\d{4,})-.+")
HISTORY = 100
TAKEN_BACK = ("rolled back", "canary ended")


@dataclass(frozen=True)
class Canary:
    """A version on trial: it serves `share` (in (0, 1)) of the requests that name no version."""

    version: str
    share: float


@dataclass(frozen=True)
class Live:
    """Versions that were live, the present one last; and the canary beside it."""

    history: tuple[str, ...] = ()
    canary: Canary | None = None

    @property
    def version(self) -> str | None:
        return self.history[-1] if self.history else None

    def share(self, version: str) -> float:
        """Of the requests that name no version."""
        canary = self.canary.share if self.canary else 0.0
        if self.canary and self.canary.version == version:
            return canary
        return 1.0 - canary if version == self.version else 0.0


class Registry:
    """The versions under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(
        self, selector: LocalSelector, manifest: Manifest, extra: Mapping[str, bytes] | None = None
    ) -> Manifest:
        """Write `selector` as a new version; `manifest.version`, `.files` and `.created_at` are
        filled in here, and the model card is written. `extra`: further files by name (a plot, the
        training curve).

        A job publishes once: when `manifest.job` has a version already, that version's manifest is
        returned and nothing is written. Nobody ever sees a part of a version: the folder appears by
        one rename, when everything in it is on disk.
        """
        assert selector.adapter is not None
        with self._writing():
            if manifest.job and (done := self.find_job(manifest.job)) is not None:
                return done
            aside = self.root / f".publishing-{uuid.uuid4().hex}"
            aside.mkdir()
            try:
                save_adapter(selector.adapter, aside, manifest.base_model)
                if selector.bin_deltas is not None:
                    save_file(
                        {"deltas": selector.bin_deltas.detach().float().cpu().contiguous()},
                        aside / BINS,
                    )
                for name, content in (extra or {}).items():
                    assert Path(name).name == name and Path(name).suffix in DATA_SUFFIXES, name
                    assert name not in (MANIFEST, CARD) and not (aside / name).exists(), name
                    (aside / name).write_bytes(content)
                published = self._describe(aside, manifest)
                (aside / MANIFEST).write_text(published.model_dump_json(indent=2), encoding="utf-8")
                publish_folder(aside, self.root / published.version)
                return published
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _describe(self, aside: Path, manifest: Manifest) -> Manifest:
        """Name the version, write its card into `aside`, and complete its manifest."""
        files = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
        number = 1 + max((_number(name) for name in self.names()), default=0)
        named = manifest.model_copy(
            update={
                "version": f"v{number:04d}-{manifest.kind.value}-{manifest.reads.value}-{digest}",
                # A figure that could not be computed was not measured, and NaN is not JSON.
                "metrics": {
                    name: value
                    for name, value in manifest.metrics.items()
                    if abs(value) < float("inf")
                },
                "files": files,
                "created_at": time.time(),
            }
        )
        (aside / CARD).write_text(model_card(named), encoding="utf-8")
        return named.model_copy(update={"files": files | {CARD: sha256_file(aside / CARD)}})

    def names(self) -> list[str]:
        """Complete versions, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(
            (
                p.name
                for p in self.root.iterdir()
                if NAME.fullmatch(p.name) and (p / MANIFEST).is_file()
            ),
            key=lambda name: (_number(name), name),
        )

    def manifest(self, version: str) -> Manifest:
        """Raises VersionNotFoundError, or VersionError for a broken manifest."""
        return read_manifest(self.folder(version))

    def manifests(self) -> tuple[list[Manifest], dict[str, str]]:
        """All versions' manifests, oldest first; and of those that cannot be read, why."""
        found, broken = [], {}
        for name in self.names():
            try:
                found.append(read_manifest(self.root / name))
            except VersionError as error:
                broken[name] = str(error)
        return found, broken

    def folder(self, version: str) -> Path:
        """Where a version's files are. Raises VersionNotFoundError."""
        names = self.names()
        if version not in names:
            raise VersionNotFoundError(
                f"no version {version!r} in the registry; there are: {', '.join(names) or 'none'}"
            )
        return self.root / version

    def find_job(self, job: str) -> Manifest | None:
        """What a training job has published, or None. A version that cannot be read is nobody's."""
        assert job
        return next((m for m in self.manifests()[0] if m.job == job), None)

    def load(self, version: str, runtime: ModelRuntime, tokenizer_digest: str) -> LocalSelector:
        """Read and check a version for this SLM. Raises VersionNotFoundError or VersionError."""
        return load_version(self.folder(version), runtime, tokenizer_digest)

    def verify(
        self, version: str, runtime: ModelRuntime | None = None, tokenizer_digest: str = ""
    ) -> Manifest:
        """Check a version's manifest, files and weights; with a model also that it fits that model.

        Raises:
            VersionNotFoundError or VersionError: the first thing that is wrong.
        """
        manifest = self.manifest(version)
        if manifest.version != version:
            raise VersionError(
                f"version {version!r}: its manifest says it is {manifest.version!r}; publish it again"
            )
        verify_files(self.root / version, manifest)
        verify_weights(self.root / version, manifest)
        _ = manifest.calibration
        if runtime is not None:
            load_version(self.root / version, runtime, tokenizer_digest)
        return manifest

    # -- the live pointer -------------------------------------------------------------------------

    def state(self) -> Live:
        """What is live, was live, and is on trial.

        Raises:
            VersionError: the pointer file is damaged, or cannot be read.
        """
        if (state := self._pointer()) is None:
            raise VersionError(
                f"the registry's {LIVE} file is damaged; promote a version again (s2t versions promote "
                "VERSION)"
            )
        return state

    def _pointer(self) -> Live | None:
        """None: its content is damaged, so that it may be started anew. A file that cannot be read
        may be sound.

        Raises:
            VersionError: it cannot be read.
        """
        try:
            content = json.loads((self.root / LIVE).read_text(encoding="utf-8"))
            canary = (
                Canary(str(c["version"]), float(c["share"]))
                if (c := content.get("canary"))
                else None
            )
            if canary is not None and not 0.0 < canary.share < 1.0:
                raise ValueError(f"a canary's share of {canary.share}")
            return Live(tuple(str(name) for name in content["history"]), canary)
        except FileNotFoundError:
            return Live()
        except OSError as error:
            raise VersionError(
                f"the registry's {LIVE} file cannot be read ({error.strerror or error}); check the "
                "registry's storage"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def live(self) -> str | None:
        """The live version, or None. Raises VersionError: as `state`."""
        return self.state().version

    def promote(self, version: str, share: float | None = None) -> None:
        """Make `version` live, and end a canary. With a `share` in (0, 1) make it the canary
        instead, for so large a share of the requests that name no version.

        Raises: VersionNotFoundError or VersionError: it is not sound, the share is no share, a
            canary has no live version beside it, or the pointer file cannot be read (one that is
            damaged starts anew).
        """
        if share is not None and not 0.0 < share <= 1.0:
            raise VersionError(f"share={share}: must be above 0 and at most 1 (all requests)")
        self.verify(version)
        with self._writing():
            state = self._pointer() or Live()
            if share is None or share == 1.0:
                history = state.history if state.version == version else (*state.history, version)
                self._set(Live(history), {"event": "live", "version": version})
                return
            if state.version is None:
                raise VersionError(
                    f"share={share:g}: no version is live that the other requests could get; promote "
                    f"{version!r} without a share"
                )
            if state.version == version:
                raise VersionError(
                    f"version {version!r} is live already, so it cannot be its own canary; choose "
                    "another, or promote it without a share to end the canary"
                )
            self._set(
                Live(state.history, Canary(version, share)),
                {"event": "canary", "version": version, "share": share},
            )

    def objection(self, version: str) -> str:
        """Why nobody but an operator should make `version` live now: one has a canary on trial, or
        took this very version back. "" for none.

        Raises:
            VersionError: the pointer file cannot be read.
        """
        command = f"s2t versions promote {version}"
        if (state := self._pointer()) is not None and state.canary is not None:
            return (
                f"the canary {state.canary.version} is on trial; end it (s2t versions rollback), or make this "
                f"version live ({command})"
            )
        moves = [
            event.get("event") for event in self.events(version) if event.get("event") != "gate"
        ]
        return (
            f"it was rolled back; to make it live again: {command}"
            if moves and moves[-1] in TAKEN_BACK
            else ""
        )

    def rollback(self) -> str | None:
        """End the canary, if there is one; else make the version before the live one live again.
        Returns the live version (None: none is live any more).

        Raises:
            VersionError: nothing is live, or the version before is not sound.
        """
        with self._writing():
            state = self.state()
            if state.canary is not None:
                self._set(
                    Live(state.history), {"event": "canary ended", "version": state.canary.version}
                )
                return state.version
            if state.version is None:
                raise VersionError("nothing to roll back: no version is live")
            before = Live(state.history[:-1])
            if before.version is not None:
                self.verify(before.version)
            self._set(
                before,
                {"event": "rolled back", "version": state.version, "to": before.version or ""},
            )
            return before.version

    def _set(self, state: Live, event: dict[str, Any]) -> None:
        content = {
            "history": state.history[-HISTORY:],
            "canary": asdict(state.canary) if state.canary else None,
        }
        if state != self._pointer():
            write_atomically(self.root / LIVE, json.dumps(content))
            self._append(event)

    # -- what happened ----------------------------------------------------------------------------

    def record(self, version: str, verdict: Verdict) -> None:
        """Keep what the gate said of a version. A manifest never changes, so it is written
        beside."""
        with self._writing():
            self._append({"event": "gate", "version": version, **verdict.as_json()})

    def events(self, version: str | None = None) -> list[dict[str, Any]]:
        """What happened to the versions (or to one), oldest first: {"at": Unix seconds, "event",
        "version", ...}."""
        try:
            lines = (self.root / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line, of a writer that died
            if isinstance(event, dict) and version in (None, event.get("version")):
                found.append(event)
        return found

    def _append(self, event: dict[str, Any]) -> None:
        with (self.root / EVENTS).open("ab+") as stream:
            if stream.tell():  # half a line must not swallow the next one
                stream.seek(-1, os.SEEK_END)
                stream.write(b"" if stream.read(1) == b"\n" else b"\n")
            stream.write(json.dumps({"at": time.time(), **event}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, on this and other hosts that share the folder; released when the
        process dies. Who has it finds only dead writers' leftovers, and sweeps them."""
        if not self.root.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            sync(self.root.parent)
        with locked(self.root / ".lock"):
            for pattern in LEFTOVERS:
                for path in self.root.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                        missing_ok=True
                    )
            yield


def _number(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match.group(1))


def open_version(
    name: str, versions: Path, runtime: ModelRuntime, tokenizer_digest: str
) -> LocalSelector:
    """Load a version by what a person calls it: its name in the registry, "live", or its folder.

    Raises:
        VersionNotFoundError: there is none of this name.
        VersionError: damaged, made for another model, or none is live.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_version(folder, runtime, tokenizer_digest)
    registry = Registry(versions)
    version = registry.live() if name == "live" else name
    if version is None:
        raise VersionError(
            "no version is live in the registry; train one, or name a version or folder"
        )
    return registry.load(version, runtime, tokenizer_digest)


def load_version(folder: Path, runtime: ModelRuntime, tokenizer_digest: str) -> LocalSelector:
    """Read and check the version in `folder` for this SLM.

    Raises:
        VersionNotFoundError: no manifest there.
        VersionError: damaged, or made for another SLM or tokenizer.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for what, theirs, ours in (
        ("SLM", manifest.slm_digest, runtime.digest),
        ("tokenizer", manifest.tokenizer_digest, tokenizer_digest),
    ):
        if theirs != ours:
            raise VersionError(
                f"version {folder.name!r} was trained for another {what} (digest {theirs}, "
                f"this one is {ours}); choose a version of this {what}"
            )
    adapter = load_adapter(folder, runtime.model).to(runtime.device, torch.float32)
    deltas = None
    if BINS in manifest.files:
        try:
            deltas = load_file(folder / BINS)["deltas"].to(runtime.device)
        except (OSError, KeyError, SafetensorError) as error:
            raise VersionError(
                f"version {folder.name!r}: {BINS} cannot be read; publish it again"
            ) from error
        expected = (manifest.bins, runtime.head.weight.shape[1])
        if tuple(deltas.shape) != expected or not torch.isfinite(deltas).all():
            raise VersionError(
                f"version {folder.name!r}: {BINS} must be finite and of shape {expected}, it has shape "
                f"{tuple(deltas.shape)}"
            )
    return LocalSelector(
        version=manifest.version,
        kind=manifest.kind,
        reads=manifest.reads,
        reserved_ids=manifest.reserved_ids,
        adapter=adapter,
        bin_deltas=deltas,
        temperature=manifest.temperature,
        fusion=manifest.fusion,
        calibration=manifest.calibration,
        scoring=manifest.scoring,
        standardise=manifest.standardise,
    )
