"""The drain against a real server: labels reach the lake once, poison blocks nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import redis

from s2t_shared.errors import StoreError
from s2t_shared.labels.dead_letters import delete_dead_letters, read_dead_letters, requeue
from s2t_shared.labels.drain import DAY_S, MOST_GIB, Drain, default_max_gib
from s2t_shared.labels.known_models import KnownModels
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.packed import MAGIC, pack
from s2t_shared.labels.rows import Rows
from s2t_shared.labels.stream import DEAD_LETTERS, GROUP, LABELS, LabelStream, StreamCounts
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client
from services.launch.redis_server import RedisServer, free_port, open_redis
from tests.helpers.lake import ids_in, label, names, rollout
from tests.helpers.redis import eventually


def rows(lake: Lake) -> int:
    return sum(shard.rollouts for shard in lake.shards())


def pending(client: redis.Redis) -> int:
    """Entries that a drain has read and not acknowledged."""
    return int(client.xpending(LABELS, GROUP)["pending"])


def put(store: LabelStream, *numbers: int) -> None:
    store.append([pack(rollout(n)) for n in numbers])


def test_drain_writes_full_shards_at_once_and_the_rest_when_old(
    lake: Lake, store: LabelStream, client: redis.Redis
) -> None:
    put(store, *range(25))
    drain = Drain(store, lake, shard_rows=10, shard_age_s=0.5)
    assert drain.run_once() == 10 and rows(lake) == 10
    assert drain.run_once() == 10 and drain.run_once() == 5
    assert rows(lake) == 20
    assert store.counts().rollouts == pending(client) == 5  # not in the lake, so still in Redis
    time.sleep(0.5)
    drain.run_once()
    assert (rows(lake), store.counts().rollouts, pending(client)) == (25, 0, 0)
    assert drain.flush() == 0
    assert ids_in(lake) == names(*range(25))


def test_flush_takes_what_is_still_in_the_stream(lake: Lake, store: LabelStream) -> None:
    put(store, *range(600))
    drain = Drain(store, lake, shard_age_s=99)
    assert drain.flush() == 600 and ids_in(lake) == names(*range(600)) and len(lake.shards()) == 1
    assert drain.flush() == 0 and store.counts().rollouts == 0


def test_an_entry_is_deleted_only_once_the_shard_is_written(
    lake: Lake, store: LabelStream, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    put(store, *range(3))
    drain = Drain(store, lake, shard_rows=3)
    with monkeypatch.context() as patch:
        patch.setattr("s2t_shared.labels.lake.os.fsync", disk_full)
        for _ in range(2):
            with pytest.raises(StoreError, match="No space left on device"):
                drain.run_once()
        put(store, 3)
        assert store.counts().rollouts == 4
        assert pending(client) == 3  # a full buffer reads no more
    drain.run_once()
    assert ids_in(lake) == names(0, 1, 2) and store.counts().rollouts == 1


def test_a_drain_that_holds_entries_for_long_is_not_robbed(
    lake: Lake, store: LabelStream, tmp_path: Path
) -> None:
    """Others must not deliver them again and again until they are dead letters."""
    put(store, *range(3))
    slow = Drain(store, lake, shard_age_s=99, reclaim_idle_s=0.6)
    slow.run_once()
    other = Drain(store, Lake(tmp_path / "other"), reclaim_idle_s=0.6)
    for _ in range(20):
        time.sleep(0.1)
        assert slow.run_once() == 0 and other.run_once() == 0
    assert slow.flush() == 3 and other.flush() == 0
    assert (store.counts().rollouts, store.counts().dead_letters) == (0, 0)


def test_a_drain_that_dies_mid_way_loses_nothing_and_repeats_nothing(
    lake: Lake, store: LabelStream, server: RedisServer, client: redis.Redis
) -> None:
    put(store, *range(4))
    before_shard = Drain(store, lake, shard_rows=4, consumer="a")
    before_shard.run_once()
    put(store, 4, 5, 6)
    assert before_shard.run_once() == 3
    assert rows(lake) == 4  # three are only in its memory when it "dies"
    put(store, 7, 8, 9, 10)

    class Unheard(LabelStream):
        def remove(self, entry_ids: Sequence[bytes]) -> None:
            if entry_ids:
                raise StoreError("gone")

    after_shard = Drain(Unheard(server.url), lake, shard_rows=99, consumer="b")
    with pytest.raises(StoreError):
        after_shard.flush()  # dies between writing the shard and acknowledging it
    time.sleep(0.1)
    third = Drain(store, lake, consumer="c", reclaim_idle_s=0.05)
    while third.run_once():
        pass
    third.flush()
    assert ids_in(lake) == names(*range(11))
    assert rows(lake) > 11 == len(list(lake.rollouts()))
    assert (store.counts().rollouts, pending(client)) == (0, 0)


def mislabelled(**changes: object) -> bytes:
    wrong = replace(label("wrong"), **changes)  # type: ignore[arg-type]
    return pack(replace(rollout(1), labels=(wrong,)))


def resized(place: int, by: int) -> bytes:
    """An entry whose sizes lie."""
    line, _, numbers = pack(rollout(7)).removeprefix(MAGIC).partition(b"\n")
    head = json.loads(line)
    head["sizes"][place] += by
    return MAGIC + json.dumps(head).encode() + b"\n" + numbers


POISON = {
    "two in one": b"{}{}",
    "two in one line after another": replace(rollout(7)).to_json().encode() * 2,
    "two lines": b"\n".join([rollout(7).to_json().encode()] * 2),
    "not UTF-8": rollout(7).to_json().encode().replace(b"request-7", b"\xff"),
    "deep in a field": rollout(7).to_json().encode()[:-1] + b',"x":' + b"[" * 100_000,
    "packed: cut off": pack(rollout(7))[:-1],
    "packed: followed by more": pack(rollout(7)) * 2,
    "packed: no line": MAGIC + b"\n",
    "packed: a list": MAGIC + b"[]\n",
    "packed: nothing": MAGIC,
    "packed: not UTF-8": pack(rollout(7)).replace(b"request-7", b"request-\xff"),
    "packed: two objects": pack(rollout(7)).replace(b'"task"', b'"x":1}{"task"'),
    "packed: more labels than it has": resized(4, 1),
    "packed: fewer than no tokens": resized(0, -99),
    "packed: sizes that overflow": resized(0, 1 << 62),
    "packed: not finite": pack(replace(rollout(1), kl=(float("nan"), 0.0))),
    "packed: null": pack(replace(rollout(1), task=None)),  # type: ignore[arg-type]
    "packed: evaluation": pack(replace(rollout(1), split="test")),
    "packed: old schema": pack(replace(rollout(1), schema_version=1)),
    "not json": b"\xff{",
    "no field": None,
    "deep": b"[" * 100_000,
    "list": b"[]",
    "other schema": json.dumps({"schema_version": "\ud800"}).encode(),
    "missing key": json.dumps({"schema_version": 2}).encode(),
    "wrong type": replace(rollout(1), token_ids=("text",)).to_json().encode(),  # type: ignore[arg-type]
    "too large": replace(rollout(1), token_ids=(1, 2, 1 << 40, 4)).to_json().encode(),
    "null": replace(rollout(1), task=None).to_json().encode(),  # type: ignore[arg-type]
    "not finite": replace(rollout(1), kl=(float("nan"), 0.0)).to_json().encode(),
    "evaluation": replace(rollout(1), split="test").to_json().encode(),
    "old schema": replace(rollout(1), schema_version=1).to_json().encode(),
    "rank of another candidate": mislabelled(llm_top_rank=0),
    "rank behind the candidates": mislabelled(llm_top_rank=2),
    "rank without its candidate": mislabelled(llm_top_id=7),
    "rank beyond the support": mislabelled(llm_top_id=7, llm_top_rank=64),
    "candidate twice": mislabelled(candidate_ids=(6, 6)),
    "more than certain": mislabelled(llm_log_probs=(1.0, -1.0)),
}


@pytest.mark.parametrize("poison", POISON)
def test_poison_becomes_a_dead_letter_and_blocks_nothing(
    poison: str, lake: Lake, store: LabelStream, client: redis.Redis
) -> None:
    value = POISON[poison]
    put(store, 1)
    client.xadd(
        LABELS, {"label": "x"} if value is None else {"rollout": value}
    )  # "label": as schema 1 did
    put(store, 2)
    drain = Drain(store, lake)
    assert drain.run_once() == 3 and drain.flush() == 2
    assert ids_in(lake) == names(1, 2)
    counts = store.counts()
    assert (counts.rollouts, pending(client), counts.dead_letters) == (0, 0, 1)
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert fields.get(b"rollout") == value and b"Error: " in fields[b"reason"]


def test_an_entry_that_ends_its_reader_is_a_dead_letter_and_its_neighbours_are_not(
    lake: Lake, store: LabelStream, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DiesError(BaseException):
        """Stands for SIGKILL: nothing of the drain runs after it."""

    from_json = Rows.from_json

    def fragile(texts: Sequence[bytes]) -> Rows:
        if any(b"request-5" in text for text in texts):
            raise DiesError
        return from_json(texts)

    monkeypatch.setattr(Rows, "from_json", fragile)
    store.append([rollout(n).to_json().encode() for n in range(10)])
    deaths = 0
    while (deaths < 6 or store.counts().rollouts) and deaths < 20:
        drain = Drain(store, lake, shard_age_s=0.01, reclaim_idle_s=0.02)
        try:
            for _ in range(15):
                drain.run_once()
                time.sleep(0.03)
                if not store.counts().rollouts:
                    break
        except DiesError:
            deaths += 1
    assert deaths == 6 and ids_in(lake) == names(*range(10)) - names(5)
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert b"request-5" in fields[b"rollout"] and b"delivered 6 times" in fields[b"reason"]
    assert (store.counts().rollouts, pending(client)) == (0, 0)


@pytest.mark.parametrize("prompt_length", [1 << 40, 99])
def test_what_the_lake_cannot_hold_blocks_nothing(
    prompt_length: int,
    lake: Lake,
    store: LabelStream,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gap in check_rollout would be a bug; it must not stop the ledger, be it Arrow that refuses
    the value or the check of its columns."""
    monkeypatch.setattr("s2t_shared.labels.label.check_rollout", lambda _: None)
    store.append(
        [
            r.to_json().encode()
            for r in (rollout(1), replace(rollout(2), prompt_length=prompt_length), rollout(3))
        ]
    )
    Drain(store, lake).flush()
    assert ids_in(lake) == names(1, 3) and store.counts().rollouts == 0
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert b"lake cannot hold it" in fields[b"reason"]


def test_drain_thread_survives_an_outage_and_data_loss(tmp_path: Path, lake: Lake) -> None:
    port = free_port()
    server = open_redis(None, tmp_path / "one", port)
    store = LabelStream(server.url, timeout_s=1.0)
    drain = Drain(store, lake, shard_age_s=0.05)
    drain.start()
    put(store, 1)
    eventually(lambda: rows(lake) == 1)
    server.stop()
    time.sleep(0.2)
    copytree(tmp_path / "one" / "users", tmp_path / "two" / "users")  # the same passwords
    with open_redis(
        None, tmp_path / "two", port
    ):  # an empty Redis: the consumer group is gone as well
        put(store, 2)
        eventually(lambda: rows(lake) == 2 and store.counts().rollouts == 0)
        put(store, 3)
        client = open_client(server.url, 2.0)
        eventually(lambda: pending(client) == 1 or rows(lake) == 3)
        drain.stop()
        assert ids_in(lake) == names(1, 2, 3)
        assert store.counts().rollouts == 0


def test_housekeeping_joins_shards_and_applies_retention(lake: Lake, store: LabelStream) -> None:
    for n in range(20):
        lake.write([replace(rollout(n), created_at=time.time() - 90_000.0)])
    put(store, 99)
    Drain(store, lake).housekeep()
    assert len(lake.shards()) == 1 and ids_in(lake) == names(*range(20))
    drain = Drain(store, lake, max_age_days=1.0)
    drain.flush()
    drain.housekeep()
    assert ids_in(lake) == names(99)


def test_labels_of_unknown_models_are_dead_letters_that_can_be_sent_again(
    lake: Lake, store: LabelStream, client: redis.Redis, tmp_path: Path
) -> None:
    """Whoever reaches Redis could train our local selector on labels of an LLM of his own."""
    known = KnownModels(tmp_path / "known-models")
    writer = LabelWriter(store, tmp_path / "spool", known=known)
    writer.write([rollout(1)]).result(5.0)
    foreign = [
        replace(rollout(2), llm_digest="evil"),
        replace(rollout(3), tokenizer_digest="other"),
        replace(rollout(4), slm_digest="llm", llm_digest="slm"),
    ]
    store.append([r.to_json().encode() for r in foreign])
    drain = Drain(store, lake, known=KnownModels(tmp_path / "known-models"))
    assert drain.flush() == 1 and ids_in(lake) == names(1)
    letters = list(read_dead_letters(store))
    assert [letter.reason.partition(":")[2] for letter in letters] == [
        " llm_digest 'evil' is unknown: no proposer here used such models",
        " tokenizer_digest 'other' is unknown: no proposer here used such models",
        " the SLM, the LLM and the tokenizer are known, but not together: no proposer here used "
        "such models",
    ]
    writer.write([replace(rollout(5), llm_digest="evil")]).result(5.0)  # now it is ours
    assert requeue(store, letters[:1]) == 1
    drain.flush()
    assert ids_in(lake) == names(1, 2, 5) and store.counts().dead_letters == 2
    writer.close()


def test_dead_letters_are_removed_when_they_are_old(lake: Lake, store: LabelStream) -> None:
    """They hold users' text as labels do."""
    store.append([b"poison"])
    drain = Drain(store, lake, dead_letter_days=1 / DAY_S)
    drain.flush()
    drain.housekeep()
    assert store.counts().dead_letters == 1
    time.sleep(1.1)
    drain.housekeep()
    assert store.counts().dead_letters == 0


def test_dead_letters_are_deleted_by_what_they_are_of(
    lake: Lake, store: LabelStream, client: redis.Redis
) -> None:
    """`s2t labels delete` left them behind. In one that is not JSON any mention counts."""
    wrong = [replace(rollout(n), schema_version=1).to_json().encode() for n in range(3)]
    store.append([*wrong, b"{torn request-1"])
    Drain(store, lake).flush()
    assert store.counts().dead_letters == 4
    assert delete_dead_letters(store, lambda d: d.matches("request_id", "request-1")) == 2
    assert [d.matches("problem_id", "p2") for d in read_dead_letters(store)] == [False, True]
    content = str(client.xrange(DEAD_LETTERS))
    assert "request-0" in content and "request-1" not in content


def test_a_lake_whose_size_nobody_set_is_bounded_by_its_disk(
    lake: Lake, store: LabelStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default everything was kept, until the disk was full."""
    for n in range(3):
        lake.write([rollout(n)])
    assert 0 < default_max_gib(lake.root) <= MOST_GIB
    monkeypatch.setattr("s2t_shared.labels.drain.default_max_gib", lambda root: 1e-9)
    Drain(store, lake, max_gib=0.0).housekeep()
    assert len(lake.shards()) == 3
    Drain(store, lake, max_gib=None).housekeep()
    assert lake.shards() == []


def test_counts_before_any_drain_ran(store: LabelStream, client: redis.Redis) -> None:
    put(store, 1, 2)
    assert store.counts() == StreamCounts(rollouts=2, dead_letters=0)
    store.create_group()
    store.create_group()
    store.read("someone", 1, 0)
    assert pending(client) == 1 and store.counts().rollouts == 2
