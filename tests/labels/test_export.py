"""Exports: what a stranger reads from the folder is what the lake holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from s2t_shared.errors import TokenizerMismatchError
from s2t_shared.labels.export import ExportFormat, export_labels, size_category
from s2t_shared.labels.lake import Lake
from s2t_shared.model.tokenizer import Tokenizer
from tests.helpers.models import word_tokenizer
from tests.helpers.scored_rollouts import PROMPT, SCORED_ROLLOUTS, scored_rollout


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
            "group": r.group,
            "source": "plain",
            "rollout_id": r.rollout_id,
            "slm_digest": "slm",
            "llm_digest": "llm",
            "tokenizer_digest": "tok",
            "template_digest": "template",
        }
        for r in SCORED_ROLLOUTS
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


def test_export_round_trip_through_datasets(scored_lake: Lake, tmp_path: Path) -> None:
    """In a process of its own, offline: what a stranger gets from the folder."""
    pytest.importorskip("datasets")
    exported = export_labels(scored_lake, tmp_path / "out")
    assert exported.total == 120 == exported.labels["train"] + exported.labels["heldout"]
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


def test_export_in_shards_of_bounded_size(scored_lake: Lake, tmp_path: Path) -> None:
    export_labels(scored_lake, tmp_path / "out", shard_bytes=5_000)
    files = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    count = sum(name.startswith("train") for name in files)
    assert count > 1 and f"train-{count - 1:05}-of-{count:05}.parquet" in files
    assert all((tmp_path / "out/data" / name).stat().st_size < 25_000 for name in files)
    metadata = pq.ParquetFile(tmp_path / "out/data" / files[-1]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    check_rows(rows_by_split(tmp_path / "out"))


def test_export_as_jsonl_and_bare_parquet(scored_lake: Lake, tmp_path: Path) -> None:
    export_labels(scored_lake, tmp_path / "lines", ExportFormat.JSONL)
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
    export_labels(scored_lake, tmp_path / "bare", ExportFormat.PARQUET)
    check_rows(rows_by_split(tmp_path / "bare"))
    assert not (tmp_path / "bare/README.md").exists()


def test_the_card_says_what_is_there(scored_lake: Lake, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    scored_lake.write([scored_rollout(100, task="a|b\n# <b>c")])
    exported = export_labels(scored_lake, tmp_path / "out")
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
    lake.write([scored_rollout(i, tokenizer_digest=tokenizer.digest) for i in range(30)])
    export_labels(lake, tmp_path / "out", tokenizer=tokenizer)
    rows = [row for rows in rows_by_split(tmp_path / "out").values() for row in rows]
    assert len(rows) == 60 and rows[0]["candidates"] == ["w2", "<eos>", "w4"]
    for row in rows:
        assert tokenizer.hf.convert_tokens_to_ids(row["context"].split()) == row["context_ids"]
    other = Lake(tmp_path / "other")
    other.write([scored_rollout(1)])
    with pytest.raises(TokenizerMismatchError, match="give the SLM they were made with"):
        export_labels(other, tmp_path / "out2", tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "lake",
        "other",
        "out",
        "slm",
    ]  # nothing half-done is left


def test_a_lake_without_held_out_problems_exports(tmp_path: Path) -> None:
    """No file for a split, so the card must not promise one."""
    lake = Lake(tmp_path / "lake")
    lake.write([r for r in SCORED_ROLLOUTS if not r.held_out])
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
