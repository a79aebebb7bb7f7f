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
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402

from s2t_shared.config import Config  # noqa: E402
from s2t_shared.errors import (  # noqa: E402
    ConfigError,
    EvaluationSplitError,
    InvalidRequestError,
    ModelLoadError,
    S2TError,
    VersionError,
)
from services.cli.bench import bench_app  # noqa: E402
from services.cli.evaluate import evaluate  # noqa: E402
from services.cli.generate import generate  # noqa: E402
from services.cli.harvest import harvest  # noqa: E402
from services.cli.labels import labels_app  # noqa: E402
from services.cli.options import (  # noqa: E402
    Address,
    ConfigFile,
    DataDir,
    Json,
    as_typed,
    settings,
)
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
    host: Annotated[str | None, typer.Option(help="gateway's address")] = None,
    port: Annotated[int | None, typer.Option(help="gateway's port; 0: any free one")] = None,
    slm: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
    llm: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
) -> None:
    """Run the service until Ctrl-C."""
    import signal

    from services.launch.local import running_service

    resolved = settings(
        config,
        data_dir=str(data_dir) if data_dir else None,
        gateway__host=host,
        gateway__port=port,
        slm__model=slm,
        llm__model=llm,
    )
    try:
        with running_service(
            resolved, say=lambda line: print(line, flush=True), reuse_ray=True
        ) as service:
            # Here, because Ray sets handlers of its own when it starts.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print(f"serving at {service.address} (gRPC); Ctrl-C stops", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped")


app.command()(generate)


app.command()(harvest)


app.command()(train)


app.command("eval")(evaluate)


@app.command()
def doctor(config: ConfigFile = None, address: Address = None, json_out: Json = False) -> None:
    """Check this installation and configuration; each failure says how to mend it."""
    from services.launch.doctor import examine

    findings = examine(settings(config), address)
    if json_out:
        print(json.dumps([asdict(f) for f in findings]))
    else:
        for f in findings:
            mark = "[green]ok  [/green]" if f.ok else "[red]FAIL[/red]"
            Console().print(f"{mark} {f.what}: {escape(f.detail)}", soft_wrap=True, highlight=False)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command("config")
def show_config(
    config: ConfigFile = None,
    schema: Annotated[bool, typer.Option("--schema", help="the JSON schema, for editors")] = False,
) -> None:
    """Print the resolved configuration."""
    import yaml

    resolved = settings(config)
    print(
        json.dumps(Config.model_json_schema(), indent=2)
        if schema
        else yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False),
        end="",
    )
