"""The nodes of a Ray cluster: what they have, what a replica waits for, and which settings do for
one node only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import ray

from s2t_shared.config import LOOPBACK, Config, Placement
from s2t_shared.errors import ConfigError

ACCELERATOR = "accelerator_type:"
ACCELERATOR_SHARE = 0.001  # Ray's own request for a type of accelerator


@dataclass(frozen=True)
class Node:
    """A living node. total, free: amounts by resource, for example {"CPU": 8, "GPU": 1}."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def find_nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def needs_of(placement: Placement) -> dict[str, float]:
    """What one replica takes of its node."""
    needs = {"CPU": placement.num_cpus, "GPU": placement.num_gpus, **placement.resources}
    if placement.accelerator_type:
        needs[ACCELERATOR + placement.accelerator_type] = ACCELERATOR_SHARE
    return {name: amount for name, amount in needs.items() if amount > 0}


def awaited(needs: Mapping[str, float], nodes: Iterable[Node]) -> str:
    """What a replica waits for, in words; "" where a node has room for it.

    First what no node has at all, then what no one node has together, then what is taken.
    """
    nodes = list(nodes)
    lacking = [name for name in needs if not any(node.total.get(name) for node in nodes)]
    if lacking:
        return f"no node has {_amounts(needs, lacking)}"
    if not any(_holds(node.total, needs) for node in nodes):
        return f"no single node has {_amounts(needs, needs)}"
    suited = [node for node in nodes if _holds(node.total, needs)]
    if any(_holds(node.free, needs) for node in suited):
        return ""
    taken = [
        name for name in needs if not any(node.free.get(name, 0) >= needs[name] for node in suited)
    ]
    return f"{_amounts(needs, taken or needs)} is taken on every node that has it"


def room_for(needs: Mapping[str, float], nodes: Iterable[Node]) -> int:
    """How many workers with these needs fit into what is free."""
    return sum(
        min(int(node.free.get(name, 0) / amount) for name, amount in needs.items())
        for node in nodes
    )


def _holds(amounts: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(amounts.get(name, 0) >= amount for name, amount in needs.items())


def _amounts(needs: Mapping[str, float], names: Iterable[str]) -> str:
    """For example: GPU (1), accelerator_type H100."""
    shown = []
    for name in names:
        if name.startswith(ACCELERATOR):
            shown.append(f"accelerator_type {name.removeprefix(ACCELERATOR)}")
        else:
            shown.append(f"{name} ({needs[name]:g})")
    return ", ".join(shown)


def check_spread(config: Config, nodes: Sequence[Node]) -> None:
    """Check that the settings do for as many nodes as there are.

    Raises:
        ConfigError: a server or Redis could be reached from its own node only.
    """
    if len(nodes) < 2:
        return
    several = f"this Ray cluster has {len(nodes)} nodes"
    redis = config.redis.url
    has_labels = config.proposer.replicas > 0
    if has_labels and (redis is None or urlsplit(redis).hostname in LOOPBACK):
        what = "on loopback" if redis else "that `s2t` starts itself"
        raise ConfigError(
            f"{several}, and a Redis {what} is reached from one only: labels of the others would "
            "be lost. Set redis.url to a Redis that all nodes reach, for example "
            "redis://:PASSWORD@HOST:6379/0 (S2T_REDIS__URL keeps it out of files), or give this "
            "service a Ray of its own: RAY_ADDRESS=local"
        )
    starts_selectors = config.selector.replicas > 0 and not config.selector.addresses
    if starts_selectors and config.selector.host in LOOPBACK:
        raise ConfigError(
            f"{several}, and selector.host={config.selector.host} lets proposers on the same node "
            "ask the LLM, and no others. Set selector.host: 0.0.0.0, with security.certificate, "
            "key, authority and token_file (or security.insecure: true, if the network is yours "
            "alone)"
        )


def check_gateway_host(config: Config, nodes: Sequence[Node]) -> str:
    """A word of warning where clients on other machines cannot connect; else ""."""
    if len(nodes) < 2 or config.gateway.host not in LOOPBACK:
        return ""
    return (
        f"gateway.host={config.gateway.host}: clients on the gateway's own node can connect, and "
        "no others; set gateway.host: 0.0.0.0 with security.*"
    )
