"""What the scripted pair says, so that every token of a history can be checked.

The SLM says `WORDS` to every prompt. At each index of `UNSURE_AT` it might as well say `OTHER`,
and the LLM selects that. Proposer, selector and checker run in different processes: all give the
words the same ids.
"""

from __future__ import annotations

from s2t_shared.decode.scripted import ScriptedSelector, ScriptedSLM, ScriptedTokenizer

LENGTH = 40
WORDS = [f"w{i}" for i in range(LENGTH)]
UNSURE_AT = frozenset(range(4, LENGTH, 5))
OTHER = "other"
LONG_WORDS = [f"w{i % LENGTH}" for i in range(4000)]


def tokenizer() -> ScriptedTokenizer:
    """One that knows the script's words by the same ids in every process."""
    made = ScriptedTokenizer()
    for word in (*WORDS, OTHER):
        made.id_of(word)
    return made


TOKENIZER = tokenizer()
OTHER_ID = TOKENIZER.id_of(OTHER)


def word_id(index: int) -> int:
    """What the SLM alone says at an index; 0 behind the last word."""
    return TOKENIZER.id_of(WORDS[index]) if index < LENGTH else 0


def slm(step_s: float, slots: int = 64, is_long: bool = False) -> ScriptedSLM:
    """The scripted SLM. is_long: it says the words again and again, 4,000 of them."""
    return ScriptedSLM(
        LONG_WORDS if is_long else WORDS,
        unsure_at=UNSURE_AT,
        alternatives=[OTHER],
        tokenizer=tokenizer(),
        step_s=step_s,
        slots=slots,
        max_length=8192,
    )


def llm(digest: str) -> ScriptedSelector:
    """The scripted LLM."""
    return ScriptedSelector(prefers=OTHER_ID, digest=digest)
