"""`s2t train`: a Ray Train job over a frozen snapshot of the lake, publication, and the gate to
becoming live.

    freeze -> job id -> train (checkpoints in data_dir/training/<job>/) -> publish -> gate ->
    promote

Whatever process dies when: a job's id is a hash of everything that decides its outcome, so that the
same command finds its checkpoints, or the version it has published, and goes on from there. Each
worker trains on its share (gradients averaged over torch.distributed: gloo on CPUs, NCCL on GPUs);
rank 0 writes and publishes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from s2t_shared import errors  # noqa: E402
from s2t_shared.config import Config, TrainingConfig  # noqa: E402
from s2t_shared.decode.calibrate import load_calibration  # noqa: E402
from s2t_shared.errors import ConfigError, EvaluationSplitError, S2TError  # noqa: E402
from s2t_shared.files import locked, write_atomically  # noqa: E402
from s2t_shared.labels.lake import Lake  # noqa: E402
from s2t_shared.labels.shards import Snapshot  # noqa: E402
from s2t_shared.model.local_selector import Reading, Scoring, SelectorKind  # noqa: E402
from s2t_shared.model.runtime import ModelRuntime, model_digest, resolve_model  # noqa: E402
from s2t_shared.model.tokenizer import RESERVED_COUNT, Tokenizer, reserved_ids  # noqa: E402
from s2t_shared.policy import Calibration  # noqa: E402
from s2t_shared.training.checkpoints import load_checkpoint  # noqa: E402
from s2t_shared.training.losses import MarginFilter, Objective  # noqa: E402
from s2t_shared.training.objective import DistillSettings  # noqa: E402
from s2t_shared.training.trainer import Distilled, Point, distil  # noqa: E402
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions  # noqa: E402
from s2t_shared.versions.manifest import Manifest  # noqa: E402
from s2t_shared.versions.registry import Registry  # noqa: E402
from services.train.curves import CurveWriter, curve_files  # noqa: E402
from services.train.gate_job import enact, judge_apart, task_problems  # noqa: E402

MAX_FAILURES = 3  # of workers, before a job gives up
COLLECTIVE_S = 300  # that one worker waits for the others
JOB, PROGRESS, FAILURE = "job.json", "progress.json", "failure.json"
PROGRESS_S = 0.5
ENUMS: dict[str, type[Enum]] = {
    "kind": SelectorKind,
    "reads": Reading,
    "scoring": Scoring,
    "objective": Objective,
    "teacher_margin": MarginFilter,
}


@dataclass(frozen=True)
class Job:
    """What decides a training run's outcome. `init`: the version it starts from, or ""."""

    id: str
    snapshot: str
    init: str

    def folder(self, config: Config) -> Path:
        return config.data_dir / "training" / self.id


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where a running job stands. loss: of the last step; validation_loss, agree_at_1: at the last
    validation."""

    step: int
    steps: int
    loss: float
    validation_loss: float
    agree_at_1: float


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a training run did. `live_agree_at_1`: of the version (or SLM) it was compared with, on
    the same labels; None where there were too few to compare. `figures`: what the gate measured."""

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


def distill_config(settings: TrainingConfig) -> DistillSettings:
    """Raises ConfigError: settings that contradict one another."""
    values = {f.name: getattr(settings, f.name) for f in fields(DistillSettings)}
    return DistillSettings(**values | {name: kind(values[name]) for name, kind in ENUMS.items()})


# -- the job --------------------------------------------------------------------------------------


def train(
    config: Config,
    promote: bool = True,
    on_progress: Callable[[TrainProgress], None] = lambda p: None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainOutcome:
    """Train, publish, and promote when the gate opens; what an earlier, killed call has done is not
    done again. Needs an initialised Ray.

    Raises: StoreError: no or too few labels, or a folder cannot be used. ConfigError: the labels
        are of another SLM, or a setting is wrong. EvaluationSplitError: labels, or the gate's
        problems, are for evaluation. S2TError: the workers failed; the same call goes on from their
        last checkpoint.
    """
    distill_config(config.training)
    task_problems(config)  # what is wrong with them is said now, not after the training
    job, registry = _open_job(config, say), Registry(config.versions)
    try:
        if registry.find_job(job.id) is None:
            _run(config, job, on_progress)
        manifest = registry.find_job(job.id)
        if manifest is None:
            raise S2TError(f"training job {job.id} ended without a version; run it again")
        outcome = _gate(config, manifest, promote)
    except (
        ConfigError,
        EvaluationSplitError,
    ):  # of settings or labels: it must not stand in the next one's way
        (job.folder(config) / JOB).unlink(missing_ok=True)
        raise
    if skipped := manifest.training.get("skipped_labels"):
        say(f"{skipped:,} labels of other SLMs or LLMs were skipped")
    _close_job(config, job)
    return outcome


def job_of(config: Config, snapshot: str, slm_digest: str) -> Job:
    """The job that these settings make of a snapshot.

    Raises:
        VersionError: `training.init_from` names a version that is not there.
    """
    versions, init = LiveVersions(config.versions), config.training.init_from
    if init == "live":
        init = versions.live() or ""
    elif init:
        versions.registry.folder(init)
    content = json.dumps(
        [
            snapshot,
            asdict(distill_config(config.training)),
            slm_digest,
            init,
            config.slm.dtype,
            config.training.workers,
            config.training.sharding,
        ],
        default=str,
    )
    return Job(hashlib.sha256(content.encode()).hexdigest()[:16], snapshot, init)


def _open_job(config: Config, say: Callable[[str], None]) -> Job:
    """The job to do now: one that a killed process left, though labels came since; else that of the
    labels there are now."""
    if (job := unfinished_job(config)) is not None:
        found = load_checkpoint(job.folder(config))
        say(
            f"job {job.id} was interrupted{f' after {found.step} steps' if found else ''}; it goes on (labels that "
            "came since are for the next one)"
        )
        return job
    job = job_of(
        config, Lake(config.lake).freeze().id, model_digest(resolve_model(config.slm.model))
    )
    job.folder(config).mkdir(parents=True, exist_ok=True)
    write_atomically(job.folder(config) / JOB, json.dumps(asdict(job)))
    return job


def unfinished_job(config: Config) -> Job | None:
    """The latest job of these settings that has a checkpoint or a version but was not gated."""
    notes = sorted(
        (config.data_dir / "training").glob(f"*/{JOB}"),
        key=lambda p: p.stat().st_mtime,
        reverse=True,
    )
    digest = model_digest(resolve_model(config.slm.model)) if notes else ""
    for note in notes:
        with suppress(
            OSError, ValueError, TypeError, S2TError
        ):  # its snapshot or starting version may be gone
            job = Job(**json.loads(note.read_text(encoding="utf-8")))
            begun = load_checkpoint(job.folder(config)) or Registry(config.versions).find_job(
                job.id
            )
            if begun and job_of(config, Lake(config.lake).snapshot(job.snapshot).id, digest) == job:
                return job
    return None


def _close_job(config: Config, job: Job) -> None:
    """The version has it all, and what older jobs had come to is past: their checkpoints go, the
    TensorBoard events stay."""
    ours = job.folder(config)
    for folder in {ours, *ours.parent.glob("*/")}:
        if not (folder / ".lock").exists():
            continue  # no job's folder
        with suppress(OSError), locked(folder / ".lock", wait=False) as held:
            note = folder / JOB
            past = not note.exists() or note.stat().st_mtime <= (ours / JOB).stat().st_mtime
            if held and past:  # not those of a job that runs
                for checkpoint in folder.glob("step-*"):
                    shutil.rmtree(checkpoint, ignore_errors=True)
    (ours / JOB).unlink(missing_ok=True)


def _run(config: Config, job: Job, on_progress: Callable[[TrainProgress], None]) -> None:
    """Until a version of `job` is published.

    Raises:
        What a worker raised. S2TError: workers died too often.
    """
    failure = job.folder(config) / FAILURE
    failure.unlink(missing_ok=True)
    settings, attempt = config.training, f"{job.id}-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "job": asdict(job)},
        torch_config=TorchConfig(
            backend="nccl" if settings.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_S
        ),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=_resources(settings),
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(config.data_dir / "training" / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        with _own_interrupts(), _watching(job.folder(config) / PROGRESS, on_progress):
            outcome: dict[str, Any] = trainer.fit().return_value or {}
    except ray.train.TrainingFailedError as error:
        with suppress(OSError, ValueError, LookupError):
            raise _error_of(json.loads(failure.read_text(encoding="utf-8"))) from error
        raise S2TError(
            f"the training job failed: {_last_line(error)}; the same command goes on from its last "
            "checkpoint"
        ) from error
    finally:
        shutil.rmtree(config.data_dir / "training" / "ray" / attempt, ignore_errors=True)
    if "error" in outcome:
        raise _error_of(outcome)


def _error_of(failure: dict[str, str]) -> S2TError:
    return cast("S2TError", vars(errors)[failure["kind"]](failure["error"]))


def _resources(settings: TrainingConfig) -> dict[str, float]:
    gpus = {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
    return {"CPU": settings.cpus_per_worker, **gpus}


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ray Train answers Ctrl-C with a handler of its own, which stops the workers, ends this
    process, and stays: give it back its meaning."""
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


@contextmanager
def _watching(file: Path, on_progress: Callable[[TrainProgress], None]) -> Iterator[None]:
    """Report what rank 0 writes to `file`, on whatever node it runs."""
    file.unlink(missing_ok=True)
    stop, last = threading.Event(), ""

    def look() -> None:
        nonlocal last
        with suppress(OSError):
            if (text := file.read_text(encoding="utf-8")) != last:
                last = text
                on_progress(TrainProgress(**json.loads(text)))

    def watch() -> None:
        while not stop.wait(PROGRESS_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


# -- in a worker ----------------------------------------------------------------------------------


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs in every training worker. One alone returns an error that trying again cannot mend.
    Among several it is noted and raised, which stops the others: they would wait for this one, and
    only rank 0's return value is heard. Any other error, and a worker's death, starts all workers
    again from the last checkpoint."""
    config, job = Config.model_validate(arguments["config"]), Job(**arguments["job"])
    place = ray.train.get_context()
    torch.set_num_threads(config.slm.threads)
    try:
        train_and_publish(config, job, place.get_world_rank() == 0)
        return {}
    except S2TError as error:
        failure = {"error": str(error), "kind": type(error).__name__}
        if place.get_world_size() == 1:
            return failure
        with suppress(OSError):
            write_atomically(job.folder(config) / FAILURE, json.dumps(failure))
        raise


def train_and_publish(config: Config, job: Job, publishes: bool) -> Manifest | None:
    """The job itself, with no Ray in sight: read, train, publish. Called again it goes on where it
    was killed."""
    folder = resolve_model(config.slm.model)
    runtime = ModelRuntime.load(
        str(folder), config.slm.dtype, "cuda" if config.training.gpus_per_worker else "cpu"
    )
    tokenizer = Tokenizer.load(folder, config.slm.chat_template)
    reserved = reserved_ids(tokenizer, runtime.vocab_rows)
    settings, snapshot = distill_config(config.training), Lake(config.lake).snapshot(job.snapshot)
    registry = Registry(config.versions)
    init = registry.load(job.init, runtime, tokenizer.digest) if job.init else None
    with _sole_writer(job.folder(config) if publishes else None):
        curves, written = CurveWriter(job.folder(config) / "tensorboard"), 0.0

        def progress(step: int, loss: float, point: Point) -> None:
            nonlocal written
            if not publishes:
                return
            curves.write(step, loss, point)
            if time.monotonic() - written > PROGRESS_S or step == settings.steps:
                written = time.monotonic()
                now = TrainProgress(
                    step=step,
                    steps=settings.steps,
                    loss=loss,
                    validation_loss=point.loss,
                    agree_at_1=point.agree_at_1,
                )
                write_atomically(job.folder(config) / PROGRESS, json.dumps(asdict(now)))

        distilled = distil(
            runtime,
            reserved,
            snapshot,
            settings,
            progress,
            job.folder(config),
            init,
            config.training.sharding == "fsdp",
        )
        curves.close()
        if not publishes:
            return None
        manifest = _manifest(
            config, distilled, settings, snapshot, job, runtime, tokenizer, reserved
        )
        return registry.publish(distilled.selector, manifest, curve_files(distilled.curve))


@contextmanager
def _sole_writer(folder: Path | None) -> Iterator[None]:
    """Wait for a writer that a killed command left behind and that has not died yet."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        yield


def _manifest(
    config: Config,
    distilled: Distilled,
    settings: DistillSettings,
    snapshot: Snapshot,
    job: Job,
    runtime: ModelRuntime,
    tokenizer: Tokenizer,
    reserved: tuple[int, ...],
) -> Manifest:
    calibration = load_calibration(
        config.data_dir / "calibration", runtime.digest, distilled.llm_digest
    )
    training = {
        name: value.value
        if isinstance(value, Enum)
        else int(value)
        if isinstance(value, bool)
        else value
        for name, value in asdict(settings).items()
    }
    counts = {
        "training_labels": distilled.training_labels,
        "validation_labels": distilled.validation_labels,
        "held_out_labels": distilled.test_labels,
        "skipped_labels": distilled.skipped_labels,
        "labels_until": distilled.newest,
        "steps_done": distilled.steps,
    }
    return Manifest(
        version="",
        kind=settings.kind,
        reads=settings.reads,
        temperature=settings.temperature,
        fusion=distilled.selector.fusion,
        scoring=settings.scoring,
        standardise=settings.standardise,
        base_model=str(resolve_model(config.slm.model)),
        slm_digest=runtime.digest,
        llm_digest=distilled.llm_digest,
        tokenizer_digest=tokenizer.digest,
        reserved_ids=reserved,
        bins=RESERVED_COUNT,
        thresholds=json.loads((calibration or Calibration({})).to_json()),
        metrics=distilled.metrics,
        snapshot=snapshot.id,
        created_at=0.0,
        files={},
        job=job.id,
        training={**training, **counts, **({"init_from": job.init} if job.init else {})},
    )


# -- the gate -------------------------------------------------------------------------------------


def _gate(config: Config, manifest: Manifest, promote: bool) -> TrainOutcome:
    """Judge the version where a worker has room for the SLM; promote it when the gate opens."""
    versions = LiveVersions(config.versions)
    if versions.state(if_damaged=NOTHING_LIVE).version == manifest.version:
        agreed = manifest.metrics["agree_at_1"]
        return _outcome(manifest, True, f"{manifest.version} is live already", agreed, {})
    verdict = judge_apart(config, manifest.version, distill_config(config.training))
    versions.record("gate", manifest.version, **verdict.as_json())
    promoted, reason = enact(versions, manifest.version, verdict, promote)
    return _outcome(
        manifest, promoted, reason, verdict.figures.get("agree_at_1_old"), verdict.figures
    )


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


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
