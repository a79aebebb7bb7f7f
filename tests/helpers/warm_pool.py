"""What a full KV pool costs: CPU time of answers with thousands of contexts cached, over the same
with few.

`python -m tests.helpers.warm_pool` asks the bundled pair, in this process. A pool whose look-ups
grow with what it holds shows ratios well above 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from s2t_shared.bundled import problems
from s2t_shared.pair import Pair

ANSWERS = 64
CACHED = 3000  # contexts of the SLM; the LLM has read some thousands of selections beside
MODES = (("greedy", None), ("s2t", 0.05), ("llm", None))


def cpu_seconds(pair: Pair, prompts: Sequence[str], mode: str, budget: float | None) -> float:
    started = time.process_time()
    pair.generate(prompts, mode=mode, budget=budget)
    return time.process_time() - started


def main() -> None:
    """Print a line per mode."""
    pair = Pair.open("bundled", "bundled", batch_size=16, threads=1)
    prompts = [problem.prompt for problem in problems.problems("test", 16 + 6 * ANSWERS)]
    cpu_seconds(pair, prompts[:16], "s2t", 0.05)  # what is loaded and calibrated late
    parts = [prompts[16 + i * ANSWERS :][:ANSWERS] for i in range(6)]
    few = [cpu_seconds(pair, part, *mode) for part, mode in zip(parts, MODES, strict=False)]
    others = [problem.prompt for problem in problems.problems("train", CACHED)]
    pair.generate(others, mode="greedy", max_new_tokens=40)
    pair.generate(others[:1200], mode="s2t", budget=0.1)
    many = [cpu_seconds(pair, part, *mode) for part, mode in zip(parts[3:], MODES, strict=True)]
    for (name, _), before, after in zip(MODES, few, many, strict=True):
        print(f"{name}: {after / before:.2f} ({before:.2f} s, {after:.2f} s)")


if __name__ == "__main__":
    main()
