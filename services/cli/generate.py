"""`s2t generate`: the whole method in this process, from a JSONL file to a JSONL file. No Ray, no
Redis, no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from s2t_shared.data.prompts import read_prompts
from s2t_shared.decode.calibrate import (
    calibration_prompts,
    load_calibration,
    measure_calibration,
    store_calibration,
)
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator, check_request, with_thresholds
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError, VersionError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime, resolve_model
from s2t_shared.model.tokenizer import Tokenizer, check_same_tokenizer, reserved_ids
from s2t_shared.policy import CALIBRATED, Calibration, check_policy
from s2t_shared.types import Answer, GenerateRequest, Prompt
from s2t_shared.versions.manifest import MANIFEST
from s2t_shared.versions.registry import Registry, load_version

CACHE = Path("~/.cache/s2t/calibration")
KV_BYTES = 4 << 30  # of each model; taken as it is needed


@dataclass(frozen=True)
class Loaded:
    """Models in this process, ready to generate."""

    generator: Generator
    calibration_folder: Path
    selector: LocalSelector | None = None

    def calibration(
        self,
        needs_llm: bool,
        max_new_tokens: int = 64,
        count: int = 32,
        prompts: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Calibration:
        """Thresholds of this pair, measured once and then kept (the KL triggers need the LLM)."""
        g = self.generator
        slm, llm = g.engine.proposer.runtime.digest, g.llm_digest
        if needs_llm and not llm:
            raise InvalidRequestError(
                "a KL budget needs the LLM for calibration; give --llm, or --threshold"
            )
        if prompts is None and (known := load_calibration(self.calibration_folder, slm, llm)):
            return known
        training = calibration_prompts(g.tokenizer, count, prompts)
        say(f"calibrating thresholds on {len(training)} training prompts (kept for the next run)")
        calibration = measure_calibration(g, training, max_new_tokens, bool(llm))
        store_calibration(self.calibration_folder, slm, llm, calibration)
        return calibration


def load_models(
    slm: str,
    llm: str | None,
    selector: str,
    versions: Path,
    dtype: str,
    device: str,
    batch_size: int,
    threads: int,
    chat_template: str | None = None,
) -> Loaded:
    """SLM, optional LLM and optional local selector, in one engine.

    Raises:
        ModelLoadError, TokenizerMismatchError, VersionError.
    """
    torch.set_num_threads(threads)
    folder = resolve_model(slm)
    tokenizer = Tokenizer.load(folder, chat_template)
    scorer = None
    if llm is not None:
        llm_tokenizer = Tokenizer.load(resolve_model(llm))
        check_same_tokenizer(tokenizer, llm_tokenizer)
        scorer = LLMSelector(ModelRuntime.load(llm, dtype, device, KV_BYTES), llm_tokenizer.digest)
    runtime = ModelRuntime.load(slm, dtype, device, KV_BYTES)
    local = load_selector(selector, versions, runtime, tokenizer)
    engine = Engine(
        Proposer(runtime, reserved_ids(tokenizer, runtime.vocab_rows)),
        InProcessSelector(scorer) if scorer else None,
        lambda version: local,
        batch_size,
    )
    return Loaded(
        Generator(tokenizer, engine, scorer.info.digest if scorer else ""),
        CACHE.expanduser(),
        local,
    )


def load_selector(
    name: str, versions: Path, runtime: ModelRuntime, tokenizer: Tokenizer
) -> LocalSelector | None:
    """ "none", a published version's name, "live", or a version's folder."""
    if name == "none":
        return None
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file() or folder.is_dir():
        return load_version(folder, runtime, tokenizer.digest)
    registry = Registry(versions)
    version = registry.live() if name == "live" else name
    if version is None:
        raise VersionError(
            "no version is live in the registry; train one, or name a version or folder"
        )
    return registry.load(version, runtime, tokenizer.digest)


def generate_file(
    loaded: Loaded,
    template: GenerateRequest,
    source: Path,
    target: Path,
    with_steps: bool,
    on_answer: Callable[[], None] = lambda: None,
) -> int:
    """Answer every line of `source` into `target`, in input order, written as soon as the order
    allows. `template`: everything but id and prompt. Returns how many lines failed; each failure is
    reported on stderr with its number.

    Raises: ConfigError: a file cannot be read or written. InvalidRequestError: the settings
        themselves are wrong.
    """
    check_policy(template.policy)
    check_request(template)
    rows = list(read_prompts(source))
    order: dict[str, int] = {}
    outcomes: dict[int, Answer | S2TError] = {}
    for index, (row, prompt) in enumerate(rows):
        if isinstance(prompt, InvalidRequestError):
            outcomes[index] = prompt
        else:
            order[row["id"]] = index

    def requests() -> Iterator[GenerateRequest]:
        for row, prompt in rows:
            if isinstance(prompt, Prompt):
                yield with_prompt(template, str(row["id"]), prompt)

    failed = written = 0
    with open_output(target) as stream:

        def write_ready() -> None:
            nonlocal failed, written
            while written in outcomes:
                row, outcome = rows[written][0], outcomes.pop(written)
                if isinstance(outcome, S2TError):
                    failed += 1
                    text = str(outcome)
                    print(
                        text if text.startswith("line ") else f"line {row['line']}: {text}",
                        file=sys.stderr,
                    )
                else:
                    stream.write(
                        json.dumps(answer_row(row["id"], outcome, with_steps), ensure_ascii=False)
                        + "\n"
                    )
                written += 1

        write_ready()
        for request, outcome in loaded.generator.generate(requests()):
            outcomes[order[request.request_id]] = outcome
            on_answer()
            write_ready()
    return failed


def with_prompt(template: GenerateRequest, request_id: str, prompt: Prompt) -> GenerateRequest:
    return replace(template, request_id=request_id, prompt=prompt)


def open_output(target: Path) -> TextIO:
    try:
        return target.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {str(target)!r} cannot be written: {error.strerror}") from error


def resolve_thresholds(
    template: GenerateRequest, loaded: Loaded, prompts: Path | None, say: Callable[[str], None]
) -> GenerateRequest:
    """The template with its budget turned into a threshold: the version's own calibration if it has
    one, else the pair's, measured on training prompts."""
    policy = template.policy
    if template.budget is None or not policy.can_trigger or policy.trigger not in CALIBRATED:
        return with_thresholds(template, Calibration({}))
    if (
        loaded.selector is not None
        and prompts is None
        and policy.trigger in loaded.selector.calibration.thresholds
    ):
        return with_thresholds(template, loaded.selector.calibration)
    return with_thresholds(
        template, loaded.calibration(policy.trigger.needs_llm, prompts=prompts, say=say)
    )


def answer_row(request_id: Any, answer: Answer, with_steps: bool) -> dict[str, Any]:
    """One output line."""
    row: dict[str, Any] = {
        "id": request_id,
        "token_ids": list(answer.token_ids),
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "usage": asdict(answer.usage),
        "versions": asdict(answer.versions),
    }
    if with_steps:
        row["steps"] = [
            {
                "index": s.index,
                "token_id": s.token_id,
                "signal": s.signal,
                "candidate_ids": list(s.candidate_ids),
                "scores": list(s.scores),
                "chosen_by": s.chosen_by.value,
                "slm_top_id": s.slm_top_id,
                "llm_top_id": s.llm_top_id,
            }
            for s in answer.steps
            if s.triggered
        ]
    return row
