"""`s2t harvest`: labels from training prompts, through a running service or alone in this process.

    prompts -> chunks -> rollouts, scored whole by one LLM prefill -> labels where KL or entropy is
    high -> lake

Plain rollouts are the SLM's greedy ones. Intervened ones are S2T's: the LLM selects at the
divergence points, so their labels lie on the paths that a served answer takes. Thresholds come from
the run's own first prompts. The run's journal keeps them, and which chunks are done: the same
command again continues, and ends with the same labels as a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from s2t_shared.bundled.problems import Problem
from s2t_shared.data import prompts as prompt_files
from s2t_shared.data.prompts import PromptSource, Row, fingerprint
from s2t_shared.data.templates import MIN_TEMPLATES, tell_templates_apart
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.labels.label import Rollout, is_label, with_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.policy import threshold_for
from s2t_shared.splits import check_split
from s2t_shared.types import WARMUP_STEPS, LabelRule, Prompt, Trigger
from services.harvest.journal import CHUNK, Chunk, HarvestJournal
from services.harvest.rollouts import (
    TRIGGERS,
    HarvestOptions,
    RolloutCounts,
    RolloutOutcome,
    RolloutRequest,
    RolloutSource,
)

COMPACT_EVERY = 64  # chunks: so that a long run's shards do not pile up
TEMPLATE_SAMPLE = 1000  # first prompts that tell whether there are templates to hold out
# Entropy and KL are never below 0: these rules mark every position.
EVERY_POSITION = tuple(LabelRule(trigger, -1.0) for trigger in TRIGGERS)


# -- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """What to harvest.

    rows: starts from the first row at every call. fingerprint: stands for their content. total: how
    many rows there are, None where only reading everything would tell. grouped: problems are held
    out by the rows' "group", else each by itself.
    """

    rows: Callable[[], Iterable[Row]]
    fingerprint: str
    total: int | None = None
    grouped: bool = False

    def group(self, row: dict[str, Any]) -> str:
        """The group of a row's problem, "" for a problem of its own."""
        return str(row["group"]) if self.grouped else ""


def open_prompts(
    source: PromptSource, limit: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Prompts:
    """The prompts of a source, the first `limit` of them.

    say: called with each choice of a default, once.

    Raises:
        ConfigError: the source cannot be read.
        EvaluationSplitError: its split is for evaluation.
    """
    said: set[str] = set()

    def say_once(line: str) -> None:
        if line not in said:  # the rows are read more than once
            said.add(line)
            say(line)

    total = prompt_files.count(source)
    if limit is not None:
        total = limit if total is None else min(limit, total)

    def rows() -> Iterator[Row]:
        return islice(prompt_files.read(source, say_once), limit)

    grouped = source.group_column is not None or _has_templates(rows(), say_once)
    return Prompts(rows, f"{fingerprint(source)}:{limit or 'all'}", total, grouped)


def _has_templates(rows: Iterable[Row], say: Callable[[str], None]) -> bool:
    """Whether the first prompts come from enough templates to hold out whole ones."""
    sampled = [row["group"] for row, _ in islice(rows, TEMPLATE_SAMPLE) if _has_group(row)]
    if tell_templates_apart(sampled):
        return True
    templates = len(set(sampled))
    if len(sampled) >= MIN_TEMPLATES:
        say(
            f"the first {len(sampled)} prompts come from {templates} templates, too few to hold "
            "out whole ones: problems are held out one by one, so held-out figures say nothing "
            "about other templates (--group-column names groups)"
        )
    return False


def _has_group(row: dict[str, Any]) -> bool:
    return bool(row.get("group"))


def bundled_prompts(problems: Iterable[Problem]) -> Prompts:
    """The prompts of the bundled pair's problems."""
    rows: list[Row] = [({"id": problem.id}, Prompt(text=problem.prompt)) for problem in problems]
    first_id = rows[0][0]["id"]
    return Prompts(lambda: rows, f"bundled-{len(rows)}-{first_id}", len(rows))


# -- a run ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class HarvestOutcome:
    """What a run has given so far, earlier starts included.

    resumed: prompts that earlier starts did. answered: prompts with a rollout; their chunk may not
    be done. new_labels: of this start, those of open chunks included. errors: one text per prompt
    that can never give labels. failed: one text per prompt that gave none this time.
    """

    run: str = ""
    prompts: int = 0
    resumed: int = 0
    answered: int = 0
    new_labels: int = 0
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


OnProgress = Callable[[HarvestOutcome], None]


def harvest(
    source: RolloutSource,
    prompts: Prompts,
    lake: Lake,
    options: HarvestOptions,
    on_progress: OnProgress = lambda outcome: None,
    say: Callable[[str], None] = lambda line: None,
    again: bool = False,
    journals: Path | None = None,
) -> HarvestOutcome:
    """Harvest what is not done yet.

    again: harvest everything, as after labels were lost; none is counted twice. journals: the
    folder of this lake's journals; without, the lake's own, which must be a folder then.

    Raises:
        EvaluationSplitError: the split is for evaluation.
        ConfigError: another process does this run, the lake cannot be used, or no prompt gave
            anything to calibrate on.
    """
    check_split(options.split)
    identity = _identity(prompts, options, source)
    with HarvestJournal.open(journals or lake.root, identity, again) as journal:
        outcome = HarvestOutcome(run=journal.run_id)
        for chunk in journal.done.values():
            outcome.add(chunk)
        outcome.resumed = outcome.prompts
        outcome.answered = outcome.prompts
        reusable: dict[str, Rollout] = {}
        if not journal.rules:
            if not options.thresholds:
                say(
                    f"run {journal.run_id}: thresholds from the first {options.calibrate_on} "
                    "prompts"
                )
            reusable = _plan(journal, source, prompts, options)
        chunks = _OpenChunks(journal, prompts, lake, source.returns_labels, outcome, on_progress)
        on_progress(outcome)
        if reusable:
            for request in chunks.requests(_first_rows(prompts, options), only=reusable):
                rollout = _relabelled(reusable[request.request_id], journal.rules)
                chunks.on_rollout(request, rollout)
        source.make_rollouts(chunks.requests(prompts.rows()), options, chunks.on_rollout)
        if source.returns_labels:
            lake.compact()
        return outcome


def _identity(prompts: Prompts, options: HarvestOptions, source: RolloutSource) -> dict[str, Any]:
    """Everything that the labels depend on."""
    digests = source.digests
    return {
        "prompts": prompts.fingerprint,
        "grouped": prompts.grouped,
        "task": options.task,
        "split": options.split,
        "budget": options.budget,
        "triggers": [trigger.value for trigger in options.triggers],
        "candidates": options.candidates,
        "intervene": options.intervene,
        "thresholds": [[rule.trigger.value, rule.threshold] for rule in options.thresholds],
        "max_new_tokens": options.max_new_tokens,
        "calibrate_on": options.calibrate_on,
        "slm": digests.slm,
        "llm": digests.llm,
        "tokenizer": digests.tokenizer,
        "template": digests.template,
        "precision": source.precision,
    }


def _request_id(journal: HarvestJournal, row: dict[str, Any]) -> str:
    return f"harvest-{journal.run_id}-{row['id']}"


# -- thresholds -----------------------------------------------------------------------------------


def _first_rows(prompts: Prompts, options: HarvestOptions) -> Iterable[Row]:
    """The rows that give the thresholds.

    They fill whole chunks, so that their rollouts need not be made again.
    """
    chunks = -(-options.calibrate_on // CHUNK)
    return islice(prompts.rows(), chunks * CHUNK)


def _plan(
    journal: HarvestJournal, source: RolloutSource, prompts: Prompts, options: HarvestOptions
) -> dict[str, Rollout]:
    """Fix the thresholds.

    Returns the rollouts that were made for it, by request id, where the harvest can use them too.
    """
    if options.thresholds:
        journal.plan(options.thresholds)
        return {}
    rollouts = _calibration_rollouts(journal, source, prompts, options)
    entropies: list[float] = []
    divergences: list[float] = []
    for rollout in rollouts.values():
        entropies += rollout.entropy[WARMUP_STEPS:]
        divergences += rollout.kl[WARMUP_STEPS:]
    signals = {Trigger.ENTROPY: entropies, Trigger.KL: divergences}
    positions = sum(len(rollout.kl) for rollout in rollouts.values())
    rules = []
    for trigger in options.triggers:
        threshold = threshold_for(options.budget, signals[trigger], positions)
        rules.append(LabelRule(trigger, threshold))
    journal.plan(tuple(rules))
    return rollouts if source.returns_labels and not options.intervene else {}


def _calibration_rollouts(
    journal: HarvestJournal, source: RolloutSource, prompts: Prompts, options: HarvestOptions
) -> dict[str, Rollout]:
    """Greedy rollouts of the first prompts, by request id. Every position is a label.

    Raises:
        ConfigError: some failed, or all are too short to calibrate on.
    """
    rollouts: dict[str, Rollout] = {}
    failed: list[S2TError] = []

    def on_rollout(request: RolloutRequest, outcome: RolloutOutcome) -> None:
        if isinstance(outcome, Rollout):
            rollouts[request.request_id] = outcome
        elif isinstance(outcome, S2TError):
            failed.append(outcome)

    def requests() -> Iterator[RolloutRequest]:
        for row, prompt in _first_rows(prompts, options):
            if isinstance(prompt, Prompt):
                yield RolloutRequest(
                    request_id=_request_id(journal, row),
                    problem_id=str(row["id"]),
                    group=prompts.group(row),
                    prompt=prompt,
                    rules=EVERY_POSITION,
                    calibrating=True,
                )

    source.make_rollouts(requests(), options, on_rollout)
    long_enough = any(len(rollout.kl) > WARMUP_STEPS for rollout in rollouts.values())
    unanswered = any(not isinstance(error, InvalidRequestError) for error in failed)
    if unanswered or not long_enough:
        reason = failed[0] if failed else "there are none"
        raise ConfigError(
            "no thresholds could be calibrated: of the first prompts "
            f"{len(rollouts)} gave a rollout ({reason})"
        )
    return rollouts


def _relabelled(rollout: Rollout, rules: tuple[LabelRule, ...]) -> Rollout:
    """The rollout with those of its labels that the rules mark."""
    marked = []
    for label in rollout.labels:
        signals = {Trigger.KL: label.kl, Trigger.ENTROPY: label.entropy}
        if is_label(signals, rules):
            marked.append(label)
    return with_labels(rollout, tuple(marked))


# -- chunks ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _OpenChunk:
    """A chunk of prompts; `waiting` of its rollouts have no outcome yet."""

    waiting: int
    prompts: int
    rollouts: list[Rollout] = field(default_factory=list)
    counts: list[RolloutCounts] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False


class _OpenChunks:
    """The chunks that a start works on. Each is made durable when its last outcome comes."""

    def __init__(
        self,
        journal: HarvestJournal,
        prompts: Prompts,
        lake: Lake,
        writes_labels: bool,
        outcome: HarvestOutcome,
        on_progress: OnProgress,
    ) -> None:
        """writes_labels: the labels go into `lake`; else a service has stored them."""
        self._journal = journal
        self._prompts = prompts
        self._lake = lake
        self._writes_labels = writes_labels
        self._outcome = outcome
        self._on_progress = on_progress
        self._open: dict[int, _OpenChunk] = {}
        self._chunk_of: dict[str, int] = {}  # request id -> number of its chunk

    def requests(
        self, rows: Iterable[Row], only: dict[str, Rollout] | None = None
    ) -> Iterator[RolloutRequest]:
        """The rollouts that are not done, chunk by chunk.

        only: leave out chunks of which this lacks a rollout, by request id.
        """
        for number, chunk in self._journal.open_chunks(rows):
            new = _OpenChunk(waiting=0, prompts=len(chunk))
            requests = []
            for row, prompt in chunk:
                if isinstance(prompt, Prompt):
                    requests.append(self._request(row, prompt))
                else:
                    new.errors.append(str(prompt))
            if only is not None and any(r.request_id not in only for r in requests):
                continue
            new.waiting = len(requests)
            self._open[number] = new
            self._outcome.answered += len(new.errors)
            if not requests:
                self._close(number)
            for request in requests:
                self._chunk_of[request.request_id] = number
                yield request

    def _request(self, row: dict[str, Any], prompt: Prompt) -> RolloutRequest:
        return RolloutRequest(
            request_id=_request_id(self._journal, row),
            problem_id=str(row["id"]),
            group=self._prompts.group(row),
            prompt=prompt,
            rules=self._journal.rules,
        )

    def on_rollout(self, request: RolloutRequest, outcome: RolloutOutcome) -> None:
        """Count an outcome, and close its chunk when it was the last one."""
        number = self._chunk_of.pop(request.request_id)
        chunk = self._open[number]
        self._outcome.answered += 1
        if isinstance(outcome, InvalidRequestError):
            chunk.errors.append(f"{request.problem_id}: {outcome}")
        elif isinstance(outcome, S2TError):
            chunk.failed = True
            self._outcome.failed.append(f"{request.problem_id}: {outcome}")
        else:
            counts = RolloutCounts.of(outcome)
            if isinstance(outcome, Rollout):
                chunk.rollouts.append(outcome)
            chunk.counts.append(counts)
            self._outcome.new_labels += counts.labels
        chunk.waiting -= 1
        if not chunk.waiting:
            self._close(number)
        self._on_progress(self._outcome)

    def _close(self, number: int) -> None:
        """Make a chunk's labels durable. One that failed stays undone: the next start tries it."""
        chunk = self._open.pop(number)
        if chunk.failed:
            return
        if self._writes_labels:
            rollouts = sorted(chunk.rollouts, key=lambda rollout: rollout.request_id)
            self._lake.write(rollouts, f"{self._journal.run_id}-{number:06d}")
        done = Chunk(
            number=number,
            prompts=chunk.prompts,
            rollouts=len(chunk.counts),
            labels=sum(counts.labels for counts in chunk.counts),
            tokens=sum(counts.tokens for counts in chunk.counts),
            errors=tuple(chunk.errors),
        )
        self._journal.finish(done)
        self._outcome.add(done)
        if self._writes_labels and len(self._journal.done) % COMPACT_EVERY == 0:
            self._lake.compact()
