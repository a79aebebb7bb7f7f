"""The roles of a service: which of them a configuration has, and where their replicas go.

Knows the config; neither Ray nor models, so that who only looks after a service loads neither.
"""

from __future__ import annotations

from s2t_shared.config import Config, Placement

APPLICATION = "s2t"  # its name in Serve
# The deployments' names in Serve, and their sections of the configuration.
SECTIONS = {"Gateway": "gateway", "ProposerReplica": "proposer", "SelectorReplica": "selector"}


def runs_selectors(config: Config) -> bool:
    """Whether the service runs selectors of its own: not those at configured addresses."""
    return not config.selector.addresses and config.selector.replicas > 0


def runs_proposers(config: Config) -> bool:
    """Whether it is a whole service, with a gateway: not the selectors alone."""
    return config.proposer.replicas > 0


def placements(config: Config) -> dict[str, Placement]:
    """Where the replicas of each deployment go, by its name in Serve."""
    runs = {
        "Gateway": runs_proposers(config),
        "ProposerReplica": runs_proposers(config),
        "SelectorReplica": runs_selectors(config),
    }
    return {name: getattr(config, SECTIONS[name]) for name, there in runs.items() if there}
