"""The `s2t bench` commands: parse, run, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from s2t_shared.bundled import BUNDLED, LLM_DIR
from s2t_shared.errors import InvalidRequestError
from s2t_shared.requests import by_name
from s2t_shared.types import Trigger

if TYPE_CHECKING:
    from services.bench.measure import Figure, Report
    from services.evaluation.problems import Problem

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure side by side, in one run, on any model folder."
)

Slm = Annotated[str, typer.Option(help="folder or hub id of the SLM, or bundled")]
Llm = Annotated[str | None, typer.Option(help="folder or hub id of the LLM")]
Prefix = Annotated[int, typer.Option(help="prompt tokens (mean, where prompts are ragged)")]
New = Annotated[int, typer.Option(help="tokens of an answer")]
K = Annotated[int, typer.Option("--k", help="candidates")]
Budget = Annotated[float, typer.Option(help="share of steps that trigger")]
Repeats = Annotated[int, typer.Option(help="turns of every side")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
Batch = Annotated[int, typer.Option(help="sequences at once")]


def numbers(text: str, option: str) -> list[int]:
    """ "1,16" -> [1, 16]. Raises InvalidRequestError."""
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise InvalidRequestError(f"{option}={text!r}: give positive numbers, as in 1,16")
    return [int(part) for part in text.split(",")]


def shares(text: str, option: str) -> tuple[float, ...]:
    """ "0.01,0.05" -> (0.01, 0.05). Raises InvalidRequestError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise InvalidRequestError(
            f"{option}={text!r}: give shares above 0 and at most 1, as in 0.01,0.05"
        )
    return values


def at_least_one(value: int, option: str) -> int:
    """Raises InvalidRequestError."""
    if value < 1:
        raise InvalidRequestError(f"{option}={value}: must be at least 1")
    return value


def chosen(text: str, known: list[str], option: str) -> list[str]:
    """ "all", "none", or some of `known`, ;-separated. Raises InvalidRequestError."""
    if text == "none":
        return []
    names = known if text == "all" else [name.strip() for name in text.split(";") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise InvalidRequestError(f"{option}={unknown[0]!r}: choose from {'; '.join(known)}")
    return names


def settings(**values: Any) -> Any:
    """Raises InvalidRequestError: a number is out of range."""
    from services.bench.workload import Settings

    for name in ("prefix", "new", "k", "repeats", "threads"):
        if values.get(name, 1) < 1:
            raise InvalidRequestError(f"--{name}={values[name]}: must be at least 1")
    if not 0 < values.get("budget", 0.01) <= 1:
        raise InvalidRequestError(f"--budget={values['budget']}: must be above 0 and at most 1")
    return Settings(**values)


def show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        Console(width=max(120, Console().width), highlight=False).print(report.table())


@contextmanager
def ticks() -> Iterator[Any]:
    """A dot on stderr per turn, so that a long benchmark is seen to live."""
    yield lambda: print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


@bench_app.command()
def decode(
    slm: Slm,
    prefix: Prefix = 256,
    new: New = 100,
    k: K = 8,
    budget: Budget = 0.01,
    batches: Annotated[str, typer.Option(help="batch sizes, comma-separated")] = "1,16",
    kinds: Annotated[
        str, typer.Option(help="selector configurations: all, none, or some, ;-separated")
    ] = "all",
    hf: Annotated[bool, typer.Option(help="also against Hugging Face generate")] = True,
    repeats: Repeats = 5,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """Greedy against Hugging Face `generate`; `s2t_local` of every kind and reading against
    greedy."""
    from services.bench.decode import CONFIGURATIONS, bench_decode

    names = chosen(kinds, list(CONFIGURATIONS), "--kinds")
    made = settings(
        slm=slm,
        prefix=prefix,
        new=new,
        k=k,
        budget=budget,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    with ticks() as tick:
        report = bench_decode(made, numbers(batches, "--batches"), names, hf, tick)
    show(report, json_out)


@bench_app.command()
def gpu(
    slm: Annotated[str, typer.Option(help="size of the SLM: 0.5B, 1.5B, 7B, 32B")] = "1.5B",
    llm: Annotated[str, typer.Option(help="size of the LLM, or none")] = "none",
    batches: Annotated[str, typer.Option(help="batch sizes, comma-separated")] = "1,64,256",
    prefix: Prefix = 256,
    new: New = 128,
    k: K = 8,
    budget: Budget = 0.01,
    kv_gib: Annotated[float, typer.Option(help="KV pool of each model")] = 6.0,
    max_hf_batch: Annotated[int, typer.Option(help="largest batch for generate; 0: none")] = 64,
    graphs: Annotated[bool, typer.Option(help="decode steps as CUDA graphs")] = True,
    repeats: Repeats = 3,
    threads: Threads = 2,
    dtype: Dtype = "bfloat16",
    device: Device = "cuda",
    json_out: Json = False,
) -> None:
    """Every mode with random weights of real shapes: no network and no model is needed."""
    from services.bench.gpu import GpuSettings, bench_gpu

    made = settings(
        slm=slm,
        prefix=prefix,
        new=new,
        k=k,
        budget=budget,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    wanted = GpuSettings(
        slm=slm,
        llm=None if llm == "none" else llm,
        batches=numbers(batches, "--batches"),
        kv_gib=kv_gib,
        max_hf_batch=max_hf_batch,
        graphs=graphs,
    )

    def say(found: Figure) -> None:
        line = f"{found.name}: {found.median:.4g} {found.unit}, {found.conditions}"
        print(line, file=sys.stderr, flush=True)

    show(bench_gpu(made, wanted, say), json_out)


@bench_app.command()
def score(
    slm: Slm,
    prefixes: Annotated[str, typer.Option(help="prompt tokens, comma-separated")] = "512",
    ks: Annotated[str, typer.Option(help="candidates, comma-separated")] = "8",
    published: Annotated[
        bool, typer.Option(help="also K whole prefixes, as the published code does")
    ] = True,
    repeats: Repeats = 5,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """One divergence point scored locally, in decode steps."""
    from services.bench.score import bench_score

    made = settings(slm=slm, repeats=repeats, threads=threads, dtype=dtype, device=device)
    with ticks() as tick:
        report = bench_score(
            made, numbers(prefixes, "--prefixes"), numbers(ks, "--ks"), published, tick
        )
    show(report, json_out)


@bench_app.command()
def kl(
    slm: Slm,
    llm: Llm = None,
    prefix: Prefix = 256,
    new: New = 96,
    k: K = 8,
    budget: Budget = 0.01,
    batch: Batch = 1,
    answers: Annotated[int, typer.Option(help="prompts in all")] = 4,
    lockstep: Annotated[
        bool, typer.Option(help="also once token by token, to compare the tokens")
    ] = True,
    repeats: Repeats = 3,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """S2T with the LLM (KL by drafts, entropy) against the LLM alone."""
    from services.bench.kl import bench_kl

    made = settings(
        slm=slm,
        llm=llm,
        prefix=prefix,
        new=new,
        k=k,
        budget=budget,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    with ticks() as tick:
        report = bench_kl(made, batch, answers, lockstep, tick)
    show(report, json_out)


@bench_app.command()
def selector(
    llm: Slm,
    prefix: Prefix = 512,
    k: K = 8,
    repeats: Repeats = 5,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """What a `Score` costs beyond the model's own time, and how queries batch."""
    from services.bench.selector import bench_selector

    if llm == BUNDLED:  # the LLM is measured alone, in the place of the SLM
        llm = str(LLM_DIR)
    made = settings(
        slm=llm, prefix=prefix, k=k, repeats=repeats, threads=threads, dtype=dtype, device=device
    )
    with ticks() as tick:
        report = bench_selector(made, tick)
    show(report, json_out)


@bench_app.command()
def serve(
    slm: Slm,
    llm: Llm = None,
    prefix: Prefix = 256,
    new: New = 64,
    batch: Batch = 16,
    repeats: Repeats = 5,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    soak_minutes: Annotated[
        float, typer.Option(help="instead: mixed load for so long, memory watched")
    ] = 0.0,
    json_out: Json = False,
) -> None:
    """The whole service (Ray, gRPC, streaming) against the engine in one process; with --llm also
    mixed modes."""
    from services.bench.serve import bench_serve, soak

    made = settings(
        slm=slm,
        llm=llm,
        prefix=prefix,
        new=new,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    if soak_minutes > 0:
        show(
            soak(made, soak_minutes, batch, lambda line: print(line, file=sys.stderr, flush=True)),
            json_out,
        )
        return
    with ticks() as tick:
        report = bench_serve(made, batch, tick)
    show(report, json_out)


@bench_app.command()
def swap(
    swaps: Annotated[int, typer.Option(help="promotions, between two versions in turn")] = 50,
    minutes: Annotated[float, typer.Option(help="how long the load lasts")] = 5.0,
    concurrency: Annotated[int, typer.Option(help="requests that stream at once")] = 4,
    slm: Annotated[str, typer.Option(help="folder or hub id of the SLM, or bundled")] = "bundled",
    threads: Annotated[int, typer.Option(help="CPU threads of the proposer")] = 1,
    json_out: Json = False,
) -> None:
    """Local selectors swapped under streaming load: failed and mixed answers, waits for the first
    piece."""
    from services.bench.swap import bench_swap
    from services.cli.options import show as show_values

    report = bench_swap(
        swaps,
        minutes,
        concurrency,
        slm,
        threads,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    show_values(report.as_json(), json_out)


@bench_app.command()
def train(
    slm: Slm,
    prompt: Annotated[int, typer.Option(help="prompt tokens of a rollout")] = 50,
    new: Annotated[int, typer.Option(help="answer tokens of a rollout")] = 200,
    share: Annotated[
        float, typer.Option(help="share of the answer's positions with a label")
    ] = 0.1,
    k: K = 16,
    rollouts: Annotated[int, typer.Option(help="in one batch of tree packing")] = 3,
    groups: Annotated[int, typer.Option(help="labels per turn the published way")] = 2,
    kinds: Annotated[
        str, typer.Option(help="selector configurations: all, or some, ;-separated")
    ] = "all",
    memory: Annotated[
        bool, typer.Option(help="also peak memory, each side in a process of its own")
    ] = True,
    repeats: Repeats = 3,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """Training per label, time and memory: tree packing against one sequence per candidate plus a
    second model."""
    from services.bench.train import SIDES, Work, bench_train

    made = settings(
        slm=slm,
        prefix=prompt,
        new=new,
        k=k,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    (labelled,) = shares(str(share), "--share")
    work = Work(
        made, at_least_one(rollouts, "--rollouts"), labelled, at_least_one(groups, "--groups")
    )
    names = chosen(kinds, list(SIDES), "--kinds")
    with ticks() as tick:
        report = bench_train(work, names, memory, tick)
    show(report, json_out)


@bench_app.command()
def harvest(
    slm: Slm,
    llm: Llm = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL; default: made up, of --prefix tokens")
    ] = None,
    count: Annotated[int, typer.Option(help="prompts of a harvest")] = 32,
    lockstep: Annotated[int, typer.Option(help="of these, also collected token by token")] = 2,
    batch: Batch = 16,
    prefix: Prefix = 128,
    new: New = 200,
    k: K = 16,
    budget: Budget = 0.1,
    repeats: Repeats = 3,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """Labels per second: plain and intervened harvest against collecting token by token."""
    from services.bench.harvest import Load, bench_harvest

    made = settings(
        slm=slm,
        llm=llm,
        prefix=prefix,
        new=new,
        k=k,
        budget=budget,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    load = Load(
        at_least_one(count, "--count"),
        at_least_one(lockstep, "--lockstep"),
        at_least_one(batch, "--batch"),
    )
    with ticks() as tick:
        report = bench_harvest(made, load, prompts, tick)
    show(report, json_out)


@bench_app.command()
def lake(
    rollouts: Annotated[int, typer.Option(help="with 20 labels each")] = 50_000,
    drained: Annotated[int, typer.Option(help="rollouts through Redis")] = 10_000,
    repeats: Repeats = 3,
    folder: Annotated[Path | None, typer.Option(help="keeps the lake for the next run")] = None,
    linked_shards: Annotated[
        int | None,
        typer.Option(help="only the verbs that need not read a lake of so many linked shards"),
    ] = None,
    json_out: Json = False,
) -> None:
    """Statistics, checks, export, deletion, training's first batch and drains, against plain
    pyarrow."""
    from services.bench.lake import Load, bench_lake
    from services.bench.lake_at_scale import bench_linked

    if linked_shards is not None:
        show(bench_linked(at_least_one(linked_shards, "--linked-shards")), json_out)
        return
    load = Load(
        at_least_one(rollouts, "--rollouts"),
        at_least_one(drained, "--drained"),
        at_least_one(repeats, "--repeats"),
    )
    with ticks() as on_turn:
        report = bench_lake(load, folder, on_turn)
    show(report, json_out)


@bench_app.command()
def curve(
    slm: Slm,
    lake: Annotated[Path, typer.Option(help="folder with labels (s2t harvest)")],
    out: Annotated[
        Path, typer.Option(help="JSONL of results, gone on with; a PNG goes beside it")
    ] = Path("curve.jsonl"),
    counts: Annotated[str, typer.Option(help="training labels, comma-separated")] = "200,1000",
    kinds: Annotated[
        str, typer.Option(help="selector configurations: all, none, or some, ;-separated")
    ] = "all",
    control: Annotated[bool, typer.Option(help="also plain distillation")] = True,
    seeds: Annotated[int, typer.Option(help="trainings of each")] = 1,
    steps: Annotated[int, typer.Option(help="training steps at most")] = 400,
    learning_rate: Annotated[float, typer.Option()] = 3e-4,
    held_out: Annotated[
        int, typer.Option(help="labels to validate on, and to test on, at most")
    ] = 1024,
    accuracy_at: Annotated[
        str, typer.Option(help="counts at which problems are answered; none; last")
    ] = "last",
    problems: Annotated[
        Path | None,
        typer.Option(help='JSONL with "answer" beside the prompt; default: the bundled pair\'s'),
    ] = None,
    count: Annotated[int, typer.Option(help="problems at most")] = 200,
    skip: Annotated[int, typer.Option(help="problems to leave out before them")] = 0,
    answer_pattern: Annotated[
        str, typer.Option(help="regular expression of an answer in a text")
    ] = "",
    budgets: Annotated[str, typer.Option(help="shares of steps that trigger")] = "0.01,0.05",
    triggers: Annotated[str, typer.Option(help="comma-separated")] = "entropy",
    llm: Llm = None,
    batch_labels: Annotated[int, typer.Option(help="labels of a training step")] = 64,
    rank: Annotated[int, typer.Option(help="of the adapter")] = 16,
    new: New = 256,
    k: K = 8,
    batch: Batch = 16,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """Learning curves: labels against held-out Agree@1 and task accuracy, for every kind and beside
    controls."""
    from services.bench.curve import KINDS, CurveSettings, bench_curve
    from services.bench.curve_answers import PLAIN
    from services.bench.curve_report import draw, tables

    sizes = numbers(counts, "--counts")
    asked = {"none": [], "last": [max(sizes)]}.get(accuracy_at)
    asked = numbers(accuracy_at, "--accuracy-at") if asked is None else asked
    if unknown := set(asked) - set(sizes):
        raise InvalidRequestError(f"--accuracy-at={unknown.pop()}: not one of --counts={counts}")
    names = chosen(kinds, list(KINDS), "--kinds") + [PLAIN] * control
    wanted = CurveSettings(
        lake=lake,
        counts=tuple(sizes),
        names=tuple(names),
        seeds=tuple(range(at_least_one(seeds, "--seeds"))),
        steps=at_least_one(steps, "--steps"),
        learning_rate=learning_rate,
        budgets=shares(budgets, "--budgets"),
        triggers=tuple(by_name(Trigger, name, "--triggers") for name in triggers.split(",")),
        batch_labels=at_least_one(batch_labels, "--batch-labels"),
        rank=at_least_one(rank, "--rank"),
        pattern=answer_pattern,
        accuracy_at=tuple(asked),
        held_out_labels=at_least_one(held_out, "--held-out"),
        batch=at_least_one(batch, "--batch"),
    )
    made = settings(slm=slm, llm=llm, new=new, k=k, threads=threads, dtype=dtype, device=device)
    items = _problems(problems, count, skip, answer_pattern) if asked else []
    points = bench_curve(
        made,
        wanted,
        items,
        out,
        lambda p: print(
            f"{p.name}, {p.labels} labels, seed {p.seed}: {p.figures}", file=sys.stderr, flush=True
        ),
    )
    draw(points, f"{Path(made.slm).name}, {wanted.steps} steps at most", out.with_suffix(".png"))
    if json_out:
        print(json.dumps([asdict(p) for p in points]))
    else:
        groups = [item.group or item.id for item in items]
        console = Console(width=max(150, Console().width), highlight=False)
        console.print(*tables(points, groups), sep="\n")


def _problems(file: Path | None, count: int, skip: int, pattern: str) -> list[Problem]:
    """`count` problems of a file (None: the bundled ones) behind the first `skip`."""
    from services.evaluation.problems import Reading, problems_of

    return problems_of(file, skip + count, Reading(pattern=pattern))[skip:]


@bench_app.command()
def plot(
    slm: Slm,
    out: Annotated[Path, typer.Option(help="SVG file; the numbers go beside it")] = Path(
        "cost.svg"
    ),
    new: New = 100,
    repeats: Repeats = 3,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """How the cost grows with batch, prefix, K and budget: four small plots."""
    from services.bench.plot import draw, sweep

    made = settings(
        slm=slm, new=new, repeats=repeats, threads=threads, dtype=dtype, device=device, budget=0.01
    )
    with ticks() as tick:
        plots = sweep(made, tick)
    draw(plots, made, out)
    print(f"{out} and {out.with_suffix('.json')}")
