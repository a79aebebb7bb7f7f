"""A proposer under an open load, on a simulated clock: the real admission and the real engine over
a scripted SLM. Nothing waits, so a minute of load takes a second, and every run is the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import AnswerBuilder, EncodedRequest
from s2t_shared.decode.scripted import ScriptedSLM
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import OverloadedError, S2TError
from s2t_shared.types import DecodeOptions, GenerateRequest, Prompt
from services.serve.admission import Admission

WORDS = [f"w{i}" for i in range(200)]
LENGTHS = (20, 60)  # tokens of an answer, evenly spread; its request allows MAX_NEW_TOKENS
MAX_NEW_TOKENS = 100


@dataclass
class SimulatedClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests per second, for how long, each with how long a client waits for its answer."""

    rate: float
    seconds: float
    deadline_s: float
    client: str = ""
    seed: int = 0

    def arrivals(self) -> Iterator[tuple[float, int]]:
        """When each request comes, and how long its answer is."""
        drawn = random.Random(self.seed)
        at = drawn.expovariate(self.rate)
        while at < self.seconds:
            yield at, drawn.randint(*LENGTHS)
            at += drawn.expovariate(self.rate)


@dataclass(frozen=True)
class Outcome:
    """How one request ended: seconds from its arrival, and its error."""

    client: str
    arrived: float
    seconds: float
    error: S2TError | None = None


@dataclass
class Tally:
    """What became of a load."""

    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    wasted_tokens: int = 0  # decoded for answers that came too late

    @property
    def goodput(self) -> float:
        """Answers in time, per second."""
        return len(self._answered) / self.seconds

    @property
    def p99(self) -> float:
        """Of the answers' seconds."""
        ordered = sorted(outcome.seconds for outcome in self._answered)
        return ordered[int(0.99 * (len(ordered) - 1))]

    @property
    def refusals(self) -> list[OverloadedError]:
        return [o.error for o in self.outcomes if isinstance(o.error, OverloadedError)]

    @property
    def _answered(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is None]

    def of(self, client: str) -> Tally:
        return Tally(self.seconds, [o for o in self.outcomes if o.client == client])


class SimulatedProposer:
    """slots: sequences in the batch. step_s: of one forward."""

    def __init__(self, slots: int = 4, step_s: float = 0.025, max_queue_s: float = 0.0) -> None:
        self.clock = SimulatedClock()
        self._slm = ScriptedSLM(WORDS, step_s=step_s, sleep=self.clock.sleep)
        self.engine = Engine(self._slm, max_num_seqs=slots, clock=self.clock)
        self.admission = Admission(
            lambda: self.engine.capacity,
            max_ongoing_requests=10_000,
            max_queue_s=max_queue_s,
            clock=self.clock,
        )
        self.capacity = slots / (sum(LENGTHS) / 2 * step_s)  # requests per second
        self._ongoing: dict[LiveSequence, tuple[AnswerBuilder, ExitStack, Outcome]] = {}

    def slow_down(self, times: float) -> None:
        """Each forward takes so many times as long from now on."""
        self._slm.step_s *= times

    def run(self, *loads: Load) -> Tally:
        """Offer the loads together, until the last request has ended."""
        tally = Tally()
        start = self.clock.now
        coming = [
            (start + at, load.client, length, load)
            for load in loads
            for at, length in load.arrivals()
        ]
        coming.sort(key=lambda arrival: arrival[0], reverse=True)
        while coming or not self.engine.idle:
            if self.engine.idle:
                self.clock.now = max(self.clock.now, coming[-1][0])
            while coming and coming[-1][0] <= self.clock.now:
                at, client, length, load = coming.pop()
                self._offer(Outcome(client, at, 0.0), length, load.deadline_s, tally)
            for sequence, steps in self.engine.step():
                builder, place, outcome = self._ongoing[sequence]
                builder.push(sequence, steps)
                if builder.done:
                    place.close()
                    self._end(outcome, self._error(builder, tally), tally)
        tally.seconds = self.clock.now - start
        assert len(self.admission) == 0 and self._slm.open_sequences == 0
        return tally

    def _offer(self, outcome: Outcome, length: int, deadline_s: float, tally: Tally) -> None:
        request = GenerateRequest(
            request_id=f"{outcome.client}{outcome.arrived}",
            prompt=Prompt(token_ids=(1,)),
            options=DecodeOptions(max_new_tokens=MAX_NEW_TOKENS),
            stop=(WORDS[length - 1],),
            client=outcome.client,
            timeout_s=outcome.arrived + deadline_s - self.clock.now,
        )
        place = ExitStack()
        try:
            ticket = place.enter_context(self.admission.admit(request))
        except S2TError as error:
            self._end(outcome, error, tally)
            return
        encoded = EncodedRequest(
            request=request,
            token_ids=(1,),
            deadline=ticket.deadline,
            start_by=ticket.start_by,
            turn=ticket.turn,
        )
        builder = AnswerBuilder(encoded, self._slm.tokenizer, self.engine)
        ticket.sequences = builder.sequences
        self._ongoing[builder.sequences[0]] = (builder, place, outcome)

    def _error(self, builder: AnswerBuilder, tally: Tally) -> S2TError | None:
        try:
            builder.answer("")
        except S2TError as error:
            tally.wasted_tokens += sum(len(s.steps) for s in builder.sequences)
            return error
        return None

    def _end(self, outcome: Outcome, error: S2TError | None, tally: Tally) -> None:
        seconds = self.clock.now - outcome.arrived
        tally.outcomes.append(Outcome(outcome.client, outcome.arrived, seconds, error))
