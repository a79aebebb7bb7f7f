"""Starting a service: never over a running one, and never with a traceback for a wrong
RAY_ADDRESS."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.errors import ConfigError
from services.launch import local
from services.roles import APPLICATION


class FakeHandle:
    """Serve's handle of the gateway that runs."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    @property
    def address(self) -> Any:
        return self

    def remote(self) -> Any:
        return self

    def result(self, timeout_s: float) -> str:
        if self._address is None:
            raise TimeoutError
        return self._address


def serving(monkeypatch: pytest.MonkeyPatch, status: Any, address: str | None = None) -> None:
    application = SimpleNamespace(status=status)
    found = {APPLICATION: application} if status is not None else {}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=found))
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: FakeHandle(address))


class FakeClaims:
    """Ray's named actors, as one cluster holds them: `taken` at first, then as they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, taken: bool = False) -> None:
        self.taken = taken
        context = SimpleNamespace(gcs_address="10.0.0.1:6379")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray, "remote", lambda **options: lambda kind: self)
        monkeypatch.setattr(ray, "kill", self.kill)

    def options(self, name: str, namespace: str) -> Any:
        return self

    def remote(self) -> Any:
        if self.taken:
            raise ValueError("The name is already taken")
        self.taken = True
        return self

    def kill(self, claim: Any) -> None:
        assert claim is self and self.taken
        self.taken = False


def test_a_second_service_is_refused_with_the_address_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It used to join the running Ray and replace the first one without a word."""
    serving(monkeypatch, ApplicationStatus.RUNNING, "127.0.0.1:50051")
    claims = FakeClaims(monkeypatch, taken=True)
    with pytest.raises(ConfigError, match=r"already \(at 127.0.0.1:50051\).*RAY_ADDRESS=local"):
        with local.claimed():
            pass
    assert claims.taken  # the first one's


def test_of_two_that_start_at_once_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve knows of no application yet when both look."""
    serving(monkeypatch, None)
    claims = FakeClaims(monkeypatch)
    with local.claimed():
        with pytest.raises(ConfigError, match="runs or starts"):
            with local.claimed():
                pass
        assert claims.taken
    assert not claims.taken


def test_one_that_was_left_behind_is_not_replaced_and_how_to_remove_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serving(monkeypatch, ApplicationStatus.RUNNING, "127.0.0.1:50051")
    claims = FakeClaims(monkeypatch)
    removal = r"RAY_ADDRESS=10.0.0.1:6379 s2t down"
    with pytest.raises(ConfigError, match=removal):
        with local.claimed():
            pass
    assert not claims.taken


@pytest.mark.parametrize("status", [None, ApplicationStatus.DELETING])
def test_nothing_stands_in_the_way_of_the_first(
    monkeypatch: pytest.MonkeyPatch, status: Any
) -> None:
    serving(monkeypatch, status)
    FakeClaims(monkeypatch)
    with local.claimed():
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:1", "refused"), ("ray://127.0.0.1:1", "not host:port"), ("head", "not host:port")],
)
def test_a_ray_address_that_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    """It used to be a traceback about num_cpus, after two minutes in which Ray tried."""

    def init(**options: Any) -> None:
        raise AssertionError("Ray must not be left to try")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: .*{reason}.*unset RAY_ADDRESS"):
        with local.local_ray():
            pass


def test_a_cluster_that_refuses_us_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens, but Ray cannot join, for example without the cluster's token."""

    def init(**options: Any) -> None:
        assert "num_cpus" not in options
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(ConfigError, match="Failed to connect.*RAY_AUTH_MODE=token"):
            with local.local_ray():
                pass


def test_without_a_running_cluster_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        if address == "auto":
            raise ConnectionError("no running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with local.local_ray():
        pass
    assert asked == ["auto", "local"]
