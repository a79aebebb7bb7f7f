"""Verbs beside a service: they find it by its data folder, and use or name its configuration."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2t_shared.config import Config, load_config
from services.cli.options import settings_beside_service
from services.launch.service_record import FILE, find_service, recorded


@pytest.fixture
def address() -> Iterator[str]:
    """Somebody who listens, as a gateway does."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def config_of(tmp_path: Path, **overrides: object) -> Config:
    return load_config(None, {"data_dir": str(tmp_path), **overrides}, {})


def test_a_service_is_found_while_it_runs(tmp_path: Path, address: str) -> None:
    config = config_of(tmp_path, **{"slm.model": "acme/slm"})
    assert find_service(tmp_path) is None
    with recorded(config, address):
        found = find_service(tmp_path)
        assert found is not None and found.address == address
        assert found.config["slm"]["model"] == "acme/slm"
    assert find_service(tmp_path) is None and not (tmp_path / FILE).exists()


def test_a_record_that_a_killed_service_left_is_no_service(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with recorded(config_of(tmp_path), f"127.0.0.1:{port}"):
        assert find_service(tmp_path) is None


def test_no_secret_is_recorded(tmp_path: Path, address: str) -> None:
    url = "redis://user:s3cret@redis.internal:6379"
    with recorded(config_of(tmp_path, **{"redis.url": url}), address):
        assert "s3cret" not in (tmp_path / FILE).read_text()


def test_who_works_beside_a_service_finds_its_redis(tmp_path: Path, address: str) -> None:
    """A Redis that the service started is in no configuration file."""
    started = {"redis.url": "redis://127.0.0.1:7000/0", "redis.password_dir": "/data/users"}
    own = config_of(tmp_path)
    named = config_of(tmp_path, **{"redis.url": "redis://elsewhere:1/0"})
    with recorded(config_of(tmp_path, **started), address):
        service = find_service(tmp_path)
        assert service is not None
        assert service.with_redis(own).redis.url == "redis://127.0.0.1:7000/0"
        assert service.with_redis(own).redis.password_dir == Path("/data/users")
        assert service.with_redis(named) is named
    with recorded(own, address):
        service = find_service(tmp_path)
        assert service is not None and service.with_redis(own) is own


def test_training_takes_the_services_configuration(tmp_path: Path, address: str) -> None:
    """`s2t train` as the README has it trained the bundled SLM on another service's labels."""
    said: list[str] = []
    service = config_of(tmp_path, **{"slm.model": "acme/slm", "training.rank": 4})
    with recorded(service, address):
        own = settings_beside_service(None, said.append, data_dir=str(tmp_path), training__steps=7)
    assert own.slm.model == "acme/slm"
    assert (own.training.rank, own.training.steps) == (4, 7)
    assert said == [f"using the configuration of the service at {address}"]


def test_a_file_of_its_own_is_compared(tmp_path: Path, address: str) -> None:
    said: list[str] = []
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"slm": {"model": "acme/other"}, "data_dir": str(tmp_path)}))
    with recorded(config_of(tmp_path, **{"slm.model": "acme/slm"}), address):
        own = settings_beside_service(file, said.append)
    assert own.slm.model == "acme/other"
    assert len(said) == 1
    assert "slm.model: the service has 'acme/slm', this command 'acme/other'" in said[0]


def test_without_a_service_nothing_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert settings_beside_service(None, said.append, data_dir=str(tmp_path)).slm.model == "bundled"
    assert not said
