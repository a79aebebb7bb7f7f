"""`s2t bench gpu`: what a GPU makes of each mode, with models of real shapes.

Needs no network and no weights: a size ("1.5B") stands for random weights of Qwen2.5's shape, which
cost what trained ones cost. Their signals mean nothing, so triggers are random at the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from s2t_shared.bundled import SLM_DIR
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.llm_selector import LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.model import attention
from s2t_shared.model.device_memory import GIB, check_fits
from s2t_shared.model.kv_pool import BatchLayout
from s2t_shared.model.loading import DTYPES
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.shape import published_config
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import (
    CandidateRule,
    DecodeOptions,
    DecodeRequest,
    Mode,
    Policy,
    Sampling,
)
from services.bench import workload
from services.bench.measure import Figure, Report, clock, figure, ratios, take_turns
from services.bench.workload import Models, Settings

RESERVED_IDS = tuple(range(64))
GREEDY = "greedy"


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """slm, llm: sizes as in `shape.SHAPES`. kv_gib: of each model's KV pool. max_hf_batch: larger
    batches are not compared with `generate`. graphs: decode steps are recorded."""

    slm: str
    llm: str | None
    batches: Sequence[int]
    kv_gib: float
    max_hf_batch: int = 64
    graphs: bool = True


def dummy_model(size: str, dtype: torch.dtype, implementation: str) -> PreTrainedModel:
    """A model with random weights, made on the default device.

    Raises:
        ConfigError: no shape of this name.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        published_config(size, dtype), dtype=dtype, attn_implementation=implementation
    )
    return model.eval()


def _runtime(size: str, settings: Settings, kv_bytes: int, max_num_seqs: int) -> ModelRuntime:
    device = torch.device(settings.device)
    dtype = DTYPES[settings.dtype]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        check_fits(size, _parameters(size) * dtype.itemsize, kv_bytes, free)
    with device:
        model = dummy_model(size, dtype, attention.NAME)
    layout = BatchLayout.for_device(device, max_num_seqs)
    return ModelRuntime(model, f"dummy-{size}", frozenset(), kv_bytes, layout)


def _parameters(size: str) -> int:
    with torch.device("meta"):
        model = dummy_model(size, torch.bfloat16, "eager")
    return sum(parameter.numel() for parameter in model.parameters())


def load(settings: Settings, gpu: GpuSettings) -> Models:
    """Both models on the device.

    Raises:
        ConfigError: no shape of this name.
        ModelLoadError: they do not fit.
    """
    torch.set_num_threads(settings.threads)
    kv_bytes = int(gpu.kv_gib * GIB)
    slm = _runtime(gpu.slm, settings, kv_bytes, max(gpu.batches))
    slm.switch  # noqa: B018 - wraps the layers, as a service does
    if gpu.graphs:
        slm.use_decode_graphs()
    tokenizer = Tokenizer.load(SLM_DIR)  # prompts are ids: it is never asked
    scorer = None
    if gpu.llm is not None:
        scorer = LLMSelector(_runtime(gpu.llm, settings, kv_bytes, 1), tokenizer.digest)
    return Models(tokenizer, Proposer(slm, RESERVED_IDS), scorer)


def bench_gpu(
    settings: Settings, gpu: GpuSettings, on_figure: Callable[[Figure], None] = lambda figure: None
) -> Report:
    """Tokens per second of every mode at every batch size, in turns, prompts included."""
    models = load(settings, gpu)
    figures = []
    for batch in gpu.batches:
        for found in _bench_batch(settings, gpu, models, batch):
            figures.append(found)
            on_figure(found)
    title = f"gpu: SLM {gpu.slm}, LLM {gpu.llm}, random weights, {settings.dtype}"
    return Report(title, tuple(figures))


def _bench_batch(
    settings: Settings, gpu: GpuSettings, models: Models, batch: int
) -> Iterator[Figure]:
    generator = torch.Generator().manual_seed(batch)

    def prompts() -> torch.Tensor:
        """New ones for every run: contexts that were read before would be free."""
        vocabulary = models.slm.vocab_rows
        return torch.randint(64, vocabulary, (batch, settings.prefix), generator=generator)

    sides: dict[str, Callable[[], float]] = {}
    for name, (policy, selector) in _policies(settings, models).items():
        sides[name] = partial(_run, models, policy, selector, prompts, settings.new)
    with _generate(settings, gpu, batch) as generate:
        if generate is not None:
            name = "greedy, Hugging Face generate"
            sides[name] = lambda: generate(prompts().to(settings.device))
        for side in sides.values():  # first runs load kernels and fill caches
            side()
        seconds = take_turns(sides, settings.repeats)
    tokens = batch * settings.new
    conditions = f"batch {batch}, prompts of {settings.prefix}, {settings.new} new"
    for name, taken in seconds.items():
        yield figure(name, [tokens / s for s in taken], "tokens/s", conditions)
    for name, taken in seconds.items():
        if name != GREEDY:
            yield figure(f"{name} / greedy", ratios(seconds[GREEDY], taken), "x", f"batch {batch}")


def _policies(
    settings: Settings, models: Models
) -> Mapping[str, tuple[Policy, LocalSelector | None]]:
    rule = CandidateRule(settings.k)
    local = Policy(mode=Mode.S2T_LOCAL, candidates=rule)
    s2t = Policy(mode=Mode.S2T, candidates=rule)
    selector = workload.random_selector(models.slm, RESERVED_IDS, SelectorKind.PREFIX, Reading.BASE)
    budget = f"{settings.budget:.0%}"
    sides: dict[str, tuple[Policy, LocalSelector | None]] = {
        GREEDY: (Policy(), None),
        "sample, top_p 0.95 of flat logits": (Policy(mode=Mode.SAMPLE), None),
        f"s2t_local (prefix, base), {budget}": (
            workload.with_random_trigger(local, settings.budget),
            selector,
        ),
    }
    if models.scorer is not None:
        sides[f"s2t, {budget}"] = (workload.with_random_trigger(s2t, settings.budget), None)
        sides["LLM alone (mode llm)"] = (Policy(mode=Mode.LLM), None)
    return sides


def _run(
    models: Models,
    policy: Policy,
    selector: LocalSelector | None,
    prompts: Callable[[], torch.Tensor],
    new: int,
) -> float:
    """Seconds of one batch. The KV pool is not emptied: recorded steps would end with its slabs."""
    rows = prompts().tolist()
    if policy.needs_llm:
        engine = workload.with_llm(models, len(rows))(models.proposer)
    else:
        engine = Engine(models.proposer, None, lambda version: selector, max_num_seqs=len(rows))
    sampling = Sampling(1.0, 0.95) if policy.mode is Mode.SAMPLE else Sampling()
    started = clock()
    for i, row in enumerate(rows):
        options = DecodeOptions(
            policy=policy, sampling=replace(sampling, seed=i), max_new_tokens=new
        )
        engine.add(DecodeRequest(request_id=str(i), token_ids=tuple(row), options=options))
    while not engine.idle:
        engine.step()
        engine.wait()
    return clock() - started


@contextmanager
def _generate(
    settings: Settings, gpu: GpuSettings, batch: int
) -> Iterator[Callable[[torch.Tensor], float] | None]:
    """Seconds that Hugging Face `generate` takes; None for batches that are not compared."""
    if batch > gpu.max_hf_batch:
        yield None
        return
    with torch.device(settings.device):
        model = dummy_model(gpu.slm, DTYPES[settings.dtype], "sdpa")

    def generate(ids: torch.Tensor) -> float:
        started = clock()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.new,
                min_new_tokens=settings.new,
                do_sample=False,
                pad_token_id=0,
            )
        return clock() - started

    yield generate
