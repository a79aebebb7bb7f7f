"""A `SelectorClient` over the network: which selector replica to ask, and what to do when it does
not answer.

Each sequence goes to the replica that rendezvous hashing of its id names, so that its KV stays warm
there. A replica that fails is not asked for a second; its sequences go to the next one in their
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

from s2t_shared.config import Config, SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import SelectorUnavailableError, TokenizerMismatchError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import channels, wire

log = logging.getLogger(__name__)
REST_AFTER_FAILURE_S = 1.0
REFRESH_S = 2.0
START_POLL_S = 0.2
DESCRIBE_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 30.0
ATTEMPTS = 2  # replicas that are asked for one query
FIND_TIMEOUT_S = 10.0

FindAddresses = Callable[[], Awaitable[Sequence[str]]]


def address_finder(config: Config, selectors: Any = None) -> FindAddresses:
    """Finds the selectors that the configuration names, else those that Serve runs.

    selectors: Serve's handle of the selector deployment, None where there is none.
    """
    configured = list(config.selector.addresses)

    async def find_addresses() -> list[str]:
        if configured or selectors is None:
            return configured
        responses = selectors.broadcast("address").results_async()
        return [str(address) for address in await asyncio.wait_for(responses, FIND_TIMEOUT_S)]

    return find_addresses


class RemoteSelector:
    """Lives on one asyncio loop. `submit` may be called from any thread.

    find_addresses: asks where the selectors are now. fallback: assumed until one was reached.
    """

    def __init__(
        self,
        find_addresses: FindAddresses,
        security: SecurityConfig,
        tokenizer_digest: str,
        fallback: LLMInfo,
    ) -> None:
        """Raises ConfigError: the token file holds no token."""
        self._find_addresses = find_addresses
        self._authority = security.authority
        self._tokenizer_digest = tokenizer_digest
        self._metadata = channels.call_metadata(channels.read_token(security.token_file))
        self._stubs: dict[str, Any] = {}
        self._resting_until: dict[str, float] = {}
        self._mismatch = ""
        self.info = fallback
        self._loop = asyncio.get_running_loop()
        self._watch_task = self._loop.create_task(self._watch())

    # -- queries ----------------------------------------------------------------------------------

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """Send queries. Returns at once, with a future for each."""
        return [asyncio.run_coroutine_threadsafe(self._score(q), self._loop) for q in queries]

    async def _score(self, query: ScoreQuery) -> ScoreReply:
        message = wire.write_query(query)
        for address in self.replicas_for(query.sequence_id)[:ATTEMPTS]:
            stub = self._stubs.get(address)
            if stub is None:  # refreshed away meanwhile
                continue
            try:
                response = await stub.Score(
                    message, timeout=CALL_TIMEOUT_S, metadata=self._metadata
                )
                return wire.read_reply(query, response)
            except grpc.RpcError as error:
                failure = wire.error_of(error)
                if not isinstance(failure, SelectorUnavailableError):
                    raise failure from error
                self._resting_until[address] = time.monotonic() + REST_AFTER_FAILURE_S
        raise SelectorUnavailableError("no selector answers")

    def replicas_for(self, sequence_id: str) -> list[str]:
        """Addresses in a sequence's order: every proposer finds the same, and few sequences move
        when a replica leaves."""
        now = time.monotonic()
        awake = [a for a in self._stubs if self._resting_until.get(a, 0.0) <= now]
        return sorted(awake, key=lambda a: hashlib.sha256(f"{a}|{sequence_id}".encode()).digest())

    # -- replicas ---------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether there is a selector to ask."""
        return bool(self._stubs)

    async def wait_until_reachable(self, timeout_s: float) -> None:
        """Wait for the first selector; after `timeout_s` seconds go on without one.

        Raises:
            TokenizerMismatchError: the only selectors there are tokenize differently.
        """
        give_up_at = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at:
            await self.refresh()
            self.check_tokenizer()
            if self.reachable:
                return
            await asyncio.sleep(START_POLL_S)

    def check_tokenizer(self) -> None:
        """Raises TokenizerMismatchError: the only selectors there are tokenize differently."""
        if self._mismatch and not self._stubs:
            raise TokenizerMismatchError(self._mismatch)

    async def refresh(self) -> None:
        """Learn the selectors' addresses. Admit those that tokenize as the SLM does."""
        try:
            found = set(await self._find_addresses())
        except Exception as error:  # noqa: BLE001 - whatever Serve raises means "not now"
            log.info("selectors cannot be listed now: %s", type(error).__name__)
            return
        for address in self._stubs.keys() - found:
            del self._stubs[address]
        for address in sorted(found - self._stubs.keys()):
            await self._admit(address)

    async def _admit(self, address: str) -> None:
        stub = pb_grpc.SelectionServiceStub(channels.open_channel(address, self._authority))
        try:
            model = await stub.DescribeModel(
                pb.DescribeModelRequest(), timeout=DESCRIBE_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError:
            return  # the next refresh tries again
        if model.tokenizer_digest != self._tokenizer_digest:
            self._mismatch = (
                f"a selector's tokenizer ({model.tokenizer_digest}) is not the SLM's "
                f"({self._tokenizer_digest}); choose two models of one family"
            )
            log.error("selector refused: %s", self._mismatch)
            return
        eos_ids = frozenset(model.eos_ids)
        self.info = LLMInfo(model.digest, model.tokenizer_digest, eos_ids, model.max_length)
        self._stubs[address] = stub
        self._resting_until.pop(address, None)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()
