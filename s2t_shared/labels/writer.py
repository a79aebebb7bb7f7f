"""The ledger's way from a proposer to the lake; here its first half, `LabelWriter`. `drain` is the
second.

    engine --> LabelWriter --XADD, WAITAOF--> Redis stream --XREADGROUP--> Drain --Lake.write-->
               Parquet lake queue in memory                append-only file             buffer
               |
                 |  away, full, slow,         holds a rollout until        full: reads no more  v durable:
                 v  does not confirm          it is in the lake            until it has written only then XACK + XDEL
               Spool on disk --XADD--^

Nothing presses back on decoding: a slow lake lengthens the stream, a Redis that is away or full
lengthens the spool; only a full spool or a full queue loses labels, which are counted, and the
writer's future says so. Delivery is *at least once*: a crash or a lost answer anywhere on the way
repeats rollouts, and the lake's readers drop repeats.

Knows rollouts; no models, no decoding, no text. Redis itself is touched in `redis_client` only,
files in `spool`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from s2t_shared.errors import StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.spool import Spool
from s2t_shared.labels.stream import LabelStream

log = logging.getLogger(__name__)
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0
BATCH_BYTES = 1 << 20  # of JSON, about, per question to Redis and per fsync of the spool
WRITE_TIMEOUT_S = 4.0  # a server that syncs every second confirms within two
SETTLED_S = (
    3.0  # what a server took so long ago is synced, where its policy is "always" or "everysec"
)
ADOPT_EVERY_S = 10.0


@dataclass
class _Write:
    rollouts: tuple[Rollout, ...]
    future: Future[None] = field(default_factory=Future)

    @cached_property
    def labels(self) -> int:
        return sum(len(r.labels) for r in self.rollouts)

    @cached_property
    def bytes(self) -> int:
        """Of JSON, about."""
        return sum(
            1000
            + 8 * len(r.token_ids)
            + 45 * len(r.entropy)
            + sum(250 + 50 * len(label.candidate_ids) for label in r.labels)
            for r in self.rollouts
        )


@dataclass(frozen=True)
class _Sent:
    """A segment that a server took without confirming it: by which run of the server, when, and its
    last entry."""

    run_id: str
    at: float
    last: tuple[int, int]


class LabelWriter:
    """Takes rollouts from the decode loop without ever making it wait, and stores them durably.

    One thread gives them to Redis, and when Redis does not confirm, to the spool; another brings
    what is in the spool to Redis, also that of writers that died. A segment of the spool is removed
    when the server confirmed its entries (`WAITAOF`). A server without that command has them when
    its append-only file is synced by policy, SETTLED_S have passed, and its run_id (INFO) is still
    the one that took them; one that syncs nothing, when the drain has taken them from the stream.
    Else they are sent again.

    written, dropped (by reason): labels since the start.

    Raises:
        StoreError: the spool's folder cannot be used.
    """

    def __init__(
        self,
        store: LabelStream,
        spool: Path,
        spool_bytes: int = 1 << 30,
        queue_bytes: int = 64 << 20,
    ) -> None:
        self._store = store.with_timeout(WRITE_TIMEOUT_S)
        self._spool, self._capacity = Spool(spool, spool_bytes), queue_bytes
        self.written, self.dropped = 0, Counter[str]()
        self._waiting: deque[_Write] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()  # of the queue and the counts
        self._closed = False
        self._confirms = threading.Event()  # Redis answers, and says what it has on disk
        self._confirms.set()
        self._spooled, self._closing = threading.Event(), threading.Event()
        self._sent: dict[Path, _Sent] = {}
        self._threads = [
            threading.Thread(target=self._store_all, name="label-writer", daemon=True),
            threading.Thread(target=self._deliver_all, name="label-spool", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def write(self, rollouts: Sequence[Rollout]) -> Future[None]:
        """Queue rollouts; the future is done when they are durable. Never blocks, never raises:
        what finds no room is dropped and counted, and its future holds a StoreError."""
        write = _Write(tuple(rollouts))
        write.future.set_running_or_notify_cancel()  # a caller that gives up changes nothing
        with self._changed:
            refused = (
                "the writer is closed"
                if self._closed
                else "queue full"
                if self._waiting_bytes + write.bytes > self._capacity
                else ""
            )
            if not refused:
                self._waiting.append(write)
                self._waiting_bytes += write.bytes
                self._changed.notify_all()
        if refused:
            self._drop([write], refused, f"labels dropped: {refused}")
        return write.future

    def close(self, timeout_s: float = 5.0) -> None:
        """Store what is queued, in the spool what Redis does not take, then end. What is in the
        spool then is brought to Redis by the next writer there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._closing.set()
        self._spooled.set()
        for thread in self._threads:
            thread.join(timeout_s + WRITE_TIMEOUT_S)
        with self._changed:
            left = list(self._waiting) if self._threads[0].is_alive() else []
        if left:
            self._drop(
                left, "closed", "labels dropped: the service ended before they could be stored"
            )
        try:
            self._spool.close()
        except StoreError as error:
            log.warning("%s", error)
        self._store.close()

    # -- the writer's thread

    def _store_all(self) -> None:
        while batch := self._next_batch():
            try:
                self._store_batch(batch)
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on
                self._drop(batch, "a bug", f"labels dropped: {type(error).__name__}")
            with self._changed:
                for write in batch:
                    self._waiting.popleft()
                    self._waiting_bytes -= write.bytes

    def _next_batch(self) -> list[_Write]:
        """Empty at the end. They stay in the queue until they are stored: they count against its
        capacity."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            batch: list[_Write] = []
            size = 0
            for write in self._waiting:
                if batch and size + write.bytes > BATCH_BYTES:
                    break
                batch.append(write)
                size += write.bytes
            return batch

    def _store_batch(self, batch: list[_Write]) -> None:
        good: list[_Write] = []
        texts: list[bytes] = []
        for write in batch:
            try:
                texts += [rollout.to_json().encode() for rollout in write.rollouts]
                good.append(write)
            except (TypeError, ValueError) as error:  # a bug, but no reason to lose the others
                self._drop(
                    [write],
                    "not serialisable",
                    f"labels dropped: they cannot be serialised ({error})",
                )
        try:
            if texts:
                self._make_durable(texts)
        except StoreError as error:
            self._drop(good, "no room in Redis and the spool", f"labels dropped: {error}")
            return
        with self._changed:
            self.written += sum(write.labels for write in good)
        for write in good:
            if not write.future.done():  # `close` gave it up
                write.future.set_result(None)

    def _make_durable(self, texts: list[bytes]) -> None:
        """In Redis or in the spool, in this order only while Redis is known to be well. Raises
        StoreError: in none."""
        first, second = (
            (self._to_redis, self._to_spool)
            if self._confirms.is_set()
            else (self._to_spool, self._to_redis)
        )
        try:
            first(texts)
        except StoreError as error:
            if self._confirms.is_set():
                self._confirms.clear()
                log.warning("labels wait in the spool: %s", error)
            second(texts)

    def _to_redis(self, texts: list[bytes]) -> None:
        if not self._store.append(texts).durable:
            raise StoreError(
                f"Redis at {self._store.place} does not say that labels are on its disk (WAITAOF)"
            )
        self._confirms.set()

    def _to_spool(self, texts: list[bytes]) -> None:
        self._spool.append(texts)
        self._spooled.set()

    def _drop(self, writes: Sequence[_Write], reason: str, text: str) -> None:
        lost = [write for write in writes if not write.future.done()]
        with self._changed:
            if reason not in self.dropped:
                log.warning("labels are dropped (%s): %s", reason, text)
            self.dropped[reason] += sum(write.labels for write in lost)
        for write in lost:
            write.future.set_exception(StoreError(text))

    # -- the spool's thread

    def _deliver_all(self) -> None:
        backoff, next_adoption = 0.0, time.monotonic() + ADOPT_EVERY_S
        while not self._closing.wait(backoff):
            try:
                if time.monotonic() >= next_adoption:
                    next_adoption = time.monotonic() + ADOPT_EVERY_S
                    self._spool.adopt()
                self._spooled.clear()
                if (
                    self._closing.is_set()
                ):  # looked at after `clear`: `close` sets it before it wakes us
                    return
                waits = self._deliver()
                backoff = 0.0
            except StoreError as error:
                log.log(logging.DEBUG if backoff else logging.INFO, "the spool waits: %s", error)
                backoff = min(MAX_BACKOFF_S, backoff * 2 or FIRST_BACKOFF_S)
                continue
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on
                log.error("the spool waits: %s", type(error).__name__)
                backoff = MAX_BACKOFF_S
                continue
            self._spooled.wait(0.5 if waits else max(0.0, next_adoption - time.monotonic()))

    def _deliver(self) -> bool:
        """Send what has not been sent, remove what is durable there; whether there may be more to
        do."""
        segments = self._spool.segments()
        if all(
            segment in self._sent for segment in segments
        ):  # else an outage would leave many small ones
            self._spool.seal()
            segments = self._spool.segments()
        if not segments:
            return False
        server = (
            self._store.persistence()
        )  # before anything is sent: the run that takes it is this one, or unknown
        for segment in segments:
            sent = self._sent.get(segment)
            if sent is None or sent.run_id != server.run_id:
                self._sent.pop(segment, None)
                if self._closing.is_set():
                    break
                self._send(segment, server.run_id)
            elif (
                (server.fsyncs and time.monotonic() - sent.at > SETTLED_S)
                or server.oldest is None
                or server.oldest > sent.last
            ):
                self._remove(segment)
        return True

    def _send(self, segment: Path, run_id: str) -> None:
        confirmed, last = True, (0, 0)
        for texts in _batches(self._spool.read(segment)):
            appended = self._store.append(texts)
            confirmed, last = confirmed and appended.durable, appended.last
        if confirmed:
            self._remove(segment)
            self._confirms.set()
        else:
            self._sent[segment] = _Sent(run_id, time.monotonic(), last)

    def _remove(self, segment: Path) -> None:
        self._sent.pop(segment, None)
        self._spool.remove(segment)


def _batches(texts: Sequence[bytes]) -> list[list[bytes]]:
    batches: list[list[bytes]] = []
    size = BATCH_BYTES
    for text in texts:
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches
