"""Several selection servers in this process, and a proposer's client of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.types import ScoreQuery, ScoreReply
from services.serve.breaker import Backoff
from services.serve.remote_selector import RemoteSelector
from tests.helpers.selection_server import OPEN, FixedSelection, start_selection_server

QUICK = Backoff(first_s=0.02, longest_s=0.05)
NEVER = Backoff(first_s=600.0, longest_s=600.0)
LONG_S = 600.0
NO_LLM = LLMInfo("", "", frozenset(), 99)


@dataclass
class Selectors:
    """Selection servers in this process, and a proposer's client of them."""

    client: RemoteSelector
    fakes: dict[str, FixedSelection] = field(default_factory=dict)
    servers: dict[str, grpc.aio.Server] = field(default_factory=dict)

    def sequences_of(self, address: str, count: int) -> list[str]:
        """Names of sequences that go to `address` first."""
        found: list[str] = []
        number = 0
        while len(found) < count:
            name = f"sequence-{number}"
            number += 1
            if self.client.replicas_for(name)[:1] == [address]:
                found.append(name)
        return found

    async def score(
        self, sequence_id: str, patience_s: float = LONG_S, **options: Any
    ) -> ScoreReply:
        """options: of the query."""
        query = ScoreQuery(
            token_ids=(1, 2),
            positions=(1,),
            candidate_ids=((4, 5),),
            sequence_id=sequence_id,
            patience_s=patience_s,
            **options,
        )
        (future,) = self.client.submit([query])
        return await asyncio.wrap_future(future)

    async def stop(self, address: str) -> None:
        await self.servers.pop(address).stop(None)

    async def start(self, address: str, fake: FixedSelection) -> None:
        port = int(address.rpartition(":")[2])
        self.servers[address], _ = await start_selection_server(OPEN, selection=fake, port=port)
        self.fakes[address] = fake


@asynccontextmanager
async def selectors(
    count: int, backoff: Backoff = QUICK, **options: Any
) -> AsyncIterator[Selectors]:
    """options: of the fakes."""
    fakes: dict[str, FixedSelection] = {}

    async def find() -> list[str]:
        return list(fakes)

    client = RemoteSelector(find, OPEN, "tok", NO_LLM, backoff)
    started = Selectors(client, fakes)
    for _ in range(count):
        fake = FixedSelection(**options)
        server, address = await start_selection_server(OPEN, selection=fake)
        fakes[address] = fake
        started.servers[address] = server
    await client.refresh()
    try:
        yield started
    finally:
        await client.close()
        for server in started.servers.values():
            await server.stop(None)
