"""The settings files of `cluster/`: each loads, builds the application, and fits the cards it
names, by arithmetic over the models' published shapes. No weights are needed for that."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray.serve.schema import ServeDeploySchema

from s2t_shared.config import Config, ModelConfig, load_config
from s2t_shared.errors import ModelLoadError
from s2t_shared.model.device_memory import GIB, WORKING_BYTES, check_fits
from s2t_shared.model.shape import model_shape
from services.app import build
from services.launch.cluster_files import CLUSTER_FILES, write_cluster_files

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
PODS = {name: CLUSTER / f"k8s/overlays/{name}/s2t.yaml" for name in ("reference", "one-gpu")}
SETTINGS = [
    *(file for file in sorted(CLUSTER.glob("*.yaml")) if file.name != "serve.yaml"),
    *PODS.values(),
]
BF16, FP8 = 2, 1


def name_of(file: Path) -> str:
    return str(file.relative_to(CLUSTER))


def load(file: Path) -> Config:
    return load_config(file, environment={})


# -- memory ---------------------------------------------------------------------------------------


# What is free on a card in GiB, before anything is loaded: less than its label says.
FREE_GIB = {"L4": 22.0, "H100": 78.0, "H200": 139.0}


shape = cache(model_shape)


def weight_bytes(model: str, bytes_of_layers: int = BF16) -> int:
    """By the model's published shape."""
    return int(shape(model).weight_bytes(bytes_of_layers, BF16))


def needed_bytes(model: ModelConfig) -> int:
    """What a model takes of its card beside the working memory."""
    return weight_bytes(model.model) + model.kv_bytes


@pytest.mark.parametrize("file", SETTINGS, ids=name_of)
def test_models_fit_their_cards(file: Path) -> None:
    """K3: reference.yaml had 61 GiB of weights and 40 GiB of KV cache for a card of 80, which
    starts, and ends under load."""
    config = load(file)
    if config.slm.model == "bundled" and config.llm.model == "bundled":
        return
    proposes, selects = config.proposer, config.selector
    if "one-gpu" in str(file):  # both on one card
        total = needed_bytes(config.slm) + needed_bytes(config.llm) + WORKING_BYTES
        check_fits("both", total, 0, int(FREE_GIB["L4"] * GIB))
        assert proposes.num_gpus + selects.num_gpus <= 1
        return
    if proposes.replicas:
        free = int(FREE_GIB[proposes.accelerator_type or "L4"] * GIB)
        check_fits(config.slm.model, weight_bytes(config.slm.model), config.slm.kv_bytes, free)
    if selects.replicas and not selects.addresses:
        check_llm(config.llm, int(FREE_GIB[selects.accelerator_type or "H100"] * GIB))
        assert selects.num_gpus == config.llm.tensor_parallel * config.llm.pipeline_parallel


def check_llm(llm: ModelConfig, free: int) -> None:
    if llm.runtime == "torch":
        check_fits(llm.model, weight_bytes(llm.model), llm.kv_bytes, free)
        return
    quantised = FP8 if llm.quantization == "fp8" else BF16
    weights = weight_bytes(llm.model, quantised) // llm.tensor_parallel
    cache = free * llm.gpu_memory_utilization - weights - WORKING_BYTES
    tokens = int(cache * llm.tensor_parallel / shape(llm.model).kv_bytes_per_token)
    assert llm.max_length is not None
    assert tokens > 4 * llm.max_length, f"room for {tokens} tokens only"


def test_the_old_reference_does_not_fit() -> None:
    """The arithmetic sees what it is there for."""
    with pytest.raises(ModelLoadError, match="lower kv_gib to 1[45]"):
        check_fits("32B", weight_bytes("32B"), 40 * GIB, int(FREE_GIB["H100"] * GIB))


@pytest.mark.parametrize("file", SETTINGS, ids=name_of)
def test_tokens_in_comments_are_right(file: Path) -> None:
    """Whoever changes kv_gib reads beside it what it was worth."""
    section = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(slm|llm):", line):
            section = found[1]
        if said := re.match(r"  kv_gib: ([\d.]+) +# ([\d,]+) tokens", line):
            model: ModelConfig = getattr(load(file), section)
            tokens = model.kv_bytes / shape(model.model).kv_bytes_per_token
            assert int(said[2].replace(",", "")) == pytest.approx(tokens, rel=0.03), line


# -- what the files say ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", SETTINGS, ids=name_of)
def test_each_file_builds_the_application(file: Path) -> None:
    build({"config": str(file), "redis.url": "redis://127.0.0.1:1/0"})


def deployments(application: object) -> dict[str, dict]:
    """Deployment name -> Ray actor options, walking the bound graph."""
    found: dict[str, dict] = {}
    waiting = [application._bound_deployment]  # type: ignore[attr-defined]
    while waiting:
        deployment = waiting.pop()
        found[deployment.name] = deployment.ray_actor_options
        waiting += [
            a._bound_deployment for a in deployment.init_args if hasattr(a, "_bound_deployment")
        ]
    return found


def test_laptop_needs_no_gpu() -> None:
    graph = deployments(build({"config": str(CLUSTER / "laptop.yaml")}))
    assert set(graph) == {"Gateway", "ProposerReplica", "SelectorReplica"}
    assert all(options["num_gpus"] == 0 for options in graph.values())


def test_reference_places_by_accelerator_and_resource() -> None:
    """The SLM goes to the small GPUs, the 32B LLM to the large one, gateways to neither."""
    graph = deployments(build({"config": str(CLUSTER / "reference.yaml")}))
    wanted = {
        "Gateway": ("gateway_node", None),
        "ProposerReplica": ("slm_node", "L4"),
        "SelectorReplica": ("llm_node", "H100"),
    }
    for name, (resource, accelerator) in wanted.items():
        options = graph[name]
        assert options["resources"][resource] == 1
        assert options["num_gpus"] == (1 if accelerator else 0)
        assert options.get("accelerator_type") == accelerator


def test_split_halves_are_one_service() -> None:
    """The LLM's half runs selectors alone, where the SLM's half looks for them."""
    llm, slm = load(CLUSTER / "split-llm.yaml"), load(CLUSTER / "split-slm.yaml")
    half = deployments(build({"config": str(CLUSTER / "split-llm.yaml")}))
    other = deployments(build({"config": str(CLUSTER / "split-slm.yaml")}))
    assert set(half) == {"SelectorReplica"}
    assert set(other) == {"Gateway", "ProposerReplica"}
    (address,) = slm.selector.addresses
    assert int(address.rpartition(":")[2]) == llm.selector.port
    assert llm.security.authority and slm.security.authority


PRODUCTS = {"L4": "NVIDIA L4", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}


@pytest.mark.parametrize("file", SETTINGS, ids=name_of)
def test_accelerators_are_named_as_ray_names_them(file: Path) -> None:
    """Ray makes the name from what the driver calls the card; another one is waited for in vain."""
    config = load(file)
    for placement in (config.proposer, config.selector):
        if name := placement.accelerator_type:
            found = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(PRODUCTS[name])
            assert found == name


def differences(one: object, other: object, name: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        inner = (differences(one.get(k), other.get(k), f"{name}.{k}".strip(".")) for k in keys)
        return set().union(*inner)
    return set() if one == other else {name}


@pytest.mark.parametrize(
    ("file", "other", "differing"),
    [
        (
            "k8s/overlays/reference/s2t.yaml",
            "reference.yaml",
            {"proposer.accelerator_type", "selector.accelerator_type", "gateway.drain_lag_s"},
        ),
        ("reference-h200.yaml", "reference.yaml", {"llm.kv_gib", "selector.accelerator_type"}),
        (
            "reference-h100-fp8.yaml",
            "reference.yaml",
            {
                *("llm.kv_gib", "llm.device", "llm.runtime"),
                *("llm.quantization", "llm.max_length"),
            },
        ),
        (
            "reference-2xh100.yaml",
            "reference.yaml",
            {
                *("llm.kv_gib", "llm.device", "llm.runtime"),
                *("llm.tensor_parallel", "llm.max_length", "selector.num_gpus"),
            },
        ),
    ],
)
def test_variants_differ_where_they_say(file: str, other: str, differing: set[str]) -> None:
    """They are copies of one file: a mend in one must reach all."""
    one, two = (load(CLUSTER / name).model_dump(mode="json") for name in (file, other))
    assert differences(one, two) == differing


def test_serve_file_passes_rays_schema() -> None:
    text = yaml.safe_load((CLUSTER / "serve.yaml").read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema.model_validate(text).applications
    assert application.import_path == "services.app:build"
    assert set(application.args) == {"config"}


# -- in the wheel ---------------------------------------------------------------------------------


def test_files_are_written_out_and_own_changes_kept(tmp_path: Path) -> None:
    """`s2t init cluster` twice must not undo an operator's work."""
    written = list(write_cluster_files(tmp_path))
    names = {str(file.relative_to(tmp_path)) for file in written}
    assert {"laptop.yaml", "README.md", "k8s/base/rayservice.yaml", "vm/aws.yaml"} <= names
    assert names == {
        str(f.relative_to(CLUSTER_FILES)) for f in CLUSTER_FILES.rglob("*") if f.is_file()
    }
    (tmp_path / "laptop.yaml").write_text("gateway: {port: 1}\n")
    assert not list(write_cluster_files(tmp_path))
    assert load(tmp_path / "laptop.yaml").gateway.port == 1
