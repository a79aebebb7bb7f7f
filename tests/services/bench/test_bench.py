"""The benchmarks work and compare what they say; no time is tested."""

from __future__ import annotations

import io
import json
import mmap
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from s2t_shared import policy as decide
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.llm_selector import InProcessSelector
from s2t_shared.decode.proposer import PREFILL_CHUNK_TOKENS
from s2t_shared.errors import ConfigError
from s2t_shared.labels.label import check_rollout, check_sense
from s2t_shared.labels.lake import Lake
from s2t_shared.model.local_selector import Reading, SelectorKind
from s2t_shared.pair import Pair
from s2t_shared.splits import Part
from s2t_shared.statistics import clustered_difference
from s2t_shared.training.dataset import part_of
from s2t_shared.training.loss import training_loss
from s2t_shared.types import Prompt, Trigger
from services.bench import train as bench_training
from services.bench import workload
from services.bench.curve import Curve, CurveSettings, bench_curve
from services.bench.curve_answers import (
    LLM,
    MAJORITY,
    PLAIN,
    PLAIN_GATED,
    S2T,
    SLM,
    UNTRAINED,
)
from services.bench.curve_report import difference
from services.bench.curve_report import draw as draw_curve
from services.bench.curve_report import tables as curve_tables
from services.bench.decode import CONFIGURATIONS, bench_decode
from services.bench.harvest import Load, bench_harvest
from services.bench.kl import bench_kl
from services.bench.lake import made_up
from services.bench.measure import figure, ratios, take_turns
from services.bench.plot import draw
from services.bench.score import bench_score
from services.bench.train import (
    SIDES,
    PeakMemory,
    Work,
    bench_train,
    peak_memory,
    synthetic_rollouts,
)
from services.bench.workload import Settings
from services.cli import app
from services.evaluation.problems import Problem
from services.harvest.rollouts import HarvestOptions, PairRollouts
from services.harvest.run import Prompts, harvest

pytestmark = pytest.mark.slow


@pytest.fixture
def small(models: dict[str, Path]) -> Settings:
    return Settings(
        slm=str(models["slm"]),
        llm=str(models["llm"]),
        prefix=40,
        new=60,
        k=4,
        budget=0.05,
        repeats=1,
        threads=1,
    )


def test_sides_take_turns() -> None:
    """A side that always went first would get the quieter machine."""
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return 1.0

    seconds = take_turns({name: lambda name=name: side(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab" and {k: len(v) for k, v in seconds.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert figure("x", [3.0, 1.0, 2.0]).median == 2.0


def test_workload_is_what_it_says(small: Settings) -> None:
    """Lengths, mean and the number of triggers are conditions that are printed beside every
    figure."""
    for batch in (2, 7, 14, 16):
        lengths = workload.ragged_lengths(batch, 256)
        assert (
            len(lengths) == batch
            and len(set(lengths)) == batch
            and abs(sum(lengths) / batch - 256) < 2
        )
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
    assert equal == [
        "batch 1; 1 of 1 answers token for token equal",
        "batch 3; 3 of 3 answers token for token equal",
    ]


def test_decode_with_more_prompt_tokens_than_one_step_reads(small: Settings) -> None:
    """An adapter that proposes must have read the prompts too, in as many steps as it takes; else
    the sides begin at different tokens."""
    adapted = "reserved, proposals adapted"
    report = bench_decode(replace(small, new=20), [8], [adapted], False)
    assert 8 * small.prefix > PREFILL_CHUNK_TOKENS["cpu"] and len(report.figures) == 1


def test_decode_refuses_what_the_model_cannot_hold(small: Settings) -> None:
    """Answers were cut short, and an assertion about triggers failed."""
    with pytest.raises(ConfigError, match="up to 280 tokens .* lower --prefix or --new"):
        bench_decode(replace(small, prefix=160, new=100), [1, 16], [], False)


def test_score_and_kl_run(small: Settings) -> None:
    assert len(bench_score(small, [40], [4], True).figures) == 7
    report = bench_kl(small, 2, 3, True)
    (lockstep,) = [f for f in report.figures if f.name.startswith("lockstep")]
    (drafted,) = [f for f in report.figures if f.name == "KL: LLM forwards per token"]
    assert "3 of 3 answers token for token equal" in lockstep.conditions
    assert drafted.median < 0.5 * lockstep.median
    with pytest.raises(ConfigError, match="--llm"):
        bench_kl(replace(small, llm=None), 1, 1, False)


def test_the_command_prints_json_and_refuses_nonsense(small: Settings) -> None:
    runner = CliRunner()
    command = [
        "bench",
        "decode",
        "--slm",
        small.slm,
        "--prefix",
        "20",
        "--new",
        "8",
        "--kinds",
        "none",
        "--batches",
        "1",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    result = runner.invoke(app.app, command)
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and len(report["figures"]) == 3 and "torch" in report["machine"]
    for bad in (["--batches", "0"], ["--kinds", "magic"], ["--budget", "2"], ["--repeats", "0"]):
        assert "InvalidRequestError" in repr(runner.invoke(app.app, command + bad).exception)


def test_plots_are_drawn(small: Settings, tmp_path: Path) -> None:
    curves = {"prefix": [(1.0, 1.1, 1.0, 1.2), (2.0, 1.2, 1.1, 1.3)]}
    draw(
        {"batch": curves, "budget": curves, "prefix": curves, "K": curves},
        small,
        tmp_path / "cost.svg",
    )
    assert "<svg" in (tmp_path / "cost.svg").read_text()
    assert json.loads((tmp_path / "cost.json").read_text())["plots"]["K"]["prefix"][1][1] == 1.2


def test_tree_packing_trains_what_the_published_way_trains(small: Settings) -> None:
    """The baseline is plain Hugging Face code: the same loss and gradients mean that both do the
    same work."""
    report = bench_train(
        Work(replace(small, prefix=10, new=40), rollouts=2, groups=3), list(SIDES), False
    )
    figures = {f.name: f for f in report.figures}
    assert all(f"published way / {name}: time per label" in figures for name in SIDES)
    equal = [f for name, f in figures.items() if name.endswith("relative difference")]
    assert len(equal) == 4 and all(f.median < 1e-5 for f in equal)
    assert "labels: 3;" in figures["L_sel: gradient, relative difference"].conditions


def test_a_wrong_loss_is_seen(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "training_loss", lambda *work: 1.001 * training_loss(*work))
    report = bench_train(Work(replace(small, prefix=10, new=20), rollouts=1), [], False)
    assert min(f.median for f in report.figures if f.name.endswith("relative difference")) > 9e-4


def test_rollouts_of_a_made_up_lake_pass_the_drain() -> None:
    """The drain refused them all, and the bench called them lost."""
    [rows] = made_up(20)
    for rollout in rows.rollouts():
        check_rollout(rollout)
        check_sense(rollout)


def test_synthetic_rollouts_are_what_they_say(small: Settings) -> None:
    reserved = range(48, 64)
    rollouts = synthetic_rollouts(
        Work(replace(small, prefix=50, new=200), rollouts=3, share=0.1), 64, reserved
    )
    assert [(len(r.token_ids), r.prompt_length, len(r.labels)) for r in rollouts] == [
        (250, 50, 20)
    ] * 3
    for rollout in rollouts:
        check_rollout(rollout)
        assert len({label.position for label in rollout.labels}) == 20 and not set(
            rollout.token_ids
        ) & set(reserved)
        assert all(
            label.position > 50 and len(set(label.candidate_ids)) == small.k
            for label in rollout.labels
        )
    assert len({label.label_id for r in rollouts for label in r.labels}) == 60


def test_peak_memory_is_that_of_the_work(small: Settings) -> None:
    with PeakMemory("cpu") as memory:
        # Straight from the system: an allocator may hand out memory that earlier tests have freed.
        with mmap.mmap(-1, 64 << 20) as block:
            block.write(b"1" * (64 << 20))
            time.sleep(0.05)
    assert (64 << 20) * 0.9 < memory.peak - memory.before < (64 << 20) * 1.5
    work = Work(replace(small, prefix=10, new=40), rollouts=1)
    measured = peak_memory(work, "prefix, base")
    assert measured.labels == 4 and 0 < measured.growth < measured.peak


def test_harvest_sides_collect_the_same_labels(small: Settings) -> None:
    """Intervened answers are token for token those of the lockstep collector, so their labels are
    too."""
    report = bench_harvest(
        replace(small, new=30, budget=0.2), Load(prompts=4, lockstep_prompts=4, batch=3)
    )
    found = {f.name: f for f in report.figures}
    labels = [
        re.search(r"(\d+) prompts.* (\d+) labels", found[f"{name}: labels per second"].conditions)
        for name in ("token by token", "intervened")
    ]
    assert (
        labels[0]
        and labels[1]
        and labels[0].groups() == labels[1].groups()
        and labels[0].group(1) == "4"
    )
    assert "1 at once" in found["token by token: labels per second"].conditions
    assert all(
        0 < found[f"{name}: the LLM's share of the time"].median < 1
        for name in ("token by token", "plain", "intervened")
    )
    assert {
        "plain / token by token: labels per second",
        "intervened / token by token: labels per second",
    } <= set(found)


@pytest.fixture(scope="module")
def harvested(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of 120 problems, harvested with the tiny pair."""
    lake = tmp_path_factory.mktemp("lake")
    pair = workload.load(
        Settings(slm=str(models["slm"]), llm=str(models["llm"]), threads=1), needs_llm=True
    )
    assert pair.scorer is not None
    engine = Engine(pair.proposer, InProcessSelector(pair.scorer), max_num_seqs=16)
    prompts = [Prompt(token_ids=(5 + i % 43, 5 + i // 43, 6 + i % 7, 9)) for i in range(120)]
    harvest(
        PairRollouts(Pair(tokenizer=pair.tokenizer, engine=engine, llm=pair.scorer)),
        Prompts(lambda: (({"id": f"p{i}"}, p) for i, p in enumerate(prompts)), "test", 120),
        Lake(lake),
        HarvestOptions(task="curve", candidates=4, max_new_tokens=10),
    )
    return lake


@pytest.fixture
def curve(harvested: Path) -> CurveSettings:
    return CurveSettings(
        lake=harvested,
        counts=(20, 60),
        names=("prefix, base", PLAIN),
        steps=6,
        budgets=(0.5,),
        accuracy_at=(60,),
    )


PROBLEMS = [
    Problem(str(i), Prompt(token_ids=(6 + i, 7)), lambda text, i=i: f"w{i}" in text)
    for i in range(6)
]


def test_curve_goes_on_where_it_was_killed(
    small: Settings, curve: CurveSettings, tmp_path: Path
) -> None:
    alone = replace(small, new=12, llm=None)
    out = tmp_path / "curve.jsonl"
    made = []
    points = bench_curve(alone, curve, PROBLEMS, out, made.append)
    assert made == points and [(p.name, p.count) for p in points] == [
        (SLM, 0),
        (UNTRAINED, 0),
        (MAJORITY, 0),
        ("prefix, base", 20),
        (PLAIN, 20),
        (PLAIN_GATED, 20),
        ("prefix, base", 60),
        (PLAIN, 60),
        (PLAIN_GATED, 60),
    ]
    gated = ["entropy 0.5"]
    answered = [[""], gated, [""], [], [], [], gated, [""], gated]
    assert [sorted(p.correct) for p in points] == answered
    assert all(len(digits) == 6 for p in points for digits in p.correct.values())
    assert (
        all(20 <= p.labels < 60 for p in points if p.count == 20)
        and len({p.test_labels for p in points if p.name != MAJORITY}) == 1
    )

    lines = out.read_text().splitlines()
    out.write_text(
        "\n".join(lines[:-1]) + "\n" + lines[-1][:40]
    )  # killed while it wrote the last point
    made.clear()
    again = bench_curve(alone, curve, PROBLEMS, out, made.append)
    assert [p.key for p in made] == [p.key for p in points[-2:]]
    assert [replace(p, seconds=0.0) for p in again] == [replace(p, seconds=0.0) for p in points]
    more = bench_curve(alone, replace(curve, accuracy_at=(20, 60)), PROBLEMS, out, made.append)
    assert [p.count for p in made[2:]] == [20, 20, 20] and all(p.correct for p in more)

    with pytest.raises(ConfigError, match="--out"):
        bench_curve(replace(alone, new=13), curve, PROBLEMS, out)
    draw_curve(points, "tiny", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    console = Console(width=160, file=shown)
    console.print(*curve_tables(points, [p.id for p in PROBLEMS]))
    text = shown.getvalue()
    assert "entropy 50 %" in text and "- plain" in text


def test_subsets_are_nested_and_hold_whole_problems(small: Settings, curve: CurveSettings) -> None:
    work = Curve(small, replace(curve, budgets=(0.2,)), PROBLEMS)
    fewer, more = work.subset(20), work.subset(60)
    assert fewer == more[: len(fewer)] and len(more) > len(fewer)
    assert not {r.problem for r in fewer} & {r.problem for r in more[len(fewer) :]}
    assert all(part_of(r) is Part.TRAINING for r in more)
    answers = [r.entropy for r in Lake(curve.lake).rollouts() if part_of(r) is Part.TRAINING]
    allowed = 0.2 * sum(
        map(len, answers)
    )  # a share of all steps, of which the first three never trigger
    threshold = work.calibration().threshold(Trigger.ENTROPY, 0.2)
    assert 0.95 * allowed < sum(x > threshold for a in answers for x in a[3:]) <= allowed
    with pytest.raises(ConfigError, match="--counts"):
        Curve(small, replace(curve, counts=(10**6,)), PROBLEMS)
    with pytest.raises(ConfigError, match="--problems"):
        Curve(small, curve, [])


def test_with_an_llm_its_answers_and_likelihoods_stand_beside(
    small: Settings, curve: CurveSettings, tmp_path: Path
) -> None:
    """Behind two triggers, one of which the lake knows nothing of; the LLM finds its own answers
    likelier than the SLM's."""
    made = replace(small, new=12, llm=small.slm)
    wanted = replace(curve, names=(), budgets=(0.2,), triggers=(Trigger.ENTROPY, Trigger.MARGIN))
    points = {p.name: p for p in bench_curve(made, wanted, PROBLEMS, tmp_path / "c.jsonl")}
    assert list(points) == [SLM, UNTRAINED, MAJORITY, S2T, LLM]
    assert list(points[S2T].log_probs) == ["entropy 0.2", "margin 0.2"]
    assert all(len(values) == 6 for values in points[S2T].log_probs.values())
    assert points[LLM].log_probs[""] == pytest.approx(points[SLM].log_probs[""], abs=1e-4)
    assert points[LLM].agree_at_1 is None
    shown = io.StringIO()
    console = Console(width=160, file=shown)
    console.print(*curve_tables(list(points.values()), [p.id for p in PROBLEMS]))
    assert "log p" in shown.getvalue()


def test_intervals_grow_with_what_differs_between_seeds() -> None:
    groups = [str(i) for i in range(100)]
    old = [[0.0] * 100]
    alike = [[1.0, 0.0] * 50] * 3
    mean, half = difference(alike, old, groups)
    assert (mean, half) == (
        0.5,
        pytest.approx(clustered_difference(alike[0], old[0], groups)[1], rel=0.02),
    )
    apart = [[0.4, 0.4] * 50, [0.5, 0.5] * 50, [0.6, 0.6] * 50]
    mean, half = difference(apart, old, groups)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * 0.1 / 3**0.5, rel=0.01)


def test_plain_distillation_decodes_with_the_adapter_on(
    small: Settings, curve: CurveSettings
) -> None:
    """The control would be the SLM itself if its adapter were off."""
    answers: list[str] = []
    spied = [Problem(p.id, p.prompt, lambda text: bool(answers.append(text))) for p in PROBLEMS]
    work = Curve(replace(small, new=12), curve, spied)
    selector = workload.random_selector(
        work.models.slm, work.models.proposer.reserved_ids, SelectorKind.PREFIX, Reading.ADAPTED
    )
    work.answerer.answer(PLAIN, replace(selector, always_on=True))
    work.answerer.answer(SLM)
    assert len(answers) == 12 and sorted(answers[:6]) != sorted(answers[6:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--kinds", "magic"],
        ["train", "--groups", "0"],
        ["train", "--share", "2"],
        ["harvest", "--lockstep", "0"],
        ["curve", "--lake", "x", "--budgets", "0.01,2"],
        ["curve", "--lake", "x", "--counts", "9", "--accuracy-at", "7"],
    ],
)
def test_nonsense_is_refused(small: Settings, arguments: list[str]) -> None:
    name, *options = arguments
    outcome = CliRunner().invoke(app.app, ["bench", name, "--slm", small.slm, *options])
    assert "InvalidRequestError" in repr(outcome.exception) and options[-2] in str(
        outcome.exception
    )
