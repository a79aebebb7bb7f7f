"""Rollouts as training data: which of them train, validate and test, and in what order they stream.

An epoch streams: shards in a seeded order, a shuffle buffer, then windows sorted by length, which
limits padding. In memory stay two hashes per label, about 80 bytes in all.

Knows labels; no models.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.shards import Shard, Snapshot
from s2t_shared.splits import check_split
from s2t_shared.training.losses import label_weight
from s2t_shared.training.settings import TrainingSettings

Source = Snapshot | Sequence[Rollout]
BUFFER = 2048  # rollouts; of an epoch no more are in memory, beside one window
WINDOW = 16  # batches that are sorted by length together
MIN_TRAINING_LABELS = 8


class Part(str, Enum):
    """What a rollout is for.

    The held-out tenth of all groups of problems is halved. `VALIDATION` decides when to stop, the
    best weights and lambda. `TEST` is what is reported and gated; it decides nothing before.
    """

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


def part_of(rollout: Rollout) -> Part:
    """By a hash of the group: stable when the lake grows, and no group is in two parts."""
    if not rollout.held_out:
        return Part.TRAINING
    digest = hashlib.sha256(f"half/{rollout.task}/{rollout.split_group}".encode()).digest()
    return Part.VALIDATION if digest[0] < 128 else Part.TEST


def context_length(rollout: Rollout) -> int:
    """Tokens before the last labelled position: later ones are never read."""
    return max(label.position for label in rollout.labels)


def count_labels(rollouts: Iterable[Rollout]) -> int:
    """Labels of all rollouts together."""
    return sum(len(rollout.labels) for rollout in rollouts)


class TrainingData:
    """What one run reads of `source`: rollouts of this SLM and of the LLM of most of its labels.

    A label of weight 0 does not train. Held-out labels are all kept, so that figures of different
    settings are about the same labels. A prompt that is held out anywhere, under whatever task or
    id, never trains.

    validation, test: at most `settings.held_out_labels` labels each, chosen by hash, sorted by
    length. labels: how many train. skipped: labels of other SLMs or LLMs. newest: when the newest
    of all rollouts was made, Unix seconds.

    Raises:
        StoreError: there are too few labels.
        ConfigError: all labels are of another SLM.
        EvaluationSplitError: a rollout comes from an evaluation split.
    """

    def __init__(self, source: Source, slm_digest: str, settings: TrainingSettings) -> None:
        self._source = source
        self._settings = settings
        pairs = _labels_by_pair(source)
        self.llm_digest = _llm_of(pairs, slm_digest)
        self._pair = (slm_digest, self.llm_digest)
        self.skipped = pairs.total() - pairs[self._pair]
        self.newest = 0.0
        # Hashes of the label ids and prompts of all held-out rollouts, chosen or not.
        self._held_out: set[int] = set()
        self.labels = self._read_all()
        if self.labels < MIN_TRAINING_LABELS or not self.validation or not self.test:
            raise StoreError(
                f"{self.labels} training labels, {count_labels(self.validation)} to validate and "
                f"{count_labels(self.test)} to test are too few to train on (at least "
                f"{MIN_TRAINING_LABELS}, 1, 1, after the filters of teacher_margin and min_mass); "
                "harvest more problems"
            )

    def _read_all(self) -> int:
        """Read the source once: choose what is held out; returns how many labels train."""
        limit = self._settings.held_out_labels
        chosen = {Part.VALIDATION: _SmallestHashes(limit), Part.TEST: _SmallestHashes(limit)}
        # Of every label that may train; what is held out is known only in the end.
        prompts, labels = array("q"), array("q")
        for rollout in _read(self._source):
            check_split(rollout.split)
            self.newest = max(self.newest, rollout.created_at)
            if not self._is_of_pair(rollout) or not rollout.labels:
                continue
            prompt = _prompt_hash(rollout)
            part = part_of(rollout)
            if part is Part.TRAINING:
                for label in rollout.labels:
                    if label_weight(label, self._settings) > 0:
                        prompts.append(prompt)
                        labels.append(hash(label.label_id))
                continue
            chosen[part].add(rollout)
            self._held_out.add(prompt)
            self._held_out.update(hash(label.label_id) for label in rollout.labels)
        self.validation = chosen[Part.VALIDATION].rollouts()
        self.test = chosen[Part.TEST].rollouts()
        held_out = self._held_out
        training = zip(prompts, labels, strict=True)
        return sum(p not in held_out and label not in held_out for p, label in training)

    def epoch(self, number: int) -> Iterator[list[Rollout]]:
        """Batches of about `settings.batch_labels` labels.

        The same for the same source, seed and number, whoever asks.
        """
        size = self._settings.batch_labels
        order = random.Random(f"{self._settings.seed}/{number}")
        shuffled = _shuffle(self._training(_read(self._source, order)), order)
        for window in _windows(shuffled, size * WINDOW):
            window.sort(key=_by_length)
            batches = list(_windows(iter(window), size))
            order.shuffle(batches)
            yield from batches

    def _training(self, rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
        """Those that train, each with its training labels only."""
        for rollout in rollouts:
            if not self._is_of_pair(rollout) or part_of(rollout) is not Part.TRAINING:
                continue
            if _prompt_hash(rollout) in self._held_out:
                continue
            labels = []
            for label in rollout.labels:
                held_out = hash(label.label_id) in self._held_out
                if not held_out and label_weight(label, self._settings) > 0:
                    labels.append(label)
            if labels:
                yield replace(rollout, labels=tuple(labels))

    def _is_of_pair(self, rollout: Rollout) -> bool:
        return (rollout.slm_digest, rollout.llm_digest) == self._pair


class _SmallestHashes:
    """The rollouts with the smallest hashes that together have about `limit` labels at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._heap: list[tuple[int, str, Rollout]] = []  # the largest hash first

    def add(self, rollout: Rollout) -> None:
        digest = hashlib.sha256(f"chosen/{rollout.rollout_id}".encode()).digest()
        number = int.from_bytes(digest[:8], "big")
        heapq.heappush(self._heap, (-number, rollout.rollout_id, rollout))
        self._count += len(rollout.labels)
        while self._count > self._limit and len(self._heap) > 1:
            _, _, dropped = heapq.heappop(self._heap)
            self._count -= len(dropped.labels)

    def rollouts(self) -> tuple[Rollout, ...]:
        """Sorted by length."""
        return tuple(sorted((rollout for _, _, rollout in self._heap), key=_by_length))


def _by_length(rollout: Rollout) -> tuple[int, str]:
    return context_length(rollout), rollout.rollout_id


def _prompt_hash(rollout: Rollout) -> int:
    return hash(rollout.token_ids[: rollout.prompt_length])


# -- whose labels ---------------------------------------------------------------------------------


def _labels_by_pair(source: Source) -> Counter[tuple[str, str]]:
    """Number of labels by (SLM, LLM) digest."""
    if isinstance(source, Snapshot):
        return source.pairs()
    pairs: Counter[tuple[str, str]] = Counter()
    for rollout in source:
        pairs[rollout.slm_digest, rollout.llm_digest] += len(rollout.labels)
    return pairs


def _llm_of(pairs: Counter[tuple[str, str]], slm_digest: str) -> str:
    """The LLM that made most of this SLM's labels; the same for whoever asks."""
    labels_of = {llm: labels for (slm, llm), labels in pairs.items() if slm == slm_digest}
    if pairs and not labels_of:
        (other_slm, _), _ = pairs.most_common(1)[0]
        raise ConfigError(
            f"the labels were made with another SLM (digest {other_slm}, this one is "
            f"{slm_digest}); harvest with this SLM"
        )
    return max(sorted(labels_of), key=lambda llm: labels_of[llm], default="")


# -- order ----------------------------------------------------------------------------------------


def _read(source: Source, order: random.Random | None = None) -> Iterator[Rollout]:
    """order: rearranges the shards of a snapshot."""
    if not isinstance(source, Snapshot):
        return iter(source)

    def shuffled(shards: list[Shard]) -> list[Shard]:
        if order is not None:
            order.shuffle(shards)
        return shards

    return source.rollouts(shuffled)


def _shuffle(rollouts: Iterator[Rollout], order: random.Random) -> Iterator[Rollout]:
    """Random order within a buffer: each rollout that comes in pushes out one at random."""
    buffer: list[Rollout] = []
    for rollout in rollouts:
        if len(buffer) < BUFFER:
            buffer.append(rollout)
            continue
        index = order.randrange(BUFFER)
        yield buffer[index]
        buffer[index] = rollout
    order.shuffle(buffer)
    yield from buffer


def _windows(rollouts: Iterator[Rollout], labels: int) -> Iterator[list[Rollout]]:
    """Runs of rollouts with about `labels` labels, the last one smaller."""
    window: list[Rollout] = []
    size = 0
    for rollout in rollouts:
        window.append(rollout)
        size += len(rollout.labels)
        if size >= labels:
            yield window
            window = []
            size = 0
    if window:
        yield window
