"""The whole service on a real Ray cluster: what only Ray, Serve, Redis and the models show."""

from __future__ import annotations

import math
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import openai
import pytest
import ray

from s2t_shared import errors
from s2t_shared.bundled import problems
from s2t_shared.pair import Pair
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc
from s2t_shared.types import (
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    Mode,
    Policy,
    Prompt,
    Sampling,
    Step,
    Trigger,
)
from services.client import Client
from services.launch.local import RunningService
from services.launch.running import find_metrics
from services.roles import SECTIONS
from services.rpc.ask_many import Target, answer_all

pytestmark = pytest.mark.service
PROBLEMS = problems.problems("test", 24)


def request_for(
    problem: problems.Problem, policy: Policy, request_id: str = "", **options: Any
) -> GenerateRequest:
    """One of the problems, 40 tokens at most, without a local selector."""
    settings = {"policy": policy, "max_new_tokens": 40, "version": "", **options}
    return GenerateRequest(
        request_id=request_id or problem.id,
        prompt=Prompt(text=problem.prompt),
        options=DecodeOptions(**settings),
        return_steps=True,
    )


def answers_of(
    service: RunningService, requests: list[GenerateRequest], concurrency: int
) -> list[Answer]:
    found = []
    for outcome in answer_all(Target(service.address), requests, concurrency=concurrency):
        assert isinstance(outcome, Answer), outcome
        found.append(outcome)
    return found


# -- answers --------------------------------------------------------------------------------------


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
def test_local_equals_remote(service: RunningService, pair: Pair, policy: Policy) -> None:
    """Law 3: through gateway, Serve and gRPC come the same tokens and the same triggered Steps as
    in one process."""
    requests = [request_for(p, policy, sampling=Sampling(seed=7)) for p in PROBLEMS]
    here = {request.request_id: outcome for request, outcome in pair.run(requests)}
    there = answers_of(service, requests, concurrency=8)
    triggered = 0
    for request, remote in zip(requests, there, strict=True):
        local = here[request.request_id]
        assert isinstance(local, Answer)
        assert (remote.token_ids, remote.text) == (local.token_ids, local.text)
        assert [chosen(s) for s in remote.steps] == [chosen(s) for s in local.steps]
        for a, b in zip(local.steps, remote.steps, strict=True):
            assert b.scores == pytest.approx(a.scores, rel=1e-4, abs=1e-4)
            assert b.signal == pytest.approx(a.signal, rel=1e-4, abs=1e-4)
            triggered += 1
    if policy.can_trigger:
        assert triggered > 5  # otherwise the comparison above compared nothing


def chosen(step: Step) -> tuple[int, int, tuple[int, ...]]:
    return step.index, step.token_id, step.candidate_ids


def test_metrics_of_every_role_here_and_through_ray(service: RunningService) -> None:
    """Each replica has an endpoint of its own, and Ray's shows all of the node."""
    urls = find_metrics()
    assert urls.keys() == SECTIONS.keys()
    for name, role in SECTIONS.items():
        (url,) = urls[name]
        assert f'role="{role}"' in read_metrics(url)
    (node,) = ray.nodes()
    through_ray = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    give_up_at = time.monotonic() + 40
    roles: set[str] = set()
    while roles != set(SECTIONS.values()) and time.monotonic() < give_up_at:
        time.sleep(0.5)
        roles = set(re.findall(r'ray_s2t_build_info\{.*role="(\w+)"', read_metrics(through_ray)))
    assert roles == set(SECTIONS.values())
    assert "ray_s2t_generation_tokens_total{" in read_metrics(through_ray)


def read_metrics(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def test_streaming_pieces_are_the_text(client: Client) -> None:
    """Every piece in order and nothing else; the last message has the answer."""
    settings = {"mode": "greedy", "max_new_tokens": 40}
    pieces = list(client.stream(PROBLEMS[0].prompt, **settings))
    assert len(pieces) >= 3 and all(piece.answer is None for piece in pieces[:-1])
    answer = pieces[-1].answer
    assert answer is not None
    assert "".join(piece.text for piece in pieces) == answer.text
    assert client.generate(PROBLEMS[0].prompt, **settings).text == answer.text


@pytest.mark.parametrize("mode", ["greedy", "s2t", "takeover"])
def test_streamed_steps_are_those_of_the_answer(client: Client, mode: str) -> None:
    """Through Serve too they come one by one, in order, each once, and never change."""
    settings = {"mode": mode, "threshold": 0.3, "max_new_tokens": 40, "return_steps": True}
    triggered = 0
    for problem in PROBLEMS[:6]:
        pieces = list(client.stream(problem.prompt, stream_steps=True, **settings))
        answer = pieces[-1].answer
        assert answer is not None and len(pieces) >= 3
        steps = [step for piece in pieces for step in piece.steps]
        assert tuple(step.token_id for step in steps) == answer.token_ids
        assert [step.index for step in steps] == list(range(len(steps)))
        assert "".join(step.text for step in steps) == answer.text
        assert tuple(step for step in steps if step.triggered) == answer.steps
        triggered += len(answer.steps)
    assert bool(triggered) == (mode != "greedy")


def test_mixed_modes_share_the_engine(service: RunningService) -> None:
    """All modes at once: none disturbs another's tokens."""
    modes = (Mode.GREEDY, Mode.S2T, Mode.TAKEOVER, Mode.LLM, Mode.MAJORITY, Mode.SAMPLE)
    requests = []
    for problem in PROBLEMS[:8]:
        for mode in modes:
            policy = Policy(mode=mode, threshold=0.5)
            requests.append(request_for(problem, policy, f"{mode.value}-{problem.id}"))
    together = answers_of(service, requests, concurrency=48)
    alone = answers_of(service, requests, concurrency=1)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_messages_and_token_ids(client: Client, pair: Pair) -> None:
    """The three forms of one prompt give one answer."""
    prompt = PROBLEMS[1].prompt
    ids = pair.tokenizer.encode(Prompt(text=prompt))
    text = client.generate(prompt, mode="greedy").text
    assert client.generate([{"role": "user", "content": prompt}], mode="greedy").text == text
    assert client.generate(ids, mode="greedy").text == text


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"candidates": 65}, errors.InvalidRequestError, "candidates=65: must be 1..64"),
        ({"version": "v9999-nothing"}, errors.VersionNotFoundError, "v9999-nothing"),
        ({"version": "../../etc"}, errors.VersionNotFoundError, "no version"),
        ({"timeout_seconds": 1e-4}, errors.DeadlineExceededError, "deadline"),
    ],
    ids=str,
)
def test_errors_keep_their_kind_through_serve(
    client: Client, settings: dict[str, Any], kind: type[errors.S2TError], message: str
) -> None:
    """They say what is wrong; nothing of our insides shows."""
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


# -- labels and the cache -------------------------------------------------------------------------


def test_selections_become_labels_and_cache(service: RunningService, client: Client) -> None:
    """Every LLM selection is a label; the same question again is answered without the LLM."""
    plain = request_for(PROBLEMS[2], Policy(mode=Mode.S2T, threshold=0.3))
    labelled = replace(plain, labels=LabelOptions(store=True, task="t"))
    fresh = replace(plain, options=replace(plain.options, fresh_selections=True))
    before = client.count_labels(flush=True)
    [first] = answers_of(service, [labelled], 1)
    assert first.usage.triggers > 0 and first.labels_stored == first.usage.triggers
    deadline = time.monotonic() + 10
    while (after := client.count_labels(flush=True)).in_lake < before.in_lake + first.labels_stored:
        assert time.monotonic() < deadline, after
        time.sleep(0.1)
    assert after.dead_letters == 0 and after.dropped == 0
    [again] = answers_of(service, [plain], 1)
    assert again.token_ids == first.token_ids and again.labels_stored == 0
    assert again.usage.triggers == first.usage.triggers and again.usage.llm_forwards == 0
    [asked] = answers_of(service, [fresh], 1)
    assert asked.usage.llm_forwards == first.usage.triggers


# -- clients that leave ---------------------------------------------------------------------------


def long_answer(seed: int) -> pb.GenerationParameters:
    """An answer that takes seconds: drawn from all words alike, it seldom meets the end."""
    sampling = pb.Sampling(temperature=100.0, seed=seed)
    return pb.GenerationParameters(
        text=PROBLEMS[3].prompt, mode=pb.MODE_SAMPLE, sampling=sampling, max_new_tokens=240
    )


@pytest.fixture(scope="module")
def long_seeds(service: RunningService, pair: Pair) -> list[int]:
    """Seeds of answers with 200 tokens and more, as many as the batch holds."""
    wanted = service.config.proposer.max_num_seqs
    requests = []
    for seed in range(12 * wanted):
        options = {"sampling": Sampling(100.0, seed=seed), "max_new_tokens": 240}
        requests.append(request_for(PROBLEMS[3], Policy(mode=Mode.SAMPLE), str(seed), **options))
    seeds = []
    for request, outcome in pair.run(requests):
        if isinstance(outcome, Answer) and len(outcome.token_ids) >= 200:
            seeds.append(request.options.sampling.seed)
    assert len(seeds) >= wanted
    return seeds[:wanted]


Leave = Callable[[Any, grpc.Channel], None]


def leave_streams(service: RunningService, seeds: list[int], leave: Leave) -> None:
    """Stream long answers, as many as the batch holds; leave all of them when each has sent a
    piece."""
    calls = []
    for seed in seeds:
        channel = grpc.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)])
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = pb.StreamGenerateRequest(parameters=long_answer(seed))
        calls.append((stub.StreamGenerate(request), channel))
    for call, _ in calls:
        next(call)
    for call, channel in calls:
        leave(call, channel)


def cancel_streams(service: RunningService, seeds: list[int]) -> None:
    leave_streams(service, seeds, lambda call, _: call.cancel())


def close_channels(service: RunningService, seeds: list[int]) -> None:
    leave_streams(service, seeds, lambda _, channel: channel.close())


def cancel_unary(service: RunningService, seeds: list[int]) -> None:
    with grpc.insecure_channel(service.address) as channel, Client(service.address) as watching:
        request = pb.GenerateRequest(parameters=long_answer(seeds[0]))
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate.future(request)
        deadline = time.monotonic() + 10
        while not watching.describe().running_sequences:
            assert time.monotonic() < deadline and not call.done()
        call.cancel()


@pytest.mark.parametrize("leave", [cancel_streams, close_channels, cancel_unary])
def test_answers_that_nobody_waits_for_are_stopped(
    service: RunningService,
    client: Client,
    long_seeds: list[int],
    leave: Callable[[RunningService, list[int]], None],
) -> None:
    """Batch and KV are free long before the answers' end, and stay sound. How soon is measured by
    tests/faults/test_ends.py, on a machine that may be less busy."""
    expected = client.generate(PROBLEMS[3].prompt, mode="greedy").text
    took: list[float] = []
    while len(took) < 10 and min(took, default=math.inf) >= 1.0:
        leave(service, long_seeds)
        left = time.monotonic()
        while any(held(client)):
            assert time.monotonic() < left + 30, held(client)
        took.append(time.monotonic() - left)
    assert min(took) < 1.0, took
    assert client.generate(PROBLEMS[3].prompt, mode="greedy").text == expected


def held(client: Client) -> tuple[int, int, int]:
    d = client.describe()
    return d.running_sequences, d.waiting_sequences, d.live_kv_slots


# -- a selector that dies -------------------------------------------------------------------------


@pytest.mark.kill
@pytest.mark.faults
def test_killed_selector_degrades_and_returns(service: RunningService, client: Client) -> None:
    """Law 5: with the LLM dead no client that has it select sees an error, the answers are greedy's
    and say so; its own answers (mode llm) are refused. When it is back it is used again."""
    greedy = {p.id: client.generate(p.prompt, mode="greedy").text for p in PROBLEMS}
    selected: dict[str, Any] = {"mode": "s2t", "trigger": "always", "fresh_selections": True}
    selected["threshold"] = 0.0
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if "SelectorReplica#" in actor["name"]]
    assert len(names) == 1
    failures: list[Exception] = []
    answers: dict[str, Answer] = {}

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
    degraded = {}
    for problem_id, answer in answers.items():
        if answer.usage.degraded_steps == answer.usage.completion_tokens:
            degraded[problem_id] = answer.text
    assert degraded, "the kill hit no answer"
    for problem_id, text in degraded.items():
        assert text == greedy[problem_id]
    with pytest.raises(errors.SelectorUnavailableError, match="mode llm"):
        client.generate(PROBLEMS[0].prompt, mode="llm", fresh_selections=True)
    deadline = time.monotonic() + 60
    while client.generate(PROBLEMS[0].prompt, **selected).usage.degraded_steps:
        assert time.monotonic() < deadline, "the selector did not come back"
        time.sleep(0.5)
    own_answer = client.generate(PROBLEMS[0].prompt, mode="llm", fresh_selections=True)
    assert not own_answer.usage.degraded_steps


def test_http_says_what_grpc_says(service: RunningService, client: Client) -> None:
    """Through Serve too: the same text, and the divergence with what both models thought of it."""
    problem = PROBLEMS[0]
    settings = {"mode": "s2t", "budget": 0.05, "version": "none"}
    answer = client.generate(problem.prompt, max_new_tokens=40, return_steps=True, **settings)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as opened:
        reply: Any = opened.completions.create(
            model="bundled",
            prompt=problem.prompt,
            max_tokens=40,
            extra_body={"s2t": {**settings, "steps": True}},
        )
    [choice] = reply.choices
    assert choice.text == answer.text
    indices = [step.index for step in answer.steps if step.triggered]
    assert [d["index"] for d in choice.s2t["divergences"]] == indices != []
    assert all(a["llm"] is not None for a in choice.s2t["divergences"][0]["alternatives"])
