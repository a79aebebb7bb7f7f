"""Every setting as inert data.

One YAML file, overridden by the environment (`S2T_GATEWAY__PORT=50052`), overridden by the command
line. Unknown keys are refused with the nearest name. Nothing here loads a model or opens a port.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from s2t_shared.errors import ConfigError
from s2t_shared.redis_url import has_password
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.types import MAX_CANDIDATES, MAX_SAMPLES, Mode, OnLLMFailure, Trigger

ENVIRONMENT_PREFIX = "S2T_"
HTTP_PORT = 8080
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::", "[::]")
# What Kubernetes puts into a pod for each Service of its namespace, here for one named `s2t` or
# `s2t-...`: S2T_REDIS_SERVICE_HOST, S2T_REDIS_PORT, S2T_REDIS_PORT_6379_TCP_ADDR. No setting of
# ours looks like that: they have a section, and `__` behind it.
SERVICE_LINK = re.compile(
    r"S2T(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """A model and what runs it. Some settings are those of one runtime only."""

    model: str = Field(
        "bundled", description="Hugging Face folder or hub id; 'bundled': the pair in this package"
    )
    runtime: Literal["torch", "vllm"] = Field(
        "torch",
        description="what runs the model; vllm: a server's tokens per second, quantised weights, "
        "and for the LLM several GPUs",
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("cpu", description="torch: the device: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, description="CPU threads of one replica")
    kv_gib: float = Field(
        2.0,
        gt=0,
        description="torch: memory for keys and values, of live and kept contexts together",
    )
    chat_template: str | None = Field(
        None, description="Jinja text that replaces the tokenizer's own"
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm, LLM only: GPUs that share every layer")
    pipeline_parallel: int = Field(
        1, ge=1, description="vllm, LLM only: GPUs that hold some layers each"
    )
    quantization: str | None = Field(
        None,
        description="vllm: as it names it, for example fp8; default: as the weights are stored",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="vllm: share of a GPU's memory for weights and KV cache"
    )
    max_length: int | None = Field(
        None, ge=1, description="vllm: longest context in tokens; default: the model's"
    )

    @property
    def kv_bytes(self) -> int:
        return int(self.kv_gib * (1 << 30))

    @model_validator(mode="after")
    def _check_runtime(self) -> Self:
        """A setting that the chosen runtime would not look at is a mistake."""
        for runtime, (names, instead) in ONLY_OF.items():
            for name in names:
                is_set = getattr(self, name) != ModelConfig.model_fields[name].default
                if is_set and self.runtime != runtime:
                    raise ValueError(
                        f"{name} needs runtime: {runtime} (this model's is {self.runtime}{instead})"
                    )
        return self


ONLY_OF = {  # runtime -> settings that the other one does not have; what that one has instead
    "torch": (
        ("device", "kv_gib"),
        ", which takes the GPU that CUDA_VISIBLE_DEVICES names, and gpu_memory_utilization of it",
    ),
    "vllm": (
        (
            "tensor_parallel",
            "pipeline_parallel",
            "quantization",
            "gpu_memory_utilization",
            "max_length",
        ),
        "",
    ),
}


class Placement(_Section):
    """Where Ray puts a kind of replica."""

    replicas: int = Field(1, ge=0)
    num_cpus: float = Field(0.5, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    accelerator_type: str | None = Field(
        None, description="as Ray names it, for example H100 or L4"
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources of the node"
    )


class ScaledPlacement(Placement):
    """Replicas of which Serve may start more under load, and end them again."""

    replicas: int = Field(1, ge=0, description="that always run")
    max_replicas: int | None = Field(
        None, ge=1, description="Serve starts up to so many under load; default: only `replicas`"
    )
    target_ongoing_requests: float = Field(
        32.0,
        gt=0,
        description="with max_replicas: requests at once (of a selector: queries) that Serve aims "
        "at for each replica",
    )

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.max_replicas is not None and not 1 <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"replicas={self.replicas} must be 1 to max_replicas={self.max_replicas}"
            )
        return self

    @property
    def scales(self) -> bool:
        """Whether Serve changes the number of replicas."""
        return self.max_replicas is not None and self.max_replicas > self.replicas


class ProposerConfig(ScaledPlacement):
    max_num_seqs: int = Field(32, ge=1, description="sequences in one batch")
    max_lora_rank: int = Field(
        0,
        ge=0,
        le=512,
        description="with slm.runtime vllm: rank of the local selectors that it can load; 0: none, "
        "and vLLM decodes faster",
    )
    cuda_graphs: bool = Field(
        True, description="on a GPU, record decode steps and replay them; off: for debugging"
    )
    max_ongoing_requests: int = Field(
        256,
        ge=1,
        description="requests a replica accepts before it refuses more; it refuses earlier those "
        "that could not be finished before their deadline",
    )
    max_queue_s: float = Field(
        30.0,
        ge=0,
        description="a request that would wait longer for a place in the batch is refused; 0: only "
        "its deadline counts",
    )
    prefill_chunk_tokens: int | None = Field(
        None,
        ge=16,
        description="prompt tokens read per step, beside the decoding of others; default: 256 on a "
        "CPU, 4096 on a GPU",
    )
    selection_timeout_s: float = Field(
        2.0, gt=0, description="a later LLM selection degrades the step"
    )
    stall_timeout_s: float = Field(
        60.0,
        gt=0,
        description="a decode step that takes longer hangs: the replica is replaced, and its "
        "answers go on elsewhere",
    )
    max_draft_tokens: int = Field(
        32, ge=1, description="KL triggers: drafted tokens per LLM check; 1: token by token"
    )


class SelectorConfig(ScaledPlacement):
    host: str = Field("127.0.0.1", description="where the replica's own gRPC server listens")
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="of that server, for a firewall's rule; then a node has one replica at most; "
        "0: any free port",
    )
    addresses: tuple[str, ...] = Field(
        (), description="host:port of selectors elsewhere; then none is started here"
    )
    max_queries: int = Field(
        1024, ge=0, description="queries that one selector answers at once; 0: any number"
    )
    max_queries_per_client: int = Field(
        512,
        ge=0,
        description="of them, those of one proposer (a token from a host); 0: any number",
    )
    start_wait_s: float = Field(
        120.0,
        ge=0,
        description="a proposer that starts waits so long for the LLM; later, it is taken up "
        "when it comes",
    )
    stall_timeout_s: float = Field(
        60.0, gt=0, description="an LLM that takes longer for a step hangs: it is replaced"
    )


class GatewayConfig(Placement):
    num_cpus: float = Field(0.1, ge=0)
    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="gRPC; 0: any free port")
    http: bool = Field(True, description="also serve HTTP: OpenAI's API and the playground")
    http_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description=f"0: any free port; default: {HTTP_PORT}, or any free one where port is 0",
    )
    playground: bool = Field(True, description="serve a page to try the service, at /")
    served_model_name: str | None = Field(
        None, description="as HTTP clients name the model; default: the last part of slm.model"
    )
    max_message_bytes: int = Field(4 << 20, ge=1024, description="of one request")
    max_prompt_bytes: int = Field(
        1 << 20, ge=1, description="of a prompt's text or messages; a token id counts 4"
    )
    max_new_tokens: int = Field(8192, ge=1, description="that a request may ask for")
    max_samples: int = Field(
        MAX_SAMPLES, ge=1, le=MAX_SAMPLES, description="of majority@n that a request may ask for"
    )
    max_requests_per_client: int = Field(
        128,
        ge=0,
        description="requests of one client (a token from a host) that are answered at once; 0: "
        "any number",
    )
    max_resumes: int = Field(
        5,
        ge=0,
        description="an answer whose proposer dies goes on with another one; so often in a row "
        "without a new token",
    )
    max_concurrent_streams: int = Field(
        256, ge=0, description="calls of one connection at once, more wait there; 0: any number"
    )
    max_connection_idle_s: float = Field(
        600.0, ge=0, description="a connection without calls is closed after this long; 0: never"
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="an older connection takes no new calls, so that clients spread over gateways "
        "behind one address; 0: never",
    )
    max_connection_age_grace_s: float = Field(
        600.0, ge=0, description="calls of such a connection are cut after this long; 0: never"
    )
    drain_lag_s: float = Field(
        0.0,
        ge=0,
        description="a gateway that stops takes calls for so long after its health says "
        "NOT_SERVING: as long as load balancers need to notice",
    )
    drain_grace_s: float = Field(
        30.0, ge=0, description="then calls under way have so long to end before they are cut"
    )

    @property
    def drain_s(self) -> float:
        """Seconds that a gateway takes to stop, at most. What is behind it stays as long."""
        return self.drain_lag_s + self.drain_grace_s


class SecurityConfig(_Section):
    """Needed as soon as the gateway or the LLM selector listens beyond loopback. All files are read
    again when they change."""

    certificate: Path | None = Field(None, description="PEM file of the servers' certificate chain")
    key: Path | None = Field(None, description="PEM file of its private key")
    client_authority: Path | None = Field(
        None,
        description="PEM file of the authority whose certificates clients must have (mutual TLS)",
    )
    authority: Path | None = Field(
        None, description="PEM file of the authority that clients here trust"
    )
    client_certificate: Path | None = Field(
        None, description="PEM file of the certificate chain that clients here show"
    )
    client_key: Path | None = Field(None, description="PEM file of its private key")
    server_name: str = Field(
        "",
        description="name in the servers' certificate, where it is not the address at which "
        "clients here reach them: replicas behind one certificate",
    )
    token_file: Path | None = Field(
        None,
        description="file with the tokens that callers must send, one 'ROLE: TOKEN' a line; roles "
        "are generate, score (proposers to selectors) and admin",
    )
    insecure: bool = Field(
        False, description="allow plain, tokenless servers on other than loopback addresses"
    )

    @model_validator(mode="after")
    def _check_needs(self) -> Self:
        for name, needed in SECURITY_NEEDS:
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(
                    f"security.{name} has no effect without security.{needed}; set both or neither"
                )
        return self


SECURITY_NEEDS = (  # a setting, and what it does nothing without
    ("certificate", "key"),
    ("key", "certificate"),
    ("client_authority", "certificate"),
    ("client_certificate", "client_key"),
    ("client_key", "client_certificate"),
    ("client_certificate", "authority"),
    ("server_name", "authority"),
)


class DefaultsConfig(_Section):
    """What a request gets that leaves a setting out."""

    mode: Mode = Mode.S2T
    trigger: Trigger = Trigger.ENTROPY
    budget: float = Field(0.01, gt=0, le=1)
    candidates: int = Field(8, ge=1, le=MAX_CANDIDATES)
    max_new_tokens: int = Field(256, ge=1)
    on_llm_failure: OnLLMFailure = Field(
        OnLLMFailure.DEGRADE,
        description="when the LLM does not answer: degrade (go on without it, and say so) or fail",
    )
    store_labels: bool = False
    answer_pattern: str = Field(
        "", description="regular expression that finds the answer in a text, for majority@n"
    )


class RedisConfig(_Section):
    url: str | None = Field(
        None, description="None: `s2t serve` starts one of its own, on loopback"
    )
    password_dir: Path | None = Field(
        None,
        description="folder of `s2t redis-acl`: each process logs in under its role, with the "
        "password in the file of that name; None: the URL says user and password, if any",
    )
    port: int = Field(0, ge=0, le=65535, description="of the one it starts; 0: any free port")
    max_memory_mib: int = Field(
        1024,
        ge=16,
        description="of the one it starts; when it is full, cached selections make room for "
        "labels, then labels wait in the spool",
    )
    cache_ttl_s: int = Field(
        86_400, ge=1, description="how long a selection answers from the cache"
    )


class LabelsConfig(_Section):
    lake: str | None = Field(
        None,
        pattern=r"^[a-z0-9]+://.+",
        description="URL of the lake in object storage (s3://bucket/lake, gs://, az://, hf://); "
        "credentials come from the store's usual environment variables on every node; None: a "
        "folder in data_dir",
    )
    shard_rows: int = Field(2000, ge=1, description="rollouts that make a shard at once")
    shard_age_s: float = Field(
        60.0, gt=0, description="a shard is written at the latest after this long"
    )
    max_age_days: float = Field(
        0.0, ge=0, description="shards of older labels only are removed; 0: kept"
    )
    max_gib: float | None = Field(
        None,
        ge=0,
        description="the oldest shards beyond are removed; None: half of the lake's disk, at most "
        "100; 0: kept",
    )
    dead_letter_days: float = Field(
        30.0, ge=0, description="refused labels are removed after this long; 0: kept"
    )
    spool_dir: Path | None = Field(
        None,
        description="where they wait; on a disk of the proposer's own node, if data_dir is on "
        "shared storage; None: spool in data_dir",
    )
    spool_mib: int = Field(
        1024, ge=1, description="disk of one proposer for labels that Redis cannot take now"
    )


class MetricsConfig(_Section):
    """Where each process shows its metrics to Prometheus."""

    enabled: bool = True
    host: str = Field("127.0.0.1", description="where the endpoints listen")
    port: int | None = Field(
        9464,
        ge=0,
        le=65000,
        description="the gateway's; selectors have the next one, proposers those behind it: on a "
        "node each process takes the first free one. 0: any free ones; None: no endpoints",
    )
    ray: bool = Field(True, description="also through the metrics port of Ray on each node")


class CalibrationConfig(_Section):
    prompts: Path | None = Field(
        None,
        description="JSONL of training prompts; None: the bundled pair's own problems, or generic "
        "questions for other pairs",
    )
    count: int = Field(200, ge=8, description="prompts that are rolled out")
    max_new_tokens: int = Field(128, ge=8)


class LogConfig(_Section):
    """What gateways, proposers and selectors log. Prompts, answers and tokens never are."""

    format: Literal["text", "json"] = Field("text", description="json: an object a line")
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = Field(True, description="a line for each request, at its end")
    folder: Path | None = Field(
        None,
        description="where each process keeps a file; None: its standard error, which Ray keeps in "
        "/tmp/ray/session_latest/logs/worker-*.err of its node",
    )


class TracesConfig(_Section):
    """OpenTelemetry (`pip install 's2t[traces]'`). What is not set here, OTEL_* variables say."""

    enabled: bool = False
    endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="of an OTLP collector, for example http://collector:4317",
    )
    sample_ratio: float | None = Field(
        None, ge=0, le=1, description="share of the requests whose caller has not decided it"
    )


class Config(_Section):
    """The whole configuration; `s2t config` prints the resolved one."""

    slm: ModelConfig = ModelConfig()
    llm: ModelConfig = ModelConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    gateway: GatewayConfig = GatewayConfig()
    proposer: ProposerConfig = ProposerConfig()
    selector: SelectorConfig = SelectorConfig()
    security: SecurityConfig = SecurityConfig()
    redis: RedisConfig = RedisConfig()
    labels: LabelsConfig = LabelsConfig()
    metrics: MetricsConfig = MetricsConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    training: TrainingSettings = TrainingSettings()
    log: LogConfig = LogConfig()
    traces: TracesConfig = TracesConfig()
    data_dir: Path = Field(
        Path("s2t-data"), description="labels, versions and Redis files; shared by all nodes"
    )

    @field_validator("data_dir", mode="before")
    @classmethod
    def _is_a_folder(cls, value: Any) -> Any:
        if "://" in str(value):
            raise ValueError(
                "must be a folder with locks that all nodes see; only the lake may be in object "
                "storage (labels.lake)"
            )
        return value

    @property
    def http_port(self) -> int:
        """The gateway's, 0 for any free one."""
        gateway = self.gateway
        if gateway.http_port is not None:
            return gateway.http_port
        return HTTP_PORT if gateway.port else 0

    @property
    def served_model_name(self) -> str:
        """As HTTP clients name the model."""
        return self.gateway.served_model_name or self.slm.model.rstrip("/").rpartition("/")[2]

    @property
    def lake(self) -> Path | str:
        """The lake's folder, or its URL."""
        return self.labels.lake or self.lake_folder

    @property
    def lake_folder(self) -> Path:
        """The lake, unless it is in object storage; there harvests keep their progress."""
        return self.data_dir / "labels"

    @property
    def spool(self) -> Path:
        return self.labels.spool_dir or self.data_dir / "spool"

    @property
    def known_models(self) -> Path:
        return self.data_dir / "known-models"

    @property
    def versions(self) -> Path:
        return self.data_dir / "versions"


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration: defaults < `base` or file < environment < overrides.

    base: values by section, where there is no file. overrides: by dotted key; None values are
    ignored.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the nearest name), a value out of
            range, or settings that contradict one another.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if file is not None:
        values = _read_yaml(file)
    if environment is None:
        environment = os.environ
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and not SERVICE_LINK.fullmatch(name):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            _set(values, key, yaml.safe_load(text), name)
    for key, value in (overrides or {}).items():
        if value is not None:
            _set(values, key, value, key)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    _check_together(config)
    return _with_absolute_paths(config)


def _with_absolute_paths(config: Config) -> Config:
    """Replicas have other working folders."""
    labels, redis, log = config.labels, config.redis, config.log
    if log.folder is not None:
        log = log.model_copy(update={"folder": _absolute(log.folder)})
    if labels.spool_dir is not None:
        labels = labels.model_copy(update={"spool_dir": _absolute(labels.spool_dir)})
    if redis.password_dir is not None:
        redis = redis.model_copy(update={"password_dir": _absolute(redis.password_dir)})
    absolute = {"labels": labels, "redis": redis, "log": log}
    return config.model_copy(update={"data_dir": _absolute(config.data_dir), **absolute})


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _check_together(config: Config) -> None:
    redis = config.redis
    if redis.url is None and redis.password_dir is not None:
        raise ConfigError(
            "redis.password_dir is for the Redis at redis.url, and that is not set; a Redis that "
            "`s2t serve` starts makes its own"
        )
    if redis.url is not None and redis.password_dir is not None and has_password(redis.url):
        raise ConfigError(
            "redis.url holds a user or password, and redis.password_dir gives them too; remove "
            "them from the URL, or leave redis.password_dir out"
        )
    default, limit = config.defaults.max_new_tokens, config.gateway.max_new_tokens
    if default > limit:
        raise ConfigError(
            f"defaults.max_new_tokens={default} is more than gateway.max_new_tokens={limit} lets a "
            "request have; lower the one or raise the other"
        )


def check_exposure(config: Config) -> None:
    """Refuse servers beyond loopback without TLS and a token, and proposers that could not reach
    their selectors.

    Raises:
        ConfigError: there is such a server, or settings of both ends
            of a connection contradict one another.
    """
    security = config.security
    _check_ends(config)
    if security.insecure:
        return
    secured = security.certificate and security.key and security.token_file
    hosts = {"gateway.host": config.gateway.host, "selector.host": config.selector.host}
    if config.metrics.enabled and config.metrics.port is not None:
        hosts["metrics.host"] = config.metrics.host
    for name, host in hosts.items():
        if host not in LOOPBACK and not secured:
            raise ConfigError(
                f"{name}={host}: listening beyond loopback needs security.certificate, "
                "security.key and security.token_file (or security.insecure: true, if the network "
                "is yours alone)"
            )
    for address in config.selector.addresses:
        if address.rpartition(":")[0] not in LOOPBACK and not security.authority:
            raise ConfigError(
                f"selector.addresses: prompts and the token would go to {address} in clear text; "
                "set security.authority (or security.insecure: true, if the network is yours alone)"
            )


def _check_ends(config: Config) -> None:
    """Both ends of the connections from proposers to the selectors that are started here."""
    security = config.security
    if config.selector.addresses or not config.selector.replicas:
        return
    if security.certificate and not security.authority:
        raise ConfigError(
            "security.certificate without security.authority: proposers would speak plain text to "
            "selectors that speak TLS, and no LLM would ever be reached; set security.authority to "
            "the PEM file of the authority that issued the certificate"
        )
    if security.authority and not security.certificate:
        raise ConfigError(
            "security.authority without security.certificate: proposers would speak TLS to "
            "selectors that speak plain text, and no LLM would ever be reached; set "
            "security.certificate and security.key, or leave security.authority out"
        )
    if security.client_authority and not security.client_certificate:
        raise ConfigError(
            "security.client_authority without security.client_certificate: selectors would not "
            "hear proposers, which have no certificate; set security.client_certificate and "
            "security.client_key to one of that authority"
        )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration file {str(file)!r} cannot be read: {error.strerror}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration file {str(file)!r} is not YAML: {str(error).splitlines()[0]}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {str(file)!r} must hold keys and values")
    return content


def _set(values: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    *path, last = dotted.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {part!r} is not a section")
    values[last] = value


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_item(item) for item in error.errors())


def _explain_item(item: ErrorDetails) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        return f"{'.'.join(path)}={item['input']!r}: {item['msg']}"
    *section, name = path
    [nearest] = difflib.get_close_matches(name, _fields_at(section), n=1, cutoff=0.0)
    return f"unknown setting {'.'.join(path)!r}; nearest: {'.'.join([*section, nearest])!r}"


def _fields_at(path: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
