"""Made-up labelled rollouts for the trainer's tests."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from s2t_shared.labels.label import Label, Rollout


def make_label(name: str, position: int, seed: int, k: int = 4) -> Label:
    rng = random.Random(seed)
    ids = tuple(rng.sample(range(20, 45), k))
    raw = torch.tensor([rng.uniform(-3, 0) for _ in range(2 * k)])
    slm = sorted(raw[:k].log_softmax(0).tolist(), reverse=True)
    llm = (raw[k:].log_softmax(0) - 0.1).tolist()  # some mass is elsewhere
    return Label(
        label_id=name,
        position=position,
        candidate_ids=ids,
        slm_log_probs=tuple(slm),
        llm_log_probs=tuple(llm),
        llm_top_id=ids[1],
        llm_top_rank=1,
        mass=0.9,
        kl=0.5,
        entropy=0.7,
    )


def make_rollout(
    number: int, positions: tuple[int, ...] = (5, 9, 14), slm: str = "slm", **changes: object
) -> Rollout:
    rng = random.Random(number)
    tokens = tuple(rng.randrange(20, 45) for _ in range(max(4, *positions) + number % 3))
    labels = tuple(
        make_label(f"l{number}-{n}", n, 100 * number + n, k=3 + n % 3) for n in positions
    )
    rollout = Rollout(
        rollout_id=f"r{number:05d}",
        request_id=f"q{number}",
        problem_id=f"p{number}",
        task="t",
        split="train",
        source="plain",
        token_ids=tokens,
        prompt_length=4,
        entropy=(),
        kl=(),
        llm_top_rank=(),
        labels=labels,
        slm_digest=slm,
        llm_digest="llm",
        tokenizer_digest="tok",
        template_digest="template",
        created_at=1.0 + number,
    )
    return replace(rollout, **changes)  # type: ignore[arg-type]


def make_rollouts(count: int, slm: str = "slm") -> list[Rollout]:
    """With three labelled positions each, of different lengths."""
    return [make_rollout(r, (5 + r % 4, 9 + r % 4, 14 + r % 7), slm) for r in range(count)]


def learnable(rollouts: list[Rollout]) -> list[Rollout]:
    """The same, with a rule to learn: the LLM always prefers the candidate with the smallest id."""

    def ruled(label: Label) -> Label:
        order = sorted(label.candidate_ids)
        scores = (
            torch.tensor([-2.0 * order.index(i) for i in label.candidate_ids])
            .log_softmax(0)
            .tolist()
        )
        return replace(label, llm_log_probs=tuple(scores), mass=1.0)

    return [replace(r, labels=tuple(ruled(label) for label in r.labels)) for r in rollouts]
