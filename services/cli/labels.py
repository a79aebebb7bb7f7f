"""`s2t labels`: the lake on the command line. Parses, asks and prints; `s2t_shared.labels` does the
work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
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
    from services.launch.service_record import ServiceRecord

labels_app = typer.Typer(no_args_is_help=True, help="The lake of selection labels.")
LakeFolder = Annotated[
    str | None,
    typer.Argument(help="the lake's folder or s3://... URL; default: that of the data folder"),
]
GIB = 1 << 30
DAY_S = 86_400.0
BRING_IN_S = 10.0  # online traffic makes new labels all the time


def _open(folder: str | None, config: Path | None, data_dir: Path | None) -> tuple[Lake, Config]:
    """The lake and the configuration.

    Raises:
        ConfigError: there is no such folder (a verb must not make one).
    """
    from s2t_shared.labels.lake import Lake
    from s2t_shared.labels.object_lake import open_lake
    from s2t_shared.labels.places import is_url

    resolved = settings(config, data_dir=data_dir)
    where = folder or resolved.lake
    if is_url(where):
        return open_lake(where), resolved
    root = Path(where)
    if not root.is_dir():
        raise ConfigError(
            f"there is no lake folder {str(root)!r}; name one, give --data-dir, or harvest first "
            "(s2t harvest)"
        )
    return Lake(root), resolved


RayAddress = Annotated[
    str | None, typer.Option(help="host:port of a Ray cluster's head: its nodes read the shards")
]


@contextmanager
def _workers(address: str | None) -> Iterator[Any]:
    """What applies a function to the parts of a lake: here, or on a Ray cluster.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if address is None:
        yield map
        return
    from services.lake_on_ray import map_on_ray
    from services.launch.ray_connection import existing_ray, listens

    if not listens(address):
        raise ConfigError(
            f"--address={address}: no Ray cluster is there; give host:port of its head, start one "
            "(ray start --head), or leave --address out"
        )
    with existing_ray(address):
        yield map_on_ray


# -- stats ----------------------------------------------------------------------------------------


@labels_app.command()
def stats(
    lake: LakeFolder = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    flush: Annotated[
        bool, typer.Option("--flush", help="first let a running service write what it has")
    ] = False,
    address: RayAddress = None,
    json_out: Json = False,
) -> None:
    """How much there is, of what, and how often the LLM's choice is among the SLM's first K."""
    from s2t_shared.labels.stats import measure_labels
    from services.launch.service_record import find_service

    opened, resolved = _open(lake, config, data_dir)
    service = find_service(resolved.data_dir) if opened.where == str(resolved.lake) else None
    if flush and service is None:
        raise ConfigError(f"--flush: no service runs on {str(resolved.data_dir)!r}")
    queued = _queued(resolved, service, flush)
    with _workers(address) as run:
        measured = measure_labels(opened, run)
    if json_out:
        figures = asdict(measured) | {"label_share": measured.label_share} | queued
        print(json.dumps(figures))
        return
    show(_shown(measured) | _shown_queued(queued), as_json=False)
    if queued.get("in_redis"):
        print(
            f"{queued['in_redis']} rollouts are still on their way and not counted above; they are "
            f"in the lake within {resolved.labels.shard_age_s:.0f} s (--flush writes them now)"
        )
    if queued.get("dead_letters"):
        print(f"{queued['dead_letters']} labelled rollouts were refused; s2t labels dead says why")
    wanted = 2 * resolved.training.gate_min_groups  # half of those held out are for testing
    if measured.labels and measured.held_out_groups < wanted:
        print(
            f"few groups: {measured.held_out_groups} of {measured.groups} groups of problems are "
            f"held out, and the gate wants {wanted}; harvest problems of more templates"
        )
    wide_console().print(_hit_table(measured))


def _shown(measured: LabelStats) -> dict[str, Any]:
    """What people see, by its title."""
    pairs = str(len(measured.pairs))
    if len(measured.pairs) > 1:
        pairs = f"{pairs} (never trained on together)"
    return {
        "rollouts": measured.rollouts,
        "labels": measured.labels,
        "held-out labels": measured.held_out_labels,
        "problems": measured.problems,
        "groups": f"{measured.groups} ({measured.held_out_groups} held out)",
        "tasks": _counts(measured.tasks),
        "sources": _counts(measured.sources),
        "model pairs": pairs,
        "answer tokens": measured.answer_tokens,
        "scored": measured.positions,
        "label share": _figure(measured.label_share, ".2%"),
        "mean mass": _figure(measured.mass, ".3f"),
        "shards": measured.shards,
        "size": f"{measured.bytes / (1 << 20):.1f} MiB",
        "made": f"{date(measured.oldest)} to {date(measured.newest)}",
    }


def bring_in(config: Config, say: Callable[[str], None]) -> None:
    """Let a running service write the labels that are on their way to the lake.

    Waits for them, BRING_IN_S at most, and says what did not come.
    """
    from services.launch.service_record import find_service

    service = find_service(config.data_dir)
    deadline = time.monotonic() + BRING_IN_S
    counts = _queued(config, service, flush=True)
    while service is not None and counts.get("in_redis") and time.monotonic() < deadline:
        time.sleep(0.1)
        counts = _queued(config, service, flush=True)
    if "redis_error" in counts:
        say(f"labels may be on their way to the lake: {counts['redis_error']}")
    elif counts.get("in_redis"):
        say(
            f"{counts['in_redis']} rollouts are still on their way to the lake and not used now; "
            "a running service (s2t serve) brings them there"
        )


def _queued(config: Config, service: ServiceRecord | None, flush: bool) -> dict[str, Any]:
    """Counts of rollouts that are not in the lake yet, by a running service or the configured
    Redis. Counts that cannot be had are None.

    flush: a service writes first what it has.
    """
    from services.client import Client
    from services.rpc import channels
    from services.rpc.tls import ClientTLS
    from services.rpc.tokens import Role

    if service is None:
        return _redis_counts(config) if config.redis.url else {}
    security = config.security
    token = channels.read_token(security.token_file, Role.ADMIN)
    tls = ClientTLS.of(security)
    with Client(service.address, token, tls=tls, timeout_s=60.0) as client:
        try:
            counts = client.count_labels(flush=flush)
        except S2TError as error:
            return {"in_redis": None, "dead_letters": None, "redis_error": str(error)}
    return {"in_redis": counts.queued, "dead_letters": counts.dead_letters}


def _redis_counts(config: Config) -> dict[str, Any]:
    """Counts of what is in Redis. When Redis is away they are None: the verb is about the lake and
    must not fail."""
    from services.cli.dead_letters import operator_stream

    try:
        with operator_stream(config) as stream:
            counts = stream.counts()
    except S2TError as error:
        return {"in_redis": None, "dead_letters": None, "redis_error": str(error)}
    return {"in_redis": counts.rollouts, "dead_letters": counts.dead_letters}


def _shown_queued(counts: dict[str, Any]) -> dict[str, Any]:
    shown = {}
    for name, value in counts.items():
        shown[name.replace("_", " ")] = "unknown" if value is None else value
    return shown


def _hit_table(measured: LabelStats) -> Table:
    from s2t_shared.statistics import HIT_AT

    table = Table(title="LLM's choice among the SLM's first K", title_justify="left")
    table.add_column("positions")
    for k in HIT_AT:
        table.add_column(f"Hit@{k}", justify="right")
    for name, hits in measured.hits.items():
        table.add_row(name, *(_figure(hits[k], ".3f") for k in HIT_AT))
    return table


def _counts(values: dict[str, int]) -> str:
    largest = sorted(values.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name or '(none)'} {count}" for name, count in largest[:10])
    if len(largest) > 10:
        text = f"{text}, and {len(largest) - 10} more"
    return text


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def date(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


# -- export ---------------------------------------------------------------------------------------


@labels_app.command()
def export(
    lake: Annotated[str, typer.Argument(help="the lake's folder or s3://... URL")],
    folder: Annotated[str, typer.Argument(help="new folder or URL for the data set")],
    format: Annotated[
        str, typer.Option("--format", help="hf (Parquet and a card), parquet or jsonl")
    ] = "hf",
    with_text: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the SLM: contexts and candidates also as text"),
    ] = None,
    address: RayAddress = None,
    json_out: Json = False,
) -> None:
    """Write the labels, one a row, as a data set that datasets.load_dataset(FOLDER) reads."""
    from s2t_shared.labels.export import SPLITS, ExportFormat, export_labels

    kind = by_name(ExportFormat, format, "--format")
    opened, _ = _open(lake, None, None)
    tokenizer = None
    if with_text is not None:
        from s2t_shared.model.folders import resolve_model
        from s2t_shared.model.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(resolve_model(with_text))
    rollouts = sum(shard.rollouts for shard in opened.shards())
    with progress("rollouts", rollouts, json_out) as shown:

        def on_rollouts(count: int) -> None:
            shown.update(shown.done + count)

        with _workers(address) as run:
            exported = export_labels(
                opened, folder, kind, tokenizer, on_rollouts, run=None if run is map else run
            )
    result: dict[str, Any] = {"folder": str(folder), "labels": exported.total}
    for split in SPLITS:
        result[split] = exported.labels[split]
    result["rollouts"] = exported.rollouts
    result["snapshot"] = exported.snapshot
    show(result, json_out)


# -- delete ---------------------------------------------------------------------------------------


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
    """Delete labels, in the lake with its snapshots and quarantine, on their way there, and refused
    ones. Doing it again changes nothing."""
    fields = {"problem_id": problem_id, "request_id": request_id, "task": task}
    by_field = [(field, value) for field, value in fields.items() if value is not None]
    by_retention = older_than is not None or keep_gib is not None
    if len(by_field) + by_retention != 1:
        raise InvalidRequestError(
            "say what to delete with one of --problem-id, --request-id, --task, or with "
            "--older-than and --keep-gib"
        )
    opened, resolved = _open(lake, config, data_dir)
    result: dict[str, Any] = {}
    if by_retention:
        removed = _delete_by_retention(opened, older_than, keep_gib, yes)
    else:
        [(field, value)] = by_field
        removed = _delete_by_field(opened, field, value, yes)
        result = _delete_refused(opened, resolved, field, value)
    if opened.quarantined.names(".parquet"):
        print(
            f"s2t: what cannot be read in {opened.where + '/quarantine'!r} was not searched; "
            "remove that folder when it is needed no more",
            file=sys.stderr,
        )
    show({"deleted rollouts": removed} | result, json_out)


def _delete_by_field(lake: Lake, field: str, value: str, yes: bool) -> int:
    rollouts, labels = lake.rollouts_with(field, value)
    confirm(
        f"{rollouts} rollouts with {labels} labels of {field} {value!r}, and what of it is "
        f"on its way, in {lake.where!r}",
        yes,
    )
    return lake.delete(field, value)


def _delete_refused(lake: Lake, config: Config, field: str, value: str) -> dict[str, Any]:
    """Delete from the dead letters of the Redis that belongs to the lake, if there is one."""
    from services.cli.dead_letters import delete_from_dead_letters, with_redis

    if lake.where != str(config.lake):
        return {}
    return delete_from_dead_letters(with_redis(config), field, value)


def _delete_by_retention(
    lake: Lake, older_than: float | None, keep_gib: float | None, yes: bool
) -> int:
    for limit in (older_than, keep_gib):
        if limit is not None and not 0 < limit < 1e9:
            raise InvalidRequestError("--older-than (days) and --keep-gib must be numbers above 0")
    max_age_s = (older_than or 0.0) * DAY_S
    max_bytes = 0 if keep_gib is None else max(1, int(keep_gib * GIB))
    shards = lake.prunable(max_age_s, max_bytes)
    newest = shards[-1].last if shards else None
    confirm(
        f"{len(shards)} of {len(lake.shards())} shards: "
        f"{sum(shard.rollouts for shard in shards)} rollouts with "
        f"{sum(shard.labels for shard in shards)} labels, made until {date(newest)}, "
        f"in {lake.where!r}",
        yes,
    )
    return lake.prune(max_age_s, max_bytes)


def confirm(what: str, yes: bool) -> None:
    """Say what is deleted, and ask unless `yes`.

    Raises:
        ConfigError: nobody can be asked.
    """
    print(f"s2t: deleting {what} for good", file=sys.stderr)
    if yes:
        return
    if not _on_terminal():
        raise ConfigError("nothing was deleted: there is no terminal to ask on; give --yes")
    if not typer.confirm("go on?", err=True):
        raise typer.Exit(1)


def _on_terminal() -> bool:
    return sys.stdin.isatty()


# -- verify ---------------------------------------------------------------------------------------


@labels_app.command()
def verify(
    lake: LakeFolder = None,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="move bad shards aside")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="decode and check every value too")
    ] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Check hash and schema of every shard; exit status 1 where one is bad."""
    opened, _ = _open(lake, config, data_dir)
    bad = opened.verify(values)
    quarantined = quarantine and bool(bad)
    if quarantined:
        opened.quarantine(bad)
    good_shards = len(opened.shards()) if quarantined or not bad else None
    if json_out:
        print(json.dumps({"bad": bad, "quarantined": quarantined, "good_shards": good_shards}))
    else:
        for name, reason in bad.items():
            wide_console().print(f"[red]BAD[/red] {escape(name)}: {escape(reason)}", soft_wrap=True)
        if quarantined:
            print(
                f"moved to {opened.where}/quarantine; {good_shards} good shards remain; "
                "run the harvest again with --again to make them anew"
            )
        elif not bad:
            print(f"{good_shards} shards, all well")
    if bad:
        raise typer.Exit(1)


# -- migrate --------------------------------------------------------------------------------------


@labels_app.command()
def migrate(
    lake: LakeFolder = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Rewrite the shards of an older format. They are read without it too, but more slowly."""
    opened, _ = _open(lake, config, data_dir)
    show({"rewritten shards": opened.migrate()}, json_out)
