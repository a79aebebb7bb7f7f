"""What the doctor says of a service, of its Redis and of its disks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from s2t_shared.config import Config, load_config
from s2t_shared.errors import UnauthenticatedError
from s2t_shared.labels.stream import LabelStream
from services.cli.findings import show_findings
from services.launch import doctor, redis_checks, storage_checks
from services.launch.doctor import check_any_redis, check_service, examine
from services.launch.findings import Finding, Level, fail, ok, warn
from services.launch.redis_checks import ServerFacts, check_redis
from services.launch.redis_server import RedisServer
from services.launch.service_record import recorded
from services.launch.storage_checks import check_storage, mount_of
from tests.helpers.serving import (
    gateway_address,
    gateway_config,
    proposer_service,
    scripted_llm,
    scripted_slm,
    with_gateway,
)


def config_of(tmp_path: Path, **overrides: object) -> Config:
    return load_config(None, {"data_dir": str(tmp_path), **overrides}, {})


def levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.what: finding.level for finding in findings}


# -- the service ----------------------------------------------------------------------------------


@pytest.mark.parametrize("available", [True, False])
def test_an_llm_that_cannot_be_reached_is_told(tmp_path: Path, available: bool) -> None:
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm, available=available))
    config = config_of(tmp_path)
    told = with_gateway(tmp_path, service, lambda at: list(check_service(config, at)))
    assert told[0].what == "service" and "LLM scripted" in told[0].detail
    assert told[0].level is (Level.OK if available else Level.WARN)
    assert told[0].detail.endswith("answers degrade") != available
    assert told[1].level is Level.WARN and "no Redis" in told[1].detail


def test_a_service_that_wants_a_token_is_looked_at_with_it(tmp_path: Path) -> None:
    """It could not be looked at: the doctor had no token."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef-secret")
    secured = gateway_config(tmp_path, **{"security.token_file": str(token)})
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm))

    async def main() -> list[Finding]:
        async with gateway_address(secured, service) as address:
            with pytest.raises(UnauthenticatedError):
                await asyncio.to_thread(lambda: list(check_service(config_of(tmp_path), address)))
            given = await asyncio.to_thread(
                lambda: list(check_service(config_of(tmp_path), address, token))
            )
            return given + await asyncio.to_thread(lambda: list(check_service(secured, address)))

    found = asyncio.run(main())
    service.close()
    assert [f.level for f in found if f.what == "service"] == [Level.OK, Level.OK]


def test_a_running_service_is_looked_at_and_its_port_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: RedisServer
) -> None:
    """Beside a service it failed on that service's own port, and looked at a scratch Redis."""
    monkeypatch.setattr(doctor, "check_pair", lambda config: [])
    monkeypatch.setattr(doctor, "check_service", lambda config, at, file: [ok("service", at)])
    with socket.socket() as gateway:
        gateway.bind(("127.0.0.1", 0))
        gateway.listen()
        address = f"127.0.0.1:{gateway.getsockname()[1]}"
        running = config_of(tmp_path, **{f"redis.{k}": v for k, v in server.settings().items()})
        with recorded(running, address):
            own = config_of(tmp_path, **{"gateway.port": gateway.getsockname()[1]})
            found = {finding.what: finding for finding in examine(own)}
    assert found["service"].detail == address and "gateway port" not in found
    assert server.place in found["redis"].detail
    assert [f for f in found.values() if f.level is Level.FAIL] == []


def test_without_a_service_a_redis_is_tried_out(tmp_path: Path) -> None:
    [found] = check_any_redis(config_of(tmp_path), None)
    assert found.level is Level.OK and "starts here" in found.detail
    assert not (tmp_path / "redis").exists()


def test_files_with_secrets_that_others_may_read_are_told(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 32)
    token.chmod(0o644)
    config = config_of(tmp_path, **{"security.token_file": str(token)})
    assert [f.level for f in doctor.check_servers(config)] == [Level.WARN]
    token.chmod(0o600)
    assert [f.level for f in doctor.check_servers(config)] == [Level.OK]


def test_an_error_of_a_check_is_a_failure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, **{"slm.model": "/nowhere", "redis.url": "redis://127.0.0.1:1"})
    found = list(examine(config))
    failed = {finding.what for finding in found if finding.level is Level.FAIL}
    assert failed == {"models", "redis"} and len(found) > 6


def test_findings_are_shown_with_how_to_mend_them(capsys: pytest.CaptureFixture) -> None:
    show_findings([ok("a", "fine"), warn("b", "[odd]", "do this"), fail("c", "broken", "do that")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "WARN", "->", "FAIL", "->", "1"]
    assert "[odd]" in lines[1] and lines[-1] == "1 well, 1 to look at, 1 to mend"


# -- Redis ----------------------------------------------------------------------------------------


@pytest.fixture
def configured(server: RedisServer, tmp_path: Path) -> Config:
    return config_of(tmp_path, **{f"redis.{k}": v for k, v in server.settings().items()})


def test_the_redis_that_we_start_is_well(configured: Config) -> None:
    """By the operator's role, which may not ask for its configuration."""
    found = list(check_redis(configured))
    assert {finding.level for finding in found} == {Level.OK}
    assert "takes producer, consumer, admin" in next(f for f in found if "access" in f.what).detail


@pytest.fixture
def changed(client: redis.Redis) -> Iterator[redis.Redis]:
    """A client whose changes of the server's settings are undone."""
    names = ("appendonly", "maxmemory", "maxmemory-policy")
    before = {name: client.config_get(name)[name] for name in names}
    yield client
    for name, value in before.items():
        client.config_set(name, value)


@pytest.mark.parametrize(
    ("setting", "value", "what", "level"),
    [
        ("appendonly", "no", "redis persistence", Level.WARN),
        ("maxmemory", "0", "redis memory", Level.WARN),
        ("maxmemory-policy", "allkeys-lru", "redis memory", Level.FAIL),
        ("maxmemory-policy", "noeviction", "redis memory", Level.WARN),
    ],
)
def test_what_a_redis_cannot_keep_is_told(
    setting: str, value: str, what: str, level: Level, configured: Config, changed: redis.Redis
) -> None:
    changed.config_set(setting, value)
    wrong = [finding for finding in check_redis(configured) if finding.level is not Level.OK]
    assert [(finding.what, finding.level) for finding in wrong] == [(what, level)]
    assert wrong[0].mend


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({"version": "7.0.15"}, "redis", Level.WARN),
        ({"clock_s": 2.0}, "clock", Level.WARN),
        ({"clock_s": -90.0}, "clock", Level.FAIL),
        ({"info": {"aof_last_write_status": "err"}}, "redis persistence", Level.FAIL),
        ({"info": {"used_memory": 1 << 40}}, "redis memory", Level.WARN),
    ],
)
def test_what_a_redis_says_of_itself_is_judged(
    change: dict[str, Any],
    what: str,
    level: Level,
    configured: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = redis_checks.ask_server

    def changed_facts(url: str) -> ServerFacts:
        facts = ask(url)
        return ServerFacts(
            change.get("version", facts.version),
            facts.info | change.get("info", {}),
            change.get("clock_s", facts.clock_s),
        )

    monkeypatch.setattr(redis_checks, "ask_server", changed_facts)
    wrong = {k: v for k, v in levels(list(check_redis(configured))).items() if v is not Level.OK}
    assert wrong == {what: level}


def test_a_redis_that_anybody_may_use_is_told(
    configured: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_checks, "_is_open", lambda url: True)
    assert levels(list(check_redis(configured)))["redis access"] is Level.WARN
    assert redis_checks._access("redis://10.0.0.1:6379/0", None).level is Level.FAIL
    monkeypatch.setattr(redis_checks, "_is_open", lambda url: False)
    assert redis_checks._access("redis://:x@10.0.0.1:6379/0", None).level is Level.WARN
    assert redis_checks._access("rediss://:x@10.0.0.1:6379/0", None).level is Level.OK


def test_refused_labels_are_told(configured: Config, server: RedisServer) -> None:
    open_stream = LabelStream(server.url)
    open_stream.append([b"poison"])
    open_stream.create_group()
    [entry] = open_stream.read("c", 1, 100)
    open_stream.dead_letter(entry, "poison")
    assert levels(list(check_redis(configured)))["labels"] is Level.WARN


# -- disks ----------------------------------------------------------------------------------------


def test_a_local_folder_is_well(tmp_path: Path) -> None:
    found = list(check_storage(config_of(tmp_path)))
    assert levels(found)["data folder"] is Level.OK
    assert "locks hold between processes" in found[0].detail
    assert list(tmp_path.iterdir()) == []


def test_a_lake_in_object_storage_is_written_to(tmp_path: Path, bucket: str) -> None:
    """A URL that cannot be written to was found out by the first drain only."""
    well = list(check_storage(config_of(tmp_path, **{"labels.lake": f"{bucket}/doctor"})))
    assert levels(well)["lake"] is Level.OK
    for url, says in (("s3://no-such-bucket/lake", "credentials"), ("nowhere://a", "fsspec")):
        found = list(check_storage(config_of(tmp_path, **{"labels.lake": url})))
        (lake,) = [finding for finding in found if finding.what == "lake"]
        assert lake.level is Level.FAIL and says in lake.detail


def test_locks_that_other_processes_do_not_see_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mounts take every lock and tell nobody: two gateways then write one lake."""
    holder = storage_checks.HOLDER.replace("locked(Path(sys.argv[1])", "locked(Path(os.devnull)")
    monkeypatch.setattr(storage_checks, "HOLDER", f"import os{holder}")
    found = next(check_storage(config_of(tmp_path)))
    assert found.level is Level.FAIL
    assert "shared lock was granted beside another process's exclusive one" in found.detail


def test_a_folder_without_locks_is_told_and_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_checks, "HOLDER", "import time; time.sleep(60)")
    monkeypatch.setattr(storage_checks, "LOCK_TIMEOUT_S", 0.2)
    found = next(check_storage(config_of(tmp_path)))
    assert found.level is Level.FAIL and "cannot be had" in found.detail
    assert list(tmp_path.iterdir()) == []


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /data rw,relatime shared:2 - nfs4 host:/data rw,vers=4.2,local_lock=none
31 22 0:41 / /old rw,relatime - nfs host:/old rw,vers=3,local_lock=all
32 30 0:42 / /data/with\\040space rw - tmpfs tmpfs rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> str:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    return str(tmp_path / "mountinfo")


def test_the_innermost_mount_counts(mounts: str) -> None:
    kinds = {}
    for folder in ("/home/x", "/data", "/data/s2t", "/database", "/data/with space/a"):
        mount = mount_of(Path(folder), mounts)
        assert mount is not None
        kinds[folder] = mount.kind
    assert kinds == {
        "/home/x": "ext4",
        "/data": "nfs4",
        "/data/s2t": "nfs4",
        "/database": "ext4",
        "/data/with space/a": "tmpfs",
    }


@pytest.mark.parametrize(
    ("folder", "data", "spool"),
    [
        ("/home/x", Level.OK, Level.OK),
        ("/data", Level.OK, Level.WARN),
        ("/old", Level.FAIL, Level.WARN),
        ("/data/with space", Level.OK, Level.WARN),
    ],
)
def test_where_the_folders_lie_is_judged(
    folder: str,
    data: Level,
    spool: Level,
    mounts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A spool over the network is away together with Redis; memory forgets acknowledged labels."""
    monkeypatch.setattr(storage_checks, "mount_of", lambda path: mount_of(Path(folder), mounts))
    found = levels(list(check_storage(config_of(tmp_path))))
    assert (found["data folder"], found["spool"]) == (data, spool)


@pytest.mark.parametrize(("free_mib", "level"), [(2048, "ok"), (500, "warn"), (20, "fail")])
def test_room_for_the_spool_and_the_lake_is_judged(
    free_mib: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(storage_checks.shutil.disk_usage(tmp_path))
    usage = usage(100 << 30, 0, free_mib << 20)
    monkeypatch.setattr(storage_checks.shutil, "disk_usage", lambda path: usage)
    found = levels(list(check_storage(config_of(tmp_path))))
    assert found["disk"] == found["spool disk"] == level


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_checks, "temporary_name", lambda path: Path("/proc/nowhere"))
    found = next(check_storage(config_of(tmp_path)))
    assert found.level is Level.FAIL and found.mend == "a folder this user can write"
