"""Finds, among thousands of contexts that were read, those with the longest beginning of another.

Contexts are cut into blocks. A block's key is a hash of the block and of all before it, as in
vLLM's prefix cache: a look-up costs one step a block, not one a context.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Generic, Protocol, TypeVar

BLOCK_TOKENS = 16
MAX_FOUND = 64  # of thousands that begin with the same blocks, the latest are compared by token


class Context(Protocol):
    """token_ids: what was read. adapter_key: the adapter that read them; None: the base model."""

    token_ids: list[int]

    @property
    def adapter_key(self) -> Hashable: ...


AnyContext = TypeVar("AnyContext", bound=Context)


class PrefixIndex(Generic[AnyContext]):
    """Contexts by their blocks. Their ids must not change while they are in it."""

    def __init__(self) -> None:
        self._by_block: dict[int, dict[AnyContext, None]] = {}

    def add(self, context: AnyContext) -> None:
        for key in _block_keys(context.adapter_key, context.token_ids):
            self._by_block.setdefault(key, {})[context] = None

    def remove(self, context: AnyContext) -> None:
        for key in _block_keys(context.adapter_key, context.token_ids):
            contexts = self._by_block[key]
            del contexts[context]
            if not contexts:
                del self._by_block[key]

    def find(self, adapter_key: Hashable, token_ids: Sequence[int]) -> Iterator[AnyContext]:
        """The contexts that share the most blocks with `token_ids`, the latest first."""
        found: dict[AnyContext, None] = {}
        for key in _block_keys(adapter_key, token_ids):
            contexts = self._by_block.get(key)
            if contexts is None:
                break
            found = contexts
        return islice(reversed(found), MAX_FOUND)


def _block_keys(adapter_key: Hashable, token_ids: Sequence[int]) -> Iterator[int]:
    """A key for each whole block, which tells it and all before it."""
    key = hash(adapter_key)
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        key = hash((key, tuple(token_ids[end - BLOCK_TOKENS : end])))
        yield key
