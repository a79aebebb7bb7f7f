"""Whether rows are possible rollouts: `check_rollout` for whole columns at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2t_shared.errors import StoreError
from s2t_shared.labels.label import ROUNDING, Label, Rollout, check_version
from s2t_shared.labels.rows import LABELS, Rows
from s2t_shared.labels.schema import LARGEST_FLOAT32, Column, Kind, columns
from s2t_shared.splits import check_split
from s2t_shared.types import SUPPORT_SIZE

RANGES = {  # least and greatest value of a kind
    Kind.WHOLE: (0, 2**31 - 1),
    Kind.RANK: (-1, SUPPORT_SIZE - 1),
    Kind.RANK16: (-1, SUPPORT_SIZE - 1),
    Kind.REAL: (-LARGEST_FLOAT32, LARGEST_FLOAT32),
    Kind.TIME: (-math.inf, math.inf),
}


def check_rows(rows: Rows) -> None:
    """Check the values of rows that have every column of a rollout.

    Raises:
        StoreError: a value of some row has the wrong range or length, or is missing.
        EvaluationSplitError: a row comes from an evaluation split.
    """
    if not len(rows):
        return
    _check_columns(columns(Rollout), {c.name: rows.column(c.name) for c in columns(Rollout)})
    lists = rows.column(LABELS)
    if lists.null_count or rows.labels.null_count:
        raise StoreError(f"{LABELS}: a value is missing")
    _check_columns(columns(Label), {c.name: rows.labels.field(c.name) for c in columns(Label)})
    _check_lengths(rows)
    for version in pc.unique(rows.column("schema_version")).to_pylist():
        check_version(version)
    for split in pc.unique(rows.column("split")).to_pylist():
        check_split(split)


def _check_columns(schema: Iterable[Column], arrays: dict[str, pa.Array]) -> None:
    for column in schema:
        values = arrays[column.name]
        is_whole = not values.null_count
        if column.many:
            values = values.flatten()
        if not is_whole or values.null_count:
            raise StoreError(f"{column.name}: a value is missing")
        if len(values) and column.kind is not Kind.TEXT:
            _check_range(column, values.to_numpy())


def _check_range(column: Column, values: np.ndarray) -> None:
    least, greatest = RANGES[column.kind]
    # A comparison with a number that is not finite is false, so one of both fails for it.
    low, high = values.min(), values.max()
    if not (least <= low and high <= greatest and math.isfinite(low) and math.isfinite(high)):
        raise StoreError(f"{column.name}: {column.kind.rule}")


def _check_lengths(rows: Rows) -> None:
    lengths = rows.lengths("token_ids")
    prompts = rows.numbers("prompt_length")
    if not ((prompts > 0) & (prompts <= lengths)).all():
        raise StoreError("prompt_length: must lie inside token_ids")
    for name in ("entropy", "kl", "llm_top_rank"):
        scored = rows.lengths(name)
        if not ((scored == 0) | (scored == lengths - prompts)).all():
            raise StoreError("entropy, kl, llm_top_rank: one value per answer token, or none")
    positions = rows.of_labels("position")
    if not ((positions > 0) & (positions <= np.repeat(lengths, rows.label_counts))).all():
        raise StoreError("position: must lie inside token_ids")
    counts = rows.label_lengths("candidate_ids")
    for name in ("slm_log_probs", "llm_log_probs"):
        if not (counts.all() and (rows.label_lengths(name) == counts).all()):
            raise StoreError(
                "candidate_ids, slm_log_probs, llm_log_probs: empty or of different lengths"
            )


def check_rows_sense(rows: Rows) -> None:
    """`check_sense` for rows that passed `check_rows`.

    Raises:
        StoreError: the values of some label do not go together.
    """
    counts = rows.label_lengths("candidate_ids").astype(np.int64)
    if not len(counts):
        return
    ids = rows.label_values("candidate_ids").astype(np.int64)
    of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    if counts.max() > SUPPORT_SIZE or _has_twins(ids, of, within):
        raise StoreError(f"candidate_ids: must be at most {SUPPORT_SIZE}, each once")
    log_probs = [rows.label_values(name).max() for name in ("slm_log_probs", "llm_log_probs")]
    if max(*log_probs, rows.of_labels("mass").max() - 1) > ROUNDING:
        raise StoreError("slm_log_probs, llm_log_probs, mass: must be of probabilities up to 1")
    ranks = rows.of_labels("llm_top_rank")
    places = np.full(len(counts), -1)
    (found,) = np.nonzero(ids == rows.of_labels("llm_top_id")[of])
    places[of[found]] = within[found]
    beyond = (ranks == -1) | (ranks >= counts)
    if not np.where(places >= 0, ranks == places, beyond).all():
        raise StoreError("llm_top_rank: must be the place of llm_top_id among the candidates")


def _has_twins(ids: np.ndarray, of: np.ndarray, within: np.ndarray) -> bool:
    """Whether a label has an id twice. of, within: the label of each id, and its place there."""
    padding = -1 - np.arange(within.max() + 1)
    table = np.tile(padding, (of[-1] + 1, 1))
    table[of, within] = ids
    table.sort(axis=1)
    return bool((table[:, 1:] == table[:, :-1]).any())
