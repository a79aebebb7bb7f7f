"""The selector client over the network: which replica it asks, and what it does when one is
lost."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray.serve.handle import DeploymentBroadcastResponse

from s2t_shared.config import Config, SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import S2TError, TokenizerMismatchError
from s2t_shared.types import ScoreQuery
from services.serve.remote_selector import RemoteSelector, address_finder
from tests.helpers.selection_server import OPEN, start_selection_server


def remote(
    address: list[str], tokenizer: str = "tok", security: SecurityConfig = OPEN
) -> RemoteSelector:
    async def addresses() -> list[str]:
        return address

    return RemoteSelector(addresses, security, tokenizer, LLMInfo("", "", frozenset({2}), 50))


def ask(selector: RemoteSelector, *token_ids: int) -> asyncio.Future:
    (future,) = selector.submit(
        [ScoreQuery(token_ids=token_ids, positions=(0,), candidate_ids=((4, 5),), sequence_id="s")]
    )
    return asyncio.wrap_future(future)


def test_remote_selector_learns_asks_and_survives_a_loss() -> None:
    """It takes the LLM's facts from the replica, answers, passes errors on as they were raised,
    goes to the other replica when one dies, and fails at once when none is left."""

    async def main() -> None:
        one, first = await start_selection_server(OPEN)
        two, second = await start_selection_server(OPEN)
        addresses = [first, second]
        selector = remote(addresses)
        assert selector.info.digest == "" and not selector.reachable
        with pytest.raises(S2TError, match="no selector"):
            await ask(selector, 1)
        await selector.refresh()
        assert selector.info == LLMInfo("llm", "tok", frozenset({1}), 99)
        reply = await ask(selector, 1)
        assert reply.positions[0].log_probs == (-1.0, -1.0) and reply.positions[0].top_id == 7
        with pytest.raises(TokenizerMismatchError, match="thirteen"):
            await ask(selector, 13)
        await one.stop(0)
        for _ in range(4):
            assert (await ask(selector, 1)).positions[0].top_id == 7
        await two.stop(0)
        for _ in range(2):
            with pytest.raises(S2TError, match="no selector"):
                await ask(selector, 1)

    asyncio.run(main())


def test_a_selector_of_another_tokenizer_is_refused() -> None:
    async def main() -> None:
        server, address = await start_selection_server(OPEN)
        selector = remote([address], tokenizer="other")
        await selector.refresh()
        assert not selector.reachable
        with pytest.raises(TokenizerMismatchError, match="not the SLM's"):
            selector.check_tokenizer()
        await server.stop(0)

    asyncio.run(main())


def test_waiting_for_the_first_selector() -> None:
    """A proposer starts without any selector when none comes in time, and refuses a wrong one at
    once."""

    async def main() -> None:
        server, address = await start_selection_server(OPEN)
        await remote([address]).wait_until_reachable(10.0)
        started = time.monotonic()
        absent = remote([])
        await absent.wait_until_reachable(0.05)
        assert not absent.reachable and time.monotonic() - started < 1.0
        with pytest.raises(TokenizerMismatchError, match="not the SLM's"):
            await remote([address], tokenizer="other").wait_until_reachable(10.0)
        await server.stop(0)

    asyncio.run(main())


def test_a_sequence_stays_with_its_replica() -> None:
    """So its KV is warm there; with another replica gone it does not move."""

    async def main() -> None:
        started = [await start_selection_server(OPEN) for _ in range(3)]
        addresses = [address for _, address in started]
        selector = remote(addresses)
        await selector.refresh()
        others = remote(list(reversed(addresses)))
        await others.refresh()
        orders = {}
        for name in map(str, range(30)):
            orders[name] = selector.replicas_for(name)
            assert orders[name] == others.replicas_for(name)
        assert {order[0] for order in orders.values()} == set(addresses)
        gone = addresses.pop()
        await selector.refresh()
        for name, order in orders.items():
            assert selector.replicas_for(name) == [a for a in order if a != gone]
        for server, _ in started:
            await server.stop(0)

    asyncio.run(main())


def test_a_replica_that_fails_is_not_asked_for_a_while() -> None:
    """Otherwise every query would wait for a connection that fails."""

    async def main() -> None:
        one, first = await start_selection_server(OPEN)
        two, second = await start_selection_server(OPEN)
        selector = remote([first, second])
        await selector.refresh()
        names = [name for name in map(str, range(30)) if selector.replicas_for(name)[0] == first]
        await one.stop(0)
        query = ScoreQuery(
            token_ids=(1,), positions=(0,), candidate_ids=((4, 5),), sequence_id=names[0]
        )
        (future,) = selector.submit([query])
        assert (await asyncio.wrap_future(future)).positions[0].top_id == 7
        assert selector.replicas_for(names[0]) == [second]
        await two.stop(0)

    asyncio.run(main())


def test_addresses_that_cannot_be_listed_change_nothing() -> None:
    async def main() -> None:
        server, address = await start_selection_server(OPEN)

        async def find() -> list[str]:
            if failing:
                raise RuntimeError("Serve is busy")
            return [address]

        failing = False
        selector = RemoteSelector(find, OPEN, "tok", LLMInfo("", "", frozenset(), 9))
        await selector.refresh()
        failing = True
        await selector.refresh()
        assert selector.reachable
        await server.stop(0)

    asyncio.run(main())


# -- where selectors are --------------------------------------------------------------------------


class SelectorHandle:
    """Stands for Serve's handle of the selectors and its replies: each says its address, fails
    (an error), or never answers (None)."""

    def __init__(self, *answers: str | Exception | None) -> None:
        self._answers = answers
        self.cancelled = 0

    def broadcast(self, method: str) -> SelectorHandle:
        assert method == "address"
        return self

    async def _fetch_replica_results_async(self) -> list[SelectorReply]:
        return [SelectorReply(self, answer) for answer in self._answers]


class SelectorReply:
    def __init__(self, handle: SelectorHandle, answer: str | Exception | None) -> None:
        self._handle = handle
        self._answer = answer

    async def get_async(self) -> str:
        if self._answer is None:
            await asyncio.sleep(60)
        if isinstance(self._answer, Exception):
            raise self._answer
        return str(self._answer)

    def cancel(self) -> None:
        self._handle.cancelled += 1


def test_a_selector_that_hangs_or_dies_hides_no_other() -> None:
    """Serve waits for all of them: no new selector was found until the hung one was killed."""
    handle = SelectorHandle("a:1", None, ValueError("dead"), "b:2")
    find = address_finder(Config(), handle, find_timeout_s=0.1)
    assert sorted(asyncio.run(find())) == ["a:1", "b:2"]
    assert handle.cancelled == 1, "its calls must not pile up"


def test_serve_still_has_what_the_finder_uses() -> None:
    """It is no public interface of Serve."""
    assert hasattr(DeploymentBroadcastResponse, "_fetch_replica_results_async")
