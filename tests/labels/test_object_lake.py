"""The lake on an S3 server (moto): what a folder promises, without locks and renames."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.deletions import Deletion
from s2t_shared.labels.export import export_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.object_lake import ObjectLake, open_lake
from s2t_shared.labels.objects import Objects
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.stats import measure_labels
from tests.helpers.lake import ids, names, rollout
from tests.helpers.scored_rollouts import SCORED_ROLLOUTS


@pytest.fixture
def lake(bucket: str, request: pytest.FixtureRequest) -> ObjectLake:
    return ObjectLake(f"{bucket}/{request.node.name}")


def there(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301 - our own


def elsewhere(work: Callable[[Reader], Any], parts: Iterable[Reader]) -> Iterator[Any]:
    """As on other machines: parts and counts are sent there and back, and come in any order."""
    for part in reversed(list(parts)):
        yield there(there(work)(there(part)))


def test_it_reads_as_a_folder_does(lake: ObjectLake, tmp_path: Path) -> None:
    folder = Lake(tmp_path / "lake")
    for made in (lake, folder):
        made.write(SCORED_ROLLOUTS[:25], "a")
        made.write(SCORED_ROLLOUTS[20:], "b")
        made.write(SCORED_ROLLOUTS[20:], "b")  # the same name: once
    assert list(lake.rollouts()) == list(folder.rollouts())
    found, expected = measure_labels(lake), measure_labels(folder)
    assert replace(found, bytes=0) == replace(expected, bytes=0)
    assert measure_labels(lake, elsewhere) == found
    assert lake.verify(values=True) == {}
    snapshot = lake.freeze()
    assert list(lake.snapshot(snapshot.id).rollouts()) == list(folder.rollouts())
    assert snapshot.pairs() == folder.freeze().pairs()


def test_it_is_rewritten_as_a_folder_is(lake: ObjectLake) -> None:
    for n in range(6):
        lake.write([rollout(n)], f"{n}")
    kept = lake.freeze()
    assert lake.compact(2) == 6 and len(lake.shards()) == 1
    assert {r.rollout_id for r in kept.rollouts()} == names(*range(6))  # a snapshot keeps its files
    assert lake.delete("problem_id", "p3") == 1
    assert set(ids(lake)) == names(0, 1, 2, 4, 5)
    with pytest.raises(StoreError, match="is gone"):
        lake.snapshot(kept.id)
    assert len(lake.place.names(".parquet")) == 1
    lake.write([replace(rollout(3), created_at=0.0)])  # was on its way
    assert lake.delete("problem_id", "p4") == 1  # a shard that replaced others is replaced
    assert set(ids(lake)) == names(0, 1, 2, 5)
    assert lake.prune(max_bytes=1) == 4 and ids(lake) == []


def test_of_two_rewriters_the_slower_one_begins_again(lake: ObjectLake) -> None:
    """A compaction that had read a shard before a deletion would bring back what was deleted."""
    for n in range(4):
        lake.write([rollout(n)], f"{n}")
    other = ObjectLake(lake.where)
    was_read, may_write = threading.Event(), threading.Event()
    replacing = lake.place.replace
    attempts = []

    def slow(name: str, content: bytes) -> None:
        attempts.append(name)
        was_read.set()
        assert may_write.wait(20)
        replacing(name, content)

    lake.place.replace = slow  # type: ignore[method-assign]
    compacting = threading.Thread(target=lake.compact, args=(2,))
    compacting.start()
    assert was_read.wait(20)
    assert other.delete("problem_id", "p2") == 1
    may_write.set()
    compacting.join(30)
    assert len(attempts) == 2 and set(ids(other)) == set(ids(lake)) == names(0, 1, 3)


def test_what_was_deleted_while_it_was_written_does_not_stay(lake: ObjectLake) -> None:
    """The deletion had searched before the shard was there; the writer had looked before it."""
    other = ObjectLake(lake.where)
    creating = lake.place.create

    def late(name: str, content: bytes) -> None:
        if name.startswith("shard-"):
            lake.place.create = creating  # type: ignore[method-assign]
            other.delete("problem_id", "p1")
        creating(name, content)

    lake.place.create = late  # type: ignore[method-assign]
    made = [replace(rollout(n), created_at=time.time() - 60.0) for n in (1, 2)]
    lake.write(made)
    assert set(ids(lake)) == names(2)
    assert [type(d) for d in lake.deletions()] == [Deletion]


def test_damage_is_put_aside(lake: ObjectLake) -> None:
    lake.write([rollout(1)], "a")
    lake.write([rollout(2)], "b")
    lake._objects.put("shard-a-0.parquet", b"x")
    wrong = lake.verify()
    assert set(wrong) == {"shard-a-0"}
    lake.quarantine(wrong)
    assert ids(lake) == ["rollout-2"] and lake.quarantined.names(".parquet") == ["shard-a-0"]


def test_export_goes_there_too(lake: ObjectLake) -> None:
    lake.write(SCORED_ROLLOUTS)
    target = f"{lake.where}-export"
    assert export_labels(lake, target).total == 120
    import s3fs

    found = s3fs.S3FileSystem().find(target)
    assert {path.rpartition("/")[2][:5] for path in found} == {"train", "heldo", "READM"}
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_labels(lake, target)


def test_what_is_no_place_for_a_lake_is_said(lake: ObjectLake) -> None:
    with pytest.raises(ConfigError, match="name one for the journal"):
        _ = lake.root
    with pytest.raises(ConfigError, match="install the fsspec file system"):
        open_lake("nowhere://x")


def test_an_export_by_parts_holds_the_same(lake: ObjectLake, tmp_path: Path) -> None:
    """Each part is written by itself, to a folder or a URL; nothing twice, and the card last."""
    import datasets

    lake.write(SCORED_ROLLOUTS[:25], "a")
    lake.write(SCORED_ROLLOUTS[20:], "b")
    expected = export_labels(lake, tmp_path / "one")
    exported = export_labels(lake, tmp_path / "parts", run=elsewhere)
    assert replace(exported, snapshot="") == replace(expected, snapshot="")
    rows = []
    for folder in ("one", "parts"):
        found = datasets.load_dataset(str(tmp_path / folder), cache_dir=str(tmp_path / "cache"))
        rows.append({split: sorted(data["label_id"]) for split, data in found.items()})
    assert rows[0] == rows[1] and len(rows[0]["train"]) == expected.labels["train"]
    url = f"{lake.where}-export"
    export_labels(lake, url, run=elsewhere)
    sent = [file.rpartition("/")[2] for file in Objects(url).listed("data")]
    files = sorted(path.name for path in (tmp_path / "parts/data").iterdir())
    assert sent == files and b"Select-to-Think" in Objects(url).fetch("README.md")
