"""What deletion, retention and freezing promise, also after a crash in the middle and beside
damaged files."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from s2t_shared.errors import StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import DAY_S, Lake
from s2t_shared.labels.snapshots import Snapshot
from s2t_shared.labels.stream import LabelStream
from services.launch.redis_server import open_redis
from tests.helpers.lake import ids, label, names, rollout

NOON = time.time() // DAY_S * DAY_S - DAY_S / 2  # of yesterday


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.mark.parametrize("then", ["delete", "prune", "compact", "quarantine"])
def test_what_a_killed_delete_replaced_never_comes_back(then: str, lake: Lake) -> None:
    lake.write([rollout(1, "doomed"), rollout(2)], "a")
    old = {path: path.read_bytes() for path in lake.root.glob("shard-a-0.*")}
    lake.delete("problem_id", "doomed")
    for path, content in old.items():  # as if killed just before removing it
        path.write_bytes(content)
    assert set(ids(lake)) == names(2) and len(list(lake.root.glob("*.parquet"))) == 2
    [replacing] = lake.shards()
    if then == "delete":
        lake.delete("problem_id", "p2")
    elif then == "prune":
        lake.prune(max_bytes=1)
    elif then == "compact":
        lake.compact(1)
    else:
        lake.quarantine([replacing.name])
    assert set(ids(lake)) == (names(2) if then == "compact" else set())
    assert not (lake.root / "shard-a-0.parquet").exists()


def test_a_new_shard_names_all_its_ancestors(lake: Lake) -> None:
    lake.write([rollout(n, f"p{n}") for n in range(3)], "a")
    lake.delete("problem_id", "p0")
    [second] = lake.shards()
    lake.delete("problem_id", "p1")
    [third] = lake.shards()
    assert set(third.replaces) == {"shard-a-0", second.name}


def test_orphans_go_with_the_next_rewriting(lake: Lake) -> None:
    lake.write([rollout(1)])
    for name in ("shard-x-0.parquet", ".shard-y-0.1234.tmp", ".shard-y-0.json.77.tmp"):
        (lake.root / name).write_bytes(b"half")
    lake.compact()
    assert (
        len(list(lake.root.glob("*shard-*"))) == len(list(lake.root.glob("shard-*"))) == 2
        and len(ids(lake)) == 1
    )


# -- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", ["everything", "one shard", "a manifest", "a file", "half a file", "manifest text"]
)
def test_a_snapshot_that_lost_a_part_is_an_error_until_frozen_anew(lost: str, lake: Lake) -> None:
    for n in range(3):
        lake.write([rollout(n)], f"{n}")
    snapshot = lake.freeze()
    paths = sorted(snapshot.folder.iterdir())  # .json, .parquet, ...
    for path in {
        "everything": paths,
        "one shard": paths[:2],
        "a manifest": paths[:1],
        "a file": paths[1:2],
    }.get(lost, []):
        path.unlink()
    if lost == "half a file":
        content = paths[1].read_bytes()
        paths[1].unlink()  # not through the link
        paths[1].write_bytes(content[: len(content) // 2])
    elif lost == "manifest text":
        paths[0].unlink()
        paths[0].write_text("{")
    if lost == "everything":
        snapshot.folder.rmdir()
    for read in (
        lambda: lake.snapshot(snapshot.id),
        lambda: list(snapshot.rollouts()),
        lambda: snapshot.labels,
        snapshot.pairs,
    ):
        with pytest.raises(StoreError, match="gone or incomplete.*train on a new one"):
            read()
    again = lake.freeze()
    assert again.id == snapshot.id and {r.rollout_id for r in again.rollouts()} == names(0, 1, 2)
    assert not list((lake.root / "snapshots").glob(".*"))


def test_freezing_again_keeps_a_snapshot_alive(lake: Lake) -> None:
    lake.write([rollout(1)])
    snapshot = lake.freeze()
    os.utime(snapshot.folder, (0, 0))
    lake.freeze()
    lake.compact()
    assert lake.snapshot(snapshot.id).labels == 2
    os.utime(snapshot.folder, (0, 0))
    lake.compact()
    assert not snapshot.folder.exists()


def test_size_spares_the_newest_snapshot_and_age_spares_none(lake: Lake) -> None:
    snapshots: list[Snapshot] = []
    for n, age in enumerate((5, 3, 1)):
        lake.write([replace(rollout(n), created_at=time.time() - age * DAY_S)], f"{n}")
        snapshots.append(lake.freeze())
        os.utime(snapshots[-1].folder, (time.time() + n, time.time() + n))
    assert lake.prunable(max_bytes=1) == sorted(lake.shards(), key=lambda s: s.last)
    assert lake.prune(max_bytes=lake.shards()[-1].bytes) == 2
    assert [s.folder.is_dir() for s in snapshots] == [False, False, True]
    assert {r.rollout_id for r in snapshots[2].rollouts()} == names(0, 1, 2)
    assert lake.prunable(max_age_s=4 * DAY_S) == [] and lake.prune(max_age_s=4 * DAY_S) == 0
    assert not snapshots[2].folder.exists()


@pytest.mark.parametrize("damage", ["manifest", "shard"])
@pytest.mark.parametrize("verb", ["delete", "prune"])
def test_a_damaged_snapshot_holds_nothing_up(verb: str, damage: str, lake: Lake) -> None:
    lake.write([rollout(1), rollout(2)])
    snapshot = lake.freeze()
    path = next(snapshot.folder.glob("*.json" if damage == "manifest" else "*.parquet"))
    path.unlink()
    path.write_text("{")
    assert (
        lake.delete("problem_id", "p1") if verb == "delete" else lake.prune(max_age_s=DAY_S)
    ) == (verb == "delete")
    assert (
        set(ids(lake)) == (names(2) if verb == "delete" else names(1, 2))
        and not snapshot.folder.exists()
    )


# -- deletion -------------------------------------------------------------------------------------


def test_deletion_reaches_into_quarantine(lake: Lake) -> None:
    lake.write([rollout(1), rollout(2)], "good")
    lake.write([rollout(3)], "bad")
    (lake.root / "shard-bad-0.parquet").write_bytes(b"x")
    lake.quarantine(["shard-good-0", "shard-bad-0"])
    assert lake.delete("problem_id", "p1") == 1
    left = Lake(lake.root / "quarantine")
    left.quarantine(["shard-bad-0"])
    assert set(ids(left)) == names(2)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"field": "task"}',
        "\xff",
        '{"field": "split", "sha256": "", "at": 1.0}',
        '{"field": "task", "sha256": "", "at": "now"}',
    ],
)
def test_a_damaged_deletion_is_told_and_buries_nothing(
    line: str, lake: Lake, tmp_path: Path
) -> None:
    lake.write([rollout(1)])
    lake.delete("request_id", "nobody")
    path = lake.root / "deleted.jsonl"
    good = path.read_bytes()
    path.write_bytes(line.encode("latin-1") + b"\n" + good)
    with pytest.raises(StoreError, match="line 1 of deleted.jsonl.*remove the line"):
        lake.deletions()
    with open_redis(None, tmp_path / "redis") as server:
        store = LabelStream(server.url)
        store.append([rollout(2).to_json().encode()])
        drain = Drain(store, lake)
        with pytest.raises(StoreError, match="deleted.jsonl"):
            drain.flush()
        assert store.counts().dead_letters == 0
        path.write_bytes(good)
        drain.flush()
        assert set(ids(lake)) == names(1, 2) and store.counts().rollouts == 0


def test_the_drain_blames_no_rollout_for_a_fault_of_the_lake(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_redis(None, tmp_path / "redis") as server:
        store = LabelStream(server.url)
        store.append([rollout(2).to_json().encode()])
        drain = Drain(store, lake)
        with monkeypatch.context() as patch:
            patch.setattr(Lake, "deletions", lambda _: [][0])  # a bug, say
            with pytest.raises(IndexError):
                drain.flush()
        assert store.counts().dead_letters == 0
        drain.flush()
        assert ids(lake) == ["rollout-2"]


# -- retention and counts -------------------------------------------------------------------------


def test_compaction_joins_within_a_day_only(lake: Lake) -> None:
    for n in range(8):
        lake.write([replace(rollout(n), created_at=NOON - n % 2 * DAY_S)])
    assert lake.compact(4) == 8
    assert sorted((s.rollouts, s.first, s.last) for s in lake.shards()) == [
        (4, NOON - DAY_S, NOON - DAY_S),
        (4, NOON, NOON),
    ]
    assert lake.prune(max_age_s=time.time() - NOON + DAY_S / 2) == 4 and set(ids(lake)) == names(
        0, 2, 4, 6
    )


def test_labels_since(lake: Lake) -> None:
    assert lake.labels_since(0.0) == 0
    lake.write([replace(rollout(n, labels=n), created_at=100.0 + n) for n in range(4)], "a")
    lake.write([replace(rollout(9, labels=2), created_at=200.0)], "b")
    assert [lake.labels_since(t) for t in (0.0, 100.0, 101.0, 102.5, 103.0, 199.0, 200.0)] == [
        8,
        8,
        7,
        5,
        2,
        2,
        0,
    ]
    (lake.root / "shard-b-0.parquet").unlink()  # the manifest says enough
    assert lake.labels_since(102.5) == 5


def test_pairs_of_a_snapshot(lake: Lake) -> None:
    lake.write([rollout(1), replace(rollout(2, labels=1), llm_digest="other"), rollout(3)], "a")
    lake.write(
        [
            replace(rollout(4, labels=0), slm_digest="unlabelled"),
            replace(rollout(5), labels=(label("x"),)),
        ],
        "b",
    )
    assert lake.freeze().pairs() == {("slm", "llm"): 5, ("slm", "other"): 1}


def test_the_file_of_deletions_is_written_whole(lake: Lake) -> None:
    for n in range(3):
        lake.delete("request_id", f"{n}")
    lines = (lake.root / "deleted.jsonl").read_text().splitlines()
    assert len(lines) == 3 == len(lake.deletions()) and all(
        json.loads(line)["field"] == "request_id" for line in lines
    )
