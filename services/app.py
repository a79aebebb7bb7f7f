"""The graph of the service, and the only `.bind`. `serve deploy` imports `services.app:build`; `s2t
serve` calls it.

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


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application of a configuration: `{"config": FILE, "redis.url": ..., any other dotted
    setting}`.

    Raises:
        ConfigError: as `load_config` and `check_exposure`.
    """
    settings = dict(arguments)
    file = settings.pop("config", None)
    return build_application(load_config(Path(file) if file else None, settings))


def build_application(config: Config) -> serve.Application:
    check_exposure(config)
    selectors = None
    if not config.selector.addresses and config.selector.replicas:
        selectors = _deployment(SelectorReplica, config.selector, max_ongoing_requests=64).bind(
            config
        )
    busy = config.proposer.max_ongoing_requests
    proposers = _deployment(
        ProposerReplica,
        config.proposer,
        max_ongoing_requests=busy + 64,
        max_queued_requests=4 * busy,
    ).bind(config, selectors)
    return _deployment(Gateway, config.gateway, max_ongoing_requests=64).bind(config, proposers)


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
