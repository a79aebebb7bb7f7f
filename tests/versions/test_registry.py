"""Publication that no crash can spoil, and checks before every use."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import sha256_file
from s2t_shared.model.local_selector import Reading, Scoring, SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.manifest import MANIFEST
from s2t_shared.versions.registry import Registry
from tests.faults.figures import sizes
from tests.helpers.versions import (
    BAD_VERSIONS,
    BINS,
    CONFIG,
    SHOW_BESIDE_THE_MODEL_ONLY,
    WEIGHTS,
    make_local_selector,
    manifest_of,
    publish,
)

ROOT = Path(__file__).parents[2]


def test_a_version_holds_card_and_extra_files_all_hashed(
    registry: Registry, runtime: ModelRuntime
) -> None:
    selector = make_local_selector(runtime)
    done = registry.publish(
        selector, manifest_of(runtime, selector), {"curve.json": b"[1]", "curve.svg": b"<svg/>"}
    )
    folder = registry.folder(done.version)
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(done.files) == names
    assert names == {WEIGHTS, CONFIG, BINS, "README.md", "curve.json", "curve.svg"}
    assert all(sha256_file(folder / name) == digest for name, digest in done.files.items())
    (folder / "curve.json").write_bytes(b"[2]")
    with pytest.raises(VersionError, match="curve.json does not match its hash"):
        registry.verify(done.version)


def test_what_is_loaded_is_what_was_published(registry: Registry, runtime: ModelRuntime) -> None:
    assert registry.names() == []
    selector = make_local_selector(runtime)
    first = registry.publish(selector, manifest_of(runtime, selector)).version
    second = publish(registry, runtime, seed=1)
    assert registry.names() == [first, second]
    assert first.startswith("v0001-joint-base-")
    loaded = registry.load(first, runtime, "tok")
    assert (loaded.version, loaded.kind, loaded.reads) == (first, SelectorKind.JOINT, Reading.BASE)
    assert loaded.adapter is not None
    assert selector.adapter is not None
    pairs = zip(loaded.adapter.parameters(), selector.adapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.bin_deltas is not None
    assert torch.equal(loaded.bin_deltas, selector.bin_deltas)


@pytest.mark.parametrize("case", BAD_VERSIONS)
def test_bad_versions_are_refused(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime, case: str
) -> None:
    """Ten kinds of bad version and more: none is loaded, and none is promoted whose fault shows
    without the model."""
    spoil, message = BAD_VERSIONS[case]
    bad = publish(registry, runtime)
    spoil(registry.root / bad)
    with pytest.raises(VersionError, match=message):
        registry.load(bad, runtime, "tok")
    if case not in SHOW_BESIDE_THE_MODEL_ONLY:
        with pytest.raises(VersionError):
            versions.promote(bad)


def test_versions_of_strange_names_are_not_found(
    versions: LiveVersions, registry: Registry, runtime: ModelRuntime
) -> None:
    publish(registry, runtime)
    for name in ("", ".", "..", "../versions", "v0001", "/etc/passwd"):
        for use in (registry.verify, versions.promote, registry.manifest, registry.folder):
            with pytest.raises(VersionNotFoundError):
                use(name)


def test_a_long_list_of_versions_is_not_told(tmp_path: Path) -> None:
    """300 names in one text were more than gRPC's metadata may hold."""
    for number in range(300):
        folder = tmp_path / f"v{number:04}-x"
        folder.mkdir()
        (folder / MANIFEST).write_text("{}")
    with pytest.raises(VersionNotFoundError, match="there are 300, the newest: v0290-x") as caught:
        Registry(tmp_path).folder("nope")
    assert "v0289-x" not in str(caught.value) and "v0299-x" in str(caught.value)


def test_a_job_publishes_once(registry: Registry, runtime: ModelRuntime) -> None:
    """A training job that runs again after a crash finds what it published, whatever else came
    between."""
    assert registry.find_job("job-7") is None
    first = publish(registry, runtime, job="job-7")
    publish(registry, runtime, seed=1)
    before = sorted(p.name for p in registry.root.iterdir())
    assert publish(registry, runtime, seed=2, job="job-7") == first
    assert sorted(p.name for p in registry.root.iterdir()) == before
    assert len(registry.names()) == 2
    found = registry.find_job("job-7")
    assert found is not None
    assert found.version == first


def test_versions_are_ordered_beyond_four_digits(registry: Registry, runtime: ModelRuntime) -> None:
    folder = registry.folder(publish(registry, runtime))
    folder.rename(folder.with_name("v9999-joint-base-x"))
    assert publish(registry, runtime, seed=1).startswith("v10000-")
    assert publish(registry, runtime, seed=2).startswith("v10001-")
    assert [name.split("-")[0] for name in registry.names()] == ["v9999", "v10000", "v10001"]


def test_scoring_is_kept(registry: Registry, runtime: ModelRuntime) -> None:
    """The settings of the reserved score come back as they were published, and the card says
    them."""
    version = publish(
        registry, runtime, SelectorKind.RESERVED, scoring=Scoring.BINARY, standardise=True
    )
    loaded = registry.load(version, runtime, "tok")
    assert loaded.scoring is Scoring.BINARY
    assert loaded.standardise
    assert not loaded.always_on
    card = (registry.folder(version) / "README.md").read_text(encoding="utf-8")
    assert "logit of the second of 16" in card


def test_an_always_on_version_says_so(registry: Registry, runtime: ModelRuntime) -> None:
    version = publish(registry, runtime, SelectorKind.PREFIX, always_on=True)
    assert registry.load(version, runtime, "tok").always_on
    card = (registry.folder(version) / "README.md").read_text(encoding="utf-8")
    assert "Always on: the adapter acts on every token" in card


def test_figures_that_are_no_numbers_are_left_out(
    registry: Registry, runtime: ModelRuntime
) -> None:
    version = publish(
        registry,
        runtime,
        metrics={"agree_at_1": 0.5, "spearman": float("nan"), "loss": float("inf")},
    )
    assert registry.manifest(version).metrics == {"agree_at_1": 0.5}


PUBLISHER = """
import sys, torch
from pathlib import Path
from s2t_shared.versions.live import LiveVersions
from s2t_shared.model.runtime import ModelRuntime
from tests.helpers.versions import make_local_selector, manifest_of
torch.set_num_threads(1)
runtime, versions = ModelRuntime.load(sys.argv[1]), LiveVersions(Path(sys.argv[2]))
print("ready", flush=True)
for seed in range(1000):
    selector = make_local_selector(runtime, seed=seed)
    manifest = manifest_of(runtime, selector, job=f"{sys.argv[3]}-{seed}")
    version = versions.registry.publish(selector, manifest).version
    versions.promote(version)
    print(version, flush=True)
"""


@pytest.mark.kill
@pytest.mark.parametrize("least", sizes([3], [12]))
def test_killed_publishers_leave_nothing_to_repair(
    versions: LiveVersions,
    registry: Registry,
    runtime: ModelRuntime,
    models: dict[str, Path],
    least: int,
) -> None:
    """Publish and promote in other processes, killed at random moments: every version that is ever
    listed is whole, what was reported as published stays, LIVE is always readable, and the next
    writer sweeps the rest."""
    moments = random.Random(3)
    reported: set[str] = set()
    for turn in range(20):
        # A busy machine publishes little before it is killed.
        if turn >= least and len(reported) > 3:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(models["slm"]), str(registry.root), str(turn)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        end = time.monotonic() + moments.uniform(0.01, 1.0)
        while time.monotonic() < end:
            for name in registry.names():
                registry.verify(name)
            versions.state()
        process.send_signal(signal.SIGKILL)
        reported |= set(process.stdout.read().split())
        process.wait()
        assert reported <= set(registry.names())
        for name in registry.names():
            registry.verify(name)
        assert versions.live() is None or versions.live() in registry.names()
    last = publish(registry, runtime, seed=99)
    versions.promote(last)
    assert len(reported) > 3
    assert versions.live() == last
    assert not [p for p in registry.root.iterdir() if p.name.startswith((".publishing", ".LIVE"))]
    assert versions.events(last)[-1]["event"] == "live"
