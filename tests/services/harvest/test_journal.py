"""A run's journal on disk: what survives a crash, and who may work on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.errors import ConfigError
from s2t_shared.types import LabelRule, Trigger
from services.harvest.journal import CHUNK, Chunk, HarvestJournal

IDENTITY = {"prompts": "abc", "split": "train"}
RULES = (LabelRule(Trigger.KL, 0.1 + 0.2), LabelRule(Trigger.ENTROPY, 1.0))
FIRST = Chunk(number=0, prompts=32, rollouts=31, labels=7, tokens=900, errors=("p3: too long",))
SECOND = Chunk(number=1, prompts=8, rollouts=8, labels=2, tokens=200)


def write_run(lake: Path) -> Path:
    """A run with two finished chunks; returns its folder."""
    with HarvestJournal.open(lake, IDENTITY) as journal:
        journal.plan(RULES)
        journal.finish(FIRST)
        journal.finish(SECOND)
        return lake / "runs" / journal.run_id


def test_a_run_is_read_as_it_was_left(tmp_path: Path) -> None:
    write_run(tmp_path)
    with HarvestJournal.open(tmp_path, dict(reversed(IDENTITY.items()))) as journal:
        assert journal.rules == RULES
        assert journal.done == {0: FIRST, 1: SECOND}


def test_another_identity_is_another_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    with HarvestJournal.open(tmp_path, IDENTITY | {"prompts": "other"}) as journal:
        assert journal.run_id != folder.name
        assert not journal.done
        assert not journal.rules


def test_again_keeps_the_thresholds_only(tmp_path: Path) -> None:
    write_run(tmp_path)
    with HarvestJournal.open(tmp_path, IDENTITY, again=True) as journal:
        assert journal.rules == RULES
        assert not journal.done


def test_a_torn_line_costs_its_chunk_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    whole = (folder / "done.jsonl").read_text("utf-8")
    (folder / "done.jsonl").write_text(whole[:-10], "utf-8")
    with HarvestJournal.open(tmp_path, IDENTITY) as journal:
        assert journal.done == {0: FIRST}
        journal.finish(SECOND)
    with HarvestJournal.open(tmp_path, IDENTITY) as journal:
        assert journal.done == {0: FIRST, 1: SECOND}


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for text in ("{", "{}", '{"rules": [["nothing", 1]]}'):
        (folder / "plan.json").write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=r"plan.json is damaged .*remove .*runs"):
            with HarvestJournal.open(tmp_path, IDENTITY):
                pass


def test_a_run_without_a_plan_has_nothing_done(tmp_path: Path) -> None:
    (write_run(tmp_path) / "plan.json").unlink()
    with HarvestJournal.open(tmp_path, IDENTITY) as journal:
        assert not journal.done


def test_one_process_per_run(tmp_path: Path) -> None:
    with HarvestJournal.open(tmp_path, IDENTITY):
        with pytest.raises(ConfigError, match="another process"):
            with HarvestJournal.open(tmp_path, IDENTITY):
                pass
        with HarvestJournal.open(tmp_path, IDENTITY | {"prompts": "other"}):
            pass
    with HarvestJournal.open(tmp_path, IDENTITY):
        pass


def test_a_lake_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConfigError, match="file' cannot be used"):
        with HarvestJournal.open(tmp_path / "file", IDENTITY):
            pass


def test_chunks_that_are_not_done(tmp_path: Path) -> None:
    rows = list(range(2 * CHUNK + 3))
    with HarvestJournal.open(tmp_path, IDENTITY) as journal:
        journal.plan(RULES)
        assert [number for number, _ in journal.open_chunks(rows)] == [0, 1, 2]
        journal.finish(SECOND)
        assert list(journal.open_chunks(rows)) == [(0, rows[:CHUNK]), (2, rows[2 * CHUNK :])]
