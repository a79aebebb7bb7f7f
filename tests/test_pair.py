"""`Pair`, the front door, on the bundled models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import s2t_shared
from s2t_shared.bundled import problems
from s2t_shared.decode.llm_selector import InProcessSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import InvalidRequestError, VersionNotFoundError
from s2t_shared.pair import Pair

QUESTIONS = [problem.prompt for problem in problems.problems("test", 3)]
DECODING = {"mode": "s2t", "budget": 0.05, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    opened = Pair.open("bundled", "bundled", threads=1)
    opened.calibrations = tmp_path_factory.mktemp("calibrations")
    return opened


def test_it_is_imported_from_the_top() -> None:
    assert s2t_shared.Pair is Pair


def test_answers_come_in_input_order(pair: Pair) -> None:
    together = pair.generate(QUESTIONS, **DECODING)
    alone = [pair.generate([question], **DECODING)[0] for question in QUESTIONS]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert sum(answer.usage.triggers for answer in together) > 0


def test_one_text_is_a_list_of_one(pair: Pair) -> None:
    """Its characters were taken for prompts."""
    [answer] = pair.generate(QUESTIONS[0], **DECODING)
    assert answer.text == pair.generate(QUESTIONS[:1], **DECODING)[0].text


def test_a_stream_is_the_answer_in_pieces(pair: Pair) -> None:
    pieces = list(pair.stream(QUESTIONS[0], **DECODING))
    [answer] = pair.generate(QUESTIONS[0], **DECODING)
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == answer.text
    last = pieces[-1].answer
    assert last is not None and last.text == answer.text


def test_an_error_names_its_prompt(pair: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1: "):
        pair.generate([QUESTIONS[0], ""], **DECODING)


def test_a_budget_is_measured_once_and_kept(pair: Pair) -> None:
    pair.generate(QUESTIONS[0], **DECODING)
    kept = list(Path(pair.calibrations).rglob("*.json"))
    assert kept
    written = [file.stat().st_mtime_ns for file in kept]
    pair.generate(QUESTIONS[0], **DECODING)
    assert [file.stat().st_mtime_ns for file in kept] == written


def test_a_file_of_prompts_is_calibrated_on_once(pair: Pair, tmp_path: Path) -> None:
    """Each row of an evaluation asks for it."""
    file = tmp_path / "training.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": QUESTIONS[0]}) + "\n")
    apart = replace(pair, calibrations=tmp_path)
    said: list[str] = []
    first = apart.calibration(needs_llm=False, prompts=file, say=said.append)
    assert apart.calibration(needs_llm=False, prompts=file, say=said.append) is first
    assert len(said) == 1


def test_what_is_forgotten_is_read_again(pair: Pair) -> None:
    """Else a later row of an evaluation looks fast: an earlier one has read its prompts."""
    assert isinstance(pair.engine.proposer, Proposer) and isinstance(pair.llm, InProcessSelector)
    pair.generate(QUESTIONS, **DECODING)
    pools = [pair.engine.proposer.runtime.pool, pair.llm._llm.runtime.pool]
    assert all(list(pool.slots()) for pool in pools)
    pair.forget()
    assert not any(list(pool.slots()) for pool in pools)


def test_a_version_that_is_not_loaded_is_refused(pair: Pair) -> None:
    with pytest.raises(VersionNotFoundError, match="nowhere"):
        pair.generate(QUESTIONS[0], mode="s2t_local", version="nowhere", budget=0.05)


def test_it_works_without_an_llm() -> None:
    [answer] = Pair.open("bundled", threads=1).generate(QUESTIONS[0], mode="greedy")
    assert answer.text and answer.usage.llm_forwards == 0
