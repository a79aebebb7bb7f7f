"""TLS of our own servers and channels: who connects and who does not, and new certificates while
calls go on. One small server on loopback per test."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from s2t_shared.config import SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import ConfigError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery
from services.client import Client
from services.rpc import channels, reloading
from services.rpc.tls import ClientTLS
from services.serve.remote_selector import RemoteSelector
from tests.helpers.certificates import NAME, Authority, secured
from tests.helpers.selection_server import start_selection_server
from tests.helpers.serving import becomes

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
QUERY = ScoreQuery(token_ids=(1, 2), positions=(1,), candidate_ids=((3, 4),))


async def connects(address: str, tls: ClientTLS | None) -> bool:
    """Whether one call over a channel of its own comes through."""
    async with channels.open_channel(address, tls) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        try:
            await stub.DescribeModel(pb.DescribeModelRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


def with_server(security: SecurityConfig, work: Callable[[str], Awaitable[None]]) -> None:
    async def main() -> None:
        server, address = await start_selection_server(security)
        try:
            await work(address)
        finally:
            await server.stop(0)

    asyncio.run(main())


def trusted(security: SecurityConfig) -> ClientTLS:
    tls = ClientTLS.of(security)
    assert tls is not None
    return tls


# -- who connects ---------------------------------------------------------------------------------


def test_who_has_the_authority_connects_and_plain_text_does_not(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    security = secured(authority)

    async def work(address: str) -> None:
        assert await connects(address, trusted(security))
        assert not await connects(address, None)
        assert not await connects(address, ClientTLS(authority=other.file))

    with_server(security, work)


def test_an_expired_certificate_is_not_trusted(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    security = secured(authority)
    authority.issue("server", valid_until=YESTERDAY)

    async def work(address: str) -> None:
        assert not await connects(address, trusted(security))

    with_server(security, work)


def test_a_certificate_of_another_name_needs_the_name(tmp_path: Path) -> None:
    """F14: replicas behind one certificate are dialed by addresses that are not in it; they were
    never reached, and nothing said so. With the name they are, and with another they are not."""
    authority = Authority(tmp_path)
    security = secured(authority)
    authority.issue("server", NAME)

    async def work(address: str) -> None:
        assert not await connects(address, trusted(security))
        assert await connects(address, replace(trusted(security), server_name=NAME))
        assert not await connects(address, replace(trusted(security), server_name="else.internal"))

    with_server(security, work)


def test_mutual_tls_hears_only_clients_with_a_certificate(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    security = secured(authority, mutual=True)
    foreign, foreign_key = other.issue("foreign", "client")

    async def work(address: str) -> None:
        tls = trusted(security)
        assert await connects(address, tls)
        assert not await connects(address, replace(tls, certificate=None, key=None))
        assert not await connects(address, replace(tls, certificate=foreign, key=foreign_key))

    with_server(security, work)


@pytest.mark.parametrize(
    ("version", "accepted"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)]
)
def test_old_versions_of_tls_are_refused(
    tmp_path: Path, version: ssl.TLSVersion, accepted: bool
) -> None:
    """By hand, because gRPC's own clients do not speak them."""
    security = secured(Authority(tmp_path))

    def handshake(address: str) -> bool:
        context = ssl.create_default_context(cafile=str(security.authority))
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.set_alpn_protocols(["h2"])
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5.0) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host) as wrapped:
                    return wrapped.version() is not None
            except (ssl.SSLError, ConnectionResetError):
                return False

    async def work(address: str) -> None:
        assert await asyncio.to_thread(handshake, address) is accepted

    with_server(security, work)


def test_the_client_takes_a_certificate_and_a_name(tmp_path: Path) -> None:
    """The public client, as a user of a deployment with mutual TLS builds it."""
    authority = Authority(tmp_path)
    security = secured(authority, mutual=True, server_name=NAME)
    authority.issue("server", NAME)

    async def work(address: str) -> None:
        def reaches(tls: ClientTLS | None) -> bool:
            with Client(address, authority=security.authority, tls=tls, timeout_s=5.0) as client:
                try:
                    client.describe()
                except Exception as error:  # noqa: BLE001 - any: the server has no such service
                    return "cannot be reached" not in str(error)
            return True

        assert await asyncio.to_thread(reaches, trusted(security))
        assert not await asyncio.to_thread(reaches, None)

    with_server(security, work)


# -- files that cannot be used --------------------------------------------------------------------


def test_files_that_are_no_pair_are_refused_at_start(tmp_path: Path) -> None:
    """gRPC listens with them, and fails at every handshake."""
    authority = Authority(tmp_path)
    security = secured(authority)
    foreign = Authority(tmp_path, "other").issue("foreign")[1]
    mismatched = security.model_copy(update={"key": foreign})
    for wrong, message in (
        (mismatched, "'server.crt' and 'foreign.key' are not"),
        (security.model_copy(update={"key": tmp_path / "none"}), "'none' cannot be read"),
        (security.model_copy(update={"certificate": foreign}), "are not a PEM certificate chain"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_server(wrong, lambda _: asyncio.sleep(0))
    with pytest.raises(ConfigError, match="holds no PEM certificates"):
        channels.open_channel("127.0.0.1:1", ClientTLS(authority=foreign))


# -- new certificates -----------------------------------------------------------------------------


def test_new_certificates_are_taken_up_while_calls_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart: new connections see the new certificate, those that stand lose no call. A
    key that has not followed yet changes nothing."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    old, new = Authority(tmp_path), Authority(tmp_path, "new")
    security = secured(old)

    async def work(address: str) -> None:
        done, failed = 0, 0
        stop = asyncio.Event()

        async def ask_on() -> None:
            nonlocal done, failed
            async with channels.open_channel(address, trusted(security)) as channel:
                stub = pb_grpc.SelectionServiceStub(channel)
                while not stop.is_set():
                    try:
                        await stub.DescribeModel(pb.DescribeModelRequest(), timeout=10.0)
                        done += 1
                    except grpc.aio.AioRpcError:
                        failed += 1

        load = [asyncio.create_task(ask_on()) for _ in range(4)]
        assert await becomes(lambda: done > 20)
        key_of_old = (tmp_path / "server.key").read_bytes()
        new.issue("server")
        key_of_new = (tmp_path / "server.key").read_bytes()
        (tmp_path / "server.key").write_bytes(key_of_old)
        assert await connects(address, ClientTLS(authority=old.file)), "half a change is none"
        (tmp_path / "server.key").write_bytes(key_of_new)
        assert await connects(address, ClientTLS(authority=new.file))
        assert not await connects(address, ClientTLS(authority=old.file))
        before = done
        assert await becomes(lambda: done > before + 20)
        stop.set()
        await asyncio.gather(*load)
        assert failed == 0

    with_server(security, work)


def test_a_new_authority_of_clients_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    authority, new = Authority(tmp_path), Authority(tmp_path, "new")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.file.read_bytes())
    security = secured(authority, mutual=True, client_authority=clients)
    certificate, key = new.issue("renewed", "client")

    async def work(address: str) -> None:
        renewed = replace(trusted(security), certificate=certificate, key=key)
        assert not await connects(address, renewed)
        clients.write_bytes(new.file.read_bytes())
        assert await connects(address, renewed)
        assert not await connects(address, trusted(security))

    with_server(security, work)


def test_proposers_follow_their_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authority is changed under a proposer that runs: it dials selectors with the new one. A
    half-written file stops nothing."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    old, new = Authority(tmp_path), Authority(tmp_path, "new")
    trust = tmp_path / "trust.pem"
    trust.write_bytes(old.file.read_bytes())
    security = secured(old, mutual=True, server_name=NAME).model_copy(update={"authority": trust})

    async def main() -> None:
        server, address = await start_selection_server(security)

        async def find() -> list[str]:
            return [address]

        remote = RemoteSelector(find, security, "tok", LLMInfo("", "", frozenset(), 9))
        await remote.wait_until_reachable(5.0)
        assert (await asyncio.wrap_future(remote.submit([QUERY])[0])).positions[0].top_id == 7

        trust.write_bytes(b"half")
        await remote.refresh()
        assert (await asyncio.wrap_future(remote.submit([QUERY])[0])).positions[0].top_id == 7

        new.issue("server", NAME)
        trust.write_bytes(new.file.read_bytes())
        await server.stop(0)
        server, _ = await start_selection_server(security, port=int(address.rpartition(":")[2]))
        await remote.refresh()
        await remote.wait_until_reachable(5.0)
        assert (await asyncio.wrap_future(remote.submit([QUERY])[0])).positions[0].top_id == 7
        await remote.close()
        await server.stop(0)

    asyncio.run(main())
