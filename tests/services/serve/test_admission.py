"""What a proposer takes: under any load it answers nearly as much as it can, in time, and refuses
the rest at once. On a simulated clock: a minute of load in half a second, the same in every run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache

import pytest

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import AnswerBuilder, encode_request
from s2t_shared.decode.scripted import ScriptedSLM
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import DeadlineExceededError, OverloadedError
from s2t_shared.types import (
    DecodeOptions,
    DecodeRequest,
    FinishReason,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
)
from services.serve.admission import Admission
from tests.helpers.overload import Load, SimulatedClock, SimulatedProposer, Tally

MINUTE = 60.0


@cache
def under_load(times: float, deadline_s: float = 10.0, max_queue_s: float = 0.0) -> Tally:
    """A minute at so many times the proposer's capacity."""
    proposer = SimulatedProposer(max_queue_s=max_queue_s)
    return proposer.run(Load(rate=times * proposer.capacity, seconds=MINUTE, deadline_s=deadline_s))


# -- goodput --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline_s", [3.0, 10.0])
@pytest.mark.parametrize("times", [2.0, 5.0, 10.0])
def test_overload_costs_no_goodput(times: float, deadline_s: float) -> None:
    """A queue of 256 requests, each begun in its turn, answered a sixth of what it could at five
    times the capacity, and nothing in time after 15 seconds: all was begun, and all expired."""
    peak = max(under_load(load, deadline_s).goodput for load in (1.0, 1.5))
    tally = under_load(times, deadline_s)
    assert tally.goodput >= 0.9 * peak
    assert tally.wasted_tokens <= 0.05 * MINUTE * 4 / 0.025
    assert tally.p99 <= deadline_s


@pytest.mark.parametrize("max_queue_s", [1.0, 0.0], ids=["bounded queue", "deadlines alone"])
def test_answers_take_at_most_twice_as_long_as_at_capacity(max_queue_s: float) -> None:
    at_capacity = under_load(1.0, max_queue_s=max_queue_s)
    assert under_load(5.0, max_queue_s=max_queue_s).p99 <= 2 * at_capacity.p99


def test_a_bounded_queue_keeps_answers_fast() -> None:
    assert under_load(5.0, max_queue_s=1.0).p99 <= 3.0 < 9.0 <= under_load(5.0).p99


def test_refusals_come_at_once_and_say_when_to_try_again() -> None:
    """Few are refused late: those that were taken and could not be finished any more."""
    tally = under_load(5.0)
    refused = [o for o in tally.outcomes if isinstance(o.error, OverloadedError)]
    at_once = [o for o in refused if o.seconds <= 0.1]
    assert len(at_once) >= 0.99 * len(refused) > 0.7 * len(tally.outcomes)
    assert all(0.1 <= (error.retry_after_s or 0.0) <= 30.0 for error in tally.refusals)


def test_little_load_is_never_refused() -> None:
    assert not [o for o in under_load(0.5).outcomes if o.error is not None]


def test_a_proposer_that_becomes_slow_takes_less() -> None:
    """What was measured before does not stand for what is now."""
    proposer = SimulatedProposer()
    proposer.run(Load(rate=proposer.capacity, seconds=MINUTE, deadline_s=10.0))
    proposer.slow_down(3.0)
    tally = proposer.run(Load(rate=proposer.capacity, seconds=MINUTE, deadline_s=10.0))
    assert tally.goodput >= 0.85 * proposer.capacity / 3


# -- clients take turns ---------------------------------------------------------------------------


@pytest.mark.parametrize("calm_comes", ["first", "second"])
def test_one_clients_flood_does_not_starve_another(calm_comes: str) -> None:
    """The other asks for a fifth of the capacity, and gets it, nearly as fast as alone."""
    proposer = SimulatedProposer()
    alone = proposer.run(Load(rate=0.2 * proposer.capacity, seconds=MINUTE, deadline_s=10.0))
    calm, flood = ("a", "b") if calm_comes == "first" else ("b", "a")
    tally = proposer.run(
        Load(rate=0.2 * proposer.capacity, seconds=MINUTE, deadline_s=10.0, client=calm),
        Load(rate=5 * proposer.capacity, seconds=MINUTE, deadline_s=10.0, client=flood, seed=1),
    )
    assert not tally.of(calm).refusals
    assert tally.of(calm).p99 <= 2 * alone.p99
    assert tally.goodput >= 0.9 * proposer.capacity


def test_the_louder_of_two_floods_gets_no_more() -> None:
    proposer = SimulatedProposer()
    loads = [
        Load(rate=rate * proposer.capacity, seconds=MINUTE, deadline_s=10.0, client=c, seed=rate)
        for c, rate in (("a", 2), ("b", 6))
    ]
    tally = proposer.run(*loads)
    quiet, loud = (tally.of(client).goodput for client in ("a", "b"))
    assert loud <= 1.1 * quiet
    assert loud >= 0.35 * proposer.capacity
    assert quiet + loud >= 0.9 * proposer.capacity


def test_the_lowest_turn_begins_first_and_equal_ones_as_they_came() -> None:
    slm = ScriptedSLM(["word"] * 5)
    engine = Engine(slm, max_num_seqs=1)
    turns = [5.0, 0.0, 3.0, 0.0]
    added = [
        engine.add(DecodeRequest(request_id=str(i), token_ids=(1,), turn=turn))
        for i, turn in enumerate(turns)
    ]
    begun: list[str] = []
    while not engine.idle:
        engine.step()
        begun += [s.request.request_id for s in added if s.was_begun]
    assert list(dict.fromkeys(begun)) == ["1", "3", "2", "0"]


# -- the estimate ---------------------------------------------------------------------------------


def request(max_new_tokens: int = 100, timeout_s: float = 0.0, samples: int = 0) -> GenerateRequest:
    policy = Policy(mode=Mode.MAJORITY if samples else Mode.GREEDY)
    return GenerateRequest(
        request_id="r",
        prompt=Prompt(token_ids=(1,)),
        options=DecodeOptions(policy=policy, max_new_tokens=max_new_tokens),
        samples=samples or 1,
        timeout_s=timeout_s,
    )


class Place:
    """An engine of two slots that takes a second for a token, and its admission."""

    def __init__(self, slots: int = 2, kv_slots: int = 64, **limits: float) -> None:
        self.clock = SimulatedClock()
        self.slm = ScriptedSLM(["word"] * 1000, step_s=1.0, sleep=self.clock.sleep, slots=kv_slots)
        self.engine = Engine(self.slm, max_num_seqs=slots, clock=self.clock)
        self.admission = Admission(
            lambda: self.engine.capacity,
            clock=self.clock,
            **limits,  # type: ignore[arg-type]
        )
        self.places = ExitStack()

    def take(self, asked: GenerateRequest) -> Sequence[LiveSequence]:
        ticket = self.places.enter_context(self.admission.admit(asked))
        encoded = encode_request(asked, self.slm.tokenizer)
        builder = AnswerBuilder(encoded, self.slm.tokenizer, self.engine)
        ticket.sequences = builder.sequences
        return builder.sequences

    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()


def test_nothing_known_is_no_reason_to_refuse() -> None:
    place = Place()
    for _ in range(10):
        place.take(request(timeout_s=1.0))
    assert len(place.admission) == 10


def test_the_first_answers_under_way_are_known_already() -> None:
    """Before any has ended: an answer may take a minute, and a queue forms in a second."""
    place = Place()
    for _ in range(2):
        place.take(request(max_new_tokens=100))
    place.step(20)
    with pytest.raises(OverloadedError, match=r"may take 196.0 s, and its deadline is in 150") as e:
        place.take(request(max_new_tokens=100, timeout_s=150.0))
    assert e.value.retry_after_s == 30.0
    place.take(request(max_new_tokens=100, timeout_s=200.0))


def test_a_free_slot_is_always_given() -> None:
    """However short the deadline: else a wrong estimate would stand for ever."""
    place = Place()
    place.take(request(max_new_tokens=100))
    place.step(20)
    place.take(request(max_new_tokens=100, timeout_s=1.0))


def test_what_runs_on_gets_nearer_to_its_end() -> None:
    place = Place(slots=1)
    place.take(request(max_new_tokens=100))
    place.step(20)
    with pytest.raises(OverloadedError):
        place.take(request(max_new_tokens=10, timeout_s=50.0))
    place.step(50)
    place.take(request(max_new_tokens=10, timeout_s=50.0))


def test_samples_of_a_majority_count_each() -> None:
    place = Place(slots=2)
    place.take(request(max_new_tokens=50, samples=8))
    place.step(20)
    with pytest.raises(OverloadedError, match="may take 226.0 s"):  # 1.2 * (30 + 3 * 50) and 10
        place.take(request(max_new_tokens=10, timeout_s=1.0))


def test_scarce_kv_is_a_small_batch() -> None:
    """The batch could hold 8, the KV pool holds one."""
    place = Place(slots=8, kv_slots=1)
    place.take(request(max_new_tokens=40))
    place.take(request(max_new_tokens=40))
    place.step(20)
    with pytest.raises(OverloadedError, match="may take 82.0 s"):
        place.take(request(max_new_tokens=10, timeout_s=1.0))


def test_answers_that_end_early_are_expected_to() -> None:
    place = Place(slots=1)
    place.slm.words = ["word"] * 9
    for _ in range(3):
        place.take(request(max_new_tokens=100))
    place.step(32)
    place.places.close()
    place.take(request(max_new_tokens=100))
    place.take(request(max_new_tokens=100, timeout_s=28.0))  # 1.2 * 10 and 1.5 * 10
    with pytest.raises(OverloadedError):
        place.take(request(max_new_tokens=100, timeout_s=28.0))


def test_the_queue_is_bounded_in_time() -> None:
    place = Place(slots=1, max_queue_s=90.0)
    place.take(request(max_new_tokens=100))
    place.step(20)
    place.take(request(max_new_tokens=100))
    with pytest.raises(OverloadedError, match="free in about 180.0 s, and a request waits 90 s"):
        place.take(request(max_new_tokens=1))


def test_a_burst_takes_no_more_places_than_there_are() -> None:
    """Checked and taken at once: nobody comes between."""
    place = Place(max_ongoing_requests=3)
    for _ in range(3):
        place.take(request())
    with pytest.raises(OverloadedError, match="3 requests are being answered; try again in"):
        place.take(request())
    place.places.close()
    place.take(request())


# -- what would expire is not begun ---------------------------------------------------------------


def test_a_sequence_whose_turn_comes_too_late_is_not_begun() -> None:
    clock = SimulatedClock()
    slm = ScriptedSLM(["word"] * 1000, step_s=1.0, sleep=clock.sleep)
    engine = Engine(slm, max_num_seqs=1, clock=clock)

    def add(start_by: float | None, tokens: int = 20) -> LiveSequence:
        options = DecodeOptions(max_new_tokens=tokens)
        return engine.add(
            DecodeRequest(request_id="r", token_ids=(1,), options=options, start_by=start_by)
        )

    first, late, in_time = add(None), add(10.0), add(30.0)
    while not engine.idle:
        engine.step()
    assert first.finish_reason is in_time.finish_reason is FinishReason.LENGTH
    assert late.finish_reason is FinishReason.DEADLINE and not late.steps and not late.was_begun


@pytest.mark.parametrize(
    ("start_by", "error", "text"),
    [
        (5.0, OverloadedError, "nothing was begun"),
        (None, DeadlineExceededError, "passed after 0 tokens"),
    ],
)
def test_who_was_not_begun_may_come_again(
    start_by: float | None, error: type[Exception], text: str
) -> None:
    place = Place(slots=1)
    place.take(request(max_new_tokens=20))
    asked = request(timeout_s=10.0)
    encoded = encode_request(asked, place.slm.tokenizer)
    waiting = AnswerBuilder(
        type(encoded)(request=asked, token_ids=(1,), deadline=10.0, start_by=start_by),
        place.slm.tokenizer,
        place.engine,
    )
    while not place.engine.idle:
        for sequence, steps in place.engine.step():
            if sequence in waiting.sequences:
                waiting.push(sequence, steps)
    with pytest.raises(error, match=text):
        waiting.answer("")
