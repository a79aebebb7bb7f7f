"""`s2t up`, `down` and `status`, and `s2t init cluster`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import (
    LLM,
    SLM,
    ConfigFile,
    DataDir,
    Host,
    HTTPPort,
    Json,
    Port,
    service_settings,
    settings,
)

if TYPE_CHECKING:
    from services.launch.status import ServiceStatus

init_app = typer.Typer(no_args_is_help=True, help="Write files to start from.")


def up(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    http_port: HTTPPort = None,
    slm: SLM = None,
    llm: LLM = None,
) -> None:
    """Bring the service up and leave it running; of one that runs, replace what changed."""
    from services.launch.up import up as bring_up

    resolved = service_settings(config, data_dir, host, port, http_port, slm, llm)
    began = time.monotonic()
    addresses = bring_up(resolved, say)
    took = time.monotonic() - began
    print(f"serving at {', '.join(addresses)} (gRPC), after {took:.0f} s; s2t down ends it")


def down(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """End the service that `s2t up` left running."""
    from services.launch.down import down as bring_down

    resolved = settings(config, data_dir=data_dir)
    bring_down(resolved.data_dir, say)


def status(config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False) -> None:
    """Say what runs and what it waits for. Exit status 3: nothing runs, or not all of it."""
    from services.launch.status import status as find_status

    found = find_status(settings(config, data_dir=data_dir))
    if json_out:
        print(json.dumps(asdict(found)))
    else:
        show_status(found)
    if found.state != "RUNNING":
        raise typer.Exit(3)


def show_status(found: ServiceStatus) -> None:
    where = f" at {', '.join(found.addresses)}" if found.addresses else ""
    print(f"{found.state}{where}" + (f": {found.message}" if found.message else ""))
    for name, role in found.roles.items():
        states = ", ".join(f"{count} {state}" for state, count in role.states.items())
        print(f"  {name}: {states or 'none'}")
        if role.awaits:
            print(f"    {role.awaits}")
        for url in role.metrics:
            print(f"    metrics: {url}")
    for name, value in {**found.description, **found.labels}.items():
        print(f"  {name}: {value}")
    if found.error:
        print(f"  {found.error}")


def say(line: str) -> None:
    print(line, flush=True)


@init_app.command("cluster")
def init_cluster(
    folder: Annotated[Path, typer.Argument(help="is made; files that are there are kept")],
) -> None:
    """Write the files to bring a cluster up with: settings, Kubernetes, VMs, SLURM, containers."""
    from services.launch.cluster_files import write_cluster_files

    for file in write_cluster_files(folder):
        print(file)
    print(f"read {folder / 'README.md'} next")
