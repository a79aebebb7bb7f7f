"""`s2t up`: a service that stays when the command ends. `down` ends it.

On a Ray cluster with a Redis of its own, Serve keeps the service. Elsewhere somebody must hold what
the service needs: a process in the background that does what `s2t serve` does.

    up --+-- a service runs already ----------> deploy what changed
         +-- a Ray cluster and redis.url -----> deploy; nothing of ours stays but the deployments
         +-- else ----------------------------> start `s2t serve` in the background, wait for it
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import ray
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError
from s2t_shared.files import private_folder
from services.launch.deploy import Say, deploy, start_serve
from services.launch.local import check_models, check_port, check_security, claimed
from services.launch.ray_connection import existing_ray
from services.launch.service_record import ServiceRecord, find_service, read_record, write_record
from services.roles import APPLICATION, runs_proposers

LOG = "serve.log"
SETTINGS = "serve.yaml"
POLL_S = 0.1


def up(config: Config, say: Say) -> list[str]:
    """Bring the service up, or what changed of it; returns host:port of each gateway, or of each
    selector where there are only these.

    Raises:
        ConfigError: a setting is wrong, or the service did not start.
        ModelLoadError: a tokenizer is missing.
        TokenizerMismatchError: SLM and LLM tokenize differently.
        StoreError: Redis cannot be reached or started.
    """
    check_security(config)
    check_models(config)
    record = read_record(config.data_dir)
    with existing_ray(record.ray if record else "") as found:
        if found and _runs():
            return _replace_changed(config, record, say)
        if found and (config.redis.url or not runs_proposers(config)):
            return _deploy_detached(config, say)
    check_port(config)
    return _start_holder(config, say)


def _runs() -> bool:
    """Whether this Ray cluster has a service."""
    application = serve.status().applications.get(APPLICATION)
    return application is not None and application.status != ApplicationStatus.DELETING


def _replace_changed(config: Config, record: ServiceRecord | None, say: Say) -> list[str]:
    head = ray.get_runtime_context().gcs_address
    if record is None or record.ray != head:
        raise ConfigError(
            f"the service in this Ray cluster is not one that `s2t up` started on data_dir="
            f"{config.data_dir}: change it the way it was started, or end it (RAY_ADDRESS={head} "
            "s2t down) and start this one, or give this one a Ray of its own: RAY_ADDRESS=local"
        )
    config = record.with_redis(config)
    say("changed: " + ("; ".join(record.changes(config)) or "nothing"))
    return _deployed(config, say, record.pid)


def _deploy_detached(config: Config, say: Say) -> list[str]:
    start_serve()
    with claimed():
        return _deployed(config, say, pid=0)


def _deployed(config: Config, say: Say, pid: int) -> list[str]:
    addresses = deploy(config, say)
    head = ray.get_runtime_context().gcs_address
    write_record(config, addresses[0], head, pid)
    return addresses


# -- a process that holds Redis and Ray -----------------------------------------------------------


def _start_holder(config: Config, say: Say) -> list[str]:
    folder = config.data_dir
    private_folder(folder)
    settings, log = folder / SETTINGS, folder / LOG
    _write_private(settings, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    with log.open("ab") as output:
        start = output.tell()
        command = [sys.executable, "-m", "services.main", "serve", "--config", str(settings)]
        holder = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with log.open("rb") as written:
        written.seek(start)
        try:
            return [_await_service(holder, folder, written, say)]
        except BaseException:  # Ctrl-C while it starts must not leave it behind
            holder.terminate()
            raise


def _await_service(holder: subprocess.Popen[bytes], folder: Path, log: IO[bytes], say: Say) -> str:
    """The address, as soon as the service that `holder` starts answers; relays what it says."""
    last = ""
    while True:
        ended = holder.poll() is not None
        for line in _lines(log):
            last = line.removeprefix("s2t: ")
            if not ended and not line.startswith("serving at "):
                say(line)
        if ended:
            raise ConfigError(
                f"the service did not start: {last or 'it said nothing'} (log: {folder / LOG})"
            )
        record = find_service(folder)
        if record is not None and record.pid == holder.pid:
            return record.address
        time.sleep(POLL_S)


def _lines(log: IO[bytes]) -> Iterator[str]:
    for line in log.read().decode(errors="replace").splitlines():
        if line.strip():
            yield line.strip()


def _write_private(file: Path, text: str) -> None:
    """Write what may hold a password: for this user's eyes only."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
