"""Attention of a padded batch, for training: differentiable, and outside the KV pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2t_shared.model.attention import AttentionParams, additive_mask, grouped_attention


class PaddedPlan:
    """The attention plan of a padded batch of b rows with t new tokens each.

    positions: int64 [b, t]. mask: bool [t, t] or [b, t, t], which new tokens each token sees.
    context: the plan of a forward that has run; its keys and values precede the new ones.
    visible: int64 [b, t], how many of the context's columns each token sees.
    """

    def __init__(
        self,
        positions: Tensor,
        mask: Tensor,
        context: PaddedPlan | None = None,
        visible: Tensor | None = None,
    ) -> None:
        self.positions = positions
        self._context = context
        self._key_positions = positions
        self._visible = mask.expand(*positions.shape, -1)
        if context is not None:
            assert visible is not None
            columns = torch.arange(context.positions.shape[1])
            visible_context = columns < visible[:, :, None]
            self._visible = torch.cat([visible_context, self._visible], dim=2)
            self._key_positions = torch.cat([context.positions, positions], dim=1)
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}

    @property
    def kv(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [b, key heads, t, dim] by layer, of a forward without gradient."""
        return [self._kv[layer] for layer in sorted(self._kv)]

    def set_kv(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the keys and values [b, key heads, t, dim] by layer, in place of a forward."""
        self._kv = dict(enumerate(layers))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """See `AttentionPlan`."""
        if not torch.is_grad_enabled():
            self._kv[layer] = (key, value)
        if self._context is not None:
            context_key, context_value = self._context._kv[layer]
            key = torch.cat([context_key, key], dim=2)
            value = torch.cat([context_value, value], dim=2)
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
        mask = self._mask(params.window, query)
        return grouped_attention(query, key, value, mask, params).transpose(1, 2)

    def _mask(self, window: int | None, query: Tensor) -> Tensor:
        """[b, 1, t, keys] to add to the scores. Layers with the same window share one mask."""
        if window not in self._masks:
            visible = self._visible
            if window is not None:
                distance = self.positions[:, :, None] - self._key_positions[:, None, :]
                visible = visible & (distance < window)
            mask = additive_mask(visible, query.dtype)
            self._masks[window] = mask[:, None].to(query.device)
        return self._masks[window]
