"""The LLM's thread and server: queries join, and what nobody waits for is dropped."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

import pytest

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import PendingQuery, always
from s2t_shared.errors import ConfigError, InvalidRequestError, SelectorUnavailableError
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply
from services.serve.remote_selector import RemoteSelector
from services.serve.selector_server import SelectorServer
from services.serve.selector_thread import SelectorThread
from tests.helpers.serving import becomes

INFO = LLMInfo("llm", "tok", frozenset({2}), 99)


class GatedLLM:
    """Answers all waiting queries in one step, when the gate is open."""

    info = INFO

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.steps: list[int] = []
        self._pending: list[PendingQuery] = []

    def check(self, query: ScoreQuery) -> None:
        if not query.token_ids:
            raise InvalidRequestError("token_ids: empty")

    def add(self, query: ScoreQuery, is_wanted: Callable[[], bool] = always) -> PendingQuery:
        self._pending.append(PendingQuery(query, is_wanted))
        return self._pending[-1]

    @property
    def idle(self) -> bool:
        return not self._pending

    def step(self) -> list[tuple[PendingQuery, ScoreReply | None]]:
        self.gate.wait(10)
        results: list[tuple[PendingQuery, ScoreReply | None]] = []
        for pending in self._pending:
            wanted = pending.is_wanted()
            reply = ScoreReply((PositionScores((-1.0, -2.0), 4),), "llm") if wanted else None
            results.append((pending, reply))
        self.steps.append(sum(reply is not None for _, reply in results))
        self._pending = []
        return results


def query(*token_ids: int) -> ScoreQuery:
    return ScoreQuery(token_ids=token_ids, positions=(0,), candidate_ids=((4, 5),))


def test_queries_that_wait_share_a_forward() -> None:
    llm = GatedLLM()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        calls = [asyncio.create_task(thread.score(query(i + 1))) for i in range(5)]
        await asyncio.sleep(0.05)
        llm.gate.set()
        replies = await asyncio.gather(*calls)
        assert all(reply.positions[0].top_id == 4 for reply in replies)

    asyncio.run(main())
    assert sum(llm.steps) == 5 and len(llm.steps) <= 2


def test_queries_that_nobody_waits_for_are_dropped() -> None:
    """A caller that has gone, and one whose time is up; the others are answered."""
    llm = GatedLLM()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        gone = asyncio.create_task(thread.score(query(1)))
        late = asyncio.create_task(thread.score(query(2), time_left_s=0.01))
        patient = asyncio.create_task(thread.score(query(3), time_left_s=60.0))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.01)
        llm.gate.set()
        with pytest.raises(SelectorUnavailableError, match="deadline passed"):
            await late
        assert (await patient).llm_digest == "llm"
        assert gone.cancelled()

    asyncio.run(main())
    assert sum(llm.steps) == 1


def test_a_wrong_query_is_refused_before_it_is_queued() -> None:
    async def main() -> None:
        thread = SelectorThread(GatedLLM())  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="empty"):
            await thread.score(query())

    asyncio.run(main())


def test_a_selector_server_answers_a_proposer() -> None:
    """Both ends together: the server and the client that proposers use."""
    llm = GatedLLM()
    llm.gate.set()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        server = SelectorServer(thread, SecurityConfig(), SelectorConfig(), quiet_s=0.0)
        await server.start()
        server.check_health()

        async def find() -> list[str]:
            return [f"127.0.0.1:{server.port}"]

        fallback = LLMInfo("", "", frozenset(), 9)
        client = RemoteSelector(find, SecurityConfig(), "tok", fallback)
        await client.wait_until_reachable(10.0)
        assert client.info == INFO
        (future,) = client.submit([query(1)])
        reply = await asyncio.wrap_future(future)
        assert reply == ScoreReply((PositionScores((-1.0, -2.0), 4),), "llm")
        (refused,) = client.submit([query()])
        with pytest.raises(InvalidRequestError):
            await asyncio.wrap_future(refused)
        await server.stop()

    asyncio.run(main())


def test_waiting_queries_are_counted() -> None:
    """Serve scales selectors by it: those that fail or are given up must not count for ever."""
    llm = GatedLLM()

    async def main() -> None:
        server = SelectorServer(SelectorThread(llm), SecurityConfig(), SelectorConfig())  # type: ignore[arg-type]
        await server.start()

        async def find() -> list[str]:
            return [f"127.0.0.1:{server.port}"]

        client = RemoteSelector(find, SecurityConfig(), "tok", LLMInfo("", "", frozenset(), 9))
        await client.wait_until_reachable(10.0)
        futures = client.submit([query(1), query(2), query()])
        assert await becomes(lambda: server.queries == 2)
        llm.gate.set()
        await asyncio.wait([asyncio.wrap_future(future) for future in futures])
        assert await becomes(lambda: server.queries == 0)
        await server.stop()

    asyncio.run(main())


def test_a_fixed_port_is_the_one_that_is_taken() -> None:
    """For a firewall's rule."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def main() -> None:
        selector = SelectorThread(GatedLLM())  # type: ignore[arg-type]
        server = SelectorServer(selector, SecurityConfig(), SelectorConfig(port=port))
        assert server.port == port
        with pytest.raises(ConfigError, match=rf":{port}.*choose another selector.port"):
            SelectorServer(selector, SecurityConfig(), SelectorConfig(port=port))
        await server.stop()

    asyncio.run(main())
