"""One run: its parts, its history, and what is left when it is over."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import redis

from s2t_shared.errors import StoreError
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.redis_connection import open_client
from services.launch.redis_server import find_program, free_port
from tests.faults.checker import (
    Request,
    kept,
    lost_labels,
    mixed,
    requests_of,
    violations,
    wrong_tokens,
)
from tests.faults.clients import Clients
from tests.faults.history import History, Record, read
from tests.faults.processes import (
    HOST,
    Part,
    ProposerSettings,
    SelectorSettings,
    proposer,
    selector,
)
from tests.faults.replicas import GatewaySettings, ReplicaSettings, gateway, replica

CALM_S = 20.0  # what is held is free by then, or counts as kept
DRAIN_S = 40.0


class Stage:
    """Parts are stopped at its end, whatever became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History(folder / "history.jsonl")
        self._parts: list[Any] = []
        self._before: dict[int, Record] = {}  # vitals, by process

    # -- parts ------------------------------------------------------------------------------------

    def selector(self, name: str = "selector", **settings: Any) -> Part:
        settings = {"port": free_port(), **settings}
        return self._started(Part(name, selector, SelectorSettings(**settings), self.folder))

    def redis(self, *arguments: str) -> RedisPart:
        return self._started(RedisPart(self.folder / "redis", arguments))

    def proposer(
        self,
        selectors: Collection[int] = (),
        redis_port: int | None = None,
        name: str = "proposer",
        overrides: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Part:
        """A proposer behind a gateway. selectors: their ports."""
        overrides = self._overrides(selectors, redis_port) | (overrides or {})
        made = ProposerSettings(overrides, **settings)
        return self._started(Part(name, proposer, made, self.folder))

    def replica(self, name: str, selectors: Collection[int] = ()) -> Part:
        """A proposer without a gateway."""
        socket = str(self.folder / f"{name}.socket")
        settings = ReplicaSettings(self._overrides(selectors), socket=socket)
        return self._started(Part(name, replica, settings, self.folder))

    def gateway(self, replicas: Collection[Part], name: str = "gateway") -> Part:
        """A gateway before replicas."""
        sockets = tuple(part.settings.socket for part in replicas)
        settings = GatewaySettings(self._overrides(), sockets=sockets)
        return self._started(Part(name, gateway, settings, self.folder))

    def _overrides(
        self, selectors: Collection[int] = (), redis_port: int | None = None
    ) -> dict[str, Any]:
        return {
            "data_dir": str(self.folder / "data"),
            "gateway.port": free_port(),
            "selector.addresses": [f"{HOST}:{port}" for port in selectors],
            "selector.start_wait_s": 10.0,
            "redis.url": f"redis://{HOST}:{redis_port}/0" if redis_port else None,
            "labels.shard_age_s": 0.5,
        }

    def _started(self, part: Any) -> Any:
        self._parts.append(part)
        return part.start()

    def clients(
        self, *gateways: Part, first: int = 0, credentials: grpc.ChannelCredentials | None = None
    ) -> Clients:
        """Clients of several gateways take them in turns. first: number of the first request.
        credentials: for TLS."""
        addresses = [address_of(part) for part in gateways]
        return Clients(self.history, addresses, first, credentials)

    def close(self) -> None:
        for part in reversed(self._parts):
            part.stop()
        self.history.close()

    # -- faults and vitals ------------------------------------------------------------------------

    def fault(self, what: str) -> float:
        """Write down that something is done to a part. Returns when."""
        return self.history.write("fault", what=what)

    def look(self, when: str, *parts: Part) -> list[Record]:
        """Write down the parts' vitals."""
        seen = [part.vitals() for part in parts]
        for vitals in seen:
            self.history.write("vitals", when=when, **vitals)
            if when == "before":
                self._before[vitals["pid"]] = vitals
        return seen

    async def calm(self, *parts: Part) -> None:
        """Wait until the parts hold nothing of what they did, and write down their vitals."""
        await until(lambda: self._is_calm(*parts), CALM_S, pause_s=0.05)
        self.look("after", *parts)

    def _is_calm(self, *parts: Part) -> bool:
        seen = [part.vitals() for part in parts]
        return not any([*kept(self._before.get(now["pid"], now), now)] for now in seen)

    # -- the outcome ------------------------------------------------------------------------------

    @property
    def records(self) -> list[Record]:
        return read(self.history.file)

    @property
    def requests(self) -> list[Request]:
        return list(requests_of(self.records).values())

    def failed(self, allowed: Collection[str] = ()) -> int:
        """Requests that ended with another error than these."""
        errors = [r.error for r in self.requests if r.error is not None]
        return sum((error["reason"] or error["status"]) not in allowed for error in errors)

    def lost_labels(self) -> int:
        """That were acknowledged, and are not in the lake."""
        return lost_labels(self.records)

    def wrong_tokens(self) -> int:
        """Answers with a token that was lost, doubled or is another one than the script's."""
        return wrong_tokens(self.records)

    def mixed(self) -> int:
        """Answers that are not what their version says."""
        return mixed(self.records)

    async def drain(self, redis_url: str, proposer: Part) -> None:
        """Wait until every label on its way is in the lake, and write down what is there."""
        config = proposer.settings.config
        stream = LabelStream(redis_url)

        def is_empty() -> bool:
            try:
                return not list(config.spool.glob("*/*.entries")) and not stream.counts().rollouts
            except StoreError:
                return False

        await until(is_empty, DRAIN_S, pause_s=0.1)
        found = {r.request_id: len(r.labels) for r in Lake(config.lake).rollouts()}
        self.history.write("lake", labels=found, dead=stream.counts().dead_letters)
        stream.close()

    def check(self, allowed: Collection[str] = ()) -> None:
        """Nothing was broken. allowed: as in `violations`."""
        broken = violations(self.records, allowed)
        shown = "\n".join(broken[:20])
        assert not broken, f"{len(broken)} in {self.history.file}:\n{shown}"


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    opened = Stage(folder)
    try:
        yield opened
    finally:
        opened.close()


def address_of(part: Part) -> str:
    return f"{HOST}:{part.settings.overrides['gateway.port']}"


async def until(holds: Callable[[], bool], within_s: float, pause_s: float = 0.01) -> bool:
    """Whether `holds` comes true in time. It may block for a moment: clients go on meanwhile."""
    deadline = time.monotonic() + within_s
    while not (is_true := await asyncio.to_thread(holds)) and time.monotonic() < deadline:
        await asyncio.sleep(pause_s)
    return is_true


class RedisPart:
    """A Redis server on one folder and one port."""

    def __init__(self, folder: Path, arguments: Collection[str]) -> None:
        folder.mkdir()
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self._command = [find_program(), "--port", str(self.port), "--dir", str(folder)]
        self._command += ["--bind", HOST, "--save", "", "--appendonly", "yes", *arguments]

    def start(self) -> RedisPart:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        client = open_client(self.url, 1.0)
        give_up_at = time.monotonic() + 20
        while time.monotonic() < give_up_at:
            try:
                client.ping()
                client.close()
                return self
            except redis.RedisError:
                time.sleep(0.01)
        raise AssertionError("Redis does not come up")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.kill()
