"""Harvesting: what becomes a label, and that a run ends with the same labels however often it was
stopped."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.errors import (
    ConfigError,
    EvaluationSplitError,
    InvalidRequestError,
    S2TError,
    SelectorUnavailableError,
)
from s2t_shared.labels.lake import Lake
from s2t_shared.model.tokenizer import Tokenizer, reserved_ids
from s2t_shared.pair import Pair
from s2t_shared.types import WARMUP_STEPS, LabelRule, Prompt, Trigger
from services.harvest.journal import CHUNK
from services.harvest.rollouts import (
    HarvestOptions,
    OnRollout,
    PairRollouts,
    RolloutOutcome,
    RolloutRequest,
)
from services.harvest.run import HarvestOutcome, Prompts, bundled_prompts, harvest

OPTIONS = HarvestOptions(task="t", max_new_tokens=40, calibrate_on=CHUNK)
KILLS = int(os.environ.get("S2T_KILLS", "3"))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.open(str(SLM_DIR), str(LLM_DIR), batch_size=16, threads=1)


@pytest.fixture(scope="module")
def source(pair: Pair) -> PairRollouts:
    return PairRollouts(pair)


def prompts(count: int) -> Prompts:
    return bundled_prompts(problems.problems("train", count))


def contents(lake: Path) -> dict[str, tuple]:
    """Label id -> all that a label says."""
    return {
        label.label_id: (r.problem_id, label.position, label.candidate_ids, label.llm_top_id)
        for r in Lake(lake).rollouts()
        for label in r.labels
    }


def written(lake: Path) -> int:
    """Labels on disk before any deduplication."""
    return sum(s.labels for s in Lake(lake).shards())


class Interrupted:
    """A source that is stopped after so many rollouts, as Ctrl-C does; or some of whose rollouts
    fail."""

    returns_labels = True

    def __init__(
        self,
        inner: PairRollouts,
        pair: Pair,
        stop_after: int = 10**9,
        error: S2TError | None = None,
        failing: Callable[[RolloutRequest], bool] = lambda request: False,
    ) -> None:
        self.digests = inner.digests
        self.precision = inner.precision
        self._inner = inner
        self._engine = pair.engine
        self._left = stop_after
        self._error = error
        self._failing = failing
        self.rolled = 0

    def make_rollouts(
        self,
        requests: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: OnRollout,
    ) -> None:
        def interrupted(request: RolloutRequest, outcome: RolloutOutcome) -> None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            self.rolled += 1
            fails = self._error is not None and self._failing(request)
            on_rollout(request, self._error if fails else outcome)

        try:
            self._inner.make_rollouts(requests, options, interrupted)
        except KeyboardInterrupt:
            # The process would be gone; this one's engine must be empty again.
            while not self._engine.idle:
                for sequence in self._engine.sequences:
                    self._engine.cancel(sequence)
                self._engine.step()
            raise


@pytest.fixture(scope="module")
def undisturbed(source: PairRollouts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    lake = tmp_path_factory.mktemp("undisturbed")
    outcome = harvest(source, prompts(150), Lake(lake), OPTIONS)
    found = contents(lake)
    assert outcome.prompts == outcome.rollouts == 150 and outcome.labels == len(found) > 150
    return found


# -- what is a label ------------------------------------------------------------------------------


def test_labels_are_what_both_models_say(source: PairRollouts, tmp_path: Path) -> None:
    """Against plain Hugging Face forwards: the SLM's top 16 with its log-probabilities, the LLM's
    of the same ids and its first choice, at every labelled position; and the statistics of every
    position."""
    harvest(source, prompts(4), Lake(tmp_path), replace(OPTIONS, budget=0.3))
    slm, llm = (AutoModelForCausalLM.from_pretrained(d) for d in (SLM_DIR, LLM_DIR))
    tokenizer = Tokenizer.load(SLM_DIR)
    reserved = list(reserved_ids(tokenizer, slm.get_input_embeddings().weight.shape[0]))
    seen = 0
    for r in Lake(tmp_path).rollouts():
        ids = torch.tensor([r.token_ids])
        with torch.no_grad():
            logits = [m(ids).logits[0].float() for m in (slm, llm)]
        for x in logits:
            x[:, [i for i in reserved if i < x.shape[1]]] = -torch.inf
        p_slm, p_llm = (x.log_softmax(-1) for x in logits)
        for label in r.labels:
            at = label.position - 1
            top = p_slm[at].topk(16)
            assert label.candidate_ids == tuple(top.indices.tolist())
            assert label.slm_log_probs == pytest.approx(top.values.tolist(), abs=1e-4)
            assert label.llm_log_probs == pytest.approx(p_llm[at, top.indices].tolist(), abs=1e-4)
            assert (
                label.llm_top_id == int(p_llm[at].argmax())
                and label.position - r.prompt_length >= WARMUP_STEPS
            )
            seen += 1
        answer = range(r.prompt_length - 1, len(r.token_ids) - 1)
        ranks = [
            p_slm[at].topk(64).indices.tolist().index(int(p_llm[at].argmax())) for at in answer
        ]
        assert list(r.llm_top_rank) == ranks and len(r.kl) == len(r.entropy) == len(ranks)
    assert seen > 15


@pytest.mark.parametrize(
    ("triggers", "signals"),
    [
        ((Trigger.KL,), ("kl",)),
        ((Trigger.ENTROPY,), ("entropy",)),
        ((Trigger.ENTROPY, Trigger.KL), ("kl", "entropy")),
    ],
    ids=["kl", "entropy", "both"],
)
def test_the_top_share_becomes_labels(
    source: PairRollouts, tmp_path: Path, triggers: tuple[Trigger, ...], signals: tuple[str, ...]
) -> None:
    """Exactly the positions whose signal lies above the run's own thresholds: here 10 % of all, per
    signal."""
    outcome = harvest(
        source, prompts(60), Lake(tmp_path), replace(OPTIONS, triggers=triggers, calibrate_on=60)
    )
    plan = json.loads((tmp_path / "runs" / outcome.run / "plan.json").read_text())
    above = dict(plan["rules"])
    assert set(above) == set(signals)
    rollouts = list(Lake(tmp_path).rollouts())
    positions = sum(len(r.kl) for r in rollouts)
    for signal_name in signals:
        marked = sum(
            x > above[signal_name] for r in rollouts for x in getattr(r, signal_name)[WARMUP_STEPS:]
        )
        assert marked == pytest.approx(0.1 * positions, abs=0.005 * positions + 1)
    for r in (
        rollouts
    ):  # a threshold is one position's own value: fp32 on disk may fall on either side of it
        found = {label.position - r.prompt_length for label in r.labels}
        for i in range(WARMUP_STEPS, len(r.kl)):
            excess = max(getattr(r, s)[i] - above[s] for s in signals)
            assert abs(excess) < 1e-6 or (i in found) == (excess > 0)
        assert all(i >= WARMUP_STEPS for i in found)


def test_intervened_rollouts_are_the_services_own(source: PairRollouts, tmp_path: Path) -> None:
    """Their tokens are S2T's (here: often the LLM's choice where the SLM's differs), scored at
    every position too."""
    plain, intervened = tmp_path / "plain", tmp_path / "intervened"
    harvest(source, prompts(40), Lake(plain), OPTIONS)
    outcome = harvest(source, prompts(40), Lake(intervened), replace(OPTIONS, intervene=True))
    threshold = dict(
        json.loads((intervened / "runs" / outcome.run / "plan.json").read_text())["rules"]
    )["kl"]
    greedy = {r.problem_id: r for r in Lake(plain).rollouts()}
    changed = 0
    for r in Lake(intervened).rollouts():
        assert (
            r.source == "intervened" and len(r.llm_top_rank) == len(r.token_ids) - r.prompt_length
        )
        changed += r.token_ids != greedy[r.problem_id].token_ids
        for label in r.labels:
            if label.kl > threshold and label.position < len(r.token_ids):
                assert r.token_ids[label.position] == label.candidate_ids[label.best]
    assert changed > 10


def test_given_thresholds(source: PairRollouts, tmp_path: Path) -> None:
    harvest(
        source,
        prompts(8),
        Lake(tmp_path),
        replace(
            OPTIONS, thresholds=(LabelRule(Trigger.ENTROPY, 0.5),), triggers=(Trigger.ENTROPY,)
        ),
    )
    labels = [label for r in Lake(tmp_path).rollouts() for label in r.labels]
    assert labels and all(label.entropy > 0.5 for label in labels)


# -- stopping and going on ------------------------------------------------------------------------


@pytest.mark.kill
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stops=st.lists(st.integers(0, 190), min_size=1, max_size=3))
def test_stopped_and_started_again(
    source: PairRollouts,
    pair: Pair,
    undisturbed: dict[str, tuple],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
) -> None:
    """Law 7: stopped anywhere (while it calibrates, in the middle of a chunk), the labels in the
    end are the same, each written once."""
    lake = tmp_path_factory.mktemp("lake")
    for stop in stops:
        with suppress(KeyboardInterrupt):
            harvest(Interrupted(source, pair, stop), prompts(150), Lake(lake), OPTIONS)
    outcome = harvest(source, prompts(150), Lake(lake), OPTIONS)
    assert contents(lake) == undisturbed and written(lake) == len(undisturbed) == outcome.labels
    idle = Interrupted(source, pair)
    assert harvest(idle, prompts(150), Lake(lake), OPTIONS).resumed == 150 and idle.rolled == 0


@pytest.mark.slow
def test_again_mends_a_lake_that_lost_labels(
    source: PairRollouts, undisturbed: dict[str, tuple], tmp_path: Path
) -> None:
    """A shard that is gone (quarantined, say) comes back with `again`, and nothing is there
    twice."""
    harvest(source, prompts(150), Lake(tmp_path), OPTIONS)
    lost = Lake(tmp_path).shards()[2].name
    for suffix in (".json", ".parquet"):
        (tmp_path / f"{lost}{suffix}").unlink()
    assert contents(tmp_path) != undisturbed
    assert harvest(source, prompts(150), Lake(tmp_path), OPTIONS).resumed == 150  # it does not know
    assert harvest(source, prompts(150), Lake(tmp_path), OPTIONS, again=True).prompts == 150
    assert contents(tmp_path) == undisturbed and written(tmp_path) == len(undisturbed)


def is_working(lake: Path) -> bool:
    for lock in lake.glob("runs/*/lock"):
        with lock.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


@pytest.mark.kill
def test_killed_and_started_again(undisturbed: dict[str, tuple], tmp_path: Path) -> None:
    """The same through the command line with kill -9 at random moments (20 of them with
    S2T_KILLS=20)."""
    file, lake = tmp_path / "train.jsonl", tmp_path / "lake"
    file.write_text(
        "".join(
            json.dumps({"id": p.id, "prompt": p.prompt}) + "\n"
            for p in problems.problems("train", 150)
        ),
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "services.main",
        "harvest",
        str(file),
        "--out",
        str(lake),
        "--slm",
        str(SLM_DIR),
        "--llm",
        str(LLM_DIR),
        "--task",
        "t",
        "--max-new-tokens",
        "40",
        "--calibrate-on",
        str(CHUNK),
        "--threads",
        "1",
        "--json",
    ]
    rng = random.Random(1)
    killed = 0
    while killed < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not is_working(lake):
            time.sleep(0.01)  # starting costs seconds and touches nothing
        time.sleep(rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        elif process.returncode == 0:  # it was done before: the next kills hit a new run
            assert contents(lake) == undisturbed
            shutil.rmtree(lake)
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert contents(lake) == undisturbed and written(lake) == len(undisturbed) == told["labels"]
    assert not Lake(lake).verify()


@pytest.mark.kill
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": p.id, "prompt": p.prompt}) + "\n"
            for p in problems.problems("train", 2000)
        ),
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "services.main",
            "harvest",
            str(file),
            "--out",
            str(tmp_path / "lake"),
            "--slm",
            str(SLM_DIR),
            "--llm",
            str(LLM_DIR),
            "--threads",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list((tmp_path / "lake").glob("shard-*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (
        process.returncode == 130
        and "the same command goes on" in error
        and "Traceback" not in error
    )


def test_one_process_per_run(source: PairRollouts, pair: Pair, tmp_path: Path) -> None:
    """A second one is told, rather than doing the same work again."""

    def second(outcome: HarvestOutcome) -> None:
        with pytest.raises(ConfigError, match="another process"):
            harvest(Interrupted(source, pair), prompts(5), Lake(tmp_path), OPTIONS)

    harvest(source, prompts(5), Lake(tmp_path), OPTIONS, second)


def test_other_options_are_another_run(source: PairRollouts, tmp_path: Path) -> None:
    first = harvest(source, prompts(5), Lake(tmp_path), OPTIONS)
    other = harvest(source, prompts(5), Lake(tmp_path), replace(OPTIONS, candidates=8))
    assert first.run != other.run and other.resumed == 0


# -- what goes wrong ------------------------------------------------------------------------------


def test_bad_prompts_are_told_and_never_tried_again(
    source: PairRollouts, pair: Pair, tmp_path: Path
) -> None:
    rows = [
        ({"id": f"p{i}"}, Prompt(text=p.prompt))
        for i, p in enumerate(problems.problems("train", 6))
    ]
    rows[1] = ({"id": "bad"}, InvalidRequestError("line 2: not JSON"))
    rows[2] = ({"id": "long"}, Prompt(text="coins " * 400))
    bad = Prompts(lambda: rows, "bad", 6)
    outcome = harvest(source, bad, Lake(tmp_path), OPTIONS)
    assert outcome.rollouts == 4 and len(outcome.errors) == 2 and not outcome.failed
    assert any("line 2" in e for e in outcome.errors) and any(
        "long: the prompt has" in e for e in outcome.errors
    )
    again = harvest(Interrupted(source, pair), bad, Lake(tmp_path), OPTIONS)
    assert again.errors == outcome.errors and again.labels == outcome.labels


@pytest.mark.slow
def test_what_failed_is_tried_again(source: PairRollouts, pair: Pair, tmp_path: Path) -> None:
    """An LLM that is away spoils only the chunks it hits, and only for now."""
    given = replace(OPTIONS, thresholds=(LabelRule(Trigger.KL, 0.3),), triggers=(Trigger.KL,))
    away = Interrupted(
        source,
        pair,
        error=SelectorUnavailableError("away"),
        failing=lambda a: a.problem_id.endswith("7"),
    )
    first = harvest(away, prompts(100), Lake(tmp_path / "a"), given)
    assert first.failed and first.prompts < 100
    second = harvest(source, prompts(100), Lake(tmp_path / "a"), given)
    harvest(source, prompts(100), Lake(tmp_path / "b"), given)
    assert not second.failed and second.prompts == 100
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_to_calibrate_on(source: PairRollouts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no thresholds"):
        harvest(source, Prompts(lambda: [], "none", 0), Lake(tmp_path), OPTIONS)


def test_evaluation_splits_are_refused(source: PairRollouts, tmp_path: Path) -> None:
    with pytest.raises(EvaluationSplitError):
        harvest(source, prompts(5), Lake(tmp_path), replace(OPTIONS, split="test"))
