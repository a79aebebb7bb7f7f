"""A `SelectorClient` over the network: which selector to ask, and what to do when it does not
answer.

Each sequence goes to the selector that rendezvous hashing of its id names, so that its KV stays
warm there. One that fails or is late is left out (`SelectorLink`), and its sequences go to the next
one in their order. When none is left, futures fail at once with `SelectorUnavailableError` and the
engine degrades.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from s2t_shared.config import Config, SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import (
    ConfigError,
    InvalidRequestError,
    SelectorUnavailableError,
    TokenizerMismatchError,
)
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.types import ScoreQuery, ScoreReply
from services.metrics.registry import Distribution, Reading
from services.metrics.table import TABLE
from services.rpc import channels, wire
from services.rpc.tls import ClientTLS, FollowedTLS
from services.rpc.tokens import Role, Tokens
from services.serve.breaker import Backoff, BreakerState, CircuitBreaker
from services.serve.selector_link import LATE_SHARE, PATIENCE_S, Metadata, SelectorLink

log = logging.getLogger(__name__)
REFRESH_S = 2.0  # selectors are looked for this often; a new one that hangs holds up no other
START_POLL_S = 0.2
ATTEMPTS = 2  # selectors that are asked for one query
FIND_TIMEOUT_S = 5.0
BACKOFF = Backoff()

FindAddresses = Callable[[], Awaitable[Sequence[str]]]


def address_finder(
    config: Config, selectors: Any = None, find_timeout_s: float = FIND_TIMEOUT_S
) -> FindAddresses:
    """Finds the selectors that the configuration names, else those that Serve runs.

    selectors: Serve's handle of the selector deployment, None where there is none. find_timeout_s:
    a selector that does not say its address within so many seconds is not found this time.
    """
    configured = list(config.selector.addresses)

    async def find_addresses() -> list[str]:
        if configured or selectors is None:
            return configured
        return await _addresses_in_time(selectors, find_timeout_s)

    return find_addresses


async def _addresses_in_time(selectors: Any, timeout_s: float) -> list[str]:
    """Addresses of the selectors that say theirs in time.

    Serve's `results_async` waits for all of them, so that one that hangs would hide a new one.
    """
    broadcast = selectors.broadcast("address")
    replies = await asyncio.wait_for(broadcast._fetch_replica_results_async(), timeout_s)
    waiting = {asyncio.ensure_future(reply.get_async()): reply for reply in replies}
    answered, late = await asyncio.wait(waiting, timeout=timeout_s)
    for call in late:
        call.cancel()
        waiting[call].cancel()
    return [str(call.result()) for call in answered if call.exception() is None]


class RemoteSelector:
    """Lives on one asyncio loop. `submit` may be called from any thread.

    Asks selectors of one LLM at a time, so that answers do not mix two. While an LLM is being
    replaced, the selectors of the new one wait until none of the old one answers.

    find_addresses: asks where the selectors are now. fallback: assumed until one was reached.
    """

    def __init__(
        self,
        find_addresses: FindAddresses,
        security: SecurityConfig,
        tokenizer_digest: str,
        fallback: LLMInfo,
        backoff: Backoff = BACKOFF,
    ) -> None:
        """Raises ConfigError: the token file or a certificate cannot be used."""
        self._find_addresses = find_addresses
        tls = ClientTLS.of(security)
        self._tls = FollowedTLS(tls) if tls is not None else None
        self._credentials = self._tls.credentials() if self._tls is not None else None
        self._tokenizer_digest = tokenizer_digest
        self._tokens = Tokens(security.token_file) if security.token_file else None
        self._backoff = backoff
        self._links: dict[str, SelectorLink] = {}
        self._last_query: ScoreQuery | None = None
        self._list_failed = False
        self._answered = 0
        self._failed = 0
        self._latency = Distribution(TABLE["s2t_selection_latency_seconds"].buckets)
        self.info = fallback
        self._loop = asyncio.get_running_loop()
        self._watch_task = self._loop.create_task(self._watch())

    # -- queries ----------------------------------------------------------------------------------

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """Send queries. Returns at once, with a future for each."""
        return [asyncio.run_coroutine_threadsafe(self._score(q), self._loop) for q in queries]

    async def _score(self, query: ScoreQuery) -> ScoreReply:
        message = wire.write_query(query)
        if message.ByteSize() > channels.MAX_MESSAGE_BYTES:
            raise InvalidRequestError(
                f"a query of {message.ByteSize()} bytes; selectors take "
                f"{channels.MAX_MESSAGE_BYTES}: ask for a shorter answer"
            )
        self._last_query = query
        started = time.monotonic()
        try:
            reply = await self._first_reply(query, message)
        except SelectorUnavailableError:
            self._failed += 1
            raise
        self._latency.observe(time.monotonic() - started)
        self._answered += 1
        return reply

    async def _first_reply(self, query: ScoreQuery, message: pb.ScoreRequest) -> ScoreReply:
        """Of the selectors that the query is for: the second is asked when the first is late."""
        waiting = [self._links[a] for a in self.replicas_for(query.sequence_id)[:ATTEMPTS]]
        if len(waiting) == 1:
            return await waiting[0].ask(query, message)
        late_s = LATE_SHARE * (query.patience_s or PATIENCE_S)
        asked: set[asyncio.Task[ScoreReply]] = set()
        failure = SelectorUnavailableError("no selector answers")
        try:
            while waiting or asked:
                if waiting:
                    asked.add(self._loop.create_task(waiting.pop(0).ask(query, message)))
                done, asked = await asyncio.wait(
                    asked,
                    timeout=late_s if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not isinstance(error, SelectorUnavailableError):
                        raise error
                    failure = error
            raise failure
        finally:
            for task in asked:
                task.cancel()

    def replicas_for(self, sequence_id: str) -> list[str]:
        """Addresses in a sequence's order: every proposer finds the same, and few sequences move
        when a replica leaves."""
        usable = [a for a, link in self._links.items() if link.is_closed and link.info == self.info]
        return sorted(usable, key=lambda a: hashlib.sha256(f"{a}|{sequence_id}".encode()).digest())

    def readings(self) -> Iterator[Reading]:
        """For the metrics; from any thread."""
        yield Reading("s2t_llm_reachable", self.reachable)
        states = Counter(link.state for link in list(self._links.values()))
        for state in BreakerState:
            yield Reading("s2t_selector_breakers", states[state], (state.value,))
        yield Reading("s2t_selection_latency_seconds", self._latency)
        yield Reading("s2t_selections_total", self._answered, ("answered",))
        yield Reading("s2t_selections_total", self._failed, ("failed",))

    # -- selectors --------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether there is a selector to ask."""
        return any(link.is_closed for link in list(self._links.values()))

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
        mismatches = [link.mismatch for link in self._links.values() if link.mismatch]
        if mismatches and not self.reachable:
            raise TokenizerMismatchError(mismatches[0])

    async def refresh(self) -> None:
        """Learn the selectors' addresses, and get to know new ones, all at once.

        A selector that does not answer holds up no other. It is admitted whenever it answers, if
        it tokenizes as the SLM does.
        """
        self._follow_certificates()
        try:
            found = set(await self._find_addresses())
        except Exception as error:  # noqa: BLE001 - whatever Serve raises means "not now"
            if not self._list_failed:  # said once, not every second
                log.info("selectors cannot be listed now: %s", type(error).__name__)
            self._list_failed = True
            return
        self._list_failed = False
        for address in self._links.keys() - found:
            await self._links.pop(address).close()
        new = [self._open(address) for address in sorted(found - self._links.keys())]
        self._choose_llm()
        if new:
            waits = [asyncio.ensure_future(link.first_probe_done.wait()) for link in new]
            _, late = await asyncio.wait(waits, timeout=REFRESH_S)
            for wait in late:
                wait.cancel()

    def _open(self, address: str) -> SelectorLink:
        link = SelectorLink(
            address,
            channels.open_channel(address, self._tls),
            metadata=self._metadata,
            tokenizer_digest=self._tokenizer_digest,
            breaker=CircuitBreaker(self._backoff),
            on_change=self._choose_llm,
            sample=self._sample_query,
        )
        self._links[address] = link
        return link

    def _follow_certificates(self) -> None:
        if self._tls is None or self._tls.credentials() is self._credentials:
            return
        self._credentials = self._tls.credentials()
        for address, link in self._links.items():
            link.reconnect(channels.open_channel(address, self._tls))

    def _metadata(self) -> Metadata:
        """Of a call now: the token file may have changed since the last one.

        Raises:
            SelectorUnavailableError: no token in it may ask selectors.
        """
        try:
            token = self._tokens.token_for(Role.SCORE) if self._tokens else None
        except ConfigError as error:
            raise SelectorUnavailableError(str(error)) from error
        return channels.call_metadata(token)

    def _choose_llm(self) -> None:
        """Stay with the LLM that answers now as long as one of its selectors does."""
        known = [link.info for link in self._links.values() if link.is_closed and link.info]
        if known and self.info not in known:
            if self.info.digest:
                log.warning("the LLM is now %s, it was %s", known[0].digest, self.info.digest)
            self.info = known[0]

    def _sample_query(self) -> ScoreQuery | None:
        """The last query, cut down to one position: what a probe asks."""
        query = self._last_query
        if query is None:
            return None
        return replace(
            query,
            positions=query.positions[-1:],
            candidate_ids=query.candidate_ids[-1:],
            sequence_id="probe",
            trace=(),
        )

    async def close(self) -> None:
        """End connections and probes. Queries under way fail."""
        self._watch_task.cancel()
        for address in list(self._links):
            await self._links.pop(address).close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()
