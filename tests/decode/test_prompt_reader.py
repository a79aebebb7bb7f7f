"""A prompt's own log-probabilities against plain transformers, and the room they take."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.decode.prompt_reader import read_prompt
from s2t_shared.decode.proposer import Proposer
from tests.helpers.engine import Models, make_proposer
from tests.helpers.queries import LONG


@pytest.mark.parametrize("name", ["slm", "gemma2"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_scores_are_the_plain_models(models: Models, name: str, chunk: int) -> None:
    """Also of a prompt that the pool has read before: nothing of it may be left out."""
    proposer = make_proposer(models, name)
    model = AutoModelForCausalLM.from_pretrained(
        models[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([LONG])).logits[0].double()
    logits[:, list(proposer.excluded_ids)] = -torch.inf
    log_probs = logits.log_softmax(-1)
    excluded = torch.tensor(proposer.excluded_ids, dtype=torch.long)
    for _ in range(2):
        lists = list(read_prompt(proposer.runtime, excluded, LONG, 3, chunk))
        assert len(lists) == -(-(len(LONG) - 1) // chunk)
        scores = [score for found in lists for score in found]
        assert len(scores) == len(LONG) - 1
        for position, score in enumerate(scores):
            expected = max(float(log_probs[position, LONG[position + 1]]), -1e30)
            assert max(score.log_prob, -1e30) == pytest.approx(expected, abs=1e-4)
            values, ids = log_probs[position].topk(3)
            assert score.support.ids == tuple(ids.tolist())
            assert score.support.log_probs == pytest.approx(values.tolist(), abs=1e-4)
    assert proposer.kv_slots_in_use == 0


def test_it_waits_for_room_and_gives_it_back(models: Models) -> None:
    proposer = make_proposer(models, max_rows=1)
    holder = proposer.runtime.pool.allocate((), len(LONG))
    assert holder is not None
    reading = proposer.read_prompt(LONG, 1)
    assert next(reading) == [] and next(reading) == []
    proposer.runtime.pool.release(holder)
    assert next(reading) and proposer.kv_slots_in_use == 1
    reading.close()
    assert proposer.kv_slots_in_use == 0


def test_nothing_is_said_of_one_token(models: Models) -> None:
    assert list(make_proposer(models).read_prompt(LONG[:1], 1)) == []


def test_a_closed_reading_that_never_began_holds_nothing(models: Models) -> None:
    proposer: Proposer = make_proposer(models)
    proposer.read_prompt(LONG, 1).close()
    assert proposer.kv_slots_in_use == 0
