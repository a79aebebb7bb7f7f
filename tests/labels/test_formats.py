"""Lakes and streams that an older program wrote. `format2/` was written by the last program of
format 2: some rollouts twice, one shard from before `group` was a column."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.errors import S2TError
from s2t_shared.labels.check import check_rows
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.export import export_labels
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.rows import OPTIONAL, WIRE_SCHEMA, Rows, joined_entries, read_entry
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
    assert older.verify(values=True) == {}
    older.compact(2)
    check(older, expected)


def test_what_an_older_writer_left_in_the_stream_and_the_spool_arrives(
    lake: Lake, store: LabelStream
) -> None:
    """JSON, as the last program wrote it; and rows without a column that came later."""
    store.append([rollout(1).to_json().encode(), *Rows.of([rollout(2)]).encoded()])
    without_group = WIRE_SCHEMA.remove(WIRE_SCHEMA.get_field_index("group"))
    [batch] = Rows.of([rollout(3)]).table.select(without_group.names).to_batches()
    from s2t_shared.labels import rows

    store.append([rows._header(without_group) + batch.serialize().to_pybytes()])
    Drain(store, lake).flush()
    assert ids_in(lake) == names(1, 2, 3) and store.counts().dead_letters == 0
    assert "group" in OPTIONAL and {r.group for r in lake.rollouts()} == {""}


def test_rows_travel_unchanged() -> None:
    sent = [replace(rollout(n, labels=n), group=f"g{n}") for n in range(4)]
    assert joined_entries(map(read_entry, Rows.of(sent).encoded())).rollouts() == sent


def test_an_entry_holds_nothing_of_its_neighbours() -> None:
    """Arrow pads a slice's buffers with what lies behind them: another user's tokens."""
    for number, entry in enumerate(Rows.of([rollout(n) for n in range(30)]).encoded()):
        assert set(re.findall(rb"request-(\d+)", entry)) == {b"%d" % number}


@given(data=st.data())
def test_damaged_entries_are_refused_or_can_be_written(data: st.DataObject) -> None:
    """Anyone who can reach Redis may write there: no bytes may end the drain."""
    [entry] = Rows.of([rollout(1)]).encoded()
    content = bytearray(entry)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(7, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        rows = joined_entries([read_entry(bytes(content))])
        check_rows(rows)
    except S2TError:
        return
    assert len(rows.completed().rollouts()) == 1
