"""The same laws on a GPU. Skipped without one; CI has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.proposer import Proposer
from s2t_shared.model.local_selector import Reading, SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.types import CandidateRule, Mode, Policy, Trigger
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
    return Proposer(ModelRuntime.load(str(folder), dtype, "cuda", 64 << 20), RESERVED)


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
