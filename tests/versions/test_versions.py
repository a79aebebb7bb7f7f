"""Versions: publication that no crash can spoil, ten kinds of bad version refused while the old one
serves, the canary, the gate, the model card and the exports."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from s2t_shared.errors import ConfigError, ModelLoadError, VersionError, VersionNotFoundError
from s2t_shared.files import sha256_file
from s2t_shared.model.local_selector import Reading, Scoring, SelectorKind
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.statistics import Z95, clustered_difference, paired_difference, t95
from s2t_shared.versions.export import export_adapter, export_merged
from s2t_shared.versions.gate import GateSettings, Paired, Verdict, judge
from s2t_shared.versions.manifest import changes
from s2t_shared.versions.registry import Canary, Registry
from services.cli.versions import versions_app
from services.serve.version_watcher import VersionWatcher
from tests.helpers.versions import edit_manifest, make_local_selector, manifest_of, publish, rehash

ROOT = Path(__file__).parents[2]
WEIGHTS, CONFIG, BINS = "adapter_model.safetensors", "adapter_config.json", "bins.safetensors"


@pytest.fixture(scope="module")
def runtime(models: dict[str, Path]) -> ModelRuntime:
    return ModelRuntime.load(str(models["slm"]))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "versions")


# -- publication ----------------------------------------------------------------------------------


def test_a_version_holds_card_and_extra_files_all_hashed(
    registry: Registry, runtime: ModelRuntime
) -> None:
    selector = make_local_selector(runtime)
    done = registry.publish(
        selector, manifest_of(runtime, selector), {"curve.json": b"[1]", "curve.svg": b"<svg/>"}
    )
    folder = registry.folder(done.version)
    assert (
        set(done.files)
        == {p.name for p in folder.iterdir()} - {"manifest.json"}
        == {WEIGHTS, CONFIG, BINS, "README.md", "curve.json", "curve.svg"}
    )
    assert all(sha256_file(folder / name) == digest for name, digest in done.files.items())
    (folder / "curve.json").write_bytes(b"[2]")
    with pytest.raises(VersionError, match="curve.json does not match its hash"):
        registry.verify(done.version)


def test_publish_load_promote_rollback(registry: Registry, runtime: ModelRuntime) -> None:
    """What is read back is what was published."""
    assert registry.names() == [] and registry.live() is None
    selector = make_local_selector(runtime)
    first = registry.publish(selector, manifest_of(runtime, selector)).version
    second = publish(registry, runtime, seed=1)
    assert registry.names() == [first, second] and first.startswith("v0001-joint-base-")
    loaded = registry.load(first, runtime, "tok")
    assert (loaded.version, loaded.kind, loaded.reads) == (first, SelectorKind.JOINT, Reading.BASE)
    assert loaded.adapter is not None and selector.adapter is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.adapter.parameters(), selector.adapter.parameters(), strict=True)
    )
    assert loaded.bin_deltas is not None and torch.equal(loaded.bin_deltas, selector.bin_deltas)
    registry.promote(first)
    registry.promote(second)
    assert registry.live() == second
    assert registry.rollback() == first and registry.live() == first
    assert registry.rollback() is None and registry.live() is None
    with pytest.raises(VersionError, match="nothing to roll back"):
        registry.rollback()


def test_versions_of_strange_names_are_not_found(registry: Registry, runtime: ModelRuntime) -> None:
    publish(registry, runtime)
    for name in ("", ".", "..", "../versions", "v0001", "/etc/passwd"):
        for use in (registry.verify, registry.promote, registry.manifest, registry.folder):
            with pytest.raises(VersionNotFoundError):
                use(name)


@pytest.mark.parametrize(
    "content",
    [
        "garbage",
        "[]",
        "{}",
        '{"history": 3}',
        '{"history": [], "canary": {"share": 1}}',
        '{"history": ["a"], "canary": {"version": "b", "share": 7}}',
    ],
)
def test_damaged_live_pointer_is_an_error_and_can_be_mended(
    registry: Registry, runtime: ModelRuntime, content: str
) -> None:
    """Proposers keep what they have; promoting again mends it."""
    version = publish(registry, runtime)
    registry.promote(version)
    selectors = VersionWatcher(registry, runtime, "tok")
    (registry.root / "LIVE").write_text(content, encoding="utf-8")
    with pytest.raises(VersionError, match="LIVE file is damaged"):
        registry.live()
    selectors.refresh()
    assert selectors.live_version == version
    registry.promote(version)
    assert registry.live() == version


def test_a_job_publishes_once(registry: Registry, runtime: ModelRuntime) -> None:
    """A training job that runs again after a crash finds what it published, whatever else came
    between."""
    assert registry.find_job("job-7") is None
    first = publish(registry, runtime, job="job-7")
    publish(registry, runtime, seed=1)
    before = sorted(p.name for p in registry.root.iterdir())
    assert publish(registry, runtime, seed=2, job="job-7") == first
    assert sorted(p.name for p in registry.root.iterdir()) == before and len(registry.names()) == 2
    found = registry.find_job("job-7")
    assert found is not None and found.version == first


def test_versions_are_ordered_beyond_four_digits(registry: Registry, runtime: ModelRuntime) -> None:
    folder = registry.folder(publish(registry, runtime))
    folder.rename(folder.with_name("v9999-joint-base-x"))
    assert publish(registry, runtime, seed=1).startswith("v10000-")
    assert publish(registry, runtime, seed=2).startswith("v10001-")
    assert [name.split("-")[0] for name in registry.names()] == ["v9999", "v10000", "v10001"]


def test_manifests_of_the_first_schema_still_load(
    registry: Registry, runtime: ModelRuntime
) -> None:
    folder = registry.folder(publish(registry, runtime))
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("job", "scoring", "standardise", "schema_version"):
        del content[name]
    content["files"] = {
        name: digest for name, digest in content["files"].items() if name != "README.md"
    }
    (folder / "manifest.json").write_text(
        json.dumps(content | {"schema_version": 1}), encoding="utf-8"
    )
    assert registry.load(folder.name, runtime, "tok").adapter is not None
    assert registry.manifest(folder.name).scoring is Scoring.EXPECTED


def test_scoring_is_kept(registry: Registry, runtime: ModelRuntime) -> None:
    """The settings of the reserved score come back as they were published, and the card says
    them."""
    version = publish(
        registry, runtime, SelectorKind.RESERVED, scoring=Scoring.BINARY, standardise=True
    )
    loaded = registry.load(version, runtime, "tok")
    assert loaded.scoring is Scoring.BINARY and loaded.standardise
    assert "logit of the second of 16" in (registry.folder(version) / "README.md").read_text(
        encoding="utf-8"
    )


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
from s2t_shared.versions.registry import Registry
from s2t_shared.model.runtime import ModelRuntime
from tests.helpers.versions import make_local_selector, manifest_of
torch.set_num_threads(1)
runtime, registry = ModelRuntime.load(sys.argv[1]), Registry(Path(sys.argv[2]))
print("ready", flush=True)
for seed in range(1000):
    selector = make_local_selector(runtime, seed=seed)
    version = registry.publish(selector, manifest_of(runtime, selector, job=f"{sys.argv[3]}-{seed}")).version
    registry.promote(version)
    print(version, flush=True)
"""


def test_killed_publishers_leave_nothing_to_repair(
    runtime: ModelRuntime, models: dict[str, Path], tmp_path: Path
) -> None:
    """Publish and promote in other processes, killed at random moments: every version that is ever
    listed is whole, what was reported as published stays, LIVE is always readable, and the next
    writer sweeps the rest."""
    registry, moments, reported = Registry(tmp_path / "versions"), random.Random(3), set()
    for turn in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(models["slm"]), str(registry.root), str(turn)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        end = time.monotonic() + moments.uniform(0.01, 0.3)
        while time.monotonic() < end:
            for name in registry.names():
                registry.verify(name)
            registry.state()
        process.send_signal(signal.SIGKILL)
        reported |= set(process.stdout.read().split())
        process.wait()
        assert reported <= set(registry.names())
        for name in registry.names():
            registry.verify(name)
        assert registry.live() is None or registry.live() in registry.names()
    last = publish(registry, runtime, seed=99)
    registry.promote(last)
    assert len(reported) > 3 and registry.live() == last
    assert not [p for p in registry.root.iterdir() if p.name.startswith((".publishing", ".LIVE"))]
    assert registry.events(last)[-1]["event"] == "live"


def test_half_a_line_of_a_dead_writer_hides_nothing(
    registry: Registry, runtime: ModelRuntime
) -> None:
    version = publish(registry, runtime)
    registry.record(version, Verdict(False, ("because",), {"n": 1.0}))
    with (registry.root / "promotions.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"at": 1, "ev')
    registry.promote(version)
    assert [(e["event"], e.get("reasons")) for e in registry.events(version)] == [
        ("gate", ["because"]),
        ("live", None),
    ]


# -- the live pointer -----------------------------------------------------------------------------


def test_canary_and_rollback(registry: Registry, runtime: ModelRuntime) -> None:
    a, b, c = (publish(registry, runtime, seed=i) for i in range(3))
    with pytest.raises(VersionError, match="no version is live"):
        registry.promote(a, 0.1)
    for share in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(VersionError, match="above 0"):
            registry.promote(a, share)
    registry.promote(a)
    with pytest.raises(VersionError, match="its own canary"):
        registry.promote(a, 0.5)
    registry.promote(b, 0.1)
    state = registry.state()
    assert (state.version, state.canary) == (a, Canary(b, 0.1))
    assert [state.share(v) for v in (a, b, c)] == [0.9, 0.1, 0.0]
    assert registry.rollback() == a and registry.state().canary is None  # first ends the canary
    registry.promote(b, 0.1)
    registry.promote(b)  # the canary goes fully live
    assert registry.state().canary is None and registry.live() == b
    registry.promote(c, 0.5)
    registry.promote(b)  # promoting what is live ends the canary too
    assert registry.state().canary is None and registry.state().history == (a, b)
    assert registry.rollback() == a


def test_a_pointer_that_cannot_be_read_is_not_started_anew(
    registry: Registry, runtime: ModelRuntime
) -> None:
    """Storage that fails for a moment says nothing about the file's content: what was live is not
    forgotten."""
    a, b = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(a)
    pointer = registry.root / "LIVE"
    pointer.rename(registry.root / "kept")
    pointer.mkdir()  # reading it is an OSError, for root too
    for call in (
        registry.state,
        registry.live,
        registry.rollback,
        lambda: registry.promote(b),
        lambda: registry.promote(b, 0.5),
        lambda: registry.objection(b),
    ):
        with pytest.raises(VersionError, match="cannot be read"):
            call()
    pointer.rmdir()
    (registry.root / "kept").rename(pointer)
    registry.promote(b)
    assert registry.state().history == (a, b)


def test_rollback_to_a_damaged_version_is_refused(
    registry: Registry, runtime: ModelRuntime
) -> None:
    a, b = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(a)
    registry.promote(b)
    (registry.folder(a) / WEIGHTS).write_bytes(b"x")
    with pytest.raises(VersionError, match="hash"):
        registry.rollback()
    assert registry.live() == b


# -- serving --------------------------------------------------------------------------------------


def spoil_tensor(
    folder: Path, spoil: Callable[[torch.Tensor], torch.Tensor], side: str = "lora_B"
) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if side in n)
    tensors[name] = spoil(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    rehash(folder)


def escape(folder: Path) -> None:
    outside = folder.parent.parent / "outside.json"
    outside.write_text("{}", encoding="utf-8")
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    edit_manifest(folder, files=files | {"../../outside.json": sha256_file(outside)})


BAD_VERSIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda f: spoil_tensor(f, lambda t: t * float("nan")), "NaN or infinite"),
    "shape": (lambda f: spoil_tensor(f, lambda t: t[:-1]), "do not fit rank"),
    "base model": (lambda f: edit_manifest(f, slm_digest="other"), "another SLM"),
    "tokenizer": (lambda f: edit_manifest(f, tokenizer_digest="other"), "another tokenizer"),
    "truncated": (
        lambda f: ((f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), rehash(f)),
        "cannot be read",
    ),
    "hash": (
        lambda f: (f / BINS).write_bytes((f / BINS).read_bytes()[:-1] + b"\x01"),
        "does not match its hash",
    ),
    "rank": (lambda f: spoil_tensor(f, lambda t: torch.cat([t, t]), "lora_A"), "rank"),
    "no reserved rows": (lambda f: ((f / BINS).unlink(), rehash(f)), "bins.safetensors is missing"),
    "pickle": (to_pickle, "not a safetensors or data file"),
    "path escape": (escape, "place elsewhere"),
    "symlink": (
        lambda f: ((f / BINS).rename(f.parent / "b"), (f / BINS).symlink_to(f.parent / "b")),
        "elsewhere",
    ),
    "future schema": (lambda f: edit_manifest(f, schema_version=99, surprise=1), "schema 99"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no version"),
    "manifest not JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json is broken",
    ),
    "unknown field": (lambda f: edit_manifest(f, surprise=1), "manifest.json is broken"),
    "bins": (lambda f: edit_manifest(f, bins=8), "of shape"),
    "temperature": (lambda f: edit_manifest(f, temperature=0.0), "manifest.json is broken"),
}


@pytest.mark.parametrize("case", BAD_VERSIONS)
def test_bad_versions_are_refused_and_the_old_one_serves(
    registry: Registry, runtime: ModelRuntime, case: str
) -> None:
    """Ten kinds of bad version and more: asked for by name it is refused with its reason; forced
    into LIVE, live or as the canary, the one before keeps serving every request."""
    spoil, message = BAD_VERSIONS[case]
    good, bad = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(good)
    selectors = VersionWatcher(registry, runtime, "tok")
    serving = selectors.lookup(None)
    assert serving is not None and serving.version == good
    spoil(registry.root / bad)
    with pytest.raises(VersionError, match=message):
        asyncio.run(selectors.obtain(bad))
    for content in (
        {"history": [good, bad]},
        {"history": [good], "canary": {"version": bad, "share": 0.9}},
    ):
        (registry.root / "LIVE").write_text(json.dumps(content), encoding="utf-8")
        selectors.refresh()
        assert selectors.lookup(None) is serving and selectors.canary == ("", 0.0)
        assert all(selectors.choose(str(i)) is serving for i in range(50))
    if case not in ("base model", "tokenizer", "shape"):  # those show beside the model only
        with pytest.raises(VersionError):
            registry.promote(bad)


def test_a_refused_version_serves_once_it_is_sound(
    registry: Registry, runtime: ModelRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared storage may show the files late: a refused version is tried again, but not at every
    look."""
    monkeypatch.setattr("services.serve.version_watcher.RETRY_S", 0.5)
    monkeypatch.setattr("services.serve.version_watcher.WATCH_S", 1000)
    good, late = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(good)
    registry.promote(late)
    weights = registry.folder(late) / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    registry._set(registry.state().__class__((good,)), {"event": "test"})
    selectors = VersionWatcher(registry, runtime, "tok")
    (registry.root / "LIVE").write_text(json.dumps({"history": [good, late]}), encoding="utf-8")
    selectors.refresh()
    weights.write_bytes(content)
    selectors.refresh()
    assert selectors.live_version == good
    time.sleep(0.6)
    selectors.refresh()
    assert selectors.live_version == late


def choices(selectors: VersionWatcher, ids: Sequence[str]) -> list[str]:
    return [s.version if (s := selectors.choose(i)) else "" for i in ids]


def test_canary_gets_its_share_and_a_retry_the_same_version(
    registry: Registry, runtime: ModelRuntime
) -> None:
    old, new = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(old)
    registry.promote(new, 0.2)
    here, there = (VersionWatcher(registry, runtime, "tok") for _ in range(2))
    assert here.canary == (new, 0.2) and here.live_version == old
    ids = [f"request-{i}" for i in range(4000)]
    chosen = choices(here, ids)
    assert chosen == choices(there, ids) == choices(here, ids)
    assert 0.17 < chosen.count(new) / len(ids) < 0.23 and set(chosen) == {old, new}
    registry.promote(new, 0.6)
    here.refresh()
    wider = choices(here, ids)
    assert all(
        after == new for before, after in zip(chosen, wider, strict=True) if before == new
    )  # the share grows
    registry.rollback()
    here.refresh()
    assert (
        set(choices(here, ids)) == {old} and here.lookup(new) is not None
    )  # a running answer keeps its own


def test_versions_in_use_stay_loaded(registry: Registry, runtime: ModelRuntime) -> None:
    """Live and canary are never pushed out by requests that name others, and memory is bounded."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(9)]
    registry.promote(names[0])
    registry.promote(names[1], 0.5)
    selectors = VersionWatcher(registry, runtime, "tok")
    for name in names:
        assert asyncio.run(selectors.obtain(name)) is selectors.lookup(name)
    assert len(selectors._loaded) <= 7
    assert (
        selectors.lookup(names[0]) is selectors.lookup(None)
        and selectors.lookup(names[1]) is not None
    )
    with pytest.raises(VersionNotFoundError):
        asyncio.run(selectors.obtain("v0099-x"))


def test_a_version_pushed_out_of_memory_stays_itself(
    registry: Registry, runtime: ModelRuntime
) -> None:
    """What a request was given is still that version after many others were asked for, and can be
    asked for anew."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(8)]
    registry.promote(names[0])
    selectors = VersionWatcher(registry, runtime, "tok")
    held = asyncio.run(selectors.obtain(names[1]))
    for name in names[2:]:
        asyncio.run(selectors.obtain(name))
    with pytest.raises(VersionNotFoundError, match=names[1]):
        selectors.lookup(names[1])
    again = asyncio.run(selectors.obtain(names[1]))
    assert held.version == again.version == names[1] and again is not held


def test_no_request_is_without_a_version_while_versions_are_swapped(
    registry: Registry, runtime: ModelRuntime
) -> None:
    """What was chosen can be looked up, at any moment of 60 swaps by the watcher's own code."""
    names = [publish(registry, runtime, SelectorKind.PREFIX, seed=i) for i in range(3)]
    registry.promote(names[0])
    selectors = VersionWatcher(registry, runtime, "tok")

    async def swaps_and_requests() -> int:
        swapping = asyncio.create_task(
            asyncio.to_thread(
                lambda: [(registry.promote(names[i % 3]), selectors.refresh()) for i in range(60)]
            )
        )
        asked = 0
        while not swapping.done():
            chosen = selectors.choose(f"{asked}")
            assert chosen is not None and await selectors.obtain(chosen.version) is not None
            asked += 1
            await asyncio.sleep(0)
        await swapping
        return asked

    assert asyncio.run(swaps_and_requests()) > 60


# -- the gate -------------------------------------------------------------------------------------


def paired(problems: int, per_problem: int, new: float, old: float, seed: int = 0) -> Paired:
    draw = random.Random(seed)
    names = [f"p{i}" for i in range(problems) for _ in range(per_problem)]
    return Paired([draw.random() < new for _ in names], [draw.random() < old for _ in names], names)


def test_clustered_interval_is_the_paired_one_for_single_items() -> None:
    a, b = [True, False, True, True, False] * 9, [False, False, True, False, True] * 9
    mean, half = clustered_difference(a, b, [str(i) for i in range(45)])
    naive, width = paired_difference(a, b)
    assert (mean, half) == pytest.approx((naive, width * t95(44) / Z95))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (19, 2.093),
        (44, 2.015),
        (99, 1.984),
        (10**6, 1.960),
    ],
)
def test_few_clusters_have_wider_intervals(degrees: int, quantile: float) -> None:
    """Student's t, from tables; and the interval is that many standard errors wide."""
    assert t95(degrees) == pytest.approx(quantile, abs=1e-3)
    n = degrees + 1
    if n <= 100:
        a = [i % 3 == 0 for i in range(n)]
        mean, half = clustered_difference(a, [False] * n, [str(i) for i in range(n)])
        assert half == pytest.approx(quantile * math.sqrt(mean * (1 - mean) / degrees), rel=1e-3)


def test_clustered_interval_knows_that_copies_are_no_evidence() -> None:
    """Each problem's labels ten times over: the same interval, where the naive one shrinks by a
    root of ten."""
    single = paired(40, 1, 0.7, 0.5)
    copied = Paired(
        *(
            tuple(x for x in values for _ in range(10))
            for values in (single.new, single.old, single.problems)
        )
    )
    assert clustered_difference(copied.new, copied.old, copied.problems) == pytest.approx(
        clustered_difference(single.new, single.old, single.problems)
    )
    assert clustered_difference([True], [False], ["a"]) == (1.0, float("inf"))
    assert clustered_difference([], [], []) == (0.0, float("inf"))


def test_clustered_interval_covers_the_truth() -> None:
    """95 % of intervals hold the true difference, with problems of unequal size and difficulty."""
    draw, covered = random.Random(1), 0
    for _ in range(400):
        new, old, problems = [], [], []
        for i in range(60):
            easy = draw.random()
            for _ in range(draw.randint(1, 8)):
                problems.append(str(i))
                new.append(draw.random() < min(1.0, 0.3 + 0.5 * easy + 0.1))
                old.append(draw.random() < 0.3 + 0.5 * easy)
        mean, half = clustered_difference(new, old, problems)
        covered += abs(mean - 0.1) <= half
    assert 0.91 <= covered / 400 <= 0.98


def test_the_gate_opens_for_a_clear_gain() -> None:
    verdict = judge(paired(200, 6, 0.85, 0.7), 0.01, paired(200, 1, 0.6, 0.6), "v0003")
    assert verdict.passed and len(verdict.reasons) == 3
    assert verdict.figures["difference_low"] > 0.1 and verdict.figures["labels"] == 1200
    json.dumps(verdict.as_json())


def test_the_gate_says_why_it_refuses() -> None:
    labels = Paired(
        [True] * 812 + [False] * 189,
        [False] * 196 + [True] * 805,
        [f"p{i % 214}" for i in range(1001)],
    )
    verdict = judge(labels, None, against="v0003")
    assert not verdict.passed
    assert verdict.reasons[0].startswith(
        "held-out Agree@1 .811 against .804 of v0003: difference +.007, 95 % interval"
    )
    assert "(1,001 labels of 214 problems)" in verdict.reasons[0]
    noise = judge(paired(100, 3, 0.72, 0.7, seed=1), None, against="v0003")
    assert not noise.passed and "not above 0" in noise.reasons[0]
    regression = judge(paired(200, 6, 0.6, 0.7), None, against="v0003")
    assert not regression.passed and "difference -." in regression.reasons[0]


def test_few_labels_are_refused_for_being_few() -> None:
    verdict = judge(Paired([True] * 40, [False] * 40, [f"p{i % 5}" for i in range(40)]), None)
    assert (
        not verdict.passed
        and "more labels are needed: 40 held-out labels of 5 problems" in verdict.reasons[0]
    )
    assert not judge(Paired([], [], []), None).passed


def test_each_bound_refuses_alone() -> None:
    good = paired(200, 6, 0.85, 0.7)
    assert "LM-KL 0.5 nats" in judge(good, 0.5).reasons[0] and not judge(good, 0.5).passed
    assert not judge(good, float("nan")).passed
    worse = judge(good, None, paired(300, 1, 0.4, 0.6), "v0003")
    assert not worse.passed and "a significant loss" in worse.reasons[0] and len(worse.reasons) == 1
    little = Paired(
        [True] * 58 + [False] * 42, [False] * 40 + [True] * 60, [f"p{i}" for i in range(100)]
    )
    assert judge(good, None, little).passed
    strict = judge(good, None, little, settings=GateSettings(max_task_loss=0.01))
    assert not strict.passed and "a loss of .010 is not ruled out" in strict.reasons[0]
    assert not judge(good, None, settings=GateSettings(min_gain=0.3)).passed


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 30)), min_size=25, max_size=200)
)
def test_swapping_the_sides_mirrors_the_interval(items: list[tuple[bool, bool, int]]) -> None:
    a, b, problems = (
        [x for x, _, _ in items],
        [y for _, y, _ in items],
        [str(z) for _, _, z in items],
    )
    mean, half = clustered_difference(a, b, problems)
    mirrored, same = clustered_difference(b, a, problems)
    assert (
        mirrored == pytest.approx(-mean) and same == pytest.approx(half) and half >= 0 and Z95 > 1.9
    )
    if half > 0:  # at most one side can be significantly better
        assert not (
            judge(Paired(a, b, problems), None).passed
            and judge(Paired(b, a, problems), None).passed
        )


def test_a_regression_is_not_made_live(registry: Registry, runtime: ModelRuntime) -> None:
    """The gate's verdict stands beside the version, and the one before serves."""
    good, worse = publish(registry, runtime), publish(registry, runtime, seed=1)
    registry.promote(good)
    verdict = judge(paired(200, 6, 0.6, 0.7), None, against=good)
    registry.record(worse, verdict)
    if verdict.passed:
        registry.promote(worse)
    selectors = VersionWatcher(registry, runtime, "tok")
    assert selectors.live_version == good
    event = registry.events(worse)[-1]
    assert (
        event["event"] == "gate"
        and event["passed"] is False
        and "not above 0" in event["reasons"][0]
    )
    assert event["figures"]["difference"] < 0


# -- the model card -------------------------------------------------------------------------------


def test_model_card_is_hugging_faces(registry: Registry, runtime: ModelRuntime) -> None:
    version = publish(registry, runtime)
    card = ModelCard.load(registry.folder(version) / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("acme/tiny-slm", "adapter")
    assert card.data.library_name == "peft" and {"lora", "kind-joint"} <= set(card.data.tags)
    assert card.data.license is None and card.data.datasets is None
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured == {"agree_at_1": 0.812, "slm_agree_at_1": 0.7, "spearman": 0.5, "lm_kl": 0.01}
    assert card.data.model_name == version
    for text in (
        "1,201 labels",
        "snap1",
        "0.0005",
        "9,000",
        "held out",
        "## Limits",
        BINS,
        runtime.digest,
    ):
        assert text in card.text, text


def test_model_card_shows_no_folder_of_ours(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path]
) -> None:
    version = publish(
        registry,
        runtime,
        SelectorKind.PREFIX,
        base_model=str(models["slm"]),
        metrics={},
        training={},
    )
    card = ModelCard.load(registry.folder(version) / "README.md")
    assert card.data.base_model is None and str(models["slm"].parent) not in card.content
    assert BINS not in card.text and "Nothing was measured" in card.text


# -- exports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("slm", SelectorKind.PREFIX),
        ("slm", SelectorKind.JOINT),
        ("qwen2_tied", SelectorKind.JOINT),
        ("padding", SelectorKind.RESERVED),
        ("virtual", SelectorKind.RESERVED),
        ("gemma2", SelectorKind.PREFIX),
    ],
)
def test_merged_export_is_the_adapted_model(
    models: dict[str, Path], registry: Registry, tmp_path: Path, model: str, kind: SelectorKind
) -> None:
    """Plain Hugging Face logits of the exported folder == ours with the adapter on; its reserved
    rows == the reserved logits; text rows of a tied head stay as they were."""
    runtime = ModelRuntime.load(str(models[model]))
    reserved = tuple(range(48, 64))
    selector = make_local_selector(runtime, kind, reserved=reserved)
    version = registry.publish(
        selector, manifest_of(runtime, selector, base_model=str(models[model]))
    ).version
    folder = tmp_path / "merged"
    done = export_merged(registry.folder(version), str(models[model]), folder)
    tokens = [5, 9, 30, 7, 41, 12]
    row = runtime.pool.allocate(tokens, 16)
    assert row is not None
    _ = runtime.switch
    hidden, _ = runtime.forward(
        [Segment(slot=row, token_ids=tokens, start=0, adapter=selector.adapter)]
    )
    ours, bins = (
        runtime.logits(hidden),
        runtime.reserved_logits(hidden, reserved, selector.bin_deltas),
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = plain(torch.tensor([tokens])).logits[0].float()
    text = [i for i in range(runtime.vocab_rows) if i not in reserved]
    assert torch.allclose(theirs[:, text], ours[:, text], atol=1e-5)
    if kind is not SelectorKind.PREFIX:
        assert torch.allclose(theirs[:, list(reserved)], bins, atol=1e-4)
        assert set(reserved) <= set(plain.generation_config.suppress_tokens)
    assert (kind is not SelectorKind.PREFIX and model == "qwen2_tied") == any(
        "tied" in n for n in done.notes
    )
    assert (model == "virtual") == any("rows of their own" in n for n in done.notes)
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= {p.name for p in folder.iterdir()}
    again = ModelRuntime.load(str(folder))  # and the service takes it as its SLM
    assert again.vocab_rows == max(runtime.vocab_rows, 64 if kind is not SelectorKind.PREFIX else 0)


def test_exports_never_overwrite(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path], tmp_path: Path
) -> None:
    version = registry.folder(publish(registry, runtime))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine", encoding="utf-8")
    for export in (
        lambda f: export_adapter(version, f),
        lambda f: export_merged(version, str(models["slm"]), f),
    ):
        with pytest.raises(ConfigError, match="not an empty folder"):
            export(tmp_path / "full")
        with pytest.raises(ConfigError, match="cannot write"):
            export(tmp_path / "full/x")
    with pytest.raises(VersionError, match="another SLM"):
        export_merged(version, str(models["qwen2"]), tmp_path / "new")
    spare = tmp_path / "spare"
    shutil.copytree(models["slm"], spare)
    (spare / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(
        ModelLoadError, match="cannot be loaded"
    ):  # fails half way: nothing is left behind
        export_merged(version, str(spare), tmp_path / "new")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "spare", "versions"]


def test_exported_adapter_loads_in_peft(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    export_adapter(registry.folder(publish(registry, runtime)), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["slm"]), tmp_path / "adapter"
    )
    assert any("lora_B" in name for name, _ in loaded.named_parameters())
    assert (tmp_path / "adapter" / BINS).is_file() and (tmp_path / "adapter/README.md").is_file()


# -- the command line -----------------------------------------------------------------------------


def s2t_versions(registry: Registry, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(versions_app, [*arguments, "--data-dir", str(registry.root.parent)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_verbs(
    registry: Registry, runtime: ModelRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert {
        c.name or c.callback.__name__ for c in versions_app.registered_commands if c.callback
    } == {"list", "show", "verify", "diff", "promote", "rollback", "export"}  # scripts rely on them
    assert "no versions" in s2t_versions(registry, "list")[1]
    a = publish(registry, runtime)
    b = publish(
        registry,
        runtime,
        seed=1,
        snapshot="snap2",
        metrics={"agree_at_1": 0.832, "slm_agree_at_1": 0.7},
    )
    with pytest.raises(VersionError, match="no version is live"):
        s2t_versions(registry, "show", "live")
    assert s2t_versions(registry, "promote", a) == (0, f"live: {a}\n")
    assert "10% of the requests" in s2t_versions(registry, "promote", b, "--share", "0.1")[1]
    status, text = s2t_versions(registry, "list")
    assert status == 0 and "90%" in text and "10%" in text and "0.832" in text
    rows = json.loads(s2t_versions(registry, "list", "--json")[1])
    assert [(r["version"], r["live"], r["share"]) for r in rows] == [
        (a, True, 0.9),
        (b, False, 0.1),
    ]
    found = json.loads(s2t_versions(registry, "diff", "live", b, "--json")[1])
    changed = {(c["section"], c["name"]): c["difference"] for c in found}
    assert (
        changed[("metrics", "agree_at_1")] == pytest.approx(0.02)
        and ("data", "snapshot") in changed
    )
    assert ("files", WEIGHTS) in changed and ("settings", "kind") not in changed
    assert "+0.02" in s2t_versions(registry, "diff", a, b)[1]
    registry.record(b, judge(paired(200, 6, 0.6, 0.7), None, against=a))
    assert "gate: refused: held-out Agree@1" in s2t_versions(registry, "show", b)[1]
    assert s2t_versions(registry, "rollback") == (0, f"live: {a}\n")
    assert s2t_versions(registry, "verify")[0] == 0
    (registry.folder(b) / WEIGHTS).write_bytes(b"x")
    status, text = s2t_versions(registry, "verify", "all")
    assert status == 1 and f"ok  {a}" in text and f"FAIL  {b}: " in text and "hash" in text
    assert (
        s2t_versions(registry, "export", a, str(tmp_path / "out"))[0] == 0
        and (tmp_path / "out" / BINS).is_file()
    )


def test_verify_with_the_model_and_export_merged(
    registry: Registry,
    runtime: ModelRuntime,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S2T_SLM__MODEL", str(models["slm"]))
    version = publish(registry, runtime)
    status, text = s2t_versions(registry, "verify", version, "--model")
    assert status == 1 and "another tokenizer" in text  # "tok" is nobody's digest
    status, text = s2t_versions(registry, "export", version, str(tmp_path / "m"), "--merged")
    assert status == 0 and "reserved bins" in text and (tmp_path / "m/model.safetensors").is_file()


def test_no_difference_between_a_version_and_itself(
    registry: Registry, runtime: ModelRuntime
) -> None:
    manifest = registry.manifest(publish(registry, runtime))
    assert changes(manifest, manifest) == []
    assert hashlib.sha256(b"").hexdigest() not in manifest.files.values()
