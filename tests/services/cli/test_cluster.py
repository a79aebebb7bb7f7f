"""`s2t up`, `down`, `status` and `init cluster` as commands: what they print and how they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError
from services.cli import app
from services.launch import status, up
from services.launch.status import RoleStatus, ServiceStatus


def s2t(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["s2t", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        app.run()
        sys.exit(0)
    return int(done.value.code or 0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_up_says_where_it_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Config] = []

    def bring_up(config: Config, say: Callable[[str], None]) -> list[str]:
        seen.append(config)
        say("Redis ready")
        return ["10.0.0.1:50051", "10.0.0.2:50051"]

    monkeypatch.setattr(up, "up", bring_up)
    assert s2t(monkeypatch, "up", "--data-dir", tmp_path / "d", "--port", "7") == 0
    assert (seen[0].data_dir, seen[0].gateway.port) == (tmp_path / "d", 7)
    said = capsys.readouterr().out
    assert "Redis ready\nserving at 10.0.0.1:50051, 10.0.0.2:50051 (gRPC)" in said


def test_what_is_refused_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bring_up(config: Config, say: Callable[[str], None]) -> list[str]:
        raise ConfigError("this Ray cluster has 2 nodes; set redis.url")

    monkeypatch.setattr(up, "up", bring_up)
    assert s2t(monkeypatch, "up") == 2
    assert capsys.readouterr().err == "s2t: this Ray cluster has 2 nodes; set redis.url\n"


STARTING = ServiceStatus(
    state="DEPLOYING",
    roles={
        "Gateway": RoleStatus({"RUNNING": 1}),
        "SelectorReplica": RoleStatus({"STARTING": 1}, "waiting for a node: no node has GPU (1)"),
    },
    error="no gateway answers",
)
RUNNING = ServiceStatus(
    state="RUNNING",
    addresses=("127.0.0.1:50051",),
    roles={"Gateway": RoleStatus({"RUNNING": 1}, metrics=("http://127.0.0.1:9464/metrics",))},
    description={"llm": "abc", "llm_reachable": True, "live_version": "v1"},
    labels={"queued": 3, "in_lake": 9},
)


@pytest.mark.parametrize(
    ("found", "code"), [(RUNNING, 0), (STARTING, 3), (ServiceStatus("DOWN"), 3)]
)
def test_status_ends_as_the_service_stands(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: ServiceStatus,
    code: int,
) -> None:
    """A script can wait for it; a person reads what is awaited."""
    monkeypatch.setattr(status, "status", lambda config: found)
    assert s2t(monkeypatch, "status") == code
    said = capsys.readouterr().out
    assert said.startswith(found.state)
    for role in found.roles.values():
        assert role.awaits in said and all(f"metrics: {url}" in said for url in role.metrics)
    for name, value in {**found.description, **found.labels}.items():
        assert f"{name}: {value}" in said
    assert s2t(monkeypatch, "status", "--json") == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["state"] == found.state and printed["labels"] == found.labels


def test_init_cluster_writes_the_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert s2t(monkeypatch, "init", "cluster", "mine") == 0
    assert Path("mine/k8s/base/rayservice.yaml").is_file()
    assert "read mine/README.md next" in capsys.readouterr().out
