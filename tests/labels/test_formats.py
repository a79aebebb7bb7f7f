"""Lakes and streams that an older program wrote. `format2/` was written by the last program of
format 2: some rollouts twice, one shard from before `group` was a column."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.labels.drain import Drain
from s2t_shared.labels.export import export_labels
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.packed import pack, read_rollout, read_rows
from s2t_shared.labels.rows import Rows
from s2t_shared.labels.stats import measure_labels
from s2t_shared.labels.stream import LabelStream
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.settings import TrainingSettings
from tests.helpers.lake import ids_in, names, rollout

FORMAT2 = Path(__file__).parent / "format2"


@pytest.fixture
def older(tmp_path: Path) -> Lake:
    shutil.copytree(FORMAT2, tmp_path / "lake")
    return Lake(tmp_path / "lake")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FORMAT2 / "read_by_its_program.json").read_text())
    return found


def check(lake: Lake, expected: dict[str, Any]) -> None:
    """What the program that wrote the lake read from it."""
    rollouts = sorted((Rollout.from_json(text) for text in expected["rollouts"]), key=_id)
    assert sorted(lake.rollouts(), key=_id) == rollouts
    stats = json.loads(json.dumps(asdict(measure_labels(lake))))
    for name in ("shards", "bytes"):
        assert stats.pop(name) > 0
    assert stats == {name: expected["stats"][name] for name in stats}
    data = TrainingData(lake.freeze(), "slm", TrainingSettings(min_mass=0.0))
    assert data.labels == expected["labels"]
    assert [r.rollout_id for r in data.validation] == expected["validation"]
    assert [r.rollout_id for r in data.test] == expected["test"]


def _id(rollout: Rollout) -> str:
    return rollout.rollout_id


def test_a_lake_of_format_2_reads_as_its_own_program_read_it(
    older: Lake, expected: dict[str, Any], tmp_path: Path
) -> None:
    check(older, expected)
    assert older.verify() == older.verify(values=True) == {}
    exported = export_labels(older, tmp_path / "out")
    assert exported.total == expected["stats"]["labels"]
    assert older.delete("problem_id", "p22") == 2
    assert "p22" not in {r.problem_id for r in older.rollouts()}


def test_a_lake_of_format_2_is_migrated_once(older: Lake, expected: dict[str, Any]) -> None:
    older.write([rollout(900)], "new")
    older.delete("request_id", "request-900")
    assert older.migrate() == 3 and older.migrate() == 0
    assert {shard.schema_version for shard in older.shards()} == {3}
    assert older.verify() == {}
    older.compact(2)
    check(older, expected)


def test_an_entry_of_an_older_writer_arrives(lake: Lake, store: LabelStream) -> None:
    """JSON, without a column that came later; and beside those of writers of today."""
    row = json.loads(rollout(1).to_json())
    del row["group"]
    store.append([json.dumps(row).encode(), rollout(2).to_json().encode()])
    Drain(store, lake).flush()
    store.append([rollout(3).to_json().encode(), pack(rollout(4)), rollout(5).to_json().encode()])
    Drain(store, lake).flush()
    assert ids_in(lake) == names(*range(1, 6)) and store.counts().dead_letters == 0
    assert {r.group for r in lake.rollouts()} == {""}


def test_rows_hold_rollouts_unchanged() -> None:
    made = [replace(rollout(n, labels=n), group=f"g{n}") for n in range(4)]
    assert Rows.of(made).rollouts() == made
    assert [Rollout.from_json(r.to_json()) for r in made] == made
    assert [read_rollout(pack(r)) for r in made] == made
    assert read_rows([pack(r) for r in made]).rollouts() == made
    assert read_rows([pack(replace(r, labels=())) for r in made]).label_counts.sum() == 0
