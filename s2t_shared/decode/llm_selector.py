"""The LLM as selector: queries in, log-probabilities of the asked candidates out.

Stateless to its callers: every query carries the whole context, and whatever the pool still holds of it is not read
again. `step` is one packed forward over all waiting queries, so that a long prompt does not hold up a short gap.
Knows no policy, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from s2t_shared.errors import InvalidRequestError
from s2t_shared.model.kv_pool import SHORTEST_REUSE, Row, will_hold_more
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply

STEP_TOKENS = 1024  # tokens of one forward
HEAD_TOKENS = 256  # positions whose full-vocabulary logits exist at once
IMPOSSIBLE = -1e4  # log-probability of an id that cannot occur; finite, so that it survives JSON and float32


@dataclass(frozen=True)
class LLMInfo:
    """What a proposer must know about the LLM."""

    digest: str
    tokenizer_digest: str
    eos_ids: frozenset[int]
    max_length: int


class SelectorClient(Protocol):
    """Where LLM selections come from: in this process, behind a cache, or over the network. The caller need not
    know. A failed future holds `SelectorUnavailableError` or `InvalidRequestError`."""

    @property
    def info(self) -> LLMInfo: ...

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]: ...


@dataclass(eq=False)
class Pending:
    """A query being answered. `is_wanted`: asked before every forward; a query nobody waits for is dropped."""

    query: ScoreQuery
    is_wanted: Callable[[], bool] = lambda: True
    row: Row | None = None
    scores: list[PositionScores] = field(default_factory=list)

    @property
    def needed(self) -> tuple[int, ...]:
        """The context up to the last asked position; what follows need not be read."""
        return self.query.token_ids[: self.query.positions[-1] + 1]

    @property
    def read(self) -> int:
        return len(self.row.token_ids) if self.row is not None else 0

    @property
    def unread(self) -> int:
        return self.query.positions[-1] + 1 - self.read

    def asked(self, start: int, stop: int) -> list[int]:
        """Indices of the asked positions among the tokens start..stop-1."""
        return [j for j, position in enumerate(self.query.positions) if start <= position < stop]


class LLMScorer:
    """The LLM. One thread owns it."""

    def __init__(self, runtime: ModelRuntime, tokenizer_digest: str, step_tokens: int = STEP_TOKENS) -> None:
        self.runtime, self._step_tokens = runtime, step_tokens
        self.info = LLMInfo(runtime.digest, tokenizer_digest, runtime.eos_ids, runtime.max_length)
        self._pending: list[Pending] = []

    def check(self, query: ScoreQuery) -> None:
        """Raises InvalidRequestError: naming the field that is wrong."""
        n = len(query.token_ids)
        if not n:
            raise InvalidRequestError("token_ids: empty; send the whole context")
        if n > self.runtime.max_length:
            raise InvalidRequestError(f"token_ids: {n} ids, the LLM reads at most {self.runtime.max_length}")
        if not self.runtime.pool.fits(n):
            raise InvalidRequestError(f"token_ids: {n} ids do not fit the LLM's KV pool of "
                                      f"{self.runtime.pool.max_tokens} tokens; shorten the context or raise kv_gib")
        if not query.positions or len(query.positions) != len(query.candidate_ids):
            raise InvalidRequestError(f"positions: {len(query.positions)} given with {len(query.candidate_ids)} "
                                      "candidate groups; send one group (may be empty) per position, at least one")
        for position in query.positions:
            if not 0 <= position < n:
                raise InvalidRequestError(f"positions: {position} is outside the context 0..{n - 1}")
        if list(query.positions) != sorted(set(query.positions)):
            raise InvalidRequestError("positions: must be ascending, each once")
        self.runtime.check_ids(query.token_ids)
        if any(i < 0 for group in query.candidate_ids for i in group):
            raise InvalidRequestError("candidate_ids: an id is negative")

    def add(self, query: ScoreQuery, is_wanted: Callable[[], bool] = lambda: True) -> Pending:
        """Queue a checked query."""
        pending = Pending(query, is_wanted)
        self._pending.append(pending)
        return pending

    @property
    def idle(self) -> bool:
        return not self._pending

    def step(self) -> list[tuple[Pending, ScoreReply | None]]:
        """One forward. Returns the queries it finished, and (with None) those nobody waits for any more."""
        dropped = [p for p in self._pending if not p.is_wanted()]
        self._pending = [p for p in self._pending if p not in dropped]
        for pending in dropped:
            self._close(pending)
        chunks = self._chunks()
        if chunks:
            self._forward(chunks)
        done = [p for p, _ in chunks if p.unread == 0]
        self._pending = [p for p in self._pending if p not in done]
        for pending in done:
            self._close(pending)
        return [*((p, None) for p in dropped), *((p, ScoreReply(tuple(p.scores), self.info.digest)) for p in done)]

    def score(self, queries: Sequence[ScoreQuery]) -> list[ScoreReply]:
        """Answer checked queries; blocks until all are answered."""
        waiting = [self.add(query) for query in queries]
        replies: dict[Pending, ScoreReply] = {}
        while len(replies) < len(waiting):
            replies |= {p: reply for p, reply in self.step() if reply is not None}
        return [replies[p] for p in waiting]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _chunks(self) -> list[tuple[Pending, int]]:
        """Who reads how many tokens in this forward: the oldest query gets up to half of it, the rest goes to those
        with the least to read. What one query reads here another need not: it copies it in the next step."""
        for pending in self._pending:
            if pending.row is None:
                pending.row = self.runtime.pool.acquire(_reusable(pending), len(pending.needed))
            if pending.row is None:  # first come, first served: later ones must not take what it waits for
                break
        ready = [p for p in self._pending if p.row is not None]
        assert ready or not self._pending, "check() let a query pass that does not fit"
        share = dict.fromkeys(ready[:1], self._step_tokens // 2) if len(ready) > 1 else {}
        budget = self._step_tokens
        chunks: list[tuple[Pending, int]] = []
        for pending in [*ready[:1], *sorted(ready[1:], key=lambda p: p.unread)]:
            if budget <= 0 or self._waits_for_another(pending, chunks):
                continue
            tokens = min(pending.unread, share.get(pending, budget), budget)
            if tokens > 0:
                chunks.append((pending, tokens))
                budget -= tokens
        return chunks

    def _waits_for_another(self, pending: Pending, chunks: Sequence[tuple[Pending, int]]) -> bool:
        if pending.unread <= SHORTEST_REUSE:
            return False
        assert pending.row is not None
        self.runtime.pool.catch_up(pending.row, _reusable(pending))
        return any(will_hold_more(_reusable(pending), pending.row, other.row, other.needed)
                   for other, _ in chunks if other.row is not None)

    def _close(self, pending: Pending) -> None:
        if pending.row is not None:
            self.runtime.pool.release(pending.row)

    @torch.no_grad()
    def _forward(self, chunks: Sequence[tuple[Pending, int]]) -> None:
        segments, wanted = [], []
        for pending, tokens in chunks:
            assert pending.row is not None
            start = pending.read
            segments.append(Segment(pending.row, pending.query.token_ids[start: start + tokens], start))
            wanted.append([(pending, j, pending.query.positions[j] - start)
                           for j in pending.asked(start, start + tokens)])
        hidden, places = self.runtime.forward(segments)
        asked = [(pending, j, place.start + offset) for place, group in zip(places, wanted, strict=True)
                 for pending, j, offset in group]
        for at in range(0, len(asked), HEAD_TOKENS):
            part = asked[at: at + HEAD_TOKENS]
            scores = self._read(hidden[[index for _, _, index in part]], [(p.query, j) for p, j, _ in part])
            for (pending, _, _), position in zip(part, scores, strict=True):
                pending.scores.append(position)

    def _read(self, hidden: Tensor, asked: Sequence[tuple[ScoreQuery, int]]) -> list[PositionScores]:
        """[m, hidden] and who asked -> the asked log-probabilities, with one transfer to the host."""
        logits = self.runtime.logits(hidden)
        rows_of: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for row, (query, _) in enumerate(asked):
            rows_of.setdefault((query.excluded_ids, query.vocab_size or self.runtime.vocab_rows), []).append(row)
        for (excluded, vocab_size), rows in rows_of.items():  # one group where all proposers run the same SLM
            barred = torch.zeros(self.runtime.vocab_rows, dtype=torch.bool)
            barred[[i for i in excluded if i < self.runtime.vocab_rows]] = True
            barred[vocab_size:] = True
            mine = slice(None) if len(rows) == len(asked) else torch.tensor(rows, device=logits.device)
            logits[mine] = logits[mine].masked_fill(barred.to(logits.device), -torch.inf)
        norm = logits.logsumexp(-1, keepdim=True)
        best = logits.max(-1)
        groups = [query.candidate_ids[j] for query, j in asked]
        width = max(len(group) for group in groups)
        ids = torch.tensor([[*g, *[0] * (width - len(g))] for g in groups], dtype=torch.long, device=hidden.device)
        # Rows may differ inside a family: an id the LLM has no row for is impossible to it.
        found = logits.gather(1, ids.clamp(max=self.runtime.vocab_rows - 1)) - norm
        found = found.masked_fill(ids >= self.runtime.vocab_rows, IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        packed = torch.cat([found, best.values[:, None] - norm, best.indices[:, None].float()], 1).tolist()
        return [PositionScores(tuple(values[: len(group)]), int(values[-1]), values[-2])
                for values, group in zip(packed, groups, strict=True)]


def _reusable(pending: Pending) -> tuple[int, ...]:
    """What another row may lend: the first asked position itself must be computed."""
    return pending.query.token_ids[: pending.query.positions[0] + 1]


class InProcessSelector:
    """A `SelectorClient` over an `LLMScorer` in this process: each `submit` is one batch, answered at once."""

    def __init__(self, scorer: LLMScorer) -> None:
        self._scorer = scorer

    @property
    def info(self) -> LLMInfo:
        return self._scorer.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        good = []
        for query, future in zip(queries, futures, strict=True):
            try:
                self._scorer.check(query)
                good.append((query, future))
            except InvalidRequestError as error:
                future.set_exception(error)
        for (_, future), reply in zip(good, self._scorer.score([query for query, _ in good]), strict=True):
            future.set_result(reply)
        return futures
