"""The way to one selector: its address, its LLM, and whether it is worth asking.

Counts every failure against the address's circuit breaker: no reply, a late one, one that cannot be
true. While the breaker is open, probes find out when the selector is back, and which LLM it then
runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_calls import check_reply
from s2t_shared.errors import (
    ConfigError,
    InvalidRequestError,
    SelectorUnavailableError,
    TokenizerMismatchError,
)
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import wire
from services.serve.breaker import BreakerState, CircuitBreaker

log = logging.getLogger(__name__)
DESCRIBE_TIMEOUT_S = 5.0
PATIENCE_S = 30.0  # for a query whose caller does not say how long it waits
# Pauses before a query whose connection broke is sent again. A channel may take a moment to see
# that it is broken: what is sent meanwhile fails like what was under way.
RESEND_AFTER_S = (0.0, 0.05)
LATE_SHARE = 0.5  # given up after this share of its caller's patience, a query has failed

Metadata = tuple[tuple[str, str], ...]


class SelectorLink:
    """Lives on one asyncio loop.

    metadata: of a call now. on_change: called when the link opens or closes. sample: a query like
    those of now, for probes; None while there was none. clock: seconds.
    """

    def __init__(
        self,
        address: str,
        channel: Any,
        *,
        metadata: Callable[[], Metadata],
        tokenizer_digest: str,
        breaker: CircuitBreaker,
        on_change: Callable[[], None],
        sample: Callable[[], ScoreQuery | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.info: LLMInfo | None = None
        self.mismatch = ""  # why it is refused: another tokenizer
        self.first_probe_done = asyncio.Event()
        self._channel = channel
        self._stub = pb_grpc.SelectionServiceStub(channel)
        self._metadata = metadata
        self._tokenizer_digest = tokenizer_digest
        self._breaker = breaker
        self._on_change = on_change
        self._sample = sample
        self._clock = clock
        self._is_dropped = False
        self._retiring: asyncio.Task[None] | None = None
        self._winning_back = asyncio.get_running_loop().create_task(self._win_back())

    @property
    def is_closed(self) -> bool:
        """Whether queries may be sent, as an electrical circuit is closed."""
        return self._breaker.is_closed

    @property
    def state(self) -> BreakerState:
        """Of its circuit breaker."""
        return self._breaker.state

    async def close(self) -> None:
        """End probes and connection. Queries under way fail."""
        self._is_dropped = True
        self._winning_back.cancel()
        if self._retiring is not None:
            self._retiring.cancel()
        await self._channel.close()

    def reconnect(self, channel: Any) -> None:
        """Send queries over another channel from now on. Those under way end on the old one."""
        old, self._channel = self._channel, channel
        self._stub = pb_grpc.SelectionServiceStub(channel)
        self._retiring = asyncio.get_running_loop().create_task(old.close(PATIENCE_S))

    # -- queries ----------------------------------------------------------------------------------

    async def ask(self, query: ScoreQuery, message: pb.ScoreRequest) -> ScoreReply:
        """The selector's reply to `query`; `message` is the query on the wire.

        Raises:
            SelectorUnavailableError: there is no reply that can be used; the breaker has opened.
            InvalidRequestError, ConfigError: the query is wrong, as the selector says.
        """
        try:
            reply = await self._score(query, message)
        except SelectorUnavailableError:
            self._failed()
            raise
        self._breaker.query_succeeded()
        return reply

    async def _score(self, query: ScoreQuery, message: pb.ScoreRequest) -> ScoreReply:
        patience_s = query.patience_s or PATIENCE_S
        started = self._clock()
        try:
            response = await self._send(message, patience_s, query.trace)
        except grpc.RpcError as error:
            failure = wire.error_of(error)
            if isinstance(failure, (InvalidRequestError, ConfigError)):
                raise failure from error
            log.info("selector %s: %s", self.address, failure)  # hosts are not for clients
            raise SelectorUnavailableError(f"no selector answers ({error.code().name})") from error
        except asyncio.CancelledError:
            if self._clock() - started >= LATE_SHARE * patience_s:
                self._failed()
            raise
        return self._read(query, response)

    async def _send(
        self, message: pb.ScoreRequest, patience_s: float, trace: Metadata
    ) -> pb.ScoreResponse:
        """The reply. A query whose connection breaks is sent again, over a new one: that a
        connection is lost says nothing of the selector. A dead one refuses the new one at once."""
        give_up_at = self._clock() + patience_s
        left_s = patience_s
        for pause_s in (*RESEND_AFTER_S, None):
            try:
                metadata = (*self._metadata(), *trace)
                return await self._stub.Score(message, timeout=left_s, metadata=metadata)
            except grpc.RpcError as error:
                left_s = give_up_at - self._clock() - (pause_s or 0.0)
                if pause_s is None or left_s <= 0 or not wire.is_connection_lost(error):
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("the last failure is raised")

    def _read(self, query: ScoreQuery, response: pb.ScoreResponse) -> ScoreReply:
        """The reply, if it comes from the LLM that is known here, and can be true.

        Raises SelectorUnavailableError: it does not; the next probe asks which LLM it is now.
        """
        assert self.info is not None
        digests = (response.llm_digest, response.tokenizer_digest)
        for digest, known in zip(digests, (self.info.digest, self._tokenizer_digest), strict=True):
            if digest not in ("", known):
                raise SelectorUnavailableError("the LLM has been replaced by another one")
        reply = wire.read_reply(query, response)
        check_reply(query, reply)
        return replace(reply, llm_digest=self.info.digest)

    def _failed(self) -> None:
        if self._breaker.query_failed() and not self._is_dropped:
            log.warning("selector %s fails; it is not asked for now", self.address)
            self._winning_back = asyncio.get_running_loop().create_task(self._win_back())
            self._on_change()

    # -- probes -----------------------------------------------------------------------------------

    async def _win_back(self) -> None:
        """Probe until the breaker is closed."""
        while not self._breaker.is_closed:
            await asyncio.sleep(self._breaker.next_probe_s())
            self._breaker.begin_probe()
            succeeded = False
            try:
                await self._probe()
                succeeded = True
            except TokenizerMismatchError as error:
                self._refuse(str(error))
            except (SelectorUnavailableError, InvalidRequestError, ConfigError) as error:
                log.info("selector %s does not answer a probe: %s", self.address, error)
            finally:
                self._breaker.end_probe(succeeded)
                self.first_probe_done.set()
        self._on_change()

    async def _probe(self) -> None:
        """Ask which LLM it is, then a query as everyone sends them: a hung LLM still describes
        itself."""
        self.info = await self._describe()
        self.mismatch = ""
        query = self._sample()
        if query is None:
            return
        patience_s = LATE_SHARE * (query.patience_s or PATIENCE_S)
        query = replace(query, patience_s=patience_s)
        await self._score(query, wire.write_query(query))

    async def _describe(self) -> LLMInfo:
        """Raises SelectorUnavailableError, TokenizerMismatchError."""
        try:
            model = await self._stub.DescribeModel(
                pb.DescribeModelRequest(), timeout=DESCRIBE_TIMEOUT_S, metadata=self._metadata()
            )
        except grpc.RpcError as error:
            raise SelectorUnavailableError(str(wire.error_of(error))) from error
        if model.tokenizer_digest != self._tokenizer_digest:
            raise TokenizerMismatchError(
                f"a selector's tokenizer ({model.tokenizer_digest}) is not the SLM's "
                f"({self._tokenizer_digest}); choose two models of one family"
            )
        return LLMInfo(
            model.digest, model.tokenizer_digest, frozenset(model.eos_ids), model.max_length
        )

    def _refuse(self, mismatch: str) -> None:
        if mismatch != self.mismatch:
            log.error("selector %s refused: %s", self.address, mismatch)
        self.mismatch = mismatch
