"""Stream entries that were refused: found again, deleted, or sent once more.

They hold users' text as the labels do, so what deletes labels must reach them too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from s2t_shared.labels.deletions import DELETABLE
from s2t_shared.labels.stream import Entry, LabelStream

PAGE = 200


@dataclass(frozen=True)
class DeadLetter:
    """One refused entry."""

    entry: Entry

    @property
    def reason(self) -> str:
        return self.entry.fields.get(b"reason", b"").decode(errors="replace")

    @property
    def refused_at(self) -> float:
        """Unix seconds, by Redis' clock."""
        return int(self.entry.entry_id.partition(b"-")[0]) / 1000

    @property
    def text(self) -> bytes:
        """What should have been a rollout."""
        return self.entry.fields.get(b"rollout", b"")

    @cached_property
    def _row(self) -> dict[str, Any] | None:
        with suppress(ValueError, RecursionError):
            row = json.loads(self.text)
            return row if isinstance(row, dict) else None
        return None

    def matches(self, field: str, value: str) -> bool:
        """Whether `field` (one of DELETABLE) is `value`; in an entry that cannot be read, whether
        the value occurs in it at all."""
        assert field in DELETABLE
        if self._row is None:
            return any(value.encode() in content for content in self.entry.fields.values())
        return bool(self._row.get(field) == value)

    def is_older(self, age_s: float) -> bool:
        return self.refused_at < time.time() - age_s


def read_dead_letters(stream: LabelStream) -> Iterator[DeadLetter]:
    """All dead letters, oldest first.

    Raises:
        StoreError: Redis cannot be used.
    """
    last = b"-"
    while page := stream.dead_letters(last, PAGE):
        yield from map(DeadLetter, page)
        last = b"(" + page[-1].entry_id


def delete_dead_letters(stream: LabelStream, wanted: Callable[[DeadLetter], bool]) -> int:
    """Delete dead letters, also from the disk of the server. Returns how many.

    Raises:
        StoreError: Redis cannot be used.
    """
    deleted = 0
    for page in _pages(letter for letter in read_dead_letters(stream) if wanted(letter)):
        deleted += stream.remove_dead_letters([letter.entry.entry_id for letter in page])
    if deleted:
        stream.rewrite_log()
    return deleted


def requeue(stream: LabelStream, letters: Iterable[DeadLetter]) -> int:
    """Send dead letters to the drain once more. Returns how many.

    Raises:
        StoreError: Redis cannot be used.
    """
    count = 0
    for page in _pages(letters):
        stream.append([letter.text for letter in page])
        count += stream.remove_dead_letters([letter.entry.entry_id for letter in page])
    return count


def _pages(letters: Iterable[DeadLetter]) -> Iterator[Sequence[DeadLetter]]:
    page: list[DeadLetter] = []
    for letter in letters:
        page.append(letter)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page
