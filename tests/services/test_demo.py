"""What the demo prints of an answer, and how it counts mixed versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.bundled import SLM_DIR
from s2t_shared.errors import OverloadedError
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import Answer, FinishReason, Prompt, Step, Usage, Versions
from services.client import Client
from services.demo import check_swap, marked_text
from services.evaluation.problems import Problem
from services.rpc.ask_many import Target
from tests.helpers.serving import FixedVersions, local_selector, proposer_service, with_gateway


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SLM_DIR)


def test_divergence_points_are_marked(tokenizer: Tokenizer) -> None:
    (refused,) = tokenizer.encode(Prompt(text="has"))[-1:]
    plain = Step(index=0, token_id=5, slm_top_id=5, text=" coins")
    assert marked_text(plain, tokenizer) == " coins"
    agreed = Step(index=0, token_id=5, slm_top_id=5, triggered=True, text=" coins")
    assert marked_text(agreed, tokenizer) == "[yellow] coins[/yellow]"
    flipped = Step(index=0, token_id=5, slm_top_id=refused, triggered=True, text=" coins")
    shown = marked_text(flipped, tokenizer)
    assert "has" in shown.split("→")[0] and "[bold green]coins[/bold green]" in shown


def test_a_mixed_answer_is_one_that_its_version_would_not_give(tmp_path: Path) -> None:
    """Of five outcomes one failed, and one has tokens that no replay of its version has."""
    old, new = local_selector("v1"), local_selector("v2")
    asked = [Problem("p", Prompt(text="x"), bool)]
    service = proposer_service(versions=FixedVersions(live=new, others=[old]))

    def answer(version: str, token_ids: tuple[int, ...]) -> Answer:
        return Answer(
            token_ids=token_ids,
            text="",
            finish_reason=FinishReason.STOP,
            usage=Usage(),
            versions=Versions(local_selector=version),
        )

    def work(address: str) -> None:
        with Client(address) as client:
            true = client.generate("x", mode="s2t_local", budget=0.05, version="v1").token_ids
        collected = [
            (0, answer("v1", true)),
            (0, answer("v2", true)),
            (0, answer("v2", true)),
            (0, answer("v2", true[:-1])),
            (0, OverloadedError("full")),
        ]
        report = check_swap(Target(address), asked, "v1", "v2", collected)
        assert (report.in_flight, report.failed, report.mixed) == (5, 1, 1)
        assert (report.old, report.new) == (1, 3)

    with_gateway(tmp_path, service, work)
