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
    return Label(name, position, ids, tuple(slm), tuple(llm), ids[1], 1, 0.9, 0.5, 0.7)


def make_rollout(number: int, positions: tuple[int, ...] = (5, 9, 14), slm: str = "slm", **changes: object) -> Rollout:
    rng = random.Random(number)
    tokens = tuple(rng.randrange(20, 45) for _ in range(max(positions) + number % 3))
    labels = tuple(make_label(f"l{number}-{n}", n, 100 * number + n, k=3 + n % 3) for n in positions)
    rollout = Rollout(f"r{number:05d}", f"q{number}", f"p{number}", "t", "train", "plain", tokens, 4, (), (), (),
                      labels, slm, "llm", "tok", "template", 1.0 + number)
    return replace(rollout, **changes)  # type: ignore[arg-type]


def make_rollouts(count: int, slm: str = "slm") -> list[Rollout]:
    """With three labelled positions each, of different lengths."""
    return [make_rollout(r, (5 + r % 4, 9 + r % 4, 14 + r % 7), slm) for r in range(count)]


def learnable(rollouts: list[Rollout]) -> list[Rollout]:
    """The same, with a rule to learn: the LLM always prefers the candidate with the smallest id."""

    def ruled(label: Label) -> Label:
        order = sorted(label.candidate_ids)
        scores = torch.tensor([-2.0 * order.index(i) for i in label.candidate_ids]).log_softmax(0).tolist()
        return replace(label, llm_log_probs=tuple(scores), mass=1.0)

    return [replace(r, labels=tuple(ruled(label) for label in r.labels)) for r in rollouts]
