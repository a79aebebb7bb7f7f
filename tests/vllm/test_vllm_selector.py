"""The LLM selector on vLLM against the one on torch, both in fp32 on the bundled LLM.

These tests have an environment of their own: `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import grpc.aio
import psutil
import pytest

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.config import load_config
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import SelectorClient
from s2t_shared.decode.llm_selector import (
    IMPOSSIBLE,
    InProcessSelector,
    LLMSelector,
)
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.vllm_options import VLLMOptions
from s2t_shared.decode.vllm_selector import VLLMSelectorClient
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.pair import Pair
from s2t_shared.pb.v1.selection_pb2_grpc import SelectionServiceStub
from s2t_shared.types import (
    CandidateRule,
    DecodeOptions,
    DecodeRequest,
    Mode,
    Policy,
    ScoreQuery,
    ScoreReply,
    Trigger,
)
from services.rpc import wire
from services.serve.build import selector_server

OPTIONS = VLLMOptions(dtype="float32", max_length=255, eager=True)
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def torch_llm() -> LLMSelector:
    return LLMSelector(ModelRuntime.load(str(LLM_DIR)), Tokenizer.load(LLM_DIR).digest)


@pytest.fixture(scope="module")
def vllm_llm() -> Iterator[VLLMSelectorClient]:
    client = VLLMSelectorClient("bundled", OPTIONS)
    yield client
    client.close()


def random_query(rng: random.Random, rows: int) -> ScoreQuery:
    length = rng.randint(1, 200)
    positions = sorted(rng.sample(range(length), min(length, rng.choice([1, 1, 2, 8]))))
    excluded = rng.sample(range(rows), rng.choice([0, 5, 40]))
    groups = []
    for _ in positions:
        groups.append(tuple(rng.sample(range(rows), rng.choice([1, 4, 16, 64]))))
    return ScoreQuery(
        token_ids=tuple(rng.randrange(rows) for _ in range(length)),
        positions=tuple(positions),
        candidate_ids=tuple(groups),
        excluded_ids=tuple(excluded),
        vocab_size=rng.choice([0, rows - 3]),
    )


def test_scores_are_the_torch_selectors(
    torch_llm: LLMSelector, vllm_llm: VLLMSelectorClient
) -> None:
    """Every best id, and log-probabilities as near as two sets of kernels are: 1e-4 on an Intel
    CPU, 2e-4 on an AMD one, 4e-4 there for ids that have next to no mass. With excluded ids and
    padding rows."""
    rng = random.Random(0)
    rows = torch_llm.runtime.vocab_rows
    queries = [random_query(rng, rows) for _ in range(40)]
    expected = torch_llm.score(queries)
    futures = vllm_llm.submit(queries)
    compared = 0
    for query, reply, future in zip(queries, expected, futures, strict=True):
        found = future.result(TIMEOUT_S)
        assert found.llm_digest == vllm_llm.info.digest
        barred = {*query.excluded_ids, *range(query.vocab_size or rows, rows)}
        asked = zip(query.candidate_ids, reply.positions, found.positions, strict=True)
        for ids, there, here in asked:
            assert here.top_id == there.top_id
            for token_id, a, b in zip(ids, there.log_probs, here.log_probs, strict=True):
                if token_id in barred:  # no mass: one says -10,000, the other about -100
                    assert a == IMPOSSIBLE and b < -60
                else:
                    assert b == pytest.approx(a, abs=1e-3)
                    compared += 1
    assert compared > 500


def test_a_repeated_query_is_answered_the_same(vllm_llm: VLLMSelectorClient) -> None:
    """The second time its context comes from vLLM's prefix cache."""
    query = random_query(random.Random(7), 64)
    first, second = [future.result(TIMEOUT_S) for future in vllm_llm.submit([query, query])]
    assert first.positions == second.positions
    for here, there in zip(first.positions, second.positions, strict=True):
        assert here.log_probs == pytest.approx(there.log_probs, abs=1e-5)


def test_wrong_queries_are_refused(vllm_llm: VLLMSelectorClient) -> None:
    good = random_query(random.Random(1), 64)
    wrong = [
        replace(good, token_ids=()),
        replace(good, token_ids=(5,) * 256),
        replace(good, positions=(len(good.token_ids),), candidate_ids=((1,),)),
        replace(good, token_ids=(10**6,) * len(good.token_ids)),
    ]
    for future in vllm_llm.submit(wrong):
        with pytest.raises(InvalidRequestError):
            future.result(TIMEOUT_S)
    assert vllm_llm.submit([good])[0].result(TIMEOUT_S).positions


def test_a_deadline_aborts(vllm_llm: VLLMSelectorClient) -> None:
    """Nothing of the query is left in vLLM."""
    selector = vllm_llm._selector
    query = random_query(random.Random(2), 64)

    async def late() -> None:
        await selector.score(query, time_left_s=0.0)

    with pytest.raises(SelectorUnavailableError, match="deadline"):
        asyncio.run_coroutine_threadsafe(late(), vllm_llm._loop).result(TIMEOUT_S)
    assert vllm_llm.submit([query])[0].result(TIMEOUT_S).positions
    assert selector.is_alive
    assert not selector._engine.output_processor.has_unfinished_requests()


@pytest.mark.parametrize(
    "policy",
    [
        Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.5, candidates=CandidateRule(8)),
        Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=0.1, candidates=CandidateRule(8)),
        Policy(mode=Mode.TAKEOVER, trigger=Trigger.ENTROPY, threshold=0.5),
        Policy(mode=Mode.LLM),
    ],
    ids=["entropy", "kl", "takeover", "llm"],
)
def test_answers_are_the_same(
    torch_llm: LLMSelector, vllm_llm: VLLMSelectorClient, policy: Policy
) -> None:
    """Every mode that asks the LLM, token for token, by the same engine."""
    runtime = ModelRuntime.load(str(SLM_DIR))
    tokenizer = Tokenizer.load(SLM_DIR)
    proposer = Proposer(runtime, reserved_ids(tokenizer, runtime.vocab_rows))

    def answers(selector: SelectorClient) -> list[tuple[int, ...]]:
        engine = Engine(proposer, selector, selection_timeout_s=TIMEOUT_S)
        live = []
        for problem in bundled_problems.problems("test", 6):
            ids = tuple(tokenizer.encode_text(problem.prompt))
            options = DecodeOptions(policy=policy, max_new_tokens=24)
            request = DecodeRequest(request_id=problem.id, token_ids=ids, options=options)
            live.append(engine.add(request))
        while not engine.idle:
            engine.step()
            engine.wait()
        assert not any(step.degraded for s in live for step in s.steps)
        return [s.output_ids for s in live]

    assert answers(vllm_llm) == answers(InProcessSelector(torch_llm))


def test_the_pair_opens_with_it(torch_llm: LLMSelector) -> None:
    """The front door: the same answers as with both models on torch."""
    prompts = [problem.prompt for problem in bundled_problems.problems("test", 4)]
    settings = {"mode": "s2t", "threshold": 0.5, "max_new_tokens": 24}
    there = Pair.open("bundled", "bundled", threads=1).generate(prompts, **settings)
    pair = Pair.open("bundled", "bundled", threads=1, vllm=OPTIONS)
    here = pair.generate(prompts, **settings)
    assert [a.token_ids for a in here] == [a.token_ids for a in there]
    assert pair.llm_digest == OPTIONS.digest(torch_llm.info.digest)
    kill_vllm()
    [answer] = pair.generate(prompts[:1], **settings)
    assert answer.usage.degraded_steps > 0 and answer.token_ids


def test_a_selector_server_on_it(torch_llm: LLMSelector) -> None:
    """What Serve runs with `llm.runtime: vllm`, asked by gRPC as proposers do."""
    rng = random.Random(5)
    rows = torch_llm.runtime.vocab_rows
    queries = [random_query(rng, rows) for _ in range(6)]
    overrides = {"llm.runtime": "vllm", "llm.max_length": 255, "llm.dtype": "float32"}
    config = load_config(None, overrides, environment={})

    async def ask() -> list[ScoreReply]:
        server = selector_server(config)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub = SelectionServiceStub(channel)
                calls = [stub.Score(wire.write_query(query)) for query in queries]
                replies = await asyncio.gather(*calls)
            pairs = zip(queries, replies, strict=True)
            return [wire.read_reply(query, reply) for query, reply in pairs]
        finally:
            await server.stop()

    for found, expected in zip(asyncio.run(ask()), torch_llm.score(queries), strict=True):
        top = [position.top_id for position in expected.positions]
        assert [position.top_id for position in found.positions] == top


def kill_vllm() -> None:
    """SIGKILL the engine processes that this process started last."""
    children = psutil.Process().children(recursive=True)
    engines = [child for child in children if "EngineCore" in "".join(child.cmdline())]
    assert engines
    newest = max(engines, key=lambda child: child.create_time())
    newest.kill()
    newest.wait(30)


def test_other_options_are_another_llm() -> None:
    digests = {
        OPTIONS.digest("a"),
        OPTIONS.digest("b"),
        replace(OPTIONS, quantization="fp8").digest("a"),
        replace(OPTIONS, tensor_parallel=2).digest("a"),
    }
    assert len(digests) == 4
