"""The LLM as selector, on torch: queries in, log-probabilities of the asked candidates out.

Stateless to its callers: every query carries the whole context, and what the KV pool still holds of
it is not read again. `step` is one packed forward over all waiting queries, so that a long context
does not hold up a short gap. Knows no policy, no network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import InvalidRequestError
from s2t_shared.model.kv_pool import MIN_PREFIX_MATCH, Slot, shares_longer_prefix
from s2t_shared.model.runtime import ModelRuntime, Segment, check_ids
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply

STEP_TOKENS = {"cpu": 1024, "cuda": 4096}  # of one forward, by type of device
HEAD_TOKENS = 256  # positions whose full-vocabulary logits exist at once
IMPOSSIBLE = -1e4  # log-probability of an id that cannot occur; finite, to survive JSON and float32


def always() -> bool:
    return True


def check_query(query: ScoreQuery, max_length: int, vocab_rows: int) -> None:
    """Check a query against an LLM, whatever runs it.

    max_length: tokens that the LLM reads at most. vocab_rows: of its head.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """
    n = len(query.token_ids)
    if not n:
        raise InvalidRequestError("token_ids: empty; send the whole context")
    if n > max_length:
        raise InvalidRequestError(f"token_ids: {n} ids, the LLM reads at most {max_length}")
    groups = len(query.candidate_ids)
    if not query.positions or len(query.positions) != groups:
        raise InvalidRequestError(
            f"positions: {len(query.positions)} given with {groups} candidate groups; send "
            "one group (may be empty) per position, at least one"
        )
    for position in query.positions:
        if not 0 <= position < n:
            raise InvalidRequestError(f"positions: {position} is outside the context 0..{n - 1}")
    if list(query.positions) != sorted(set(query.positions)):
        raise InvalidRequestError("positions: must be ascending, each once")
    check_ids(query.token_ids, vocab_rows)
    for group in query.candidate_ids:
        if group and min(group) < 0:
            raise InvalidRequestError("candidate_ids: an id is negative")


@dataclass(eq=False)
class PendingQuery:
    """A query being answered. is_wanted: asked before every forward; what nobody waits for is
    dropped."""

    query: ScoreQuery
    is_wanted: Callable[[], bool] = always
    slot: Slot | None = None
    scores: list[PositionScores] = field(default_factory=list)

    @property
    def needed(self) -> tuple[int, ...]:
        """The context up to the last asked position; what follows need not be read."""
        return self.query.token_ids[: self.query.positions[-1] + 1]

    @property
    def reusable(self) -> tuple[int, ...]:
        """What another slot may lend; the first asked position itself must be computed."""
        return self.query.token_ids[: self.query.positions[0] + 1]

    @property
    def read(self) -> int:
        return len(self.slot.token_ids) if self.slot is not None else 0

    @property
    def unread(self) -> int:
        return self.query.positions[-1] + 1 - self.read

    def asked(self, start: int, stop: int) -> list[int]:
        """Indices of the asked positions among the tokens start..stop-1."""
        return [j for j, at in enumerate(self.query.positions) if start <= at < stop]


@dataclass(frozen=True)
class _Asked:
    """One asked position: of a query, its index there, and its place in the packed hidden
    states."""

    pending: PendingQuery
    index: int
    at: int

    @property
    def candidate_ids(self) -> tuple[int, ...]:
        return self.pending.query.candidate_ids[self.index]


class LLMSelector:
    """The LLM. One thread owns it."""

    def __init__(
        self, runtime: ModelRuntime, tokenizer_digest: str, step_tokens: int | None = None
    ) -> None:
        self.runtime = runtime
        by_device = STEP_TOKENS.get(runtime.device.type, STEP_TOKENS["cpu"])
        self._step_tokens = step_tokens or by_device
        self.info = LLMInfo(runtime.digest, tokenizer_digest, runtime.eos_ids, runtime.max_length)
        self._pending: list[PendingQuery] = []

    def check(self, query: ScoreQuery) -> None:
        """Check a query before it is queued.

        Raises:
            InvalidRequestError: naming the field that is wrong.
        """
        check_query(query, self.runtime.max_length, self.runtime.vocab_rows)
        pool = self.runtime.pool
        if not pool.fits(len(query.token_ids)):
            raise InvalidRequestError(
                f"token_ids: {len(query.token_ids)} ids do not fit the LLM's KV pool of "
                f"{pool.max_tokens} tokens; shorten the context or raise kv_gib"
            )

    def add(self, query: ScoreQuery, is_wanted: Callable[[], bool] = always) -> PendingQuery:
        """Queue a checked query."""
        pending = PendingQuery(query, is_wanted)
        self._pending.append(pending)
        return pending

    @property
    def idle(self) -> bool:
        """Whether no query waits."""
        return not self._pending

    def step(self) -> list[tuple[PendingQuery, ScoreReply | None]]:
        """One forward. Returns the finished queries and, with None, those nobody waits for."""
        dropped = [p for p in self._pending if not p.is_wanted()]
        self._retire(dropped)
        chunks = self._chunks()
        if chunks:
            self._forward(chunks)
        done = [pending for pending, _ in chunks if pending.unread == 0]
        self._retire(done)
        results: list[tuple[PendingQuery, ScoreReply | None]] = [(p, None) for p in dropped]
        for pending in done:
            results.append((pending, ScoreReply(tuple(pending.scores), self.info.digest)))
        return results

    def score(self, queries: Sequence[ScoreQuery]) -> list[ScoreReply]:
        """Answer checked queries. Blocks until all are answered."""
        waiting = [self.add(query) for query in queries]
        replies: dict[PendingQuery, ScoreReply] = {}
        while len(replies) < len(waiting):
            for pending, reply in self.step():
                assert reply is not None
                replies[pending] = reply
        return [replies[pending] for pending in waiting]

    # -- who reads what ---------------------------------------------------------------------------

    def _retire(self, ended: Sequence[PendingQuery]) -> None:
        """Forget queries and release their slots."""
        if not ended:
            return
        self._pending = [p for p in self._pending if p not in ended]
        for pending in ended:
            if pending.slot is not None:
                self.runtime.pool.release(pending.slot)

    def _chunks(self) -> list[tuple[PendingQuery, int]]:
        """Who reads how many tokens in this forward.

        The oldest query gets up to half of it, the rest goes to those with the least to read. What
        one query reads here another copies in the next step.
        """
        self._allocate()
        ready = [p for p in self._pending if p.slot is not None]
        assert ready or not self._pending, "check() let a query pass that does not fit"
        budget = self._step_tokens
        chunks: list[tuple[PendingQuery, int]] = []
        for pending in [*ready[:1], *sorted(ready[1:], key=lambda p: p.unread)]:
            if budget <= 0 or self._waits_for_another(pending, chunks):
                continue
            tokens = min(pending.unread, budget)
            if pending is ready[0] and len(ready) > 1:
                tokens = min(tokens, self._step_tokens // 2)
            if tokens > 0:
                chunks.append((pending, tokens))
                budget -= tokens
        return chunks

    def _allocate(self) -> None:
        """Slots for waiting queries, first come, first served."""
        for pending in self._pending:
            if pending.slot is None:
                pool = self.runtime.pool
                pending.slot = pool.allocate(pending.reusable, len(pending.needed))
            if pending.slot is None:  # later ones must not take what it waits for
                return

    def _waits_for_another(
        self, pending: PendingQuery, chunks: Sequence[tuple[PendingQuery, int]]
    ) -> bool:
        if pending.unread <= MIN_PREFIX_MATCH:
            return False
        assert pending.slot is not None
        self.runtime.pool.extend_from_cache(pending.slot, pending.reusable)
        for other, _ in chunks:
            assert other.slot is not None
            if shares_longer_prefix(pending.reusable, pending.slot, other.slot, other.needed):
                return True
        return False

    # -- the forward ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[tuple[PendingQuery, int]]) -> None:
        segments = []
        starts = []
        for pending, tokens in chunks:
            assert pending.slot is not None
            start = pending.read
            ids = pending.query.token_ids[start : start + tokens]
            segments.append(Segment(slot=pending.slot, token_ids=ids, start=start))
            starts.append(start)
        hidden, places = self.runtime.forward(segments)
        asked: list[_Asked] = []
        for (pending, tokens), start, place in zip(chunks, starts, places, strict=True):
            for j in pending.asked(start, start + tokens):
                at = place.start + pending.query.positions[j] - start
                asked.append(_Asked(pending, j, at))
        for first in range(0, len(asked), HEAD_TOKENS):
            part = asked[first : first + HEAD_TOKENS]
            scores = self._position_scores(hidden[[a.at for a in part]], part)
            for a, found in zip(part, scores, strict=True):
                a.pending.scores.append(found)

    def _position_scores(self, hidden: Tensor, asked: Sequence[_Asked]) -> list[PositionScores]:
        """[m, hidden] and who asked -> the asked log-probabilities, with one transfer."""
        logits = self.runtime.logits(hidden)
        self._exclude(logits, asked)
        norm = logits.logsumexp(-1, keepdim=True)
        top_ids = logits.argmax(-1, keepdim=True)
        width = max(len(a.candidate_ids) for a in asked)
        padded = [[*a.candidate_ids, *[0] * (width - len(a.candidate_ids))] for a in asked]
        ids = torch.tensor(padded, dtype=torch.long, device=hidden.device)
        # Rows may differ inside a family: an id the LLM has no row for is impossible to it.
        rows = self.runtime.vocab_rows
        found = logits.gather(1, ids.clamp(max=rows - 1)) - norm
        found = found.masked_fill(ids >= rows, IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        numbers = torch.cat([found, top_ids.float()], 1).tolist()
        scores = []
        for a, row in zip(asked, numbers, strict=True):
            scores.append(PositionScores(tuple(row[: len(a.candidate_ids)]), int(row[-1])))
        return scores

    def _exclude(self, logits: Tensor, asked: Sequence[_Asked]) -> None:
        """Set excluded ids to -inf: one group of rows where all proposers run the same SLM."""
        all_rows = self.runtime.vocab_rows
        groups: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for row, a in enumerate(asked):
            query = a.pending.query
            groups[query.excluded_ids, query.vocab_size or all_rows].append(row)
        for (excluded_ids, vocab_size), rows in groups.items():
            barred = torch.zeros(all_rows, dtype=torch.bool)
            barred[[i for i in excluded_ids if i < all_rows]] = True
            barred[vocab_size:] = True
            mine: slice | Tensor = slice(None)
            if len(rows) < len(asked):
                mine = torch.tensor(rows, device=logits.device)
            logits[mine] = logits[mine].masked_fill(barred.to(logits.device), -torch.inf)


class InProcessSelector:
    """A `SelectorClient` over an `LLMSelector` in this process: `submit` answers at once."""

    def __init__(self, llm: LLMSelector) -> None:
        self._llm = llm

    @property
    def info(self) -> LLMInfo:
        return self._llm.info

    def forget(self) -> None:
        """Free the contexts that are kept for reuse."""
        self._llm.runtime.pool.clear()

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        good = []
        for query, future in zip(queries, futures, strict=True):
            try:
                self._llm.check(query)
            except InvalidRequestError as error:
                future.set_exception(error)
            else:
                good.append((query, future))
        replies = self._llm.score([query for query, _ in good])
        for (_, future), reply in zip(good, replies, strict=True):
            future.set_result(reply)
        return futures
