"""Malformed requests to every port: each ends in a documented status and tells nothing of our
insides, no prompt reaches a log, and the next good request is answered."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from s2t_shared.config import SecurityConfig
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2
from tests.faults import figures
from tests.fuzz.malformed import CANARY, GATEWAY, SELECTOR, Call, calls, raw
from tests.fuzz.sending import Sender
from tests.helpers.servers import selector_address
from tests.helpers.serving import gateway_address, gateway_config, proposer_service

TOKEN = "all-roles-0123456789abcdef"
ROOT = Path(__file__).parents[2]
GOOD = Call(
    "/s2t.v1.GenerationService/Generate",
    pb.GenerateRequest(
        parameters=pb.GenerationParameters(
            text=f"Mia has 19 coins . {CANARY}", mode=pb.MODE_S2T, threshold=0.3, max_new_tokens=4
        )
    ).SerializeToString(),
)
GOOD_SCORE = Call(
    "/s2t.v1.SelectionService/Score",
    selection_pb2.ScoreRequest(
        token_ids=[3, 4], positions=[1], candidate_ids=[5], candidate_counts=[1]
    ).SerializeToString(),
)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


def batches(size: int) -> st.SearchStrategy[tuple[list[Call], list[Call], list[bytes]]]:
    """Calls to the gateway, calls to the selector, raw bytes; of `size` in all."""
    part = size // 5
    return st.tuples(
        st.lists(calls(GATEWAY), min_size=size - 2 * part, max_size=size - 2 * part),
        st.lists(calls(SELECTOR), min_size=part, max_size=part),
        st.lists(raw, min_size=part, max_size=part),
    )


def attack(
    run: Callable[[Awaitable[None]], None], gateway: Sender, selector: Sender, count: int, size: int
) -> None:
    """Send `count` batches; after each a good request to either server is answered."""

    async def one(batch: tuple[list[Call], list[Call], list[bytes]]) -> None:
        to_gateway, to_selector, below = batch
        await gateway.send(to_gateway)
        await selector.send(to_selector)
        half = len(below) // 2
        await asyncio.gather(*(gateway.send_raw(sent) for sent in below[:half]))
        await asyncio.gather(*(selector.send_raw(sent) for sent in below[half:]))
        for sender, good in ((gateway, GOOD), (selector, GOOD_SCORE)):
            assert await sender.end_of(good) == (grpc.StatusCode.OK, ""), good.method
        assert not gateway.wrong + selector.wrong

    @examples(count)
    @given(batches(size))
    def send(batch: tuple[list[Call], list[Call], list[bytes]]) -> None:
        run(one(batch))

    send()


def test_a_few_hundred_malformed_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The short form, over a scripted SLM, in this process."""
    caplog.set_level(logging.INFO)
    (tmp_path / "tokens").write_text(TOKEN, encoding="utf-8")
    security = SecurityConfig(token_file=tmp_path / "tokens")
    service = proposer_service()
    config = gateway_config(
        tmp_path, **{"security.token_file": str(security.token_file), "gateway.max_new_tokens": 256}
    )
    with asyncio.Runner() as runner:

        async def start() -> tuple[Sender, Sender]:
            opened = await gateway.__aenter__(), await selector.__aenter__()
            return Sender(opened[0], TOKEN), Sender(opened[1], TOKEN)

        async def stop() -> None:
            await senders[0].close()
            await senders[1].close()
            await gateway.__aexit__(None, None, None)
            await selector.__aexit__(None, None, None)

        gateway, selector = gateway_address(config, service), selector_address(security)
        senders = runner.run(start())
        try:
            attack(lambda work: runner.run(work), *senders, count=10, size=30)  # type: ignore[arg-type]
        finally:
            runner.run(stop())
            service.close()
    assert sum(senders[0].ends.values()) + sum(senders[1].ends.values()) == 300
    logged = [r for r in caplog.records if r.name.startswith(("s2t_shared", "services"))]
    assert CANARY not in caplog.text and not [r for r in logged if "unexpected" in r.msg]


# -- the long form --------------------------------------------------------------------------------


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str, Path]]:
    """The bundled pair behind a gateway and a selector, in a process of its own, and its log."""
    (tmp_path / "tokens").write_text(TOKEN, encoding="utf-8")
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = start("server", errors, str(tmp_path / "data"), str(tmp_path / "tokens"))
        try:
            assert process.stdout is not None
            gateway, selector = process.stdout.readline().split()
            yield process, gateway, selector, log
        finally:
            process.kill()
            process.wait()


def start(module: str, errors: IO[str] | None, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.fuzz.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.faults
def test_ten_thousand_malformed_requests(
    servers: tuple[subprocess.Popen[str], str, str, Path],
) -> None:
    """S5, with two ordinary streams beside; their gaps are compared with those of streams alone,
    as what a busy machine does to them is no fault of the requests."""
    process, gateway_at, selector_at, log = servers
    with asyncio.Runner() as runner:

        async def connect() -> tuple[Sender, Sender]:
            return Sender(gateway_at, TOKEN), Sender(selector_at, TOKEN)

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)

        senders = runner.run(connect())
        alone = start("streams", None, gateway_at, TOKEN)
        runner.run(wait(15.0))
        before = json.loads(alone.communicate(timeout=120)[0])
        beside = start("streams", None, gateway_at, TOKEN)
        attack(lambda work: runner.run(work), *senders, count=200, size=50)  # type: ignore[arg-type]
        during = json.loads(beside.communicate(timeout=120)[0])
        for sender in senders:
            runner.run(sender.close())
    sent = sum(sum(sender.ends.values()) for sender in senders)
    print("ends:", dict(senders[0].ends), dict(senders[1].ends))
    print("gaps of streams, ms: alone", before, "beside", during)
    what = "10,000 malformed requests: "
    wrong = len(senders[0].wrong + senders[1].wrong)
    figures.at_most("S5", f"{what}without a documented status", wrong, 0)
    figures.at_most("S5", f"{what}longest gap of 2 streams beside", during["max"], 100.0, " ms")
    alone_ms = f"{before['max']:.3g} ms"
    figures.report("S5", f"{what}longest gap of 2 streams alone", alone_ms, "", None)
    assert sent == 10_000 and process.poll() is None
    assert during["failed"] == []
    assert during["max"] < 20 * max(100.0, before["max"])
    text = log.read_text(encoding="utf-8", errors="replace")
    assert CANARY not in text and "unexpected" not in text and "Traceback" not in text
