"""The real selector server over an LLM that is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import check_query
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply
from services.serve.selector_server import AsyncSelector, SelectorServer

OPEN = SecurityConfig()
VOCABULARY = 512


@dataclass
class FixedLLM:
    """Every candidate has log-probability -1. Answers while `open` is set."""

    info: LLMInfo = field(default_factory=lambda: LLMInfo("llm", "tok", frozenset({1}), 99))
    is_alive: bool = True
    open: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    silent_s: float = 0.0
    kv_usage: float | None = None

    def __post_init__(self) -> None:
        self.open.set()

    def shutdown(self) -> None:
        pass

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        check_query(query, self.info.max_length, VOCABULARY)
        self.asked += 1
        await self.open.wait()
        positions = (PositionScores((-1.0,) * len(ids), 7) for ids in query.candidate_ids)
        return ScoreReply(tuple(positions), self.info.digest)


@asynccontextmanager
async def selector_address(
    security: SecurityConfig = OPEN,
    llm: AsyncSelector | None = None,
    settings: SelectorConfig | None = None,
) -> AsyncIterator[str]:
    """The address of the real selector server before `llm`."""
    server = SelectorServer(llm or FixedLLM(), security, settings or SelectorConfig())
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()
