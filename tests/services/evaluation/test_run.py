"""What an evaluation asks, keeps, resumes and counts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import ConfigError, InvalidRequestError, OverloadedError
from s2t_shared.types import (
    Answer,
    ChosenBy,
    FinishReason,
    GenerateRequest,
    Mode,
    Prompt,
    Step,
    Support,
    Trigger,
    Usage,
    Versions,
)
from services.cli.progress import Progress, progress
from services.evaluation.answering import OnOutcome, PairAnswerer, ServiceAnswerer
from services.evaluation.figures import (
    Row,
    local_choices,
    mcnemar,
    order_agreement,
    positions,
    row_of,
    sufficiency,
)
from services.evaluation.grid import Task
from services.evaluation.journal import Journal, ScoredChoices, ScoredRollout
from services.evaluation.modes import ModeSpec, rows
from services.evaluation.problems import Problem, Reading, problems_of
from services.evaluation.records import Record, record_of, token_pieces
from services.evaluation.run import (
    EvaluationSettings,
    run_all,
    run_row,
    score_choices,
    score_rollouts,
)
from services.rpc.ask_many import Outcome, Target
from tests.helpers.serving import LLM_TEXT, SLM_TEXT, proposer_service, with_gateway

PROMPT = Prompt(text="x")
SETTINGS = EvaluationSettings(max_new_tokens=40)
GREEDY = ModeSpec(name="greedy")
S2T = ModeSpec(name="s2t", trigger="entropy", budget=0.05)


def answer(text: str = "yes", *steps: Step, reason: FinishReason = FinishReason.STOP) -> Answer:
    usage = Usage(completion_tokens=10, triggers=len(steps), llm_forwards=len(steps))
    return Answer(
        token_ids=(1,) * 10,
        text=text,
        finish_reason=reason,
        usage=usage,
        versions=Versions(),
        steps=steps,
    )


@dataclass
class Scripted:
    """Gives each problem's answer by its prompt; remembers what it was asked."""

    answers: dict[str, Outcome]
    asked: list[GenerateRequest] = field(default_factory=list)
    tokenizer: None = None

    def identity(self) -> dict[str, str]:
        return {"slm": "s", "llm": "l", "local_selector": ""}

    def prepare(self, request: GenerateRequest) -> None:
        pass

    def answer(self, requests: Sequence[GenerateRequest], on_outcome: OnOutcome) -> None:
        self.asked += requests
        for request in requests:
            on_outcome(request, self.answers[request.prompt.text or ""])


def is_yes(text: str) -> bool:
    return text == "yes"


PROBLEMS = [Problem("a", Prompt(text="a"), is_yes), Problem("b", Prompt(text="b"), is_yes)]


# -- what is asked --------------------------------------------------------------------------------


def test_a_mode_asks_what_it_says() -> None:
    spec = ModeSpec(name="takeover", trigger="kl", budget=0.05, candidates=4, version="v1")
    request = spec.request(PROMPT, request_id="r", max_new_tokens=9, seed=3, stop=["\n"])
    options = request.options
    assert options.policy.mode is Mode.TAKEOVER and options.policy.trigger is Trigger.KL
    assert options.policy.candidates.k == 4 and request.budget == 0.05
    assert options.max_new_tokens == 9 and options.sampling.seed == 3 and request.stop == ("\n",)
    assert options.version == "v1" and options.fresh_selections
    majority = ModeSpec(name="majority@4").request(PROMPT, request_id="r", max_new_tokens=9)
    assert majority.samples == 4
    assert spec.label == "takeover kl 5% K=4" and GREEDY.label == "greedy"


def test_rows_are_the_product_where_the_mode_has_it() -> None:
    found = rows(["greedy", "pass@2", "s2t"], ["entropy", "kl"], [0.01, 0.025], [8])
    labels = [spec.label for spec in found]
    assert labels == [
        "greedy",
        "pass@2",
        "s2t entropy 1%",
        "s2t entropy 2.5%",
        "s2t kl 1%",
        "s2t kl 2.5%",
    ]
    assert found[1].mode is Mode.SAMPLE and found[1].samples == 2
    several = rows(["takeover", "s2t", "s2t_local"], ["kl"], [0.01], [4, 8], ["v1", "v2"])
    assert [spec.label for spec in several] == [
        "takeover kl 1%",  # whose tokens do not depend on K
        "s2t kl 1% K=4",
        "s2t kl 1%",
        "s2t_local kl 1% K=4 v1",
        "s2t_local kl 1% v1",
        "s2t_local kl 1% K=4 v2",
        "s2t_local kl 1% v2",
    ]


@pytest.mark.parametrize(
    ("modes", "trigger", "says"),
    [
        (["pass@0"], "entropy", "pass@n"),
        (["pass@x"], "entropy", "pass@n"),
        (["fast"], "entropy", "unknown"),
        (["s2t"], "gut", "--trigger"),
        (["greedy", "greedy"], "entropy", "twice"),
    ],
)
def test_a_row_that_cannot_be_is_refused(modes: list[str], trigger: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        rows(modes, [trigger], [0.01], [8])


def test_pass_at_n_asks_n_different_samples() -> None:
    """With one seed all samples would be the same answer."""
    answerer = Scripted({"a": answer(), "b": answer("no")})
    spec, journal = ModeSpec(name="pass@3"), Journal()
    run_row(answerer, spec, PROBLEMS, SETTINGS, journal)
    seeds = [request.options.sampling.seed for request in answerer.asked]
    assert len(seeds) == len(set(seeds)) == 6
    assert row_of(spec, PROBLEMS, journal).correct == (True, False)


# -- what is kept ---------------------------------------------------------------------------------


def test_a_truncated_answer_is_never_right() -> None:
    """Its text may contain the right answer before it went on for ever."""
    cut = answer("yes", reason=FinishReason.LENGTH)
    journal = Journal()
    run_row(Scripted({"a": cut, "b": answer()}), GREEDY, PROBLEMS, SETTINGS, journal)
    row = row_of(GREEDY, PROBLEMS, journal)
    assert row.correct == (False, True) and row.truncated == 1


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """Failed answers are asked again, finished ones are not, half a line is thrown away."""
    file = tmp_path / "answers.jsonl"
    identity = {"slm": "s"}
    first = Scripted({"a": answer(), "b": OverloadedError("full")})
    run_row(first, GREEDY, PROBLEMS, SETTINGS, Journal.open(file, identity))
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"answer": {"row": "gre')
    again = Scripted({"a": answer(), "b": answer()})
    journal = Journal.open(file, identity)
    run_row(again, GREEDY, PROBLEMS, SETTINGS, journal)
    assert [request.prompt.text for request in again.asked] == ["b"]
    third = Scripted({})
    journal = Journal.open(file, identity)
    run_row(third, GREEDY, PROBLEMS, SETTINGS, journal)
    assert third.asked == [] and row_of(GREEDY, PROBLEMS, journal).correct == (True, True)


def test_another_evaluation_in_the_folder_is_refused(tmp_path: Path) -> None:
    """Answers of another model would be counted as this one's."""
    file = tmp_path / "answers.jsonl"
    Journal.open(file, {"slm": "s", "seed": 0})
    with pytest.raises(ConfigError, match="another seed.*choose another --out"):
        Journal.open(file, {"slm": "s", "seed": 1})
    file.write_text("[]\n", encoding="utf-8")
    with pytest.raises(ConfigError):
        Journal.open(file, {})


def test_records_survive_the_file() -> None:
    step = Step(
        index=4,
        token_id=7,
        chosen_by=ChosenBy.LLM,
        triggered=True,
        signal=1.5,
        candidate_ids=(5, 7),
        scores=(-3.0, -0.1),
        slm_top_id=5,
        support=Support((5, 7, 9), (-0.4, -1.2, -5.0)),
    )
    record = record_of(S2T, "a", 0, answer("yes", step), True, None)
    again = Record.from_row(json.loads(json.dumps(record.to_row())))
    assert again == record
    (decision,) = again.decisions
    assert decision.flipped and decision.chosen == 1 and decision.slm_first == 0
    first, second = decision.candidates
    assert first.slm is not None and second.slm is not None and second.llm is not None
    assert first.slm + second.slm == pytest.approx(1.0, abs=1e-3) and second.llm > 0.9
    assert record.llm_read == 4  # the answer's tokens before the selection


# -- figures --------------------------------------------------------------------------------------


def row(correct: Sequence[bool], name: str = "greedy", **usage: int) -> Row:
    records = []
    for place, is_right in enumerate(correct):
        record = Record(
            row=name,
            problem_id=str(place),
            correct=is_right,
            usage=Usage(completion_tokens=10, **usage),
        )
        records.append((record,))
    clusters = tuple(str(place) for place in range(len(correct)))
    return Row(spec=ModeSpec(name=name), records=tuple(records), clusters=clusters, seconds=1.0)


def test_rescues_and_harms() -> None:
    base, other = row([True, True, False, False]), row([True, False, True, True])
    assert other.rescues_and_harms(base) == (2, 1)
    assert other.gain_over(base)[0] == 0.25


def test_problems_of_one_group_count_once() -> None:
    """Ten copies of one lucky problem are no evidence."""
    base, other = row([False] * 10 + [True] * 10), row([True] * 20)
    spread = replace(other, clusters=base.clusters).gain_over(base)[1]
    grouped = ("one",) * 10 + tuple("abcdefghij")
    assert replace(other, clusters=grouped).gain_over(base)[1] > 1.5 * spread


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(3000, 0) < 1e-300 or mcnemar(3000, 0) == 0.0


def test_times_of_a_row_that_was_cut_off_are_not_shown() -> None:
    journal = Journal()
    run_row(Scripted({"a": answer(), "b": answer()}), GREEDY, PROBLEMS, SETTINGS, journal)
    assert row_of(GREEDY, PROBLEMS, journal).seconds is not None
    journal.timed["greedy"] = 1
    assert row_of(GREEDY, PROBLEMS, journal).seconds is None


def test_where_triggers_fall_and_whether_orders_agree() -> None:
    steps = [
        Step(
            index=index,
            token_id=5,
            chosen_by=ChosenBy.LLM,
            triggered=True,
            candidate_ids=(5, 7, 9),
            scores=scores,
            slm_top_id=5,
            support=Support((5, 7, 9), (-0.4, -1.2, -5.0)),
        )
        for index, scores in ((0, (-1.0, -2.0, -3.0)), (9, (-3.0, -2.0, -1.0)))
    ]
    journal = Journal()
    answers: dict[str, Outcome] = {"a": answer("yes", steps[0]), "b": answer("yes", steps[1])}
    run_row(Scripted(answers), S2T, PROBLEMS, SETTINGS, journal)
    found = row_of(S2T, PROBLEMS, journal)
    assert positions(found) == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert order_agreement(found) == pytest.approx(0.0)


def test_local_sufficiency_leaves_the_warm_up_out() -> None:
    """Of 20 steps the 3 first do not count, though their KL is the largest."""
    kl = (100.0,) * 3 + tuple(float(-i) for i in range(17))
    ranks = (-1,) * 3 + tuple(range(17))
    found = sufficiency([ScoredRollout("p", kl, kl, ranks)])
    assert found.steps == 20
    assert found.by_kl[0.1] == {1: 0.5, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}
    assert found.all_steps[16] == pytest.approx(16 / 17)


def test_local_sufficiency_by_depth() -> None:
    """The only divergent step is in the last quarter; an empty quarter has no rate."""
    kl = (0.0,) * 39 + (1.0,)
    found = sufficiency([ScoredRollout("p", kl, kl, (0,) * 39 + (5,))])
    assert [steps for steps, _ in found.by_depth] == [1, 0, 0, 1]
    assert found.by_depth[3][1] == {1: 0.0, 2: 0.0, 4: 0.0, 8: 1.0, 16: 1.0}
    assert found.by_depth[1][1] == {}


def test_hit_and_selection_failures_are_told_apart() -> None:
    """What no candidate is, no selector can choose; the rest is the local selector's fault."""
    one = ScoredChoices("r", "a", rank=(-1, 0, 2, 3), chosen=(0, 0, 2, 1), order=(0.5, 1.0))
    found = local_choices([one, ScoredChoices("r", "b", (), ())])
    assert (found.steps, found.hit_failures, found.selection_failures) == (4, 1, 1)
    assert (found.agreed, found.slm_agreed, found.order) == (2, 1, 0.75)


def test_scored_rollouts_store_no_label() -> None:
    steps = tuple(
        Step(index=i, token_id=1, kl=0.1 * i, entropy=0.2, llm_top_rank=i) for i in range(5)
    )
    scored = replace(answer(), steps=(*steps, Step(index=5, token_id=1)))
    answerer = Scripted({"a": scored, "b": OverloadedError("full")})
    journal = Journal()
    score_rollouts(answerer, PROBLEMS, SETTINGS, journal)
    assert journal.rollouts["a"].rank == (0, 1, 2, 3, 4) and "b" not in journal.rollouts
    options = answerer.asked[0].options
    assert options.score_rollout and not answerer.asked[0].labels.store


# -- through a service, and in this process -------------------------------------------------------


def test_figures_of_a_service(tmp_path: Path) -> None:
    problems = [
        Problem("right", PROMPT, lambda text: text == LLM_TEXT),
        Problem("wrong", PROMPT, lambda text: text == SLM_TEXT),
    ]

    def work(address: str) -> list[Row]:
        journal, answerer = Journal(), ServiceAnswerer(Target(address))
        for spec in (GREEDY, S2T):
            run_row(answerer, spec, problems, SETTINGS, journal)
        return [row_of(spec, problems, journal) for spec in (GREEDY, S2T)]

    greedy, s2t = with_gateway(tmp_path, proposer_service(), work)
    assert greedy.correct == (False, True) and s2t.correct == (True, False)
    assert greedy.usage.triggers == 0 and s2t.usage.triggers == s2t.usage.flips == 4
    assert s2t.failed == s2t.usage.degraded_steps == 0
    assert s2t.trigger_rate == 4 / s2t.usage.completion_tokens
    assert 0 < s2t.llm_read_per_token < 1 and greedy.llm_read_per_token == 0


def test_a_mode_that_always_fails_raises_its_error(tmp_path: Path) -> None:
    spec = ModeSpec(name="s2t", trigger="entropy", budget=7.0)

    def work(address: str) -> None:
        with pytest.raises(InvalidRequestError, match="budget"):
            run_row(
                ServiceAnswerer(Target(address)),
                spec,
                [Problem("p", PROMPT, bool)],
                SETTINGS,
                Journal(),
            )

    with_gateway(tmp_path, proposer_service(), work)


def test_a_pair_in_this_process_keeps_both_models_views() -> None:
    from s2t_shared.pair import Pair

    pair = Pair.open("bundled", "bundled", threads=1)
    problems = problems_of("bundled", 4)
    journal, answerer = Journal(), PairAnswerer(pair)
    run_row(answerer, S2T, problems, SETTINGS, journal)
    score_rollouts(answerer, problems[:1], SETTINGS, journal)
    found = row_of(S2T, problems, journal)
    assert found.decisions() and sum(found.correct) >= 3
    for decision in found.decisions():
        assert all(c.slm is not None and c.llm is not None for c in decision.candidates)
    record = found.records[0][0]
    pieces = token_pieces(pair.tokenizer, record.token_ids)
    assert "".join(pieces).strip() == record.text.strip()
    assert answerer.identity()["llm"] and len(journal.rollouts) == 1
    # The next row reads its prompts itself, as this one did.
    assert isinstance(pair.engine.proposer, Proposer)
    pool = pair.engine.proposer.runtime.pool
    assert list(pool.slots())
    answerer.prepare(S2T.request(PROMPT, request_id="next", max_new_tokens=40))
    assert not list(pool.slots())


def test_a_local_selectors_choices_are_scored_and_kept(tmp_path: Path) -> None:
    """The LLM sees the answer that the local selector steered, not the SLM's own."""
    from s2t_shared.pair import Pair

    pair = Pair.open("bundled", "bundled", threads=1)
    spec = ModeSpec(name="s2t_local", trigger="entropy", budget=0.1)
    problems = problems_of("bundled", 3)
    file = tmp_path / "answers.jsonl"
    journal, answerer = Journal.open(file, {}), PairAnswerer(pair)
    score_choices(answerer, spec, problems, SETTINGS, journal)
    found = local_choices(list(journal.choices.values()))
    assert len(journal.choices) == 3 and found.steps > 0
    assert found.agreed + found.hit_failures + found.selection_failures == found.steps
    assert found.order is not None and -1 <= found.order <= 1
    assert Journal.open(file, {}).choices == journal.choices


# -- problems -------------------------------------------------------------------------------------


def test_a_problem_without_an_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "a", "prompt": "x", "answer": "4"}\n', encoding="utf-8")
    (problem,) = problems_of(file, 10, Reading(pattern=r"(\d+)"))
    assert problem.prompt == PROMPT and problem.is_correct("so 4") and problem.expected == "4"
    file.write_text('{"id": "a", "prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="a: 'answer' is missing"):
        problems_of(file, 10)
    assert len(problems_of(None, 3)) == 3


def test_a_public_test_set_needs_no_rewriting(tmp_path: Path) -> None:
    """Its own columns, no ids, a file that is named for evaluation, more rows than are asked."""
    file = tmp_path / "test.jsonl"
    line = '{"question": "x", "solution": "2 + 2 = 4\\n#### 4"}\n'
    file.write_text(line * 5, encoding="utf-8")
    found = problems_of(file, 3, Reading(answer_column="solution"))
    assert len({problem.id for problem in found}) == 3
    assert found[0].is_correct("The answer is 4") and not found[0].is_correct("The answer is 2")


class _Gym:
    """As reasoning_gym: entries by seed, some twice; scores below 1 for a near miss."""

    @staticmethod
    def create_dataset(family: str, size: int, seed: int) -> _Gym:
        if family != "sums":
            raise ValueError(f"Dataset {family!r} not registered")
        gym = _Gym()
        numbers = [number // 2 for number in range(size)]
        gym.entries = [{"question": f"{seed} + {n}?", "answer": str(n)} for n in numbers]
        return gym

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.entries)

    def score_answer(self, answer: str, entry: dict[str, str]) -> float:
        return 1.0 if answer == entry["answer"] else 0.5


def test_reasoning_gym_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each content once, the same for the same seed; a near miss is no answer."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", _Gym)
    problems = problems_of("reasoning-gym:sums", 20)
    assert len({problem.prompt for problem in problems}) == 20
    assert problems_of("reasoning-gym:sums", 20) == problems
    assert problems_of("reasoning-gym:sums", 20, Reading(seed=1)) != problems
    first = problems[0]
    assert first.is_correct(f"2 + 2 = 4. Answer: {first.expected}\n\nQuestion: what")
    assert not first.is_correct(f"It is {first.expected}") and not first.is_correct("Answer: x")
    with pytest.raises(ConfigError, match="no_such_family"):
        problems_of("reasoning-gym:no_such_family", 1)


def test_examples_come_before_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system message first, then the worked examples, then the question, as turns of a chat."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", _Gym)
    shown = tmp_path / "examples.jsonl"
    shown.write_text('{"question": "1 + 1?", "answer": "1 + 1 = 2. Answer: 2"}\n')
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "2 + 2?", "answer": "4"}\n')
    before = [("system", "Add."), ("user", "1 + 1?"), ("assistant", "1 + 1 = 2. Answer: 2")]
    for source, question in ((str(asked), "2 + 2?"), ("reasoning-gym:sums", "1000003 + 0?")):
        task = Task(source=source, system="Add.", examples=shown)
        (problem,) = task.problems(1, "", 0)
        turns = [(turn.role, turn.content) for turn in problem.prompt.messages]
        assert turns == [*before, ("user", question)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "1 + 1?"}', "worked answer"),
        ('{"question": "1 + 1?", "answer": 2}', "worked answer"),
        ('{"answer": "2"}', "no prompt"),
        ('{"messages": [{"role": "user", "content": "1?"}], "answer": "1"}', "text is needed"),
        ("", "no example"),
    ],
)
def test_examples_that_show_nothing_are_refused(tmp_path: Path, line: str, says: str) -> None:
    shown = tmp_path / "examples.jsonl"
    shown.write_text(line + "\n")
    with pytest.raises(ConfigError, match=says):
        Task(examples=shown).problems(1, "", 0)


def test_examples_go_with_text(tmp_path: Path) -> None:
    shown, asked = tmp_path / "examples.jsonl", tmp_path / "asked.jsonl"
    shown.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    asked.write_text('{"token_ids": [1, 2], "answer": "4"}\n')
    with pytest.raises(ConfigError, match="token ids are taken as they are"):
        Task(source=str(asked), examples=shown).problems(1, "", 0)


def test_what_is_finished_asks_nothing_again() -> None:
    """A report that was only to be written anew waited for answers that nobody counts."""
    journal, answerer = Journal(), Scripted({"a": answer(), "b": answer()})

    def quiet(what: str, total: int) -> AbstractContextManager[Progress]:
        return progress(what, total, quiet=True)

    run_all(answerer, [GREEDY], PROBLEMS, SETTINGS, journal, 0, quiet)
    assert len(answerer.asked) == 4  # two of them warm up
    run_all(answerer, [GREEDY], PROBLEMS, SETTINGS, journal, 0, quiet)
    assert len(answerer.asked) == 4


def test_what_a_row_needs_beforehand_is_in_no_rows_time() -> None:
    """Calibration made the first row that triggers look slow."""

    class Slow(Scripted):
        def prepare(self, request: GenerateRequest) -> None:
            time.sleep(0.2)

    journal = Journal()
    run_row(Slow({"a": answer(), "b": answer()}), S2T, PROBLEMS, SETTINGS, journal)
    assert journal.seconds[S2T.label] < 0.1


def test_majority_votes_on_the_answer_that_the_pattern_finds() -> None:
    answerer = Scripted({"a": answer(), "b": answer()})
    settings = replace(SETTINGS, answer_pattern="buys (.*)")
    run_row(answerer, ModeSpec(name="majority@4"), PROBLEMS, settings, Journal())
    assert {request.answer_pattern for request in answerer.asked} == {"buys (.*)"}
    identities = [s.identity(answerer, PROBLEMS) for s in (SETTINGS, settings)]
    assert identities[0] != identities[1]


def test_the_real_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym", reason="pip install 's2t[gym]' compiles a part of it")
    (problem,) = problems_of("reasoning-gym:chain_sum", 1)
    assert problem.is_correct(f"Answer: {problem.expected}")
