"""`s2t labels` on real lakes: figures that can be recomputed, exports others can read, deletion
that is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from s2t_shared.errors import ConfigError, InvalidRequestError, StoreError, TokenizerMismatchError
from s2t_shared.labels.export import export_labels, size_category
from s2t_shared.labels.label import Label, Rollout, check_rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import LabelCounts
from services.cli.labels import labels_app
from services.launch.redis_server import open_redis
from services.launch.service_record import ServiceRecord
from tests.helpers.models import word_tokenizer

PROMPT, ANSWER = 6, 10


def rollout(
    number: int, task: str = "sums", tokenizer_digest: str = "tok", created_at: float = 1000.0
) -> Rollout:
    """One with two labels; numbers from a seeded generator."""
    rng = np.random.default_rng(number)
    token_ids = tuple(int(i) for i in rng.integers(5, 48, PROMPT + ANSWER))
    kl, entropy = (
        tuple(float(np.float32(x)) for x in rng.gamma(0.5, 1.0, ANSWER)) for _ in range(2)
    )
    ranks = tuple(int(r) for r in rng.integers(-1, 12, ANSWER))
    labels = tuple(
        Label(
            label_id=f"label-{number}-{step}",
            position=PROMPT + step,
            candidate_ids=(7, 2, 9),
            slm_log_probs=(-0.5, -1.5, -2.5),
            llm_log_probs=(-1.5, -0.25, -3.5),
            llm_top_id=2,
            llm_top_rank=ranks[step],
            mass=0.75,
            kl=kl[step],
            entropy=entropy[step],
        )
        for step in (3, 8)
    )
    made = Rollout(
        rollout_id=f"rollout-{number}",
        request_id=f"request-{number}",
        problem_id=f"p{number}",
        task=task,
        split="train",
        source="plain",
        token_ids=token_ids,
        prompt_length=PROMPT,
        entropy=entropy,
        kl=kl,
        llm_top_rank=ranks,
        labels=labels,
        slm_digest="slm",
        llm_digest="llm",
        tokenizer_digest=tokenizer_digest,
        template_digest="template",
        created_at=created_at,
    )
    check_rollout(made)
    return made


ROLLOUTS = [rollout(i, task="sums" if i % 4 else "words") for i in range(60)]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """60 rollouts in three shards, some of them twice."""
    made = Lake(tmp_path / "lake")
    for part in (ROLLOUTS[:25], ROLLOUTS[20:50], ROLLOUTS[50:]):
        made.write(part)
    return made


def s2t_labels(*arguments: str | Path, **options: Any) -> tuple[int, str]:
    """Exit status and stdout. Typed errors pass through: `services.cli.run` prints them."""
    app = typer.Typer()
    app.add_typer(labels_app, name="labels")
    result = CliRunner().invoke(app, ["labels", *map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def as_json(*arguments: str | Path) -> Any:
    status, text = s2t_labels(*arguments, "--json")
    assert status == 0
    return json.loads(text)


# -- stats ----------------------------------------------------------------------------------------


def hit(ranks: Sequence[int], k: int) -> float:
    return sum(0 <= r < k for r in ranks) / len(ranks)


def test_stats_are_those_of_the_rollouts(lake: Lake) -> None:
    told = as_json("stats", lake.root)
    assert (told["rollouts"], told["labels"], told["problems"], told["shards"]) == (60, 120, 60, 3)
    assert told["tasks"] == {"words": 30, "sums": 90} and told["pairs"] == {"slm / llm": 120}
    assert told["held_out_labels"] == 2 * sum(r.held_out for r in ROLLOUTS) > 0
    assert told["answer_tokens"] == told["positions"] == 600 and told["label_share"] == 0.2
    assert told["mass"] == pytest.approx(0.75) and told["bytes"] == sum(
        p.stat().st_size for p in lake.root.glob("*.parquet")
    )
    assert "dead_letters" not in told  # no Redis is configured
    every = [rank for r in ROLLOUTS for rank in r.llm_top_rank]
    labelled = [label.llm_top_rank for r in ROLLOUTS for label in r.labels]
    for k in (1, 2, 4, 8):
        assert told["hits"]["all"][str(k)] == pytest.approx(hit(every, k))
        assert told["hits"]["labelled"][str(k)] == pytest.approx(hit(labelled, k))
    for signal in ("kl", "entropy"):
        positions = sorted(
            (
                (getattr(r, signal)[i], r.llm_top_rank[i])
                for r in ROLLOUTS
                for i in range(3, ANSWER)
            ),
            reverse=True,
        )
        for share in (0.01, 0.05, 0.10):
            top = [rank for _, rank in positions[: int(share * 600)]]
            for k in (1, 2, 4, 8):  # two signals within 0.3 % of one another may change places
                found = told["hits"][f"{signal} top {share:.0%}"][str(k)]
                assert found == pytest.approx(hit(top, k), abs=1.01 / len(top))


def test_stats_without_scored_positions_and_of_an_empty_lake(tmp_path: Path) -> None:
    online = Lake(tmp_path / "online")
    online.write([replace(rollout(1), entropy=(), kl=(), llm_top_rank=(), source="online")])
    told = as_json("stats", online.root)
    assert (
        told["positions"] == 0
        and told["hits"]["all"]["1"] is None
        and told["hits"]["labelled"]["8"] is not None
    )
    (tmp_path / "empty").mkdir()
    assert as_json("stats", tmp_path / "empty")["labels"] == 0
    for folder in (online.root, tmp_path / "empty"):
        status, text = s2t_labels("stats", folder)
        assert status == 0 and "Hit@8" in text


def test_stats_count_dead_letters_or_say_that_redis_is_away(lake: Lake, tmp_path: Path) -> None:
    with open_redis(None, tmp_path / "redis") as server:
        config = tmp_path / "s2t.yaml"
        config.write_text(f"redis: {{url: '{server.url}'}}\n", encoding="utf-8")
        told = as_json("stats", lake.root, "--config", config)
        assert (told["in_redis"], told["dead_letters"]) == (0, 0)
    told = as_json("stats", lake.root, "--config", config)
    assert (
        told["labels"] == 120 and told["dead_letters"] is None and "Redis at" in told["redis_error"]
    )
    assert "unknown" in s2t_labels("stats", lake.root, "--config", config)[1]


def test_the_data_folder_s_own_lake(lake: Lake, tmp_path: Path) -> None:
    lake.root.rename(tmp_path / "labels")
    assert as_json("stats", "--data-dir", tmp_path)["labels"] == 120


@pytest.mark.parametrize("verb", [["stats"], ["verify"], ["delete", "--task", "x", "--yes"]])
def test_a_mistyped_lake_is_an_error_and_makes_no_folder(tmp_path: Path, verb: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no lake folder"):
        s2t_labels(verb[0], tmp_path / "nowhere", *verb[1:])
    assert not (tmp_path / "nowhere").exists()


# -- export ---------------------------------------------------------------------------------------


def expected_rows() -> dict[str, dict[str, Any]]:
    return {
        label.label_id: {
            "label_id": label.label_id,
            "context_ids": list(r.token_ids[: label.position]),
            "candidate_ids": list(label.candidate_ids),
            "slm_log_probs": list(label.slm_log_probs),
            "llm_log_probs": list(label.llm_log_probs),
            "llm_top_id": 2,
            "llm_top_rank": label.llm_top_rank,
            "mass": 0.75,
            "kl": label.kl,
            "entropy": label.entropy,
            "step": label.position - PROMPT,
            "prompt_length": PROMPT,
            "split": "heldout" if r.held_out else "train",
            "task": r.task,
            "problem_id": r.problem_id,
            "source": "plain",
            "rollout_id": r.rollout_id,
            "slm_digest": "slm",
            "llm_digest": "llm",
            "tokenizer_digest": "tok",
            "template_digest": "template",
        }
        for r in ROLLOUTS
        for label in r.labels
    }


def rows_by_split(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """With pyarrow alone."""
    return {
        split: [
            row
            for file in sorted((folder / "data").glob(f"{split}-*.parquet"))
            for row in pq.read_table(file).to_pylist()
        ]
        for split in ("train", "heldout")
    }


def check_rows(found: dict[str, list[dict[str, Any]]]) -> None:
    assert all(row["split"] == split for split, rows in found.items() for row in rows)
    rows = found["train"] + found["heldout"]
    assert len(rows) == 120 and {row["label_id"]: row for row in rows} == expected_rows()


def test_export_round_trip_through_datasets(lake: Lake, tmp_path: Path) -> None:
    """In a process of its own, offline: what a stranger gets from the folder."""
    pytest.importorskip("datasets")
    told = as_json("export", lake.root, tmp_path / "out")
    assert told["labels"] == 120 == told["train"] + told["heldout"]
    script = (
        "import datasets, json, sys; d = datasets.load_dataset(sys.argv[1]);"
        "print(json.dumps({s: d[s].to_list() for s in d}))"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    check_rows(json.loads(done.stdout.splitlines()[-1]))


def test_export_in_shards_of_bounded_size(lake: Lake, tmp_path: Path) -> None:
    export_labels(lake, tmp_path / "out", shard_bytes=5_000)
    files = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    count = sum(name.startswith("train") for name in files)
    assert count > 2 and f"train-{count - 1:05}-of-{count:05}.parquet" in files
    assert all((tmp_path / "out/data" / name).stat().st_size < 25_000 for name in files)
    metadata = pq.ParquetFile(tmp_path / "out/data" / files[-1]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    check_rows(rows_by_split(tmp_path / "out"))


def test_export_as_jsonl_and_bare_parquet(lake: Lake, tmp_path: Path) -> None:
    as_json("export", lake.root, tmp_path / "lines", "--format", "jsonl")
    check_rows(
        {
            split: [
                json.loads(line)
                for file in (tmp_path / "lines/data").glob(f"{split}-*.jsonl")
                for line in file.read_text("utf-8").splitlines()
            ]
            for split in ("train", "heldout")
        }
    )
    as_json("export", lake.root, tmp_path / "bare", "--format", "parquet")
    check_rows(rows_by_split(tmp_path / "bare"))
    assert not (tmp_path / "bare/README.md").exists()
    with pytest.raises(InvalidRequestError, match="--format='csv': unknown"):
        s2t_labels("export", lake.root, tmp_path / "x", "--format", "csv")


def test_the_card_says_what_is_there(lake: Lake, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    lake.write([rollout(100, task="a|b\n# <b>c")])
    exported = export_labels(lake, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["size_categories"] == ["n<1K"] and metadata["license"] == "other"
    assert {d["split"] for d in metadata["configs"][0]["data_files"]} == {"train", "heldout"}
    assert f"| train | {exported.labels['train']} |" in text and f"`{exported.snapshot}`" in text
    assert "| slm | llm | tok | template | 122 |" in text
    assert "| a\\|b # &lt;b>c | 2 |" in text  # no way out of its cell
    assert "privacy" in text.lower() and "{" not in text.split("---\n", 2)[2]
    names = pq.read_schema(next((tmp_path / "out/data").glob("train-*"))).names
    assert all(f"| `{name}` |" in text for name in names)


def test_export_with_text(tmp_path: Path) -> None:
    folder = tmp_path / "slm"
    word_tokenizer().save_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    lake = Lake(tmp_path / "lake")
    lake.write([rollout(i, tokenizer_digest=tokenizer.digest) for i in range(30)])
    export_labels(lake, tmp_path / "out", tokenizer=tokenizer)
    rows = [row for rows in rows_by_split(tmp_path / "out").values() for row in rows]
    assert len(rows) == 60 and rows[0]["candidates"] == ["w2", "<eos>", "w4"]
    for row in rows:
        assert tokenizer.hf.convert_tokens_to_ids(row["context"].split()) == row["context_ids"]
    other = Lake(tmp_path / "other")
    other.write([rollout(1)])
    with pytest.raises(TokenizerMismatchError, match="give the SLM they were made with"):
        export_labels(other, tmp_path / "out2", tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "lake",
        "other",
        "out",
        "slm",
    ]  # nothing half-done is left


def test_export_refuses_what_it_would_overwrite_and_what_is_not_there(
    lake: Lake, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    as_json("export", lake.root, tmp_path / "out")  # an empty folder is fine
    before = (tmp_path / "out/README.md").read_bytes()
    with pytest.raises(ConfigError, match="not an empty folder"):
        s2t_labels("export", lake.root, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no labels"):
        s2t_labels("export", tmp_path / "empty", tmp_path / "out3")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot export"):
        s2t_labels("export", lake.root, tmp_path / "file" / "out")


def test_a_lake_without_held_out_problems_exports(tmp_path: Path) -> None:
    """No file for a split, so the card must not promise one."""
    lake = Lake(tmp_path / "lake")
    lake.write([r for r in ROLLOUTS if not r.held_out])
    export_labels(lake, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text("utf-8")
    assert "data/train-*" in text and "data/heldout-*" not in text.split("---\n")[1]


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**6, "1M<n<10M"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories_are_the_hub_s(count: int, name: str) -> None:
    assert size_category(count) == name


# -- delete ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "gone"),
    [
        ("--problem-id", "p22", {"rollout-22"}),
        ("--request-id", "request-7", {"rollout-7"}),
        ("--task", "words", {f"rollout-{i}" for i in range(0, 60, 4)}),
        ("--problem-id", "no such", set()),
    ],
)
def test_delete_is_complete_and_idempotent(
    lake: Lake, option: str, value: str, gone: set[str]
) -> None:
    """From every shard and snapshot, and what comes again later stays out."""
    frozen = lake.freeze()
    as_json("delete", lake.root, option, value, "--yes")
    left = {r.rollout_id for r in Lake(lake.root).rollouts()}
    assert left == {r.rollout_id for r in ROLLOUTS} - gone
    assert frozen.folder.exists() == (not gone)
    assert as_json("delete", lake.root, option, value, "--yes") == {"deleted rollouts": 0}
    lake.write(ROLLOUTS[:30])
    assert {r.rollout_id for r in lake.rollouts()} == left
    assert lake.verify() == {}


def test_delete_says_what_and_asks(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing was deleted: there is no terminal"):
        s2t_labels("delete", lake.root, "--task", "words")
    app = typer.Typer()
    app.add_typer(labels_app, name="labels")
    monkeypatch.setattr("services.cli.labels._on_terminal", lambda: True)
    refused = CliRunner().invoke(
        app, ["labels", "delete", str(lake.root), "--task", "words"], input="n\n"
    )
    assert refused.exit_code == 1 and "15 rollouts with 30 labels of task 'words'" in refused.stderr
    assert len(list(lake.rollouts())) == 60
    agreed = CliRunner().invoke(
        app, ["labels", "delete", str(lake.root), "--task", "words"], input="y\n"
    )
    assert agreed.exit_code == 0 and len(list(lake.rollouts())) == 45


def test_delete_by_age_and_size(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    now = time.time()
    for age_days in (40, 20, 1):
        lake.write(
            [rollout(age_days * 10 + i, created_at=now - age_days * 86_400) for i in range(5)]
        )
    assert as_json("delete", lake.root, "--older-than", "30", "--yes") == {"deleted rollouts": 5}
    assert as_json("delete", lake.root, "--older-than", "30", "--yes") == {"deleted rollouts": 0}
    newest = max(lake.shards(), key=lambda s: s.last)
    assert as_json("delete", lake.root, "--keep-gib", str(newest.bytes / (1 << 30)), "--yes") == {
        "deleted rollouts": 5
    }
    assert lake.shards() == [newest]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to delete"),
        (["--task", "a", "--problem-id", "b"], "say what to delete"),
        (["--task", "a", "--older-than", "3"], "say what to delete"),
        (["--older-than", "0"], "above 0"),
        (["--keep-gib", "nan"], "above 0"),
    ],
)
def test_delete_needs_one_clear_wish(lake: Lake, options: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        s2t_labels("delete", lake.root, *options, "--yes")
    assert len(list(lake.rollouts())) == 60


# -- verify ---------------------------------------------------------------------------------------


def test_verify_finds_damage_and_quarantine_makes_the_rest_usable(lake: Lake) -> None:
    status, text = s2t_labels("verify", lake.root)
    assert status == 0 and "3 shards, all well" in text
    first, second, third = sorted(lake.root.glob("shard-*.parquet"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(bytes(content))
    second.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="verify --quarantine"):
        list(lake.rollouts())
    status, text = s2t_labels("verify", lake.root, "--json")
    assert status == 1 and set(json.loads(text)["bad"]) == {first.stem, second.stem}
    status, text = s2t_labels("verify", lake.root, "--quarantine")
    assert status == 1 and first.stem in text and "1 good shards remain" in text
    assert "harvest again with --again" in text
    assert s2t_labels("verify", lake.root)[0] == 0
    assert [s.name for s in lake.shards()] == [third.stem] and len(list(lake.rollouts())) > 0
    assert (lake.root / "quarantine" / first.name).exists() and as_json("stats", lake.root)[
        "shards"
    ] == 1


def test_verify_checks_values_too(lake: Lake) -> None:
    """A shard that matches its manifest can still hold what no label can be."""
    broken = rollout(200)
    label = replace(broken.labels[0], candidate_ids=(1,))  # fewer candidates than log-probabilities
    lake.write([replace(broken, labels=(label,))])
    assert s2t_labels("verify", lake.root)[0] == 1


def test_stats_beside_a_service_count_what_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right after a harvest they used to say 0 labels, without a hint that 549 were on their way."""
    counts = LabelCounts(queued=12, in_lake=0, dead_letters=1)
    asked: list[bool] = []

    class FakeClient:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def count_labels(self, flush: bool) -> LabelCounts:
            asked.append(flush)
            return counts

    record = ServiceRecord("127.0.0.1:1", 1, {})
    monkeypatch.setattr("services.client.Client", FakeClient)
    monkeypatch.setattr("services.launch.service_record.find_service", lambda folder: record)
    (tmp_path / "labels").mkdir()
    outcome = CliRunner().invoke(labels_app, ["stats", "--data-dir", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert "12 rollouts are still on their way" in outcome.output
    outcome = CliRunner().invoke(
        labels_app, ["stats", "--data-dir", str(tmp_path), "--flush", "--json"]
    )
    told = json.loads(outcome.output)
    assert (told["in_redis"], told["dead_letters"]) == (12, 1)
    assert asked == [False, True]
