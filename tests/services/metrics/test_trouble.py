"""What a watcher must see when something is wrong: selectors that fail, labels that pile up."""

from __future__ import annotations

import asyncio
from pathlib import Path

from s2t_shared.config import SelectorConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import S2TError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.types import ScoreQuery
from services.metrics.registry import Registry
from services.metrics.table import Role
from services.serve.label_recorder import LabelRecorder
from services.serve.remote_selector import RemoteSelector
from services.serve.selector_server import SelectorServer
from tests.helpers.rollouts import make_rollout
from tests.helpers.selection_server import OPEN, start_selection_server
from tests.helpers.servers import FixedLLM
from tests.helpers.serving import becomes
from tests.services.metrics.scrape import Scrape

QUERY = ScoreQuery(token_ids=(1,), positions=(0,), candidate_ids=((4, 5),), sequence_id="s")


async def ask(selector: RemoteSelector, query: ScoreQuery = QUERY) -> str:
    (future,) = selector.submit([query])
    try:
        await asyncio.wrap_future(future)
    except S2TError as error:
        return type(error).__name__
    return "answered"


def test_a_selector_that_dies() -> None:
    """Its breaker opens, queries fail, and the LLM is not reachable; before, the opposite."""

    async def main() -> None:
        server, address = await start_selection_server(OPEN)

        async def addresses() -> list[str]:
            return [address]

        remote = RemoteSelector(addresses, OPEN, "tok", LLMInfo("", "", frozenset({2}), 50))
        registry = Registry(Role.PROPOSER)
        registry.add(remote.readings)
        await remote.refresh()
        assert await ask(remote) == "answered"
        found = Scrape.now(registry)
        assert found.sum("s2t_llm_reachable") == 1
        assert found.sum("s2t_selector_breakers", state="closed") == 1
        assert found.sum("s2t_selector_breakers", state="open") == 0
        assert found.sum("s2t_selections_total", outcome="answered") == 1
        assert found.sum("s2t_selection_latency_seconds_count") == 1
        await server.stop(0)
        assert await ask(remote) == "SelectorUnavailableError"
        found = Scrape.now(registry)
        assert found.sum("s2t_llm_reachable") == 0
        assert found.sum("s2t_selector_breakers", state="closed") == 0
        assert found.sum("s2t_selector_breakers") == 1
        assert found.sum("s2t_selections_total", outcome="failed") == 1
        assert found.sum("s2t_selection_latency_seconds_count") == 1, "a failure has no latency"
        await remote.close()

    asyncio.run(main())


def test_a_selector_under_load_that_stops() -> None:
    """Queries by status, those in progress, and that it drains."""

    async def main() -> None:
        llm = FixedLLM(kv_usage=0.5)
        server = SelectorServer(llm, OPEN, SelectorConfig(), drain_grace_s=0.2, quiet_s=0.0)
        await server.start()

        async def addresses() -> list[str]:
            return [f"127.0.0.1:{server.port}"]

        remote = RemoteSelector(addresses, OPEN, "tok", LLMInfo("", "", frozenset({2}), 50))
        await remote.refresh()

        def now(name: str, **labels: str) -> float:
            return Scrape.now(server.registry).sum(name, **labels)

        assert await ask(remote) == "answered"
        assert now("s2t_selector_queries_total", status="OK") == 1
        assert now("s2t_selector_positions_total") == 1
        assert now("s2t_selector_query_seconds_count") == 1
        bad = ScoreQuery(token_ids=(10**6,), positions=(0,), candidate_ids=((4,),), sequence_id="s")
        assert await ask(remote, bad) == "InvalidRequestError"
        assert now("s2t_selector_queries_total", status="INVALID_ARGUMENT") == 1
        assert now("s2t_selector_kv_usage_ratio") == 0.5 and now("s2t_selector_draining") == 0
        llm.open.clear()
        waiting = asyncio.create_task(ask(remote))
        assert await becomes(lambda: now("s2t_selector_queries_in_progress") == 1)
        stopping = asyncio.create_task(server.stop())
        assert await becomes(lambda: now("s2t_selector_draining") == 1)
        llm.open.set()
        assert await waiting == "answered"
        await stopping
        assert now("s2t_selector_queries_in_progress") == 0
        await remote.close()

    asyncio.run(main())


def test_labels_that_redis_does_not_take(tmp_path: Path) -> None:
    """They wait in the spool, and are lost by a closed writer; each is another metric."""
    writer = LabelWriter(LabelStream("redis://127.0.0.1:1/0"), tmp_path / "spool")
    registry = Registry(Role.PROPOSER)
    registry.add(LabelRecorder(writer).readings)
    assert Scrape.now(registry).sum("s2t_spool_bytes") == 0
    rollouts = [make_rollout(i) for i in range(3)]
    labels = sum(len(rollout.labels) for rollout in rollouts)
    for rollout in rollouts:
        writer.write([rollout]).result(timeout=10)
    found = Scrape.now(registry)
    assert found.sum("s2t_spool_rollouts") == 3 and found.sum("s2t_spool_bytes") > 1000
    assert found.sum("s2t_labels_written_total") == labels
    assert found.sum("s2t_labels_dropped_total") == 0
    writer.close()
    writer.write(rollouts)
    found = Scrape.now(registry)
    dropped = found.sum("s2t_labels_dropped_total", reason="the_writer_is_closed")
    assert dropped == labels == found.sum("s2t_labels_dropped_total")
