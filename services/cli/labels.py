"""`s2t labels`: the lake on the command line. Parses, asks, prints; lake, label_stats and
label_export do the work."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError, StoreError
from s2t_shared.requests import by_name
from services.cli.options import (
    ConfigFile,
    DataDir,
    Json,
    settings,
    show,
    wide_console,
)
from services.cli.progress import progress

if TYPE_CHECKING:
    from s2t_shared.config import Config
    from s2t_shared.labels.lake import Lake
    from s2t_shared.labels.stats import LabelStats

labels_app = typer.Typer(no_args_is_help=True, help="The lake of selection labels.")
LakeFolder = Annotated[
    Path | None, typer.Argument(help="the lake folder; default: that of the data folder")
]
GIB = 1 << 30
DAY_S = 86_400.0


def _open(folder: Path | None, config: Path | None, data_dir: Path | None) -> tuple[Lake, Config]:
    """Raises ConfigError: there is no such folder (a verb must not make one)."""
    from s2t_shared.labels.lake import Lake

    resolved = settings(config, data_dir=str(data_dir) if data_dir else None)
    root = folder or resolved.lake
    if not root.is_dir():
        raise ConfigError(
            f"there is no lake folder {str(root)!r}; name one, give --data-dir, or harvest first "
            "(s2t harvest)"
        )
    return Lake(root), resolved


@labels_app.command()
def stats(
    lake: LakeFolder = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    flush: Annotated[
        bool, typer.Option("--flush", help="first let a running service write what it has")
    ] = False,
    json_out: Json = False,
) -> None:
    """How much there is, of what, and how often the LLM's choice is among the SLM's first K."""
    from s2t_shared.labels.stats import measure_labels

    opened, resolved = _open(lake, config, data_dir)
    waiting = _on_their_way(opened, resolved, flush)
    measured = measure_labels(opened)
    if json_out:
        print(json.dumps({**asdict(measured), "label_share": measured.label_share, **waiting}))
        return
    pairs = (
        f"{len(measured.pairs)} (never trained on together)"
        if len(measured.pairs) > 1
        else len(measured.pairs)
    )
    show(
        {
            "rollouts": measured.rollouts,
            "labels": measured.labels,
            "held-out labels": measured.held_out_labels,
            "problems": measured.problems,
            "tasks": _counts(measured.tasks),
            "sources": _counts(measured.sources),
            "model pairs": pairs,
            "answer tokens": measured.answer_tokens,
            "scored": measured.positions,
            "label share": _figure(measured.label_share, ".2%"),
            "mean mass": _figure(measured.mass, ".3f"),
            "shards": measured.shards,
            "size": f"{measured.bytes / (1 << 20):.1f} MiB",
            "made": f"{_date(measured.oldest)} to {_date(measured.newest)}",
            **{
                name.replace("_", " "): "unknown" if value is None else value
                for name, value in waiting.items()
            },
        },
        as_json=False,
    )
    if waiting.get("in_redis"):
        print(
            f"{waiting['in_redis']} rollouts are still on their way and not counted above; they are "
            f"in the lake within {resolved.labels.shard_age_s:.0f} s (--flush writes them now)"
        )
    wide_console().print(_hit_table(measured))


def _on_their_way(lake: Lake, config: Config, flush: bool) -> dict[str, Any]:
    """Rollouts that are not in the lake yet, by a running service or the configured Redis."""
    from services.client import Client
    from services.launch.service_record import find_service
    from services.rpc import channels

    service = find_service(config.data_dir) if lake.root == config.lake else None
    if service is None:
        if flush:
            raise ConfigError(f"--flush: no service runs on {str(config.data_dir)!r}")
        return _redis_counts(config) if config.redis.url else {}
    security = config.security
    token = channels.read_token(security.token_file)
    with Client(service.address, token, security.authority, timeout_s=60.0) as client:
        try:
            counts = client.count_labels(flush=flush)
        except S2TError as error:
            return {"in_redis": None, "dead_letters": None, "redis_error": str(error)}
    return {"in_redis": counts.queued, "dead_letters": counts.dead_letters}


def _redis_counts(config: Config) -> dict[str, Any]:
    """What waits in Redis; an answer about the lake must not fail with it."""
    from s2t_shared.labels.stream import LabelStream

    try:
        store = LabelStream(str(config.redis.url))
        counts = store.counts()
        store.close()
    except StoreError as error:
        return {"in_redis": None, "dead_letters": None, "redis_error": str(error)}
    return {"in_redis": counts.rollouts, "dead_letters": counts.dead_letters}


def _hit_table(measured: LabelStats) -> Table:
    table = Table(title="LLM's choice among the SLM's first K", title_justify="left")
    table.add_column("positions")
    for k in next(iter(measured.hits.values())):
        table.add_column(f"Hit@{k}", justify="right")
    for name, hits in measured.hits.items():
        table.add_row(name, *(_figure(hit, ".3f") for hit in hits.values()))
    return table


def _counts(values: dict[str, int]) -> str:
    shown = sorted(values.items(), key=lambda item: -item[1])
    rest = f", and {len(shown) - 10} more" if len(shown) > 10 else ""
    return ", ".join(f"{name or '(none)'} {count}" for name, count in shown[:10]) + rest


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _date(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@labels_app.command()
def export(
    lake: Annotated[Path, typer.Argument(help="the lake folder")],
    folder: Annotated[Path, typer.Argument(help="new folder for the data set")],
    format: Annotated[
        str, typer.Option("--format", help="hf (Parquet and a card), parquet or jsonl")
    ] = "hf",
    with_text: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the SLM: contexts and candidates also as text"),
    ] = None,
    json_out: Json = False,
) -> None:
    """Write the labels, one a row, as a data set that datasets.load_dataset(FOLDER) reads."""
    from s2t_shared.labels.export import SPLITS, ExportFormat, export_labels

    kind = by_name(ExportFormat, format, "--format")
    opened, _ = _open(lake, None, None)
    tokenizer = None
    if with_text is not None:
        from s2t_shared.model.runtime import resolve_model
        from s2t_shared.model.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(resolve_model(with_text))
    total = sum(shard.rollouts for shard in opened.shards())
    with progress("rollouts", total, json_out) as shown:
        exported = export_labels(opened, folder, kind, tokenizer, lambda labels: shown.advance())
    show(
        {
            "folder": str(folder),
            "labels": exported.total,
            **{split: exported.labels[split] for split in SPLITS},
            "rollouts": exported.rollouts,
            "snapshot": exported.snapshot,
        },
        json_out,
    )


@labels_app.command()
def delete(
    lake: LakeFolder = None,
    problem_id: Annotated[str | None, typer.Option(help="labels of this problem")] = None,
    request_id: Annotated[str | None, typer.Option(help="labels of this request")] = None,
    task: Annotated[str | None, typer.Option(help="labels of this task")] = None,
    older_than: Annotated[
        float | None, typer.Option(help="DAYS: shards with nothing newer")
    ] = None,
    keep_gib: Annotated[float | None, typer.Option(help="the oldest shards beyond so much")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Delete labels, in the lake with its snapshots and quarantine, and on their way there. Doing
    it again changes nothing."""
    chosen = {"problem_id": problem_id, "request_id": request_id, "task": task}
    named = [(field, value) for field, value in chosen.items() if value is not None]
    retention = older_than is not None or keep_gib is not None
    if len(named) + retention != 1:
        raise InvalidRequestError(
            "say what to delete with one of --problem-id, --request-id, --task, or with "
            "--older-than and --keep-gib"
        )
    if not all(limit is None or 0 < limit < 1e9 for limit in (older_than, keep_gib)):
        raise InvalidRequestError("--older-than (days) and --keep-gib must be numbers above 0")
    opened, _ = _open(lake, config, data_dir)
    age_s, size = (
        (older_than or 0.0) * DAY_S,
        max(1, int(keep_gib * GIB)) if keep_gib is not None else 0,
    )
    what = _retention(opened, age_s, size) if retention else _matching(opened, *named[0])
    _confirm(f"{what} in {str(opened.root)!r}", yes)
    removed = opened.prune(age_s, size) if retention else opened.delete(*named[0])
    if any((opened.root / "quarantine").glob("shard-*")):
        print(
            f"s2t: what cannot be read in {str(opened.root / 'quarantine')!r} was not searched; remove that folder "
            "when it is needed no more",
            file=sys.stderr,
        )
    show({"deleted rollouts": removed}, json_out)


def _matching(lake: Lake, field: str, value: str) -> str:
    from s2t_shared.labels.lake import Deletion

    deletion = Deletion.of(field, value)
    found = [len(r.labels) for r in lake.rollouts() if deletion.matches(r)]
    return f"{len(found)} rollouts with {sum(found)} labels of {field} {value!r}, and what of it is on its way,"


def _retention(lake: Lake, age_s: float, size: int) -> str:
    gone = lake.prunable(age_s, size)
    return (
        f"{len(gone)} of {len(lake.shards())} shards: {sum(s.rollouts for s in gone)} rollouts with "
        f"{sum(s.labels for s in gone)} labels, made until {_date(gone[-1].last if gone else None)},"
    )


def _confirm(what: str, yes: bool) -> None:
    """Raises ConfigError: nobody can be asked."""
    print(f"s2t: deleting {what} for good", file=sys.stderr)
    if yes:
        return
    if not _on_terminal():
        raise ConfigError("nothing was deleted: there is no terminal to ask on; give --yes")
    if not typer.confirm("go on?", err=True):
        raise typer.Exit(1)


def _on_terminal() -> bool:
    return sys.stdin.isatty()


@labels_app.command()
def verify(
    lake: LakeFolder = None,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="move bad shards aside")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Check hash, schema and values of every shard; exit status 1 where one is bad."""
    opened, _ = _open(lake, config, data_dir)
    wrong = opened.verify()
    if quarantine and wrong:
        opened.quarantine(wrong)
    shards = len(opened.shards()) if quarantine or not wrong else None
    if json_out:
        print(
            json.dumps(
                {"bad": wrong, "quarantined": bool(quarantine and wrong), "good_shards": shards}
            )
        )
    else:
        for name, reason in wrong.items():
            wide_console().print(f"[red]BAD[/red] {escape(name)}: {escape(reason)}", soft_wrap=True)
        if wrong and quarantine:
            print(
                f"moved to {opened.root / 'quarantine'}; {shards} good shards remain; run the harvest again with "
                "--again to make them anew"
            )
        elif not wrong:
            print(f"{shards} shards, all well")
    if wrong:
        raise typer.Exit(1)
