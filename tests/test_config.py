"""Configuration: precedence, and refusals with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.config import Config, check_exposure, load_config
from s2t_shared.errors import ConfigError


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "gateway: {port: 1}\ndefaults: {budget: 0.2, candidates: 4}\n", encoding="utf-8"
    )
    config = load_config(
        file,
        {"gateway.port": 3, "defaults.mode": None},
        {"S2T_GATEWAY__PORT": "2", "S2T_DEFAULTS__BUDGET": "0.3", "OTHER": "x"},
    )
    assert (config.gateway.port, config.defaults.budget, config.defaults.candidates) == (3, 0.3, 4)
    assert config.defaults.mode == Config().defaults.mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gatway: {port: 1}", "unknown setting 'gatway'; nearest: 'gateway'"),
        ("gateway: {prot: 1}", "unknown setting 'gateway.prot'; nearest: 'gateway.port'"),
        ("gateway: {port: 99999}", "gateway.port=99999"),
        ("defaults: {mode: nope}", "defaults.mode='nope'"),
        ("defaults: {candidates: 0}", "defaults.candidates=0"),
        ("- a", "keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """A typo must never become a default in silence."""
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(file, environment={})


def test_missing_file_and_bad_environment() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Path("/nowhere/c.yaml"), environment={})
    with pytest.raises(ConfigError, match="nearest: 'gateway'"):
        load_config(None, environment={"S2T_GATEWAI__PORT": "1"})


def test_exposed_servers_need_tls_and_a_token() -> None:
    """S1: beyond loopback only with certificate, key and token, or by an explicit word."""
    exposed = {"gateway.host": "0.0.0.0"}
    with pytest.raises(ConfigError, match=r"gateway\.host=0\.0\.0\.0"):
        check_exposure(load_config(overrides=exposed, environment={}))
    with pytest.raises(ConfigError, match="selector.host"):
        check_exposure(load_config(overrides={"selector.host": "10.0.0.1"}, environment={}))
    check_exposure(load_config(overrides={**exposed, "security.insecure": True}, environment={}))
    secured = {
        "security.certificate": "c",
        "security.key": "k",
        "security.authority": "a",
        "security.token_file": "t",
    }
    check_exposure(load_config(overrides={**exposed, **secured}, environment={}))
    for name in secured.keys() - {"security.authority"}:
        but_one = {**exposed, **secured, name: None}
        with pytest.raises(ConfigError, match=name):
            check_exposure(load_config(overrides=but_one, environment={}))


def test_kubernetes_service_links_are_no_settings() -> None:
    """K4: for a Service named s2t-redis, Kubernetes puts S2T_REDIS_PORT=tcp://... and more into
    each pod, which used to end every process of ours there; a misspelt setting still does."""
    links = {
        "S2T_REDIS_SERVICE_HOST": "10.0.0.1",
        "S2T_REDIS_SERVICE_PORT": "6379",
        "S2T_REDIS_SERVICE_PORT_REDIS": "6379",
        "S2T_REDIS_PORT": "tcp://10.0.0.1:6379",
        "S2T_REDIS_PORT_6379_TCP": "tcp://10.0.0.1:6379",
        "S2T_REDIS_PORT_6379_TCP_PROTO": "tcp",
        "S2T_REDIS_PORT_6379_TCP_PORT": "6379",
        "S2T_REDIS_PORT_6379_TCP_ADDR": "10.0.0.1",
        "S2T_GATEWAY_SERVICE_PORT_GRPC": "50051",
        "S2T_SERVICE_HOST": "10.0.0.2",
        "S2T_PORT": "tcp://10.0.0.2:1",
    }
    assert load_config(environment=links) == load_config(environment={})
    config = load_config(environment={**links, "S2T_GATEWAY__PORT": "7"})
    assert config.gateway.port == 7
    with pytest.raises(ConfigError, match="unknown setting"):
        load_config(environment={"S2T_GATEWAY_PROT": "1"})


SERVED = {"security.certificate": "c", "security.key": "k", "security.authority": "a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"certificate": "c"}, r"certificate has no effect without security\.key"),
        ({"key": "k"}, r"key has no effect without security\.certificate"),
        ({"client_authority": "a"}, r"client_authority .* without security\.certificate"),
        ({"client_certificate": "c"}, r"client_certificate .* without security\.client_key"),
        ({"client_key": "k"}, r"client_key .* without security\.client_certificate"),
        (
            {"client_certificate": "c", "client_key": "k"},
            r"client_certificate .* without security\.authority",
        ),
        ({"server_name": "s"}, r"server_name .* without security\.authority"),
    ],
)
def test_settings_that_do_nothing_alone_are_refused(settings: dict, message: str) -> None:
    """F14: half of a pair was taken, and plain text or no protection came of it."""
    with pytest.raises(ConfigError, match=message):
        load_config(overrides={f"security.{k}": v for k, v in settings.items()}, environment={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"security.certificate": "c", "security.key": "k"},
            "certificate without security.authority: proposers would speak plain text",
        ),
        ({"security.authority": "a"}, "authority without security.certificate"),
        (
            {**SERVED, "security.client_authority": "a"},
            "client_authority without security.client_certificate",
        ),
        ({"selector.addresses": ["10.0.0.9:70"]}, "10.0.0.9:70 in clear text"),
    ],
)
def test_both_ends_of_the_selectors_connections_agree(settings: dict, message: str) -> None:
    """F14: the service came up, looked healthy, and never reached an LLM; or told a network the
    token in clear text. A client's own file may have the authority alone."""
    config = load_config(overrides=settings, environment={})
    with pytest.raises(ConfigError, match=message):
        check_exposure(config)


def test_what_agrees_is_taken() -> None:
    mutual = {
        "security.client_authority": "a",
        "security.client_certificate": "c",
        "security.client_key": "k",
    }
    for settings in (
        {},
        SERVED,
        {**SERVED, **mutual, "security.server_name": "s2t"},
        {"selector.addresses": ["10.0.0.9:70"], "security.authority": "a"},
        {"selector.addresses": ["127.0.0.1:70"]},
        {"selector.replicas": 0, "security.certificate": "c", "security.key": "k"},
    ):
        check_exposure(load_config(overrides=settings, environment={}))


@pytest.mark.parametrize(
    ("replicas", "most", "scales"), [(1, None, False), (2, 2, False), (1, 4, True)]
)
def test_replicas_scale_between_two_numbers(replicas: int, most: int | None, scales: bool) -> None:
    overrides = {"proposer.replicas": replicas, "proposer.max_replicas": most}
    assert load_config(None, overrides, environment={}).proposer.scales is scales


def test_more_replicas_than_at_most_are_refused() -> None:
    with pytest.raises(ConfigError, match="replicas=3 must be 1 to max_replicas=2"):
        load_config(None, {"selector.replicas": 3, "selector.max_replicas": 2}, environment={})


def test_vllms_settings_need_vllm() -> None:
    """Two GPUs that are asked for and silently not used would be found out under load."""
    with pytest.raises(ConfigError, match="tensor_parallel needs runtime: vllm"):
        load_config(None, {"llm.tensor_parallel": 2}, environment={})
    llm = load_config(None, {"llm.tensor_parallel": 2, "llm.runtime": "vllm"}, environment={}).llm
    assert llm.tensor_parallel == 2


def test_a_data_folder_is_no_url() -> None:
    """It became a local folder `s3:`. The lake alone may be in object storage."""
    with pytest.raises(ConfigError, match="labels.lake"):
        load_config(None, {"data_dir": "s3://bucket/data"}, {})
    lake = load_config(None, {"labels.lake": "s3://bucket/lake"}, {})
    assert lake.lake == "s3://bucket/lake" and lake.lake_folder.name == "labels"


def test_the_spool_lies_where_it_is_told(tmp_path: Path) -> None:
    """Replicas have other working folders: a relative path would be another folder in each."""
    assert load_config(None, {"data_dir": str(tmp_path)}, {}).spool == tmp_path / "spool"
    elsewhere = load_config(None, {"labels.spool_dir": "own/spool"}, {}).spool
    assert elsewhere == Path.cwd() / "own/spool"


@pytest.mark.parametrize(
    ("redis", "message"),
    [
        ({"url": "redis://:secret@host:1", "password_dir": "users"}, "user or password, and"),
        ({"password_dir": "users"}, "redis.url, and that is not set"),
    ],
)
def test_redis_settings_that_contradict_one_another(redis: dict, message: str) -> None:
    """One of the two passwords would be taken, and nobody would know which."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, {f"redis.{name}": value for name, value in redis.items()}, {})
    assert "secret" not in str(caught.value)


def test_a_runtimes_settings_need_it() -> None:
    """A device or a KV size that vLLM would not look at, for either model."""
    for role in ("slm", "llm"):
        for name, value in (("device", "cuda"), ("kv_gib", 8.0)):
            wrong = {f"{role}.{name}": value, f"{role}.runtime": "vllm"}
            with pytest.raises(ConfigError, match=f"{name} needs runtime: torch"):
                load_config(None, wrong, environment={})
        right = {f"{role}.device": "cuda", f"{role}.kv_gib": 8.0}
        load_config(None, right, environment={})
    slm = {"slm.runtime": "vllm", "slm.quantization": "fp8", "proposer.max_lora_rank": 16}
    assert load_config(None, slm, environment={}).slm.quantization == "fp8"
