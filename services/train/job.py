"""`s2t train`: a Ray Train job over a frozen snapshot of the label lake, published and gated.

    freeze -> job id -> train (checkpoints) -> publish -> gate -> promote

A process may die at any moment: the same command goes on from what is on disk (`jobs`).
"""

from __future__ import annotations

import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError, EvaluationSplitError, S2TError
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry
from services.launch.ray_connection import local_ray
from services.train.gate import enact, judge_on_ray
from services.train.gate_problems import task_problems
from services.train.jobs import Job, close_job, forget_job, open_job
from services.train.progress import (
    OnProgress,
    clear_failure,
    error_of,
    read_failure,
    watched_progress,
)

MAX_FAILURES = 3  # of workers, before a job gives up
COLLECTIVE_S = 300  # that one worker waits for the others


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a training run did.

    live_agree_at_1: of the version (or SLM) it was compared with, on the same labels; None where
    there were too few to compare. figures: what the gate measured.
    """

    version: str
    promoted: bool
    reason: str
    metrics: dict[str, float]
    live_agree_at_1: float | None
    training_labels: int
    held_out_labels: int
    steps: int
    snapshot: str
    job: str
    figures: dict[str, float]


def train(
    config: Config,
    promote: bool = True,
    on_progress: OnProgress = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainOutcome:
    """Train, publish, and promote when the gate opens, on the Ray of this process, else on one that
    is found or started once there is something to train.

    What an earlier, killed call has done is not done again.

    Raises:
        StoreError: no or too few labels, or a folder cannot be used.
        ConfigError: the labels are of another SLM, or a setting is wrong.
        EvaluationSplitError: labels, or the gate's problems, are for evaluation.
        S2TError: the workers failed; the same call goes on from their last checkpoint.
    """
    task_problems(config)  # what is wrong with them is reported now, not after the training
    job = open_job(config, say)
    registry = Registry(config.versions)
    try:
        with local_ray():
            if registry.find_job(job.id) is None:
                _run(config, job, on_progress)
            manifest = registry.find_job(job.id)
            if manifest is None:
                raise S2TError(f"training job {job.id} ended without a version; run it again")
            outcome = _gate(config, manifest, promote)
    except (ConfigError, EvaluationSplitError):
        # Settings or labels are wrong: the next command must not go on with this job.
        forget_job(config, job)
        raise
    skipped = manifest.training.get("skipped_labels")
    if skipped:
        say(f"{skipped:,} labels of other SLMs or LLMs were skipped")
    close_job(config, job)
    return outcome


# -- on Ray Train ---------------------------------------------------------------------------------


def _run(config: Config, job: Job, on_progress: OnProgress) -> None:
    """Run workers until a version of `job` is published.

    Raises:
        S2TError: what a worker raised; or workers died too often.
    """
    folder = job.folder(config)
    clear_failure(folder)
    ray_folder = config.data_dir / "training" / "ray"
    attempt = f"{job.id}-{uuid.uuid4().hex}"
    trainer = _trainer(config, job, ray_folder, attempt)
    try:
        with _own_interrupts(), watched_progress(folder, on_progress):
            outcome: dict[str, Any] = trainer.fit().return_value or {}
    except ray.train.TrainingFailedError as error:
        cause = read_failure(folder)
        if cause is not None:
            raise cause from error
        raise S2TError(
            f"the training job failed: {_last_line(error)}; the same command goes on from its last "
            "checkpoint"
        ) from error
    finally:
        shutil.rmtree(ray_folder / attempt, ignore_errors=True)
    if "error" in outcome:
        raise error_of(outcome)


def _trainer(config: Config, job: Job, ray_folder: Path, attempt: str) -> TorchTrainer:
    settings = config.training
    backend = "nccl" if settings.gpus_per_worker else "gloo"

    def work(arguments: dict[str, Any]) -> dict[str, str]:
        # Found by name where it runs: Ray Train's controller, which only hands it on, would import
        # torch and transformers for it.
        from services.train.worker import run_worker

        return run_worker(arguments)

    return TorchTrainer(
        work,
        train_loop_config={"config": config.model_dump(mode="json"), "job": asdict(job)},
        torch_config=TorchConfig(backend=backend, timeout_s=COLLECTIVE_S),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=_resources(settings),
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(ray_folder),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )


def _resources(settings: TrainingSettings) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return resources


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Give Ctrl-C its usual meaning back.

    Ray Train installs a handler of its own, which stops the workers, ends this process, and stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# -- the gate -------------------------------------------------------------------------------------


def _gate(config: Config, manifest: Manifest, promote: bool) -> TrainOutcome:
    """Judge the version, and promote it when the gate opens."""
    versions = LiveVersions(config.versions)
    if versions.state(if_damaged=NOTHING_LIVE).version == manifest.version:
        agreed = manifest.metrics["agree_at_1"]
        return _outcome(manifest, True, f"{manifest.version} is live already", agreed, {})
    verdict = judge_on_ray(config, manifest.version)
    versions.record("gate", manifest.version, **verdict.as_json())
    promoted, reason = enact(versions, manifest.version, verdict, promote)
    live = verdict.figures.get("agree_at_1_old")
    return _outcome(manifest, promoted, reason, live, verdict.figures)


def _outcome(
    manifest: Manifest, promoted: bool, reason: str, live: float | None, figures: dict[str, float]
) -> TrainOutcome:
    training = manifest.training
    return TrainOutcome(
        version=manifest.version,
        promoted=promoted,
        reason=reason,
        metrics=manifest.metrics,
        live_agree_at_1=live,
        training_labels=int(training["training_labels"]),
        held_out_labels=int(training["held_out_labels"]),
        steps=int(training["steps_done"]),
        snapshot=manifest.snapshot,
        job=manifest.job,
        figures=figures,
    )
