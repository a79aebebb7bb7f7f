"""Many requests at once: input order, errors in their places, bounded concurrency."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from s2t_shared.errors import InvalidRequestError, OverloadedError
from s2t_shared.requests import new_request
from s2t_shared.types import Answer, GenerateRequest
from services.rpc.ask_many import Outcome, Target, answer_all, bounded, describe
from tests.helpers.serving import (
    LLM_TEXT,
    SLM_TEXT,
    proposer_service,
    scripted_slm,
    with_gateway,
)


def test_outcomes_are_in_input_order(tmp_path: Path) -> None:
    s2t = new_request("x", "s2t", threshold=0.3, request_id="a")
    requests = [
        s2t,
        replace(s2t, request_id="b", samples=8, budget=7.0),
        new_request("x", "greedy", request_id="c"),
    ]
    seen: list[Outcome] = []

    def work(address: str) -> list[Outcome]:
        assert describe(Target(address)).slm_digest

        def keep(request: GenerateRequest, outcome: Outcome) -> None:
            seen.append(outcome)

        return answer_all(Target(address), iter(requests), on_answer=keep)

    first, refused, last = with_gateway(tmp_path, proposer_service(), work)
    assert isinstance(first, Answer) and first.text == LLM_TEXT
    assert isinstance(refused, InvalidRequestError) and "budget" in str(refused)
    assert isinstance(last, Answer) and last.text == SLM_TEXT
    assert len(seen) == 3


def test_who_asks_many_waits_for_a_place(tmp_path: Path) -> None:
    """An evaluation with more requests than the service takes at once loses none of them."""
    requests = [new_request("x", "greedy", request_id=str(i)) for i in range(12)]

    def work(address: str) -> list[Outcome]:
        return answer_all(Target(address), requests, concurrency=12, timeout_s=20.0)

    service = proposer_service(scripted_slm(step_s=0.002), max_ongoing_requests=2)
    outcomes = with_gateway(tmp_path, service, work)
    assert [type(outcome) for outcome in outcomes] == [Answer] * 12


def test_nobody_waits_beyond_the_timeout(tmp_path: Path) -> None:
    request = new_request("x", "greedy", request_id="r")

    def work(address: str) -> list[Outcome]:
        started = time.monotonic()
        outcomes = answer_all(Target(address), [request], timeout_s=0.3)
        assert time.monotonic() - started < 1.0
        return outcomes

    [outcome] = with_gateway(tmp_path, proposer_service(max_ongoing_requests=0), work)
    assert isinstance(outcome, OverloadedError)


def test_no_request_is_no_call() -> None:
    assert answer_all(Target("127.0.0.1:1"), []) == []


def test_concurrency_is_bounded() -> None:
    running = 0
    most = 0

    async def work(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (item % 3))
        running -= 1
        return item * 2

    assert asyncio.run(bounded(range(20), work, 4)) == [2 * i for i in range(20)]
    assert most == 4
