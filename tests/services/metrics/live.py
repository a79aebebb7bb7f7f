"""A whole service in this process, without Ray: the bundled pair, a Redis, and what replicas are
built from. Asked in every mode, and each process's endpoint read."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from s2t_shared.config import Config, MetricsConfig, SecurityConfig, load_config
from s2t_shared.errors import S2TError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.requests import new_request
from s2t_shared.types import GenerateRequest, Sampling
from s2t_shared.versions.live import LiveVersions
from services.metrics.endpoint import MetricsEndpoint
from services.metrics.registry import Registry
from services.rpc.ask_many import AsyncCaller, Target
from services.serve import build, build_gateway
from tests.helpers.versions import publish

PROMPT = "Mia has 19 coins . Prices are 11 , 15 , 19 , 4 , 12 . Which two cost 19 ?"
MODES = (
    *("greedy", "sample", "majority@2", "llm"),
    *("s2t entropy", "s2t kl", "takeover kl", "s2t_local entropy", "s2t_local kl"),
)
CREATED_AT = 1.7e9


def requests() -> list[GenerateRequest]:
    """Every mode; one of them again, so that the cache answers; and one that is refused."""
    asked = []
    for number, name in enumerate((*MODES, "s2t entropy")):
        mode, _, trigger = name.partition(" ")
        budget = {"trigger": trigger, "budget": 0.2} if trigger else {}
        sampling = Sampling(seed=number)
        made = new_request(PROMPT, mode, max_new_tokens=40, sampling=sampling, **budget)
        asked.append(replace(made, labels=replace(made.labels, store=mode == "s2t", split="train")))
    asked.append(new_request(PROMPT, "greedy", version="nonesuch"))
    return asked


def _config(folder: Path, redis_url: str, **settings: Any) -> Config:
    overrides = {
        "data_dir": str(folder),
        "gateway.port": 0,
        "gateway.http": False,
        "redis.url": redis_url,
        "calibration.count": 8,
        "calibration.max_new_tokens": 24,
        **settings,
    }
    return load_config(overrides=overrides, environment={})


def _publish_a_version(config: Config) -> None:
    runtime = ModelRuntime.load(config.slm.model, config.slm.dtype)
    tokenizer = Tokenizer.load(resolve_model(config.slm.model))
    versions = LiveVersions(config.versions)
    name = publish(
        versions.registry,
        runtime,
        tokenizer_digest=tokenizer.digest,
        created_at=CREATED_AT,
        thresholds={},
    )
    versions.promote(name)


@asynccontextmanager
async def service(folder: Path, redis_url: str) -> AsyncIterator[tuple[str, list[Registry]]]:
    """The gateway's address, and the registries of gateway, proposer and selector."""
    async with AsyncExitStack() as stack:
        config = _config(folder, redis_url)
        _publish_a_version(config)
        selector = build.selector_server(config)
        selector._quiet_s = 0.0
        await selector.start()
        stack.push_async_callback(selector.stop)
        addresses = [f"127.0.0.1:{selector.port}"]
        config = _config(folder, redis_url, **{"selector.addresses": addresses})
        proposer = await build.proposer_service(config)
        stack.callback(proposer.close)
        gateway = build_gateway.gateway_server(config, proposer)
        await gateway.start()
        stack.push_async_callback(gateway.stop, 0.0)
        yield f"127.0.0.1:{gateway.port}", [gateway.registry, proposer.registry, selector.registry]


async def scraped(folder: Path, redis_url: str) -> list[str]:
    """What the three endpoints say before and after the requests."""
    async with service(folder, redis_url) as (address, registries):
        target = Target(address)
        async with target.open_channel() as channel:
            caller = AsyncCaller(target, channel)
            for request in requests():
                with suppress(S2TError):
                    async for _ in caller.stream(request, timeout_s=60.0):
                        pass
        endpoints = [
            MetricsEndpoint(r, MetricsConfig(port=0), SecurityConfig()) for r in registries
        ]
        try:
            return [await asyncio.to_thread(_read, endpoint.url) for endpoint in endpoints]
        finally:
            for endpoint in endpoints:
                endpoint.close()


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())
