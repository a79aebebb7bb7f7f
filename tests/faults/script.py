"""What the scripted pair says, so that every token of a history can be checked.

The SLM says `WORDS` to every prompt, again and again. At each index of `UNSURE_AT` it might as well
say `OTHER`, and the LLM selects that. Proposer, selector and checker run in different processes:
all give the words the same ids.
"""

from __future__ import annotations

from s2t_shared.decode.scripted import ScriptedSelector, ScriptedSLM, ScriptedTokenizer

WORDS = [f"w{i}" for i in range(40)]
LENGTH = 6000  # tokens, if nobody asks for fewer: the words again and again
UNSURE_AT = range(4, LENGTH, 5)
OTHER = "other"


def tokenizer() -> ScriptedTokenizer:
    """One that knows the script's words by the same ids in every process."""
    made = ScriptedTokenizer()
    for word in (*WORDS, OTHER):
        made.id_of(word)
    return made


TOKENIZER = tokenizer()
OTHER_ID = TOKENIZER.id_of(OTHER)


def word_id(index: int) -> int:
    """What the SLM alone says at an index."""
    return TOKENIZER.id_of(WORDS[index % len(WORDS)])


def slm(step_s: float, slots: int) -> ScriptedSLM:
    """The scripted SLM. step_s: of one forward. slots: sequences at once."""
    return ScriptedSLM(
        [WORDS[i % len(WORDS)] for i in range(LENGTH)],
        unsure_at=UNSURE_AT,
        alternatives=[OTHER],
        tokenizer=tokenizer(),
        step_s=step_s,
        slots=slots,
        max_length=LENGTH,
    )


def llm(digest: str) -> ScriptedSelector:
    """The scripted LLM."""
    return ScriptedSelector(prefers=OTHER_ID, digest=digest)
