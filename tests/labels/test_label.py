"""What a rollout may hold, and which positions of an answer become labels."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared.decode.decide import with_figures
from s2t_shared.errors import EvaluationSplitError, S2TError
from s2t_shared.labels.label import Digests, Label, Rollout, is_label, rollout_of, with_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.types import (
    CandidateRule,
    ChosenBy,
    LabelOptions,
    LabelRule,
    PositionScores,
    Step,
    Support,
    Trigger,
)
from tests.helpers.lake import rollout

# -- values ---------------------------------------------------------------------------------------

WORDS = st.text(max_size=8)
WHOLE = st.integers(0, 2**31 - 1)
REAL = st.floats(-float(1 << 90), float(1 << 90), width=32, allow_subnormal=False)
RANK = st.integers(-1, 63)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    prompt, answer = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    tokens = tuple(draw(st.lists(WHOLE, min_size=prompt + answer, max_size=prompt + answer)))
    scored = draw(st.booleans())

    def values(one: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(one, min_size=answer, max_size=answer))) if scored else ()

    def a_label() -> Label:
        k = draw(st.integers(1, 3))
        ids, slm, llm = (
            tuple(draw(st.lists(one, min_size=k, max_size=k))) for one in (WHOLE, REAL, REAL)
        )
        return Label(
            label_id=draw(WORDS),
            position=draw(st.integers(1, prompt + answer)),
            candidate_ids=ids,
            slm_log_probs=slm,
            llm_log_probs=llm,
            llm_top_id=draw(WHOLE),
            llm_top_rank=draw(RANK),
            mass=draw(REAL),
            kl=draw(REAL),
            entropy=draw(REAL),
        )

    return Rollout(
        rollout_id=draw(WORDS),
        request_id=draw(WORDS),
        problem_id=draw(WORDS),
        task=draw(WORDS),
        split="train",
        source=draw(WORDS),
        token_ids=tokens,
        prompt_length=prompt,
        entropy=values(REAL),
        kl=values(REAL),
        llm_top_rank=values(RANK),
        labels=tuple(a_label() for _ in range(draw(st.integers(0, 2)))),
        slm_digest=draw(WORDS),
        llm_digest=draw(WORDS),
        tokenizer_digest=draw(WORDS),
        template_digest=draw(WORDS),
        created_at=draw(st.floats(0, 1e10)),
    )


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(original=rollouts())
def test_what_json_accepts_the_lake_gives_back(original: Rollout, tmp_path: Path) -> None:
    sent = Rollout.from_json(original.to_json())
    assert sent == original
    lake = Lake(tmp_path / uuid.uuid4().hex)
    lake.write([sent])
    [found] = lake.rollouts()
    assert found == replace(sent, labels=found.labels)
    assert found.labels == tuple(
        {x.label_id: x for x in reversed(sent.labels)}[i]
        for i in dict.fromkeys(x.label_id for x in sent.labels)
    )


BAD: st.SearchStrategy[object] = st.sampled_from(
    [
        None,
        True,
        "x",
        "\ud800",
        -2,
        64,
        1 << 40,
        10**400,
        1.5,
        1e300,
        float("nan"),
        [],
        [1.5],
        ["x"],
        [None],
        {},
        [[1]],
    ]
)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    field=st.sampled_from(sorted(set(json.loads(rollout(1).to_json())))),
    value=BAD,
    inside=st.booleans(),
    inner=st.sampled_from(sorted(json.loads(rollout(1).to_json())["labels"][0])),
)
def test_any_value_is_refused_or_can_be_written(
    field: str, value: object, inside: bool, inner: str, tmp_path: Path
) -> None:
    """One that is neither would block the drain for ever."""
    row = json.loads(rollout(1).to_json())
    if inside:
        row["labels"][0][inner] = value
    else:
        row[field] = value
    try:
        accepted = Rollout.from_json(json.dumps(row))
    except S2TError:
        return
    lake = Lake(tmp_path / uuid.uuid4().hex)
    lake.write([accepted])
    assert len(list(lake.rollouts())) == 1


@pytest.mark.parametrize("split", ["test", " Eval ", "dev", ""])
def test_an_evaluation_split_is_refused(split: str) -> None:
    with pytest.raises(EvaluationSplitError):
        Rollout.from_json(replace(rollout(1), split=split).to_json())


# -- which positions are labels -------------------------------------------------------------------

DIGESTS = Digests(slm="slm", llm="llm", tokenizer="tok", template="template")
PROMPT = (1, 2, 3)


def scored(index: int, llm_top_id: int = 7, triggered: bool = False) -> Step:
    """A Step whose entropy is the same everywhere, and whose KL grows with the LLM's doubt."""
    step = Step(
        index=index,
        token_id=7,
        chosen_by=ChosenBy.LLM if triggered else ChosenBy.SLM,
        triggered=triggered,
        support=Support((7, 8, 9), (-0.5, -1.5, -2.5)),
        llm=PositionScores((-0.5, -1.5, -0.1 * (index + 1)), llm_top_id),
    )
    return with_figures(step)


def folded(*steps: Step, **options: Any) -> Rollout:
    return rollout_of(PROMPT, steps, CandidateRule(2), LabelOptions(**options), DIGESTS, "request")


def test_every_llm_selection_of_an_answer_is_a_label() -> None:
    bare = Step(index=1, token_id=8)
    made = folded(scored(0), bare, scored(2, llm_top_id=9, triggered=True))
    [label] = made.labels
    assert label.position == 5
    assert made.token_ids[: label.position] == (*PROMPT, 7, 8)
    assert label.candidate_ids == (7, 8)
    assert label.slm_log_probs == (-0.5, -1.5)
    assert label.llm_log_probs == (-0.5, -1.5)
    assert label.mass == pytest.approx(math.exp(-0.5) + math.exp(-1.5))
    assert (label.llm_top_id, label.llm_top_rank) == (9, 2)
    assert made.entropy == made.kl == made.llm_top_rank == ()  # one position was not scored


def test_what_another_llm_said_is_no_label() -> None:
    """During a rolling change of the LLM, labels of the old one were filed under the new."""
    steps = [
        scored(3, triggered=True).changed(llm_digest="llm"),
        scored(4, triggered=True).changed(llm_digest="another"),
    ]
    made = folded(*steps)
    assert [label.position for label in made.labels] == [len(PROMPT)]
    assert made.llm_digest == "llm" and made.kl == ()
    rules = (LabelRule(Trigger.ENTROPY, -1.0),)
    assert len(folded(*steps, *steps, rules=rules).labels) == 2


def test_of_a_scored_rollout_the_rules_choose_behind_the_warm_up() -> None:
    steps = [scored(i) for i in range(8)]
    made = folded(*steps, rules=(LabelRule(Trigger.ENTROPY, -1.0),))
    assert [label.position - 3 for label in made.labels] == [3, 4, 5, 6, 7]
    assert made.entropy == tuple(step.entropy for step in steps)
    assert made.kl == tuple(step.kl for step in steps)
    assert made.llm_top_rank == (0,) * 8
    assert [label.kl for label in made.labels] == list(made.kl[3:])
    threshold = made.kl[5]
    strict = folded(*steps, rules=(LabelRule(Trigger.KL, threshold),))
    above = [i for i in range(3, 8) if made.kl[i] > threshold]
    assert 0 < len(above) < 4
    assert [label.position - 3 for label in strict.labels] == above
    both = (LabelRule(Trigger.KL, threshold), LabelRule(Trigger.MARGIN, 0.0))
    assert len(folded(*steps, rules=both).labels) == 5


def test_a_signal_at_the_threshold_is_no_label() -> None:
    signals = {Trigger.KL: 0.5, Trigger.ENTROPY: 1.0}
    assert not is_label(signals, (LabelRule(Trigger.KL, 0.5),))
    assert is_label(signals, (LabelRule(Trigger.KL, 0.5), LabelRule(Trigger.ENTROPY, 0.9)))
    assert not is_label(signals, ())


def test_the_id_of_a_label_depends_on_context_candidates_and_models_only() -> None:
    steps = [scored(0), scored(1, triggered=True)]
    [label] = folded(*steps).labels
    [again] = folded(*steps, task="other", problem_id="p").labels
    assert again.label_id == label.label_id
    other_context = [replace(steps[0], token_id=8), steps[1]]
    changed = [
        folded(*other_context),
        rollout_of(PROMPT[:2], steps, CandidateRule(2), LabelOptions(), DIGESTS, "request"),
        rollout_of(PROMPT, steps, CandidateRule(3), LabelOptions(), DIGESTS, "request"),
    ]
    for name in ("slm", "llm", "tokenizer", "template"):
        digests = replace(DIGESTS, **{name: "other"})
        changed.append(
            rollout_of(PROMPT, steps, CandidateRule(2), LabelOptions(), digests, "request")
        )
    found = {made.labels[0].label_id for made in changed}
    assert len(found) == len(changed) and label.label_id not in found


def test_labels_of_stored_schema_2_keep_their_ids() -> None:
    """The lake knows a label by its id: another way to compute it would count all labels twice."""
    text = json.dumps([2, "slm", "llm", "tok", "template", *PROMPT])
    context = hashlib.sha256(text.encode() + b",7" + json.dumps(["candidates", 7, 8]).encode())
    [label] = folded(scored(0), scored(1, triggered=True)).labels
    assert label.label_id == context.hexdigest()[:32]


def test_a_rollout_with_other_labels_has_another_id() -> None:
    made = folded(scored(0, triggered=True), scored(1, triggered=True))
    assert with_labels(made, made.labels) == made
    assert with_labels(made, made.labels[:1]).rollout_id != made.rollout_id
