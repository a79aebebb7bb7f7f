"""Rollouts as training data: which of them train, validate and test, and in what order they stream.

To begin, some short columns of the snapshot are read: keys of 64 bits, parts, digests. An epoch
takes shards in a seeded order, two at a time, mixes their row groups, and of those some thousand
rollouts; windows of these are sorted by length, which limits padding. Rollouts become objects when
their batch is due. In memory stay the keys of what is held out, and what is being mixed.

Several workers read the same epoch, each all of it, and share a batch among them: reading is cheap
beside training. Not by Ray Data's `streaming_split`: who gets which block there depends on who asks
first, and an iterator cannot begin at the batch where a killed run was.

Knows labels; no models.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.keys import Keys, ascending, is_among, mixed
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.rows import LABEL_KEY, LABELS, PART, PROMPT_KEY, SCHEMA, Rows
from s2t_shared.labels.snapshots import Snapshot
from s2t_shared.splits import PARTS, Part, check_split, part_of_group
from s2t_shared.training.losses import label_weights
from s2t_shared.training.settings import TrainingSettings

Source = Snapshot | Sequence[Rollout]
BUFFER = 2048  # rollouts that are mixed with one another
SHARDS_AT_ONCE = 2
WINDOW = 16  # batches that are sorted by length together
MIN_TRAINING_LABELS = 8
KEY_COLUMNS = (
    "rollout_id",
    "split",
    "slm_digest",
    "llm_digest",
    PROMPT_KEY,
    PART,
    f"{LABELS}.{LABEL_KEY}",
)
WEIGHT_COLUMNS = (f"{LABELS}.mass", f"{LABELS}.llm_log_probs")


def part_of(rollout: Rollout) -> Part:
    """By a hash of the group: stable when the lake grows, and no group is in two parts."""
    return part_of_group(rollout.task, rollout.split_group)


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
        self._settings = settings
        self._data: _Shards | _InMemory
        self._data = _Shards(source) if isinstance(source, Snapshot) else _InMemory(source)
        self.newest = self._data.newest
        pairs = Counter[tuple[str, ...]]()
        held_out: list[tuple[np.ndarray, Rows]] = []  # of each shard: their numbers, their keys
        for rows in self._data.each(KEY_COLUMNS):
            for split in rows.distinct("split"):
                check_split(split)
            pairs += rows.labels_by("slm_digest", "llm_digest")
            chosen = (rows.numbers(PART) != 0) & (rows.label_counts > 0)
            held_out.append((np.flatnonzero(chosen), rows.where(chosen)))
        self.llm_digest = _llm_of(pairs, slm_digest)
        self._pair = (slm_digest, self.llm_digest)
        self.skipped = pairs.total() - pairs[self._pair]
        self._held_prompts, self._held_labels = self._find_held_out(held_out)
        parts = (Part.VALIDATION, Part.TEST)
        self._chosen = {part: self._choose(held_out, part) for part in parts}
        if not all(self._chosen.values()) or not self._has_enough():
            raise StoreError(
                f"{self.labels} training labels, {self._chosen_labels(Part.VALIDATION)} to "
                f"validate and {self._chosen_labels(Part.TEST)} to test are too few to train on "
                f"(at least {MIN_TRAINING_LABELS}, 1, 1, after the filters of teacher_margin and "
                "min_mass); harvest more problems"
            )

    # -- what is held out -------------------------------------------------------------------------

    def _find_held_out(self, held_out: Iterable[tuple[np.ndarray, Rows]]) -> tuple[Keys, Keys]:
        """Keys of the prompts and of the labels of all held-out rollouts, ascending."""
        prompts, labels = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for _, rows in held_out:
            of_pair = rows.where(self._is_of_pair(rows))
            prompts.append(of_pair.numbers(PROMPT_KEY))
            labels.append(of_pair.of_labels(LABEL_KEY))
        return ascending(np.concatenate(prompts)), ascending(np.concatenate(labels))

    def _choose(self, held_out: Iterable[tuple[np.ndarray, Rows]], part: Part) -> list[_Place]:
        """The rollouts of a part with the smallest hashes that together have about
        `settings.held_out_labels` labels at most."""
        hashes, places = [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int64)]
        for shard, (numbers, rows) in enumerate(held_out):
            wanted = (rows.numbers(PART) == PARTS.index(part)) & self._is_of_pair(rows)
            hashes.append(mixed(rows.keys("rollout_id")[wanted]))
            shards = np.full(len(rows), shard)
            places.append(np.stack([shards, numbers, rows.label_counts], axis=1)[wanted])
        ordered = np.concatenate(places)[np.argsort(np.concatenate(hashes), kind="stable")]
        labels = np.cumsum(ordered[:, 2])
        fit = int(np.searchsorted(labels, self._settings.held_out_labels, "right"))
        return [_Place(*place) for place in ordered[: max(1, fit)].tolist()]

    def _chosen_labels(self, part: Part) -> int:
        return sum(place.labels for place in self._chosen[part])

    @cached_property
    def validation(self) -> tuple[Rollout, ...]:
        return self._load(self._chosen[Part.VALIDATION])

    @cached_property
    def test(self) -> tuple[Rollout, ...]:
        return self._load(self._chosen[Part.TEST])

    def _load(self, places: Sequence[_Place]) -> tuple[Rollout, ...]:
        """Rollouts sorted by length."""
        rollouts: list[Rollout] = []
        for shard in sorted({place.shard for place in places}):
            numbers = np.array(sorted(p.number for p in places if p.shard == shard))
            for rows in self._data.pick(shard, numbers):
                rollouts += rows.rollouts()
        return tuple(sorted(rollouts, key=lambda r: (context_length(r), r.rollout_id)))

    # -- what trains ------------------------------------------------------------------------------

    def _is_of_pair(self, rows: Rows) -> np.ndarray:
        slm, llm = self._pair
        found: np.ndarray = rows.equal("slm_digest", slm) & rows.equal("llm_digest", llm)
        return found

    def _training(self, rows: Rows) -> Rows:
        """Those that train, each with its training labels only."""
        trains = self._is_of_pair(rows) & (rows.numbers(PART) == 0)
        trains &= ~is_among(rows.numbers(PROMPT_KEY), self._held_prompts)
        rows = rows.where(trains)
        weights = label_weights(
            rows.of_labels("mass"),
            rows.label_lengths("llm_log_probs"),
            rows.label_values("llm_log_probs"),
            self._settings,
        )
        held_out = is_among(rows.of_labels(LABEL_KEY), self._held_labels)
        rows = rows.with_labels_where((weights > 0) & ~held_out)
        return rows.where(rows.label_counts > 0)

    def _counts(self) -> Iterator[int]:
        """Numbers of training labels, shard by shard."""
        for rows in self._data.each([*KEY_COLUMNS, *WEIGHT_COLUMNS]):
            yield int(self._training(rows).label_counts.sum())

    @cached_property
    def labels(self) -> int:
        return sum(self._counts())

    def _has_enough(self) -> bool:
        """Looks no further than it must: a large lake need not be read to be enough."""
        count = 0
        for more in self._counts():
            count += more
            if count >= MIN_TRAINING_LABELS:
                return True
        return False

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Rollout]]:
        """Batches of about `settings.batch_labels` labels, from the `start`-th on.

        The same for the same source, seed and number, whoever asks.
        """
        size = self._settings.batch_labels
        order = random.Random(f"{self._settings.seed}/{number}")
        done = 0
        for window in _windows(self._mixed(order), size * WINDOW):
            lengths = window.label_ends("position")
            window = window.take(np.lexsort([window.keys("rollout_id"), lengths]))
            cuts = _cuts(window.label_counts, size)
            batches = list(zip(cuts, cuts[1:], strict=False))
            order.shuffle(batches)
            for first, end in batches:
                done += 1
                if done > start:
                    yield window.slice(first, end - first).rollouts()

    def _mixed(self, order: random.Random) -> Iterator[Rows]:
        """All that trains, BUFFER rollouts at a time, in random order among themselves."""
        waiting: list[Rows] = []
        for rows in self._data.shuffled(order):
            waiting.append(self._training(rows))
            if sum(map(len, waiting)) >= BUFFER:
                yield _shuffled(Rows.joined(waiting), order)
                waiting = []
        yield _shuffled(Rows.joined(waiting), order)


@dataclass(frozen=True)
class _Place:
    """Where a held-out rollout lies."""

    shard: int
    number: int
    labels: int


# -- whose labels ---------------------------------------------------------------------------------


def _llm_of(pairs: Counter[tuple[str, ...]], slm_digest: str) -> str:
    """The LLM that made most of this SLM's labels; the same for whoever asks."""
    labels_of = {llm: labels for (slm, llm), labels in pairs.items() if slm == slm_digest}
    if pairs and not labels_of:
        (other_slm, _), _ = pairs.most_common(1)[0]
        raise ConfigError(
            f"the labels were made with another SLM (digest {other_slm}, this one is "
            f"{slm_digest}); harvest with this SLM"
        )
    return max(sorted(labels_of), key=lambda llm: labels_of[llm], default="")


# -- where rollouts come from ---------------------------------------------------------------------


class _Shards:
    """A snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._reader: Reader = snapshot.reader()
        self.shards = len(self._reader.shards)
        self.newest = max((shard.last for shard in self._reader.shards), default=0.0)

    def each(self, names: Sequence[str]) -> Iterator[Rows]:
        """Columns of one shard after the other."""
        return self._reader.each(names)

    def pick(self, shard: int, numbers: np.ndarray) -> Iterator[Rows]:
        """Whole rows of a shard by their numbers among the distinct ones."""
        return self._reader.pick(shard, numbers)

    def shuffled(self, order: random.Random) -> Iterator[Rows]:
        """Runs of whole rows in random order."""
        shards = list(range(self.shards))
        order.shuffle(shards)
        for start in range(0, len(shards), SHARDS_AT_ONCE):
            groups = []
            for shard in shards[start : start + SHARDS_AT_ONCE]:
                self._reader.verify(shard)
                groups += [(shard, group) for group in range(self._reader.groups(shard))]
            order.shuffle(groups)
            for shard, group in groups:
                yield self._reader.read(shard, SCHEMA.names, [group])


class _InMemory:
    """Rollouts that a caller has."""

    shards = 1

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._rows = Rows.of(rollouts).completed()
        self.newest = max((rollout.created_at for rollout in rollouts), default=0.0)

    def each(self, names: Sequence[str]) -> Iterator[Rows]:
        yield self._rows

    def pick(self, shard: int, numbers: np.ndarray) -> Iterator[Rows]:
        yield self._rows.take(numbers)

    def shuffled(self, order: random.Random) -> Iterator[Rows]:
        starts = list(range(0, len(self._rows), BUFFER // 8))
        order.shuffle(starts)
        for start in starts:
            yield self._rows.slice(start, BUFFER // 8)


# -- order ----------------------------------------------------------------------------------------


def _shuffled(rows: Rows, order: random.Random) -> Rows:
    return rows.take(np.random.default_rng(order.getrandbits(64)).permutation(len(rows)))


def _windows(buffers: Iterable[Rows], labels: int) -> Iterator[Rows]:
    """Runs of rollouts with about `labels` labels, the last one smaller."""
    rest = Rows.joined([])
    for rows in buffers:
        rows = Rows.joined([rest, rows])
        cuts = _cuts(rows.label_counts, labels)
        for start, end in zip(cuts, cuts[1:-1], strict=False):
            yield rows.slice(start, end - start)
        rest = rows.slice(cuts[-2], len(rows) - cuts[-2]) if len(cuts) > 1 else rows
    if len(rest):
        yield rest


def _cuts(counts: np.ndarray, size: int) -> list[int]:
    """Where runs of `size` items, or a few more, begin and end: [0, ..., len(counts)]."""
    ends = np.cumsum(counts)
    cuts = [0]
    while cuts[-1] < len(counts):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cut = int(np.searchsorted(ends, before + size)) + 1
        cuts.append(min(cut, len(counts)))
    return cuts
