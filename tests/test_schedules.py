"""The engine under random schedules: arrivals, departures, late and lost replies, small pools, chunks and drafts.

None of them may change what an answer says: every sequence is compared with itself alone, asked token by token
(`longest_draft=1`) in a large pool. Time is counted in engine steps, so that a run repeats exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared.engine import Engine
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.generate import GenerateRequest, Generator
from s2t_shared.kv import SHORTEST_REUSE
from s2t_shared.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.pair import LLM_DIR, SLM_DIR, problems
from s2t_shared.proposer import Proposer
from s2t_shared.runtime import ModelRuntime
from s2t_shared.scorer import InProcessSelector, LLMInfo, LLMScorer, SelectorClient
from s2t_shared.sequence import LiveSequence
from s2t_shared.text import Tokenizer, reserved_ids
from s2t_shared.types import (
    Answer,
    CandidateRule,
    ChosenBy,
    DecodeRequest,
    FinishReason,
    Mode,
    Policy,
    Prompt,
    Proposals,
    Sampling,
    ScoreQuery,
    ScoreReply,
    Step,
    Trigger,
)
from tests.models import EOS
from tests.test_engine_laws import (
    GREEDY,
    FailingSelector,
    Models,
    all_selectors,
    assert_same,
    count_read_tokens,
    finish,
    greedy_from,
    lookup_in,
    make_llm,
    make_proposer,
    make_selector,
    query,
    request,
    run,
    with_small_pool,
)

SHARED = tuple(int(x) for x in np.random.default_rng(7).integers(5, 48, 130))
PROMPTS = ((*SHARED[:50], 6), (*SHARED[:50], 9, 10), (*SHARED[:20], 7), (9,), SHARED[:110], SHARED[:50], (44, 44, 10))
LATE = "the network is down"

# -- helpers ----------------------------------------------------------------------------------------------------------


class DelayedSelector:
    """A real selector whose replies come `delay()` engine steps later, or (`fails()`) not at all."""

    def __init__(self, real: SelectorClient, delay: Callable[[], int], fails: Callable[[], bool]) -> None:
        self._real, self._delay, self._fails, self._now = real, delay, fails, 0
        self._waiting: list[tuple[int, ScoreQuery, Future[ScoreReply]]] = []
        self.failures = 0

    @property
    def info(self) -> LLMInfo:
        return self._real.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        self._waiting += [(self._now + self._delay(), q, f) for q, f in zip(queries, futures, strict=True)]
        self._answer()
        return futures

    def tick(self) -> None:
        self._now += 1
        self._answer()

    def _answer(self) -> None:
        due = [(q, f) for at, q, f in self._waiting if at <= self._now and f.set_running_or_notify_cancel()]
        self._waiting = [entry for entry in self._waiting if entry[0] > self._now]
        for (_, future), real in zip(due, self._real.submit([q for q, _ in due]), strict=True):
            if self._fails():
                self.failures += 1
                future.set_exception(SelectorUnavailableError(LATE))
            else:
                future.set_result(real.result())


@dataclass(frozen=True)
class Plan:
    """When a request comes, and after how many engine steps (None: never) its client leaves or its deadline passes."""

    request: DecodeRequest
    arrival: int = 0
    leave: int | None = None
    by_deadline: bool = False


@dataclass
class Lab:
    """Both models, loaded once, each time with new pools; answers alone are remembered."""

    slm: ModelRuntime
    llm: ModelRuntime
    reserved: tuple[int, ...]
    selectors: list[LocalSelector]
    known: dict[DecodeRequest, LiveSequence] = field(default_factory=dict)

    def engine(self, rows: int = 64, chunk: int = 256, longest: int = 1, llm_rows: int = 64, llm_step: int = 1024,
               running: int = 32, wrap: Callable[[SelectorClient], SelectorClient] = lambda client: client) -> Engine:
        proposer = Proposer(with_small_pool(self.slm, rows), self.reserved, chunk_tokens=chunk)
        client = wrap(InProcessSelector(LLMScorer(with_small_pool(self.llm, llm_rows), "tokenizer", llm_step)))
        return Engine(proposer, client, lookup_in(self.selectors), running, 1000.0, longest)

    def alone(self, wanted: DecodeRequest) -> LiveSequence:
        if wanted not in self.known:
            (self.known[wanted],) = run(self.engine(), wanted)
        return self.known[wanted]


@pytest.fixture(scope="module")
def lab(models: Models) -> Lab:
    proposer = make_proposer(models)
    return Lab(proposer.runtime, make_llm(models).runtime, proposer.reserved_ids, all_selectors(proposer))


def drive(engine: Engine, client: DelayedSelector | None, plans: Sequence[Plan]) -> list[LiveSequence]:
    """Run the plans to their end and check, after every step, everything that must hold at any time."""
    live: dict[int, LiveSequence] = {}
    told: dict[int, list[Step]] = {}
    pool = engine.proposer.runtime.pool
    for tick in range(1500):
        live |= {i: engine.add(p.request) for i, p in enumerate(plans) if p.arrival == tick}
        leaving = [s for i, s in live.items()
                   if plans[i].leave is not None and tick == plans[i].arrival + plans[i].leave  # type: ignore[operator]
                   and s.finish_reason is None]
        held = [([s.parked.future] if s.parked else []) + [c.future for c in s.checks] for s in leaving]
        waiting = [[f for f in futures if not f.done()] for futures in held]
        rows = [[r for r in (s.track.row, s.track.adapted_row) if r] if s.track else [] for s in leaving]
        for s in leaving:
            if next(p for i, p in enumerate(plans) if live.get(i) is s).by_deadline:
                s.request = replace(s.request, deadline=0.0)
            else:
                engine.cancel(s)
        for s, steps in engine.step():
            told.setdefault(id(s), []).extend(steps)
        pool.check()
        tracks = [s.track for s in engine._running if s.track is not None]
        assert pool.live_rows == sum(1 + (t.adapted_row is not None) for t in tracks), "rows of no one"
        for s, mine, futures in zip(leaving, rows, waiting, strict=True):
            assert s.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE) and s.track is None
            assert not any(row.live for row in mine), "KV in use one step after its client left"
            assert all(f.cancelled() for f in futures), "the LLM still works for someone who left"
            assert s not in engine._running and s not in engine._waiting
        if client is not None:
            client.tick()
        if engine.idle and all(p.arrival <= tick for p in plans):
            break
    else:
        raise AssertionError("the engine stands still: " + str([(s.request.policy, len(s.steps)) for s in live.values()
                                                                if s.finish_reason is None]))
    assert pool.live_rows == 0
    for s in live.values():
        assert [step.token_id for step in told.get(id(s), [])] == list(s.output_ids), "told otherwise than decided"
    return [live[i] for i in range(len(plans))]


def make_plan(mode: tuple[Mode, Trigger, float, str], k: int, ratio: float, prompt: tuple[int, ...], new: int, seed: int,
              when: tuple[int, int | None, bool], adapted: bool, rollout: bool) -> Plan:
    kind, trigger, threshold, version = mode
    proposals = Proposals.ADAPTED if adapted and kind is Mode.S2T_LOCAL else Proposals.BASE
    policy = Policy(kind, trigger, threshold, CandidateRule(k, ratio), proposals)
    made = request(policy, prompt, new, "r", version, seed)
    return Plan(replace(made, score_rollout=rollout and kind in (Mode.GREEDY, Mode.SAMPLE)), *when)


MODES = [(Mode.GREEDY, Trigger.NEVER, 0.0, ""), (Mode.SAMPLE, Trigger.NEVER, 0.0, ""),
         (Mode.LLM, Trigger.NEVER, 0.0, ""), (Mode.S2T, Trigger.ENTROPY, 2.0, ""), (Mode.TAKEOVER, Trigger.MARGIN, 0.8, ""),
         (Mode.S2T, Trigger.KL, 2.0, ""), (Mode.S2T, Trigger.KL, 6.0, ""), (Mode.TAKEOVER, Trigger.KL_REVERSE, 4.0, ""),
         (Mode.S2T_LOCAL, Trigger.KL, 3.0, "joint-base"), (Mode.S2T_LOCAL, Trigger.KL_REVERSE, 3.0, "reserved-adapted"),
         (Mode.S2T_LOCAL, Trigger.ALWAYS, 0.0, "joint-adapted"), (Mode.S2T_LOCAL, Trigger.RANDOM, 0.5, "prefix-adapted"),
         (Mode.S2T_LOCAL, Trigger.ENTROPY, 1.8, "prefix-base"), (Mode.S2T, Trigger.ALWAYS, 0.0, "")]
WHEN = st.tuples(st.integers(0, 12), st.none() | st.none() | st.integers(0, 20), st.booleans())
PLANS = st.lists(st.builds(make_plan, st.sampled_from(MODES), st.sampled_from([1, 4, 8]), st.sampled_from([0.0, 0.1]),
                           st.sampled_from(PROMPTS), st.sampled_from([1, 3, 7, 13]), st.integers(0, 2), WHEN,
                           st.booleans(), st.booleans()), min_size=3, max_size=10)
ENGINES = st.fixed_dictionaries({
    "rows": st.sampled_from([4, 5, 8, 64]), "chunk": st.sampled_from([16, 40, 256]), "running": st.sampled_from([2, 5, 32]),
    "longest": st.sampled_from([1, 2, 5, 32]), "llm_rows": st.sampled_from([2, 5, 64]),
    "llm_step": st.sampled_from([32, 1024])})


def run_delayed(lab: Lab, plans: list[Plan], options: dict[str, int], seed: int, patience: int, lost: float
                ) -> tuple[list[LiveSequence], DelayedSelector]:
    dice, made = random.Random(seed), []

    def wrap(real: SelectorClient) -> SelectorClient:
        made.append(DelayedSelector(real, lambda: dice.randint(0, patience), lambda: dice.random() < lost))
        return made[0]

    engine = lab.engine(wrap=wrap, **options)
    return drive(engine, made[0], plans), made[0]


# -- any schedule -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(PLANS, ENGINES, st.integers(0, 10**6), st.sampled_from([0, 2, 6]))
def test_no_schedule_changes_an_answer(lab: Lab, plans: list[Plan], options: dict[str, int], seed: int, patience: int
                                       ) -> None:
    """Who else is served, how prompts are chunked, how full the pool is, how late the LLM and how far one drafts are
    matters of speed: where they leak into an answer, the same question has another answer under load."""
    expected = [lab.alone(p.request) for p in plans]
    together, _ = run_delayed(lab, plans, options, seed, patience, 0.0)
    for plan, a, b in zip(plans, expected, together, strict=True):
        n = len(b.steps)
        assert b.output_ids == a.output_ids[:n], plan.request
        if b.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
            assert plan.leave is not None
            assert plan.request.score_rollout or assert_same(a.steps[:n], b.steps) is None  # type: ignore[func-returns-value]
            continue
        assert_same(a.steps, b.steps, str(plan.request.policy))
        assert (a.finish_reason, a.selector_version) == (b.finish_reason, b.selector_version)
        same = a.usage if options["longest"] == 1 else replace(a.usage, llm_forwards=b.usage.llm_forwards)
        assert b.usage == same


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(PLANS, ENGINES, st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 1.0]))
def test_lost_replies_are_marked_and_stop_no_one(lab: Lab, plans: list[Plan], options: dict[str, int], seed: int,
                                                 lost: float) -> None:
    """A flaky network must cost quality where it happened, say so, and nothing else: an unmarked fallback poisons
    labels and measurements, a sequence that waits for ever blocks its client and its KV."""
    together, client = run_delayed(lab, plans, options, seed, 4, lost)
    marked = 0
    for plan, b in zip(plans, together, strict=True):
        a, asks = lab.alone(plan.request), plan.request.policy.needs_llm or plan.request.score_rollout
        first = next((s.index for s in b.steps if s.degraded), len(b.steps))
        marked += first < len(b.steps)
        assert b.output_ids[:first] == a.output_ids[:first] and (asks or first == len(b.steps))
        if not plan.request.score_rollout:
            assert_same(a.steps[:first], b.steps[:first])
        for step in b.steps:
            assert step.degraded in ("", LATE)
            assert not step.degraded or step.chosen_by is not ChosenBy.LLM and step.llm is None
            if plan.request.policy.trigger.needs_llm and step.index >= 3:
                assert (step.llm is None) == bool(step.degraded), "a step without the LLM that does not say so"
        if plan.leave is None:
            assert b.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert marked <= client.failures and (marked or client.failures == 0 or any(p.leave is not None for p in plans))


# -- small pools ------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_and_names_the_setting(lab: Lab) -> None:
    """Such a request at the head of the queue would block everyone behind it for ever."""
    engine = lab.engine(rows=1)
    with pytest.raises(InvalidRequestError, match="kv_gib"):
        engine.add(request(GREEDY, SHARED[:100], 60))
    with pytest.raises(InvalidRequestError, match="kv_gib"):  # a row for the adapter's own reading does not fit
        engine.add(request(Policy(Mode.S2T_LOCAL, Trigger.ALWAYS), SHARED[:20], 10, version="joint-adapted"))
    assert engine.idle
    served, = run(engine, request(GREEDY, SHARED[:100], 9))
    assert_same(served.steps, lab.alone(request(GREEDY, SHARED[:100], 9)).steps)


@pytest.mark.parametrize("prompt", [SHARED[:110], SHARED[19::-1] * 5 + SHARED[:10]], ids=["shared prefix", "its own"])
def test_what_fits_only_alone_waits_and_is_served(lab: Lab, prompt: tuple[int, ...]) -> None:
    """The largest request a pool was configured for: it waits for those in its way, not for ever, and kept rows
    (whether or not they hold its own beginning) give way to it."""
    engine = lab.engine(rows=2, chunk=16)
    short = [request(GREEDY, PROMPTS[i], 6) for i in (0, 1)]
    large = request(GREEDY, prompt, 40)
    sequences = [engine.add(r) for r in [*short, large]]
    engine.step()
    assert sequences[2].track is None and sequences[0].track is not None, "it should have to wait"
    finish(engine, 200)
    for sequence in sequences:
        assert_same(sequence.steps, lab.alone(sequence.request).steps)


def test_a_request_of_two_rows_does_not_lock_itself_out(lab: Lab) -> None:
    """`reads: adapted` needs two rows; when the first is taken over from a kept one that fills the whole pool, there
    is never room for the second, and the engine stands still with nothing running."""
    engine = lab.engine(rows=4)
    run(engine, request(GREEDY, SHARED[:60], 190))  # keeps one row, as large as the pool... of 256 columns
    policy = Policy(Mode.S2T_LOCAL, Trigger.ALWAYS, candidates=CandidateRule(4))
    run(engine, request(replace(policy, candidates=CandidateRule(64), proposals=Proposals.ADAPTED), SHARED[:61], 190))
    wanted = request(policy, SHARED[:61], 5, version="joint-adapted")
    sequence = engine.add(wanted)
    finish(engine, 200)
    assert_same(sequence.steps, lab.alone(wanted).steps)
