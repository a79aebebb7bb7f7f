"""`s2t bench harvest`: labels per second, plain and intervened, against collecting them token by
token.

All sides are `s2t harvest` itself on one pair of models, with one KL threshold and a lake of their
own. The token by token side is the published collector's way (batch 1, both models step at every
token, the LLM selects above the threshold) on this engine, whose single steps are faster than
Hugging Face's; it gets fewer prompts, being slow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from s2t_shared.data.prompts import Row, read_prompts
from s2t_shared.decode.calibrate import measure_calibration
from s2t_shared.decode.engine import MAX_DRAFT_TOKENS, Engine
from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.errors import ConfigError
from s2t_shared.labels.lake import Lake
from s2t_shared.pair import Pair
from s2t_shared.types import LabelRule, Prompt, ScoreQuery, ScoreReply, Trigger
from services.bench import workload
from services.bench.measure import Figure, Report, clock, figure, ratios, take_turns
from services.bench.workload import Models, Settings
from services.harvest.rollouts import HarvestOptions, PairRollouts
from services.harvest.run import HarvestOutcome, Prompts, harvest

LOCKSTEP, PLAIN, INTERVENED = "token by token", "plain", "intervened"
PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Load:
    """How many prompts each side answers, and how many at once (token by token: one)."""

    prompts: int = 32
    lockstep_prompts: int = 2
    batch: int = 16


class TimedSelector:
    """A `SelectorClient` that counts the seconds its LLM works."""

    def __init__(self, client: SelectorClient) -> None:
        self._client = client
        self.seconds = 0.0

    @property
    def info(self) -> LLMInfo:
        return self._client.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        started = clock()
        futures = self._client.submit(queries)
        self.seconds += clock() - started
        return futures


@dataclass(frozen=True)
class Turn:
    """One side's harvest."""

    labels: int
    tokens: int
    seconds: float
    llm_seconds: float

    @property
    def rate(self) -> float:
        return self.labels / self.seconds


def bench_harvest(
    settings: Settings,
    load: Load,
    file: Path | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> Report:
    """Every answer has exactly `settings.new` tokens; `settings.budget` of the positions become
    labels, by KL.

    Raises:
        ConfigError: no usable prompt, or no label at this size.
    """
    models = workload.load(settings, needs_llm=True)
    assert models.scorer is not None
    models.slm.eos_ids = models.scorer.runtime.eos_ids = (
        frozenset()
    )  # before an engine asks for them
    models = Models(
        models.tokenizer,
        models.proposer,
        LLMSelector(models.scorer.runtime, models.tokenizer.digest),
    )
    prompts = _prompts(settings, models, load.prompts, file)
    calibration = measure_calibration(
        _pair(models, load.batch, MAX_DRAFT_TOKENS)[0].generator,
        prompts[: load.batch],
        settings.new,
        with_llm=True,
    )
    options = HarvestOptions(
        task="bench",
        triggers=(Trigger.KL,),
        budget=settings.budget,
        candidates=settings.k,
        max_new_tokens=settings.new,
        thresholds=(LabelRule(Trigger.KL, calibration.threshold(Trigger.KL, settings.budget)),),
    )
    turns: dict[str, list[Turn]] = {LOCKSTEP: [], PLAIN: [], INTERVENED: []}

    def side(name: str) -> Callable[[], float]:
        mine = _evenly(prompts, load.lockstep_prompts) if name == LOCKSTEP else prompts
        asked = replace(options, intervene=name != PLAIN)
        batch, max_draft_tokens = (1, 1) if name == LOCKSTEP else (load.batch, MAX_DRAFT_TOKENS)

        def work() -> float:
            turns[name].append(_harvest(models, mine, asked, batch, max_draft_tokens))
            return turns[name][-1].seconds

        return work

    take_turns({name: side(name) for name in turns}, settings.repeats, on_turn)
    if not all(t.labels for of in turns.values() for t in of):
        raise ConfigError(
            "a side found no label at all: give more prompts, longer answers or a larger --budget"
        )
    return Report(
        f"harvest: {settings.slm} with {settings.llm}, {settings.dtype}",
        tuple(_figures(settings, load, turns)),
    )


def _prompts(settings: Settings, models: Models, count: int, file: Path | None) -> list[Prompt]:
    if file is None:
        ids = workload.prompts(models.tokenizer, workload.ragged_lengths(count, settings.prefix))
        return [Prompt(token_ids=p) for p in ids]
    found = [prompt for _, prompt in read_prompts(file) if isinstance(prompt, Prompt)][:count]
    if not found:
        raise ConfigError(f"--prompts={str(file)!r}: no usable line")
    return found


def _evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Some of the prompts, whose lengths stand for all."""
    count = min(count, len(prompts))
    return [prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)]


def _pair(models: Models, batch: int, max_draft_tokens: int) -> tuple[Pair, TimedSelector]:
    assert models.scorer is not None
    models.slm.pool.clear()
    models.scorer.runtime.pool.clear()
    selector = TimedSelector(InProcessSelector(models.scorer))
    engine = Engine(
        models.proposer,
        selector,
        max_num_seqs=batch,
        selection_timeout_s=PATIENCE_S,
        max_draft_tokens=max_draft_tokens,
    )
    return Pair(tokenizer=models.tokenizer, engine=engine, llm=selector), selector


def _harvest(
    models: Models,
    prompts: Sequence[Prompt],
    options: HarvestOptions,
    batch: int,
    max_draft_tokens: int,
) -> Turn:
    def rows() -> Iterator[Row]:
        return (({"id": f"bench-{i}"}, prompt) for i, prompt in enumerate(prompts))

    pair, selector = _pair(models, batch, max_draft_tokens)
    with tempfile.TemporaryDirectory(prefix="s2t-bench-") as folder:
        started = clock()
        outcome: HarvestOutcome = harvest(
            PairRollouts(pair), Prompts(rows, "bench", len(prompts)), Lake(Path(folder)), options
        )
        seconds = clock() - started
    assert not outcome.errors and not outcome.failed, (outcome.errors + outcome.failed)[0]
    return Turn(outcome.labels, outcome.tokens, seconds, selector.seconds)


def _figures(settings: Settings, load: Load, turns: dict[str, list[Turn]]) -> list[Figure]:
    figures = []
    rates = {name: [t.rate for t in of] for name, of in turns.items()}
    for name, of in turns.items():
        batch = 1 if name == LOCKSTEP else load.batch
        figures.append(
            figure(
                f"{name}: labels per second",
                rates[name],
                "1/s",
                f"{of[-1].tokens // settings.new} prompts, {batch} at once, {settings.new} new "
                f"each, K {settings.k}, budget {settings.budget:.0%}: {of[-1].labels} labels",
            )
        )
        figures.append(
            figure(f"{name}: tokens per second", [t.tokens / t.seconds for t in of], "1/s")
        )
        share = [t.llm_seconds / t.seconds for t in of]
        reads = (
            "a token at a time"
            if name == LOCKSTEP
            else "rollouts"
            if name == PLAIN
            else "drafts and rollouts"
        )
        figures.append(
            figure(
                f"{name}: the LLM's share of the time",
                share,
                "",
                f"reading {reads}; the rest is the SLM's decoding and, little, the lake",
            )
        )
    for name in (PLAIN, INTERVENED):
        figures.append(
            figure(
                f"{name} / {LOCKSTEP}: labels per second", ratios(rates[name], rates[LOCKSTEP]), "x"
            )
        )
        per_token = {n: [t.seconds / t.tokens for t in of] for n, of in turns.items()}
        figures.append(
            figure(
                f"{LOCKSTEP} / {name}: time per scored token",
                ratios(per_token[LOCKSTEP], per_token[name]),
                "x",
                "the same but for chance in how many positions became labels",
            )
        )
    return figures
