"""The laptop's first ten minutes of `cluster/README.md`, run as they stand, and an upgrade between:
what is not changed keeps its process. With a real Ray."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from services.launch.service_record import read_record
from tests.helpers.laptop_page import laptop_commands, run

pytestmark = [pytest.mark.service, pytest.mark.faults]
ROLES = ("Gateway", "ProposerReplica", "SelectorReplica")


def replicas(holder: int) -> dict[str, int]:
    """Pids of the replicas below the process that holds the service."""
    found = {}
    for process in psutil.Process(holder).children(recursive=True):
        for role in ROLES:
            if f":{role}" in process.name() or any(f":{role}" in a for a in process.cmdline()):
                found[role] = process.pid
    return found


def test_the_laptop_page(up: Path) -> None:
    start, ask, status, down = laptop_commands()
    assert " buys " in run(ask, up)
    assert "RUNNING at 127.0.0.1:50051" in run(status, up)

    record = read_record(up / "s2t-data")
    assert record is not None
    before = replicas(record.pid)
    assert set(before) == set(ROLES)
    changed = f"S2T_DEFAULTS__MAX_NEW_TOKENS=32 {start}"
    assert "changed: defaults.max_new_tokens from 64 to 32" in run(changed, up)
    after = replicas(record.pid)
    assert {role for role in ROLES if after[role] != before[role]} == {"Gateway"}

    everything = psutil.Process(record.pid).children(recursive=True)
    run(down, up)
    holder = [psutil.Process(record.pid)] if psutil.pid_exists(record.pid) else []
    # Nobody may have heard of its end yet: it was left running.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in holder)
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert not alive
