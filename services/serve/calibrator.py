"""The thresholds of the pair that serves: from an earlier start, else measured, and again whenever
another LLM answers.

An LLM may come long after the proposer, and may be replaced. Knows the engine's thread, the
selector's status and a folder; no network, no labels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from s2t_shared.decode.calibrate import (
    calibration_from,
    calibration_request,
    load_calibration,
    store_calibration,
)
from s2t_shared.decode.generate import encode_request
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.policy import Calibration
from s2t_shared.types import Answer, GenerateRequest, Prompt
from services.rpc.ask_many import bounded
from services.serve.engine_thread import EngineThread
from services.serve.proposer_service import SelectorStatus

log = logging.getLogger(__name__)
WATCH_S = 1.0  # another LLM is noticed after so long
RETRY_S = 10.0  # after an attempt that the LLM did not last through
START_CONCURRENCY = 64
SERVING_CONCURRENCY = 4  # beside requests: slow, but they hardly feel it


class Calibrator:
    """Lives on one asyncio loop.

    prompts: training prompts that are rolled out. max_new_tokens: of each rollout.
    watch_s, retry_s: seconds.
    """

    def __init__(
        self,
        *,
        engine: EngineThread,
        tokenizer: TextTokenizer,
        selector: SelectorStatus,
        folder: Path,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        watch_s: float = WATCH_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._selector = selector
        self._folder = folder
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._watch_s = watch_s
        self._retry_s = retry_s
        self._calibration = Calibration({})
        self._llm_digest: str | None = None  # whose thresholds these are, "" for the SLM's alone
        self._watch_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Calibrate for the LLM that answers now, if one does, and watch for others.

        Raises:
            ConfigError: not one training prompt could be rolled out.
        """
        if not await self._calibrate(START_CONCURRENCY):
            log.warning("the LLM was lost while thresholds were measured; going on without it")
            await self._calibrate(START_CONCURRENCY, alone=True)
        self._watch_task = asyncio.get_running_loop().create_task(self._watch())

    def calibration(self) -> Calibration:
        """The thresholds that hold now. Those of KL triggers only for the LLM that they were
        measured with."""
        if self._llm_digest == self._selector.info.digest:
            return self._calibration
        return self._calibration.without_llm()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._watch_s)
            if self._llm_digest == self._selector.info.digest:
                continue
            try:
                done = await self._calibrate(SERVING_CONCURRENCY)
            except (S2TError, OSError) as error:
                log.warning("thresholds could not be measured or kept: %s", error)
                done = False
            if not done:
                await asyncio.sleep(self._retry_s)

    async def _calibrate(self, concurrency: int, alone: bool = False) -> bool:
        """Returns whether the thresholds are those of the LLM that answers now.

        alone: without the LLM, whatever answers.

        Raises:
            ConfigError: the SLM could not be calibrated.
        """
        llm_digest = "" if alone else self._selector.info.digest
        slm_digest = self._engine.slm.digest
        calibration = load_calibration(self._folder, slm_digest, llm_digest)
        if calibration is None:
            log.info("measuring thresholds with %s", llm_digest or "no LLM")
            outcomes = await self._roll_out(concurrency, with_llm=bool(llm_digest))
            try:
                calibration = calibration_from(outcomes, llm_digest)
            except ConfigError:
                if llm_digest:
                    return False
                raise
            store_calibration(self._folder, slm_digest, llm_digest, calibration)
        self._calibration = calibration
        self._llm_digest = llm_digest
        return alone or llm_digest == self._selector.info.digest

    async def _roll_out(self, concurrency: int, with_llm: bool) -> list[Answer | S2TError]:
        requests = [
            calibration_request(i, prompt, self._max_new_tokens, with_llm)
            for i, prompt in enumerate(self._prompts)
        ]
        return await bounded(requests, self._answer, concurrency)

    async def _answer(self, request: GenerateRequest) -> Answer | S2TError:
        try:
            encoded = encode_request(request, self._tokenizer)
            builder, ongoing = await self._engine.submit(encoded)
            try:
                is_last = False
                while not is_last:
                    _, is_last = await ongoing.next_piece()
                return builder.answer(self._engine.slm.digest)
            finally:
                if not builder.done:
                    self._engine.cancel(builder)
        except S2TError as error:
            return error
