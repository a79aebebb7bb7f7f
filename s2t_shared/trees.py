"""Labels of one rollout as one training sequence, and the split of problems into training and held-out ones.

Knows labels; no models.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from s2t_shared.labels import Label

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Group:
    """One labelled position of a tree: `length` context tokens come before it."""

    length: int
    label: Label


@dataclass(frozen=True)
class Tree:
    """A rollout: its tokens and its labelled positions."""

    token_ids: tuple[int, ...]
    groups: tuple[Group, ...]


def build_trees(labels: Iterable[Label]) -> list[Tree]:
    """Join labels whose contexts are prefixes of one another (those of one rollout) into trees."""
    rollouts: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        rollouts[label.rollout_id].append(label)
    trees = []
    for _, members in sorted(rollouts.items()):
        waiting = sorted(members, key=lambda label: (-len(label.context_ids), label.label_id))
        while waiting:
            longest = waiting[0].context_ids
            inside = [m for m in waiting if longest[: len(m.context_ids)] == m.context_ids]
            waiting = [m for m in waiting if m not in inside]
            trees.append(Tree(longest, tuple(Group(len(m.context_ids), m) for m in reversed(inside))))
    return trees


def is_held_out(label: Label) -> bool:
    """Split by problem, by hash: stable when the lake grows, and no problem is on both sides."""
    problem = label.problem_id or str(label.context_ids[:32])
    digest = hashlib.sha256(f"{label.task}/{problem}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def held_out_trees(labels: Iterable[Label]) -> list[Tree]:
    """The trees that no training run ever sees."""
    return build_trees(label for label in labels if is_held_out(label))
