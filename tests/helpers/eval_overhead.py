"""What `s2t eval` adds to decoding: its loop and the bare engine answer the same prompts, in turns.

    python -m tests.helpers.eval_overhead [--slm S --llm L] [--rounds 12] [--batch 16] [--tokens 64]

Each round has four batches of problems of its own. Sides: `engine`, decode requests whose prompts
are ids already, and no text comes out; `generate`, texts and Steps; `eval`, all that the report
needs: requests, grading, divergence points, a line of the journal. Caches are emptied before each.
One thread; CPU seconds, so that other work beside counts less. The bundled pair decodes so fast
that the loop weighs as much as it ever can.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from s2t_shared.decode.generate import decode_requests, encode_request
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pair import Pair
from s2t_shared.types import DecodeRequest, GenerateRequest
from services.evaluation.answering import PairAnswerer
from services.evaluation.journal import Journal
from services.evaluation.modes import ModeSpec
from services.evaluation.problems import Problem, problems_of
from services.evaluation.run import EvaluationSettings, run_row

SIDES = ("engine", "generate", "eval")
ROWS = (ModeSpec(name="greedy"), ModeSpec(name="s2t", trigger="entropy", budget=0.05))


class Measured:
    """A pair whose sides are timed."""

    def __init__(self, slm: str, llm: str, batch: int, tokens: int, folder: Path) -> None:
        torch.set_num_threads(1)
        tokenizer = Tokenizer.load(resolve_model(slm))
        self._models = [ModelRuntime.load(slm), ModelRuntime.load(llm, role="llm")]
        selector = InProcessSelector(LLMSelector(self._models[1], tokenizer.digest))
        self._pair = Pair.of(
            self._models[0], tokenizer, selector, max_num_seqs=batch, selection_timeout_s=600.0
        )
        self._pair.calibrations = folder
        self._answerer = PairAnswerer(self._pair)
        self._settings = EvaluationSettings(max_new_tokens=tokens)
        self._journal = Journal.open(folder / "answers.jsonl", {})

    def seconds(self, side: str, spec: ModeSpec, problems: Sequence[Problem]) -> float:
        """CPU seconds of one side."""
        requests = self._requests(spec, problems)
        work: dict[str, Callable[[], object]] = {
            "engine": lambda: self._engine(encoded),
            "generate": lambda: list(self._pair.generator.generate(requests)),
            "eval": lambda: run_row(self._answerer, spec, problems, self._settings, self._journal),
        }
        encoded = []
        for request in requests:
            encoded += decode_requests(encode_request(request, self._pair.tokenizer))
        for model in self._models:
            model.pool.clear()
        started = time.process_time()
        work[side]()
        return time.process_time() - started

    def _requests(self, spec: ModeSpec, problems: Sequence[Problem]) -> list[GenerateRequest]:
        made = []
        for problem in problems:
            tokens = self._settings.max_new_tokens
            request = spec.request(problem.prompt, request_id=problem.id, max_new_tokens=tokens)
            made.append(replace(self._pair.with_thresholds(request), budget=None))
        return made

    def _engine(self, encoded: Sequence[DecodeRequest]) -> None:
        engine = self._pair.engine
        for request in encoded:
            engine.add(request)
        while not engine.idle:
            engine.step()
            engine.wait()


def report(spec: ModeSpec, seconds: dict[str, list[float]]) -> None:
    """Ratios of all rounds together, and the middle half of the rounds."""
    print(f"{spec.label}: " + ", ".join(f"{side} {sum(seconds[side]):.2f} s" for side in SIDES))
    for over, under in (("generate", "engine"), ("eval", "generate"), ("eval", "engine")):
        rounds = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        low, middle, high = statistics.quantiles(rounds, n=4)
        total = sum(seconds[over]) / sum(seconds[under])
        print(
            f"  {over} / {under}: {total:.3f}; of {len(rounds)} rounds: median {middle:.3f}, "
            f"middle half {low:.3f} - {high:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slm", default="bundled")
    parser.add_argument("--llm", default="bundled")
    parser.add_argument("--problems", default="bundled")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    size = 4 * args.batch
    problems = problems_of(args.problems, (args.rounds + 1) * size)
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(args.slm, args.llm, args.batch, args.tokens, Path(folder))
        for spec in ROWS:
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            for number in range(args.rounds + 1):
                part = problems[number * size : (number + 1) * size]
                for place in range(len(SIDES)):
                    side = SIDES[(number + place) % len(SIDES)]
                    took = measured.seconds(side, spec, part)
                    if number > 0:  # the first round warms up
                        seconds[side].append(took)
            report(spec, seconds)


if __name__ == "__main__":
    main()
