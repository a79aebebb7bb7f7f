"""What a full KV pool costs: CPU time of answers from a pair whose pools hold thousands of
contexts, over the same answers from one whose pools hold few, in turns.

`python -m tests.helpers.warm_pool` asks the bundled pair, twice in this process. A pool whose
look-ups grow with what it holds shows ratios well above 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from s2t_shared.bundled import problems
from s2t_shared.pair import Pair

TURNS = 5
ANSWERS = 32  # of a turn
CACHED = 2000  # contexts of the SLM; the LLM has read some thousands of selections beside
MODES = (("greedy", None), ("s2t", 0.05), ("llm", None))


def cpu_seconds(pair: Pair, prompts: Sequence[str], mode: str, budget: float | None) -> float:
    started = time.process_time()
    pair.generate(prompts, mode=mode, budget=budget)
    return time.process_time() - started


def main() -> None:
    """Print a line per mode."""
    few, many = (Pair.open("bundled", "bundled", batch_size=16, threads=1) for _ in range(2))
    others = [problem.prompt for problem in problems.problems("train", CACHED)]
    many.generate(others, mode="greedy", max_new_tokens=40)
    many.generate(others[:800], mode="s2t", budget=0.1)
    prompts = [problem.prompt for problem in problems.problems("test", 16 + 3 * TURNS * ANSWERS)]
    for pair in (few, many):
        cpu_seconds(pair, prompts[:16], "s2t", 0.05)  # what is loaded and calibrated late
    for number, (mode, budget) in enumerate(MODES):
        ratios = []
        for turn in range(TURNS):
            first = 16 + (number * TURNS + turn) * ANSWERS
            asked = prompts[first : first + ANSWERS]
            before = cpu_seconds(few, asked, mode, budget)
            ratios.append(cpu_seconds(many, asked, mode, budget) / before)
        print(f"{mode}: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


if __name__ == "__main__":
    main()
