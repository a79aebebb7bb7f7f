"""The whole service on one real Ray cluster (started once for the session): gateway, proposer,
selector, Redis."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rich.console import Console

from s2t_shared import errors
from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.config import Config, load_config
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer, reserved_ids
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc
from s2t_shared.training.objective import DistillSettings
from s2t_shared.training.trainer import new_selector, trained_tensors
from s2t_shared.types import (
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    Sampling,
    Trigger,
)
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry
from services.client import Client, parameters
from services.demo import DemoSize, run_loop
from services.harvest.rollouts import ByService, HarvestOptions, InProcess
from services.harvest.run import HarvestOutcome, harvest, pair_prompts
from services.launch.local import RunningService, running_service
from services.rpc.ask_many import Target, answer_all
from services.train.follow import follow
from services.train.job import TrainOutcome, train

PROBLEMS = problems.problems("test", 24)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    config = load_config(
        overrides={
            "data_dir": str(tmp_path_factory.mktemp("data")),
            "gateway.port": 0,
            "training.learning_rate": 3e-3,
            "defaults.answer_pattern": problems.ANSWER_PATTERN,
            "proposer.selection_timeout_s": 1.0,
        },
        environment={},
    )
    with running_service(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.address, timeout_s=60) as c:
        yield c


@pytest.fixture(scope="module")
def in_process() -> Generator:
    tokenizer = Tokenizer.load(SLM_DIR)
    slm, llm = ModelRuntime.load(str(SLM_DIR)), ModelRuntime.load(str(LLM_DIR))
    scorer = LLMSelector(llm, tokenizer.digest)
    engine = Engine(
        Proposer(slm, reserved_ids(tokenizer, slm.vocab_rows)), InProcessSelector(scorer)
    )
    return Generator(tokenizer, engine, scorer.info.digest)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(mode=Mode.GREEDY),
        Policy(mode=Mode.SAMPLE),
        Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.5),
        Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=0.5, candidates=CandidateRule(4)),
        Policy(mode=Mode.TAKEOVER, trigger=Trigger.MARGIN, threshold=0.5),
        Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ENTROPY, threshold=0.2),
        Policy(mode=Mode.LLM),
    ],
    ids=lambda p: f"{p.mode.value}-{p.trigger.value}",
)
def test_local_equals_remote(
    service: RunningService, in_process: Generator, policy: Policy
) -> None:
    """Law 3: through gateway, Serve and gRPC come the same tokens and the same triggered Steps as
    in one process."""
    requests = [
        GenerateRequest(
            request_id=p.id,
            prompt=Prompt(text=p.prompt),
            options=DecodeOptions(
                policy=policy, sampling=Sampling(seed=7), max_new_tokens=40, version=""
            ),
        )
        for p in PROBLEMS
    ]
    local = {r.request_id: a for r, a in in_process.generate(requests)}
    parameters = [
        (
            p.id,
            pb.GenerationParameters(
                text=p.prompt,
                mode=f"MODE_{policy.mode.name}",
                trigger=f"TRIGGER_{policy.trigger.name}",
                threshold=policy.threshold,
                candidates=policy.candidates.k,
                sampling=pb.Sampling(seed=7),
                max_new_tokens=40,
                version="none",
                return_steps=True,
            ),
        )
        for p in PROBLEMS
    ]
    remote = answer_all(Target(service.address), parameters, concurrency=8)
    seen = 0
    for problem, there in zip(PROBLEMS, remote, strict=True):
        here = local[problem.id]
        assert isinstance(here, Answer) and isinstance(there, pb.Answer), there
        assert tuple(there.token_ids) == here.token_ids and there.text == here.text
        triggered = [s for s in here.steps if s.triggered]
        assert [(s.index, s.token_id, list(s.candidate_ids)) for s in triggered] == [
            (s.index, s.token_id, list(s.candidate_ids)) for s in there.steps
        ]
        for a, b in zip(triggered, there.steps, strict=True):
            assert list(b.scores) == pytest.approx(a.scores, rel=1e-4, abs=1e-4)
            assert b.signal == pytest.approx(a.signal, rel=1e-4, abs=1e-4)
            seen += 1
    if policy.can_trigger:
        assert seen > 5  # otherwise the comparison above compared nothing


def test_streaming_pieces_are_the_text(client: Client) -> None:
    """Every piece in order and nothing else; the last message has the answer."""
    pieces = list(client.stream(PROBLEMS[0].prompt, mode="greedy", max_new_tokens=40))
    assert len(pieces) >= 3 and all(not p.HasField("answer") for p in pieces[:-1])
    assert "".join(p.text for p in pieces) == pieces[-1].answer.text
    assert (
        client.generate(PROBLEMS[0].prompt, mode="greedy", max_new_tokens=40).text
        == pieces[-1].answer.text
    )


def test_mixed_modes_share_the_engine(service: RunningService) -> None:
    """All modes at once: none disturbs another's tokens."""
    modes = ["MODE_GREEDY", "MODE_S2T", "MODE_TAKEOVER", "MODE_LLM", "MODE_MAJORITY", "MODE_SAMPLE"]
    questions = [
        (
            f"{m}-{p.id}",
            pb.GenerationParameters(text=p.prompt, mode=m, threshold=0.5, max_new_tokens=40),
        )
        for p in PROBLEMS[:8]
        for m in modes
    ]
    together = answer_all(Target(service.address), questions, concurrency=48)
    alone = answer_all(Target(service.address), questions, concurrency=1)
    assert all(isinstance(a, pb.Answer) for a in together + alone)
    assert [list(a.token_ids) for a in together] == [list(a.token_ids) for a in alone]  # type: ignore[union-attr]


def test_messages_and_token_ids(client: Client) -> None:
    """The three forms of one prompt give one answer."""
    prompt = PROBLEMS[1].prompt
    text = client.generate(prompt, mode="greedy").text
    assert client.generate([{"role": "user", "content": prompt}], mode="greedy").text == text
    assert (
        client.generate(Tokenizer.load(SLM_DIR).encode(Prompt(text=prompt)), mode="greedy").text
        == text
    )


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"candidates": 0}, errors.InvalidRequestError, "candidates=0: must be 1..64"),
        ({"candidates": 65}, errors.InvalidRequestError, "candidates=65: must be 1..64"),
        ({"budget": 1.5}, errors.InvalidRequestError, "budget=1.5"),
        ({"threshold": float("nan")}, errors.InvalidRequestError, "threshold=nan"),
        ({"max_new_tokens": 0}, errors.InvalidRequestError, "max_new_tokens=0"),
        ({"samples": 65, "mode": "majority"}, errors.InvalidRequestError, "samples=65"),
        (
            {"sampling": pb.Sampling(top_p=0.0), "mode": "sample"},
            errors.InvalidRequestError,
            "top_p=0",
        ),
        ({"stop": [""]}, errors.InvalidRequestError, "stop"),
        ({"version": "v9999-nothing"}, errors.VersionNotFoundError, "v9999-nothing"),
        ({"version": "../../etc"}, errors.VersionNotFoundError, "no version"),
        ({"mode": "s2t_local"}, errors.VersionNotFoundError, "no local selector is live"),
        (
            {"labels": pb.LabelOptions(store=True, split="test")},
            errors.EvaluationSplitError,
            "evaluation split",
        ),
        ({"timeout_seconds": 1e-4}, errors.DeadlineExceededError, "deadline"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_bad_requests(
    client: Client, settings: dict, kind: type[errors.S2TError], message: str
) -> None:
    """Each bad input has its own status and says what is wrong; nothing of our insides shows."""
    with pytest.raises(kind, match=message) as caught:
        client.generate(PROBLEMS[0].prompt, **{"mode": "s2t", **settings})
    for secret in ("Traceback", "/", "actor", "ray", PROBLEMS[0].prompt):
        assert secret not in str(caught.value).replace("../../etc", "")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "no tokens|non-empty"), ([999_999], "999999"), ("coins " * 300, "prompt has 300 tokens")],
    ids=["empty", "id out of range", "too long"],
)
def test_bad_prompts(client: Client, prompt: str | list[int], message: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message):
        client.generate(prompt, mode="greedy")


def test_unknown_mode_is_refused(client: Client) -> None:
    with pytest.raises(errors.InvalidRequestError, match="MODE_NOPE"):
        client.generate("x", mode="nope")


def test_health_and_reflection(service: RunningService) -> None:
    """What load balancers and grpcurl ask."""
    with grpc.insecure_channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="s2t.v1.GenerationService"), timeout=10
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listed = next(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
        )
        names = {s.name for s in listed.list_services_response.service}
        assert {"s2t.v1.GenerationService", "s2t.v1.AdminService", "grpc.health.v1.Health"} <= names


def test_selections_become_labels_and_cache(client: Client) -> None:
    """Every LLM selection is a label; the same question again is answered without the LLM."""
    settings = {"mode": "s2t", "threshold": 0.3, "max_new_tokens": 40}
    before = client.count_labels(flush=True)
    first = client.generate(
        PROBLEMS[2].prompt, labels=pb.LabelOptions(store=True, task="t"), **settings
    )
    assert first.usage.triggers > 0 and first.labels_stored == first.usage.triggers
    deadline = time.monotonic() + 10
    while (after := client.count_labels(flush=True)).in_lake < before.in_lake + first.labels_stored:
        assert time.monotonic() < deadline, after
        time.sleep(0.1)
    assert after.dead_letters == 0 and after.dropped == 0
    again = client.generate(PROBLEMS[2].prompt, **settings)
    assert list(again.token_ids) == list(first.token_ids) and again.labels_stored == 0
    assert again.usage.triggers == first.usage.triggers and again.usage.llm_forwards == 0
    fresh = client.generate(PROBLEMS[2].prompt, fresh_selections=True, **settings)
    assert fresh.usage.llm_forwards == first.usage.triggers


def long_answer(seed: int) -> dict[str, Any]:
    """Settings of an answer that takes seconds: drawn from all words alike, it seldom meets the
    end."""
    return {
        "mode": "sample",
        "sampling": pb.Sampling(temperature=100.0, seed=seed),
        "max_new_tokens": 240,
    }


@pytest.fixture(scope="module")
def long_seeds(service: RunningService, in_process: Generator) -> list[int]:
    """Seeds of answers with 200 tokens and more, as many as the batch holds."""
    wanted = service.config.proposer.max_num_seqs
    requests = (
        GenerateRequest(
            request_id=str(seed),
            prompt=Prompt(text=PROBLEMS[3].prompt),
            options=DecodeOptions(
                policy=Policy(mode=Mode.SAMPLE),
                sampling=Sampling(100.0, seed=seed),
                max_new_tokens=240,
            ),
        )
        for seed in range(12 * wanted)
    )
    seeds = [
        request.sampling.seed
        for request, answer in in_process.generate(requests)
        if isinstance(answer, Answer) and len(answer.token_ids) >= 200
    ]
    assert len(seeds) >= wanted
    return seeds[:wanted]


Leave = Callable[[Any, grpc.Channel], None]


def leave_streams(service: RunningService, seeds: list[int], leave: Leave) -> None:
    """Stream long answers, as many as the batch holds; leave all of them when each has sent a
    piece."""
    calls = []
    for seed in seeds:
        channel = grpc.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)])
        request = pb.StreamGenerateRequest(
            parameters=parameters(PROBLEMS[3].prompt, **long_answer(seed))
        )
        calls.append(
            (generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request), channel)
        )
    for call, _ in calls:
        next(call)
    for call, channel in calls:
        leave(call, channel)


def cancel_unary(service: RunningService, seeds: list[int]) -> None:
    with grpc.insecure_channel(service.address) as channel, Client(service.address) as watching:
        request = pb.GenerateRequest(
            parameters=parameters(PROBLEMS[3].prompt, **long_answer(seeds[0]))
        )
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate.future(request)
        deadline = time.monotonic() + 10
        while not watching.describe().running_sequences:
            assert time.monotonic() < deadline and not call.done()
        call.cancel()


LEAVING: dict[str, Callable[[RunningService, list[int]], None]] = {
    "streams cancelled": lambda service, seeds: leave_streams(
        service, seeds, lambda call, _: call.cancel()
    ),
    "clients gone": lambda service, seeds: leave_streams(
        service, seeds, lambda _, channel: channel.close()
    ),
    "unary cancelled": cancel_unary,
}


@pytest.mark.parametrize("way", LEAVING)
def test_answers_that_nobody_waits_for_are_stopped(
    service: RunningService, client: Client, long_seeds: list[int], way: str
) -> None:
    """Batch and KV are free within 250 ms (the best of three times: the machine may be busy), and
    stay sound."""
    expected = client.generate(PROBLEMS[3].prompt, mode="greedy").text
    took = []
    for _ in range(3):
        LEAVING[way](service, long_seeds)
        left = time.monotonic()
        while any(held(client)):
            assert time.monotonic() < left + 30, held(client)
        took.append(time.monotonic() - left)
    assert min(took) < 0.25, took
    assert client.generate(PROBLEMS[3].prompt, mode="greedy").text == expected


def held(client: Client) -> tuple[int, int, int]:
    d = client.describe()
    return d.running_sequences, d.waiting_sequences, d.live_kv_slots


def test_killed_selector_degrades_and_returns(service: RunningService, client: Client) -> None:
    """Law 5: with the LLM dead no client that has it select sees an error, the answers are greedy's
    and say so; its own answers (mode llm) are refused. When it is back it is used again."""
    greedy = {p.id: client.generate(p.prompt, mode="greedy").text for p in PROBLEMS}
    selected: dict[str, Any] = {
        "mode": "s2t",
        "trigger": "always",
        "threshold": 0.0,
        "fresh_selections": True,
    }
    names = [
        n["name"]
        for n in ray.util.list_named_actors(all_namespaces=True)
        if "Selector#" in n["name"]
    ]
    assert len(names) == 1
    failures: list[Exception] = []
    answers: dict[str, pb.Answer] = {}

    def ask(problem: problems.Problem) -> None:
        try:
            with Client(service.address, timeout_s=60) as own:
                answers[problem.id] = own.generate(problem.prompt, **selected)
        except errors.S2TError as error:
            failures.append(error)

    ray.kill(ray.get_actor(names[0], namespace="serve"))
    threads = [threading.Thread(target=ask, args=(p,)) for p in PROBLEMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    degraded = {
        i: a for i, a in answers.items() if a.usage.degraded_steps == a.usage.completion_tokens
    }
    assert degraded, "the kill hit no answer"
    for problem_id, answer in degraded.items():
        assert answer.text == greedy[problem_id]
    with pytest.raises(errors.SelectorUnavailableError, match="mode llm"):
        client.generate(PROBLEMS[0].prompt, mode="llm", fresh_selections=True)
    deadline = time.monotonic() + 60
    while client.generate(PROBLEMS[0].prompt, **selected).usage.degraded_steps:
        assert time.monotonic() < deadline, "the selector did not come back"
        time.sleep(0.5)
    assert not client.generate(
        PROBLEMS[0].prompt, mode="llm", fresh_selections=True
    ).usage.degraded_steps


def test_the_loop_and_a_swap_under_load(service: RunningService) -> None:
    """The demo's own steps on this service, small: harvest, train, swap while requests run, ask
    again. The numbers have the documented form, nothing failed and no answer mixed versions (law
    6)."""
    lines: list[str] = []
    report = run_loop(
        service,
        DemoSize(problems=30, first_harvest=150, harvest=300, first_steps=30, steps=60),
        lines.append,
        Console(quiet=True),
    )
    assert {"greedy", "majority@8", "takeover", "s2t", "s2t_local", "llm"} <= set(report["modes"])
    for figures in report["modes"].values():
        assert {"accuracy", "n", "trigger_rate", "llm_forwards_per_token", "relative_time"} <= set(
            figures
        )
        assert figures["n"] == 30 and figures["failed"] == 0
    assert set(report["hit_at"]) == {"1", "2", "4", "8"}
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
    assert client.generate(PROBLEMS[0].prompt, mode="s2t_local").versions.selector == live
    assert client.rollback() == live


def test_a_bug_shows_nothing_of_our_insides() -> None:
    """S7: an unexpected exception ends the call as INTERNAL with a text of ours, not with its
    own."""
    import asyncio

    from services.serve.generation_servicer import refuse

    ended: list[tuple[Any, str]] = []

    class Context:
        async def abort(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
            ended.append((code, details))
            raise RuntimeError("aborted")

    with pytest.raises(RuntimeError, match="aborted"):
        asyncio.run(refuse(Context(), KeyError("/secret/path")))  # type: ignore[arg-type]
    assert (
        ended[0][0] is grpc.StatusCode.INTERNAL
        and "secret" not in ended[0][1]
        and "KeyError" not in ended[0][1]
    )


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
                "gate_min_problems": 8,
                "gate_problem_count": 40,
                "checkpoint_every": 5,
            }
        }
    )
    registry, noisy = Registry(config.versions), publish_noise(config)
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
    traffic = problems.problems("train", 400, seed=11)
    questions = [
        (
            p.id,
            pb.GenerationParameters(
                text=p.prompt,
                mode="MODE_S2T",
                trigger="TRIGGER_ENTROPY",
                threshold=0.3,
                max_new_tokens=40,
                labels=pb.LabelOptions(store=True, task="shop", problem_id=p.id),
            ),
        )
        for p in traffic
    ]
    assert all(
        isinstance(a, pb.Answer)
        for a in answer_all(Target(service.address), questions, concurrency=16)
    )
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
    assert done.figures["difference_low"] > 0 and done.figures["task_problems"] == 40
    assert [e["event"] for e in registry.events(done.version)] == ["gate", "live"]
    wait_until_live(client, done.version)
    assert client.generate(PROBLEMS[0].prompt, mode="s2t_local").versions.selector == done.version
    assert accuracy_of_local(service) > before

    registry.promote(noisy)  # as if the process had died between publishing and promoting
    again = train(config)
    assert again.version == done.version and again.promoted and registry.live() == done.version


def publish_noise(config: Config) -> str:
    """A version whose adapter is random."""
    runtime, tokenizer = ModelRuntime.load(str(SLM_DIR)), Tokenizer.load(SLM_DIR)
    settings = DistillSettings()
    reserved = reserved_ids(tokenizer, runtime.vocab_rows)
    selector = new_selector(runtime, reserved, settings)
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
    questions = [
        (
            p.id,
            pb.GenerationParameters(
                text=p.prompt,
                mode="MODE_S2T_LOCAL",
                trigger="TRIGGER_ENTROPY",
                threshold=0.3,
                max_new_tokens=40,
            ),
        )
        for p in asked
    ]
    answers = answer_all(Target(service.address), questions, concurrency=16)
    return sum(
        isinstance(a, pb.Answer) and problems.is_correct(p, a.text)
        for p, a in zip(asked, answers, strict=True)
    ) / len(asked)


def test_harvest_through_the_service(
    service: RunningService, in_process: Generator, tmp_path: Path
) -> None:
    """The same labels as alone in one process, whether they come back to be kept or go the
    service's own way; also when its selector and its proposer are killed meanwhile."""
    prompts = pair_prompts(problems.problems("train", 160))
    options = HarvestOptions(task="harvested", max_new_tokens=40, calibrate_on=32)
    alone, collected, own = (
        Lake(tmp_path / "alone"),
        Lake(tmp_path / "collected"),
        Lake(service.config.lake),
    )
    harvest(InProcess(in_process), prompts, alone, options)

    def kill(outcome: HarvestOutcome) -> None:
        for part in ("Selector#", "ProposerReplica#") if outcome.heard in (40, 90) else ():
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if part in actor["name"]:
                    ray.kill(ray.get_actor(actor["name"], namespace="serve"))

    outcome = harvest(
        ByService(Target(service.address), collect=True), prompts, collected, options, kill
    )
    assert outcome.rollouts == 160 and not outcome.failed and not outcome.errors
    harvest(ByService(Target(service.address), collect=False), prompts, own, options)
    with Client(service.address) as asking:
        deadline = time.monotonic() + 20
        while asking.count_labels(flush=True).queued and time.monotonic() < deadline:
            time.sleep(0.1)
    found = [
        {label.label_id for r in lake.rollouts() for label in r.labels}
        for lake in (alone, collected, own)
    ]
    assert len(found[0]) > 100 and found[0] == found[1]
    assert (
        found[0] <= found[2]
    )  # where earlier tests have harvested too; a label they have found counts as theirs
    assert sum(r.task == "harvested" for r in own.rollouts()) == 160
