"""The command line: the fixed form of `s2t generate`, exit status and text of every kind of bad
input."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.labels.lake import Lake
from services.cli import app
from services.cli.options import as_typed

VERBS = {
    "demo",
    "serve",
    "up",
    "down",
    "status",
    "init",
    "generate",
    "harvest",
    "train",
    "versions",
    "eval",
    "sweep",
    "doctor",
    "config",
    "bench",
    "plan",
    "labels",
    "redis-acl",
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations and data of a test stay in its folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def s2t(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["s2t", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        app.run()
        sys.exit(0)
    return int(done.value.code or 0)


def generate(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], *options: str | Path
) -> tuple[int, list[dict]]:
    Path("in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status = s2t(
        monkeypatch,
        "generate",
        "--slm",
        SLM_DIR,
        "--llm",
        LLM_DIR,
        "--max-new-tokens",
        "40",
        "--input",
        "in.jsonl",
        "--output",
        "out.jsonl",
        "--threads",
        "1",
        *options,
    )
    out = Path("out.jsonl")
    return status, [
        json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()
    ] if out.exists() else []


LINES = [json.dumps({"id": p.id, "prompt": p.prompt}) for p in problems.problems("test", 6)]


def test_verbs_are_frozen() -> None:
    """Scripts rely on them: a new or lost verb is a decision, not an accident."""
    names = {c.name or c.callback.__name__ for c in app.app.registered_commands if c.callback}
    assert names | {g.name for g in app.app.registered_groups} == VERBS


@pytest.mark.parametrize(
    "mode", ["greedy", "sample", "s2t", "s2t_local", "takeover", "llm", "majority@4"]
)
def test_generate_in_every_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The documented fields, in input order, for every mode."""
    status, rows = generate(monkeypatch, LINES, "--mode", mode, "--threshold", "0.5", "--steps")
    assert status == 0 and [r["id"] for r in rows] == [json.loads(line)["id"] for line in LINES]
    for row in rows:
        assert set(row) == {
            "id",
            "token_ids",
            "text",
            "finish_reason",
            "usage",
            "versions",
            "steps",
        }
        assert row["finish_reason"] in ("stop", "length") and row["token_ids"] and row["text"]
        assert len(row["steps"]) == row["usage"]["triggers"] or mode.startswith("majority")
        for step in row["steps"]:
            assert set(step) == {
                "index",
                "token_id",
                "signal",
                "candidate_ids",
                "scores",
                "chosen_by",
                "slm_top_id",
                "llm_top_id",
            }
            assert row["token_ids"][step["index"]] == step["token_id"]
    assert (sum(len(r["steps"]) for r in rows) > 0) == (mode in ("s2t", "s2t_local", "takeover"))


def test_budget_is_kept_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 5 % triggers about 5 % of the steps of other problems of the kind."""
    lines = [json.dumps({"id": p.id, "prompt": p.prompt}) for p in problems.problems("test", 60)]
    status, rows = generate(
        monkeypatch, lines, "--mode", "s2t", "--budget", "0.05", "--batch-size", "16"
    )
    rate = sum(r["usage"]["triggers"] for r in rows) / sum(len(r["token_ids"]) for r in rows)
    assert status == 0 and 0.03 < rate < 0.07


def test_broken_lines_do_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = [
        "{",
        "[]",
        '{"prompt": "x"}',
        '{"id": "a"}',
        '{"id": "b", "prompt": ""}',
        '{"id": "c", "prompt": "x", "token_ids": [1]}',
        '{"id": "d", "token_ids": [99999]}',
        '{"id": "e", "token_ids": [1.5]}',
        '{"id": "f", "messages": [{"role": "user"}]}',
        json.dumps({"id": "g", "prompt": "coins " * 300}),
    ]
    status, rows = generate(monkeypatch, [LINES[0], *bad, LINES[1], LINES[0]], "--mode", "greedy")
    assert status == 1 and [r["id"] for r in rows] == [json.loads(line)["id"] for line in LINES[:2]]
    errors = capsys.readouterr().err
    for number in range(2, len(bad) + 2):
        assert f"line {number}: " in errors
    assert f'line {len(bad) + 3}: "id"' in errors and "prompt has 300 tokens" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "nope"], "s2t: --mode nope: unknown; choose from greedy"),
        (["--mode", "greedy@3"], "--mode greedy@3: only majority"),
        (["--trigger=nope"], "--trigger nope: unknown"),
        (["--on-llm-failure", "nope"], "--on-llm-failure nope: unknown; choose from degrade, fail"),
        (["--candidates", "0"], "--candidates 0: must be 1..64"),
        (["--candidates", "65"], "--candidates 65: must be 1..64"),
        (["--budget", "2"], "--budget 2"),
        (["--budget", "0.1", "--threshold", "1"], "not both"),
        (["--threshold", "nan"], "--threshold nan"),
        (["--dtype", "float8"], "dtype 'float8'"),
        (["--slm", "/nowhere/model"], "'/nowhere/model' does not exist"),
        (["--selector", "v0001-none"], "no version 'v0001-none'"),
        (["--input", "/nowhere.jsonl"], "cannot be read"),
        (["--output", "/nowhere/out.jsonl"], "cannot be written"),
    ],
    ids=lambda o: " ".join(map(str, o))[:40] if isinstance(o, list) else "",
)
def test_bad_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    """One line that says what, where and how; exit status 2; no traceback."""
    status, _ = generate(monkeypatch, LINES[:1], *options)
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


def test_mismatched_tokenizers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """What differs is said."""
    other = tmp_path / "llm"
    shutil.copytree(LLM_DIR, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"coins"', '"euros"')
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    status, _ = generate(monkeypatch, LINES[:1], "--llm", other)
    error = capsys.readouterr().err
    assert status == 2 and "share a tokenizer" in error and "'coins'" in error


@pytest.mark.parametrize(("mode", "said"), [("s2t_local", True), ("s2t", False)])
def test_an_untrained_local_selector_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, mode: str, said: bool
) -> None:
    """Its answers are worse than greedy's, and nothing else in the output shows why."""
    status, rows = generate(monkeypatch, LINES[:1], "--mode", mode, "--threshold", "0.5")
    assert status == 0 and len(rows) == 1
    assert ("untrained local selector" in capsys.readouterr().err) == said


def test_corrupt_version_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v/manifest.json").write_text("{", encoding="utf-8")
    status, _ = generate(
        monkeypatch, LINES[:1], "--selector", tmp_path / "v", "--mode", "s2t_local"
    )
    assert status == 2 and "manifest.json is broken" in capsys.readouterr().err


def test_broken_model_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "slm"
    shutil.copytree(SLM_DIR, broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    status, _ = generate(monkeypatch, LINES[:1], "--slm", broken)
    error = capsys.readouterr().err
    assert status == 2 and "cannot be loaded" in error and "Traceback" not in error


def test_harvest_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Prompts in, Parquet labels out; an evaluation split is refused."""
    file = tmp_path / "train.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"id": p.id, "prompt": p.prompt}) for p in problems.problems("train", 40)
        ),
        encoding="utf-8",
    )
    arguments = [
        "harvest",
        file,
        "--slm",
        SLM_DIR,
        "--llm",
        LLM_DIR,
        "--out",
        tmp_path / "lake",
        "--max-new-tokens",
        "40",
        "--threads",
        "1",
    ]
    assert s2t(monkeypatch, *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    labels = [label for rollout in Lake(tmp_path / "lake").rollouts() for label in rollout.labels]
    assert told["labels"] == len(labels) > 40 and told["prompts"] == 40 and told["resumed"] == 0
    assert all(len(label.candidate_ids) == 16 for label in labels)
    assert s2t(monkeypatch, *arguments, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["resumed"] == 40 and again["labels"] == len(labels)
    assert s2t(monkeypatch, *arguments, "--split", "test") == 2
    assert "evaluation split" in capsys.readouterr().err


def test_port_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Known before anything is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert s2t(monkeypatch, "serve", "--port", str(taken.getsockname()[1])) == 2
    assert "the port is taken" in capsys.readouterr().err


def test_unreachable_service(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert (
        s2t(monkeypatch, "eval", "--address", "127.0.0.1:9", "--count", "2", "--modes", "greedy")
        == 3
    )
    assert "cannot be reached" in capsys.readouterr().err


def test_redis_acl_writes_what_the_settings_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Made again, the passwords of running processes must stay."""
    assert s2t(monkeypatch, "redis-acl", tmp_path / "users", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    first = Path(told["acl_file"]).read_text()
    assert "user producer reset on #" in first
    assert (Path(told["password_dir"]) / "producer").is_file()
    assert s2t(monkeypatch, "redis-acl", tmp_path / "users") == 0
    assert Path(told["acl_file"]).read_text() == first
    assert "redis.password_dir" in capsys.readouterr().out


def test_the_printed_configuration_holds_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """People paste it into tickets."""
    monkeypatch.setenv("S2T_REDIS__URL", "redis://user:s3cret@redis.internal:6379/0")
    assert s2t(monkeypatch, "config") == 0
    out = capsys.readouterr().out
    assert "redis://redis.internal:6379/0" in out and "s3cret" not in out


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Well here; with a wrong model it says which check failed and how to mend it."""
    assert s2t(monkeypatch, "doctor", "--json") == 0
    assert not [f for f in json.loads(capsys.readouterr().out) if f["level"] == "fail"]
    monkeypatch.setenv("S2T_SLM__MODEL", "/nowhere/model")
    assert s2t(monkeypatch, "doctor", "--json") == 1
    failed = [f for f in json.loads(capsys.readouterr().out) if f["level"] == "fail"]
    assert [f["what"] for f in failed] == ["models"] and "does not exist" in failed[0]["detail"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mode='x': unknown", "--mode x: unknown"),
        ("--max-rounds=0 and max_rounds=0", "--max-rounds 0 and --max-rounds 0"),
        ("trigger='x': unknown", "trigger='x': unknown"),
        ("slm.mode=x", "slm.mode=x"),
    ],
)
def test_settings_are_named_as_they_were_typed(text: str, shown: str) -> None:
    """Those that were given as options, and only those."""
    assert as_typed(text, ["train", "--mode", "x", "--max-rounds=0"]) == shown
