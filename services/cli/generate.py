"""`s2t generate`: the whole method in this process, from a JSONL file to a JSONL file.

No Ray, no Redis, no network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.requests import by_name, new_request
from s2t_shared.types import Answer, GenerateRequest, Mode, Prompt, Proposals, Sampling, Step
from services.cli.options import (
    ConfigFile,
    DataDir,
    LLMRuntime,
    Quantization,
    SLMRuntime,
    TensorParallel,
    llm_vllm_options,
    settings,
    slm_vllm_options,
)
from services.cli.progress import progress


def generate(
    slm: Annotated[str, typer.Option(help="folder or hub id of the SLM")],
    input: Annotated[
        Path, typer.Option(help='JSONL: {"id", and one of "prompt", "messages", "token_ids"}')
    ],
    output: Annotated[Path, typer.Option(help="JSONL, in input order")],
    llm: Annotated[str | None, typer.Option(help="folder or hub id of the LLM")] = None,
    mode: Annotated[
        str, typer.Option(help="greedy, sample, s2t, s2t_local, takeover, llm, majority@N")
    ] = "s2t",
    trigger: Annotated[
        str, typer.Option(help="entropy, kl, kl-reverse, margin, random, never, always")
    ] = "entropy",
    threshold: Annotated[float | None, typer.Option(help="trigger strictly above this")] = None,
    budget: Annotated[
        float | None, typer.Option(help="share of steps that may trigger (default 0.01)")
    ] = None,
    candidates: Annotated[int, typer.Option(help="K, 1..64")] = 8,
    candidate_ratio: Annotated[
        float, typer.Option(help="adaptive: p >= ratio * p_max; 0: fixed K")
    ] = 0.0,
    proposals: Annotated[str, typer.Option(help="base or adapted")] = "base",
    selector: Annotated[
        str, typer.Option(help="none, live, a version's name, or its folder")
    ] = "none",
    max_new_tokens: Annotated[int, typer.Option(help="at least 1")] = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="sequences in one batch")] = 8,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all cores)")] = None,
    seed: Annotated[int, typer.Option(help="of sampling and of the random trigger")] = 0,
    temperature: Annotated[float, typer.Option(help="of sample and majority")] = 0.7,
    on_llm_failure: Annotated[
        str, typer.Option(help="degrade: go on without the LLM; fail: the line fails")
    ] = "degrade",
    steps: Annotated[bool, typer.Option("--steps", help="also write the triggered steps")] = False,
    calibration_prompts: Annotated[
        Path | None, typer.Option(help="JSONL of training prompts to calibrate the budget on")
    ] = None,
    slm_runtime: SLMRuntime = "torch",
    llm_runtime: LLMRuntime = "torch",
    tensor_parallel: TensorParallel = 1,
    quantization: Quantization = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Answer a JSONL file in this process: no Ray, no Redis."""
    if budget is not None and threshold is not None:
        raise InvalidRequestError("give --threshold or --budget, not both")
    if batch_size < 1:
        raise InvalidRequestError(f"--batch-size={batch_size}: must be at least 1")
    template = new_request(
        Prompt(),
        mode,
        trigger=trigger,
        budget=budget,
        threshold=threshold,
        candidates=candidates,
        candidate_ratio=candidate_ratio,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, seed=seed),
        steps=True,
        on_llm_failure=on_llm_failure,
    )
    template = _with_proposals(template, by_name(Proposals, proposals, "--proposals"))
    if template.options.policy.needs_llm and llm is None:
        raise InvalidRequestError(
            f"mode {mode!r} with trigger {trigger!r} asks the LLM; give --llm"
        )
    if template.options.policy.mode is Mode.S2T_LOCAL and selector == "none":
        _say("--selector none: s2t_local selects with an untrained local selector; name a version")
    from s2t_shared.pair import Pair

    pair = Pair.open(
        slm,
        llm,
        None if selector == "none" else selector,
        versions=settings(config, data_dir=data_dir).versions,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        threads=threads,
        vllm=llm_vllm_options(llm_runtime, dtype, tensor_parallel, quantization),
        slm_vllm=slm_vllm_options(slm_runtime, dtype),
    )
    template = pair.with_thresholds(template, calibration_prompts, _say)
    with progress("answers", count_lines(input)) as shown:
        failed = generate_file(pair, template, input, output, steps, shown.advance)
    if failed:
        _say(f"{failed} of the input lines failed, see above; the others are in {output}")
        raise typer.Exit(1)


def _say(line: str) -> None:
    print(f"s2t: {line}", file=sys.stderr)


def _with_proposals(request: GenerateRequest, proposals: Proposals) -> GenerateRequest:
    policy = replace(request.options.policy, proposals=proposals)
    return replace(request, options=replace(request.options, policy=policy))


def count_lines(file: Path) -> int:
    """Lines of a file; 0 where it cannot be read (the command itself reports that)."""
    try:
        with file.open("rb") as stream:
            return sum(1 for _ in stream)
    except OSError:
        return 0


def generate_file(
    pair: Any,
    template: GenerateRequest,
    source: Path,
    target: Path,
    with_steps: bool,
    on_answer: Callable[[], None] = lambda: None,
) -> int:
    """Answer every line of `source` into `target`, in input order, as soon as the order allows.

    template: everything but id and prompt. Returns how many lines failed; each failure is reported
    on stderr with its line number.

    Raises:
        ConfigError: a file cannot be read or written.
        InvalidRequestError: the settings themselves are wrong.
    """
    from s2t_shared.data.prompts import read_prompts
    from s2t_shared.policy import check_policy
    from s2t_shared.requests import check_request

    check_policy(template.options.policy)
    check_request(template)
    rows = list(read_prompts(source))
    index_of: dict[str, int] = {}
    with open_output(target) as stream:
        writer = _OrderedWriter(rows, stream, with_steps)
        for index, (row, prompt) in enumerate(rows):
            if isinstance(prompt, InvalidRequestError):
                writer.add(index, prompt)
            else:
                index_of[row["id"]] = index

        def requests() -> Iterator[GenerateRequest]:
            for row, prompt in rows:
                if isinstance(prompt, Prompt):
                    yield replace(template, request_id=str(row["id"]), prompt=prompt)

        for request, outcome in pair.run(requests()):
            on_answer()
            writer.add(index_of[request.request_id], outcome)
    return writer.failed


class _OrderedWriter:
    """Writes outcomes in input order, whatever the order they come in."""

    def __init__(self, rows: list[Any], stream: TextIO, with_steps: bool) -> None:
        self._rows = rows
        self._stream = stream
        self._with_steps = with_steps
        self._waiting: dict[int, Answer | S2TError] = {}
        self._written = 0
        self.failed = 0

    def add(self, index: int, outcome: Answer | S2TError) -> None:
        self._waiting[index] = outcome
        while self._written in self._waiting:
            row, _ = self._rows[self._written]
            self._write(row, self._waiting.pop(self._written))
            self._written += 1

    def _write(self, row: dict[str, Any], outcome: Answer | S2TError) -> None:
        if isinstance(outcome, Answer):
            line = answer_row(row["id"], outcome, self._with_steps)
            self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            return
        self.failed += 1
        text = str(outcome)
        if not text.startswith("line "):
            text = f"line {row['line']}: {text}"
        print(text, file=sys.stderr)


def open_output(target: Path) -> TextIO:
    """Open a file to write.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return target.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {str(target)!r} cannot be written: {error.strerror}") from error


def answer_row(request_id: Any, answer: Answer, with_steps: bool) -> dict[str, Any]:
    """One output line. Its keys are a contract: other tools read them."""
    versions = answer.versions
    row: dict[str, Any] = {
        "id": request_id,
        "token_ids": list(answer.token_ids),
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "usage": asdict(answer.usage),
        "versions": {
            "slm": versions.slm,
            "llm": versions.llm,
            "selector": versions.local_selector,
        },
    }
    if with_steps:
        row["steps"] = [step_row(step) for step in answer.steps if step.triggered]
    return row


def step_row(step: Step) -> dict[str, Any]:
    """A triggered Step of an output line."""
    return {
        "index": step.index,
        "token_id": step.token_id,
        "signal": step.signal,
        "candidate_ids": list(step.candidate_ids),
        "scores": list(step.scores),
        "chosen_by": step.chosen_by.value,
        "slm_top_id": step.slm_top_id,
        "llm_top_id": step.llm_top_id,
    }
