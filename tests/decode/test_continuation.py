"""An engine that goes on with what another one has decided: the same answer, whatever the mode.

The proposer that began an answer may die at any token; the Steps that it had handed out are all
that is left of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.llm_selector import InProcessSelector
from s2t_shared.decode.scripted import ScriptedSelector, ScriptedSLM
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import (
    DecodeOptions,
    DecodeRequest,
    Mode,
    Policy,
    Progress,
    Step,
    Trigger,
)
from tests.decode.test_engine_laws import mixed_requests
from tests.helpers.engine import (
    Models,
    all_local_selectors,
    assert_same,
    lookup_in,
    make_llm,
    make_proposer,
    run,
)

REQUESTS = [item for item in mixed_requests() if not item.options.score_rollout]


def new_engine(models: Models) -> Engine:
    """Of a replica that has seen nothing yet."""
    proposer = make_proposer(models)
    selectors = lookup_in(all_local_selectors(proposer))
    return Engine(proposer, InProcessSelector(make_llm(models)), selectors)


def run_alone(engine: Engine, request: DecodeRequest) -> LiveSequence:
    sequence = engine.add(request)
    while not engine.idle:
        engine.step()
    return sequence


def behind(sequence: LiveSequence, count: int) -> DecodeRequest:
    """The request for what follows the first `count` Steps, as they come over the wire."""
    steps = sequence.steps[:count]
    progress = Progress(
        slm="slm",
        version="",
        threshold=0.0,
        token_ids=tuple(step.token_id for step in steps),
        steps=tuple(s for s in steps if s.triggered or s.degraded or s.llm_digest),
    )
    return replace(sequence.request, decided=progress.decided)


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=lambda i: REQUESTS[i].request_id)
def test_the_rest_is_the_undisturbed_answers(models: Models, number: int) -> None:
    """Tokens, Steps and how it ends, behind every token. Draws, warm-up and random triggers go by
    the place in the answer, not by what this engine has decided."""
    [whole] = run(new_engine(models), REQUESTS[number])
    assert len(whole.steps) > 5
    later = new_engine(models)
    rests = run(later, *(behind(whole, count) for count in range(1, len(whole.steps))))
    for rest in rests:
        count = len(rest.request.decided)
        assert rest.output_ids == whole.output_ids, count
        assert_same(rest.steps[count:], whole.steps[count:])
        assert rest.finish_reason is whole.finish_reason
        assert rest.decoded == len(whole.steps) - count
        alike = replace(rest.usage, llm_forwards=whole.usage.llm_forwards)
        assert alike == whole.usage
    assert later.idle and later.load.kv_slots == 0


def test_only_what_is_new_is_handed_out() -> None:
    slm = ScriptedSLM(["a", "b", "c", "d"])
    decided = (Step(index=0, token_id=slm.tokenizer.id_of("a")),)
    engine = Engine(slm)
    request = DecodeRequest(request_id="r", token_ids=(9, 9), decided=decided, llm_forwards=3)
    sequence = engine.add(request)
    new: list[Step] = []
    while not engine.idle:
        for _, steps in engine.step():
            new += steps
    assert [step.index for step in new] == [1, 2, 3, 4]
    assert sequence.usage.llm_forwards == 3 and sequence.usage.completion_tokens == 5


def test_the_length_counts_what_is_decided() -> None:
    slm = ScriptedSLM(["a", "b", "c", "d"])
    decided = tuple(Step(index=i, token_id=slm.tokenizer.id_of(w)) for i, w in enumerate("ab"))
    options = DecodeOptions(max_new_tokens=3)
    request = DecodeRequest(request_id="r", token_ids=(9,), decided=decided, options=options)
    sequence = run_alone(Engine(slm), request)
    assert slm.tokenizer.decode(sequence.output_ids) == " a b c"
    full = replace(request, options=DecodeOptions(max_new_tokens=2))
    with pytest.raises(InvalidRequestError, match="2 tokens are decided already"):
        Engine(slm).add(full)


def test_a_step_that_degraded_stays_as_it_was_shown() -> None:
    """The LLM that comes back is asked behind it, not again about it."""
    slm = ScriptedSLM(["a"] * 9, unsure_at=(4, 6), alternatives=["z"])
    policy = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.3)
    request = DecodeRequest(
        request_id="r", token_ids=(9,), options=DecodeOptions(policy=policy, max_new_tokens=9)
    )
    greedy = run_alone(Engine(slm, ScriptedSelector(available=False)), request)
    selector = ScriptedSelector(prefers=slm.tokenizer.id_of("z"))
    rest = run_alone(Engine(slm, selector), behind(greedy, 5))
    assert slm.tokenizer.decode(rest.output_ids) == " a a a a a a z a a"
    assert [bool(step.degraded) for step in rest.steps] == [False] * 4 + [True] + [False] * 4
    assert len(selector.queries) == 1 and rest.usage.degraded_steps == 1
