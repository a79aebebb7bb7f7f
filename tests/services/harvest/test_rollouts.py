"""Rollouts and their labels, of both models in this process and of a service."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.errors import ConfigError, InvalidRequestError, SelectorUnavailableError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.types import WARMUP_STEPS, LabelRule, Prompt, Trigger
from services.harvest import rollouts
from services.harvest.rollouts import (
    HarvestOptions,
    PairRollouts,
    RolloutCounts,
    RolloutOutcome,
    RolloutRequest,
    ServiceRollouts,
)
from services.harvest.run import harvest
from services.rpc.ask_many import Target
from services.serve.proposer_service import ProposerService
from tests.helpers.harvest import OPTIONS, training_prompts
from tests.helpers.serving import (
    UNSURE_AT,
    WORDS,
    proposer_service,
    scripted_llm,
    scripted_slm,
    with_gateway,
)

NO_REDIS = "redis://127.0.0.1:1/0"
REQUEST = RolloutRequest(
    request_id="r1",
    problem_id="p1",
    prompt=Prompt(text="x"),
    rules=(LabelRule(Trigger.ENTROPY, 0.3),),
)
LONG = replace(REQUEST, request_id="r2", problem_id="p2", prompt=Prompt(text="x " * 100_000))
ROLLOUTS = HarvestOptions(task="t", candidates=2)


def test_labels_are_what_both_models_say(source: PairRollouts, tmp_path: Path) -> None:
    """Against plain Hugging Face forwards: the SLM's top 16 with its log-probabilities, the LLM's
    of the same ids and its first choice, at every labelled position; and the LLM's rank at every
    position."""
    harvest(source, training_prompts(4), Lake(tmp_path), replace(OPTIONS, budget=0.3))
    slm, llm = (AutoModelForCausalLM.from_pretrained(folder) for folder in (SLM_DIR, LLM_DIR))
    reserved = reserved_ids(Tokenizer.load(SLM_DIR), slm.get_input_embeddings().weight.shape[0])

    def log_probs(model: torch.nn.Module, token_ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits[0].float()
        logits[:, [i for i in reserved if i < logits.shape[1]]] = -torch.inf
        return logits.log_softmax(-1)

    seen = 0
    for r in Lake(tmp_path).rollouts():
        p_slm = log_probs(slm, r.token_ids)
        p_llm = log_probs(llm, r.token_ids)
        for label in r.labels:
            at = label.position - 1
            top = p_slm[at].topk(16)
            assert label.candidate_ids == tuple(top.indices.tolist())
            assert label.slm_log_probs == pytest.approx(top.values.tolist(), abs=1e-4)
            assert label.llm_log_probs == pytest.approx(p_llm[at, top.indices].tolist(), abs=1e-4)
            assert label.llm_top_id == int(p_llm[at].argmax())
            assert label.position - r.prompt_length >= WARMUP_STEPS
            seen += 1
        ranks = []
        for at in range(r.prompt_length - 1, len(r.token_ids) - 1):
            support = p_slm[at].topk(64).indices.tolist()
            ranks.append(support.index(int(p_llm[at].argmax())))
        assert list(r.llm_top_rank) == ranks
        assert len(r.kl) == len(r.entropy) == len(ranks)
    assert seen > 15


# -- through a service ----------------------------------------------------------------------------


def rollouts_of(
    folder: Path,
    service: ProposerService,
    returns_labels: bool,
    *requests: RolloutRequest,
) -> dict[str, RolloutOutcome]:
    """The outcomes by problem id."""
    outcomes: dict[str, RolloutOutcome] = {}

    def on_rollout(request: RolloutRequest, outcome: RolloutOutcome) -> None:
        outcomes[request.problem_id] = outcome

    def work(address: str) -> None:
        source = ServiceRollouts(Target(address), returns_labels)
        source.make_rollouts(requests, ROLLOUTS, on_rollout)

    with_gateway(folder, service, work)
    return outcomes


def test_a_service_returns_rollouts(tmp_path: Path) -> None:
    """With the labels of the rules' positions; a request that is refused spoils no other."""
    outcomes = rollouts_of(tmp_path, proposer_service(), True, REQUEST, LONG)
    rollout = outcomes["p1"]
    assert isinstance(rollout, Rollout)
    assert (rollout.request_id, rollout.problem_id, rollout.task) == ("r1", "p1", "t")
    assert [label.position - rollout.prompt_length for label in rollout.labels] == list(UNSURE_AT)
    assert isinstance(outcomes["p2"], InvalidRequestError)


def test_a_service_stores_labels(tmp_path: Path) -> None:
    """Counts come back when the labels are durable; a calibrating rollout comes back whole."""
    calibrating = replace(REQUEST, request_id="r3", problem_id="p3", calibrating=True)
    writer = LabelWriter(LabelStream(NO_REDIS), tmp_path / "spool")
    service = proposer_service(writer=writer)
    outcomes = rollouts_of(tmp_path, service, False, REQUEST, calibrating)
    assert outcomes["p1"] == RolloutCounts(labels=len(UNSURE_AT), tokens=len(WORDS) + 1)
    assert isinstance(outcomes["p3"], Rollout)
    files = [file for file in (tmp_path / "spool").rglob("*") if file.is_file()]
    spooled = b"".join(file.read_bytes() for file in files)
    assert spooled.count(b'"request_id":"r1"') == 1
    assert spooled.count(b'"request_id":"r3"') == 0


def test_a_service_that_stores_no_labels_is_named(tmp_path: Path) -> None:
    """At once: waiting would not mend it."""
    outcomes = rollouts_of(tmp_path, proposer_service(), False, REQUEST)
    assert isinstance(outcomes["p1"], ConfigError)
    assert "no Redis is configured" in str(outcomes["p1"])


def test_an_llm_that_is_away_is_waited_for(tmp_path: Path) -> None:
    slm = scripted_slm()
    selector = scripted_llm(slm)
    service = proposer_service(slm, selector)

    def work(address: str) -> list[RolloutOutcome]:
        source = ServiceRollouts(Target(address), returns_labels=True)
        selector.available = False
        back = threading.Timer(0.5, setattr, (selector, "available", True))
        back.start()
        outcomes: list[RolloutOutcome] = []
        source.make_rollouts([REQUEST], ROLLOUTS, lambda _, outcome: outcomes.append(outcome))
        back.join()
        return outcomes

    (outcome,) = with_gateway(tmp_path, service, work)
    assert isinstance(outcome, Rollout)
    assert len(selector.queries) > 1


def test_patience_ends(tmp_path: Path) -> None:
    slm = scripted_slm()
    selector = scripted_llm(slm)
    service = proposer_service(slm, selector)

    def work(address: str) -> list[RolloutOutcome]:
        source = ServiceRollouts(Target(address), returns_labels=True, patience_s=0.5)
        selector.available = False
        outcomes: list[RolloutOutcome] = []
        source.make_rollouts([REQUEST], ROLLOUTS, lambda _, outcome: outcomes.append(outcome))
        return outcomes

    (outcome,) = with_gateway(tmp_path, service, work)
    assert isinstance(outcome, SelectorUnavailableError)


def test_a_service_without_an_llm_is_refused(tmp_path: Path) -> None:
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm, available=False))

    def work(address: str) -> None:
        with pytest.raises(SelectorUnavailableError, match="the service has no LLM"):
            ServiceRollouts(Target(address), returns_labels=True)

    with_gateway(tmp_path, service, work)


def test_a_harvest_follows_the_number_of_proposers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asked as many at once as there were proposers when it began; those that Serve added later
    had nothing to do."""
    monkeypatch.setattr(rollouts, "FOLLOW_S", 0.05)
    monkeypatch.setattr(rollouts, "ROLLOUTS_PER_PROPOSER", 1)
    service = proposer_service()
    described = cache(rollouts.describe)
    proposers = [1]
    monkeypatch.setattr(
        rollouts, "describe", lambda to: replace(described(to), proposers=proposers[0])
    )
    ongoing: set[str] = set()
    most = [0]

    class Watched(ServiceRollouts):
        async def _ask(self, caller: Any, request: RolloutRequest, options: Any) -> Any:
            ongoing.add(request.request_id)
            most[0] = max(most[0], len(ongoing))
            await asyncio.sleep(0.2)
            ongoing.discard(request.request_id)
            return await super()._ask(caller, request, options)

    def work(address: str) -> list[int]:
        seen: list[int] = []

        def on_rollout(request: RolloutRequest, outcome: RolloutOutcome) -> None:
            seen.append(most[0])
            proposers[0] = 3 if len(seen) < 12 else 1

        requests = [replace(REQUEST, request_id=f"r{i}", problem_id=f"p{i}") for i in range(40)]
        source = Watched(Target(address), returns_labels=True)
        source.make_rollouts(requests, ROLLOUTS, on_rollout)
        assert source._concurrency == 1 and not ongoing
        return seen

    seen = with_gateway(tmp_path, service, work)
    assert len(seen) == 40
    assert seen[0] == 1 and seen[-1] == 3
