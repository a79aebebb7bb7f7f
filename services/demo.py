"""`s2t demo`: the whole loop on one machine with the bundled pair. Every number it prints was
measured in this run.

serve -> ask held-out problems in every mode -> harvest -> train -> swap under load -> ask again ->
table
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from s2t_shared.bundled import SLM_DIR, problems
from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pb.v1 import generation_pb2 as pb
from services.client import Client
from services.evaluation import (
    ModeResult,
    ModeSpec,
    Problem,
    as_rows,
    bundled_problems,
    local_sufficiency,
    run_mode,
    table,
)
from services.harvest.harvest import harvest, pair_prompts
from services.harvest.rollouts import ByService, HarvestOptions
from services.launch.local import RunningService, running_service
from services.rpc.ask_many import Target, answer_all
from services.train.job import TrainOutcome, train

MAX_NEW_TOKENS = 40
BUDGET = 0.05
BEFORE = (
    ModeSpec("greedy"),
    ModeSpec("majority@8"),
    ModeSpec("takeover", "kl", BUDGET),
    ModeSpec("takeover", "entropy", BUDGET),
    ModeSpec("s2t", "kl", BUDGET),
    ModeSpec("s2t", "entropy", BUDGET),
    ModeSpec("llm"),
)
AFTER = (ModeSpec("s2t_local", "entropy", BUDGET),)
KEYS = {
    "takeover kl 5%": "takeover",
    "s2t kl 5%": "s2t",
    "s2t_local entropy 5%": "s2t_local",
}  # of the JSON file


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo asks, harvests and trains."""

    problems: int = 200
    first_harvest: int = 600
    harvest: int = 4000
    first_steps: int = 150
    steps: int = 1200


@dataclass
class SwapReport:
    """What a swap did to the requests that were under way."""

    in_flight: int = 0
    failed: int = 0
    mixed: int = 0
    old: int = 0
    new: int = 0


def run_demo(
    json_file: Path | None = None,
    size: DemoSize = DemoSize(),
    console: Console | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Run it all; returns (and writes) the numbers. Leaves nothing running and no files but
    `json_file`."""
    console = console or Console(highlight=False, width=max(110, Console().width))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="s2t-demo-") as scratch:
        config = load_config(
            overrides={
                "data_dir": str(data_dir or scratch),
                "gateway.port": 0,
                "defaults.answer_pattern": problems.ANSWER_PATTERN,
                "training.learning_rate": 3e-3,
                "training.workers": 2,
                "training.cpus_per_worker": 0.25,
            }
        )

        def say(line: str) -> None:
            console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {line}")

        say(
            "starting Redis, Ray, selector (LLM), proposer (SLM) and gateway; this takes about half a minute"
        )
        with running_service(config, say) as service:
            say(f"service ready at {service.address} (gRPC)")
            report = run_loop(service, size, say, console)
        report["seconds"] = round(time.perf_counter() - started, 1)
        say("everything stopped")
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {str(json_file)!r}: {error.strerror}") from error
    return report


def run_loop(
    service: RunningService, size: DemoSize, say: Callable[[str], None], console: Console
) -> dict[str, Any]:
    target = Target(service.address)
    held_out = bundled_problems(size.problems)
    run_mode(
        target, BEFORE[0], held_out[:64], MAX_NEW_TOKENS
    )  # first calls are slow; greedy's time is the yardstick
    results = [_ask(target, spec, held_out, say) for spec in BEFORE]
    hits = local_sufficiency(target, held_out, MAX_NEW_TOKENS)
    say(
        "local sufficiency at the top 5 % KL steps: "
        + ", ".join(f"Hit@{k} {v:.2f}" for k, v in hits.items())
    )

    training = problems.problems("train", size.harvest)
    _harvest(service, training[: size.first_harvest], say)
    first = _train(service.config, size.first_steps, say)
    _make_live(service, first, say)
    _harvest(service, training[size.first_harvest :], say)
    second, swap = _swap_under_load(service, target, held_out, size, say)
    results += [_ask(target, spec, held_out, say) for spec in AFTER]

    _print_results(console, results, hits, second, swap)
    _print_marked_answer(console, target, held_out)
    return {
        "modes": {KEYS.get(label, label): row for label, row in as_rows(results).items()},
        "hit_at": {str(k): v for k, v in hits.items()},
        "agree_at_1": second.metrics["agree_at_1"],
        "swap": {"in_flight": swap.in_flight, "failed": swap.failed, "mixed": swap.mixed},
        "training": {
            "version": second.version,
            "labels": second.training_labels,
            "held_out": second.held_out_labels,
            "metrics": second.metrics,
            "agree_at_1_before": second.live_agree_at_1,
        },
    }


def _ask(
    target: Target, spec: ModeSpec, held_out: Sequence[Problem], say: Callable[[str], None]
) -> ModeResult:
    result = run_mode(target, spec, held_out, MAX_NEW_TOKENS)
    say(
        f"asked {len(held_out)} held-out problems: {spec.label:<24} accuracy {result.accuracy:.3f}"
        + (f", {result.failed} failed" if result.failed else "")
    )
    return result


def _harvest(
    service: RunningService, training: Sequence[problems.Problem], say: Callable[[str], None]
) -> None:
    started = time.perf_counter()
    outcome = harvest(
        ByService(Target(service.address), collect=False),
        pair_prompts(training),
        Lake(service.config.lake),
        HarvestOptions(task="shop", max_new_tokens=MAX_NEW_TOKENS),
    )
    if bad := [*outcome.errors, *outcome.failed]:
        raise ConfigError(f"{len(bad)} prompts could not be harvested; the first: {bad[0]}")
    with Client(service.address) as client:
        deadline = time.monotonic() + 30
        while (counts := client.count_labels(flush=True)).queued and time.monotonic() < deadline:
            time.sleep(0.1)
    say(
        f"harvested {outcome.labels} labels from {outcome.prompts} training problems in "
        f"{time.perf_counter() - started:.0f} s; {counts.in_lake} labels in the Parquet lake"
    )


def _train(
    config: Config, steps: int, say: Callable[[str], None], promote: bool = True
) -> TrainOutcome:
    started = time.perf_counter()
    settings = config.training.model_copy(update={"steps": steps})
    outcome = train(config.model_copy(update={"training": settings}), promote)
    say(
        f"Ray Train job: {outcome.training_labels} labels, {outcome.steps} steps, "
        f"{time.perf_counter() - started:.0f} s -> {outcome.version}; {outcome.reason}"
    )
    return outcome


def _make_live(
    service: RunningService,
    outcome: TrainOutcome,
    say: Callable[[str], None],
    timeout_s: float = 20.0,
) -> None:
    """Until the proposers have taken the version up by themselves. The swap below needs some
    version that serves."""
    deadline = time.monotonic() + timeout_s
    with Client(service.address) as client:
        if not outcome.promoted:
            client.promote(outcome.version)
            say(f"{outcome.version} made live by hand, so that there is a version to swap")
        while client.describe().live_version != outcome.version:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the proposers did not take up {outcome.version} within {timeout_s:g} s"
                )
            time.sleep(0.1)


def _swap_under_load(
    service: RunningService,
    target: Target,
    held_out: Sequence[Problem],
    size: DemoSize,
    say: Callable[[str], None],
) -> tuple[TrainOutcome, SwapReport]:
    """Train the next version, then make it live while requests keep coming; check every answer
    against a replay that names its version."""
    second = _train(service.config, size.steps, say, promote=False)
    spec = AFTER[0]
    collected: list[tuple[int, pb.Answer | S2TError]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            batch = list(enumerate(held_out[:64]))
            answers = answer_all(
                target,
                (
                    (f"swap-{time.monotonic_ns()}", spec.parameters(p.prompt, MAX_NEW_TOKENS, 0))
                    for _, p in batch
                ),
                concurrency=16,
            )
            collected.extend((i, a) for (i, _), a in zip(batch, answers, strict=True))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    time.sleep(1.0)
    with Client(service.address) as client:
        before = client.describe().live_version
        client.promote(second.version)
        while client.describe().live_version == before:
            time.sleep(0.05)
    time.sleep(1.0)
    stop.set()
    thread.join()
    report = _check_swap(target, held_out, spec, before, second.version, collected)
    say(
        f"swapped {before} -> {second.version} under load: {report.in_flight} requests ({report.old} on the old, "
        f"{report.new} on the new version), {report.failed} failed, {report.mixed} mixed"
    )
    return second, report


def _check_swap(
    target: Target,
    held_out: Sequence[Problem],
    spec: ModeSpec,
    old: str,
    new: str,
    collected: Sequence[tuple[int, pb.Answer | S2TError]],
) -> SwapReport:
    """A mixed answer is one whose tokens differ from a replay that names the version it claims."""
    report = SwapReport(in_flight=len(collected))
    replays: dict[tuple[str, int], tuple[int, ...]] = {}
    for version in (old, new):
        named = ModeSpec(spec.name, spec.trigger, spec.budget, version)
        answers = answer_all(
            target,
            (
                (f"replay-{version}-{i}", named.parameters(p.prompt, MAX_NEW_TOKENS, 0))
                for i, p in enumerate(held_out[:64])
            ),
        )
        replays |= {
            (version, i): tuple(a.token_ids)
            for i, a in enumerate(answers)
            if isinstance(a, pb.Answer)
        }
    for index, answer in collected:
        if isinstance(answer, S2TError):
            report.failed += 1
            continue
        version = answer.versions.selector
        report.old += version == old
        report.new += version == new
        report.mixed += replays.get((version, index)) != tuple(answer.token_ids)
    return report


def _print_results(
    console: Console,
    results: Sequence[ModeResult],
    hits: dict[int, float],
    outcome: TrainOutcome,
    swap: SwapReport,
) -> None:
    console.print(
        table(results, f"{len(results[0].correct)} held-out problems, bundled pair, this machine")
    )
    console.print(
        "Local sufficiency (LLM's choice among the SLM's top K, top 5 % KL steps): "
        + "  ".join(f"Hit@{k} {v:.3f}" for k, v in hits.items())
    )
    console.print(
        f"Held-out labels ({outcome.held_out_labels}): Agree@1 {outcome.metrics['agree_at_1']:.3f} "
        f"(SLM alone {outcome.metrics['slm_agree_at_1']:.3f}), "
        f"Spearman {outcome.metrics['spearman']:.3f}"
    )
    console.print(
        f"Swap: {swap.in_flight} requests while it happened, {swap.failed} failed, "
        f"{swap.mixed} mixed versions"
    )


def _print_marked_answer(console: Console, target: Target, held_out: Sequence[Problem]) -> None:
    """One s2t answer with its divergence points: [what the SLM would have said -> what was
    selected]."""
    tokenizer = Tokenizer.load(SLM_DIR)
    spec = ModeSpec("s2t", "kl", BUDGET)

    def ask(problem: Problem) -> pb.GenerationParameters:
        p = spec.parameters(problem.prompt, MAX_NEW_TOKENS, 0)
        p.return_steps = True
        return p

    answers = answer_all(target, ((f"marked-{p.id}", ask(p)) for p in held_out[:20]))
    flipped = [
        (p, a)
        for p, a in zip(held_out, answers, strict=False)
        if isinstance(a, pb.Answer) and a.usage.flips
    ]
    if not flipped:
        console.print("No divergence point changed a token in the first 20 answers.")
        return
    problem, answer = flipped[0]
    steps = {s.index: s for s in answer.steps}
    words = []
    for index, token_id in enumerate(answer.token_ids):
        step, word = steps.get(index), tokenizer.decode([token_id])
        if step is None or not word:
            words.append(word)
        elif step.slm_top_id == token_id:
            words.append(f"[yellow]{word}[/yellow]")
        else:
            refused = tokenizer.decode([step.slm_top_id])
            words.append(f"[red]\\[{refused} →[/red] [bold green]{word}[/bold green][red]][/red]")
    console.print(
        "\nOne answer (yellow: the LLM agreed; red → green: the LLM selected another candidate)\n"
        f"  {problem.prompt.text}\n  {' '.join(w for w in words if w)}"
    )
