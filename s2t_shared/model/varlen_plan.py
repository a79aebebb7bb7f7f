"""Attention of a packed forward over the KV pool: tokens of many sequences, without padding.

Single tokens in neighbouring slots share one attention call; longer spans have one call each.
Query heads that share a key head are folded into the query length: keys are not copied per head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2t_shared.model.attention import AttentionParams, additive_mask, grouped_attention
from s2t_shared.model.kv_pool import Slab, Slot

# Columns of padding that cost about as much as one more attention call (measured on CPU).
MAX_ADDED_PADDING = 1024
FOLDED_TOKENS = 64  # longer spans use SDPA's own grouped-query path


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

    @property
    def length(self) -> int:
        return self.causal + self.siblings

    @property
    def columns(self) -> int:
        """How many of the slot's columns attention reads."""
        return self.first_column + self.length

    @property
    def tokens(self) -> slice:
        """The span's tokens in the packed forward."""
        return slice(self.at, self.at + self.length)

    def positions(self) -> list[int]:
        """The position of each token in its sequence."""
        sibling_position = self.start + self.causal
        positions = list(range(self.start, sibling_position))
        positions += [sibling_position] * self.siblings
        return positions

    def visible(self, window: int | None) -> Tensor:
        """bool [length, columns]: which columns each token sees."""
        own = torch.eye(self.length, dtype=torch.bool)
        # A causal token sees those before it; a sibling comes after all of them.
        causal = torch.ones(self.length, self.causal, dtype=torch.bool).tril()
        own[:, : self.causal] |= causal
        visible = torch.zeros(self.length, self.columns, dtype=torch.bool)
        visible[:, : self.start] = True
        visible[:, self.first_column :] = own
        if window is not None:
            query_positions = torch.tensor(self.positions())
            key_positions = torch.arange(self.columns)
            key_positions[self.first_column :] = query_positions
            distance = query_positions[:, None] - key_positions[None, :]
            visible &= distance < window
        return visible


@dataclass(frozen=True)
class SlotGroup:
    """Single-token spans of neighbouring slots of one slab; they share one attention call.

    columns: how many columns of each slot the call reads.
    """

    spans: tuple[PackedSpan, ...]
    columns: int

    @property
    def slab(self) -> Slab:
        return self.spans[0].slot.slab

    @property
    def slots(self) -> slice:
        """The group's slots in the slab."""
        first = self.spans[0].slot.index
        return slice(first, first + len(self.spans))

    @property
    def at(self) -> int:
        """The group's first token in the packed forward."""
        return self.spans[0].at

    @property
    def tokens(self) -> slice:
        """The group's tokens in the packed forward."""
        return slice(self.at, self.at + len(self.spans))


@dataclass(frozen=True)
class _SlabWrite:
    """Where the keys and values of a slab's single tokens are stored.

    slots and columns: int64 [n], by token. tokens: the n tokens in the packed forward.
    """

    slab: Slab
    slots: Tensor
    columns: Tensor
    tokens: slice


class VarlenPlan:
    """The attention plan of one packed forward.

    spans: in packed order, sorted by `packing_order`.
    """

    def __init__(
        self, spans: Sequence[PackedSpan], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._device = device
        self._dtype = dtype
        single_tokens = [span for span in spans if span.length == 1]
        self._groups = _slot_groups(single_tokens)
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
        for group in self._groups:
            outputs.append(self._attend_group(group, layer, query, params))
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
            slots = torch.tensor([span.slot.index for span in members], device=self._device)
            columns = torch.tensor([span.first_column for span in members], device=self._device)
            at = members[0].at
            tokens = slice(at, at + len(members))
            writes.append(_SlabWrite(slab, slots, columns, tokens))
        return writes

    def _store_single_tokens(self, layer: int, key: Tensor, value: Tensor) -> None:
        for write in self._writes:
            keys, values = write.slab.layers[layer]
            keys[write.slots, :, write.columns] = key[:, write.tokens].transpose(0, 1)
            values[write.slots, :, write.columns] = value[:, write.tokens].transpose(0, 1)

    # -- attending --------------------------------------------------------------------------------

    def _attend_group(
        self, group: SlotGroup, layer: int, query: Tensor, params: AttentionParams
    ) -> Tensor:
        """[heads, N, dim] of all tokens -> [n, heads, value dim] of the group's."""
        keys, values = group.slab.layers[layer]
        count = len(group.spans)
        heads, _, dim = query.shape
        key_heads = keys.shape[1]
        own_query = query[:, group.tokens].transpose(0, 1)
        out = grouped_attention(
            own_query.reshape(count, key_heads, heads // key_heads, dim),
            keys[group.slots, :, : group.columns],
            values[group.slots, :, : group.columns],
            self._group_mask(group, params.window),
            params,
        )
        return out.reshape(count, heads, -1)

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

    def _group_mask(self, group: SlotGroup, window: int | None) -> Tensor | None:
        """[n, 1, 1, columns] to add to the scores; None: every token sees every column."""
        key = (group.at, window)
        if key not in self._masks:
            self._masks[key] = self._new_group_mask(group, window)
        return self._masks[key]

    def _new_group_mask(self, group: SlotGroup, window: int | None) -> Tensor | None:
        visible = torch.zeros(len(group.spans), group.columns, dtype=torch.bool)
        for row, span in enumerate(group.spans):
            visible[row, : span.start] = True
            visible[row, span.first_column] = True
            if window is not None:
                first_visible = max(0, span.start + 1 - window)
                visible[row, :first_visible] = False
        if visible.all():
            return None
        mask = additive_mask(visible, self._dtype).to(self._device)
        return mask[:, None, None, :]

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
        mask = additive_mask(span.visible(window), self._dtype).to(self._device)
        return mask.repeat(groups, 1) if folds_heads else mask


def packing_order(slot: Slot, length: int) -> tuple[bool, int, int]:
    """Sort key of a span in the packed forward: single tokens first, by slab and slot."""
    return (length > 1, id(slot.slab), slot.index)


# -- groups of single tokens ----------------------------------------------------------------------


def _slot_groups(spans: Sequence[PackedSpan]) -> list[SlotGroup]:
    """Groups of single-token spans, which are sorted by slab and slot."""
    groups: list[SlotGroup] = []
    members: list[PackedSpan] = []
    columns = 0  # that the members' call reads
    for span in spans:
        if members and not _joins(span, members, columns):
            groups.append(SlotGroup(tuple(members), columns))
            members = []
            columns = 0
        members.append(span)
        columns = max(columns, span.columns)
    if members:
        groups.append(SlotGroup(tuple(members), columns))
    return groups


def _joins(span: PackedSpan, members: Sequence[PackedSpan], columns: int) -> bool:
    """Whether the span is the members' next slot, and padding costs less than another call.

    columns: that the members' call reads.
    """
    previous = members[-1].slot
    if span.slot.slab is not previous.slab:
        return False
    if span.slot.index != previous.index + 1:
        return False
    columns_with_span = max(columns, span.columns)
    own_padding = columns_with_span - span.columns
    others_padding = (columns_with_span - columns) * len(members)
    return own_padding + others_padding <= MAX_ADDED_PADDING


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
