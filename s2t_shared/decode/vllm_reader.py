"""What a proposer reads of vLLM's logits, and how it makes vLLM choose what the method chooses.

`logits_reader` makes a logits processor, vLLM's public way into a decode step. In each row of ours
it masks the reserved ids, reduces the logits as the torch proposer does, and leaves one choice: the
proposed id, the drawn one, or the pause id, which ends the request there because a selector is to
choose. One class speaks to both generations of vLLM's model runner.

vLLM takes a class, not an object, and gives a request a number only; so the class knows its `runs`
by number. Both live in the process of the proposer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2t_shared.decode.interfaces import (
    ModelInput,
    ModelOutput,
    NextTokenInput,
    Proposal,
    SelectionInput,
)
from s2t_shared.decode.reductions import read_proposals

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

RUN = "s2t_run"  # of a request's `extra_args`: the run's number
CHOSEN = torch.finfo(torch.float32).max


@dataclass(eq=False)
class Run:
    """A vLLM request that generates what a sequence will want, token by token.

    item: what the sequence wants of the token that is being generated. output: of the last forward.
    length, last_id: the context whose next token is being generated. is_new: vLLM has the token.
    """

    number: int
    item: ModelInput
    length: int
    last_id: int
    output: ModelOutput = None
    is_new: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """excluded_ids: never generated. support_size: of a proposal. pause_id: ends a request."""

    excluded_ids: tuple[int, ...]
    support_size: int
    pause_id: int


class LogitsReader:
    """Reads the logits of runs and decides what vLLM takes for chosen."""

    def __init__(self, runs: Mapping[int, Run], vocabulary: Vocabulary) -> None:
        self._runs = runs
        self._vocabulary = vocabulary
        self._excluded: Tensor | None = None

    @torch.inference_mode()
    def read(self, logits: Tensor, numbers: Sequence[int | None]) -> None:
        """Reduce [n, V] float32 logits into the runs' outputs, and leave one choice in their rows.

        numbers: each row's run, None for a row of nobody.
        """
        runs = {}
        for row, number in enumerate(numbers):
            if number is not None and number in self._runs:
                runs[row] = self._runs[number]
        if not runs:
            return
        self._mask_excluded(logits)
        proposing: dict[int, NextTokenInput] = {}
        for row, run in runs.items():
            if isinstance(run.item, NextTokenInput):
                proposing[row] = run.item
            else:
                run.output = _local_scores(logits[row], run.item)
        chosen = dict.fromkeys(runs, self._vocabulary.pause_id)
        for row, proposal in self._proposals(logits, proposing).items():
            runs[row].output = proposal
            if not proposing[row].pauses(proposal):
                drawn_id = proposal.drawn_id
                chosen[row] = proposal.top_id if drawn_id is None else drawn_id
        logits[list(chosen), list(chosen.values())] = CHOSEN

    def _mask_excluded(self, logits: Tensor) -> None:
        """Foreign rows are only those of vLLM's own trials."""
        if self._excluded is None:
            self._excluded = torch.tensor(self._vocabulary.excluded_ids, device=logits.device)
        if len(self._excluded):
            logits.index_fill_(1, self._excluded, -torch.inf)

    def _proposals(
        self, logits: Tensor, inputs: Mapping[int, NextTokenInput]
    ) -> dict[int, Proposal]:
        """By row."""
        if not inputs:
            return {}
        own = logits if len(inputs) == len(logits) else logits[list(inputs)]
        proposals = read_proposals(own, list(inputs.values()), self._vocabulary.support_size)
        return dict(zip(inputs, proposals, strict=True))


def _local_scores(logits: Tensor, item: SelectionInput) -> tuple[float, ...]:
    """Log-probabilities of the candidates, renormalised on them (kind `prefix`)."""
    ids = torch.tensor(item.candidate_ids, device=logits.device)
    return tuple(logits[ids].log_softmax(-1).tolist())


def logits_reader(runs: Mapping[int, Run], vocabulary: Vocabulary) -> type:
    """The class for vLLM's `logits_processors`."""
    from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface

    class Reader(FirstInterface, SecondInterface):
        """Rows are those of the batch. Their runs by row (V1 runner), or by slot (V2 runner)."""

        def __init__(self, vllm_config: Any, *of_the_runner: Any) -> None:
            self._reader = LogitsReader(runs, vocabulary)
            self._numbers: dict[int, int] = {}

        def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
            places = range(len(logits)) if ctx is None else ctx.idx_mapping_np.tolist()
            self._reader.read(logits, [self._numbers.get(place) for place in places])
            return logits

        # -- the V1 runner --

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            if batch_update is not None:
                self._numbers = updated_rows(self._numbers, batch_update)

        # -- the V2 runner --

        def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
            number = run_number(sampling_params)
            if number is None:
                self._numbers.pop(req_idx, None)
                return False
            self._numbers[req_idx] = number
            return True

    return Reader


def run_number(params: SamplingParams) -> int | None:
    """The run of a request, None for a foreign one."""
    return (params.extra_args or {}).get(RUN)


def updated_rows(numbers: dict[int, int], update: BatchUpdate) -> dict[int, int]:
    """The runs by row after a change of the batch: requests leave, then join, then move."""
    for row in update.removed:
        numbers.pop(row, None)
    for row, params, _, _ in update.added:
        numbers.pop(row, None)
        if (number := run_number(params)) is not None:
            numbers[row] = number
    for here, there, direction in update.moved:
        moving, displaced = numbers.pop(here, None), numbers.pop(there, None)
        if moving is not None:
            numbers[there] = moving
        if direction.name == "SWAP" and displaced is not None:
            numbers[here] = displaced
    return numbers
