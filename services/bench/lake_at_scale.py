"""`s2t bench lake --linked-shards N`: a lake far beyond this disk, for the verbs that must not read
it.

One shard of the size that compaction makes is on the disk N times by hard links, each with a
manifest of its own that says when its rollouts were made, over a year; beside them lies one small
shard with the problem that is deleted. What the verbs do is real but for the disk's own speed: the
same bytes come from memory.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from s2t_shared.labels.lake import Lake
from s2t_shared.labels.rows import Rows
from s2t_shared.labels.shards import Shard
from services.bench.lake import made_up
from services.bench.measure import Report, figure

SHARD_ROLLOUTS = 8000  # 64 MiB, about
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
YEAR_S = 365 * DAY_S
FEW = 100  # shards of the lake that the large one is compared with


def bench_linked(shards: int) -> Report:
    """Seconds of each verb with `shards` shards, and with FEW."""
    with tempfile.TemporaryDirectory(prefix="s2t-bench-") as folder:
        source = Lake(Path(folder) / "source")
        large, small = _rows()
        source.write(large, "large")
        sides = {}
        for count in (FEW, shards):
            lake = Lake(Path(folder) / f"lake-{count}")
            lake.write(small, "small")
            _link(source, lake, count)
            sides[count] = _timed(lake)
        [shard] = source.shards()
    figures = []
    for name, seconds in sides[shards].items():
        few = sides[FEW][name]
        figures.append(figure(name, [seconds], "s", f"with {FEW} shards {few:.3g} s"))
    labels = shards * shard.labels
    size = shards * shard.bytes / 1e9
    return Report(f"lake: {labels:,} labels in {shards:,} shards, {size:.0f} GB", tuple(figures))


def _rows() -> tuple[Rows, Rows]:
    """Of a large shard, and of a small one, whose problem is deleted."""
    parts = list(made_up(SHARD_ROLLOUTS + 1))
    return Rows.joined(parts[:-1]), parts[-1]


def _link(source: Lake, lake: Lake, count: int) -> None:
    """Make the source's shard `count` shards of the lake."""
    [shard] = source.shards()
    year_ago = time.time() - YEAR_S
    for number in range(count):
        made = year_ago + YEAR_S * number / count
        # Another hash: what was looked up by it would be found after the first one.
        link = replace(
            shard,
            name=f"shard-link-{number:06d}",
            sha256=f"{number:064x}",
            first=made - HOUR_S,
            last=made,
        )
        os.link(source.root / shard.file, lake.root / link.file)
        content = json.dumps(asdict(link), indent=2)
        (lake.root / f"{link.name}.json").write_text(content, encoding="utf-8")


def _timed(lake: Lake) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - started

    [others] = made_up(32)
    timed("list the shards", lake.shards)
    timed("count the labels of the last day", lambda: lake.labels_since(time.time() - DAY_S))
    timed("write 32 rollouts", lambda: lake.write(others, "written"))
    timed("what retention would remove", lambda: lake.prunable(max_age_s=DAY_S))
    timed("join small shards (there are none)", lake.compact)
    timed("freeze a snapshot", lake.freeze)
    timed("delete a problem of one shard", lambda: _delete(lake))
    return seconds


def _delete(lake: Lake) -> None:
    before = _names(lake.shards())
    assert lake.delete("problem_id", f"problem-{SHARD_ROLLOUTS}") == 1
    assert len(before - _names(lake.shards())) == 1, "one shard is rewritten"


def _names(shards: list[Shard]) -> set[str]:
    return {shard.name for shard in shards}
