"""The page for clients is run: each of its commands and snippets, against a gateway over the
bundled pair, in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.bundled import problems
from s2t_shared.pair import Pair
from services.http import errors
from services.http.requests import ChatRequest, CompletionRequest, Settings
from services.rpc import wire
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import CALIBRATION, FixedVersions, http_and_grpc, proposer_service

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "services/http/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:curl|buf|lm_eval|python) (?:.|\n    )*)", PAGE, re.MULTILINE)
STARTS = ("curl", "buf", "lm_eval")
BUF = Path(sys.executable).parent / "buf"
needs_buf = pytest.mark.skipif(not BUF.exists(), reason="buf is not there; pip install buf-bin")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# lm-eval pins an older python-dateutil: it may live in an environment of its own.
HARNESS = os.environ.get("LM_EVAL_PYTHON", sys.executable)
needs_harness = pytest.mark.skipif(
    sys.executable == HARNESS and importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; pip install lm-eval, or set LM_EVAL_PYTHON",
)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """HTTP's host:port and gRPC's."""
    pair = Pair.open("bundled", "bundled", batch_size=8, threads=1)
    assert pair.llm is not None

    class Selector:
        info = pair.llm.info
        reachable = True

    service = ProposerService(
        engine=EngineThread(pair.engine, pair.tokenizer),
        tokenizer=pair.tokenizer,
        selector=Selector(),
        versions=FixedVersions(),
        labels=LabelRecorder(None),
        calibration=lambda: CALIBRATION,
    )
    with http_and_grpc(tmp_path_factory.mktemp("page"), service) as (url, grpc):
        yield url.removeprefix("http://"), grpc


def moved(text: str, addresses: tuple[str, str]) -> str:
    """A command of the page with the addresses of this test's gateway."""
    http, grpc = addresses
    return text.replace("127.0.0.1:8080", http).replace("127.0.0.1:50051", grpc)


def test_the_pages_commands_are_found() -> None:
    """A command in a form that the expressions above overlook would never be run."""
    blocks = re.findall(r"^    \S.*$", PAGE, re.MULTILINE)
    starts = [line for line in blocks if line.strip().partition(" ")[0] in STARTS]
    starts += [line for line in blocks if line.strip().startswith("python -m")]
    assert len(starts) == len(COMMANDS) == 8 and len(SNIPPETS) == PAGE.count("```") / 2 == 3


@pytest.mark.parametrize("number", range(3))
def test_each_curl_command_answers(addresses: tuple[str, str], number: int) -> None:
    command = [c for c in COMMANDS if c.startswith("curl")][number]
    done = subprocess.run(
        ["bash", "-c", moved(command, addresses)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    if "stream" in command:
        *events, last = done.stdout.strip().split("\n\n")
        assert last == "data: [DONE]" and json.loads(events[-1].removeprefix("data: "))["usage"]
    else:
        assert "error" not in json.loads(done.stdout), done.stdout


@needs_buf
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_each_buf_command_answers(addresses: tuple[str, str], method: str) -> None:
    """Reflection described less than a client without our files needs."""
    [command] = [c for c in COMMANDS if c.startswith("buf") and f"/{method}" in c]
    messages = answers_of_buf(moved(command, addresses))
    assert messages[-1]["answer"]["usage"]["completionTokens"] == 8
    assert len(messages) > 1 or method == "Generate"


@needs_buf
def test_buf_sends_a_token(tmp_path: Path) -> None:
    """As the page says: reflection is a call of its own, and needs the token too."""
    token = "0123456789abcdef0123456789abcdef"
    file = tmp_path / "tokens"
    file.write_text(f"generate: {token}\n")
    settings = {"security.token_file": str(file)}
    [command] = [c for c in COMMANDS if c.startswith("buf") and c.rstrip().endswith("/Generate")]
    with http_and_grpc(tmp_path, proposer_service(), **settings) as (url, grpc):
        command = moved(command, (url, grpc))
        refused = run_buf(command)
        header = f"'authorization: Bearer {token}'"
        sent = command.replace(" -d ", f" --header {header} --reflect-header {header} -d ")
        [message] = answers_of_buf(sent)
    assert refused.returncode != 0
    assert message["answer"]["text"]


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


@pytest.mark.parametrize("number", range(3))
def test_each_snippet_runs(
    addresses: tuple[str, str], number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(moved(SNIPPETS[number], addresses), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "Mia buys 4 and 15" in said
    assert ("[llm, 8 candidates]" in said) == ("openai" in SNIPPETS[number])


def test_the_tables_of_fields_and_errors_are_whole() -> None:
    _, _, fields = PAGE.partition("## What a request may say")
    named = {name for text in re.findall(r"`([\w.]+)`", fields) for name in text.split(".")}
    for name in Settings.model_fields:
        assert name in named, f"s2t.{name}"
    off = {"model_config", "tool_choice", "parallel_tool_calls", "response_format", "modalities"}
    off |= {"presence_penalty", "frequency_penalty", "best_of", "suffix"}
    off |= {"safety_identifier", "prompt_cache_key"}
    for name in {**ChatRequest.model_fields, **CompletionRequest.model_fields}.keys() - off:
        assert name in named, name
    statuses = {str(status) for status, _ in [*errors.STATUS.values(), errors.OTHERS]}
    assert statuses <= set(re.findall(r"^\| (\d{3})", fields, re.MULTILINE))
    others = ("TOKENIZER_MISMATCH", "MODEL_LOAD", "VERSION")  # 400, "..." there
    for reason in {wire.INTERNAL, *wire.REASONS.values()} - {*others}:
        assert reason.lower() in named, reason


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("way", ["local-completions", "local-chat-completions", "s2t"])
def test_lm_eval_runs_a_task(addresses: tuple[str, str], tmp_path: Path, way: str) -> None:
    """Each way of the page; S2T at 5 % answers what the SLM alone answers half of the time."""
    lines = []
    for problem in problems.problems("test", 8):
        [bought] = re.findall(r"buys (\d+ and \d+)", problem.solution)
        lines.append(json.dumps({"prompt": problem.prompt, "answer": bought}))
    (tmp_path / "shop.jsonl").write_text("\n".join(lines))
    (tmp_path / "shop.yaml").write_text(TASK.format(file=tmp_path / "shop.jsonl"))
    name = "--model s2t" if way == "s2t" else "tokenizer_backend=None"
    [command] = [c for c in COMMANDS if name in c]
    command = moved(command, addresses)
    if way == "local-chat-completions":
        command = command.replace("--model local-completions", f"--model {way}")
        command = command.replace("/v1/completions", "/v1/chat/completions")
        command += " --apply_chat_template"
    results = run_harness(command, "s2t_shop", tmp_path)
    assert results["exact_match,pair"] >= 0.75


@needs_harness
@pytest.mark.slow
def test_lm_eval_compares_log_likelihoods(addresses: tuple[str, str], tmp_path: Path) -> None:
    """The harness counts the prompt's tokens: one that is left out or shifted changes its sums."""
    pair = Pair.open("bundled")
    lines = []
    expected = []
    for problem in problems.problems("test", 12):
        [right] = re.findall(r"buys \d+ and \d+", problem.solution)
        choices = [right, "buys 1 and 2", "buys 4 and 15"]
        lines.append(json.dumps({"prompt": problem.prompt, "choices": choices}))
        values = [log_likelihood(pair, problem.prompt, f" {choice}") for choice in choices]
        expected.append(values.index(max(values)) == 0)
    (tmp_path / "shop.jsonl").write_text("\n".join(lines))
    (tmp_path / "pick.yaml").write_text(CHOICES.format(file=tmp_path / "shop.jsonl"))
    [command] = [c for c in COMMANDS if "SLM_FOLDER" in c]
    folder = ROOT / "s2t_shared/bundled/slm"
    command = moved(command, addresses).replace("SLM_FOLDER", str(folder))
    results = run_harness(command, "s2t_pick", tmp_path)
    assert results["acc,none"] == pytest.approx(sum(expected) / len(expected))


def log_likelihood(pair: Pair, prompt: str, continuation: str) -> float:
    """By the SLM's own forward over prompt and continuation."""
    hf = pair.tokenizer.hf
    before = len(hf.encode(prompt))
    scores = [
        s
        for part in pair.engine.proposer.read_prompt(hf.encode(prompt + continuation), 1)
        for s in part
    ]
    return sum(score.log_prob for score in scores[before - 1 :])


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


CHOICES = """
task: s2t_pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


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
