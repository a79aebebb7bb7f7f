"""The token file: its roles, its rotation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from services.rpc import reloading
from services.rpc.tokens import ALL_ROLES, Role, Tokens

A, B, C = ("a" * 16, "b" * 16, "c:" * 8)
NONE: frozenset[Role] = frozenset()


def tokens(folder: Path, text: str) -> Tokens:
    (folder / "tokens").write_text(text, encoding="utf-8")
    return Tokens(folder / "tokens")


def roles(given: Tokens, token: str) -> frozenset[Role]:
    return given.role_of(f"Bearer {token}")


def test_each_token_has_its_lines_roles(tmp_path: Path) -> None:
    """Several tokens of one role, several roles of one token; a colon may be part of a token."""
    given = tokens(tmp_path, f"# ours\n\n generate: {A}\ngenerate , admin:{B}\nscore:{C}\n")
    assert roles(given, A) == {Role.GENERATE}
    assert roles(given, B) == {Role.GENERATE, Role.ADMIN}
    assert roles(given, C) == {Role.SCORE}
    assert given.token_for(Role.GENERATE) == A and given.token_for(Role.ADMIN) == B


def test_what_is_no_token_has_no_role(tmp_path: Path) -> None:
    given = tokens(tmp_path, f"admin: {A}\n")
    for authorization in ("", A, f"Basic {A}", "Bearer", "Bearer ", f"Bearer {A[:-1]}", "\x00\xff"):
        assert given.role_of(authorization) == NONE, authorization
    for line in (f"Bearer admin: {A}", f"Bearer {A}x", b"\xff\xfe"):
        assert given.role_of(line) == NONE
    assert given.role_of(f"bearer {A}".encode()) == {Role.ADMIN}  # a scheme has no case


def test_a_file_that_is_one_token_gives_every_role(tmp_path: Path) -> None:
    """As all deployments had it before there were roles."""
    assert roles(tokens(tmp_path, f"{A}\n"), A) == ALL_ROLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"generat: {A}", "roles are generate, score, admin"),
        (f"generate: {A}\n{B}", "line 2: a line is 'ROLE: TOKEN'"),
        (f"{A}\n{B}", "line 1: a line is"),
        (f": {A}", "a line is"),
        ("generate: short", "5 bytes, at least 16"),
        (f"generate: {A} {B}", "one word"),
        ("# nothing", "no token in it"),
    ],
)
def test_a_wrong_line_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """A misspelt role must not become part of a token that may do everything."""
    with pytest.raises(ConfigError, match=message) as refused:
        tokens(tmp_path, text)
    assert A not in str(refused.value) and B not in str(refused.value)


def test_a_missing_role_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add a line 'score: TOKEN'"):
        tokens(tmp_path, f"admin: {A}").token_for(Role.SCORE)


def test_tokens_rotate_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are valid while both stand there. A file that is emptied or half written by accident
    neither opens the service nor locks everybody out."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    given = tokens(tmp_path, f"generate: {A}")
    tokens(tmp_path, f"generate: {A}\ngenerate: {B}")
    assert roles(given, A) == roles(given, B) == {Role.GENERATE}
    tokens(tmp_path, f"generate: {B}")
    assert roles(given, A) == NONE and given.token_for(Role.GENERATE) == B
    (tmp_path / "tokens").write_text("", encoding="utf-8")
    assert roles(given, B) == {Role.GENERATE} and roles(given, "") == NONE
    assert roles(given, B) and caplog.text.count("stays in force") == 1, "said once"
    (tmp_path / "tokens").unlink()
    assert roles(given, B) == {Role.GENERATE}
    tokens(tmp_path, f"admin: {B}")
    assert roles(given, B) == {Role.ADMIN}


def test_tokens_of_a_file_that_is_gone_are_valid_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who removed the file to lock everybody out locked out nobody, until a restart. One that is
    replaced is gone for a moment only."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    given = tokens(tmp_path, f"generate: {A}")
    (tmp_path / "tokens").unlink()
    assert roles(given, A) == {Role.GENERATE}
    tokens(tmp_path, f"generate: {A}")
    assert roles(given, A) == {Role.GENERATE}
    monkeypatch.setattr(reloading, "GONE_S", 0.0)
    (tmp_path / "tokens").unlink()
    assert roles(given, A) == roles(given, "") == NONE
    assert roles(given, A) == NONE and caplog.text.count("no longer in force") == 1, "said once"
    with pytest.raises(ConfigError, match="no token has the role"):
        given.token_for(Role.GENERATE)
    tokens(tmp_path, f"generate: {A}")
    assert roles(given, A) == {Role.GENERATE}


def test_a_mounted_secret_changes_by_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes writes a new folder and moves a symbolic link to it."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    for name, token in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").write_text(f"generate: {token}", encoding="utf-8")
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "one")
    given = Tokens(link / "tokens")
    (tmp_path / "new").symlink_to(tmp_path / "two")
    (tmp_path / "new").rename(link)
    assert roles(given, A) == NONE and roles(given, B) == {Role.GENERATE}


def test_a_check_says_who_is_missing(tmp_path: Path) -> None:
    given = tokens(tmp_path, f"generate: {A}")
    given.check(f"Bearer {A}", frozenset({Role.GENERATE, Role.ADMIN}))
    with pytest.raises(UnauthenticatedError, match="authorization: Bearer"):
        given.check(f"Bearer {B}", ALL_ROLES)
    with pytest.raises(PermissionDeniedError, match="admin or score is needed"):
        given.check(f"Bearer {A}", frozenset({Role.SCORE, Role.ADMIN}))
    with pytest.raises(PermissionDeniedError):
        given.check(f"Bearer {A}", NONE)
