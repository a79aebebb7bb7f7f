"""The contract: generated code is current, protos are linted, errors and enums are all on it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from s2t_shared import errors
from s2t_shared.types import (
    ChosenBy,
    Mode,
    Proposals,
    Trigger,
)
from services.rpc import wire
from services.rpc.wire import generation

ROOT = Path(__file__).parent.parent


def test_generated_code_is_current(tmp_path: Path) -> None:
    """protos/ changed without `make protos` would ship a contract nobody reads."""
    protos = sorted((ROOT / "protos/s2t/v1").glob("*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-Is2t_shared/pb/v1={ROOT / 'protos/s2t/v1'}",
            f"--python_out={tmp_path}",
            f"--pyi_out={tmp_path}",
            f"--grpc_python_out={tmp_path}",
            *map(str, protos),
        ],
        check=True,
    )
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*_pb2*"))
    assert len(made) == 3 * len(protos)
    for file in made:
        assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes(), (
            f"{file} is stale: run make protos"
        )


def test_proto_lint() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run(
        [str(buf), "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    buf = Path(sys.executable).parent / "buf"
    command = [str(buf), "breaking", "--against", str(ROOT / "protos/baseline.binpb")]
    return subprocess.run(command, cwd=protos, capture_output=True, text=True, check=False)


def test_protos_break_no_client_of_the_last_release(tmp_path: Path) -> None:
    """R15: a field that is taken away, renumbered or given another type. The check itself is
    checked: such a change is found."""
    done = breaking(ROOT / "protos")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    file = tmp_path / "protos/s2t/v1/selection.proto"
    text = file.read_text(encoding="utf-8")
    assert "uint32 vocab_size = 6;" in text
    file.write_text(text.replace("uint32 vocab_size = 6;", "string vocab_size = 6;"), "utf-8")
    assert "vocab_size" in breaking(tmp_path / "protos").stdout


def all_errors(kind: type[errors.S2TError] = errors.S2TError) -> list[type[errors.S2TError]]:
    found = [d for child in kind.__subclasses__() for d in [child, *all_errors(child)]]
    return [e for e in found if e.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda k: k.__name__)
def test_every_error_has_a_status(kind: type[errors.S2TError]) -> None:
    """A new error class without a status would reach clients as INTERNAL."""
    assert kind in wire.STATUS
    assert wire.status_of(kind("x")) is wire.STATUS[kind] is not grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("kind", all_errors(), ids=lambda k: k.__name__)
def test_an_error_survives_the_way_between_processes(kind: type[errors.S2TError]) -> None:
    """Ray pickles what a replica raises; copying takes the same way."""
    error = copy.copy(kind("what", field="samples", retry_after_s=2.5))
    assert (str(error), error.field, error.retry_after_s) == ("what", "samples", 2.5)


def test_every_enum_member_is_on_the_wire() -> None:
    assert set(generation.MODES.values()) == set(Mode)
    assert set(generation.TRIGGERS.values()) == set(Trigger)
    assert set(generation.PROPOSALS.values()) == set(Proposals)
    assert set(generation.CHOSEN_BY.values()) == set(ChosenBy)
