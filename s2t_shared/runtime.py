"""One causal language model: its weights, its private KV rows, and the two forwards everything is built from.

Token ids and positions in, hidden states and log-probabilities out. Knows no policy, no text, no roles.

    extend(rows, token_ids, starts)             read new tokens into the rows' KV (prefill and decode)
    branch(rows, token_ids, positions, mask)    look at tokens that are not kept (siblings, re-reads, training trees)

A branch is one row of t tokens with their own positions and a mask that says which of them see which, so K
candidates of one context cost one forward of K tokens, flat in the prefix (DESIGN section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.kv import KVPool, PoolCache
from s2t_shared.lora import Adapter, AdapterSwitch, install

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIGEST_WHOLE_FILE_BYTES = 64 << 20
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def resolve_model(model: str) -> Path:
    """A local folder for a model name: the folder itself, or a download of the hub id.

    Raises:
        ModelLoadError: neither a folder with a config.json nor an id the hub answers for.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelLoadError(f"model folder {model!r} has no config.json; give a Hugging Face model folder")
        return folder
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise ModelLoadError(f"model folder {model!r} does not exist; check the path")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the border to the hub client, whose error types vary by transport
        raise ModelLoadError(f"model {model!r} is neither a folder here nor could it be downloaded from the hub "
                             f"({type(error).__name__}); check the name, or download it and give the folder") from error


def model_digest(folder: Path) -> str:
    """A fingerprint of config and weights (16 hex digits): small files whole, large ones by size, head and tail."""
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


class ModelRuntime:
    """A loaded model. Not thread-safe: one thread owns it.

    hidden states are [n, t, hidden] in the model's dtype; logits and log-probabilities are float32.
    """

    def __init__(self, model: Any, digest: str, eos_ids: frozenset[int], max_rows: int = 64) -> None:
        self.model = model.eval()
        self.digest, self.eos_ids = digest, eos_ids
        self.config = model.config.get_text_config()
        self.device: torch.device = next(model.parameters()).device
        self.head = model.get_output_embeddings()
        self.vocab_rows = int(self.head.weight.shape[0])
        self.max_length = int(getattr(self.config, "max_position_embeddings", 1 << 20))
        self.pool = KVPool(max_rows)
        self._switch: AdapterSwitch | None = None
        self._window = int(getattr(self.config, "sliding_window", 0) or 0)
        # Without a list of types (Mistral, Phi-3) a window, if there is one, is every layer's.
        every = ["sliding_attention" if self._window else "full_attention"]
        self._layer_types = set(getattr(self.config, "layer_types", None) or every)
        if not self._layer_types <= SUPPORTED_LAYER_TYPES:
            raise ModelLoadError(f"model type {self.config.model_type!r} has layers of type "
                                 f"{sorted(self._layer_types - SUPPORTED_LAYER_TYPES)}; only attention models "
                                 "are supported")

    @classmethod
    def load(cls, model: str, dtype: str = "float32", device: str = "cpu", max_rows: int = 64) -> ModelRuntime:
        """Load a Hugging Face folder or hub id (safetensors only, no remote code).

        Raises:
            ModelLoadError: missing, unreadable or unsupported model, unknown dtype.
        """
        if dtype not in DTYPES:
            raise ModelLoadError(f"dtype {dtype!r} is not supported; choose from {sorted(DTYPES)}")
        folder = resolve_model(model)
        try:
            config = AutoConfig.from_pretrained(folder)
            text = config.get_text_config()
            softcapped = getattr(text, "attn_logit_softcapping", None) is not None
            loaded, found = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True,
                attn_implementation="eager" if softcapped else "sdpa")
            if found["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[0]}")
            generation = (GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file()
                          else GenerationConfig.from_model_config(config))
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelLoadError(f"model folder {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        eos = generation.eos_token_id
        eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        return cls(loaded.to(device), model_digest(folder), eos_ids, max_rows)

    @property
    def switch(self) -> AdapterSwitch:
        """The adapter gate; the linear layers are wrapped when it is first needed."""
        if self._switch is None:
            self._switch = install(self.model)
        return self._switch

    # -- forwards -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], starts: Sequence[int],
               adapter: Adapter | None = None) -> Tensor:
        """Read `token_ids[i]` (one or more) into row `rows[i]` at positions `starts[i]...`.

        Returns hidden states [n, t, hidden], t the longest; row i is valid for its first len(token_ids[i]) columns.
        """
        counts = [len(ids) for ids in token_ids]
        longest = max(counts)
        assert min(counts) > 0
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, ids in enumerate(token_ids):
            tokens[i, : counts[i]] = torch.tensor(ids)
        # Padding tokens are written behind the row's end, where no later query looks before they are overwritten.
        positions = torch.tensor(list(starts))[:, None] + torch.arange(longest)[None, :]
        length = int(positions.max()) + 1
        self.pool.reserve(max(rows) + 1, length)
        columns = torch.arange(length)
        visible = columns[None, None, :] <= positions[:, :, None]
        cache = PoolCache(self.pool, rows, positions.to(self.device), length)
        return self._forward(tokens, positions, visible, columns.expand(len(rows), -1), cache, adapter)

    def branch(self, rows: Sequence[int], token_ids: Tensor, positions: Tensor, visible: Sequence[int] | Tensor,
               mask: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Look at tokens without keeping them. Differentiable in the adapter's weights.

        token_ids, positions: [n, t]. visible: [n], or [n, t] per token: how many of row i's cached positions are
        seen. mask: bool [t, t] or [n, t, t], query sees key among the new tokens. Returns hidden [n, t, hidden].
        """
        n, t = token_ids.shape
        seen = torch.as_tensor(visible)
        seen = seen[:, None].expand(n, t) if seen.dim() == 1 else seen
        length = int(seen.max()) if not self.pool.is_empty else 0
        columns = torch.arange(length)
        cached = columns[None, None, :] < seen[:, :, None]
        block = mask if mask.dim() == 3 else mask.expand(n, t, t)
        key_positions = torch.cat([columns.expand(n, -1), positions], dim=1)
        cache = PoolCache(self.pool, rows, None, length)
        return self._forward(token_ids, positions, torch.cat([cached, block], dim=2), key_positions, cache, adapter)

    def _forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, key_positions: Tensor,
                 cache: PoolCache, adapter: Adapter | None) -> Tensor:
        """visible: bool [n, t, keys]; key_positions: [n, keys], for sliding windows."""
        mask: Tensor | dict[str, Tensor] = self._mask(visible)
        if "sliding_attention" in self._layer_types:
            near = positions[:, :, None] - key_positions[:, None, :] < self._window
            mask = {"full_attention": self._mask(visible), "sliding_attention": self._mask(visible & near)}
            if self._layer_types == {"sliding_attention"}:
                mask = mask["sliding_attention"]
        decoder = self.model.get_decoder()
        arguments = {"input_ids": tokens.to(self.device), "position_ids": positions.to(self.device),
                     "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if adapter is None and self._switch is None:
            return decoder(**arguments).last_hidden_state
        with self.switch.using(adapter):
            return decoder(**arguments).last_hidden_state

    def _mask(self, visible: Tensor) -> Tensor:
        """bool [n, t, keys] -> [n, 1, t, keys] as the attention in use wants it: bool, or added to the scores."""
        mask = visible[:, None].to(self.device)
        if self.config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)

    # -- output rows --------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab_rows] float32, before any masking."""
        return self._finish(self.head(hidden).float())

    def row_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of some ids only: [..., hidden] and ids [..., k] -> [..., k] float32. Never the whole head."""
        rows = self.head.weight[ids.to(self.device)]
        logits = (rows @ hidden[..., None])[..., 0].float()
        bias = getattr(self.head, "bias", None)
        return self._finish(logits if bias is None else logits + bias[ids.to(self.device)].float())

    def reserved_logits(self, hidden: Tensor, reserved_ids: Sequence[int], deltas: Tensor | None) -> Tensor:
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
                raise InvalidRequestError(f"token_ids[{index}]={token_id}: must be 0..{self.vocab_rows - 1}")
