"""Rollouts as a harvest makes them, and a lake of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s2t_shared.labels.label import Label, Rollout, check_rollout
from s2t_shared.labels.lake import Lake

PROMPT = 6
ANSWER = 10


def scored_rollout(
    number: int, task: str = "sums", tokenizer_digest: str = "tok", created_at: float = 1000.0
) -> Rollout:
    """Every position scored, two of them labels; numbers from a seeded generator."""
    rng = np.random.default_rng(number)
    token_ids = tuple(int(i) for i in rng.integers(5, 48, PROMPT + ANSWER))
    kl, entropy = (
        tuple(float(np.float32(x)) for x in rng.gamma(0.5, 1.0, ANSWER)) for _ in range(2)
    )
    ranks = tuple(int(r) for r in rng.integers(-1, 12, ANSWER))
    labels = tuple(
        Label(
            label_id=f"label-{number}-{step}",
            position=PROMPT + step,
            candidate_ids=(7, 2, 9),
            slm_log_probs=(-0.5, -1.5, -2.5),
            llm_log_probs=(-1.5, -0.25, -3.5),
            llm_top_id=2,
            llm_top_rank=ranks[step],
            mass=0.75,
            kl=kl[step],
            entropy=entropy[step],
        )
        for step in (3, 8)
    )
    made = Rollout(
        rollout_id=f"rollout-{number}",
        request_id=f"request-{number}",
        problem_id=f"p{number}",
        task=task,
        split="train",
        source="plain",
        token_ids=token_ids,
        prompt_length=PROMPT,
        entropy=entropy,
        kl=kl,
        llm_top_rank=ranks,
        labels=labels,
        slm_digest="slm",
        llm_digest="llm",
        tokenizer_digest=tokenizer_digest,
        template_digest="template",
        created_at=created_at,
    )
    check_rollout(made)
    return made


SCORED_ROLLOUTS = [scored_rollout(i, task="sums" if i % 4 else "words") for i in range(60)]


@pytest.fixture
def scored_lake(tmp_path: Path) -> Lake:
    """60 rollouts in three shards, some of them twice."""
    made = Lake(tmp_path / "lake")
    for part in (SCORED_ROLLOUTS[:25], SCORED_ROLLOUTS[20:50], SCORED_ROLLOUTS[50:]):
        made.write(part)
    return made
