"""The README is run, as far as it can be inside a test: its commands, files, verbs and snippet
exist and fit."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from services.cli import app
from services.client import Client

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_screen() -> None:
    """What it is, one figure, two commands: within the first screen, and the commands are the
    Makefile's."""
    screen = "\n".join(README.splitlines()[:24])
    assert "selec" in screen and re.search(r"\d+ %", screen)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^    make (\w+)", screen, re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in [*commands, *re.findall(r"`make (\w+)`", README)]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:s2t_shared|services|tests|cluster|protos)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name


def test_verbs_and_flags_exist() -> None:
    """Every `s2t ...` line names a verb and options that the command has."""
    commands = {
        c.name or c.callback.__name__: c.callback for c in app.app.registered_commands if c.callback
    }
    groups = {g.name for g in app.app.registered_groups}
    lines = re.findall(r"^    s2t (\S+)(.*(?:\\\n.*)*)", README, re.MULTILINE)
    assert len(lines) >= 6
    for verb, rest in lines:
        assert verb in commands or verb in groups, verb
        if verb in commands:
            known = {
                name.replace("_", "-") for name in inspect.signature(commands[verb]).parameters
            }
            for flag in re.findall(r"--([\w-]+)", rest.split("#")[0]):
                assert flag in known, f"s2t {verb} --{flag}"


def test_snippet_is_python_that_fits_the_client() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {n.attr for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Attribute)}
    assert "stream" in names and hasattr(Client, "stream")
