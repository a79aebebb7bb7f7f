"""The README is run, as far as it can be inside a test: its commands, files, verbs and snippet
exist and fit."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from services.cli import app
from services.client import Client

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_screen() -> None:
    """What it is, one figure, two commands: within the first screen, and the commands are the
    Makefile's."""
    screen = "\n".join(README.splitlines()[:22])
    assert "selec" in screen and re.search(r"\d+ %", screen)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^    make (\w+)", screen, re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in [*commands, *re.findall(r"`make (\w+)`", README)]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_ci_runs_the_readmes_test_command() -> None:
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert "make lint" in commands and "make test" in commands


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


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_pair_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It is run as it stands. It asks a bundled question, so both models are read."""
    of_pair, _ = snippets()
    exec(compile(of_pair, "README.md", "exec"), {})
    assert "buys" in capsys.readouterr().out


def test_the_client_snippet_fits_the_client() -> None:
    _, of_client = snippets()
    names = {n.attr for n in ast.walk(ast.parse(of_client)) if isinstance(n, ast.Attribute)}
    assert "stream" in names and hasattr(Client, "stream")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "s2t_shared/README.md",
        "CONTRIBUTING.md",
        "services/evaluation/README.md",
        "services/evaluation/reports/README.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
