"""How many selectors: by the queries that they report, as Serve hands them on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from services.serve import scaling
from services.serve.scaling import QUERIES, replicas_for_queries


def context(reported: dict[str, float], target: float = 10, now: int = 2) -> Any:
    metrics = {QUERIES: reported} if reported else {}
    return SimpleNamespace(
        aggregated_metrics=metrics,
        config=SimpleNamespace(target_ongoing_requests=target),
        target_num_replicas=now,
    )


@pytest.mark.parametrize(
    ("reported", "wanted"),
    [({"a": 20, "b": 15}, 3.5), ({"a": 0, "b": 0}, 0), ({"a": 5}, 0.5)],
)
def test_queries_of_all_replicas_count(reported: dict[str, float], wanted: float) -> None:
    """Serve itself sees no query: proposers ask selectors directly."""
    assert replicas_for_queries(context(reported))[0] == wanted


def test_nothing_reported_changes_nothing() -> None:
    """A selector that loads its LLM reports nothing yet; that is no reason to end another."""
    assert replicas_for_queries(context({}, now=3))[0] == 3


def test_serves_controller_can_run_it_without_this_package() -> None:
    """Serve sends the policy by value."""
    cloudpickle.register_pickle_by_value(scaling)
    try:
        sent = cloudpickle.dumps(replicas_for_queries)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)
    assert b"s2t_shared" not in sent
    assert cloudpickle.loads(sent)(context({"a": 20}))[0] == 2
