"""`s2t labels dead`: labels that the drain refused. Parses, asks and prints; the work is done in
`s2t_shared.labels.dead_letters`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.redis_url import RedisRole, url_of
from services.cli.labels import DAY_S, confirm, date, labels_app
from services.cli.options import (
    ConfigFile,
    DataDir,
    Json,
    settings,
    show,
    wide_console,
)

if TYPE_CHECKING:
    from s2t_shared.config import Config
    from s2t_shared.labels.dead_letters import DeadLetter
    from s2t_shared.labels.stream import LabelStream

Selection = Callable[["DeadLetter"], bool]
REASON_WIDTH = 100


@labels_app.command()
def dead(
    delete: Annotated[bool, typer.Option("--delete", help="delete them for good")] = False,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="send them again, and accept their models from now on")
    ] = False,
    problem_id: Annotated[str | None, typer.Option(help="those of this problem")] = None,
    request_id: Annotated[str | None, typer.Option(help="those of this request")] = None,
    task: Annotated[str | None, typer.Option(help="those of this task")] = None,
    older_than: Annotated[float | None, typer.Option(help="DAYS: those refused before")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="every one")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Labels that were refused, by reason. Delete them, or send them again."""
    from s2t_shared.labels.dead_letters import read_dead_letters

    fields = {"problem_id": problem_id, "request_id": request_id, "task": task}
    wanted = _selection(fields, older_than, all_of_them, must_say=delete or requeue)
    if delete and requeue:
        raise InvalidRequestError("--delete and --requeue: choose one")
    resolved = with_redis(settings(config, data_dir=data_dir))
    with operator_stream(resolved) as stream:
        letters = [letter for letter in read_dead_letters(stream) if wanted(letter)]
        if delete:
            _delete(stream, letters, yes, json_out)
        elif requeue:
            _requeue(stream, letters, resolved, json_out)
        else:
            _list(letters, json_out)


def with_redis(config: Config) -> Config:
    """The settings with the Redis that they name, else that of the service on their data folder."""
    from services.launch.service_record import find_service

    service = find_service(config.data_dir)
    return config if service is None else service.with_redis(config)


@contextmanager
def operator_stream(config: Config) -> Iterator[LabelStream]:
    """The label stream of the configured or the running Redis, under the operator's role.

    Raises:
        ConfigError: there is none.
    """
    from s2t_shared.labels.stream import LabelStream

    if config.redis.url is None:
        raise ConfigError(
            f"no Redis: redis.url is not set, and no service runs on {str(config.data_dir)!r}"
        )
    stream = LabelStream(url_of(RedisRole.ADMIN, config.redis.url, config.redis.password_dir))
    try:
        yield stream
    finally:
        stream.close()


def delete_from_dead_letters(config: Config, field: str, value: str) -> dict[str, Any]:
    """Delete what `field` says from the dead letters as well, and say what became of it.

    Without a Redis that answers, its letters stay: that is said, not raised.
    """
    from s2t_shared.labels.dead_letters import delete_dead_letters

    if config.redis.url is None:
        return {}
    try:
        with operator_stream(config) as stream:
            deleted = delete_dead_letters(stream, lambda letter: letter.matches(field, value))
    except S2TError as error:
        return {"dead letters": f"not searched: {error}"}
    return {"deleted dead letters": deleted}


def _selection(
    fields: dict[str, str | None], older_than: float | None, all_of_them: bool, must_say: bool
) -> Selection:
    """Whether a letter is meant: all that is said must hold."""
    if older_than is not None and not 0 < older_than < 1e6:
        raise InvalidRequestError("--older-than: must be a number of days above 0")
    said = {field: value for field, value in fields.items() if value is not None}
    if must_say and not said and older_than is None and not all_of_them:
        raise InvalidRequestError(
            "say which: --problem-id, --request-id, --task, --older-than or --all"
        )

    def wanted(letter: DeadLetter) -> bool:
        if older_than is not None and not letter.is_older(older_than * DAY_S):
            return False
        return all(letter.matches(field, value) for field, value in said.items())

    return wanted


def _list(letters: list[DeadLetter], json_out: bool) -> None:
    reasons = Counter(letter.reason for letter in letters)
    if json_out:
        print(json.dumps({"dead_letters": len(letters), "reasons": dict(reasons)}))
        return
    if not letters:
        print("no dead letters")
        return
    table = Table(title=f"{len(letters)} dead letters", title_justify="left")
    table.add_column("letters", justify="right")
    table.add_column("last refused")
    table.add_column("reason")
    for reason, count in reasons.most_common(20):
        last = max(letter.refused_at for letter in letters if letter.reason == reason)
        table.add_row(str(count), date(last), escape(reason[:REASON_WIDTH]))
    wide_console().print(table)
    print("--delete or --requeue, with --all or with which (--help)")


def _delete(stream: LabelStream, letters: list[DeadLetter], yes: bool, json_out: bool) -> None:
    from s2t_shared.labels.dead_letters import delete_dead_letters

    confirm(f"{len(letters)} dead letters", yes)
    meant = {letter.entry.entry_id for letter in letters}
    deleted = delete_dead_letters(stream, lambda letter: letter.entry.entry_id in meant)
    show({"deleted dead letters": deleted}, json_out)


def _requeue(
    stream: LabelStream, letters: list[DeadLetter], config: Config, json_out: bool
) -> None:
    from s2t_shared.labels.dead_letters import requeue
    from s2t_shared.labels.known_models import KnownModels, Models
    from s2t_shared.labels.packed import read_rollout

    readable = []
    known = KnownModels(config.known_models)
    for letter in letters:
        try:
            rollout = read_rollout(letter.text)
        except S2TError:
            continue
        known.add(Models.of(rollout))
        readable.append(letter)
    sent = requeue(stream, readable)
    show({"sent again": sent, "cannot be read": len(letters) - sent}, json_out)
