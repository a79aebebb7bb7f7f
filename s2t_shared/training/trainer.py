"""The trainer: rollouts in, a trained `LocalSelector` and its figures out (S2T paper, S2T-LOCAL).

One loop for all kinds, readings and objectives: stream, pack, accumulate, average over the
workers, step; validate, stop early, keep the best. A checkpoint lets a killed run go on and end
with the same bits. Knows labels and models; no Ray, no registry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.snapshots import Snapshot
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from s2t_shared.training.dataset import Source, TrainingData, count_labels
from s2t_shared.training.distributed import rank_and_world
from s2t_shared.training.evaluate import Evaluation, evaluate_local_selector, mean_lm_kl
from s2t_shared.training.loss import BatchTotals, training_loss
from s2t_shared.training.new_local_selector import new_local_selector, trained_tensors
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.training.tree_forward import ContextCache
from s2t_shared.training.tree_layout import micro_batches
from s2t_shared.types import Reading

FUSIONS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
FINAL_LEARNING_RATE = 0.1  # of the peak, where the decay ends


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the training curve.

    train_loss: mean since the point before, NaN at the first. loss, agree_at_1: on the validation
    labels.
    """

    step: int
    train_loss: float
    loss: float
    agree_at_1: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A trained local selector, its figures on the test labels, and how it got there.

    skipped_labels, newest: as in `TrainingData`.
    """

    local_selector: LocalSelector
    evaluation: Evaluation
    training_labels: int
    validation_labels: int
    test_labels: int
    steps: int
    curve: list[Point]
    llm_digest: str
    skipped_labels: int
    newest: float

    @property
    def metrics(self) -> dict[str, float]:
        """The figures on the test labels."""
        return self.evaluation.metrics


OnStep = Callable[[int, float, Point], None]  # step, its loss, the last validation


def distil(
    runtime: ModelRuntime,
    reserved_ids: tuple[int, ...],
    source: Source,
    settings: TrainingSettings,
    on_step: OnStep = lambda step, loss, point: None,
    checkpoints: Path | None = None,
    init: LocalSelector | None = None,
    sharded: bool = False,
) -> Distilled:
    """Train one local selector on a snapshot, or on any sequence of rollouts.

    Under torch.distributed every worker calls this. Each takes its share of every batch, and
    gradients are averaged.

    checkpoints: a folder of this run alone. Called again with the same arguments, a killed run goes
    on from there and ends with the weights it would have had. sharded: each worker holds a part of
    every layer of the SLM and gathers the others' when it needs them (FSDP); `runtime` then
    forwards only where all workers do.

    Raises:
        StoreError: too few labels, or none any more; or the folder cannot be written.
        ConfigError: labels of another SLM, `init` does not fit, or the folder is of another run.
        RuntimeError: the workers stand at different steps.
    """
    data = TrainingData(source, runtime.digest, settings)
    identity = _identity(runtime, source, settings, init)
    if sharded:
        shard_layers(runtime)
    contexts = None
    # Sharded, all workers must forward equally often, and a cache saves each other ones.
    if settings.reads is Reading.BASE and settings.context_cache_gib and not sharded:
        contexts = ContextCache(runtime, settings.context_cache_bytes)
    run = _Run(
        runtime=runtime,
        local=new_local_selector(runtime, reserved_ids, settings, init),
        data=data,
        settings=settings,
        checkpoints=checkpoints,
        identity=identity,
        contexts=contexts,
    )
    run.resume()
    run.train(on_step)
    return run.finish()


def shard_layers(runtime: ModelRuntime) -> None:
    """Spread every decoder layer of `runtime` over the workers (FSDP).

    The adapter stays whole, as it is trained; so do embeddings and head, of which scores need a few
    rows.
    """
    _ = runtime.switch  # its wrappers must be in place before the parameters are taken over
    for layer in runtime.model.get_decoder().layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.contiguous()
        fully_shard(layer)


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up from 0, then decay to a tenth (linear, cosine), or none (constant)."""
    warmup = max(1, int(settings.warmup_share * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    share = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * decay[settings.schedule]
    return settings.learning_rate * share


def _identity(
    runtime: ModelRuntime, source: Source, settings: TrainingSettings, init: LocalSelector | None
) -> str:
    """A hash of what decides the run's outcome."""
    labels = source.id if isinstance(source, Snapshot) else len(source)
    start = init.version if init else ""
    content = json.dumps([settings.of_weights(), runtime.digest, start, labels])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class _Run:
    """The state of one run.

    A checkpoint holds the weights, the best weights so far, the optimizer's moments, the position
    in the data (epoch, batches done of it), and the numbers below.
    """

    runtime: ModelRuntime
    local: LocalSelector
    data: TrainingData
    settings: TrainingSettings
    checkpoints: Path | None
    identity: str
    contexts: ContextCache | None
    step: int = 0
    epoch: int = 0
    batches_done: int = 0
    best_loss: float = math.inf
    validations_since_best: int = 0
    loss_sum: float = 0.0  # of the steps since the last validation
    loss_count: int = 0
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = trained_tensors(self.local)
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )

    # -- the loop ---------------------------------------------------------------------------------

    @property
    def _is_done(self) -> bool:
        stopped_early = self.validations_since_best >= self.settings.patience
        return stopped_early or self.step >= self.settings.steps

    def train(self, on_step: OnStep) -> None:
        """Step until the last step, or until validation no longer improves."""
        settings = self.settings
        validate_every = settings.validate_every or max(1, settings.steps // 10)
        if not self.curve:
            self._validate()
        batches = self._batches()
        while not self._is_done:
            loss = self._step(next(batches))
            if self.step % validate_every == 0 or self.step == settings.steps:
                self._validate()
            if self.step % settings.checkpoint_every == 0 or self._is_done:
                self._save()
            on_step(self.step, loss, self.curve[-1])

    def _batches(self) -> Iterator[list[Rollout]]:
        """Endless, from where the run stands.

        Raises:
            StoreError: an epoch without a batch.
        """
        while True:
            for batch in self.data.epoch(self.epoch, self.batches_done):
                self.batches_done += 1
                yield batch
            if not self.batches_done:
                raise StoreError(
                    f"epoch {self.epoch} has no labels to train on, though there were "
                    f"{self.data.labels}: they were changed meanwhile; train again, on a new "
                    "snapshot"
                )
            self.epoch += 1
            self.batches_done = 0

    def _step(self, batch: list[Rollout]) -> float:
        """One optimizer step; returns the batch's mean loss."""
        totals = BatchTotals.of(batch, self.settings)
        batch_loss = torch.zeros(1, device=self.runtime.device)
        self.optimizer.zero_grad(set_to_none=True)
        for rollouts, counts in self._shares(batch):
            loss = counts * training_loss(
                self.runtime, self.local, rollouts, self.settings, totals, self.contexts
            )
            loss.backward()
            batch_loss += loss.detach()
        mean = self._sum_gradients(batch_loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.optimizer.step()
        self.step += 1
        self.loss_sum += mean
        self.loss_count += 1
        return mean

    def _shares(self, batch: list[Rollout]) -> Iterator[tuple[list[Rollout], bool]]:
        """This worker's micro-batches of a batch, and whether each counts.

        All workers get as many, as with a sharded SLM a forward needs all of them: one that has
        fewer repeats a rollout that does not count.
        """
        rank, world = rank_and_world()
        settings = self.settings
        shares = []
        for worker in range(world):
            rollouts = batch[worker::world]
            width = settings.scored_tokens_per_label
            shares.append(list(micro_batches(rollouts, settings.max_tokens, width)))
        turns = max(len(share) for share in shares)
        yield from ((rollouts, True) for rollouts in shares[rank])
        yield from ((batch[:1], False) for _ in range(turns - len(shares[rank])))

    def _sum_gradients(self, loss: Tensor) -> float:
        """Add up all workers' gradients and losses in one message; returns the loss.

        Each worker's gradient is its share of the batch's mean.
        """
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:  # no label needed it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.flatten())
        if rank_and_world()[1] > 1:
            flat = torch.cat([loss, *gradients])
            dist.all_reduce(flat)
            loss = flat[:1]
            sums = flat[1:].split([parameter.numel() for parameter in self.parameters])
            for parameter, total in zip(self.parameters, sums, strict=True):
                parameter.grad = total.view_as(parameter)
        return float(loss)

    def _validate(self) -> None:
        metrics = self._on_validation_labels(self.local)
        point = Point(
            step=self.step,
            train_loss=self.loss_sum / self.loss_count if self.loss_count else math.nan,
            loss=metrics["loss"],
            agree_at_1=metrics["agree_at_1"],
            learning_rate=learning_rate(self.step, self.settings),
        )
        self.curve.append(point)
        self.loss_sum = 0.0
        self.loss_count = 0
        self.validations_since_best += 1
        if point.loss < self.best_loss:
            self.best_loss = point.loss
            self.validations_since_best = 0
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    def _on_validation_labels(self, local: LocalSelector) -> dict[str, float]:
        evaluation = evaluate_local_selector(
            self.runtime, local, self.data.validation, self.settings, self.contexts
        )
        return evaluation.metrics

    def finish(self) -> Distilled:
        """The best weights, lambda where it is wanted, and figures on the test labels."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
        local = self._with_fusion() if self.settings.fusion else self.local
        evaluation = evaluate_local_selector(self.runtime, local, self.data.test, self.settings)
        lm_kl = mean_lm_kl(self.runtime, local, self.data.test, self.settings)
        return Distilled(
            local_selector=local,
            evaluation=replace(evaluation, metrics={**evaluation.metrics, "lm_kl": lm_kl}),
            training_labels=self.data.labels,
            validation_labels=count_labels(self.data.validation),
            test_labels=count_labels(self.data.test),
            steps=self.step,
            curve=self.curve,
            llm_digest=self.data.llm_digest,
            skipped_labels=self.data.skipped,
            newest=self.data.newest,
        )

    def _with_fusion(self) -> LocalSelector:
        """The local selector with the lambda that agrees most often on the validation labels.

        Among equals the smallest: 0 where none does better.
        """
        candidates = [replace(self.local, fusion=value) for value in FUSIONS]
        return max(candidates, key=lambda local: self._on_validation_labels(local)["agree_at_1"])

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None or rank_and_world()[0] != 0:
            return
        tensors = {"rng": torch.get_rng_state()}
        for i, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors[f"weight.{i}"] = parameter
            tensors[f"best.{i}"] = best
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{i}"] = value
        state: dict[str, Any] = {
            "identity": self.identity,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "validations_since_best": self.validations_since_best,
            "best_loss": self.best_loss,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "curve": [asdict(point) for point in self.curve],
        }
        save_checkpoint(self.checkpoints, self.step, tensors, state)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ConfigError: it is of another run.
            RuntimeError: the workers found different ones; start all again.
        """
        if self.checkpoints is not None:
            checkpoint = load_checkpoint(self.checkpoints)
            if checkpoint is not None:
                self._load(checkpoint)
        if rank_and_world()[1] == 1:
            return
        # A writer that was left behind may still save, and a node may lack the folder.
        extremes = torch.tensor([self.step, -self.step], device=self.runtime.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        newest = int(extremes[0])
        oldest = -int(extremes[1])
        if newest != oldest:
            raise RuntimeError(
                f"the workers' checkpoints differ: one is of step {newest}, one of step {oldest} "
                f"(0: none); all nodes must share the folder {str(self.checkpoints)!r}"
            )

    def _load(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, checkpoint.tensors
        if state["identity"] != self.identity:
            raise ConfigError(
                f"the training folder {self.checkpoints and self.checkpoints.name!r} holds the "
                "checkpoint of another run; give this one a folder of its own"
            )
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"weight.{i}"])
                self.best[i].copy_(tensors[f"best.{i}"])
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{i}"],
                    "exp_avg": tensors[f"exp_avg.{i}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(parameter.device),
                }
        torch.set_rng_state(tensors["rng"])
        self.step = checkpoint.step
        self.epoch = state["epoch"]
        self.batches_done = state["batches_done"]
        self.validations_since_best = state["validations_since_best"]
        self.best_loss = state["best_loss"]
        self.loss_sum = state["loss_sum"]
        self.loss_count = state["loss_count"]
        self.curve = [Point(**point) for point in state["curve"]]
