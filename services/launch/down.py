"""`s2t down`: ends the service that `s2t up` left running, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ray import serve

from s2t_shared.errors import S2TError
from services.launch.ray_connection import existing_ray
from services.launch.service_record import ServiceRecord, read_record, remove_record
from services.roles import APPLICATION

POLL_S = 0.1
END_TIMEOUT_S = 60.0


def down(data_dir: Path, say: Callable[[str], None]) -> None:
    """End the service on this data folder, or the one in the Ray cluster that is found.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
        S2TError: the service did not end in time.
    """
    record = read_record(data_dir)
    if record is not None and _holds(record):
        _end_holder(record)
        say(f"ended the service at {record.address}")
        return
    with existing_ray(record.ray if record else "") as found:
        application = serve.status().applications.get(APPLICATION) if found else None
        if application is None:
            say("no service runs")
        else:
            serve.delete(APPLICATION)
            say("ended the service in the Ray cluster; Ray itself still runs")
    remove_record(data_dir)


def _holds(record: ServiceRecord) -> bool:
    """Whether the process that holds the recorded service lives, here."""
    if not record.pid or record.host not in ("", socket.gethostname()):
        return False
    try:
        command = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"serve" in command


def _end_holder(record: ServiceRecord) -> None:
    os.kill(record.pid, signal.SIGTERM)
    give_up = time.monotonic() + END_TIMEOUT_S
    while _holds(record):
        if time.monotonic() > give_up:
            raise S2TError(
                f"process {record.pid} was told to end the service {END_TIMEOUT_S:.0f} s ago, and "
                f"still runs; look at it, or end it: kill -KILL {record.pid}"
            )
        time.sleep(POLL_S)
