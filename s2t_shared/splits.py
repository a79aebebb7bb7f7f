"""Which splits are for evaluation. Calibrating, harvesting or training there would spoil every figure."""

from __future__ import annotations

from s2t_shared.errors import EvaluationSplitError

EVALUATION_SPLITS = frozenset(
    {"test", "eval", "evaluation", "heldout", "held_out", "held-out", "val", "validation", "dev"}
)


def check_split(split: str) -> None:
    """Refuse an evaluation split.

    Raises:
        EvaluationSplitError: the split is for evaluation, or has no name.
    """
    name = split.strip().lower()
    if not name or name in EVALUATION_SPLITS:
        raise EvaluationSplitError(
            f"split {split!r}: labels and thresholds must never come from an evaluation split; "
            "use training problems (split 'train')"
        )
