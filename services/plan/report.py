"""A plan as values, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from s2t_shared.config import Config
from services.plan.capacity import ModePlan, plan_mode
from services.plan.demand import MODES, Traffic
from services.plan.deployment import Assumptions, Deployment, RolePlan, deployment_of
from services.plan.devices import BANDWIDTH_SHARE, FLOPS_SHARE
from services.plan.queues import QueuePoint

Input = tuple[str, str, str]  # what, value, whether measured, published, assumed or given


@dataclass(frozen=True)
class Plan:
    """A deployment, what each mode makes of it, and where every input comes from."""

    traffic: Traffic
    deployment: Deployment
    modes: tuple[ModePlan, ...]
    inputs: tuple[Input, ...]
    queues: tuple[QueuePoint, ...] = ()

    def as_json(self) -> dict[str, Any]:
        inputs = [dict(zip(("what", "value", "source"), row, strict=True)) for row in self.inputs]
        return {**asdict(self), "inputs": inputs}

    def troubles(self) -> list[str]:
        """Why the deployment would not start."""
        return [role.memory.trouble for role in roles(self.deployment) if role.memory.trouble]

    def notes(self) -> list[str]:
        """What was left out, and why."""
        if not self.deployment.proposer.replicas:
            return ["no proposers here: plan the configuration that has them"]
        if self.deployment.selector is None:
            return ["modes that ask the LLM are left out: none is named; --llm, --llm-device"]
        return []

    def tables(self) -> Iterator[Table]:
        yield _memory_table(self.deployment)
        yield _mode_table(self.modes)
        if self.queues:
            yield _queue_table(self.queues)
        yield _input_table(self.inputs)


def make_plan(config: Config, traffic: Traffic, given: Assumptions) -> Plan:
    """Raises ConfigError, ModelLoadError: a device or a model is unknown."""
    deployment = deployment_of(config, traffic, given)
    found = (plan_mode(mode, deployment, traffic) for mode in MODES)
    modes = tuple(mode for mode in found if mode is not None)
    return Plan(traffic, deployment, modes, tuple(_inputs(deployment, traffic, given)))


def roles(deployment: Deployment) -> list[RolePlan]:
    """Proposer and, where there is one, selector."""
    found = [deployment.proposer, deployment.selector]
    return [role for role in found if role is not None]


def _inputs(deployment: Deployment, traffic: Traffic, given: Assumptions) -> Iterator[Input]:
    answers = f"{traffic.prompt:g} + {traffic.new:g} tokens, {traffic.budget:.1%} of steps trigger"
    yield "prompt + answer", answers, "given"
    for name, role in zip(("slm", "llm"), roles(deployment), strict=False):
        if name in given.measured:
            yield f"{name}: forwards", _cost_text(role), f"measured: {given.measured_on}"
            continue
        device = role.device
        if not role.named:
            yield f"{name}: device", device.name, f"assumed; give yours: --{name}-device"
        rates = f"{device.bandwidth / 1e12:.3g} TB/s, {device.flops / 1e12:.3g} TFLOP/s"
        yield f"{name}: {device.name}", rates, "published" if device.is_gpu else "measured once"
        share = f"{BANDWIDTH_SHARE:.0%} of the one, {FLOPS_SHARE:.0%} of the other are reached"
        yield f"{name}: efficiency", share, "assumed"
        yield f"{name}: forwards", _cost_text(role), "from these and assumed host times"
    if deployment.hop:
        yield "a query's way", f"{1e3 * deployment.hop:g} ms", "assumed (0.8 measured on loopback)"
    for device in {role.device for role in roles(deployment)}:
        source = "given" if device.name in given.prices else "assumed; give yours: --gpu-cost"
        yield f"{device.name} an hour", f"$ {device.price:g}", source


def _cost_text(role: RolePlan) -> str:
    cost = role.cost
    parts = [f"{1e3 * cost.per_step:.3g} ms a step", f"{1e3 * cost.per_sequence:.2g} a sequence"]
    if cost.weights:
        parts.append(f"{1e3 * cost.weights:.3g} to read the weights")
    parts.append(f"{1e3 * cost.per_token:.2g} a token")
    return ", ".join(parts)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=name == "mode", overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _memory_table(deployment: Deployment) -> Table:
    right = ["weights GiB", "KV GiB", "working GiB", "device has GiB", "contexts in KV", "fits"]
    table = _table("Memory of one replica", ["role", "model", "replicas"], right)
    for name, role in zip(("proposer", "selector"), roles(deployment), strict=False):
        memory = role.memory
        table.add_row(
            name,
            role.model,
            f"{role.replicas} x {role.devices:g} {role.device.name}",
            f"{memory.weights:.3g}",
            f"{memory.kv:.3g}",
            f"{memory.working:.3g}",
            "not checked" if memory.free is None else f"{memory.free:.3g}",
            f"{memory.contexts:,}",
            "NO" if memory.trouble else "yes",
        )
    return table


LEGEND = (
    "alone: tokens a second of one request on an idle service. full: of the whole deployment, at "
    "the number of sequences (at once, per proposer) that gives most; replica: a proposer's share. "
    "reads: tokens that the LLM reads per token of the answer. busy: of what the selectors could "
    "do. feeds: proposers that one selector can feed. $/1M: dollars per million tokens, of the "
    "roles that the mode needs, as deployed; balanced: with as much of each as is used up."
)


def _mode_table(modes: tuple[ModePlan, ...]) -> Table:
    right = ["alone", "full", "replica", "at once", "reads", "busy", "feeds", "$/1M", "balanced"]
    table = _table("Modes (estimates)", ["mode"], right)
    table.add_column("saturates", no_wrap=True)
    table.caption, table.caption_justify = LEGEND, "left"
    for mode in modes:
        table.add_row(
            mode.mode.removesuffix(" entropy") if mode.mode.startswith("s2t_local") else mode.mode,
            f"{mode.alone:,.0f}",
            f"{mode.total:,.0f}",
            f"{mode.per_proposer:,.0f}",
            f"{mode.at_once}",
            f"{mode.llm_read:.2f}",
            "" if mode.selector_busy is None else f"{mode.selector_busy:.0%}",
            "" if mode.feeds is None else f"{mode.feeds:.3g}",
            f"{mode.cost:.3g}",
            f"{mode.balanced:.3g}",
            mode.saturates,
        )
    return table


QUEUE_LEGEND = (
    "Seconds more than on an idle deployment, in mode s2t by entropy, of a query to the LLM and of "
    "a whole answer; taken: share of the proposers' places; busy: of the selectors' time. Where "
    "answers stay unfinished, the queues grow without bound."
)


def _queue_table(queues: tuple[QueuePoint, ...]) -> Table:
    right = ["selectors", "query p50", "p99", "answer p50", "p99", "taken", "busy", "unfinished"]
    title = f"Queues, simulated: {queues[0].proposers} proposers, requests at random"
    table = _table(title, [], ["proposers per selector", *right])
    table.caption, table.caption_justify = QUEUE_LEGEND, "left"
    for point in queues:
        table.add_row(
            f"{point.proposers_per_selector:.3g}",
            f"{point.selectors}",
            f"{point.query_p50:.3f}",
            f"{point.query_p99:.3f}",
            f"{point.answer_p50:.2f}",
            f"{point.answer_p99:.2f}",
            f"{point.proposer_utilisation:.0%}",
            f"{point.selector_utilisation:.0%}",
            f"{point.unfinished:.0%}",
        )
    return table


def _input_table(inputs: tuple[Input, ...]) -> Table:
    table = _table("Where the numbers come from", ["what", "value", "source"], [])
    for row in inputs:
        table.add_row(*row)
    return table
