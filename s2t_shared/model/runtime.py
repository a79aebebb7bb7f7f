"""One causal language model: its weights, its private KV pool, and its two forwards.

Token ids and positions in, hidden states and logits out. Knows no policy, no text, no requests.

    forward(segments)    serving: tokens of many sequences, packed without padding, over the pool.
                         Prefill chunks, decode steps, drafts to verify and candidates to score
                         share one forward. An adapter acts on the segments that name it.
    forward_padded(...)  training: a padded batch with its own masks. Stores nothing in the pool;
                         differentiable.

K candidates of one context are one segment of K siblings. Each sibling attends to the prefix and
to itself, so the cost does not grow with K times the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.model.attention import AttentionPlan
from s2t_shared.model.decode_graphs import DecodeGraphs
from s2t_shared.model.device_ints import DeviceInts
from s2t_shared.model.folders import Role
from s2t_shared.model.kv_pool import BatchLayout, KVPool, KVShape, Slot
from s2t_shared.model.loading import load_model
from s2t_shared.model.lora import Adapter, AdapterSwitch, Gate, adaptable_layers, install
from s2t_shared.model.padded_plan import PaddedPlan
from s2t_shared.model.varlen_plan import PackedSpan, VarlenPlan, packing_order

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
UNLIMITED_LENGTH = 1 << 20  # positions, where a model's config gives no limit


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one slot in a packed forward.

    token_ids: may be empty; they follow the slot's first `start` tokens. siblings: each follows
    all `token_ids` and does not see the others. adapter: acts on all these tokens.
    extends_slot: the slot has then read `token_ids`, never the siblings. False: the slot must hold
    at least `start` tokens, and stays as it is.
    """

    slot: Slot
    token_ids: Sequence[int]
    start: int
    siblings: Sequence[int] = ()
    adapter: Adapter | None = None
    extends_slot: bool = True

    @property
    def length(self) -> int:
        return len(self.token_ids) + len(self.siblings)


class ModelRuntime:
    """A loaded model. Not thread-safe: one thread owns it.

    Hidden states have the model's dtype; logits are float32.
    """

    def __init__(
        self,
        model: Any,
        digest: str,
        eos_ids: frozenset[int],
        kv_bytes: int = 1 << 30,
        layout: BatchLayout | None = None,
    ) -> None:
        self.model = model.eval()
        self.digest = digest
        self.eos_ids = eos_ids
        self.config = model.config.get_text_config()
        self.device: torch.device = next(model.parameters()).device
        # The weights stay as they are: only adapters are trained.
        model.requires_grad_(False)
        self.head = model.get_output_embeddings()
        self.vocab_rows = int(self.head.weight.shape[0])
        self.max_length = _max_length(self.config)
        self._switch: AdapterSwitch | None = None
        self._graphs: DecodeGraphs | None = None
        _check_layer_types(self.config)
        if self.device.type == "cpu" and self.model.dtype is torch.float32:
            _order_for_single_tokens(self.model, self.head)
        layout = layout or BatchLayout.for_device(self.device)
        self.pool = KVPool(self._kv_shapes(), self.model.dtype, self.device, kv_bytes, layout)

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "float32",
        device: str = "cpu",
        kv_bytes: int = 1 << 30,
        role: Role = "slm",
        max_num_seqs: int = 1,
        cuda_graphs: bool = True,
    ) -> ModelRuntime:
        """Load a Hugging Face folder, a hub id or "bundled" onto a device.

        max_num_seqs: sequences that decode together, at most; a GPU's KV pool is laid out for them.
        cuda_graphs: on a GPU, decode steps of such a model are recorded and replayed.

        Raises:
            ModelLoadError: missing, unreadable or unsupported model, unknown dtype, or a GPU with
                too little free memory for the weights and `kv_bytes`.
        """
        where = torch.device(device)
        loaded = load_model(model, dtype, role, where, kv_bytes)
        layout = BatchLayout.for_device(where, max_num_seqs)
        runtime = cls(loaded.model, loaded.digest, loaded.eos_ids, kv_bytes, layout)
        if cuda_graphs and where.type == "cuda" and max_num_seqs > 1:
            runtime.use_decode_graphs()
        return runtime

    @property
    def switch(self) -> AdapterSwitch:
        """The switch of the model's adapters. The first use wraps the model's linear layers."""
        if self._switch is None:
            self._switch = install(self.model)
        return self._switch

    # -- forwards ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> tuple[Tensor, list[slice]]:
        """Hidden states [N, hidden] of all segments' tokens, and each segment's slice of them."""
        order = sorted(range(len(segments)), key=lambda i: _segment_order(segments[i]))
        packed = [segments[i] for i in order]
        spans = _packed_spans(packed)
        token_ids: list[int] = []
        positions: list[int] = []
        for segment, span in zip(packed, spans, strict=True):
            token_ids += segment.token_ids
            token_ids += segment.siblings
            positions += span.positions()
        hidden = self._replayed(packed, spans, token_ids)
        if hidden is None:
            ints = DeviceInts(self.device)
            ids_at = ints.add(token_ids)
            positions_at = ints.add(positions)
            plan = VarlenPlan(spans, ints, self.model.dtype, self.pool.layout)
            ints.send()
            gates = self._gates(packed, spans)
            hidden = self._decode(ints[ids_at][None], ints[positions_at][None], plan, gates)[0]
        slices = [slice(0)] * len(segments)
        for index, segment, span in zip(order, packed, spans, strict=True):
            slices[index] = span.tokens
            if segment.extends_slot:
                segment.slot.token_ids[segment.start :] = segment.token_ids
        return hidden, slices

    def _replayed(
        self, segments: Sequence[Segment], spans: Sequence[PackedSpan], token_ids: Sequence[int]
    ) -> Tensor | None:
        """Hidden states [N, hidden] of a recorded decode step; None: this step is none."""
        if self._graphs is None or spans[-1].length > 1:  # spans of several tokens come last
            return None
        if any(segment.adapter is not None for segment in segments):
            return None
        return self._graphs.run(spans, token_ids)

    def use_decode_graphs(self) -> None:
        """Record decode steps and replay them, see `decode_graphs`."""

        def decode(token_ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
            return self._decode(token_ids, positions, plan, [])

        self._graphs = DecodeGraphs(decode, self.device, self.model.dtype)

    def forward_padded(
        self, token_ids: Tensor, plan: PaddedPlan, adapter: Adapter | None = None
    ) -> Tensor:
        """Hidden states [b, t, hidden] of token ids [b, t]. Differentiable in the adapter.

        plan: the tokens' positions and mask. adapter: acts on all tokens.
        """
        gates = [] if adapter is None else [Gate(adapter, None)]
        return self._decode(token_ids, plan.positions, plan, gates)

    def _decode(
        self, token_ids: Tensor, positions: Tensor, plan: AttentionPlan, gates: Sequence[Gate]
    ) -> Tensor:
        """Run the decoder stack, without the head: [b, t] -> [b, t, hidden]."""
        decoder = self.model.get_decoder()
        arguments = {
            "input_ids": token_ids.to(self.device),
            "position_ids": positions.to(self.device),
            "plan": plan,
            "use_cache": False,
        }
        if not gates and self._switch is None:
            return decoder(**arguments).last_hidden_state
        with self.switch.using(gates):
            return decoder(**arguments).last_hidden_state

    def _gates(self, segments: Sequence[Segment], spans: Sequence[PackedSpan]) -> list[Gate]:
        """One gate per adapter, on the tokens of the segments that name it."""
        adapters = dict.fromkeys(segment.adapter for segment in segments)
        gates = []
        for adapter in adapters:
            if adapter is None:
                continue
            if len(adapters) == 1:
                return [Gate(adapter, None)]
            tokens: list[int] = []
            for segment, span in zip(segments, spans, strict=True):
                if segment.adapter is adapter:
                    tokens += range(span.tokens.start, span.tokens.stop)
            gates.append(Gate(adapter, self._as_slice(tokens)))
        return gates

    def _as_slice(self, tokens: list[int]) -> slice | Tensor:
        """Ascending token indices as a slice where they have no gaps, else as a tensor."""
        first = tokens[0]
        end = tokens[-1] + 1
        if end - first == len(tokens):
            return slice(first, end)
        return torch.tensor(tokens, device=self.device)

    @torch.no_grad()
    def _kv_shapes(self) -> list[KVShape]:
        """What each layer stores per token.

        Measured with a forward of one token: the meaning of configuration fields differs between
        architectures.
        """
        token = torch.zeros(1, 1, dtype=torch.long)
        plan = PaddedPlan(positions=token, mask=torch.ones(1, 1, 1, dtype=torch.bool))
        kind = self.config.model_type
        try:
            self._decode(token, token, plan, [])
        except (NotImplementedError, TypeError) as error:
            raise ModelLoadError(f"model type {kind!r} is not supported: {error}") from error
        layers = plan.kv
        if len(layers) != self.config.num_hidden_layers:
            raise ModelLoadError(
                f"model type {kind!r}: only {len(layers)} of {self.config.num_hidden_layers} "
                "layers are attention; only attention models are supported"
            )
        shapes = []
        for keys, values in layers:
            _, heads, _, key_dim = keys.shape
            shapes.append(KVShape(heads, key_dim, values.shape[3]))
        return shapes

    # -- logits -----------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab_rows] float32, before any masking."""
        return self._scaled(self.head(hidden).float())

    def row_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of some ids, without the other rows of the head.

        hidden: [..., hidden]. ids: [..., k]. Returns [..., k] float32.
        """
        ids = ids.to(self.device)
        rows = self.head.weight[ids]
        products = rows @ hidden[..., None]
        logits = products[..., 0].float()
        bias = getattr(self.head, "bias", None)
        if bias is not None:
            logits = logits + bias[ids].float()
        return self._scaled(logits)

    def reserved_logits(
        self, hidden: Tensor, reserved_ids: Sequence[int], deltas: Tensor | None
    ) -> Tensor:
        """z = h (W_R + delta)^T, the logits of the reserved ids: [..., hidden] -> [..., B] float32.

        W_R are the base model's rows (zero for virtual ids, which lie at and above `vocab_rows`).
        """
        real = [i for i in reserved_ids if i < self.vocab_rows]
        if real:
            rows = self.head.weight[torch.tensor(real, device=self.device)].float()
        else:
            rows = hidden.new_zeros(len(reserved_ids), hidden.shape[-1], dtype=torch.float32)
        if deltas is not None:
            rows = rows + deltas.to(self.device)
        return self._scaled(hidden.float() @ rows.T)

    def _scaled(self, logits: Tensor) -> Tensor:
        """Logits as the architecture scales them after its head (Granite, Cohere, Gemma)."""
        divisor = getattr(self.config, "logits_scaling", None)
        if divisor is not None:
            logits = logits / divisor
        factor = getattr(self.config, "logit_scale", None)
        if factor is not None:
            logits = logits * factor
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Check that every id has a row.

        Raises:
            InvalidRequestError: an id has no embedding row.
        """
        check_ids(token_ids, self.vocab_rows)


def check_ids(token_ids: Sequence[int], vocab_rows: int) -> None:
    """Raises InvalidRequestError: an id has no embedding row."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_rows:
            raise InvalidRequestError(
                f"token_ids[{index}]={token_id}: must be 0..{vocab_rows - 1}", field="token_ids"
            )


# -- packing --------------------------------------------------------------------------------------


def _segment_order(segment: Segment) -> tuple[bool, int, int]:
    return packing_order(segment.slot, segment.length)


def _packed_spans(segments: Sequence[Segment]) -> list[PackedSpan]:
    """The spans of segments that are in packed order."""
    spans = []
    at = 0
    for segment in segments:
        slot = segment.slot
        read = len(slot.token_ids)
        assert segment.start <= read, "a gap in the context"
        span = PackedSpan(
            at=at,
            slot=slot,
            start=segment.start,
            causal=len(segment.token_ids),
            siblings=len(segment.siblings),
            first_column=segment.start if segment.extends_slot else read,
        )
        assert span.columns <= slot.columns, "the slot is too short"
        spans.append(span)
        at += span.length
    return spans


# -- what models need -----------------------------------------------------------------------------


def _check_layer_types(config: Any) -> None:
    """Raises ModelLoadError: a layer is not attention of a kind that is supported."""
    unsupported = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if unsupported:
        raise ModelLoadError(
            f"model type {config.model_type!r} has layers of type {sorted(unsupported)}; only "
            "attention models are supported"
        )


def _max_length(config: Any) -> int:
    """How many positions a sequence may have.

    The rotary frequencies of `longrope` and `dynamic` depend on the longest sequence of a forward:
    a sequence's numbers would depend on its batch. Such a model is used up to the length at which
    they begin to change.
    """
    longest = int(getattr(config, "max_position_embeddings", UNLIMITED_LENGTH))
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        rope = getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("longrope", "dynamic"):
        return longest
    original = rope.get("original_max_position_embeddings")
    if not original:
        original = getattr(config, "original_max_position_embeddings", None)
    return int(min(longest, original or longest))


def _order_for_single_tokens(model: Any, head: Any) -> None:
    """Store the weights of widening layers, and of the head, in [in, out] memory order.

    On CPU in fp32 the product with one token is then 1.6 times as fast, with many tokens about as
    fast (measured: 13 % slower to 10 % faster).
    """
    for layer in [*adaptable_layers(model).values(), head]:
        if layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.t().contiguous().t()
