"""`LabelWriter` brings rollouts to Redis. From there `drain` brings them to the lake.

    engine --> LabelWriter --XADD, WAITAOF--> Redis stream --XREADGROUP--> Drain --> Parquet lake
               queue in memory                append-only file             buffer
                    |                              ^
                    | Redis is away, full, slow,   |        XACK and XDEL only after
                    v or does not confirm          |        the shard is durable
               Spool on disk ----------XADD--------+

Decoding is never back-pressured. A slow lake lengthens the stream; a Redis that is away or full
lengthens the spool. Labels are lost when the queue is full, when Redis and the spool both refuse
them, or when the writer closes first: they are counted, and the writer's future holds an error.
Delivery is *at least once*: a crash or a lost reply repeats rollouts, and the lake's readers drop
duplicates. Knows rollouts; no models, no decoding, no text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from s2t_shared.errors import StoreError
from s2t_shared.labels.known_models import KnownModels, Models
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.packed import pack
from s2t_shared.labels.spool import Spool, SpoolUsage
from s2t_shared.labels.stream import EntryNumber, LabelStream, Persistence

log = logging.getLogger(__name__)
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
BATCH_BYTES = 1 << 20  # of the queue, for one call of Redis and one fsync of the spool
WRITE_TIMEOUT_S = 4.0  # a server that syncs every second confirms within two
# After so long, a server that syncs "always" or "everysec" has on disk what it took.
SETTLED_S = 3.0
ADOPT_EVERY_S = 10.0
RECHECK_S = 0.5  # whether sent segments are durable by now
# Why labels are dropped:
CLOSED = "the writer is closed"
QUEUE_FULL = "queue full"
BUG = "a bug"
NOT_SERIALISABLE = "not serialisable"
NO_ROOM = "no room in Redis and the spool"
DROP_REASONS = (CLOSED, QUEUE_FULL, BUG, NOT_SERIALISABLE, NO_ROOM)


def next_backoff(backoff_s: float) -> float:
    """The pause after one more failure; 0 means that there was none before."""
    return min(MAX_BACKOFF_S, backoff_s * 2 or FIRST_BACKOFF_S)


@dataclass(frozen=True)
class _Write:
    """Rollouts that one call of `LabelWriter.write` queued."""

    rollouts: tuple[Rollout, ...]
    future: Future[None] = field(default_factory=Future)

    @cached_property
    def labels(self) -> int:
        return sum(len(rollout.labels) for rollout in self.rollouts)

    @cached_property
    def bytes(self) -> int:
        """About what they take in the queue."""
        return sum(_queue_bytes(rollout) for rollout in self.rollouts)


def _queue_bytes(rollout: Rollout) -> int:
    labels = sum(250 + 50 * len(label.candidate_ids) for label in rollout.labels)
    return 1000 + 8 * len(rollout.token_ids) + 45 * len(rollout.entropy) + labels


@dataclass(frozen=True)
class _Sent:
    """A segment that a server took without confirming it.

    run_id: of the server. at: `time.monotonic()`. last: the segment's last entry in the stream.
    """

    run_id: str
    at: float
    last: EntryNumber

    def is_durable(self, server: Persistence) -> bool:
        """Whether the same run of the server has the segment on disk, or the drain has read it."""
        if server.fsyncs and time.monotonic() - self.at > SETTLED_S:
            return True
        return server.oldest is None or server.oldest > self.last


class LabelWriter:
    """Takes rollouts from the decode loop without ever making it wait, and stores them durably.

    One thread sends them to Redis and, when Redis does not confirm, writes them to the spool.
    Another sends what is in the spool to Redis, also what dead writers left there. A segment of the
    spool is removed when the server confirmed its entries (`WAITAOF`). A server without that
    command has them when its append-only file is synced by policy, SETTLED_S have passed, and its
    run_id (INFO) is still the same. A server that syncs nothing has them when the drain has taken
    them from the stream. Otherwise they are sent again.

    written, dropped (by reason): labels since the start.

    Raises:
        StoreError: the spool's folder cannot be used.
    """

    def __init__(
        self,
        stream: LabelStream,
        spool: Path,
        spool_bytes: int = 1 << 30,
        queue_bytes: int = 64 << 20,
        known: KnownModels | None = None,
    ) -> None:
        """known: where the models of what is written are written down, for the drain."""
        self._known = known
        self._stream = stream.with_timeout(WRITE_TIMEOUT_S)
        self._spool = Spool(spool, spool_bytes)
        self._capacity = queue_bytes
        self.written = 0
        self.dropped = Counter[str]()
        self._queue: deque[_Write] = deque()
        self._queue_bytes = 0
        self._changed = threading.Condition()  # of the queue and the counts
        self._is_closed = False
        self._redis_confirms = threading.Event()  # Redis answers, and confirms what is on its disk
        self._redis_confirms.set()
        self._spooled = threading.Event()
        self._closing = threading.Event()
        self._sent: dict[Path, _Sent] = {}
        self._storing = threading.Thread(target=self._store_all, name="label-writer", daemon=True)
        self._sending = threading.Thread(target=self._send_all, name="label-spool", daemon=True)
        self._storing.start()
        self._sending.start()

    @property
    def writes_to_redis(self) -> bool:
        """Whether Redis confirmed the last write; otherwise the spool is used first."""
        return self._redis_confirms.is_set()

    def spool_usage(self) -> SpoolUsage:
        """How much waits in the spool. Raises StoreError: the disk refuses."""
        return self._spool.usage()

    def write(self, rollouts: Sequence[Rollout]) -> Future[None]:
        """Queue rollouts. Never blocks, never raises.

        The future is done when they are durable. Rollouts that find no room are dropped and
        counted, and their future holds a StoreError.
        """
        write = _Write(tuple(rollouts))
        write.future.set_running_or_notify_cancel()  # a caller that gives up changes nothing
        with self._changed:
            refusal = self._refusal(write)
            if not refusal:
                self._queue.append(write)
                self._queue_bytes += write.bytes
                self._changed.notify_all()
        if refusal:
            self._drop([write], refusal, f"labels dropped: {refusal}")
        return write.future

    def _refusal(self, write: _Write) -> str:
        """Why the queue does not take a write, or ""."""
        if self._is_closed:
            return CLOSED
        if self._queue_bytes + write.bytes > self._capacity:
            return QUEUE_FULL
        return ""

    def close(self, timeout_s: float = 5.0) -> None:
        """Store the queued rollouts in Redis, or in the spool where Redis refuses. Then end.

        The next writer on this spool sends what is in it to Redis.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._closing.set()
        self._spooled.set()
        for thread in (self._storing, self._sending):
            thread.join(timeout_s + WRITE_TIMEOUT_S)
        with self._changed:
            remaining = list(self._queue) if self._storing.is_alive() else []
        if remaining:
            text = "labels dropped: the service ended before they could be stored"
            self._drop(remaining, CLOSED, text)
        try:
            self._spool.close()
        except StoreError as error:
            log.warning("%s", error)
        self._stream.close()

    # -- the storing thread: queue to Redis or spool ----------------------------------------------

    def _store_all(self) -> None:
        while batch := self._next_batch():
            try:
                self._store_batch(batch)
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on
                self._drop(batch, BUG, f"labels dropped: {type(error).__name__}")
            with self._changed:
                for write in batch:
                    self._queue.popleft()
                    self._queue_bytes -= write.bytes

    def _next_batch(self) -> list[_Write]:
        """The first writes of the queue; empty at the end.

        They stay in the queue until they are stored, so that they count against its capacity.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._queue))
            batch: list[_Write] = []
            size = 0
            for write in self._queue:
                size += write.bytes
                if batch and size > BATCH_BYTES:
                    break
                batch.append(write)
            return batch

    def _store_batch(self, batch: list[_Write]) -> None:
        good: list[_Write] = []
        texts: list[bytes] = []
        for write in batch:
            try:
                texts += [pack(rollout) for rollout in write.rollouts]
                good.append(write)
            except (TypeError, ValueError, OverflowError) as error:
                # A bug, but no reason to lose the others.
                text = f"labels dropped: they cannot be serialised ({error})"
                self._drop([write], NOT_SERIALISABLE, text)
        self._introduce(good)
        try:
            if texts:
                self._make_durable(texts)
        except StoreError as error:
            self._drop(good, NO_ROOM, f"labels dropped: {error}")
            return
        with self._changed:
            self.written += sum(write.labels for write in good)
        for write in good:
            if not write.future.done():  # `close` gave it up
                write.future.set_result(None)

    def _introduce(self, batch: Sequence[_Write]) -> None:
        """Write down the models before their labels can reach the drain."""
        if self._known is None:
            return
        try:
            for write in batch:
                for rollout in write.rollouts:
                    self._known.add(Models.of(rollout))
        except StoreError as error:
            log.warning("labels of new models may be refused: %s", error)

    def _make_durable(self, texts: list[bytes]) -> None:
        """Store in Redis or in the spool; first in the spool unless Redis confirmed the last write.

        Raises:
            StoreError: neither took them.
        """
        if not self._redis_confirms.is_set():
            try:
                self._to_spool(texts)
            except StoreError:
                self._to_redis(texts)
            return
        try:
            self._to_redis(texts)
        except StoreError as error:
            self._redis_confirms.clear()
            log.warning("labels wait in the spool: %s", error)
            self._to_spool(texts)

    def _to_redis(self, texts: list[bytes]) -> None:
        if not self._stream.append(texts).durable:
            raise StoreError(
                f"Redis at {self._stream.place} does not confirm that labels are on its disk "
                "(WAITAOF)"
            )
        self._redis_confirms.set()

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

    # -- the sending thread: spool to Redis -------------------------------------------------------

    def _send_all(self) -> None:
        backoff = 0.0
        next_adoption = time.monotonic() + ADOPT_EVERY_S
        while not self._closing.wait(backoff):
            try:
                if time.monotonic() >= next_adoption:
                    next_adoption = time.monotonic() + ADOPT_EVERY_S
                    self._spool.adopt()
                self._spooled.clear()
                # Read after `clear`: `close` sets it before it wakes this thread.
                if self._closing.is_set():
                    return
                is_waiting = self._send_segments()
                backoff = 0.0
            except StoreError as error:
                level = logging.DEBUG if backoff else logging.INFO
                log.log(level, "the spool waits: %s", error)
                backoff = next_backoff(backoff)
                continue
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on
                log.error("the spool waits: %s", type(error).__name__)
                backoff = MAX_BACKOFF_S
                continue
            pause = RECHECK_S if is_waiting else max(0.0, next_adoption - time.monotonic())
            self._spooled.wait(pause)

    def _send_segments(self) -> bool:
        """Send the segments that were not sent, and remove those that are durable.

        Returns whether the spool held any segment.
        """
        segments = self._spool.segments()
        # Only when nothing else is left: otherwise an outage would leave many small segments.
        if all(segment in self._sent for segment in segments):
            self._spool.seal()
            segments = self._spool.segments()
        if not segments:
            return False
        # Asked before anything is sent, so that the server's run_id is the one that takes segments.
        server = self._stream.persistence()
        for segment in segments:
            sent = self._sent.get(segment)
            if sent is None or sent.run_id != server.run_id:
                self._sent.pop(segment, None)
                if self._closing.is_set():
                    break
                self._send(segment, server.run_id)
            elif sent.is_durable(server):
                self._remove(segment)
        return True

    def _send(self, segment: Path, run_id: str) -> None:
        is_confirmed = True
        last = (0, 0)
        for texts in _batches(self._spool.read(segment)):
            appended = self._stream.append(texts)
            is_confirmed = is_confirmed and appended.durable
            last = appended.last
        if is_confirmed:
            self._remove(segment)
            self._redis_confirms.set()
        else:
            self._sent[segment] = _Sent(run_id, time.monotonic(), last)

    def _remove(self, segment: Path) -> None:
        self._sent.pop(segment, None)
        self._spool.remove(segment)


def _batches(texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The texts in order, in lists that end once they hold BATCH_BYTES."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
