"""What an operator is told while and after a service starts. No Ray: it is asked through fakes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError
from services.launch import deploy, running
from services.nodes import Node

EMPTY = [Node("n1", "10.0.0.1", {"CPU": 8}, {"CPU": 8})]


def config_of(**overrides: object) -> Config:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, named, environment={})


def actor(name: str, state: str, port: int) -> dict[str, Any]:
    return {"Name": name, "State": state, "Address": {"Port": port}}


def test_what_an_unplaced_replica_waits_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own table of actors: Serve says it after 30 s, in the controller's log. A replica
    that has its node and still loads waits for nothing."""
    actors = [
        actor("SERVE_REPLICA::s2t#SelectorReplica#a", "PENDING_CREATION", 0),
        actor("SERVE_REPLICA::s2t#ProposerReplica#b", "PENDING_CREATION", 4711),
        actor("SERVE_REPLICA::other#SelectorReplica#c", "PENDING_CREATION", 0),
        actor("SERVE_REPLICA::s2t#Gateway#d", "ALIVE", 4712),
        actor("", "DEAD", 0),
    ]
    state = SimpleNamespace(actors=lambda: dict(enumerate(actors)))
    monkeypatch.setattr(ray._private, "state", state)
    monkeypatch.setattr(running, "find_nodes", lambda: EMPTY)
    found = running.waits(config_of(selector__resources={"llm_node": 1}))
    assert set(found) == {"SelectorReplica"}
    assert "1 SelectorReplica: no node has llm_node (1)" in found["SelectorReplica"]
    assert "selector.*" in found["SelectorReplica"]


def test_it_is_said_once_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 s as it is configured; here the clock runs faster."""
    assert deploy.PATIENCE_S + 2 * deploy.WATCH_EVERY_S <= 10
    monkeypatch.setattr(deploy, "WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(deploy, "PATIENCE_S", 0.02)
    monkeypatch.setattr(deploy, "waits", lambda config: {"SelectorReplica": "no GPU"})
    said: list[str] = []
    with deploy.watched(config_of(), said.append):
        give_up = time.monotonic() + 10
        while not said and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.1)
    assert said == ["no GPU"]


def test_uncalibrated_budgets_are_said_aloud(tmp_path: Path) -> None:
    """K: a 1 % budget of a Qwen pair was calibrated on toy problems, in silence."""
    (word,) = deploy.words_before(config_of(slm__model="Qwen/x"), EMPTY)
    assert "calibration.prompts is not set" in word and "0.01" in word
    prompts = str(tmp_path / "p.jsonl")
    own = config_of(slm__model="Qwen/x", calibration__prompts=prompts)
    assert not list(deploy.words_before(own, EMPTY))
    assert not list(deploy.words_before(config_of(), EMPTY))  # the bundled pair has its own


def test_training_without_room_is_said() -> None:
    """K7: `s2t train` waited for GPUs that the service held."""
    config = config_of(
        training__workers=2, training__gpus_per_worker=1, training__cpus_per_worker=4
    )
    full = [Node("n", "a", {"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 1})]
    word = deploy.no_training_room(config, full)
    assert "2 workers with 4 CPU and 1 GPU each" in word and "training.workers" in word
    free = [Node("n", "a", {"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 2})]
    assert not deploy.no_training_room(config, free)


def test_one_node_needs_no_shared_folder(tmp_path: Path) -> None:
    deploy.check_folder(tmp_path / "not-there", EMPTY)
    assert not (tmp_path / "not-there").exists()


def test_a_folder_that_is_not_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each node would have had labels and versions of its own. It is tried, not believed: a file is
    looked for from each node."""
    two = [*EMPTY, Node("n2", "10.0.0.2", {"CPU": 8}, {"CPU": 8})]
    seen: list[bool] = []

    def on_node(function: Any, node: Node) -> bool:
        seen.append(function())
        return seen[-1] and node.address != "10.0.0.2"

    monkeypatch.setattr(deploy, "_on_node", on_node)
    monkeypatch.setattr(deploy, "_answer", lambda asked: asked)
    monkeypatch.setattr(ray, "wait", lambda asked, **options: None)
    folder = tmp_path / "data"
    with pytest.raises(ConfigError, match=r"not the same folder on 10\.0\.0\.2 as here"):
        deploy.check_folder(folder, two)
    assert seen == [True, True] and not list(folder.iterdir())
    deploy.check_folder(folder, [two[0], two[0]])
