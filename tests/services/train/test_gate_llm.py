"""The gate's LLM: a running service's selectors by gRPC say what a bundled LLM in process says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from s2t_shared.bundled import LLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.config import Config, load_config
from s2t_shared.decode.likelihood import mean_log_probs
from s2t_shared.pair import Pair
from services.serve.build import selector_server
from services.train import gate_llm as module
from services.train.gate_llm import gate_llm

COUNT = 6


@dataclass(frozen=True)
class RunningServer:
    address: str
    stop: threading.Event


def configured(address: str | None, llm: str = str(LLM_DIR)) -> Config:
    """As with a real pair: the LLM is a folder, which the gate never loads itself."""
    addresses = {"selector.addresses": [address]} if address else {}
    return load_config(None, {"llm.model": llm, **addresses}, environment={})


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """A selector server on a thread of its own."""
    started = threading.Event()
    stop = threading.Event()
    found: list[str] = []

    async def serve() -> None:
        server = selector_server(configured(None))
        await server.start()
        found.append(f"127.0.0.1:{server.port}")
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.05)
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(30)
    yield RunningServer(found[0], stop)
    stop.set()
    thread.join(30)


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray: only the configured addresses are asked."""
    monkeypatch.setattr(module, "_selector_handle", lambda: None)


def likelihoods(pair: Pair, config: Config) -> list[float | None] | None:
    """Of the right answers to some problems, by the gate's LLM; None where it has none."""
    contexts = []
    for problem in bundled_problems.problems("test", COUNT):
        prompt = tuple(pair.tokenizer.encode_text(problem.prompt))
        [answer] = pair.generate([problem.prompt], mode="greedy", max_new_tokens=30)
        contexts.append((prompt, answer.token_ids))
    info = pair.engine.proposer.info
    with gate_llm(config, info, pair.tokenizer) as llm:
        return None if llm is None else mean_log_probs(llm, info, contexts)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.open("bundled", batch_size=8, threads=1)


def test_a_services_selectors_say_what_a_bundled_llm_says(
    pair: Pair, server: RunningServer
) -> None:
    remote = likelihoods(pair, configured(server.address))
    local = likelihoods(pair, configured(None, llm="bundled"))
    assert remote is not None and local is not None
    assert len(remote) == COUNT and None not in remote
    assert remote == pytest.approx(local, abs=1e-4)


def test_without_a_service_the_gate_does_without(
    pair: Pair, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address, and one where nobody answers."""
    assert likelihoods(pair, configured(None)) is None
    monkeypatch.setattr(module, "REACH_S", 1.0)
    assert likelihoods(pair, configured("127.0.0.1:1")) is None
