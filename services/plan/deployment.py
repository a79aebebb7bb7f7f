"""What a configuration has: per role devices, memory, the cost of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from s2t_shared.bundled import BUNDLED
from s2t_shared.config import Config, ModelConfig, ScaledPlacement
from s2t_shared.decode.llm_selector import STEP_TOKENS
from s2t_shared.decode.proposer import PREFILL_CHUNK_TOKENS
from s2t_shared.errors import ModelLoadError
from s2t_shared.model.device_memory import GIB, WORKING_BYTES, check_fits
from s2t_shared.model.folders import Role
from s2t_shared.model.loading import DTYPES
from s2t_shared.model.shape import ModelShape, model_shape
from services.plan.costs import ForwardCost, assumed_cost
from services.plan.demand import Traffic
from services.plan.devices import CPU, Device, device_named, priced

DEFAULT_GPU = "H100"
HOP_S = 1e-3  # a query's way to a selector and back; 0.8 ms on loopback (services/bench/README.md)
QUANTISED_BYTES = {"fp8": 1.0, "int8": 1.0, "awq": 0.5, "gptq": 0.5, "bitsandbytes": 0.5}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one replica, in GiB: weights, keys and values, working memory, what its devices have free.

    contexts: of the planned length that its KV holds at once. trouble: why it does not fit, or "".
    """

    weights: float
    kv: float
    working: float
    free: float | None
    contexts: int
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """One kind of replica.

    named: whether somebody said which device it is. devices: of one replica; below 1 where it
    shares a GPU, and CPU threads where it has none. slots: sequences (of a proposer) or queries (of
    a selector) at once, by the configuration.
    """

    model: str
    shape: ModelShape
    device: Device
    named: bool
    devices: float
    replicas: int
    slots: int
    memory: Memory
    cost: ForwardCost

    @property
    def price(self) -> float:
        """Of all replicas, dollars an hour."""
        return self.replicas * self.devices * self.device.price


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Proposers, selectors (None: no LLM), and whether both share one device.

    hop: seconds of a query's way to a selector and back. step_tokens: that one LLM forward reads.
    """

    proposer: RolePlan
    selector: RolePlan | None
    shared: bool
    hop: float
    step_tokens: int


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the operator says beside the configuration: prices by device, the measured costs of
    roles and where they were measured, and GPUs where the configuration names none."""

    prices: Mapping[str, float]
    measured: Mapping[str, ForwardCost]
    measured_on: str = ""
    slm_device: str | None = None
    llm_device: str | None = None


def deployment_of(config: Config, traffic: Traffic, given: Assumptions) -> Deployment:
    """Raises ConfigError, ModelLoadError: an unknown device, or a model that cannot be told."""
    proposer = _role("slm", config, traffic, given)
    selector = _role("llm", config, traffic, given) if _knows_llm(config) else None
    shared = selector is not None and _share(config, proposer.device, selector.device)
    if shared:
        assert selector is not None
        proposer, selector = _beside(proposer, selector)
    kind = "cuda" if selector is not None and selector.device.is_gpu else "cpu"
    return Deployment(
        proposer=proposer,
        selector=selector,
        shared=shared,
        hop=0.0 if "llm" in given.measured else HOP_S,
        step_tokens=STEP_TOKENS[kind],
    )


def _share(config: Config, one: Device, other: Device) -> bool:
    """Whether both roles are one device's: fractions that are one at most, as Ray counts them."""
    if one != other or config.selector.addresses:
        return False
    roles = (config.proposer, config.selector)
    parts = [role.num_gpus if one.is_gpu else role.num_cpus for role in roles]
    return all(0 < part < 1 for part in parts) and sum(parts) <= 1


def _knows_llm(config: Config) -> bool:
    """Selectors elsewhere run an LLM that this configuration need not name."""
    if not config.selector.addresses:
        return config.selector.replicas > 0
    return config.llm.model != BUNDLED or config.slm.model == BUNDLED


def prefill_chunk(config: Config) -> int:
    """Prompt tokens that a proposer reads per step."""
    default = PREFILL_CHUNK_TOKENS["cpu" if config.slm.device == "cpu" else "cuda"]
    return config.proposer.prefill_chunk_tokens or default


def _role(role: Role, config: Config, traffic: Traffic, given: Assumptions) -> RolePlan:
    is_slm = role == "slm"
    model: ModelConfig = config.slm if is_slm else config.llm
    placement: ScaledPlacement = config.proposer if is_slm else config.selector
    on_cpu = model.runtime == "torch" and model.device == "cpu"
    asked = given.slm_device if is_slm else given.llm_device
    named = asked or (CPU if on_cpu else placement.accelerator_type)
    device = priced(device_named(named or DEFAULT_GPU, f"--{role}-device"), dict(given.prices))
    if on_cpu and device.is_gpu:  # what the configuration would have to say for that device
        model = model.model_copy(update={"device": "cuda", "dtype": "bfloat16"})
    if device.is_gpu:
        sharing = model.tensor_parallel * model.pipeline_parallel
        devices = placement.num_gpus if 0 < placement.num_gpus < 1 else float(sharing)
    else:
        sharing = model.threads
        devices = float(sharing)
    shape = model_shape(model.model, role, model.dtype)
    replicas = placement.replicas
    if not is_slm and config.selector.addresses:
        replicas = len(config.selector.addresses)
    slots = config.proposer.max_num_seqs
    if not is_slm:
        slots = config.selector.max_queries or 1 << 20
    cost = given.measured.get(role) or assumed_cost(
        shape,
        device,
        runtime=model.runtime,
        bytes_per_weight=_bytes_per_weight(model),
        devices=sharing,
        recorded=is_slm and config.proposer.cuda_graphs,
    )
    return RolePlan(
        model=model.model,
        shape=shape,
        device=device,
        named=named is not None,
        devices=devices,
        replicas=replicas,
        slots=slots,
        memory=_memory(model, shape, device, traffic, slots if is_slm else 1),
        cost=cost,
    )


def _bytes_per_weight(model: ModelConfig) -> float:
    """Of a layer's weights."""
    plain = float(DTYPES[model.dtype].itemsize)
    return QUANTISED_BYTES.get(model.quantization or "", plain)


def _memory(
    model: ModelConfig, shape: ModelShape, device: Device, traffic: Traffic, max_num_seqs: int
) -> Memory:
    """By the arithmetic of the start-up check (`check_fits`); vLLM's share is its own setting."""
    plain = float(DTYPES[model.dtype].itemsize)
    weights = shape.weight_bytes(_bytes_per_weight(model), plain)
    columns = int(traffic.prompt + traffic.new)
    gpus = model.tensor_parallel * model.pipeline_parallel
    free = device.free_gib * gpus * GIB if device.free_gib is not None else None
    working = float(WORKING_BYTES * gpus) if device.is_gpu else 0.0
    if model.runtime == "vllm" and free is not None:
        kv = free * model.gpu_memory_utilization - weights - working
        contexts = max(0, int(kv / shape.kv_bytes_per_token / columns))
        trouble = "" if contexts else f"{model.model!r} leaves no room for KV cache on {gpus} GPUs"
    else:
        kv = float(model.kv_bytes)
        kind = torch.device("cuda" if device.is_gpu else "cpu")
        contexts = shape.kv_slots(model.kv_bytes, columns, kind.type, max_num_seqs)
        trouble = _trouble(model.model, int(weights), model.kv_bytes, free)
    return Memory(
        weights=weights / GIB,
        kv=kv / GIB,
        working=working / GIB,
        free=free / GIB if free is not None else None,
        contexts=contexts,
        trouble=trouble,
    )


def _trouble(model: str, weights: int, kv_bytes: int, free: float | None) -> str:
    """Why the start-up check would refuse it."""
    if free is None:
        return ""
    try:
        check_fits(model, weights, kv_bytes, int(free))
    except ModelLoadError as error:
        return str(error)
    return ""


def _beside(proposer: RolePlan, selector: RolePlan) -> tuple[RolePlan, RolePlan]:
    """Both on one GPU: its memory holds both."""
    memories = (proposer.memory, selector.memory)
    needed = sum(m.weights + m.kv + m.working for m in memories)
    free = proposer.device.free_gib
    if free is None or needed <= free or any(m.trouble for m in memories):
        return proposer, selector
    trouble = f"both models need {needed:.1f} GiB on one {proposer.device.name} of {free:.1f}"
    memory = replace(selector.memory, trouble=trouble)
    return proposer, replace(selector, memory=memory)
