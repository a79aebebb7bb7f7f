"""The final answer in an answer's text."""

from __future__ import annotations

import re


def extract_answer(text: str, pattern: str = "") -> str | None:
    """The final answer that a text states, or None.

    The last match of `pattern` (its groups joined) when a pattern is given; else the last
    \\boxed{...}; else the numbers (or the words) after the last "answer (is)"; else the last
    number.
    """
    if pattern:
        found = [match.groups() or (match.group(),) for match in re.finditer(pattern, text)]
        return " ".join(found[-1]).strip() if found else None
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return str(boxed[-1]).strip()
    stated = re.findall(r"(?i)answer(?:\s+is)?\s*:?\s*([^\n]+)", text)
    numbers = re.findall(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)", stated[-1] if stated else text)
    if stated:
        joined = " ".join(number.replace(",", "") for number in numbers)
        return joined or stated[-1].strip().rstrip(".") or None
    return numbers[-1].replace(",", "") if numbers else None
