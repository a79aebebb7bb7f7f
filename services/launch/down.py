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
from services.launch.running import END_TIMEOUT_S, SAY_EVERY_S, end_application
from services.launch.service_record import ServiceRecord, read_record, remove_record
from services.roles import APPLICATION

POLL_S = 0.1


def down(data_dir: Path, say: Callable[[str], None]) -> None:
    """End the service on this data folder, or the one in the Ray cluster that is found.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
        S2TError: the service did not end in time.
    """
    record = read_record(data_dir)
    if record is not None and _holds(record):
        _end_holder(record, say)
        say(f"ended the service at {record.address}")
        return
    with existing_ray(record.ray if record else "") as found:
        application = serve.status().applications.get(APPLICATION) if found else None
        if application is None:
            say("no service runs")
        else:
            end_application(say)
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


def _end_holder(record: ServiceRecord, say: Callable[[str], None]) -> None:
    os.kill(record.pid, signal.SIGTERM)
    began = time.monotonic()
    say_at = began + SAY_EVERY_S
    while _holds(record):
        now = time.monotonic()
        if now >= say_at:
            say(f"waiting for process {record.pid} to end; its log is serve.log in data_dir")
            say_at = now + SAY_EVERY_S
        if now - began > END_TIMEOUT_S:
            raise S2TError(
                f"process {record.pid} was told to end the service {END_TIMEOUT_S:.0f} s ago, and "
                f"still runs; look at it, or end it: kill -KILL {record.pid}"
            )
        time.sleep(POLL_S)
