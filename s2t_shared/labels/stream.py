"""The label stream in Redis: entries appended by writers, read and acknowledged by drains.

Knows bytes and keys; not what a rollout is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis

from s2t_shared.redis_connection import open_client, redis_errors
from s2t_shared.redis_url import place_of

# A stream. Field "rollout" is `packed.pack` of a rollout; any other entry becomes a dead letter.
LABELS = "s2t:labels"
# A stream: the entry's own fields, its id and the reason.
DEAD_LETTERS = "s2t:labels:dead"
GROUP = "drain"
MAX_DEAD_LETTERS = 10_000  # about; bad entries must not fill Redis

EntryNumber = tuple[int, int]  # of an entry: milliseconds and sequence number, in order


@dataclass(frozen=True)
class StreamCounts:
    """rollouts: in the stream, not yet in the lake."""

    rollouts: int
    dead_letters: int


@dataclass(frozen=True)
class Entry:
    """One stream entry as received. Anyone who can reach Redis may have written it."""

    entry_id: bytes
    fields: dict[bytes, bytes]


@dataclass(frozen=True)
class Appended:
    """durable: the server confirmed (WAITAOF) that its append-only file holds the entries on disk.
    last: the newest of them."""

    durable: bool
    last: EntryNumber


@dataclass(frozen=True)
class Persistence:
    """run_id: changes when the server restarts. fsyncs: the server syncs its append-only file
    within seconds. oldest: the first entry in the stream, None where it is empty."""

    run_id: str
    fsyncs: bool
    oldest: EntryNumber | None


class LabelStream:
    """The Redis commands that labels need, over one client.

    Every method raises StoreError where Redis does not answer within `timeout_s`, or refuses.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._url = url
        self._redis = open_client(url, timeout_s)
        self.timeout_s = timeout_s
        self.place = place_of(url)

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
            rollouts = int(self._redis.xlen(LABELS))
            dead_letters = int(self._redis.xlen(DEAD_LETTERS))
        return StreamCounts(rollouts, dead_letters)

    def oldest(self) -> EntryNumber | None:
        """The first entry that is not in the lake; None where the stream is empty."""
        with redis_errors(self.place):
            first = self._redis.xrange(LABELS, count=1)
        return _number(first[0][0]) if first else None

    # -- writers ----------------------------------------------------------------------------------

    def append(self, rollouts: Sequence[bytes]) -> Appended:
        """Append serialised rollouts and wait, half the timeout at most, until they are on the
        server's disk. After an error some of them may be in the stream nevertheless."""
        assert rollouts
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=False)
            for rollout in rollouts:
                pipeline.xadd(LABELS, {"rollout": rollout})
            pipeline.execute_command("WAITAOF", 1, 0, int(self.timeout_s * 500))
            *entry_ids, synced = pipeline.execute(raise_on_error=False)
            for answer in entry_ids:
                if isinstance(answer, Exception):
                    raise answer
        # An error: an older server, or one without an append-only file.
        durable = not isinstance(synced, Exception) and synced[0] >= 1
        return Appended(durable, _number(entry_ids[-1]))

    def persistence(self) -> Persistence:
        """What the server says of its disk."""
        with redis_errors(self.place):
            info: dict[str, Any] = self._redis.info()
            try:
                policy = self._redis.config_get("appendfsync").get("appendfsync", "")
            except redis.ResponseError:  # we are not allowed to ask
                policy = ""
            oldest = self._redis.xrange(LABELS, count=1)
        fsyncs = (
            policy in ("always", "everysec")
            and info.get("aof_enabled") == 1
            and info.get("aof_last_write_status") == "ok"
        )
        return Persistence(info["run_id"], fsyncs, _number(oldest[0][0]) if oldest else None)

    # -- drains -----------------------------------------------------------------------------------

    def create_group(self) -> None:
        """Create the stream and the consumer group where they do not exist."""
        with redis_errors(self.place):
            try:
                self._redis.xgroup_create(LABELS, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        """Up to `count` entries that no consumer has read. Waits for the first one at most
        `block_ms`, and at most half the timeout."""
        block = min(block_ms, int(self.timeout_s * 500)) or None  # 0 would mean for ever
        with redis_errors(self.place):
            reply: Any = self._redis.xreadgroup(
                GROUP, consumer, {LABELS: ">"}, count=count, block=block
            )
        entries: list[Entry] = []
        for _, found in reply or ():
            entries.extend(Entry(entry_id, fields) for entry_id, fields in found)
        return entries

    def unacknowledged(self, idle_s: float, count: int) -> list[tuple[bytes, int]]:
        """The oldest entries that some consumer read `idle_s` ago or earlier and never
        acknowledged, and how often each was delivered."""
        with redis_errors(self.place):
            found: Any = self._redis.xpending_range(
                LABELS, GROUP, "-", "+", count, idle=int(idle_s * 1000)
            )
        return [(entry["message_id"], entry["times_delivered"]) for entry in found]

    def claim(self, consumer: str, entry_ids: Sequence[bytes], idle_s: float) -> list[Entry]:
        """Take over entries that still nobody has claimed or renewed for `idle_s`."""
        with redis_errors(self.place):
            reply: Any = self._redis.xclaim(
                LABELS, GROUP, consumer, int(idle_s * 1000), list(entry_ids)
            )
        return [Entry(entry_id, fields or {}) for entry_id, fields in reply if entry_id is not None]

    def renew(self, consumer: str, entry_ids: Sequence[bytes]) -> None:
        """Renew the claim of a living consumer on its entries."""
        if not entry_ids:
            return
        with redis_errors(self.place):
            self._redis.xclaim(LABELS, GROUP, consumer, 0, list(entry_ids), justid=True)

    def remove(self, entry_ids: Sequence[bytes]) -> None:
        """Acknowledge and delete entries: they are in the lake."""
        if not entry_ids:
            return
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.xack(LABELS, GROUP, *entry_ids)
            pipeline.xdel(LABELS, *entry_ids)
            pipeline.execute()

    def dead_letter(self, entry: Entry, reason: str) -> None:
        """Move an entry to the dead letters."""
        fields: dict[Any, Any] = dict(entry.fields)
        fields[b"entry_id"] = entry.entry_id
        fields[b"reason"] = reason.encode(errors="replace")
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.xadd(DEAD_LETTERS, fields, maxlen=MAX_DEAD_LETTERS)
            pipeline.xack(LABELS, GROUP, entry.entry_id)
            pipeline.xdel(LABELS, entry.entry_id)
            pipeline.execute()

    # -- dead letters -----------------------------------------------------------------------------

    def dead_letters(self, start: bytes, count: int) -> list[Entry]:
        """The first `count` dead letters from `start` on ("-": from the first)."""
        with redis_errors(self.place):
            found: Any = self._redis.xrange(DEAD_LETTERS, min=start, count=count)
        return [Entry(entry_id, fields) for entry_id, fields in found]

    def remove_dead_letters(self, entry_ids: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many were there."""
        if not entry_ids:
            return 0
        with redis_errors(self.place):
            return int(self._redis.xdel(DEAD_LETTERS, *entry_ids))

    def trim_dead_letters(self, age_s: float) -> int:
        """Delete the dead letters that are older; returns how many."""
        oldest = int((time.time() - age_s) * 1000)
        with redis_errors(self.place):
            return int(self._redis.xtrim(DEAD_LETTERS, minid=oldest, approximate=False))

    def rewrite_log(self) -> None:
        """Let the server write its append-only file anew, without what was deleted."""
        with redis_errors(self.place), suppress(redis.ResponseError):  # it does so already
            self._redis.bgrewriteaof()


def _number(entry_id: Any) -> EntryNumber:
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence)
