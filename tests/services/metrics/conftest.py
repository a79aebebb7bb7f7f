from __future__ import annotations

import asyncio

import pytest

from services.launch.redis_server import open_redis
from tests.services.metrics.live import scraped


@pytest.fixture(scope="session")
def live_texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What gateway, proposer and selector say after requests in every mode."""
    with open_redis(None, tmp_path_factory.mktemp("redis")) as redis:
        return asyncio.run(scraped(tmp_path_factory.mktemp("data"), redis.url))
