"""What both sides answer, for the gate: on the bundled pair, whose LLM is right."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.bundled import LLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.labels.label import Rollout
from s2t_shared.pair import Pair
from s2t_shared.requests import new_request
from services.train.gate_answers import Sides, compare_by_llm, held_out_prompts
from tests.helpers.lake import rollout

COUNT = 24


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.open("bundled", "bundled", batch_size=16, threads=1)


def prompts_of(pair: Pair) -> list[Rollout]:
    """Rollouts of held-out problems, of which only the prompts count."""
    rollouts = []
    for number, problem in enumerate(bundled_problems.problems("test", COUNT)):
        ids = tuple(pair.tokenizer.encode_text(problem.prompt))
        values = {"token_ids": ids, "prompt_length": len(ids), "problem_id": problem.id}
        rollouts.append(Rollout(**(rollout(number).__dict__ | values)))
    return rollouts


def test_the_llm_finds_what_it_selected_likelier(pair: Pair) -> None:
    """Against the SLM alone, and by the log-probabilities of a plain forward pass."""
    assert pair.llm is not None
    sides = Sides(
        pair=pair,
        new=new_request("", mode="s2t", trigger="entropy", threshold=1.0, max_new_tokens=40),
        old=new_request("", mode="greedy", max_new_tokens=40),
    )
    rollouts = prompts_of(pair)
    likelihood, finished = compare_by_llm(sides, rollouts, pair.llm)
    assert len(likelihood.new) == len(finished.new) == COUNT
    assert likelihood.clusters == COUNT
    assert sum(likelihood.new) > sum(likelihood.old)
    assert all(finished.new)
    prompt = rollouts[0].token_ids
    [answer] = pair.generate([bundled_problems.problems("test", 1)[0].prompt], mode="greedy")
    llm = AutoModelForCausalLM.from_pretrained(LLM_DIR)
    with torch.no_grad():
        logits = llm(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
    excluded = list(pair.engine.proposer.info.excluded_ids)
    logits[:, excluded] = -torch.inf
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    chosen = log_probs.gather(1, torch.tensor(answer.token_ids)[:, None])
    assert likelihood.old[0] == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_each_problem_is_asked_once(pair: Pair) -> None:
    rollouts = prompts_of(pair)
    assert held_out_prompts([*rollouts, *rollouts], 10) == rollouts[:10]
    assert held_out_prompts(rollouts, 1000) == rollouts
