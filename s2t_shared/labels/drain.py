"""The second half of a label's way: out of the Redis stream, into the lake. The picture is at the
top of `writer`."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.labels.check import check_rows, check_rows_sense
from s2t_shared.labels.known_models import KnownModels, Models
from s2t_shared.labels.label import check_sense
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.packed import read_rollout, read_rows
from s2t_shared.labels.places import is_url
from s2t_shared.labels.rows import Rows
from s2t_shared.labels.stream import DEAD_LETTERS, Entry, LabelStream
from s2t_shared.labels.writer import next_backoff

log = logging.getLogger(__name__)
READ_ENTRIES = 256
ROLLOUT = b"rollout"
DIGESTS = ("slm_digest", "llm_digest", "tokenizer_digest")
# Of entries: long contexts make smaller shards, not a larger buffer.
MAX_BUFFER_BYTES = 16 << 20
# An entry that was delivered so often is read alone: it may kill the process that reads it, and
# the others must not be blamed.
SUSPECT_DELIVERIES = 2
MAX_DELIVERIES = 5
HOUSEKEEPING_EVERY_S = 600.0
MOST_GIB = 100.0  # of a lake whose size nobody has set
DAY_S = 86_400.0
GIB = 1 << 30


class Drain:
    """Moves rollouts from the stream to the lake, at least once. Joins small shards there and
    applies retention (`max_age_days`, `max_gib`; 0: keep all), also to dead letters
    (`dead_letter_days`). `max_gib` None: half of the lake's disk, at most MOST_GIB.

    An entry is deleted only after it is durable in the lake. An entry that is not a rollout becomes
    a dead letter, and so does one of models that are not `known` (None: all are). So does one that
    was delivered more than MAX_DELIVERIES times and never
    acknowledged: it ends its reader each time. Several drains may run: each reads its own share,
    renews its claims, and takes over what a dead one has not renewed for `reclaim_idle_s`. `flush`
    may be called from any thread, `run_once` from one; `start` starts that one.
    """

    def __init__(
        self,
        stream: LabelStream,
        lake: Lake,
        shard_rows: int = 2000,
        shard_age_s: float = 60.0,
        max_age_days: float = 0.0,
        max_gib: float | None = 0.0,
        dead_letter_days: float = 0.0,
        known: KnownModels | None = None,
        consumer: str | None = None,
        reclaim_idle_s: float = 30.0,
    ) -> None:
        self._stream = stream
        self._lake = lake
        self._shard_rows = shard_rows
        self._shard_age_s = shard_age_s
        self._max_age_s = max_age_days * DAY_S
        self._max_gib = max_gib
        self._dead_letter_s = dead_letter_days * DAY_S
        self._known = known
        self._reclaim_idle_s = reclaim_idle_s
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._next_reclaim = 0.0
        self._next_renewal = 0.0
        self._buffer = _Buffer()
        self._unacknowledged: list[bytes] = []  # in the lake, but Redis does not know it yet
        self._lock = threading.RLock()  # of the buffer; not held while waiting for entries
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what others call -------------------------------------------------------------------------

    def run_once(self, block_ms: int = 0) -> int:
        """Read entries, waiting for them up to `block_ms`, and write a shard when one is due.

        Returns the number of entries read.

        Raises:
            StoreError: Redis or the lake cannot be used. Nothing is lost: call again.
        """
        with self._lock:
            self._acknowledge()
            self._renew()
            is_due = self._is_due()
        entries = [] if is_due else self._receive(block_ms)
        with self._lock:
            self._take(entries)
            if self._is_due():
                self._write()
        return len(entries)

    def flush(self) -> int:
        """Write everything that is buffered or in the stream to the lake and acknowledge it.

        Returns the number of rollouts.

        Raises:
            StoreError: Redis or the lake cannot be used.
        """
        with self._lock:
            self._acknowledge()
            self._stream.create_group()
            rows = 0
            is_empty = False
            while not is_empty:
                entries = self._stream.read(self.consumer, READ_ENTRIES, 0)
                self._take(entries)
                if self._buffer.bytes >= MAX_BUFFER_BYTES:
                    rows += self._write()
                is_empty = len(entries) < READ_ENTRIES
            return rows + self._write()

    def housekeep(self) -> None:
        """Join small shards, apply retention, remove leftover files of crashes.

        Raises:
            StoreError: the lake or Redis cannot be used.
        """
        self._lake.compact()
        max_gib = default_max_gib(self._lake.where) if self._max_gib is None else self._max_gib
        removed = self._lake.prune(self._max_age_s, int(max_gib * GIB))
        if removed:
            log.warning("retention removed the %d oldest rollouts from the lake", removed)
        if self._dead_letter_s:
            self._stream.trim_dead_letters(self._dead_letter_s)

    def start(self) -> None:
        assert self._thread is None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="label-drain", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write what it had buffered. What cannot be written now stays in Redis
        for another drain."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            with self._lock:
                self._write()
        except StoreError as error:
            log.warning("labels wait for the next drain: %s", error)

    def _run(self) -> None:
        backoff = 0.0
        next_housekeeping = time.monotonic()
        while not self._stop.wait(backoff):
            try:
                self.run_once(block_ms=500)
                if time.monotonic() >= next_housekeeping:
                    next_housekeeping = time.monotonic() + HOUSEKEEPING_EVERY_S
                    self.housekeep()
                backoff = 0.0
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on, or labels pile up unseen
                if not backoff:
                    # Of a foreign error the type only: its text may quote a label.
                    reason = error if isinstance(error, StoreError) else type(error)
                    log.warning("label drain waits: %s", reason)
                backoff = next_backoff(backoff)

    # -- out of the stream ------------------------------------------------------------------------

    def _receive(self, block_ms: int) -> list[Entry]:
        room = min(READ_ENTRIES, self._shard_rows - len(self._buffer.entry_ids))
        if time.monotonic() >= self._next_reclaim:
            self._stream.create_group()  # here, so that a Redis that lost its data is mended too
            reclaimed = self._reclaim(room)
            if reclaimed:
                return reclaimed  # there may be more: look again at once
            self._next_reclaim = time.monotonic() + min(10.0, self._reclaim_idle_s)
        if self._buffer.entry_ids:
            due_in_s = self._buffer.oldest + self._shard_age_s - time.monotonic()
            block_ms = min(block_ms, max(0, math.ceil(due_in_s * 1000)))
        try:
            return self._stream.read(self.consumer, room, block_ms)
        except StoreError:
            self._next_reclaim = 0.0
            raise

    def _reclaim(self, room: int) -> list[Entry]:
        """Take over what another drain left: many entries at once, but a suspect one alone.

        Not XAUTOCLAIM: it counts a delivery for every entry it returns, so a reader that one of
        them ends would bring all of them nearer to the dead letters.
        """
        suspects: list[tuple[int, bytes]] = []
        harmless: list[bytes] = []
        for entry_id, deliveries in self._stream.unacknowledged(self._reclaim_idle_s, room):
            if entry_id in self._buffer.entry_ids:
                continue
            if deliveries < SUSPECT_DELIVERIES:
                harmless.append(entry_id)
            else:
                suspects.append((deliveries, entry_id))
        if harmless:
            return self._stream.claim(self.consumer, harmless, self._reclaim_idle_s)
        suspects.sort(key=lambda suspect: suspect[0])  # the worst last: kills are mostly chance
        for deliveries, entry_id in suspects:
            with self._lock:
                self._write()
            for entry in self._stream.claim(self.consumer, [entry_id], self._reclaim_idle_s):
                if deliveries <= MAX_DELIVERIES:
                    self._buffer.is_suspect = True
                    return [entry]
                self._dead_letter(
                    entry,
                    f"delivered {deliveries} times, never acknowledged: does it end its reader?",
                )
        return []

    def _renew(self) -> None:
        """Renew the claims, so that others do not take the entries while the lake refuses them."""
        if time.monotonic() >= self._next_renewal:
            self._next_renewal = time.monotonic() + self._reclaim_idle_s / 3
            self._stream.renew(self.consumer, list(self._buffer.entry_ids))

    def _take(self, entries: Sequence[Entry]) -> None:
        """Buffer the rollouts of entries, or make those dead letters that hold none."""
        new = [entry for entry in entries if entry.entry_id not in self._buffer.entry_ids]
        if not new:
            return
        try:
            self._buffer.add(new, self._read(new))
        except Exception:  # noqa: BLE001 - whatever a foreign text raises: one by one it is found
            for entry in new:
                self._take_one(entry)

    def _read(self, entries: Sequence[Entry]) -> Rows:
        """The rollouts of entries at once. Raises whatever any of them makes Arrow or a check
        raise."""
        rows = read_rows([entry.fields[ROLLOUT] for entry in entries])
        check_rows(rows)
        check_rows_sense(rows)
        if self._known is not None:
            for models in rows.distinct_of(*DIGESTS):
                self._known.check(Models(*models))
        return rows

    def _take_one(self, entry: Entry) -> None:
        """Buffer the rollout of an entry, or make the entry a dead letter."""
        try:
            rollout = read_rollout(entry.fields.get(ROLLOUT, b""))
            check_sense(rollout)
            if self._known is not None:
                self._known.check(Models.of(rollout))
        except S2TError as error:
            self._dead_letter(entry, f"{type(error).__name__}: {error}"[:500])
            return
        try:
            rows = Rows.of([rollout])
            check_rows(rows)
        except Exception as error:  # noqa: BLE001 - a value that the lake cannot hold must not block all others for ever
            self._dead_letter(entry, f"the lake cannot hold it: {type(error).__name__}")
            return
        self._buffer.add([entry], rows)

    def _dead_letter(self, entry: Entry, reason: str) -> None:
        self._stream.dead_letter(entry, reason)
        log.warning("stream entry %s moved to %s", entry.entry_id.decode(), DEAD_LETTERS)

    # -- into the lake ----------------------------------------------------------------------------

    def _is_due(self) -> bool:
        buffer = self._buffer
        if not buffer.entry_ids:
            return False
        is_full = len(buffer.entry_ids) >= self._shard_rows or buffer.bytes >= MAX_BUFFER_BYTES
        is_old = time.monotonic() - buffer.oldest >= self._shard_age_s
        return buffer.is_suspect or is_full or is_old

    def _write(self) -> int:
        """Write the buffer to the lake and acknowledge it. Returns the number of rollouts."""
        rows = len(self._buffer.entry_ids)
        if rows:
            self._lake.write(Rows.joined(self._buffer.rows))
            self._unacknowledged.extend(self._buffer.entry_ids)
            self._buffer = _Buffer()
        self._acknowledge()
        return rows

    def _acknowledge(self) -> None:
        self._stream.remove(self._unacknowledged)
        self._unacknowledged.clear()


def default_max_gib(lake: Path | str) -> float:
    """How large a lake may grow where nobody has said: half of its disk, at most MOST_GIB."""
    if is_url(lake):
        return MOST_GIB
    return min(MOST_GIB, shutil.disk_usage(lake).total / 2 / GIB)


class _Buffer:
    """Rollouts that are not in the lake yet.

    entry_ids: of all of them, so that an entry that is delivered twice counts once. bytes: of the
    entries. oldest: `time.monotonic()` of the first. is_suspect: the rollout may end its reader, so
    it is written at once.
    """

    def __init__(self) -> None:
        self.entry_ids: dict[bytes, None] = {}
        self.rows: list[Rows] = []
        self.bytes = 0
        self.oldest = 0.0
        self.is_suspect = False

    def add(self, entries: Sequence[Entry], rows: Rows) -> None:
        """rows: one of each entry."""
        if not self.entry_ids:
            self.oldest = time.monotonic()
        self.entry_ids.update(dict.fromkeys(entry.entry_id for entry in entries))
        self.rows.append(rows)
        self.bytes += sum(len(entry.fields[ROLLOUT]) for entry in entries)
