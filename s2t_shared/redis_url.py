"""URLs of Redis: who logs in, what may be shown.

Opens no connection. What a role may do is in `services.launch.redis_acl`.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from s2t_shared.errors import ConfigError


class RedisRole(str, Enum):
    """Who a process is to Redis; also the name of its ACL user."""

    PRODUCER = "producer"  # a proposer: appends labels, keeps the cache of selections
    CONSUMER = "consumer"  # a gateway: reads labels and acknowledges them
    ADMIN = "admin"  # the operator's verbs: dead letters, doctor


def url_of(role: RedisRole, url: str, password_dir: Path | None) -> str:
    """The URL with which a process of `role` logs in.

    password_dir: holds one file for each role, with its password; None: `url` says all.

    Raises:
        ConfigError: the role's file cannot be read or is empty.
    """
    if password_dir is None:
        return url
    file = password_dir / role.value
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"redis.password_dir: {str(file)!r} cannot be read ({reason}); make the files with "
            "`s2t redis-acl`, and let this user read the one of its role"
        ) from None
    if not password:
        raise ConfigError(f"redis.password_dir: {str(file)!r} is empty; remove it and make it anew")
    scheme, _, rest = without_password(url).partition("://")
    return f"{scheme}://{role.value}:{quote(password, safe='')}@{rest}"


def has_password(url: str) -> bool:
    return without_password(url) != url


def without_password(url: str) -> str:
    """The URL without user and password, wherever in it they are."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url.rpartition("@")[2]
    body, _, query = rest.partition("?")
    if scheme == "unix":
        path = body[body.index("/") :] if "/" in body else body
    else:
        path = body.rpartition("@")[2]  # of a malformed URL too: a "/" in the password is an error
    options = parse_qsl(query, keep_blank_values=True)
    shown = [(name, value) for name, value in options if name not in ("username", "password")]
    return f"{scheme}://{path}{'?' if shown else ''}{urlencode(shown, safe='/:')}"


def place_of(url: str) -> str:
    """host:port (or the socket's path) of a Redis URL, never its password."""
    try:
        parts = urlsplit(url)
        return (
            parts.path
            if parts.scheme == "unix"
            else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
        )
    except ValueError:
        return "the configured URL"
