"""Commands and snippets of the page for clients (services/http/README.md), and how to run them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.bundled import problems

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "services/http/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:curl|buf|lm_eval|python) (?:.|\n    )*)", PAGE, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HTTP, GRPC = "127.0.0.1:8080", "127.0.0.1:50051"  # as the page has them
BUF = Path(sys.executable).parent / "buf"
needs_buf = pytest.mark.skipif(not BUF.exists(), reason="buf is not there; pip install buf-bin")
# lm-eval pins an older python-dateutil: it may live in an environment of its own.
HARNESS = os.environ.get("LM_EVAL_PYTHON", sys.executable)
needs_harness = pytest.mark.skipif(
    sys.executable == HARNESS and importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; pip install lm-eval, or set LM_EVAL_PYTHON",
)


def moved(text: str, addresses: tuple[str, str]) -> str:
    """A command of the page with other addresses: HTTP's host:port and gRPC's."""
    http, grpc = addresses
    return text.replace(HTTP, http).replace(GRPC, grpc)


def curl_commands() -> list[str]:
    return [command for command in COMMANDS if command.startswith("curl")]


def check_curl(command: str) -> None:
    """Run a curl command of the page: it must give a whole answer."""
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    if "stream" in command:
        *events, last = done.stdout.strip().split("\n\n")
        assert last == "data: [DONE]" and json.loads(events[-1].removeprefix("data: "))["usage"]
    else:
        assert "error" not in json.loads(done.stdout), done.stdout


# -- buf ------------------------------------------------------------------------------------------


def buf_command(method: str) -> str:
    """The page's command for `Generate` or `StreamGenerate`."""
    [command] = [c for c in COMMANDS if c.startswith("buf") and c.rstrip().endswith(f"/{method}")]
    return command


def run_buf(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BUF.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answers_of_buf(command: str) -> list[dict[str, Any]]:
    """The messages it prints, one JSON object behind the other."""
    done = run_buf(command)
    assert done.returncode == 0, done.stderr
    messages, rest = [], done.stdout.strip()
    while rest:
        message, end = json.JSONDecoder().raw_decode(rest)
        messages.append(message)
        rest = rest[end:].lstrip()
    return messages


# -- lm-eval --------------------------------------------------------------------------------------

TASK = r"""
task: s2t_shop
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\n"], max_gen_toks: 40, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: pair, filter: [{{function: regex, regex_pattern: "buys (\\d+ and \\d+)"}},
      {{function: take_first}}]}}
"""


def share_right(command: str, folder: Path) -> float:
    """What one of the page's commands measures on eight problems of the bundled pair."""
    lines = []
    for problem in problems.problems("test", 8):
        [bought] = re.findall(r"buys (\d+ and \d+)", problem.solution)
        lines.append(json.dumps({"prompt": problem.prompt, "answer": bought}))
    (folder / "shop.jsonl").write_text("\n".join(lines))
    (folder / "shop.yaml").write_text(TASK.format(file=folder / "shop.jsonl"))
    return run_harness(command, "s2t_shop", folder)["exact_match,pair"]


def run_harness(command: str, task: str, folder: Path) -> dict[str, float]:
    """What a command of the page measures on the task that lies in a folder."""
    command = command.replace("TASKS", task)
    command = command.replace("TASK_FOLDER", str(folder)).replace("results", f"{folder}/out")
    command = re.sub("^(python -m )?", f"{HARNESS} -m ", command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "hf")}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (folder / "out").rglob("results_*.json")
    results: dict[str, float] = json.loads(file.read_text())["results"][task]
    return results
