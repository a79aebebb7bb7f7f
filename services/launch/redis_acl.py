"""The users of Redis: one for each role, with exactly the commands and keys that it needs.

    FOLDER/users.acl                       for the server: aclfile FOLDER/users.acl
    FOLDER/producer, consumer, admin       passwords, one a file, for redis.password_dir
    FOLDER/default                         password of the user who may do all, for people

The passwords are for their owner alone (0600); the ACL file holds hashes only. Needs Redis 7 or
Valkey: older servers know no selectors (in parentheses: commands with their own keys).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from s2t_shared.decode.selection_cache import CACHE_PREFIX
from s2t_shared.errors import ConfigError
from s2t_shared.files import write_atomically
from s2t_shared.labels.stream import DEAD_LETTERS, LABELS
from s2t_shared.redis_url import RedisRole

ACL_FILE = "users.acl"
EVERYTHING = "default"
RULES = {
    RedisRole.PRODUCER: (
        "+ping +select +info +waitaof",
        f"+xadd +xrange ~{LABELS}",
        f"+mget +set ~{CACHE_PREFIX}*",
    ),
    RedisRole.CONSUMER: (
        "+ping +select +multi +exec",
        f"+xgroup|create +xreadgroup +xpending +xclaim +xack +xdel +xlen +xrange ~{LABELS}",
        f"+xadd +xtrim +xlen ~{DEAD_LETTERS}",
    ),
    RedisRole.ADMIN: (
        "+ping +select +info +time +waitaof +bgrewriteaof",
        f"+xadd +xlen ~{LABELS}",
        f"+xrange +xdel +xlen ~{DEAD_LETTERS}",
    ),
}


def write_acl(folder: Path) -> Path:
    """Write the ACL file, and a password for each user that has none yet. Returns the ACL file.

    Raises:
        ConfigError: a file cannot be written, or a password file is empty.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = [_user(EVERYTHING, _password(folder / EVERYTHING), ["~*", "&*", "+@all"])]
        for role, (common, *selectors) in RULES.items():
            rules = [common, *(f"({selector})" for selector in selectors)]
            lines.append(_user(role.value, _password(folder / role.value), rules))
        write_atomically(folder / ACL_FILE, "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(
            f"the folder for Redis users {str(folder)!r} cannot be used: {error.strerror}; give "
            "one that this user can write"
        ) from error
    return folder / ACL_FILE


def _user(name: str, password: str, rules: list[str]) -> str:
    digest = hashlib.sha256(password.encode()).hexdigest()
    return f"user {name} reset on #{digest} {' '.join(rules)}"


def _password(file: Path) -> str:
    """The password in a file, which is made with a new one where there is none."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        password = file.read_text(encoding="utf-8").strip()
        if not password:
            raise ConfigError(f"{str(file)!r} is empty; remove it and try again") from None
        return password
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        password = secrets.token_urlsafe(32)
        stream.write(password + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return password
