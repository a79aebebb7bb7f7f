"""`s2t harvest`: flags to options, progress, and what a run prints.

The work is in `services.harvest`.
"""

from __future__ import annotations

import hashlib
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.requests import by_name
from s2t_shared.types import LabelRule, Trigger
from services.cli.options import (
    Address,
    BatchSize,
    Chat,
    ConfigFile,
    DataDir,
    Device,
    Dtype,
    GroupColumn,
    Json,
    LLMRuntime,
    PromptColumn,
    PromptTemplate,
    Quantization,
    TensorParallel,
    Threads,
    TokenFile,
    llm_vllm_options,
    settings,
    show,
    target,
)
from services.cli.progress import progress

if TYPE_CHECKING:
    from s2t_shared.config import Config
    from s2t_shared.data.prompts import PromptSource
    from s2t_shared.decode.vllm_options import VLLMOptions
    from s2t_shared.labels.lake import Lake
    from s2t_shared.pair import Pair
    from services.harvest.rollouts import HarvestOptions, RolloutSource
    from services.harvest.run import HarvestOutcome, Prompts

POSITIONS = {
    "kl": (Trigger.KL,),
    "entropy": (Trigger.ENTROPY,),
    "both": (Trigger.ENTROPY, Trigger.KL),
}


def harvest(
    prompts: Annotated[
        str, typer.Argument(help="JSONL, Parquet, Hugging Face dataset folder or hub id")
    ],
    out: Annotated[
        str | None,
        typer.Option(help="the lake's folder or s3://... URL; without: the service's own"),
    ] = None,
    slm: Annotated[
        str | None, typer.Option(help="harvest in this process, without a service")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="with --slm")] = None,
    address: Address = None,
    token_file: TokenFile = None,
    prompt_column: PromptColumn = None,
    id_column: Annotated[
        str | None, typer.Option(help="default: id, else the row's number")
    ] = None,
    group_column: GroupColumn = None,
    template: PromptTemplate = None,
    chat: Chat = False,
    system: Annotated[
        str | None, typer.Option(help="system message before it (implies --chat)")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="with --slm: a Jinja file")] = None,
    task: Annotated[str, typer.Option(help="name stored with the labels")] = "",
    split: Annotated[str, typer.Option(help="recorded; an evaluation split is refused")] = "train",
    limit: Annotated[int | None, typer.Option(help="prompts at most, the first ones")] = None,
    positions: Annotated[
        str, typer.Option(help="what becomes a label: the top share by kl, entropy or both")
    ] = "both",
    budget: Annotated[float, typer.Option(help="that share, per signal")] = 0.1,
    threshold: Annotated[
        list[str] | None, typer.Option(help="kl=0.5, entropy=1.2: not a share")
    ] = None,
    intervene: Annotated[
        bool, typer.Option("--intervene", help="S2T rollouts instead of greedy ones")
    ] = False,
    candidates: Annotated[int, typer.Option(help="K of a label")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="of a rollout")] = 256,
    calibrate_on: Annotated[int, typer.Option(help="first prompts that give the thresholds")] = 64,
    again: Annotated[
        bool, typer.Option("--again", help="also what is done: labels were lost")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(help="rollouts asked at once (0: 64 per proposer)")
    ] = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    llm_runtime: LLMRuntime = "torch",
    tensor_parallel: TensorParallel = 1,
    quantization: Quantization = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Turn training prompts into selection labels. The same command again goes on where it was
    stopped."""
    from s2t_shared.data.prompts import PromptSource
    from services.harvest.rollouts import HarvestOptions, PairRollouts, ServiceRollouts

    _stop_on_signals()
    thresholds = tuple(_label_rule(text) for text in threshold or ())
    prompt_source = PromptSource(
        source=prompts,
        split=split,
        id_column=id_column,
        group_column=group_column,
        prompt_column=prompt_column,
        template=template,
        system=system,
        chat=chat or system is not None,
    )
    options = HarvestOptions(
        task=task,
        split=split,
        triggers=tuple(rule.trigger for rule in thresholds) or _triggers(positions),
        budget=budget,
        thresholds=thresholds,
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        intervene=intervene,
        calibrate_on=calibrate_on,
    )
    opened = _open_prompts(prompt_source, limit)
    source: RolloutSource
    if slm or llm:
        if not (slm and llm and out):
            raise ConfigError("harvesting without a service needs --slm, --llm and --out")
        vllm = llm_vllm_options(llm_runtime, dtype, tensor_parallel, quantization)
        pair = _open_pair(slm, llm, dtype, device, batch_size, threads, chat_template, vllm)
        source = PairRollouts(pair)
    else:
        source = ServiceRollouts(target(address, config, token_file), out is not None, concurrency)
    destination = _destination(out, settings(config, data_dir=data_dir))
    _harvest(source, opened, destination, options, again, json_out)


def _stop_on_signals() -> None:
    """Both signals raise KeyboardInterrupt, also where a shell started us with one ignored."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


def _triggers(positions: str) -> tuple[Trigger, ...]:
    """The triggers that `--positions` names.

    Raises:
        InvalidRequestError: unknown.
    """
    if positions not in POSITIONS:
        raise InvalidRequestError(f"--positions={positions!r}: choose from {', '.join(POSITIONS)}")
    return POSITIONS[positions]


def _label_rule(text: str) -> LabelRule:
    """The rule of one `--threshold`: `kl=NUMBER` or `entropy=NUMBER`.

    Raises:
        InvalidRequestError: another trigger, or no number.
    """
    name, _, value = text.partition("=")
    trigger = by_name(Trigger, name, "--threshold")
    threshold = None
    with suppress(ValueError):
        threshold = float(value)
    if threshold is None or trigger not in (Trigger.KL, Trigger.ENTROPY):
        raise InvalidRequestError(f"--threshold={text!r}: write kl=NUMBER or entropy=NUMBER (nats)")
    return LabelRule(trigger, threshold)


def _open_prompts(source: PromptSource, limit: int | None) -> Prompts:
    from services.harvest.run import open_prompts

    return open_prompts(source, limit, say)


def _open_pair(
    slm: str,
    llm: str,
    dtype: str,
    device: str,
    batch_size: int,
    threads: int | None,
    chat_template: Path | None,
    vllm: VLLMOptions | None,
) -> Pair:
    from s2t_shared.pair import Pair

    return Pair.open(
        slm,
        llm,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        threads=threads,
        chat_template=_read_template(chat_template),
        vllm=vllm,
    )


def _read_template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--chat-template {str(file)!r} cannot be read: {error.strerror}"
        ) from error


@dataclass(frozen=True)
class _Destination:
    """A lake, and the folder where the journals of its harvests lie."""

    lake: Lake
    journals: Path


def _destination(out: str | None, config: Config) -> _Destination:
    """out: the lake's folder or URL; without, the labels go through a service, and only the journal
    is kept here."""
    from s2t_shared.labels.lake import Lake
    from s2t_shared.labels.object_lake import open_lake
    from s2t_shared.labels.places import is_url

    if out is None:
        return _Destination(Lake(config.lake_folder), config.lake_folder)
    if not is_url(out):
        return _Destination(Lake(Path(out)), Path(out))
    lake = open_lake(out)
    name = hashlib.sha256(lake.where.encode()).hexdigest()[:16]
    return _Destination(lake, config.data_dir / "harvests" / name)


def _harvest(
    source: RolloutSource,
    prompts: Prompts,
    destination: _Destination,
    options: HarvestOptions,
    again: bool,
    json_out: bool,
) -> None:
    """Run, show progress, and print what came of it."""
    from services.harvest.run import harvest as run_harvest

    try:
        with progress("prompts", prompts.total, json_out) as shown:

            def on_progress(outcome: HarvestOutcome) -> None:
                rate = outcome.new_labels / shown.seconds
                note = f"{outcome.labels:,} labels, {rate:.1f} labels/s"
                shown.update(outcome.answered, note=note)

            outcome = run_harvest(
                source,
                prompts,
                destination.lake,
                options,
                on_progress,
                say,
                again,
                destination.journals,
            )
    except KeyboardInterrupt:
        say("stopped; what was finished is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    _print(outcome, destination.lake.where, json_out)


def _print(outcome: HarvestOutcome, lake: str, json_out: bool) -> None:
    """Print the outcome; exit with 1 if a prompt gave no labels because of an error."""
    for text in [*outcome.errors, *outcome.failed]:
        say(text)
    values = {
        "lake": lake,
        "run": outcome.run,
        "prompts": outcome.prompts,
        "resumed": outcome.resumed,
        "rollouts": outcome.rollouts,
        "labels": outcome.labels,
        "tokens": outcome.tokens,
        "errors": len(outcome.errors),
        "failed": len(outcome.failed),
    }
    show(values, json_out)
    if outcome.failed:
        say(
            f"{len(outcome.failed)} prompts failed this time, see above; the same command tries "
            "their chunks again"
        )
    if outcome.errors or outcome.failed:
        raise typer.Exit(1)


def say(line: str) -> None:
    print(f"s2t: {line}", file=sys.stderr, flush=True)
