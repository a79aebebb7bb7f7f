"""What a step could have been: texts of single tokens, both models' numbers."""

from __future__ import annotations

from collections.abc import Sequence

from s2t_shared.bundled import SLM_DIR
from s2t_shared.decode.alternatives import TokenTexts, with_alternatives
from s2t_shared.decode.scripted import ScriptedTokenizer
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import ChosenBy, PositionScores, Step, Support

SUPPORT = Support((3, 5, 7), (-0.1, -2.5, -4.0))


class Dropping(ScriptedTokenizer):
    """As SentencePiece's: the space in front of a text's first token is not part of the text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return super().decode(token_ids).removeprefix(" ")


def test_a_tokens_text_keeps_its_space() -> None:
    """Decoded alone it would lose it, and the texts of an answer's tokens would not join to it."""
    tokenizer = Dropping()
    assert TokenTexts(tokenizer)[tokenizer.id_of("word")] == " word"


def test_texts_of_a_real_tokenizer_join_to_the_text() -> None:
    tokenizer = Tokenizer.load(SLM_DIR)
    ids = tokenizer.encode_text("Mia has 19 coins . Prices are 11 ,")
    texts = TokenTexts(tokenizer)
    assert "".join(texts[i] for i in ids[1:]) == tokenizer.decode(ids)[len(texts[ids[0]].strip()) :]


def test_candidates_carry_what_the_llm_thought_of_them() -> None:
    """The LLM's numbers are those of the first candidates; the rest of the support has none."""
    step = Step(
        index=4,
        token_id=5,
        chosen_by=ChosenBy.LLM,
        triggered=True,
        candidate_ids=(3, 5),
        scores=(-3.0, -0.2),
        support=SUPPORT,
        llm=PositionScores((-3.0, -0.2), 5),
    )
    shown = with_alternatives(step, 3, numbers())
    assert [a.token_id for a in shown.alternatives] == [3, 5, 7]
    assert [a.llm for a in shown.alternatives] == [-3.0, -0.2, None]
    assert [a.local for a in shown.alternatives] == [None] * 3
    assert shown.chosen == shown.alternatives[1]


def test_all_candidates_even_where_fewer_are_wanted() -> None:
    step = Step(
        index=4,
        token_id=3,
        chosen_by=ChosenBy.LOCAL,
        triggered=True,
        candidate_ids=(3, 5),
        scores=(1.0, 0.5),
        support=SUPPORT,
    )
    shown = with_alternatives(step, 0, numbers())
    assert [(a.token_id, a.local) for a in shown.alternatives] == [(3, 1.0), (5, 0.5)]


def test_a_token_outside_the_support_and_a_step_without_one() -> None:
    """A sampled token may be anywhere; most steps keep no support."""
    step = Step(index=0, token_id=9, chosen_by=ChosenBy.SAMPLER, support=SUPPORT)
    shown = with_alternatives(step, 1, numbers())
    assert shown.chosen is not None and (shown.chosen.token_id, shown.chosen.slm) == (9, None)
    assert [a.token_id for a in shown.alternatives] == [3]
    bare = Step(index=0, token_id=9)
    assert with_alternatives(bare, 5, numbers()) is bare


def numbers() -> TokenTexts:
    tokenizer = ScriptedTokenizer()
    for number in range(1, 10):
        tokenizer.id_of(str(number))
    return TokenTexts(tokenizer)
