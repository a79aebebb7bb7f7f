"""Processes that serve do not stop for a look through all their libraries."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from s2t_shared.config import load_config
from services.serve import build, build_gateway
from services.serve.gateway import Gateway
from services.serve.proposer_replica import ProposerReplica
from services.serve.selector_replica import SelectorReplica


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


async def nothing() -> None:
    pass


@pytest.mark.parametrize("kind", [Gateway, ProposerReplica, SelectorReplica])
def test_what_a_replica_loads_is_not_looked_through_again(
    kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A full collection over torch and Ray took 0.6 s here: every stream waited for it."""
    server = SimpleNamespace(start=nothing, stop=nothing, port=1, llm_digest="", close=lambda: None)

    async def service(*_: Any) -> Any:
        return server

    server.registry = None
    monkeypatch.setattr(sys.modules[kind.__module__], "MetricsExports", lambda *_: None)
    monkeypatch.setattr(build_gateway, "gateway_server", lambda *_: server)
    monkeypatch.setattr(build, "selector_server", lambda *_: server)
    monkeypatch.setattr(build, "proposer_service", service)
    monkeypatch.setattr(kind, "__del__", lambda _: None, raising=False)
    config = load_config(None, {"data_dir": str(tmp_path)}, {})
    assert not gc.get_freeze_count()

    async def begin() -> None:
        await kind.__init__(object.__new__(kind), config, *[None][: kind is not SelectorReplica])

    asyncio.run(begin())
    assert gc.get_freeze_count() > 10_000
