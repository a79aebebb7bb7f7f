"""The application's graph: what a change of settings restarts, and how replicas scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s2t_shared.config import load_config
from s2t_shared.errors import ConfigError
from services.app import build_application
from services.roles import placements


def graph(**overrides: object) -> dict[str, Any]:
    """The deployments, by name."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    application: Any = build_application(load_config(None, named, environment={}))
    found: dict[str, Any] = {}
    waiting = [application._bound_deployment]
    while waiting:
        deployment = waiting.pop()
        found[deployment.name] = deployment
        waiting += [
            a._bound_deployment for a in deployment.init_args if hasattr(a, "_bound_deployment")
        ]
    return found


ALL = {"Gateway", "ProposerReplica", "SelectorReplica"}


@pytest.mark.parametrize(
    ("changed", "restarted"),
    [
        ({}, set()),
        ({"defaults__max_new_tokens": 99}, {"Gateway"}),
        ({"gateway__max_samples": 8}, {"Gateway"}),
        ({"training__rank": 4}, set()),
        ({"proposer__max_num_seqs": 16}, {"ProposerReplica"}),
        ({"proposer__replicas": 3}, set()),
        ({"selector__replicas": 2}, set()),
        ({"selector__max_replicas": 4, "selector__target_ongoing_requests": 7}, set()),
        ({"calibration__count": 50}, {"ProposerReplica"}),
        ({"slm__threads": 2}, {"Gateway", "ProposerReplica"}),
        ({"redis__url": "redis://h:1/0"}, {"Gateway", "ProposerReplica"}),
        ({"llm__threads": 2}, {"SelectorReplica"}),
        ({"selector__port": 7000}, {"ProposerReplica", "SelectorReplica"}),
        ({"security__insecure": True}, ALL),
    ],
    ids=lambda value: " ".join(sorted(value)) or "nothing",
)
def test_a_change_restarts_who_reads_it(changed: dict[str, object], restarted: set[str]) -> None:
    """Every `up` used to be a new version of everything, and the LLM was loaded again for a
    gateway's limit."""
    before, after = graph(), graph(**changed)
    assert {name for name in ALL if before[name].version != after[name].version} == restarted


def test_replicas_are_given_only_what_their_version_covers() -> None:
    """Else a replica that starts later would run with other settings than its fellows."""
    changed = {"defaults__max_new_tokens": 99, "llm__threads": 3, "proposer__max_num_seqs": 7}
    given = {name: found.init_args[0] for name, found in graph(**changed).items()}
    assert given["Gateway"].defaults.max_new_tokens == 99
    assert given["ProposerReplica"].defaults.max_new_tokens != 99
    assert given["ProposerReplica"].proposer.max_num_seqs == 7
    assert given["Gateway"].proposer.max_num_seqs != 7
    assert given["SelectorReplica"].llm.threads == 3
    assert given["ProposerReplica"].llm.threads != 3
    assert given["SelectorReplica"].data_dir == Path("s2t-data")


def test_replicas_scale_only_where_they_may() -> None:
    fixed = graph(proposer__replicas=2)["ProposerReplica"]
    assert fixed._deployment_config.autoscaling_config is None and fixed.num_replicas == 2
    scaled = graph(
        proposer__replicas=2, proposer__max_replicas=6, proposer__target_ongoing_requests=48
    )
    scaling = scaled["ProposerReplica"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 6)
    assert scaling.target_ongoing_requests == 48
    assert scaling.policy.is_default_policy_function()
    selector = graph(selector__max_replicas=2)["SelectorReplica"]
    policy = selector._deployment_config.autoscaling_config.policy
    assert policy.policy_function == "services.serve.scaling.replicas_for_queries"


def test_a_fixed_port_is_for_one_replica_of_a_node() -> None:
    """Two gateways on one node: the second could not listen, and the deployment failed."""
    assert graph(gateway__port=1)["Gateway"]._replica_config.max_replicas_per_node == 1
    free = graph(gateway__port=0, selector__port=0)
    assert free["Gateway"]._replica_config.max_replicas_per_node is None
    assert free["SelectorReplica"]._replica_config.max_replicas_per_node is None


def test_selectors_alone_and_nothing_at_all() -> None:
    assert set(graph(proposer__replicas=0)) == {"SelectorReplica"}
    with pytest.raises(ConfigError, match="nothing to run"):
        graph(proposer__replicas=0, selector__replicas=0)
    config = load_config(None, {"selector.addresses": ["h:1"]}, environment={})
    assert list(placements(config)) == ["Gateway", "ProposerReplica"]
