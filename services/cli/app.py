"""The `s2t` command. Parses, dispatches, and turns errors into one line and an exit status; does no
work itself.

Exit status: 0 done, 1 some input failed, 2 a setting or input file is wrong, 3 a service or store
is not available.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer  # noqa: E402 - the environment above is read at import

import services.cli.bench_capacity  # noqa: E402, F401 - a verb of bench
import services.cli.dead_letters  # noqa: E402, F401 - a verb of labels
from s2t_shared.config import Config  # noqa: E402
from s2t_shared.errors import (  # noqa: E402
    ConfigError,
    EvaluationSplitError,
    InvalidRequestError,
    ModelLoadError,
    S2TError,
    VersionError,
)
from s2t_shared.redis_url import without_password  # noqa: E402
from services.cli.bench import bench_app  # noqa: E402
from services.cli.cluster import down, init_app, status, up  # noqa: E402
from services.cli.evaluate import evaluate, sweep  # noqa: E402
from services.cli.generate import generate  # noqa: E402
from services.cli.harvest import harvest  # noqa: E402
from services.cli.labels import labels_app  # noqa: E402
from services.cli.options import (  # noqa: E402
    LLM,
    SLM,
    Address,
    ConfigFile,
    DataDir,
    Host,
    HTTPPort,
    Json,
    Port,
    TokenFile,
    as_typed,
    service_settings,
    settings,
    settings_beside_service,
    show,
)
from services.cli.plan import plan  # noqa: E402
from services.cli.train import train  # noqa: E402
from services.cli.versions import versions_app  # noqa: E402

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Select-to-Think: a small model answers, a large one only selects.",
)
app.add_typer(versions_app, name="versions")
app.add_typer(labels_app, name="labels")
app.add_typer(bench_app, name="bench")
app.add_typer(init_app, name="init")
USER_ERRORS = (ConfigError, InvalidRequestError, ModelLoadError, VersionError, EvaluationSplitError)


def run() -> None:
    """Entry point: errors become one line on stderr."""
    try:
        app()
    except S2TError as error:
        print(f"s2t: {as_typed(str(error), sys.argv[1:])}", file=sys.stderr)
        sys.exit(2 if isinstance(error, USER_ERRORS) else 3)


@app.command()
def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the numbers here")
    ] = None,
) -> None:
    """The whole loop on this machine with the bundled pair: serve, ask, harvest, train, swap, ask
    again."""
    from services.demo import run_demo

    run_demo(json_file)


@app.command()
def serve(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    http_port: HTTPPort = None,
    slm: SLM = None,
    llm: LLM = None,
) -> None:
    """Run the service until Ctrl-C."""
    import signal

    from services.launch.local import running_service

    resolved = service_settings(config, data_dir, host, port, http_port, slm, llm)
    try:
        with running_service(
            resolved, say=lambda line: print(line, flush=True), reuse_ray=True
        ) as service:
            # Here, because Ray sets handlers of its own when it starts.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if service.url:
                print(f"{service.url} (playground), {service.url}/v1 (OpenAI's API)", flush=True)
            print(f"serving at {service.address} (gRPC); Ctrl-C stops", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped")


app.command()(up)


app.command()(down)


app.command()(status)


app.command()(plan)


app.command()(generate)


app.command()(harvest)


app.command()(train)


app.command("eval")(evaluate)
app.command()(sweep)


@app.command()
def doctor(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    address: Address = None,
    token_file: TokenFile = None,
    json_out: Json = False,
) -> None:
    """Check this installation, its configuration and the service that runs; each finding says how
    to mend it. Exit status 1 where something fails."""
    from services.cli.findings import show_findings
    from services.launch.doctor import examine
    from services.launch.findings import Level

    resolved = settings_beside_service(config, lambda line: None, data_dir=data_dir)
    findings = examine(resolved, address, token_file)
    if json_out:
        found = list(findings)
        print(json.dumps([asdict(finding) for finding in found]))
    else:
        found = show_findings(findings)
    if any(finding.level is Level.FAIL for finding in found):
        raise typer.Exit(1)


@app.command("redis-acl")
def redis_acl(
    folder: Annotated[Path, typer.Argument(help="for the ACL file and the passwords")],
    json_out: Json = False,
) -> None:
    """Make Redis users with the least rights, one for each role, and their passwords.

    Doing it again keeps the passwords and writes the rules anew.
    """
    from services.launch.redis_acl import write_acl

    acl = write_acl(folder).absolute()
    if json_out:
        show({"acl_file": str(acl), "password_dir": str(acl.parent)}, json_out)
        return
    print(f"{acl}: producer (proposers), consumer (gateways), admin (verbs, doctor), default (all)")
    print(f"server:  redis-server --aclfile {acl}")
    print(f"service: redis.password_dir: {acl.parent}, and no user or password in redis.url")
    print("a node needs only the password files of the roles that run on it")


@app.command("config")
def show_config(
    config: ConfigFile = None,
    schema: Annotated[bool, typer.Option("--schema", help="the JSON schema, for editors")] = False,
) -> None:
    """Print the resolved configuration, but for passwords."""
    import yaml

    resolved = settings(config)
    values = resolved.model_dump(mode="json")
    if resolved.redis.url:
        values["redis"]["url"] = without_password(resolved.redis.url)
    print(
        json.dumps(Config.model_json_schema(), indent=2)
        if schema
        else yaml.safe_dump(values, sort_keys=False),
        end="",
    )
