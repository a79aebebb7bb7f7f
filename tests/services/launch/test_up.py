"""`s2t up` and `down`: which way is taken, and what is never done. Ray is a fake here; the ways are
walked with a real one in `test_up_service.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, S2TError
from services.launch import down as down_module
from services.launch import running
from services.launch import up as module
from services.launch.service_record import FILE, read_record, write_record
from services.roles import APPLICATION

HEAD = "10.0.0.1:6379"
REDIS = "redis://:secret@10.0.0.9:6379/0"


def config_of(folder: Path, **overrides: object) -> Config:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, {"data_dir": str(folder), "gateway.port": 0, **named}, environment={})


class FakeCluster:
    """A Ray cluster with or without a service. deployed: the configurations that were deployed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = True
        self.status: ApplicationStatus | None = None
        self.deployed: list[Config] = []
        self.held: list[Config] = []
        self.deleted = 0
        self.hangs = False
        monkeypatch.setattr(module, "existing_ray", self.existing)
        monkeypatch.setattr(down_module, "existing_ray", self.existing)
        monkeypatch.setattr(serve, "status", self.serve_status)
        monkeypatch.setattr(serve, "delete", self.delete)
        context = SimpleNamespace(gcs_address=HEAD)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(module, "deploy", self.deploy)
        monkeypatch.setattr(module, "start_serve", lambda: None)
        monkeypatch.setattr(module, "claimed", self.claimed)
        monkeypatch.setattr(module, "_start_holder", self.hold)

    @contextmanager
    def existing(self, address: str = "") -> Iterator[bool]:
        yield self.there

    @contextmanager
    def claimed(self) -> Iterator[None]:
        yield

    def serve_status(self) -> Any:
        gateway = SimpleNamespace(replica_states={"STOPPING": 2})
        application = SimpleNamespace(status=self.status, deployments={"Gateway": gateway})
        found = {APPLICATION: application} if self.status else {}
        return SimpleNamespace(applications=found)

    def delete(self, name: str, _blocking: bool) -> None:
        self.deleted += 1
        if not self.hangs:
            self.status = None

    def deploy(self, config: Config, say: Any) -> list[str]:
        self.deployed.append(config)
        return ["10.0.0.2:50051"]

    def hold(self, config: Config, say: Any) -> list[str]:
        self.held.append(config)
        return ["127.0.0.1:1"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


def test_without_a_cluster_a_process_holds_it(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.there = False
    assert module.up(config_of(tmp_path), print) == ["127.0.0.1:1"]
    assert cluster.held and not cluster.deployed


def test_a_cluster_without_a_redis_url_needs_a_holder_too(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """Else the Redis that `up` starts would end with the command, and labels with it."""
    module.up(config_of(tmp_path), print)
    assert cluster.held and not cluster.deployed


def test_with_a_redis_nothing_of_ours_stays(cluster: FakeCluster, tmp_path: Path) -> None:
    config = config_of(tmp_path, redis__url=REDIS)
    assert module.up(config, print) == ["10.0.0.2:50051"]
    assert cluster.deployed == [config] and not cluster.held
    record = read_record(tmp_path)
    assert record is not None and (record.pid, record.ray) == (0, HEAD)
    assert "secret" not in (tmp_path / FILE).read_text(encoding="utf-8")


def test_a_second_up_keeps_redis_and_says_what_changed(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.status = ApplicationStatus.RUNNING
    held = config_of(tmp_path, redis__url="redis://held/0", redis__password_dir="/held/users")
    write_record(held, "127.0.0.1:1", HEAD, pid=7)
    said: list[str] = []
    module.up(config_of(tmp_path, defaults__max_new_tokens=99), said.append)
    assert said == ["changed: defaults.max_new_tokens from 256 to 99"]
    (config,) = cluster.deployed
    assert config.redis.url == "redis://held/0"
    assert config.redis.password_dir == Path("/held/users")
    record = read_record(tmp_path)
    assert record is not None and record.pid == 7
    module.up(config_of(tmp_path, defaults__max_new_tokens=99), said.append)
    assert said[1:] == ["changed: nothing"]


def test_a_service_of_another_folder_is_not_replaced(cluster: FakeCluster, tmp_path: Path) -> None:
    """A second service on the machine used to take the first one's place without a word."""
    cluster.status = ApplicationStatus.RUNNING
    with pytest.raises(ConfigError, match=r"not one that `s2t up` started.*RAY_ADDRESS=local"):
        module.up(config_of(tmp_path, redis__url=REDIS), print)
    write_record(config_of(tmp_path), "127.0.0.1:1", "10.9.9.9:6379")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=10.0.0.1:6379 s2t down"):
        module.up(config_of(tmp_path), print)
    assert not cluster.deployed and not cluster.held


def test_one_that_is_being_deleted_is_none(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.status = ApplicationStatus.DELETING
    module.up(config_of(tmp_path, redis__url=REDIS), print)
    assert cluster.deployed


# -- the process that holds a service -------------------------------------------------------------

HOLDER = """
import json, os, pathlib, socket, sys, time
folder = pathlib.Path(sys.argv[-1]).parent
print("Redis ready", flush=True)
if "fail" in folder.name:
    sys.exit("s2t: port 1 is taken")
listening = socket.create_server(("127.0.0.1", 0))
address = "127.0.0.1:%d" % listening.getsockname()[1]
record = {"address": address, "pid": os.getpid(), "config": {}, "host": socket.gethostname()}
(folder / "service.json").write_text(json.dumps(record))
print("serving at " + address, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """`s2t serve` is a small script. Yields the pids of those started; none survives the test."""
    script = tmp_path / "serve"  # the name by which `down` knows a holder
    script.write_text(HOLDER, encoding="utf-8")
    started: list[int] = []
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = real([sys.executable, str(script), "serve", command[-1]], **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_up_waits_for_its_holder_and_down_ends_it(holder: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "data"
    (address,) = module._start_holder(config_of(folder, redis__url=REDIS), said.append)
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    assert said == ["Redis ready"]
    # The settings may hold a password.
    assert (folder / "serve.yaml").stat().st_mode & 0o077 == 0
    signalled = []

    def reap(pid: int, number: int) -> None:
        signalled.append((pid, number))
        real_kill(pid, number)
        os.waitpid(pid, 0)  # its parent is this test; after `s2t up` ends it is init

    real_kill = os.kill
    try:
        os.kill = reap  # type: ignore[assignment]
        down_module.down(folder, said.append)
    finally:
        os.kill = real_kill
    assert signalled == [(holder[0], signal.SIGTERM)]
    assert said[1:] == [f"ended the service at {address}"]


def test_why_a_holder_ended_is_said(holder: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not start: port 1 is taken \(log: .*serve.log\)"):
        module._start_holder(config_of(tmp_path / "fail"), print)


def test_down_signals_no_stranger(cluster: FakeCluster, tmp_path: Path) -> None:
    """A pid is given again: the record of a service that was killed may name somebody else."""
    cluster.there = False
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as stranger:
        write_record(config_of(tmp_path), "127.0.0.1:1", HEAD, stranger.pid)
        said: list[str] = []
        down_module.down(tmp_path, said.append)
        time.sleep(0.1)
        assert stranger.poll() is None
        stranger.kill()
    assert said == ["no service runs"]
    assert read_record(tmp_path) is None


def test_a_service_that_does_not_end_is_told(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve gave up after 60 s with a TimeoutError, in the middle of a longer drain, and its record
    was gone or not, as it came."""
    monkeypatch.setattr(running, "END_TIMEOUT_S", 0.3)
    monkeypatch.setattr(running, "SAY_EVERY_S", 0.1)
    monkeypatch.setattr(running, "POLL_S", 0.01)
    cluster.status = ApplicationStatus.RUNNING
    cluster.hangs = True
    write_record(config_of(tmp_path), "127.0.0.1:1", HEAD)
    said: list[str] = []
    with pytest.raises(S2TError, match=f"2 Gateway is still there.*RAY_ADDRESS={HEAD} s2t down"):
        down_module.down(tmp_path, said.append)
    assert said[0] == "waiting for 2 Gateway to end" and len(said) < 4
    assert read_record(tmp_path) is not None, "a later `down` finds it"
    cluster.hangs = False
    down_module.down(tmp_path, said.append)
    assert said[-1].startswith("ended") and read_record(tmp_path) is None


def test_down_removes_the_application_and_leaves_ray(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.status = ApplicationStatus.RUNNING
    write_record(config_of(tmp_path), "127.0.0.1:1", HEAD)
    down_module.down(tmp_path, print)
    assert cluster.deleted == 1 and read_record(tmp_path) is None
