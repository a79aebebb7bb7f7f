"""A canary on a real service: promoted, chosen by share, rolled back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from s2t_shared.bundled import SLM_DIR
from s2t_shared.config import Config
from s2t_shared.model.local_selector import SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.versions.registry import Registry
from services.client import Client
from services.launch.local import RunningService
from tests.helpers.versions import publish

pytestmark = pytest.mark.service
IDS = [f"r{i}" for i in range(30)]


def publish_two(config: Config) -> tuple[str, str]:
    runtime = ModelRuntime.load(str(SLM_DIR))
    tokenizer_digest = Tokenizer.load(SLM_DIR).digest
    registry = Registry(config.versions)
    fits: dict[str, Any] = {"tokenizer_digest": tokenizer_digest, "thresholds": {}}
    old = publish(registry, runtime, SelectorKind.PREFIX, seed=0, **fits)
    new = publish(registry, runtime, SelectorKind.PREFIX, seed=1, **fits)
    return old, new


def versions_of(client: Client, **settings: Any) -> list[str]:
    """The version that each request id gets."""
    found = []
    for request_id in IDS:
        answer = client.generate(
            "Eva has 20 coins .",
            request_id,
            mode="s2t_local",
            trigger="entropy",
            budget=0.2,
            max_new_tokens=8,
            **settings,
        )
        found.append(answer.versions.local_selector)
    return found


def wait_for(done: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_canary_through_the_service(service: RunningService, client: Client) -> None:
    """Promoted by the client with a share: so many requests get it, a retry the same one, a named
    version is kept; rolling back ends it. Nothing is live before and after."""
    old, new = publish_two(service.config)
    client.promote(old)
    wait_for(lambda: client.describe().live_version == old)
    assert client.promote(new, share=0.3) == old
    wait_for(lambda: client.describe().canary_version == new)
    described = client.describe()
    assert (described.live_version, described.canary_share) == (old, pytest.approx(0.3))
    shares = {v.name: (v.live, round(v.share, 6)) for v in client.versions()}
    assert shares == {old: (True, 0.7), new: (False, 0.3)}
    first = versions_of(client)
    assert set(first) == {old, new}
    assert 3 <= first.count(new) <= 16
    assert versions_of(client) == first
    assert set(versions_of(client, version=old)) == {old}
    assert client.rollback() == old
    wait_for(lambda: client.describe().canary_version == "")
    assert set(versions_of(client)) == {old}
    assert client.rollback() == ""
    wait_for(lambda: client.describe().live_version == "")
