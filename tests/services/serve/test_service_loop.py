"""The closed loop on a real service: traffic becomes labels, labels a version, the version serves.

The tests run in this order on one service.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from s2t_shared import errors
from s2t_shared.bundled import SLM_DIR, problems
from s2t_shared.config import Config
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.pair import Pair
from s2t_shared.training.new_local_selector import new_local_selector, trained_tensors
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.types import (
    Answer,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    Mode,
    Policy,
    Prompt,
    Trigger,
)
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry
from services.client import Client
from services.demo import DemoSize, run_loop
from services.harvest.rollouts import HarvestOptions, PairRollouts, ServiceRollouts
from services.harvest.run import HarvestOutcome, bundled_prompts, harvest
from services.launch.local import RunningService
from services.rpc.ask_many import Target, answer_all
from services.train.follow import follow
from services.train.job import TrainOutcome, train
from tests.faults.figures import sizes

pytestmark = [pytest.mark.service, pytest.mark.slow]
PROBLEMS = problems.problems("test", 24)


def request_for(problem: problems.Problem, mode: Mode) -> GenerateRequest:
    policy = Policy(mode=mode, trigger=Trigger.ENTROPY, threshold=0.3)
    return GenerateRequest(
        request_id=problem.id,
        prompt=Prompt(text=problem.prompt),
        options=DecodeOptions(policy=policy, max_new_tokens=40),
    )


def test_the_loop_and_a_swap_under_load(service: RunningService) -> None:
    """The demo's own steps on this service, small: harvest, train, swap while requests run, ask
    again. The numbers have the documented form, nothing failed and no answer mixed versions (law
    6)."""
    lines: list[str] = []
    report = run_loop(
        service,
        DemoSize(problems=24, first_harvest=150, harvest=280, first_steps=20, steps=40),
        lines.append,
        Console(quiet=True),
    )
    assert {"greedy", "majority@8", "takeover", "s2t", "s2t_local", "llm"} <= set(report["modes"])
    for figures in report["modes"].values():
        assert {"accuracy", "n", "trigger_rate", "llm_forwards_per_token", "relative_time"} <= set(
            figures
        )
        assert figures["n"] == 24 and figures["failed"] == 0
    assert set(report["hit_at"]) == {"1", "2", "4", "8", "16"}
    swap = report["swap"]
    assert swap["in_flight"] > 0 and swap["failed"] == 0 and swap["mixed"] == 0
    assert report["modes"]["llm"]["accuracy"] > report["modes"]["greedy"]["accuracy"]
    json.dumps(report)


def test_bad_version_is_refused_and_the_old_one_serves(
    service: RunningService, client: Client
) -> None:
    """A version damaged after its promotion never replaces what serves (runs after the loop
    above)."""
    live = client.describe().live_version
    assert live
    folder = Path(service.config.versions)
    other = next(v.name for v in client.versions() if v.name != live)
    weights = folder / other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(errors.VersionError, match="hash"):
        client.promote(other)
    (folder / "LIVE").write_text(
        json.dumps({"history": [live, other]}), encoding="utf-8"
    )  # someone forces it
    time.sleep(1.5)
    assert client.describe().live_version == live
    served = client.generate(PROBLEMS[0].prompt, mode="s2t_local")
    assert served.versions.local_selector == live
    assert client.rollback() == live


def test_the_closed_loop_from_traffic_to_a_better_version(
    service: RunningService, client: Client
) -> None:
    """`s2t train --follow` beside a live service: users' requests are labelled on the way, enough
    of them start a training job, the gate compares its version with the live one (here one that
    learnt noise) on held-out problems of that very traffic and on a task set, and proposers take it
    up. Killed between publishing and promoting, the next round promotes what was published."""
    config = Config.model_validate(
        service.config.model_dump()
        | {
            "training": service.config.training.model_dump()
            | {
                "steps": 20,
                "learning_rate": 1e-3,
                "gate_min_groups": 8,
                "gate_problem_count": 40,
                "checkpoint_every": 5,
            }
        }
    )
    versions, noisy = LiveVersions(config.versions), publish_noise(config)
    client.promote(noisy)
    wait_until_live(client, noisy)
    before = accuracy_of_local(service)
    outcomes: list[TrainOutcome] = []
    lines: list[str] = []
    loop = threading.Thread(
        target=follow,
        args=(config, 300, 1),
        kwargs={"say": lines.append, "on_round": outcomes.append},
        daemon=True,
    )
    loop.start()
    requests = []
    for problem in problems.problems("train", 400, seed=11):
        labels = LabelOptions(store=True, task="shop", problem_id=problem.id)
        requests.append(replace(request_for(problem, Mode.S2T), labels=labels))
    answers = answer_all(Target(service.address), requests, concurrency=16)
    assert all(isinstance(answer, Answer) for answer in answers)
    deadline = time.monotonic() + 180
    while loop.is_alive():
        assert time.monotonic() < deadline, lines
        client.count_labels(flush=True)
        loop.join(0.5)
    assert len(outcomes) == 1 and "waiting" in lines[0] and "new labels: training" in lines[-1], (
        lines
    )
    done = outcomes[0]
    assert done.promoted and done.training_labels >= 200 and noisy in done.reason, done.reason
    assert done.figures["likelihood_items"] > 0 and done.figures["task_accuracy_items"] == 40
    assert [e["event"] for e in versions.events(done.version)] == ["gate", "live"]
    wait_until_live(client, done.version)
    served = client.generate(PROBLEMS[0].prompt, mode="s2t_local")
    assert served.versions.local_selector == done.version
    assert accuracy_of_local(service) > before

    published = train(config).version  # another one, if labels came behind the round's snapshot
    versions.promote(noisy)  # as if the process had died between publishing and promoting
    again = train(config)
    assert again.version == published and again.promoted and versions.live() == published


def publish_noise(config: Config) -> str:
    """A version whose adapter is random."""
    runtime, tokenizer = ModelRuntime.load(str(SLM_DIR)), Tokenizer.load(SLM_DIR)
    settings = TrainingSettings()
    reserved = reserved_ids(tokenizer, runtime.vocab_rows)
    selector = new_local_selector(runtime, reserved, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trained_tensors(selector):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    lake = Lake(config.lake)
    snapshot = lake.freeze().id if lake.labels_since(0.0) else ""
    return (
        Registry(config.versions)
        .publish(
            selector,
            Manifest(
                version="",
                kind=settings.kind,
                reads=settings.reads,
                temperature=settings.temperature,
                base_model=str(SLM_DIR),
                slm_digest=runtime.digest,
                llm_digest="",
                tokenizer_digest=tokenizer.digest,
                reserved_ids=reserved,
                bins=16,
                thresholds={},
                metrics={"agree_at_1": 0.0},
                snapshot=snapshot,
                training={},
                created_at=0.0,
                files={},
            ),
        )
        .version
    )


def wait_until_live(client: Client, version: str) -> None:
    deadline = time.monotonic() + 20
    while client.describe().live_version != version:
        assert time.monotonic() < deadline, f"{version} was not taken up"
        time.sleep(0.1)


def accuracy_of_local(service: RunningService) -> float:
    asked = problems.problems("test", 60)
    requests = [request_for(problem, Mode.S2T_LOCAL) for problem in asked]
    answers = answer_all(Target(service.address), requests, concurrency=16)
    right = 0
    for problem, answer in zip(asked, answers, strict=True):
        right += isinstance(answer, Answer) and problems.is_correct(problem, answer.text)
    return right / len(asked)


@pytest.mark.kill
@pytest.mark.parametrize("kills", sizes([((),)], [((24, 54),)]))
def test_harvest_through_the_service(
    service: RunningService, pair: Pair, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    """The same labels as alone in one process, whether they come back to be kept or go the
    service's own way; also when its selector and its proposer are killed after so many answers."""
    prompts = bundled_prompts(problems.problems("train", 96))
    options = HarvestOptions(task="harvested", max_new_tokens=40, calibrate_on=32)
    alone = Lake(tmp_path / "alone")
    collected = Lake(tmp_path / "collected")
    own = Lake(service.config.lake)
    harvest(PairRollouts(pair), prompts, alone, options)

    def kill(outcome: HarvestOutcome) -> None:
        if outcome.answered not in kills:
            return
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = actor["name"]
            if "SelectorReplica#" in name or "ProposerReplica#" in name:
                ray.kill(ray.get_actor(name, namespace="serve"))

    outcome = harvest(
        ServiceRollouts(Target(service.address), returns_labels=True),
        prompts,
        collected,
        options,
        kill,
    )
    assert outcome.rollouts == 96 and not outcome.failed and not outcome.errors
    harvest(ServiceRollouts(Target(service.address), returns_labels=False), prompts, own, options)
    with Client(service.address) as asking:
        deadline = time.monotonic() + 20
        while asking.count_labels(flush=True).queued and time.monotonic() < deadline:
            time.sleep(0.1)
    found = [label_ids(lake) for lake in (alone, collected, own)]
    assert len(found[0]) > 60 and found[0] == found[1]
    # Where earlier tests have harvested too, a label they have found counts as theirs.
    assert found[0] <= found[2]
    assert sum(r.task == "harvested" for r in own.rollouts()) == 96


def label_ids(lake: Lake) -> set[str]:
    return {label.label_id for rollout in lake.rollouts() for label in rollout.labels}
