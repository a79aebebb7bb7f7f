"""The LLM selector on vLLM: tensor parallel, quantised, many GPUs.

One asked position is one request of one token: vLLM returns
the log-probabilities of the asked ids (`logprob_token_ids`), and its prefix cache makes the
positions of one query, and a sequence's next query, cheap. Ids that must not count are pushed away
by a bias before vLLM normalises, so that what is left sums to one without them.

Public vLLM interfaces only.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import IMPOSSIBLE, check_query
from s2t_shared.decode.vllm_options import VLLMOptions, cannot_run, check_installed, first_line
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.model.loading import identify_model
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_ASKED_IDS = 128  # vLLM's limit of `logprob_token_ids`
MIN_UNANSWERED = 3  # fewer requests without an answer may just have been cancelled
EXCLUDING_BIAS = -100.0  # vLLM's least; an id 100 nats less likely has no mass left


class VLLMSelector:
    """The LLM, as an asyncio service. Use it on the loop that made it."""

    def __init__(self, engine: AsyncLLM, info: LLMInfo, vocab_rows: int) -> None:
        self._engine = engine
        self.info = info
        self._vocab_rows = vocab_rows
        self._numbers = itertools.count()
        self._unanswered = 0  # requests since the last that was answered
        self._unanswered_since = 0.0

    @classmethod
    def load(cls, model: str, options: VLLMOptions) -> VLLMSelector:
        """Start vLLM on a Hugging Face folder, a hub id or "bundled". Call it on a running loop.

        Raises:
            ConfigError: vLLM is not installed.
            ModelLoadError: the model is missing, or vLLM cannot run it with these options.
        """
        identity = identify_model(model, "llm")
        check_installed("llm.runtime")
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(
            **options.arguments(identity.folder),
            max_logprobs=MAX_ASKED_IDS,
            logprobs_mode="processed_logprobs",  # of the logits with their bias
        )
        try:
            engine = AsyncLLM.from_engine_args(args)
        except Exception as error:  # the border to vLLM, which raises anything here
            raise cannot_run(model, options, error) from error
        config = engine.model_config
        info = LLMInfo(
            options.digest(identity.digest),
            Tokenizer.load(identity.folder).digest,
            identity.eos_ids,
            config.max_model_len - 1,  # vLLM wants room for the one token it writes
        )
        return cls(engine, info, config.get_vocab_size())

    @property
    def is_alive(self) -> bool:
        """Whether anything can be answered."""
        return not self._engine.errored

    @property
    def kv_usage(self) -> None:
        return None

    @property
    def silent_s(self) -> float:
        """Seconds since the first of the last requests, if none of them was answered and they
        are several: who asks a hung vLLM gives up, and asks again."""
        if self._unanswered < MIN_UNANSWERED:
            return 0.0
        return time.monotonic() - self._unanswered_since

    def check(self, query: ScoreQuery) -> None:
        """Raises InvalidRequestError: naming the field that is wrong."""
        check_query(query, self.info.max_length, self._vocab_rows)

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """The reply to a query. time_left_s: how long its caller waits; None for no limit.

        Raises:
            InvalidRequestError: the query is wrong.
            SelectorUnavailableError: the time was up, or vLLM has died.
        """
        self.check(query)
        try:
            async with asyncio.timeout(time_left_s):
                positions = await self._score_positions(query)
        except TimeoutError as error:
            raise SelectorUnavailableError("the deadline passed before the LLM answered") from error
        except Exception as error:  # the border to vLLM
            reason = first_line(error)
            raise SelectorUnavailableError(f"vLLM does not answer: {reason}") from error
        return ScoreReply(tuple(positions), self.info.digest)

    async def _score_positions(self, query: ScoreQuery) -> list[PositionScores]:
        bias = self._bias(query)
        tasks = []
        for position, ids in zip(query.positions, query.candidate_ids, strict=True):
            context = query.token_ids[: position + 1]
            tasks.append(asyncio.create_task(self._score_position(context, ids, bias)))
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one has failed or time is up, the others end too
                task.cancel()

    async def _score_position(
        self, context: Sequence[int], ids: Sequence[int], bias: Mapping[int, float]
    ) -> PositionScores:
        """What follows `context`: log-probabilities of `ids`, and the likeliest id of all."""
        from vllm import SamplingParams

        known = [i for i in ids if i < self._vocab_rows]
        found: dict[int, float] = {}
        top_id = -1
        for start in range(0, max(1, len(known)), MAX_ASKED_IDS):
            asked = known[start : start + MAX_ASKED_IDS]
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=asked or None,
                logit_bias=dict(bias) or None,
                detokenize=False,
            )
            output = await self._run(context, params)
            top_id = output.token_ids[0]
            if asked:
                for token_id, value in output.logprobs[0].items():
                    found[token_id] = value.logprob
        scores = [max(found.get(i, IMPOSSIBLE), IMPOSSIBLE) for i in ids]
        return PositionScores(tuple(scores), top_id)

    async def _run(self, context: Sequence[int], params: SamplingParams) -> Any:
        """The one completion of a request; aborted when the caller is cancelled."""
        prompt = {"prompt_token_ids": list(context)}
        request_id = f"s2t-{next(self._numbers)}"
        if not self._unanswered:
            self._unanswered_since = time.monotonic()
        self._unanswered += 1
        outputs = [output async for output in self._engine.generate(prompt, params, request_id)]
        self._unanswered = 0
        return outputs[-1].outputs[0]

    def _bias(self, query: ScoreQuery) -> dict[int, float]:
        """What must not count: excluded ids, and rows beyond the family's vocabulary."""
        rows = self._vocab_rows
        barred = [i for i in query.excluded_ids if i < rows]
        barred += range(query.vocab_size or rows, rows)
        return dict.fromkeys(barred, EXCLUDING_BIAS)

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()


class VLLMSelectorClient:
    """A `SelectorClient` over a `VLLMSelector` in this process, on a loop of its own."""

    def __init__(self, model: str, options: VLLMOptions) -> None:
        """Raises: as `VLLMSelector.load`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

        async def load() -> VLLMSelector:
            return VLLMSelector.load(model, options)

        try:
            self._selector = asyncio.run_coroutine_threadsafe(load(), self._loop).result()
        except BaseException:
            self._stop()
            raise

    @property
    def info(self) -> LLMInfo:
        return self._selector.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """See `SelectorClient`."""
        return [
            asyncio.run_coroutine_threadsafe(self._selector.score(query), self._loop)
            for query in queries
        ]

    def close(self) -> None:
        """End vLLM and the loop."""

        async def end() -> None:
            self._selector.shutdown()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
