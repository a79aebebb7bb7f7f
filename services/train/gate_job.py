"""The gate at work: a trained version against what serves now, on the same labels and prompts.

The numbers are made here, in one process with the SLM: labels say what the LLM would select,
`gate_answers` what both sides answer. `s2t_shared.versions.gate` judges them. The labels are the
test labels (`dataset.Part.TEST`), on which nothing was trained or chosen.
"""

from __future__ import annotations

from dataclasses import replace

from s2t_shared.config import Config
from s2t_shared.errors import VersionError
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pair import Pair
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.evaluate import evaluate_local_selector, mean_lm_kl
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.types import (
    Prompt,
    Reading,
)
from s2t_shared.versions.gate import (
    Evidence,
    GateSettings,
    Paired,
    Verdict,
    judge,
)
from s2t_shared.versions.live import LiveVersions
from services.train.gate_answers import (
    compare_by_llm,
    compare_on_tasks,
    held_out_prompts,
    open_sides,
)
from services.train.gate_llm import gate_llm
from services.train.gate_problems import task_problems

SLM_ALONE = "the SLM alone"


# -- the verdict ----------------------------------------------------------------------------------


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
    snapshot = open_lake(config.lake).snapshot(registry.manifest(version).snapshot)
    data = TrainingData(snapshot, runtime.digest, settings)
    labels = _compare_on_labels(runtime, data, settings, new, live)
    lm_kl = None
    if new.reads is Reading.ADAPTED:
        lm_kl = mean_lm_kl(runtime, new, data.test, settings)
    evidence = Evidence(labels=labels, lm_kl=lm_kl)
    if labels.clusters >= settings.gate_min_groups:
        pair = Pair.of(runtime, tokenizer, None, new, others=[live] if live is not None else [])
        evidence = _with_answers(config, evidence, pair, data, live)
    bounds = GateSettings(
        max_lm_kl=settings.gate_max_lm_kl,
        max_task_loss=settings.gate_max_task_loss,
        min_groups=settings.gate_min_groups,
    )
    against = f"the live {live.version}" if live is not None else SLM_ALONE
    return judge(evidence, against, bounds)


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
    return Paired(found.agreed, live_agreed, found.groups)


def _with_answers(
    config: Config, evidence: Evidence, pair: Pair, data: TrainingData, live: LocalSelector | None
) -> Evidence:
    """The evidence, and what both sides answer: to the task set, and to held-out prompts where an
    LLM is at hand."""
    held_out = held_out_prompts(data.test, config.training.gate_prompt_count)
    problems = task_problems(config)
    if not problems and not held_out:
        return evidence
    prompts = [problem.prompt for problem in problems]
    if not prompts:
        prompts = [Prompt(token_ids=r.token_ids[: r.prompt_length]) for r in held_out]
    live_version = live.version if live is not None else None
    sides = open_sides(config, pair, data.llm_digest, live_version, prompts)
    if problems:
        evidence = replace(evidence, tasks=compare_on_tasks(sides, problems))
    if not held_out:
        return evidence
    with gate_llm(config, pair.engine.proposer.info, pair.tokenizer) as llm:
        if llm is None:
            return evidence
        likelihood, finished = compare_by_llm(sides, held_out, llm)
    return replace(evidence, likelihood=likelihood, finished=finished)
