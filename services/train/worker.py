"""What runs in every training worker: read, train, publish.

Each worker trains on its share of every batch. Gradients are averaged over torch.distributed (gloo
on CPUs, NCCL on GPUs). Rank 0 alone writes and publishes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray.train
import torch

from s2t_shared.config import Config
from s2t_shared.decode.calibrate import load_calibration
from s2t_shared.errors import S2TError
from s2t_shared.files import locked, private_folder
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import RESERVED_COUNT, reserved_ids
from s2t_shared.policy import Calibration
from s2t_shared.training.trainer import Distilled, OnStep, Point, distil
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry
from services.train.curves import CurveWriter, curve_files
from services.train.jobs import LOCK, Job
from services.train.progress import ProgressWriter, TrainProgress, failure_of, write_failure


def run_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """Ray Train's loop function. arguments: `config` and `job` as JSON values.

    A worker alone returns an error that trying again cannot mend. Among several it is noted and
    raised, which stops the others: they would wait for this one, and Ray passes on only rank 0's
    return value. Any other error, and a worker's death, starts all workers again from the last
    checkpoint.
    """
    config = Config.model_validate(arguments["config"])
    job = Job(**arguments["job"])
    context = ray.train.get_context()
    torch.set_num_threads(config.slm.threads)
    try:
        train_and_publish(config, job, publishes=context.get_world_rank() == 0)
    except S2TError as error:
        if context.get_world_size() == 1:
            return failure_of(error)
        write_failure(job.folder(config), error)
        raise
    return {}


def train_and_publish(config: Config, job: Job, publishes: bool) -> Manifest | None:
    """The job itself, without Ray. Called again, it goes on where it was killed.

    publishes: whether this worker writes; the others return None.

    Raises:
        S2TError: labels, models, settings or folders cannot be used.
    """
    settings = config.training
    folder = resolve_model(config.slm.model)
    runtime = ModelRuntime.load(str(folder), config.slm.dtype, settings.device)
    tokenizer = Tokenizer.load(folder, config.slm.chat_template)
    registry = Registry(config.versions)
    init = registry.load(job.init, runtime, tokenizer.digest) if job.init else None
    snapshot = open_lake(config.lake).snapshot(job.snapshot)

    def train(on_step: OnStep) -> Distilled:
        return distil(
            runtime,
            reserved_ids(tokenizer, runtime.vocab_rows),
            snapshot,
            settings,
            on_step,
            checkpoints=job.folder(config),
            init=init,
            sharded=settings.sharding == "fsdp",
        )

    if not publishes:
        train(lambda step, loss, point: None)
        return None
    private_folder(job.folder(config))
    # Waits for a writer that a killed command left behind and that has not died yet.
    with locked(job.folder(config) / LOCK):
        reports = _Reports(job.folder(config), settings.steps)
        distilled = train(reports.on_step)
        reports.close()
        manifest = _manifest(config, job, distilled, runtime, tokenizer)
        return registry.publish(distilled.local_selector, manifest, curve_files(distilled.curve))


class _Reports:
    """Training curves and progress of the worker that writes, in the job's folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._curves = CurveWriter(folder / "tensorboard")
        self._progress = ProgressWriter(folder)
        self._steps = steps

    def on_step(self, step: int, loss: float, point: Point) -> None:
        self._curves.write(step, loss, point)
        progress = TrainProgress(
            step=step,
            steps=self._steps,
            loss=loss,
            validation_loss=point.loss,
            agree_at_1=point.agree_at_1,
        )
        self._progress.write(progress)

    def close(self) -> None:
        self._curves.close()


def _manifest(
    config: Config, job: Job, distilled: Distilled, runtime: ModelRuntime, tokenizer: Tokenizer
) -> Manifest:
    local = distilled.local_selector
    calibration = load_calibration(
        config.data_dir / "calibration", runtime.digest, distilled.llm_digest
    )
    return Manifest(
        version="",
        kind=local.kind,
        reads=local.reads,
        temperature=local.temperature,
        fusion=local.fusion,
        scoring=local.scoring,
        standardise=local.standardise,
        always_on=local.always_on,
        base_model=str(resolve_model(config.slm.model)),
        slm_digest=runtime.digest,
        llm_digest=distilled.llm_digest,
        tokenizer_digest=tokenizer.digest,
        reserved_ids=local.reserved_ids,
        bins=RESERVED_COUNT,
        thresholds=json.loads((calibration or Calibration({})).to_json()),
        metrics=distilled.metrics,
        snapshot=job.snapshot,
        created_at=0.0,
        files={},
        job=job.id,
        training=_training_record(config, job, distilled),
    )


def _training_record(
    config: Config, job: Job, distilled: Distilled
) -> dict[str, float | int | str]:
    """What the manifest says about the training: its settings, its labels, its start."""
    record: dict[str, float | int | str] = {}
    for name, value in config.training.of_weights().items():
        record[name] = int(value) if isinstance(value, bool) else value
    record |= {
        "training_labels": distilled.training_labels,
        "validation_labels": distilled.validation_labels,
        "held_out_labels": distilled.test_labels,
        "skipped_labels": distilled.skipped_labels,
        "labels_until": distilled.newest,
        "steps_done": distilled.steps,
    }
    if job.init:
        record["init_from"] = job.init
    return record
