"""What `s2t doctor` looks at in Redis: what it keeps, what fits, who gets in, its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from s2t_shared.config import LOOPBACK, Config
from s2t_shared.errors import StoreError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.redis_connection import open_client, redis_errors
from s2t_shared.redis_url import RedisRole, place_of, url_of, without_password
from services.launch.findings import Finding, fail, ok, warn
from services.launch.redis_server import check_login

TIMEOUT_S = 3.0
CLOCK_WARN_S = 1.0
CLOCK_FAIL_S = 60.0
FULL_SHARE = 0.8
WAITAOF_SINCE = (7, 2)
MIB = 1 << 20


@dataclass(frozen=True)
class ServerFacts:
    """What a Redis says of itself. clock_s: how far its clock is ahead of ours."""

    version: str
    info: dict[str, Any]
    clock_s: float

    @property
    def program(self) -> str:
        name = "Valkey" if "valkey_version" in self.info else "Redis"
        return f"{name} {self.info.get('valkey_version', self.version)}"

    @property
    def confirms(self) -> bool:
        """Whether it has WAITAOF."""
        major, minor = (int(part) for part in self.version.split(".")[:2])
        return (major, minor) >= WAITAOF_SINCE


def ask_server(url: str) -> ServerFacts:
    """What the server at `url` says.

    Raises:
        StoreError: it does not answer, or refuses.
    """
    client = open_client(url, TIMEOUT_S)
    with redis_errors(place_of(url)):
        client.ping()  # the connection is made
        asked = time.time()
        seconds, micros = client.time()
        answered = time.time()
        info: dict[str, Any] = client.info()
        client.close()
    clock_s = seconds + micros / 1e6 - (asked + answered) / 2
    return ServerFacts(str(info["redis_version"]), info, clock_s)


def check_redis(config: Config) -> Iterator[Finding]:
    """The checks of the Redis that the configuration names.

    Raises:
        StoreError: it does not answer, or refuses.
        ConfigError: a role's password cannot be read.
    """
    url = str(config.redis.url)
    admin = url_of(RedisRole.ADMIN, url, config.redis.password_dir)
    facts = ask_server(admin)
    yield _version(facts, place_of(url))
    yield _persistence(facts.info)
    yield _memory(facts.info)
    yield _access(url, config.redis.password_dir)
    yield _clock(facts.clock_s)
    yield _labels(LabelStream(admin, TIMEOUT_S))


def _version(facts: ServerFacts, place: str) -> Finding:
    if facts.confirms:
        return ok("redis", f"{facts.program} at {place}")
    return warn(
        "redis",
        f"{facts.program} at {place} has no WAITAOF: every label goes by the spool and waits there",
        "use Redis 7.2 or later, or Valkey",
    )


def _persistence(info: dict[str, Any]) -> Finding:
    what = "redis persistence"
    if not info.get("aof_enabled"):
        return warn(
            what,
            "no append-only file: after a restart labels come again from spools only",
            "appendonly yes, appendfsync everysec",
        )
    for name in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(name, "ok") != "ok":
            return fail(
                what,
                f"{name}: {info[name]}: the server cannot write its append-only file",
                "free space on its disk, see its log",
            )
    return ok(what, "append-only file, last write well")


def _memory(info: dict[str, Any]) -> Finding:
    what = "redis memory"
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy = str(info.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        return fail(
            what,
            f"maxmemory-policy {policy} removes labels when memory is short",
            "maxmemory-policy volatile-lru",
        )
    if not most:
        return warn(
            what,
            f"{used / MIB:.0f} MiB used, no limit: labels that wait can fill the machine",
            "maxmemory 1gb (or what it may have), maxmemory-policy volatile-lru",
        )
    detail = f"{used / MIB:.0f} of {most / MIB:.0f} MiB used, {policy}"
    if policy == "noeviction":
        return warn(
            what,
            f"{detail}: cached selections can keep labels out",
            "maxmemory-policy volatile-lru: selections expire, labels do not",
        )
    if used > FULL_SHARE * most:
        return warn(what, detail, "see that labels reach the lake (s2t labels stats), or raise it")
    return ok(what, detail)


def _access(url: str, password_dir: Path | None) -> Finding:
    what = "redis access"
    parts = urlsplit(url)
    is_near = parts.scheme == "unix" or parts.hostname in LOOPBACK
    if _is_open(url):
        text = "answers without a password: whoever reaches it reads users' tokens"
        mend = "s2t redis-acl FOLDER, then aclfile there and redis.password_dir here"
        return warn(what, text, mend) if is_near else fail(what, text, mend)
    if not is_near and parts.scheme == "redis":
        return warn(
            what,
            "the password and users' tokens cross the network in clear text",
            "a rediss:// URL (TLS), unless the network is yours alone",
        )
    if password_dir is None:
        return ok(what, "wants a password; one user for all processes")
    roles = [role for role in RedisRole if (password_dir / role.value).exists()]
    for role in roles:
        check_login(url_of(role, url, password_dir))
    return ok(what, f"wants a password; takes {', '.join(role.value for role in roles)}")


def _is_open(url: str) -> bool:
    try:
        check_login(without_password(url))
    except StoreError:
        return False
    return True


def _clock(ahead_s: float) -> Finding:
    detail = f"Redis' clock and this node's differ by {abs(ahead_s):.2f} s"
    mend = "synchronise the nodes (chrony, ntpd): deletions and ages go by time"
    if abs(ahead_s) > CLOCK_FAIL_S:
        return fail("clock", detail, mend)
    return warn("clock", detail, mend) if abs(ahead_s) > CLOCK_WARN_S else ok("clock", detail)


def _labels(stream: LabelStream) -> Finding:
    counts = stream.counts()
    stream.close()
    detail = f"{counts.rollouts} rollouts on their way, {counts.dead_letters} refused"
    if counts.dead_letters:
        return warn("labels", detail, "s2t labels dead says why")
    return ok("labels", detail)
