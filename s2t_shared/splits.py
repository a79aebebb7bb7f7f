"""Which problems are for training.

An evaluation split is refused by its name. A tenth of the problems is held out from training,
chosen by a hash of its group, so that a problem stays on its side when the collection grows.
"""

from __future__ import annotations

import hashlib
from enum import Enum

from s2t_shared.errors import EvaluationSplitError

EVALUATION_SPLITS = frozenset(
    {"test", "eval", "evaluation", "heldout", "held_out", "held-out", "val", "validation", "dev"}
)
HELD_OUT_SHARE = 0.1


def check_split(split: str) -> None:
    """Refuse to calibrate, harvest or train on an evaluation split: it would spoil every figure.

    Raises:
        EvaluationSplitError: `split` names an evaluation split, or nothing.
    """
    name = split.strip().lower()
    if not name or name in EVALUATION_SPLITS:
        raise EvaluationSplitError(
            f"split {split!r}: labels and thresholds must never come from an evaluation split; "
            "use training problems (split 'train')"
        )


def is_held_out(task: str, group: str) -> bool:
    """Whether no training run may see the labels of this group's problems."""
    digest = hashlib.sha256(f"{task}/{group}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


class Part(str, Enum):
    """What a rollout is for.

    The held-out tenth of all groups of problems is halved. `VALIDATION` decides when to stop, the
    best weights and lambda. `TEST` is what is reported and gated; it decides nothing before.
    """

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


PARTS = tuple(Part)


def part_of_group(task: str, group: str) -> Part:
    """By a hash: stable when the lake grows, and no group is in two parts."""
    if not is_held_out(task, group):
        return Part.TRAINING
    digest = hashlib.sha256(f"half/{task}/{group}".encode()).digest()
    return Part.VALIDATION if digest[0] < 128 else Part.TEST
