"""The local selector: the SLM, with a gated adapter, scores its own candidates (S2T-LOCAL).

There are three kinds and two readings (`s2t_shared/README.md`). `scoring_segment` chooses the
tokens to look at, for serving. `combine` turns their hidden states into scores, for serving and
for training alike. Knows slots and tokens; no policy, no files.

    kind       tokens looked at          score(c)
    reserved   the K siblings            sum_i v_i softmax(z(c))_i, v = linspace(0, 1, 16)  (paper)
    prefix     the last context token    log p_adapted(c | s), renormalised on the candidates
    joint      last token and siblings   reserved score / T + prefix score

The reserved score can be `binary` instead: z(c)_1, the raw logit of the second bin. `standardise`
brings the score to mean 0 and variance 1 over the candidates of a context.

`reads: base` looks at those tokens over the base model's KV. `reads: adapted` looks at them over a
KV that the adapter read itself.

A local selector that is always on does not select: its adapter acts on every token, and the SLM's
own first choice is emitted (plain distillation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from s2t_shared.model.kv_pool import Slot
from s2t_shared.model.lora import Adapter
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.policy import Calibration
from s2t_shared.types import Mode, Policy, Proposals, Trigger
from s2t_shared.types import Reading as Reading
from s2t_shared.types import Scoring as Scoring
from s2t_shared.types import SelectorKind as SelectorKind

VARIANCE_FLOOR = 1e-8  # equal scores stay equal when they are standardised, and have a gradient


@dataclass(kw_only=True)
class LocalSelector:
    """A published version, loaded.

    bin_deltas: float [16, hidden], added to the base model's reserved rows. temperature: T of the
    reserved score. fusion: lambda, the weight of log p_base(c | s). calibration: the thresholds
    that were published with the version. always_on: the adapter acts on every token of an
    `s2t_local` answer, and nothing triggers. folder: its files, for a runtime that reads them
    itself.
    """

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
    always_on: bool = False
    folder: Path | None = None

    @classmethod
    def untrained(cls, reserved_ids: tuple[int, ...]) -> LocalSelector:
        """The local selector of no version: kind `reserved` with the base model's own rows."""
        return cls(
            version="", kind=SelectorKind.RESERVED, reads=Reading.BASE, reserved_ids=reserved_ids
        )

    @property
    def is_ordinary_lora(self) -> bool:
        """Whether the adapted model's own next-token distribution is all that is needed."""
        reads_as_lora = self.kind is SelectorKind.PREFIX and self.reads is Reading.ADAPTED
        return self.always_on or reads_as_lora

    def served(self, policy: Policy) -> Policy:
        """How this local selector serves a request of that policy."""
        if not self.always_on or policy.mode is not Mode.S2T_LOCAL:
            return policy
        return replace(policy, trigger=Trigger.NEVER, proposals=Proposals.ADAPTED)

    def selection_logits(self, scores: Tensor) -> Tensor:
        """Scores on the scale of logits, as softmax and the training losses take them."""
        return scores / self.temperature if self.kind is SelectorKind.RESERVED else scores


@dataclass(frozen=True)
class AdapterHost:
    """An SLM whose runtime reads the adapters of ordinary LoRAs from their folders.

    digest: of its weights. max_rank: of an adapter; 0: it takes none.
    """

    digest: str
    max_rank: int


@dataclass(frozen=True)
class Candidates:
    """The candidates of n contexts, padded to K.

    ids: int64 [n, K]. base_log_probs: float [n, K]. counts: int64 [n], 1..K without padding.
    """

    ids: Tensor
    base_log_probs: Tensor
    counts: Tensor

    @classmethod
    def pad(
        cls, ids: Sequence[Sequence[int]], base_log_probs: Sequence[Sequence[float]]
    ) -> Candidates:
        counts = [len(group) for group in ids]
        width = max(counts)
        padded_ids = []
        padded_log_probs = []
        for group, log_probs in zip(ids, base_log_probs, strict=True):
            missing = width - len(group)
            padded_ids.append([*group, *[group[0]] * missing])
            padded_log_probs.append([*log_probs, *[0.0] * missing])
        return cls(torch.tensor(padded_ids), torch.tensor(padded_log_probs), torch.tensor(counts))

    @property
    def valid(self) -> Tensor:
        """bool [n, K]: which entries are candidates, not padding."""
        width = self.ids.shape[1]
        return torch.arange(width) < self.counts[:, None]


# -- tokens to look at ----------------------------------------------------------------------------


def scoring_segment(
    local_selector: LocalSelector,
    slot: Slot,
    token_ids: Sequence[int],
    candidate_ids: Sequence[int],
    own_reading: bool,
    limit: int,
) -> tuple[Segment, bool]:
    """The tokens to look at to score `candidate_ids` after `token_ids`, and whether all fit.

    own_reading: `slot` is the adapter's. The segment first reads what is new in `token_ids`; if
    that is more than `limit` tokens, it reads `limit` of them and scores nothing. Otherwise `slot`
    is the generation's, has read all of `token_ids`, and stays as it is.
    """
    with_last = local_selector.kind is not SelectorKind.RESERVED
    siblings = candidate_ids if local_selector.kind is not SelectorKind.PREFIX else ()
    start = len(token_ids) - int(with_last)
    if own_reading:
        start = min(start, len(slot.token_ids))
        if len(token_ids) - start > limit:
            part = Segment(
                slot=slot,
                token_ids=token_ids[start : start + limit],
                start=start,
                adapter=local_selector.adapter,
            )
            return part, False
    segment = Segment(
        slot=slot,
        token_ids=token_ids[start:],
        start=start,
        siblings=siblings,
        adapter=local_selector.adapter,
        extends_slot=own_reading,
    )
    return segment, True


def block_mask(siblings: int, with_last: bool) -> Tensor:
    """bool [t, t], which tokens of one context's scoring block see which.

    The last context token, if it is read again, comes first. Siblings see it and themselves.
    """
    mask = torch.eye(siblings + int(with_last), dtype=torch.bool)
    if with_last:
        mask[:, 0] = True
    return mask


# -- scores ---------------------------------------------------------------------------------------


def split_hidden(
    local_selector: LocalSelector, hidden: Tensor, candidates: int
) -> tuple[Tensor | None, Tensor | None]:
    """Split the hidden states [..., t, hidden] of a complete scoring segment.

    Returns those of the last context token [..., hidden] and of the siblings [..., K, hidden];
    None where the kind does not use them.
    """
    if local_selector.kind is SelectorKind.PREFIX:
        return hidden[..., -1, :], None
    siblings = hidden[..., -candidates:, :]
    if local_selector.kind is SelectorKind.RESERVED:
        return None, siblings
    return hidden[..., -candidates - 1, :], siblings


def combine(
    runtime: ModelRuntime,
    local_selector: LocalSelector,
    last: Tensor | None,
    siblings: Tensor | None,
    candidates: Candidates,
) -> Tensor:
    """Scores [n, K] from the hidden states of `split_hidden`; -inf for padding.

    last: [n, hidden]. siblings: [n, K, hidden].
    """
    device = runtime.device
    valid = candidates.valid.to(device)
    scores = torch.zeros(valid.shape, device=device)
    if siblings is not None:
        scores = _reserved_scores(runtime, local_selector, siblings, valid)
        if local_selector.kind is not SelectorKind.RESERVED:
            scores = scores / local_selector.temperature
    if last is not None:
        logits = runtime.row_logits(last, candidates.ids).masked_fill(~valid, -torch.inf)
        scores = scores + logits.log_softmax(-1)
    if local_selector.fusion:
        scores = scores + local_selector.fusion * candidates.base_log_probs.to(device)
    return scores.masked_fill(~valid, -torch.inf)


def _reserved_scores(
    runtime: ModelRuntime, local_selector: LocalSelector, siblings: Tensor, valid: Tensor
) -> Tensor:
    """[n, K, hidden] -> [n, K]."""
    reserved_ids = local_selector.reserved_ids
    deltas = local_selector.bin_deltas
    if local_selector.scoring is Scoring.BINARY:
        second_delta = None if deltas is None else deltas[1:2]
        scores = runtime.reserved_logits(siblings, reserved_ids[1:2], second_delta)[..., 0]
    else:
        bins = runtime.reserved_logits(siblings, reserved_ids, deltas).softmax(-1)
        scores = bins @ torch.linspace(0, 1, bins.shape[-1], device=runtime.device)
    return _standardised(scores, valid) if local_selector.standardise else scores


def _standardised(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores [n, K] brought to mean 0 and variance 1 over each row's candidates."""
    counts = valid.sum(-1, keepdim=True)
    mean = (scores * valid).sum(-1, keepdim=True) / counts
    centred = (scores - mean) * valid
    variance = centred.square().sum(-1, keepdim=True) / counts
    return centred / (variance + VARIANCE_FLOOR).sqrt()
