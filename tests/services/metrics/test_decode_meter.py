"""What an engine decides is counted, each kind of event by its own metric: a proposer over a
scripted SLM and a scripted LLM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.errors import S2TError
from s2t_shared.policy import BUDGETS, Calibration
from s2t_shared.requests import new_request
from s2t_shared.types import GenerateRequest, Progress, Sampling, Trigger
from services.serve.proposer_service import ProposerService
from tests.helpers import serving
from tests.helpers.serving import (
    SLM_TEXT,
    UNSURE_AT,
    FixedVersions,
    becomes,
    local_selector,
    proposer_service,
    scripted_llm,
    scripted_slm,
)
from tests.services.metrics.scrape import Scrape

TOKENS = len(SLM_TEXT.split()) + 1  # and the end
TRIGGERS = len(UNSURE_AT)
PROMPT = "how many words"


def request(mode: str = "greedy", **values: Any) -> GenerateRequest:
    if "s2t" in mode or mode == "takeover":
        values.setdefault("budget", 0.01)
    return new_request(PROMPT, mode, max_new_tokens=64, **values)


def counted(requests: Sequence[GenerateRequest], service: ProposerService | None = None) -> Scrape:
    """What a proposer has counted after these requests, one after the other."""
    service = service or proposer_service()

    async def main() -> None:
        for asked in requests:
            try:
                await service.answer(asked)
            except S2TError:
                continue

    try:
        asyncio.run(main())
        return Scrape.now(service.registry)
    finally:
        service.close()


def test_tokens_and_times_of_a_plain_answer() -> None:
    found = counted([request()] * 3)
    assert found.sum("s2t_prompt_tokens_total", mode="greedy") == 3 * len(PROMPT.split())
    tokens = found.sum("s2t_generation_tokens_total", mode="greedy", chosen_by="slm")
    assert tokens == 3 * TOKENS == found.sum("s2t_generation_tokens_total")
    assert found.sum("s2t_time_to_first_token_seconds_count", mode="greedy") == 3
    assert found.sum("s2t_queue_time_seconds_count", mode="greedy") == 3
    between = found.sum("s2t_inter_token_latency_seconds_count", mode="greedy")
    assert between == 3 * (TOKENS - 1)
    for name in ("triggers", "flips", "degraded_steps", "parked_steps", "llm_forwards"):
        assert found.sum(f"s2t_{name}_total") == 0, name


def test_selections_of_the_llm() -> None:
    """At two tokens the LLM is asked and chooses another one."""
    found = counted([request("s2t")])
    for name in ("triggers", "flips", "parked_steps", "llm_forwards"):
        assert found.sum(f"s2t_{name}_total", mode="s2t") == TRIGGERS, name
    assert found.sum("s2t_generation_tokens_total", chosen_by="llm") == TRIGGERS
    assert found.sum("s2t_degraded_steps_total") == 0
    assert found.sum("s2t_compared_selections_total", chooser="slm") == TRIGGERS
    assert found.sum("s2t_agreed_selections_total", chooser="slm") == 0


def test_an_llm_that_agrees() -> None:
    """Agree@1 was 1 minus the share of flips only by chance: it is counted for itself."""
    slm = scripted_slm()
    found = counted([request("s2t")], proposer_service(slm, ScriptedSelector()))
    assert found.sum("s2t_triggers_total") == TRIGGERS and found.sum("s2t_flips_total") == 0
    assert found.sum("s2t_agreed_selections_total", chooser="slm") == TRIGGERS


def test_an_llm_that_is_away() -> None:
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm, available=False))
    found = counted([request("s2t")], service)
    assert found.sum("s2t_degraded_steps_total", mode="s2t") == TRIGGERS
    assert found.sum("s2t_llm_forwards_total") == 0
    assert found.sum("s2t_compared_selections_total") == 0


def test_the_llms_own_answer() -> None:
    slm = scripted_slm()
    service = proposer_service(slm, ScriptedSelector(prefers=0))
    found = counted([request("llm")], service)
    for name in ("llm_forwards", "parked_steps", "generation_tokens"):
        assert found.sum(f"s2t_{name}_total", mode="llm") == 1, name
    assert found.sum("s2t_triggers_total") == 0


@pytest.fixture
def kl_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = dict.fromkeys(BUDGETS, 0.3)
    both = Calibration({Trigger.ENTROPY: thresholds, Trigger.KL: thresholds})
    monkeypatch.setattr(serving, "CALIBRATION", both)


def test_drafts(kl_thresholds: None) -> None:
    """The LLM checks what the SLM drafts: all stand but those where it chooses another token, and
    what was drafted behind them is lost."""
    found = counted([request("s2t", trigger="kl")])
    drafted = found.sum("s2t_draft_tokens_total", mode="s2t")
    accepted = found.sum("s2t_accepted_draft_tokens_total", mode="s2t")
    flips = found.sum("s2t_flips_total", mode="s2t")
    assert flips == TRIGGERS and accepted > 0 and drafted >= accepted + flips
    assert found.sum("s2t_parked_steps_total") == 0, "it decodes on while the LLM checks"
    assert 0 < found.sum("s2t_llm_forwards_total") <= drafted


def test_the_local_selector(kl_thresholds: None) -> None:
    """It prefers the last candidate, as the LLM does: with a KL trigger both are asked."""
    versions = FixedVersions(local_selector("v1"))
    found = counted(
        [request("s2t_local"), request("s2t_local", trigger="kl")],
        proposer_service(versions=versions),
    )
    assert found.sum("s2t_generation_tokens_total", chosen_by="local") == 2 * TRIGGERS
    assert found.sum("s2t_compared_selections_total", chooser="local") == TRIGGERS
    assert found.sum("s2t_agreed_selections_total", chooser="local") == TRIGGERS


def test_samples_of_a_majority_count_as_sampled() -> None:
    asked = request("majority@3", sampling=Sampling(seed=1))
    found = counted([asked])
    tokens = found.sum("s2t_generation_tokens_total", mode="sample", chosen_by="sampler")
    assert tokens == 3 * TOKENS
    assert found.sum("s2t_time_to_first_token_seconds_count", mode="sample") == 3


def test_the_rest_of_an_answer_has_no_first_token() -> None:
    """An answer that another proposer began would count as one that began at once, and its LLM
    forwards and tokens twice."""
    slm = scripted_slm()
    decided = tuple(slm.tokenizer.id_of(word) for word in SLM_TEXT.split()[:5])
    progress = Progress(
        slm="scripted", version="", threshold=0.3, llm_forwards=1, token_ids=decided
    )
    rest = replace(request("s2t"), progress=progress)
    found = counted([rest], proposer_service(slm))
    assert found.sum("s2t_time_to_first_token_seconds_count") == 0
    assert found.sum("s2t_llm_forwards_total") == 1, "the second of two divergence points"
    assert found.sum("s2t_generation_tokens_total") == TOKENS - len(decided)


def test_what_the_engine_holds() -> None:
    """Running, waiting and parked sequences, and the KV share, while the LLM is late; all back at
    0 when their callers have gone, and nothing is remembered of them."""
    slm = scripted_slm(slots=2)
    service = proposer_service(slm, scripted_llm(slm, late=True), selection_timeout_s=60.0)

    async def main() -> None:
        tasks = [asyncio.create_task(service.answer(request("s2t"))) for _ in range(3)]
        held = {"running": 2.0, "waiting": 1.0, "parked": 2.0}

        def now(name: str) -> float:
            return Scrape.now(service.registry).sum(name)

        for name, count in held.items():
            assert await becomes(lambda n=name, c=count: now(f"s2t_sequences_{n}") == c), name
        assert now("s2t_kv_usage_ratio") == 1.0 and now("s2t_requests_ongoing") == 3
        for task in tasks:
            task.cancel()
        for name in held:
            assert await becomes(lambda n=name: now(f"s2t_sequences_{n}") == 0), name
        assert now("s2t_kv_usage_ratio") == 0
        assert await becomes(lambda: not service._engine.meter._seen)

    asyncio.run(main())
    service.close()


def test_versions() -> None:
    versions = FixedVersions(local_selector("v7"), on_trial=local_selector("v8"), share=0.25)
    found = counted([], proposer_service(versions=versions))
    assert found.sum("s2t_version_info", live="v7", canary="v8", slm="scripted") == 1
    assert found.sum("s2t_canary_share") == 0.25
    assert found.sum("s2t_version_created_timestamp_seconds") == versions.live_created_at


def test_no_version_has_no_age() -> None:
    assert "s2t_version_created_timestamp_seconds" not in counted([]).labels
