"""The two models in their roles: the SLM as proposer (and local selector), the LLM as selector.

Turns sequences and queries into forwards of a `ModelRuntime`, and hidden states into the numbers the policy reads.
Decides nothing; knows no text, no network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from s2t_shared.errors import InvalidRequestError
from s2t_shared.local_selector import Candidates, LocalSelector, Reading, score_candidates
from s2t_shared.lora import Adapter
from s2t_shared.runtime import ModelRuntime
from s2t_shared.types import (
    SUPPORT_SIZE,
    Policy,
    PositionScores,
    Proposals,
    Sampling,
    ScoreQuery,
    ScoreReply,
    Support,
)

PREFILL_TOKENS = 4096  # tokens of one prefill forward, padding included
HEAD_TOKENS = 256  # positions whose full-vocabulary log-probabilities exist at once
IMPOSSIBLE = -1e4  # log-probability of an id that cannot occur; finite, so that it survives JSON and float32
T = TypeVar("T")


# -- proposer ---------------------------------------------------------------------------------------------------


@dataclass
class Track:
    """A sequence's place in the SLM: its generation row, and its adapted row once `reads: adapted` needed one."""

    row: int
    length: int = 0
    adapted_row: int | None = None
    adapted_length: int = 0
    selector: LocalSelector | None = None
    proposals: Proposals = Proposals.BASE

    @property
    def proposing_adapter(self) -> Adapter | None:
        return self.selector.adapter if self.selector and self.proposals is Proposals.ADAPTED else None

    @property
    def reads_for_itself(self) -> bool:
        """The selector's adapter has a KV of its own (with adapted proposals the generation KV is the adapter's)."""
        return (self.selector is not None and self.selector.adapter is not None
                and self.selector.reads is Reading.ADAPTED and self.proposals is Proposals.BASE)


@dataclass(frozen=True)
class Draw:
    """A request to sample at this position: the seed and step make it independent of the batch."""

    sampling: Sampling
    step: int


class Proposer:
    """The SLM. One call to `propose` is one batched forward for all sequences that want a next token."""

    def __init__(self, runtime: ModelRuntime, reserved_ids: tuple[int, ...]) -> None:
        self.runtime, self.reserved_ids = runtime, reserved_ids
        self.excluded_ids = tuple(i for i in reserved_ids if i < runtime.vocab_rows)
        self._support_size = min(SUPPORT_SIZE, runtime.vocab_rows - len(self.excluded_ids))

    def open(self, selector: LocalSelector | None, policy: Policy) -> Track | None:
        """A place for a new sequence, or None when too few rows are free. A selector that reads the context itself
        gets its row now: a sequence that has begun must never lack one."""
        row = self.runtime.pool.allocate()
        if row is None:
            return None
        track = Track(row, selector=selector, proposals=policy.proposals)
        if policy.can_trigger and track.reads_for_itself:
            track.adapted_row = self.runtime.pool.allocate()
            if track.adapted_row is None:
                self.runtime.pool.free(row)
                return None
        return track

    def close(self, track: Track) -> None:
        self.runtime.pool.free(track.row)
        if track.adapted_row is not None:
            self.runtime.pool.free(track.adapted_row)

    def propose(self, tracks: Sequence[Track], token_ids: Sequence[Sequence[int]],
                draws: Sequence[Draw | None]) -> list[tuple[Support, int | None]]:
        """Read each sequence's unread tokens; return the support at its end and, where asked, a sampled id."""
        results: dict[int, tuple[Support, int | None]] = {}

        def kind(i: int) -> tuple[bool, int]:
            return len(token_ids[i]) - tracks[i].length > 1, id(tracks[i].proposing_adapter)

        for _, group in groupby(sorted(range(len(tracks)), key=kind), key=kind):
            for batch in token_batches(list(group), lambda i: len(token_ids[i]) - tracks[i].length, PREFILL_TOKENS):
                unread = [token_ids[i][tracks[i].length:] for i in batch]
                hidden = self.runtime.extend([tracks[i].row for i in batch], unread,
                                             [tracks[i].length for i in batch], tracks[batch[0]].proposing_adapter)
                for i in batch:
                    tracks[i].length = len(token_ids[i])
                last = hidden[torch.arange(len(batch)), torch.tensor([len(ids) - 1 for ids in unread])]
                results |= zip(batch, self._reduce(last, [draws[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(tracks))]

    @torch.no_grad()
    def _reduce(self, hidden: Tensor, draws: Sequence[Draw | None]) -> list[tuple[Support, int | None]]:
        """[n, hidden] -> supports, with one transfer to the host."""
        logits = self.runtime.logits(hidden)
        logits[:, list(self.excluded_ids)] = -torch.inf
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(self._support_size, dim=-1)
        values, ids = torch.cat([top.values, top.indices.float()], 1).cpu().chunk(2, dim=1)
        return [(Support(tuple(map(int, i)), tuple(v)), None if draw is None else sample(log_probs[row], draw))
                for row, (i, v, draw) in enumerate(zip(ids.tolist(), values.tolist(), draws, strict=True))]

    @torch.no_grad()
    def select(self, tracks: Sequence[Track], token_ids: Sequence[Sequence[int]], supports: Sequence[Support],
               counts: Sequence[int]) -> list[tuple[float, ...]]:
        """The local selector's score of each sequence's first `counts[i]` support ids, SLM order."""
        results: dict[int, tuple[float, ...]] = {}

        def selector_of(i: int) -> LocalSelector:
            return tracks[i].selector or LocalSelector.untrained(self.reserved_ids)

        def key(i: int) -> tuple[str, bool]:
            return selector_of(i).version, tracks[i].proposals is Proposals.ADAPTED

        for _, group in groupby(sorted(range(len(tracks)), key=key), key=key):
            batch = list(group)
            selector = selector_of(batch[0])
            rows = [tracks[i].row for i in batch]
            if tracks[batch[0]].reads_for_itself:
                rows = self._catch_up([tracks[i] for i in batch], [token_ids[i] for i in batch], selector)
            candidates = Candidates.pad([supports[i].ids[: counts[i]] for i in batch],
                                        [supports[i].log_probs[: counts[i]] for i in batch])
            scores = score_candidates(self.runtime, selector, rows, [token_ids[i][-1] for i in batch],
                                      [len(token_ids[i]) for i in batch], candidates).tolist()
            results |= {i: tuple(scores[j][: counts[i]]) for j, i in enumerate(batch)}
        return [results[i] for i in range(len(tracks))]

    def _catch_up(self, tracks: Sequence[Track], token_ids: Sequence[Sequence[int]],
                  selector: LocalSelector) -> list[int]:
        """Let the adapter read what came since its last score, into rows of its own."""
        rows = [track.adapted_row for track in tracks if track.adapted_row is not None]
        assert len(rows) == len(tracks)
        self.runtime.extend(rows, [ids[t.adapted_length:] for ids, t in zip(token_ids, tracks, strict=True)],
                            [t.adapted_length for t in tracks], selector.adapter)
        for ids, track in zip(token_ids, tracks, strict=True):
            track.adapted_length = len(ids)
        return rows


def sample(log_probs: Tensor, draw: Draw) -> int:
    """One id from log-probabilities [V], after temperature, top-k and top-p, by the sequence's own random numbers."""
    sampling = draw.sampling
    if sampling.temperature <= 0.0:
        return int(log_probs.argmax())
    probs = (log_probs.double().cpu() / sampling.temperature).softmax(-1)
    ordered, ids = probs.sort(descending=True, stable=True)
    if sampling.top_k > 0:
        ordered[sampling.top_k:] = 0.0
    if sampling.top_p < 1.0:
        ordered[(ordered.cumsum(0) - ordered) >= sampling.top_p] = 0.0
    generator = torch.Generator().manual_seed(hash((sampling.seed, draw.step)) & 0x7FFFFFFFFFFFFFFF)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * ordered.sum()
    index = min(int(torch.searchsorted(ordered.cumsum(0), point, right=True)), int((ordered > 0).sum()) - 1)
    return int(ids[index])


def token_batches(items: Sequence[T], size: Callable[[T], int], limit: int) -> Iterable[list[T]]:
    """Split into batches, similar sizes together, so that len(batch) * max(size) stays within `limit`."""
    batch: list[T] = []
    for item in sorted(items, key=size):
        if batch and (len(batch) + 1) * size(item) > limit:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# -- selector ---------------------------------------------------------------------------------------------------


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


@dataclass
class _Held:
    """A row of KV kept after an answer, for the next query that starts with the same ids."""

    row: int
    token_ids: list[int] = field(default_factory=list)


class LLMScorer:
    """The LLM. Stateless to its callers: every query carries the whole context, and the KV of the longest matching
    prefix that is still held is reused."""

    def __init__(self, runtime: ModelRuntime, tokenizer_digest: str) -> None:
        self.runtime = runtime
        self.info = LLMInfo(runtime.digest, tokenizer_digest, runtime.eos_ids, runtime.max_length)
        self._held: OrderedDict[int, _Held] = OrderedDict()  # by row, least recently used first

    def check(self, query: ScoreQuery) -> None:
        """Raises InvalidRequestError: naming the field that is wrong."""
        n = len(query.token_ids)
        if not n:
            raise InvalidRequestError("token_ids: empty; send the whole context")
        if n > self.runtime.max_length:
            raise InvalidRequestError(f"token_ids: {n} ids, the LLM reads at most {self.runtime.max_length}")
        if not query.positions or len(query.positions) != len(query.candidate_ids):
            raise InvalidRequestError(f"positions: {len(query.positions)} given with {len(query.candidate_ids)} "
                                      "candidate groups; send one group (may be empty) per position, at least one")
        for position in query.positions:
            if not 0 <= position < n:
                raise InvalidRequestError(f"positions: {position} is outside the context 0..{n - 1}")
        self.runtime.check_ids(query.token_ids)
        if any(i < 0 for group in query.candidate_ids for i in group):
            raise InvalidRequestError("candidate_ids: an id is negative")

    def score(self, queries: Sequence[ScoreQuery]) -> list[ScoreReply]:
        """Answer checked queries, batched by tokens."""
        replies: dict[int, ScoreReply] = {}
        waiting = list(range(len(queries)))
        while waiting:
            size = min(len(waiting), max(1, self.runtime.pool.max_rows // 2))
            chunk, waiting = waiting[:size], waiting[size:]
            places = {i: self._place(queries[i]) for i in chunk}
            unread = {i: len(queries[i].token_ids) - places[i][1] for i in chunk}
            for batch in token_batches(chunk, unread.__getitem__, PREFILL_TOKENS):
                replies |= zip(batch, self._forward([queries[i] for i in batch], [places[i] for i in batch]),
                               strict=True)
            for i in chunk:
                row = places[i][0]
                self._held[row] = _Held(row, list(queries[i].token_ids))
        return [replies[i] for i in range(len(queries))]

    def _place(self, query: ScoreQuery) -> tuple[int, int]:
        """(row, reusable length): the held row with the longest common prefix, or a free or the oldest row."""
        reusable = {row: min(_common_prefix(held.token_ids, query.token_ids), min(query.positions))
                    for row, held in self._held.items()}
        best = max(reusable, key=lambda row: reusable[row], default=None)
        # Taking a row destroys what it held beyond the common part: do so only if little is lost.
        if best is not None and reusable[best] * 2 >= len(self._held[best].token_ids):
            del self._held[best]
            return best, reusable[best]
        row = self.runtime.pool.allocate()
        if row is None:
            row, _ = self._held.popitem(last=False)
        return row, 0

    @torch.no_grad()
    def _forward(self, queries: Sequence[ScoreQuery], places: Sequence[tuple[int, int]]) -> list[ScoreReply]:
        hidden = self.runtime.extend([row for row, _ in places],
                                     [q.token_ids[start:] for q, (_, start) in zip(queries, places, strict=True)],
                                     [start for _, start in places])
        wanted = [(i, position - places[i][1], j) for i, query in enumerate(queries)
                  for j, position in enumerate(query.positions)]
        scores: list[list[PositionScores]] = [[] for _ in queries]
        for at in range(0, len(wanted), HEAD_TOKENS):
            part = wanted[at: at + HEAD_TOKENS]
            rows = hidden[[i for i, _, _ in part], [column for _, column, _ in part]]
            for (i, _, _), result in zip(part, self._read(rows, [(queries[i], j) for i, _, j in part]), strict=True):
                scores[i].append(result)
        return [ScoreReply(tuple(positions), self.info.digest) for positions in scores]

    def _read(self, hidden: Tensor, asked: Sequence[tuple[ScoreQuery, int]]) -> list[PositionScores]:
        """[m, hidden] and who asked -> the asked log-probabilities, with one transfer to the host."""
        logits = self.runtime.logits(hidden)
        for row, (query, _) in enumerate(asked):
            logits[row, [i for i in query.excluded_ids if i < self.runtime.vocab_rows]] = -torch.inf
            if query.vocab_size:
                logits[row, query.vocab_size:] = -torch.inf
        log_probs = logits.log_softmax(-1)
        best = log_probs.max(-1)
        groups = [query.candidate_ids[j] for query, j in asked]
        width = max(len(group) for group in groups)
        ids = torch.tensor([[*g, *[0] * (width - len(g))] for g in groups], dtype=torch.long, device=hidden.device)
        # Rows may differ inside a family: an id the LLM has no row for is impossible to it.
        found = log_probs.gather(1, ids.clamp(max=self.runtime.vocab_rows - 1))
        found = found.masked_fill(ids >= self.runtime.vocab_rows, IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        packed = torch.cat([found, best.values[:, None], best.indices[:, None].float()], 1).tolist()
        return [PositionScores(tuple(values[: len(group)]), int(values[-1]), values[-2])
                for values, group in zip(packed, groups, strict=True)]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


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
