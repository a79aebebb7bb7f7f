"""Which local selector a new request gets: watches the registry's LIVE file and loads a new version beside the old.

A version is read and checked completely before it is offered; a bad one is refused and the old one keeps serving.
Sequences hold the object they began with, so nothing is ever switched under a running answer, and an old version's
memory goes when its last sequence ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

from s2t_shared.errors import S2TError, VersionNotFoundError
from s2t_shared.local_selector import LocalSelector
from s2t_shared.registry import Registry
from s2t_shared.runtime import ModelRuntime

log = logging.getLogger(__name__)
WATCH_S = 0.5
KEPT = 4  # versions other than the live one that stay loaded, for requests that name them


class LiveSelectors:
    """Loaded versions by name. Thread-safe: the engine looks up, a watcher loads."""

    def __init__(self, registry: Registry, runtime: ModelRuntime, tokenizer_digest: str) -> None:
        self._registry, self._runtime, self._tokenizer_digest = registry, runtime, tokenizer_digest
        self._lock = threading.Lock()
        self._live: LocalSelector | None = None
        self._refused = ""
        self._named: OrderedDict[str, LocalSelector] = OrderedDict()
        self.refresh()
        threading.Thread(target=self._watch, daemon=True, name="live-selector").start()

    @property
    def live_version(self) -> str:
        live = self._live
        return live.version if live is not None else ""

    def lookup(self, version: str | None) -> LocalSelector | None:
        """None: the live one (or None when there is none); "": none; else a loaded version.

        Raises:
            VersionNotFoundError: not loaded; `check` loads.
        """
        if version is None:
            return self._live
        if version == "":
            return None
        with self._lock:
            if self._live is not None and self._live.version == version:
                return self._live
            if version not in self._named:
                raise VersionNotFoundError(f"version {version!r} is not loaded")
            return self._named[version]

    def check(self, version: str | None) -> None:
        """Make sure that `version` can be looked up.

        Raises:
            VersionNotFoundError: there is none of this name, or (None) none is live.
            VersionError: it is corrupt or made for another model.
        """
        if version is None and self._live is None:
            raise VersionNotFoundError("no local selector is live; train one (s2t train), or ask for "
                                       "selector_version 'none'")
        if not version or version == self.live_version or version in self._named:
            return
        loaded = self._registry.load(version, self._runtime, self._tokenizer_digest)
        with self._lock:
            self._named[version] = loaded
            while len(self._named) > KEPT:
                self._named.popitem(last=False)

    def refresh(self) -> None:
        """Follow the registry. A version that cannot be loaded leaves the present one live."""
        try:
            wanted = self._registry.live()
            if (wanted or "") == self.live_version or wanted == self._refused:
                return
            loaded = self._registry.load(wanted, self._runtime, self._tokenizer_digest) if wanted else None
        except S2TError as error:
            if str(error) != self._refused:
                log.error("version refused, %s keeps serving: %s", self.live_version or "no selector", error)
                self._refused = str(error)
            return
        log.info("live selector: %s -> %s", self.live_version or "none", wanted or "none")
        self._live, self._refused = loaded, ""

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            self.refresh()
