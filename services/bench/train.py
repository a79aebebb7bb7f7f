"""`s2t bench train`: what a label costs to train on, in time and memory, against the published way.

Published: one sequence per candidate and a second model (services.bench.published). Here: one
sequence per rollout. Rollouts are random tokens: what they say does not matter to what they cost.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.training.loss import training_loss
from s2t_shared.training.settings import TrainingSettings
from services.bench.measure import Figure, Report, clock, figure, ratios, take_turns
from services.bench.published import LossWeights, PublishedTrainer
from services.bench.workload import Settings

SIDES = {
    f"{kind.value}, {reads.value}": (kind, reads)
    for reads in reversed(Reading)
    for kind in SelectorKind
}
PUBLISHED = "published"
LIKE_FOR_LIKE = (SelectorKind.RESERVED, Reading.ADAPTED)  # what the published way trains
STEPS_FOR_MEMORY = 2  # from the second on, the optimizer has its state
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Work:
    """What is trained on: `rollouts` sequences of `settings.prefix` prompt and `settings.new`
    answer tokens with a label at `share` of the answer's positions; `groups` of them per turn the
    published way."""

    settings: Settings
    rollouts: int = 3
    share: float = 0.1
    groups: int = 2

    def describe(self) -> str:
        s = self.settings
        return (
            f"rollouts of {s.prefix} + {s.new} tokens, {labels_per_rollout(s.new, self.share)} "
            f"labels each, K {s.k}"
        )


def labels_per_rollout(new: int, share: float) -> int:
    return max(1, round(share * new))


def synthetic_rollouts(
    work: Work, vocab_rows: int, reserved: Sequence[int], seed: int = 0
) -> list[Rollout]:
    """Random tokens, random labelled positions, random candidates and log-probabilities; no
    reserved id."""
    rng, settings = random.Random(seed), work.settings
    ids = sorted(set(range(vocab_rows)) - set(reserved))
    made = []
    for i in range(work.rollouts):
        tokens = tuple(rng.choices(ids, k=settings.prefix + settings.new))
        places = sorted(
            rng.sample(
                range(settings.prefix + 1, len(tokens) + 1),
                labels_per_rollout(settings.new, work.share),
            )
        )
        labels = tuple(
            _random_label(f"{i}/{place}", place, rng.sample(ids, settings.k), rng)
            for place in places
        )
        made.append(
            Rollout(
                rollout_id=f"bench-{i}",
                request_id=f"bench-{i}",
                problem_id=f"bench-{i}",
                task="bench",
                split="train",
                source="plain",
                token_ids=tokens,
                prompt_length=settings.prefix,
                entropy=(),
                kl=(),
                llm_top_rank=(),
                labels=labels,
                slm_digest="",
                llm_digest="",
                tokenizer_digest="",
                template_digest="",
                created_at=0.0,
            )
        )
    return made


def _random_label(
    label_id: str, position: int, candidates: Sequence[int], rng: random.Random
) -> Label:
    def log_probs() -> list[float]:
        values = [rng.gauss(0.0, 2.0) for _ in candidates]
        norm = math.log(sum(map(math.exp, values)))
        return [v - norm for v in values]

    return Label(
        label_id=label_id,
        position=position,
        candidate_ids=tuple(candidates),
        slm_log_probs=tuple(sorted(log_probs(), reverse=True)),
        llm_log_probs=tuple(log_probs()),
        llm_top_id=candidates[0],
        llm_top_rank=0,
        mass=1.0,
        kl=1.0,
        entropy=1.0,
    )


def bench_train(
    work: Work, names: Sequence[str], with_memory: bool, on_turn: Callable[[], None] = lambda: None
) -> Report:
    """Time per label and peak memory of each of `names` (of SIDES) against the published way, and
    whether both give the same loss and gradients."""
    figures = [*_memory(work, names, on_turn)] if with_memory else []
    torch.set_num_threads(work.settings.threads)
    runtime, reserved = _load(work.settings)
    published = PublishedTrainer.load(work.settings.slm, work.settings.dtype, work.settings.device)
    rollouts = synthetic_rollouts(work, runtime.vocab_rows, reserved)
    figures = [
        *_time(work, names, runtime, reserved, published, rollouts, on_turn),
        *figures,
        *_equality(work, runtime, reserved, published, on_turn),
    ]
    return Report(
        f"train: {work.settings.slm}, {work.settings.dtype}; {work.describe()}", tuple(figures)
    )


def _load(settings: Settings) -> tuple[ModelRuntime, tuple[int, ...]]:
    runtime = ModelRuntime.load(settings.slm, settings.dtype, settings.device)
    runtime.model.requires_grad_(False)
    return runtime, reserved_ids(Tokenizer.load(resolve_model(settings.slm)), runtime.vocab_rows)


def _selector(model: Any, reserved: Sequence[int], config: TrainingSettings) -> LocalSelector:
    """A trainable one with random weights: at a new one's start half of the gradients are zero."""
    adapter = new_adapter(model, config.rank, config.alpha, config.seed)
    generator, head = (
        torch.Generator().manual_seed(config.seed),
        model.get_output_embeddings().weight,
    )
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.02)
    deltas = None
    if config.kind is not SelectorKind.PREFIX:
        scale = float(head.float().std())
        deltas = (torch.randn(len(reserved), head.shape[1], generator=generator) * scale).to(
            head.device
        )
        deltas.requires_grad_()
    return LocalSelector(
        version="",
        kind=config.kind,
        reads=config.reads,
        reserved_ids=tuple(reserved),
        adapter=adapter,
        bin_deltas=deltas,
        temperature=config.temperature,
    )


def _parameters(selector: LocalSelector) -> list[Tensor]:
    assert selector.adapter is not None
    return [
        *selector.adapter.parameters(),
        *([selector.bin_deltas] if selector.bin_deltas is not None else []),
    ]


# -- time -----------------------------------------------------------------------------------------


def _time(
    work: Work,
    names: Sequence[str],
    runtime: ModelRuntime,
    reserved: tuple[int, ...],
    published: PublishedTrainer,
    rollouts: Sequence[Rollout],
    on_turn: Callable[[], None],
) -> list[Figure]:
    """Forward and backward. The optimizer's step is left out: per batch, it is the same for all."""
    groups = _spread(rollouts, work.groups)
    labels = sum(len(r.labels) for r in rollouts)

    def timed(
        selector: LocalSelector, losses: Callable[[], Iterator[Tensor]], labels: int
    ) -> Callable[[], float]:
        def side() -> float:
            started = clock()
            for loss in losses():
                loss.backward()
            seconds = clock() - started
            for parameter in _parameters(selector):
                parameter.grad = None
            return seconds / labels

        return side

    def packed(config: TrainingSettings) -> Callable[[], float]:
        selector = _selector(runtime.model, reserved, config)
        return timed(
            selector, lambda: iter([training_loss(runtime, selector, rollouts, config)]), labels
        )

    config = _settings(LIKE_FOR_LIKE)
    theirs = _selector(runtime.model, reserved, config)
    sides = {
        PUBLISHED: timed(
            theirs,
            lambda: (
                published.loss(r.token_ids[: label.position], label, theirs, _weights(config))
                for r, label in groups
            ),
            len(groups),
        )
    }
    sides |= {name: packed(_settings(SIDES[name])) for name in names}
    seconds = take_turns(sides, work.settings.repeats, on_turn)
    lengths = ", ".join(str(label.position) for _, label in groups)
    figures = [
        figure(
            "published way: time per label",
            seconds[PUBLISHED],
            "s",
            f"{len(groups)} labels with contexts of {lengths} tokens, one at a time",
        )
    ]
    for name in names:
        figures.append(
            figure(
                f"{name}: time per label",
                [1e3 * s for s in seconds[name]],
                "ms",
                f"{len(rollouts)} rollouts, {labels} labels in one batch",
            )
        )
        figures.append(
            figure(
                f"published way / {name}: time per label",
                ratios(seconds[PUBLISHED], seconds[name]),
                "x",
                "reserved, adapted is like for like",
            )
        )
    return figures


def _spread(rollouts: Sequence[Rollout], count: int) -> list[tuple[Rollout, Label]]:
    """`count` labels with evenly spread context lengths: their mean length is that of all."""
    ordered = sorted(
        ((r, label) for r in rollouts for label in r.labels), key=lambda pair: pair[1].position
    )
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _weights(config: TrainingSettings) -> LossWeights:
    return LossWeights(
        ce=config.ce_weight,
        hinge=config.hinge_weight,
        margin=config.hinge_margin,
        kl=config.kl_weight,
        reg=config.reg_weight,
    )


# -- memory ---------------------------------------------------------------------------------------


def _memory(work: Work, names: Sequence[str], on_turn: Callable[[], None]) -> list[Figure]:
    """Each side in a process of its own, training on the smallest unit it can: one group, or one
    rollout."""
    measured = {}
    for name in (PUBLISHED, *names):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured[name] = pool.submit(peak_memory, work, name).result()
        on_turn()
    theirs = measured.pop(PUBLISHED)
    figures = [
        figure(
            "published way: peak memory above the loaded models",
            [theirs.growth / 2**20],
            "MiB",
            f"the longest group; whole process {theirs.peak / 2**20:.0f} MiB",
        )
    ]
    for name, mine in measured.items():
        figures += [
            figure(
                f"{name} / published way: peak memory above the loaded models",
                [mine.growth / theirs.growth],
                "x",
                f"one rollout of {mine.labels} labels, {mine.growth / 2**20:.0f} MiB; per label "
                f"{mine.growth / mine.labels / theirs.growth:.4f}",
            ),
            figure(
                f"{name} / published way: peak memory of the whole process",
                [mine.peak / theirs.peak],
                "x",
                f"{mine.peak / 2**20:.0f} MiB, models and libraries included",
            ),
        ]
    return figures


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its peak, and how many of these came on top of the loaded models, in a
    step of `labels` labels."""

    peak: int
    growth: int
    labels: int


def _settings(side: tuple[SelectorKind, Reading]) -> TrainingSettings:
    kind, reads = side
    return TrainingSettings(kind=kind, reads=reads)


def peak_memory(work: Work, name: str) -> Memory:
    """Two training steps, the optimizer's included."""
    settings = work.settings
    torch.set_num_threads(settings.threads)
    loss: Callable[[], Tensor]
    if name == PUBLISHED:
        config = _settings(LIKE_FOR_LIKE)
        published = PublishedTrainer.load(settings.slm, settings.dtype, settings.device)
        rows = published.model.get_output_embeddings().weight.shape[0]
        reserved = reserved_ids(Tokenizer.load(resolve_model(settings.slm)), rows)
        rollouts = synthetic_rollouts(work, rows, reserved)
        rollout, label = max(
            ((r, label) for r in rollouts for label in r.labels), key=lambda pair: pair[1].position
        )
        selector = _selector(published.model, reserved, config)
        labels = 1

        def loss() -> Tensor:
            return published.loss(
                rollout.token_ids[: label.position], label, selector, _weights(config)
            )
    else:
        config = _settings(SIDES[name])
        runtime, reserved = _load(settings)
        rollouts = synthetic_rollouts(replace(work, rollouts=1), runtime.vocab_rows, reserved)
        selector, labels = _selector(runtime.model, reserved, config), len(rollouts[0].labels)

        def loss() -> Tensor:
            return training_loss(runtime, selector, rollouts, config)

    optimizer = torch.optim.AdamW(_parameters(selector))
    with PeakMemory(settings.device) as memory:
        for _ in range(STEPS_FOR_MEMORY):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return Memory(memory.peak, memory.peak - memory.before, labels)


class PeakMemory:
    """Bytes in use before and at the peak of a `with` block: resident memory (sampled), or the
    device's own count."""

    def __init__(self, device: str) -> None:
        self._cuda, self._process, self._over = (
            device.startswith("cuda"),
            psutil.Process(),
            threading.Event(),
        )
        self._sampler = threading.Thread(target=self._sample)
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = self.peak = (
            torch.cuda.memory_allocated() if self._cuda else self._process.memory_info().rss
        )
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._sampler.join()
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.peak = (
                max(self.peak, self._process.memory_info().rss) if not self._cuda else self.peak
            )


# -- equality -------------------------------------------------------------------------------------


def _equality(
    work: Work,
    runtime: ModelRuntime,
    reserved: tuple[int, ...],
    published: PublishedTrainer,
    on_turn: Callable[[], None],
) -> list[Figure]:
    """Both ways on the same labels: L_sel of one rollout's labels, and L_sel + L_reg of a label at
    a rollout's end (there both take L_reg over the same positions; with more labels the published
    way counts early positions once per label, here they count once)."""
    config = _settings(LIKE_FOR_LIKE)
    (rollout,) = synthetic_rollouts(replace(work, rollouts=1), runtime.vocab_rows, reserved, seed=1)
    several = replace(rollout, labels=tuple(label for _, label in _spread([rollout], work.groups)))
    at_end = replace(
        rollout, labels=(replace(rollout.labels[-1], position=len(rollout.token_ids)),)
    )
    figures = []
    for what, case, reg in (("L_sel", several, 0.0), ("L_sel + L_reg", at_end, config.reg_weight)):
        mine = config.model_copy(update={"reg_weight": reg})
        selector = _selector(runtime.model, reserved, mine)
        found = [
            _gradients(selector, [training_loss(runtime, selector, [case], mine)]),
            _gradients(
                selector,
                (
                    published.loss(
                        case.token_ids[: label.position], label, selector, _weights(mine)
                    )
                    / len(case.labels)
                    for label in case.labels
                ),
            ),
        ]
        (loss, ours), (their_loss, theirs) = found
        worst = max(_relative(a, b) for a, b in zip(ours, theirs, strict=True))
        conditions = f"labels: {len(case.labels)}; reserved, adapted against the published way"
        figures += [
            figure(
                f"{what}: loss, relative difference",
                [abs(loss - their_loss) / abs(their_loss)],
                "",
                conditions,
            ),
            figure(
                f"{what}: gradient, relative difference",
                [_relative(_joined(ours), _joined(theirs))],
                "",
                f"{conditions}; worst single tensor {worst:.1e}",
            ),
        ]
        on_turn()
    return figures


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _gradients(selector: LocalSelector, losses: Iterable[Tensor]) -> tuple[float, list[Tensor]]:
    """The losses' sum and its gradients."""
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    gradients = []
    for parameter in _parameters(selector):
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return total, gradients
