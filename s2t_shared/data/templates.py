"""Which prompts are alike but for numbers, names and the things they speak of.

Generated problem sets come from a few hundred templates. A split by problem puts the same template
on both sides, and what was learnt by heart looks like skill. A split by template does not.

Knows text only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from s2t_shared.types import Prompt

WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+(?:[.,]\d+)*")
QUOTED = re.compile(r'"[^"\n]*"')
MIN_FUNCTION_WORDS = 6
MIN_TEMPLATES = 20  # so that a tenth of them is at least two

# English words that carry grammar, not content. They stay when names, numbers and things change.
# Particles ("off", "up") are not among them: they change with the verb.
ENGLISH = """
a about after again all also am among an and any as at be been before being below between both but
by can cannot could did do does doing during each either else every few for from further given
gives had has have he her hers him his how i if in into is it its itself just least less many me
more most much my neither no nor not now of on once one only or other our own per same she should
so some such than that the their them then there these they this those through to too twice under
until upon us very was we were what when where which while who whom whose why will within without
would you your
"""
FUNCTION_WORDS = frozenset(ENGLISH.split())

# Forms that follow a name's gender or a number's size.
SAME_WORD = {
    "he": "they",
    "she": "they",
    "it": "they",
    "him": "them",
    "her": "their",
    "his": "their",
    "hers": "their",
    "its": "their",
    "is": "are",
    "was": "were",
    "has": "have",
    "does": "do",
    "an": "a",
    "this": "these",
    "that": "those",
}


def template_of(text: str) -> str:
    """A text without what changes from one use of its template to the next.

    The sequence of the text's English function words outside quotation marks. A text with fewer
    than MIN_FUNCTION_WORDS of them keeps all its words instead, with numbers as "#", single letters
    and capitalised words as "@". Two uses of a template have the same result. So may two templates
    that differ by little.
    """
    words = WORD.findall(QUOTED.sub(" ", text))
    kept = []
    for word in words:
        lower = word.lower()
        if lower in FUNCTION_WORDS:
            kept.append(SAME_WORD.get(lower, lower))
    if len(kept) >= MIN_FUNCTION_WORDS:
        return " ".join(kept)
    return " ".join(_masked(word) for word in words)


def prompt_group(prompt: Prompt) -> str:
    """The group of prompts that share this one's template, 16 hex digits; "" for token ids."""
    if prompt.messages:
        text = "\n".join(message.content for message in prompt.messages)
    else:
        text = prompt.text or ""
    if not text:
        return ""
    return hashlib.sha256(template_of(text).encode()).hexdigest()[:16]


def tell_templates_apart(groups: Iterable[str]) -> bool:
    """Whether prompts of these groups come from enough templates to hold out whole ones."""
    return len(set(groups) - {""}) >= MIN_TEMPLATES


def _masked(word: str) -> str:
    if word[0].isdigit():
        return "#"
    is_name = word[0].isupper() or (len(word) == 1 and word not in "ai")
    return "@" if is_name else word
