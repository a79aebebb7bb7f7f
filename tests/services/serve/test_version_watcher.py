"""Which local selector a request gets while versions are promoted, damaged and swapped."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.model.local_selector import SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.registry import Registry
from services.serve.version_watcher import VersionWatcher
from tests.helpers.versions import BAD_VERSIONS, WEIGHTS, publish


@pytest.fixture(scope="module")
def runtime(models: dict[str, Path]) -> ModelRuntime:
    return ModelRuntime.load(str(models["slm"]))


@pytest.fixture
def versions(tmp_path: Path) -> LiveVersions:
    return LiveVersions(tmp_path / "versions")


@pytest.fixture
def registry(versions: LiveVersions) -> Registry:
    return versions.registry


@pytest.mark.parametrize("case", BAD_VERSIONS)
def test_bad_versions_are_refused_and_the_old_one_serves(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime, case: str
) -> None:
    """Ten kinds of bad version and more: asked for by name it is refused with its reason; forced
    into LIVE, live or as the canary, the one before keeps serving every request."""
    spoil, message = BAD_VERSIONS[case]
    good, bad = publish(registry, runtime), publish(registry, runtime, seed=1)
    versions.promote(good)
    watcher = VersionWatcher(versions, runtime, "tok")
    serving = watcher.lookup(None)
    assert serving is not None
    assert serving.version == good
    spoil(registry.root / bad)
    with pytest.raises(VersionError, match=message):
        asyncio.run(watcher.obtain(bad))
    for content in (
        {"history": [good, bad]},
        {"history": [good], "canary": {"version": bad, "share": 0.9}},
    ):
        (registry.root / "LIVE").write_text(json.dumps(content), encoding="utf-8")
        watcher.refresh()
        assert watcher.lookup(None) is serving
        assert (watcher.canary_version, watcher.canary_share) == ("", 0.0)
        assert all(watcher.choose(str(i)) is serving for i in range(50))


@pytest.mark.parametrize("content", ["garbage", "{}"])
def test_a_damaged_pointer_changes_nothing(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime, content: str
) -> None:
    """Proposers keep what they have."""
    version = publish(registry, runtime)
    versions.promote(version)
    watcher = VersionWatcher(versions, runtime, "tok")
    (registry.root / "LIVE").write_text(content, encoding="utf-8")
    watcher.refresh()
    assert watcher.live_version == version
    versions.promote(version)
    watcher.refresh()
    assert watcher.live_version == version


def test_a_refused_version_serves_once_it_is_sound(
    versions: LiveVersions,
    registry: Registry,
    runtime: ModelRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shared storage may show the files late: a refused version is tried again, but not at every
    look."""
    monkeypatch.setattr("services.serve.version_watcher.RETRY_S", 0.5)
    monkeypatch.setattr("services.serve.version_watcher.WATCH_S", 1000)
    good, late = publish(registry, runtime), publish(registry, runtime, seed=1)
    versions.promote(good)
    versions.promote(late)
    weights = registry.folder(late) / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    (registry.root / "LIVE").write_text(json.dumps({"history": [good]}), encoding="utf-8")
    watcher = VersionWatcher(versions, runtime, "tok")
    (registry.root / "LIVE").write_text(json.dumps({"history": [good, late]}), encoding="utf-8")
    watcher.refresh()
    weights.write_bytes(content)
    watcher.refresh()
    assert watcher.live_version == good
    time.sleep(0.6)
    watcher.refresh()
    assert watcher.live_version == late


def choices(watcher: VersionWatcher, ids: Sequence[str]) -> list[str]:
    chosen = [watcher.choose(i) for i in ids]
    return [local_selector.version if local_selector else "" for local_selector in chosen]


def test_canary_gets_its_share_and_a_retry_the_same_version(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime
) -> None:
    old, new = publish(registry, runtime), publish(registry, runtime, seed=1)
    versions.promote(old)
    versions.promote(new, 0.2)
    here, there = (VersionWatcher(versions, runtime, "tok") for _ in range(2))
    assert (here.canary_version, here.canary_share) == (new, 0.2)
    assert here.live_version == old
    ids = [f"request-{i}" for i in range(4000)]
    chosen = choices(here, ids)
    assert chosen == choices(there, ids) == choices(here, ids)
    assert 0.17 < chosen.count(new) / len(ids) < 0.23
    assert set(chosen) == {old, new}
    versions.promote(new, 0.6)
    here.refresh()
    wider = choices(here, ids)
    pairs = zip(chosen, wider, strict=True)
    assert all(after == new for before, after in pairs if before == new)  # the share grows
    versions.rollback()
    here.refresh()
    assert set(choices(here, ids)) == {old}
    assert here.lookup(new) is not None  # a running answer keeps its own


def test_versions_in_use_stay_loaded(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime
) -> None:
    """Live and canary are never pushed out by requests that name others, and memory is bounded."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(9)]
    versions.promote(names[0])
    versions.promote(names[1], 0.5)
    watcher = VersionWatcher(versions, runtime, "tok")
    for name in names:
        assert asyncio.run(watcher.obtain(name)) is watcher.lookup(name)
    assert sum(is_loaded(watcher, name) for name in names) <= 7
    assert watcher.lookup(names[0]) is watcher.lookup(None)
    assert watcher.lookup(names[1]) is not None
    with pytest.raises(VersionNotFoundError, match="'v0099-x' is published") as unknown:
        asyncio.run(watcher.obtain("v0099-x"))
    assert not any(name in str(unknown.value) for name in names), "clients learn no other names"


def is_loaded(watcher: VersionWatcher, version: str) -> bool:
    try:
        return watcher.lookup(version) is not None
    except VersionNotFoundError:
        return False


def test_a_version_pushed_out_of_memory_stays_itself(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime
) -> None:
    """What a request was given is still that version after many others were asked for, and can be
    asked for anew."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(8)]
    versions.promote(names[0])
    watcher = VersionWatcher(versions, runtime, "tok")
    held = asyncio.run(watcher.obtain(names[1]))
    for name in names[2:]:
        asyncio.run(watcher.obtain(name))
    with pytest.raises(VersionNotFoundError, match=names[1]):
        watcher.lookup(names[1])
    again = asyncio.run(watcher.obtain(names[1]))
    assert held.version == again.version == names[1]
    assert again is not held


def test_no_request_is_without_a_version_while_versions_are_swapped(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime
) -> None:
    """What was chosen can be looked up, at any moment of 60 swaps by the watcher's own code."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(3)]
    versions.promote(names[0])
    watcher = VersionWatcher(versions, runtime, "tok")

    def swap() -> None:
        for i in range(60):
            versions.promote(names[i % 3])
            watcher.refresh()

    async def swaps_and_requests() -> int:
        swapping = asyncio.create_task(asyncio.to_thread(swap))
        asked = 0
        while not swapping.done():
            chosen = watcher.choose(f"{asked}")
            assert chosen is not None
            assert await watcher.obtain(chosen.version) is not None
            asked += 1
            await asyncio.sleep(0)
        await swapping
        return asked

    assert asyncio.run(swaps_and_requests()) > 60
