"""Engines of tiny random models for tests: models, local selectors, requests, runs, and comparisons
of Steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import (
    LLMInfo,
    ModelInput,
    NextTokenInput,
    Proposal,
    SelectionInput,
    SelectorClient,
)
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer, SequenceSlots
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError, VersionNotFoundError
from s2t_shared.model.kv_pool import MIN_SLOT_TOKENS, KVPool
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.types import (
    CandidateRule,
    DecodeOptions,
    DecodeRequest,
    Mode,
    Policy,
    Sampling,
    ScoreQuery,
    ScoreReply,
    Support,
    Trigger,
)

Models = dict[str, Path]
PROMPTS = (
    (6, 7, 8, 45),
    (9,),
    (20, 3, 31, 30, 12, 11, 40, 41, 22),
    (17, 18),
    tuple(range(5, 30)),
    (44, 44, 10),
)
KINDS = [(kind, reads) for kind in SelectorKind for reads in Reading]
ALL = Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS, candidates=CandidateRule(64))


def with_small_pool(runtime: ModelRuntime, rows: int) -> ModelRuntime:
    """The runtime with room for so many short rows only."""
    pool = runtime.pool
    runtime.pool = KVPool(
        pool._shapes, pool._dtype, pool._device, rows * MIN_SLOT_TOKENS * pool.bytes_per_token
    )
    return runtime


def make_proposer(models: Models, name: str = "slm", max_rows: int = 64) -> Proposer:
    runtime = with_small_pool(ModelRuntime.load(str(models[name])), max_rows)
    return Proposer(runtime, reserved_ids(Tokenizer.load(models[name]), runtime.vocab_rows))


def make_llm(models: Models, name: str = "llm", max_rows: int = 64) -> LLMSelector:
    return LLMSelector(with_small_pool(ModelRuntime.load(str(models[name])), max_rows), "tokenizer")


def make_local_selector(
    proposer: Proposer,
    version: str,
    kind: SelectorKind,
    reads: Reading,
    seed: int = 0,
    fusion: float = 0.0,
) -> LocalSelector:
    """A random local selector that disagrees with the SLM."""
    adapter = new_adapter(proposer.runtime.model, 3, 6.0, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {
        path: (a.detach(), torch.randn(b.shape, generator=generator) * 0.15)
        for path, (a, b) in adapter.weights.items()
    }
    deltas = torch.randn(16, proposer.runtime.config.hidden_size, generator=generator) * 0.3
    return LocalSelector(
        version=version,
        kind=kind,
        reads=reads,
        reserved_ids=proposer.reserved_ids,
        adapter=Adapter(rank=3, alpha=6.0, weights=weights),
        bin_deltas=deltas,
        temperature=0.2,
        fusion=fusion,
    )


def run_inputs(proposer: Proposer, inputs: Sequence[ModelInput]) -> list[object]:
    """Every work's result, in as many forwards as it takes."""
    results: list[object] = [None] * len(inputs)
    for _ in range(50):
        open_ = [i for i, r in enumerate(results) if r is None]
        if not open_:
            return results
        for i, result in zip(open_, proposer.run([inputs[i] for i in open_]), strict=True):
            results[i] = result
    raise AssertionError("inputs never end")


def propose(
    proposer: Proposer, tracks: Sequence[SequenceSlots], contexts: Sequence[Sequence[int]]
) -> list[Support]:
    proposals = run_inputs(
        proposer, [NextTokenInput(t, c) for t, c in zip(tracks, contexts, strict=True)]
    )
    return [p.support for p in proposals if isinstance(p, Proposal) and p.support]


def select(
    proposer: Proposer,
    tracks: Sequence[SequenceSlots],
    contexts: Sequence[Sequence[int]],
    supports: Sequence[Support],
    counts: Sequence[int],
) -> list[tuple[float, ...]]:
    return run_inputs(
        proposer,
        [  # type: ignore[return-value]
            SelectionInput(t, c, s.ids[:n], s.log_probs[:n])
            for t, c, s, n in zip(tracks, contexts, supports, counts, strict=True)
        ],
    )


def lookup_in(
    selectors: Sequence[LocalSelector], live: str = ""
) -> Callable[[str | None], LocalSelector | None]:
    by_version = {s.version: s for s in selectors}

    def lookup(version: str | None) -> LocalSelector | None:
        name = live if version is None else version
        if name and name not in by_version:
            raise VersionNotFoundError(name)
        return by_version[name] if name else None

    return lookup


def all_local_selectors(proposer: Proposer) -> list[LocalSelector]:
    return [
        make_local_selector(proposer, f"{kind.value}-{reads.value}", kind, reads, seed)
        for seed, (kind, reads) in enumerate(KINDS)
    ]


def finish(engine: Engine, limit: int = 4000) -> None:
    """Run until nothing is left; a loop that never ends is a failure, not a hang."""
    for _ in range(limit):
        if engine.idle:
            assert engine.proposer.runtime.pool.live_slots == 0, "a finished answer kept its rows"
            return
        engine.step()
        engine.proposer.runtime.pool.check()
        engine.wait()
    raise AssertionError(f"not finished after {limit} steps")


def run(engine: Engine, *requests: DecodeRequest) -> list[LiveSequence]:
    sequences = [engine.add(request) for request in requests]
    finish(engine)
    return sequences


def request(
    policy: Policy,
    prompt: Sequence[int] = PROMPTS[0],
    new: int = 16,
    name: str = "r",
    version: str | None = None,
    seed: int = 0,
) -> DecodeRequest:
    return DecodeRequest(
        request_id=name,
        token_ids=tuple(prompt),
        options=DecodeOptions(
            policy=policy,
            sampling=Sampling(0.9, 0.95, 20, seed),
            max_new_tokens=new,
            version=version,
        ),
    )


GREEDY = Policy(mode=Mode.GREEDY)


def greedy_from(
    models: Models, prompt: Sequence[int], new: int, name: str = "slm"
) -> tuple[int, ...]:
    return (
        run(Engine(make_proposer(models, name)), request(GREEDY, prompt, new))[0].output_ids
        if new
        else ()
    )


def hf_greedy(
    folder: Path, prompt: Sequence[int], new: int, suppressed: Sequence[int]
) -> tuple[int, ...]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        suppress_tokens=list(suppressed) or None,
    )
    return tuple(out[0, len(prompt) :].tolist())


def assert_same(a: object, b: object, where: str = "step") -> None:
    """Equal field by field; floats to 1e-4 (batches of other shapes round differently)."""
    assert type(a) is type(b), where
    if is_dataclass(a):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{where}.{field.name}")
    elif isinstance(a, tuple | list):
        assert len(a) == len(b), where  # type: ignore[arg-type]
        for i, (x, y) in enumerate(zip(a, b, strict=True)):  # type: ignore[call-overload]
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-4), where
    else:
        assert a == b, where


def with_options(request: DecodeRequest, **changes: object) -> DecodeRequest:
    """The request with other decode options."""
    return replace(request, options=replace(request.options, **changes))  # type: ignore[arg-type]


class FailingSelector:
    """Answers the first `healthy` queries, then fails with `error`, or (None) never answers."""

    def __init__(self, real: SelectorClient, healthy: int, error: Exception | None) -> None:
        self.real = real
        self.healthy = healthy
        self._error = error
        self.unanswered: list[tuple[ScoreQuery, Future[ScoreReply]]] = []

    @property
    def info(self) -> LLMInfo:
        return self.real.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        return [self._answer(q) for q in queries]

    def _answer(self, asked: ScoreQuery) -> Future[ScoreReply]:
        if self.healthy > 0:
            self.healthy -= 1
            return self.real.submit([asked])[0]
        future: Future[ScoreReply] = Future()
        if self._error is not None:
            future.set_exception(self._error)
        else:
            self.unanswered.append((asked, future))
        return future

    def answer_late(self, count: int) -> None:
        """Answer the oldest `count` queries, whoever still waits."""
        for asked, future in self.unanswered[:count]:
            if future.set_running_or_notify_cancel():
                future.set_result(self.real.submit([asked])[0].result())
        del self.unanswered[:count]


FAILURES = {
    "unavailable": SelectorUnavailableError("no selector"),
    "refused": InvalidRequestError("no such id"),
    "wordless": SelectorUnavailableError(),
    "late": None,
}


def failing_engine(
    models: Models,
    healthy: int,
    failure: str,
    selectors: Callable[[Proposer], list[LocalSelector]] = lambda _: [],
) -> tuple[Engine, FailingSelector]:
    proposer = make_proposer(models)
    made = selectors(proposer)
    client = FailingSelector(InProcessSelector(make_llm(models)), healthy, FAILURES[failure])
    engine = Engine(
        proposer,
        client,
        lookup_in(made, made[0].version if made else ""),
        selection_timeout_s=0.01,
        max_draft_tokens=1,
    )
    return engine, client
