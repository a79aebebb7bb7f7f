"""The gate at work: a trained version against what serves now, on the same labels and problems.

The numbers are made here, in one process with the SLM: labels say what the LLM would select.
`s2t_shared.versions.gate` judges them. The labels are the test labels (`dataset.Part.TEST`), on
which nothing was trained or chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.config import Config
from s2t_shared.data.datasets import open_records, refuse_evaluation
from s2t_shared.data.prompts import read_prompts
from s2t_shared.decode.calibrate import load_calibration, measure_calibration
from s2t_shared.decode.generate import with_thresholds
from s2t_shared.errors import S2TError, VersionError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.loading import resolve_model
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pair import Pair
from s2t_shared.policy import Calibration
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.evaluate import evaluate_local_selector, mean_lm_kl
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.types import (
    Answer,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    Reading,
    Trigger,
)
from s2t_shared.versions.gate import GateSettings, Paired, Verdict, judge, objection
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions
from services.evaluation import Problem, load_problems

MAX_NEW_TOKENS = 256
MAX_RETRIES = 3
UNHARVESTED_SEED = 1_000_000  # of bundled training problems that no harvest of ours uses
SLM_ALONE = "the SLM alone"
LOCAL = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY)


# -- the verdict ----------------------------------------------------------------------------------


def judge_on_ray(config: Config, version: str) -> Verdict:
    """`judge_version` in a Ray task, which gets the resources of a training worker.

    Raises:
        S2TError: as `judge_version`.
    """
    task = ray.remote(
        num_cpus=config.training.cpus_per_worker,
        num_gpus=config.training.gpus_per_worker,
        max_retries=MAX_RETRIES,
    )
    reference = task(_judge).remote(config.model_dump(mode="json"), version)
    verdict: Verdict | S2TError = ray.get(reference)
    if isinstance(verdict, S2TError):
        raise verdict
    return verdict


def _judge(config: dict[str, Any], version: str) -> Verdict | S2TError:
    """In the task. Our errors are returned, as Ray would wrap a raised one in one of its own."""
    resolved = Config.model_validate(config)
    torch.set_num_threads(resolved.slm.threads)
    try:
        return judge_version(resolved, version)
    except S2TError as error:
        return error


def judge_version(config: Config, version: str) -> Verdict:
    """Compare `version` with the live one, or with the SLM alone.

    On the test labels of the snapshot it was trained on, and on the task set.

    Raises:
        VersionError: `version` cannot be loaded.
        StoreError: its snapshot is gone.
        ConfigError: the task set cannot be read.
        EvaluationSplitError: labels or task set are for evaluation.
    """
    settings = config.training
    folder = resolve_model(config.slm.model)
    kv_bytes = config.slm.kv_bytes
    runtime = ModelRuntime.load(str(folder), config.slm.dtype, settings.device, kv_bytes)
    tokenizer = Tokenizer.load(folder, config.slm.chat_template)
    versions = LiveVersions(config.versions)
    registry = versions.registry
    new = registry.load(version, runtime, tokenizer.digest)
    live = _load_live(versions, runtime, tokenizer)
    snapshot = Lake(config.lake).snapshot(registry.manifest(version).snapshot)
    data = TrainingData(snapshot, runtime.digest, settings)
    labels = _compare_on_labels(runtime, data, settings, new, live)
    lm_kl = None
    if new.reads is Reading.ADAPTED:
        lm_kl = mean_lm_kl(runtime, new, data.test, settings)
    pair = Pair.of(runtime, tokenizer, None, new, others=[live] if live is not None else [])
    tasks = _compare_on_tasks(config, pair, data.llm_digest, new, live)
    bounds = GateSettings(
        min_gain=settings.gate_min_gain,
        max_lm_kl=settings.gate_max_lm_kl,
        max_task_loss=settings.gate_max_task_loss,
        min_problems=settings.gate_min_problems,
    )
    against = f"the live {live.version}" if live is not None else SLM_ALONE
    return judge(labels, lm_kl, tasks, against, bounds)


def _load_live(
    versions: LiveVersions, runtime: ModelRuntime, tokenizer: Tokenizer
) -> LocalSelector | None:
    try:
        live = versions.live()
        if live is None:
            return None
        return versions.registry.load(live, runtime, tokenizer.digest)
    except VersionError:
        return None  # a broken or foreign live version does not keep a sound one out


def enact(
    versions: LiveVersions, version: str, verdict: Verdict, promote: bool = True
) -> tuple[bool, str]:
    """Make `version` live if the gate opened and no operator objects.

    Returns whether it is live, and why, or why not.

    Raises:
        VersionError: the version is not sound, or the registry's pointer cannot be read.
    """
    found = "; ".join(verdict.reasons)
    if not verdict.passed:
        return False, f"not promoted: {found}"
    if not promote:
        return False, found
    # A promotion replaces a damaged pointer file.
    state = versions.state(if_damaged=NOTHING_LIVE)
    objected = objection(state, versions.events(version), version)
    if objected:
        return False, f"not promoted: {objected}; {found}"
    versions.promote(version)
    return True, found


# -- the comparisons ------------------------------------------------------------------------------


def _compare_on_labels(
    runtime: ModelRuntime,
    data: TrainingData,
    settings: TrainingSettings,
    new: LocalSelector,
    live: LocalSelector | None,
) -> Paired:
    """Which test labels both sides agree with."""
    # Only the selections count here, so any objective will do.
    plain = TrainingSettings(max_tokens=settings.max_tokens)
    found = evaluate_local_selector(runtime, new, data.test, plain)
    live_agreed = found.slm_agreed
    if live is not None:
        live_agreed = evaluate_local_selector(runtime, live, data.test, plain).agreed
    return Paired(found.agreed, live_agreed, found.problems)


def _compare_on_tasks(
    config: Config, pair: Pair, llm_digest: str, new: LocalSelector, live: LocalSelector | None
) -> Paired | None:
    """Both sides' answers to the task set, at the same budget and thresholds; None without one."""
    problems = task_problems(config)
    if not problems:
        return None
    calibration = _calibration(config, pair, llm_digest, problems)
    options = DecodeOptions(policy=LOCAL, max_new_tokens=MAX_NEW_TOKENS)
    template = GenerateRequest(
        request_id="", prompt=Prompt(), budget=config.training.gate_budget, options=options
    )
    local = with_thresholds(template, calibration)
    alone = replace(template, budget=None, options=replace(options, policy=Policy(), version=""))

    def of_version(version: str) -> GenerateRequest:
        return replace(local, options=replace(local.options, version=version))

    old = of_version(live.version) if live is not None else alone
    return Paired(
        _solved(pair, problems, of_version(new.version)),
        _solved(pair, problems, old),
        [problem.id for problem in problems],
    )


def _solved(pair: Pair, problems: Sequence[Problem], template: GenerateRequest) -> list[bool]:
    """Which problems are answered right. template: the request without a prompt."""
    requests = []
    for number, problem in enumerate(problems):
        requests.append(replace(template, request_id=str(number), prompt=problem.prompt))
    solved = [False] * len(problems)
    for request, outcome in pair.run(requests):
        number = int(request.request_id)
        if isinstance(outcome, Answer):
            solved[number] = problems[number].is_correct(outcome.text)
    return solved


def _calibration(
    config: Config, pair: Pair, llm_digest: str, problems: Sequence[Problem]
) -> Calibration:
    """Thresholds of SLM and LLM where a service has measured them, else of the SLM on the task set.

    The gate has no LLM, so the pair's own calibration would not be that of the service.
    """
    folder = config.data_dir / "calibration"
    known = load_calibration(folder, pair.engine.proposer.info.digest, llm_digest)
    if known is not None and LOCAL.trigger in known.thresholds:
        return known
    prompts = [problem.prompt for problem in problems]
    return measure_calibration(pair.generator, prompts, MAX_NEW_TOKENS, with_llm=False)


# -- the task set ---------------------------------------------------------------------------------


def task_problems(config: Config) -> list[Problem]:
    """The problems that both sides answer; empty where there are none for this SLM.

    They are training problems, as they decide what serves.

    Raises:
        EvaluationSplitError: the file, or a row's "split", is for evaluation.
        ConfigError: the file cannot be read.
    """
    training = config.training
    count = training.gate_problem_count
    if training.gate_problems is not None:
        # Refuses a file that is named like one for evaluation.
        open_records(str(training.gate_problems), "train")
        for row, _ in read_prompts(training.gate_problems):
            refuse_evaluation(str(row.get("split", "train")))
        return load_problems(training.gate_problems, count, config.defaults.answer_pattern)
    if config.slm.model != "bundled":
        return []
    return [_graded(p) for p in bundled_problems.problems("train", count, UNHARVESTED_SEED)]


def _graded(problem: bundled_problems.Problem) -> Problem:
    def is_correct(text: str) -> bool:
        return bundled_problems.is_correct(problem, text)

    return Problem(problem.id, Prompt(text=problem.prompt), is_correct)
