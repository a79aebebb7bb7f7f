"""A whole service under load, read as Prometheus reads it: the table, the dashboard and the alert
rules against what is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from services.metrics.table import BY_ROLE, Kind, Metric, Role
from tests.services.metrics.scrape import Scrape

ROOT = Path(__file__).parent.parent.parent.parent
MONITORING = ROOT / "cluster/k8s/components/monitoring"
ALERTS = Path(__file__).parent / "alerts.yaml"
ROLES = (Role.GATEWAY, Role.PROPOSER, Role.SELECTOR)
ROWS = [(role, row) for role in ROLES for row in BY_ROLE[role]]
STAY_AT_ZERO = {  # of a service where nothing goes wrong
    *("s2t_draining", "s2t_selector_draining", "s2t_handovers_total", "s2t_label_dead_letters"),
    *("s2t_degraded_steps_total", "s2t_labels_dropped_total", "s2t_canary_share"),
    *("s2t_spool_bytes", "s2t_spool_rollouts"),
    # and of one that has answered everything:
    *("s2t_requests_in_progress", "s2t_requests_ongoing", "s2t_selector_queries_in_progress"),
    *("s2t_sequences_running", "s2t_sequences_waiting", "s2t_sequences_parked"),
    *("s2t_kv_usage_ratio", "s2t_selector_kv_usage_ratio"),
    *("s2t_label_lag_seconds", "s2t_label_queue_rollouts"),  # by chance: the drain is fast
}

# -- what is there --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(live_texts: list[str]) -> Scrape:
    return Scrape.of(*live_texts)


@pytest.mark.parametrize(("role", "row"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_each_metric_is_there_and_moves(live_texts: list[str], role: Role, row: Metric) -> None:
    """With its kind and its labels. One that stays at zero counts nothing."""
    text = live_texts[ROLES.index(role)]
    kind = Kind.GAUGE if row.kind is Kind.INFO else row.kind
    assert f"# TYPE {row.name} {kind.value}\n" in text
    assert f"# HELP {row.name} {row.help}\n" in text
    found = Scrape.of(text)
    name = f"{row.name}_count" if row.kind is Kind.HISTOGRAM else row.name
    assert found.labels[name] == set(row.labels)
    if row.name not in STAY_AT_ZERO:
        assert found.sum(name) > 0


def test_a_process_shows_nothing_else(live_texts: list[str]) -> None:
    """What is not in the table is in no document."""
    for role, text in zip(ROLES, live_texts, strict=True):
        shown = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
        assert shown == {row.name for row in BY_ROLE[role]}, role


def test_no_prompt_is_in_a_scrape(live_texts: list[str]) -> None:
    assert not re.search(r"Mia|coins|127\.0\.0\.1|nonesuch", "".join(live_texts))


# -- the dashboard and the rules ------------------------------------------------------------------


def dashboard() -> dict[str, list[dict[str, str]]]:
    """The queries of each panel."""
    content = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    return {p["title"]: p["targets"] for p in content["panels"] if p["type"] != "row"}


def rules() -> list[dict[str, str]]:
    content = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    for title, targets in dashboard().items():
        yield from ((f"{title} {i}", target["expr"]) for i, target in enumerate(targets))
    yield from ((rule["alert"], rule["expr"]) for rule in rules())


SELECTOR = re.compile(r"\b(s2t_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"")
GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")
QUERIES = dict(queries())


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_reads_what_is_there(live: Scrape, query: str) -> None:
    """A misspelt name or label is no error in Prometheus: the panel is empty, the alert silent."""
    selectors = SELECTOR.findall(query)
    named = re.sub(r'"[^"]*"', "", query).count("s2t_")
    assert selectors and len(selectors) == named, query
    known: set[str] = set()
    for name, matchers in selectors:
        assert name in live.labels, f"{name} is not in a live scrape"
        known |= live.labels[name]
        for label, operator, value in MATCHER.findall(matchers):
            assert label in live.labels[name], f"{name} has no label {label}"
            if operator in ("=", "=~"):
                for one in value.split("|"):
                    there = any(n == name and (label, one) in has for n, has in live.samples)
                    assert there, f"{name} has no {label}={one}"
    for names in GROUPING.findall(query):
        assert {name.strip() for name in names.split(",")} <= known, names


@pytest.mark.parametrize("title", dashboard())
def test_a_legend_names_labels_of_its_query(title: str) -> None:
    for target in dashboard()[title]:
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        grouped = {
            n.strip() for names in GROUPING.findall(target["expr"]) for n in names.split(",")
        }
        assert labels <= grouped, target


def test_each_metric_is_in_a_panel() -> None:
    """One that nobody sees need not be counted."""
    read = " ".join(target["expr"] for targets in dashboard().values() for target in targets)
    unseen = {row.name for _, row in ROWS if row.name not in read}
    assert not unseen


def test_the_operators_rules_are_the_same() -> None:
    plain = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    text = (MONITORING / "prometheusrule.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["spec"] == plain


# -- with promtool --------------------------------------------------------------------------------

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt-get install prometheus): queries are not "
    "parsed and alert rules are not tried",
)


def promtool(*arguments: str | Path, read: str = "") -> str:
    command = ["promtool", *arguments]
    done = subprocess.run(command, input=read, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_takes_rules_and_configuration() -> None:
    promtool("check", "rules", MONITORING / "rules.yaml")
    promtool("check", "config", MONITORING / "prometheus.yml")


@needs_promtool
def test_promtool_takes_the_dashboards_queries(tmp_path: Path) -> None:
    written = [
        {"record": f"query:number_{i}", "expr": query.replace("$__rate_interval", "5m")}
        for i, query in enumerate(QUERIES.values())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": written}]}))
    assert f"{len(written)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_promtool_takes_a_scrape(live_texts: list[str]) -> None:
    """Its linter of names, units and help texts."""
    for text in live_texts:
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    content = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    content["rule_files"] = [str(MONITORING / "rules.yaml")]
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", file)


def test_each_alert_is_tried() -> None:
    """One that never fires looks like a service that is well."""
    tried = set(re.findall(r'alertname="(\w+)"', ALERTS.read_text(encoding="utf-8")))
    assert tried == {rule["alert"] for rule in rules()}
