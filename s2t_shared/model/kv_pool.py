"""Keys and values of many token sequences in one byte-bounded pool.

Knows tensors, slots and which ids a slot has read; not what they mean. A *slot* is one sequence's
place. Rows of one size class (columns, a power of two) lie together in a *slab*; all slabs of short
slots have the same size, so a slab that falls empty can serve another class. Attention reads a
slab's slots in place, without a copy.

    allocate -> a slot that already holds the longest prefix of the ids found in any other slot (or
    nothing) release -> the slot is kept, for the prefixes it holds, until its bytes are needed
    (least recently used first)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SLAB_TOKENS = 8192
MIN_SLOT_TOKENS = 128
MIN_PREFIX_MATCH = 16  # a shorter common prefix is cheaper to read again than to look after


@dataclass(frozen=True)
class KVShape:
    """One layer's key and value heads and widths: what one token costs there."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(eq=False)
class Slab:
    """`layers`: per layer keys [slots, heads, columns, key_dim] and values [slots, heads, columns,
    value_dim]."""

    columns: int
    bytes: int
    layers: list[tuple[Tensor, Tensor]]
    slots: list[Slot | None]

    @property
    def is_empty(self) -> bool:
        return not any(self.slots)


@dataclass(kw_only=True, eq=False)
class Slot:
    """`token_ids`: what has been read into columns 0.., in order, by `adapter_key` (None: the base
    model; else an adapter). Columns behind them are scratch. `live`: in use; otherwise kept for
    reuse."""

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
        """Forget everything behind the first `length` tokens; nothing is moved."""
        del self.token_ids[length:]


class KVPool:
    """Allocator and storage, at most `max_bytes` in all."""

    def __init__(
        self, shapes: Sequence[KVShape], dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> None:
        self._shapes, self._dtype, self._device = list(shapes), dtype, device
        size = torch.empty(0, dtype=dtype).element_size()
        self.bytes_per_token = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes) * size
        self.max_bytes = max_bytes
        # A small budget gets small slabs, so that several size classes fit side by side.
        self._slab_tokens = min(
            SLAB_TOKENS, max(MIN_SLOT_TOKENS, _power_of_two(self.max_tokens // 16 + 1))
        )
        self._slabs: list[Slab] = []
        self._clock = 0

    # -- size -------------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        return self.max_bytes // self.bytes_per_token

    @property
    def bytes(self) -> int:
        """Bytes held on the device now."""
        return sum(slab.bytes for slab in self._slabs)

    @property
    def live_slots(self) -> int:
        return sum(slot.live for slot in self._all_slots())

    @property
    def kept_slots(self) -> int:
        return sum(not slot.live for slot in self._all_slots())

    def fits(self, columns: int, slots: int = 1) -> bool:
        """Whether `slots` slots of so many columns fit into the pool when nothing else is in it."""
        size = _size_class(columns)
        per_page = max(1, self._slab_tokens // size)
        return -(-slots // per_page) * self._slab_bytes(size) <= self.max_bytes

    def _slab_bytes(self, size: int) -> int:
        return max(self._slab_tokens, size) * self.bytes_per_token

    # -- slots ------------------------------------------------------------------------------------

    def allocate(
        self, token_ids: Sequence[int], columns: int, adapter_key: Hashable = None
    ) -> Slot | None:
        """A slot for a sequence of up to `columns` tokens, holding as much of `token_ids` (never
        all of it: the last token's output is wanted) as any slot of the same adapter_key has read.
        None: no room now, try again later."""
        source, shared = self._longest_prefix(token_ids, adapter_key)
        kept = source if source is not None and not source.live else None
        if (
            kept is not None
            and kept.columns == _size_class(columns)
            and len(kept.token_ids) - shared <= MIN_PREFIX_MATCH
        ):
            return self._take(kept, shared)  # little of it is lost
        slot = self._place(columns, adapter_key, source)
        if slot is not None:
            if source is not None:
                self._copy(source, slot, shared)
            return slot
        if kept is not None and kept.columns >= columns:  # no other room
            return self._take(kept, shared)
        if kept is None:
            return None
        self._evict(kept)  # what it holds is of no use where it stands in its own way
        return self.allocate(token_ids, columns, adapter_key)

    def _take(self, slot: Slot, length: int) -> Slot:
        slot.truncate(length)
        slot.live = True
        return self._touched(slot)

    def extend_from_cache(self, slot: Slot, token_ids: Sequence[int]) -> None:
        """Copy what another slot has meanwhile read of `token_ids` and this one has not."""
        source, shared = self._longest_prefix(token_ids, slot.adapter_key)
        if (
            source is not None
            and source is not slot
            and shared >= len(slot.token_ids) + MIN_PREFIX_MATCH
        ):
            self._copy(source, slot, shared)

    def release(self, slot: Slot) -> None:
        """The sequence is over; the slot stays for reuse until its bytes are needed."""
        assert slot.live, "released twice"
        slot.live = False
        if len(self._touched(slot).token_ids) < MIN_PREFIX_MATCH:
            self._evict(slot)

    def clear(self) -> None:
        """Drop every kept slot and every empty slab."""
        for slot in [r for r in self._all_slots() if not r.live]:
            self._evict(slot)
        self._slabs = [slab for slab in self._slabs if not slab.is_empty]

    def check(self) -> None:
        """The integrity check: storage within the bound, every slot where its slab says it is,
        nothing read beyond a slot's end. Raises AssertionError: a bug of ours."""
        assert self.bytes <= self.max_bytes, f"{self.bytes} bytes held, {self.max_bytes} allowed"
        for slab in self._slabs:
            slots, _, columns, _ = slab.layers[0][0].shape
            assert (slots, columns) == (len(slab.slots), slab.columns)
            for index, slot in enumerate(slab.slots):
                if slot is not None:
                    assert slot.slab is slab and slot.index == index, "two owners of one place"
                    assert len(slot.token_ids) <= slab.columns, "read beyond the slot's end"

    # -- inside -----------------------------------------------------------------------------------

    def _all_slots(self) -> Iterator[Slot]:
        return (slot for slab in self._slabs for slot in slab.slots if slot is not None)

    def _touched(self, slot: Slot) -> Slot:
        self._clock += 1
        slot.used_at = self._clock
        return slot

    def _longest_prefix(
        self, token_ids: Sequence[int], adapter_key: Hashable
    ) -> tuple[Slot | None, int]:
        ids = list(token_ids[:-1])
        best, most = None, MIN_PREFIX_MATCH - 1
        for slot in self._all_slots():
            if (
                slot.adapter_key == adapter_key
                and slot.token_ids[:MIN_PREFIX_MATCH] == ids[:MIN_PREFIX_MATCH]
            ):
                shared = common_prefix(slot.token_ids, ids)
                if shared > most or (
                    shared == most and best is not None and best.live and not slot.live
                ):
                    best, most = slot, shared
        return best, most

    def _place(self, columns: int, adapter_key: Hashable, keep: Slot | None) -> Slot | None:
        """A free place of the right size, evicting kept slots (but not `keep`) where that makes
        one."""
        size = _size_class(columns)
        while True:
            for slab in self._slabs:
                if slab.columns == size and None in slab.slots:
                    slot = Slot(slab=slab, index=slab.slots.index(None), adapter_key=adapter_key)
                    slab.slots[slot.index] = slot
                    return self._touched(slot)
            if self._make_room(self._slab_bytes(size)):
                self._slabs.append(self._new_slab(size))
                continue
            for slot in self._least_useful(size, keep):
                self._evict(slot)
                break
            else:
                return None

    def _least_useful(self, size: int, keep: Slot | None) -> Iterator[Slot]:
        """Kept slots whose eviction leads to a place of this size: one of the size frees a place at
        once; others only together, where dropping whole slabs makes room for a new one."""
        kept = sorted(
            (r for r in self._all_slots() if not r.live and r is not keep),
            key=lambda slot: slot.used_at,
        )
        yield from (slot for slot in kept if slot.columns == size)
        idle = [
            slab
            for slab in self._slabs
            if not any(r is not None and (r.live or r is keep) for r in slab.slots)
        ]
        if self.bytes - sum(slab.bytes for slab in idle) + self._slab_bytes(size) <= self.max_bytes:
            yield from (slot for slot in kept if slot.slab in idle)

    def _make_room(self, needed: int) -> bool:
        """Whether a new slab fits, dropping empty slabs if it does not otherwise."""
        while self.bytes + needed > self.max_bytes:
            empty = next((slab for slab in self._slabs if slab.is_empty), None)
            if empty is None:
                return False
            self._slabs.remove(empty)
        return True

    def _new_slab(self, size: int) -> Slab:
        slots = max(1, self._slab_tokens // size)

        def storage(heads: int, dim: int) -> Tensor:
            # Zeros, not empty: a masked column has weight 0, and 0 * NaN is NaN.
            return torch.zeros(slots, heads, size, dim, dtype=self._dtype, device=self._device)

        layers = [
            (storage(s.heads, s.key_dim), storage(s.heads, s.value_dim)) for s in self._shapes
        ]
        return Slab(size, self._slab_bytes(size), layers, [None] * slots)

    def _evict(self, slot: Slot) -> None:
        assert not slot.live and slot.slab.slots[slot.index] is slot
        slot.slab.slots[slot.index] = None

    def _copy(self, source: Slot, target: Slot, length: int) -> None:
        start = min(common_prefix(target.token_ids, source.token_ids), length)
        for (from_k, from_v), (to_k, to_v) in zip(
            source.slab.layers, target.slab.layers, strict=True
        ):
            to_k[target.index, :, start:length] = from_k[source.index, :, start:length]
            to_v[target.index, :, start:length] = from_v[source.index, :, start:length]
        target.token_ids = source.token_ids[:length]
        self._touched(source)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix, by comparing slices (at C speed)."""
    low, high = 0, min(len(a), len(b))
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
    """Whether `other`, which is reading `other_ids`, will hold clearly more of `token_ids` than
    `slot` does."""
    return other.adapter_key == slot.adapter_key and (
        common_prefix(list(token_ids[:-1]), list(other_ids))
        >= len(slot.token_ids) + MIN_PREFIX_MATCH
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _size_class(columns: int) -> int:
    return max(MIN_SLOT_TOKENS, _power_of_two(columns))
