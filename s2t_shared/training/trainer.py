"""Teaching the SLM to select: rollouts in, a trained `LocalSelector` and its figures out (paper,
S2T-LOCAL).

One loop for all kinds, readings and losses: stream, pack, accumulate, average over the workers,
step; validate, stop early, keep the best; and a checkpoint from which a killed run goes on bit for
bit. Knows labels and models; no Ray (several workers only need torch.distributed), no registry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.shards import Snapshot
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.checkpoints import load_checkpoint, save_checkpoint
from s2t_shared.training.dataset import Source, TrainingData, count_labels
from s2t_shared.training.objective import (
    DistillSettings,
    Evaluation,
    Whole,
    evaluate_selector,
    place,
    training_loss,
)
from s2t_shared.training.tree_forward import Contexts, parts_of

FUSIONS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
LAST_LEARNING_RATE = 0.1  # of the peak, where the decay ends


def new_selector(
    runtime: ModelRuntime,
    reserved_ids: tuple[int, ...],
    config: DistillSettings,
    init: LocalSelector | None = None,
) -> LocalSelector:
    """An untrained selector: LoRA that changes nothing yet, and reserved-row deltas that break the
    near equality of real models' spare rows (equal rows score every candidate 0.5, and their
    gradient keeps them equal). `init`: start from this one's weights instead.

    Raises:
        ConfigError: `init` is of another kind, reading or shape.
    """
    adapter, deltas = new_adapter(runtime.model, config.rank, config.alpha, config.seed), None
    if config.kind is not SelectorKind.PREFIX:
        generator = torch.Generator().manual_seed(config.seed + 1)
        scale = float(runtime.head.weight.float().std()) * config.row_scale
        shape = (len(reserved_ids), runtime.head.weight.shape[1])
        deltas = (
            (torch.randn(shape, generator=generator) * scale).to(runtime.device).requires_grad_()
        )
    if init is not None:
        adapter, deltas = _weights_of(init, adapter, deltas, config)
    return LocalSelector(
        version="",
        kind=config.kind,
        reads=config.reads,
        reserved_ids=reserved_ids,
        adapter=adapter,
        bin_deltas=deltas,
        temperature=config.temperature,
        scoring=config.scoring,
        standardise=config.standardise,
    )


def _weights_of(
    init: LocalSelector, adapter: Adapter, deltas: Tensor | None, config: DistillSettings
) -> tuple[Adapter, Tensor | None]:
    theirs = init.adapter
    wanted = (config.kind, config.reads, config.rank, config.alpha)
    there = (init.kind, init.reads, theirs.rank, theirs.alpha) if theirs is not None else None
    if theirs is None or there != wanted or theirs.weights.keys() != adapter.weights.keys():
        raise ConfigError(
            f"training.init_from={init.version!r}: it was trained with other settings (kind, reads, "
            "rank, alpha); train with its settings, or from the beginning"
        )

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().float().requires_grad_()

    weights = {path: (copy(a), copy(b)) for path, (a, b) in theirs.weights.items()}
    return Adapter(rank=config.rank, alpha=config.alpha, weights=weights), copy(
        init.bin_deltas
    ) if init.bin_deltas is not None else None


def trained_tensors(selector: LocalSelector) -> list[Tensor]:
    assert selector.adapter is not None
    return selector.adapter.parameters() + (
        [selector.bin_deltas] if selector.bin_deltas is not None else []
    )


@dataclass(frozen=True)
class Point:
    """One point of the training curve: the mean training loss since the point before, and the
    validation figures."""

    step: int
    train_loss: float
    loss: float
    agree_at_1: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A trained selector, its figures on the test labels, and how it got there. skipped_labels,
    newest: as in `TrainingData`."""

    selector: LocalSelector
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
        return self.evaluation.metrics


Progress = Callable[[int, float, Point], None]  # step, its loss, the last validation


def distil(
    runtime: ModelRuntime,
    reserved_ids: tuple[int, ...],
    source: Source,
    config: DistillSettings,
    on_progress: Progress = lambda step, loss, point: None,
    checkpoints: Path | None = None,
    init: LocalSelector | None = None,
    sharded: bool = False,
) -> Distilled:
    """Train one selector on a snapshot, or on any sequence of rollouts. Under torch.distributed
    every worker calls this; each takes its share of every batch, and gradients are averaged.

    checkpoints: a folder of this run alone. Called again with the same arguments, a killed run goes
    on from there and ends with the weights it would have had. sharded: each worker holds a part of
    every layer of the SLM and gathers the others' when it needs them (FSDP); `runtime` then
    forwards only where all workers do.

    Raises: StoreError: too few labels, or none any more; the folder cannot be written. ConfigError:
        labels of another SLM; `init` does not fit; the folder is of another run. RuntimeError: the
        workers stand at different steps.
    """
    data = TrainingData(
        source,
        runtime.digest,
        config.weigh,
        config.batch_labels,
        config.held_out_labels,
        config.seed,
    )
    for parameter in runtime.model.parameters():
        parameter.requires_grad_(False)
    identity = _identity(runtime, source, config, init)
    if sharded:
        shard_layers(runtime)
    contexts = None
    if (
        config.reads is Reading.BASE and config.kept_gib and not sharded
    ):  # sharded, all workers must forward as often
        contexts = Contexts(runtime, int(config.kept_gib * (1 << 30)))
    selector = new_selector(runtime, reserved_ids, config, init)
    run = _Run(runtime, selector, data, config, checkpoints, identity, contexts)
    run.resume()
    run.train(on_progress)
    return run.finish()


def shard_layers(runtime: ModelRuntime) -> None:
    """Spread every decoder layer of `runtime` over the workers. The adapter, embeddings and head
    stay whole: the first is what is trained, of the others' rows the scores read a few."""
    _ = runtime.switch  # its wrappers must be in place before the parameters are taken over
    for layer in runtime.model.get_decoder().layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.contiguous()
        fully_shard(layer)


def _identity(
    runtime: ModelRuntime, source: Source, config: DistillSettings, init: LocalSelector | None
) -> str:
    content = json.dumps(
        [
            asdict(config),
            runtime.digest,
            init.version if init else "",
            source.id if isinstance(source, Snapshot) else len(source),
        ],
        default=str,
    )
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass
class _Run:
    """The state of one run. What a checkpoint holds: the weights, the best weights so far, the
    optimizer's moments, the position in the data (epoch, batches done of it), and the numbers
    below."""

    runtime: ModelRuntime
    selector: LocalSelector
    data: TrainingData
    config: DistillSettings
    checkpoints: Path | None
    identity: str
    contexts: Contexts | None
    step: int = 0
    epoch: int = 0
    batches_done: int = 0
    best_loss: float = math.inf
    bad: int = 0  # validations since the best one
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = trained_tensors(self.selector)
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )

    # -- the loop ---------------------------------------------------------------------------------

    def train(self, on_progress: Progress) -> None:
        config = self.config
        every = config.validate_every or max(1, config.steps // 10)
        if not self.curve:
            self._validate()
        batches = self._batches()
        while self.step < config.steps and self.bad < config.patience:
            loss = self._step(next(batches))
            if self.step % every == 0 or self.step == config.steps:
                self._validate()
            if (
                self.step % config.checkpoint_every == 0
                or self.step == config.steps
                or self.bad >= config.patience
            ):
                self._save()
            on_progress(self.step, loss, self.curve[-1])

    def _batches(self) -> Iterator[list[Rollout]]:
        """Endless, from where the run stands.

        Raises:
            StoreError: an epoch without a batch.
        """
        while True:
            for batch in islice(self.data.epoch(self.epoch), self.batches_done, None):
                self.batches_done += 1
                yield batch
            if not self.batches_done:
                raise StoreError(
                    f"epoch {self.epoch} has no labels to train on, though there were "
                    f"{self.data.labels}: they were changed meanwhile; train again, on a new snapshot"
                )
            self.epoch, self.batches_done = self.epoch + 1, 0

    def _step(self, batch: list[Rollout]) -> float:
        rank, world = place()
        whole, total = Whole.of(batch, self.config), torch.zeros(1, device=self.runtime.device)
        self.optimizer.zero_grad(set_to_none=True)
        shares = [
            list(parts_of(batch[r::world], self.config.max_tokens, self.config.scored_tokens))
            for r in range(world)
        ]
        for turn in range(
            max(map(len, shares))
        ):  # as many for all: with a sharded SLM a forward takes all workers
            mine = turn < len(shares[rank])
            part = shares[rank][turn] if mine else batch[:1]
            loss = (
                training_loss(self.runtime, self.selector, part, self.config, whole, self.contexts)
                * mine
            )
            loss.backward()
            total += loss.detach()
        mean = self._sum_gradients(total)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.step += 1
        self.loss_sum, self.loss_count = self.loss_sum + mean, self.loss_count + 1
        return mean

    def _sum_gradients(self, loss: Tensor) -> float:
        """Add up all workers' gradients (each is a share of the batch's mean) and losses, in one
        message."""
        for parameter in self.parameters:
            if parameter.grad is None:  # no label needed it
                parameter.grad = torch.zeros_like(parameter)
        if place()[1] > 1:
            flat = torch.cat(
                [loss, *(p.grad.flatten() for p in self.parameters if p.grad is not None)]
            )
            dist.all_reduce(flat)
            loss = flat[:1]
            for parameter, part in zip(
                self.parameters, flat[1:].split([p.numel() for p in self.parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)
        return float(loss)

    def _validate(self) -> None:
        metrics = evaluate_selector(
            self.runtime,
            self.selector,
            self.data.validation,
            self.config,
            together=True,
            contexts=self.contexts,
        ).metrics
        trained = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.curve.append(
            Point(
                self.step,
                trained,
                metrics["loss"],
                metrics["agree_at_1"],
                learning_rate(self.step, self.config),
            )
        )
        self.loss_sum, self.loss_count = 0.0, 0
        if metrics["loss"] < self.best_loss:
            self.best_loss, self.bad = metrics["loss"], 0
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self.bad += 1

    def finish(self) -> Distilled:
        """The best weights, lambda where it is wanted, and the figures of labels that had no say in
        either."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
        selector = self._fused() if self.config.fusion else self.selector
        evaluation = evaluate_selector(
            self.runtime, selector, self.data.test, self.config, with_lm_kl=True, together=True
        )
        return Distilled(
            selector=selector,
            evaluation=evaluation,
            training_labels=self.data.labels,
            validation_labels=count_labels(self.data.validation),
            test_labels=count_labels(self.data.test),
            steps=self.step,
            curve=self.curve,
            llm_digest=self.data.llm_digest,
            skipped_labels=self.data.skipped,
            newest=self.data.newest,
        )

    def _fused(self) -> LocalSelector:
        """The selector with the lambda that agrees most often on the validation labels; 0 where
        none does better."""
        tried = [replace(self.selector, fusion=value) for value in FUSIONS]
        agreements = [
            evaluate_selector(
                self.runtime,
                selector,
                self.data.validation,
                self.config,
                together=True,
                contexts=self.contexts,
            ).metrics["agree_at_1"]
            for selector in tried
        ]
        return tried[agreements.index(max(agreements))]

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None or place()[0] != 0:
            return
        tensors = {"rng": torch.get_rng_state()}
        for i, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            moments = self.optimizer.state[parameter]
            tensors |= {f"weight.{i}": parameter, f"best.{i}": best}
            tensors |= {f"{name}.{i}": value for name, value in moments.items()}
        save_checkpoint(
            self.checkpoints,
            self.step,
            tensors,
            {
                "identity": self.identity,
                "epoch": self.epoch,
                "batches_done": self.batches_done,
                "bad": self.bad,
                "best_loss": self.best_loss,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
                "curve": [asdict(point) for point in self.curve],
            },
        )

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; all workers from the same.

        Raises: ConfigError: it is of another run. RuntimeError: another worker goes on from
            another; start all again.
        """
        self._load()
        if (
            place()[1] > 1
        ):  # a writer that was left behind may still save, and a node may miss the folder
            ends = torch.tensor([self.step, -self.step], device=self.runtime.device)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            newest, oldest = int(ends[0]), -int(ends[1])
            if newest != oldest:
                raise RuntimeError(
                    f"the workers' checkpoints differ: one is of step {newest}, one of step {oldest} "
                    f"(0: none); all nodes must share the folder {str(self.checkpoints)!r}"
                )

    def _load(self) -> None:
        found = load_checkpoint(self.checkpoints) if self.checkpoints is not None else None
        if found is None:
            return
        state, tensors = found.state, found.tensors
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
                    **{
                        name: tensors[f"{name}.{i}"].to(parameter.device)
                        for name in ("exp_avg", "exp_avg_sq")
                    },
                }
        torch.set_rng_state(tensors["rng"])
        self.step, self.epoch, self.batches_done = found.step, state["epoch"], state["batches_done"]
        self.best_loss, self.bad = state["best_loss"], state["bad"]
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
        self.curve = [Point(**point) for point in state["curve"]]


def learning_rate(step: int, config: DistillSettings) -> float:
    """Linear warm-up from 0, then decay to a tenth (linear, cosine), or none (constant)."""
    warmup = max(1, int(config.warmup_share * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[
        config.schedule
    ]
    return config.learning_rate * (LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * left)
