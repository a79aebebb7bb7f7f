"""`s2t status`: what Serve says of the roles, and what a real gateway says of itself. Ray and Serve
are fakes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.config import load_config
from services.launch import status as module
from services.launch.status import ServiceStatus
from services.roles import APPLICATION
from tests.helpers.serving import FixedVersions, local_selector, proposer_service, with_gateway

METRICS = "http://127.0.0.1:9464/metrics"
WAIT = "waiting for a node for 1 SelectorReplica: no node has GPU (1)"


def found(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    addresses: list[str],
    state: ApplicationStatus | None = ApplicationStatus.RUNNING,
    roles: tuple[str, ...] = ("Gateway", "ProposerReplica"),
) -> ServiceStatus:
    """The status of a service as Serve and these gateways describe it."""

    @contextmanager
    def existing_ray(address: str) -> Iterator[bool]:
        yield True

    def find_addresses() -> list[str]:
        if not addresses:
            raise TimeoutError
        return addresses

    deployments = {role: SimpleNamespace(replica_states={"RUNNING": 1}) for role in roles}
    deployments["SelectorReplica"] = SimpleNamespace(replica_states={"STARTING": 1})
    application: Any = SimpleNamespace(status=state, message="", deployments=deployments)
    applications = {APPLICATION: application} if state else {}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(module, "existing_ray", existing_ray)
    monkeypatch.setattr(module, "find_addresses", find_addresses)
    monkeypatch.setattr(module, "find_metrics", lambda: {"Gateway": [METRICS]})
    monkeypatch.setattr(module, "waits", lambda config: {"SelectorReplica": WAIT})
    return module.status(load_config(None, {"data_dir": str(folder)}, environment={}))


def test_a_service_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Roles with what they wait for, the LLM, the live version. This gateway has no Redis, so no
    labels: that must not hide the rest."""
    service = proposer_service(versions=FixedVersions(live=local_selector("v1")))
    status = with_gateway(tmp_path, service, lambda a: found(monkeypatch, tmp_path, [a]))
    assert status.state == "RUNNING" and "no Redis is configured" in status.error
    assert status.roles["ProposerReplica"].states == {"RUNNING": 1}
    assert status.roles["SelectorReplica"].awaits == WAIT
    assert status.roles["Gateway"].metrics == (METRICS,)
    assert not status.roles["ProposerReplica"].metrics
    assert status.description["llm"] == "scripted" and status.description["llm_reachable"]
    assert status.description["live_version"] == "v1" and status.description["proposers"] == 1
    assert not status.labels


def test_a_gateway_that_does_not_answer_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What Serve knows is shown all the same."""
    starting = found(monkeypatch, tmp_path, [], ApplicationStatus.DEPLOYING)
    assert (starting.state, starting.error) == ("DEPLOYING", "no gateway answers")
    assert starting.roles["SelectorReplica"].awaits == WAIT
    gone = found(monkeypatch, tmp_path, ["127.0.0.1:1"])
    assert gone.error and gone.addresses == ("127.0.0.1:1",)


def test_selectors_alone_have_no_gateway_to_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = found(monkeypatch, tmp_path, ["10.0.0.1:50052"], roles=())
    assert alone.addresses == ("10.0.0.1:50052",) and not alone.error


def test_no_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found(monkeypatch, tmp_path, [], state=None) == ServiceStatus("DOWN")


def test_looking_after_a_service_loads_no_models_code() -> None:
    """torch and transformers took three quarters of the time of `s2t status` and `s2t down`."""
    code = "import sys, services.launch.status, services.launch.down; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
