"""Small rollouts and lakes for tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.labels.lake import Lake


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


def label(identity: str, position: int = 2) -> Label:
    return Label(
        label_id=identity,
        position=position,
        candidate_ids=(5, 6),
        slm_log_probs=(-0.125, -2.5),
        llm_log_probs=(-1.5, -0.5),
        llm_top_id=6,
        llm_top_rank=1,
        mass=0.75,
        kl=0.25,
        entropy=0.5,
    )


def rollout(number: int, problem: str = "", labels: int = 2) -> Rollout:
    """With numbers that float32 holds exactly."""
    return Rollout(
        rollout_id=f"rollout-{number}",
        request_id=f"request-{number}",
        problem_id=problem or f"p{number}",
        task="sums",
        split="train",
        source="plain",
        token_ids=(1, 2, number, 4),
        prompt_length=2,
        entropy=(0.5, 0.25),
        kl=(0.0, 1.0),
        llm_top_rank=(0, -1),
        labels=tuple(label(f"{number}-{i}", 2 + i) for i in range(labels)),
        slm_digest="slm",
        llm_digest="llm",
        tokenizer_digest="tok",
        template_digest="template",
        created_at=time.time(),
    )


def ids(lake: Lake) -> list[str]:
    return [r.rollout_id for r in lake.rollouts()]


def names(*numbers: int) -> set[str]:
    return {f"rollout-{n}" for n in numbers}


def ids_in(lake: Lake) -> set[str]:
    return {found.rollout_id for found in lake.rollouts()}
