"""The benchmark's streams by gRPC and HTTP: the same tokens, each piece timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.errors import ServiceUnavailableError
from s2t_shared.requests import new_request
from services.bench.streams import Streamed, by_grpc, by_http, compared
from tests.helpers.serving import http_and_grpc, proposer_service, scripted_slm

REQUESTS = [new_request([n, 5], "greedy", max_new_tokens=5, request_id=f"r{n}") for n in (3, 4)]


def test_both_transports_are_timed_alike(tmp_path: Path) -> None:
    """A side that counts its last event, or its tokens, differently is faster on paper only."""
    slm = scripted_slm(step_s=0.01)
    with http_and_grpc(tmp_path, proposer_service(slm)) as (url, grpc):
        turns = [by_grpc(grpc, REQUESTS), by_http(url, "bundled", REQUESTS)]
    for turn in turns:
        assert turn.tokens == 10
        assert len(turn.firsts) == 2 and len(turn.gaps) >= 4
        assert 0 < max(turn.firsts) <= turn.seconds


def test_a_refusal_is_no_figure(tmp_path: Path) -> None:
    """Streams that failed at once looked like the fastest."""
    with http_and_grpc(tmp_path, proposer_service()) as (url, _):
        with pytest.raises(ServiceUnavailableError, match="404"):
            by_http(url, "another", REQUESTS)


def test_ratios_are_turn_by_turn() -> None:
    slow = Streamed(seconds=2.0, tokens=10, firsts=(0.4, 0.6), gaps=(0.2, 0.2))
    fast = Streamed(seconds=1.0, tokens=10, firsts=(0.2, 0.3), gaps=(0.1, 0.1))
    found = {each.name: each.median for each in compared([slow, fast], [fast, fast])}
    assert found["HTTP / gRPC, tokens per second"] == pytest.approx(0.75)
    assert found["HTTP / gRPC, time to first token"] == pytest.approx(1.5)
