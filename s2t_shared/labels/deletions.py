"""What was deleted from the lake, as hashes. It also keeps out what is still on its way there."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2t_shared.errors import StoreError
from s2t_shared.labels.rows import Rows

DELETABLE = ("problem_id", "request_id", "task")


@dataclass(frozen=True)
class Deletion:
    """Deletes the rollouts made until `at` (Unix seconds) whose `field` (one of DELETABLE) has a
    value with this SHA-256."""

    field: str
    sha256: str
    at: float

    @classmethod
    def of(cls, field: str, value: str) -> Deletion:
        """A deletion of what was made until now."""
        assert field in DELETABLE
        return cls(field, _sha256(value), time.time())

    def matches(self, rows: Rows) -> np.ndarray:
        """[rows] bool: which of them it deletes.

        Hashes the values of rows as old as it only: few, unless labels were long on their way.
        """
        matching = rows.numbers("created_at") <= self.at
        numbers = np.flatnonzero(matching)
        values = rows.column(self.field).take(pa.array(numbers)).to_pylist()
        matching[numbers] = [_sha256(value) == self.sha256 for value in values]
        return matching


def _sha256(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def read_deletions(path: Path) -> list[Deletion]:
    """Read a file of deletions, one a line; none where there is no file.

    Raises:
        StoreError: a line is damaged. (A torn last line was never promised to anybody.)
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith(b"}"):
        lines.pop()
    return [_read_deletion(line, number) for number, line in enumerate(lines, 1) if line]


def _read_deletion(line: bytes, number: int) -> Deletion:
    try:
        deletion = Deletion(**json.loads(line))
        _check(deletion)
    except (ValueError, TypeError):
        raise StoreError(
            f"line {number} of deleted.jsonl in the lake is damaged, so what it kept out cannot be "
            "told; remove the line, and delete again what it stood for"
        ) from None
    return deletion


def _check(deletion: Deletion) -> None:
    """Raises ValueError: a value is impossible."""
    if deletion.field not in DELETABLE:
        raise ValueError("field")
    if not isinstance(deletion.sha256, str):
        raise ValueError("sha256")
    if not isinstance(deletion.at, int | float):
        raise ValueError("at")
