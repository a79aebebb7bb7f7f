"""The labels' hot set and queue, and the cache of LLM selections, in Redis; the drain into the Parquet lake.

    engine --> LabelWriter --XADD--> Redis stream --XREADGROUP--> Drain --write_shard--> Parquet lake
               queue in memory       append-only file             buffer                 |
               full: the newest      holds a label until          full: reads no more    v shard, then manifest:
               dropped and counted   it is in the lake            until it has written   only then XACK + XDEL

Nothing presses back on decoding: a slow lake lengthens the stream, a Redis that is away or full lengthens the queue,
and only a full queue loses labels, which it counts. Delivery is *at least once*: a crash or a lost answer anywhere on
the way repeats labels, and the lake's readers drop repeats by `label_id`.

Knows labels, queries and replies; no models, no decoding, no text. Redis itself is touched in `redis_server` only.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from s2t_shared.errors import EvaluationSplitError, StoreError
from s2t_shared.labels import ARROW_SCHEMA, LIST_FIELDS, Label, check_split, write_shard
from s2t_shared.redis_server import DEAD_LETTERS, Entry, LabelStore

if TYPE_CHECKING:  # a drain needs no torch
    pass

log = logging.getLogger(__name__)


# -- labels in ----------------------------------------------------------------------------------------------------

BATCH_LABELS = 256
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0


class LabelWriter:
    """Takes labels from the decode loop without ever making it wait, and brings them to Redis from a thread.

    written, dropped: labels since the start. A label can be written twice after a lost answer, and counts once.
    """

    def __init__(self, store: LabelStore, capacity: int = 10_000) -> None:
        self._store, self._capacity = store, capacity
        self.written = self.dropped = 0
        self._waiting: deque[Label] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="label-writer", daemon=True)
        self._thread.start()

    def write(self, labels: Sequence[Label]) -> None:
        """Queue labels. Never blocks, never raises: what finds no room is dropped and counted."""
        with self._changed:
            room = 0 if self._closed else self._capacity - len(self._waiting)
            self._waiting.extend(labels[:room])
            self.dropped += max(0, len(labels) - room)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Whether everything queued reached Redis within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then end; what Redis has not taken within `timeout_s` is dropped and counted."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._store.timeout_s + 1.0)
        with self._changed:
            if self._waiting and not self._thread.is_alive():
                log.warning("%d labels dropped: Redis at %s did not take them", len(self._waiting), self._store.place)
                self.dropped += len(self._waiting)
                self._waiting.clear()

    def _run(self) -> None:
        backoff = 0.0
        while True:
            with self._changed:
                if backoff:
                    self._changed.wait_for(lambda: self._closed, backoff)
                else:
                    self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                # They stay in the queue until Redis has them: they count against its capacity, and `flush` sees them.
                batch = list(islice(self._waiting, BATCH_LABELS))
            texts = [text for label in batch if (text := _serialised(label)) is not None]
            try:
                self._store.append(texts)
            except StoreError as error:
                if not backoff:
                    log.warning("labels wait in memory: %s", error)
                backoff = min(MAX_BACKOFF_S, backoff * 2 or FIRST_BACKOFF_S)
                continue
            backoff = 0.0
            with self._changed:
                self.written += len(texts)
                self.dropped += len(batch) - len(texts)
                for _ in batch:
                    self._waiting.popleft()
                self._changed.notify_all()


def _serialised(label: Label) -> str | None:
    """None for a label that JSON cannot hold, say with a numpy number: a bug, but no reason to lose the others."""
    try:
        return label.to_json()
    except (TypeError, ValueError) as error:
        log.error("a label was dropped: it cannot be serialised (%s)", type(error).__name__)
        return None


# -- labels out ---------------------------------------------------------------------------------------------------

READ_ENTRIES = 256
MAX_BUFFER_BYTES = 16 << 20  # of JSON: labels of long contexts are written in smaller shards, not from more memory
RECLAIM_EVERY_S = 10.0


class Drain:
    """Moves labels from the stream to the lake, at least once (the picture is at the top of this file).

    An entry is deleted only after the shard that holds it has its manifest. An entry that is not a label becomes a
    dead letter. Several drains may run: each reads its own share, and takes over what a dead one left unfinished for
    `reclaim_idle_s`. `flush` may be called from any thread; `run_once` from one (`start` is that one).
    """

    def __init__(self, store: LabelStore, lake: Path, shard_rows: int = 2000, max_age_s: float = 2.0,
                 consumer: str | None = None, reclaim_idle_s: float = 30.0) -> None:
        self._store, self._lake, self._shard_rows, self._max_age_s = store, lake, shard_rows, max_age_s
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._reclaim_idle_s, self._next_reclaim = reclaim_idle_s, 0.0
        self._buffer: dict[bytes, Label] = {}  # by entry id: one that is delivered twice counts once
        self._buffer_bytes, self._oldest = 0, 0.0
        self._in_lake: list[bytes] = []  # written, but Redis has not heard so yet
        self._lock = threading.RLock()  # of the buffer; not held while waiting for entries
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run_once(self, block_ms: int = 0) -> int:
        """Read what there is (waiting up to `block_ms` for it), write a shard when one is due; entries read.

        Raises:
            StoreError: Redis or the lake cannot be used. Nothing is lost: call again.
        """
        with self._lock:
            self._acknowledge()
            due = self._due()
        entries = [] if due else self._receive(block_ms)
        with self._lock:
            for entry in entries:
                self._take(entry)
            if self._due():
                self.flush()
        return len(entries)

    def flush(self) -> int:
        """Write what is buffered as a shard and acknowledge it; its rows.

        Raises:
            StoreError: Redis or the lake cannot be used.
        """
        with self._lock:
            rows = len(self._buffer)
            if rows:
                try:
                    write_shard(self._lake, list(self._buffer.values()))
                except OSError as error:
                    raise StoreError(f"cannot write labels to the lake folder {self._lake.name!r}, they wait: "
                                     f"{error.strerror or error}; free or grant space there") from error
                self._in_lake.extend(self._buffer)
                self._buffer.clear()
                self._buffer_bytes = 0
            self._acknowledge()
        return rows

    def start(self) -> None:
        assert self._thread is None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="label-drain", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write what it had buffered; what cannot be written now waits in Redis for another."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            self.flush()
        except StoreError as error:
            log.warning("labels wait for the next drain: %s", error)

    def _due(self) -> bool:
        if not self._buffer:
            return False
        return (len(self._buffer) >= self._shard_rows or self._buffer_bytes >= MAX_BUFFER_BYTES
                or time.monotonic() - self._oldest >= self._max_age_s)

    def _receive(self, block_ms: int) -> list[Entry]:
        room = min(READ_ENTRIES, self._shard_rows - len(self._buffer))
        if time.monotonic() >= self._next_reclaim:
            self._store.create_group()  # here, so that a Redis that lost its data is mended too
            reclaimed = self._store.reclaim(self.consumer, self._reclaim_idle_s, room)
            if len(reclaimed) < room:  # else there may be more: look again at once
                self._next_reclaim = time.monotonic() + min(RECLAIM_EVERY_S, self._reclaim_idle_s)
            if reclaimed:
                return reclaimed
        if self._buffer:
            block_ms = min(block_ms, max(0, math.ceil((self._oldest + self._max_age_s - time.monotonic()) * 1000)))
        try:
            return self._store.read(self.consumer, room, block_ms)
        except StoreError:
            self._next_reclaim = 0.0
            raise

    def _take(self, entry: Entry) -> None:
        if entry.entry_id in self._buffer:
            return
        text = entry.fields.get(b"label", b"")
        try:
            label = Label.from_json(text)
            check_storable(label)
        except (StoreError, EvaluationSplitError, RecursionError) as error:
            self._store.bury(entry, f"{type(error).__name__}: {error}"[:500])
            log.warning("stream entry %s is not a label: moved to %s", entry.entry_id.decode(), DEAD_LETTERS)
            return
        if not self._buffer:
            self._oldest = time.monotonic()
        self._buffer[entry.entry_id] = label
        self._buffer_bytes += len(text)

    def _acknowledge(self) -> None:
        self._store.remove(self._in_lake)
        self._in_lake.clear()

    def _run(self) -> None:
        backoff = 0.0
        while not self._stop.wait(backoff):
            try:
                self.run_once(block_ms=500)
            except Exception as error:  # noqa: BLE001 - a thread's border: it must go on, or labels pile up unseen
                if not backoff:  # of a foreign error the type only: its text may quote a label
                    log.warning("label drain waits: %s", error if isinstance(error, StoreError) else type(error))
                backoff = min(MAX_BACKOFF_S, backoff * 2 or FIRST_BACKOFF_S)
            else:
                backoff = 0.0


def check_storable(label: Label) -> None:
    """What JSON alone does not promise; one such label would make every shard with it unwritable.

    Raises:
        StoreError: a value has the wrong type or range, or the candidates' lists differ in length.
        EvaluationSplitError: it comes from an evaluation split.
    """
    try:
        for name in ARROW_SCHEMA.names:
            value, field = getattr(label, name), ARROW_SCHEMA.field(name)
            column = pa.array(value, field.type.value_type) if name in LIST_FIELDS else pa.array([value], field.type)
            if column.null_count:
                raise StoreError(f"{name}: null")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{name}: {type(error).__name__}") from None
    if not all(map(math.isfinite, label.slm_log_probs + label.llm_log_probs)):
        raise StoreError("slm_log_probs, llm_log_probs: not finite")
    if not len(label.candidate_ids) == len(label.slm_log_probs) == len(label.llm_log_probs) > 0:
        raise StoreError("candidate_ids, slm_log_probs, llm_log_probs: empty or of different lengths")
    check_split(label.split)
