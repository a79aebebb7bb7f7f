"""Golden Step traces: every mode, trigger, local selector kind and reading.

A change of the engine that changes no token proves itself against them (`tests/test_golden.py`). To
record them anew, after a change that is meant to change tokens: `python -m
tests.decode.golden.traces`. With a folder they are written there: before and after a change, on one
machine, two folders must be equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
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
    Proposals,
    Sampling,
    Step,
    Trigger,
)

FOLDER = Path(__file__).parent
NEW_TOKENS = 24
THRESHOLDS = {
    Trigger.ENTROPY: 0.5,
    Trigger.MARGIN: 0.3,
    Trigger.KL: 0.3,
    Trigger.KL_REVERSE: 0.3,
    Trigger.RANDOM: 0.7,
    Trigger.ALWAYS: 0.0,
    Trigger.NEVER: 0.0,
}
RANDOM_PROMPTS = ((6, 7, 8, 45), (20, 3, 31, 30, 12, 11, 40, 41, 22), tuple(range(5, 30)))
BIN_COUNT = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to decode a prompt."""

    name: str
    policy: Policy
    version: str = ""
    score_rollout: bool = False
    sampling: Sampling = Sampling()


def cases() -> Iterator[Case]:
    yield Case(name="greedy", policy=Policy(mode=Mode.GREEDY))
    yield Case(name="greedy, scored", policy=Policy(mode=Mode.GREEDY), score_rollout=True)
    yield Case(
        name="sample", policy=Policy(mode=Mode.SAMPLE), sampling=Sampling(temperature=0.9, seed=3)
    )
    cut = Sampling(temperature=1.1, top_p=0.9, top_k=20, seed=4)
    yield Case(name="sample, top_p, top_k", policy=Policy(mode=Mode.SAMPLE), sampling=cut)
    yield Case(name="llm", policy=Policy(mode=Mode.LLM))
    for trigger in Trigger:
        yield Case(name=f"s2t {trigger.value}", policy=_policy(Mode.S2T, trigger))
        yield Case(name=f"takeover {trigger.value}", policy=_policy(Mode.TAKEOVER, trigger))
    adaptive = _policy(Mode.S2T, Trigger.ENTROPY, CandidateRule(16, 0.1))
    yield Case(name="s2t entropy, adaptive K", policy=adaptive)
    yield Case(
        name="s2t entropy, scored", policy=_policy(Mode.S2T, Trigger.ENTROPY), score_rollout=True
    )
    yield Case(name="s2t_local untrained", policy=_policy(Mode.S2T_LOCAL, Trigger.ENTROPY))
    for trigger in (Trigger.ENTROPY, Trigger.KL, Trigger.ALWAYS):
        for kind in SelectorKind:
            for reads in Reading:
                name = f"{kind.value}-{reads.value}"
                yield Case(
                    name=f"s2t_local {trigger.value} {name}",
                    policy=_policy(Mode.S2T_LOCAL, trigger),
                    version=name,
                )
    adapted = _policy(Mode.S2T_LOCAL, Trigger.ENTROPY, proposals=Proposals.ADAPTED)
    yield Case(
        name="s2t_local entropy joint-adapted, proposals adapted",
        policy=adapted,
        version="joint-adapted",
    )


DEFAULT_RULE = CandidateRule()


def _policy(
    mode: Mode,
    trigger: Trigger,
    candidates: CandidateRule = DEFAULT_RULE,
    proposals: Proposals = Proposals.BASE,
) -> Policy:
    return Policy(
        mode=mode,
        trigger=trigger,
        threshold=THRESHOLDS[trigger],
        candidates=candidates,
        proposals=proposals,
    )


def random_local_selector(
    proposer: Proposer, kind: SelectorKind, reads: Reading, seed: int
) -> LocalSelector:
    """A local selector that disagrees with the SLM. Its weights depend on `seed` only."""
    adapter = new_adapter(proposer.runtime.model, 3, 6.0, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {
        path: (a.detach(), torch.randn(b.shape, generator=generator) * 0.15)
        for path, (a, b) in adapter.weights.items()
    }
    hidden = proposer.runtime.config.hidden_size
    deltas = torch.randn(BIN_COUNT, hidden, generator=generator) * 0.3
    return LocalSelector(
        version=f"{kind.value}-{reads.value}",
        kind=kind,
        reads=reads,
        reserved_ids=proposer.reserved_ids,
        adapter=Adapter(rank=3, alpha=6.0, weights=weights),
        bin_deltas=deltas,
        temperature=0.2,
    )


def decode(
    slm: Path, llm: Path, prompts: Sequence[Sequence[int]]
) -> dict[str, list[list[dict[str, Any]]]]:
    """Case name -> per prompt the trace of every Step, each decoded alone."""
    runtime = ModelRuntime.load(str(slm))
    proposer = Proposer(runtime, reserved_ids(Tokenizer.load(slm), runtime.vocab_rows))
    scorer = LLMSelector(ModelRuntime.load(str(llm)), "tokenizer")
    local_selectors: dict[str, LocalSelector] = {}
    for kind in SelectorKind:
        for reads in Reading:
            made = random_local_selector(proposer, kind, reads, seed=len(local_selectors))
            local_selectors[made.version] = made
    engine = Engine(
        proposer, InProcessSelector(scorer), lambda version: local_selectors.get(version or "")
    )
    traces: dict[str, list[list[dict[str, Any]]]] = {}
    for case in cases():
        traces[case.name] = []
        for i, prompt in enumerate(prompts):
            request = DecodeRequest(
                request_id=f"{case.name}/{i}",
                token_ids=tuple(prompt),
                options=DecodeOptions(
                    policy=case.policy,
                    sampling=case.sampling,
                    max_new_tokens=NEW_TOKENS,
                    score_rollout=case.score_rollout,
                    version=case.version,
                ),
            )
            steps = run_alone(engine, request)
            runtime.pool.clear()
            traces[case.name].append([trace(step) for step in steps])
    return traces


def run_alone(engine: Engine, request: DecodeRequest) -> list[Step]:
    """Alone, because rounding depends on what else is in a forward (the laws say that nothing more
    does)."""
    sequence = engine.add(request)
    while not engine.idle:
        engine.step()
        engine.wait()
    return sequence.steps


def trace(step: Step) -> dict[str, Any]:
    """What must not change about a Step; fields that say nothing are left out."""
    found = {
        "token": step.token_id,
        "by": step.chosen_by.value,
        "signal": step.signal,
        "candidates": list(step.candidate_ids) if step.triggered else None,
        "scores": list(step.scores) if step.triggered else None,
        "slm_top": step.slm_top_id if step.support else None,
        "llm_top": step.llm_top_id,
        "llm": list(step.llm.log_probs[:4]) if step.llm else None,
        "degraded": step.degraded or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def bundled_pair() -> dict[str, Any]:
    tokenizer = Tokenizer.load(SLM_DIR)
    problems = list(bundled_problems.problems("test", 3))
    prompts = [tokenizer.hf.encode(problem.prompt) for problem in problems]
    return decode(SLM_DIR, LLM_DIR, prompts)


def random_pair(root: Path) -> dict[str, Any]:
    from tests.helpers.models import SPECS, build_model

    slm = build_model(root / "slm", SPECS["slm"])
    llm = build_model(root / "llm", SPECS["llm"])
    return decode(slm, llm, RANDOM_PROMPTS)


def rounded(value: Any) -> Any:
    """Floats to 9 significant digits: more than fp32 holds, less than a file of noise."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


def write(folder: Path, name: str, traces: dict[str, Any]) -> None:
    lines = (f"{json.dumps(case)}: {json.dumps(rounded(found))}" for case, found in traces.items())
    (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    target.mkdir(parents=True, exist_ok=True)
    write(target, "bundled_pair", bundled_pair())
    with tempfile.TemporaryDirectory() as pair:
        write(target, "random_pair", random_pair(Path(pair)))
    print("recorded", *target.glob("*.json"), file=sys.stderr)
