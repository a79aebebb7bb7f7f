"""The other ways to bring a cluster up: Ray's launcher on VMs, SLURM, containers. Their own
validators accept them; none was run here (no cloud, no SLURM, no container runtime)."""

from __future__ import annotations

import copy
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from s2t_shared.config import ENVIRONMENT_PREFIX, load_config
from s2t_shared.redis_url import RedisRole
from services.launch.redis_acl import write_acl

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
VMS = sorted((CLUSTER / "vm").glob("*.yaml"))
DOCKERFILES = sorted((CLUSTER / "docker").glob("Dockerfile.*"))


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


# -- VMs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", VMS, ids=lambda file: file.stem)
def test_rays_launcher_accepts_it(file: Path) -> None:
    """As `ray up` does before it asks the cloud for anything."""
    prepared = prepare_config(copy.deepcopy(read(file)))
    validate_config(prepared)
    assert prepared["cluster_name"] == "s2t"


@pytest.mark.parametrize("file", VMS, ids=lambda file: file.stem)
def test_ray_starts_with_its_token_and_an_inward_dashboard(file: Path) -> None:
    """S9: whoever reaches Ray's ports without it runs what he likes."""
    config = read(file)
    head = config["head_start_ray_commands"][-1]
    for command in (head, config["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in head
    assert any("auth_token" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_node_types_hold_the_roles(name: str) -> None:
    """Each role of reference.yaml has a type of node, and training has room beside proposers."""
    types = read(CLUSTER / f"vm/{name}.yaml")["available_node_types"]
    config = load_config(CLUSTER / "reference.yaml", environment={})
    for role, kind in ((config.gateway, "gateway"), (config.proposer, "slm")):
        check_holds(types[kind]["resources"], role)
    check_holds(types["llm"]["resources"], config.selector)
    check_holds(types["head"]["resources"], config.gateway)
    proposers = config.proposer.replicas
    assert types["slm"]["min_workers"] >= proposers
    assert types["slm"]["max_workers"] >= proposers + config.training.workers
    gateways = 1 + types["gateway"]["min_workers"]  # the head is one
    assert gateways >= config.gateway.replicas


def check_holds(has: dict[str, float], placement: Any) -> None:
    assert has["CPU"] >= placement.num_cpus and has.get("GPU", 0) >= placement.num_gpus
    for resource, amount in placement.resources.items():
        assert has[resource] >= amount
    if placement.accelerator_type:
        assert has[f"accelerator_type:{placement.accelerator_type}"] == 1


# -- SLURM ----------------------------------------------------------------------------------------

SBATCH = CLUSTER / "slurm/service.sbatch"


def test_the_batch_script_is_bash() -> None:
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_symmetric_run_accepts_its_options() -> None:
    """It refuses --head, --port, --node-ip-address and --block, and needs the `--`."""
    text = SBATCH.read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"ray symmetric-run (.*) &$", text, re.MULTILINE)
    start, found, entry = command.partition(" -- ")
    assert found and entry.strip().startswith("s2t serve --config")
    cleaned = curate_and_validate_ray_start_args(start.split())
    assert {option.partition("=")[0] for option in cleaned if option.startswith("--")} >= {
        "--resources",
        "--num-gpus",
    }


def test_every_role_of_the_reference_has_a_component() -> None:
    text = SBATCH.read_text(encoding="utf-8")
    components = dict(re.findall(r"^ray_node (\d) (\w+) \d$", text, re.MULTILINE))
    assert list(components) == ["0", "1", "2"]
    config = load_config(CLUSTER / "reference.yaml", environment={})
    roles = (config.gateway, config.proposer, config.selector)
    assert list(components.values()) == [next(iter(role.resources)) for role in roles]
    assert text.count("#SBATCH hetjob") == len(components) - 1


def test_what_the_script_exports_are_settings(tmp_path: Path) -> None:
    """Each S2T_ variable that the service sees is read as a setting, so none may be another."""
    lines = SBATCH.read_text(encoding="utf-8").split("unset ")
    exported = re.findall(rf"({ENVIRONMENT_PREFIX}\w+)=", lines[0].split("activate")[1])
    own = set(re.findall(rf"{ENVIRONMENT_PREFIX}\w+", lines[1].splitlines()[0]))
    values = {name: str(tmp_path) for name in exported if name not in own}
    config = load_config(CLUSTER / "reference.yaml", environment=values)
    assert config.data_dir == tmp_path and str(config.security.key) == str(tmp_path)
    used = set(re.findall(rf"\$\{{?({ENVIRONMENT_PREFIX}\w+)", SBATCH.read_text(encoding="utf-8")))
    assert used <= own


# -- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix[1:])
def test_hadolint_finds_nothing(file: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix[1:])
def test_images_run_as_an_ordinary_user(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert "--uid 1000" in "\n".join(lines)
    for source in re.findall(r"^COPY (.*) \S+$", "\n".join(lines), re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), f"{file.name} copies {name}"


def test_the_client_image_has_the_client_alone() -> None:
    """`pip install .` without extras: neither Ray nor torch."""
    text = (CLUSTER / "docker/Dockerfile.client").read_text(encoding="utf-8")
    assert "pip install --no-cache-dir . " in text and "serve" not in text.partition("COPY")[2]


def test_compose_hangs_together() -> None:
    """Secrets and volumes that are used are declared, and nothing runs as root."""
    compose = read(CLUSTER / "docker/compose.yaml")
    for name, service in compose["services"].items():
        assert service["user"].split(":")[0] != "0" and service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("..") or source in compose["volumes"], volume
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert service["healthcheck"]["test"]


def test_compose_starts_redis_with_its_users(tmp_path: Path) -> None:
    """Everything had the password of the user who may do all."""
    compose = read(CLUSTER / "docker/compose.yaml")
    redis = compose["services"]["redis"]
    command = redis["command"]
    assert command[command.index("--aclfile") + 1] == f"/run/secrets/{redis['secrets'][0]}"
    made = write_acl(tmp_path / "redis").parent
    for name, secret in compose["secrets"].items():
        if secret["file"].startswith("./secrets/redis/"):
            assert (made / Path(secret["file"]).name).is_file(), name
    assert "default" not in compose["secrets"], "for people, not for the service"


def test_compose_settings_are_settings() -> None:
    """The service's S2T_ variables load, on top of the settings file that it mounts."""
    service = read(CLUSTER / "docker/compose.yaml")["services"]["s2t"]
    environment = {k: str(v) for k, v in service["environment"].items()}
    config = load_config(CLUSTER / "laptop.yaml", environment=environment)
    secrets = {f"/run/secrets/{name}" for name in service["secrets"]}
    security = config.security
    named = {security.certificate, security.key, security.authority, security.token_file}
    assert config.redis.password_dir is not None
    named |= {config.redis.password_dir / role.value for role in RedisRole}
    assert {str(file) for file in named} == secrets
    assert service["ports"][0] == f"{config.gateway.port}:{config.gateway.port}"


# -- certificates ---------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_certificates_are_for_the_names_given(tmp_path: Path) -> None:
    """The servers' certificate is checked as a client does: by the authority, for the name. A
    second run keeps the authority and the tokens, or every client would have to be told."""
    script = str(CLUSTER / "certificates.sh")
    folder = tmp_path / "secrets"
    subprocess.run(["sh", script, str(folder), "s2t.internal"], check=True, capture_output=True)
    kept = {name: (folder / name).read_bytes() for name in ("ca.crt", "token", "ray-token")}
    subprocess.run(["sh", script, str(folder), "s2t.internal", "10.0.0.5"], check=True)
    assert kept == {name: (folder / name).read_bytes() for name in kept}
    assert len(kept["token"].strip()) >= 16
    assert (tmp_path / "secrets-authority/ca.key").stat().st_mode & 0o077 == 0
    assert {file.name for file in folder.iterdir()} == {*kept, "tls.crt", "tls.key"}
    assert (folder / "tls.key").stat().st_mode & 0o077 == 0
    for name in ("s2t.internal", "10.0.0.5", "localhost", "127.0.0.1"):
        handshake(folder, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, "elsewhere.internal")


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_a_key_of_the_authority_from_before_is_moved_away(tmp_path: Path) -> None:
    """It lay among the files that every node gets. A new one instead would part old from new."""
    script = str(CLUSTER / "certificates.sh")
    folder = tmp_path / "secrets"
    subprocess.run(["sh", script, str(folder)], check=True, capture_output=True)
    kept = (folder / "ca.crt").read_bytes()
    (tmp_path / "secrets-authority/ca.key").rename(folder / "ca.key")
    subprocess.run(["sh", script, f"{folder}/", "s2t.internal"], check=True, capture_output=True)
    assert not (folder / "ca.key").exists() and (folder / "ca.crt").read_bytes() == kept
    handshake(folder, "s2t.internal")


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_nodes_get_no_key_of_the_authority(name: str) -> None:
    """Whoever broke into one node could be every server. A whole folder brought along what lies
    in it."""
    for source in read(CLUSTER / f"vm/{name}.yaml")["file_mounts"].values():
        assert source == "./secrets" or (CLUSTER / source).is_file(), source


def handshake(folder: Path, name: str) -> None:
    """TLS between two ends in memory; raises what the client finds wrong."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(down, up, server_hostname=name)
    theirs = server.wrap_bio(up, down, server_side=True)
    for _ in range(3):
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ours.version() == "TLSv1.3"
