"""Attention over a `KVPool`, for a forward that packs the tokens of many sequences into one slot
without padding.

Registered with transformers as attention "s2t": a model computes queries, keys and values of all
packed tokens as [1, heads, N, dim]; a `Packed` plan, made once per forward, stores keys and values
and lets each token attend to what its sequence may see. `Aside` is the same for training: a padded
batch, nothing stored, differentiable.

Single tokens of neighbouring slots share one call; longer segments have one each. Query heads that
share a key head are folded into the query length, so that keys are never copied per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from s2t_shared.model.kv_pool import Slab, Slot

NAME = "s2t"
WASTE = (
    1024  # columns of padding that cost about as much as one more attention call (measured on CPU)
)
UNSUPPORTED = (
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
)  # what some architectures ask of attention besides
FOLDED_TOKENS = 64  # longer segments use SDPA's own grouped-query path


@dataclass(frozen=True)
class Flavour:
    """What a layer does to attention scores: scale, then soft cap (tanh), then a window of
    positions."""

    scaling: float
    softcap: float | None
    window: int | None


class Plan(Protocol):
    """How the tokens of one forward attend. query: [b, heads, n, dim]; key, value: [b, key heads,
    n, dim]; returns [b, n, heads, dim]."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour
    ) -> Tensor: ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    plan: Plan,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    for name in UNSUPPORTED:
        if rest.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not supported")
    flavour = Flavour(
        query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window
    )
    return plan.attend(int(module.layer_idx), query, key, value, flavour), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)


# -- serving --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens [at, at + causal + siblings) of the packed forward, all of one slot. The first
    `causal` ones are at positions start.., each seeing the slot's first `start` columns and the
    earlier ones; the siblings are all at position start + causal and see those and themselves. Keys
    and values go to columns column.. ."""

    at: int
    slot: Slot
    start: int
    causal: int
    siblings: int
    column: int

    @property
    def length(self) -> int:
        return self.causal + self.siblings

    @property
    def end(self) -> int:
        """Columns that attention has to look at."""
        return self.column + self.length

    def positions(self) -> list[int]:
        last = self.start + self.causal
        return [*range(self.start, last), *[last] * self.siblings]

    def visible(self, window: int | None) -> Tensor:
        """bool [length, end]: which columns each token sees."""
        own = torch.eye(self.length, dtype=torch.bool)
        own[:, : self.causal] |= torch.ones(self.length, self.causal, dtype=torch.bool).tril()
        seen = torch.zeros(self.length, self.end, dtype=torch.bool)
        seen[:, : self.start] = True
        seen[:, self.column :] = own
        if window is not None:
            query = torch.tensor(self.positions())
            keys = torch.arange(self.end)
            keys[self.column :] = query
            seen &= query[:, None] - keys[None, :] < window
        return seen


@dataclass(frozen=True)
class _Run:
    """Single tokens of neighbouring slots of one slab: packed tokens [at, at + n), slots [first,
    first + n)."""

    at: int
    first: int
    spans: tuple[Span, ...]
    columns: int


class Packed:
    """The plan of one packed forward. `spans` must be in packed order, single tokens sorted by slab
    and slot first (`order` does it)."""

    def __init__(self, spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        single = [s for s in spans if s.length == 1]
        self._runs = _runs(single)
        self._long = [s for s in spans if s.length > 1]
        self._writes = [
            (
                slab,
                self._index([s.slot.index for s in mine]),
                self._index([s.column for s in mine]),
                slice(mine[0].at, mine[0].at + len(mine)),
            )
            for slab in _unique(s.slot.slab for s in single)
            for mine in [[s for s in single if s.slot.slab is slab]]
        ]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour
    ) -> Tensor:
        key, value = key[0], value[0]  # [key heads, N, dim]
        for slab, slots, columns, tokens in self._writes:
            keys, values = slab.layers[layer]
            keys[slots, :, columns] = key[:, tokens].transpose(0, 1)
            values[slots, :, columns] = value[:, tokens].transpose(0, 1)
        outputs = []
        heads, groups = key.shape[0], query.shape[1] // key.shape[0]
        for run in self._runs:
            n = len(run.spans)
            keys, values = run.spans[0].slot.slab.layers[layer]
            q = query[0, :, run.at : run.at + n].transpose(0, 1).reshape(n, heads, groups, -1)
            mine = slice(run.first, run.first + n)
            out = _sdpa(
                q,
                keys[mine, :, : run.columns],
                values[mine, :, : run.columns],
                self._run_mask(run, flavour.window),
                flavour,
            )
            outputs.append(out.reshape(n, heads * groups, -1))
        for span in self._long:
            keys, values = span.slot.slab.layers[layer]
            at, index = slice(span.at, span.at + span.length), span.slot.index
            keys[index, :, span.column : span.end] = key[:, at]
            values[index, :, span.column : span.end] = value[:, at]
            out = _segment(
                query[:, :, at],
                keys[index : index + 1, :, : span.end],
                values[index : index + 1, :, : span.end],
                self._long_mask(span, flavour, groups),
                flavour,
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]

    def _run_mask(self, run: _Run, window: int | None) -> Tensor | None:
        """[n, 1, 1, columns] to add to the scores; None: everyone sees everything."""
        if (run.at, window) not in self._masks:
            seen = torch.zeros(len(run.spans), run.columns, dtype=torch.bool)
            for i, span in enumerate(run.spans):
                seen[i, : span.start] = True
                seen[i, span.column] = True
                if window is not None:
                    seen[i, : max(0, span.start + 1 - window)] = False
            self._masks[run.at, window] = (
                None if seen.all() else self._additive(seen)[:, None, None, :]
            )
        return self._masks[run.at, window]

    def _long_mask(self, span: Span, flavour: Flavour, groups: int) -> Tensor | None:
        """[length, end] to add to the scores, or [groups * length, end] for a folded segment; None:
        plainly causal from the slot's beginning."""
        window = flavour.window
        if (span.at, window) not in self._masks:
            folded = _is_folded(span.length, flavour)
            plain = (
                span.start == 0 == span.siblings
                and (window is None or span.length <= window)
                and not folded
            )
            mask = None if plain else self._additive(span.visible(window))
            self._masks[span.at, window] = (
                mask.repeat(groups, 1) if folded and mask is not None else mask
            )
        return self._masks[span.at, window]

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, -torch.inf)
        return mask.to(self._device)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def order(slot: Slot, length: int) -> tuple[int, int, int]:
    """Sort key of a segment in the packed forward: single tokens first, by slab and slot."""
    return (length > 1, id(slot.slab), slot.index)


def _unique(slabs: Any) -> list[Slab]:
    return list(dict.fromkeys(slabs))


def _runs(spans: Sequence[Span]) -> list[_Run]:
    """Neighbouring slots together, except where padding to the longest would cost more than another
    call."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups:
            last, mine = groups[-1][-1], groups[-1]
            ends = [s.end for s in mine]
            waste = max(*ends, span.end) * (len(mine) + 1) - sum(ends) - span.end
            before = max(ends) * len(mine) - sum(ends)
            together = waste - before <= WASTE
            if (
                span.slot.slab is last.slot.slab
                and span.slot.index == last.slot.index + 1
                and together
            ):
                mine.append(span)
                continue
        groups.append([span])
    return [_Run(g[0].at, g[0].slot.index, tuple(g), max(s.end for s in g)) for g in groups]


def _is_folded(length: int, flavour: Flavour) -> bool:
    return length <= FOLDED_TOKENS or flavour.softcap is not None


def _segment(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, flavour: Flavour
) -> Tensor:
    """[1, heads, t, dim] of one slot against [1, key heads, columns, dim] -> [1, heads, t, value
    dim]."""
    _, heads, t, dim = query.shape
    groups = heads // keys.shape[1]
    if _is_folded(t, flavour):
        out = _sdpa(query.reshape(1, keys.shape[1], groups * t, dim), keys, values, mask, flavour)
        return out.reshape(1, heads, t, -1)
    if (
        query.is_cuda and mask is not None and groups > 1
    ):  # its fast kernels take a mask or shared heads, not both
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=flavour.scaling,
        enable_gqa=keys.shape[1] < heads,
    )


def _sdpa(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, flavour: Flavour
) -> Tensor:
    """Grouped attention of [n, key heads, queries, dim]; by hand where scores are capped."""
    if flavour.softcap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=flavour.scaling
        )
    scores = query @ keys.transpose(2, 3) * flavour.scaling
    scores = torch.tanh(scores / flavour.softcap) * flavour.softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


# -- training -------------------------------------------------------------------------------------


class Aside:
    """The plan of a padded batch that keeps nothing in the pool. Differentiable.

    positions: [b, t]. mask: bool [b, t, t], which new tokens each sees. context: a finished `Aside`
    whose keys and values [b, key heads, c, dim] stand before the new ones; visible: [b, t], how
    many of its columns each token sees.
    """

    def __init__(
        self,
        positions: Tensor,
        mask: Tensor,
        context: Aside | None = None,
        visible: Tensor | None = None,
    ) -> None:
        self._context, self._layers = context, dict[int, tuple[Tensor, Tensor]]()
        self._masks: dict[int | None, Tensor] = {}
        self.positions, seen = positions, mask.expand(*positions.shape, -1)
        self._key_positions = positions
        if context is not None:
            assert visible is not None
            columns = torch.arange(context.positions.shape[1])
            seen = torch.cat([columns < visible[:, :, None], seen], dim=2)
            self._key_positions = torch.cat([context.positions, positions], dim=1)
        self._seen = seen

    @property
    def stored(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values by layer, of a forward without gradient."""
        return [self._layers[i] for i in sorted(self._layers)]

    def hold(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take keys and values [b, key heads, t, dim] by layer for what a forward would have
        stored."""
        self._layers = dict(enumerate(layers))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, flavour: Flavour
    ) -> Tensor:
        if not torch.is_grad_enabled():
            self._layers[layer] = (key, value)
        if self._context is not None:
            before_k, before_v = self._context._layers[layer]
            key, value = torch.cat([before_k, key], dim=2), torch.cat([before_v, value], dim=2)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return _sdpa(query, key, value, self._mask(flavour.window, query), flavour).transpose(1, 2)

    def _mask(self, window: int | None, query: Tensor) -> Tensor:
        """[b, 1, t, keys] to add to the scores; the same for all layers of a kind."""
        if window not in self._masks:
            seen = self._seen
            if window is not None:
                seen = seen & (
                    self.positions[:, :, None] - self._key_positions[:, None, :] < window
                )
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[window] = mask[:, None].to(query.device)
        return self._masks[window]
