"""Attention of a packed forward over the KV pool: tokens of many sequences, without padding.

Single tokens in neighbouring slots share one attention call; longer spans have one call each.
Query heads that share a key head are folded into the query length: keys are not copied per head.
Masks and indices are made on the device, from a few integers per span that come in one transfer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from s2t_shared.model.attention import AttentionParams, additive_mask, grouped_attention
from s2t_shared.model.device_ints import DeviceInts
from s2t_shared.model.kv_pool import BatchLayout, Slab, Slot

FOLDED_TOKENS = 64  # longer spans use SDPA's own grouped-query path
MASK_COLUMNS = 64  # CUDA's kernels take masks whose rows are aligned


@dataclass(frozen=True, kw_only=True)
class PackedSpan:
    """Tokens [at, at + length) of the packed forward; all belong to one slot.

    The first `causal` tokens are at positions start, start + 1, ... Each sees the slot's first
    `start` columns and the causal tokens up to itself. The `siblings` are all at position start +
    causal. Each sees the same columns, all causal tokens and itself. Keys and values of the span
    go to the slot's columns from `first_column` on.
    """

    at: int
    slot: Slot
    start: int
    causal: int
    siblings: int
    first_column: int

    @cached_property
    def length(self) -> int:
        return self.causal + self.siblings

    @cached_property
    def columns(self) -> int:
        """How many of the slot's columns attention reads."""
        return self.first_column + self.length

    @cached_property
    def tokens(self) -> slice:
        """The span's tokens in the packed forward."""
        return slice(self.at, self.at + self.length)

    def positions(self) -> list[int]:
        """The position of each token in its sequence."""
        sibling_position = self.start + self.causal
        positions = list(range(self.start, sibling_position))
        positions += [sibling_position] * self.siblings
        return positions

    def visible(self, window: int | None, device: torch.device) -> Tensor:
        """bool [length, columns]: which columns each token sees."""
        rows = torch.arange(self.length, device=device)[:, None]
        columns = torch.arange(self.columns, device=device)[None, :]
        own = columns - self.first_column  # place in the span of what a column holds
        # A causal token sees those before it; a sibling comes after all of them.
        visible = (own >= 0) & ((own == rows) | ((own <= rows) & (own < self.causal)))
        visible = visible | (columns < self.start)
        if window is not None:
            query_positions = self.start + rows.clamp(max=self.causal)
            key_positions = torch.where(own >= 0, self.start + own.clamp(max=self.causal), columns)
            visible = visible & (query_positions - key_positions < window)
        return visible


@dataclass(frozen=True)
class SlotGroup:
    """Single-token spans of one slab; they share one attention call.

    The call reads the slots from the first span's to the last span's, those between included.
    columns: how many columns of each slot the call reads.
    """

    spans: tuple[PackedSpan, ...]
    columns: int

    @property
    def slab(self) -> Slab:
        return self.spans[0].slot.slab

    @cached_property
    def slots(self) -> slice:
        """The slots that the call reads."""
        return slice(self.spans[0].slot.index, self.spans[-1].slot.index + 1)

    @cached_property
    def count(self) -> int:
        """How many slots the call reads."""
        return self.slots.stop - self.slots.start

    @cached_property
    def has_gaps(self) -> bool:
        return self.count > len(self.spans)

    @property
    def at(self) -> int:
        """The group's first token in the packed forward."""
        return self.spans[0].at

    @cached_property
    def tokens(self) -> slice:
        """The group's tokens in the packed forward."""
        return slice(self.at, self.at + len(self.spans))


@dataclass(frozen=True)
class _SlabWrite:
    """Where the keys and values of a slab's single tokens are stored.

    slots and columns: places in the forward's integers of n slots and columns, by token. tokens:
    the n tokens in the packed forward.
    """

    slab: Slab
    slots: int
    columns: int
    tokens: slice


@dataclass(frozen=True)
class _GroupInts:
    """Places in the forward's integers: what a group's call reads, by slot of the call.

    starts: how many columns from the first on are visible. own: the column of the slot's token.
    rows: for each span, its slot of the call; None: the call has no other slots.
    """

    starts: int
    own: int
    rows: int | None


class VarlenPlan:
    """The attention plan of one packed forward.

    spans: in packed order, sorted by `packing_order`. ints: the plan adds its integers to them, and
    reads them when they have been sent to the device.
    """

    def __init__(
        self, spans: Sequence[PackedSpan], ints: DeviceInts, dtype: torch.dtype, layout: BatchLayout
    ) -> None:
        self._ints = ints
        self._dtype = dtype
        single_tokens = [span for span in spans if span.length == 1]
        self._groups = _slot_groups(single_tokens, layout.max_added_padding)
        self._group_ints = [self._add_group(group) for group in self._groups]
        self._writes = self._slab_writes(single_tokens)
        self._long_spans = [span for span in spans if span.length > 1]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the forward's keys and values in the pool, then attend. See `AttentionPlan`."""
        query = query[0]  # [heads, N, dim]
        key = key[0]  # [key heads, N, dim]
        value = value[0]
        self._store_single_tokens(layer, key, value)
        outputs = []
        for group, places in zip(self._groups, self._group_ints, strict=True):
            outputs.append(self._attend_group(group, places, layer, query, params))
        for span in self._long_spans:
            _store_span(span, layer, key, value)
            outputs.append(self._attend_span(span, layer, query, params))
        if len(outputs) == 1:
            return outputs[0][None]
        return torch.cat(outputs)[None]

    # -- storing ----------------------------------------------------------------------------------

    def _slab_writes(self, spans: Sequence[PackedSpan]) -> list[_SlabWrite]:
        by_slab: dict[Slab, list[PackedSpan]] = defaultdict(list)
        for span in spans:
            by_slab[span.slot.slab].append(span)
        writes = []
        for slab, members in by_slab.items():
            slots = self._ints.add([span.slot.index for span in members])
            columns = self._ints.add([span.first_column for span in members])
            at = members[0].at
            tokens = slice(at, at + len(members))
            writes.append(_SlabWrite(slab, slots, columns, tokens))
        return writes

    def _store_single_tokens(self, layer: int, key: Tensor, value: Tensor) -> None:
        for write in self._writes:
            keys, values = write.slab.layers[layer]
            slots = self._ints[write.slots]
            columns = self._ints[write.columns]
            keys[slots, :, columns] = key[:, write.tokens].transpose(0, 1)
            values[slots, :, columns] = value[:, write.tokens].transpose(0, 1)

    # -- attending --------------------------------------------------------------------------------

    def _add_group(self, group: SlotGroup) -> _GroupInts:
        first = group.slots.start
        starts = [1] * group.count  # a slot without a token sees something, for a finite softmax
        own = [0] * group.count
        rows = []
        for span in group.spans:
            row = span.slot.index - first
            rows.append(row)
            starts[row] = span.start
            own[row] = span.first_column
        add = self._ints.add
        return _GroupInts(add(starts), add(own), add(rows) if group.has_gaps else None)

    def _attend_group(
        self,
        group: SlotGroup,
        places: _GroupInts,
        layer: int,
        query: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        """[heads, N, dim] of all tokens -> [n, heads, value dim] of the group's."""
        keys, values = group.slab.layers[layer]
        heads, _, dim = query.shape
        key_heads = keys.shape[1]
        own_query = query[:, group.tokens].transpose(0, 1)
        own_query = own_query.reshape(len(group.spans), key_heads, heads // key_heads, dim)
        rows = self._ints[places.rows] if places.rows is not None else None
        if rows is not None:
            by_slot = own_query.new_zeros(group.count, *own_query.shape[1:])
            own_query = by_slot.index_copy(0, rows, own_query)
        out = grouped_attention(
            own_query,
            keys[group.slots, :, : group.columns],
            values[group.slots, :, : group.columns],
            self._group_mask(group, places, params.window),
            params,
        )
        if rows is not None:
            out = out.index_select(0, rows)
        return out.reshape(len(group.spans), heads, -1)

    def _attend_span(
        self, span: PackedSpan, layer: int, query: Tensor, params: AttentionParams
    ) -> Tensor:
        """[heads, N, dim] of all tokens -> [length, heads, value dim] of the span's."""
        keys, values = span.slot.slab.layers[layer]
        row = slice(span.slot.index, span.slot.index + 1)
        out = _span_attention(
            query[None, :, span.tokens],
            keys[row, :, : span.columns],
            values[row, :, : span.columns],
            self._span_mask(span, params, groups=query.shape[0] // keys.shape[1]),
            params,
        )
        return out[0].transpose(0, 1)

    def _group_mask(
        self, group: SlotGroup, places: _GroupInts, window: int | None
    ) -> Tensor | None:
        """[n, 1, 1, columns] to add to the scores; None: every token sees every column."""
        key = (group.at, window)
        if key not in self._masks:
            self._masks[key] = self._new_group_mask(group, places, window)
        return self._masks[key]

    def _new_group_mask(
        self, group: SlotGroup, places: _GroupInts, window: int | None
    ) -> Tensor | None:
        if _sees_all(group, window):
            return None
        starts = self._ints[places.starts]
        own = self._ints[places.own]
        return single_token_mask(starts, own, group.columns, window, self._dtype)

    def _span_mask(self, span: PackedSpan, params: AttentionParams, groups: int) -> Tensor | None:
        """[length, columns] to add to the scores, [groups * length, columns] if heads are folded.

        groups: query heads per key head. None: causal from the slot's first column on.
        """
        key = (span.at, params.window)
        if key not in self._masks:
            self._masks[key] = self._new_span_mask(span, params, groups)
        return self._masks[key]

    def _new_span_mask(
        self, span: PackedSpan, params: AttentionParams, groups: int
    ) -> Tensor | None:
        window = params.window
        folds_heads = _folds_heads(span.length, params)
        if not folds_heads and _is_causal(span, window):
            return None
        mask = additive_mask(span.visible(window, self._ints.device), self._dtype)
        return mask.repeat(groups, 1) if folds_heads else mask


def single_token_mask(
    starts: Tensor, own: Tensor, columns: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """[n, 1, 1, columns] to add to the scores of n single tokens in slots of their own.

    starts: int64 [n], how many columns from the first on each token sees. own: int64 [n], the
    column of its own key and value.
    """
    column = torch.arange(columns, device=starts.device)[None, :]
    starts = starts[:, None]
    visible = column < starts
    if window is not None:
        visible = visible & (column >= starts + 1 - window)
    visible = visible | (column == own[:, None])
    return additive_mask(visible, dtype)[:, None, None, :]


def packing_order(slot: Slot, length: int) -> tuple[bool, int, int]:
    """Sort key of a span in the packed forward: single tokens first, by slab and slot."""
    return (length > 1, id(slot.slab), slot.index)


# -- groups of single tokens ----------------------------------------------------------------------


def _slot_groups(spans: Sequence[PackedSpan], max_added_padding: float) -> list[SlotGroup]:
    """Groups of single-token spans, which are sorted by slab and slot."""
    groups: list[SlotGroup] = []
    members: list[PackedSpan] = []
    columns = 0  # that the members' call reads
    for span in spans:
        if members and not _joins(span, members, columns, max_added_padding):
            groups.append(_slot_group(members, columns, max_added_padding))
            members = []
            columns = 0
        members.append(span)
        columns = max(columns, span.columns)
    if members:
        groups.append(_slot_group(members, columns, max_added_padding))
    return groups


def _slot_group(members: Sequence[PackedSpan], columns: int, max_added_padding: float) -> SlotGroup:
    if len(members) > 1 and math.isinf(max_added_padding):
        columns = -(-columns // MASK_COLUMNS) * MASK_COLUMNS
    return SlotGroup(tuple(members), columns)


def _joins(
    span: PackedSpan, members: Sequence[PackedSpan], columns: int, max_added_padding: float
) -> bool:
    """Whether the span is the members' next slot, and padding costs less than another call.

    columns: that the members' call reads.
    """
    previous = members[-1].slot
    if span.slot.slab is not previous.slab:
        return False
    if math.isinf(max_added_padding):
        return True
    if span.slot.index != previous.index + 1:
        return False
    columns_with_span = max(columns, span.columns)
    own_padding = columns_with_span - span.columns
    others_padding = (columns_with_span - columns) * len(members)
    return own_padding + others_padding <= max_added_padding


def _sees_all(group: SlotGroup, window: int | None) -> bool:
    """Whether every token of the group sees every column that its call reads."""
    if group.has_gaps:
        return False
    for span in group.spans:
        if span.start + 1 < group.columns or span.first_column != span.start:
            return False
    return window is None or group.columns <= window


# -- long spans -----------------------------------------------------------------------------------


def _store_span(span: PackedSpan, layer: int, key: Tensor, value: Tensor) -> None:
    keys, values = span.slot.slab.layers[layer]
    row = span.slot.index
    columns = slice(span.first_column, span.columns)
    keys[row, :, columns] = key[:, span.tokens]
    values[row, :, columns] = value[:, span.tokens]


def _is_causal(span: PackedSpan, window: int | None) -> bool:
    """Whether the span's mask is the causal one: no prefix, no siblings, no window in effect."""
    if span.start > 0 or span.siblings > 0:
        return False
    return window is None or span.length <= window


def _folds_heads(length: int, params: AttentionParams) -> bool:
    """Whether query heads are folded into the query length."""
    return length <= FOLDED_TOKENS or params.softcap is not None


def _span_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attention of one span: [1, heads, t, dim] over [1, key heads, columns, dim].

    Returns [1, heads, t, value dim].
    """
    _, heads, length, dim = query.shape
    key_heads = keys.shape[1]
    groups = heads // key_heads
    if _folds_heads(length, params):
        folded = query.reshape(1, key_heads, groups * length, dim)
        out = grouped_attention(folded, keys, values, mask, params)
        return out.reshape(1, heads, length, -1)
    if query.is_cuda and mask is not None and groups > 1:
        # CUDA's fast kernels take a mask or shared key heads, not both.
        keys = keys.repeat_interleave(groups, 1)
        values = values.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=params.scaling,
        enable_gqa=keys.shape[1] < heads,
    )
