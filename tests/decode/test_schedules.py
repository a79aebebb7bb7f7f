"""The engine under random schedules: arrivals, departures, late and lost replies, small pools,
chunks and drafts.

None of them may change what an answer says: every sequence is compared with itself alone, asked
token by token (`max_draft_tokens=1`) in a large pool. Time is counted in engine steps, so that a
run repeats exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared import types
from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator
from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer, SequenceSlots
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.model.kv_pool import MIN_PREFIX_MATCH, Slot
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.types import (
    CandidateRule,
    ChosenBy,
    DecodeOptions,
    DecodeRequest,
    FinishReason,
    GenerateRequest,
    Mode,
    Policy,
    Proposals,
    Trigger,
)
from tests.helpers.engine import (
    GREEDY,
    FailingSelector,
    Models,
    all_local_selectors,
    assert_same,
    finish,
    lookup_in,
    make_llm,
    make_proposer,
    request,
    run,
    with_options,
    with_small_pool,
)
from tests.helpers.queries import query

pytestmark = pytest.mark.slow
SHARED = tuple(int(x) for x in np.random.default_rng(7).integers(5, 48, 130))
PROMPTS = (
    (*SHARED[:50], 6),
    (*SHARED[:50], 9, 10),
    (*SHARED[:20], 7),
    (9,),
    SHARED[:110],
    SHARED[:50],
    (44, 44, 10),
)
LOCAL = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS, candidates=CandidateRule(4))
LONG = [SHARED[:120], SHARED[::-1][:100], (*SHARED[:60], *SHARED[:40])]
LATE = "the network is down"


class DelayedSelector:
    """A real selector whose replies come up to `patience` engine steps later, or (a share of
    `lost`) not at all."""

    def __init__(
        self, real: SelectorClient, seed: int = 0, patience: int = 0, lost: float = 0.0
    ) -> None:
        self._real, self._dice, self._patience, self._lost = (
            real,
            random.Random(seed),
            patience,
            lost,
        )
        self._waiting: list[tuple[int, types.ScoreQuery, Future[types.ScoreReply]]] = []
        self._now = 0

    @property
    def info(self) -> LLMInfo:
        return self._real.info

    def submit(self, queries: Sequence[types.ScoreQuery]) -> list[Future[types.ScoreReply]]:
        futures: list[Future[types.ScoreReply]] = [Future() for _ in queries]
        self._waiting += [
            (self._now + self._dice.randint(0, self._patience), q, f)
            for q, f in zip(queries, futures, strict=True)
        ]
        self._answer()
        return futures

    def tick(self) -> None:
        self._now += 1
        self._answer()

    def _answer(self) -> None:
        due = [
            (q, f)
            for at, q, f in self._waiting
            if at <= self._now and f.set_running_or_notify_cancel()
        ]
        self._waiting = [entry for entry in self._waiting if entry[0] > self._now]
        for (_, future), real in zip(due, self._real.submit([q for q, _ in due]), strict=True):
            if self._dice.random() < self._lost:
                future.set_exception(SelectorUnavailableError(LATE))
            else:
                future.set_result(real.result())


@dataclass(frozen=True)
class Plan:
    """When a request comes, and when (None: never) its client leaves or its deadline passes."""

    request: DecodeRequest
    arrival: int
    leaves_at: int | None
    by_deadline: bool


class Lab:
    """Both models, loaded once, each time with new pools; answers alone are remembered."""

    def __init__(self, models: Models) -> None:
        proposer = make_proposer(models)
        self.slm, self.llm = proposer.runtime, make_llm(models).runtime
        self.reserved, self.selectors = proposer.reserved_ids, all_local_selectors(proposer)
        self.known: dict[DecodeRequest, LiveSequence] = {}

    def engine(
        self,
        rows: int = 64,
        chunk: int = 256,
        longest: int = 1,
        llm_rows: int = 64,
        llm_step: int = 1024,
        running: int = 32,
        wrap: Callable[[SelectorClient], SelectorClient] = lambda client: client,
    ) -> Engine:
        proposer = Proposer(
            with_small_pool(self.slm, rows), self.reserved, prefill_chunk_tokens=chunk
        )
        self.client = wrap(
            InProcessSelector(
                LLMSelector(with_small_pool(self.llm, llm_rows), "tokenizer", llm_step)
            )
        )
        return Engine(
            proposer,
            self.client,
            lookup_in(self.selectors),
            max_num_seqs=running,
            selection_timeout_s=1000.0,
            max_draft_tokens=longest,
        )

    def alone(self, wanted: DecodeRequest) -> LiveSequence:
        if wanted not in self.known:
            (self.known[wanted],) = run(self.engine(), wanted)
        return self.known[wanted]


@pytest.fixture(scope="module")
def lab(models: Models) -> Lab:
    return Lab(models)


def counting(runtime: ModelRuntime, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many tokens each forward reads."""
    read, forward = [], runtime.forward
    monkeypatch.setattr(
        runtime,
        "forward",
        lambda segments: (read.append(sum(s.length for s in segments)), forward(segments))[1],
    )
    return read


def alike(a: Sequence[types.Step], b: Sequence[types.Step], where: object = "") -> None:
    """Equal, but for the order of ids whose probabilities are equal up to rounding."""

    def ordered(step: types.Step) -> types.Step:
        llm, support = step.llm, step.support
        return replace(
            step,
            llm=llm and replace(llm, log_probs=tuple(sorted(llm.log_probs))),
            support=support and replace(support, ids=tuple(sorted(support.ids))),
        )

    assert_same([ordered(x) for x in a], [ordered(x) for x in b], str(where))


def drive(engine: Engine, client: DelayedSelector, plans: Sequence[Plan]) -> list[LiveSequence]:
    """Run the plans to their end and check, after every step, what must hold at any time."""
    live: dict[int, LiveSequence] = {}
    handed_out: dict[LiveSequence, list[int]] = {}
    proposer = engine.proposer
    assert isinstance(client, DelayedSelector)
    assert isinstance(proposer, Proposer)
    pool = proposer.runtime.pool
    for tick in range(1500):
        live |= {i: engine.add(p.request) for i, p in enumerate(plans) if p.arrival == tick}
        leaving = [
            s for i, s in live.items() if plans[i].leaves_at == tick and s.finish_reason is None
        ]
        futures = [call.future for s in leaving for call in s.calls if not call.future.done()]
        for s in leaving:
            if any(live.get(i) is s and plan.by_deadline for i, plan in enumerate(plans)):
                s.request = replace(s.request, deadline=0.0)
            else:
                engine.cancel(s)
        for s, steps in engine.step():
            handed_out.setdefault(s, []).extend(step.token_id for step in steps)
        pool.check()
        held = sum(len(slots_of(s)) for s in engine.sequences)
        assert pool.live_slots == held, "KV in use one step after its client left"
        for s in leaving:
            assert s.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE)
            assert s.kv is None
            assert s not in engine.sequences
        assert all(f.cancelled() for f in futures), "the LLM still works for someone who left"
        client.tick()
        if engine.idle and all(p.arrival <= tick for p in plans):
            break
    unfinished = [s.request.options.policy for s in live.values() if s.finish_reason is None]
    assert engine.idle, f"it stands still: {unfinished}"
    assert pool.live_slots == 0
    for s in live.values():
        assert tuple(handed_out.get(s, ())) == s.output_ids, "handed out otherwise than decided"
    return [live[i] for i in range(len(plans))]


def slots_of(sequence: LiveSequence) -> list[Slot]:
    """The KV slots that a sequence holds."""
    if sequence.kv is None:
        return []
    assert isinstance(sequence.kv, SequenceSlots)
    held = (sequence.kv.slot, sequence.kv.adapted_slot)
    return [slot for slot in held if slot is not None]


def make_plan(
    mode: tuple[Mode, Trigger, float, str],
    k: int,
    ratio: float,
    prompt: tuple[int, ...],
    new: int,
    seed: int,
    arrival: int,
    stay: int | None,
    flags: int,
) -> Plan:
    kind, trigger, threshold, version = mode
    proposals = Proposals.ADAPTED if flags & 1 and kind is Mode.S2T_LOCAL else Proposals.BASE
    policy = Policy(
        mode=kind,
        trigger=trigger,
        threshold=threshold,
        candidates=CandidateRule(k, ratio),
        proposals=proposals,
    )
    made = with_options(
        request(policy, prompt, new, "r", version, seed),
        score_rollout=flags & 4 > 0 and kind in (Mode.GREEDY, Mode.SAMPLE),
    )
    return Plan(made, arrival, None if stay is None else arrival + stay, flags & 2 > 0)


MODES = [
    (Mode.GREEDY, Trigger.NEVER, 0.0, ""),
    (Mode.SAMPLE, Trigger.NEVER, 0.0, ""),
    (Mode.LLM, Trigger.NEVER, 0.0, ""),
    (Mode.S2T, Trigger.ENTROPY, 2.0, ""),
    (Mode.TAKEOVER, Trigger.MARGIN, 0.8, ""),
    (Mode.S2T, Trigger.ALWAYS, 0.0, ""),
    (Mode.S2T, Trigger.KL, 2.0, ""),
    (Mode.S2T, Trigger.KL, 6.0, ""),
    (Mode.TAKEOVER, Trigger.KL_REVERSE, 4.0, ""),
    (Mode.S2T_LOCAL, Trigger.KL, 3.0, "joint-base"),
    (Mode.S2T_LOCAL, Trigger.KL_REVERSE, 3.0, "reserved-adapted"),
    (Mode.S2T_LOCAL, Trigger.ALWAYS, 0.0, "joint-adapted"),
    (Mode.S2T_LOCAL, Trigger.ENTROPY, 1.8, "prefix-base"),
    (Mode.S2T_LOCAL, Trigger.RANDOM, 0.5, "prefix-adapted"),
]
PLANS = st.lists(
    st.builds(
        make_plan,
        st.sampled_from(MODES),
        st.sampled_from([1, 4, 8]),
        st.sampled_from([0.0, 0.1]),
        st.sampled_from(PROMPTS),
        st.sampled_from([1, 4, 13, 30]),
        st.integers(0, 2),
        st.integers(0, 12),
        st.none() | st.none() | st.integers(0, 20),
        st.integers(0, 7),
    ),
    min_size=3,
    max_size=10,
)
ENGINES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([4, 5, 8, 64]),
        "chunk": st.sampled_from([16, 40, 256]),
        "running": st.sampled_from([2, 5, 32]),
        "longest": st.sampled_from([1, 2, 5, 32]),
        "llm_rows": st.sampled_from([2, 5, 64]),
        "llm_step": st.sampled_from([32, 1024]),
    }
)

# -- any schedule ---------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(PLANS, ENGINES, st.integers(0, 10**6), st.sampled_from([0, 2, 6]))
def test_no_schedule_changes_an_answer(
    lab: Lab, plans: list[Plan], options: dict[str, int], seed: int, patience: int
) -> None:
    """Who else is served, how prompts are chunked, how full the pool is, how late the LLM and how
    far one drafts are matters of speed: where they leak into an answer, the same question has
    another answer under load."""
    expected = [lab.alone(p.request) for p in plans]
    wrap = partial(DelayedSelector, seed=seed, patience=patience)
    engine = lab.engine(wrap=wrap, **options)
    together = drive(engine, lab.client, plans)
    for plan, a, b in zip(plans, expected, together, strict=True):
        left = b.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE)
        assert b.output_ids == a.output_ids[: len(b.steps)] and (
            plan.leaves_at is not None or not left
        ), plan.request
        if not (left and plan.request.options.score_rollout):
            alike(
                a.steps[: len(b.steps)] if left else a.steps, b.steps, plan.request.options.policy
            )
        if left:
            continue
        assert (a.finish_reason, a.version) == (b.finish_reason, b.version)
        assert b.usage == (
            a.usage
            if options["longest"] == 1
            else replace(a.usage, llm_forwards=b.usage.llm_forwards)
        )


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(PLANS, ENGINES, st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 1.0]))
def test_lost_replies_are_marked_and_stop_no_one(
    lab: Lab, plans: list[Plan], options: dict[str, int], seed: int, lost: float
) -> None:
    """A flaky network must cost quality where it happened, say so, and nothing else: an unmarked
    fallback poisons labels and measurements, a sequence that waits for ever blocks its client and
    its KV."""
    engine = lab.engine(wrap=partial(DelayedSelector, seed=seed, patience=4, lost=lost), **options)
    together = drive(engine, lab.client, plans)
    for plan, b in zip(plans, together, strict=True):
        a, policy = lab.alone(plan.request), plan.request.options.policy
        first = next((s.index for s in b.steps if s.degraded), len(b.steps))
        assert b.output_ids[:first] == a.output_ids[:first]
        assert first == len(b.steps) or policy.needs_llm or plan.request.options.score_rollout
        if not plan.request.options.score_rollout:
            alike(a.steps[:first], b.steps[:first])
        for step in b.steps:
            assert step.degraded in ("", LATE)
            assert not step.degraded or step.chosen_by is not ChosenBy.LLM and step.llm is None
            if policy.mode is Mode.LLM or policy.trigger.needs_llm and step.index >= 3:
                assert (step.llm is None) == bool(step.degraded), (
                    "a step without the LLM that does not say so"
                )
            if step.triggered and policy.mode.asks_llm:
                assert (step.chosen_by is ChosenBy.LLM) == (not step.degraded)
        assert plan.leaves_at is not None or b.finish_reason in (
            FinishReason.STOP,
            FinishReason.LENGTH,
        )


def test_what_can_never_fit_is_refused_and_names_the_setting(lab: Lab) -> None:
    """Such a request at the head of the queue would block everyone behind it for ever."""
    engine = lab.engine(rows=1)
    for never in (
        request(GREEDY, SHARED[:100], 60),
        request(LOCAL, SHARED[:20], 10, version="joint-adapted"),
    ):
        with pytest.raises(InvalidRequestError, match="kv_gib"):  # (the second needs two rows)
            engine.add(never)
    assert engine.idle
    (served,) = run(engine, request(GREEDY, SHARED[:100], 9))
    alike(served.steps, lab.alone(served.request).steps)


@pytest.mark.parametrize(
    "prompt", [SHARED[:110], SHARED[19::-1] * 5 + SHARED[:10]], ids=["shared prefix", "its own"]
)
def test_what_fits_only_alone_waits_and_is_served(lab: Lab, prompt: tuple[int, ...]) -> None:
    """The largest request a pool was configured for: it waits for those in its way, not for ever,
    and kept rows (whether or not they hold its own beginning) give way to it."""
    engine = lab.engine(rows=2, chunk=16)
    sequences = [
        engine.add(request(GREEDY, ids, new))
        for ids, new in ((PROMPTS[0], 6), (PROMPTS[1], 6), (prompt, 40))
    ]
    engine.step()
    assert sequences[2].kv is None and sequences[0].kv is not None, "it should have to wait"
    finish(engine, 200)
    for sequence in sequences:
        alike(sequence.steps, lab.alone(sequence.request).steps)


def test_a_request_of_two_rows_does_not_lock_itself_out(lab: Lab) -> None:
    """`reads: adapted` needs two rows; when the first is taken over from a kept one that fills the
    whole pool, there is never room for the second, and the engine stands still with nothing
    running."""
    engine = lab.engine(rows=2)
    run(engine, request(GREEDY, SHARED[:60], 100))
    (sequence,) = run(engine, request(LOCAL, SHARED[:61], 5, version="joint-adapted"))
    alike(sequence.steps, lab.alone(sequence.request).steps)


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize(
    "policy, version",
    [
        (GREEDY, ""),
        (LOCAL, "joint-adapted"),
        (replace(LOCAL, proposals=Proposals.ADAPTED), "prefix-base"),
    ],
)
def test_a_prompt_that_many_ask_is_read_once(
    lab: Lab, policy: Policy, version: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long system prompt read once per request is most of a service's work, done for nothing."""
    engine = lab.engine(rows=rows, chunk=16)
    read = counting(lab.slm, monkeypatch)
    requests = [request(policy, (*SHARED[:90], 5 + i), 6, f"{i}", version) for i in range(5)]
    together = run(engine, *requests)
    total, longest = sum(read), max(read)
    for sequence in together:
        alike(sequence.steps, lab.alone(sequence.request).steps)
    readings = 2 if version and policy.proposals is Proposals.BASE else 1
    looked_at = sum(len(s.steps) * (5 if policy.can_trigger else 0) for s in together)
    own = (
        5 * readings * (MIN_PREFIX_MATCH + 1 + 6)
    )  # what follows the common part, and the least worth copying
    assert 90 * readings <= total <= 91 * readings + own + looked_at
    assert longest <= 16 + 5 * (MIN_PREFIX_MATCH + 1 + 5), "a long prompt held up the others"


@pytest.mark.parametrize(
    "mode, version, trigger",
    [
        (Mode.S2T, "", Trigger.KL),
        (Mode.TAKEOVER, "", Trigger.KL),
        (Mode.S2T_LOCAL, "joint-base", Trigger.KL),
        (Mode.S2T_LOCAL, "reserved-adapted", Trigger.KL),
        (Mode.S2T, "", Trigger.KL_REVERSE),
        (Mode.S2T_LOCAL, "joint-base", Trigger.KL_REVERSE),
    ],
)
def test_drafts_are_lockstep_with_fewer_questions(
    lab: Lab, mode: Mode, version: str, trigger: Trigger
) -> None:
    """Drafting is speed: a token that lockstep would have rejected, or a KV that keeps rejected
    tokens, changes the answer; and a draft that costs as many LLM forwards as lockstep is for
    nothing."""
    flips = stops = 0
    for threshold in (1.0, 4.0, 1e9):
        policy = Policy(
            mode=mode, trigger=trigger, threshold=threshold, candidates=CandidateRule(4)
        )
        requests = [
            request(policy, prompt, new, "d", version)
            for prompt, new in ((PROMPTS[0], 29), (PROMPTS[3], 23), ((5, 45), 18), ((14, 45), 30))
        ]
        lockstep = run(lab.engine(), *requests)
        flips += sum(s.usage.flips for s in lockstep)
        stops += sum(s.finish_reason is FinishReason.STOP and len(s.steps) > 4 for s in lockstep)
        for longest in (2, 5, 32):
            full = min(
                longest, 22
            )  # the longest draft at the rate of rejection that is assumed at first
            for a, b in zip(
                lockstep, run(lab.engine(longest=longest, chunk=16), *requests), strict=True
            ):
                alike(a.steps, b.steps, f"{threshold} {longest}")
                assert a.finish_reason is b.finish_reason
                assert (asked := a.usage.llm_forwards) == max(0, len(a.steps) - 3)
                if (
                    threshold == 1e9
                ):  # nothing is rejected; half a draft goes along where another's is full
                    assert b.usage.llm_forwards <= -(-asked // -(-full // 2)) + 1
        if threshold == 1e9:
            (b,) = run(lab.engine(longest=5), requests[0])
            assert b.usage.llm_forwards <= -(-lockstep[0].usage.llm_forwards // 5)
    assert flips > 10 and stops >= 2, (
        "nothing was rejected, or nothing ended inside a draft: nothing was tested"
    )


@pytest.mark.parametrize("longest", [1, 2, 5, 32])
@pytest.mark.parametrize(
    "mode, threshold", [(Mode.S2T, 1e9), (Mode.S2T, 3.0), (Mode.TAKEOVER, 5.0)]
)
def test_an_llm_that_dies_in_a_draft_leaves_the_slms_tokens_marked(
    lab: Lab, mode: Mode, threshold: float, longest: int
) -> None:
    """What was confirmed stands, what was not is the SLM's and says so: an unmarked token counts as
    the LLM's word."""
    wanted = request(
        Policy(mode=mode, trigger=Trigger.KL, threshold=threshold, candidates=CandidateRule(4)),
        PROMPTS[3],
        21,
    )
    reference, firsts = lab.alone(wanted), set()
    for healthy in range(4):
        dead = partial(FailingSelector, healthy=healthy, error=SelectorUnavailableError(LATE))
        (b,) = run(lab.engine(longest=longest, wrap=dead), wanted)
        first = next((s.index for s in b.steps if s.degraded), len(b.steps))
        firsts.add(first)
        alike(b.steps[:first], reference.steps[:first])
        for step in b.steps[first:]:
            assert (step.degraded, step.chosen_by, step.triggered, step.llm) == (
                LATE,
                ChosenBy.SLM,
                False,
                None,
            )
        context = (*wanted.token_ids, *b.output_ids[:first])
        greedy = (
            run(lab.engine(), request(GREEDY, context, 21 - first))[0].output_ids
            if first < 21
            else ()
        )
        assert b.output_ids[first:] == greedy[: len(b.steps) - first] and b.steps
    assert min(firsts) == 3 and len(firsts) > 1


def test_stop_strings_cut_drafts_where_they_cut_lockstep() -> None:
    """A draft is confirmed in one go: tokens behind the stop string must not become part of the
    answer."""
    tokenizer = Tokenizer.load(SLM_DIR)
    slm, llm = ModelRuntime.load(str(SLM_DIR)), ModelRuntime.load(str(LLM_DIR))
    inside = 0

    def answer(longest: int, text: str, threshold: float, stop: str) -> types.Answer:
        engine = Engine(
            Proposer(slm, reserved_ids(tokenizer, slm.vocab_rows)),
            InProcessSelector(LLMSelector(llm, "t")),
            max_draft_tokens=longest,
        )
        asked = GenerateRequest(
            request_id="s",
            prompt=types.Prompt(text=text),
            stop=(stop,) if stop else (),
            options=DecodeOptions(
                policy=Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=threshold),
                max_new_tokens=37,
            ),
        )
        ((_, answer),) = Generator(tokenizer, engine).generate([asked])
        assert isinstance(answer, types.Answer) and engine.idle and slm.pool.live_slots == 0
        return answer

    for problem in problems.problems("test", 2):
        for threshold in (0.2, 1e9):
            whole = answer(1, problem.prompt, threshold, "")
            for stop in ("", *(" " + word for word in whole.text.split()[2:11:4])):
                lockstep = answer(1, problem.prompt, threshold, stop)
                assert lockstep.text == (whole.text.partition(stop)[0] if stop else whole.text)
                inside += len(lockstep.token_ids) < len(whole.token_ids)
                for longest in (5, 32):
                    drafted = answer(longest, problem.prompt, threshold, stop)
                    alike(drafted.steps, lockstep.steps)
                    assert replace(drafted, steps=(), usage=lockstep.usage) == replace(
                        lockstep, steps=()
                    )
                    assert replace(drafted.usage, llm_forwards=0) == replace(
                        lockstep.usage, llm_forwards=0
                    )
    assert inside > 5, "no stop string ended an answer early"


# -- the LLM's side -------------------------------------------------------------------------------


def test_short_queries_are_not_held_up_by_long_ones(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One new long conversation must not stop the gaps of all others for its whole prefill; and
    what is read in pieces, in any company, must score as it does alone."""
    queries = [
        *(query(ids, [len(ids) - 3, len(ids) - 1]) for ids in LONG),
        query((7, 8, 9)),
        query((9, 10, 11, 12)),
    ]
    scorer = LLMSelector(with_small_pool(lab.llm, 64), "t", step_tokens=16)
    read = counting(lab.llm, monkeypatch)
    pending = [scorer.add(q) for q in queries]
    done = [(p, step, reply) for step in range(30) for p, reply in scorer.step()]
    ended = {p: step for p, step, _ in done}
    assert len(done) == 5 and scorer.idle and lab.llm.pool.live_slots == 0
    assert [ended[p] for p in pending[3:]] == [0, 0] and 7 <= ended[pending[0]] < 20, (
        "a long one first, or starved"
    )
    assert max(read) <= 16 and sum(read) <= 120 + 100 + 40 + MIN_PREFIX_MATCH + 7
    for p, _, reply in done:
        assert_same([reply], LLMSelector(with_small_pool(lab.llm, 64), "t").score([p.query]))


def test_queries_nobody_waits_for_are_dropped_before_a_forward(lab: Lab) -> None:
    """After a time-out storm the LLM would spend minutes on answers that nobody reads, before the
    first one wanted."""
    scorer = LLMSelector(with_small_pool(lab.llm, 64), "t", step_tokens=16)
    wanted = [True, False, True]
    pending = [scorer.add(query(ids), lambda i=i: wanted[i]) for i, ids in enumerate(LONG)]  # type: ignore[misc]
    assert scorer.step() == [(pending[1], None)] and pending[1].slot is None, (
        "dropped, and never opened"
    )
    wanted[0] = False  # in the middle of its reading
    assert (pending[0], None) in scorer.step() and lab.llm.pool.live_slots == 1
    replies = [r for _ in range(20) for p, r in scorer.step() if p is pending[2]]
    assert scorer.idle and lab.llm.pool.live_slots == 0 and scorer.step() == []
    assert_same(replies, LLMSelector(with_small_pool(lab.llm, 64), "t").score([query(LONG[2])]))
