"""Every metric of the service: its name, kind, labels and meaning. There are no others.

Names and units follow Prometheus' rules and, where vLLM has the same thing, vLLM's names. Labels
have few values: no prompt, client, request id or address is among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """As Prometheus names them. A counter's name ends in `_total`; an info's value is always 1."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


class Role(str, Enum):
    """The kinds of processes."""

    GATEWAY = "gateway"
    PROPOSER = "proposer"
    SELECTOR = "selector"


STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table. buckets: upper bounds of a histogram, in seconds."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


def _counter(name: str, labels: str, text: str) -> Metric:
    assert name.endswith("_total")
    return Metric(name, Kind.COUNTER, tuple(labels.split()), text)


def _gauge(name: str, labels: str, text: str) -> Metric:
    return Metric(name, Kind.GAUGE, tuple(labels.split()), text)


def _histogram(name: str, labels: str, text: str, buckets: tuple[float, ...]) -> Metric:
    assert name.endswith("_seconds")
    return Metric(name, Kind.HISTOGRAM, tuple(labels.split()), text, buckets)


def _info(name: str, labels: str, text: str) -> Metric:
    assert name.endswith("_info")
    return Metric(name, Kind.INFO, tuple(labels.split()), text)


ALL = (_info("s2t_build_info", "version role", "The release that runs, and as what."),)

GATEWAY = (
    _counter(
        "s2t_requests_total",
        "mode status",
        "Requests that reached a proposer and have ended, by gRPC status.",
    ),
    _counter(
        "s2t_refusals_total",
        "reason",
        "Calls that ended with an error, by the reason that clients are told.",
    ),
    _counter(
        "s2t_finished_answers_total", "finish_reason", "Finished answers, by what ended them."
    ),
    _histogram(
        "s2t_request_duration_seconds",
        "mode",
        "From a checked request to the end of its answer.",
        REQUEST_BUCKETS,
    ),
    _gauge("s2t_requests_in_progress", "", "Requests that are being answered."),
    _counter(
        "s2t_handovers_total",
        "",
        "Times that an answer went on with another proposer, because its own was lost.",
    ),
    _gauge("s2t_ready", "", "1 while a proposer answers this gateway."),
    _gauge("s2t_draining", "", "1 while this gateway stops and lets answers finish."),
    _gauge("s2t_label_store_up", "", "1 while Redis answers this gateway."),
    _gauge("s2t_label_queue_rollouts", "", "Rollouts in Redis that are not in the lake yet."),
    _gauge(
        "s2t_label_lag_seconds",
        "",
        "Age of the oldest of them; up to labels.shard_age_s is normal.",
    ),
    _gauge("s2t_label_dead_letters", "", "Refused labels in Redis."),
)

ANSWERS = (
    _counter("s2t_prompt_tokens_total", "mode", "Tokens of prompts that were begun."),
    _counter(
        "s2t_generation_tokens_total",
        "mode chosen_by",
        "Tokens that were decided, by who chose them: slm, sampler, llm, local.",
    ),
    _histogram(
        "s2t_time_to_first_token_seconds",
        "mode",
        "From a request's arrival at the proposer to its first token.",
        REQUEST_BUCKETS,
    ),
    _histogram(
        "s2t_inter_token_latency_seconds",
        "mode",
        "From one token to the next; tokens decided together share the time.",
        STEP_BUCKETS,
    ),
    _histogram(
        "s2t_queue_time_seconds",
        "mode",
        "From a request's arrival at the proposer to a place in the batch.",
        REQUEST_BUCKETS,
    ),
    _counter("s2t_triggers_total", "mode", "Steps at a divergence point."),
    _counter("s2t_flips_total", "mode", "Of them, those that changed the token."),
    _counter("s2t_degraded_steps_total", "mode", "Steps that did without the LLM."),
    _counter("s2t_parked_steps_total", "mode", "Steps at which an answer waited for the LLM."),
    _counter(
        "s2t_llm_forwards_total", "mode", "LLM forward passes that answers caused; cache hits none."
    ),
    _counter("s2t_draft_tokens_total", "mode", "Tokens that the SLM drafted for the LLM to check."),
    _counter("s2t_accepted_draft_tokens_total", "mode", "Of them, those that the LLM let stand."),
    _counter(
        "s2t_compared_selections_total",
        "chooser",
        "Triggered steps where the LLM's choice is known, and that of the SLM (slm: its first "
        "candidate) or of the local selector (local).",
    ),
    _counter(
        "s2t_agreed_selections_total",
        "chooser",
        "Of them, those where it is the LLM's; over compared ones: Agree@1 online.",
    ),
)

ENGINE = (
    _gauge("s2t_sequences_running", "", "Sequences in the batch."),
    _gauge("s2t_sequences_waiting", "", "Sequences that wait for a place in it."),
    _gauge("s2t_sequences_parked", "", "Sequences in the batch that wait for the LLM."),
    _gauge("s2t_requests_ongoing", "", "Requests that this proposer has accepted."),
    _gauge("s2t_kv_usage_ratio", "", "Share of the SLM's KV memory that live sequences hold."),
)

ASKING = (  # the LLM, as a proposer sees it
    _gauge("s2t_llm_reachable", "", "1 while there is a selector to ask."),
    _gauge(
        "s2t_selector_breakers",
        "state",
        "Selectors by the state of their circuit breaker: closed is asked, open is not.",
    ),
    _histogram(
        "s2t_selection_latency_seconds",
        "",
        "From a query to the selector's reply, the network included.",
        STEP_BUCKETS,
    ),
    _counter(
        "s2t_selections_total", "outcome", "Queries to selectors, by outcome: answered, failed."
    ),
    _counter(
        "s2t_selection_cache_lookups_total",
        "result",
        "Selections that were looked up in Redis, by result: hit, miss.",
    ),
)

LABELS = (
    _counter("s2t_labels_written_total", "", "Labels that are safe in Redis or the spool."),
    _counter("s2t_labels_dropped_total", "reason", "Labels that were lost, by reason."),
    _gauge("s2t_spool_bytes", "", "Size of this proposer's spool on disk."),
    _gauge("s2t_spool_rollouts", "", "Rollouts in it: Redis has not confirmed them."),
)

VERSIONS = (
    _info(
        "s2t_version_info",
        "slm llm live canary",
        "What answers: digests of the models, names of the local selectors.",
    ),
    _gauge(
        "s2t_version_created_timestamp_seconds",
        "",
        "When the live local selector was made, in Unix seconds.",
    ),
    _gauge("s2t_canary_share", "", "Share of the requests that the canary gets."),
)

SELECTOR = (
    _counter("s2t_selector_queries_total", "status", "Queries, by gRPC status."),
    _counter("s2t_selector_positions_total", "", "Positions that the LLM has scored."),
    _histogram(
        "s2t_selector_query_seconds", "", "From a query's arrival to its reply.", STEP_BUCKETS
    ),
    _gauge("s2t_selector_queries_in_progress", "", "Queries that wait for their reply."),
    _gauge(
        "s2t_selector_kv_usage_ratio", "", "Share of the LLM's KV memory that live queries hold."
    ),
    _gauge("s2t_selector_draining", "", "1 while this selector stops and still answers."),
)

BY_ROLE = {
    Role.GATEWAY: ALL + GATEWAY,
    Role.PROPOSER: ALL + ANSWERS + ENGINE + ASKING + LABELS + VERSIONS,
    Role.SELECTOR: ALL + SELECTOR,
}
TABLE = {row.name: row for rows in BY_ROLE.values() for row in rows}


def as_markdown() -> str:
    """The table as the documentation has it."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for title, rows in (("all", ALL), *((r.value, BY_ROLE[r][len(ALL) :]) for r in Role)):
        lines.append(f"| **{title}** | | | |")
        for row in rows:
            labels = ", ".join(row.labels)
            lines.append(f"| `{row.name}` | {row.kind.value} | {labels} | {row.help} |")
    return "\n".join(lines) + "\n"
