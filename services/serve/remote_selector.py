"""A `SelectorClient` over the network: which selector replica to ask, and what to do when it does
not answer.

Each sequence goes to the replica that rendezvous hashing of its id names, so that its KV stays warm
there. A replica that fails is left alone for a second; its sequences go to the next one in their
order. When none is left, futures fail at once with `SelectorUnavailableError` and the engine
degrades.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import grpc
import grpc.aio

from s2t_shared.config import SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import SelectorUnavailableError, TokenizerMismatchError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import channels, wire

log = logging.getLogger(__name__)
REST_AFTER_FAILURE_S = 1.0
REFRESH_S = 2.0
CALL_TIMEOUT_S = 30.0

Addresses = Callable[[], Awaitable[Sequence[str]]]


class RemoteSelector:
    """Lives on one asyncio loop; `submit` may be called from any thread."""

    def __init__(
        self,
        addresses: Addresses,
        security: SecurityConfig,
        tokenizer_digest: str,
        fallback: LLMInfo,
    ) -> None:
        """`addresses`: asks where the selectors are now. `fallback`: assumed until one was
        reached."""
        self._find, self._security = addresses, security
        self._tokenizer_digest = tokenizer_digest
        self._metadata = channels.call_metadata(channels.read_token(security.token_file))
        self._stubs: dict[str, Any] = {}
        self._resting: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self.info = fallback
        self.refused = ""
        self._watcher = self._loop.create_task(self._watch())

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        return [
            asyncio.run_coroutine_threadsafe(self._score(query), self._loop) for query in queries
        ]

    @property
    def reachable(self) -> bool:
        return bool(self._stubs)

    async def refresh(self) -> None:
        """Learn the selectors' addresses; admit those whose tokenizer is ours."""
        try:
            found = set(await self._find())
        except Exception as error:  # noqa: BLE001 - the border to Serve: whatever it raises means "not now"
            log.info("selectors cannot be listed now: %s", type(error).__name__)
            return
        for gone in self._stubs.keys() - found:
            del self._stubs[gone]
        for address in sorted(found - self._stubs.keys()):
            stub = pb_grpc.SelectionServiceStub(
                channels.open_channel(address, self._security.authority)
            )
            try:
                model = await stub.DescribeModel(
                    pb.DescribeModelRequest(), timeout=5.0, metadata=self._metadata
                )
            except grpc.RpcError:
                continue
            if model.tokenizer_digest != self._tokenizer_digest:
                self.refused = (
                    f"a selector's tokenizer ({model.tokenizer_digest}) is not the SLM's "
                    f"({self._tokenizer_digest}); choose two models of one family"
                )
                log.error("selector refused: %s", self.refused)
                continue
            self.info = LLMInfo(
                model.digest, model.tokenizer_digest, frozenset(model.eos_ids), model.max_length
            )
            self._stubs[address] = stub
            self._resting.pop(address, None)

    def check(self) -> None:
        """Raises TokenizerMismatchError: the only selectors there are tokenize differently."""
        if self.refused and not self._stubs:
            raise TokenizerMismatchError(self.refused)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()

    def _order(self, sequence_id: str) -> list[str]:
        """Rendezvous hashing: every proposer names the same replica for a sequence, and few move
        when one leaves."""
        now = time.monotonic()
        live = [a for a in self._stubs if self._resting.get(a, 0.0) <= now]
        return sorted(live, key=lambda a: hashlib.sha256(f"{a}|{sequence_id}".encode()).digest())

    async def _score(self, query: ScoreQuery) -> ScoreReply:
        request = wire.write_query(query)
        for address in self._order(query.sequence_id)[:2]:
            try:
                response = await self._stubs[address].Score(
                    request, timeout=CALL_TIMEOUT_S, metadata=self._metadata
                )
                return wire.read_reply(query, response)
            except grpc.RpcError as error:
                failure = wire.error_of(error)
                if not isinstance(failure, SelectorUnavailableError):
                    raise failure from error
                self._resting[address] = time.monotonic() + REST_AFTER_FAILURE_S
            except KeyError:  # refreshed away meanwhile
                continue
        raise SelectorUnavailableError("no selector answers")
