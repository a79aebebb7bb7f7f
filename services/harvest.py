"""`s2t harvest`: labels from training prompts, by a running service or alone in this process.

Plain harvest: greedy SLM rollouts, then one LLM prefill over each finished rollout scores all its positions; the
positions whose entropy or KL lies in the top share become labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2t_shared.calibrate import measure_calibration
from s2t_shared.errors import InvalidRequestError, S2TError
from s2t_shared.generate import GenerateRequest, Generator, with_thresholds
from s2t_shared.labels import Digests, check_split, labels_of, write_shard
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import CandidateRule, LabelOptions, Policy, Prompt, Trigger
from services.load import Target, answer_all

Row = tuple[dict[str, Any], Prompt | InvalidRequestError]
TRIGGERS = (Trigger.ENTROPY, Trigger.KL)


@dataclass(frozen=True)
class HarvestOptions:
    """`budget`: share of positions per trigger that become labels; `candidates`: K of a label."""

    task: str = ""
    split: str = "train"
    budget: float = 0.1
    candidates: int = 16
    max_new_tokens: int = 256
    triggers: tuple[Trigger, ...] = TRIGGERS


@dataclass
class HarvestOutcome:
    """What a harvest did. `errors`: one text per prompt that gave none."""

    prompts: int = 0
    labels: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


def usable(rows: Iterable[Row], outcome: HarvestOutcome) -> list[tuple[dict[str, Any], Prompt]]:
    """The rows with a prompt; the others' errors are noted."""
    good = []
    for row, prompt in rows:
        if isinstance(prompt, Prompt):
            check_split(str(row.get("split", "train")))
            good.append((row, prompt))
        else:
            outcome.errors.append(str(prompt))
    return good


def harvest_by_service(target: Target, rows: Iterable[Row], options: HarvestOptions,
                       on_progress: Callable[[], None] = lambda: None) -> HarvestOutcome:
    """Labels go to the service's store and lake.

    Raises:
        EvaluationSplitError: the split, or a row's own, is for evaluation.
    """
    check_split(options.split)
    outcome = HarvestOutcome()

    def note(answer: pb.Answer | S2TError) -> None:
        if isinstance(answer, S2TError):
            outcome.errors.append(str(answer))
        elif answer.usage.degraded_steps:
            outcome.errors.append("the LLM did not score a rollout")
        else:
            outcome.prompts += 1
            outcome.labels += answer.labels_stored
            outcome.tokens += answer.usage.completion_tokens
        on_progress()

    questions = ((f"harvest-{row['id']}", _parameters(row, prompt, options)) for row, prompt in usable(rows, outcome))
    answer_all(target, questions, on_answer=note)
    return outcome


def _parameters(row: dict[str, Any], prompt: Prompt, options: HarvestOptions) -> pb.GenerationParameters:
    return pb.GenerationParameters(
        **prompt_fields(prompt), mode=pb.MODE_GREEDY, score_rollout=True, candidates=options.candidates,
        max_new_tokens=options.max_new_tokens,
        labels=pb.LabelOptions(store=True, task=options.task, problem_id=str(row["id"]), split=options.split,
                               triggers=[f"TRIGGER_{t.name}" for t in options.triggers],
                               budget=options.budget))


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """The wire's prompt field of a prompt."""
    if prompt.text is not None:
        return {"text": prompt.text}
    if prompt.messages:
        return {"messages": pb.Messages(messages=[pb.Message(role=m.role, content=m.content)
                                                  for m in prompt.messages])}
    return {"token_ids": pb.TokenIds(ids=prompt.token_ids)}


def harvest_alone(generator: Generator, rows: Iterable[Row], lake: Path, options: HarvestOptions,
                  shard_rows: int = 2000, on_progress: Callable[[], None] = lambda: None) -> HarvestOutcome:
    """Labels go straight into Parquet shards; thresholds are calibrated on the first prompts of the run.

    Raises:
        EvaluationSplitError: the split, or a row's own, is for evaluation.
    """
    check_split(options.split)
    outcome = HarvestOutcome()
    good = usable(rows, outcome)
    calibration = measure_calibration(generator, [prompt for _, prompt in good[:64]], options.max_new_tokens,
                                      with_llm=True)
    runtime = generator.engine.proposer.runtime
    digests = Digests(runtime.digest, generator.llm_digest, generator.tokenizer.digest)
    requests = (with_thresholds(GenerateRequest(
        str(row["id"]), prompt, Policy(candidates=CandidateRule(options.candidates)), score_rollout=True,
        max_new_tokens=options.max_new_tokens,
        labels=LabelOptions(True, options.task, str(row["id"]), options.split, options.triggers, options.budget)),
        calibration) for row, prompt in good)
    pending = []
    for request, answer in generator.generate(requests):
        on_progress()
        if isinstance(answer, S2TError):
            outcome.errors.append(f"{request.request_id}: {answer}")
            continue
        outcome.prompts += 1
        outcome.tokens += len(answer.token_ids)
        prompt_ids = generator.tokenizer.encode(request.prompt)
        pending += labels_of(prompt_ids, answer.steps, request.policy.candidates, request.labels, digests,
                             request.request_id)
        if len(pending) >= shard_rows:
            outcome.labels += len(pending)
            write_shard(lake, pending)
            pending = []
    if pending:
        outcome.labels += len(pending)
        write_shard(lake, pending)
    return outcome


def pair_rows(problems: Iterable[Any]) -> list[Row]:
    """The bundled pair's problems as rows."""
    return [({"id": p.id}, Prompt(text=p.prompt)) for p in problems]
