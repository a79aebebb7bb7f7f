"""What is read of logits inside vLLM, without vLLM: on tensors, as both of its model runners hand
them over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from s2t_shared.decode.interfaces import NextTokenInput, Proposal, SamplingInput, SelectionInput
from s2t_shared.decode.vllm_reader import RUN, LogitsReader, Run, Vocabulary, updated_rows
from s2t_shared.types import Sampling, Trigger

EXCLUDED = (2, 3, 9)
PAUSE = 2
V = 40


class Place:
    def truncate(self, length: int) -> None:
        raise AssertionError


def next_token(**wanted: Any) -> NextTokenInput:
    return NextTokenInput(Place(), (5, 6), **wanted)


def read(logits: torch.Tensor, *items: Any) -> tuple[list[Run], list[int]]:
    """Runs, and what vLLM's greedy sampler takes for each row."""
    runs = {n: Run(n, item, 2, 6) for n, item in enumerate(items) if item is not None}
    numbers = [None if item is None else n for n, item in enumerate(items)]
    LogitsReader(runs, Vocabulary(EXCLUDED, 16, PAUSE)).read(logits, numbers)
    return list(runs.values()), logits.argmax(-1).tolist()


def rows(n: int) -> torch.Tensor:
    """Logits whose best id is an excluded one."""
    logits = torch.randn(n, V, generator=torch.Generator().manual_seed(n))
    logits[:, EXCLUDED] = 50.0
    return logits


def masked(logits: torch.Tensor) -> torch.Tensor:
    copy = logits.clone()
    copy[:, EXCLUDED] = -torch.inf
    return copy


def test_excluded_ids_are_neither_taken_nor_counted() -> None:
    """Their mass would move every log-probability, and one of them would be emitted."""
    logits = rows(3)
    expected = masked(logits).log_softmax(-1)
    runs, taken = read(logits, *[next_token(signal=Trigger.ENTROPY)] * 3)
    assert taken == expected.argmax(-1).tolist()
    for run, row in zip(runs, expected, strict=True):
        assert isinstance(run.output, Proposal)
        support = run.output.support
        assert support is not None and len(support.ids) == 16
        assert support.log_probs == pytest.approx(row[list(support.ids)].tolist(), abs=1e-5)
        assert not {*support.ids} & {*EXCLUDED}


def test_a_divergence_point_pauses_its_row_only() -> None:
    logits = rows(2)
    best = masked(logits).argmax(-1).tolist()
    pausing = next_token(signal=Trigger.MARGIN, pauses=lambda proposal: True)
    runs, taken = read(logits, next_token(signal=Trigger.MARGIN), pausing)
    assert taken == [best[0], PAUSE]
    assert isinstance(runs[1].output, Proposal) and runs[1].output.top_id == best[1]


def test_a_drawn_id_is_taken() -> None:
    """Drawn as on torch, by seed and step: vLLM's own sampler has other random numbers."""
    draws = [SamplingInput(Sampling(temperature=1.5, seed=7), step) for step in range(20)]
    items = [next_token(wants_support=False, sampling=draw) for draw in draws]
    logits = torch.zeros(20, V)
    runs, taken = read(logits, *items)
    drawn = [run.output.drawn_id for run in runs if isinstance(run.output, Proposal)]
    assert taken == drawn
    assert len(set(taken)) > 5 and not {*taken} & {*EXCLUDED}


def test_candidates_are_scored_beside_proposals_and_foreign_rows() -> None:
    logits = rows(3)
    expected = masked(logits)
    candidates = (11, 30, 4)
    scoring = SelectionInput(Place(), (5, 6), candidates, (-1.0, -2.0, -3.0))
    runs, taken = read(logits, None, scoring, next_token(wants_support=False))
    scores = expected[1][list(candidates)].log_softmax(-1).tolist()
    assert runs[0].output == pytest.approx(scores, abs=1e-5)
    assert taken[1:] == [PAUSE, expected[2].argmax().item()]
    assert torch.equal(logits[0], expected[0])


def test_a_batch_of_strangers_is_left_alone() -> None:
    """vLLM tries itself out at start, with rows of nobody."""
    logits = rows(2)
    before = logits.clone()
    read(logits, None, None)
    assert torch.equal(logits, before)


@dataclass
class Params:
    extra_args: dict[str, int] | None = None


@dataclass
class Direction:
    name: str


@dataclass
class Update:
    removed: list[int] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)
    moved: list[Any] = field(default_factory=list)


def added(row: int, number: int | None) -> tuple[int, Params, None, list[int]]:
    return row, Params({RUN: number} if number is not None else None), None, []


def test_rows_follow_the_batch() -> None:
    """A run that reads another's row would propose its tokens."""
    numbers = updated_rows({}, Update(added=[added(0, 10), added(1, 11), added(2, 12)]))
    assert numbers == {0: 10, 1: 11, 2: 12}
    swap, one_way = Direction("SWAP"), Direction("UNIDIRECTIONAL")
    assert updated_rows(dict(numbers), Update(moved=[(0, 2, swap)])) == {2: 10, 1: 11, 0: 12}
    gone = updated_rows(dict(numbers), Update(removed=[1], moved=[(2, 1, one_way)]))
    assert gone == {0: 10, 1: 12}
    assert updated_rows(dict(numbers), Update(added=[added(1, None)])) == {0: 10, 2: 12}
    assert updated_rows({0: 10}, Update(moved=[(1, 0, swap)])) == {1: 10}
