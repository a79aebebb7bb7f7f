"""The page for clients is run: each of its commands and snippets, against a gateway over the
bundled pair, in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2t_shared.bundled import problems
from s2t_shared.pair import Pair
from services.http import errors
from services.http.requests import ChatRequest, CompletionRequest, Settings
from services.rpc import wire
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from tests.helpers.http_page import (
    COMMANDS,
    PAGE,
    ROOT,
    SNIPPETS,
    answers_of_buf,
    buf_command,
    check_curl,
    curl_commands,
    moved,
    needs_buf,
    needs_harness,
    run_buf,
    run_harness,
    share_right,
)
from tests.helpers.serving import CALIBRATION, FixedVersions, http_and_grpc, proposer_service

STARTS = ("curl", "buf", "lm_eval")


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


def test_the_pages_commands_are_found() -> None:
    """A command in a form that the expressions above overlook would never be run."""
    blocks = re.findall(r"^    \S.*$", PAGE, re.MULTILINE)
    starts = [line for line in blocks if line.strip().partition(" ")[0] in STARTS]
    starts += [line for line in blocks if line.strip().startswith("python -m")]
    assert len(starts) == len(COMMANDS) == 8 and len(SNIPPETS) == PAGE.count("```") / 2 == 3


@pytest.mark.parametrize("command", curl_commands())
def test_each_curl_command_answers(addresses: tuple[str, str], command: str) -> None:
    check_curl(moved(command, addresses))


@needs_buf
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_each_buf_command_answers(addresses: tuple[str, str], method: str) -> None:
    """Reflection described less than a client without our files needs."""
    messages = answers_of_buf(moved(buf_command(method), addresses))
    assert messages[-1]["answer"]["usage"]["completionTokens"] == 8
    assert len(messages) > 1 or method == "Generate"


@needs_buf
def test_buf_sends_a_token(tmp_path: Path) -> None:
    """As the page says: reflection is a call of its own, and needs the token too."""
    token = "0123456789abcdef0123456789abcdef"
    file = tmp_path / "tokens"
    file.write_text(f"generate: {token}\n")
    settings = {"security.token_file": str(file)}
    with http_and_grpc(tmp_path, proposer_service(), **settings) as (url, grpc):
        command = moved(buf_command("Generate"), (url, grpc))
        refused = run_buf(command)
        header = f"'authorization: Bearer {token}'"
        sent = command.replace(" -d ", f" --header {header} --reflect-header {header} -d ")
        [message] = answers_of_buf(sent)
    assert refused.returncode != 0
    assert message["answer"]["text"]


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
    name = "--model s2t" if way == "s2t" else "tokenizer_backend=None"
    [command] = [c for c in COMMANDS if name in c]
    command = moved(command, addresses)
    if way == "local-chat-completions":
        command = command.replace("--model local-completions", f"--model {way}")
        command = command.replace("/v1/completions", "/v1/chat/completions")
        command += " --apply_chat_template"
    assert share_right(command, tmp_path) >= 0.75


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
