"""The same laws on a GPU. Skipped without one; CI has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import SamplingInput
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.reductions import draw
from s2t_shared.model.local_selector import Reading, SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.types import CandidateRule, Mode, Policy, Sampling, Trigger
from tests.helpers.engine import (
    GREEDY,
    KINDS,
    PROMPTS,
    lookup_in,
    make_local_selector,
    request,
    run,
    with_options,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RESERVED = tuple(range(48, 64))


def on_gpu(folder: Path, dtype: str = "float32") -> Proposer:
    runtime = ModelRuntime.load(str(folder), dtype, "cuda", 64 << 20, max_num_seqs=8)
    return Proposer(runtime, RESERVED)


@pytest.mark.parametrize("name", ["slm", "qwen2", "gemma2", "mistral"])
def test_greedy_is_hugging_faces(models: dict[str, Path], name: str) -> None:
    """A mask or index left on the host shows here, not at a customer's first request."""
    proposer = on_gpu(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).cuda().eval()
    answers = run(Engine(proposer), *(request(GREEDY, prompt, 12) for prompt in PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=list(RESERVED),
        )
        assert answer.output_ids == tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind, reads", KINDS)
def test_local_selections_are_the_cpus(
    models: dict[str, Path], kind: SelectorKind, reads: Reading
) -> None:
    policy = Policy(
        mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY, threshold=1.8, candidates=CandidateRule(4)
    )
    answers = []
    for device in ("cpu", "cuda"):
        proposer = Proposer(
            ModelRuntime.load(str(models["slm"]), "float32", device, 64 << 20), RESERVED
        )
        selector = make_local_selector(proposer, "v", kind, reads)
        assert selector.adapter is not None and selector.bin_deltas is not None
        selector.adapter = selector.adapter.to(proposer.runtime.device, torch.float32)
        selector.bin_deltas = selector.bin_deltas.to(proposer.runtime.device)
        engine = Engine(proposer, local_selectors=lookup_in([selector], "v"))
        answers.append(
            [s.output_ids for s in run(engine, *(request(policy, p, 12) for p in PROMPTS))]
        )
    assert answers[0] == answers[1]


def test_bfloat16_decodes(models: dict[str, Path]) -> None:
    """The first token is among the fp32 model's likeliest, and no reserved id ever comes."""
    watched = with_options(request(GREEDY, PROMPTS[0], 12), keep_support=True)
    (exact,) = run(Engine(on_gpu(models["slm"])), watched)
    (answer,) = run(Engine(on_gpu(models["slm"], "bfloat16")), watched)
    assert exact.steps[0].support is not None
    assert answer.output_ids[0] in exact.steps[0].support.ids[:3]
    assert not set(answer.output_ids) & set(RESERVED)


@pytest.mark.parametrize("name", ["slm", "qwen2", "gemma2", "mistral"])
def test_recorded_steps_are_the_others(models: dict[str, Path], name: str) -> None:
    """A tensor that lives outside a recorded graph, or a kernel chosen while recording, shows
    here: the same answers in a batch whose sequences come and go."""
    requests = [request(GREEDY, prompt, 5 + 4 * i) for i, prompt in enumerate(PROMPTS)]
    recorded = on_gpu(models[name])
    assert recorded.runtime._graphs is not None
    plain = Proposer(ModelRuntime.load(str(models[name]), "float32", "cuda", 64 << 20), RESERVED)
    for _ in range(2):
        answers = [s.output_ids for s in run(Engine(recorded, max_num_seqs=3), *requests)]
        expected = [s.output_ids for s in run(Engine(plain, max_num_seqs=3), *requests)]
        assert answers == expected


def test_drawn_ids_are_the_cpus() -> None:
    logits = torch.randn(24, 5000, generator=torch.Generator().manual_seed(0)) * 3
    cuts = (Sampling(0.7), Sampling(1.3, 0.8), Sampling(1.0, 1.0, 40), Sampling(0.0))
    inputs = [SamplingInput(replace(cuts[i % 4], seed=i), i) for i in range(24)]
    assert draw(logits.cuda(), inputs).tolist() == draw(logits, inputs).tolist()
