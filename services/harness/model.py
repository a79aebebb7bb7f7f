"""The model class `s2t` of lm-evaluation-harness, over a `Pair`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from s2t_shared.decode.interfaces import SelectorClient
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import InvalidRequestError, S2TError
from s2t_shared.pair import Pair
from s2t_shared.requests import new_request, parse_mode
from s2t_shared.types import GenerateRequest, Mode, Sampling, ScoreQuery

MAX_NEW_TOKENS = 256
WINDOW = 64  # texts that are scored at once


@register_model("s2t")
class S2TModel(TemplateLM):
    """Generates in the given mode. Log-likelihoods are the SLM's own, in mode llm the LLM's: what a
    mode chooses has none."""

    def __init__(
        self,
        slm: str = "bundled",
        llm: str | None = None,
        mode: str = "s2t",
        trigger: str = "entropy",
        budget: float | None = None,
        candidates: int = 8,
        version: str | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        batch_size: int | str | None = 8,
        device: str | None = "cpu",
        dtype: str = "float32",
        **_: Any,
    ) -> None:
        """slm, llm, version, dtype: as in `Pair.open`. The rest as in `new_request`.

        Raises:
            S2TError: a model cannot be opened, or a setting is wrong.
        """
        super().__init__()
        kind, _samples = parse_mode(mode)
        if llm is None and kind.asks_llm:
            raise InvalidRequestError(f"mode {mode} asks the LLM: give llm=..., or another mode")
        self._settings: dict[str, Any] = {
            "mode": mode,
            "trigger": trigger,
            "budget": budget,
            "candidates": candidates,
        }
        self._mode = kind
        self._max_new_tokens = int(max_gen_toks)
        self._name = slm
        size = batch_size if isinstance(batch_size, int) else 8  # "auto"
        self.pair = Pair.open(
            slm, llm, version, dtype=dtype, device=_present(device), batch_size=size
        )
        self._scorer = self._who_scores()

    def _who_scores(self) -> SelectorClient:
        if self._mode is Mode.LLM:
            assert self.pair.llm is not None
            return self.pair.llm
        proposer = self.pair.engine.proposer
        assert isinstance(proposer, Proposer)
        return InProcessSelector(LLMSelector(proposer.runtime, self.pair.tokenizer.digest))

    # -- text -------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return self._name

    @property
    def eot_token_id(self) -> int:
        return min(self.pair.engine.proposer.info.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        bos = self.pair.tokenizer.hf.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        hf = self.pair.tokenizer.hf
        if add_special_tokens is None:
            has_them = hf.bos_token is not None and string.startswith(hf.bos_token)
            add_special_tokens = not has_them
        return list(hf.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.pair.tokenizer.hf.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # -- answers ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One text for each (context, settings), in order."""
        asked = [self._request(number, *r.args) for number, r in enumerate(requests)]
        texts: dict[str, str] = {}
        for request, outcome in self.pair.run(asked):
            if isinstance(outcome, S2TError):
                raise outcome
            texts[request.request_id] = outcome.text
        return [texts[request.request_id] for request in asked]

    def _request(self, number: int, context: str, settings: dict[str, Any]) -> GenerateRequest:
        max_new_tokens = int(settings.get("max_gen_toks", self._max_new_tokens))
        room = self.pair.engine.proposer.info.max_length - max_new_tokens
        if room < 1:
            raise InvalidRequestError(
                f"max_gen_toks={max_new_tokens} leaves no room for a prompt; lower it"
            )
        stop = [s for s in handle_stop_sequences(settings.get("until"), None) if s]
        sampling = Sampling()
        if settings.get("do_sample"):
            sampling = Sampling(temperature=float(settings.get("temperature", 1.0)), seed=number)
        return new_request(
            self.tok_encode(context)[-room:],
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            request_id=str(number),
            **self._settings,
        )

    # -- log-likelihoods --------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (_, context, continuation) the log-probability, and whether it is the argmax."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), WINDOW):
            window = requests[start : start + WINDOW]
            queries = [self._query(context, wanted) for _, context, wanted in window]
            replies = self._scorer.submit(queries)
            for (_tag, _context, wanted), future in zip(window, replies, strict=True):
                positions = future.result().positions
                total = sum(position.log_probs[0] for position in positions)
                is_best = all(p.top_id == t for p, t in zip(positions, wanted, strict=True))
                found.append((total, is_best))
        return found

    def _query(self, context: list[int], wanted: list[int]) -> ScoreQuery:
        longest = self._scorer.info.max_length
        token_ids = (*context, *wanted)[-longest:]
        first = len(token_ids) - len(wanted) - 1
        if first < 0:
            raise InvalidRequestError(
                f"a continuation of {len(wanted)} tokens does not fit {longest} with its context"
            )
        slm = self.pair.engine.proposer.info
        return ScoreQuery(
            token_ids=token_ids[:-1],
            positions=tuple(range(first, first + len(wanted))),
            candidate_ids=tuple((token_id,) for token_id in wanted),
            excluded_ids=slm.excluded_ids,
            vocab_size=slm.vocab_rows,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._scorer.info.max_length - 1,
            context_len=1,
        )
        pairs: list[tuple[Any, list[int], list[int]]] = []
        for window in windows:
            before, wanted = make_disjoint_window(window)
            pairs.append(("", before, wanted))
        return sum(value for value, _ in self._loglikelihood_tokens(pairs))


def _present(device: str | None) -> str:
    """The harness names cuda where nobody named a device."""
    wanted = device or "cuda"
    return wanted if not wanted.startswith("cuda") or torch.cuda.is_available() else "cpu"
