"""The attention that the models call: one function for transformers, one protocol for its plans.

Registered with transformers as attention "s2t". A model computes queries, keys and values. An
`AttentionPlan`, made once per forward, decides which keys each token sees:

    VarlenPlan   serving: tokens of many sequences, packed without padding, over the KV pool
    PaddedPlan   training: a padded batch with a mask, differentiable, outside the KV pool
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "s2t"
# Arguments by which some architectures change attention in ways that are not implemented here.
UNSUPPORTED_ARGUMENTS = ("s_aux", "sinks", "position_bias", "indices")


@dataclass(frozen=True)
class AttentionParams:
    """How a layer turns attention scores into weights.

    scaling: factor of the scores. softcap: bound of the scores, by tanh; None: unbounded. window:
    how many positions back a token sees, itself included; None: all.
    """

    scaling: float
    softcap: float | None
    window: int | None


class AttentionPlan(Protocol):
    """Which keys the tokens of one forward attend to."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """query [b, heads, n, dim]; key and value [b, key heads, n, dim] -> [b, n, heads, dim]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    plan: AttentionPlan,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls. The plan replaces `attention_mask`.

    Raises:
        NotImplementedError: the architecture needs an argument that is not supported.
    """
    for name in UNSUPPORTED_ARGUMENTS:
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not supported")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    params = AttentionParams(scaling, softcap, sliding_window)
    return plan.attend(layer, query, key, value, params), None


AttentionInterface.register(NAME, _attention)


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attention with as many query heads as key heads, capped where the layer caps its scores.

    query: [n, heads, q, dim]; keys: [n, heads, columns, dim]; values: [n, heads, columns, value
    dim]. mask: added to the scores [n, heads, q, columns]; None: every query sees every column.
    Returns [n, heads, q, value dim].
    """
    if params.softcap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=params.scaling
        )
    scores = query @ keys.transpose(2, 3) * params.scaling
    scores = torch.tanh(scores / params.softcap) * params.softcap
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ values


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool mask -> `dtype` mask to add to the scores: 0 where visible, -inf elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf)
