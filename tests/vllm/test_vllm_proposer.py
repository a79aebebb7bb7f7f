"""The SLM on vLLM against the one on torch, both in fp32 on the bundled SLM, by the same engine.

These tests have an environment of their own: `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.config import load_config
from s2t_shared.decode import vllm_proposer, vllm_reader
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import NextTokenInput, Proposal, SelectorClient
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.decode.vllm_options import VLLMOptions
from s2t_shared.decode.vllm_proposer import VLLMProposer, VLLMSequence
from s2t_shared.errors import ConfigError, InvalidRequestError, ModelFailedError, VersionError
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import save_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.pair import Pair
from s2t_shared.requests import new_request
from s2t_shared.types import (
    Answer,
    CandidateRule,
    DecodeOptions,
    DecodeRequest,
    FinishReason,
    Mode,
    Policy,
    Prompt,
    Proposals,
    Step,
    Trigger,
)
from s2t_shared.versions.registry import Registry
from services.serve.build import proposer_service
from tests.decode.golden.traces import Case, cases, random_local_selector
from tests.helpers.versions import manifest_of

OPTIONS = VLLMOptions(dtype="float32", eager=True)
NEW_TOKENS = 24
EVERY_STEP = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=-1.0)
WITHOUT_VERSION = [case for case in cases() if not case.version and "untrained" not in case.name]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SLM_DIR)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    texts = [problem.prompt for problem in bundled_problems.problems("test", 8)]
    return [tuple(tokenizer.encode_text(text)) for text in texts]


@pytest.fixture(scope="module")
def on_torch(tokenizer: Tokenizer) -> Proposer:
    runtime = ModelRuntime.load(str(SLM_DIR))
    return Proposer(runtime, reserved_ids(tokenizer, runtime.vocab_rows))


@pytest.fixture(scope="module")
def on_vllm(tokenizer: Tokenizer) -> VLLMProposer:
    """A small one: it reads prompts in pieces, which are steps without a token, and takes the KV of
    running sequences back."""
    start = vllm_proposer._start
    small = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 12}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vllm_proposer, "_start", lambda arguments: start(arguments | small))
        return VLLMProposer.load("bundled", OPTIONS, tokenizer, max_num_seqs=8, max_lora_rank=8)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> InProcessSelector:
    return InProcessSelector(LLMSelector(ModelRuntime.load(str(LLM_DIR)), tokenizer.digest))


def decoded(
    proposer: Proposer | VLLMProposer,
    llm: SelectorClient | None,
    prompts: Sequence[tuple[int, ...]],
    options: DecodeOptions,
    local_selector: LocalSelector | None = None,
    **engine_options: Any,
) -> list[LiveSequence]:
    engine = Engine(proposer, llm, selection_timeout_s=60.0, **engine_options)
    live = []
    for i, prompt in enumerate(prompts):
        request = DecodeRequest(request_id=str(i), token_ids=prompt, options=options)
        live.append(engine.add(request, local_selector))
    while not engine.idle:
        engine.step()
        engine.wait()
    assert proposer.kv_slots_in_use == 0
    return live


def check_same(found: Sequence[LiveSequence], expected: Sequence[LiveSequence]) -> None:
    """Every Step: ids and choices equal, numbers within 1e-3: kernels of CPUs differ."""
    for here, there in zip(found, expected, strict=True):
        assert here.output_ids == there.output_ids
        assert here.finish_reason is there.finish_reason
        # How many drafts there are depends on when the LLM answers.
        assert replace(here.usage, llm_forwards=0) == replace(there.usage, llm_forwards=0)
        for step, other in zip(here.steps, there.steps, strict=True):
            check_same_step(step, other)


def check_same_step(step: Step, other: Step) -> None:
    for name in (
        "token_id",
        "triggered",
        "chosen_by",
        "candidate_ids",
        "slm_top_id",
        "llm_top_id",
        "llm_top_rank",
        "degraded",
    ):
        assert getattr(step, name) == getattr(other, name), (name, step, other)
    for name in ("signal", "entropy", "kl", "scores"):
        here, there = getattr(step, name), getattr(other, name)
        assert (here is None) == (there is None)
        if there is not None:
            assert here == pytest.approx(there, abs=1e-3, rel=1e-3), (name, step, other)
    assert (step.support is None) == (other.support is None)
    if step.support is not None and other.support is not None:
        best = other.support.log_probs[:8]
        assert step.support.log_probs[:8] == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("case", WITHOUT_VERSION, ids=lambda case: case.name)
def test_every_mode_makes_the_same_steps(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    llm: InProcessSelector,
    prompts: list[tuple[int, ...]],
    case: Case,
) -> None:
    """Eight prompts in one batch, together too long for the KV."""
    options = DecodeOptions(
        policy=case.policy,
        sampling=case.sampling,
        max_new_tokens=NEW_TOKENS,
        score_rollout=case.score_rollout,
    )
    expected = decoded(on_torch, llm, prompts, options)
    check_same(decoded(on_vllm, llm, prompts, options), expected)
    tokens = [len(s.token_ids) for s in expected]
    assert sum(tokens) > 300 and min(tokens) > vllm_proposer.CPU_BLOCK_TOKENS


def test_a_step_keeps_its_support(
    on_torch: Proposer, on_vllm: VLLMProposer, prompts: list[tuple[int, ...]]
) -> None:
    """Calibration and harvest read the support of every Step."""
    options = DecodeOptions(max_new_tokens=NEW_TOKENS, keep_support=True)
    found = decoded(on_vllm, None, prompts, options)
    check_same(found, decoded(on_torch, None, prompts, options))
    assert all(step.support and len(step.support.ids) == 64 for s in found for step in s.steps)


# -- divergence points ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_draft_tokens", [1, 4, 32])
@pytest.mark.parametrize("trigger", [Trigger.ENTROPY, Trigger.KL])
def test_every_step_a_divergence_point(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    llm: InProcessSelector,
    prompts: list[tuple[int, ...]],
    trigger: Trigger,
    max_draft_tokens: int,
) -> None:
    """The first that may be, adjacent ones, the last token, and the end token among them."""
    policy = replace(EVERY_STEP, trigger=trigger)
    options = DecodeOptions(policy=policy, max_new_tokens=64)
    drafts = {"max_draft_tokens": max_draft_tokens}
    expected = decoded(on_torch, llm, prompts, options, **drafts)
    check_same(decoded(on_vllm, llm, prompts, options, **drafts), expected)
    for sequence in expected:
        marks = [step.triggered for step in sequence.steps]
        assert marks == [False] * 3 + [True] * (len(marks) - 3)
    assert any(s.finish_reason is FinishReason.STOP and s.steps[-1].triggered for s in expected)
    short = replace(options, max_new_tokens=4)  # the one divergence point is the last token
    check_same(decoded(on_vllm, llm, prompts, short), decoded(on_torch, llm, prompts, short))


def test_a_drafted_kl_equals_token_by_token(
    on_vllm: VLLMProposer, llm: InProcessSelector, prompts: list[tuple[int, ...]]
) -> None:
    """Law 2: rejected drafts leave nothing in what vLLM generates next."""
    policy = Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=0.05)
    options = DecodeOptions(policy=policy, max_new_tokens=48)
    one = decoded(on_vllm, llm, prompts, options, max_draft_tokens=1)
    many = decoded(on_vllm, llm, prompts, options, max_draft_tokens=32)
    assert [s.output_ids for s in many] == [s.output_ids for s in one]
    assert sum(s.usage.flips for s in one) > 0


def test_a_replay_is_the_same(
    on_vllm: VLLMProposer, llm: InProcessSelector, prompts: list[tuple[int, ...]]
) -> None:
    """The second time the prefix cache has read everything, a prompt's last token included."""
    options = DecodeOptions(policy=EVERY_STEP, max_new_tokens=NEW_TOKENS)
    first = decoded(on_vllm, llm, prompts, options)
    check_same(decoded(on_vllm, llm, prompts, options), first)


def test_a_dead_llm_degrades_the_same(
    on_torch: Proposer, on_vllm: VLLMProposer, prompts: list[tuple[int, ...]]
) -> None:
    """Law 5, in the mode that needs the SLM only then as well."""
    for mode in (Mode.S2T, Mode.LLM):
        options = DecodeOptions(policy=replace(EVERY_STEP, mode=mode), max_new_tokens=8)
        dead = ScriptedSelector(available=False)
        found = decoded(on_vllm, dead, prompts, options)
        check_same(found, decoded(on_torch, dead, prompts, options))
        assert all(s.usage.degraded_steps for s in found)


# -- beginnings and endings -----------------------------------------------------------------------


def test_a_cancelled_sequence_leaves_nothing_in_vllm(
    on_vllm: VLLMProposer, prompts: list[tuple[int, ...]]
) -> None:
    engine = Engine(on_vllm)
    options = DecodeOptions(max_new_tokens=NEW_TOKENS)
    alone = decoded(on_vllm, None, prompts[:2], options)
    stays, goes = [
        engine.add(DecodeRequest(request_id=str(i), token_ids=prompt, options=options))
        for i, prompt in enumerate(prompts[:2])
    ]
    for _ in range(4):
        engine.step()
    engine.cancel(goes)
    engine.step()
    assert goes.finish_reason is FinishReason.CANCELLED
    assert on_vllm._engine.get_num_unfinished_requests() == 1
    while not engine.idle:
        engine.step()
    assert stays.output_ids == alone[0].output_ids
    assert on_vllm._engine.get_num_unfinished_requests() == 0


def test_a_long_and_a_full_context(
    on_torch: Proposer, on_vllm: VLLMProposer, prompts: list[tuple[int, ...]]
) -> None:
    """Up to the model's last position, and refused beyond it, as on torch."""
    long = (prompts[0] * 8)[:250]
    options = DecodeOptions(max_new_tokens=NEW_TOKENS)
    expected = decoded(on_torch, None, [long], options)
    check_same(decoded(on_vllm, None, [long], options), expected)
    assert on_vllm.info.max_length == on_torch.info.max_length
    assert on_vllm.info.kv_tokens == 12 * vllm_proposer.CPU_BLOCK_TOKENS
    for wrong in ((), (5,) * 300, (10**6,), (-1,)):
        with pytest.raises(InvalidRequestError):
            Engine(on_vllm).add(DecodeRequest(request_id="", token_ids=wrong))


def test_a_failed_vllm_is_a_typed_error(
    on_vllm: VLLMProposer, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(on_vllm)
    sequence = engine.add(DecodeRequest(request_id="", token_ids=prompts[0]))
    engine.step()

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(on_vllm._engine, "step", fail)
        with pytest.raises(ModelFailedError, match="illegal memory access"):
            engine.step()
    engine.cancel(sequence)
    engine.step()
    assert on_vllm._engine.get_num_unfinished_requests() == 0


# -- local selectors ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def version(on_torch: Proposer, tmp_path_factory: pytest.TempPathFactory) -> LocalSelector:
    """One that disagrees with the SLM, with its files."""
    made = random_local_selector(on_torch, SelectorKind.PREFIX, Reading.ADAPTED, seed=3)
    folder = tmp_path_factory.mktemp("version")
    assert made.adapter is not None
    save_adapter(made.adapter, folder, "bundled")
    return replace(made, folder=folder)


@pytest.mark.parametrize("proposals", list(Proposals))
@pytest.mark.parametrize("trigger", [Trigger.ENTROPY, Trigger.KL, Trigger.ALWAYS])
def test_a_local_selector_makes_the_same_steps(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    llm: InProcessSelector,
    prompts: list[tuple[int, ...]],
    version: LocalSelector,
    trigger: Trigger,
    proposals: Proposals,
) -> None:
    policy = Policy(
        mode=Mode.S2T_LOCAL,
        trigger=trigger,
        threshold=0.3,
        candidates=CandidateRule(8),
        proposals=proposals,
    )
    options = DecodeOptions(policy=policy, max_new_tokens=NEW_TOKENS)
    fused = replace(version, fusion=0.5)
    expected = decoded(on_torch, llm, prompts, options, fused)
    check_same(decoded(on_vllm, llm, prompts, options, fused), expected)
    assert sum(s.usage.triggers for s in expected) > 0


def test_an_adapter_that_is_always_on(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    prompts: list[tuple[int, ...]],
    version: LocalSelector,
) -> None:
    """Plain distillation, beside sequences of the base model, whose tokens it must not change."""
    always = replace(version, always_on=True)
    options = DecodeOptions(policy=Policy(mode=Mode.S2T_LOCAL), max_new_tokens=NEW_TOKENS)
    expected = decoded(on_torch, None, prompts, options, always)
    check_same(decoded(on_vllm, None, prompts, options, always), expected)
    greedy = DecodeOptions(max_new_tokens=NEW_TOKENS)
    assert [s.output_ids for s in decoded(on_vllm, None, prompts, greedy)] != [
        s.output_ids for s in expected
    ]


@pytest.mark.parametrize("kind", list(SelectorKind))
@pytest.mark.parametrize("reads", list(Reading))
def test_other_kinds_are_refused(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    prompts: list[tuple[int, ...]],
    kind: SelectorKind,
    reads: Reading,
) -> None:
    """With the runtime that has them, before anything is decoded."""
    if (kind, reads) == (SelectorKind.PREFIX, Reading.ADAPTED):
        return
    selector = random_local_selector(on_torch, kind, reads, seed=0)
    options = DecodeOptions(policy=Policy(mode=Mode.S2T_LOCAL))
    request = DecodeRequest(request_id="", token_ids=prompts[0], options=options)
    for wrong in (selector, None):
        with pytest.raises(InvalidRequestError, match=r"set slm.runtime to torch"):
            Engine(on_vllm).add(request, wrong)


def test_versions_beyond_vllms_places_wait(
    on_vllm: VLLMProposer, prompts: list[tuple[int, ...]], version: LocalSelector
) -> None:
    """An adapter in vLLM's last place would act on the base model's tokens. One that is not used
    any more gives its place away."""
    policy = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS)
    options = DecodeOptions(policy=policy, max_new_tokens=8)
    expected = decoded(on_vllm, None, prompts[:1], options, version)[0]
    engine = Engine(on_vllm)
    live = []
    for i in range(vllm_proposer.MAX_ADAPTERS + 2):
        named = replace(version, version=f"v{i}")
        request = DecodeRequest(request_id=str(i), token_ids=prompts[0], options=options)
        live.append(engine.add(request, named))
    engine.step()
    assert [s.was_begun for s in live] == [True] * vllm_proposer.MAX_ADAPTERS + [False] * 2
    while not engine.idle:
        engine.step()
        assert len(on_vllm._engine.list_loras()) <= vllm_proposer.MAX_ADAPTERS
    assert [s.output_ids for s in live] == [expected.output_ids] * len(live)


# -- around the engine ----------------------------------------------------------------------------


def test_both_generations_of_the_runner_find_their_rows() -> None:
    """One class speaks to both; the second one's slots are not rows."""
    run = vllm_reader.Run(7, NextTokenInput(VLLMSequence(Policy()), (5, 6)), 2, 6)
    vocabulary = vllm_reader.Vocabulary((2, 3), 8, 2)
    reader = vllm_reader.logits_reader({7: run}, vocabulary)
    for base in (FirstInterface, SecondInterface):
        assert issubclass(reader, base)
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    expected = logits[1].clone()
    expected[[2, 3]] = -torch.inf
    second = reader(None, None)
    ours = SamplingParams(extra_args={vllm_reader.RUN: 7})
    assert second.add_request(4, ours)
    assert not second.add_request(1, SamplingParams())
    second.apply(logits, SimpleNamespace(idx_mapping_np=np.array([1, 4])))
    assert isinstance(run.output, Proposal)
    assert run.output.top_id == logits[1].argmax().item() == expected.argmax().item()
    assert not second.add_request(4, SamplingParams())  # the slot is another request's now
    run.output = None
    second.apply(logits, SimpleNamespace(idx_mapping_np=np.array([1, 4])))
    assert run.output is None


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "greedy", "stop": ("so",)},
        {"mode": "majority@4"},
        {"mode": "s2t", "threshold": 0.2, "stop": (" .",), "steps": True},
    ],
    ids=lambda settings: settings["mode"],
)
def test_a_pair_answers_the_same(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    llm: InProcessSelector,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
) -> None:
    """Text, stop strings and votes are around the engine."""
    texts = [problem.prompt for problem in bundled_problems.problems("test", 4)]
    there = Pair.of(on_torch.runtime, tokenizer, llm).generate(texts, **settings)
    pair = Pair.of(on_vllm, tokenizer, llm)
    here = pair.generate(texts, **settings)
    assert [(a.text, a.token_ids, a.finish_reason) for a in here] == [
        (a.text, a.token_ids, a.finish_reason) for a in there
    ]
    assert {a.versions.slm for a in here} == {OPTIONS.digest(on_torch.info.digest)}
    assert pair.dtype == "torch.float32"


def test_a_version_is_loaded_for_vllm(
    on_torch: Proposer, on_vllm: VLLMProposer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Published for the SLM's weights, whatever runs them; its adapter stays in its folder."""
    registry = Registry(tmp_path)
    kinds = {}
    for reads in Reading:
        made = random_local_selector(on_torch, SelectorKind.PREFIX, reads, seed=1)
        kinds[reads] = registry.publish(made, manifest_of(on_torch.runtime, made)).version
    host = on_vllm.adapter_host
    digest = manifest_of(on_torch.runtime, made).tokenizer_digest
    loaded = registry.load(kinds[Reading.ADAPTED], host, digest)
    assert loaded.folder == tmp_path / loaded.version and loaded.adapter is None
    with pytest.raises(VersionError, match=r"set slm.runtime to torch"):
        registry.load(kinds[Reading.BASE], host, digest)
    with pytest.raises(VersionError, match=r"raise proposer.max_lora_rank"):
        registry.load(kinds[Reading.ADAPTED], replace(host, max_rank=0), digest)


def test_serve_builds_its_proposer_on_it(
    on_torch: Proposer,
    on_vllm: VLLMProposer,
    prompts: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`slm.runtime: vllm`: calibrated, and answering as the torch engine."""
    loaded: dict[str, Any] = {}

    def load(model: str, options: VLLMOptions, tokenizer: Tokenizer, **sizes: int) -> VLLMProposer:
        loaded.update(model=model, options=options, **sizes)
        return on_vllm

    monkeypatch.setattr(VLLMProposer, "load", load)
    overrides = {
        "slm.runtime": "vllm",
        "slm.quantization": "fp8",
        "proposer.max_num_seqs": 5,
        "proposer.max_lora_rank": 16,
        "calibration.count": 8,
        "calibration.max_new_tokens": 8,
        "data_dir": str(tmp_path),
    }
    config = load_config(None, overrides, environment={})
    request = new_request(Prompt(token_ids=prompts[0]), "greedy", max_new_tokens=12)

    async def answer() -> Answer:
        service = await proposer_service(config)
        try:
            return await service.answer(request)
        finally:
            service.close()

    options = DecodeOptions(max_new_tokens=12)
    [expected] = decoded(on_torch, None, prompts[:1], options)
    assert asyncio.run(answer()).token_ids == expected.output_ids
    assert loaded["options"].quantization == "fp8"
    assert (loaded["max_num_seqs"], loaded["max_lora_rank"]) == (5, 16)


def test_what_cannot_be_started_is_refused(on_vllm: VLLMProposer, tokenizer: Tokenizer) -> None:
    """Two GPUs for the SLM; a second engine in a process, whose end would end the first."""
    with pytest.raises(ConfigError, match="one GPU"):
        VLLMProposer.load("bundled", replace(OPTIONS, tensor_parallel=2), tokenizer)
    with pytest.raises(ConfigError, match="already"):
        VLLMProposer.load("bundled", OPTIONS, tokenizer)


def test_s2t_generate_runs_it(on_torch: Proposer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The command, in a process of its own, with vLLM's compiled kernels. It has no LLM: an LLM
    that is asked would take as long again to compile."""
    texts = [problem.prompt for problem in bundled_problems.problems("test", 4)]
    lines = [json.dumps({"id": i, "prompt": text}) for i, text in enumerate(texts)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "services.main", "generate", "--slm-runtime", "vllm"),
        *("--slm", "bundled", "--mode", "greedy", "--max-new-tokens", "24"),
        *("--input", str(source), "--output", str(out)),
    ]
    subprocess.run(command, check=True, timeout=500)
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    settings = {"mode": "greedy", "max_new_tokens": 24}
    expected = Pair.of(on_torch.runtime, tokenizer).generate(texts, **settings)
    assert [tuple(answer["token_ids"]) for answer in answers] == [a.token_ids for a in expected]
