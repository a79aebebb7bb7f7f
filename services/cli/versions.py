"""`s2t versions`: published versions on the command line. Parses and prints; the work is done by
`s2t_shared.versions`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from s2t_shared.errors import VersionError
from services.cli.options import ConfigFile, DataDir, Json, settings, wide_console

if TYPE_CHECKING:
    from s2t_shared.model.runtime import ModelRuntime
    from s2t_shared.versions.live import Live, LiveVersions
    from s2t_shared.versions.manifest import Change, Manifest

versions_app = typer.Typer(no_args_is_help=True, help="Published local selectors.")
Version = Annotated[str, typer.Argument(help="a version's name, or live")]
SHORT = 32  # characters of a value in a table


def _live_versions(config: Path | None, data_dir: Path | None) -> LiveVersions:
    from s2t_shared.versions.live import LiveVersions

    resolved = settings(config, data_dir=data_dir)
    return LiveVersions(resolved.versions)


def _manifest(versions: LiveVersions, version: str) -> Manifest:
    return versions.registry.manifest(versions.resolve(version))


# -- list and show --------------------------------------------------------------------------------


@versions_app.command("list")
def list_versions(
    config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False
) -> None:
    """All versions, what was measured of them, and which share of the requests each gets."""
    versions = _live_versions(config, data_dir)
    state = versions.state()
    manifests, broken = versions.registry.manifests()
    if json_out:
        print(json.dumps(_rows(state, manifests, broken)))
        return
    table = Table("version", "live", "kind", "reads", "Agree@1", "SLM's own", "labels")
    for m in manifests:
        table.add_row(
            m.version,
            _mark(state, m.version),
            "always on" if m.always_on else m.kind.value,
            m.reads.value,
            _figure(m.metrics, "agree_at_1"),
            _figure(m.metrics, "slm_agree_at_1"),
            str(m.training.get("training_labels", "")),
        )
    for name, reason in broken.items():
        table.add_row(name, _mark(state, name), f"broken: {escape(reason)}")
    wide_console().print(table if manifests or broken else "no versions; train one with: s2t train")


def _rows(state: Live, manifests: list[Manifest], broken: dict[str, str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for manifest in manifests:
        row = manifest.model_dump(mode="json")
        row["live"] = manifest.version == state.version
        row["share"] = state.share(manifest.version)
        rows.append(row)
    for name, reason in broken.items():
        rows.append({"version": name, "broken": reason})
    return rows


def _mark(state: Live, version: str) -> str:
    """ "*" for the only version that serves, else its share, "" for none."""
    share = state.share(version)
    if share == 1.0:
        return "*"
    return f"{share:.0%}" if share else ""


def _figure(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else ""


@versions_app.command()
def show(
    version: Version, config: ConfigFile = None, data_dir: DataDir = None, json_out: Json = False
) -> None:
    """One version's manifest, the gate's verdicts on it, and what happened to it."""
    versions = _live_versions(config, data_dir)
    manifest = _manifest(versions, version)
    events = versions.events(manifest.version)
    if json_out:
        print(json.dumps({**manifest.model_dump(mode="json"), "events": events}))
        return
    print(manifest.model_dump_json(indent=2))
    for event in events:
        print(_event_line(event))


def _event_line(event: dict[str, Any]) -> str:
    """For example "2026-01-02 03:04:05  gate: refused: held-out Agree@1 ..."."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("at", 0)))
    if event.get("event") == "gate":
        verdict = "passed" if event.get("passed") else "refused"
        reasons = "; ".join(event.get("reasons", ()))
        return f"{at}  gate: {verdict}: {reasons}"
    line = f"{at}  {event.get('event')}"
    if "share" in event:
        line += f" for {event['share']:.0%} of the requests"
    if "to" in event:
        line += f" to {event['to'] or 'none'}"
    return line


# -- verify and diff ------------------------------------------------------------------------------


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
    """Check manifests, hashes and weights; print what is wrong with each version. Exit status 1 if
    anything is."""
    versions = _live_versions(config, data_dir)
    registry = versions.registry
    runtime, tokenizer_digest = _slm(config) if model else (None, "")
    names = registry.names() if version == "all" else [versions.resolve(version)]
    faults: dict[str, str] = {}
    for name in names:
        try:
            registry.verify(name, runtime, tokenizer_digest)
            faults[name] = ""
        except VersionError as error:
            faults[name] = str(error)
    if json_out:
        rows = [{"version": name, "ok": not text, "detail": text} for name, text in faults.items()]
        print(json.dumps(rows))
    else:
        for name, text in faults.items():
            print(f"FAIL  {name}: {text}" if text else f"ok  {name}")
    if any(faults.values()):
        raise typer.Exit(1)


def _slm(config: Path | None) -> tuple[ModelRuntime, str]:
    """The configured SLM and its tokenizer's digest."""
    from s2t_shared.model.folders import resolve_model
    from s2t_shared.model.runtime import ModelRuntime
    from s2t_shared.model.tokenizer import Tokenizer

    resolved = settings(config)
    slm = resolved.slm
    runtime = ModelRuntime.load(slm.model, slm.dtype, "cpu")
    tokenizer = Tokenizer.load(resolve_model(slm.model), slm.chat_template)
    return runtime, tokenizer.digest


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

    versions = _live_versions(config, data_dir)
    left = _manifest(versions, a)
    right = _manifest(versions, b)
    found = changes(left, right)
    if json_out:
        rows = [{**asdict(change), "difference": change.difference} for change in found]
        print(json.dumps(rows))
        return
    table = Table("", "", left.version, right.version, "difference")
    for change in found:
        table.add_row(
            change.section, change.name, _short(change.a), _short(change.b), _difference(change)
        )
    wide_console().print(table if found else "no difference but the name and the time")


def _difference(change: Change) -> str:
    return f"{change.difference:+.4g}" if change.difference is not None else ""


def _short(value: Any) -> str:
    """A value as a table shows it. Long hashes and lists are cut."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= SHORT else text[: SHORT // 2] + "...")


# -- promote, roll back, export -------------------------------------------------------------------


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
    versions = _live_versions(config, data_dir)
    versions.promote(version, share)
    _print_live(versions)


@versions_app.command()
def rollback(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """End the canary; without one, go back to the version that was live before."""
    versions = _live_versions(config, data_dir)
    versions.rollback()
    _print_live(versions)


def _print_live(versions: LiveVersions) -> None:
    state = versions.state()
    line = f"live: {state.version or 'none'}"
    if state.canary is not None:
        line += f"; canary: {state.canary.version} for {state.canary.share:.0%} of the requests"
    print(line)


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

    versions = _live_versions(config, data_dir)
    source = versions.registry.folder(versions.resolve(version))
    if merged:
        exported = export_merged(source, settings(config).slm.model, folder)
    else:
        exported = export_adapter(source, folder)
    for note in exported.notes:
        print(f"note: {note}")
    print(f"{source.name} -> {exported.folder}")
