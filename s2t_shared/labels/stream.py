"""The label stream in Redis: entries appended by writers, read and acknowledged by drains.

Knows bytes and keys. What a rollout is, `label` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from s2t_shared.redis_connection import open_client, place_of, redis_errors

# stream; field "rollout" = Rollout.to_json(); what it holds else becomes a dead letter
LABELS = "s2t:labels"
DEAD_LETTERS = "s2t:labels:dead"  # stream; the entry's own fields and "reason"
GROUP = "drain"
MAX_DEAD_LETTERS = 10_000  # about; poison must not fill Redis


# -- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamCounts:
    """rollouts: in the stream, not yet in the lake. pending: of those, read by a drain and not
    acknowledged yet."""

    rollouts: int
    pending: int
    dead_letters: int


@dataclass(frozen=True)
class Entry:
    """One stream entry as received: anyone who can reach Redis may have written it."""

    entry_id: bytes
    fields: dict[bytes, bytes]


@dataclass(frozen=True)
class Appended:
    """durable: the server says (WAITAOF) that its append-only file holds the entries on disk. last:
    the newest."""

    durable: bool
    last: tuple[int, int]


@dataclass(frozen=True)
class Persistence:
    """run_id: changes when the server starts anew. fsyncs: it syncs its append-only file within
    seconds. oldest: the first entry in the stream, None where it is empty."""

    run_id: str
    fsyncs: bool
    oldest: tuple[int, int] | None


class LabelStream:
    """The commands that labels need, over one client. Every method raises
    StoreError where Redis is away, slower than `timeout_s`, or refuses."""

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._url, self.timeout_s, self.place = url, timeout_s, place_of(url)
        self._redis = open_client(url, timeout_s)

    def with_timeout(self, timeout_s: float) -> LabelStream:
        """The same Redis over connections of its own, with another timeout."""
        return LabelStream(self._url, timeout_s)

    def close(self) -> None:
        self._redis.close()

    def ping(self) -> None:
        with redis_errors(self.place):
            self._redis.ping()

    def counts(self) -> StreamCounts:
        with redis_errors(self.place):
            rollouts, dead = int(self._redis.xlen(LABELS)), int(self._redis.xlen(DEAD_LETTERS))
            try:
                pending = int(self._redis.xpending(LABELS, GROUP)["pending"])
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                pending = 0  # no drain has run yet
        return StreamCounts(rollouts, pending, dead)

    def append(self, rollouts: Sequence[bytes]) -> Appended:
        """Append serialised rollouts and wait, half the timeout at most, until they are on the
        server's disk; after an error some of them may be there nevertheless."""
        assert rollouts
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=False)
            for rollout in rollouts:
                pipeline.xadd(LABELS, {"rollout": rollout})
            pipeline.execute_command("WAITAOF", 1, 0, int(self.timeout_s * 500))
            *ids, synced = pipeline.execute(raise_on_error=False)
            for answer in ids:
                if isinstance(answer, Exception):
                    raise answer
        # An error: an older server, or one without an append-only file.
        return Appended(not isinstance(synced, Exception) and synced[0] >= 1, _numbers(ids[-1]))

    def persistence(self) -> Persistence:
        with redis_errors(self.place):
            info: dict[str, Any] = self._redis.info()
            try:
                policy = self._redis.config_get("appendfsync").get("appendfsync", "")
            except redis.ResponseError:  # forbidden to us: then we cannot know
                policy = ""
            oldest = self._redis.xrange(LABELS, count=1)
        fsyncs = policy in ("always", "everysec") and info.get("aof_enabled") == 1
        return Persistence(
            info["run_id"],
            fsyncs and info.get("aof_last_write_status") == "ok",
            _numbers(oldest[0][0]) if oldest else None,
        )

    def create_group(self) -> None:
        with redis_errors(self.place):
            try:
                self._redis.xgroup_create(LABELS, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        """Up to `count` entries that no consumer has read; waits for one at most `block_ms` (and
        half the timeout)."""
        block = min(block_ms, int(self.timeout_s * 500)) or None  # 0 would mean for ever
        with redis_errors(self.place):
            reply: Any = self._redis.xreadgroup(
                GROUP, consumer, {LABELS: ">"}, count=count, block=block
            )
        return [
            Entry(entry_id, fields) for _, entries in reply or () for entry_id, fields in entries
        ]

    def unacknowledged(self, idle_s: float, count: int) -> list[tuple[bytes, int]]:
        """The oldest entries that some consumer read `idle_s` ago or earlier and never
        acknowledged, and how often each was delivered."""
        with redis_errors(self.place):
            found: Any = self._redis.xpending_range(
                LABELS, GROUP, "-", "+", count, idle=int(idle_s * 1000)
            )
        return [(entry["message_id"], entry["times_delivered"]) for entry in found]

    def claim(self, consumer: str, entry_ids: Sequence[bytes], idle_s: float) -> list[Entry]:
        """Take over entries, if still nobody has touched them for `idle_s`."""
        with redis_errors(self.place):
            reply: Any = self._redis.xclaim(
                LABELS, GROUP, consumer, int(idle_s * 1000), list(entry_ids)
            )
        return [Entry(entry_id, fields or {}) for entry_id, fields in reply if entry_id is not None]

    def keep(self, consumer: str, entry_ids: Sequence[bytes]) -> None:
        """Say that `consumer` lives and still has these entries in hand."""
        if entry_ids:
            with redis_errors(self.place):
                self._redis.xclaim(LABELS, GROUP, consumer, 0, list(entry_ids), justid=True)

    def remove(self, entry_ids: Sequence[bytes]) -> None:
        """Acknowledge and delete: the entries are in the lake."""
        if entry_ids:
            with redis_errors(self.place):
                pipeline = self._redis.pipeline(transaction=True)
                pipeline.xack(LABELS, GROUP, *entry_ids)
                pipeline.xdel(LABELS, *entry_ids)
                pipeline.execute()

    def dead_letter(self, entry: Entry, reason: str) -> None:
        """Move an entry to the dead letters."""
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=True)
            fields: dict[Any, Any] = {
                **entry.fields,
                b"entry_id": entry.entry_id,
                b"reason": reason.encode(errors="replace"),
            }
            pipeline.xadd(DEAD_LETTERS, fields, maxlen=MAX_DEAD_LETTERS)
            pipeline.xack(LABELS, GROUP, entry.entry_id)
            pipeline.xdel(LABELS, entry.entry_id)
            pipeline.execute()


def _numbers(entry_id: Any) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence)
