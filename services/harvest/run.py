"""`s2t harvest`: labels from training prompts, through a running service or alone in this process.

    prompts -> chunks -> rollouts, scored whole by one LLM prefill -> labels where KL or entropy is
    high -> lake

Plain rollouts are the SLM's greedy ones; intervened ones are S2T's own (the LLM selects at the
divergence points), so their labels lie on the paths that a served answer takes. Thresholds come
from the run's own first prompts, and are kept with the run (`harvest_run`), which remembers what is
done: the same command again goes on and ends with the same labels as a run that was never
disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from s2t_shared.data import prompts as prompt_files
from s2t_shared.data.prompts import PromptSource, fingerprint
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.labels.label import Rollout, is_label, with_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.policy import threshold_for
from s2t_shared.splits import check_split
from s2t_shared.types import WARMUP_STEPS, LabelRule, Prompt, Trigger
from services.harvest.journal import CHUNK, Chunk, HarvestRun
from services.harvest.rollouts import (
    TRIGGERS,
    HarvestOptions,
    Outcome,
    RolloutCounts,
    RolloutRequest,
    RolloutSource,
)

COMPACT_EVERY = 64  # chunks: so that a long run's shards do not pile up
Row = tuple[dict[str, Any], Prompt | InvalidRequestError]
EVERYWHERE = tuple(LabelRule(t, -1.0) for t in TRIGGERS)  # entropy and KL are never below 0


@dataclass(frozen=True)
class Prompts:
    """What to harvest: `rows()` starts from the first row every time; `fingerprint` stands for
    their content."""

    rows: Callable[[], Iterable[Row]]
    fingerprint: str
    total: int | None = None


@dataclass(kw_only=True)
class HarvestOutcome:
    """What a run has given so far, earlier starts included. `errors`: one text per prompt that can
    never give labels; `failed`: per prompt that did not this time."""

    run: str = ""
    prompts: int = 0
    resumed: int = 0  # of the prompts, done by earlier starts
    answered: int = 0  # prompts that are rolled out; their chunk may not be done
    new_labels: int = 0  # of this start, chunks that are not done included
    rollouts: int = 0
    labels: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.prompts += chunk.prompts
        self.rollouts += chunk.rollouts
        self.labels += chunk.labels
        self.tokens += chunk.tokens
        self.errors += chunk.errors


Progress = Callable[[HarvestOutcome], None]


def harvest(
    source: RolloutSource,
    prompts: Prompts,
    lake: Lake,
    options: HarvestOptions,
    on_progress: Progress = lambda outcome: None,
    say: Callable[[str], None] = lambda line: None,
    again: bool = False,
) -> HarvestOutcome:
    """Harvest what is not done yet; `again`: everything, as after labels were lost (none is counted
    twice).

    Raises: EvaluationSplitError: the split is for evaluation. ConfigError: another process does
        this run, the lake cannot be used, or no prompt gave anything to calibrate on.
    """
    check_split(options.split)
    with HarvestRun.open(lake.root, _identity(prompts, options, source), again) as run:
        outcome = HarvestOutcome(run=run.id)
        for chunk in run.done.values():
            outcome.add(chunk)
        outcome.resumed = outcome.answered = outcome.prompts
        if not run.rules and not options.thresholds:
            say(f"run {run.id}: thresholds from the first {options.calibrate_on} prompts")
        first = {} if run.rules else _plan(run, source, prompts, options)
        work = _Work(run, lake, source.returns_labels, outcome, on_progress)
        on_progress(outcome)
        if first:
            for asked in work.asked(_firsts(prompts, options), only=first):
                work.on_rollout(asked, _relabelled(first[asked.request_id], run.rules))
        source.make_rollouts(work.asked(prompts.rows()), options, work.on_rollout)
        if source.returns_labels:
            lake.compact()
        return outcome


def _identity(prompts: Prompts, options: HarvestOptions, source: RolloutSource) -> dict[str, Any]:
    """Everything that the labels depend on."""
    o, digests = options, source.digests
    return {
        "prompts": prompts.fingerprint,
        "task": o.task,
        "split": o.split,
        "budget": o.budget,
        "triggers": [t.value for t in o.triggers],
        "candidates": o.candidates,
        "intervene": o.intervene,
        "thresholds": [[r.trigger.value, r.threshold] for r in o.thresholds],
        "max_new_tokens": o.max_new_tokens,
        "calibrate_on": o.calibrate_on,
        "slm": digests.slm,
        "llm": digests.llm,
        "tokenizer": digests.tokenizer,
        "template": digests.template,
        "precision": source.precision,
    }


def _firsts(prompts: Prompts, options: HarvestOptions) -> Iterator[Row]:
    """The prompts that give the thresholds: whole chunks, so that their rollouts need not be made
    again."""
    for _, row in zip(
        range(-(-options.calibrate_on // CHUNK) * CHUNK), prompts.rows(), strict=False
    ):
        yield row


def _plan(
    run: HarvestRun, source: RolloutSource, prompts: Prompts, options: HarvestOptions
) -> dict[str, Rollout]:
    """Fix the thresholds.

    Returns the rollouts made for that, by request, where they are also the harvest's own.
    """
    if options.thresholds:
        run.plan(options.thresholds)
        return {}
    rollouts = _calibration_rollouts(run, source, prompts, options)
    entropies: list[float] = []
    divergences: list[float] = []
    for rollout in rollouts.values():
        entropies += rollout.entropy[WARMUP_STEPS:]
        divergences += rollout.kl[WARMUP_STEPS:]
    signals = {Trigger.ENTROPY: entropies, Trigger.KL: divergences}
    total = sum(len(rollout.kl) for rollout in rollouts.values())
    rules = []
    for trigger in options.triggers:
        rules.append(LabelRule(trigger, threshold_for(options.budget, signals[trigger], total)))
    run.plan(tuple(rules))
    return rollouts if source.returns_labels and not options.intervene else {}


def _calibration_rollouts(
    run: HarvestRun, source: RolloutSource, prompts: Prompts, options: HarvestOptions
) -> dict[str, Rollout]:
    """Greedy rollouts of the first prompts, every position a label.

    Raises:
        ConfigError: they say too little to calibrate on.
    """
    rollouts: dict[str, Rollout] = {}
    failed: list[S2TError] = []

    def on_rollout(request: RolloutRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Rollout):
            rollouts[request.request_id] = outcome
        elif isinstance(outcome, S2TError):
            failed.append(outcome)

    def requests() -> Iterator[RolloutRequest]:
        for row, prompt in _firsts(prompts, options):
            if isinstance(prompt, Prompt):
                yield RolloutRequest(
                    request_id=_request_id(run, row),
                    problem_id=str(row["id"]),
                    prompt=prompt,
                    rules=EVERYWHERE,
                    calibrating=True,
                )

    source.make_rollouts(requests(), options, on_rollout)
    says_something = any(len(rollout.kl) > WARMUP_STEPS for rollout in rollouts.values())
    unanswered = any(not isinstance(error, InvalidRequestError) for error in failed)
    if unanswered or not says_something:
        reason = failed[0] if failed else "there are none"
        raise ConfigError(
            "no thresholds could be calibrated: of the first prompts "
            f"{len(rollouts)} gave a rollout ({reason})"
        )
    return rollouts


def _request_id(run: HarvestRun, row: dict[str, Any]) -> str:
    return f"harvest-{run.id}-{row['id']}"


def _relabelled(rollout: Rollout, rules: tuple[LabelRule, ...]) -> Rollout:
    """The rollout with those of its labels that the rules mark."""
    marked = []
    for label in rollout.labels:
        signals = {Trigger.KL: label.kl, Trigger.ENTROPY: label.entropy}
        if is_label(signals, rules):
            marked.append(label)
    return with_labels(rollout, tuple(marked))


@dataclass(kw_only=True)
class _OpenChunk:
    """A chunk of prompts whose rollouts are not all there yet."""

    left: int
    prompts: int
    rollouts: list[Rollout] = field(default_factory=list)
    counts: list[RolloutCounts] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False


class _Work:
    """The chunks under way: counts what comes back, and makes a chunk durable when the last of it
    is there."""

    def __init__(
        self,
        run: HarvestRun,
        lake: Lake,
        keeps: bool,
        outcome: HarvestOutcome,
        on_progress: Progress,
    ) -> None:
        self._run, self._lake, self._keeps = run, lake, keeps
        self._outcome, self._on_progress = outcome, on_progress
        self._open: dict[int, _OpenChunk] = {}
        self._chunk_of: dict[str, int] = {}

    def asked(
        self, rows: Iterable[Row], only: dict[str, Rollout] | None = None
    ) -> Iterator[RolloutRequest]:
        """The rollouts that are not done (and, with `only`, are known already), chunk by chunk."""
        for number, chunk in self._run.open_chunks(rows):
            good = [(row, prompt) for row, prompt in chunk if isinstance(prompt, Prompt)]
            if only is not None and not all(_request_id(self._run, row) in only for row, _ in good):
                continue
            self._open[number] = _OpenChunk(
                left=len(good),
                prompts=len(chunk),
                errors=[
                    str(prompt) for _, prompt in chunk if isinstance(prompt, InvalidRequestError)
                ],
            )
            self._outcome.answered += len(chunk) - len(good)
            if not good:
                self._close(number)
            for row, prompt in good:
                request_id = _request_id(self._run, row)
                self._chunk_of[request_id] = number
                yield RolloutRequest(
                    request_id=request_id,
                    problem_id=str(row["id"]),
                    prompt=prompt,
                    rules=self._run.rules,
                )

    def on_rollout(self, request: RolloutRequest, outcome: Outcome) -> None:
        """Count an outcome, and close its chunk when it was the last one."""
        number = self._chunk_of.pop(request.request_id)
        chunk = self._open[number]
        self._outcome.answered += 1
        if isinstance(outcome, Rollout):
            chunk.rollouts.append(outcome)
            outcome = RolloutCounts(
                len(outcome.labels), len(outcome.token_ids) - outcome.prompt_length
            )
        if isinstance(outcome, RolloutCounts):
            chunk.counts.append(outcome)
            self._outcome.new_labels += outcome.labels
        elif isinstance(outcome, InvalidRequestError):
            chunk.errors.append(f"{request.problem_id}: {outcome}")
        else:
            chunk.failed = True
            self._outcome.failed.append(f"{request.problem_id}: {outcome}")
        chunk.left -= 1
        if not chunk.left:
            self._close(number)
        self._on_progress(self._outcome)

    def _close(self, number: int) -> None:
        chunk = self._open.pop(number)
        if chunk.failed:  # not done: the next start tries it again
            return
        if self._keeps:
            rollouts = sorted(chunk.rollouts, key=lambda r: r.request_id)
            self._lake.write(rollouts, f"{self._run.id}-{number:06d}")
        done = Chunk(
            number=number,
            prompts=chunk.prompts,
            rollouts=len(chunk.counts),
            labels=sum(counts.labels for counts in chunk.counts),
            tokens=sum(counts.tokens for counts in chunk.counts),
            errors=tuple(chunk.errors),
        )
        self._run.finish(done)
        self._outcome.add(done)
        if self._keeps and len(self._run.done) % COMPACT_EVERY == 0:
            self._lake.compact()


def prompts_of(
    source: PromptSource, limit: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Prompts:
    """The prompts of a source, the first `limit` of them. `say` hears what was chosen by itself.

    Raises:
        ConfigError: the source cannot be read. EvaluationSplitError: its split is for evaluation.
    """
    said: list[str] = []

    def say_once(line: str) -> None:
        if line not in said:  # the rows are read more than once
            said.append(line)
            say(line)

    total = prompt_files.count(source)
    if limit is not None:
        total = limit if total is None else min(limit, total)
    return Prompts(
        lambda: islice(prompt_files.read(source, say_once), limit),
        f"{fingerprint(source)}:{limit or 'all'}",
        total,
    )


def pair_prompts(problems: Iterable[Any]) -> Prompts:
    """The bundled pair's problems."""
    rows: list[Row] = [({"id": p.id}, Prompt(text=p.prompt)) for p in problems]
    return Prompts(lambda: rows, f"bundled-{len(rows)}-{rows[0][0]['id']}", len(rows))
