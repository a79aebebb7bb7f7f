"""The local selector: the SLM, with a gated adapter, scores its own candidates (S2T-LOCAL).

There are three kinds and two readings (`s2t_shared/README.md`). `scoring_segment` says which tokens
to look at, for serving. `combine` turns their hidden states into scores, for serving and for
training alike. Knows rows and tokens; no policy, no files.

    kind       tokens looked at          score(c)
    reserved   the K siblings            sum_i v_i softmax(z(c))_i, v = linspace(0, 1, 16)  (paper)
    prefix     the last context token    log p_adapted(c | s), renormalised on the candidates
    joint      last token and siblings   reserved score / T + prefix score

The reserved score can be `binary` instead: z(c)_1, the raw logit of the second bin. `standardise`
brings the score to mean 0 and variance 1 over the candidates of a context.

`reads: base` looks at those tokens over the base model's KV. `reads: adapted` looks at them over a
KV that the adapter read itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t_shared.model.kv_pool import Slot
from s2t_shared.model.lora import Adapter
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.policy import Calibration
from s2t_shared.types import Reading as Reading
from s2t_shared.types import Scoring as Scoring
from s2t_shared.types import SelectorKind as SelectorKind

VARIANCE_FLOOR = 1e-8  # equal scores stay equal when they are standardised, and have a gradient


@dataclass(kw_only=True)
class LocalSelector:
    """What a published version holds in memory. `bin_deltas`: [16, hidden], added to the base
    model's reserved rows. `temperature` T belongs to the reserved score; `fusion` is lambda, the
    weight of log p_base(c | s); `calibration` holds the thresholds stored with the version."""

    version: str
    kind: SelectorKind
    reads: Reading
    reserved_ids: tuple[int, ...]
    adapter: Adapter | None = None
    bin_deltas: Tensor | None = None
    temperature: float = 0.1
    fusion: float = 0.0
    calibration: Calibration = Calibration({})
    scoring: Scoring = Scoring.EXPECTED
    standardise: bool = False

    @classmethod
    def untrained(cls, reserved_ids: tuple[int, ...]) -> LocalSelector:
        """Selector "none": kind `reserved` with the base model's own rows."""
        return cls(
            version="", kind=SelectorKind.RESERVED, reads=Reading.BASE, reserved_ids=reserved_ids
        )

    def selection_logits(self, scores: Tensor) -> Tensor:
        """Scores on the scale of logits: what the training losses and softmax see."""
        return scores / self.temperature if self.kind is SelectorKind.RESERVED else scores


@dataclass(frozen=True)
class Candidates:
    """Padded candidates of n contexts: ids [n, K] int64, base_log_probs [n, K], counts [n] (>= 1,
    <= K)."""

    ids: Tensor
    base_log_probs: Tensor
    counts: Tensor

    @classmethod
    def pad(
        cls, ids: Sequence[Sequence[int]], base_log_probs: Sequence[Sequence[float]]
    ) -> Candidates:
        width = max(len(group) for group in ids)
        return cls(
            torch.tensor([[*group, *[group[0]] * (width - len(group))] for group in ids]),
            torch.tensor([[*group, *[0.0] * (width - len(group))] for group in base_log_probs]),
            torch.tensor([len(group) for group in ids]),
        )

    @property
    def valid(self) -> Tensor:
        """bool [n, K]"""
        return torch.arange(self.ids.shape[1])[None, :] < self.counts[:, None]


def scoring_segment(
    selector: LocalSelector,
    slot: Slot,
    token_ids: Sequence[int],
    candidate_ids: Sequence[int],
    own_reading: bool,
    limit: int,
) -> tuple[Segment, bool]:
    """The tokens to look at for the scores of `candidate_ids` after `token_ids`, and whether they
    are all of them.

    own_reading: `slot` is the adapter's own, which first reads what is new in `token_ids`, at most
    `limit` tokens at a time. Otherwise `slot` is the generation's; it has read all of `token_ids`,
    and nothing is kept.
    """
    with_last = selector.kind is not SelectorKind.RESERVED
    siblings = candidate_ids if selector.kind is not SelectorKind.PREFIX else ()
    start = len(token_ids) - int(with_last)
    if own_reading:
        start = min(start, len(slot.token_ids))
        if len(token_ids) - start > limit:
            return Segment(
                slot=slot,
                token_ids=token_ids[start : start + limit],
                start=start,
                siblings=(),
                adapter=selector.adapter,
            ), False
    return Segment(
        slot=slot,
        token_ids=token_ids[start:],
        start=start,
        siblings=siblings,
        adapter=selector.adapter,
        keep=own_reading,
    ), True


def split_hidden(
    selector: LocalSelector, hidden: Tensor, candidates: int
) -> tuple[Tensor | None, Tensor | None]:
    """Hidden states [..., t, hidden] of a whole scoring segment -> those of the last context token
    [..., hidden] and of the siblings [..., K, hidden], as the kind reads them."""
    if selector.kind is SelectorKind.PREFIX:
        return hidden[..., -1, :], None
    siblings = hidden[..., -candidates:, :]
    return (
        hidden[..., -candidates - 1, :] if selector.kind is SelectorKind.JOINT else None
    ), siblings


def block_mask(siblings: int, with_last: bool) -> Tensor:
    """bool [t, t] of one scoring block: the re-read last token first, then siblings that see it and
    themselves."""
    mask = torch.eye(siblings + int(with_last), dtype=torch.bool)
    if with_last:
        mask[:, 0] = True
    return mask


def combine(
    runtime: ModelRuntime,
    selector: LocalSelector,
    last: Tensor | None,
    siblings: Tensor | None,
    candidates: Candidates,
) -> Tensor:
    """Hidden states of the looked-at tokens -> scores [n, K]. last: [n, hidden]; siblings: [n, K,
    hidden]."""
    device = runtime.device
    valid = candidates.valid.to(device)
    scores = torch.zeros(valid.shape, device=device)
    if siblings is not None:
        reserved = _reserved_scores(runtime, selector, siblings, valid)
        scores = (
            reserved if selector.kind is SelectorKind.RESERVED else reserved / selector.temperature
        )
    if last is not None:
        logits = runtime.row_logits(last, candidates.ids).masked_fill(~valid, -torch.inf)
        scores = scores + logits.log_softmax(-1)
    if selector.fusion:
        scores = scores + selector.fusion * candidates.base_log_probs.to(device)
    return scores.masked_fill(~valid, -torch.inf)


def _reserved_scores(
    runtime: ModelRuntime, selector: LocalSelector, siblings: Tensor, valid: Tensor
) -> Tensor:
    """[n, K, hidden] -> [n, K]."""
    deltas = selector.bin_deltas
    if selector.scoring is Scoring.BINARY:
        second = None if deltas is None else deltas[1:2]
        scores = runtime.reserved_logits(siblings, selector.reserved_ids[1:2], second)[..., 0]
    else:
        bins = runtime.reserved_logits(siblings, selector.reserved_ids, deltas).softmax(-1)
        scores = bins @ torch.linspace(0, 1, bins.shape[-1], device=runtime.device)
    if not selector.standardise:
        return scores
    counts = valid.sum(-1, keepdim=True)
    centred = (scores - (scores * valid).sum(-1, keepdim=True) / counts) * valid
    return centred / (centred.square().sum(-1, keepdim=True) / counts + VARIANCE_FLOOR).sqrt()
