"""What Ray and Serve say of the application in the cluster that this process is connected to."""

from __future__ import annotations

import logging

import ray
from ray import serve

from s2t_shared.config import Config
from services.nodes import awaited, find_nodes, needs_of
from services.roles import APPLICATION, SECTIONS, placements

logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)
ADDRESS_TIMEOUT_S = 30.0
METRICS_TIMEOUT_S = 5.0


def find_addresses() -> list[str]:
    """host:port of each gateway of the application; of selectors alone, theirs.

    Raises:
        Exception: of any kind, from Serve; they do not say.
    """
    entry = serve.get_app_handle(APPLICATION)
    found = entry.broadcast("address").results(timeout_s=ADDRESS_TIMEOUT_S)
    return sorted(str(address) for address in found)


def find_url() -> str:
    """Where the service speaks HTTP; "" for nowhere.

    Raises:
        Exception: of any kind, from Serve; they do not say.
    """
    gateway = serve.get_deployment_handle("Gateway", APPLICATION)
    return str(gateway.url.remote().result(timeout_s=ADDRESS_TIMEOUT_S))


def find_metrics() -> dict[str, list[str]]:
    """Where Prometheus reads each replica's metrics, by the name of its deployment; without those
    that do not run or do not say."""
    found = {}
    for name, role in serve.status().applications[APPLICATION].deployments.items():
        if not role.replica_states.get("RUNNING"):
            continue
        try:
            asked = serve.get_deployment_handle(name, APPLICATION).broadcast("metrics_url")
            urls = asked.results(timeout_s=METRICS_TIMEOUT_S)
        except Exception:  # noqa: BLE001 - the border to Serve: it may raise anything here
            continue
        found[name] = sorted(str(url) for url in urls if url)
    return found


def waits(config: Config) -> dict[str, str]:
    """What replicas that have no node wait for, in words, by the name of their deployment."""
    unplaced = _unplaced()
    nodes = find_nodes()
    found = {}
    for name, placement in placements(config).items():
        count = unplaced.get(name, 0)
        lacking = awaited(needs_of(placement), nodes) if count else ""
        if lacking:
            found[name] = (
                f"waiting for a node for {count} {name}: {lacking}; add such a node to the Ray "
                f"cluster, or change {SECTIONS[name]}.*"
            )
    return found


def _unplaced() -> dict[str, int]:
    """Replicas without a node, by deployment. Serve says it itself after 30 s only, in a log."""
    counts: dict[str, int] = {}
    for actor in ray._private.state.actors().values():
        application, _, rest = actor["Name"].removeprefix("SERVE_REPLICA::").partition("#")
        pending = actor["State"] in ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING")
        if application == APPLICATION and pending and not actor["Address"]["Port"]:
            name = rest.partition("#")[0]
            counts[name] = counts.get(name, 0) + 1
    return counts
