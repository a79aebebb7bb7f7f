"""Evaluation: the requests of a mode, grading, the figures of a table, local sufficiency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import (
    Answer,
    FinishReason,
    GenerateRequest,
    Mode,
    Prompt,
    Step,
    Trigger,
    Usage,
    Versions,
)
from services import evaluation
from services.evaluation import ModeSpec, Problem, answers_match, as_rows, load_problems, run_mode
from services.rpc.ask_many import Target
from tests.helpers.serving import LLM_TEXT, SLM_TEXT, proposer_service, with_gateway

PROMPT = Prompt(text="x")


def test_a_mode_asks_what_it_says() -> None:
    spec = ModeSpec(name="takeover", trigger="kl", budget=0.05, candidates=4, version="v1")
    request = spec.request(PROMPT, request_id="r", max_new_tokens=9, seed=3)
    options = request.options
    assert options.policy.mode is Mode.TAKEOVER and options.policy.trigger is Trigger.KL
    assert options.policy.candidates.k == 4 and request.budget == 0.05
    assert options.max_new_tokens == 9 and options.sampling.seed == 3
    assert options.version == "v1" and options.fresh_selections
    assert (
        ModeSpec(name="majority@4").request(PROMPT, request_id="r", max_new_tokens=9).samples == 4
    )
    assert spec.label == "takeover kl 5%" and ModeSpec(name="greedy").label == "greedy"


def test_figures_of_a_mode(tmp_path: Path) -> None:
    problems = [
        Problem("right", PROMPT, lambda text: text == LLM_TEXT),
        Problem("wrong", PROMPT, lambda text: text == SLM_TEXT),
    ]

    def work(address: str) -> list[evaluation.ModeResult]:
        target = Target(address)
        greedy = run_mode(target, ModeSpec(name="greedy"), problems, 40)
        s2t = run_mode(target, ModeSpec(name="s2t", trigger="entropy", budget=0.05), problems, 40)
        return [greedy, s2t]

    greedy, s2t = with_gateway(tmp_path, proposer_service(), work)
    assert greedy.correct == (False, True) and s2t.correct == (True, False)
    assert greedy.triggers == 0 and s2t.triggers == s2t.flips == 4
    assert s2t.failed == s2t.degraded == 0
    assert s2t.trigger_rate == 4 / s2t.tokens
    rows = as_rows([greedy, s2t])
    assert list(rows) == ["greedy", "s2t entropy 5%"]
    assert rows["greedy"]["relative_time"] == 1.0 and rows["s2t entropy 5%"]["gain"][0] == 0.0


def test_a_mode_that_always_fails_raises_its_error(tmp_path: Path) -> None:
    spec = ModeSpec(name="s2t", trigger="entropy", budget=7.0)

    def work(address: str) -> None:
        with pytest.raises(InvalidRequestError, match="budget"):
            run_mode(Target(address), spec, [Problem("p", PROMPT, bool)], 40)

    with_gateway(tmp_path, proposer_service(), work)


def test_local_sufficiency_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 steps the 3 first do not count, though their KL is the largest."""
    steps = [Step(index=i, token_id=1, kl=100.0, llm_top_rank=-1) for i in range(3)]
    steps += [Step(index=i, token_id=1, kl=float(-i), llm_top_rank=i - 3) for i in range(3, 20)]
    answer = Answer(
        token_ids=(1,) * 20,
        text="",
        finish_reason=FinishReason.STOP,
        usage=Usage(),
        versions=Versions(),
        steps=tuple(steps),
    )
    asked: list[GenerateRequest] = []

    def answer_all(target: Target, requests: list[GenerateRequest]) -> list[Any]:
        asked.extend(requests)
        return [answer]

    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    problems = [Problem("p", PROMPT, bool)]
    hits = evaluation.local_sufficiency(Target(""), problems, 40, share=0.2)
    assert hits == {1: 0.25, 2: 0.5, 4: 1.0, 8: 1.0}
    (request,) = asked
    assert request.options.score_rollout and request.return_steps and not request.labels.store


def test_answers_are_compared_as_numbers_or_text() -> None:
    assert answers_match("4", r"answer (\S+)")("the answer 4.0")
    assert answers_match("b", r"answer (\S+)")("the answer b")
    assert not answers_match("b", r"answer (\S+)")("the answer c")
    assert not answers_match("4", r"answer (\S+)")("no number")


def test_a_problem_without_an_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "a", "prompt": "x", "answer": "4"}\n', encoding="utf-8")
    (problem,) = load_problems(file, 10, r"(\d+)")
    assert problem.prompt == PROMPT and problem.is_correct("so 4")
    file.write_text('{"id": "a", "prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match='line 1: "answer" is missing'):
        load_problems(file, 10, "")
    assert len(load_problems(None, 3, "")) == 3
