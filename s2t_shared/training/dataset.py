"""Rollouts as training sequences, called trees: which of them train, validate and test, and in what
order they stream.

A tree is a rollout with its labelled positions; its tokens count up to the last of these. An epoch
streams: shards in a seeded order, a shuffle buffer, a window that is sorted by length to limit
padding. What stays in memory of all labels is hashes, by which none comes twice: about 60 bytes a
label.

Knows labels; no models.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.label import Label, Rollout
from s2t_shared.labels.shards import Shard, Snapshot
from s2t_shared.splits import check_split

Source = Snapshot | Sequence[Rollout]
BUFFER = 2048  # trees; of an epoch no more are in memory, beside one window
WINDOW = 16  # batches sorted by length together
LEAST_TRAINING_LABELS = 8


class Part(str, Enum):
    """What a rollout is for. The held-out tenth of all problems is halved: when to stop, the best
    weights and lambda are chosen on `VALIDATION`; what is reported and gated is measured on `TEST`,
    which had no say in anything."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


def part_of(rollout: Rollout) -> Part:
    """By problem, by hash: stable when the lake grows, and no problem is in two parts."""
    if not rollout.held_out:
        return Part.TRAINING
    digest = hashlib.sha256(f"half/{rollout.task}/{rollout.problem}".encode()).digest()
    return Part.VALIDATION if digest[0] < 128 else Part.TEST


def tree_length(tree: Rollout) -> int:
    """Tokens before the last labelled position: nothing behind it is ever looked at."""
    return max(label.position for label in tree.labels)


class TrainingData:
    """What one run reads of `source`: the rollouts of this SLM and of the LLM that made most of its
    labels. `weigh`: a label's weight in the loss; 0 drops it from training (held-out labels are all
    kept, so that figures of different settings are about the same labels). A prompt that is held
    out anywhere, under whatever task or id, never trains.

    validation, test: at most `held_out_labels` labels each, chosen by hash, sorted by length.
    labels: how many train. skipped: labels of other SLMs or LLMs. newest: when the newest of all
    rollouts was made, Unix seconds.

    Raises: StoreError: too few labels. ConfigError: all are of another SLM. EvaluationSplitError: a
        rollout comes from an evaluation split.
    """

    def __init__(
        self,
        source: Source,
        slm_digest: str,
        weigh: Callable[[Label], float],
        batch_labels: int = 64,
        held_out_labels: int = 4096,
        seed: int = 0,
    ) -> None:
        self._source, self._weigh, self._batch_labels, self._seed = (
            source,
            weigh,
            batch_labels,
            seed,
        )
        chosen = {Part.VALIDATION: _Chosen(held_out_labels), Part.TEST: _Chosen(held_out_labels)}
        self._held_out: set[int] = (
            set()
        )  # hashes of label ids and prompts; of all, not only of the chosen ones
        pairs = _pairs(source)
        self._pair = slm_digest, self.llm_digest = slm_digest, _llm_of(pairs, slm_digest)
        self.skipped, self.newest = pairs.total() - pairs[self._pair], 0.0
        for rollout in _read(source):
            check_split(rollout.split)
            self.newest = max(self.newest, rollout.created_at)
            part = part_of(rollout)
            if self._is_ours(rollout) and rollout.labels and part is not Part.TRAINING:
                chosen[part].add(rollout)
                self._held_out.update(hash(label.label_id) for label in rollout.labels)
                self._held_out.add(_prompt(rollout))
        self.validation, self.test = chosen[Part.VALIDATION].trees(), chosen[Part.TEST].trees()
        self.labels = sum(len(tree.labels) for tree in self._training(_read(source)))
        if self.labels < LEAST_TRAINING_LABELS or not self.validation or not self.test:
            raise StoreError(
                f"{self.labels} training labels, {count_labels(self.validation)} to validate and "
                f"{count_labels(self.test)} to test are too few to train on (at least {LEAST_TRAINING_LABELS}, 1, 1, "
                "after the filters of teacher_margin and min_mass); harvest more problems"
            )

    def epoch(self, number: int) -> Iterator[list[Rollout]]:
        """Batches of about `batch_labels` labels. The same for the same source, seed and number,
        whoever asks."""
        order = random.Random(f"{self._seed}/{number}")
        shuffled = _shuffle(self._training(_read(self._source, order)), order)
        for window in _windows(shuffled, self._batch_labels * WINDOW):
            window.sort(key=lambda tree: (tree_length(tree), tree.rollout_id))
            batches = list(_windows(iter(window), self._batch_labels))
            order.shuffle(batches)
            yield from batches

    def _training(self, rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
        for rollout in rollouts:
            if (
                not self._is_ours(rollout)
                or part_of(rollout) is not Part.TRAINING
                or _prompt(rollout) in self._held_out
            ):
                continue
            kept = tuple(
                label
                for label in rollout.labels
                if hash(label.label_id) not in self._held_out and self._weigh(label) > 0
            )
            if kept:
                yield replace(rollout, labels=kept)

    def _is_ours(self, rollout: Rollout) -> bool:
        return (rollout.slm_digest, rollout.llm_digest) == self._pair


def count_labels(trees: Iterable[Rollout]) -> int:
    return sum(len(tree.labels) for tree in trees)


class _Chosen:
    """The trees with the smallest hashes that together have about `limit` labels at most."""

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0
        self._heap: list[tuple[int, str, Rollout]] = []  # the largest hash first

    def add(self, tree: Rollout) -> None:
        digest = hashlib.sha256(f"chosen/{tree.rollout_id}".encode()).digest()
        heapq.heappush(self._heap, (-int.from_bytes(digest[:8], "big"), tree.rollout_id, tree))
        self._count += len(tree.labels)
        while self._count > self._limit and len(self._heap) > 1:
            self._count -= len(heapq.heappop(self._heap)[2].labels)

    def trees(self) -> tuple[Rollout, ...]:
        return tuple(
            sorted(
                (tree for _, _, tree in self._heap),
                key=lambda tree: (tree_length(tree), tree.rollout_id),
            )
        )


def _pairs(source: Source) -> Counter[tuple[str, str]]:
    """Labels by (SLM, LLM) digest."""
    if isinstance(source, Snapshot):
        return source.pairs()
    pairs: Counter[tuple[str, str]] = Counter()
    for rollout in source:
        pairs[rollout.slm_digest, rollout.llm_digest] += len(rollout.labels)
    return pairs


def _llm_of(pairs: Counter[tuple[str, str]], slm_digest: str) -> str:
    """The LLM that made most of this SLM's labels; the same for whoever asks."""
    ours = {llm: labels for (slm, llm), labels in pairs.items() if slm == slm_digest}
    if pairs and not ours:
        raise ConfigError(
            f"the labels were made with another SLM (digest {pairs.most_common(1)[0][0][0]}, this one is "
            f"{slm_digest}); harvest with this SLM"
        )
    return max(sorted(ours), key=lambda llm: ours[llm], default="")


def _prompt(rollout: Rollout) -> int:
    return hash(rollout.token_ids[: rollout.prompt_length])


def _read(source: Source, order: random.Random | None = None) -> Iterator[Rollout]:
    if not isinstance(source, Snapshot):
        return iter(source)

    def shuffled(shards: list[Shard]) -> list[Shard]:
        if order is not None:
            order.shuffle(shards)
        return shards

    return source.rollouts(shuffled)


def _shuffle(trees: Iterator[Rollout], order: random.Random) -> Iterator[Rollout]:
    """Random order within a buffer: each tree that comes in pushes out one at random."""
    buffer: list[Rollout] = []
    for tree in trees:
        if len(buffer) < BUFFER:
            buffer.append(tree)
            continue
        place = order.randrange(BUFFER)
        buffer[place], tree = tree, buffer[place]
        yield tree
    order.shuffle(buffer)
    yield from buffer


def _windows(trees: Iterator[Rollout], labels: int) -> Iterator[list[Rollout]]:
    """Runs of trees with about `labels` labels, the last one smaller."""
    window: list[Rollout] = []
    size = 0
    for tree in trees:
        window.append(tree)
        size += len(tree.labels)
        if size >= labels:
            yield window
            window, size = [], 0
    if window:
        yield window
