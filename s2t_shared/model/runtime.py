"""One causal language model: its weights, its private KV pool, and the two forwards everything is
built from.

Token ids and positions in, hidden states and log-probabilities out. Knows no policy, no text, no
requests.

    forward(segments)   serving: tokens of many sequences, packed without padding, over the pool.
                        Prefill chunks, decode steps, drafts to verify and candidates to score
                        ride in one forward; an adapter acts on the segments that name it.
    aside(tokens, ...)  training: a padded batch with masks of its own; keeps nothing,
                        differentiable.

K candidates of one context are one segment of K siblings. Each sibling attends to the prefix and
to itself, so the cost is flat in the prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from s2t_shared.bundled import BUNDLED, LLM_DIR, SLM_DIR
from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.model import attention
from s2t_shared.model.attention import Aside, Packed, Plan, Span
from s2t_shared.model.kv_pool import KVPool, KVShape, Slot
from s2t_shared.model.lora import Adapter, AdapterSwitch, Gate, adaptable_layers, install

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIGEST_WHOLE_FILE_BYTES = 64 << 20
Role = Literal["slm", "llm"]
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def resolve_model(model: str, role: Role = "slm") -> Path:
    """The local folder of a model.

    model: a folder, a hub id, or "bundled" (the bundled pair's model of this role).

    Raises:
        ModelLoadError: neither a folder with a config.json nor an id the hub answers for.
    """
    if model == BUNDLED:
        return SLM_DIR if role == "slm" else LLM_DIR
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"model folder {model!r} has no config.json; give a Hugging Face model folder"
            )
        return folder
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise ModelLoadError(f"model folder {model!r} does not exist; check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except Exception as error:  # the border to the hub client, whose error types vary by transport
        raise ModelLoadError(
            f"model {model!r} is neither a folder here nor could it be downloaded from the hub "
            f"({type(error).__name__}); check the name, or download it and give the folder"
        ) from error


def model_digest(folder: Path) -> str:
    """A fingerprint of config and weights (16 hex digits): small files whole, large ones by size,
    head and tail."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= DIGEST_WHOLE_FILE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(8 << 20))
                stream.seek(-(8 << 20), 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one row in a packed forward: `token_ids` (>= 0) follow the row's first `start`
    tokens; `siblings` all come next, each blind to the others. `keep`: the row has then read
    `token_ids` (siblings are never kept); False: nothing is kept, and the row must hold at least
    `start` tokens, which stay as they are."""

    slot: Slot
    token_ids: Sequence[int]
    start: int
    siblings: Sequence[int] = ()
    adapter: Adapter | None = None
    keep: bool = True

    @property
    def length(self) -> int:
        return len(self.token_ids) + len(self.siblings)


class ModelRuntime:
    """A loaded model. Not thread-safe: one thread owns it.

    hidden states are in the model's dtype; logits and log-probabilities are float32.
    """

    def __init__(
        self, model: Any, digest: str, eos_ids: frozenset[int], kv_bytes: int = 1 << 30
    ) -> None:
        self.model = model.eval()
        self.digest, self.eos_ids = digest, eos_ids
        self.config = model.config.get_text_config()
        self.device: torch.device = next(model.parameters()).device
        self.head = model.get_output_embeddings()
        self.vocab_rows = int(self.head.weight.shape[0])
        self.max_length = _max_length(self.config)
        self._switch: AdapterSwitch | None = None
        unknown = set(getattr(self.config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
        if unknown:
            raise ModelLoadError(
                f"model type {self.config.model_type!r} has layers of type {sorted(unknown)}; only "
                "attention models are supported"
            )
        if self.device.type == "cpu" and self.model.dtype is torch.float32:
            _order_for_single_tokens(self.model, self.head)
        self.pool = KVPool(self._kv_shapes(), self.model.dtype, self.device, kv_bytes)

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "float32",
        device: str = "cpu",
        kv_bytes: int = 1 << 30,
        role: Role = "slm",
    ) -> ModelRuntime:
        """Load a Hugging Face folder or hub id (safetensors only, no remote code).

        Raises:
            ModelLoadError: missing, unreadable or unsupported model, unknown dtype.
        """
        if dtype not in DTYPES:
            raise ModelLoadError(f"dtype {dtype!r} is not supported; choose from {sorted(DTYPES)}")
        folder = resolve_model(model, role)
        try:
            config = AutoConfig.from_pretrained(folder)
            loaded, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=attention.NAME,
            )
            if found["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[0]}")
            generation = (
                GenerationConfig.from_pretrained(folder)
                if (folder / "generation_config.json").is_file()
                else GenerationConfig.from_model_config(config)
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelLoadError(
                f"model folder {model!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        eos = generation.eos_token_id
        eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        return cls(loaded.to(device), model_digest(folder), eos_ids, kv_bytes)

    @property
    def switch(self) -> AdapterSwitch:
        """The adapter gate; the linear layers are wrapped when it is first needed."""
        if self._switch is None:
            self._switch = install(self.model)
        return self._switch

    # -- forwards ---------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, segments: Sequence[Segment]) -> tuple[Tensor, list[slice]]:
        """Hidden states [N, hidden] of all segments' tokens, and each segment's place in them."""
        spans = self._spans(segments)
        tokens = [i for _, s in spans for i in (*segments[s].token_ids, *segments[s].siblings)]
        positions = [p for span, _ in spans for p in span.positions()]
        plan = Packed([span for span, _ in spans], self.device, self.model.dtype)
        hidden = self._run(
            torch.tensor([tokens]), torch.tensor([positions]), plan, self._gates(segments, spans)
        )[0]
        places = [slice(0)] * len(segments)
        for span, s in spans:
            places[s] = slice(span.at, span.at + span.length)
            if segments[s].keep:
                span.slot.token_ids[span.start :] = segments[s].token_ids
        return hidden, places

    def aside(self, token_ids: Tensor, plan: Aside, adapter: Adapter | None = None) -> Tensor:
        """[b, t] tokens and a plan with their positions and mask -> [b, t, hidden]. Differentiable
        in the adapter."""
        return self._run(token_ids, plan.positions, plan, [(adapter, None)] if adapter else [])

    def _run(self, tokens: Tensor, positions: Tensor, plan: Plan, gates: Sequence[Gate]) -> Tensor:
        decoder = self.model.get_decoder()
        arguments = {
            "input_ids": tokens.to(self.device),
            "position_ids": positions.to(self.device),
            "plan": plan,
            "use_cache": False,
        }
        if not gates and self._switch is None:
            return decoder(**arguments).last_hidden_state
        with self.switch.using(gates):
            return decoder(**arguments).last_hidden_state

    def _spans(self, segments: Sequence[Segment]) -> list[tuple[Span, int]]:
        """The segments' spans in packed order, each with its segment's index."""
        at, spans = 0, []
        for index in sorted(
            range(len(segments)),
            key=lambda i: attention.order(segments[i].slot, segments[i].length),
        ):
            s = segments[index]
            assert s.start <= len(s.slot.token_ids), "a gap in the context"
            column = s.start if s.keep else len(s.slot.token_ids)
            span = Span(
                at=at,
                slot=s.slot,
                start=s.start,
                causal=len(s.token_ids),
                siblings=len(s.siblings),
                column=column,
            )
            assert span.end <= s.slot.columns, "the row is too short"
            spans.append((span, index))
            at += span.length
        return spans

    def _gates(self, segments: Sequence[Segment], spans: Sequence[tuple[Span, int]]) -> list[Gate]:
        adapters = {a.key: a for segment in segments if (a := segment.adapter) is not None}
        if len(adapters) == 1 and all(segment.adapter is not None for segment in segments):
            return [(next(iter(adapters.values())), None)]
        gates: list[Gate] = []
        for adapter in adapters.values():
            tokens = [
                i
                for span, s in spans
                if segments[s].adapter is adapter
                for i in range(span.at, span.at + span.length)
            ]
            first, last = min(tokens), max(tokens)
            gates.append(
                (
                    adapter,
                    slice(first, last + 1)
                    if last - first + 1 == len(tokens)
                    else torch.tensor(tokens, device=self.device),
                )
            )
        return gates

    @torch.no_grad()
    def _kv_shapes(self) -> list[KVShape]:
        """What each layer stores per token, from a forward of one token rather than from
        configuration fields, whose meaning differs between architectures."""
        probe = Aside(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.bool))
        kind = self.config.model_type
        try:
            self._run(
                torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), probe, []
            )
        except (NotImplementedError, TypeError) as error:
            raise ModelLoadError(f"model type {kind!r} is not supported: {error}") from error
        if len(probe.stored) != self.config.num_hidden_layers:
            raise ModelLoadError(
                f"model type {kind!r}: only {len(probe.stored)} of {self.config.num_hidden_layers} "
                "layers are attention; only attention models are supported"
            )
        return [KVShape(k.shape[1], k.shape[3], v.shape[3]) for k, v in probe.stored]

    # -- output rows ------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab_rows] float32, before any masking."""
        return self._finish(self.head(hidden).float())

    def row_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of some ids only: [..., hidden] and ids [..., k] -> [..., k] float32. Never the
        whole head."""
        rows = self.head.weight[ids.to(self.device)]
        logits = (rows @ hidden[..., None])[..., 0].float()
        bias = getattr(self.head, "bias", None)
        return self._finish(logits if bias is None else logits + bias[ids.to(self.device)].float())

    def reserved_logits(
        self, hidden: Tensor, reserved_ids: Sequence[int], deltas: Tensor | None
    ) -> Tensor:
        """z = h (W_R + delta)^T, the logits of the reserved ids: [..., hidden] -> [..., B] float32.

        W_R are the base model's rows (zero for virtual ids, which lie at and above `vocab_rows`).
        """
        real = [i for i in reserved_ids if i < self.vocab_rows]
        rows = hidden.new_zeros(len(reserved_ids), hidden.shape[-1], dtype=torch.float32)
        if real:
            rows = self.head.weight[torch.tensor(real, device=self.device)].float()
        if deltas is not None:
            rows = rows + deltas.to(self.device)
        return self._finish(hidden.float() @ rows.T)

    def _finish(self, logits: Tensor) -> Tensor:
        """The scalings some architectures apply behind the head (Granite, Cohere, Gemma)."""
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * factor
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError: an id has no embedding row."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.vocab_rows:
                raise InvalidRequestError(
                    f"token_ids[{index}]={token_id}: must be 0..{self.vocab_rows - 1}"
                )


def _max_length(config: Any) -> int:
    """Positions a token may have. Rotary frequencies that depend on the longest sequence of a
    forward (`longrope`, `dynamic`) would tie a sequence's numbers to the batch: such a model is
    used up to where they begin to change."""
    longest = int(getattr(config, "max_position_embeddings", 1 << 20))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return int(min(longest, original or longest))
    return longest


def _order_for_single_tokens(model: Any, head: Any) -> None:
    """Keep weights that widen their input (and the head) in [in, out] memory order: on CPU, fp32,
    the product with one token is then 1.6 times as fast, with many about as fast (measured: 13 %
    slower to 10 % faster)."""
    for layer in [*adaptable_layers(model).values(), head]:
        if layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.t().contiguous().t()
