"""What a harvest makes a label, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from s2t_shared.bundled.problems import problems
from s2t_shared.data.prompts import PromptSource, Row
from s2t_shared.data.templates import FUNCTION_WORDS
from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.labels.lake import Lake
from s2t_shared.pair import Pair
from s2t_shared.types import WARMUP_STEPS, LabelRule, Prompt, Trigger
from services.harvest.rollouts import PairRollouts
from services.harvest.run import Prompts, harvest, open_prompts
from tests.helpers.harvest import (
    OPTIONS,
    DisturbedSource,
    thresholds_of,
    training_prompts,
    write_training_prompts,
)
from tests.helpers.prompt_files import write_jsonl

# -- what is a label ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triggers", "signals"),
    [
        ((Trigger.KL,), ("kl",)),
        ((Trigger.ENTROPY,), ("entropy",)),
        ((Trigger.ENTROPY, Trigger.KL), ("kl", "entropy")),
    ],
    ids=["kl", "entropy", "both"],
)
def test_the_top_share_becomes_labels(
    source: PairRollouts, tmp_path: Path, triggers: tuple[Trigger, ...], signals: tuple[str, ...]
) -> None:
    """Exactly the positions whose signal lies above the run's own thresholds: here 10 % of all, per
    signal."""
    options = replace(OPTIONS, triggers=triggers, calibrate_on=60)
    outcome = harvest(source, training_prompts(60), Lake(tmp_path), options)
    above = thresholds_of(tmp_path, outcome.run)
    assert set(above) == set(signals)
    rollouts = list(Lake(tmp_path).rollouts())
    positions = sum(len(r.kl) for r in rollouts)
    for signal in signals:
        marked = 0
        for r in rollouts:
            marked += sum(x > above[signal] for x in getattr(r, signal)[WARMUP_STEPS:])
        assert marked == pytest.approx(0.1 * positions, abs=0.005 * positions + 1)
    for r in rollouts:
        found = {label.position - r.prompt_length for label in r.labels}
        assert all(i >= WARMUP_STEPS for i in found)
        for i in range(WARMUP_STEPS, len(r.kl)):
            excess = max(getattr(r, signal)[i] - above[signal] for signal in signals)
            # A threshold is one position's own value: fp32 on disk may fall on either side of it.
            assert abs(excess) < 1e-6 or (i in found) == (excess > 0)


def test_given_thresholds(source: PairRollouts, tmp_path: Path) -> None:
    rules = (LabelRule(Trigger.ENTROPY, 0.5),)
    options = replace(OPTIONS, thresholds=rules, triggers=(Trigger.ENTROPY,))
    harvest(source, training_prompts(8), Lake(tmp_path), options)
    labels = [label for r in Lake(tmp_path).rollouts() for label in r.labels]
    assert labels
    assert all(label.entropy > 0.5 for label in labels)


def test_intervened_labels_lie_on_s2ts_path(source: PairRollouts, tmp_path: Path) -> None:
    """The tokens are S2T's (here: often the LLM's choice where the SLM's differs), scored at every
    position too."""
    prompts = training_prompts(40)
    plain = tmp_path / "plain"
    intervened = tmp_path / "intervened"
    harvest(source, prompts, Lake(plain), OPTIONS)
    outcome = harvest(source, prompts, Lake(intervened), replace(OPTIONS, intervene=True))
    threshold = thresholds_of(intervened, outcome.run)["kl"]
    greedy = {r.problem_id: r for r in Lake(plain).rollouts()}
    changed = 0
    for r in Lake(intervened).rollouts():
        assert r.source == "intervened"
        assert len(r.llm_top_rank) == len(r.token_ids) - r.prompt_length
        changed += r.token_ids != greedy[r.problem_id].token_ids
        for label in r.labels:
            if label.kl > threshold and label.position < len(r.token_ids):
                assert r.token_ids[label.position] == label.candidate_ids[label.best]
    assert changed > 10


# -- prompts --------------------------------------------------------------------------------------


def test_bad_prompts_are_named_and_never_tried_again(
    source: PairRollouts, pair: Pair, tmp_path: Path
) -> None:
    rows: list[Row] = [({"id": p.id}, Prompt(text=p.prompt)) for p in problems("train", 6)]
    rows[1] = ({"id": "bad"}, InvalidRequestError("line 2: not JSON"))
    rows[2] = ({"id": "long"}, Prompt(text="coins " * 400))
    prompts = Prompts(lambda: rows, "bad", 6)
    outcome = harvest(source, prompts, Lake(tmp_path), OPTIONS)
    assert outcome.rollouts == 4
    assert not outcome.failed
    first, second = sorted(outcome.errors)
    assert first == "line 2: not JSON"
    assert second.startswith("long: the prompt has")
    idle = DisturbedSource(source, pair)
    again = harvest(idle, prompts, Lake(tmp_path), OPTIONS)
    assert again.errors == outcome.errors
    assert again.labels == outcome.labels
    assert idle.rolled == 0


def test_the_first_prompts_of_a_source(tmp_path: Path) -> None:
    """The content and the limit make the fingerprint."""
    file = write_training_prompts(tmp_path / "train.jsonl", 5)
    source = PromptSource(source=str(file))
    every = open_prompts(source)
    first = open_prompts(source, limit=2)
    assert every.total == 5
    assert first.total == 2
    assert open_prompts(source, limit=9).total == 5
    assert list(first.rows()) == list(every.rows())[:2] == list(first.rows())
    assert first.fingerprint != every.fingerprint


def numbered_prompts(file: Path, templates: int, count: int) -> PromptSource:
    """Prompts in turn from so many templates, which differ in one function word each."""
    words = sorted(FUNCTION_WORDS)[:templates]
    rows = []
    for i in range(count):
        word = words[i % templates]
        text = f"{word} of the {i} coins and {i} or by me"
        rows.append({"prompt": text, "origin": f"file {i % 3}"})
    write_jsonl(file, rows)
    return PromptSource(source=str(file))


def groups_of(prompts: Prompts) -> list[str]:
    return [prompts.group(row) for row, _ in prompts.rows()]


def test_problems_are_held_out_by_template(tmp_path: Path) -> None:
    source = numbered_prompts(tmp_path / "a.jsonl", templates=60, count=180)
    found = groups_of(open_prompts(source))
    assert found[:60] == found[60:120]
    assert len(set(found)) > 40


def test_too_few_templates_are_told_and_not_used(tmp_path: Path) -> None:
    said: list[str] = []
    source = numbered_prompts(tmp_path / "a.jsonl", templates=2, count=60)
    assert set(groups_of(open_prompts(source, say=said.append))) == {""}
    assert any("come from 2 templates" in line for line in said)


def test_a_column_names_the_groups(source: PairRollouts, tmp_path: Path) -> None:
    """They reach the lake, and a row without a value is refused by name."""
    rows = []
    for i, problem in enumerate(problems("train", 6)):
        rows.append({"id": problem.id, "prompt": problem.prompt, "origin": f"file {i % 2}"})
    del rows[3]["origin"]
    write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = open_prompts(PromptSource(source=str(tmp_path / "a.jsonl"), group_column="origin"))
    lake = Lake(tmp_path / "lake")
    outcome = harvest(source, prompts, lake, OPTIONS)
    assert {r.group for r in lake.rollouts()} == {"file 0", "file 1"}
    assert len(outcome.errors) == 1
    assert "there is no column 'origin'" in outcome.errors[0]


def test_a_choice_is_said_once(tmp_path: Path) -> None:
    """The rows are read once to calibrate and once to harvest."""
    said: list[str] = []
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
    prompts = open_prompts(PromptSource(source=str(file)), say=said.append)
    assert list(prompts.rows()) == list(prompts.rows())
    assert len(said) == 1
    assert "'question'" in said[0]


def test_nothing_to_calibrate_on(source: PairRollouts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no thresholds"):
        harvest(source, Prompts(lambda: [], "none", 0), Lake(tmp_path), OPTIONS)


def test_evaluation_splits_are_refused(source: PairRollouts, tmp_path: Path) -> None:
    with pytest.raises(EvaluationSplitError):
        harvest(source, training_prompts(5), Lake(tmp_path), replace(OPTIONS, split="test"))
    assert not any(tmp_path.iterdir()), "before any work"
