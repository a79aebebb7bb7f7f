"""The lake: what was acknowledged is there once, whatever was killed when; what was deleted is
nowhere."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from s2t_shared.errors import StoreError
from s2t_shared.labels import lake as lake_module
from s2t_shared.labels import shards as shards_module
from s2t_shared.labels.lake import Lake
from tests.faults.figures import sizes
from tests.helpers.lake import ids, label, names, rollout

ROOT = Path(__file__).parents[2]


# -- reading and writing --------------------------------------------------------------------------


def test_each_rollout_and_each_label_once(lake: Lake) -> None:
    lake.write([rollout(1), rollout(2), rollout(1)], "a")
    lake.write([rollout(2), replace(rollout(3), labels=(label("1-0"), label("new")))], "b")
    found = list(lake.rollouts())
    assert [r.rollout_id for r in found] == ["rollout-1", "rollout-2", "rollout-3"]
    assert [x.label_id for r in found for x in r.labels] == ["1-0", "1-1", "2-0", "2-1", "new"]
    assert (
        found[0].token_ids == (1, 2, 1, 4)
        and found[0].llm_top_rank == (0, -1)
        and found[0].entropy == (0.5, 0.25)
    )
    assert (
        sum(s.labels for s in lake.shards()) == 10 and sum(s.rollouts for s in lake.shards()) == 5
    )


def test_an_empty_lake_and_empty_writes(lake: Lake) -> None:
    assert (
        ids(lake) == [] and lake.shards() == [] and lake.deletions() == [] and lake.verify() == {}
    )
    lake.write([])
    assert lake.shards() == []
    with pytest.raises(StoreError, match="no labels"):
        lake.freeze()


def test_a_name_makes_writing_repeatable(lake: Lake) -> None:
    lake.write([rollout(1)], "part")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in lake.root.glob("shard-*"))
    lake.write([rollout(1)], "part")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in lake.root.glob("shard-*"))
    lake.delete("request_id", "request-1")
    lake.write(
        [replace(rollout(1), created_at=0.0), rollout(2)], "part"
    )  # the deleted one does not come back
    assert set(ids(lake)) == names(2)


def test_shards_stay_small(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake_module, "SHARD_ROLLOUTS", 10)
    monkeypatch.setattr(shards_module, "READ_ROWS", 4)
    lake.write([rollout(n) for n in range(25)])
    assert [s.rollouts for s in lake.shards()] == [10, 10, 5]
    assert pq.ParquetFile(lake.root / f"{lake.shards()[0].name}.parquet").num_row_groups == 3
    assert set(ids(lake)) == names(*range(25))


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain tries again and again; what it leaves each time would fill the disk that is already
    full."""
    lake.write([rollout(1)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {p.name for p in lake.root.iterdir()}
    for target in ("s2t_shared.labels.lake.os.fsync", "s2t_shared.labels.places.Folder.create"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(StoreError, match="No space left on device; free"):
                lake.write([rollout(2)])
        assert {p.name for p in lake.root.iterdir()} == before and lake.verify() == {}
    lake.write([rollout(2)])
    assert set(ids(lake)) == names(1, 2)


def test_a_file_size_limit_in_the_middle_of_a_shard(lake: Lake) -> None:
    lake.write([rollout(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="cannot be used"):
            lake.write(
                [
                    replace(
                        rollout(n),
                        token_ids=tuple(range(n, n + 2000)),
                        entropy=(),
                        kl=(),
                        llm_top_rank=(),
                    )
                    for n in range(50)
                ]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert ids(lake) == ["rollout-1"] and not list(lake.root.glob(".shard-*"))


# -- damage ---------------------------------------------------------------------------------------


def test_damage_is_found_named_and_can_be_put_aside(lake: Lake) -> None:
    for n in range(3):
        lake.write([rollout(n)], f"{n}")
    first, second, _ = (lake.root / s.name for s in lake.shards())
    content = first.with_suffix(".parquet").read_bytes()
    first.with_suffix(".parquet").write_bytes(
        content[:50] + bytes([content[50] ^ 1]) + content[51:]
    )
    second.with_suffix(".parquet").unlink()
    with pytest.raises(StoreError, match="does not match its manifest.*quarantine"):
        ids(lake)
    wrong = lake.verify()
    assert set(wrong) == {first.name, second.name} and "missing" in wrong[second.name]
    lake.quarantine(wrong)
    assert ids(lake) == ["rollout-2"] and lake.verify() == {}
    (lake.root / f"{lake.shards()[0].name}.json").write_text("{")
    with pytest.raises(StoreError, match="manifest of label shard .* is damaged"):
        lake.shards()


def test_another_schema_is_refused_with_the_way_out(lake: Lake) -> None:
    lake.write([rollout(1)])
    manifest = lake.root / f"{lake.shards()[0].name}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 1}))
    with pytest.raises(StoreError, match="has schema 1, this program reads 2, 3"):
        ids(lake)


# -- rewriting ------------------------------------------------------------------------------------


def test_compaction_keeps_everything_once(lake: Lake) -> None:
    for n in range(16):
        lake.write([rollout(n), rollout(n % 3)])
    before = sorted(lake.rollouts(), key=lambda r: r.rollout_id)
    assert lake.compact(17) == 0 and lake.compact() == 16
    [shard] = lake.shards()
    assert (shard.rollouts, shard.labels) == (16, 32)  # copies are gone
    assert sorted(lake.rollouts(), key=lambda r: r.rollout_id) == before
    assert len(list(lake.root.glob("shard-*"))) == 2 and lake.verify() == {}


def test_deleting_one_rollout_leaves_anothers_copy_of_a_label(lake: Lake) -> None:
    """Two requests with one prompt share labels; each has the right to its own deletion only."""
    for n in range(16):
        lake.write([replace(rollout(n), labels=(label("shared"),))])
    lake.compact()
    lake.delete("request_id", "request-0")
    assert [x.label_id for r in lake.rollouts() for x in r.labels] == ["shared"]


@pytest.mark.parametrize(
    ("field", "value"), [("problem_id", "p1"), ("request_id", "request-1"), ("task", "other")]
)
def test_deleted_here_in_snapshots_and_on_its_way(field: str, value: str, lake: Lake) -> None:
    doomed = replace(rollout(1), task="other")
    lake.write([doomed, rollout(2)])
    kept = lake.freeze()
    lake.write([rollout(3)])
    late = lake.freeze()
    assert lake.delete(field, value) == 1
    assert set(ids(lake)) == names(2, 3)
    for snapshot in (kept, late):
        with pytest.raises(StoreError, match="is gone"):
            lake.snapshot(snapshot.id)
    lake.write([doomed])  # was on its way
    assert set(ids(lake)) == names(2, 3)
    lake.write(
        [replace(doomed, created_at=time.time())]
    )  # asked again afterwards: not what was deleted
    assert set(ids(lake)) == names(1, 2, 3)
    assert value not in (lake.root / "deleted.jsonl").read_text()
    assert lake.delete(field, "nobody") == 0


def test_a_torn_deletion_was_no_promise_and_spoils_no_later_one(lake: Lake) -> None:
    lake.write([rollout(1), rollout(2)])
    lake.delete("request_id", "request-1")
    with (lake.root / "deleted.jsonl").open("a") as stream:
        stream.write('\n{"field": "request_id", "sha2')
    assert len(lake.deletions()) == 1
    lake.delete("request_id", "request-2")
    assert len(lake.deletions()) == 2 and ids(lake) == []


def test_retention_by_age_and_size(lake: Lake) -> None:
    for n, age in enumerate((40, 20, 0)):
        lake.write([replace(rollout(n), created_at=time.time() - age * 86_400)], f"{n}")
    old = lake.freeze()
    assert lake.prune() == 0 and len(ids(lake)) == 3
    assert lake.prune(max_age_s=30 * 86_400) == 1
    assert set(ids(lake)) == names(1, 2)
    with pytest.raises(StoreError, match="is gone"):
        lake.snapshot(old.id)
    newest = next(s for s in lake.shards() if s.name.startswith("shard-2"))
    assert lake.prune(max_bytes=newest.bytes) == 1
    assert set(ids(lake)) == names(2) and len(list(lake.root.glob("shard-*"))) == 2


def test_a_snapshot_stays_whatever_the_lake_does(lake: Lake) -> None:
    for n in range(16):
        lake.write([rollout(n)])
    snapshot = lake.freeze()
    assert lake.freeze().id == snapshot.id and snapshot.labels == 32
    lake.write([rollout(99)])
    lake.compact()
    assert {r.rollout_id for r in lake.snapshot(snapshot.id).rollouts()} == names(*range(16))
    assert lake.freeze().id != snapshot.id


# -- kill -9 --------------------------------------------------------------------------------------

WORKER = """
import random, sys, tempfile
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
from tests.helpers.lake import rollout
from s2t_shared.labels.lake import Lake
lake, first = Lake(Path(sys.argv[1])), int(sys.argv[2])
with tempfile.TemporaryDirectory() as scratch:  # pyarrow's first write takes long
    Lake(Path(scratch)).write([rollout(0)])
print("ready", flush=True)
for n in range(first, first + 100000):
    problem = "doomed" if n % 5 == 0 else ""
    lake.write([rollout(n, problem)])
    print("wrote", n, flush=True)
    act = random.random()
    if act < 0.3: lake.compact(4)
    elif act < 0.5:
        lake.delete("problem_id", "doomed")
        print("deleted", n, flush=True)
    elif act < 0.6: lake.prune(30 * 86400.0, 1 << 30)
    elif act < 0.7: print("froze", lake.freeze().id, flush=True)
"""


def killed(command: list[str], alive_s: Callable[[], float]) -> list[str]:
    """Run a process, SIGKILL it some time after it says it is ready; the whole lines it had
    printed."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as p:
        assert p.stdout is not None and p.stdout.readline() == "ready\n"
        timer = threading.Timer(alive_s(), p.kill)
        timer.start()
        text = p.stdout.read()
        timer.cancel()
        assert p.wait() == -signal.SIGKILL
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]


def numbers_after(word: str, lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith(word)]


@pytest.mark.kill
@pytest.mark.parametrize("least", sizes([4], [12]))
def test_killed_at_random_moments(least: int, lake: Lake) -> None:
    """Two processes write, compact, delete, prune and freeze; each is killed again and again. What
    either of them acknowledged is there once; what was deleted is not; nothing needs repair."""
    written: set[str] = set()
    doomed: set[str] = set()
    lock = threading.Lock()

    def lives(base: int) -> None:
        random.seed(base)
        for life in range(24):
            if life >= least and len(written) > 20 and doomed:  # a busy machine needs more lives
                return
            first = base + life * 100_000
            lines = killed(
                [sys.executable, "-c", WORKER.format(root=str(ROOT)), str(lake.root), str(first)],
                lambda: random.uniform(0.05, 0.6),
            )
            with lock:
                acknowledged = numbers_after("wrote", lines)
                last_deletion = max(numbers_after("deleted", lines), default=-1)
                for n in acknowledged:
                    if n % 5:
                        written.update(names(n))
                    elif n <= last_deletion:
                        doomed.update(names(n))
            lake.shards()  # readable right after a crash
            for snapshot in (lake.root / "snapshots").glob("[!.]*"):
                try:
                    assert len(list(lake.snapshot(snapshot.name).rollouts())) > 0
                except StoreError:
                    assert not snapshot.is_dir()  # the other process deleted from it meanwhile

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(lives, base) for base in (1, 10_000_001)]:
            done.result()
    found = ids(lake)
    assert len(found) == len(set(found)) and len(written) > 20 and doomed
    assert written <= set(found) and not doomed & set(found)
    labels = [x.label_id for r in lake.rollouts() for x in r.labels]
    assert len(labels) == len(set(labels)) == 2 * len(found)
    assert lake.verify() == {}
    lake.compact(2)
    lake.delete("problem_id", "doomed")
    assert set(ids(lake)) == {i for i in found if int(i.split("-")[1]) % 5}
    assert not list((lake.root / "snapshots").glob(".*"))
