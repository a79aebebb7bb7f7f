"""Builds the Serve application: gateway, proposers and selectors.

No other module calls `.bind`. Knows the deployments and the config; no models, no requests.

`serve deploy` imports `services.app:build`. `s2t serve` calls `build_application`.

    gateway --handle--> proposers --handle (addresses only)--> selectors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from s2t_shared.config import Config, Placement, check_exposure, load_config
from services.serve.gateway import Gateway
from services.serve.proposer_replica import ProposerReplica
from services.serve.selector_replica import SelectorReplica

APPLICATION = "s2t"
STOP_MARGIN_S = 10.0  # for a replica's last labels and its processes, behind the last answer
CONTROL_CALLS = 64  # slots for health checks and address look-ups, beside the answers in progress


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application.

    arguments: "config" names a file; all others are settings by their dotted names.

    Raises:
        ConfigError: a setting is wrong, or a server would listen unprotected.
    """
    settings = dict(arguments)
    file = settings.pop("config", None)
    return build_application(load_config(Path(file) if file else None, settings))


def build_application(config: Config) -> serve.Application:
    """Build the application from a loaded configuration.

    Raises:
        ConfigError: a server would listen unprotected.
    """
    check_exposure(config)
    drain_s = config.gateway.drain_s
    selectors = None
    if not config.selector.addresses and config.selector.replicas:
        selectors = _deployment(
            SelectorReplica, config.selector, drain_s, max_ongoing_requests=CONTROL_CALLS
        ).bind(config)
    max_ongoing = config.proposer.max_ongoing_requests
    proposers = _deployment(
        ProposerReplica,
        config.proposer,
        drain_s,
        max_ongoing_requests=max_ongoing + CONTROL_CALLS,
        max_queued_requests=4 * max_ongoing,
    ).bind(config, selectors)
    # Its calls are not Serve's: to wait for them first would only let in more of them.
    gateway = _deployment(
        Gateway,
        config.gateway,
        drain_s,
        max_ongoing_requests=CONTROL_CALLS,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return gateway.bind(config, proposers)


def _deployment(
    target: type, placement: Placement, drain_s: float, **options: Any
) -> serve.Deployment:
    """drain_s: seconds that the replica may take to stop."""
    actor: dict[str, Any] = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus}
    if placement.accelerator_type:
        actor["accelerator_type"] = placement.accelerator_type
    if placement.resources:
        actor["resources"] = placement.resources
    return serve.deployment(target).options(
        num_replicas=placement.replicas,
        ray_actor_options=actor,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=drain_s + STOP_MARGIN_S,
        **options,
    )
