"""A plan as a picture: what more proposers give, what a request alone gets, what tokens cost, and
how long queries wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.plan.capacity import ModePlan, plan_mode
from services.plan.deployment import Deployment
from services.plan.queues import QueuePoint
from services.plan.report import Plan

PROPOSERS = (1, 2, 4, 8, 16, 32, 64, 128)
COLOURS = {  # of a mode in every plot; by Okabe and Ito, told apart by colour-blind people
    "greedy": "#777777",
    "s2t_local entropy": "#009e73",
    "s2t entropy": "#0072b2",
    "s2t kl": "#56b4e9",
    "takeover entropy": "#cc79a7",
    "llm": "#d55e00",
}


def draw(plan: Plan, queues: Sequence[QueuePoint], file: Path) -> None:
    """Write an SVG. Without simulated queues it has three plots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s2t"
    from matplotlib import pyplot

    modes = [mode for mode in plan.modes if mode.mode != "takeover entropy"]  # costs what s2t does
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7))
    _growth(axes[0, 0], plan, modes)
    _bars(axes[0, 1], modes, "alone", "tokens per second of one request alone")
    _bars(axes[1, 0], modes, "balanced", "dollars per million tokens, all devices in use")
    if queues:
        _waits(axes[1, 1], queues)
    else:
        axes[1, 1].axis("off")
    figure.suptitle(_title(plan), fontsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _title(plan: Plan) -> str:
    roles = [plan.deployment.proposer, plan.deployment.selector]
    models = " + ".join(
        f"{role.model.rpartition('/')[2]} on {role.device.name}" for role in roles if role
    )
    traffic = plan.traffic
    answers = f"prompts of {traffic.prompt:g}, answers of {traffic.new:g} tokens"
    return f"Estimates: {models}; {answers}, {traffic.budget:.1%} of steps trigger"


def _growth(axis: Any, plan: Plan, modes: Sequence[ModePlan]) -> None:
    """Tokens per second of one selector with its proposers."""
    for mode in modes:
        found = [plan_mode(mode.mode, _with(plan.deployment, n), plan.traffic) for n in PROPOSERS]
        totals = [one.total if one else 0.0 for one in found]
        axis.plot(
            PROPOSERS,
            totals,
            marker="o",
            markersize=3,
            color=COLOURS[mode.mode],
            linestyle="--" if mode.mode == "greedy" else "-",
            label=mode.mode.removesuffix(" entropy"),
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(PROPOSERS, [str(n) for n in PROPOSERS])
    axis.minorticks_off()
    axis.set_xlabel("proposers, with one selector", fontsize=8)
    axis.set_title("tokens per second", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _with(deployment: Deployment, proposers: int) -> Deployment:
    """So many proposers and one selector, each on devices of its own."""
    selector = deployment.selector
    return replace(
        deployment,
        proposer=replace(deployment.proposer, replicas=proposers),
        selector=replace(selector, replicas=1) if selector is not None else None,
        shared=False,
    )


def _bars(axis: Any, modes: Sequence[ModePlan], field: str, title: str) -> None:
    names = [mode.mode.removesuffix(" entropy") for mode in modes]
    values = [getattr(mode, field) for mode in modes]
    bars = axis.barh(names, values, color=[COLOURS[mode.mode] for mode in modes])
    axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], fontsize=8, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)


def _waits(axis: Any, queues: Sequence[QueuePoint]) -> None:
    x = [point.proposers_per_selector for point in queues]
    axis.plot(x, [p.query_p50 for p in queues], marker="o", markersize=3, label="query, p50")
    axis.plot(x, [p.query_p99 for p in queues], marker="o", markersize=3, label="query, p99")
    axis.plot(x, [p.answer_p99 for p in queues], marker="o", markersize=3, label="answer, p99")
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=0)
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    axis.set_ylabel("seconds more than on an idle service", fontsize=8)
    axis.set_xlabel("proposers per selector", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    busy = axis.twinx()
    busy.plot(x, [p.selector_utilisation for p in queues], color="#777777", linestyle=":")
    busy.set_ylim(0, 1.05)
    busy.set_ylabel("selectors busy (dotted)", fontsize=8)
    busy.tick_params(labelsize=8)
    axis.set_title(f"waits in s2t, simulated, {queues[0].proposers} proposers", fontsize=9)
    axis.legend(fontsize=8)
