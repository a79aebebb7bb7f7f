"""The LLM selector against plain transformers: scores, batches, reused KV, refusals (law 2)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import (
    ScoreQuery,
)
from tests.helpers.engine import (
    Models,
    assert_same,
    make_llm,
)
from tests.helpers.queries import LONG, count_read_tokens, query

# -- law 2: the LLM's scorer ----------------------------------------------------------------------


@pytest.mark.parametrize("llm", ["llm", "gemma2"])
def test_scores_are_the_plain_models(models: Models, llm: str) -> None:
    """Excluded ids and rows past vocab_size get probability zero *before* normalising, at every
    position asked."""
    model = AutoModelForCausalLM.from_pretrained(
        models[llm], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([LONG])).logits[0].double()
    logits[:, [7, 9]] = -torch.inf
    logits[:, 45:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    asked = query(LONG, range(0, 40, 3), excluded_ids=(7, 9, 900), vocab_size=45)
    (reply,) = make_llm(models, llm).score([asked])
    assert reply.llm_digest and len(reply.positions) == 14
    for position, group, scores in zip(
        asked.positions, asked.candidate_ids, reply.positions, strict=True
    ):
        expected = [max(float(log_probs[position, i]), -1e4) for i in group]
        assert scores.log_probs == pytest.approx(expected, abs=1e-4)
        assert scores.top_id == int(log_probs[position].argmax()) and scores.top_id not in (7, 9)


def test_ids_the_llm_cannot_say_are_impossible_and_finite(models: Models) -> None:
    """An SLM row the LLM lacks, an excluded id, an id past vocab_size: -1e4, not -inf (JSON) and
    not a crash."""
    asked = ScoreQuery(
        token_ids=(5, 6),
        positions=(1,),
        candidate_ids=((7, 44, 46, 1000),),
        excluded_ids=(7,),
        vocab_size=45,
    )
    (reply,) = make_llm(models).score([asked])
    scores = reply.positions[0].log_probs
    assert (scores[0], scores[2], scores[3]) == (-1e4, -1e4, -1e4) and scores[1] > -50


def test_all_positions_at_once_equal_one_position_each(models: Models) -> None:
    """Harvesting by prefill is lockstep asking: 40 positions in one query, 40 queries of one, no
    candidates."""
    scorer = make_llm(models)
    (all_at_once,) = scorer.score([query(LONG, range(40))])
    for position in range(40):
        single = query(LONG[: position + 1], [position])
        assert_same(all_at_once.positions[position], scorer.score([single])[0].positions[0])
    (no_candidates,) = scorer.score(
        [ScoreQuery(token_ids=LONG, positions=(39,), candidate_ids=((),))]
    )
    assert no_candidates.positions[0].log_probs == ()
    assert no_candidates.positions[0].top_id == all_at_once.positions[39].top_id


def test_reused_kv_changes_no_score(models: Models) -> None:
    """Longest-prefix reuse is speed only: growing, branching, shrinking and repeated contexts
    against a scorer that never saw another; and it does save reading."""
    warm = make_llm(models)
    read = count_read_tokens(warm)
    other = (*LONG[:25], 5, 5, 6, 7)
    story = [
        query(LONG[:20]),
        query(LONG[:30]),
        query(LONG),
        query(LONG),
        query(other),
        query(LONG[:8]),
        query(LONG, [3, 39]),
        query((44, 43)),
        query(other, [28]),
        query(LONG[:26]),
    ]
    for asked in story:
        assert_same(warm.score([asked])[0], make_llm(models).score([asked])[0])
    assert read[:4] == [20, 10, 10, 1]
    assert sum(read) < sum(len(asked.token_ids) for asked in story)


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([LONG, LONG[::-1], (*LONG[:9], *LONG[20:])]), st.integers(1, 29)
            ),
            min_size=1,
            max_size=7,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_batched_ragged_queries_equal_single_ones(
    models: Models, batches: list[list[tuple[tuple[int, ...], int]]]
) -> None:
    """Any batches of any prefixes, on a pool so small that rows are taken from others all the
    time."""
    small = make_llm(models, max_rows=4)
    for batch in batches:
        queries = [query(tokens[:n], [n - 1] if n % 2 else range(n // 2, n)) for tokens, n in batch]
        for asked, reply in zip(queries, small.score(queries), strict=True):
            assert_same(reply, make_llm(models).score([asked])[0])
        small.runtime.pool.check()
        assert small.runtime.pool.live_slots == 0


@pytest.mark.parametrize(
    "bad, word",
    [
        (ScoreQuery(token_ids=(), positions=(0,), candidate_ids=((),)), "token_ids"),
        (ScoreQuery(token_ids=(5,) * 300, positions=(0,), candidate_ids=((),)), "300"),
        (ScoreQuery(token_ids=(5,), positions=(), candidate_ids=()), "positions"),
        (ScoreQuery(token_ids=(5,), positions=(0,), candidate_ids=()), "positions"),
        (ScoreQuery(token_ids=(5,), positions=(1,), candidate_ids=((),)), "positions"),
        (ScoreQuery(token_ids=(5,), positions=(-1,), candidate_ids=((),)), "positions"),
        (ScoreQuery(token_ids=(64,), positions=(0,), candidate_ids=((),)), "token_ids"),
        (ScoreQuery(token_ids=(5,), positions=(0,), candidate_ids=((-1,),)), "candidate_ids"),
    ],
)
def test_wrong_queries_are_refused(models: Models, bad: ScoreQuery, word: str) -> None:
    """A query from the wire that fails inside the forward takes the whole batch with it."""
    with pytest.raises(InvalidRequestError, match=word):
        make_llm(models).check(bad)
