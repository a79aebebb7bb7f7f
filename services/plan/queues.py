"""The queues of a deployment, simulated event by event (simpy).

Requests come at random (Poisson). Each takes a place at the less busy of two proposers, as Serve
chooses, and decodes until a step triggers. Then it asks its selector, which answers in rounds all
queries that have come meanwhile, and goes on. A run of tokens between two triggers is one event: it
lasts as many steps as tokens, each as long as a step of the sequences that run when it begins.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import simpy

from services.plan.capacity import Load, most_slots
from services.plan.costs import ForwardCost, Step
from services.plan.demand import WARMUP_STEPS, Traffic, demand_of
from services.plan.deployment import Deployment

SIMULATED = "s2t entropy"
LIFETIMES = 4.0  # of an answer, simulated; the first quarter is warm-up
MOST_ANSWERS = 40_000  # of one simulation
MIN_ANSWERS = 300
Process = Generator[simpy.Event, None, None]


@dataclass(frozen=True, kw_only=True)
class QueuePoint:
    """What was seen with so many proposers per selector.

    Seconds. query: a query's wait beyond an idle LLM's answer. answer: an answer's time beyond an
    idle deployment's. Utilisation: share of the places that were taken, and of the time in which
    selectors worked. unfinished: share of the answers that were not done soon after the arrivals
    ended: much of it says that the queues grow without bound.
    """

    proposers_per_selector: float
    proposers: int
    selectors: int
    answers: int
    query_p50: float
    query_p99: float
    answer_p50: float
    answer_p99: float
    proposer_utilisation: float
    selector_utilisation: float
    unfinished: float


def sweep(
    deployment: Deployment,
    traffic: Traffic,
    proposers: int,
    load: float,
    ratios: Sequence[float],
    seed: int = 0,
) -> Iterator[QueuePoint]:
    """One simulation per number of proposers per selector, of so many proposers in all.

    load: of what the proposers could do if the LLM answered at once, as requests come.
    """
    rate = load * requests_per_second(deployment, traffic)
    for ratio in ratios:
        selectors = max(1, round(proposers / ratio))
        yield simulate(deployment, traffic, proposers, selectors, rate * proposers, seed)


def requests_per_second(deployment: Deployment, traffic: Traffic) -> float:
    """That one proposer could finish if the LLM answered at once."""
    demand = replace(demand_of(SIMULATED, traffic), queries=0.0, llm_tokens=0.0)
    one = replace(deployment, proposer=replace(deployment.proposer, replicas=1))
    return Load(demand, traffic, one, float(most_slots(deployment.proposer))).most_answers()


def simulate(
    deployment: Deployment,
    traffic: Traffic,
    proposers: int,
    selectors: int,
    requests_per_second: float,
    seed: int = 0,
) -> QueuePoint:
    """Poisson arrivals for some lifetimes of an answer, then until most are done."""
    world = _World(deployment, traffic, proposers, selectors, seed)
    rate = requests_per_second
    wanted = LIFETIMES * world.load.seconds_alone() * rate * 2
    answers = int(min(MOST_ANSWERS, max(MIN_ANSWERS, wanted)))
    arrivals_s = answers / rate
    world.env.process(world.arrivals(rate, arrivals_s))
    world.env.run(until=arrivals_s)
    world.take(0)
    busy = sum(s.busy_s for s in world.selectors) / selectors / arrivals_s
    taken = world.place_seconds / (proposers * world.slots * arrivals_s)
    world.env.run(until=arrivals_s + LIFETIMES * world.load.seconds_alone())
    late = [a for a in world.added if a.began >= arrivals_s / 4] or world.added
    return QueuePoint(
        proposers_per_selector=proposers / selectors,
        proposers=proposers,
        selectors=selectors,
        answers=world.arrived,
        query_p50=_percentile(world.query_waits, 50),
        query_p99=_percentile(world.query_waits, 99),
        answer_p50=_percentile([a.seconds for a in late], 50),
        answer_p99=_percentile([a.seconds for a in late], 99),
        proposer_utilisation=min(1.0, taken),
        selector_utilisation=min(1.0, busy),
        unfinished=1.0 - len(world.added) / max(1, world.arrived),
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


@dataclass(frozen=True)
class _Added:
    """What one answer took beyond an idle deployment."""

    began: float
    seconds: float


@dataclass
class _Proposer:
    """places: sequences that it may have. running: of them, those that decode."""

    places: simpy.Resource
    running: int = 0

    @property
    def load(self) -> int:
        return self.places.count + len(self.places.queue)


@dataclass
class _Selector:
    """An LLM that answers in rounds. context: mean tokens that a query attends to. contexts: of
    which it keeps the keys and values."""

    env: simpy.Environment
    cost: ForwardCost
    context: float
    contexts: int
    step_tokens: int
    waiting: list[tuple[float, simpy.Event]] = field(default_factory=list)
    wake: simpy.Event | None = None
    live: int = 0
    busy_s: float = 0.0

    def ask(self, tokens: float) -> simpy.Event:
        """The event of the answer; `tokens` are to be read for it."""
        answered = self.env.event()
        self.waiting.append((tokens, answered))
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()
        return answered

    def seconds(self, queries: int, tokens: float) -> float:
        """Of the forwards that answer so many queries."""
        step = Step(
            sequences=queries,
            tokens=tokens,
            context=self.context,
            forwards=max(1.0, tokens / self.step_tokens),
        )
        return self.cost.seconds(step)

    def run(self) -> Process:
        while True:
            if not self.waiting:
                self.wake = self.env.event()
                yield self.wake
            batch = self._next_batch()
            tokens = sum(read for read, _ in batch)
            seconds = self.seconds(len(batch), tokens)
            yield self.env.timeout(seconds)
            self.busy_s += seconds
            for _, answered in batch:
                answered.succeed()

    def _next_batch(self) -> list[tuple[float, simpy.Event]]:
        """The oldest queries that one forward has room for, at least one."""
        tokens, count = 0.0, 0
        for read, _ in self.waiting:
            if count and tokens + read > self.step_tokens:
                break
            tokens += read
            count += 1
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        return batch


class _World:
    """All processes of one simulation, and what they saw."""

    def __init__(
        self, deployment: Deployment, traffic: Traffic, proposers: int, selectors: int, seed: int
    ) -> None:
        assert deployment.selector is not None, "there is no queue without an LLM"
        self.env = simpy.Environment()
        self.traffic = traffic
        self.hop = deployment.hop
        self.slots = most_slots(deployment.proposer)
        self.load = Load(demand_of(SIMULATED, traffic), traffic, deployment, float(self.slots))
        self.steps = [self.load.step_seconds(float(n)) for n in range(1, self.slots + 1)]
        self.proposers = [
            _Proposer(simpy.Resource(self.env, capacity=self.slots)) for _ in range(proposers)
        ]
        role = deployment.selector
        self.selectors = [
            _Selector(
                self.env, role.cost, traffic.context, role.memory.contexts, deployment.step_tokens
            )
            for _ in range(selectors)
        ]
        for selector in self.selectors:
            self.env.process(selector.run())
        self.random = random.Random(seed)
        self.arrived = 0
        self.added: list[_Added] = []
        self.query_waits: list[float] = []
        self.place_seconds = 0.0
        self._taken, self._counted_at = 0, 0.0

    def arrivals(self, rate: float, seconds: float) -> Process:
        while True:
            yield self.env.timeout(self.random.expovariate(rate))
            if self.env.now > seconds:
                return
            self.arrived += 1
            self.env.process(self.answer())

    def answer(self) -> Process:
        """One request's way."""
        began, idle = self.env.now, 0.0
        pick = self.random.choice
        proposer = min(pick(self.proposers), pick(self.proposers), key=lambda p: p.load)
        selector = pick(self.selectors)
        asked = False
        with proposer.places.request() as place:
            yield place
            self.take(1)
            left, unread = self.traffic.new, self.traffic.prompt
            while left > 0:
                to_trigger = self._tokens_to_trigger(not asked)
                asks = to_trigger <= left
                run = min(left, to_trigger)
                proposer.running += 1
                yield self.env.timeout(run * self.steps[proposer.running - 1] + asks * self.hop)
                proposer.running -= 1
                idle += run * self.steps[0] + asks * self.hop
                left, unread = left - run, unread + run
                if asks:
                    selector.live += not asked
                    asked = True
                    idle += yield from self._select(selector, unread)
                    unread = 0.0
            selector.live -= asked
            self.take(-1)
        self.added.append(_Added(began, self.env.now - began - idle))

    def take(self, places: int) -> None:
        """Count place-seconds, and places from now on."""
        self.place_seconds += self._taken * (self.env.now - self._counted_at)
        self._taken += places
        self._counted_at = self.env.now

    def _tokens_to_trigger(self, first: bool) -> float:
        """Geometric: the trigger is the run's last token."""
        tokens = math.ceil(math.log(1.0 - self.random.random()) / math.log1p(-self.traffic.budget))
        return max(1.0, tokens) + (WARMUP_STEPS if first else 0)

    def _select(self, selector: _Selector, unread: float) -> Generator[simpy.Event, None, float]:
        """Ask, and wait. Returns the seconds that an idle LLM would have taken."""
        if selector.live > selector.contexts:
            kept = self.random.random() < selector.contexts / selector.live
            unread = unread if kept else max(unread, self.traffic.context)
        alone = selector.seconds(1, unread)
        asked_at = self.env.now
        yield selector.ask(unread)
        self.query_waits.append(self.env.now - asked_at - alone)
        return alone
