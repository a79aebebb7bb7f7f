"""The record of a running service in its data folder: where it listens, and how it is configured.

Verbs that work beside a service (`s2t train`, `s2t labels stats`) find it there, so that they use
its configuration instead of their own defaults. Holds no password and no token.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from s2t_shared.config import Config, RedisConfig
from s2t_shared.files import write_atomically
from s2t_shared.redis_url import without_password

FILE = "service.json"
CONNECT_TIMEOUT_S = 1.0
# What must agree between a service and who works on its labels and versions.
SHARED_SETTINGS = ("slm", "llm", "calibration", "data_dir")


@dataclass(frozen=True)
class ServiceRecord:
    """A running service: `address` is host:port of its gateway, `config` its settings.

    pid, host: of the process that ends the service when it ends; pid 0 where there is none, and the
    service stays in its Ray cluster until it is removed. ray: host:port of that cluster's head.
    redis: settings that lead to its Redis, without a password; empty where it has none.
    """

    address: str
    pid: int
    config: dict[str, Any]
    host: str = ""
    ray: str = ""
    redis: dict[str, str | None] = field(default_factory=dict)

    def with_redis(self, config: Config) -> Config:
        """`config` with the Redis of the service, unless it names one itself."""
        if config.redis.url or not self.redis:
            return config
        redis = RedisConfig.model_validate(config.redis.model_dump() | self.redis)
        return config.model_copy(update={"redis": redis})

    def differences(self, config: Config) -> list[str]:
        """Shared settings of `config` that are not the service's, each with both values."""
        return [
            f"{name}: the service has {theirs!r}, this command {mine!r}"
            for name, theirs, mine in self._differing(config, SHARED_SETTINGS)
        ]

    def changes(self, config: Config) -> list[str]:
        """What `config` changes of the service's settings, each with both values."""
        return [
            f"{name} from {theirs!r} to {mine!r}"
            for name, theirs, mine in self._differing(config, Config.model_fields)
        ]

    def _differing(self, config: Config, sections: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
        own = _public(config)
        for section in sections:
            if section in own:
                for name, theirs, mine in _pairs(section, self.config.get(section), own[section]):
                    if theirs != mine:
                        yield name, theirs, mine


def _pairs(name: str, theirs: Any, mine: Any) -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two settings, by their dotted names."""
    if not isinstance(mine, dict):
        yield name, theirs, mine
        return
    for key, value in mine.items():
        other = theirs.get(key) if isinstance(theirs, dict) else None
        yield from _pairs(f"{name}.{key}", other, value)


def _public(config: Config) -> dict[str, Any]:
    """The settings without what is secret or only the service's own."""
    values: dict[str, Any] = config.model_dump(mode="json")
    del values["redis"]["url"]
    del values["redis"]["password_dir"]
    del values["security"]
    return values


def _redis_of(config: Config) -> dict[str, str | None]:
    redis = config.redis
    if redis.url is None:
        return {}
    password_dir = str(redis.password_dir) if redis.password_dir else None
    return {"url": without_password(redis.url), "password_dir": password_dir}


@contextmanager
def recorded(config: Config, address: str, ray: str = "") -> Iterator[None]:
    """Leave a record in the data folder while the block runs."""
    write_record(config, address, ray, os.getpid())
    try:
        yield
    finally:
        remove_record(config.data_dir)


def write_record(config: Config, address: str, ray: str, pid: int = 0) -> None:
    """Leave a record in the data folder."""
    record = ServiceRecord(
        address=address,
        pid=pid,
        config=_public(config),
        host=socket.gethostname(),
        ray=ray,
        redis=_redis_of(config),
    )
    write_atomically(config.data_dir / FILE, json.dumps(asdict(record), indent=2))


def remove_record(data_dir: Path) -> None:
    """Remove the record, if there is one."""
    (data_dir / FILE).unlink(missing_ok=True)


def read_record(data_dir: Path) -> ServiceRecord | None:
    """The record in the data folder, whether or not its service still runs."""
    try:
        return ServiceRecord(**json.loads((data_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def find_service(data_dir: Path) -> ServiceRecord | None:
    """The service that runs on this data folder; None where none is recorded or none answers."""
    record = read_record(data_dir)
    if record is None:
        return None
    try:
        host, _, port = record.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            return record
    except (OSError, ValueError):
        return None
