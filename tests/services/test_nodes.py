"""What a replica waits for, by name, and settings that do for one node only. No Ray."""

from __future__ import annotations

import pytest

from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError
from services.nodes import (
    Node,
    awaited,
    check_gateway_host,
    check_spread,
    needs_of,
    room_for,
)


def node(free: dict[str, float] | None = None, **total: float) -> Node:
    return Node("id", "10.0.0.1", total, total if free is None else free)


def config_of(**overrides: object) -> Config:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, named, environment={})


LARGE = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 0.001, "llm_node": 1.0}


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([node(CPU=16)], "no node has GPU (1), accelerator_type H100, llm_node (1)"),
        (
            [node(CPU=16, GPU=1, llm_node=1)],
            "no node has accelerator_type H100",
        ),
        (
            [node(CPU=16), node(CPU=4, GPU=1, llm_node=1, **{"accelerator_type:H100": 1})],
            "no single node has CPU (8), GPU (1), accelerator_type H100, llm_node (1)",
        ),
        (
            [
                node(
                    {"CPU": 8, "llm_node": 1, "accelerator_type:H100": 0.999},
                    CPU=16,
                    GPU=1,
                    llm_node=1,
                    **{"accelerator_type:H100": 1},
                )
            ],
            "GPU (1) is taken on every node that has it",
        ),
        ([node(CPU=16, GPU=1, llm_node=1, **{"accelerator_type:H100": 1})], ""),
    ],
)
def test_what_is_awaited_has_a_name(nodes: list[Node], word: str) -> None:
    """F26: a service used to wait for an H100 for ever, without a word."""
    assert awaited(LARGE, nodes) == word


def test_two_halves_of_what_is_free_are_named_together() -> None:
    """Each is free somewhere, and nowhere both."""
    half = {"CPU": 1.0, "GPU": 1.0}
    nodes = [node({"CPU": 1}, CPU=2, GPU=1), node({"GPU": 1}, CPU=2, GPU=1)]
    assert awaited(half, nodes) == "CPU (1), GPU (1) is taken on every node that has it"


def test_needs_are_what_ray_is_asked_for() -> None:
    config = config_of(
        selector__num_cpus=8,
        selector__num_gpus=1,
        selector__accelerator_type="H100",
        selector__resources={"llm_node": 1},
    )
    assert needs_of(config.selector) == LARGE
    assert needs_of(config_of(gateway__num_cpus=0).gateway) == {}


def test_room_counts_workers() -> None:
    nodes = [node(CPU=8, GPU=1), node({"CPU": 1, "GPU": 1}, CPU=8, GPU=1), node(CPU=16)]
    assert room_for({"CPU": 4, "GPU": 1}, nodes) == 1
    assert room_for({"CPU": 4}, nodes) == 6


# -- several nodes --------------------------------------------------------------------------------

REDIS = "redis://:secret@10.0.0.9:6379/0"
TWO = [node(CPU=1), node(CPU=1)]


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:6379/0", "redis://localhost/0"])
def test_a_redis_of_one_node_is_refused_on_several(url: str | None) -> None:
    """Labels of the other nodes filled their spool, and were lost."""
    config = config_of(redis__url=url, selector__host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"2 nodes.*Set redis\.url"):
        check_spread(config, TWO)
    check_spread(config, TWO[:1])


def test_selectors_on_loopback_are_refused_on_several_nodes() -> None:
    """Proposers elsewhere silently had no LLM."""
    config = config_of(redis__url=REDIS)
    with pytest.raises(ConfigError, match=r"selector\.host=127\.0\.0\.1.*0\.0\.0\.0"):
        check_spread(config, TWO)
    check_spread(config_of(redis__url=REDIS, selector__addresses=["llm:1"]), TWO)
    check_spread(config_of(redis__url=REDIS, selector__replicas=0), TWO)


def test_selectors_alone_need_no_redis() -> None:
    """They store no labels."""
    check_spread(config_of(proposer__replicas=0, selector__host="0.0.0.0"), TWO)


def test_a_gateway_on_loopback_is_warned_of() -> None:
    assert "gateway.host" in check_gateway_host(config_of(), TWO)
    assert not check_gateway_host(config_of(), TWO[:1])
    assert not check_gateway_host(config_of(gateway__host="0.0.0.0"), TWO)
