"""Which local selector a request gets: watches the registry's LIVE file and loads a new version
beside the old.

A version is read and checked completely, off the decoding thread, before it is offered; a bad one
is refused and the old one keeps serving. A request holds the object it was given, so nothing is
ever switched under it, not even while it waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from s2t_shared.errors import S2TError, VersionError, VersionNotFoundError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.registry import Registry

log = logging.getLogger(__name__)
WATCH_S = 0.5
RETRY_S = 10.0  # a refused version is looked at again: shared storage may show a file late
# versions beside the live one and the canary that stay loaded: those just replaced or asked for by
# name
KEPT = 4


@dataclass(frozen=True, eq=False)
class _Serving:
    """Replaced as one, so that a reader never sees half a change."""

    live: LocalSelector | None = None
    canary: LocalSelector | None = None
    share: float = 0.0


class VersionWatcher:
    """Loaded versions by name. Thread-safe: the engine looks up, a watcher loads."""

    def __init__(self, registry: Registry, runtime: ModelRuntime, tokenizer_digest: str) -> None:
        self._registry, self._runtime, self._tokenizer_digest = registry, runtime, tokenizer_digest
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._serving = _Serving()
        self._loaded: OrderedDict[str, LocalSelector] = OrderedDict()  # least recently used first
        self._refused: dict[str, tuple[str, float]] = {}  # name -> (why, when to look again)
        self.refresh()
        threading.Thread(target=self._watch, daemon=True, name="live-selector").start()

    @property
    def live_version(self) -> str:
        live = self._serving.live
        return live.version if live is not None else ""

    @property
    def canary(self) -> tuple[str, float]:
        """The canary that serves here and its share of the requests; ("", 0) for none."""
        serving = self._serving
        return (serving.canary.version, serving.share) if serving.canary is not None else ("", 0.0)

    def choose(self, request_id: str) -> LocalSelector | None:
        """For a request that names none: the canary for its share of the request ids, else the live
        one; None when none is live. The same id gets the same one, on every replica and on a
        retry."""
        serving = self._serving
        if serving.canary is not None and _position(request_id) < serving.share:
            return serving.canary
        return serving.live

    def lookup(self, version: str | None) -> LocalSelector | None:
        """None: the live one (or None when there is none); "": none; else a loaded version.

        Raises:
            VersionNotFoundError: not loaded; `obtain` loads.
        """
        if version is None:
            return self._serving.live
        if version == "":
            return None
        with self._lock:
            if version not in self._loaded:
                raise VersionNotFoundError(f"version {version!r} is not loaded")
            self._loaded.move_to_end(version)
            return self._loaded[version]

    async def obtain(self, version: str) -> LocalSelector:
        """The version of this name. Loads on another thread: other answers stream on.

        Raises:
            VersionNotFoundError: there is none of this name.
            VersionError: it is corrupt or made for another model.
        """
        try:
            loaded = self.lookup(version)
        except VersionNotFoundError:
            loaded = await asyncio.to_thread(self._load, version)
        assert loaded is not None
        return loaded

    def refresh(self) -> None:
        """Follow the registry. A version that cannot be loaded leaves the present one live; a
        canary that cannot be loaded gets no requests."""
        try:
            state = self._registry.state()
        except VersionError as error:
            self._refuse("", error)
            return
        self._refused.pop("", None)
        old = self._serving
        live = self._obtain(state.version, old.live, old.live) if state.version else None
        canary = self._obtain(state.canary.version, old.canary, None) if state.canary else None
        new = _Serving(live, canary, state.canary.share if state.canary and canary else 0.0)
        if new.live is not old.live or new.canary is not old.canary or new.share != old.share:
            log.info("live selector: %s -> %s", _name(old), _name(new))
            self._serving = new
        current = {state.version, state.canary.version if state.canary else None}
        self._refused = {name: why for name, why in self._refused.items() if name in current}

    def _obtain(
        self, version: str, present: LocalSelector | None, otherwise: LocalSelector | None
    ) -> LocalSelector | None:
        if present is not None and present.version == version:
            return present
        if version in self._refused and time.monotonic() < self._refused[version][1]:
            return otherwise
        try:
            if (
                version in self._loaded
            ):  # sound when it was read; the next replica to start must be able to read it too
                self._registry.verify(version)
            return self._load(version)
        except S2TError as error:
            self._refuse(version, error)
            return otherwise

    def _load(self, version: str) -> LocalSelector:
        with self._loading:  # asked for by many at once, it is read once
            with self._lock:
                loaded = self._loaded.get(version)
            if loaded is None:
                loaded = self._registry.load(version, self._runtime, self._tokenizer_digest)
            with self._lock:
                self._loaded[version] = loaded
                self._loaded.move_to_end(version)
                serving = (self._serving.live, self._serving.canary, loaded)
                spare = [
                    name
                    for name, selector in self._loaded.items()
                    if all(selector is not s for s in serving)
                ]
                for name in spare[: max(0, len(spare) - KEPT)]:
                    del self._loaded[name]
            return loaded

    def _refuse(self, version: str, error: S2TError) -> None:
        if self._refused.get(version, ("",))[0] != str(error):
            log.error(
                "version refused, %s keeps serving: %s", self.live_version or "no selector", error
            )
        self._refused[version] = (str(error), time.monotonic() + RETRY_S)

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 - whatever one version does to us, the next one must be seen
                log.exception(
                    "following the registry failed; %s keeps serving",
                    self.live_version or "no selector",
                )


def _position(request_id: str) -> float:
    """Where an id lies in [0, 1), evenly spread."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / 2**64


def _name(serving: _Serving) -> str:
    name = serving.live.version if serving.live else "none"
    return (
        f"{name} (canary {serving.canary.version}, {serving.share:g})" if serving.canary else name
    )
