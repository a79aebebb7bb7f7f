"""Names, units and labels of the metrics, as Prometheus has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.metrics.registry import Registry
from services.metrics.table import BY_ROLE, TABLE, Kind, Metric, Role, as_markdown

PAGE = Path(__file__).parent.parent.parent.parent / "cluster/MONITORING.md"
FEW_VALUES = {  # labels whose values are counted on one hand, or change with a deployment only
    *("mode", "status", "reason", "finish_reason", "chosen_by", "chooser", "outcome", "result"),
    *("state", "version", "role", "slm", "llm", "live", "canary"),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_names_say_kind_and_unit(row: Metric) -> None:
    """A dashboard that is written by rule of name must not be wrong."""
    assert row.name.startswith("s2t_")
    assert row.name.endswith("_total") == (row.kind is Kind.COUNTER)
    assert row.name.endswith("_info") == (row.kind is Kind.INFO)
    assert bool(row.buckets) == (row.kind is Kind.HISTOGRAM)
    if row.kind is Kind.HISTOGRAM:
        assert row.name.endswith("_seconds")
    assert "_ms" not in row.name and row.help.endswith(".")


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_labels_have_few_values_and_name_nobody(row: Metric) -> None:
    """A label by request, client or prompt would fill Prometheus, and tell who asked what."""
    assert set(row.labels) <= FEW_VALUES


def test_a_name_has_one_row() -> None:
    rows = {row for rows in BY_ROLE.values() for row in rows}
    assert len(rows) == len(TABLE)


def test_a_process_counts_only_what_its_role_has() -> None:
    """A metric that is not in the table would be in no document and no dashboard."""
    registry = Registry(Role.GATEWAY)
    with pytest.raises(KeyError):
        registry.counter("s2t_surprises_total")
    with pytest.raises(AssertionError, match="s2t_selector_queries_total"):
        registry.counter("s2t_selector_queries_total")
    with pytest.raises(AssertionError, match="s2t_requests_total"):
        registry.gauge("s2t_requests_total")


def test_the_page_has_the_table() -> None:
    """python -c 'from services.metrics.table import as_markdown; print(as_markdown())'"""
    assert as_markdown() in PAGE.read_text(encoding="utf-8")
