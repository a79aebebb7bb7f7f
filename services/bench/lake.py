"""`s2t bench lake`: the label lake against plain pyarrow, side by side in one run.

The lake is made up: random numbers compress badly, as real log-probabilities do. Statistics stand
against a plain read of the same columns, checking against hashing the files, an export against
copying them through Arrow. The first training batch is measured in processes of their own, for
their memory; drains are processes on one Redis.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.synchronize
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2t_shared.labels.drain import Drain
from s2t_shared.labels.export import export_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.packed import pack
from s2t_shared.labels.rows import ROLLOUT_SCHEMA, SCHEMA, Rows
from s2t_shared.labels.stats import COLUMNS, measure_labels
from s2t_shared.labels.stream import LabelStream
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.settings import TrainingSettings
from services.bench.measure import Figure, Report, clock, figure, ratios, take_turns
from services.launch.redis_server import open_redis

LABELS, PROMPT, ANSWER, K = 20, 48, 160, 16  # of a rollout; K of a label
PART = 2000  # rollouts of a shard, as the drain writes them
SPREAD = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Load:
    """drained: rollouts through Redis, for each number of drains."""

    rollouts: int = 50_000
    drained: int = 10_000
    repeats: int = 3


def bench_lake(
    load: Load, folder: Path | None = None, on_turn: Callable[[], None] = lambda: None
) -> Report:
    """folder: where the lake is made, and stays; without: a temporary one."""
    with tempfile.TemporaryDirectory(prefix="s2t-bench-") as temporary:
        lake = Lake((folder or Path(temporary)) / f"lake-{load.rollouts}")
        if not lake.shards():
            for rows in made_up(load.rollouts):
                lake.write(rows)
        figures = [
            *_reading(lake, Path(temporary), load.repeats, on_turn),
            *_first_batch(lake, load.repeats),
            *_deleting(lake, load.repeats),
            *_draining(Path(temporary), load),
        ]
        labels = sum(shard.labels for shard in lake.shards())
        size = sum(shard.bytes for shard in lake.shards()) / 1e6
    return Report(
        f"lake: {labels:,} labels, {load.rollouts:,} rollouts, {size:.0f} MB", tuple(figures)
    )


# -- a lake ---------------------------------------------------------------------------------------


def made_up(rollouts: int) -> Iterator[Rows]:
    """Rollouts with LABELS labels each, PART at a time."""
    rng = np.random.default_rng(0)
    for start in range(0, rollouts, PART):
        yield _rows(rng, np.arange(start, min(start + PART, rollouts)))


def _rows(rng: np.random.Generator, numbers: np.ndarray) -> Rows:
    count = len(numbers)
    labels = count * LABELS
    ids = rng.bytes(16 * (count + labels)).hex()
    texts = [ids[i : i + 32] for i in range(0, len(ids), 32)]

    def reals(n: int) -> pa.Array:
        return pa.array(rng.gamma(0.5, 1.0, n).astype(np.float32))

    def lists(values: pa.Array, size: int, n: int) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * size), values)

    def whole(high: int, n: int) -> pa.Array:
        return pa.array(rng.integers(0, high, n, dtype=np.int32))

    ids_of_labels, top_ids, ranks = _candidates(rng, labels)
    of_label = {
        "label_id": pa.array(texts[count:]),
        "position": pa.array(
            np.sort(rng.integers(PROMPT, PROMPT + ANSWER, (count, LABELS)), 1).ravel(), pa.int32()
        ),
        "candidate_ids": lists(ids_of_labels, K, labels),
        "slm_log_probs": lists(pa.array(-np.abs(reals(labels * K).to_numpy())), K, labels),
        "llm_log_probs": lists(pa.array(-np.abs(reals(labels * K).to_numpy())), K, labels),
        "llm_top_id": top_ids,
        "llm_top_rank": ranks,
        "mass": pa.array(rng.uniform(0.2, 1.0, labels).astype(np.float32)),
        "kl": reals(labels),
        "entropy": reals(labels),
    }
    struct = ROLLOUT_SCHEMA.field("labels").type.value_type
    structs = pa.StructArray.from_arrays([of_label[f.name] for f in struct], fields=list(struct))
    named = {"task": "sums", "split": "train", "source": "plain", "group": ""}
    named |= dict.fromkeys(("slm_digest", "llm_digest"), "0123456789abcdef")
    named |= dict.fromkeys(("tokenizer_digest", "template_digest"), "0123456789abcdef")
    arrays = {name: pa.repeat(pa.scalar(value), count) for name, value in named.items()} | {
        "rollout_id": pa.array(texts[:count]),
        "request_id": pa.array([f"request-{n}" for n in numbers]),
        "problem_id": pa.array([f"problem-{n}" for n in numbers]),
        "token_ids": lists(whole(128_000, count * (PROMPT + ANSWER)), PROMPT + ANSWER, count),
        "prompt_length": pa.repeat(pa.scalar(PROMPT, pa.int32()), count),
        "entropy": lists(reals(count * ANSWER), ANSWER, count),
        "kl": lists(reals(count * ANSWER), ANSWER, count),
        "llm_top_rank": lists(whole(12, count * ANSWER).cast(pa.int16()), ANSWER, count),
        "labels": lists(structs, LABELS, count),
        "created_at": pa.array(time.time() - rng.uniform(0, 1e4, count)),
        "schema_version": pa.repeat(pa.scalar(2, pa.int32()), count),
    }
    return Rows(pa.table({f.name: arrays[f.name] for f in ROLLOUT_SCHEMA}, schema=ROLLOUT_SCHEMA))


def _candidates(rng: np.random.Generator, labels: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Of each label: K token ids, none of them twice; the LLM's first choice; its rank."""
    size = 128_000 // K
    ids = rng.integers(0, size, (labels, K), dtype=np.int32) + size * np.arange(K, dtype=np.int32)
    ids = rng.permuted(ids, axis=1)
    ranks = rng.integers(0, 12, labels, dtype=np.int32)
    return pa.array(ids.ravel()), pa.array(ids[np.arange(labels), ranks]), pa.array(ranks)


# -- reading --------------------------------------------------------------------------------------


def _reading(lake: Lake, folder: Path, repeats: int, on_turn: Callable[[], None]) -> list[Figure]:
    shards = lake.shards()
    paths = [lake.root / shard.file for shard in shards]
    snapshot = lake.freeze()  # an export freezes too; the links are made once

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def side() -> float:
            started = clock()
            work()
            return clock() - started

        return side

    def export() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as target:
            export_labels(lake, Path(target) / "out")

    sides = {
        "plain read": timed(lambda: _read(paths)),
        "stats": timed(lambda: measure_labels(lake)),
        "hashing": timed(lambda: [hashlib.sha256(path.read_bytes()) for path in paths]),
        "verify": timed(lambda: lake.verify()),
        "verify --values": timed(lambda: lake.verify(values=True)),
        "copy": timed(lambda: _copy(paths, folder / "copy.parquet")),
        "export": timed(export),
    }
    seconds = take_turns(sides, repeats, on_turn)
    snapshot.remove()
    found = [figure(name, values, "s") for name, values in seconds.items()]
    against = {
        "stats": "plain read",
        "verify": "hashing",
        "verify --values": "hashing",
        "export": "copy",
    }
    for name, plain in against.items():
        found.append(figure(f"{name} / {plain}", ratios(seconds[name], seconds[plain]), "x"))
    return found


def _read(paths: list[Path]) -> None:
    """The columns that statistics read, of each file."""
    leaves = [name.replace("labels.", "labels.list.element.") for name in COLUMNS]
    ids = ["rollout_id", "labels.list.element.key"]
    for path in paths:
        with pq.ParquetFile(path, memory_map=True) as file:
            file.read(columns=[*leaves, *ids])


def _copy(paths: list[Path], target: Path) -> None:
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        for path in paths:
            with pq.ParquetFile(path, memory_map=True) as file:
                for batch in file.iter_batches(batch_size=2048):
                    writer.write_batch(batch)
    target.unlink()


# -- training and deleting ------------------------------------------------------------------------


def _first_batch(lake: Lake, repeats: int) -> list[Figure]:
    snapshot = lake.freeze()
    with SPREAD.Pool(1, maxtasksperchild=1) as pool:
        turns = [pool.apply(read_first_batch, (lake.root, snapshot.id)) for _ in range(repeats)]
    snapshot.remove()
    conditions = "a new process each; memory is its peak, with torch and pyarrow loaded"
    return [
        figure("first training batch", [t.first for t in turns], "s", conditions),
        figure("100 batches more", [t.more for t in turns], "s"),
        figure("held-out labels", [t.held_out for t in turns], "s"),
        figure("memory before", [t.memory_before for t in turns], "MB"),
        figure("memory at the first batch", [t.memory_first for t in turns], "MB"),
        figure("memory in the end", [t.memory_after for t in turns], "MB"),
    ]


@dataclass(frozen=True)
class _Turn:
    """Seconds, and peaks of memory in MB."""

    first: float
    more: float
    held_out: float
    memory_before: float
    memory_first: float
    memory_after: float


def read_first_batch(root: Path, snapshot_id: str) -> _Turn:
    before = _peak_mb()
    started = time.perf_counter()
    data = TrainingData(Lake(root).snapshot(snapshot_id), "0123456789abcdef", TrainingSettings())
    batches = data.epoch(0)
    next(batches)
    first, memory_first = time.perf_counter() - started, _peak_mb()
    for _ in range(100):
        next(batches, None)
    more = time.perf_counter() - started - first
    assert data.validation and data.test
    held_out = time.perf_counter() - started - first - more
    return _Turn(first, more, held_out, before, memory_first, _peak_mb())


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if "VmHWM" in line)


def _deleting(lake: Lake, repeats: int) -> list[Figure]:
    seconds, touched = [], []
    for turn in range(repeats):
        before = {shard.name for shard in lake.shards()}
        started = clock()
        removed = lake.delete("problem_id", f"problem-{turn}")
        seconds.append(clock() - started)
        touched.append(len(before - {shard.name for shard in lake.shards()}))
        assert removed <= 1
    shards = len(lake.shards())
    return [
        figure("delete a problem", seconds, "s"),
        figure("shards rewritten", touched, "", f"of {shards}"),
    ]


# -- draining -------------------------------------------------------------------------------------


def _draining(folder: Path, load: Load) -> list[Figure]:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(load.repeats):
        for drains in (1, 2) if turn % 2 else (2, 1):
            rates[drains].append(_drained(folder / f"drained-{turn}-{drains}", load, drains))
    return [
        figure("drain", rates[1], "rollouts/s", "one process"),
        figure("two drains", rates[2], "rollouts/s", "together"),
        figure("two drains / one", ratios(rates[2], rates[1]), "x"),
    ]


def _drained(folder: Path, load: Load, drains: int) -> float:
    """Rollouts per second from a full stream to an empty one, with all drains ready before."""
    with open_redis(None, folder / "redis") as server:
        stream = LabelStream(server.url)
        for rows in made_up(load.drained):
            entries = [pack(rollout) for rollout in rows.rollouts()]
            for start in range(0, len(entries), 100):
                stream.append(entries[start : start + 100])
        stream.create_group()
        ready = SPREAD.Barrier(drains + 1)
        drain = (server.url, folder / "lake", ready)
        processes = [SPREAD.Process(target=drain_all, args=drain) for _ in range(drains)]
        for process in processes:
            process.start()
        ready.wait(120)
        started = time.perf_counter()
        for process in processes:
            process.join()
        seconds = time.perf_counter() - started
        stream.close()
    shards = Lake(folder / "lake").shards()
    assert sum(shard.rollouts for shard in shards) == load.drained, "lost or doubled"
    return load.drained / seconds


def drain_all(url: str, root: Path, ready: multiprocessing.synchronize.Barrier) -> None:
    """Drain until nothing comes."""
    drain = Drain(LabelStream(url), Lake(root), shard_age_s=99.0)
    for rows in made_up(1):  # what is loaded late is loaded now
        Lake(root.with_name(f"warm-{drain.consumer}")).write(rows)
    ready.wait(120)
    while drain.run_once():
        pass
    drain.flush()
