"""The front door for Python: an SLM, and where wanted an LLM and a local selector, in this process.

>>> pair = Pair.open("bundled", llm="bundled")
>>> [answer] = pair.generate(["Mia has 19 coins . ..."], mode="s2t", budget=0.05)
>>> answer.text

No Ray, no Redis, no network (but for models that are named by a hub id).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from s2t_shared.decode.calibrate import (
    calibration_prompts,
    load_calibration,
    measure_calibration,
    store_calibration,
)
from s2t_shared.decode.engine import MAX_DRAFT_TOKENS, Engine
from s2t_shared.decode.generate import Generator, shown_steps, with_thresholds
from s2t_shared.decode.interfaces import SelectorClient, SLMProposer
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.vllm_options import VLLMOptions
from s2t_shared.decode.vllm_proposer import MAX_LORA_RANK, VLLMProposer
from s2t_shared.decode.vllm_selector import VLLMSelectorClient
from s2t_shared.errors import InvalidRequestError, S2TError, VersionNotFoundError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import check_same_tokenizer, reserved_ids
from s2t_shared.policy import Calibration
from s2t_shared.requests import PromptLike, new_request
from s2t_shared.types import CALIBRATED, Answer, AnswerPiece, GenerateRequest, Prompt
from s2t_shared.versions.live import open_version
from s2t_shared.versions.weights import SLM

CALIBRATIONS = Path("~/.cache/s2t/calibration")
SELECTION_TIMEOUT_S = 600.0  # nobody waits for an answer as for a service's: rather late than worse
KV_GIB = 4.0  # of each model; taken as it is needed


@dataclass
class Pair:
    """Models in this process, ready to generate. Open one with `Pair.open`.

    local_selector: the one that requests get which name no version. calibrations: folder where
    thresholds are kept. others: local selectors that requests may name, by version.
    """

    tokenizer: Tokenizer
    engine: Engine
    llm: SelectorClient | None = None
    local_selector: LocalSelector | None = None
    calibrations: Path = CALIBRATIONS
    others: Mapping[str, LocalSelector] = field(default_factory=dict)
    _measured: dict[Path, Calibration] = field(default_factory=dict)  # on the prompts of a file

    @classmethod
    def open(
        cls,
        slm: str,
        llm: str | None = None,
        version: str | None = None,
        *,
        others: Sequence[str] = (),
        versions: Path = Path("s2t-data/versions"),
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int = 8,
        threads: int | None = None,
        kv_gib: float = KV_GIB,
        chat_template: str | None = None,
        max_draft_tokens: int = MAX_DRAFT_TOKENS,
        vllm: VLLMOptions | None = None,
        slm_vllm: VLLMOptions | None = None,
    ) -> Pair:
        """Load the models.

        slm, llm: folder, hub id, or "bundled". version: of the local selector: a name in the
        registry `versions`, "live", or a version's folder. others: further ones that requests may
        name. batch_size: sequences decoded at once.
        threads: CPU threads, default all cores. vllm, slm_vllm: run the LLM, or the SLM, on vLLM,
        so; dtype, device and kv_gib are those of models that torch runs.

        Raises:
            ModelLoadError: a model is missing or not supported.
            TokenizerMismatchError: SLM and LLM do not share a tokenizer.
            VersionError: the version is missing, corrupt or made for another model.
        """
        torch.set_num_threads(threads or os.cpu_count() or 1)
        kv_bytes = int(kv_gib * (1 << 30))
        tokenizer = Tokenizer.load(resolve_model(slm), chat_template)
        selector: SelectorClient | None = None
        if llm is not None:
            llm_tokenizer = Tokenizer.load(resolve_model(llm, "llm"))
            check_same_tokenizer(tokenizer, llm_tokenizer)
            if vllm is not None:
                selector = VLLMSelectorClient(llm, vllm)
            else:
                loaded = ModelRuntime.load(llm, dtype, device, kv_bytes, "llm")
                selector = InProcessSelector(LLMSelector(loaded, llm_tokenizer.digest))
        runtime: ModelRuntime | VLLMProposer
        weights: SLM
        if slm_vllm is not None:
            rank = MAX_LORA_RANK if version is not None or others else 0
            runtime = VLLMProposer.load(
                slm, slm_vllm, tokenizer, max_num_seqs=batch_size, max_lora_rank=rank
            )
            weights = runtime.adapter_host
        else:
            runtime = ModelRuntime.load(slm, dtype, device, kv_bytes, max_num_seqs=batch_size)
            weights = runtime
        local = None
        if version is not None:
            local = open_version(version, versions, weights, tokenizer.digest)
        named = [open_version(name, versions, weights, tokenizer.digest) for name in others]
        return cls.of(
            runtime,
            tokenizer,
            selector,
            local,
            named,
            max_num_seqs=batch_size,
            max_draft_tokens=max_draft_tokens,
            selection_timeout_s=SELECTION_TIMEOUT_S,
        )

    @classmethod
    def of(
        cls,
        slm: ModelRuntime | VLLMProposer,
        tokenizer: Tokenizer,
        llm: SelectorClient | None = None,
        local_selector: LocalSelector | None = None,
        others: Sequence[LocalSelector] = (),
        **engine_options: Any,
    ) -> Pair:
        """From loaded models. others: local selectors that requests may name by their version."""
        named = {s.version: s for s in others}

        def lookup(version: str | None) -> LocalSelector | None:
            if version is None:
                return local_selector
            if version == "":
                return None
            if version in named:
                return named[version]
            if local_selector is not None and version == local_selector.version:
                return local_selector
            raise VersionNotFoundError(f"version {version!r} is not loaded")

        proposer: SLMProposer
        if isinstance(slm, ModelRuntime):
            proposer = Proposer(slm, reserved_ids(tokenizer, slm.vocab_rows))
        else:
            proposer = slm
        engine = Engine(proposer, llm, lookup, **engine_options)
        return cls(tokenizer, engine, llm, local_selector, others=named)

    @property
    def dtype(self) -> str:
        """The SLM's arithmetic, as torch names it."""
        proposer = self.engine.proposer
        if isinstance(proposer, VLLMProposer):
            return f"torch.{proposer.dtype}"
        assert isinstance(proposer, Proposer)
        return str(proposer.runtime.model.dtype)

    @property
    def llm_digest(self) -> str:
        """Digest of the LLM, "" for none."""
        return self.llm.info.digest if self.llm else ""

    @property
    def generator(self) -> Generator:
        """The loop that answers requests on this pair's engine."""
        return Generator(self.tokenizer, self.engine)

    # -- answers ----------------------------------------------------------------------------------

    def generate(
        self, prompts: str | Prompt | Iterable[PromptLike], **settings: Any
    ) -> list[Answer]:
        """Answers in input order. One text is a list of one. `settings` as in `new_request`.

        Raises:
            S2TError: a prompt cannot be answered; the text says which one.
        """
        if isinstance(prompts, (str, Prompt)):
            prompts = [prompts]
        requests = [
            new_request(prompt, request_id=str(i), **settings) for i, prompt in enumerate(prompts)
        ]
        answers: dict[str, Answer] = {}
        for request, outcome in self.run(requests):
            if isinstance(outcome, S2TError):
                raise type(outcome)(f"prompt {request.request_id}: {outcome}") from outcome
            answers[request.request_id] = outcome
        return [answers[request.request_id] for request in requests]

    def stream(self, prompt: PromptLike, **settings: Any) -> Iterator[AnswerPiece]:
        """Pieces of one answer, each with its Steps, as they are decided. The last one has
        `.answer`.

        Raises:
            S2TError: the prompt cannot be answered.
        """
        request = self.with_thresholds(new_request(prompt, **settings))
        for piece in self.generator.stream(request):
            if piece.answer is not None:
                shown = shown_steps(request, piece.answer.steps)
                piece = replace(piece, answer=replace(piece.answer, steps=shown))
            yield piece

    def run(
        self, requests: Iterable[GenerateRequest]
    ) -> Iterator[tuple[GenerateRequest, Answer | S2TError]]:
        """Answers as they finish; a request's own error comes in its place."""
        ready = (self.with_thresholds(request) for request in requests)
        for request, outcome in self.generator.generate(ready):
            if isinstance(outcome, Answer):
                outcome = replace(outcome, steps=shown_steps(request, outcome.steps))
            yield request, outcome

    def forget(self) -> None:
        """Free the contexts that torch's models keep for reuse: the next prompts are read afresh,
        as in a measurement they should be."""
        if isinstance(self.engine.proposer, Proposer):
            self.engine.proposer.runtime.pool.clear()
        if isinstance(self.llm, InProcessSelector):
            self.llm.forget()

    # -- calibration ------------------------------------------------------------------------------

    def with_thresholds(
        self,
        request: GenerateRequest,
        prompts: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> GenerateRequest:
        """The request with its budget turned into a threshold.

        The local selector's own calibration is used if it has one; else the pair's, measured on
        training prompts.

        Raises:
            InvalidRequestError: a KL budget without an LLM, or a budget out of range.
            ConfigError: the training prompts cannot be used.
        """
        local = self.others.get(request.options.version or "", self.local_selector)
        policy = request.options.policy
        if local is not None:
            policy = local.served(policy)
        if request.budget is None or not policy.can_trigger or policy.trigger not in CALIBRATED:
            return with_thresholds(request, Calibration({}))
        if local is not None and prompts is None and policy.trigger in local.calibration.thresholds:
            return with_thresholds(request, local.calibration)
        calibration = self.calibration(policy.trigger.needs_llm, prompts=prompts, say=say)
        return with_thresholds(request, calibration)

    def calibration(
        self,
        needs_llm: bool,
        *,
        max_new_tokens: int = 64,
        count: int = 32,
        prompts: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Calibration:
        """Thresholds of this pair, measured once and then kept. The KL triggers need the LLM.

        Raises:
            InvalidRequestError: the LLM is needed and there is none.
            ConfigError: the training prompts cannot be used.
        """
        slm_digest = self.engine.proposer.info.digest
        if needs_llm and not self.llm_digest:
            raise InvalidRequestError(
                "a KL budget needs the LLM for calibration; give --llm, or --threshold"
            )
        folder = self.calibrations.expanduser()
        if prompts is None:
            known = load_calibration(folder, slm_digest, self.llm_digest)
        else:
            known = self._measured.get(prompts)
        if known is not None:
            return known
        training = calibration_prompts(self.tokenizer, count, prompts)
        say(f"calibrating thresholds on {len(training)} training prompts (kept for the next run)")
        calibration = measure_calibration(
            self.generator, training, max_new_tokens, with_llm=self.llm is not None
        )
        store_calibration(folder, slm_digest, self.llm_digest, calibration)
        if prompts is not None:
            self._measured[prompts] = calibration
        return calibration
