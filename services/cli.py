"""The `s2t` command. Parses, dispatches, and turns errors into one line and an exit status; does no work itself.

Exit status: 0 done, 1 some input failed, 2 a setting or input file is wrong, 3 a service or store is not available.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer  # noqa: E402 - the environment above is read at import
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

from s2t_shared.config import Config  # noqa: E402
from s2t_shared.errors import (  # noqa: E402
    ConfigError,
    EvaluationSplitError,
    InvalidRequestError,
    ModelLoadError,
    S2TError,
    VersionError,
)
from s2t_shared.types import CandidateRule, Mode, Policy, Prompt, Proposals, Sampling, Trigger  # noqa: E402
from services.bench.commands import bench_app  # noqa: E402
from services.console import (  # noqa: E402
    Address,
    ConfigFile,
    DataDir,
    Json,
    TokenFile,
    pick,
    progress,
    settings,
    show,
    target,
    wide_console,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Select-to-Think: a small model answers, a large one only selects.")
versions_app = typer.Typer(no_args_is_help=True, help="Published local selectors.")
app.add_typer(versions_app, name="versions")
app.add_typer(bench_app, name="bench")
USER_ERRORS = (ConfigError, InvalidRequestError, ModelLoadError, VersionError, EvaluationSplitError)



def run() -> None:
    """Entry point: errors become one line on stderr."""
    try:
        app()
    except S2TError as error:
        print(f"s2t: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, USER_ERRORS) else 3)


@app.command()
def demo(json_file: Annotated[Path | None, typer.Option("--json", help="also write the numbers here")] = None) -> None:
    """The whole loop on this machine with the bundled pair: serve, ask, harvest, train, swap, ask again."""
    from services.demo import run_demo

    run_demo(json_file)


@app.command()
def serve(config: ConfigFile = None, data_dir: DataDir = None,
          host: Annotated[str | None, typer.Option(help="gateway's address")] = None,
          port: Annotated[int | None, typer.Option(help="gateway's port; 0: any free one")] = None,
          slm: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
          llm: Annotated[str | None, typer.Option(help="folder or hub id")] = None) -> None:
    """Run the service until Ctrl-C."""
    import signal

    from services.serving import running_service

    resolved = settings(config, data_dir=str(data_dir) if data_dir else None, gateway__host=host, gateway__port=port,
                        slm__model=slm, llm__model=llm)
    try:
        with running_service(resolved, say=lambda line: print(line, flush=True), reuse_ray=True) as service:
            # Here, because Ray sets handlers of its own when it starts.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print(f"serving at {service.address} (gRPC); Ctrl-C stops", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped")


@app.command()
def generate(slm: Annotated[str, typer.Option(help="folder or hub id of the SLM")],
             input: Annotated[Path, typer.Option(help='JSONL: {"id", and one of "prompt", "messages", "token_ids"}')],
             output: Annotated[Path, typer.Option(help="JSONL, in input order")],
             llm: Annotated[str | None, typer.Option(help="folder or hub id of the LLM")] = None,
             mode: Annotated[str, typer.Option(help="greedy, sample, s2t, s2t_local, takeover, llm, majority@N")
                             ] = "s2t",
             trigger: Annotated[str, typer.Option(help="entropy, kl, kl-reverse, margin, random, never, always")
                                ] = "entropy",
             threshold: Annotated[float | None, typer.Option(help="trigger strictly above this")] = None,
             budget: Annotated[float | None, typer.Option(help="share of steps that may trigger (default 0.01)")
                               ] = None,
             candidates: Annotated[int, typer.Option(help="K, 1..64")] = 8,
             candidate_ratio: Annotated[float, typer.Option(help="adaptive: p >= ratio * p_max; 0: fixed K")] = 0.0,
             proposals: Annotated[str, typer.Option(help="base or adapted")] = "base",
             selector: Annotated[str, typer.Option(help="none, live, a version's name, or its folder")] = "none",
             max_new_tokens: Annotated[int, typer.Option(help="at least 1")] = 256,
             dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
             device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
             batch_size: Annotated[int, typer.Option(help="sequences in one batch")] = 8,
             threads: Annotated[int | None, typer.Option(help="CPU threads (default: all cores)")] = None,
             seed: Annotated[int, typer.Option(help="of sampling and of the random trigger")] = 0,
             temperature: Annotated[float, typer.Option(help="of sample and majority")] = 0.7,
             steps: Annotated[bool, typer.Option("--steps", help="also write the triggered steps")] = False,
             calibration_prompts: Annotated[Path | None, typer.Option(
                 help="JSONL of training prompts to calibrate the budget on")] = None,
             config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Answer a JSONL file in this process: no Ray, no Redis."""
    from s2t_shared.generate import GenerateRequest
    from services import local_generate

    kind, samples = parse_mode(mode)
    if budget is not None and threshold is not None:
        raise InvalidRequestError("give --threshold or --budget, not both")
    if batch_size < 1:
        raise InvalidRequestError(f"--batch-size={batch_size}: must be at least 1")
    policy = Policy(kind, pick(Trigger, trigger, "--trigger"), threshold if threshold is not None else 0.0,
                    CandidateRule(candidates, candidate_ratio), pick(Proposals, proposals, "--proposals"))
    template = GenerateRequest("", Prompt(), policy, (budget if budget is not None else 0.01) if threshold is None
                               else None, Sampling(temperature, seed=seed), samples, max_new_tokens)
    if policy.needs_llm and llm is None:
        raise InvalidRequestError(f"mode {mode!r} with trigger {trigger!r} asks the LLM; give --llm")
    resolved = settings(config, data_dir=str(data_dir) if data_dir else None)
    loaded = local_generate.load_models(slm, llm, selector, resolved.versions, dtype, device, batch_size,
                                        threads or os.cpu_count() or 1)
    template = local_generate.resolve_thresholds(template, loaded, calibration_prompts,
                                                 lambda line: print(f"s2t: {line}", file=sys.stderr))
    with progress(count_lines(input), "answers") as advance:
        failed = local_generate.generate_file(loaded, template, input, output, steps, advance)
    if failed:
        print(f"s2t: {failed} of the input lines failed, see above; the others are in {output}", file=sys.stderr)
        raise typer.Exit(1)


def parse_mode(text: str) -> tuple[Mode, int]:
    """"majority@8" -> (MAJORITY, 8). Raises InvalidRequestError."""
    name, at, number = text.partition("@")
    kind: Mode = pick(Mode, name, "--mode")
    if at and (kind is not Mode.MAJORITY or not number.isdigit()):
        raise InvalidRequestError(f"--mode={text!r}: only majority takes a number, as in majority@8")
    return kind, int(number) if at else 8


def count_lines(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            return sum(1 for _ in stream)
    except OSError:
        return 0  # the command itself reports the file


@app.command()
def harvest(prompts: Annotated[Path, typer.Argument(help="JSONL of training prompts")],
            out: Annotated[Path | None, typer.Option(help="with --slm and --llm: the lake folder")] = None,
            slm: Annotated[str | None, typer.Option(help="harvest in this process, without a service")] = None,
            llm: Annotated[str | None, typer.Option(help="with --slm")] = None,
            address: Address = None, token_file: TokenFile = None,
            task: Annotated[str, typer.Option(help="name stored with the labels")] = "",
            split: Annotated[str, typer.Option(help="recorded; an evaluation split is refused")] = "train",
            budget: Annotated[float, typer.Option(help="share of positions per trigger")] = 0.1,
            candidates: Annotated[int, typer.Option(help="K of a label")] = 16,
            max_new_tokens: Annotated[int, typer.Option(help="of a rollout")] = 256,
            threads: Annotated[int | None, typer.Option(help="with --slm: CPU threads (default: all cores)")] = None,
            config: ConfigFile = None, json_out: Json = False) -> None:
    """Turn training prompts into selection labels."""
    from s2t_shared.tasks import read_prompts
    from services import harvest as harvesting
    from services import local_generate

    options = harvesting.HarvestOptions(task, split, budget, candidates, max_new_tokens)
    rows = list(read_prompts(prompts))
    with progress(len(rows), "rollouts", json_out) as advance:
        if slm or llm:
            if not (slm and llm and out):
                raise ConfigError("harvesting without a service needs --slm, --llm and --out")
            loaded = local_generate.load_models(slm, llm, "none", Path("."), "float32", "cpu", 16,
                                                threads or os.cpu_count() or 1)
            outcome = harvesting.harvest_alone(loaded.generator, rows, out, options, on_progress=advance)
        else:
            outcome = harvesting.harvest_by_service(target(address, config, token_file), rows, options, advance)
    for text in outcome.errors:
        print(f"s2t: {text}", file=sys.stderr)
    show({"prompts": outcome.prompts, "labels": outcome.labels, "tokens": outcome.tokens,
          "failed": len(outcome.errors)}, json_out)
    if outcome.errors:
        raise typer.Exit(1)


@app.command()
def train(config: ConfigFile = None, data_dir: DataDir = None,
          kind: Annotated[str | None, typer.Option(help="prefix, joint or reserved")] = None,
          reads: Annotated[str | None, typer.Option(help="base or adapted")] = None,
          steps: Annotated[int | None, typer.Option(help="training steps at most")] = None,
          learning_rate: Annotated[float | None, typer.Option()] = None,
          workers: Annotated[int | None, typer.Option(help="Ray Train workers")] = None,
          seed: Annotated[int | None, typer.Option()] = None,
          promote: Annotated[bool, typer.Option(help="make it live when it is better")] = True,
          json_out: Json = False) -> None:
    """Distil the labels into a new version (a Ray Train job) and make it live if it is better."""
    from services.serving import local_ray
    from services.training import train as run_training

    resolved = settings(config, data_dir=str(data_dir) if data_dir else None, training__kind=kind,
                        training__reads=reads, training__steps=steps, training__learning_rate=learning_rate,
                        training__workers=workers, training__seed=seed)
    with local_ray():
        outcome = run_training(resolved, promote)
    show(asdict(outcome), json_out)


@versions_app.command("list")
def versions_list(config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False) -> None:
    """All versions; the live one is marked."""
    registry = _registry(config, data_dir)
    live = registry.live()
    manifests = [registry.manifest(name) for name in registry.names()]
    if json_out:
        print(json.dumps([{**m.model_dump(mode="json"), "live": m.version == live} for m in manifests]))
        return
    table = Table("version", "live", "kind", "reads", "Agree@1", "SLM's own", "labels")
    for m in manifests:
        table.add_row(m.version, "*" if m.version == live else "", m.kind.value, m.reads.value,
                      f"{m.metrics['agree_at_1']:.3f}", f"{m.metrics['slm_agree_at_1']:.3f}",
                      str(m.training.get("training_labels", "")))
    wide_console().print(table if manifests else "no versions; train one with: s2t train")


@versions_app.command("show")
def versions_show(version: str, config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """One version's manifest."""
    print(_registry(config, data_dir).manifest(version).model_dump_json(indent=2))


@versions_app.command("promote")
def versions_promote(version: str, config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Make a version live; proposers take it up by themselves."""
    _registry(config, data_dir).promote(version)
    print(f"live: {version}")


@versions_app.command("rollback")
def versions_rollback(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Go back to the version that was live before."""
    print(f"live: {_registry(config, data_dir).rollback() or 'none'}")


def _registry(config: Path | None, data_dir: Path | None) -> Any:
    from s2t_shared.registry import Registry

    return Registry(settings(config, data_dir=str(data_dir) if data_dir else None).versions)


@app.command("eval")
def evaluate(problems: Annotated[Path | None, typer.Argument(
                 help='JSONL with "answer" beside the prompt; default: the bundled pair\'s held-out problems')] = None,
             modes: Annotated[str, typer.Option(help="comma-separated, e.g. greedy,s2t,majority@8")] = "greedy,s2t,llm",
             trigger: Annotated[str, typer.Option()] = "entropy", budget: Annotated[float, typer.Option()] = 0.01,
             count: Annotated[int, typer.Option(help="problems at most")] = 200,
             max_new_tokens: Annotated[int, typer.Option()] = 256, seed: Annotated[int, typer.Option()] = 0,
             address: Address = None, token_file: TokenFile = None, config: ConfigFile = None,
             json_out: Json = False) -> None:
    """Compare modes on the same problems through a running service."""
    from services import evaluation

    items = evaluation.load_problems(problems, count, settings(config).defaults.answer_pattern)
    where, results = target(address, config, token_file), []
    for name in modes.split(","):
        kind, _ = parse_mode(name.strip())
        triggered = kind in (Mode.S2T, Mode.S2T_LOCAL, Mode.TAKEOVER)
        spec = evaluation.ModeSpec(name.strip(), pick(Trigger, trigger, "--trigger").value if triggered else "",
                                   budget if triggered else None)
        with progress(len(items), spec.label, json_out) as advance:
            results.append(evaluation.run_mode(where, spec, items, max_new_tokens, seed, on_answer=advance))
    if json_out:
        print(json.dumps(evaluation.as_rows(results)))
        return
    wide_console().print(evaluation.table(results, f"{len(items)} problems"))


@app.command()
def doctor(config: ConfigFile = None, address: Address = None, json_out: Json = False) -> None:
    """Check this installation and configuration; each failure says how to mend it."""
    from services.doctor import examine

    findings = examine(settings(config), address)
    if json_out:
        print(json.dumps([asdict(f) for f in findings]))
    else:
        for f in findings:
            mark = "[green]ok  [/green]" if f.ok else "[red]FAIL[/red]"
            Console().print(f"{mark} {f.what}: {escape(f.detail)}", soft_wrap=True, highlight=False)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command("config")
def show_config(config: ConfigFile = None,
                schema: Annotated[bool, typer.Option("--schema", help="the JSON schema, for editors")] = False) -> None:
    """Print the resolved configuration."""
    import yaml

    resolved = settings(config)
    print(json.dumps(Config.model_json_schema(), indent=2) if schema
          else yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="")
