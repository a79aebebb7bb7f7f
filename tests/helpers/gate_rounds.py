"""How often the gate opens, on the answers of trained versions: rounds without a gain, and with.

`python -m tests.helpers.gate_rounds CURVE.jsonl "prefix, base"` reads what `s2t bench curve --seeds
N` wrote. A round draws two of the trainings and, with replacement, as many problems as the gate
asks. In each problem the two sides change places by the toss of a coin: neither is better, while
the answers differ as those of trained versions do. A gain is put on top of that: wrong answers of
the new side turn right until its accuracy is that much higher on average; log-probabilities rise
by it, in nats per token. Each problem is a group of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s2t_shared.training.settings import TrainingSettings
from s2t_shared.versions.gate import Evidence, Paired, Verdict, judge

ROUNDS = 200
GAINS = (0.0, 0.05, 0.10)
MEASURES = (("tasks",), ("likelihood",), ("tasks", "likelihood"))


def read_trainings(path: Path, name: str) -> list[dict[str, np.ndarray]]:
    """Outcomes by problem of each training: {"tasks": float [n], "likelihood": float [n]}."""
    trainings = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("name") != name or not row.get("correct"):
            continue
        (condition, digits), *_ = row["correct"].items()
        right = np.array([digit == "1" for digit in digits], dtype=float)
        log_probs = np.array(row["log_probs"][condition], dtype=float)
        trainings.append({"tasks": right, "likelihood": log_probs})
    return trainings


def share_passed(
    trainings: Sequence[dict[str, np.ndarray]],
    measures: Sequence[str],
    gain: float,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> float:
    """Share of rounds in which the gate opens. measures: names in Evidence that are known."""
    random = np.random.default_rng(seed)
    passed = sum(_round(trainings, measures, gain, random).passed for _ in range(rounds))
    return passed / rounds


def _round(
    trainings: Sequence[dict[str, np.ndarray]],
    measures: Sequence[str],
    gain: float,
    random: np.random.Generator,
) -> Verdict:
    defaults = TrainingSettings()
    counts = {"tasks": defaults.gate_problem_count, "likelihood": defaults.gate_prompt_count}
    first, second = random.choice(len(trainings), 2, replace=False)
    known = {}
    for measure in measures:
        a, b = trainings[first][measure], trainings[second][measure]
        drawn = random.integers(len(a), size=counts[measure])
        swapped = random.random(len(drawn)) < 0.5
        new = np.where(swapped, b[drawn], a[drawn])
        old = np.where(swapped, a[drawn], b[drawn])
        if measure == "likelihood":
            new = new + gain
        elif gain:
            wrong = 1.0 - float(np.concatenate([a, b]).mean())
            new = np.maximum(new, random.random(len(new)) < gain / wrong)
        known[measure] = Paired(new.tolist(), old.tolist(), [str(i) for i in range(len(new))])
    same = [True, False] * 50
    labels = Paired(same, same, [str(i) for i in range(len(same))])
    return judge(Evidence(labels=labels, **known))


def main() -> None:
    """Print a line per choice of measures."""
    path, name = Path(sys.argv[1]), sys.argv[2]
    trainings = read_trainings(path, name)
    print(f"{len(trainings)} trainings of {name}, {len(trainings[0]['tasks'])} problems each")
    for measures in MEASURES:
        shares = [f"{share_passed(trainings, measures, gain):.3f} at +{gain:g}" for gain in GAINS]
        print(f"{' and '.join(measures)}: the gate opens in {', '.join(shares)}")


if __name__ == "__main__":
    main()
