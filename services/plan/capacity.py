"""Tokens per second, what saturates first, and cost, from demand and deployment.

The deployment is full: every proposer always has the same number of sequences (a closed system),
the one at which most tokens come out. A sequence either decodes or stands still while the LLM is
asked. Little's law gives how many stand still, bisection the rate at which everything fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from services.plan.costs import Step
from services.plan.demand import Demand, Traffic, demand_of
from services.plan.deployment import Deployment, RolePlan

# A query comes while a forward runs, waits for its rest (half of it on average), then for its own.
ROUNDS = 1.5
HOUR_S = 3600.0
BISECTIONS = 24  # to one part in ten million
SLOT_CHOICES = 24


@dataclass(frozen=True, kw_only=True)
class ModePlan:
    """What one mode makes of the deployment.

    alone: tokens a second of one request on an idle service. at_once: sequences of one proposer at
    which most comes out. total: tokens a second of the whole deployment with so many. per_proposer:
    its share of one replica. llm_read: tokens that the LLM reads per token of the
    answer. selector_busy: share of what selectors could answer. feeds: proposers that one selector
    can feed. cost: dollars per million tokens of the roles that the mode needs, in the numbers that
    are deployed; balanced: in the numbers that are used up. saturates: what gives out first.
    """

    mode: str
    alone: float
    at_once: int
    per_proposer: float
    total: float
    llm_read: float
    selector_busy: float | None
    feeds: float | None
    cost: float
    balanced: float
    saturates: str


def plan_mode(mode: str, deployment: Deployment, traffic: Traffic) -> ModePlan | None:
    """None: there are no proposers, or the mode needs an LLM and there is none."""
    demand = demand_of(mode, traffic)
    if not deployment.proposer.replicas or demand.queries and deployment.selector is None:
        return None
    loads = [Load(demand, traffic, deployment, slots) for slots in _slot_choices(deployment)]
    load = max(loads, key=lambda load: load.most_answers())
    answers = load.most_answers()
    total = answers * traffic.new
    seconds = load.proposer_seconds() if demand.slm_steps else 0.0
    proposer, selector = deployment.proposer, deployment.selector
    price = proposer.price if demand.slm_steps else 0.0
    used = seconds * proposer.devices * proposer.device.price
    busy = feeds = None
    if demand.queries and selector is not None:
        price += selector.price
        most = load.most_queries()
        busy = answers * demand.queries / (most * selector.replicas)
        used += demand.queries / most * selector.devices * selector.device.price
        if demand.slm_steps:
            feeds = most / (demand.queries / seconds)
    return ModePlan(
        mode=mode,
        alone=traffic.new / load.seconds_alone(),
        at_once=int(load.slots),
        per_proposer=total / proposer.replicas,
        total=total,
        llm_read=demand.llm_tokens / traffic.new,
        selector_busy=busy,
        feeds=feeds,
        cost=1e6 * price / HOUR_S / total,
        balanced=1e6 * used / HOUR_S / traffic.new,
        saturates=_saturates(load, busy),
    )


def most_slots(proposer: RolePlan) -> int:
    """Sequences that one proposer may have at once."""
    return max(1, min(proposer.slots, proposer.memory.contexts))


def _slot_choices(deployment: Deployment) -> Iterator[float]:
    """Numbers of sequences to try, all of them first."""
    most = most_slots(deployment.proposer)
    for i in range(SLOT_CHOICES):
        yield max(1.0, float(round(most ** (1 - i / SLOT_CHOICES))))


@dataclass(frozen=True)
class Load:
    """A demand on a deployment. slots: sequences that each proposer has at once."""

    demand: Demand
    traffic: Traffic
    deployment: Deployment
    slots: float

    # -- proposers --------------------------------------------------------------------------------

    def proposer_step(self, running: float) -> Step:
        """A step in which so many sequences decode.

        Prompts that are read and candidates that are scored are spread evenly over the steps. A
        step is a mixed one unless no sequence reads its prompt or scores candidates:
        1 - (1 - q)^S. That matters on a GPU, where only steps of single tokens are recorded.
        """
        demand, traffic = self.demand, self.traffic
        chunks = max(1.0, traffic.prompt / traffic.chunk)
        q = min(1.0, (demand.scorings + chunks) / demand.slm_steps)
        if not self.deployment.proposer.device.is_gpu:
            q = 0.0
        return Step(
            sequences=running,
            tokens=running * demand.slm_tokens / demand.slm_steps,
            context=traffic.context,
            mixed=1.0 - (1.0 - q) ** running,
            watched=running * demand.watched,
            requests=running / demand.slm_steps,
        )

    def step_seconds(self, running: float) -> float:
        return self.deployment.proposer.cost.seconds(self.proposer_step(running))

    def proposer_seconds(self) -> float:
        """Of one replica for one answer, with all its sequences decoding."""
        return self.step_seconds(self.slots) * self.demand.slm_steps / self.slots

    # -- selectors ----------------------------------------------------------------------------

    @property
    def _selector(self) -> RolePlan:
        assert self.deployment.selector is not None
        return self.deployment.selector

    @cached_property
    def in_flight(self) -> float:
        """Sequences of all proposers, per selector."""
        return self.slots * self.deployment.proposer.replicas / self._selector.replicas

    @cached_property
    def kept(self) -> float:
        """Share of the contexts that a selector still holds when they are asked about again."""
        return min(1.0, self._selector.memory.contexts / self.in_flight)

    @cached_property
    def tokens_per_query(self) -> float:
        """That the LLM reads; a context that it no longer holds is read anew."""
        read = self.demand.llm_tokens / self.demand.queries
        return self.kept * read + (1.0 - self.kept) * max(read, self.traffic.context)

    def selector_step(self, queries: float) -> Step:
        """The forwards that answer so many queries together. In mode llm each request is the LLM's
        own."""
        demand, tokens = self.demand, queries * self.tokens_per_query
        return Step(
            sequences=queries,
            tokens=tokens,
            context=self.traffic.context,
            requests=0.0 if demand.slm_steps else queries / demand.queries,
            forwards=max(1.0, tokens / self.deployment.step_tokens),
        )

    def selector_seconds(self, queries: float) -> float:
        return self._selector.cost.seconds(self.selector_step(queries))

    def most_queries(self) -> float:
        """A second, of one selector."""
        together = max(1.0, min(self._selector.slots, self.in_flight))
        return together / self.selector_seconds(together)

    def together(self, rate: float) -> float:
        """Queries that a selector answers in one round at so many a second: those that came during
        the last round."""
        low, high = 0.0, max(1.0, min(self._selector.slots, self.in_flight))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if middle / self.selector_seconds(middle) < rate:
                low = middle
            else:
                high = middle
        return high

    def latency(self, rate: float) -> float:
        """Seconds of a query at so many a second of one selector."""
        rounds = ROUNDS if self.demand.slm_steps else 1.0  # in mode llm all ask at once
        return rounds * self.selector_seconds(self.together(rate)) + self.deployment.hop

    # -- both -------------------------------------------------------------------------------------

    def most_answers(self) -> float:
        """A second, of the whole deployment."""
        low, high = 0.0, 1.0
        while self.can(high):
            low, high = high, 2 * high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.can(middle):
                low = middle
            else:
                high = middle
        return low

    def can(self, answers: float) -> bool:
        """Whether the deployment can finish so many answers a second."""
        demand, replicas = self.demand, self.deployment.proposer.replicas
        parked = busy = 0.0
        if demand.queries:
            rate = answers * demand.queries / self._selector.replicas
            if rate > self.most_queries():
                return False
            parked = answers * demand.queries * demand.waits * self.latency(rate) / replicas
            busy = rate / self.most_queries()
        running = self.slots - parked
        if running <= 0:
            return False
        if not demand.slm_steps:
            return True
        needed = answers * demand.slm_steps * self.step_seconds(running) / running / replicas
        return needed <= 1.0 and (not self.deployment.shared or needed + busy <= 1.0)

    def seconds_alone(self) -> float:
        """Of one answer on an idle deployment. The LLM keeps what it has read."""
        demand, seconds = self.demand, 0.0
        if demand.slm_steps:
            seconds = demand.slm_steps * self.step_seconds(1.0)
        if demand.queries:
            tokens = demand.llm_tokens / demand.queries
            query = replace(self.selector_step(1.0), tokens=tokens, forwards=1.0)
            waited = self._selector.cost.seconds(query) + self.deployment.hop
            seconds += demand.queries * demand.waits * waited
        return seconds


def _saturates(load: Load, selector_busy: float | None) -> str:
    """What gives out first."""
    proposer, selector = load.deployment.proposer, load.deployment.selector
    most = most_slots(proposer)
    if selector is not None and selector_busy is not None:
        if load.slots < most:  # with more, the LLM would read contexts anew
            return "selector KV"
        if selector_busy > 0.95:
            if load.in_flight > selector.slots:
                return "selector slots"
            return "selector prefill" if load.demand.slm_steps else "selector decode"
    if proposer.memory.contexts < proposer.slots:
        return "proposer KV"
    if load.deployment.shared and selector_busy:
        return "shared device"
    return "proposer decode" if load.demand.slm_steps else "proposer slots"
