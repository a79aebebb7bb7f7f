"""The Kubernetes overlays, held against Kubernetes' schemas and against what KubeRay's operator
does with a RayService (its source of 2026). Nothing here was applied to a cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from s2t_shared.config import Config, Placement, load_config
from tests.cluster.kustomize import Manifest, render

K8S = Path(__file__).parent.parent.parent / "cluster/k8s"
OVERLAYS = ["reference", "one-gpu"]
# Custom resources, of which no schema is at hand.
OTHERS_KINDS = {"RayService", "PodMonitor", "PrometheusRule"}
KUBERNETES = "1.30"
METRICS, AGENT, DASHBOARD = 8090, 52365, 8265
MOST_OF_A_NAME = 41  # of a RayService: KubeRay appends to it


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(overlay: str) -> list[Manifest]:
    return render(K8S / "overlays" / overlay)


@pytest.fixture
def service(objects: list[Manifest]) -> Manifest:
    (found,) = of_kind(objects, "RayService")
    return found


@pytest.fixture
def config(objects: list[Manifest], tmp_path: Path) -> Config:
    """The settings that the pods read."""
    (found,) = (o for o in of_kind(objects, "ConfigMap") if o["metadata"]["name"] == "s2t-config")
    file = tmp_path / "s2t.yaml"
    file.write_text(found["data"]["s2t.yaml"], encoding="utf-8")
    return load_config(file, environment={})


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [found for found in objects if found["kind"] == kind]


def groups(service: Manifest) -> dict[str, Manifest]:
    """The head and each worker group, by name."""
    cluster = service["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def pod_of(group: Manifest) -> Manifest:
    pod: Manifest = group["template"]["spec"]
    return pod


def container_of(group: Manifest) -> Manifest:
    (container,) = pod_of(group)["containers"]
    return dict(container)


def ports(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def all_pods(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for found in objects:
        if found["kind"] == "RayService":
            yield from ((name, pod_of(group)) for name, group in groups(found).items())
        elif found["kind"] == "StatefulSet":
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]


# -- the whole ------------------------------------------------------------------------------------


def test_objects_pass_kubernetes_schemas(objects: list[Manifest]) -> None:
    for found in objects:
        if found["kind"] not in OTHERS_KINDS:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_pods_of_the_rayservice_pass_kubernetes_schemas(service: Manifest) -> None:
    """RayService's own schema is not at hand; what it holds are ordinary pods."""
    for name, group in groups(service).items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
def test_kustomize_renders_the_same(overlay: str, objects: list[Manifest]) -> None:
    """The renderer of these tests must not be kinder than the real one."""
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    real = {key_of(found): found for found in yaml.safe_load_all(done.stdout)}
    assert real == {key_of(found): found for found in objects}


def key_of(found: Manifest) -> tuple[str, str]:
    return found["kind"], found["metadata"]["name"]


def test_what_is_referred_to_is_there(objects: list[Manifest]) -> None:
    """A pod whose config map or claim does not exist waits for ever. Secrets are the operator's to
    make: the README names each with a command."""
    there = {key_of(found) for found in objects}
    readme = (K8S.parent / "README.md").read_text(encoding="utf-8")
    for name, pod in all_pods(objects):
        for kind, wanted, optional in references(pod):
            if kind == "Secret":
                assert optional or f"secret generic {wanted} " in readme, (name, wanted)
            else:
                assert (kind, wanted) in there, (name, wanted)


def references(value: Any) -> Iterator[tuple[str, str, bool]]:
    """(kind, name, whether it may be missing) of what a pod refers to, wherever in it."""
    if isinstance(value, list):
        for item in value:
            yield from references(item)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key == "configMap":
            yield "ConfigMap", inner["name"], False
        elif key == "persistentVolumeClaim":
            yield "PersistentVolumeClaim", inner["claimName"], False
        elif key in ("secretKeyRef", "secret"):
            yield "Secret", inner.get("name") or inner["secretName"], inner.get("optional", False)
        else:
            yield from references(inner)


# -- KubeRay's rules ------------------------------------------------------------------------------


def test_kuberay_accepts_it(service: Manifest) -> None:
    """`ValidateRayServiceSpec` and `ValidateRayClusterSpec`, as far as they concern these files."""
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    assert service["apiVersion"] == "ray.io/v1"
    name = service["metadata"]["name"]
    assert len(name) <= MOST_OF_A_NAME and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert spec["upgradeStrategy"]["type"] in ("None", "NewCluster")
    version = tuple(int(part) for part in cluster["rayVersion"].split("."))
    assert version >= (2, 52, 0) or "authOptions" not in cluster
    assert cluster["rayVersion"] == ray.__version__
    assert "headService" not in cluster["headGroupSpec"]
    for group in groups(service).values():
        assert "resources" not in group, "either there or in rayStartParams"
        assert "labels" not in group["rayStartParams"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert pod_of(group).get("restartPolicy", "Never") == "Never"  # autoscaler v2
        assert not group.get("suspend")
    names = {entry["name"] for entry in container_of(cluster["headGroupSpec"])["env"]}
    # Each is KubeRay's own to set, with GCS fault tolerance.
    assert not names & {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"}
    assert "RAY_enable_autoscaler_v2" not in names


def test_k1_the_head_has_all_ports(service: Manifest) -> None:
    """With one port of ours, KubeRay adds none of its own; without `dashboard` it never submits the
    application."""
    head = groups(service)["head"]
    assert ports(container_of(head)) == {
        "gcs-server": 6379,
        "dashboard": DASHBOARD,
        "client": 10001,
        "serve": 8000,
        "metrics": METRICS,
    }
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"  # the operator comes from outside


def test_k2_pods_get_ready_without_serves_proxy(service: Manifest) -> None:
    """KubeRay's own probe of a worker asks Serve's proxy, which is off, so no pod would ever become
    an endpoint, and the RayService never ready. It adds none where there is one."""
    application = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert application["proxy_location"] == "Disabled"
    for name, group in groups(service).items():
        container = container_of(group)
        for probe in (container["readinessProbe"], container["livenessProbe"]):
            assert "exec" not in probe and "grpc" not in probe  # no wget here; gRPC probes lack TLS
            check_probe(name, probe, container)
    assert service["spec"]["excludeHeadPodFromServeSvc"]


def check_probe(name: str, probe: Manifest, container: Manifest) -> None:
    if probe.get("httpGet", {}).get("path") == "/readyz":
        assert name == "gateway" and probe["httpGet"]["port"] == ports(container)["http"]
        assert probe["httpGet"]["scheme"] == "HTTPS"
    else:
        assert probe["httpGet"] == (
            {"path": "/api/gcs_healthz", "port": DASHBOARD}
            if name == "head"
            else {"path": "/api/local_raylet_healthz", "port": AGENT}
        )


def test_k2b_the_gateway_has_a_service_of_its_own(
    objects: list[Manifest], service: Manifest, config: Config
) -> None:
    """KubeRay's Service points at all Ray pods; the gateway listens on its own pods alone."""
    (gateway,) = (o for o in of_kind(objects, "Service") if o["metadata"]["name"] == "s2t-gateway")
    selected = [
        name
        for name, group in groups(service).items()
        if gateway["spec"]["selector"].items() <= group["template"]["metadata"]["labels"].items()
    ]
    assert selected == ["gateway"]
    container = container_of(groups(service)["gateway"])
    served = {port["targetPort"]: port["port"] for port in gateway["spec"]["ports"]}
    assert served == {"grpc": config.gateway.port, "http": 8080}
    assert {name: ports(container)[name] for name in served} == served
    assert len(set(ports(container).values())) == len(ports(container)), "two servers on one port"
    assert "serveService" not in service["spec"]


def test_k3_the_settings_fit_the_cards_that_are_chosen(service: Manifest, config: Config) -> None:
    """Which card, by node selector; whether the models fit it, in test_settings.py."""
    for group in groups(service).values():
        cards = container_of(group)["resources"]["limits"].get("nvidia.com/gpu")
        if cards:
            product = pod_of(group)["nodeSelector"]["nvidia.com/gpu.product"]
            assert product in ("NVIDIA-L4", "NVIDIA-H100-80GB-HBM3")
            assert config.slm.device == config.llm.device == "cuda"


def test_k4_no_service_links(objects: list[Manifest]) -> None:
    for name, pod in all_pods(objects):
        assert pod["enableServiceLinks"] is False, name


def test_k5_k14_keys_only_where_a_server_runs(service: Manifest, config: Config) -> None:
    """And each file that the settings name is mounted where it is read."""
    for name, group in groups(service).items():
        (security,) = (v for v in pod_of(group)["volumes"] if v["name"] == "client-security")
        mounted: set[str] = set()
        for source in security["projected"]["sources"]:
            items = source["secret"].get("items")
            named = {item["path"] for item in items} if items else {"tls.crt", "tls.key", "ca.crt"}
            mounted |= named
        serves = name in ("gateway", "llm")
        assert mounted == {"ca.crt", "token"} | ({"tls.crt", "tls.key"} if serves else set())
        (mount,) = (
            m for m in container_of(group)["volumeMounts"] if m["name"] == "client-security"
        )
        files = {config.security.authority, config.security.token_file}
        assert {f"{mount['mountPath']}/ca.crt", f"{mount['mountPath']}/token"} == {
            str(file) for file in files
        }


def resources_of(group: Manifest) -> dict[str, float]:
    """What Ray will count on a pod of the group, as KubeRay starts it."""
    parameters = group["rayStartParams"]
    asked = container_of(group)["resources"]
    custom = json.loads(json.loads(parameters["resources"])) if "resources" in parameters else {}
    cpus = parameters.get("num-cpus") or asked["limits"].get("cpu") or asked["requests"]["cpu"]
    gpus = asked["limits"].get("nvidia.com/gpu", 0)
    return {"CPU": float(cpus), "GPU": float(gpus), **custom}


def needs_of(placement: Placement) -> dict[str, float]:
    return {"CPU": placement.num_cpus, "GPU": placement.num_gpus, **placement.resources}


def test_k6_each_role_has_pods_that_hold_it(service: Manifest, config: Config) -> None:
    """An LLM on a small card, or a resource that no pod brings, is waited for without end."""
    found = {name: resources_of(group) for name, group in groups(service).items()}
    assert found["head"]["CPU"] == 0  # no replica beside the cluster's own processes
    where = {"gateway": config.gateway, "proposer": config.proposer, "selector": config.selector}
    homes = {
        role: [name for name, has in found.items() if holds(has, needs_of(placement))]
        for role, placement in where.items()
    }
    assert homes["gateway"] == ["gateway"]
    assert homes["selector"] == ["llm"]
    assert homes["proposer"] == (["slm"] if "slm" in found else ["llm"])
    if homes["proposer"] == homes["selector"]:
        proposer, selector = needs_of(config.proposer), needs_of(config.selector)
        names = proposer.keys() | selector.keys()
        both = {name: proposer.get(name, 0) + selector.get(name, 0) for name in names}
        assert holds(found["llm"], both)
    for name, group in groups(service).items():
        if found[name]["GPU"]:
            (toleration,) = pod_of(group)["tolerations"]
            assert toleration["key"] == "nvidia.com/gpu" and pod_of(group)["nodeSelector"]
    # Ray's autoscaler knows a pod's custom resources, not its card.
    assert config.proposer.accelerator_type is None and config.selector.accelerator_type is None


def holds(has: dict[str, float], needs: dict[str, float]) -> bool:
    return all(has.get(name, 0) >= amount for name, amount in needs.items())


def test_k7_training_has_room(service: Manifest, config: Config, overlay: str) -> None:
    """Beside all proposers. One card is full; its settings say so."""
    if overlay == "one-gpu":
        return
    slm = groups(service)["slm"]
    proposers = config.proposer.max_replicas or config.proposer.replicas
    assert slm["maxReplicas"] >= proposers + config.training.workers
    has = resources_of(slm)
    assert has["GPU"] >= config.training.gpus_per_worker
    assert has["CPU"] >= config.training.cpus_per_worker


def test_k8_redis_is_there_with_a_password_that_shows_nowhere(
    objects: list[Manifest], service: Manifest
) -> None:
    """The URL comes by the environment, which `args` would go before."""
    (redis,) = of_kind(objects, "StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {
        "name": "s2t-redis",
        "key": "password",
    }
    assert "requirepass $REDIS_PASSWORD" in container["command"][-1]
    assert redis["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    (settings,) = (o for o in of_kind(objects, "ConfigMap") if "redis.conf" in o["data"])
    assert "appendonly yes" in settings["data"]["redis.conf"]
    assert "maxmemory-policy volatile-lru" in settings["data"]["redis.conf"]
    application = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    assert set(application["args"]) == {"config"}
    for group in groups(service).values():
        env = {entry["name"]: entry for entry in container_of(group)["env"]}
        names = list(env)
        assert "$(LABELS_REDIS_PASSWORD)@s2t-redis:6379" in env["S2T_REDIS__URL"]["value"]
        assert names.index("LABELS_REDIS_PASSWORD") < names.index("S2T_REDIS__URL")
        # Nothing else of ours is taken for a setting.
        assert [name for name in names if name.startswith("S2T_")] == ["S2T_REDIS__URL"]


def test_k9_images_are_those_of_our_dockerfiles(service: Manifest) -> None:
    """uid 1000, and a HOME that can be written on a read-only root."""
    for name, group in groups(service).items():
        container = container_of(group)
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-gpu") is gpu, name
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert env["HOME"] in mounts and "/tmp" in mounts
        assert not mounts[env["HOME"]].get("readOnly")


def test_k10_k11_models_and_data_lie_on_shared_claims(
    objects: list[Manifest], service: Manifest, config: Config
) -> None:
    """65 GB into a container's own layer at each start, and flock that one node alone sees."""
    for claim in of_kind(objects, "PersistentVolumeClaim"):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert claim["spec"]["storageClassName"]
    for group in groups(service).values():
        container = container_of(group)
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod_of(group)["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert claims[mounts[str(env["HF_HOME"])]] == "s2t-models"
        assert claims[mounts[f"/{config.data_dir.parts[1]}"]] == "s2t-shared"
        assert container["resources"]["requests"]["ephemeral-storage"]


def test_k12_numbers_that_differ_have_an_autoscaler(service: Manifest, config: Config) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    workers = cluster["workerGroupSpecs"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    scales = any(group["minReplicas"] < group["maxReplicas"] for group in workers)
    assert cluster["enableInTreeAutoscaling"] or not scales
    by_name = groups(service)
    assert by_name["gateway"]["replicas"] >= config.gateway.replicas
    if "slm" in by_name:
        assert by_name["slm"]["minReplicas"] >= config.proposer.replicas
    assert by_name["llm"]["maxReplicas"] >= (config.selector.max_replicas or 1)


def test_k13_a_new_head_finds_the_cluster(objects: list[Manifest], service: Manifest) -> None:
    """Without this its restart is a restart of everything, the LLM's loading included; and with
    NewCluster each change of a pod would need every GPU twice."""
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    host, _, port = options["redisAddress"].partition(":")
    (redis,) = (o for o in of_kind(objects, "Service") if o["metadata"]["name"] == host)
    assert redis["spec"]["ports"][0]["port"] == int(port)
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "s2t-redis"
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


def test_k14_pods_are_locked_down(objects: list[Manifest]) -> None:
    for name, pod in all_pods(objects):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"], name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
        # The head's autoscaler talks to Kubernetes; nobody else has a reason to.
        assert name == "head" or pod["automountServiceAccountToken"] is False


def test_k14_network_policies_name_who_may_come(
    objects: list[Manifest], service: Manifest, config: Config
) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(objects, "NetworkPolicy")}
    assert set(policies) == {"s2t", "s2t-gateway", "s2t-redis"}
    covered = policies["s2t"]["podSelector"]["matchLabels"]
    for group in groups(service).values():
        assert covered.items() <= group["template"]["metadata"]["labels"].items()
    opened = [port["port"] for port in policies["s2t-gateway"]["ingress"][0]["ports"]]
    assert opened == [config.gateway.port, 8080]
    for rule in policies["s2t"]["ingress"][1:]:  # strangers: the operator, Prometheus
        assert rule["from"] and rule["ports"][0]["port"] in (DASHBOARD, METRICS)
    assert policies["s2t-redis"]["ingress"][0]["from"] == [
        {"podSelector": {"matchLabels": covered}}
    ]


def test_k15_ports_are_fixed_and_metrics_scraped(
    objects: list[Manifest], service: Manifest, config: Config, overlay: str
) -> None:
    """A selector on a random port can be named by no firewall."""
    llm = ports(container_of(groups(service)["llm"]))
    assert llm["selector"] == config.selector.port
    for group in groups(service).values():
        assert int(group["rayStartParams"]["metrics-export-port"]) == METRICS
        assert ports(container_of(group))["metrics"] == METRICS
    for monitor in of_kind(objects, "PodMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"] == {"app": "s2t"}
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    assert bool(of_kind(objects, "PodMonitor")) is (overlay == "reference")


def test_k15_some_gateway_always_stays(objects: list[Manifest]) -> None:
    budgets = {b["metadata"]["name"]: b["spec"] for b in of_kind(objects, "PodDisruptionBudget")}
    assert budgets["s2t-gateway"]["minAvailable"] == 1


def test_the_application_is_ours(service: Manifest) -> None:
    text = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(text).applications
    assert application.import_path == "services.app:build"
    assert application.args["config"] == "/etc/s2t-config/s2t.yaml"
