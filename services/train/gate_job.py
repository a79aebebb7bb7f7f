"""The gate at work: a trained version against what serves now, on the same held-out labels and the
same problems.

The numbers are made here, in one process with the SLM (no LLM: labels say what it would select);
`s2t_shared.versions.gate` judges them. Nothing here trained or chose anything on the labels it uses
(`trees.Part.TEST`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
import torch

from s2t_shared.bundled import problems as pair_problems
from s2t_shared.config import Config
from s2t_shared.data.datasets import open_records, refuse_evaluation
from s2t_shared.data.prompts import read_prompts
from s2t_shared.decode.calibrate import load_calibration, measure_calibration
from s2t_shared.decode.generate import with_thresholds
from s2t_shared.errors import S2TError, VersionError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.local_selector import LocalSelector, Reading
from s2t_shared.model.runtime import ModelRuntime, resolve_model
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pair import Pair
from s2t_shared.policy import Calibration
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.objective import DistillSettings, evaluate_selector
from s2t_shared.types import Answer, DecodeOptions, GenerateRequest, Mode, Policy, Prompt, Trigger
from s2t_shared.versions.gate import GateSettings, Paired, Verdict, judge, objection
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions
from services.evaluation import Problem, load_problems

MAX_NEW_TOKENS = 256
MAX_RETRIES = 3
UNHARVESTED = 1_000_000  # a seed of bundled training problems that no harvest of ours uses
SLM_ALONE = "the SLM alone"
LOCAL = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY)


def judge_apart(config: Config, version: str, settings: DistillSettings) -> Verdict:
    """`judge_version` in a Ray task, where there is room for the SLM as for a training worker.
    Raises as it does."""
    training = config.training
    task = ray.remote(
        num_cpus=training.cpus_per_worker,
        num_gpus=training.gpus_per_worker,
        max_retries=MAX_RETRIES,
    )
    verdict: Verdict | S2TError = ray.get(
        task(_judge).remote(config.model_dump(mode="json"), version, settings)
    )
    if isinstance(verdict, S2TError):
        raise verdict
    return verdict


def _judge(config: dict[str, Any], version: str, settings: DistillSettings) -> Verdict | S2TError:
    """An error of ours comes back, rather than being wrapped in one of Ray's."""
    resolved = Config.model_validate(config)
    torch.set_num_threads(resolved.slm.threads)
    try:
        return judge_version(
            resolved, version, settings, "cuda" if resolved.training.gpus_per_worker else "cpu"
        )
    except S2TError as error:
        return error


def judge_version(config: Config, version: str, settings: DistillSettings, device: str) -> Verdict:
    """Compare `version` with the live one (or with the SLM alone), on the snapshot it was trained
    on.

    Raises:
        VersionError: `version` cannot be loaded. StoreError: its snapshot is gone. ConfigError or
        EvaluationSplitError: as `task_problems`.
    """
    folder = resolve_model(config.slm.model)
    runtime = ModelRuntime.load(str(folder), config.slm.dtype, device, config.slm.kv_bytes)
    tokenizer = Tokenizer.load(folder, config.slm.chat_template)
    training = config.training
    versions = LiveVersions(config.versions)
    registry = versions.registry
    new = registry.load(version, runtime, tokenizer.digest)
    old = _live(versions, runtime, tokenizer)
    snapshot = Lake(config.lake).snapshot(registry.manifest(version).snapshot)
    data = TrainingData(
        snapshot, runtime.digest, settings.weigh, held_out_labels=settings.held_out_labels
    )
    plain = DistillSettings(
        max_tokens=settings.max_tokens
    )  # only the selections count here, not the loss
    ours = evaluate_selector(
        runtime, new, data.test, plain, with_lm_kl=new.reads is Reading.ADAPTED
    )
    theirs = (
        evaluate_selector(runtime, old, data.test, plain).agreed
        if old is not None
        else ours.slm_agreed
    )
    tasks = _tasks(config, runtime, tokenizer, data.llm_digest, new, old)
    return judge(
        Paired(ours.agreed, theirs, ours.problems),
        ours.metrics.get("lm_kl"),
        tasks,
        f"the live {old.version}" if old is not None else SLM_ALONE,
        GateSettings(
            training.gate_min_gain,
            training.gate_max_lm_kl,
            training.gate_max_task_loss,
            training.gate_min_problems,
        ),
    )


def enact(
    versions: LiveVersions, version: str, verdict: Verdict, promote: bool = True
) -> tuple[bool, str]:
    """Make `version` live if the gate opened and no operator objects; whether it is, and why (not).

    Raises:
        VersionError: it is not sound, or the registry's pointer cannot be read.
    """
    reasons = verdict.reasons
    if verdict.passed and promote:
        # A promotion mends a damaged pointer file.
        state = versions.state(if_damaged=NOTHING_LIVE)
        objected = objection(state, versions.events(version), version)
        if not objected:
            versions.promote(version)
            return True, "; ".join(reasons)
        reasons = (objected, *reasons)
    return False, ("" if verdict.passed and not promote else "not promoted: ") + "; ".join(reasons)


def _live(
    versions: LiveVersions, runtime: ModelRuntime, tokenizer: Tokenizer
) -> LocalSelector | None:
    try:
        live = versions.live()
        if live is None:
            return None
        return versions.registry.load(live, runtime, tokenizer.digest)
    except VersionError:
        return None  # a broken or foreign live version is no bar to a sound one


def _tasks(
    config: Config,
    runtime: ModelRuntime,
    tokenizer: Tokenizer,
    llm_digest: str,
    new: LocalSelector,
    old: LocalSelector | None,
) -> Paired | None:
    """Both sides' answers to the task set, at the same budget and thresholds."""
    problems = task_problems(config)
    if not problems:
        return None
    others = [old] if old is not None else []
    pair = Pair.of(runtime, tokenizer, local_selector=new, others=others)
    calibration = _calibration(config, pair, llm_digest, problems)

    def solved(version: str) -> list[bool]:
        """Which problems are answered right with a version; "" stands for the SLM alone."""
        template = GenerateRequest(
            request_id="",
            prompt=Prompt(),
            budget=config.training.gate_budget if version else None,
            options=DecodeOptions(
                policy=LOCAL if version else Policy(),
                max_new_tokens=MAX_NEW_TOKENS,
                version=version,
            ),
        )
        template = with_thresholds(template, calibration)
        requests = [
            replace(template, request_id=str(i), prompt=problem.prompt)
            for i, problem in enumerate(problems)
        ]
        outcomes = {request.request_id: outcome for request, outcome in pair.run(requests)}
        return [_is_correct(p, outcomes[str(i)]) for i, p in enumerate(problems)]

    theirs = solved(old.version if old is not None else "")
    return Paired(solved(new.version), theirs, [problem.id for problem in problems])


def _calibration(
    config: Config, pair: Pair, llm_digest: str, problems: list[Problem]
) -> Calibration:
    """The pair's thresholds where a service has measured them, else measured on the task set."""
    folder = config.data_dir / "calibration"
    known = load_calibration(folder, pair.engine.proposer.info.digest, llm_digest)
    if known is not None and LOCAL.trigger in known.thresholds:
        return known
    prompts = [problem.prompt for problem in problems]
    return measure_calibration(pair.generator, prompts, MAX_NEW_TOKENS, with_llm=False)


def _is_correct(problem: Problem, outcome: object) -> bool:
    return isinstance(outcome, Answer) and problem.is_correct(outcome.text)


def task_problems(config: Config) -> list[Problem]:
    """What both sides answer: training problems, as they decide what is learnt. Empty: there are
    none for this SLM.

    Raises: EvaluationSplitError: the file, or a row's "split", is for evaluation. ConfigError: it
        cannot be read.
    """
    training = config.training
    if training.gate_problems is not None:
        open_records(
            str(training.gate_problems), "train"
        )  # refuses a file that is named like one for evaluation
        for row, _ in read_prompts(training.gate_problems):
            refuse_evaluation(str(row.get("split", "train")))
        return load_problems(
            training.gate_problems, training.gate_problem_count, config.defaults.answer_pattern
        )
    if config.slm.model != "bundled":
        return []

    def grader(problem: pair_problems.Problem) -> Problem:
        return Problem(
            problem.id,
            Prompt(text=problem.prompt),
            lambda text: pair_problems.is_correct(problem, text),
        )

    return [
        grader(p) for p in pair_problems.problems("train", training.gate_problem_count, UNHARVESTED)
    ]
