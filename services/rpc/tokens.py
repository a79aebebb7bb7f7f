"""Who may do what: bearer tokens and their roles, from one file.

Knows nothing of gRPC or HTTP: whoever takes calls asks `Tokens.role_of`.

    # security.token_file: one token a line, at least 16 bytes; several of a role are all valid
    generate: 5f2b...
    generate,admin: 90ac...
    score: 11d0...

The file is read again when it changes. To rotate a token, add the new one below the old one, and
remove the old one when every process and client has the new one. A file that is one token, without
a role, gives it every role.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from s2t_shared.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from services.rpc.reloading import Reloaded, read_bytes

MIN_TOKEN_BYTES = 16
SCHEME = "bearer"


class Role(str, Enum):
    """What a token is for."""

    GENERATE = "generate"  # answers
    SCORE = "score"  # proposers to selectors
    ADMIN = "admin"  # versions, labels
    METRICS = "metrics"  # what Prometheus reads


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True)
class Entry:
    """A token of the file. digest: SHA-256, so that comparing tells nothing of a token's length."""

    token: str
    roles: frozenset[Role]
    digest: bytes

    def __repr__(self) -> str:
        return f"Entry({sorted(self.roles)})"


class Tokens:
    """The tokens of one file, as it is now."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError: the file cannot be read, or has no token or a wrong line."""
        self._file = file
        self._entries = Reloaded([file], lambda: read_tokens(file))

    def role_of(self, authorization: str | bytes) -> frozenset[Role]:
        """The roles of who sends `Authorization: Bearer TOKEN`; none: no valid token.

        Takes the same time for every token, right or wrong.
        """
        given = authorization.encode() if isinstance(authorization, str) else authorization
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != SCHEME.encode():
            return frozenset()
        digest = hashlib.sha256(token.strip()).digest()
        roles: frozenset[Role] = frozenset()
        for entry in self._entries.value:  # every one: none is faster than another
            is_it = hmac.compare_digest(digest, entry.digest)
            roles |= entry.roles if is_it else frozenset()
        return roles

    def check(self, authorization: str | bytes, allowed: frozenset[Role]) -> None:
        """Check who sends `authorization`.

        Raises:
            UnauthenticatedError: no valid token.
            PermissionDeniedError: it has none of the roles.
        """
        roles = self.role_of(authorization)
        if not roles:
            raise UnauthenticatedError(
                "no valid token: send metadata 'authorization: Bearer TOKEN'"
            )
        if not roles & allowed:
            needed = " or ".join(sorted(role.value for role in allowed)) or "another"
            raise PermissionDeniedError(f"this token's role does not allow it: {needed} is needed")

    def token_for(self, role: Role) -> str:
        """The first token with a role: what our own calls carry.

        Raises:
            ConfigError: the file has none.
        """
        for entry in self._entries.value:
            if role in entry.roles:
                return entry.token
        raise ConfigError(
            f"token file {str(self._file)!r}: no token has the role {role.value}; add a line "
            f"'{role.value}: TOKEN' (openssl rand -hex 32 makes a token)"
        )


def read_tokens(file: Path) -> tuple[Entry, ...]:
    """The tokens in `file`, in its order.

    Raises:
        ConfigError: the file cannot be read, or has no token or a wrong line.
    """
    where = f"token file {str(file)!r}"
    try:
        content = read_bytes(file)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return parse_tokens(content, file)


def parse_tokens(content: bytes, file: Path) -> tuple[Entry, ...]:
    """The tokens in what `file` holds.

    Raises:
        ConfigError: there is no token, or a wrong line.
    """
    where = f"token file {str(file)!r}"
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: only printable ASCII may stand in it") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    numbered = [(number, line) for number, line in numbered if line and line[0] != "#"]
    if not numbered:
        raise ConfigError(f"{where}: there is no token in it; make one: {_recipe(file)}")
    is_one_token = len(numbered) == 1
    return tuple(
        _read_line(f"{where}, line {number}", line, is_one_token, file) for number, line in numbered
    )


def _read_line(where: str, line: str, is_one_token: bool, file: Path) -> Entry:
    named, colon, token = line.partition(":")
    if not colon and is_one_token:
        return _entry(where, line, ALL_ROLES, file)
    names = [name.strip() for name in named.split(",")]
    known = [role.value for role in Role]
    if not colon or not set(names) <= set(known):  # a misspelt role must not be part of a token
        raise ConfigError(
            f"{where}: a line is 'ROLE: TOKEN' or 'ROLE,ROLE: TOKEN'; roles are {', '.join(known)}"
        )
    return _entry(where, token.strip(), frozenset(map(Role, names)), file)


def _entry(where: str, token: str, roles: frozenset[Role], file: Path) -> Entry:
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"{where}: its token has {len(token)} bytes, at least {MIN_TOKEN_BYTES} are needed; "
            f"make one: {_recipe(file)}"
        )
    if not all("\x21" <= character <= "\x7e" for character in token):
        raise ConfigError(
            f"{where}: a token is one word of printable ASCII; make one: {_recipe(file)}"
        )
    return Entry(token, roles, hashlib.sha256(token.encode()).digest())


def _recipe(file: Path) -> str:
    return f'echo "generate,score,admin: $(openssl rand -hex 32)" > {file}'
