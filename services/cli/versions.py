"""`s2t versions`: the registry on the command line. Parses and prints; `s2t_shared.registry` does
the work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from s2t_shared.errors import VersionError
from services.cli.options import ConfigFile, DataDir, Json, settings, wide_console

if TYPE_CHECKING:
    from s2t_shared.versions.registry import Live, Registry

versions_app = typer.Typer(no_args_is_help=True, help="Published local selectors.")
Version = Annotated[str, typer.Argument(help="a version's name, or live")]


def _registry(config: Path | None, data_dir: Path | None) -> Registry:
    from s2t_shared.versions.registry import Registry

    return Registry(settings(config, data_dir=str(data_dir) if data_dir else None).versions)


def _name(registry: Registry, version: str) -> str:
    """Raises VersionError: "live", and none is."""
    if version != "live":
        return version
    if (live := registry.live()) is None:
        raise VersionError("no version is live; promote one (s2t versions promote VERSION)")
    return live


@versions_app.command("list")
def list_versions(
    config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False
) -> None:
    """All versions, what was measured of them, and which share of the requests each gets."""
    registry = _registry(config, data_dir)
    state, (manifests, broken) = registry.state(), registry.manifests()
    if json_out:
        print(
            json.dumps(
                [
                    *(
                        {
                            **m.model_dump(mode="json"),
                            "live": m.version == state.version,
                            "share": state.share(m.version),
                        }
                        for m in manifests
                    ),
                    *({"version": name, "broken": text} for name, text in broken.items()),
                ]
            )
        )
        return
    table = Table("version", "live", "kind", "reads", "Agree@1", "SLM's own", "labels")
    for m in manifests:
        table.add_row(
            m.version,
            _mark(state, m.version),
            m.kind.value,
            m.reads.value,
            _figure(m.metrics, "agree_at_1"),
            _figure(m.metrics, "slm_agree_at_1"),
            str(m.training.get("training_labels", "")),
        )
    for name, text in broken.items():
        table.add_row(name, _mark(state, name), f"broken: {escape(text)}")
    wide_console().print(table if manifests or broken else "no versions; train one with: s2t train")


def _mark(state: Live, version: str) -> str:
    share = state.share(version)
    return "*" if share == 1.0 else f"{share:.0%}" if share else ""


def _figure(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else ""


@versions_app.command()
def show(
    version: Version, config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False
) -> None:
    """One version's manifest, and what the gate said and happened to it."""
    registry = _registry(config, data_dir)
    manifest = registry.manifest(_name(registry, version))
    events = registry.events(manifest.version)
    if json_out:
        print(json.dumps({**manifest.model_dump(mode="json"), "events": events}))
        return
    print(manifest.model_dump_json(indent=2))
    for event in events:
        print(_told(event))


def _told(event: dict[str, Any]) -> str:
    """ "2026-01-02 03:04:05  gate: refused: held-out Agree@1 ..." """
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("at", 0)))
    if event.get("event") == "gate":
        return f"{at}  gate: {'passed' if event.get('passed') else 'refused'}: {'; '.join(event.get('reasons', ()))}"
    share = f" for {event['share']:.0%} of the requests" if "share" in event else ""
    return f"{at}  {event.get('event')}{share}" + (
        f" to {event['to'] or 'none'}" if "to" in event else ""
    )


@versions_app.command()
def verify(
    version: Annotated[str, typer.Argument(help="a version's name, live, or all")] = "all",
    model: Annotated[
        bool, typer.Option("--model", help="also load it into the configured SLM")
    ] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Check manifests, hashes and weights; says what is wrong with each version. Exit status 1 if
    anything is."""
    registry = _registry(config, data_dir)
    runtime, digest = _slm(config) if model else (None, "")
    found: dict[str, str] = {}
    for name in registry.names() if version == "all" else [_name(registry, version)]:
        try:
            registry.verify(name, runtime, digest)
            found[name] = ""
        except VersionError as error:
            found[name] = str(error)
    if json_out:
        print(
            json.dumps(
                [{"version": name, "ok": not text, "detail": text} for name, text in found.items()]
            )
        )
    else:
        for name, text in found.items():
            print(f"{'FAIL' if text else 'ok'}  {name}{': ' if text else ''}{text}")
    if any(found.values()):
        raise typer.Exit(1)


def _slm(config: Path | None) -> tuple[Any, str]:
    from s2t_shared.model.runtime import ModelRuntime, resolve_model
    from s2t_shared.model.tokenizer import Tokenizer

    resolved = settings(config)
    runtime = ModelRuntime.load(resolved.slm.model, resolved.slm.dtype, "cpu")
    return runtime, Tokenizer.load(
        resolve_model(resolved.slm.model), resolved.slm.chat_template
    ).digest


@versions_app.command()
def diff(
    a: Version,
    b: Version,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """In what version B differs from A: settings, training, metrics, data, files."""
    from s2t_shared.versions.manifest import changes

    registry = _registry(config, data_dir)
    left, right = (registry.manifest(_name(registry, name)) for name in (a, b))
    found = changes(left, right)
    if json_out:
        print(
            json.dumps(
                [
                    {
                        "section": c.section,
                        "name": c.name,
                        "a": c.a,
                        "b": c.b,
                        "difference": c.difference,
                    }
                    for c in found
                ]
            )
        )
        return
    table = Table("", "", left.version, right.version, "difference")
    for c in found:
        table.add_row(
            c.section,
            c.name,
            _short(c.a),
            _short(c.b),
            f"{c.difference:+.4g}" if c.difference is not None else "",
        )
    wide_console().print(table if found else "no difference but the name and the time")


def _short(value: Any) -> str:
    """Enough of a value to tell it from another: hashes and lists are cut."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= 32 else text[:16] + "...")


@versions_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="a version's name")],
    share: Annotated[
        float | None,
        typer.Option(help="as the canary, for this share of the requests that name no version"),
    ] = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Make a version live, or with --share the canary; proposers take it up by themselves."""
    registry = _registry(config, data_dir)
    registry.promote(version, share)
    _say_live(registry)


@versions_app.command()
def rollback(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """End the canary; without one, go back to the version that was live before."""
    registry = _registry(config, data_dir)
    registry.rollback()
    _say_live(registry)


def _say_live(registry: Registry) -> None:
    state = registry.state()
    canary = (
        f"; canary: {state.canary.version} for {state.canary.share:.0%} of the requests"
        if state.canary
        else ""
    )
    print(f"live: {state.version or 'none'}{canary}")


@versions_app.command()
def export(
    version: Version,
    folder: Annotated[Path, typer.Argument(help="a new or empty folder")],
    merged: Annotated[
        bool, typer.Option("--merged", help="a plain Hugging Face model, LoRA merged in")
    ] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Copy a version's PEFT files, or with --merged write the SLM with the LoRA in its weights."""
    from s2t_shared.versions.export import export_adapter, export_merged

    registry = _registry(config, data_dir)
    source = registry.folder(_name(registry, version))
    done = (
        export_merged(source, settings(config).slm.model, folder)
        if merged
        else export_adapter(source, folder)
    )
    for note in done.notes:
        print(f"note: {note}")
    print(f"{source.name} -> {done.folder}")
