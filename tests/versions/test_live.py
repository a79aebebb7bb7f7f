"""The live pointer: promotion, canary, rollback, damage; and the history of events."""

from __future__ import annotations

import pytest

from s2t_shared.errors import VersionError
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.gate import Verdict
from s2t_shared.versions.live import NOTHING_LIVE, Canary, Live, LiveVersions, open_version
from tests.helpers.versions import WEIGHTS, publish


def test_promote_and_roll_back(versions: LiveVersions, runtime: ModelRuntime) -> None:
    assert versions.live() is None
    first = publish(versions.registry, runtime)
    second = publish(versions.registry, runtime, seed=1)
    versions.promote(first)
    versions.promote(second)
    assert versions.live() == second
    assert versions.rollback() == first
    assert versions.live() == first
    assert versions.rollback() is None
    assert versions.live() is None
    with pytest.raises(VersionError, match="nothing to roll back"):
        versions.rollback()


def test_a_version_is_opened_by_name_as_live_or_by_folder(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    version = publish(versions.registry, runtime)
    with pytest.raises(VersionError, match="no version is live"):
        open_version("live", versions.root, runtime, "tok")
    versions.promote(version)
    for name in (version, "live", str(versions.registry.folder(version))):
        assert open_version(name, versions.root, runtime, "tok").version == version


def test_the_same_request_gets_the_same_version() -> None:
    """The canary gets its share of the ids, and ids that got it keep it when the share grows."""
    ids = [f"request-{i}" for i in range(4000)]
    narrow = Live(history=("a",), canary=Canary(version="b", share=0.2))
    wide = Live(history=("a",), canary=Canary(version="b", share=0.6))
    chosen = [narrow.choose(i) for i in ids]
    assert chosen == [narrow.choose(i) for i in ids]
    assert 0.17 < chosen.count("b") / len(ids) < 0.23
    assert set(chosen) == {"a", "b"}
    assert all(wide.choose(i) == "b" for i in ids if narrow.choose(i) == "b")
    assert Live(history=("a",)).choose("x") == "a"
    assert NOTHING_LIVE.choose("x") is None


@pytest.mark.parametrize(
    "content",
    [
        "garbage",
        "[]",
        "{}",
        '{"history": 3}',
        '{"history": [], "canary": {"share": 1}}',
        '{"history": ["a"], "canary": {"version": "b", "share": 7}}',
    ],
)
def test_damaged_live_pointer_is_an_error_and_can_be_mended(
    versions: LiveVersions, runtime: ModelRuntime, content: str
) -> None:
    """Rolling back is refused; promoting again mends it."""
    version = publish(versions.registry, runtime)
    versions.promote(version)
    (versions.root / "LIVE").write_text(content, encoding="utf-8")
    with pytest.raises(VersionError, match="LIVE file is damaged"):
        versions.live()
    with pytest.raises(VersionError, match="LIVE file is damaged"):
        versions.rollback()
    assert versions.state(if_damaged=NOTHING_LIVE) == NOTHING_LIVE
    versions.promote(version)
    assert versions.live() == version


def test_canary_and_rollback(versions: LiveVersions, runtime: ModelRuntime) -> None:
    a, b, c = (publish(versions.registry, runtime, seed=i) for i in range(3))
    with pytest.raises(VersionError, match="no version is live"):
        versions.promote(a, 0.1)
    for share in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(VersionError, match="above 0"):
            versions.promote(a, share)
    versions.promote(a)
    with pytest.raises(VersionError, match="its own canary"):
        versions.promote(a, 0.5)
    versions.promote(b, 0.1)
    state = versions.state()
    assert (state.version, state.canary) == (a, Canary(version=b, share=0.1))
    assert [state.share(v) for v in (a, b, c)] == [0.9, 0.1, 0.0]
    assert versions.rollback() == a and versions.state().canary is None  # first ends the canary
    versions.promote(b, 0.1)
    versions.promote(b)  # the canary goes fully live
    assert versions.state().canary is None
    assert versions.live() == b
    versions.promote(c, 0.5)
    versions.promote(b)  # promoting what is live ends the canary too
    assert versions.state().canary is None
    assert versions.state().history == (a, b)
    assert versions.rollback() == a


def test_a_pointer_that_cannot_be_read_is_not_started_anew(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    """Storage that fails for a moment says nothing about the file's content: what was live is not
    forgotten."""
    a = publish(versions.registry, runtime)
    b = publish(versions.registry, runtime, seed=1)
    versions.promote(a)
    pointer = versions.root / "LIVE"
    pointer.rename(versions.root / "kept")
    pointer.mkdir()  # reading it is an OSError, for root too
    for call in (
        versions.state,
        versions.live,
        versions.rollback,
        lambda: versions.promote(b),
        lambda: versions.promote(b, 0.5),
        lambda: versions.state(if_damaged=NOTHING_LIVE),
    ):
        with pytest.raises(VersionError, match="cannot be read"):
            call()
    pointer.rmdir()
    (versions.root / "kept").rename(pointer)
    versions.promote(b)
    assert versions.state().history == (a, b)


def test_rollback_to_a_damaged_version_is_refused(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    a = publish(versions.registry, runtime)
    b = publish(versions.registry, runtime, seed=1)
    versions.promote(a)
    versions.promote(b)
    (versions.registry.folder(a) / WEIGHTS).write_bytes(b"x")
    with pytest.raises(VersionError, match="hash"):
        versions.rollback()
    assert versions.live() == b


def test_half_a_line_of_a_dead_writer_hides_nothing(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    version = publish(versions.registry, runtime)
    verdict = Verdict(False, ("because",), {"n": 1.0})
    versions.record("gate", version, **verdict.as_json())
    with (versions.root / "promotions.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"at": 1, "ev')
    versions.promote(version)
    assert [(e["event"], e.get("reasons")) for e in versions.events(version)] == [
        ("gate", ["because"]),
        ("live", None),
    ]
