"""The laws that the engine must keep (`s2t_shared/README.md`), on tiny random models against plain
transformers.

Law 1 links the engine to Hugging Face's greedy; law 2 links every fast path to a naive one, and any
batch to each sequence alone; laws 4 to 6 say what adapters, a dead LLM and a changed version may
not do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from s2t_shared import policy as decide
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import (
    SamplingInput,
)
from s2t_shared.decode.llm_selector import InProcessSelector
from s2t_shared.decode.proposer import Proposer, SequenceSlots
from s2t_shared.decode.reductions import draw
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import InvalidRequestError, VersionNotFoundError
from s2t_shared.model.kv_pool import BatchLayout
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.types import (
    CandidateRule,
    ChosenBy,
    DecodeRequest,
    FinishReason,
    Mode,
    Policy,
    Proposals,
    Sampling,
    Step,
    Support,
    Trigger,
)
from tests.helpers.engine import (
    ALL,
    FAILURES,
    GREEDY,
    KINDS,
    PROMPTS,
    FailingSelector,
    Models,
    all_local_selectors,
    assert_same,
    failing_engine,
    finish,
    greedy_from,
    hf_greedy,
    lookup_in,
    make_llm,
    make_local_selector,
    make_proposer,
    propose,
    request,
    run,
    select,
    with_options,
)
from tests.helpers.forwards import with_layout
from tests.helpers.models import EOS, MAX_LENGTH

# -- law 1: the ends of the dial ------------------------------------------------------------------

PAIRS = [
    ("slm", "llm"),
    ("slm", "wide_llm"),
    ("qwen2", "qwen2_tied"),
    ("qwen2_tied", "qwen2"),
    ("padding", "padding_llm"),
    ("virtual", "virtual_llm"),
    ("gemma2", "llm"),
    ("slm", "gemma2"),
    ("mistral", "llm"),
]


@pytest.mark.parametrize(
    "slm", ["slm", "qwen2", "qwen2_tied", "padding", "virtual", "gemma2", "mistral"]
)
def test_never_asking_is_the_slms_greedy(models: Models, slm: str) -> None:
    """Never-trigger, always with K = 1 (LLM and local) and greedy are one decode: Hugging Face's, R
    suppressed."""
    proposer = make_proposer(models, slm)
    local = make_local_selector(proposer, "v", SelectorKind.JOINT, Reading.BASE)
    llm = "virtual_llm" if slm == "virtual" else "padding_llm" if slm == "padding" else "llm"
    engine = Engine(proposer, InProcessSelector(make_llm(models, llm)), lookup_in([local], "v"))
    one = CandidateRule(1)
    policies = [
        GREEDY,
        Policy(mode=Mode.S2T, trigger=Trigger.NEVER),
        Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.NEVER),
        Policy(mode=Mode.TAKEOVER, trigger=Trigger.NEVER),
        Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=1e9),
        Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=1e9),
        Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS, candidates=one),
        Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=one),
    ]
    for prompt in (PROMPTS[0], PROMPTS[2]):
        expected = hf_greedy(models[slm], prompt, 20, proposer.excluded_ids)
        assert len(set(expected)) > 5, (
            "a constant answer proves little: choose another seed for this model"
        )
        sequences = run(engine, *[request(policy, prompt, 20) for policy in policies])
        for policy, sequence in zip(policies, sequences, strict=True):
            assert sequence.output_ids == expected, (policy.mode, policy.trigger)


@pytest.mark.parametrize("slm, llm", PAIRS)
def test_always_asking_with_all_candidates_is_the_llms_greedy(
    models: Models, slm: str, llm: str
) -> None:
    """K = |V minus R| makes the LLM's choice free: s2t, takeover and llm are Hugging Face's greedy
    of the LLM with R and every row the SLM lacks suppressed."""
    proposer, scorer = make_proposer(models, slm), make_llm(models, llm)
    assert proposer.runtime.vocab_rows - len(proposer.excluded_ids) <= 64
    suppressed = [
        *proposer.excluded_ids,
        *range(proposer.runtime.vocab_rows, scorer.runtime.vocab_rows),
    ]
    engine = Engine(proposer, InProcessSelector(scorer))
    for prompt in (PROMPTS[0], PROMPTS[2]):
        expected = hf_greedy(models[llm], prompt, 20, suppressed)
        policies = (ALL, Policy(mode=Mode.LLM), replace(ALL, mode=Mode.TAKEOVER))
        sequences = run(engine, *[request(policy, prompt, 20) for policy in policies])
        for policy, sequence in zip(policies, sequences, strict=True):
            assert sequence.output_ids == expected, policy.mode
            assert {s.chosen_by for s in sequence.steps} == {ChosenBy.LLM}
        assert expected != hf_greedy(models[slm], prompt, 20, proposer.excluded_ids)


def test_reserved_ids_are_what_makes_the_difference(models: Models) -> None:
    """Guards the two tests above: unmasked, these models do emit reserved ids (else suppressing is
    untested)."""
    proposer = make_proposer(models)
    answers = [hf_greedy(models["slm"], prompt, 20, ()) for prompt in PROMPTS]
    assert any(i in proposer.excluded_ids for answer in answers for i in answer)
    assert any(i >= 64 for prompt in PROMPTS for i in hf_greedy(models["wide_llm"], prompt, 20, ()))


def test_an_answer_ends_at_eos_and_at_the_models_length(models: Models) -> None:
    """A missed eos runs on for ever; a position past the model's length is garbage on a real
    model."""
    engine = Engine(make_proposer(models))
    stopped = next(
        s
        for n in range(5, 45)
        for s in run(engine, request(GREEDY, (n, 45), 80))
        if s.finish_reason is FinishReason.STOP
    )
    assert stopped.output_ids[-1] == EOS and EOS not in stopped.output_ids[:-1]
    (full,) = run(engine, request(Policy(mode=Mode.SAMPLE), [5] * (MAX_LENGTH - 3), 80, seed=3))
    assert len(full.token_ids) <= MAX_LENGTH
    assert full.finish_reason is FinishReason.LENGTH and len(full.steps) == 3
    with pytest.raises(InvalidRequestError, match=str(MAX_LENGTH)):
        engine.add(request(GREEDY, [5] * MAX_LENGTH))


@pytest.mark.parametrize(
    "bad",
    [
        request(GREEDY, ()),
        request(GREEDY, (64,)),
        request(GREEDY, new=0),
        request(ALL),
        request(Policy(mode=Mode.LLM)),
        request(Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.KL)),
        request(replace(GREEDY, threshold=float("nan"))),
        with_options(request(GREEDY), score_rollout=True),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_allocated(
    models: Models, bad: DecodeRequest
) -> None:
    """An impossible request inside the loop would raise for the whole batch."""
    engine = Engine(make_proposer(models))
    with pytest.raises(InvalidRequestError):
        engine.add(bad)
    assert engine.idle


# -- law 2: the local selector's fast path == one plain forward per candidate ---------------------


class NaiveSelector:
    """Scores as the docstring of `local_selector` defines them: LoRA merged into copies of the
    weights, one forward per candidate, no pool, no mask of our own."""

    def __init__(self, folder: Path, selector: LocalSelector) -> None:
        def load() -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

        self.selector, self.base, self.merged = selector, load(), load()
        assert selector.adapter is not None
        for path, (a, b) in selector.adapter.weights.items():
            self.merged.get_submodule(path).weight.data += (b @ a) * (
                selector.adapter.alpha / selector.adapter.rank
            )

    def _read(
        self, context: Sequence[int], looked_at: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and last hidden states of the last tokens, `looked_at`, after `context`."""
        if self.selector.reads is Reading.ADAPTED or not context:
            out = self.merged(
                torch.tensor([[*context, *looked_at]]), output_hidden_states=True, use_cache=False
            )
        else:
            past = self.base(torch.tensor([context]), use_cache=True).past_key_values
            out = self.merged(
                torch.tensor([looked_at]), past_key_values=past, output_hidden_states=True
            )
        n = len(looked_at)
        return out.logits[0, -n:], out.hidden_states[-1][0, -n:]

    def _reserved(self, hidden: torch.Tensor) -> float:
        head = self.base.get_output_embeddings().weight
        rows = torch.stack(
            [
                head[i] if i < len(head) else torch.zeros(head.shape[1])
                for i in self.selector.reserved_ids
            ]
        )
        assert self.selector.bin_deltas is not None
        z = (rows + self.selector.bin_deltas) @ hidden
        if cap := getattr(self.base.config, "final_logit_softcapping", None):
            z = cap * torch.tanh(z / cap)
        return float((z.softmax(0) * torch.arange(16) / 15).sum())

    @torch.no_grad()
    def score(
        self, context: Sequence[int], candidates: Sequence[int], base_log_probs: Sequence[float]
    ) -> list[float]:
        kind, scores = self.selector.kind, np.zeros(len(candidates))
        if kind is SelectorKind.RESERVED:
            scores += [self._reserved(self._read(context, [c])[1][-1]) for c in candidates]
        else:
            logits, _ = self._read(context[:-1], context[-1:])
            scores += np.array(logits[-1, list(candidates)].log_softmax(0).tolist())
        if (
            kind is SelectorKind.JOINT
        ):  # the siblings see the last context token as the adapter re-read it
            scores += (
                np.array(
                    [
                        self._reserved(self._read(context[:-1], [context[-1], c])[1][-1])
                        for c in candidates
                    ]
                )
                / self.selector.temperature
            )
        return list(scores + self.selector.fusion * np.array(base_log_probs))


@pytest.mark.parametrize("kind, reads", KINDS)
@pytest.mark.parametrize(
    "slm, fusion",
    [("slm", 0.0), ("slm", 0.3), ("qwen2_tied", 0.0), ("virtual", 0.0), ("gemma2", 0.0)],
)
def test_siblings_in_one_forward_equal_one_forward_per_candidate(
    models: Models, slm: str, kind: SelectorKind, reads: Reading, fusion: float
) -> None:
    """Four ragged contexts with ragged candidate groups, at two lengths each, so that the adapted
    cache catches up from where it was: scores must be the naive ones, not merely similar in
    order."""
    proposer = make_proposer(models, slm)
    selector = make_local_selector(proposer, "v", kind, reads, seed=5, fusion=fusion)
    naive = NaiveSelector(models[slm], selector)
    contexts = [list(p) for p in PROMPTS[:4]]
    tracks = [
        proposer.open(selector, Policy(mode=Mode.S2T_LOCAL), context, 80) for context in contexts
    ]
    assert all(isinstance(t, SequenceSlots) for t in tracks)
    counts = [8, 3, 1, 5]
    for tokens in ([], [33, 12, 19]):
        for context in contexts:
            context.extend(tokens)
        supports = propose(proposer, tracks, contexts)  # type: ignore[arg-type]
        got = select(proposer, tracks, contexts, supports, counts)  # type: ignore[arg-type]
        for context, support, count, scores in zip(contexts, supports, counts, got, strict=True):
            expected = naive.score(context, support.ids[:count], support.log_probs[:count])
            assert scores == pytest.approx(expected, abs=5e-5)


def test_the_scores_depend_on_everything_they_should(models: Models) -> None:
    """Guards the test above: kinds and readings that gave equal scores could be swapped without
    anyone noticing."""
    proposer = make_proposer(models)
    scores = {}
    for selector in [
        *all_local_selectors(proposer),
        LocalSelector.untrained(proposer.reserved_ids),
    ]:
        if selector.adapter is not None:
            selector.adapter = make_local_selector(
                proposer, "", SelectorKind.JOINT, Reading.BASE
            ).adapter
        track = proposer.open(selector, Policy(mode=Mode.S2T_LOCAL), PROMPTS[4], 80)
        assert track is not None
        (support,) = propose(proposer, [track], [PROMPTS[4]])
        (scores[selector.version],) = select(proposer, [track], [PROMPTS[4]], [support], [6])
    values = list(scores.values())
    assert all(
        max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-3
        for i, a in enumerate(values)
        for b in values[:i]
    )


def test_adapted_proposals_are_the_merged_models(models: Models) -> None:
    """`proposals: adapted` leaves the adapter on everywhere: the decode is the merged model's
    greedy."""
    proposer = make_proposer(models)
    selector = make_local_selector(proposer, "v", SelectorKind.RESERVED, Reading.ADAPTED)
    naive = NaiveSelector(models["slm"], selector)
    policy = Policy(
        mode=Mode.S2T_LOCAL,
        trigger=Trigger.ALWAYS,
        candidates=CandidateRule(5),
        proposals=Proposals.ADAPTED,
    )
    engine = Engine(proposer, local_selectors=lookup_in([selector], "v"))
    plain, selected = run(engine, request(replace(policy, trigger=Trigger.NEVER)), request(policy))
    ids = torch.tensor([PROMPTS[0]])
    expected = naive.merged.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        suppress_tokens=list(proposer.excluded_ids),
    )[0, ids.shape[1] :]
    assert plain.output_ids == tuple(expected.tolist()) != greedy_from(models, PROMPTS[0], 16)
    for i, step in enumerate(selected.steps):
        context = selected.token_ids[: ids.shape[1] + i]
        assert step.support is not None
        assert step.scores == pytest.approx(
            naive.score(context, step.candidate_ids, step.support.log_probs[:5]), abs=5e-5
        )


def test_an_always_on_version_decides_how_it_serves(models: Models) -> None:
    """`s2t_local` with it is the adapted model's greedy decode, whatever trigger is asked for;
    other modes do not know it."""
    proposer = make_proposer(models)
    gated = make_local_selector(proposer, "v", SelectorKind.PREFIX, Reading.ADAPTED)
    adapted = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.NEVER, proposals=Proposals.ADAPTED)
    (expected,) = run(Engine(proposer, local_selectors=lookup_in([gated], "v")), request(adapted))
    always_on = replace(gated, always_on=True)
    engine = Engine(proposer, local_selectors=lookup_in([always_on], "v"))
    local = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY, threshold=0.0)
    served, greedy = run(engine, request(local), request(Policy()))
    assert served.output_ids == expected.output_ids != greedy.output_ids
    assert not any(step.triggered for step in served.steps)
    assert greedy.output_ids == greedy_from(models, PROMPTS[0], 16)


# -- law 2: what an engine's Steps say is what plain forwards say ---------------------------------


def test_steps_tell_what_the_models_say(models: Models) -> None:
    """Signal, candidates, scores and choice of every step, recomputed from uncached forwards of
    both models."""
    slm, llm = (
        AutoModelForCausalLM.from_pretrained(models[n], dtype=torch.float32).eval()
        for n in ("slm", "llm")
    )
    engine = Engine(make_proposer(models), InProcessSelector(make_llm(models)))
    rule = CandidateRule(6, 0.1)
    fired = 0
    for trigger, threshold in (
        (Trigger.ENTROPY, 2.2),
        (Trigger.MARGIN, 0.9),
        (Trigger.KL, 2.5),
        (Trigger.KL_REVERSE, 2.5),
        (Trigger.RANDOM, 0.5),
    ):
        (sequence,) = run(
            engine,
            request(
                Policy(mode=Mode.S2T, trigger=trigger, threshold=threshold, candidates=rule),
                PROMPTS[2],
                20,
                seed=3,
            ),
        )
        with torch.no_grad():
            ids = torch.tensor([sequence.token_ids])
            p, q = (m(ids).logits[0, :, :48].double().log_softmax(-1).numpy() for m in (slm, llm))
        for step in sequence.steps:
            at = len(PROMPTS[2]) - 1 + step.index
            order = np.argsort(-p[at], kind="stable")
            if step.index < 3:
                assert step.signal is None and not step.triggered and step.token_id == order[0]
                continue
            ps, pl = np.exp(p[at][order]), np.exp(q[at][order])
            signal = {
                Trigger.ENTROPY: -(ps * np.log(ps)).sum(),
                Trigger.MARGIN: 1 - ps[0] + ps[1],
                Trigger.KL: (ps * np.log(ps / pl)).sum(),
                Trigger.KL_REVERSE: (pl * np.log(pl / ps)).sum(),
                Trigger.RANDOM: decide.random_signal(3, step.index),
            }[trigger]
            assert step.signal == pytest.approx(signal, abs=1e-4)
            assert step.triggered == (signal > threshold)
            if not step.triggered:
                assert (
                    step.token_id == order[0]
                    and step.chosen_by is ChosenBy.SLM
                    and not step.candidate_ids
                )
                continue
            fired += 1
            candidates = [i for i in order[:6] if p[at][i] >= p[at][order[0]] + np.log(0.1)]
            assert list(step.candidate_ids) == candidates
            assert step.scores == pytest.approx([q[at][i] for i in candidates], abs=1e-4)
            assert (
                step.token_id == max(candidates, key=lambda i: q[at][i])
                and step.chosen_by is ChosenBy.LLM
            )
            assert step.llm_top_id == int(q[at].argmax()) and step.flipped == (
                step.token_id != order[0]
            )
        usage = sequence.usage
        assert (
            usage.triggers == sum(s.triggered for s in sequence.steps) and usage.degraded_steps == 0
        )
        if trigger.needs_llm:  # a draft is checked in one forward
            assert usage.llm_forwards <= len(sequence.steps) - 3
        else:
            assert usage.llm_forwards == usage.triggers
    assert 10 < fired < 80


def test_a_scored_rollout_is_the_llms_view_of_every_step(models: Models) -> None:
    """The plain harvest: one prefill's scores must be those of asking at every step, and change no
    token."""
    client = InProcessSelector(make_llm(models))
    engine = Engine(make_proposer(models), client, max_draft_tokens=1)
    rollout = with_options(request(GREEDY, PROMPTS[2], 12), score_rollout=True)
    asked = request(
        Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=1e9, warmup_steps=0), PROMPTS[2], 12
    )
    harvested, lockstep = run(engine, rollout, asked)
    assert harvested.output_ids == lockstep.output_ids == greedy_from(models, PROMPTS[2], 12)
    assert harvested.usage.llm_forwards == 1 and lockstep.usage.llm_forwards == len(lockstep.steps)
    for a, b in zip(harvested.steps, lockstep.steps, strict=True):
        assert a.support is not None and a.llm is not None
        assert decide.kl(a.support.log_probs, a.llm.log_probs) == pytest.approx(b.signal, abs=1e-4)


# -- law 2: batch n == batch 1 --------------------------------------------------------------------


def mixed_requests() -> list[DecodeRequest]:
    """Every mode, trigger, kind and reading, over ragged prompts."""
    k4 = CandidateRule(4)
    policies: list[tuple[Policy, str]] = [
        (GREEDY, ""),
        (Policy(mode=Mode.SAMPLE), ""),
        (Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=2.0, candidates=k4), ""),
        (
            Policy(
                mode=Mode.S2T, trigger=Trigger.KL, threshold=2.0, candidates=CandidateRule(8, 0.1)
            ),
            "",
        ),
        (Policy(mode=Mode.TAKEOVER, trigger=Trigger.MARGIN, threshold=0.8), ""),
        (Policy(mode=Mode.LLM), ""),
        (Policy(mode=Mode.S2T, trigger=Trigger.RANDOM, threshold=0.5, candidates=k4), ""),
        (
            Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=k4),
            "",
        ),  # the untrained selector
        (
            Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.KL_REVERSE, threshold=1.5, candidates=k4),
            "joint-base",
        ),
        (
            Policy(
                mode=Mode.S2T_LOCAL,
                trigger=Trigger.ALWAYS,
                candidates=k4,
                proposals=Proposals.ADAPTED,
            ),
            "reserved-adapted",
        ),
        *(
            (
                Policy(
                    mode=Mode.S2T_LOCAL,
                    trigger=Trigger.ENTROPY,
                    threshold=1.8,
                    candidates=CandidateRule(8, 0.05),
                ),
                f"{k.value}-{r.value}",
            )
            for k, r in KINDS
        ),
    ]
    requests = [
        request(p, PROMPTS[i % len(PROMPTS)], 9 + i % 5, f"mixed-{i}", version, seed=i)
        for i, (p, version) in enumerate(policies)
    ]
    rollout = with_options(
        request(Policy(mode=Mode.SAMPLE), PROMPTS[1], 8, "rollout", "", seed=5), score_rollout=True
    )
    return [*requests, rollout]


@pytest.fixture(scope="module")
def alone(models: Models) -> list[LiveSequence]:
    """Each mixed request alone on an engine that never saw another."""
    results = []
    for item in mixed_requests():
        proposer = make_proposer(models)
        engine = Engine(
            proposer, InProcessSelector(make_llm(models)), lookup_in(all_local_selectors(proposer))
        )
        results += run(engine, item)
    return results


def mixed_engine(models: Models, max_num_seqs: int = 32) -> Engine:
    proposer = make_proposer(models)
    return Engine(
        proposer,
        InProcessSelector(make_llm(models, max_rows=12)),
        lookup_in(all_local_selectors(proposer)),
        max_num_seqs=max_num_seqs,
    )


@pytest.mark.parametrize("max_num_seqs", [32, 5])
def test_a_mixed_batch_is_each_sequence_alone(
    models: Models, alone: list[LiveSequence], max_num_seqs: int
) -> None:
    """Batching is speed, never meaning: the same tokens, choosers, signals and scores for every
    mode at once."""
    together = run(mixed_engine(models, max_num_seqs), *mixed_requests())
    for a, b in zip(alone, together, strict=True):
        assert a.output_ids == b.output_ids, a.request.request_id
        assert_same(a.steps, b.steps, a.request.request_id)
        assert (a.finish_reason, a.usage, a.version) == (b.finish_reason, b.usage, b.version)


def test_a_mixed_batch_over_a_gpus_layout(models: Models, alone: list[LiveSequence]) -> None:
    """All sequences in slabs of a whole batch, with free slots between them, and recorded steps:
    the same answers."""
    engine = mixed_engine(models)
    layout = BatchLayout.for_device(torch.device("cuda"), max_num_seqs=32)
    runtime = with_layout(engine.proposer.runtime, layout)
    runtime.use_decode_graphs()
    together = run(engine, *mixed_requests())
    for a, b in zip(alone, together, strict=True):
        assert a.output_ids == b.output_ids, a.request.request_id
        assert_same(a.steps, b.steps, a.request.request_id)


def test_the_mixed_batch_is_worth_comparing(alone: list[LiveSequence]) -> None:
    """Guards the tests around: choices of every kind happen, and flips too."""
    steps = [step for sequence in alone for step in sequence.steps]
    assert {s.chosen_by for s in steps} == set(ChosenBy)
    for sequence in alone[7:16]:
        assert sequence.usage.triggers >= 2, sequence.request.request_id
    assert sum(s.flipped for s in steps) > 20 and not any(s.degraded for s in steps)


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_arrivals_and_cancellations_change_no_one_else(
    models: Models, alone: list[LiveSequence], data: st.DataObject
) -> None:
    """Sequences join and leave at any step, rows are reused at once: every survivor equals itself
    alone, every cancelled one is a beginning of itself alone, and no row is lost."""
    requests = mixed_requests()
    count = len(requests)
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    leaves = data.draw(st.lists(st.none() | st.integers(0, 10), min_size=count, max_size=count))
    engine = mixed_engine(models, data.draw(st.sampled_from([3, 8, 32])))
    live: dict[int, LiveSequence] = {}
    for tick in range(25):
        for i in range(count):
            if arrivals[i] == tick:
                live[i] = engine.add(requests[i])
            leave = leaves[i]
            if leave is not None and tick == arrivals[i] + leave and live[i].finish_reason is None:
                engine.cancel(live[i])
        engine.step()
    finish(engine)
    for i, sequence in live.items():
        expected = alone[i]
        if sequence.finish_reason is FinishReason.CANCELLED:
            assert sequence.output_ids == expected.output_ids[: len(sequence.steps)]
        else:
            assert sequence.output_ids == expected.output_ids, requests[i].request_id
            assert_same(sequence.steps, expected.steps, requests[i].request_id)


def test_sampling_is_repeatable_and_its_own(models: Models) -> None:
    """The same seed gives the same tokens in any batch; other seeds give others, and cuts are
    respected."""
    engine = Engine(make_proposer(models))
    sampled = Policy(mode=Mode.SAMPLE)
    requests = [
        with_options(request(sampled, PROMPTS[0], 12), sampling=Sampling(1.0, seed=seed))
        for seed in (1, 2, 3, 1)
    ]
    together = [s.output_ids for s in run(engine, *requests)]
    (again,) = run(engine, requests[2])
    assert (
        again.output_ids == together[2] and together[0] == together[3] and len(set(together)) == 3
    )
    greedy = greedy_from(models, PROMPTS[0], 12)
    for cut in (Sampling(0.0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-3)):
        (sequence,) = run(engine, with_options(requests[0], sampling=cut))
        assert sequence.output_ids == greedy, cut


def test_every_step_and_seed_draws_anew() -> None:
    """One random number for all steps keeps a sequence in one quantile: all its tokens likely ones,
    or all odd ones."""
    flat = torch.zeros(60, 48)
    steps = [SamplingInput(Sampling(1.0, seed=1), step) for step in range(60)]
    seeds = [SamplingInput(Sampling(1.0, seed=seed), 1) for seed in range(60)]
    for inputs in (steps, seeds):
        assert len(set(draw(flat, inputs).tolist())) > 25


def test_sampling_follows_the_distribution(models: Models) -> None:
    """A wrong temperature or cut shows in frequencies: first tokens of 600 seeds against the
    softmax they come from."""
    proposer = make_proposer(models)
    engine = Engine(proposer, max_num_seqs=64)
    sampling = Sampling(1.3, 0.8, 6)
    runs = run(
        engine,
        *(
            with_options(
                request(Policy(mode=Mode.SAMPLE), PROMPTS[0], 1),
                sampling=replace(sampling, seed=seed),
            )
            for seed in range(600)
        ),
    )
    drawn = np.bincount([s.output_ids[0] for s in runs], minlength=64) / 600
    model = AutoModelForCausalLM.from_pretrained(models["slm"], dtype=torch.float32)
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1, :48] / 1.3).softmax(0).numpy()
    order = np.argsort(-p)[:6]
    kept = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), 0.8))]
    expected = np.zeros(64)
    expected[kept] = p[kept] / p[kept].sum()
    assert len(kept) > 1 and set(np.flatnonzero(drawn)) <= set(kept)
    assert np.abs(drawn - expected).max() < 0.08


def test_an_expired_sequence_ends_without_touching_others(models: Models) -> None:
    """A deadline that passed ends that answer (running or still waiting) within one step."""
    engine = Engine(make_proposer(models), max_num_seqs=2)
    dead = replace(request(GREEDY, PROMPTS[0]), deadline=0.0)
    first, other, third = run(engine, dead, request(GREEDY, PROMPTS[1], 10), dead)
    assert first.finish_reason is third.finish_reason is FinishReason.DEADLINE and not first.steps
    assert other.output_ids == greedy_from(models, PROMPTS[1], 10)


def test_a_small_pool_does_not_break_the_batch(models: Models) -> None:
    """`reads: adapted` wants a second row per sequence: when the pool has none, nobody else may be
    hurt by it."""
    proposer = make_proposer(models, max_rows=4)
    selector = make_local_selector(proposer, "v", SelectorKind.RESERVED, Reading.ADAPTED)
    engine = Engine(proposer, local_selectors=lookup_in([selector], "v"))
    policy = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=CandidateRule(4))
    expected = [run(engine, request(policy, prompt, 6))[0].output_ids for prompt in PROMPTS]
    assert [
        s.output_ids for s in run(engine, *(request(policy, prompt, 6) for prompt in PROMPTS))
    ] == expected


def test_one_wrong_query_does_not_degrade_the_batch(models: Models) -> None:
    """A prompt with an id that only the SLM has a row for (the LLM is narrower) is that client's
    problem alone."""
    engine = Engine(
        make_proposer(models, "padding"), InProcessSelector(make_llm(models, "virtual_llm"))
    )
    good, bad = request(ALL, PROMPTS[0], 6), request(ALL, (6, 50, 7), 6)
    (expected,) = run(engine, good)
    (wrong,) = run(engine, bad)
    assert all(s.degraded for s in wrong.steps) and not any(s.degraded for s in expected.steps)
    both = run(engine, good, bad)
    assert both[0].output_ids == expected.output_ids and not any(s.degraded for s in both[0].steps)


# -- law 4: base proposals are the base model's, bit for bit --------------------------------------


class Recording(Proposer):
    """Keeps the first sequence's support at every step."""

    def run(self, inputs):  # type: ignore[no-untyped-def]
        results = super().run(inputs)
        for work, result in zip(inputs, results, strict=True):
            if list(work.token_ids[:3]) == [6, 7, 8]:
                self.seen: list[Support] = [*getattr(self, "seen", []), result.support]
        return results


def supports_beside(
    models: Models, second: Callable[[Proposer], tuple[Policy, LocalSelector | None]]
) -> list[Support]:
    """The first sequence's supports while another of the same length runs beside it."""
    base = make_proposer(models)
    proposer = Recording(base.runtime, base.reserved_ids)
    policy, selector = second(proposer)
    engine = Engine(
        proposer, local_selectors=lookup_in([selector] if selector else [], "v" if selector else "")
    )
    watched = with_options(request(GREEDY, (6, 7, 8), 8), keep_support=True)
    first, beside = run(engine, watched, request(policy, (9, 10, 11), 8))
    assert len(first.steps) == len(beside.steps) == 8, "choose prompts that do not meet eos"
    assert selector is None or policy.trigger is not Trigger.ALWAYS or beside.usage.flips
    return proposer.seen


@pytest.mark.parametrize("kind, reads", KINDS)
def test_base_proposals_do_not_feel_the_adapter(
    models: Models, kind: SelectorKind, reads: Reading
) -> None:
    """Law 4: no adapter in the process == one loaded, bit for bit, else published greedy numbers
    move when a version goes live. Another sequence that is scored with it beside changes the order
    and shape of the products, and nothing else: rounding, by how much depends on the machine's
    matrix kernels."""
    plain = supports_beside(models, lambda _: (GREEDY, None))
    loaded = supports_beside(models, lambda p: (GREEDY, make_local_selector(p, "v", kind, reads)))
    always = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=CandidateRule(4))
    scored = supports_beside(models, lambda p: (always, make_local_selector(p, "v", kind, reads)))
    assert plain == loaded
    assert [s.ids[0] for s in plain] == [s.ids[0] for s in scored]
    for a, b in zip(plain, scored, strict=True):
        assert dict(zip(a.ids, a.log_probs, strict=True)) == pytest.approx(
            dict(zip(b.ids, b.log_probs, strict=True)), abs=2e-5
        )


def test_a_scored_sequence_keeps_base_proposals_itself(models: Models) -> None:
    """Scoring at every step must leave no adapted KV behind: its own next supports are the base
    model's."""
    proposer = make_proposer(models)
    engine = Engine(proposer, local_selectors=lookup_in(all_local_selectors(proposer)))
    model = AutoModelForCausalLM.from_pretrained(models["slm"], dtype=torch.float32).eval()
    for kind, reads in KINDS:
        policy = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=CandidateRule(4))
        (sequence,) = run(
            engine, request(policy, PROMPTS[2], 10, version=f"{kind.value}-{reads.value}")
        )
        with torch.no_grad():
            log_probs = model(torch.tensor([sequence.token_ids])).logits[0, :, :48].log_softmax(-1)
        for step in sequence.steps:
            assert step.support is not None
            row = log_probs[len(PROMPTS[2]) - 1 + step.index]
            assert step.support.log_probs == pytest.approx(
                row[list(step.support.ids)].tolist(), abs=5e-5
            )


# -- law 5: a dead or late selector ---------------------------------------------------------------


ASKING = [
    ALL,
    Policy(mode=Mode.LLM),
    replace(ALL, mode=Mode.TAKEOVER),
    Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=0.0),
    Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.5),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("policy", ASKING, ids=lambda p: f"{p.mode.value}-{p.trigger.value}")
@pytest.mark.parametrize("healthy", [0, 4])
def test_a_dead_llm_means_greedy_from_there_on(
    models: Models, policy: Policy, failure: str, healthy: int
) -> None:
    """Law 5: no error, the SLM's tokens from the first failure on, every step that wanted the LLM
    marked, no other."""
    engine, _ = failing_engine(models, healthy, failure)
    (sequence,) = run(engine, request(policy, PROMPTS[0], 12))
    steps = sequence.steps
    asked = [s for s in steps if s.llm or s.degraded]
    assert [bool(s.degraded) for s in asked] == [i >= healthy for i in range(len(asked))]
    assert len(asked) > healthy + 2
    first = next(s.index for s in steps if s.degraded)
    prompt = [*PROMPTS[0], *(s.token_id for s in steps[:first])]
    assert sequence.output_ids[first:] == greedy_from(models, prompt, 12 - first)
    assert (
        sequence.usage.degraded_steps == len(asked) - healthy
        and sequence.usage.llm_forwards == healthy
    )
    for step in steps:
        wanted = policy.mode is Mode.LLM or policy.trigger is Trigger.ALWAYS or step.triggered
        if policy.trigger is Trigger.KL:  # the signal itself is the LLM's
            wanted = step.index >= 3
        assert (step in asked) == wanted
        assert not step.degraded or step.chosen_by is ChosenBy.SLM
    assert healthy == 0 or sequence.output_ids != greedy_from(models, PROMPTS[0], 12)


@pytest.mark.parametrize("policy", [ALL, Policy(mode=Mode.LLM)], ids=lambda p: p.mode.value)
def test_a_selector_that_comes_back_is_used_again(models: Models, policy: Policy) -> None:
    """Degrading is per step: when the LLM answers again the answer is selected again."""
    engine, client = failing_engine(models, 0, "unavailable")
    sequence = engine.add(request(policy, PROMPTS[2], 12))
    while len(sequence.steps) < 5:
        engine.step()
    client.healthy = 100
    finish(engine)
    degraded = [bool(s.degraded) for s in sequence.steps]
    assert degraded == sorted(degraded, reverse=True) and 5 <= sum(degraded) <= 6 < len(degraded)


def test_a_late_reply_changes_nothing(models: Models) -> None:
    """A reply that comes after its step was given up must not be taken for the answer to a later
    one."""
    engine, client = failing_engine(models, 0, "late")
    sequence = engine.add(request(ALL, PROMPTS[2], 8))
    while not engine.idle:
        before = len(sequence.steps)
        asked = len(client.unanswered)
        engine.step()
        engine.wait(0.02)
        if len(sequence.steps) > before:
            client.answer_late(asked)
    assert sequence.output_ids == greedy_from(models, PROMPTS[2], 8)
    assert all(s.degraded for s in sequence.steps)


def test_others_go_on_while_a_late_sequence_is_parked(models: Models) -> None:
    """One sequence's slow LLM must not stop the batch."""
    proposer = make_proposer(models)
    client = FailingSelector(InProcessSelector(make_llm(models)), 0, None)
    engine = Engine(proposer, client, selection_timeout_s=60.0)
    parked, free = (
        engine.add(request(ALL, PROMPTS[2], 4)),
        engine.add(request(GREEDY, PROMPTS[0], 10)),
    )
    for _ in range(12):
        engine.step()
    assert free.finish_reason is not None and free.output_ids == greedy_from(models, PROMPTS[0], 10)
    assert not parked.steps and len(client.unanswered) == 1, "asked once, and waited"
    engine.cancel(parked)
    finish(engine)
    assert parked.finish_reason is FinishReason.CANCELLED and client.unanswered[0][1].cancelled()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("reads", Reading)
def test_a_live_local_version_takes_over_from_a_dead_llm(
    models: Models, failure: str, reads: Reading
) -> None:
    """With a version live the triggered steps are the local selector's, not greedy's: tokens equal
    `s2t_local`."""
    policy = Policy(
        mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=1.5, candidates=CandidateRule(4)
    )

    def selectors(proposer: Proposer) -> list[LocalSelector]:
        return [make_local_selector(proposer, "v", SelectorKind.JOINT, reads)]

    engine, _ = failing_engine(models, 0, failure, selectors)
    (sequence,) = run(engine, request(policy, PROMPTS[2], 14))
    proposer = make_proposer(models)
    local = Engine(proposer, local_selectors=lookup_in(selectors(proposer), "v"))
    (expected,) = run(local, request(replace(policy, mode=Mode.S2T_LOCAL), PROMPTS[2], 14))
    assert sequence.output_ids == expected.output_ids != greedy_from(models, PROMPTS[2], 14)
    assert sequence.usage.triggers >= 3
    for a, b in zip(sequence.steps, expected.steps, strict=True):
        assert bool(a.degraded) == a.triggered == (a.chosen_by is ChosenBy.LOCAL)
        assert_same(replace(a, degraded=""), b)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rollout_that_cannot_be_scored_still_ends(models: Models, failure: str) -> None:
    """The answer is there already: only its labels are lost, and the Steps say so."""
    rollout = with_options(request(GREEDY, PROMPTS[2], 6), score_rollout=True)
    engine, _ = failing_engine(models, 0, failure)
    (sequence,) = run(engine, rollout)
    assert sequence.output_ids == greedy_from(models, PROMPTS[2], 6)
    assert (
        all(s.degraded and s.llm is None for s in sequence.steps)
        and sequence.usage.llm_forwards == 0
    )


def test_llm_mode_with_a_dead_llm_stops_where_greedy_stops(models: Models) -> None:
    """SLM and LLM of a family may have other eos ids (base and instruct): when the SLM's eos falls
    on a degraded step the answer is over, as greedy's is; running on makes text after the end."""
    prompt = next((n, 45) for n in range(5, 45) if EOS in greedy_from(models, (n, 45), 40))
    engine, client = failing_engine(models, 0, "unavailable")
    scorer = make_llm(models)
    scorer.info = replace(scorer.info, eos_ids=frozenset({1}))
    client.real = InProcessSelector(scorer)
    (sequence,) = run(engine, request(Policy(mode=Mode.LLM), prompt, 40))
    assert sequence.output_ids == greedy_from(models, prompt, 40)


# -- law 6: one version per answer ----------------------------------------------------------------


LOCAL = Policy(
    mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY, threshold=1.0, candidates=CandidateRule(6)
)


def swapping(
    first: LocalSelector, second: LocalSelector, ask_first: int = 1
) -> Callable[[str | None], LocalSelector]:
    """A live version that changes from `first` to `second` after so many sequences have started."""
    versions: Iterator[LocalSelector] = iter([first] * ask_first + [second] * 100)
    return lambda _: next(versions)


@pytest.mark.parametrize("kind, reads", KINDS)
def test_a_sequence_keeps_the_version_it_began_with(
    models: Models, kind: SelectorKind, reads: Reading
) -> None:
    """Two versions live in one batch: each answer is wholly its own version's, and says which."""

    def answer(seed: int) -> tuple[int, ...]:
        proposer = make_proposer(models)
        one = make_local_selector(proposer, "x", kind, reads, seed)
        (sequence,) = run(
            Engine(proposer, local_selectors=lookup_in([one], "x")), request(LOCAL, PROMPTS[2], 20)
        )
        return sequence.output_ids

    proposer = make_proposer(models)
    a, b = (
        make_local_selector(proposer, name, kind, reads, seed)
        for name, seed in (("a", 21), ("b", 22))
    )
    engine = Engine(proposer, local_selectors=swapping(a, b))
    old = engine.add(request(LOCAL, PROMPTS[2], 20))
    for _ in range(4):
        engine.step()
    new = engine.add(request(LOCAL, PROMPTS[2], 20))
    finish(engine)
    assert (old.version, new.version) == ("a", "b")
    assert (old.output_ids, new.output_ids) == (answer(21), answer(22)) and answer(21) != answer(22)


@pytest.mark.parametrize("reads", Reading)
def test_a_swap_to_the_same_weights_changes_nothing(models: Models, reads: Reading) -> None:
    """Republishing identical weights mid-stream splits the batch by version, and must change no
    token in it."""
    proposer = make_proposer(models)
    a = make_local_selector(proposer, "a", SelectorKind.JOINT, reads)
    b = replace(a, version="b", adapter=copy.deepcopy(a.adapter), bin_deltas=a.bin_deltas.clone())  # type: ignore
    requests = [request(LOCAL, prompt, 12) for prompt in PROMPTS]
    swapped = run(Engine(proposer, local_selectors=swapping(a, b, 3)), *requests)
    steady = run(Engine(proposer, local_selectors=swapping(a, a)), *requests)
    assert [s.version for s in swapped] == ["a"] * 3 + ["b"] * 3
    for x, y in zip(swapped, steady, strict=True):
        assert x.output_ids == y.output_ids
        assert_same(x.steps, y.steps)
    assert any(s.usage.flips for s in steady)


def test_asking_for_a_version_and_for_none(models: Models) -> None:
    """A request may name a version, or "" for none; neither may silently become the live one."""
    proposer = make_proposer(models)
    engine = Engine(
        proposer, local_selectors=lookup_in(all_local_selectors(proposer), "joint-base")
    )
    requests = [request(LOCAL, version=version) for version in (None, "prefix-base", "")]
    assert [s.version for s in run(engine, *requests)] == ["joint-base", "prefix-base", ""]


def test_a_version_unloaded_while_a_request_waits_still_serves_it(models: Models) -> None:
    """A request keeps the version it was accepted with, whether the engine or its caller has looked
    it up."""
    proposer = make_proposer(models)
    pinned = make_local_selector(proposer, "pinned", SelectorKind.JOINT, Reading.BASE, 21)
    live = make_local_selector(proposer, "live", SelectorKind.JOINT, Reading.BASE, 22)
    loaded = [pinned, live]
    engine = Engine(
        proposer, local_selectors=lambda name: lookup_in(loaded, "live")(name), max_num_seqs=1
    )
    engine.add(request(GREEDY))
    waiting = engine.add(request(LOCAL, PROMPTS[2], 20, version="pinned"))
    loaded.remove(pinned)
    given = engine.add(request(LOCAL, PROMPTS[2], 20, version="pinned"), pinned)
    finish(engine)
    alone = run(
        Engine(proposer, local_selectors=lookup_in([pinned])),
        request(LOCAL, PROMPTS[2], 20, version="pinned"),
    )
    replaced = run(engine, request(LOCAL, PROMPTS[2], 20))
    assert waiting.output_ids == given.output_ids == alone[0].output_ids != replaced[0].output_ids
    assert waiting.version == given.version == "pinned"


def test_an_unknown_version_is_refused(models: Models) -> None:
    """Never served by another one instead."""
    proposer = make_proposer(models)
    engine = Engine(
        proposer, local_selectors=lookup_in(all_local_selectors(proposer), "joint-base")
    )
    with pytest.raises(VersionNotFoundError):
        engine.add(request(LOCAL, version="removed"))
    assert engine.idle


def test_steps_are_frozen_values() -> None:
    """Everything downstream folds Steps: one that could change later would rewrite metrics and
    labels."""
    with pytest.raises(AttributeError):
        Step(index=0, token_id=5, chosen_by=ChosenBy.SLM).token_id = 6  # type: ignore[misc]
