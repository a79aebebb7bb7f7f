"""Configuration and launch files: precedence, refusals with the nearest name, and what Ray's own
schemas accept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from s2t_shared.config import Config, check_exposure, load_config
from s2t_shared.errors import ConfigError
from services.app import build

CLUSTER = Path(__file__).parent.parent / "cluster"


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
    check_exposure(
        load_config(
            overrides={
                **exposed,
                "security.certificate": "c",
                "security.key": "k",
                "security.token_file": "t",
            },
            environment={},
        )
    )


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


def test_laptop_file_builds_the_application() -> None:
    graph = deployments(
        build({"config": str(CLUSTER / "laptop.yaml"), "redis.url": "redis://127.0.0.1:1/0"})
    )
    assert set(graph) == {"Gateway", "ProposerReplica", "SelectorReplica"}
    assert all(options["num_gpus"] == 0 for options in graph.values())


def test_reference_file_places_by_accelerator_and_resource() -> None:
    """The SLM goes to the small GPUs, the 32B LLM to the large one."""
    graph = deployments(build({"config": str(CLUSTER / "reference.yaml")}))
    slm, llm = graph["ProposerReplica"], graph["SelectorReplica"]
    assert (slm["num_gpus"], slm["resources"]) == (
        1,
        {"slm_node": 1} | {k: v for k, v in slm["resources"].items() if "accelerator" in k},
    )
    assert (llm["num_gpus"], llm["resources"]["llm_node"]) == (1, 1)
    assert "L4" in str(slm) and "H100" in str(llm)


def test_serve_files_pass_rays_schema() -> None:
    direct = yaml.safe_load((CLUSTER / "serve.yaml").read_text(encoding="utf-8"))
    manifest = yaml.safe_load((CLUSTER / "k8s/rayservice.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    for text in (direct, yaml.safe_load(manifest["spec"]["serveConfigV2"])):
        (application,) = ServeDeploySchema.model_validate(text).applications
        assert application.import_path == "services.app:build"
        assert set(application.args) == {"config", "redis.url"}


def test_rayservice_is_safe_and_reaches_the_gateway() -> None:
    """No root, no privileges, and the gateway's port is on the service."""
    spec = yaml.safe_load((CLUSTER / "k8s/rayservice.yaml").read_text(encoding="utf-8"))["spec"]
    port = load_config(CLUSTER / "reference.yaml", environment={}).gateway.port
    assert port in [p["port"] for p in spec["serveService"]["spec"]["ports"]]
    cluster = spec["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_vllms_settings_need_vllm() -> None:
    """Two GPUs that are asked for and silently not used would be found out under load."""
    with pytest.raises(ConfigError, match="tensor_parallel needs runtime: vllm"):
        load_config(None, {"llm.tensor_parallel": 2}, environment={})
    llm = load_config(None, {"llm.tensor_parallel": 2, "llm.runtime": "vllm"}, environment={}).llm
    assert llm.tensor_parallel == 2


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
