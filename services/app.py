"""Builds the Serve application: gateway, proposers and selectors.

No other module calls `.bind`. Knows the deployments and the config; no models, no requests.

`serve deploy` imports `services.app:build`. `s2t up` and `s2t serve` call `build_application`.

    gateway --handle--> proposers --handle (addresses only)--> selectors

With `proposer.replicas: 0` it is the selectors alone, for proposers of another cluster.

A kind of replica is given only those sections of the configuration that it reads. What it is given
is its version in Serve: when the application is deployed again, Serve restarts the kinds whose
version differs and leaves the others, the LLM above all, as they are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from s2t_shared.config import Config, Placement, ScaledPlacement, check_exposure, load_config
from s2t_shared.errors import ConfigError
from services import nodes
from services.roles import runs_proposers, runs_selectors
from services.serve import scaling
from services.serve.gateway import Gateway
from services.serve.proposer_replica import ProposerReplica
from services.serve.selector_replica import SelectorReplica

STOP_MARGIN_S = 10.0  # for a replica's last labels and its processes, behind the last answer
CONTROL_CALLS = 64  # slots for health checks and address look-ups, beside the answers in progress
# Sections that a kind of replica does not read. A new section is read by all, until it is here.
NOT_READ: dict[type, tuple[str, ...]] = {
    SelectorReplica: (
        *("slm", "defaults", "gateway", "proposer", "redis", "labels"),
        *("calibration", "training", "data_dir"),
    ),
    ProposerReplica: ("llm", "defaults", "gateway", "training"),
    Gateway: ("llm", "proposer", "selector", "calibration", "training"),
}
DRAIN = ("drain_lag_s", "drain_grace_s")
SCALING = ("replicas", "max_replicas", "target_ongoing_requests")  # Serve's business alone


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application.

    arguments: "config" names a file; all others are settings by their dotted names.

    Raises:
        ConfigError: a setting is wrong, or does not do for this Ray cluster.
    """
    settings = dict(arguments)
    file = settings.pop("config", None)
    config = load_config(Path(file) if file else None, settings)
    if ray.is_initialized():
        nodes.check_spread(config, nodes.find_nodes())
    return build_application(config)


def build_application(config: Config) -> serve.Application:
    """Build the application from a loaded configuration.

    Raises:
        ConfigError: a server would listen unprotected.
    """
    check_exposure(config)
    selectors = _selectors(config) if runs_selectors(config) else None
    if not runs_proposers(config):
        if selectors is None:
            raise ConfigError(
                "nothing to run: proposer.replicas=0, and no selectors either; set one of "
                "proposer.replicas and selector.replicas, without selector.addresses"
            )
        return selectors
    return _gateway(config, _proposers(config, selectors))


def _selectors(config: Config) -> serve.Application:
    return _deployment(
        SelectorReplica,
        config,
        config.selector,
        max_ongoing_requests=CONTROL_CALLS,
        **_one_per_node(config.selector.port),
    ).bind(_read_by(SelectorReplica, config))


def _proposers(config: Config, selectors: serve.Application | None) -> serve.Application:
    max_ongoing = config.proposer.max_ongoing_requests
    return _deployment(
        ProposerReplica,
        config,
        config.proposer,
        max_ongoing_requests=max_ongoing + CONTROL_CALLS,
        max_queued_requests=4 * max_ongoing,
    ).bind(_read_by(ProposerReplica, config), selectors)


def _gateway(config: Config, proposers: serve.Application) -> serve.Application:
    return _deployment(
        Gateway,
        config,
        config.gateway,
        max_ongoing_requests=CONTROL_CALLS,
        # Its calls are not Serve's: to wait for them first would only let in more of them.
        graceful_shutdown_wait_loop_s=0.1,
        **_one_per_node(config.gateway.port),
    ).bind(_read_by(Gateway, config), proposers)


def _read_by(kind: type, config: Config) -> Config:
    """The configuration with what a kind of replica does not read at its default."""
    fields = Config.model_fields
    unread = {name: fields[name].get_default(call_default_factory=True) for name in NOT_READ[kind]}
    for name in ("proposer", "selector"):
        section: ScaledPlacement = unread.get(name) or getattr(config, name)
        defaults = {key: type(section).model_fields[key].default for key in SCALING}
        unread[name] = section.model_copy(update=defaults)
    if "gateway" in unread:  # all kinds stop as the gateway does
        drain = {name: getattr(config.gateway, name) for name in DRAIN}
        unread["gateway"] = unread["gateway"].model_copy(update=drain)
    return config.model_copy(update=unread)


def _version(kind: type, config: Config) -> str:
    """What a replica is made of: this package's release, and what it reads."""
    digest = hashlib.sha256(importlib.metadata.version("s2t").encode())
    digest.update(_read_by(kind, config).model_dump_json().encode())
    return digest.hexdigest()[:16]


def _one_per_node(port: int) -> dict[str, int]:
    """Replicas that listen on one port cannot share a node."""
    return {"max_replicas_per_node": 1} if port else {}


def _deployment(
    kind: type, config: Config, placement: Placement, **options: Any
) -> serve.Deployment:
    actor: dict[str, Any] = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus}
    if placement.accelerator_type:
        actor["accelerator_type"] = placement.accelerator_type
    if placement.resources:
        actor["resources"] = placement.resources
    deployment = serve.deployment(kind).options(
        ray_actor_options=actor,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=config.gateway.drain_s + STOP_MARGIN_S,
        **_replicas(kind, placement),
        **options,
    )
    # Serve has no public way to say that nothing changed: without a version it draws a new one, and
    # every replica restarts.
    return deployment.options(version=_version(kind, config), _internal=True)


def _replicas(kind: type, placement: Placement) -> dict[str, Any]:
    if not isinstance(placement, ScaledPlacement) or not placement.scales:
        return {"num_replicas": placement.replicas}
    policy = AutoscalingPolicy()
    if kind is SelectorReplica:
        policy = AutoscalingPolicy(policy_function=scaling.replicas_for_queries)
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=placement.replicas,
            max_replicas=placement.max_replicas or placement.replicas,
            target_ongoing_requests=placement.target_ongoing_requests,
            policy=policy,
        )
    }
