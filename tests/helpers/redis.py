"""A Redis for tests: one server for a module, emptied for each test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from s2t_shared.labels.stream import LabelStream
from s2t_shared.redis_connection import open_client
from services.launch.redis_server import RedisServer, open_redis


def eventually(condition: Callable[[], bool], timeout_s: float = 8.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with open_redis(None, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """The shared server, empty. Tests that stop a server start their own."""
    client = open_client(shared_server.url, 2.0)
    client.flushall()
    return shared_server


@pytest.fixture
def store(server: RedisServer) -> Iterator[LabelStream]:
    store = LabelStream(server.url)
    yield store
    store.close()


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return open_client(server.url, 2.0)
