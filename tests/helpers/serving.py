"""A proposer and a gateway in this process, over a scripted SLM and a scripted LLM: no Ray, no
models."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from s2t_shared.config import Config, load_config
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.scripted import ScriptedSelector, ScriptedSLM
from s2t_shared.errors import VersionNotFoundError
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.policy import BUDGETS, Calibration
from s2t_shared.types import Trigger
from s2t_shared.versions.live import LiveVersions
from services.metrics.decode_meter import DecodeMeter
from services.rpc import channels
from services.serve.admin_servicer import AdminServicer
from services.serve.engine_thread import EngineThread
from services.serve.gateway_server import GatewayServer
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService

Result = TypeVar("Result")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
UNSURE_AT = (4, 6)  # behind the warm-up
ALTERNATIVE = "other"
SLM_TEXT = " one two three four five six seven eight"
LLM_TEXT = " one two three four other six other eight"
CALIBRATION = Calibration({Trigger.ENTROPY: dict.fromkeys(BUDGETS, 0.3)})


def scripted_slm(words: list[str] = WORDS, **options: Any) -> ScriptedSLM:
    """Says `SLM_TEXT`; at two of its words it might as well say `ALTERNATIVE`."""
    return ScriptedSLM(words, unsure_at=UNSURE_AT, alternatives=[ALTERNATIVE], **options)


def slow_slm(**options: Any) -> ScriptedSLM:
    """Says one word for seconds."""
    return ScriptedSLM(["word"] * 4000, step_s=0.002, **options)


def scripted_llm(slm: ScriptedSLM, **options: Any) -> ScriptedSelector:
    """Prefers `ALTERNATIVE`, so that the answer becomes `LLM_TEXT`."""
    return ScriptedSelector(prefers=slm.tokenizer.id_of(ALTERNATIVE), **options)


def local_selector(version: str) -> LocalSelector:
    """A version as a scripted SLM needs it: its name."""
    return LocalSelector(
        version=version, kind=SelectorKind.PREFIX, reads=Reading.BASE, reserved_ids=()
    )


@dataclass
class FixedVersions:
    """Serving versions that nobody loads or changes. canary_ids: requests that get the canary."""

    live: LocalSelector | None = None
    on_trial: LocalSelector | None = None
    share: float = 0.0
    canary_ids: frozenset[str] = frozenset()
    others: list[LocalSelector] = field(default_factory=list)
    live_created_at: float = 1.7e9

    @property
    def live_version(self) -> str:
        return self.live.version if self.live is not None else ""

    @property
    def canary_version(self) -> str:
        return self.on_trial.version if self.on_trial is not None else ""

    @property
    def canary_share(self) -> float:
        return self.share if self.on_trial is not None else 0.0

    def choose(self, request_id: str) -> LocalSelector | None:
        return self.on_trial if request_id in self.canary_ids else self.live

    async def obtain(self, version: str) -> LocalSelector:
        for selector in (self.live, self.on_trial, *self.others):
            if selector is not None and selector.version == version:
                return selector
        raise VersionNotFoundError(f"no version {version!r} in the registry")


def proposer_service(
    slm: ScriptedSLM | None = None,
    selector: ScriptedSelector | None = None,
    *,
    versions: FixedVersions | None = None,
    writer: LabelWriter | None = None,
    max_ongoing_requests: int = 256,
    max_queue_s: float = 0.0,
    stall_timeout_s: float = 60.0,
    check_when_idle: Callable[[], None] = lambda: None,
    **engine_options: Any,
) -> ProposerService:
    """The real service over fakes."""
    slm = slm or scripted_slm()
    selector = selector or scripted_llm(slm)
    engine = Engine(slm, selector, **engine_options)
    return ProposerService(
        engine=EngineThread(engine, slm.tokenizer, check_when_idle, DecodeMeter()),
        tokenizer=slm.tokenizer,
        selector=selector,
        versions=versions or FixedVersions(),
        labels=LabelRecorder(writer),
        calibration=lambda: CALIBRATION,
        max_ongoing_requests=max_ongoing_requests,
        max_queue_s=max_queue_s,
        stall_timeout_s=stall_timeout_s,
    )


def gateway_config(folder: Path, **settings: Any) -> Config:
    """Without HTTP, unless it is asked for: its end takes a tenth of a second."""
    overrides = {"data_dir": str(folder), "gateway.port": 0, "gateway.http": False, **settings}
    return load_config(overrides=overrides, environment={})


@asynccontextmanager
async def gateway(
    config: Config, proposers: Any, stream: LabelStream | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the real gateway server before `proposers`."""
    async with gateway_address(config, proposers, stream) as address:
        async with channels.open_channel(address, None) as channel:
            yield channel


@asynccontextmanager
async def gateway_address(
    config: Config, proposers: Any, stream: LabelStream | None = None
) -> AsyncIterator[str]:
    """The address of the real gateway server before `proposers`."""
    async with gateway_server(config, proposers, stream) as server:
        yield f"127.0.0.1:{server.port}"


@asynccontextmanager
async def gateway_server(
    config: Config, proposers: Any, stream: LabelStream | None = None
) -> AsyncIterator[GatewayServer]:
    """The real gateway server before `proposers`, answering."""
    admin = AdminServicer(
        versions=LiveVersions(config.versions),
        lake=open_lake(config.lake),
        proposers=proposers,
        stream=stream,
    )
    server = GatewayServer(config, proposers, admin)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(grace_s=0.0)


def with_gateway(folder: Path, service: ProposerService, work: Callable[[str], Result]) -> Result:
    """The result of blocking work with the address of a gateway before `service`."""

    async def main() -> Result:
        async with gateway_address(gateway_config(folder), service) as address:
            return await asyncio.to_thread(work, address)

    try:
        return asyncio.run(main())
    finally:
        service.close()


@contextmanager
def http_and_grpc(folder: Path, service: Any, **settings: Any) -> Iterator[tuple[str, str]]:
    """URL and gRPC address of a gateway before `service`, on a thread of its own."""
    config = gateway_config(folder, **{"gateway.http": True, **settings})
    started: Future[tuple[str, str]] = Future()
    ended = threading.Event()

    async def main() -> None:
        async with gateway_server(config, service) as server:
            started.set_result((server.url, f"127.0.0.1:{server.port}"))
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    try:
        yield started.result(timeout=30)
    finally:
        ended.set()
        thread.join()
        if isinstance(service, ProposerService):
            service.close()


@contextmanager
def http_gateway(folder: Path, service: Any, **settings: Any) -> Iterator[str]:
    """The URL of a gateway before `service`, on a thread of its own."""
    with http_and_grpc(folder, service, **settings) as (url, _):
        yield url


def with_http(folder: Path, service: Any, work: Callable[[str], Result], **settings: Any) -> Result:
    """The result of blocking work with the URL of a gateway before `service`."""
    with http_gateway(folder, service, **settings) as url:
        return work(url)


async def becomes(holds: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether `holds` comes true in time."""
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    return holds()
