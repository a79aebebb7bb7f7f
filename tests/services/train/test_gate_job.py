"""The gate at work: it judges on unseen labels, and an operator has the last word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2t_shared.config import Config
from s2t_shared.errors import EvaluationSplitError
from s2t_shared.versions.gate import Verdict
from s2t_shared.versions.live import LiveVersions
from services.train.gate import enact
from services.train.gate_job import judge_version
from services.train.gate_problems import task_problems
from services.train.job import train
from services.train.worker import train_and_publish
from tests.helpers.training_job import job_now, with_training


@pytest.mark.slow
def test_the_gate_lets_the_better_version_pass(config: Config, tmp_path: Path) -> None:
    """A version that learnt the rule beats the SLM alone; the same one again does not beat itself;
    one that learnt nothing is refused against it; each says why in numbers of unseen labels. Then
    training starts from the live one."""
    config = with_training(config, gate_min_groups=5)
    problems = tmp_path / "tasks.jsonl"
    rows = [
        {"id": f"t{i}", "prompt": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i}"} for i in range(6)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    good = train_and_publish(config, job_now(config), publishes=True)
    assert good is not None
    few = judge_version(with_training(config, gate_problems=str(problems)), good.version)
    assert not few.passed and "task accuracy" in few.reasons[0]
    assert few.figures["task_accuracy_items"] == 6
    verdict = judge_version(config, good.version)
    assert verdict.passed, verdict.reasons
    assert "Agree@1" in verdict.reasons[0] and "the SLM alone" in verdict.reasons[0]
    assert verdict.figures["agree_at_1"] == pytest.approx(good.metrics["agree_at_1"])
    versions = LiveVersions(config.versions)
    versions.promote(good.version)
    poor = with_training(config, learning_rate=1e-9, steps=1)
    nothing = train_and_publish(poor, job_now(poor), publishes=True)
    assert nothing is not None
    refused = judge_version(poor, nothing.version)
    assert not refused.passed and good.version in refused.reasons[0]
    assert not judge_version(config, good.version).passed
    more = with_training(config, init_from="live", learning_rate=1e-9, steps=1)
    from_live = train_and_publish(more, job_now(more), publishes=True)
    assert from_live is not None and from_live.training["init_from"] == good.version
    assert from_live.metrics["agree_at_1"] == pytest.approx(good.metrics["agree_at_1"])


def test_the_gate_bounds_what_the_adapter_does_to_the_model(config: Config) -> None:
    """`reads: adapted` changes the language model on the contexts: beyond the bound it does not
    pass."""
    config = with_training(
        config, reads="adapted", steps=40, gate_min_groups=5, reg_weight=0.0, gate_max_lm_kl=1e-6
    )
    manifest = train_and_publish(config, job_now(config), publishes=True)
    assert manifest is not None
    verdict = judge_version(config, manifest.version)
    assert not verdict.passed and any("LM-KL" in reason for reason in verdict.reasons)


def test_automatic_promotion_respects_the_operator(config: Config) -> None:
    """A version that was taken back stays back, and a canary on trial stays alone, until the
    operator says so."""
    config = with_training(config, steps=2)
    other = with_training(config, seed=1)
    first = train_and_publish(config, job_now(config), publishes=True)
    second = train_and_publish(other, job_now(other), publishes=True)
    assert first is not None and second is not None
    versions = LiveVersions(config.versions)
    passed = Verdict(True, ("better",))
    assert enact(versions, first.version, passed, promote=False) == (False, "better")
    assert versions.live() is None
    assert enact(versions, first.version, passed) == (True, "better")
    assert enact(versions, second.version, passed)[0] and versions.rollback() == first.version
    versions.record("gate", second.version, **passed.as_json())
    promoted, reason = enact(versions, second.version, passed)
    assert not promoted and versions.live() == first.version
    assert reason.startswith("not promoted: it was rolled back")
    assert f"s2t versions promote {second.version}" in reason
    versions.promote(second.version, 0.1)
    state = versions.state()
    for version in (first.version, second.version):
        promoted, reason = enact(versions, version, passed)
        assert not promoted and "canary" in reason and versions.state() == state
    versions.promote(second.version)  # the operator's last word
    versions.promote(first.version)
    assert enact(versions, second.version, passed) == (True, "better")
    assert versions.live() == second.version
    refused = Verdict(False, ("worse",))
    assert enact(versions, first.version, refused) == (False, "not promoted: worse")


@pytest.mark.parametrize(("name", "split"), [("test.jsonl", "train"), ("tasks.jsonl", "test")])
def test_the_gate_refuses_evaluation_problems(
    config: Config, tmp_path: Path, name: str, split: str
) -> None:
    """By file name and by row, and before any training."""
    row = {"id": "t", "prompt": "w1 w2", "answer": "w1", "split": split}
    (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = with_training(config, gate_problems=str(tmp_path / name))
    for call in (task_problems, train):
        with pytest.raises(EvaluationSplitError):
            call(config)
