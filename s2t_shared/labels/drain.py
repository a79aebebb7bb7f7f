"""The second half of the ledger's way: out of the stream, into the lake (the picture is at the top
of `store`)."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.shards import to_table
from s2t_shared.labels.stream import DEAD_LETTERS, Entry, LabelStream
from s2t_shared.labels.writer import FIRST_BACKOFF_S, MAX_BACKOFF_S

log = logging.getLogger(__name__)
READ_ENTRIES = 256
MAX_BUFFER_BYTES = (
    16 << 20
)  # of JSON: rollouts of long contexts are written in smaller shards, not from more memory
SUSPECT_DELIVERIES = (
    2  # from then on an entry is handled alone: others must not be blamed for what it does
)
MAX_DELIVERIES = 5
HOUSEKEEPING_EVERY_S = 600.0


class Drain:
    """Moves rollouts from the stream to the lake, at least once, joins small shards there and
    applies retention (`max_age_days`, `max_gib`; 0: keep all).

    An entry is deleted only after it is durable in the lake. One that is not a rollout becomes a
    dead letter, and so does one that was delivered more than MAX_DELIVERIES times and never
    acknowledged: it ends its reader each time. Several drains may run: each reads its own share,
    says that it lives, and takes over what a dead one left for `reclaim_idle_s`. `flush` may be
    called from any thread; `run_once` from one (`start` is that one).
    """

    def __init__(
        self,
        store: LabelStream,
        lake: Lake,
        shard_rows: int = 2000,
        shard_age_s: float = 60.0,
        max_age_days: float = 0.0,
        max_gib: float = 0.0,
        consumer: str | None = None,
        reclaim_idle_s: float = 30.0,
    ) -> None:
        self._store, self._lake, self._shard_rows, self._shard_age_s = (
            store,
            lake,
            shard_rows,
            shard_age_s,
        )
        self._max_age_s, self._max_bytes = max_age_days * 86_400, int(max_gib * (1 << 30))
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._reclaim_idle_s, self._next_reclaim, self._next_keep = reclaim_idle_s, 0.0, 0.0
        self._buffer: dict[
            bytes, Rollout
        ] = {}  # by entry id: one that is delivered twice counts once
        self._buffer_bytes, self._oldest, self._alone = 0, 0.0, False
        self._in_lake: list[bytes] = []  # written, but Redis has not heard so yet
        self._lock = threading.RLock()  # of the buffer; not held while waiting for entries
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run_once(self, block_ms: int = 0) -> int:
        """Read what there is (waiting up to `block_ms` for it), write a shard when one is due;
        entries read.

        Raises:
            StoreError: Redis or the lake cannot be used. Nothing is lost: call again.
        """
        with self._lock:
            self._acknowledge()
            self._keep()
            due = self._due()
        entries = [] if due else self._receive(block_ms)
        with self._lock:
            for entry in entries:
                self._take(entry)
            if self._due():
                self._write()
        return len(entries)

    def flush(self) -> int:
        """Write everything that is buffered or in the stream to the lake and acknowledge it; its
        rollouts.

        Raises:
            StoreError: Redis or the lake cannot be used.
        """
        with self._lock:
            self._acknowledge()
            self._store.create_group()
            rows, entries = 0, None
            while entries is None or len(entries) == READ_ENTRIES:
                entries = self._store.read(self.consumer, READ_ENTRIES, 0)
                for entry in entries:
                    self._take(entry)
                if self._buffer_bytes >= MAX_BUFFER_BYTES:
                    rows += self._write()
            return rows + self._write()

    def housekeep(self) -> None:
        """Join small shards, apply retention, remove what crashes have left.

        Raises:
            StoreError: the lake cannot be used.
        """
        self._lake.compact()
        self._lake.prune(self._max_age_s, self._max_bytes)

    def start(self) -> None:
        assert self._thread is None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="label-drain", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write what it had buffered; what cannot be written now waits in Redis
        for another."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            with self._lock:
                self._write()
        except StoreError as error:
            log.warning("labels wait for the next drain: %s", error)

    def _due(self) -> bool:
        return bool(self._buffer) and (
            self._alone
            or len(self._buffer) >= self._shard_rows
            or self._buffer_bytes >= MAX_BUFFER_BYTES
            or time.monotonic() - self._oldest >= self._shard_age_s
        )

    def _receive(self, block_ms: int) -> list[Entry]:
        room = min(READ_ENTRIES, self._shard_rows - len(self._buffer))
        if time.monotonic() >= self._next_reclaim:
            self._store.create_group()  # here, so that a Redis that lost its data is mended too
            if reclaimed := self._reclaim(room):
                return reclaimed  # there may be more: look again at once
            self._next_reclaim = time.monotonic() + min(10.0, self._reclaim_idle_s)
        if self._buffer:
            block_ms = min(
                block_ms,
                max(0, math.ceil((self._oldest + self._shard_age_s - time.monotonic()) * 1000)),
            )
        try:
            return self._store.read(self.consumer, room, block_ms)
        except StoreError:
            self._next_reclaim = 0.0
            raise

    def _reclaim(self, room: int) -> list[Entry]:
        """Take over what another left: many at once, but one that may have ended its reader alone.

        Not XAUTOCLAIM: it counts a delivery for every entry it returns, so that a reader that one
        of them ends would bring all of them nearer to the dead letters.
        """
        waiting = [
            (i, n)
            for i, n in self._store.unacknowledged(self._reclaim_idle_s, room)
            if i not in self._buffer
        ]
        if calm := [i for i, n in waiting if n < SUSPECT_DELIVERIES]:
            return self._store.claim(self.consumer, calm, self._reclaim_idle_s)
        for entry_id, deliveries in sorted(
            waiting, key=lambda w: w[1]
        ):  # the worst last: kills are mostly chance
            with self._lock:
                self._write()
            for entry in self._store.claim(self.consumer, [entry_id], self._reclaim_idle_s):
                if deliveries <= MAX_DELIVERIES:
                    self._alone = True
                    return [entry]
                self._bury(
                    entry,
                    f"delivered {deliveries} times, never acknowledged: does it end its reader?",
                )
        return []

    def _take(self, entry: Entry) -> None:
        if entry.entry_id in self._buffer:
            return
        text = entry.fields.get(b"rollout", b"")
        try:
            rollout = Rollout.from_json(text)
        except S2TError as error:
            self._bury(entry, f"{type(error).__name__}: {error}"[:500])
            return
        if not self._buffer:
            self._oldest = time.monotonic()
        self._buffer[entry.entry_id] = rollout
        self._buffer_bytes += len(text)

    def _bury(self, entry: Entry, reason: str) -> None:
        self._store.dead_letter(entry, reason)
        log.warning("stream entry %s moved to %s", entry.entry_id.decode(), DEAD_LETTERS)

    def _write(self) -> int:
        rows = len(self._buffer)
        if rows:
            try:
                self._lake.write(list(self._buffer.values()))
            except StoreError:
                raise
            except Exception:  # noqa: BLE001 - a value that the lake cannot hold must not block all others for ever
                if not self._bury_misfits():
                    raise  # none of the rollouts is to blame: they wait
                self._lake.write(list(self._buffer.values()))
            self._in_lake.extend(self._buffer)
            self._buffer.clear()
            self._buffer_bytes, self._alone = 0, False
        self._acknowledge()
        return rows

    def _bury_misfits(self) -> int:
        """Bury those, and only those, that make no row by themselves; how many."""
        misfits: dict[bytes, Exception] = {}
        for entry_id, rollout in self._buffer.items():
            try:
                to_table([rollout])
            except Exception as error:  # noqa: BLE001 - whatever it is, this rollout alone raised it
                misfits[entry_id] = error
        for entry_id, reason in misfits.items():
            self._bury(
                Entry(entry_id, {b"rollout": self._buffer[entry_id].to_json().encode()}),
                f"the lake cannot hold it: {type(reason).__name__}",
            )
            del self._buffer[entry_id]
        return len(misfits)

    def _acknowledge(self) -> None:
        self._store.remove(self._in_lake)
        self._in_lake.clear()

    def _keep(self) -> None:
        """Others must not take what this drain has in hand, however long the lake refuses it."""
        if time.monotonic() >= self._next_keep:
            self._next_keep = time.monotonic() + self._reclaim_idle_s / 3
            self._store.keep(self.consumer, list(self._buffer))

    def _run(self) -> None:
        backoff, next_housekeeping = 0.0, time.monotonic()
        while not self._stop.wait(backoff):
            try:
                self.run_once(block_ms=500)
                if time.monotonic() >= next_housekeeping:
                    next_housekeeping = time.monotonic() + HOUSEKEEPING_EVERY_S
                    self.housekeep()
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on, or labels pile up unseen
                if not backoff:  # of a foreign error the type only: its text may quote a label
                    log.warning(
                        "label drain waits: %s",
                        error if isinstance(error, StoreError) else type(error),
                    )
                backoff = min(MAX_BACKOFF_S, backoff * 2 or FIRST_BACKOFF_S)
            else:
                backoff = 0.0
