"""Decode steps as CUDA graphs: one launch for a whole forward of single tokens.

A small model's decode step is some thousand short kernels, and a GPU waits for Python to start each
of them. A graph is recorded once per shape and replayed, one for each slab of a step. A shape is
how many of a slab's slots and how many of their columns take part. Slots without a token in the
step take part too: their token is a dummy, written into a column behind all that the slot has read.

Only steps of single tokens without adapters are replayed; the others run as usual.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from s2t_shared.model.attention import (
    AttentionParams,
    AttentionPlan,
    grouped_attention,
)
from s2t_shared.model.kv_pool import Slab
from s2t_shared.model.varlen_plan import PackedSpan, single_token_mask

Decode = Callable[[Tensor, Tensor, AttentionPlan], Tensor]
MIN_COLUMNS = 128
COLUMN_STEPS = 4  # sizes of columns between one power of two and the next
WARMUP_RUNS = 2  # libraries choose their kernels in the first runs, which must not be recorded


@dataclass(frozen=True)
class _Recorded:
    """A graph with the integers it reads and the hidden states [rows, hidden] it writes."""

    replay: Callable[[], None]
    ints: Tensor
    hidden: Tensor


@dataclass
class _SlabGraphs:
    """The graphs of one slab, by rows and columns. They end with it.

    memory: the pool that they share; None until there is one. They never run at once, and each
    keeps what it returns.
    """

    by_shape: dict[tuple[int, int], _Recorded] = field(default_factory=dict)
    memory: Any = None


class DecodeGraphs:
    """The recorded decode steps of one model.

    decode: token ids [1, n], positions [1, n] and a plan -> hidden states [1, n, hidden].
    """

    def __init__(self, decode: Decode, device: torch.device, dtype: torch.dtype) -> None:
        self._decode = decode
        self._device = device
        self._dtype = dtype
        self._slabs: WeakKeyDictionary[Slab, _SlabGraphs] = WeakKeyDictionary()

    def run(self, spans: Sequence[PackedSpan], token_ids: Sequence[int]) -> Tensor | None:
        """Hidden states [n, hidden] of n single tokens; None: the step must run as usual.

        spans: of one token each, sorted by slab and slot; their keys and values go where they say.
        """
        by_slab: dict[Slab, list[tuple[PackedSpan, int]]] = defaultdict(list)
        for span, token_id in zip(spans, token_ids, strict=True):
            by_slab[span.slot.slab].append((span, token_id))
        plans = [(slab, _numbers(slab, members)) for slab, members in by_slab.items()]
        hidden = []
        for (slab, numbers), members in zip(plans, by_slab.values(), strict=True):
            if numbers is None:
                return None
            hidden.append(self._run(slab, numbers, [span for span, _ in members]))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _run(self, slab: Slab, numbers: list[int], spans: Sequence[PackedSpan]) -> Tensor:
        """Hidden states [n, hidden] of the spans of one slab."""
        rows = _rows(spans)
        columns = _columns(max(span.columns for span in spans), slab.columns)
        recorded = self._find(slab, rows, columns, numbers)
        recorded.ints.copy_(self._to_send(numbers), non_blocking=True)
        recorded.replay()
        if len(spans) == rows:
            return recorded.hidden.clone()
        indices = [span.slot.index for span in spans]
        return recorded.hidden[self._to_send(indices).to(self._device, non_blocking=True)]

    def _to_send(self, numbers: Sequence[int]) -> Tensor:
        """int64 on the host, pinned where a GPU reads it."""
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")

    def _find(self, slab: Slab, rows: int, columns: int, numbers: list[int]) -> _Recorded:
        """The recorded step of a shape; a new shape is recorded, which runs it."""
        if slab not in self._slabs:
            self._slabs[slab] = _SlabGraphs()
        by_shape = self._slabs[slab].by_shape
        if (rows, columns) not in by_shape:
            ints = self._to_send(numbers).to(self._device)
            by_shape[rows, columns] = self._record(slab, rows, columns, ints)
        return by_shape[rows, columns]

    def _record(self, slab: Slab, rows: int, columns: int, ints: Tensor) -> _Recorded:
        def step() -> Tensor:
            token_ids, positions, starts, own = ints.view(4, rows)
            plan = _SlabPlan(slab, starts, own, columns, self._dtype)
            return self._decode(token_ids[None], positions[None], plan)[0]

        if self._device.type != "cuda":  # nothing to record: the step itself, for tests
            hidden = step()

            def again() -> None:
                hidden.copy_(step())

            return _Recorded(again, ints, hidden)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may run the LLM on this device meanwhile.
        memory = self._slabs[slab].memory
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            hidden = step()
        self._slabs[slab].memory = graph.pool()
        return _Recorded(graph.replay, ints, hidden)


class _SlabPlan:
    """The attention plan of one token per slot, for the first slots of a slab.

    starts: int64 [rows], how many columns from the first on each token sees. own: int64 [rows], the
    column of its own key and value.
    """

    def __init__(
        self, slab: Slab, starts: Tensor, own: Tensor, columns: int, dtype: torch.dtype
    ) -> None:
        self._slab = slab
        self._starts = starts
        self._own = own
        self._columns = columns
        self._dtype = dtype
        self._slots = torch.arange(len(starts), device=starts.device)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """See `AttentionPlan`."""
        keys, values = self._slab.layers[layer]
        keys[self._slots, :, self._own] = key[0].transpose(0, 1)
        values[self._slots, :, self._own] = value[0].transpose(0, 1)
        _, heads, rows, dim = query.shape
        key_heads = keys.shape[1]
        by_slot = query[0].transpose(0, 1).reshape(rows, key_heads, heads // key_heads, dim)
        out = grouped_attention(
            by_slot,
            keys[:rows, :, : self._columns],
            values[:rows, :, : self._columns],
            self._mask(params.window),
            params,
        )
        return out.reshape(1, rows, heads, -1)

    def _mask(self, window: int | None) -> Tensor:
        """[rows, 1, 1, columns] to add to the scores."""
        if window not in self._masks:
            self._masks[window] = single_token_mask(
                self._starts, self._own, self._columns, window, self._dtype
            )
        return self._masks[window]


def _rows(spans: Sequence[PackedSpan]) -> int:
    """How many slots take part: a power of two, or all of the slab."""
    needed = spans[-1].slot.index + 1
    return min(1 << (needed - 1).bit_length(), len(spans[0].slot.slab.slots))


def _columns(needed: int, most: int) -> int:
    """How many columns take part: one of few sizes, at most a fourth more than needed."""
    size = max(MIN_COLUMNS, 1 << (needed - 1).bit_length())
    step = max(MIN_COLUMNS, size // (2 * COLUMN_STEPS))
    return min(-(-needed // step) * step, most)


def _numbers(slab: Slab, members: Sequence[tuple[PackedSpan, int]]) -> list[int] | None:
    """Token ids, positions, visible columns and own columns, by slot; None: a slot without a token
    in the step is full, so that it has no column for the dummy."""
    rows = _rows([span for span, _ in members])
    ids = [0] * rows
    positions = [0] * rows
    starts = [1] * rows
    own = [0 if slot is None else len(slot.token_ids) for slot in slab.slots[:rows]]
    for span, token_id in members:
        row = span.slot.index
        ids[row] = token_id
        positions[row] = span.start
        starts[row] = span.start
        own[row] = span.first_column
    if max(own) >= slab.columns:
        return None
    return [*ids, *positions, *starts, *own]
