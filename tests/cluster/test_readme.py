"""`cluster/README.md`: its commands name files, verbs and options that are there. Those of the
laptop are run as they stand in `tests/services/launch/test_up_service.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from services.cli.app import app

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_verbs_and_options_exist() -> None:
    verbs = {
        c.name or c.callback.__name__: c.callback for c in app.registered_commands if c.callback
    }
    spoken = re.findall(r"(?<!-n )\bs2t ([a-z-]+)((?: (?:--[\w-]+|[^\s`]+))*)", "\n".join(COMMANDS))
    spoken += re.findall(r"`s2t ([a-z-]+)([^`]*)`", README)
    assert {verb for verb, _ in spoken} >= {"up", "down", "status", "init", "serve"}
    groups = {group.name for group in app.registered_groups}
    for verb, rest in spoken:
        assert verb in verbs or verb in groups, verb
        if verb in verbs:
            known = {n.replace("_", "-") for n in inspect.signature(verbs[verb]).parameters}
            assert set(re.findall(r"--([\w-]+)", rest)) <= known, f"s2t {verb}{rest}"


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_commands_exist(command: str) -> None:
    """Those of the repository; what the operator makes is under `secrets`, /etc and his own."""
    for name in re.findall(r"\bcluster/[\w/.-]+", command):
        assert (ROOT / name).exists(), command


def test_files_of_the_text_exist() -> None:
    """In backquotes, of the repository or of this folder."""
    written_by_pods = {"s2t.yaml"}
    for name in re.findall(r"`([\w-]+(?:/[\w.-]+)*(?:/|\.(?:yaml|py|sbatch|sh)))`", README):
        there = (ROOT / "cluster" / name).exists() or (ROOT / name).exists()
        assert there or name in written_by_pods, name


def test_each_settings_file_is_in_the_table() -> None:
    table = README.partition("## ")[0]
    for file in (ROOT / "cluster").glob("*.yaml"):
        assert file.name == "serve.yaml" or f"`{file.name}`" in table, file.name
