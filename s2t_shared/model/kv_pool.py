"""Keys and values of many token sequences in one byte-bounded pool.

The pool knows tensors, slots and the ids each slot has read. It does not know what they mean.

A *slot* stores one sequence. Its size class is a power of two of columns, one column a token.
Slots of one size class lie together in a *slab*. An empty slab's bytes can serve another size
class. Attention reads slots in place.

    allocate   returns a slot that already holds the longest prefix of the ids found in any slot
    release    caches the slot for the prefixes it holds; the least recently used are evicted first
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2t_shared.model.prefix_index import BLOCK_TOKENS, PrefixIndex

SLAB_TOKENS = 8192
MIN_SLOT_TOKENS = 128
MIN_PREFIX_MATCH = BLOCK_TOKENS  # to read a shorter prefix again is cheaper than to look for it
# A slab of several slots has at most this share of the pool, so that several size classes fit.
LARGEST_SLAB = 1 / 4


@dataclass(frozen=True)
class BatchLayout:
    """How many single tokens of a forward may share one attention call.

    slab_slots: how many slots of a size class lie together in a slab, at least. max_added_padding:
    how many columns of padding cost about as much as one more call. Infinite: the tokens of a slab
    always share one call, also with free slots between them.
    """

    slab_slots: int = 1
    max_added_padding: float = 1024  # measured on CPU

    @classmethod
    def for_device(cls, device: torch.device, max_num_seqs: int = 1) -> BatchLayout:
        """On a GPU launches are what costs: one call for a whole batch of `max_num_seqs`."""
        return cls(max_num_seqs, math.inf) if device.type == "cuda" else cls()


@dataclass(frozen=True)
class KVShape:
    """Key heads of one layer, and the widths of its keys and values."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(eq=False)
class Slab:
    """Storage of several slots of one size class.

    layers: per layer, keys [slots, heads, columns, key_dim] and values [slots, heads, columns,
    value_dim]. slots: by index; None where the slot is free. taken, live: how many are not free,
    and how many of those are live.
    """

    columns: int
    bytes: int
    layers: list[tuple[Tensor, Tensor]]
    slots: list[Slot | None]
    taken: int = 0
    live: int = 0

    @property
    def is_empty(self) -> bool:
        return self.taken == 0

    @property
    def is_full(self) -> bool:
        return self.taken == len(self.slots)


@dataclass(kw_only=True, eq=False)
class Slot:
    """Storage of one sequence.

    token_ids: the ids read into columns 0, 1, ... Later columns are scratch. adapter_key: the
    adapter that read them; None: the base model. live: in use by a sequence; else cached.
    """

    slab: Slab
    index: int
    adapter_key: Hashable
    token_ids: list[int] = field(default_factory=list)
    live: bool = True
    used_at: int = 0

    @property
    def columns(self) -> int:
        return self.slab.columns

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        del self.token_ids[length:]


class KVPool:
    """Allocator and storage of at most `max_bytes`.

    Looking a prefix up takes no longer because many slots are cached.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        layout: BatchLayout = BatchLayout(),  # noqa: B008 - frozen
    ) -> None:
        self.layout = layout
        self._shapes = list(shapes)
        self._dtype = dtype
        self._device = device
        numbers_per_token = sum(shape.numbers_per_token for shape in shapes)
        self.bytes_per_token = numbers_per_token * dtype.itemsize
        self.max_bytes = max_bytes
        self.slabs: list[Slab] = []
        # A small budget gets small slabs, so that several size classes fit beside each other.
        small = max(MIN_SLOT_TOKENS, _power_of_two(self.max_tokens // 16 + 1))
        self._slab_tokens = min(SLAB_TOKENS, small)
        self.bytes = 0  # allocated on the device now
        self._with_room: dict[int, dict[Slab, None]] = {}  # by size class
        self._clock = 0
        self._live: dict[Slot, None] = {}
        self._cached: dict[int, dict[Slot, None]] = {}  # by size class; least recently used first
        self._prefixes: PrefixIndex[Slot] = PrefixIndex()  # of cached slots

    # -- size -------------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        return self.max_bytes // self.bytes_per_token

    def slots(self) -> Iterator[Slot]:
        """Every slot, live and cached."""
        for slab in self.slabs:
            for slot in slab.slots:
                if slot is not None:
                    yield slot

    @property
    def live_slots(self) -> int:
        return len(self._live)

    @property
    def usage(self) -> float:
        """Share of the memory that live slots hold, 0..1. May be read from any thread."""
        live = sum(slot.columns for slot in list(self._live))
        return live * self.bytes_per_token / self.max_bytes

    def fits(self, columns: int, slots: int = 1) -> bool:
        """Whether an empty pool has room for `slots` slots of so many columns."""
        size = _size_class(columns)
        slabs = -(-slots // self._slots_per_slab(size))
        return slabs * self._slab_bytes(size) <= self.max_bytes

    def capacity(self, columns: int) -> int:
        """How many slots of so many columns an empty pool has room for."""
        size = _size_class(columns)
        slabs = self.max_bytes // self._slab_bytes(size)
        return slabs * self._slots_per_slab(size)

    def _slots_per_slab(self, size: int) -> int:
        wanted = max(self.layout.slab_slots, self._slab_tokens // size)
        return max(1, min(wanted, int(self.max_tokens * LARGEST_SLAB) // size))

    def _slab_bytes(self, size: int) -> int:
        return self._slots_per_slab(size) * size * self.bytes_per_token

    # -- slots ------------------------------------------------------------------------------------

    def allocate(
        self, token_ids: Sequence[int], columns: int, adapter_key: Hashable = None
    ) -> Slot | None:
        """A slot for a sequence of up to `columns` tokens; None: no room now, try again later.

        The slot holds the longest prefix of `token_ids` that any slot of this adapter has read.
        The prefix never includes the last token: its output is needed, so it must be read.
        """
        source, shared = self._longest_prefix(token_ids, adapter_key)
        cached = source if source is not None and not source.live else None
        if cached is not None and cached.columns == _size_class(columns):
            lost = len(cached.token_ids) - shared
            if lost <= MIN_PREFIX_MATCH:
                return self._reuse(cached, shared)
        slot = self._new_slot(columns, adapter_key, protected=source)
        if slot is not None:
            if source is not None:
                self._copy(source, slot, shared)
            return slot
        if cached is None:
            return None
        if cached.columns >= columns:
            return self._reuse(cached, shared)
        # Too short to reuse, and its bytes are needed: give up the prefix and try again.
        self._evict(cached)
        return self.allocate(token_ids, columns, adapter_key)

    def extend_from_cache(self, slot: Slot, token_ids: Sequence[int]) -> None:
        """Copy what another slot has read of `token_ids` since, if it is clearly more."""
        source, shared = self._longest_prefix(token_ids, slot.adapter_key)
        if source is None or source is slot:
            return
        if shared >= len(slot.token_ids) + MIN_PREFIX_MATCH:
            self._copy(source, slot, shared)

    def release(self, slot: Slot) -> None:
        """End a slot's sequence. The slot is cached, or freed if it holds too little to match."""
        assert slot.live, "released twice"
        slot.live = False
        slot.slab.live -= 1
        del self._live[slot]
        if len(slot.token_ids) < MIN_PREFIX_MATCH:
            self._free(slot)
            return
        self._cached.setdefault(slot.columns, {})
        self._touch(slot)
        self._prefixes.add(slot)

    def clear(self) -> None:
        """Free every cached slot and every empty slab."""
        for cached in self._cached.values():
            for slot in list(cached):
                self._evict(slot)
        for slab in [slab for slab in self.slabs if slab.is_empty]:
            self._drop(slab)

    def check(self) -> None:
        """Check the pool's integrity: bytes within the bound, slots where their slabs say.

        Raises:
            AssertionError: a bug in the pool or in its caller.
        """
        assert self.bytes <= self.max_bytes, f"{self.bytes} bytes held, {self.max_bytes} allowed"
        assert self.bytes == sum(slab.bytes for slab in self.slabs), "bytes counted wrongly"
        for slab in self.slabs:
            keys, _ = slab.layers[0]
            assert keys.shape[0] == len(slab.slots)
            assert keys.shape[2] == slab.columns
            for index, slot in enumerate(slab.slots):
                if slot is None:
                    continue
                assert slot.slab is slab and slot.index == index, "two owners of one slot"
                assert len(slot.token_ids) <= slab.columns, "read beyond the slot's end"
            taken = [slot for slot in slab.slots if slot is not None]
            live = [slot for slot in taken if slot.live]
            assert (slab.taken, slab.live) == (len(taken), len(live)), "counted wrongly"

    # -- prefixes ---------------------------------------------------------------------------------

    def _longest_prefix(
        self, token_ids: Sequence[int], adapter_key: Hashable
    ) -> tuple[Slot | None, int]:
        """The slot with the longest prefix of all but the last token, and the prefix's length.

        Of equal slots, a cached one comes before a live one. Prefixes shorter than
        MIN_PREFIX_MATCH do not count.
        """
        ids = list(token_ids[:-1])
        best: Slot | None = None
        longest = 0
        for slot in (*self._prefixes.find(adapter_key, ids), *self._live):
            # One token tells most contexts apart from a longer match, also those that begin alike.
            decisive = max(longest, MIN_PREFIX_MATCH - 1)
            held = slot.token_ids
            if slot.adapter_key != adapter_key or min(len(held), len(ids)) <= decisive:
                continue
            if held[decisive] != ids[decisive]:
                continue
            shared = common_prefix(held, ids)
            if shared > decisive:
                best, longest = slot, shared
        return best, longest

    def _reuse(self, slot: Slot, length: int) -> Slot:
        """Hand out a cached slot with its first `length` tokens."""
        self._forget(slot)
        slot.truncate(length)
        slot.live = True
        slot.slab.live += 1
        self._live[slot] = None
        return slot

    def _copy(self, source: Slot, target: Slot, length: int) -> None:
        """Make the target hold the source's first `length` tokens."""
        start = min(common_prefix(target.token_ids, source.token_ids), length)
        columns = slice(start, length)
        layers = zip(source.slab.layers, target.slab.layers, strict=True)
        for (source_keys, source_values), (target_keys, target_values) in layers:
            target_keys[target.index, :, columns] = source_keys[source.index, :, columns]
            target_values[target.index, :, columns] = source_values[source.index, :, columns]
        target.token_ids = source.token_ids[:length]
        self._touch(source)

    def _touch(self, slot: Slot) -> None:
        """Note that the slot is used now."""
        self._clock += 1
        slot.used_at = self._clock
        if not slot.live:
            cached = self._cached[slot.columns]
            cached.pop(slot, None)
            cached[slot] = None

    # -- room -------------------------------------------------------------------------------------

    def _new_slot(self, columns: int, adapter_key: Hashable, protected: Slot | None) -> Slot | None:
        """An empty slot; None: no room. Evicts cached slots for it, but never `protected`."""
        size = _size_class(columns)
        if self.layout.slab_slots > 1:
            self._evict_beside_live(size, protected)
        slab = self._slab_with_room(size)
        if slab is None:
            cached = self._cached.get(size, {})
            victim = next((slot for slot in cached if slot is not protected), None)
            if victim is not None:
                self._evict(victim)
            elif not self._clear_slabs(self._slab_bytes(size), protected):
                return None
            slab = self._slab_with_room(size)
        assert slab is not None
        slot = Slot(slab=slab, index=slab.slots.index(None), adapter_key=adapter_key)
        slab.slots[slot.index] = slot
        slab.taken += 1
        slab.live += 1
        if slab.is_full:
            del self._with_room[size][slab]
        self._live[slot] = None
        return slot

    def _evict_beside_live(self, size: int, protected: Slot | None) -> None:
        """Make room in the slab with the most live slots, if it has none: live slots that lie
        together share one attention call."""
        slabs = [slab for slab in self.slabs if slab.columns == size]
        for slab in sorted(slabs, key=_live_slots, reverse=True):
            if not slab.is_full:
                return
            cached = [slot for slot in slab.slots if slot is not None and not slot.live]
            victims = [slot for slot in cached if slot is not protected]
            if victims:
                self._evict(min(victims, key=_used_at))
                return

    def _slab_with_room(self, size: int) -> Slab | None:
        """A slab of this size class with a free slot, made if the bytes suffice; else None."""
        with_room = self._with_room.get(size)
        if with_room:
            return max(with_room, key=_live_slots)
        if not self._make_room(self._slab_bytes(size)):
            return None
        slab = self._new_slab(size)
        self.slabs.append(slab)
        self.bytes += slab.bytes
        self._with_room.setdefault(size, {})[slab] = None
        return slab

    def _make_room(self, needed: int) -> bool:
        """Whether `needed` bytes are free, after dropping empty slabs if that is necessary."""
        while self.bytes + needed > self.max_bytes:
            groups = self._with_room.values()
            empty = next((slab for group in groups for slab in group if slab.is_empty), None)
            if empty is None:
                return False
            self._drop(empty)
        return True

    def _drop(self, slab: Slab) -> None:
        """Give an empty slab's bytes back."""
        self.slabs.remove(slab)
        self.bytes -= slab.bytes
        del self._with_room[slab.columns][slab]

    def _new_slab(self, size: int) -> Slab:
        slots = self._slots_per_slab(size)
        layers = []
        for shape in self._shapes:
            keys = self._storage(slots, shape.heads, size, shape.key_dim)
            values = self._storage(slots, shape.heads, size, shape.value_dim)
            layers.append((keys, values))
        return Slab(size, self._slab_bytes(size), layers, [None] * slots)

    def _storage(self, *shape: int) -> Tensor:
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN is NaN.
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _clear_slabs(self, needed: int, protected: Slot | None) -> bool:
        """Evict whole slabs, those first whose slots were used longest ago, until `needed` bytes
        are free. Evict nothing if that does not suffice, and return False."""
        idle = [slab for slab in self.slabs if _is_idle(slab, protected)]
        bytes_in_use = self.bytes - sum(slab.bytes for slab in idle)
        if bytes_in_use + needed > self.max_bytes:
            return False
        for slab in sorted(idle, key=_last_use):
            for slot in slab.slots:
                if slot is not None:
                    self._evict(slot)
            if self._make_room(needed):
                return True
        raise AssertionError("idle slabs have fewer bytes than was counted")

    def _evict(self, slot: Slot) -> None:
        """Free a cached slot."""
        self._forget(slot)
        self._free(slot)

    def _forget(self, slot: Slot) -> None:
        """Take a slot out of what is cached."""
        assert not slot.live
        del self._cached[slot.columns][slot]
        self._prefixes.remove(slot)

    def _free(self, slot: Slot) -> None:
        assert slot.slab.slots[slot.index] is slot
        slot.slab.slots[slot.index] = None
        slot.slab.taken -= 1
        self._with_room.setdefault(slot.columns, {})[slot.slab] = None


def _live_slots(slab: Slab) -> int:
    return slab.live


def _used_at(slot: Slot) -> int:
    return slot.used_at


def _last_use(slab: Slab) -> int:
    return max((slot.used_at for slot in slab.slots if slot is not None), default=0)


def _is_idle(slab: Slab, protected: Slot | None) -> bool:
    """Whether all slots of the slab may be evicted."""
    return slab.live == 0 and (protected is None or protected.slab is not slab)


# -- prefixes of ids ------------------------------------------------------------------------------


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix. Compares slices, which run at C speed."""
    low = 0
    high = min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def shares_longer_prefix(
    token_ids: Sequence[int], slot: Slot, other: Slot, other_ids: Sequence[int]
) -> bool:
    """Whether `other` will hold clearly more of `token_ids` than `slot` does now.

    other_ids: what `other` is reading.
    """
    if other.adapter_key != slot.adapter_key:
        return False
    shared = common_prefix(list(token_ids[:-1]), list(other_ids))
    return shared >= len(slot.token_ids) + MIN_PREFIX_MATCH


# -- size classes ---------------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def _size_class(columns: int) -> int:
    return max(MIN_SLOT_TOKENS, _power_of_two(columns))
