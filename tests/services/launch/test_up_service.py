"""The laptop's first ten minutes of `cluster/README.md`, run as they stand, and an upgrade between:
what is not changed keeps its process. With a real Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from services.launch.cluster_files import CLUSTER_FILES
from services.launch.service_record import read_record

pytestmark = [pytest.mark.service, pytest.mark.faults]
ROOT = Path(__file__).parent.parent.parent.parent
README = (CLUSTER_FILES / "README.md").read_text(encoding="utf-8")
ROLES = ("Gateway", "ProposerReplica", "SelectorReplica")


def laptop_commands() -> list[str]:
    block = re.search(r"## The first ten minutes: a laptop\n+```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def replicas(holder: int) -> dict[str, int]:
    """Pids of the replicas below the process that holds the service."""
    found = {}
    for process in psutil.Process(holder).children(recursive=True):
        for role in ROLES:
            if f":{role}" in process.name() or any(f":{role}" in a for a in process.cmdline()):
                found[role] = process.pid
    return found


def test_the_laptop_page(tmp_path: Path) -> None:
    run("s2t init cluster cluster", tmp_path)
    up, ask, status, down = laptop_commands()
    began = time.monotonic()
    run(up, tmp_path)
    print(f"s2t up: {time.monotonic() - began:.0f} s")
    assert " buys " in run(ask, tmp_path)
    print(f"to the first answer: {time.monotonic() - began:.0f} s")
    assert "RUNNING at 127.0.0.1:50051" in run(status, tmp_path)

    record = read_record(tmp_path / "s2t-data")
    assert record is not None
    before = replicas(record.pid)
    assert set(before) == set(ROLES)
    changed = f"S2T_DEFAULTS__MAX_NEW_TOKENS=32 {up}"
    assert "changed: defaults.max_new_tokens from 64 to 32" in run(changed, tmp_path)
    after = replicas(record.pid)
    assert {role for role in ROLES if after[role] != before[role]} == {"Gateway"}

    everything = psutil.Process(record.pid).children(recursive=True)
    run(down, tmp_path)
    holder = [psutil.Process(record.pid)] if psutil.pid_exists(record.pid) else []
    # Nobody may have heard of its end yet: it was left running.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in holder)
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert not alive
