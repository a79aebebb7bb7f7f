"""What the benchmarks share: models, prompts of a wanted length, runs of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch

from s2t_shared import policy as decide
from s2t_shared.decode.calibrate import GENERIC_QUESTIONS
from s2t_shared.decode.engine import MAX_DRAFT_TOKENS, Engine, LocalSelectorLookup
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import ConfigError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import check_same_tokenizer, reserved_ids
from s2t_shared.types import (
    DecodeOptions,
    DecodeRequest,
    Message,
    Policy,
    Prompt,
    Sampling,
    Trigger,
)

KV_BYTES = 4 << 30
MAX_BATCH = 64  # a GPU's KV pool is laid out for it
RANK = 16
_runs = count()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The knobs all benchmarks have. Lengths are in tokens."""

    slm: str
    llm: str | None = None
    prefix: int = 256
    new: int = 64
    k: int = 8
    budget: float = 0.01
    repeats: int = 5
    threads: int = 2
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Models:
    """An SLM in an engine's clothes and, for some, an LLM."""

    tokenizer: Tokenizer
    proposer: Proposer
    scorer: LLMSelector | None = None

    @property
    def slm(self) -> ModelRuntime:
        return self.proposer.runtime


def load(settings: Settings, needs_llm: bool = False) -> Models:
    """Raises ConfigError, ModelLoadError, TokenizerMismatchError."""
    torch.set_num_threads(settings.threads)
    tokenizer = Tokenizer.load(resolve_model(settings.slm))
    slm = ModelRuntime.load(
        settings.slm, settings.dtype, settings.device, KV_BYTES, max_num_seqs=MAX_BATCH
    )
    proposer = Proposer(slm, reserved_ids(tokenizer, slm.vocab_rows))
    if not needs_llm:
        return Models(tokenizer, proposer)
    if settings.llm is None:
        raise ConfigError("this benchmark compares with an LLM; give --llm")
    llm_tokenizer = Tokenizer.load(resolve_model(settings.llm, "llm"))
    check_same_tokenizer(tokenizer, llm_tokenizer)
    llm = ModelRuntime.load(settings.llm, settings.dtype, settings.device, KV_BYTES, "llm")
    return Models(tokenizer, proposer, LLMSelector(llm, llm_tokenizer.digest))


def ragged_lengths(batch: int, mean: int) -> list[int]:
    """Lengths spread evenly over mean/4 .. 7 mean/4, in a scrambled order; one sequence has the
    mean."""
    if batch == 1:
        return [mean]
    spread = [mean // 4 + (3 * mean // 2) * i // (batch - 1) for i in range(batch)]
    return [spread[i * 7 % batch] if batch % 7 else spread[i] for i in range(batch)]


def prompts(tokenizer: Tokenizer, lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Chat prompts of these lengths: a question behind as many others as it takes, cut at the
    front."""
    made: list[tuple[int, ...]] = []
    for i, length in enumerate(lengths):
        text, ids = "", tuple[int, ...]()
        for j in range(1000):
            text = GENERIC_QUESTIONS[(seed + 5 * i + j) % len(GENERIC_QUESTIONS)] + "\n" + text
            message = "Answer the last of these questions.\n" + text
            chat = Prompt(messages=(Message("user", message),))
            ids = tokenizer.encode(chat if tokenizer.hf.chat_template else Prompt(text=message))
            if len(ids) >= length:
                break
        made.append(tuple(ids[len(ids) - length :]))
    return made


def random_selector(
    runtime: ModelRuntime, reserved: tuple[int, ...], kind: SelectorKind, reads: Reading
) -> LocalSelector:
    """A selector of the right shape: what it prefers does not matter to what it costs. New weights
    every time, so that nothing is reused between runs."""
    adapter = new_adapter(runtime.model, RANK, 2.0 * RANK, 0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        path: (a.detach(), (torch.randn(b.shape, generator=generator) * 0.02).to(b.device))
        for path, (a, b) in adapter.weights.items()
    }
    deltas = torch.randn(len(reserved), runtime.head.weight.shape[1], generator=generator) * 0.02
    return LocalSelector(
        version=f"bench-{next(_runs)}",
        kind=kind,
        reads=reads,
        reserved_ids=reserved,
        adapter=Adapter(rank=RANK, alpha=2.0 * RANK, weights=weights),
        bin_deltas=deltas.to(runtime.device),
    )


def seed_with(budget: float, steps: int, warmup: int, first: int = 0) -> int:
    """A seed whose random trigger fires at exactly `budget` of the steps (at least once)."""
    wanted = max(1, round(budget * steps))
    for seed in range(first, first + 100_000):
        if (
            sum(decide.random_signal(seed, i) > 1.0 - budget for i in range(warmup, steps))
            == wanted
        ):
            return seed
    raise ConfigError(f"no seed fires at {budget:.1%} of {steps} steps; ask for more steps")


@dataclass(frozen=True)
class Run:
    """Finished sequences and what they took."""

    sequences: tuple[LiveSequence, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(s.steps) for s in self.sequences)


def run(
    models: Models,
    policies: Sequence[Policy],
    prompt_ids: Sequence[tuple[int, ...]],
    new: int,
    engine: Callable[[Proposer], Engine] | None = None,
) -> Run:
    """Answer the prompts together, on empty pools. Without an `engine` of the caller's, each gets
    exactly `new` tokens."""
    models.slm.pool.clear()
    if models.scorer is not None:
        models.scorer.runtime.pool.clear()
    eos_ids = models.slm.eos_ids
    if engine is None:  # decode as long as we were told
        models.slm.eos_ids = frozenset()
    made = (
        engine(models.proposer) if engine else Engine(models.proposer, max_num_seqs=len(prompt_ids))
    )
    live = [
        made.add(
            DecodeRequest(
                request_id=f"{next(_runs)}",
                token_ids=ids,
                options=DecodeOptions(policy=policy, max_new_tokens=new),
            )
        )
        for ids, policy in zip(prompt_ids, policies, strict=True)
    ]
    started = time.perf_counter()
    while not made.idle:
        made.step()
        made.wait()
    seconds = time.perf_counter() - started
    models.slm.eos_ids = eos_ids
    return Run(tuple(live), seconds)


def _always(selector: LocalSelector | None) -> LocalSelectorLookup:
    return lambda version: selector


def interleaved(
    models: Models,
    sides: Mapping[str, tuple[Sequence[Policy], LocalSelector | None]],
    prompt_ids: Sequence[tuple[int, ...]],
    new: int,
    seeds: Sequence[int],
) -> dict[str, Run]:
    """The same prompts on several engines over one model, which take turns step by step: whatever
    the machine does meanwhile, it does to all of them. Every side has read the prompts before, with
    the adapter it proposes with; timed from every sequence's second token on, so that all sides
    decode the same number of tokens."""
    models.slm.pool.clear()
    eos_ids, models.slm.eos_ids = models.slm.eos_ids, frozenset()
    engines, live, seconds = {}, {}, dict.fromkeys(sides, 0.0)
    for name, (policies, selector) in sides.items():
        engines[name] = engine = Engine(
            models.proposer, None, _always(selector), max_num_seqs=len(prompt_ids)
        )
        _add(engine, policies, prompt_ids, 1, seeds)
        while not engine.idle:
            engine.step()
    for name, (policies, _) in sides.items():
        live[name] = _add(engines[name], policies, prompt_ids, new, seeds)
        engines[name].step()
        assert all(len(s.steps) == 1 for s in live[name]), "the prompts did not stay in the pool"
    names = list(sides)
    while any(not engine.idle for engine in engines.values()):
        names.append(names.pop(0))
        for name in names:
            if not engines[name].idle:
                started = time.perf_counter()
                engines[name].step()
                seconds[name] += time.perf_counter() - started
    models.slm.eos_ids = eos_ids
    return {name: Run(tuple(live[name]), seconds[name]) for name in sides}


def _add(
    engine: Engine,
    policies: Sequence[Policy],
    prompt_ids: Sequence[tuple[int, ...]],
    new: int,
    seeds: Sequence[int],
) -> list[LiveSequence]:
    return [
        engine.add(
            DecodeRequest(
                request_id=f"{next(_runs)}",
                token_ids=ids,
                options=DecodeOptions(
                    policy=policy, sampling=Sampling(seed=seed), max_new_tokens=new
                ),
            )
        )
        for ids, policy, seed in zip(prompt_ids, policies, seeds, strict=True)
    ]


def with_llm(
    models: Models, batch: int, max_draft_tokens: int = MAX_DRAFT_TOKENS
) -> Callable[[Proposer], Engine]:
    assert models.scorer is not None
    selector = InProcessSelector(models.scorer)
    return lambda proposer: Engine(
        proposer,
        selector,
        max_num_seqs=batch,
        selection_timeout_s=600.0,
        max_draft_tokens=max_draft_tokens,
    )


def with_random_trigger(policy: Policy, budget: float) -> Policy:
    return replace(policy, trigger=Trigger.RANDOM, threshold=1.0 - budget)
