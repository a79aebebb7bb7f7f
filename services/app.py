"""The graph of the service, and the only `.bind`.

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
CONTROL_CALLS = 64  # calls of Serve and between replicas, beside the answers under way


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application of a configuration.

    arguments: "config" names a file; all others are settings by their dotted names.

    Raises:
        ConfigError: a setting is wrong, or a server would listen unprotected.
    """
    settings = dict(arguments)
    file = settings.pop("config", None)
    return build_application(load_config(Path(file) if file else None, settings))


def build_application(config: Config) -> serve.Application:
    """As `build`, of a configuration that is read already."""
    check_exposure(config)
    selectors = None
    if not config.selector.addresses and config.selector.replicas:
        selectors = _deployment(
            SelectorReplica, config.selector, max_ongoing_requests=CONTROL_CALLS
        ).bind(config)
    max_ongoing = config.proposer.max_ongoing_requests
    proposers = _deployment(
        ProposerReplica,
        config.proposer,
        max_ongoing_requests=max_ongoing + CONTROL_CALLS,
        max_queued_requests=4 * max_ongoing,
    ).bind(config, selectors)
    gateway = _deployment(Gateway, config.gateway, max_ongoing_requests=CONTROL_CALLS)
    return gateway.bind(config, proposers)


def _deployment(target: type, placement: Placement, **options: Any) -> serve.Deployment:
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
        graceful_shutdown_timeout_s=10.0,
        **options,
    )
