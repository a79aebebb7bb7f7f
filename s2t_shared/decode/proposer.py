"""The SLM as proposer and local selector: works in, one packed forward, proposals and scores out.

A *work* is what one sequence wants from the SLM in this step: its next-token proposal (`Propose`), or the local
selector's scores of its candidates (`Score`). All works of a step share one forward: prompts are read in chunks
beside the decoding of others, and scored candidates ride along. Decides nothing; knows no text, no LLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2t_shared.model.kv_pool import SHORTEST_REUSE, Row, will_hold_more
from s2t_shared.model.local_selector import Candidates, LocalSelector, Reading, combine, scoring_segment, split_hidden
from s2t_shared.model.lora import Adapter, merge
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.types import SUPPORT_SIZE, Policy, Proposals, Sampling, Support

CHUNK_TOKENS = 256  # prompt tokens read per step, beside the decoding of others
TOP_BLOCK = 128  # the vocabulary is searched in blocks of so many ids


@dataclass
class Track:
    """A sequence's place in the SLM: its generation row, and a row of the adapter's own for `reads: adapted`."""

    row: Row
    adapted_row: Row | None = None
    selector: LocalSelector | None = None
    proposals: Proposals = Proposals.BASE

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens of the sequence stand."""
        self.row.truncate(length)
        if self.adapted_row is not None:
            self.adapted_row.truncate(length)


@dataclass(frozen=True)
class Draw:
    """A request to sample at this position: the seed and step make it independent of the batch."""

    sampling: Sampling
    step: int


@dataclass(frozen=True)
class Propose:
    """Read what is new in `token_ids` and propose what follows. `wants_support`: the top 64, not only the first."""

    track: Track
    token_ids: Sequence[int]
    draw: Draw | None = None
    wants_support: bool = True


@dataclass(frozen=True)
class Score:
    """Score these candidates after `token_ids`, all of which the generation row has read."""

    track: Track
    token_ids: Sequence[int]
    candidate_ids: Sequence[int]
    base_log_probs: Sequence[float]


@dataclass(frozen=True)
class Proposal:
    """The SLM's first choice; its support and a sampled id where they were wanted."""

    top_id: int
    support: Support | None = None
    drawn_id: int | None = None


Work = Propose | Score
Result = Proposal | tuple[float, ...] | None  # None: not all tokens are read yet, ask again


class Proposer:
    """The SLM. `run` is one forward for all sequences that want something."""

    def __init__(self, runtime: ModelRuntime, reserved_ids: tuple[int, ...], chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.runtime, self.reserved_ids, self._chunk_tokens = runtime, reserved_ids, chunk_tokens
        self.excluded_ids = tuple(i for i in reserved_ids if i < runtime.vocab_rows)
        self._excluded = torch.tensor(self.excluded_ids, dtype=torch.long, device=runtime.device)
        self._support_size = min(SUPPORT_SIZE, runtime.vocab_rows - len(self.excluded_ids))
        self._untrained = LocalSelector.untrained(reserved_ids)
        self._merged: Adapter | None = None

    # -- places -----------------------------------------------------------------------------------------------------

    def columns(self, policy: Policy, tokens: int) -> int:
        """KV columns of a sequence of at most `tokens` tokens, with room for the candidates it looks at."""
        return tokens + (policy.candidates.k + 1 if policy.can_trigger else 0)

    def fits(self, policy: Policy, tokens: int) -> bool:
        """Whether such a sequence can ever be served by this pool."""
        rows = 2 if policy.can_trigger and policy.proposals is Proposals.BASE else 1
        return self.runtime.pool.fits(self.columns(policy, tokens), rows)

    def open(self, selector: LocalSelector | None, policy: Policy, token_ids: Sequence[int],
             max_tokens: int) -> Track | None:
        """A place for a new sequence, holding whatever of its prompt is in the pool already; None: no room now.
        A selector that reads the context itself gets its row now: a sequence that has begun must never lack one."""
        pool, columns = self.runtime.pool, self.columns(policy, max_tokens)
        adapter = selector.adapter if selector is not None else None
        adapted = policy.proposals is Proposals.ADAPTED
        if adapted and adapter is not None:
            self._merge(adapter)
        needs_own = policy.can_trigger and selector is not None and selector.reads is Reading.ADAPTED and not adapted
        row = pool.acquire(token_ids, columns, adapter.key if adapted and adapter else None)
        if row is None:
            return None
        own_row = pool.acquire(token_ids, columns, adapter.key) if needs_own and adapter else None
        if needs_own and adapter and own_row is None:
            pool.release(row)
            if pool.live_rows == 0:  # what is kept for reuse stands in the way of what fits
                pool.clear()
                return self.open(selector, policy, token_ids, max_tokens)
            return None
        return Track(row, own_row, selector, policy.proposals)

    def _merge(self, adapter: Adapter) -> None:
        """One version at a time has merged weights; sequences of another fall back to the gate."""
        if self._merged is not None and self._merged is not adapter:
            self._merged.merged.clear()
        self._merged = adapter
        merge(adapter, self.runtime.model)

    def close(self, track: Track) -> None:
        self.runtime.pool.release(track.row)
        if track.adapted_row is not None:
            self.runtime.pool.release(track.adapted_row)

    # -- the step ---------------------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> list[Result]:
        """One forward. Works of one or a few tokens are all in it; longer reading shares `chunk_tokens` in the
        order given, and comes back as None until it is done."""
        segments, complete = self._segments(works)
        if not segments:
            return [None] * len(works)
        indices = list(segments)
        hidden, places = self.runtime.forward([segments[i] for i in indices])
        where = dict(zip(indices, places, strict=True))
        proposing = [i for i in indices if complete[i] and isinstance(works[i], Propose)]
        scoring = [i for i in indices if complete[i] and isinstance(works[i], Score)]
        results: list[Result] = [None] * len(works)
        if proposing:
            last = hidden[[where[i].stop - 1 for i in proposing]]
            for i, proposal in zip(proposing, self._reduce(last, [works[i] for i in proposing]), strict=True):
                results[i] = proposal
        for i, scores in self._scores({i: works[i] for i in scoring}, {i: hidden[where[i]] for i in scoring}).items():
            results[i] = scores
        return results

    def _segments(self, works: Sequence[Work]) -> tuple[dict[int, Segment], dict[int, bool]]:
        """Each work's tokens of this forward, and whether they complete it."""
        segments: dict[int, Segment] = {}
        complete: dict[int, bool] = {}
        unread = {i: len(work.token_ids) - len(self._row(work).token_ids) for i, work in enumerate(works)}
        for i in (i for i in unread if unread[i] <= SHORTEST_REUSE):
            segments[i], complete[i] = self._segment(works[i], SHORTEST_REUSE + 1)
        # Half of the chunk is the oldest reader's; the rest goes to those with the least to read.
        long = [i for i in unread if unread[i] > SHORTEST_REUSE]
        budget = self._chunk_tokens
        reading: list[Work] = []
        for i in [*long[:1], *sorted(long[1:], key=unread.__getitem__)]:
            if budget <= 0:
                break
            work, row = works[i], self._row(works[i])
            self.runtime.pool.catch_up(row, work.token_ids)
            # What another row reads in this very forward is copied in the next step rather than read twice.
            if any(will_hold_more(work.token_ids, row, self._row(other), other.token_ids) for other in reading):
                continue
            limit = budget if reading or len(long) == 1 else max(1, budget // 2)
            segments[i], complete[i] = self._segment(work, limit)
            budget -= len(segments[i].token_ids)
            reading.append(work)
        return segments, complete

    def _row(self, work: Work) -> Row:
        track = work.track
        return track.adapted_row if isinstance(work, Score) and track.adapted_row is not None else track.row

    def _segment(self, work: Work, limit: int) -> tuple[Segment, bool]:
        row = self._row(work)
        if isinstance(work, Score):
            selector = work.track.selector or self._untrained
            return scoring_segment(selector, row, work.token_ids, work.candidate_ids, row is work.track.adapted_row,
                                   limit)
        start = len(row.token_ids)
        assert start < len(work.token_ids), "nothing to read"
        end = min(len(work.token_ids), start + limit)
        return Segment(row, work.token_ids[start:end], start, adapter=_proposing_adapter(work.track)), \
            end == len(work.token_ids)

    # -- reductions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reduce(self, hidden: Tensor, works: Sequence[Work]) -> list[Proposal]:
        """[m, hidden] -> proposals, on the device, with one transfer to the host."""
        logits = self.runtime.logits(hidden)
        logits[:, self._excluded] = -torch.inf
        best = top_1(logits)
        wanting = [i for i, w in enumerate(works) if isinstance(w, Propose) and (w.wants_support or w.draw)]
        if not wanting:
            return [Proposal(top) for top in best.tolist()]
        k = self._support_size
        chosen = logits if len(wanting) == len(works) else logits[wanting]
        norm = chosen.logsumexp(-1, keepdim=True)
        values, ids = top_k(chosen, k)
        packed = torch.cat([best.float(), (values - norm).flatten(), ids.flatten().float()]).tolist()
        proposals = [Proposal(int(top)) for top in packed[: len(works)]]
        packed = packed[len(works):]
        half = len(wanting) * k
        for j, i in enumerate(wanting):
            support = _support(proposals[i].top_id, list(map(int, packed[half + j * k: half + (j + 1) * k])),
                               packed[j * k: (j + 1) * k])
            work = works[i]
            assert isinstance(work, Propose)
            drawn = None if work.draw is None else sample(chosen[j] - norm[j], work.draw)
            proposals[i] = Proposal(support.ids[0], support if work.wants_support else None, drawn)
        return proposals

    @torch.no_grad()
    def _scores(self, works: dict[int, Work], hidden: dict[int, Tensor]) -> dict[int, tuple[float, ...]]:
        """The scores of each work's candidates; works of one selector and count together."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, work in works.items():
            assert isinstance(work, Score)
            groups[id(work.track.selector), len(work.candidate_ids)].append(i)
        results: dict[int, tuple[float, ...]] = {}
        for (_, count), members in groups.items():
            selector = works[members[0]].track.selector or self._untrained
            parts = [split_hidden(selector, hidden[i], count) for i in members]
            last = torch.stack([p for p, _ in parts if p is not None]) if parts[0][0] is not None else None
            siblings = torch.stack([p for _, p in parts if p is not None]) if parts[0][1] is not None else None
            mine = [w for i in members if isinstance(w := works[i], Score)]
            candidates = Candidates.pad([w.candidate_ids for w in mine], [w.base_log_probs for w in mine])
            scores = combine(self.runtime, selector, last, siblings, candidates).tolist()
            results |= {i: tuple(row) for i, row in zip(members, scores, strict=True)}
        return results


def _proposing_adapter(track: Track) -> Adapter | None:
    return track.selector.adapter if track.selector and track.proposals is Proposals.ADAPTED else None


def _support(top_id: int, ids: list[int], log_probs: list[float]) -> Support:
    """Best first. Among equals (common in bfloat16) the same id comes first whether or not the rest is wanted."""
    if ids[0] != top_id:
        assert top_id in ids
        at = ids.index(top_id)
        ids.insert(0, ids.pop(at))
        log_probs.insert(0, log_probs.pop(at))
    return Support(tuple(ids), tuple(log_probs))


def top_1(logits: Tensor) -> Tensor:
    """The first greatest id of each row of [n, V]; by blocks, several times as fast as one argmax on CPU."""
    n, v = logits.shape
    if v % TOP_BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(n, -1, TOP_BLOCK)
    best = blocks.amax(-1).argmax(-1)
    return best * TOP_BLOCK + blocks[torch.arange(n, device=logits.device), best].argmax(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of [n, V], best first, by way of each block's maximum: the top k lie in the k blocks with the
    greatest maxima. One pass over V instead of a selection over it."""
    n, v = logits.shape
    if v <= 2 * k * TOP_BLOCK:
        values, ids = logits.topk(k)
        return values, ids
    blocks = F.pad(logits, (0, -v % TOP_BLOCK), value=-torch.inf).view(n, -1, TOP_BLOCK)
    best = blocks.amax(-1).topk(k).indices
    values, at = blocks.gather(1, best[..., None].expand(-1, -1, TOP_BLOCK)).flatten(1).topk(k)
    return values, best.gather(1, at // TOP_BLOCK) * TOP_BLOCK + at % TOP_BLOCK


def sample(log_probs: Tensor, draw: Draw) -> int:
    """One id from log-probabilities [V], after temperature, top-k and top-p, by the sequence's own random numbers."""
    sampling = draw.sampling
    if sampling.temperature <= 0.0:
        return int(log_probs.argmax())
    probs = (log_probs.double().cpu() / sampling.temperature).softmax(-1)
    ids = None
    if sampling.top_k > 0:
        probs, ids = probs.topk(min(sampling.top_k, len(probs)))
    elif sampling.top_p < 1.0:
        probs, ids = probs.sort(descending=True, stable=True)
    if sampling.top_p < 1.0:
        probs = probs.masked_fill((probs.cumsum(0) - probs) >= sampling.top_p, 0.0)
    generator = torch.Generator().manual_seed(hash((sampling.seed, draw.step)) & 0x7FFFFFFFFFFFFFFF)
    cumulated = probs.cumsum(0)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * cumulated[-1]
    index = min(int(torch.searchsorted(cumulated, point, right=True)), int(probs.nonzero()[-1]))
    return index if ids is None else int(ids[index])
