"""The published way to train a selector, as a baseline: every candidate is a padded sequence of its
own, and a second model is the reference. Written from a description of its behaviour (plain Hugging
Face models, our LoRA layers).

Kinder than the original where that is free: only the reserved rows are trained (there the whole
head has gradients and optimizer state, masked afterwards), numbers are fp32, and one group at a
time needs no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from s2t_shared.labels.label import Label
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.loading import DTYPES
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.lora import AdapterSwitch, Gate, install


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Of L = ce * CE + hinge * margin loss + kl * listwise KL + reg * LM-KL (the paper's
    distillation loss)."""

    ce: float
    hinge: float
    margin: float
    kl: float
    reg: float


@dataclass(frozen=True)
class PublishedTrainer:
    """Policy and reference model. For architectures without scalings behind the head."""

    model: Any
    reference: Any
    switch: AdapterSwitch

    @classmethod
    def load(cls, slm: str, dtype: str, device: str) -> PublishedTrainer:
        def model() -> Any:
            loaded = (
                AutoModelForCausalLM.from_pretrained(resolve_model(slm), dtype=DTYPES[dtype])
                .to(device)
                .eval()
            )
            return loaded.requires_grad_(False)

        policy = model()
        return cls(policy, model(), install(policy))

    def loss(
        self, context: Sequence[int], label: Label, selector: LocalSelector, weights: LossWeights
    ) -> Tensor:
        """The loss of one group: K sequences of context and candidate, kind `reserved`, adapter on
        everywhere."""
        assert selector.adapter is not None and selector.bin_deltas is not None
        device = self.model.device
        tokens = torch.tensor(
            [[*context, candidate] for candidate in label.candidate_ids], device=device
        )
        with self.switch.using([Gate(selector.adapter, None)]):
            hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        logits = head(hidden).float()  # [K, t + 1, V]
        with torch.no_grad():
            reference = self.reference(input_ids=tokens, use_cache=False).logits.float()
        real = [i for i in selector.reserved_ids if i < logits.shape[-1]]
        bins = hidden[:, -1].float() @ selector.bin_deltas.T
        if real:
            bins = bins + logits[:, -1, real]
        scores = bins.softmax(-1) @ torch.linspace(0, 1, bins.shape[-1], device=device)
        loss = _selection_loss(scores / selector.temperature, label, weights)
        if weights.reg:
            barred = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
            barred[real] = True
            log_p = logits[:, :-1].masked_fill(barred, -1e9).log_softmax(-1)
            log_q = reference[:, :-1].masked_fill(barred, -1e9).log_softmax(-1)
            loss = loss + weights.reg * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return loss


def _selection_loss(logits: Tensor, label: Label, weights: LossWeights) -> Tensor:
    teacher = torch.tensor(label.llm_log_probs, device=logits.device).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    others = torch.arange(len(logits), device=logits.device) != label.best
    hinge = (weights.margin - logits[label.best] + logits[others]).clamp(min=0).mean()
    listwise = (teacher.exp() * (teacher - log_p)).sum()
    return -weights.ce * log_p[label.best] + weights.hinge * hinge + weights.kl * listwise
