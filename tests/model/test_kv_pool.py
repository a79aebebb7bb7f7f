"""The byte-bounded KV pool: a slot always holds what its ids say, whatever was allocated, read,
released and evicted.

The pool stores tensors and never looks into them. The tests write numbers that are derived from
the adapter key and the ids up to each column (as real keys and values are), and check that they
are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared.model import kv_pool, prefix_index
from s2t_shared.model.kv_pool import (
    MIN_PREFIX_MATCH,
    MIN_SLOT_TOKENS,
    SLAB_TOKENS,
    BatchLayout,
    KVPool,
    KVShape,
    Slot,
    common_prefix,
    shares_longer_prefix,
)

SHAPES = [KVShape(2, 3, 1), KVShape(1, 2, 2)]
BYTES = 4 * (2 * 4 + 1 * 4)  # of one token in both layers
ADAPTER_KEYS = (None, "a", "b")
STORY = [(7 * i * i + i) % 11 for i in range(700)]

# -- slots and what they hold ---------------------------------------------------------------------


def new_pool(tokens: int, slab_slots: int = 1) -> KVPool:
    device = torch.device("cpu")
    layout = BatchLayout(slab_slots)
    return KVPool(SHAPES, torch.float32, device, tokens * BYTES + BYTES // 2, layout)


def values_of(adapter_key: str | None, ids: Sequence[int]) -> torch.Tensor:
    """What reading these ids leaves in each column: depends on the adapter key and on everything
    before."""
    state = 1 + ADAPTER_KEYS.index(adapter_key)
    values = []
    for token_id in ids:
        state = (state * 131 + token_id + 17) % 1_000_003
        values.append(float(state))
    return torch.tensor(values)


def read(slot: Slot, ids: Sequence[int], until: int) -> None:
    """Read `ids` up to `until` into the slot, as a forward would."""
    start = len(slot.token_ids)
    assert list(ids[:start]) == slot.token_ids, "the slot does not hold the start of these ids"
    values = values_of(slot.adapter_key, ids[:until])[start:]  # type: ignore[arg-type]
    for layer, (keys, data) in enumerate(slot.slab.layers):
        keys[slot.index, :, start:until] = (values + layer)[None, :, None]
        data[slot.index, :, start:until] = -(values + layer)[None, :, None]
    slot.token_ids[start:] = ids[start:until]


def assert_holds(slot: Slot) -> None:
    """Every column of `token_ids` has that adapter key's values of exactly those ids."""
    n = len(slot.token_ids)
    values = values_of(slot.adapter_key, slot.token_ids)  # type: ignore[arg-type]
    for layer, (keys, data) in enumerate(slot.slab.layers):
        expected = (values + layer)[None, :, None]
        assert bool((keys[slot.index, :, :n] == expected).all()), "keys of other ids"
        assert bool((data[slot.index, :, :n] == -expected).all()), "values of other ids"


def cached_slots(pool: KVPool) -> list[Slot]:
    return [slot for slot in pool.slots() if not slot.live]


def is_in(slot: Slot, pool: KVPool) -> bool:
    return any(other is slot for other in pool.slots())


def allocated(
    pool: KVPool, ids: Sequence[int], columns: int, adapter_key: str | None = None
) -> Slot:
    """A slot that has read all of `ids`."""
    slot = pool.allocate(ids, columns, adapter_key)
    assert slot is not None
    read(slot, ids, len(ids))
    return slot


def other_ids(name: int, length: int = 30) -> list[int]:
    """Ids that share no prefix with those of another name."""
    return [1000 + name] * length


def naive_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


# -- random histories -----------------------------------------------------------------------------


@dataclass
class World:
    """A pool, its live slots with the ids they are to read, and what must hold after each step."""

    pool: KVPool
    live: list[tuple[Slot, list[int]]] = field(default_factory=list)

    def prefix_lengths(self, ids: list[int], adapter_key: str | None) -> list[tuple[Slot, int]]:
        """What each slot of the adapter key has read of `ids`."""
        found = []
        for slot in self.pool.slots():
            if slot.adapter_key == adapter_key:
                found.append((slot, naive_prefix(slot.token_ids, ids[:-1])))
        return found

    def allocate(self, ids: list[int], columns: int, adapter_key: str | None, percent: int) -> None:
        before = self.prefix_lengths(ids, adapter_key)
        best = max((length for _, length in before), default=0)
        sources = [slot for slot, length in before if length == best]
        slot = self.pool.allocate(ids, columns, adapter_key)
        if slot is None:
            refused_rightly = self.live or not self.pool.fits(columns)
            assert refused_rightly, "a pool that nobody uses refuses what fits it"
            return
        assert slot.live and slot.adapter_key == adapter_key and slot.columns >= columns
        assert all(slot is not other for other, _ in self.live), "a live slot was handed out"
        length = len(slot.token_ids)
        assert length < len(ids) and slot.token_ids == ids[:length]
        if length != (best if best >= MIN_PREFIX_MATCH else 0):
            # The prefix was given up because it stood in its own sequence's way; a shorter one may
            # have been found instead.
            assert best >= MIN_PREFIX_MATCH
            assert length in {0, *(shared for _, shared in before if shared < best)}
            still_there = [source for source in sources if is_in(source, self.pool)]
            assert not still_there, "a prefix was there and not used"
        self.live.append((slot, ids))
        read(slot, ids, max(length, len(ids) * percent // 100))

    def read_more(self, number: int, percent: int) -> None:
        slot, ids = self.live[number]
        before = len(slot.token_ids)
        read(slot, ids, before + (len(ids) - before) * percent // 100)

    def truncate(self, number: int, percent: int) -> None:
        slot, _ = self.live[number]
        slot.truncate(len(slot.token_ids) * percent // 100)

    def extend(self, number: int) -> None:
        slot, ids = self.live[number]
        before = len(slot.token_ids)
        longest = max(length for _, length in self.prefix_lengths(ids, slot.adapter_key))  # type: ignore[arg-type]
        self.pool.extend_from_cache(slot, ids)
        worthwhile = longest >= before + MIN_PREFIX_MATCH
        assert len(slot.token_ids) == (longest if worthwhile else before)

    def release(self, number: int) -> None:
        slot, _ = self.live.pop(number)
        length = len(slot.token_ids)
        self.pool.release(slot)
        assert not slot.live
        assert is_in(slot, self.pool) == (length >= MIN_PREFIX_MATCH)

    def release_all(self) -> None:
        for slot, _ in self.live:
            self.pool.release(slot)
        self.live.clear()

    def clear(self) -> None:
        self.pool.clear()
        assert not cached_slots(self.pool)
        assert all(not slab.is_empty for slab in self.pool.slabs)

    def check(self) -> None:
        pool = self.pool
        pool.check()
        allocated_tokens = sum(slab.columns * len(slab.slots) for slab in pool.slabs)
        assert pool.bytes == allocated_tokens * BYTES <= pool.max_bytes
        slots = list(pool.slots())
        owned = {(id(slot.slab), slot.index) for slot, _ in self.live}
        assert len(owned) == len(self.live) == pool.live_slots, "two sequences in one slot"
        assert {id(slot) for slot, _ in self.live} == {id(slot) for slot in slots if slot.live}
        for slot, ids in self.live:
            assert slot.token_ids == ids[: len(slot.token_ids)], "someone wrote to a live slot"
        for slot in slots:
            assert_holds(slot)


IDS = st.builds(
    lambda cut, tail, length: ([*STORY[:cut], *[20 + tail] * 600])[:length],
    st.sampled_from([0, 15, 16, 17, 40, 100, 400, 400, 400]),
    st.integers(0, 2),
    st.sampled_from([1, 16, 17, 18, 30, 60, 101, 120, 180, 300]),
)
ALLOCATE = st.tuples(
    st.just("allocate"),
    IDS,
    st.sampled_from([0, 0, 9, 200, -1]),
    st.tuples(st.sampled_from([None, None, None, "a", "b"]), st.sampled_from([100, 60, 0])),
)
CHANGE = st.tuples(
    st.sampled_from(["read", "release", "extend", "truncate", "all leave", "all leave", "clear"]),
    st.integers(0, 9),
    st.integers(1, 100),
    st.none(),
)


def apply(world: World, operation: tuple) -> None:
    name, first, second, third = operation
    if name == "allocate":
        columns = len(first) + second
        if second < 0:  # as many as the pool can ever give
            sizes = (128, 256, 512, 1024, 2048)
            columns = max((size for size in sizes if world.pool.fits(size)), default=128)
        world.allocate(list(first), max(len(first), columns), *third)
    elif name == "clear":
        world.clear()
    elif name == "all leave":
        world.release_all()
    elif world.live:
        number = first % len(world.live)
        if name == "read":
            world.read_more(number, second)
        elif name == "truncate":
            world.truncate(number, second)
        elif name == "extend":
            world.extend(number)
        else:
            world.release(number)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([128, 300, 512, 513, 800, 1024, 1500, 2100, 3000]),
    st.lists(ALLOCATE | CHANGE, min_size=15, max_size=50),
    st.sampled_from([1, 4]),
)
def test_slots_hold_what_their_ids_say_whatever_happens(
    tokens: int, operations: list[tuple], slab_slots: int
) -> None:
    """An answer continued over another prompt's KV, or another adapter's, is fluent and wrong:
    nobody would notice. A pool above its bytes ends the process; one that refuses what fits it
    stops serving for ever."""
    world = World(new_pool(tokens, slab_slots))
    for operation in operations:
        apply(world, operation)
        world.check()
    world.release_all()
    world.check()
    world.pool.clear()
    assert world.pool.bytes == 0


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 2500),
    st.integers(1, 1200),
    st.integers(1, 6),
    st.lists(st.tuples(IDS, st.sampled_from([0, 100, 400])), max_size=8),
    st.sampled_from([1, 4]),
)
def test_fits_is_honest(
    tokens: int, columns: int, slots: int, history: list[tuple[list[int], int]], slab_slots: int
) -> None:
    """The engine refuses what does not fit and promises to serve what does: too timid loses
    requests, too bold makes one wait for ever, at the head of the queue."""
    pool = new_pool(tokens, slab_slots)
    for ids, extra in history:
        slot = pool.allocate(ids, len(ids) + extra)
        if slot is not None:
            read(slot, ids, len(ids))
            pool.release(slot)
    pool.clear()
    assert pool.bytes == 0
    got = [pool.allocate(other_ids(i), columns) for i in range(slots)]
    assert pool.fits(columns, slots) == all(slot is not None for slot in got)
    assert pool.fits(columns) or not pool.fits(columns, slots)
    pool.check()


# -- what is reused and what is evicted -----------------------------------------------------------


@pytest.mark.parametrize("takes_all", [384, 512])
def test_a_cached_prefix_does_not_stand_in_its_own_sequences_way(takes_all: int) -> None:
    """A conversation whose next turn needs most of the pool: the cached slot of its last turn is
    too short to be reused, and must give way when it is all that is left; else that request, and
    all behind it, waits for ever."""
    pool = new_pool(512)
    pool.release(allocated(pool, STORY[:100], 128))
    assert pool.fits(takes_all)
    slot = pool.allocate(STORY[:300], takes_all)
    assert slot is not None, "nothing is live, it fits, and yet there is no room"
    assert_holds(slot)
    pool.check()


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=4), st.integers(1, 5))
def test_the_least_recently_used_go_first(order: list[int], again: list[int], new: int) -> None:
    """Evicting the prompt that everyone shares, and caching one-off answers, costs a whole prefill
    per request."""
    pool = new_pool(6 * MIN_SLOT_TOKENS)
    slots = [allocated(pool, other_ids(i), 100) for i in range(6)]
    for i in order:
        pool.release(slots[i])
    expected = list(order)
    for i in again:  # used again: reused and released
        slot = pool.allocate(other_ids(i), 100)
        assert slot is slots[i]
        read(slot, other_ids(i), 30)
        pool.release(slot)
        expected.remove(i)
        expected.append(i)
    for j in range(new):
        allocated(pool, other_ids(50 + j), 100)
        names = {slot.token_ids[0] - 1000 for slot in cached_slots(pool)}
        assert names == set(expected[j + 1 :])


def test_lending_a_prefix_counts_as_use() -> None:
    """A system prompt that is only ever copied from must not look idle."""
    pool = new_pool(3 * MIN_SLOT_TOKENS)
    first = allocated(pool, STORY[:100], 100)
    second = allocated(pool, other_ids(1), 100)
    pool.release(first)
    pool.release(second)
    # A copy: too much of `first` would be lost.
    branch = allocated(pool, [*STORY[:40], *[99] * 20], 100)
    assert branch is not first
    assert len(cached_slots(pool)) == 2
    allocated(pool, other_ids(2), 100)
    assert cached_slots(pool) == [first]


def test_a_slot_is_reused_where_little_is_lost_and_copied_otherwise() -> None:
    """Reusing a long cached slot for a short common prefix throws the rest of it away; copying one
    that ends there costs time and a slot for nothing."""
    pool = new_pool(8 * MIN_SLOT_TOKENS)
    cached = allocated(pool, STORY[:60], 100)
    pool.release(cached)
    copy = pool.allocate([*STORY[:30], 99, 99], 100)
    assert copy is not None
    assert copy is not cached
    assert len(cached.token_ids) == 60
    assert len(copy.token_ids) == 30
    longer = pool.allocate([*STORY[:50], 98, 98], 100)
    assert longer is cached
    assert longer.token_ids == STORY[:50]
    assert longer.live
    assert_holds(copy)
    assert_holds(longer)


def test_the_last_resort_is_to_reuse_a_slot_with_much_else_in_it() -> None:
    """With no other slot left a cached one serves even where much of it is lost: waiting would gain
    nothing."""
    pool = new_pool(MIN_SLOT_TOKENS)
    cached = allocated(pool, STORY[:100], 100)
    assert pool.allocate(STORY[:30], 100) is None, "its only slot is in use"
    pool.release(cached)
    slot = pool.allocate(STORY[:30], 100)
    assert slot is cached
    assert slot.token_ids == STORY[:29]


def test_of_equal_prefixes_a_cached_one_is_reused() -> None:
    """Copying a live slot, while a cached one holds the same, costs time and a second slot."""
    pool = new_pool(8 * MIN_SLOT_TOKENS)
    live = allocated(pool, STORY[:60], 100)
    cached = allocated(pool, STORY[:60], 100)
    pool.release(cached)
    assert live.live
    assert pool.allocate(STORY[:60], 100) is cached


def test_nothing_is_evicted_in_vain() -> None:
    """A slab that the wanted prefix keeps from being freed makes no room: its other slots stay."""
    pool = new_pool(4096)
    for i in range(7):
        allocated(pool, other_ids(i), 512)
    source = allocated(pool, STORY[:200], 256)
    neighbour = allocated(pool, other_ids(7), 256)
    assert source.slab is neighbour.slab
    pool.release(neighbour)
    pool.release(source)
    assert pool.allocate(STORY[:100], 100) is source, "the last resort"
    assert is_in(neighbour, pool)


def test_releasing_twice_is_a_bug_and_says_so() -> None:
    """The second release would free the slot of whoever got it in between: two answers in one
    slot."""
    pool = new_pool(512)
    slot = allocated(pool, STORY[:30], 100)
    pool.release(slot)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(slot)


@pytest.mark.parametrize("change", ["bytes", "owner", "length"])
def test_check_notices_what_it_is_there_for(change: str) -> None:
    """Guards every test that calls `check`: an integrity check that accepts anything is none."""
    pool = new_pool(512)
    slot = allocated(pool, STORY[:30], 100)
    pool.check()
    if change == "bytes":
        pool.max_bytes = 1
    elif change == "owner":
        slot.index = 1
    else:
        slot.token_ids = [1] * 129
    with pytest.raises(AssertionError):
        pool.check()


# -- slabs ----------------------------------------------------------------------------------------


def test_empty_slabs_serve_other_sizes() -> None:
    """Slabs that stay with the size they were made for: after an hour of short requests no long one
    is ever served."""
    pool = new_pool(512)
    for lengths in ([128] * 4, [512], [256, 128, 128], [256, 256], [128] * 4):
        slots = [allocated(pool, other_ids(100 * n + i), n) for i, n in enumerate(lengths)]
        assert [slot.columns for slot in slots] == lengths
        assert pool.bytes == 512 * BYTES
        assert pool.allocate(other_ids(9), 100) is None
        for slot in slots:
            pool.release(slot)
        pool.check()


def test_short_slots_share_slabs_in_a_large_pool() -> None:
    """One allocation per short request fragments the device's memory and keeps attention from
    batching slots."""
    pool = new_pool(16 * SLAB_TOKENS)
    count = SLAB_TOKENS // MIN_SLOT_TOKENS
    slots = [allocated(pool, other_ids(i), 100) for i in range(count)]
    assert len({id(slot.slab) for slot in slots}) == 1
    assert pool.bytes == SLAB_TOKENS * BYTES
    long = allocated(pool, other_ids(-1), SLAB_TOKENS + 1)
    assert long.columns == 2 * SLAB_TOKENS
    assert len(long.slab.slots) == 1


def test_live_slots_stay_together() -> None:
    """On a GPU each slab of live slots is one more attention call per layer: cached slots give way
    before a batch spreads over more slabs."""
    pool = new_pool(64 * MIN_SLOT_TOKENS, slab_slots=4)
    for first in range(0, 40, 4):  # four live sequences at a time, each new
        slots = [allocated(pool, STORY[i : i + 30], 100) for i in range(first, first + 4)]
        assert len({id(slot.slab) for slot in slots}) == 1
        for slot in slots:
            pool.release(slot)
    assert len(pool.slabs) == 1
    pool.check()


def test_a_slab_for_a_batch_leaves_room_for_other_sizes() -> None:
    """64 slots of the longest class would be the whole pool."""
    pool = new_pool(16 * 1024, slab_slots=64)
    long = allocated(pool, STORY[:600], 2048)
    assert long.slab.bytes <= pool.max_bytes / 4
    short = allocated(pool, STORY[:20], 100)
    assert len(short.slab.slots) == 32


def test_a_fresh_slab_is_zero() -> None:
    """A masked column has weight 0, and 0 * NaN is NaN: uninitialised memory would poison a
    neighbour's answer."""
    slot = allocated(new_pool(512), STORY[:5], 100)
    for keys, values in slot.slab.layers:
        assert not keys[:, :, 5:].any()
        assert not values[:, :, 5:].any()
        assert keys.shape[0] == len(slot.slab.slots)
        assert keys.shape[2] == 128


# -- prefixes -------------------------------------------------------------------------------------


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, 1), max_size=40),
    st.lists(st.integers(0, 1), max_size=40),
    st.integers(0, 300),
)
def test_common_prefix_is_the_naive_loop(a: list[int], b: list[int], shared: int) -> None:
    """One too many is a wrong token in the KV, one too few is a prefill."""
    start = STORY[:shared]
    assert common_prefix([*start, *a], [*start, *b]) == shared + naive_prefix(a, b)
    assert common_prefix(a, a) == len(a)


def test_waiting_for_another_slot_pays_only_where_it_reads_the_same() -> None:
    """Waiting for a slot of another adapter, or for ids that differ, is waiting for nothing: the
    request starves."""
    pool = new_pool(2048)
    slot = pool.allocate((), 100)
    same = pool.allocate((), 100)
    adapted = pool.allocate((), 100, "a")
    assert slot is not None and same is not None and adapted is not None
    last_token_is_never_lent = STORY[:16]
    assert shares_longer_prefix(STORY[:17], slot, same, STORY[:50])
    assert not shares_longer_prefix(last_token_is_never_lent, slot, same, STORY[:50])
    assert not shares_longer_prefix(STORY[:50], slot, adapted, STORY[:50])
    assert not shares_longer_prefix(STORY[:50], slot, same, [99, *STORY[1:50]])
    read(slot, STORY, 40)
    assert not shares_longer_prefix(STORY[:50], slot, same, STORY[:50])
    assert shares_longer_prefix(STORY[:90], slot, same, STORY[:90])


def test_no_allocation_looks_at_every_cached_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose contexts share a system prompt slowed down as its pool filled."""
    compared: list[int] = []

    def counted(a: list[int], b: list[int]) -> int:
        compared.append(len(a))
        return common_prefix(a, b)

    monkeypatch.setattr(kv_pool, "common_prefix", counted)
    pool = new_pool(400 * MIN_SLOT_TOKENS)
    system = STORY[:48]
    for number in range(500):  # some are evicted
        pool.release(allocated(pool, [*system, *other_ids(number)], 100))
    compared.clear()
    slot = pool.allocate([*system, *other_ids(499), 5], 100)
    assert slot is not None and len(slot.token_ids) == 48 + 30
    assert len(compared) <= prefix_index.MAX_FOUND
    pool.check()
