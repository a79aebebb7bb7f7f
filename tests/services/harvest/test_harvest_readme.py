"""The page for data teams is run, line by line, in this process. Object storage is fsspec's in
memory. Only `s2t train` is not: it starts Ray, and a version of random weights stands for its
result (tests/services/train runs it)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from s2t_shared.config import load_config
from s2t_shared.model.local_selector import Reading, SelectorKind
from services.bench.swap import publish_untrained
from services.cli import app
from services.cli.train import train

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "services/harvest/README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    s2t (.*)$", PAGE, re.MULTILINE)


def run(command: str) -> str:
    result = CliRunner().invoke(app.app, command.split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"s2t {command}: {result.output}"
    return result.stdout


def in_memory(text: str) -> str:
    return text.replace("s3://", "memory://").replace('filesystem("s3")', 'filesystem("memory")')


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step needs what the one before it has left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("S2T_DATA_DIR", raising=False)
    assert len(COMMANDS) == 12 and len(SNIPPETS) == 2
    said: dict[str, str] = {}
    version = ""
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    for command in COMMANDS:
        if command.startswith("train"):
            config = load_config(None, {"data_dir": "s2t-data"}, {})
            (version,) = publish_untrained(config, [(SelectorKind.PREFIX, Reading.BASE)])
            continue
        if "s3://" in command and "labels stats" in command:
            exec(compile(in_memory(SNIPPETS[1]), "README.md", "exec"), {})
        said[command] = run(in_memory(command).replace("VERSION", version))
    harvest, local, remote = list(said)[:3]
    assert "labels" in said[harvest] and "Hit@8" in said[local]
    assert said[local].splitlines()[:5] == said[remote].splitlines()[:5]
    assert Path("shop-labels/README.md").is_file() and Path("my-selector/README.md").is_file()
    assert fsspec.filesystem("memory").exists("/lakes/shop-labels/README.md")
    report = Path("report/report.md").read_text(encoding="utf-8")
    assert re.search(r"\| llm \| (0\.[5-9]|1\.0)", report), "the grader must fit the problems"
    assert "s2t_local" in report


def test_options_of_train_exist() -> None:
    [command] = [c for c in COMMANDS if c.startswith("train")]
    known = {name.replace("_", "-") for name in inspect.signature(train).parameters}
    assert set(re.findall(r"--([\w-]+)", command)) <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "services/harvest" / target).exists(), target
