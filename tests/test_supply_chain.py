"""What is installed with the project, and what the project brings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# What `make install` installs. The other extras (object stores, vLLM) are not pinned.
PINNED_EXTRAS = ("serve", "bench", "eval", "hub", "dev")
PARTS = ("pyproject.toml", "README.md", "LICENSE", "s2t_shared", "services", "cluster")
SECRET = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.partition("==") for line in lines if line and line[0] != "#")
    return {canonicalize_name(name): version for name, _, version in pinned}


def test_every_package_is_pinned() -> None:
    """S11. What is installed today must be what was tested, down to what others bring along."""
    found = constraints()
    assert all(found.values()), "a line without =="
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    wanted += [need for name in PINNED_EXTRAS for need in extras[name]]
    for need in map(Requirement, wanted):
        if need.name != "s2t":
            version = found[canonicalize_name(need.name)]
            assert need.specifier.contains(version, prereleases=True), f"{need}, and {version}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built of a copy in which an operator has made his secrets."""
    pytest.importorskip("setuptools", reason="the wheel is built with what is installed")
    copy = tmp_path_factory.mktemp("source")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, symlinks=True)
        else:
            shutil.copy(source, copy / part)
    for folder in ("cluster/secrets", "cluster/docker/secrets/redis", "cluster/secrets-authority"):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "tls.key").write_text("-----BEGIN PRIVATE KEY-----\n")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(copy / "dist"), str(copy)], check=True, timeout=300)
    (file,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_brings_no_secrets_and_no_tests(wheel: zipfile.ZipFile) -> None:
    """S11. `services/launch/cluster` is a folder that operators work in: what they make there must
    not be published."""
    names = wheel.namelist()
    assert "services/launch/cluster/README.md" in names and "services/client.py" in names
    assert "services/evaluation/page/plot.css" in names
    assert not any("evaluation/reports" in name for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"s2t_shared", "services"}
    for name in names:
        assert not SECRET.search(wheel.read(name)), name
        assert "secrets" not in Path(name).parts and "tests" not in Path(name).parts, name
