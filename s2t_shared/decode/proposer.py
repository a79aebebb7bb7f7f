"""The SLM as proposer and local selector, on torch: inputs of a step in, one packed forward,
proposals and scores out.

An input is what one sequence wants from the SLM in this step: its next token (`NextTokenInput`), or
the local selector's scores of its candidates (`SelectionInput`). All inputs of a step share one
forward: prompts are read in chunks beside the decoding of others, and candidates are scored beside
both. Decides nothing; knows no text, no LLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t_shared.decode.interfaces import (
    LocalScores,
    ModelInput,
    ModelOutput,
    NextTokenInput,
    PromptScores,
    Proposal,
    SelectionInput,
    SequenceKV,
    SLMInfo,
)
from s2t_shared.decode.prompt_reader import read_prompt
from s2t_shared.decode.reductions import read_proposals
from s2t_shared.model.kv_pool import MIN_PREFIX_MATCH, Slot, shares_longer_prefix
from s2t_shared.model.local_selector import (
    Candidates,
    LocalSelector,
    Reading,
    combine,
    scoring_segment,
    split_hidden,
)
from s2t_shared.model.lora import Adapter, merge
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.types import SUPPORT_SIZE, Policy, Proposals

# Prompt tokens read per step beside the decoding of others, by type of device: as many as delay
# the others little. A GPU reads thousands in the time that its launches take.
PREFILL_CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}


@dataclass
class SequenceSlots:
    """A sequence's KV slots: one for generation, one for an adapter that reads the context
    itself."""

    slot: Slot
    adapted_slot: Slot | None = None
    local_selector: LocalSelector | None = None
    proposals: Proposals = Proposals.BASE

    def truncate(self, length: int) -> None:
        self.slot.truncate(length)
        if self.adapted_slot is not None:
            self.adapted_slot.truncate(length)

    @property
    def proposing_adapter(self) -> Adapter | None:
        """The adapter that is on while the SLM proposes (`proposals: adapted`)."""
        if self.local_selector is None or self.proposals is Proposals.BASE:
            return None
        return self.local_selector.adapter


class Proposer:
    """The SLM. Implements `SLMProposer`."""

    def __init__(
        self,
        runtime: ModelRuntime,
        reserved_ids: tuple[int, ...],
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        self.runtime = runtime
        self.reserved_ids = reserved_ids
        by_device = PREFILL_CHUNK_TOKENS.get(runtime.device.type, PREFILL_CHUNK_TOKENS["cpu"])
        self._prefill_chunk_tokens = prefill_chunk_tokens or by_device
        self.excluded_ids = tuple(i for i in reserved_ids if i < runtime.vocab_rows)
        self._excluded = torch.tensor(self.excluded_ids, dtype=torch.long, device=runtime.device)
        self._support_size = min(SUPPORT_SIZE, runtime.vocab_rows - len(self.excluded_ids))
        self._untrained = LocalSelector.untrained(reserved_ids)
        self._merged: Adapter | None = None

    @property
    def info(self) -> SLMInfo:
        """What an engine must know of this SLM."""
        runtime = self.runtime
        return SLMInfo(
            digest=runtime.digest,
            eos_ids=runtime.eos_ids,
            max_length=runtime.max_length,
            vocab_rows=runtime.vocab_rows,
            excluded_ids=self.excluded_ids,
            kv_tokens=runtime.pool.max_tokens,
        )

    def check(
        self, token_ids: Sequence[int], policy: Policy, local_selector: LocalSelector | None
    ) -> None:
        """Raises InvalidRequestError: an id is outside the vocabulary."""
        self.runtime.check_ids(token_ids)

    @property
    def kv_slots_in_use(self) -> int:
        return self.runtime.pool.live_slots

    @property
    def kv_usage(self) -> float:
        return self.runtime.pool.usage

    # -- places in the KV pool --------------------------------------------------------------------

    def columns(self, policy: Policy, tokens: int) -> int:
        """KV columns of a sequence of at most `tokens` tokens, with room for its candidates."""
        return tokens + (policy.candidates.k + 1 if policy.can_trigger else 0)

    def fits(self, policy: Policy, tokens: int) -> bool:
        """Whether a sequence of so many tokens can ever be served by this pool."""
        slots = 2 if policy.can_trigger and policy.proposals is Proposals.BASE else 1
        return self.runtime.pool.fits(self.columns(policy, tokens), slots)

    def open(
        self,
        local_selector: LocalSelector | None,
        policy: Policy,
        token_ids: Sequence[int],
        max_tokens: int,
    ) -> SequenceSlots | None:
        """Slots for a new sequence, holding what the pool has read of its prompt; None: no room.

        A local selector that reads the context itself gets its slot now, because a sequence that
        has begun must never lack one.
        """
        pool = self.runtime.pool
        columns = self.columns(policy, max_tokens)
        adapter = local_selector.adapter if local_selector is not None else None
        proposes_adapted = policy.proposals is Proposals.ADAPTED and adapter is not None
        if proposes_adapted and adapter is not None:
            self._merge(adapter)
        key = adapter.key if proposes_adapted and adapter is not None else None
        slot = pool.allocate(token_ids, columns, key)
        if slot is None:
            return None
        slots = SequenceSlots(slot, None, local_selector, policy.proposals)
        if adapter is None or not _reads_by_itself(local_selector, policy):
            return slots
        slots.adapted_slot = pool.allocate(token_ids, columns, adapter.key)
        if slots.adapted_slot is not None:
            return slots
        pool.release(slot)
        if pool.live_slots == 0:  # what is kept for reuse stands in the way of what fits
            pool.clear()
            return self.open(local_selector, policy, token_ids, max_tokens)
        return None

    def _merge(self, adapter: Adapter) -> None:
        """Merge the adapter's weights. One version at a time: sequences of another use the gate."""
        if self._merged is not None and self._merged is not adapter:
            self._merged.merged.clear()
        self._merged = adapter
        merge(adapter, self.runtime.model)

    def close(self, kv: SequenceKV) -> None:
        """Release a sequence's slots."""
        slots = _slots(kv)
        self.runtime.pool.release(slots.slot)
        if slots.adapted_slot is not None:
            self.runtime.pool.release(slots.adapted_slot)

    # -- the step ---------------------------------------------------------------------------------

    def run(self, inputs: Sequence[ModelInput]) -> list[ModelOutput]:
        """One forward.

        Inputs of one or a few tokens are all in it. Longer reading shares the prefill chunk in the
        order given, and its output is None until it is done.
        """
        segments, complete = self._segments(inputs)
        outputs: list[ModelOutput] = [None] * len(inputs)
        if not segments:
            return outputs
        hidden, places = self.runtime.forward(list(segments.values()))
        where = dict(zip(segments, places, strict=True))
        proposing: dict[int, NextTokenInput] = {}
        selecting: dict[int, SelectionInput] = {}
        for i in segments:
            item = inputs[i]
            if not complete[i]:
                continue
            if isinstance(item, NextTokenInput):
                proposing[i] = item
            else:
                selecting[i] = item
        if proposing:
            last = hidden[[where[i].stop - 1 for i in proposing]]
            proposals = self._proposals(last, list(proposing.values()))
            for i, proposal in zip(proposing, proposals, strict=True):
                outputs[i] = proposal
        scores = self._local_scores(selecting, {i: hidden[where[i]] for i in selecting})
        for i, found in scores.items():
            outputs[i] = found
        return outputs

    def _segments(self, inputs: Sequence[ModelInput]) -> tuple[dict[int, Segment], dict[int, bool]]:
        """Each input's tokens of this forward, and whether they complete it."""
        segments: dict[int, Segment] = {}
        complete: dict[int, bool] = {}
        unread = {
            i: len(item.token_ids) - len(_reading_slot(item).token_ids)
            for i, item in enumerate(inputs)
        }
        for i, tokens in unread.items():
            if tokens <= MIN_PREFIX_MATCH:
                segments[i], complete[i] = self._segment(inputs[i], MIN_PREFIX_MATCH + 1)
        # Half of the chunk is the oldest reader's; the rest goes to those with the least to read.
        long = [i for i, tokens in unread.items() if tokens > MIN_PREFIX_MATCH]
        budget = self._prefill_chunk_tokens
        reading: list[ModelInput] = []
        for i in [*long[:1], *sorted(long[1:], key=unread.__getitem__)]:
            if budget <= 0:
                break
            item = inputs[i]
            self.runtime.pool.extend_from_cache(_reading_slot(item), item.token_ids)
            if _another_reads_it(item, reading):
                continue
            limit = budget if reading or len(long) == 1 else max(1, budget // 2)
            segments[i], complete[i] = self._segment(item, limit)
            budget -= len(segments[i].token_ids)
            reading.append(item)
        return segments, complete

    def _segment(self, item: ModelInput, limit: int) -> tuple[Segment, bool]:
        """At most `limit` unread tokens of an input, and whether they are all of them."""
        slots = _slots(item.kv)
        slot = _reading_slot(item)
        if isinstance(item, SelectionInput):
            return scoring_segment(
                slots.local_selector or self._untrained,
                slot,
                item.token_ids,
                item.candidate_ids,
                own_reading=slot is slots.adapted_slot,
                limit=limit,
            )
        start = len(slot.token_ids)
        assert start < len(item.token_ids), "nothing to read"
        end = min(len(item.token_ids), start + limit)
        segment = Segment(
            slot=slot,
            token_ids=item.token_ids[start:end],
            start=start,
            adapter=slots.proposing_adapter,
        )
        return segment, end == len(item.token_ids)

    def read_prompt(self, token_ids: Sequence[int], count: int) -> PromptScores:
        """As `SLMProposer`'s: by the base model, whatever adapters there are."""
        return read_prompt(
            self.runtime, self._excluded, token_ids, count, self._prefill_chunk_tokens
        )

    # -- reductions -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _proposals(self, hidden: Tensor, inputs: Sequence[NextTokenInput]) -> list[Proposal]:
        """[m, hidden] -> proposals."""
        logits = self.runtime.logits(hidden)
        logits[:, self._excluded] = -torch.inf
        return read_proposals(logits, inputs, self._support_size)

    @torch.no_grad()
    def _local_scores(
        self, inputs: dict[int, SelectionInput], hidden: dict[int, Tensor]
    ) -> dict[int, LocalScores]:
        """The scores of each input's candidates; inputs of one selector and count together."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, item in inputs.items():
            selector = _slots(item.kv).local_selector
            groups[id(selector), len(item.candidate_ids)].append(i)
        scores: dict[int, LocalScores] = {}
        for (_, count), members in groups.items():
            group = [inputs[i] for i in members]
            selector = _slots(group[0].kv).local_selector or self._untrained
            parts = [split_hidden(selector, hidden[i], count) for i in members]
            last = _stack([last for last, _ in parts])
            siblings = _stack([siblings for _, siblings in parts])
            candidates = Candidates.pad(
                [item.candidate_ids for item in group], [item.base_log_probs for item in group]
            )
            found = combine(self.runtime, selector, last, siblings, candidates).tolist()
            for i, row in zip(members, found, strict=True):
                scores[i] = tuple(row)
        return scores


# -- inputs ---------------------------------------------------------------------------------------


def _slots(kv: SequenceKV) -> SequenceSlots:
    assert isinstance(kv, SequenceSlots), "a place of another proposer"
    return kv


def _reading_slot(item: ModelInput) -> Slot:
    """The slot that an input's tokens are read into."""
    slots = _slots(item.kv)
    if isinstance(item, SelectionInput) and slots.adapted_slot is not None:
        return slots.adapted_slot
    return slots.slot


def _reads_by_itself(local_selector: LocalSelector | None, policy: Policy) -> bool:
    """Whether the local selector needs KV of its own."""
    if local_selector is None or not policy.can_trigger:
        return False
    return local_selector.reads is Reading.ADAPTED and policy.proposals is Proposals.BASE


def _another_reads_it(item: ModelInput, reading: Sequence[ModelInput]) -> bool:
    """Whether another input of this forward reads more of the same prefix: copied in the next
    step."""
    slot = _reading_slot(item)
    return any(
        shares_longer_prefix(item.token_ids, slot, _reading_slot(other), other.token_ids)
        for other in reading
    )


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of all parts; None where the kind does not read them."""
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
