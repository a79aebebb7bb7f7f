"""The service's parts as processes of their own, to be killed, frozen and started again.

    test process -- control pipe --> proposer behind its gateway --> selector
                                                                 --> Redis

Everything is the product's own but the two models (`script`) and what Ray does: it starts, finds
and restarts replicas. Processes are forked from a server that has imported everything, so that one
is there again within 100 ms. One that is told to end with its parent does: the control pipe closes.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from s2t_shared.config import Config, SecurityConfig, SelectorConfig, load_config
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.labels.known_models import Models
from s2t_shared.types import ScoreQuery, ScoreReply
from services.serve import build, build_gateway
from services.serve.engine_thread import EngineThread
from services.serve.garbage import spare_what_is_loaded
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from services.serve.remote_selector import RemoteSelector, address_finder
from services.serve.selector_server import SelectorServer
from tests.faults import script
from tests.helpers.serving import CALIBRATION, FixedVersions

HOST = "127.0.0.1"
OPEN = SecurityConfig()
START_S = 120.0  # forking the first process waits for the imports
ANSWER_S = 30.0
DRAIN_S = 20.0  # for what is under way when a part is told to end

Vitals = dict[str, Any]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.faults.processes"])


# -- in the process -------------------------------------------------------------------------------


class Control:
    """The process's end of the control pipe: says that it is ready, then answers for its vitals
    until it is terminated or its parent has gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.started_at = 0.0

    async def serve(self, vitals: Callable[[], Vitals]) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def answer() -> None:
            try:
                self._pipe.recv()
            except EOFError:
                os._exit(0)
            tasks = len(asyncio.all_tasks(loop))
            self._pipe.send({"tasks": tasks, "started_at": self.started_at, **vitals()})

        loop.add_signal_handler(signal.SIGTERM, ended.set)
        loop.add_reader(self._pipe.fileno(), answer)
        spare_what_is_loaded()
        self.started_at = time.monotonic()
        self._pipe.send("ready")
        await ended.wait()


@dataclass(frozen=True)
class SelectorSettings:
    """port: where it listens. step_s: of one scoring. security: with certificates for TLS."""

    port: int
    security: SecurityConfig = OPEN
    step_s: float = 0.002
    digest: str = "llm"


class CountedLLM:
    """An `AsyncSelector` over the scripted LLM. scored: queries but probes."""

    def __init__(self, settings: SelectorSettings) -> None:
        self._llm = script.llm(settings.digest)
        self._step_s = settings.step_s
        self.scored = 0
        self.open = 0
        self.first_scored_at = 0.0

    @property
    def info(self) -> LLMInfo:
        return self._llm.info

    @property
    def is_alive(self) -> bool:
        return True

    @property
    def silent_s(self) -> float:
        return 0.0

    def shutdown(self) -> None:
        """Nothing runs that would have to end."""

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        self.open += 1
        try:
            await asyncio.sleep(self._step_s)
        finally:
            self.open -= 1
        if query.sequence_id != "probe":
            self.scored += 1
            self.first_scored_at = self.first_scored_at or time.monotonic()
        [future] = self._llm.submit([query])
        self._llm.queries.clear()
        return future.result()


async def selector(settings: SelectorSettings, control: Control) -> None:
    """A selector."""
    llm = CountedLLM(settings)
    server = SelectorServer(
        llm,
        settings.security,
        SelectorConfig(host=HOST, port=settings.port),
        drain_grace_s=1.0,  # proposers here know its address, and never stop asking
        quiet_s=0.5,
    )
    await server.start()
    await control.serve(
        lambda: {"scored": llm.scored, "first_scored_at": llm.first_scored_at, "open": llm.open}
    )
    await server.stop()


@dataclass(frozen=True)
class ProposerSettings:
    """overrides: of the configuration. step_s: of one forward of the scripted SLM. is_scripted:
    False for the bundled SLM, with thresholds and versions of its own."""

    overrides: dict[str, Any]
    step_s: float = 0.004
    is_scripted: bool = True

    @property
    def config(self) -> Config:
        return load_config(overrides={"gateway.http": False, **self.overrides}, environment={})


async def proposer(settings: ProposerSettings, control: Control) -> None:
    """A proposer behind a gateway of its own."""
    config = settings.config
    if settings.is_scripted:
        service = await scripted_service(settings)
    else:
        service = await build.proposer_service(config)
    server = build_gateway.gateway_server(config, service)
    await server.start()
    await control.serve(lambda: vitals_of(service))
    await server.stop()
    service.close()


async def scripted_service(settings: ProposerSettings) -> ProposerService:
    """As `build.proposer_service`, with the scripted SLM."""
    config = settings.config
    slm = script.slm(settings.step_s, config.proposer.max_num_seqs)
    fallback = LLMInfo("", "", frozenset({0}), slm.max_length)
    remote = RemoteSelector(address_finder(config), config.security, slm.tokenizer.digest, fallback)
    if config.selector.addresses:
        await remote.wait_until_reachable(config.selector.start_wait_s)
    models = Models(slm.info.digest, remote.info.digest, slm.tokenizer.digest)
    engine = Engine(
        slm,
        build._cached(config, remote),
        max_num_seqs=config.proposer.max_num_seqs,
        selection_timeout_s=config.proposer.selection_timeout_s,
    )
    return ProposerService(
        engine=EngineThread(engine, slm.tokenizer),
        tokenizer=slm.tokenizer,
        selector=remote,
        versions=FixedVersions(),
        labels=LabelRecorder(build._label_writer(config, models)),
        calibration=lambda: CALIBRATION,
        max_ongoing_requests=config.proposer.max_ongoing_requests,
        max_queue_s=config.proposer.max_queue_s,
    )


def vitals_of(service: ProposerService) -> Vitals:
    """What must be back at its start when nobody asks any more."""
    load = service.load
    return {
        "kv_slots": load.kv_slots,
        "running": load.running,
        "waiting": load.waiting,
        "admitted": service.ongoing_requests,
        "live_version": service._versions.live_version,
    }


def _run(
    main: Callable[[Any, Control], Awaitable[None]], settings: Any, pipe: Connection, log: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process
    logging.basicConfig(filename=log, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger().setLevel(logging.INFO)
    asyncio.run(main(settings, Control(pipe)))


# -- in the test process --------------------------------------------------------------------------


@dataclass(eq=False)
class Part:
    """One of the service's parts. It can be started as often as it has ended."""

    name: str
    main: Callable[[Any, Control], Awaitable[None]]
    settings: Any
    folder: Path
    _process: Any = None
    _pipe: Connection = field(init=False, repr=False)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def start(self) -> Part:
        """Start it and wait until it is ready."""
        self._pipe, theirs = context.Pipe()
        log = str(self.folder / f"{self.name}.log")
        self._process = context.Process(
            target=_run, args=(self.main, self.settings, theirs, log), daemon=True, name=self.name
        )
        self._process.start()
        theirs.close()
        assert self._pipe.poll(START_S), f"{self.name} does not start; see {log}"
        assert self._pipe.recv() == "ready"
        return self

    def vitals(self) -> Vitals:
        """Its own counts, and what the system says of it."""
        self._pipe.send("vitals")
        assert self._pipe.poll(ANSWER_S), f"{self.name} does not answer"
        process = psutil.Process(self.pid)
        return {
            "part": self.name,
            "pid": self.pid,
            "fds": process.num_fds(),
            "threads": process.num_threads(),
            "rss_mb": process.memory_info().rss / 2**20,
            **self._pipe.recv(),
        }

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def terminate(self) -> None:
        """SIGTERM, as an orderly end begins."""
        self._process.terminate()

    def freeze(self) -> None:
        """SIGSTOP: its connections stay, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None and self._process.is_alive():
            self.kill()

    def wait(self, within_s: float = ANSWER_S) -> int | None:
        """Its exit code, once it has ended; None when it has not in time."""
        self._process.join(within_s)
        return self._process.exitcode
