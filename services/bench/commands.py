"""The `s2t bench` commands: parse, run, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from s2t_shared.errors import InvalidRequestError
from s2t_shared.pair import LLM_DIR, SLM_DIR

if TYPE_CHECKING:
    from services.bench.measure import Report

bench_app = typer.Typer(no_args_is_help=True, help="Measure side by side, in one run, on any model folder.")

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
    """"1,16" -> [1, 16]. Raises InvalidRequestError."""
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise InvalidRequestError(f"{option}={text!r}: give positive numbers, as in 1,16")
    return [int(part) for part in text.split(",")]


def settings(**values: Any) -> Any:
    """Raises InvalidRequestError: a number is out of range."""
    from services.bench.workload import Settings

    for name in ("prefix", "new", "k", "repeats", "threads"):
        if values.get(name, 1) < 1:
            raise InvalidRequestError(f"--{name}={values[name]}: must be at least 1")
    if not 0 < values.get("budget", 0.01) <= 1:
        raise InvalidRequestError(f"--budget={values['budget']}: must be above 0 and at most 1")
    if values["slm"] == "bundled":
        values["slm"] = str(SLM_DIR)
    if values.get("llm") == "bundled":
        values["llm"] = str(LLM_DIR)
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
def decode(slm: Slm, prefix: Prefix = 256, new: New = 100, k: K = 8, budget: Budget = 0.01,
           batches: Annotated[str, typer.Option(help="batch sizes, comma-separated")] = "1,16",
           kinds: Annotated[str, typer.Option(help="selector configurations: all, none, or some, ;-separated")] = "all",
           hf: Annotated[bool, typer.Option(help="also against Hugging Face generate")] = True,
           repeats: Repeats = 5, threads: Threads = 2, dtype: Dtype = "float32", device: Device = "cpu",
           json_out: Json = False) -> None:
    """Greedy against Hugging Face `generate`; `s2t_local` of every kind and reading against greedy."""
    from services.bench.decode import CONFIGURATIONS, bench_decode

    names = {"all": list(CONFIGURATIONS), "none": []}.get(kinds) or [n.strip() for n in kinds.split(";") if n.strip()]
    names = [] if kinds == "none" else names
    if unknown := [name for name in names if name not in CONFIGURATIONS]:
        raise InvalidRequestError(f"--kinds={unknown[0]!r}: choose from {'; '.join(CONFIGURATIONS)}")
    made = settings(slm=slm, prefix=prefix, new=new, k=k, budget=budget, repeats=repeats, threads=threads, dtype=dtype,
                    device=device)
    with ticks() as tick:
        report = bench_decode(made, numbers(batches, "--batches"), names, hf, tick)
    show(report, json_out)


@bench_app.command()
def score(slm: Slm, prefixes: Annotated[str, typer.Option(help="prompt tokens, comma-separated")] = "512",
          ks: Annotated[str, typer.Option(help="candidates, comma-separated")] = "8",
          published: Annotated[bool, typer.Option(help="also K whole prefixes, as the published code does")] = True,
          repeats: Repeats = 5, threads: Threads = 2, dtype: Dtype = "float32", device: Device = "cpu",
          json_out: Json = False) -> None:
    """One divergence point scored locally, in decode steps."""
    from services.bench.score import bench_score

    made = settings(slm=slm, repeats=repeats, threads=threads, dtype=dtype, device=device)
    with ticks() as tick:
        report = bench_score(made, numbers(prefixes, "--prefixes"), numbers(ks, "--ks"), published, tick)
    show(report, json_out)


@bench_app.command()
def kl(slm: Slm, llm: Llm = None, prefix: Prefix = 256, new: New = 96, k: K = 8, budget: Budget = 0.01,
       batch: Batch = 1, answers: Annotated[int, typer.Option(help="prompts in all")] = 4,
       read_ahead: Annotated[int, typer.Option(help="also: entropy with contexts told ahead every N tokens")] = 0,
       lockstep: Annotated[bool, typer.Option(help="also once token by token, to compare the tokens")] = True,
       repeats: Repeats = 3, threads: Threads = 2, dtype: Dtype = "float32", device: Device = "cpu",
       json_out: Json = False) -> None:
    """S2T with the LLM (KL by drafts, entropy) against the LLM alone."""
    from services.bench.kl import bench_kl

    made = settings(slm=slm, llm=llm, prefix=prefix, new=new, k=k, budget=budget, repeats=repeats, threads=threads,
                    dtype=dtype, device=device)
    with ticks() as tick:
        report = bench_kl(made, batch, answers, read_ahead, lockstep, tick)
    show(report, json_out)


@bench_app.command()
def selector(llm: Slm, prefix: Prefix = 512, k: K = 8, repeats: Repeats = 5, threads: Threads = 1,
             dtype: Dtype = "float32", device: Device = "cpu", json_out: Json = False) -> None:
    """What a `Score` costs beyond the model's own time, and how queries batch."""
    from services.bench.selector import bench_selector

    made = settings(slm=llm, prefix=prefix, k=k, repeats=repeats, threads=threads, dtype=dtype, device=device)
    with ticks() as tick:
        report = bench_selector(made, tick)
    show(report, json_out)


@bench_app.command()
def serve(slm: Slm, llm: Llm = None, prefix: Prefix = 256, new: New = 64, batch: Batch = 16, repeats: Repeats = 5,
          threads: Threads = 2, dtype: Dtype = "float32", device: Device = "cpu",
          soak_minutes: Annotated[float, typer.Option(help="instead: mixed load for so long, memory watched")] = 0.0,
          json_out: Json = False) -> None:
    """The whole service (Ray, gRPC, streaming) against the engine in one process; with --llm also mixed modes."""
    from services.bench.serve import bench_serve, soak

    made = settings(slm=slm, llm=llm, prefix=prefix, new=new, repeats=repeats, threads=threads, dtype=dtype,
                    device=device)
    if soak_minutes > 0:
        show(soak(made, soak_minutes, batch, lambda line: print(line, file=sys.stderr, flush=True)), json_out)
        return
    with ticks() as tick:
        report = bench_serve(made, batch, tick)
    show(report, json_out)


@bench_app.command()
def plot(slm: Slm, out: Annotated[Path, typer.Option(help="SVG file; the numbers go beside it")] = Path("cost.svg"),
         new: New = 100, repeats: Repeats = 3, threads: Threads = 2, dtype: Dtype = "float32", device: Device = "cpu"
         ) -> None:
    """How the cost grows with batch, prefix, K and budget: four small plots."""
    from services.bench.plot import draw, sweep

    made = settings(slm=slm, new=new, repeats=repeats, threads=threads, dtype=dtype, device=device, budget=0.01)
    with ticks() as tick:
        plots = sweep(made, tick)
    draw(plots, made, out)
    print(f"{out} and {out.with_suffix('.json')}")
