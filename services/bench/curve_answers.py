"""The problems of `s2t bench curve`, answered in each way that its table compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s2t_shared.decode.calibrate import measure_calibration
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator
from s2t_shared.decode.likelihood import mean_log_probs
from s2t_shared.decode.llm_selector import InProcessSelector
from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.labels.label import Rollout
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.policy import Calibration, threshold_for
from s2t_shared.types import (
    WARMUP_STEPS,
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    Trigger,
)
from services.bench.workload import Models
from services.evaluation.problems import Problem

SAMPLES = 8
SLM, MAJORITY = "SLM alone", f"majority@{SAMPLES}"
S2T, LLM = "s2t", "LLM alone"
UNTRAINED = "untrained selector"
PLAIN, PLAIN_GATED = "plain distillation", "plain distillation, gated"
MEASURED_PROMPTS = 128  # for thresholds of triggers whose signals a lake does not hold
# Ways to answer that know no triggers.
UNGATED = (SLM, MAJORITY, LLM, PLAIN)


@dataclass(frozen=True)
class Answered:
    """Outcomes by problem: right or not, and the LLM's mean log-probability per token, nats (empty
    without an LLM)."""

    correct: str
    log_probs: list[float]


class Answerer:
    """Answers the same problems with one pair of models.

    triggers, budgets: each trigger at each share of steps. pattern: finds an answer in a text, for
    the majority.

    Raises:
        ConfigError: a threshold is not known.
    """

    def __init__(
        self,
        models: Models,
        problems: Sequence[Problem],
        *,
        calibration: Calibration,
        triggers: Sequence[Trigger],
        budgets: Sequence[float],
        candidates: int,
        max_new_tokens: int,
        batch: int,
        pattern: str,
    ) -> None:
        self._models = models
        self._problems = problems
        self._calibration = calibration
        self._gates = {f"{t.value} {b:g}": (t, b) for b in budgets for t in triggers}
        self._candidates = candidates
        self._max_new_tokens = max_new_tokens
        self._batch = batch
        self._pattern = pattern
        self._llm = InProcessSelector(models.scorer) if models.scorer is not None else None

    def answer(self, name: str, local: LocalSelector | None = None) -> dict[str, Answered]:
        """Outcomes by condition: "<trigger> <budget>", or "" for a way without triggers."""
        if name == PLAIN_GATED:
            assert local is not None
            local = replace(local, always_on=False)
        if name in UNGATED:
            return {"": self._ask(self._ungated(name), local)}
        mode = Mode.S2T if name == S2T else Mode.S2T_LOCAL
        outcomes = {}
        for condition, (trigger, budget) in self._gates.items():
            if trigger.needs_llm and mode is Mode.S2T_LOCAL:
                continue
            policy = Policy(
                mode=mode,
                trigger=trigger,
                threshold=self._calibration.threshold(trigger, budget),
                candidates=CandidateRule(self._candidates),
            )
            outcomes[condition] = self._ask(policy, local)
        return outcomes

    def _ungated(self, name: str) -> Policy:
        modes = {SLM: Mode.GREEDY, MAJORITY: Mode.MAJORITY, LLM: Mode.LLM, PLAIN: Mode.S2T_LOCAL}
        return Policy(mode=modes[name])

    def _ask(self, policy: Policy, local: LocalSelector | None) -> Answered:
        needs_llm = policy.needs_llm
        if needs_llm and self._llm is None:
            raise ConfigError(f"mode {policy.mode.value} needs an LLM; give --llm")
        engine = Engine(
            self._models.proposer,
            self._llm if needs_llm else None,
            lambda version: local,
            max_num_seqs=self._batch,
        )
        request = GenerateRequest(
            request_id="",
            prompt=self._problems[0].prompt,
            options=DecodeOptions(policy=policy, max_new_tokens=self._max_new_tokens),
            samples=SAMPLES if policy.mode is Mode.MAJORITY else 1,
            answer_pattern=self._pattern,
        )
        requests = (
            replace(request, request_id=str(number), prompt=problem.prompt)
            for number, problem in enumerate(self._problems)
        )
        answers: list[Answer | None] = [None] * len(self._problems)
        for asked, outcome in Generator(self._models.tokenizer, engine).generate(requests):
            if isinstance(outcome, Answer):
                answers[int(asked.request_id)] = outcome
        return self._graded(answers)

    def _graded(self, answers: Sequence[Answer | None]) -> Answered:
        digits = []
        pairs = []
        for problem, answer in zip(self._problems, answers, strict=True):
            digits.append(str(int(answer is not None and problem.is_correct(answer.text))))
            if answer is not None:
                pairs.append((self._models.tokenizer.encode(problem.prompt), answer.token_ids))
            else:
                pairs.append(((), ()))  # has no mean
        if self._llm is None:
            return Answered("".join(digits), [])
        means = mean_log_probs(self._llm, self._models.proposer.info, pairs)
        floor = min((mean for mean in means if mean is not None), default=0.0)
        return Answered("".join(digits), [floor if mean is None else mean for mean in means])


# -- thresholds -----------------------------------------------------------------------------------


def lake_calibration(
    models: Models,
    rollouts: Sequence[Rollout],
    *,
    triggers: Sequence[Trigger],
    budgets: Sequence[float],
    max_new_tokens: int,
    batch: int,
) -> Calibration:
    """Thresholds from plain training rollouts, labelled or not: a harvest leaves entropy and KL of
    every position. Other signals are measured anew on some of their prompts.

    Raises:
        ConfigError: there are no plain rollouts.
    """
    thresholds: dict[Trigger, dict[float, float]] = {}
    for trigger in triggers:
        if trigger is Trigger.ENTROPY:
            thresholds[trigger] = _shares(trigger, [r.entropy for r in rollouts], budgets)
        elif trigger is Trigger.KL:
            thresholds[trigger] = _shares(trigger, [r.kl for r in rollouts], budgets)
        else:
            engine = Engine(models.proposer, None, max_num_seqs=batch)
            prompts = []
            for rollout in rollouts[:MEASURED_PROMPTS]:
                prompts.append(Prompt(token_ids=rollout.token_ids[: rollout.prompt_length]))
            generator = Generator(models.tokenizer, engine)
            measured = measure_calibration(generator, prompts, max_new_tokens, with_llm=False)
            thresholds[trigger] = {b: measured.threshold(trigger, b) for b in budgets}
    return Calibration(thresholds)


def _shares(
    trigger: Trigger, rows: Sequence[Sequence[float]], budgets: Sequence[float]
) -> dict[float, float]:
    """The threshold of each budget, from the signals of whole answers."""
    signals = [signal for row in rows for signal in row[WARMUP_STEPS:]]
    steps = sum(map(len, rows))
    try:
        return {budget: threshold_for(budget, signals, steps) for budget in budgets}
    except InvalidRequestError as error:
        raise ConfigError(
            f"the lake has no plain rollouts to take {trigger.value} thresholds from ({error}); "
            "harvest some without --intervene"
        ) from error
