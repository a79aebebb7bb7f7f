"""`s2t train`: a Ray Train job over a frozen snapshot of the lake, publication, and the gate to becoming live.

Each worker trains on its share (gradients averaged over torch.distributed: gloo on CPUs, NCCL on GPUs); rank 0
measures, compares with the live version on the same held-out labels, and publishes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray.train  # noqa: E402
import torch  # noqa: E402
from ray.train import RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from s2t_shared.calibrate import load_calibration  # noqa: E402
from s2t_shared.config import Config, TrainingConfig  # noqa: E402
from s2t_shared.distill import DistillConfig, Distilled, distil, evaluate_selector  # noqa: E402
from s2t_shared.errors import ConfigError, S2TError, VersionError  # noqa: E402
from s2t_shared.labels import Label, freeze_snapshot, read_snapshot  # noqa: E402
from s2t_shared.local_selector import Reading, SelectorKind  # noqa: E402
from s2t_shared.policy import Calibration  # noqa: E402
from s2t_shared.registry import Manifest, Registry  # noqa: E402
from s2t_shared.runtime import ModelRuntime, resolve_model  # noqa: E402
from s2t_shared.text import RESERVED_COUNT, Tokenizer, reserved_ids  # noqa: E402
from s2t_shared.trees import held_out_trees  # noqa: E402


@dataclass(frozen=True)
class TrainOutcome:
    """What a training run did. `live_agree_at_1`: of the version it was compared with, else of the SLM itself."""

    version: str
    promoted: bool
    reason: str
    metrics: dict[str, float]
    live_agree_at_1: float
    training_labels: int
    held_out_labels: int
    steps: int
    snapshot: str


def distill_config(settings: TrainingConfig) -> DistillConfig:
    values = settings.model_dump(exclude={"workers", "gpus_per_worker", "cpus_per_worker", "kind", "reads"})
    return DistillConfig(kind=SelectorKind(settings.kind), reads=Reading(settings.reads), **values)


def train(config: Config, promote: bool = True) -> TrainOutcome:
    """Train, publish, and promote when better than the live version. Needs an initialised Ray.

    Raises:
        StoreError: no or too few labels. ConfigError: the labels are of another SLM, or the job failed.
    """
    snapshot = freeze_snapshot(config.lake)
    settings = config.training
    trainer = TorchTrainer(
        _worker, train_loop_config={"config": config.model_dump(mode="json"), "snapshot": snapshot},
        torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={"CPU": settings.cpus_per_worker,
                                  **({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})}),
        run_config=RunConfig(name=f"distil-{snapshot}-{settings.kind}-{settings.reads}-{os.getpid()}",
                             storage_path=str(config.data_dir / "training")))
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise ConfigError(f"the training job failed: {_last_line(error)}") from error
    outcome: dict[str, Any] = result.return_value
    if "error" in outcome:
        raise ConfigError(outcome["error"])
    return _gate(config, TrainOutcome(promoted=False, reason="", snapshot=snapshot, **outcome), promote)


def _gate(config: Config, outcome: TrainOutcome, promote: bool) -> TrainOutcome:
    """Promote when the new version agrees with the LLM more often than what serves now, on held-out labels."""
    new, old = outcome.metrics["agree_at_1"], outcome.live_agree_at_1
    if new <= old:
        reason = f"not promoted: held-out Agree@1 {new:.3f} is not above {old:.3f}, which serves now"
        return TrainOutcome(**{**asdict(outcome), "reason": reason})
    reason = f"held-out Agree@1 {new:.3f} beats {old:.3f}"
    if promote:
        Registry(config.versions).promote(outcome.version)
    return TrainOutcome(**{**asdict(outcome), "promoted": promote, "reason": reason})


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs in every training worker; returns the outcome on rank 0."""
    config = Config.model_validate(arguments["config"])
    torch.set_num_threads(config.slm.threads)
    try:
        return train_and_publish(config, arguments["snapshot"], ray.train.get_context().get_world_rank() == 0)
    except S2TError as error:
        return {"error": str(error)}


def train_and_publish(config: Config, snapshot: str, publishes: bool,
                      on_progress: Callable[[int, float], None] = lambda step, loss: None) -> dict[str, Any]:
    """The job itself, with no Ray in sight: read, train, compare, publish."""
    labels = read_snapshot(config.lake, snapshot)
    folder = resolve_model(config.slm_model)
    device = "cuda" if config.training.gpus_per_worker else "cpu"
    runtime = ModelRuntime.load(str(folder), config.slm.dtype, device)
    tokenizer = Tokenizer.load(folder, config.slm.chat_template)
    reserved = reserved_ids(tokenizer, runtime.vocab_rows)
    settings = distill_config(config.training)
    distilled = distil(runtime, reserved, labels, settings, on_progress)
    if not publishes:
        return {}
    live = _live_agreement(config, runtime, tokenizer, labels, settings, distilled)
    manifest = _manifest(config, distilled, labels, settings, snapshot, runtime, tokenizer, reserved)
    published = Registry(config.versions).publish(distilled.selector, manifest)
    return {"version": published.version, "metrics": distilled.metrics, "live_agree_at_1": live,
            "training_labels": distilled.training_labels, "held_out_labels": distilled.held_out_labels,
            "steps": distilled.steps}


def _live_agreement(config: Config, runtime: ModelRuntime, tokenizer: Tokenizer, labels: list[Label],
                    settings: DistillConfig, distilled: Distilled) -> float:
    """Agree@1 of the live version on the same held-out labels; without a usable one, the SLM's own."""
    registry = Registry(config.versions)
    try:
        live = registry.live()
        if live is not None:
            selector = registry.load(live, runtime, tokenizer.digest)
            return evaluate_selector(runtime, selector, held_out_trees(labels), settings)["agree_at_1"]
    except VersionError:
        pass  # a broken or foreign live version is no bar to a sound one
    return distilled.metrics["slm_agree_at_1"]


def _manifest(config: Config, distilled: Distilled, labels: list[Label], settings: DistillConfig, snapshot: str,
              runtime: ModelRuntime, tokenizer: Tokenizer, reserved: tuple[int, ...]) -> Manifest:
    llm = labels[0].llm_digest
    calibration = load_calibration(config.data_dir / "calibration", runtime.digest, llm) or Calibration({})
    training = {name: value.value if isinstance(value, (SelectorKind, Reading)) else value
                for name, value in asdict(settings).items()}
    return Manifest(
        version="", kind=settings.kind, reads=settings.reads, temperature=settings.temperature,
        base_model=config.slm_model, slm_digest=runtime.digest, llm_digest=llm, tokenizer_digest=tokenizer.digest,
        reserved_ids=reserved, bins=RESERVED_COUNT, thresholds=json.loads(calibration.to_json()),
        metrics=distilled.metrics, snapshot=snapshot, created_at=0.0, files={},
        training={**training, "training_labels": distilled.training_labels,
                  "held_out_labels": distilled.held_out_labels})


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
