"""Starting a service: never over a running one, and never with a traceback for a wrong
RAY_ADDRESS."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.errors import ConfigError
from services.app import APPLICATION
from services.launch import local


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


def test_a_second_service_is_refused_with_the_address_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It used to join the running Ray and replace the first one without a word."""
    serving(monkeypatch, ApplicationStatus.RUNNING, "127.0.0.1:50051")
    with pytest.raises(ConfigError, match=r"runs in this Ray cluster already \(at 127.0.0.1:50051"):
        local.check_free()


def test_one_that_is_still_starting_is_not_replaced_either(monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, ApplicationStatus.DEPLOYING)
    with pytest.raises(ConfigError, match="serve delete s2t"):
        local.check_free()


@pytest.mark.parametrize("status", [None, ApplicationStatus.DELETING])
def test_nothing_stands_in_the_way_of_the_first(
    monkeypatch: pytest.MonkeyPatch, status: Any
) -> None:
    serving(monkeypatch, status)
    local.check_free()


def test_a_ray_address_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be a traceback about num_cpus."""

    def refuse(**options: Any) -> None:
        assert "num_cpus" not in options
        raise ConnectionError("nobody at 127.0.0.1:1")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ConfigError, match="RAY_ADDRESS=127.0.0.1:1: .*nobody at.*unset RAY_ADDRESS"
    ):
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
