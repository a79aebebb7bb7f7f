"""Keys and values of many token sequences in one byte-bounded pool.

Knows tensors, rows and which ids a row has read; not what they mean. A *row* is one sequence's place. Rows of one
size class (columns, a power of two) lie together in a *page*; all pages of short rows have the same size, so a page
that falls empty can serve another class. Attention reads a page's rows in place, without a copy.

    acquire -> a row that already holds the longest prefix of the ids found in any other row (or nothing)
    release -> the row is kept, for the prefixes it holds, until its bytes are needed (least recently used first)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAGE_TOKENS = 8192
SMALLEST_ROW = 128
SHORTEST_REUSE = 16  # a shorter common prefix is cheaper to read again than to look after


@dataclass(frozen=True)
class KVShape:
    """One layer's key and value heads and widths: what one token costs there."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(eq=False)
class Page:
    """`layers`: per layer keys [rows, heads, columns, key_dim] and values [rows, heads, columns, value_dim]."""

    columns: int
    bytes: int
    layers: list[tuple[Tensor, Tensor]]
    rows: list[Row | None]

    @property
    def is_empty(self) -> bool:
        return not any(self.rows)


@dataclass(eq=False)
class Row:
    """`token_ids`: what has been read into columns 0.., in order, by `reader` (None: the base model; else an
    adapter). Columns behind them are scratch. `live`: in use; otherwise kept for reuse."""

    page: Page
    index: int
    reader: Hashable
    token_ids: list[int] = field(default_factory=list)
    live: bool = True
    used_at: int = 0

    @property
    def columns(self) -> int:
        return self.page.columns

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens; nothing is moved."""
        del self.token_ids[length:]


class KVPool:
    """Allocator and storage, at most `max_bytes` in all."""

    def __init__(self, shapes: Sequence[KVShape], dtype: torch.dtype, device: torch.device, max_bytes: int) -> None:
        self._shapes, self._dtype, self._device = list(shapes), dtype, device
        size = torch.empty(0, dtype=dtype).element_size()
        self.bytes_per_token = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes) * size
        self.max_bytes = max_bytes
        # A small budget gets small pages, so that several size classes fit side by side.
        self._page_tokens = min(PAGE_TOKENS, max(SMALLEST_ROW, _power_of_two(self.max_tokens // 16 + 1)))
        self._pages: list[Page] = []
        self._clock = 0

    # -- size -------------------------------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        return self.max_bytes // self.bytes_per_token

    @property
    def bytes(self) -> int:
        """Bytes held on the device now."""
        return sum(page.bytes for page in self._pages)

    @property
    def live_rows(self) -> int:
        return sum(row.live for row in self._all_rows())

    @property
    def kept_rows(self) -> int:
        return sum(not row.live for row in self._all_rows())

    def fits(self, columns: int, rows: int = 1) -> bool:
        """Whether `rows` rows of so many columns fit into the pool when nothing else is in it."""
        size = _size_class(columns)
        per_page = max(1, self._page_tokens // size)
        return -(-rows // per_page) * self._page_bytes(size) <= self.max_bytes

    def _page_bytes(self, size: int) -> int:
        return max(self._page_tokens, size) * self.bytes_per_token

    # -- rows -------------------------------------------------------------------------------------------------------

    def acquire(self, token_ids: Sequence[int], columns: int, reader: Hashable = None) -> Row | None:
        """A row for a sequence of up to `columns` tokens, holding as much of `token_ids` (never all of it: the last
        token's output is wanted) as any row of the same reader has read. None: no room now, try again later."""
        source, shared = self._longest_prefix(token_ids, reader)
        kept = source if source is not None and not source.live else None
        if kept is not None and kept.columns == _size_class(columns) and len(kept.token_ids) - shared <= SHORTEST_REUSE:
            return self._take(kept, shared)  # little of it is lost
        row = self._place(columns, reader, source)
        if row is not None:
            if source is not None:
                self._copy(source, row, shared)
            return row
        if kept is not None and kept.columns >= columns:  # no other room
            return self._take(kept, shared)
        if kept is None:
            return None
        self._evict(kept)  # what it holds is of no use where it stands in its own way
        return self.acquire(token_ids, columns, reader)

    def _take(self, row: Row, length: int) -> Row:
        row.truncate(length)
        row.live = True
        return self._touched(row)

    def catch_up(self, row: Row, token_ids: Sequence[int]) -> None:
        """Copy what another row has meanwhile read of `token_ids` and this one has not."""
        source, shared = self._longest_prefix(token_ids, row.reader)
        if source is not None and source is not row and shared >= len(row.token_ids) + SHORTEST_REUSE:
            self._copy(source, row, shared)

    def release(self, row: Row) -> None:
        """The sequence is over; the row stays for reuse until its bytes are needed."""
        assert row.live, "released twice"
        row.live = False
        if len(self._touched(row).token_ids) < SHORTEST_REUSE:
            self._evict(row)

    def clear(self) -> None:
        """Drop every kept row and every empty page."""
        for row in [r for r in self._all_rows() if not r.live]:
            self._evict(row)
        self._pages = [page for page in self._pages if not page.is_empty]

    def check(self) -> None:
        """The integrity check: storage within the bound, every row where its page says it is, nothing read beyond a
        row's end. Raises AssertionError: a bug of ours."""
        assert self.bytes <= self.max_bytes, f"{self.bytes} bytes held, {self.max_bytes} allowed"
        for page in self._pages:
            rows, _, columns, _ = page.layers[0][0].shape
            assert (rows, columns) == (len(page.rows), page.columns)
            for index, row in enumerate(page.rows):
                if row is not None:
                    assert row.page is page and row.index == index, "two owners of one place"
                    assert len(row.token_ids) <= page.columns, "read beyond the row's end"

    # -- inside -----------------------------------------------------------------------------------------------------

    def _all_rows(self) -> Iterator[Row]:
        return (row for page in self._pages for row in page.rows if row is not None)

    def _touched(self, row: Row) -> Row:
        self._clock += 1
        row.used_at = self._clock
        return row

    def _longest_prefix(self, token_ids: Sequence[int], reader: Hashable) -> tuple[Row | None, int]:
        ids = list(token_ids[:-1])
        best, most = None, SHORTEST_REUSE - 1
        for row in self._all_rows():
            if row.reader == reader and row.token_ids[:SHORTEST_REUSE] == ids[:SHORTEST_REUSE]:
                shared = common_prefix(row.token_ids, ids)
                if shared > most or (shared == most and best is not None and best.live and not row.live):
                    best, most = row, shared
        return best, most

    def _place(self, columns: int, reader: Hashable, keep: Row | None) -> Row | None:
        """A free place of the right size, evicting kept rows (but not `keep`) where that makes one."""
        size = _size_class(columns)
        while True:
            for page in self._pages:
                if page.columns == size and None in page.rows:
                    row = Row(page, page.rows.index(None), reader)
                    page.rows[row.index] = row
                    return self._touched(row)
            if self._make_room(self._page_bytes(size)):
                self._pages.append(self._new_page(size))
                continue
            for row in self._least_useful(size, keep):
                self._evict(row)
                break
            else:
                return None

    def _least_useful(self, size: int, keep: Row | None) -> Iterator[Row]:
        """Kept rows whose eviction leads to a place of this size: one of the size frees a place at once; others only
        together, where dropping whole pages makes room for a new one."""
        kept = sorted((r for r in self._all_rows() if not r.live and r is not keep), key=lambda row: row.used_at)
        yield from (row for row in kept if row.columns == size)
        idle = [page for page in self._pages if not any(r is not None and (r.live or r is keep) for r in page.rows)]
        if self.bytes - sum(page.bytes for page in idle) + self._page_bytes(size) <= self.max_bytes:
            yield from (row for row in kept if row.page in idle)

    def _make_room(self, needed: int) -> bool:
        """Whether a new page fits, dropping empty pages if it does not otherwise."""
        while self.bytes + needed > self.max_bytes:
            empty = next((page for page in self._pages if page.is_empty), None)
            if empty is None:
                return False
            self._pages.remove(empty)
        return True

    def _new_page(self, size: int) -> Page:
        rows = max(1, self._page_tokens // size)

        def storage(heads: int, dim: int) -> Tensor:
            # Zeros, not empty: a masked column has weight 0, and 0 * NaN is NaN.
            return torch.zeros(rows, heads, size, dim, dtype=self._dtype, device=self._device)

        layers = [(storage(s.heads, s.key_dim), storage(s.heads, s.value_dim)) for s in self._shapes]
        return Page(size, self._page_bytes(size), layers, [None] * rows)

    def _evict(self, row: Row) -> None:
        assert not row.live and row.page.rows[row.index] is row
        row.page.rows[row.index] = None

    def _copy(self, source: Row, target: Row, length: int) -> None:
        start = min(common_prefix(target.token_ids, source.token_ids), length)
        for (from_k, from_v), (to_k, to_v) in zip(source.page.layers, target.page.layers, strict=True):
            to_k[target.index, :, start:length] = from_k[source.index, :, start:length]
            to_v[target.index, :, start:length] = from_v[source.index, :, start:length]
        target.token_ids = source.token_ids[:length]
        self._touched(source)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix, by comparing slices (at C speed)."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def will_hold_more(token_ids: Sequence[int], row: Row, other: Row, other_ids: Sequence[int]) -> bool:
    """Whether `other`, which is reading `other_ids`, will hold clearly more of `token_ids` than `row` does."""
    return other.reader == row.reader and (common_prefix(list(token_ids[:-1]), list(other_ids))
                                           >= len(row.token_ids) + SHORTEST_REUSE)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _size_class(columns: int) -> int:
    return max(SMALLEST_ROW, _power_of_two(columns))
