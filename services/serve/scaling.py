"""How many selectors Serve should run: by the queries that wait at them.

Serve counts the calls of its handles. Proposers ask selectors directly, so Serve sees none of it
and each selector reports its queries itself. Serve's controller runs this module from a copy:
nothing of ours is imported here.
"""

from __future__ import annotations

from typing import Any

QUERIES = "queries"


def replicas_for_queries(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas wanted now. Serve rounds up, waits its delays, and keeps within min and max.

    context: Serve's `AutoscalingContext`.
    """
    reported: dict[Any, float] = context.aggregated_metrics.get(QUERIES, {})
    if not reported:  # none has reported yet: no reason to change anything
        return context.target_num_replicas, {}
    return sum(reported.values()) / context.config.target_ongoing_requests, {}
