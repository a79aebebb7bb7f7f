"""Score queries for tests of the LLM selector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from s2t_shared.decode.llm_selector import LLMSelector
from s2t_shared.model.runtime import Segment
from s2t_shared.types import ScoreQuery

LONG = tuple(int(x) for x in np.random.default_rng(0).integers(5, 48, 40))


def query(
    tokens: Sequence[int], positions: Sequence[int] | None = None, **options: object
) -> ScoreQuery:
    at = tuple(positions) if positions is not None else (len(tokens) - 1,)
    return ScoreQuery(
        token_ids=tuple(tokens),
        positions=at,
        candidate_ids=tuple((5 + p % 9, 40, 11)[: 1 + p % 3] for p in at),
        **options,
    )  # type: ignore[arg-type]


def count_read_tokens(scorer: LLMSelector) -> list[int]:
    """Records how many tokens each forward reads."""
    read: list[int] = []
    forward = scorer.runtime.forward

    def counted(segments: Sequence[Segment]) -> tuple[torch.Tensor, list[slice]]:
        read.append(sum(s.length for s in segments))
        return forward(segments)

    scorer.runtime.forward = counted  # type: ignore[method-assign]
    return read
