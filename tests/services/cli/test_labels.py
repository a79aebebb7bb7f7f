"""`s2t labels` on real lakes: figures that can be recomputed, exports others can read, deletion
that is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

import services.cli.dead_letters  # noqa: F401 - adds its verb
from s2t_shared.errors import ConfigError, InvalidRequestError, StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.known_models import KnownModels
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.types import LabelCounts
from services.cli.labels import labels_app
from services.launch.redis_server import RedisServer, open_redis
from tests.helpers.fake_service import pretend_service
from tests.helpers.scored_rollouts import ANSWER, SCORED_ROLLOUTS, scored_rollout


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


def test_stats_are_those_of_the_rollouts(scored_lake: Lake) -> None:
    figures = as_json("stats", scored_lake.root)
    assert (figures["rollouts"], figures["labels"], figures["problems"], figures["shards"]) == (
        60,
        120,
        60,
        3,
    )
    assert figures["groups"] == 60
    assert figures["held_out_groups"] == sum(r.held_out for r in SCORED_ROLLOUTS)
    status, text = s2t_labels("stats", scored_lake.root)
    assert status == 0 and "few groups" in text
    assert figures["tasks"] == {"words": 30, "sums": 90} and figures["pairs"] == {"slm / llm": 120}
    assert figures["held_out_labels"] == 2 * sum(r.held_out for r in SCORED_ROLLOUTS) > 0
    assert figures["answer_tokens"] == figures["positions"] == 600 and figures["label_share"] == 0.2
    assert figures["mass"] == pytest.approx(0.75) and figures["bytes"] == sum(
        p.stat().st_size for p in scored_lake.root.glob("*.parquet")
    )
    assert "dead_letters" not in figures  # no Redis is configured
    every = [rank for r in SCORED_ROLLOUTS for rank in r.llm_top_rank]
    labelled = [label.llm_top_rank for r in SCORED_ROLLOUTS for label in r.labels]
    for k in (1, 2, 4, 8):
        assert figures["hits"]["all"][str(k)] == pytest.approx(hit(every, k))
        assert figures["hits"]["labelled"][str(k)] == pytest.approx(hit(labelled, k))
    for signal in ("kl", "entropy"):
        positions = sorted(
            (
                (getattr(r, signal)[i], r.llm_top_rank[i])
                for r in SCORED_ROLLOUTS
                for i in range(3, ANSWER)
            ),
            reverse=True,
        )
        for share in (0.01, 0.05, 0.10):
            top = [rank for _, rank in positions[: int(share * 600)]]
            for k in (1, 2, 4, 8):  # two signals within 0.3 % of one another may change places
                found = figures["hits"][f"{signal} top {share:.0%}"][str(k)]
                assert found == pytest.approx(hit(top, k), abs=1.01 / len(top))


def test_stats_without_scored_positions_and_of_an_empty_lake(tmp_path: Path) -> None:
    online = Lake(tmp_path / "online")
    online.write([replace(scored_rollout(1), entropy=(), kl=(), llm_top_rank=(), source="online")])
    figures = as_json("stats", online.root)
    assert (
        figures["positions"] == 0
        and figures["hits"]["all"]["1"] is None
        and figures["hits"]["labelled"]["8"] is not None
    )
    (tmp_path / "empty").mkdir()
    assert as_json("stats", tmp_path / "empty")["labels"] == 0
    for folder in (online.root, tmp_path / "empty"):
        status, text = s2t_labels("stats", folder)
        assert status == 0 and "Hit@8" in text


def test_stats_count_dead_letters_or_say_that_redis_is_away(
    scored_lake: Lake, tmp_path: Path
) -> None:
    with open_redis(None, tmp_path / "redis") as server:
        config = tmp_path / "s2t.yaml"
        config.write_text(f"redis: {{url: '{server.url}'}}\n", encoding="utf-8")
        figures = as_json("stats", scored_lake.root, "--config", config)
        assert (figures["in_redis"], figures["dead_letters"]) == (0, 0)
    figures = as_json("stats", scored_lake.root, "--config", config)
    assert (
        figures["labels"] == 120
        and figures["dead_letters"] is None
        and "Redis at" in figures["redis_error"]
    )
    assert "unknown" in s2t_labels("stats", scored_lake.root, "--config", config)[1]


def test_the_data_folder_s_own_lake(scored_lake: Lake, tmp_path: Path) -> None:
    scored_lake.root.rename(tmp_path / "labels")
    assert as_json("stats", "--data-dir", tmp_path)["labels"] == 120


@pytest.mark.parametrize("verb", [["stats"], ["verify"], ["delete", "--task", "x", "--yes"]])
def test_a_mistyped_lake_is_an_error_and_makes_no_folder(tmp_path: Path, verb: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no lake folder"):
        s2t_labels(verb[0], tmp_path / "nowhere", *verb[1:])
    assert not (tmp_path / "nowhere").exists()


# -- export ---------------------------------------------------------------------------------------


def test_export_writes_what_it_says(scored_lake: Lake, tmp_path: Path) -> None:
    result = as_json("export", scored_lake.root, tmp_path / "out")
    assert result["labels"] == 120 == result["train"] + result["heldout"]
    assert result["rollouts"] == 60 and Path(result["folder"]) == tmp_path / "out"
    for split in ("train", "heldout"):
        [file] = (tmp_path / "out/data").glob(f"{split}-*.parquet")
        assert pq.read_table(file).num_rows == result[split]
    as_json("export", scored_lake.root, tmp_path / "lines", "--format", "jsonl")
    files = (tmp_path / "lines/data").glob("*.jsonl")
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) == 120
    with pytest.raises(InvalidRequestError, match="--format='csv': unknown"):
        s2t_labels("export", scored_lake.root, tmp_path / "x", "--format", "csv")


def test_export_refuses_what_it_would_overwrite_and_what_is_not_there(
    scored_lake: Lake, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    as_json("export", scored_lake.root, tmp_path / "out")  # an empty folder is fine
    before = (tmp_path / "out/README.md").read_bytes()
    with pytest.raises(ConfigError, match="not an empty folder"):
        s2t_labels("export", scored_lake.root, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no labels"):
        s2t_labels("export", tmp_path / "empty", tmp_path / "out3")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot export"):
        s2t_labels("export", scored_lake.root, tmp_path / "file" / "out")


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
    scored_lake: Lake, option: str, value: str, gone: set[str]
) -> None:
    """From every shard and snapshot, and what comes again later stays out."""
    frozen = scored_lake.freeze()
    as_json("delete", scored_lake.root, option, value, "--yes")
    left = {r.rollout_id for r in Lake(scored_lake.root).rollouts()}
    assert left == {r.rollout_id for r in SCORED_ROLLOUTS} - gone
    assert frozen.folder.exists() == (not gone)
    assert as_json("delete", scored_lake.root, option, value, "--yes") == {"deleted rollouts": 0}
    scored_lake.write(SCORED_ROLLOUTS[:30])
    assert {r.rollout_id for r in scored_lake.rollouts()} == left
    assert scored_lake.verify() == {}


def test_delete_says_what_and_asks(scored_lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing was deleted: there is no terminal"):
        s2t_labels("delete", scored_lake.root, "--task", "words")
    app = typer.Typer()
    app.add_typer(labels_app, name="labels")
    monkeypatch.setattr("services.cli.labels._on_terminal", lambda: True)
    refused = CliRunner().invoke(
        app, ["labels", "delete", str(scored_lake.root), "--task", "words"], input="n\n"
    )
    assert refused.exit_code == 1 and "15 rollouts with 30 labels of task 'words'" in refused.stderr
    assert len(list(scored_lake.rollouts())) == 60
    agreed = CliRunner().invoke(
        app, ["labels", "delete", str(scored_lake.root), "--task", "words"], input="y\n"
    )
    assert agreed.exit_code == 0 and len(list(scored_lake.rollouts())) == 45


def test_delete_by_age_and_size(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    now = time.time()
    for age_days in (40, 20, 1):
        lake.write(
            [
                scored_rollout(age_days * 10 + i, created_at=now - age_days * 86_400)
                for i in range(5)
            ]
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
def test_delete_needs_one_clear_wish(scored_lake: Lake, options: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        s2t_labels("delete", scored_lake.root, *options, "--yes")
    assert len(list(scored_lake.rollouts())) == 60


# -- verify ---------------------------------------------------------------------------------------


def test_verify_finds_damage_and_quarantine_makes_the_rest_usable(scored_lake: Lake) -> None:
    status, text = s2t_labels("verify", scored_lake.root)
    assert status == 0 and "3 shards, all well" in text
    first, second, third = sorted(scored_lake.root.glob("shard-*.parquet"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(bytes(content))
    second.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="verify --quarantine"):
        list(scored_lake.rollouts())
    status, text = s2t_labels("verify", scored_lake.root, "--json")
    assert status == 1 and set(json.loads(text)["bad"]) == {first.stem, second.stem}
    status, text = s2t_labels("verify", scored_lake.root, "--quarantine")
    assert status == 1 and first.stem in text and "1 good shards remain" in text
    assert "harvest again with --again" in text
    assert s2t_labels("verify", scored_lake.root)[0] == 0
    assert [s.name for s in scored_lake.shards()] == [third.stem] and len(
        list(scored_lake.rollouts())
    ) > 0
    assert (scored_lake.root / "quarantine" / first.name).exists() and as_json(
        "stats", scored_lake.root
    )["shards"] == 1


def test_verify_checks_values_where_asked(
    scored_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lake takes no value that no label can have. Where a bug let one in, `--values` tells; the
    hash does not."""
    broken = scored_rollout(200)
    label = replace(broken.labels[0], candidate_ids=(1,))  # fewer candidates than log-probabilities
    with pytest.raises(StoreError, match="of different lengths"):
        scored_lake.write([replace(broken, labels=(label,))])
    with monkeypatch.context() as patch:
        patch.setattr("s2t_shared.labels.shards.check_rows", lambda rows: None)
        scored_lake.write([replace(broken, labels=(label,))])
    assert s2t_labels("verify", scored_lake.root)[0] == 0
    assert s2t_labels("verify", scored_lake.root, "--values")[0] == 1


def test_stats_beside_a_service_count_what_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a harvest they used to say 0 labels, without a hint that 549 were on their
    way."""
    counts = LabelCounts(queued=12, in_lake=0, dead_letters=1)
    asked: list[bool] = []

    def count(flush: bool) -> LabelCounts:
        asked.append(flush)
        return counts

    pretend_service(monkeypatch, count)
    (tmp_path / "labels").mkdir()
    outcome = CliRunner().invoke(labels_app, ["stats", "--data-dir", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert "12 rollouts are still on their way" in outcome.output
    outcome = CliRunner().invoke(
        labels_app, ["stats", "--data-dir", str(tmp_path), "--flush", "--json"]
    )
    figures = json.loads(outcome.output)
    assert (figures["in_redis"], figures["dead_letters"]) == (12, 1)
    assert asked == [False, True]


# -- dead letters ---------------------------------------------------------------------------------


def sensible(made: Rollout) -> Rollout:
    """Its labels with the rank that their LLM's choice has."""
    labels = tuple(replace(label, llm_top_rank=1) for label in made.labels)
    return replace(made, labels=labels)


@pytest.fixture
def refused(server: RedisServer, scored_lake: Lake, tmp_path: Path) -> Path:
    """A configuration whose Redis holds three refused rollouts; its lake is `tmp_path / labels`."""
    scored_lake.root.rename(tmp_path / "labels")
    settings = server.settings()
    config = tmp_path / "s2t.yaml"
    config.write_text(
        f"redis: {{url: '{settings['url']}', password_dir: '{settings['password_dir']}'}}\n"
        f"data_dir: '{tmp_path}'\n",
        encoding="utf-8",
    )
    stream = LabelStream(server.url)
    good = [sensible(scored_rollout(n)) for n in (101, 102)]
    old = replace(scored_rollout(7), schema_version=1)
    stream.append([r.to_json().encode() for r in (*good, old)])
    Drain(stream, Lake(tmp_path / "labels"), known=KnownModels(tmp_path / "known-models")).flush()
    return config


def test_dead_letters_are_listed_by_reason_and_deleted(refused: Path) -> None:
    """By the operator's role, which may do no more."""
    told = as_json("dead", "--config", refused)
    assert told["dead_letters"] == 3 and len(told["reasons"]) == 2
    assert "llm_digest" not in s2t_labels("dead", "--config", refused)[1]
    assert "slm_digest 'slm' is unknown" in s2t_labels("dead", "--config", refused)[1]
    assert "s2t labels dead says why" in s2t_labels("stats", "--config", refused)[1]
    with pytest.raises(InvalidRequestError, match="say which"):
        s2t_labels("dead", "--delete", "--config", refused)
    one = ("--request-id", "request-101", "--delete", "--yes")
    assert as_json("dead", *one, "--config", refused) == {"deleted dead letters": 1}
    none = ("--older-than", "1", "--delete", "--yes")
    assert as_json("dead", *none, "--config", refused) == {"deleted dead letters": 0}
    assert as_json("dead", "--config", refused)["dead_letters"] == 2
    every = ("--all", "--delete", "--yes")
    assert as_json("dead", *every, "--config", refused) == {"deleted dead letters": 2}
    assert "no dead letters" in s2t_labels("dead", "--config", refused)[1]


def test_refused_labels_that_are_ours_are_sent_again(
    refused: Path, server: RedisServer, tmp_path: Path
) -> None:
    told = as_json("dead", "--requeue", "--all", "--config", refused)
    assert told == {"sent again": 2, "cannot be read": 1}
    lake = Lake(tmp_path / "labels")
    known = KnownModels(tmp_path / "known-models")
    assert Drain(LabelStream(server.url), lake, known=known).flush() == 2
    assert as_json("dead", "--config", refused)["dead_letters"] == 1


def test_deleting_labels_reaches_refused_ones(refused: Path) -> None:
    told = as_json("delete", "--request-id", "request-7", "--yes", "--config", refused)
    assert told == {"deleted rollouts": 1, "deleted dead letters": 1}
    assert as_json("dead", "--config", refused)["dead_letters"] == 2


def test_dead_letters_need_a_redis(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Redis: redis.url is not set, and no service runs"):
        s2t_labels("dead", "--data-dir", tmp_path)
