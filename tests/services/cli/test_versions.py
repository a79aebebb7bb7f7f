"""`s2t versions`: the verbs, their output and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2t_shared.errors import VersionError
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.gate import Evidence, judge
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.registry import Registry
from services.cli.versions import versions_app
from tests.helpers.versions import BINS, WEIGHTS, paired, publish


@pytest.fixture(scope="module")
def runtime(models: dict[str, Path]) -> ModelRuntime:
    return ModelRuntime.load(str(models["slm"]))


@pytest.fixture
def versions(tmp_path: Path) -> LiveVersions:
    return LiveVersions(tmp_path / "versions")


@pytest.fixture
def registry(versions: LiveVersions) -> Registry:
    return versions.registry


def s2t_versions(registry: Registry, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(versions_app, [*arguments, "--data-dir", str(registry.root.parent)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_verbs(
    versions: LiveVersions,
    registry: Registry,
    runtime: ModelRuntime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    commands = [c for c in versions_app.registered_commands if c.callback]
    names = {c.name or c.callback.__name__ for c in commands}
    # Scripts rely on them.
    assert names == {"list", "show", "verify", "diff", "promote", "rollback", "export"}
    assert "no versions" in s2t_versions(registry, "list")[1]
    a = publish(registry, runtime)
    b = publish(
        registry,
        runtime,
        seed=1,
        snapshot="snap2",
        metrics={"agree_at_1": 0.832, "slm_agree_at_1": 0.7},
    )
    with pytest.raises(VersionError, match="no version is live"):
        s2t_versions(registry, "show", "live")
    assert s2t_versions(registry, "promote", a) == (0, f"live: {a}\n")
    assert "10% of the requests" in s2t_versions(registry, "promote", b, "--share", "0.1")[1]
    status, text = s2t_versions(registry, "list")
    assert status == 0
    assert "90%" in text
    assert "10%" in text
    assert "0.832" in text
    rows = json.loads(s2t_versions(registry, "list", "--json")[1])
    assert [(r["version"], r["live"], r["share"]) for r in rows] == [
        (a, True, 0.9),
        (b, False, 0.1),
    ]
    found = json.loads(s2t_versions(registry, "diff", "live", b, "--json")[1])
    changed = {(c["section"], c["name"]): c["difference"] for c in found}
    assert changed[("metrics", "agree_at_1")] == pytest.approx(0.02)
    assert ("data", "snapshot") in changed
    assert ("files", WEIGHTS) in changed
    assert ("settings", "kind") not in changed
    assert "+0.02" in s2t_versions(registry, "diff", a, b)[1]
    verdict = judge(Evidence(labels=paired(200, 6, 0.6, 0.7)), against=a)
    versions.record("gate", b, **verdict.as_json())
    assert "gate: refused: held-out Agree@1" in s2t_versions(registry, "show", b)[1]
    assert s2t_versions(registry, "rollback") == (0, f"live: {a}\n")
    assert s2t_versions(registry, "verify")[0] == 0
    (registry.folder(b) / WEIGHTS).write_bytes(b"x")
    status, text = s2t_versions(registry, "verify", "all")
    assert status == 1
    assert f"ok  {a}" in text
    assert f"FAIL  {b}: " in text
    assert "hash" in text
    assert s2t_versions(registry, "export", a, str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / BINS).is_file()


def test_verify_with_the_model_and_export_merged(
    registry: Registry,
    runtime: ModelRuntime,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S2T_SLM__MODEL", str(models["slm"]))
    version = publish(registry, runtime)
    status, text = s2t_versions(registry, "verify", version, "--model")
    assert status == 1 and "another tokenizer" in text  # "tok" is nobody's digest
    status, text = s2t_versions(registry, "export", version, str(tmp_path / "m"), "--merged")
    assert status == 0
    assert "reserved bins" in text
    assert (tmp_path / "m/model.safetensors").is_file()
