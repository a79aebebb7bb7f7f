"""What each role may do in Redis: all that the product does under it, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from s2t_shared.decode.selection_cache import CachedSelector
from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import DEAD_LETTERS, GROUP, LABELS, LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client
from s2t_shared.redis_url import RedisRole
from services.launch.redis_acl import write_acl
from services.launch.redis_server import RedisServer
from tests.decode.test_selection_cache import QUERY, CountingSelector, ask, keys_reach
from tests.helpers.lake import ids_in, names, rollout
from tests.helpers.redis import eventually

DENIED: tuple[tuple[str | int, ...], ...] = (
    ("EVAL", "return 1", 0),
    ("FUNCTION", "LIST"),
    ("SCRIPT", "FLUSH"),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "appendonly", "no"),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("SHUTDOWN", "NOSAVE"),
    ("SWAPDB", 0, 1),
    ("REPLICAOF", "127.0.0.1", 1),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "default", "nopass"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("MONITOR",),
    ("SAVE",),
    ("MODULE", "LIST"),
    ("DEL", LABELS),
    ("EXPIRE", LABELS, 1),
    ("RENAME", LABELS, "other"),
    ("XTRIM", LABELS, "MAXLEN", 0),
    ("XGROUP", "DESTROY", LABELS, GROUP),
    ("SET", LABELS, "x"),
    ("SET", "s2t:other", "x"),
    ("GET", "s2t:other"),
    ("PUBLISH", "channel", "x"),
    ("SORT", LABELS),
)


@pytest.fixture(params=list(RedisRole))
def role(request: pytest.FixtureRequest) -> RedisRole:
    assert isinstance(request.param, RedisRole)
    return request.param


@pytest.fixture
def producer(server: RedisServer) -> Iterator[LabelStream]:
    stream = LabelStream(server.url_of(RedisRole.PRODUCER))
    yield stream
    stream.close()


@pytest.mark.parametrize("command", DENIED, ids=lambda command: "-".join(map(str, command[:2])))
def test_no_role_may_do_what_the_product_does_not(
    command: tuple[str | int, ...], role: RedisRole, server: RedisServer
) -> None:
    """A stolen password of one process must not read all, lose all or run code."""
    with pytest.raises(redis.exceptions.NoPermissionError):
        open_client(server.url_of(role), 2.0).execute_command(*command)


@pytest.mark.parametrize(
    ("role", "command"),
    [
        (RedisRole.PRODUCER, ("XRANGE", DEAD_LETTERS, "-", "+")),
        (RedisRole.PRODUCER, ("XADD", DEAD_LETTERS, "*", "a", "b")),
        (RedisRole.PRODUCER, ("XREADGROUP", "GROUP", GROUP, "c", "STREAMS", LABELS, ">")),
        (RedisRole.PRODUCER, ("XDEL", LABELS, "1-1")),
        (RedisRole.CONSUMER, ("XADD", LABELS, "*", "rollout", "{}")),
        (RedisRole.CONSUMER, ("MGET", "s2t:selection:1")),
        (RedisRole.CONSUMER, ("SET", "s2t:selection:1", "[]")),
        (RedisRole.ADMIN, ("XRANGE", LABELS, "-", "+")),
        (RedisRole.ADMIN, ("SET", "s2t:selection:1", "[]")),
    ],
    ids=lambda value: value.value if isinstance(value, RedisRole) else "-".join(value[:2]),
)
def test_no_role_may_do_what_is_anothers(
    role: RedisRole, command: tuple[str, ...], server: RedisServer
) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        open_client(server.url_of(role), 2.0).execute_command(*command)


def test_labels_go_all_the_way_under_the_roles(
    server: RedisServer, producer: LabelStream, lake: Lake, tmp_path: Path
) -> None:
    writer = LabelWriter(producer, tmp_path / "spool")
    writer.write([rollout(1)]).result(5.0)
    assert writer.writes_to_redis
    writer.close()
    stream = LabelStream(server.url_of(RedisRole.CONSUMER))
    drain = Drain(stream, lake, reclaim_idle_s=0.0)
    producer.append([b"poison"])
    assert drain.run_once() == 2
    assert drain.flush() == 1 and ids_in(lake) == names(1)
    dead = Drain(stream, lake, reclaim_idle_s=0.0)
    producer.append([rollout(2).to_json().encode()])
    dead.run_once()  # reads it, and dies
    Drain(stream, lake, reclaim_idle_s=0.0).run_once()  # takes it over
    counts = LabelStream(server.url_of(RedisRole.ADMIN)).counts()
    assert (counts.rollouts, counts.dead_letters) == (1, 1)


def test_a_spool_is_delivered_by_a_producer(
    server: RedisServer, producer: LabelStream, tmp_path: Path
) -> None:
    """That way asks the server what it has on disk, with commands of its own."""
    writer = LabelWriter(producer, tmp_path / "spool")
    writer._to_spool([rollout(3).to_json().encode()])
    eventually(lambda: not list((tmp_path / "spool").glob("*/*.entries")))
    assert LabelStream(server.url).counts().rollouts == 1
    writer.close()


def test_selections_are_cached_by_a_producer(server: RedisServer, client: redis.Redis) -> None:
    inner = CountingSelector()
    cached = CachedSelector(inner, server.url_of(RedisRole.PRODUCER), lookup_timeout_s=2.0)
    ask(cached, QUERY)
    keys_reach(client, 1)
    assert ask(cached, QUERY)[0].cached and inner.asked == 1
    cached.close()


def test_a_role_that_lacks_a_right_is_told_where_it_comes_from(server: RedisServer) -> None:
    with pytest.raises(StoreError, match="No permissions.*s2t redis-acl"):
        LabelStream(server.url_of(RedisRole.CONSUMER)).append([b"{}"])


@pytest.mark.parametrize("wrong", ["readable", "a link", "another's"])
def test_a_password_that_others_may_know_is_refused(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever put a file there first chose Redis's password."""
    write_acl(tmp_path)
    password = tmp_path / "producer"
    assert password.stat().st_mode & 0o777 == 0o600
    if wrong == "readable":
        password.chmod(0o640)
    elif wrong == "a link":
        password.rename(tmp_path / "elsewhere")
        password.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(os, "getuid", lambda: password.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="password in it; remove it and try again"):
        write_acl(tmp_path)


@pytest.mark.parametrize("refusal", ["no password", "wrong password"])
def test_labels_wait_in_the_spool_while_redis_refuses_the_password(
    refusal: str, server: RedisServer, tmp_path: Path
) -> None:
    """A password that was changed under a running service must not lose labels."""
    url = str(server.settings()["url"])
    if refusal == "wrong password":
        url = url.replace("redis://", "redis://producer:wrong@")
    writer = LabelWriter(LabelStream(url), tmp_path / "spool")
    writer.write([rollout(1)]).result(5.0)
    assert not writer.writes_to_redis and writer.dropped == {}
    writer.close()
    healed = LabelWriter(LabelStream(server.url_of(RedisRole.PRODUCER)), tmp_path / "spool")
    eventually(lambda: LabelStream(server.url).counts().rollouts == 1)
    healed.close()
