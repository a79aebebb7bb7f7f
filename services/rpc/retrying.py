"""Which calls gRPC itself repeats, and what it must not repeat.

A call that failed as UNAVAILABLE before its first reply, or that a server which stops has dropped
as CANCELLED, is sent again, after a growing pause or the
one that the server names, within the call's own deadline. Only calls that change nothing, or the
same thing twice, are repeated.
"""

from __future__ import annotations

import json

POLICY = {
    "maxAttempts": 5,  # gRPC's own limit
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
REPEATABLE = [
    {"service": "s2t.v1.GenerationService"},
    {"service": "s2t.v1.AdminService", "method": "ListVersions"},
    {"service": "s2t.v1.AdminService", "method": "CountLabels"},
]
SERVICE_CONFIG = {"methodConfig": [{"name": REPEATABLE, "retryPolicy": POLICY}]}
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.per_rpc_retry_buffer_size", 4 << 20),  # a longer request is not repeated
)
PUSHBACK = "grpc-retry-pushback-ms"  # trailing metadata: when to send a call again
NEVER = "-1"


def pushback(retry_after_s: float | None) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that tells gRPC when to repeat a call; None: it must not."""
    return ((PUSHBACK, NEVER if retry_after_s is None else str(round(1000 * retry_after_s))),)
