"""The benchmarks work and compare what they say; no time is tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2t_shared import policy as decide
from s2t_shared.errors import ConfigError
from services import cli
from services.bench import workload
from services.bench.decode import CONFIGURATIONS, bench_decode
from services.bench.kl import bench_kl
from services.bench.measure import figure, ratios, take_turns
from services.bench.plot import draw
from services.bench.score import bench_score
from services.bench.workload import Settings


@pytest.fixture
def small(models: dict[str, Path]) -> Settings:
    return Settings(str(models["slm"]), str(models["llm"]), prefix=40, new=60, k=4, budget=0.05, repeats=1, threads=1)


def test_sides_take_turns() -> None:
    """A side that always went first would get the quieter machine."""
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return 1.0

    seconds = take_turns({name: lambda name=name: side(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab" and {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert figure("x", [3.0, 1.0, 2.0]).median == 2.0


def test_workload_is_what_it_says(small: Settings) -> None:
    """Lengths, mean and the number of triggers are conditions that are printed beside every figure."""
    for batch in (2, 7, 14, 16):
        lengths = workload.ragged_lengths(batch, 256)
        assert len(lengths) == batch and len(set(lengths)) == batch and abs(sum(lengths) / batch - 256) < 2
    models = workload.load(small)
    assert [len(p) for p in workload.prompts(models.tokenizer, [10, 33])] == [10, 33]
    seed = workload.seed_with(0.05, 60, 3)
    assert sum(decide.random_signal(seed, i) > 0.95 for i in range(3, 60)) == 3


def test_decode_compares_equal_work(small: Settings) -> None:
    """Both greedy sides must give the same tokens, or their times are not comparable."""
    report = bench_decode(small, [1, 3], list(CONFIGURATIONS), True)
    figures = {(f.name, f.conditions): f for f in report.figures}
    assert len(figures) == 2 * (3 + len(CONFIGURATIONS)) and all(f.low > 0 for f in report.figures)
    equal = [c for name, c in figures if name == "greedy / generate"]
    assert equal == ["batch 1; 1 of 1 answers token for token equal", "batch 3; 3 of 3 answers token for token equal"]


def test_score_and_kl_run(small: Settings) -> None:
    assert len(bench_score(small, [40], [4], True).figures) == 7
    report = bench_kl(small, 2, 3, 16, True)
    (lockstep,) = [f for f in report.figures if f.name.startswith("lockstep")]
    (drafted,) = [f for f in report.figures if f.name == "KL: LLM forwards per token"]
    assert "3 of 3 answers token for token equal" in lockstep.conditions
    assert drafted.median < 0.5 * lockstep.median
    with pytest.raises(ConfigError, match="--llm"):
        bench_kl(replace(small, llm=None), 1, 1, 0, False)


def test_the_command_prints_json_and_refuses_nonsense(small: Settings) -> None:
    runner = CliRunner()
    command = ["bench", "decode", "--slm", small.slm, "--prefix", "20", "--new", "8", "--kinds", "none", "--batches",
               "1", "--repeats", "1", "--threads", "1", "--json"]
    result = runner.invoke(cli.app, command)
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and len(report["figures"]) == 3 and "torch" in report["machine"]
    for bad in (["--batches", "0"], ["--kinds", "magic"], ["--budget", "2"], ["--repeats", "0"]):
        assert "InvalidRequestError" in repr(runner.invoke(cli.app, command + bad).exception)


def test_plots_are_drawn(small: Settings, tmp_path: Path) -> None:
    curves = {"prefix": [(1.0, 1.1, 1.0, 1.2), (2.0, 1.2, 1.1, 1.3)]}
    draw({"batch": curves, "budget": curves, "prefix": curves, "K": curves}, small, tmp_path / "cost.svg")
    assert "<svg" in (tmp_path / "cost.svg").read_text()
    assert json.loads((tmp_path / "cost.json").read_text())["plots"]["K"]["prefix"][1][1] == 1.2
