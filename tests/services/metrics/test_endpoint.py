"""The endpoint that Prometheus reads: where it listens, and who may read it."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from s2t_shared.config import MetricsConfig, SecurityConfig, check_exposure, load_config
from s2t_shared.errors import ConfigError
from services.metrics.endpoint import MetricsEndpoint
from services.metrics.registry import Registry
from services.metrics.table import Role
from tests.helpers.certificates import Authority, secured

OPEN = SecurityConfig()


@contextmanager
def endpoint(
    role: Role = Role.PROPOSER, port: int = 0, security: SecurityConfig = OPEN
) -> Iterator[MetricsEndpoint]:
    made = MetricsEndpoint(Registry(role), MetricsConfig(port=port), security)
    try:
        yield made
    finally:
        made.close()


def read(url: str, token: str = "", context: ssl.SSLContext | None = None) -> tuple[int, str]:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=5, context=context) as reply:
            assert reply.headers["content-type"].startswith("text/plain; version=")
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_answers_at_metrics_and_nowhere_else() -> None:
    with endpoint() as made:
        assert read(made.url) == (200, made._registry.text().decode())
        assert read(made.url.replace("/metrics", "/"))[0] == 404
        posted = urllib.request.Request(made.url, data=b"x")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(posted, timeout=5)


def test_replicas_of_a_node_take_one_port_after_the_other() -> None:
    """Two proposers of a node cannot listen on one port, and a taken one is no reason not to
    start."""
    with endpoint() as free:
        first = free.port + 100
    with endpoint(Role.GATEWAY, first) as gateway, endpoint(Role.SELECTOR, first) as selector:
        with endpoint(Role.PROPOSER, first) as one, endpoint(Role.PROPOSER, first) as two:
            ports = [gateway.port, selector.port, one.port, two.port]
            assert ports == sorted(set(ports)) and ports[0] >= first
            assert 'role="proposer"' in read(two.url)[1]


def test_a_port_is_free_again_at_once() -> None:
    """A replica that is replaced comes back where Prometheus looks for it."""
    with endpoint() as made:
        read(made.url)
        port = made.port
    with endpoint(Role.GATEWAY, port) as again:
        assert again.port == port


def test_who_has_no_token_reads_nothing(tmp_path: Path) -> None:
    """Where the service asks for tokens, so do its metrics; those of clients do not do."""
    tokens = {role: f"{role}-0123456789abcdef" for role in ("generate", "metrics", "admin")}
    file = tmp_path / "tokens"
    file.write_text("".join(f"{role}: {token}\n" for role, token in tokens.items()))
    with endpoint(security=SecurityConfig(token_file=file)) as made:
        assert read(made.url)[0] == 401
        assert read(made.url, "not-a-token-of-ours")[0] == 401
        assert read(made.url, tokens["generate"])[0] == 403
        assert read(made.url, tokens["metrics"])[0] == 200
        assert read(made.url, tokens["admin"])[0] == 200


def test_with_the_services_certificate_it_speaks_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with endpoint(security=secured(authority)) as made:
        context = ssl.create_default_context(cafile=str(authority.file))
        assert made.url.startswith("https://")
        assert read(made.url, context=context)[0] == 200
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(made.url.replace("https", "http"))
        assert read(made.url, context=context)[0] == 200, "a plain call must not end it"


def test_an_unprotected_one_beyond_loopback_is_refused() -> None:
    config = load_config(overrides={"metrics.host": "0.0.0.0"}, environment={})
    with pytest.raises(ConfigError, match="metrics.host=0.0.0.0"):
        check_exposure(config)
    off = {"metrics.host": "0.0.0.0", "metrics.enabled": False}
    check_exposure(load_config(overrides=off, environment={}))


def test_an_address_of_another_machine_says_which_setting() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.host"):
        MetricsEndpoint(Registry(Role.GATEWAY), MetricsConfig(host="203.0.113.1"), OPEN)
