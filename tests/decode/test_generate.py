"""Text around the engine: extraction of answers, the majority vote, stop strings, deadlines,
thresholds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.answers import extract_answer
from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator, with_thresholds
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import (
    ConfigError,
    DeadlineExceededError,
    EvaluationSplitError,
    InvalidRequestError,
    S2TError,
    SelectorUnavailableError,
)
from s2t_shared.labels.label import Digests, rollout_of
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.policy import Calibration
from s2t_shared.requests import check_request
from s2t_shared.statistics import hit_at, paired_difference, spearman, wilson_interval
from s2t_shared.types import (
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    LabelRule,
    Mode,
    Policy,
    Prompt,
    Sampling,
    Trigger,
)
from tests.helpers.engine import ALL, FAILURES, PROMPTS, failing_engine

PROBLEM = problems.problems("test", 8)


@pytest.fixture(scope="module")
def pair() -> Generator:
    tokenizer = Tokenizer.load(SLM_DIR)
    slm, llm = ModelRuntime.load(str(SLM_DIR)), ModelRuntime.load(str(LLM_DIR))
    scorer = LLMSelector(llm, tokenizer.digest)
    return Generator(
        tokenizer,
        Engine(Proposer(slm, reserved_ids(tokenizer, slm.vocab_rows)), InProcessSelector(scorer)),
    )


def options(request: GenerateRequest, **changes: Any) -> GenerateRequest:
    """The request with other decode options."""
    return replace(request, options=replace(request.options, **changes))


def one(generator: Generator, request: GenerateRequest) -> Answer:
    ((_, answer),) = generator.generate([request])
    assert isinstance(answer, Answer), answer
    return answer


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        (r"so \boxed{42} is it, not 7", "", "42"),
        ("first 3, the answer is 1,234.", "", "1234"),
        ("Answer: 9 11\nnot 5", "", "9 11"),
        ("no statement but 12 then 15", "", "15"),
        ("nothing", "", None),
        ("the answer is blue.", "", "blue"),
        ("So Mia buys 4 and 15 .", r"buys (\d+) and (\d+)", "4 15"),
        ("x", "y", None),
    ],
)
def test_extract_answer(text: str, pattern: str, expected: str | None) -> None:
    assert extract_answer(text, pattern) == expected


def test_majority_is_the_vote_of_its_samples(pair: Generator) -> None:
    """The answer of majority@n is the most frequent one among the same n samples drawn alone -
    never "any right"."""
    for problem in PROBLEM:
        request = GenerateRequest(
            request_id="m",
            prompt=Prompt(text=problem.prompt),
            samples=7,
            answer_pattern=problems.ANSWER_PATTERN,
            options=DecodeOptions(
                policy=Policy(mode=Mode.MAJORITY), max_new_tokens=40, sampling=Sampling(1.0, seed=5)
            ),
        )
        majority = one(pair, request)
        samples = [
            options(
                request,
                policy=Policy(mode=Mode.SAMPLE),
                sampling=Sampling(1.0, seed=5 * 64 + i),
            )
            for i in range(7)
        ]
        alone = [answer for _, answer in pair.generate(samples)]
        votes = Counter(extract_answer(a.text, problems.ANSWER_PATTERN) for a in alone)
        assert votes[extract_answer(majority.text, problems.ANSWER_PATTERN)] == max(votes.values())
        assert majority.usage.completion_tokens == sum(len(a.token_ids) for a in alone)


def test_stop_string_ends_the_answer(pair: Generator) -> None:
    """The text ends before the stop string, the reason is "stop", and the row is free again."""
    request = GenerateRequest(
        request_id="s",
        prompt=Prompt(text=PROBLEM[0].prompt),
        options=DecodeOptions(max_new_tokens=40),
    )
    whole = one(pair, request)
    cut = one(pair, replace(request, stop=(" first",)))
    assert cut.text == whole.text.partition(" first")[0] and cut.finish_reason.value == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    assert pair.engine.idle and pair.engine.proposer.runtime.pool.live_slots == 0


@pytest.mark.parametrize(
    ("stop", "accepted"),
    [
        (("x" * 256, "é" * 256, "x" * 256, "y" * 256), True),
        (("x" * 257,), False),
        (("x" * 3_000_000,), False),
        (("x" * 205,) * 5, False),
        (("x",) * 17, False),
        (("",), False),
    ],
)
def test_stop_strings_are_bounded(stop: tuple[str, ...], accepted: bool) -> None:
    """Matching runs in the thread that decodes for everybody."""
    request = GenerateRequest(request_id="s", prompt=Prompt(text="x"), stop=stop)
    if accepted:
        check_request(request)
    else:
        with pytest.raises(InvalidRequestError, match=r"stop: .* at most|stop: at most"):
            check_request(request)


def test_length_and_deadline(pair: Generator) -> None:
    request = GenerateRequest(
        request_id="d",
        prompt=Prompt(text=PROBLEM[0].prompt),
        options=DecodeOptions(max_new_tokens=3),
    )
    assert one(pair, request).finish_reason.value == "length"
    ((_, late),) = pair.generate([replace(options(request, max_new_tokens=40), timeout_s=1e-6)])
    assert isinstance(late, DeadlineExceededError) and pair.engine.idle


def test_errors_come_in_place_of_their_own_answer_only(pair: Generator) -> None:
    good = GenerateRequest(
        request_id="good",
        prompt=Prompt(text=PROBLEM[0].prompt),
        options=DecodeOptions(max_new_tokens=5),
    )
    outcomes = {
        r.request_id: o
        for r, o in pair.generate([replace(good, request_id="bad", samples=0), good])
    }
    assert isinstance(outcomes["bad"], InvalidRequestError) and isinstance(outcomes["good"], Answer)


def test_budgets_become_thresholds() -> None:
    calibration = Calibration({Trigger.ENTROPY: {0.01: 2.0, 0.1: 1.0}})
    request = GenerateRequest(
        request_id="b",
        prompt=Prompt(text="x"),
        budget=0.01,
        options=DecodeOptions(policy=Policy(mode=Mode.S2T)),
    )
    assert with_thresholds(request, calibration).options.policy.threshold == 2.0
    middle = with_thresholds(replace(request, budget=0.0316), calibration).options.policy.threshold
    assert 1.4 < middle < 1.6  # halfway in log budget
    random = with_thresholds(
        options(request, policy=Policy(mode=Mode.S2T, trigger=Trigger.RANDOM)), Calibration({})
    )
    assert random.options.policy.threshold == pytest.approx(0.99)
    with pytest.raises(ConfigError, match="no calibrated"):
        with_thresholds(
            options(request, policy=Policy(mode=Mode.S2T, trigger=Trigger.KL)), calibration
        )
    assert Calibration.from_json(calibration.to_json()) == calibration


def test_labels_of_a_scored_rollout(pair: Generator) -> None:
    """Each label repeats what a direct look gives: context, candidates in SLM order, ranks, mass;
    warm-up left out; the same rollout gives the same ids; an evaluation split gives none."""
    answer = one(
        pair,
        GenerateRequest(
            request_id="r",
            prompt=Prompt(text=PROBLEM[1].prompt),
            options=DecodeOptions(max_new_tokens=40, score_rollout=True),
        ),
    )
    prompt = pair.tokenizer.encode(Prompt(text=PROBLEM[1].prompt))
    options = LabelOptions(
        store=True, task="shop", problem_id="p", rules=(LabelRule(Trigger.ENTROPY, -1.0),)
    )
    digests = Digests("slm", answer.versions.llm, "tok")
    rollout = rollout_of(prompt, answer.steps, CandidateRule(16), options, digests, "r")
    labels = rollout.labels
    assert rollout.token_ids == (*prompt, *answer.token_ids) and rollout.prompt_length == len(
        prompt
    )
    assert [label.position - len(prompt) for label in labels] == list(
        range(3, len(answer.token_ids))
    )
    for label in labels:
        step = answer.steps[label.position - len(prompt)]
        assert step.support is not None and step.llm is not None
        assert label.candidate_ids == step.support.ids[:16] and label.llm_top_id == step.llm.top_id
        assert label.candidate_ids[
            label.best
        ] == label.llm_top_id or label.llm_top_rank not in range(16)
        assert 0.0 < label.mass <= 1.0001 and label.kl >= -1e-6

    def ids(**changes: str) -> list[str]:
        changed = replace(digests, **changes)
        return [
            a.label_id
            for a in rollout_of(
                prompt, answer.steps, CandidateRule(16), options, changed, "x"
            ).labels
        ]

    assert ids() == [label.label_id for label in labels]
    for part in ("slm", "llm", "tokenizer", "template"):
        assert not set(ids(**{part: "new"})) & set(ids()), part
    with pytest.raises(EvaluationSplitError):
        rollout_of(
            prompt, answer.steps, CandidateRule(16), replace(options, split="Test"), digests, "r"
        )


def test_problem_splits_are_disjoint() -> None:
    train = {p.prompt.split(" has ", 1)[1] for p in problems.problems("train", 3000)}
    test = {p.prompt.split(" has ", 1)[1] for p in problems.problems("test", 600)}
    assert len(train) == 3000 and not train & test


def test_metrics() -> None:
    low, high = wilson_interval(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert paired_difference([True, True, False, True], [False, True, False, False])[0] == 0.5
    assert hit_at([0, 1, 3, -1])[2] == 0.5
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


@pytest.mark.parametrize("failure", FAILURES)
def test_an_answer_of_mode_llm_has_something_of_the_llm(
    models: dict[str, Path], failure: str
) -> None:
    """One without any step of the LLM is an error; one that the LLM left half-way is an answer that
    says so."""
    request = GenerateRequest(
        request_id="r",
        prompt=Prompt(token_ids=PROMPTS[0]),
        options=DecodeOptions(policy=Policy(mode=Mode.LLM), max_new_tokens=6),
    )

    def outcome(healthy: int, policy: Policy) -> Answer | S2TError:
        generator = Generator(
            Tokenizer.load(models["slm"]), failing_engine(models, healthy, failure)[0]
        )
        ((_, answer),) = generator.generate([options(request, policy=policy)])
        return answer

    assert isinstance(outcome(0, Policy(mode=Mode.LLM)), SelectorUnavailableError)
    for healthy, policy in ((2, Policy(mode=Mode.LLM)), (0, ALL)):
        answer = outcome(healthy, policy)
        assert (
            isinstance(answer, Answer)
            and answer.usage.degraded_steps == len(answer.token_ids) - healthy > 0
        )
