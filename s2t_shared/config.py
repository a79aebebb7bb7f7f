"""Every setting, as inert data: one YAML file, overridden by the environment
(`S2T_GATEWAY__PORT=50052`), overridden by the command line. Unknown keys are refused with the
nearest name. Nothing here loads a model or opens a port.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2t_shared.errors import ConfigError
from s2t_shared.types import MAX_CANDIDATES, Mode, Trigger

ENVIRONMENT_PREFIX = "S2T_"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    model: str = Field(
        "bundled", description="Hugging Face folder or hub id; 'bundled': the pair in this package"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("cpu", description="torch device: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, description="CPU threads of one replica")
    kv_gib: float = Field(
        2.0, gt=0, description="memory for keys and values, of live and kept contexts together"
    )
    chat_template: str | None = Field(
        None, description="Jinja text that replaces the tokenizer's own"
    )

    @property
    def kv_bytes(self) -> int:
        return int(self.kv_gib * (1 << 30))


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


class ProposerConfig(Placement):
    max_num_seqs: int = Field(32, ge=1, description="sequences in one batch")
    max_ongoing_requests: int = Field(
        256, ge=1, description="requests a replica accepts before it says 'busy'"
    )
    prefill_chunk_tokens: int = Field(
        256, ge=16, description="prompt tokens read per step, beside the decoding of others"
    )
    selection_timeout_s: float = Field(
        2.0, gt=0, description="a later LLM selection degrades the step"
    )
    max_draft_tokens: int = Field(
        32, ge=1, description="KL triggers: drafted tokens per LLM check; 1: token by token"
    )


class SelectorConfig(Placement):
    host: str = Field("127.0.0.1", description="where the replica's own gRPC server listens")
    addresses: tuple[str, ...] = Field(
        (), description="host:port of selectors elsewhere; then none is started here"
    )


class GatewayConfig(Placement):
    num_cpus: float = Field(0.1, ge=0)
    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0: any free port")
    max_message_bytes: int = Field(4 << 20, ge=1024)


class SecurityConfig(_Section):
    """Needed as soon as a host above is not loopback."""

    certificate: Path | None = Field(None, description="PEM file of the servers' certificate chain")
    key: Path | None = Field(None, description="PEM file of its private key")
    authority: Path | None = Field(
        None, description="PEM file of the authority that clients here trust"
    )
    token_file: Path | None = Field(
        None, description="file with the token clients must send, at least 16 bytes"
    )
    insecure: bool = Field(
        False, description="allow plain, tokenless servers on other than loopback addresses"
    )


class DefaultsConfig(_Section):
    """What a request gets that does not say."""

    mode: Mode = Mode.S2T
    trigger: Trigger = Trigger.ENTROPY
    budget: float = Field(0.01, gt=0, le=1)
    candidates: int = Field(8, ge=1, le=MAX_CANDIDATES)
    max_new_tokens: int = Field(256, ge=1)
    store_labels: bool = False
    answer_pattern: str = Field(
        "", description="regular expression that finds the answer in a text, for majority@n"
    )


class RedisConfig(_Section):
    url: str | None = Field(
        None, description="None: `s2t serve` starts one of its own, on loopback"
    )
    port: int = Field(0, ge=0, le=65535, description="of the one it starts; 0: any free port")
    cache_ttl_s: int = Field(
        86_400, ge=1, description="how long a selection answers from the cache"
    )


class LabelsConfig(_Section):
    shard_rows: int = Field(2000, ge=1, description="rollouts that make a shard at once")
    shard_age_s: float = Field(
        60.0, gt=0, description="a shard is written at the latest after this long"
    )
    max_age_days: float = Field(
        0.0, ge=0, description="shards of older labels only are removed; 0: kept"
    )
    max_gib: float = Field(0.0, ge=0, description="the oldest shards beyond are removed; 0: kept")
    spool_mib: int = Field(
        1024, ge=1, description="disk of one proposer for labels that Redis cannot take now"
    )


class TrainingConfig(_Section):
    """Settings of `s2t train`; see `losses.LossConfig` and `objective.DistillSettings` for what
    they do."""

    kind: Literal["reserved", "prefix", "joint"] = "prefix"
    reads: Literal["base", "adapted"] = "base"
    objective: Literal["top1_ce", "kl", "pairwise_margin", "plain"] = "top1_ce"
    scoring: Literal["expected", "binary"] = "expected"
    standardise: bool = Field(
        False, description="reserved scores to mean 0, variance 1 over a context's candidates"
    )
    fusion: bool = Field(
        False, description="choose lambda, the weight of the SLM's log-probability in the score"
    )
    steps: int = Field(1000, ge=1)
    batch_labels: int = Field(64, ge=1, description="labels per step, of all workers together")
    max_tokens: int = Field(
        16_384, ge=1, description="tokens of one forward; more of a batch is accumulated"
    )
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    temperature: float = Field(0.1, gt=0, description="T of the reserved score")
    row_scale: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(0.5, ge=0)
    hinge_weight: float = Field(0.1, ge=0)
    hinge_margin: float = Field(0.1, ge=0)
    reg_weight: float = Field(0.1, ge=0)
    teacher_temperature: float = Field(
        1.0, gt=0, description="of the LLM's distribution over the candidates"
    )
    teacher_margin: Literal["none", "weight", "drop"] = "none"
    margin_power: float = Field(1.0, ge=0)
    margin_eps: float = Field(1e-3, ge=0)
    min_margin: float = Field(0.0, ge=0, le=1)
    min_mass: float = Field(
        1e-3,
        ge=0,
        le=1,
        description="labels with less LLM probability on the candidates are left out",
    )
    validate_every: int = Field(0, ge=0, description="steps; 0: a tenth of all")
    patience: int = Field(3, ge=1, description="validations without improvement before stopping")
    checkpoint_every: int = Field(100, ge=1, description="steps")
    held_out_labels: int = Field(
        4096, ge=1, description="to validate on, and as many to test on, at most"
    )
    kept_gib: float = Field(
        2.0, ge=0, description="reads: base, unsharded: memory for contexts that are read once"
    )
    seed: int = 0
    init_from: str = Field(
        "", description="start from this version's weights, or from the 'live' one's"
    )
    workers: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0.0, ge=0)
    cpus_per_worker: float = Field(0.5, gt=0)
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="fsdp: each worker holds a part of the SLM's layers"
    )
    gate_problems: Path | None = Field(
        None,
        description='JSONL of training problems with "answer"; None: the bundled '
        "ones with the bundled SLM, else no task set",
    )
    gate_problem_count: int = Field(100, ge=0)
    gate_budget: float = Field(
        0.05, gt=0, le=1, description="share of steps that may trigger on the task set"
    )
    gate_min_gain: float = Field(
        0.0, description="of Agree@1 on held-out labels, at the lower end of its interval"
    )
    gate_max_lm_kl: float = Field(0.1, gt=0, description="nats per token")
    gate_max_task_loss: float | None = Field(
        None, ge=0, le=1, description="None: only a significant loss is refused"
    )
    gate_min_problems: int = Field(
        20, ge=1, description="held-out problems, below which nothing is judged"
    )


class CalibrationConfig(_Section):
    prompts: Path | None = Field(
        None, description="JSONL of training prompts; None: the bundled ones"
    )
    count: int = Field(200, ge=8, description="prompts that are rolled out")
    max_new_tokens: int = Field(128, ge=8)


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
    calibration: CalibrationConfig = CalibrationConfig()
    training: TrainingConfig = TrainingConfig()
    data_dir: Path = Field(
        Path("s2t-data"), description="labels, versions and Redis files; shared by all nodes"
    )

    @property
    def lake(self) -> Path:
        return self.data_dir / "labels"

    @property
    def spool(self) -> Path:
        return self.data_dir / "spool"

    @property
    def versions(self) -> Path:
        return self.data_dir / "versions"


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Defaults < `base` or file < environment < overrides (dotted keys, None values ignored).

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), or a value out of range.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if file is not None:
        values = _read_yaml(file)
    environment = os.environ if environment is None else environment
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            _set(
                values,
                name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", "."),
                yaml.safe_load(text),
                name,
            )
    for key, value in (overrides or {}).items():
        if value is not None:
            _set(values, key, value, key)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    return config.model_copy(update={"data_dir": config.data_dir.expanduser().absolute()})


def check_exposure(config: Config) -> None:
    """Raises ConfigError: a server would listen beyond loopback without TLS and a token."""
    security = config.security
    if security.insecure:
        return
    secured = security.certificate and security.key and security.token_file
    for name, host in (
        ("gateway.host", config.gateway.host),
        ("selector.host", config.selector.host),
    ):
        if host not in LOOPBACK and not secured:
            raise ConfigError(
                f"{name}={host}: listening beyond loopback needs security.certificate, security.key and "
                "security.token_file (or security.insecure: true, if the network is yours alone)"
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
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            known = _fields_at(location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
            lines.append(
                f"unknown setting {'.'.join(location)!r}; nearest: {'.'.join([*location[:-1], *near])!r}"
            )
        else:
            lines.append(f"{'.'.join(location)}={item['input']!r}: {item['msg']}")
    return "; ".join(lines)


def _fields_at(path: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
