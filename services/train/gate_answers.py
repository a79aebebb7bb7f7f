"""What a new version and the old side answer, for the gate: right or wrong, and how likely the LLM
finds it.

Both sides answer the same prompts at the same budget and thresholds, in this process. The prompts
are those of test labels (`dataset.Part.TEST`), on which nothing was trained or chosen, and a task
set of training problems whose right answers are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s2t_shared.config import Config
from s2t_shared.decode.calibrate import load_calibration, measure_calibration
from s2t_shared.decode.generate import with_thresholds
from s2t_shared.decode.interfaces import SelectorClient
from s2t_shared.decode.likelihood import mean_log_probs
from s2t_shared.labels.label import Rollout
from s2t_shared.pair import Pair
from s2t_shared.policy import Calibration
from s2t_shared.types import (
    Answer,
    DecodeOptions,
    FinishReason,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    Trigger,
)
from s2t_shared.versions.gate import Paired
from services.evaluation.problems import Problem

MAX_NEW_TOKENS = 256
LOCAL = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY)


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Who answers: requests of the new version and of the old side, without prompts."""

    pair: Pair
    new: GenerateRequest
    old: GenerateRequest


def open_sides(
    config: Config, pair: Pair, llm_digest: str, live: str | None, prompts: Sequence[Prompt]
) -> Sides:
    """The sides of a comparison. The new version is `pair`'s own.

    live: the version to compare with, None for the SLM alone. prompts: for thresholds, where none
    of this pair of models are known.
    """
    assert pair.local_selector is not None
    calibration = _calibration(config, pair, llm_digest, prompts)
    options = DecodeOptions(policy=LOCAL, max_new_tokens=MAX_NEW_TOKENS)
    template = GenerateRequest(
        request_id="", prompt=Prompt(), budget=config.training.gate_budget, options=options
    )
    local = with_thresholds(template, calibration)
    alone = replace(template, budget=None, options=replace(options, policy=Policy(), version=""))

    def of_version(version: str) -> GenerateRequest:
        return replace(local, options=replace(local.options, version=version))

    return Sides(
        pair=pair,
        new=of_version(pair.local_selector.version),
        old=of_version(live) if live is not None else alone,
    )


def compare_on_tasks(sides: Sides, problems: Sequence[Problem]) -> Paired:
    """Which problems each side answers right."""

    def solved(template: GenerateRequest) -> list[bool]:
        answers = _answers(sides.pair, [problem.prompt for problem in problems], template)
        return [
            answer is not None and problem.is_correct(answer.text)
            for problem, answer in zip(problems, answers, strict=True)
        ]

    return Paired(
        solved(sides.new), solved(sides.old), [problem.group or problem.id for problem in problems]
    )


def compare_by_llm(
    sides: Sides, rollouts: Sequence[Rollout], llm: SelectorClient
) -> tuple[Paired, Paired]:
    """The LLM's mean log-probability per token of each side's answers, nats, and whether each
    answer ended by itself.

    The end of an answer is one of its tokens. A prompt that one side cannot answer, or the LLM
    cannot score, is left out.
    """
    prompts = [rollout.token_ids[: rollout.prompt_length] for rollout in rollouts]
    texts = [Prompt(token_ids=ids) for ids in prompts]
    new = _answers(sides.pair, texts, sides.new)
    old = _answers(sides.pair, texts, sides.old)
    slm = sides.pair.engine.proposer.info
    new_means = mean_log_probs(llm, slm, _with_answers(prompts, new))
    old_means = mean_log_probs(llm, slm, _with_answers(prompts, old))
    likelihood: list[tuple[float, float, str]] = []
    finished: list[tuple[bool, bool, str]] = []
    for i, rollout in enumerate(rollouts):
        new_answer, old_answer = new[i], old[i]
        if new_answer is None or old_answer is None:
            continue
        finished.append((_ended(new_answer), _ended(old_answer), rollout.split_group))
        new_mean, old_mean = new_means[i], old_means[i]
        if new_mean is not None and old_mean is not None:
            likelihood.append((new_mean, old_mean, rollout.split_group))
    return _paired(likelihood), _paired(finished)


def held_out_prompts(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """The first rollout of each problem, `count` at most."""
    first: dict[str, Rollout] = {}
    for rollout in rollouts:
        first.setdefault(rollout.problem, rollout)
    return list(first.values())[:count]


# -- answers --------------------------------------------------------------------------------------


def _answers(
    pair: Pair, prompts: Sequence[Prompt], template: GenerateRequest
) -> list[Answer | None]:
    """Each prompt's answer, None for one that failed. template: the request without a prompt."""
    requests = []
    for number, prompt in enumerate(prompts):
        requests.append(replace(template, request_id=str(number), prompt=prompt))
    answers: list[Answer | None] = [None] * len(prompts)
    for request, outcome in pair.run(requests):
        if isinstance(outcome, Answer):
            answers[int(request.request_id)] = outcome
    return answers


def _with_answers(
    prompts: Sequence[tuple[int, ...]], answers: Sequence[Answer | None]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (prompt, answer.token_ids if answer is not None else ())
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _ended(answer: Answer) -> bool:
    return answer.finish_reason is FinishReason.STOP


def _paired(items: Sequence[tuple[float, float, str]]) -> Paired:
    return Paired(
        [new for new, _, _ in items],
        [old for _, old, _ in items],
        [group for _, _, group in items],
    )


# -- thresholds ------------------------------------------------------------------------------------


def _calibration(
    config: Config, pair: Pair, llm_digest: str, prompts: Sequence[Prompt]
) -> Calibration:
    """Thresholds of SLM and LLM where a service has measured them, else of the SLM on `prompts`."""
    folder = config.data_dir / "calibration"
    known = load_calibration(folder, pair.engine.proposer.info.digest, llm_digest)
    if known is not None and LOCAL.trigger in known.thresholds:
        return known
    return measure_calibration(pair.generator, prompts, MAX_NEW_TOKENS, with_llm=False)
