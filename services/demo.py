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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from s2t_shared.bundled import SLM_DIR, problems
from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import Answer, Step
from services.client import Client
from services.evaluation.answering import ServiceAnswerer
from services.evaluation.figures import Row, row_of, sufficiency
from services.evaluation.journal import Journal
from services.evaluation.modes import ModeSpec
from services.evaluation.problems import Problem, bundled_problems
from services.evaluation.report import row_figures
from services.evaluation.run import EvaluationSettings, run_row, score_rollouts
from services.evaluation.terminal import table
from services.harvest.rollouts import HarvestOptions, ServiceRollouts
from services.harvest.run import bundled_prompts, harvest
from services.launch.local import RunningService, running_service
from services.rpc.ask_many import Target, answer_all
from services.train.job import TrainOutcome, train

MAX_NEW_TOKENS = 40
ASKED = EvaluationSettings(max_new_tokens=MAX_NEW_TOKENS, steps=False)
BUDGET = 0.05
BEFORE = (
    ModeSpec(name="greedy"),
    ModeSpec(name="majority@8"),
    ModeSpec(name="takeover", trigger="kl", budget=BUDGET),
    ModeSpec(name="takeover", trigger="entropy", budget=BUDGET),
    ModeSpec(name="s2t", trigger="kl", budget=BUDGET),
    ModeSpec(name="s2t", trigger="entropy", budget=BUDGET),
    ModeSpec(name="llm"),
)
AFTER = (
    ModeSpec(name="s2t_local", trigger="entropy", budget=BUDGET),
    ModeSpec(name="s2t_local", trigger="entropy", budget=2 * BUDGET),
)
KEYS = {
    "takeover kl 5%": "takeover",
    "s2t kl 5%": "s2t",
    "s2t_local entropy 5%": "s2t_local",
}  # of the JSON file


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo asks, harvests and trains."""

    problems: int = 200
    first_harvest: int = 300
    harvest: int = 3200
    first_steps: int = 40
    steps: int = 300


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
                "training.rank": 64,
                "training.alpha": 128.0,
                "training.batch_labels": 256,
                "training.gate_prompt_count": 100,
                "training.cpus_per_worker": 0.25,
            }
        )

        def say(line: str) -> None:
            console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {line}")

        say(
            "starting Redis, Ray, selector (LLM), proposer (SLM) and gateway; "
            "this takes about half a minute"
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
    """Ask, harvest, train, swap and ask again; returns the figures of the JSON file."""
    target = Target(service.address)
    held_out = bundled_problems(size.problems)
    # The first calls of a service are slow, and the other modes' times are divided by greedy's.
    run_row(ServiceAnswerer(target), BEFORE[0], held_out[:64], ASKED, Journal())
    results = [_ask(target, spec, held_out, say) for spec in BEFORE]
    hits = _local_sufficiency(target, held_out)
    say(
        "local sufficiency at the top 5 % KL steps: "
        + ", ".join(f"Hit@{k} {v:.2f}" for k, v in hits.items())
    )

    training = problems.problems("train", size.harvest)
    _harvest(service, training[: size.first_harvest], say)
    with ThreadPoolExecutor(1) as background:
        first = background.submit(_train, service.config, size.first_steps, say)
        _harvest(service, training[size.first_harvest :], say)
    _make_live(service, first.result(), say)
    second, swap = _swap_under_load(service, target, held_out, size, say)
    results += [_ask(target, spec, held_out, say) for spec in AFTER]

    _print_results(console, results, hits, second, swap)
    _print_marked_answer(console, target, held_out)
    return {
        "modes": {KEYS.get(r.label, r.label): row_figures(r, results[0]) for r in results},
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
) -> Row:
    journal = Journal()
    run_row(ServiceAnswerer(target), spec, held_out, ASKED, journal)
    result = row_of(spec, held_out, journal)
    say(
        f"asked {len(held_out)} held-out problems: {spec.label:<24} accuracy {result.accuracy:.3f}"
        + (f", {result.failed} failed" if result.failed else "")
    )
    return result


def _local_sufficiency(target: Target, held_out: Sequence[Problem]) -> dict[int, float]:
    """Hit@K at the top 5 % of the steps by KL."""
    journal = Journal()
    score_rollouts(ServiceAnswerer(target), held_out, ASKED, journal)
    return sufficiency(list(journal.rollouts.values())).by_kl[0.05]


def _harvest(
    service: RunningService, training: Sequence[problems.Problem], say: Callable[[str], None]
) -> None:
    started = time.perf_counter()
    outcome = harvest(
        ServiceRollouts(Target(service.address), returns_labels=False),
        bundled_prompts(training),
        Lake(service.config.lake_folder),
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
    """Train the next version, then make it live while requests keep coming.

    Every answer is checked against a replay that names its version.
    """
    second = _train(service.config, size.steps, say, promote=False)
    asked = held_out[:64]
    collected: list[tuple[int, Answer | S2TError]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            outcomes = _ask_each(target, AFTER[0], asked, f"swap-{time.monotonic_ns()}", 16)
            collected.extend(enumerate(outcomes))

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
    report = check_swap(target, asked, before, second.version, collected)
    say(
        f"swapped {before} -> {second.version} under load: {report.in_flight} requests "
        f"({report.old} on the old, {report.new} on the new version), {report.failed} failed, "
        f"{report.mixed} mixed"
    )
    return second, report


def _ask_each(
    target: Target, spec: ModeSpec, problems: Sequence[Problem], name: str, concurrency: int = 32
) -> list[Answer | S2TError]:
    """Every problem's outcome in one mode, in order."""
    requests = []
    for i, problem in enumerate(problems):
        request = spec.request(
            problem.prompt, request_id=f"{name}-{i}", max_new_tokens=MAX_NEW_TOKENS
        )
        requests.append(request)
    return answer_all(target, requests, concurrency)


def check_swap(
    target: Target,
    asked: Sequence[Problem],
    old: str,
    new: str,
    collected: Sequence[tuple[int, Answer | S2TError]],
) -> SwapReport:
    """A mixed answer is one whose tokens differ from a replay that names the version it claims."""
    report = SwapReport(in_flight=len(collected))
    replays: dict[tuple[str, int], tuple[int, ...]] = {}
    for version in (old, new):
        spec = replace(AFTER[0], version=version)
        for i, outcome in enumerate(_ask_each(target, spec, asked, f"replay-{version}")):
            if isinstance(outcome, Answer):
                replays[version, i] = outcome.token_ids
    for index, outcome in collected:
        if isinstance(outcome, S2TError):
            report.failed += 1
            continue
        version = outcome.versions.local_selector
        report.old += version == old
        report.new += version == new
        report.mixed += replays.get((version, index)) != outcome.token_ids
    return report


def _print_results(
    console: Console,
    results: Sequence[Row],
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
    """One s2t answer with its divergence points: [the SLM's first choice -> what was selected]."""
    tokenizer = Tokenizer.load(SLM_DIR)
    with Client(target.address) as client:
        for problem in held_out[:20]:
            steps: list[Step] = []
            for piece in client.stream(
                problem.prompt,
                stream_steps=True,
                mode="s2t",
                trigger="kl",
                budget=BUDGET,
                max_new_tokens=MAX_NEW_TOKENS,
            ):
                steps += piece.steps
            if any(step.flipped for step in steps):
                marked = "".join(marked_text(step, tokenizer) for step in steps)
                console.print(
                    "\nOne answer (yellow: the LLM agreed; red → green: the LLM selected another "
                    f"candidate)\n  {problem.prompt.text}\n {marked}"
                )
                return
    console.print("No divergence point changed a token in the first 20 answers.")


def marked_text(step: Step, tokenizer: Tokenizer) -> str:
    """A Step's text in rich's markup: yellow if the LLM agreed, red -> green if it did not."""
    if not step.triggered or not step.text:
        return step.text
    if not step.flipped:
        return f"[yellow]{step.text}[/yellow]"
    assert step.slm_top_id is not None
    refused = tokenizer.decode([step.slm_top_id])
    selected = step.text.strip()
    return f" [red]\\[{refused} →[/red] [bold green]{selected}[/bold green][red]][/red]"
