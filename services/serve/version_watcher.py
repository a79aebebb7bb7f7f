"""Which local selector a request gets. Follows the registry's LIVE file and loads new versions.

A version is read and checked completely, on another thread than decoding, before requests get it.
A version that cannot be loaded is refused, and the one before keeps serving. A request holds the
local selector that it was given, so a swap never changes a running answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from s2t_shared.errors import S2TError, VersionError, VersionNotFoundError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.versions.live import NOTHING_LIVE, Live, LiveVersions
from s2t_shared.versions.weights import SLM

log = logging.getLogger(__name__)
WATCH_S = 0.5
RETRY_S = 10.0  # a refused version is loaded again: shared storage may show a file late
MAX_SPARE = 4  # loaded versions that do not serve: those just replaced, or named by a request
POINTER = "LIVE"  # stands for the pointer file among the refusals


@dataclass(frozen=True, eq=False)
class _Serving:
    """What serves here and its local selectors by version. Replaced as one, never changed."""

    state: Live
    selectors: Mapping[str, LocalSelector]


@dataclass(frozen=True)
class _Refusal:
    """Why a version cannot be loaded, and when to load it again (`time.monotonic`)."""

    reason: str
    retry_at: float


class VersionWatcher:
    """The local selectors that requests can get, by version. Thread-safe."""

    def __init__(self, versions: LiveVersions, slm: SLM, tokenizer_digest: str) -> None:
        self._versions = versions
        self._slm = slm
        self._tokenizer_digest = tokenizer_digest
        self._lock = threading.Lock()  # of `_loaded`
        self._loading = threading.Lock()
        self._serving = _Serving(NOTHING_LIVE, {})
        self._loaded: OrderedDict[str, LocalSelector] = OrderedDict()  # least recently used first
        self._refusals: dict[str, _Refusal] = {}
        self._live_created_at = 0.0
        self.refresh()
        threading.Thread(target=self._watch, daemon=True, name="version-watcher").start()

    # -- what serves ------------------------------------------------------------------------------

    @property
    def live_version(self) -> str:
        """The version that is live here, "" for none."""
        return self._serving.state.version or ""

    @property
    def live_created_at(self) -> float:
        """When the live version was made, in Unix seconds; 0 for none."""
        return self._live_created_at

    @property
    def canary_version(self) -> str:
        """The canary that serves here, "" for none."""
        canary = self._serving.state.canary
        return canary.version if canary is not None else ""

    @property
    def canary_share(self) -> float:
        """The canary's share of the requests that name no version, 0 for no canary."""
        canary = self._serving.state.canary
        return canary.share if canary is not None else 0.0

    # -- local selectors of requests --------------------------------------------------------------

    def choose(self, request_id: str) -> LocalSelector | None:
        """The local selector of a request that names no version; None when none is live.

        The canary gets its share of the request ids. The same id gets the same version, on every
        replica and on a retry.
        """
        serving = self._serving
        version = serving.state.choose(request_id)
        return serving.selectors[version] if version is not None else None

    def lookup(self, version: str | None) -> LocalSelector | None:
        """The local selector of a loaded version. None stands for the live one, "" for none.

        Raises:
            VersionNotFoundError: it is not loaded; `obtain` loads it.
        """
        serving = self._serving
        if version is None:
            version = serving.state.version
        if not version:
            return None
        if version in serving.selectors:
            return serving.selectors[version]
        with self._lock:
            if version not in self._loaded:
                raise VersionNotFoundError(f"version {version!r} is not loaded")
            self._loaded.move_to_end(version)
            return self._loaded[version]

    async def obtain(self, version: str) -> LocalSelector:
        """The local selector of this version. Loads it on another thread if it is not loaded.

        Raises:
            VersionNotFoundError: there is no such version.
            VersionError: it is damaged or made for another model.
        """
        try:
            loaded = self.lookup(version)
        except VersionNotFoundError:
            loaded = await asyncio.to_thread(self._load_published, version)
        assert loaded is not None
        return loaded

    # -- following the registry -------------------------------------------------------------------

    def refresh(self) -> None:
        """Serve what the registry says.

        A live version that cannot be loaded leaves the one before live. A canary that cannot be
        loaded gets no requests.
        """
        try:
            wanted = self._versions.state()
        except VersionError as error:
            self._refuse(POINTER, error)
            return
        selectors: dict[str, LocalSelector] = {}
        history: tuple[str, ...] = ()
        live = self._live_for(wanted)
        if live is not None:
            selectors[live.version] = live
            history = (live.version,)
        canary = None
        trial = self._canary_for(wanted)
        if trial is not None:
            selectors[trial.version] = trial
            canary = wanted.canary
        old = self._serving.state
        new = Live(history=history, canary=canary)
        if new != old:
            log.info("local selectors: %s -> %s", _describe(old), _describe(new))
            self._serving = _Serving(new, selectors)
            self._live_created_at = self._created_at(new.version)
        self._forget_refusals(wanted)

    def _live_for(self, wanted: Live) -> LocalSelector | None:
        if wanted.version is None:
            return None
        present = self.lookup(None)
        if present is not None and present.version == wanted.version:
            return present
        loaded = self._load_unless_refused(wanted.version)
        return loaded if loaded is not None else present

    def _canary_for(self, wanted: Live) -> LocalSelector | None:
        if wanted.canary is None:
            return None
        version = wanted.canary.version
        if version == self.canary_version:
            return self._serving.selectors[version]
        return self._load_unless_refused(version)

    def _load_unless_refused(self, version: str) -> LocalSelector | None:
        """The local selector of a version that is about to serve; None if it is refused."""
        refusal = self._refusals.get(version)
        if refusal is not None and time.monotonic() < refusal.retry_at:
            return None
        try:
            if version in self._loaded:
                # It was sound when it was read. The next replica must be able to read it, too.
                self._versions.registry.verify(version)
            return self._load(version)
        except S2TError as error:
            self._refuse(version, error)
            return None

    def _load_published(self, version: str) -> LocalSelector:
        """The registry's own error names other versions: who asks for one need not learn them."""
        try:
            return self._load(version)
        except VersionNotFoundError as error:
            raise VersionNotFoundError(
                f"no version {version!r} is published; leave it out for the live one",
                field="version",
            ) from error

    def _load(self, version: str) -> LocalSelector:
        with self._loading:  # a version that many requests name at once is read once
            with self._lock:
                loaded = self._loaded.get(version)
            if loaded is None:
                registry = self._versions.registry
                loaded = registry.load(version, self._slm, self._tokenizer_digest)
            with self._lock:
                self._loaded[version] = loaded
                self._loaded.move_to_end(version)
                self._drop_spare(version)
            return loaded

    def _drop_spare(self, newest: str) -> None:
        serving = self._serving.selectors
        spare = [name for name in self._loaded if name not in serving and name != newest]
        for name in spare[: max(0, len(spare) - MAX_SPARE)]:
            del self._loaded[name]

    def _created_at(self, version: str | None) -> float:
        if version is None:
            return 0.0
        try:
            return self._versions.registry.manifest(version).created_at
        except VersionError:  # its folder has gone since it was loaded
            return 0.0

    # -- refusals ---------------------------------------------------------------------------------

    def _refuse(self, version: str, error: S2TError) -> None:
        reason = str(error)
        known = self._refusals.get(version)
        if known is None or known.reason != reason:
            log.error("version refused, %s keeps serving: %s", self._live_name, reason)
        self._refusals[version] = _Refusal(reason, time.monotonic() + RETRY_S)

    def _forget_refusals(self, wanted: Live) -> None:
        """Drop refusals of versions that are no longer wanted."""
        current = {wanted.version}
        if wanted.canary is not None:
            current.add(wanted.canary.version)
        self._refusals = {name: why for name, why in self._refusals.items() if name in current}

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 - one bad version must not hide the next one
                log.exception("following the registry failed; %s keeps serving", self._live_name)

    @property
    def _live_name(self) -> str:
        return self.live_version or "no local selector"


def _describe(state: Live) -> str:
    live = state.version or "none"
    canary = state.canary
    return f"{live} (canary {canary.version}, {canary.share:g})" if canary is not None else live
