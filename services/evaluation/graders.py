"""Graders: whether an answer's text is right.

number    the stated answer, equal as text or as a number
exact     the whole text, without case and outer space
choice    the letter of a multiple choice
math      the stated answer, equal as mathematics (math-verify)
module:function    a callable of the user: (text, row) -> bool
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as PoolTimeout
from concurrent.futures.process import BrokenProcessPool
from decimal import Decimal, InvalidOperation
from typing import Any

from s2t_shared.answers import extract_answer
from s2t_shared.errors import ConfigError

IsCorrect = Callable[[str], bool]
Row = Mapping[str, Any]
MATH_TIMEOUT_S = 5.0
LETTER = r"\(?\b([A-J])\b\)?"


def grader_for(name: str, row: Row, pattern: str = "") -> IsCorrect:
    """The grader of one problem.

    row: the problem's, with its "answer". pattern: regular expression that finds an answer in a
    text.

    Raises:
        ConfigError: no such grader, or the row's answer is none for it.
    """
    if ":" in name:
        return _user_grader(name, row)
    expected = str(row["answer"])
    if name == "number":
        return answers_match(expected, pattern)
    if name == "exact":
        return _exact(expected)
    if name == "choice":
        return _choice(expected)
    if name == "math":
        return _math(expected)
    raise ConfigError(
        f"--grader={name!r}: unknown; choose number, exact, choice, math or module:function"
    )


def answers_match(expected: str, pattern: str = "") -> IsCorrect:
    """A grader for a stated answer: equal as text, or as a number."""
    wanted = _wanted(expected, pattern)

    def check(text: str) -> bool:
        found = extract_answer(text, pattern)
        if found is None:
            return False
        a, b = _number(found), _number(wanted)
        if a is not None and b is not None:
            return a == b
        return found.strip() == wanted.strip()

    return check


def _wanted(expected: str, pattern: str) -> str:
    """The answer that a reference states: the whole of it, unless it is a worked solution."""
    if pattern:
        return extract_answer(expected, pattern) or expected.strip()
    _, marked, answer = expected.rpartition("####")
    if not marked and ("\n" in expected.strip() or "\\boxed" in expected):
        return extract_answer(expected) or expected.strip()
    return extract_answer(f"answer: {answer.strip()}") or answer.strip()


def _number(text: str) -> Decimal | None:
    """A number without thousands separators, exactly: 0.1 + 0.2 is 0.3, NaN is none."""
    try:
        number = Decimal(text.strip().replace(",", "").removeprefix("$").removesuffix("%"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _exact(expected: str) -> IsCorrect:
    wanted = _folded(expected)
    return lambda text: _folded(text) == wanted


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _choice(expected: str) -> IsCorrect:
    wanted = _letter(expected)
    if wanted is None:
        raise ConfigError(f"--grader=choice: the answer {expected!r} is no letter from A to J")
    return lambda text: _letter(text) == wanted


def _letter(text: str) -> str | None:
    """The letter that a text chooses: the last stated one, else the first that stands alone.

    The article "A" and the pronoun "I" are no choice inside a sentence.
    """
    bare = text.strip().strip("().*: ")
    if re.fullmatch(r"[A-Ja-j]", bare):
        return bare.upper()
    if boxed := re.findall(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Ja-j])\)?", text):
        return str(boxed[-1]).upper()
    stated = re.findall(
        r"(?i:answer|choice|option)(?:\s+(?i:is|would be))?\s*[:=]?\s*\**" + LETTER, text
    )
    if stated:
        return str(stated[-1])
    alone = re.findall(r"(?:^|[\n(])\s*([A-J])(?=[).:]|\s*$)", text)
    return str(alone[0]) if alone else None


# -- mathematics ----------------------------------------------------------------------------------

_pool: ProcessPoolExecutor | None = None


def _math(expected: str) -> IsCorrect:
    try:
        importlib.import_module("math_verify")
    except ImportError:
        raise ConfigError(
            "--grader=math needs math-verify; install it with: pip install 's2t[eval]'"
        ) from None
    return lambda text: _verified(expected, text)


def _verified(expected: str, text: str) -> bool:
    """Whether both are equal as mathematics; what takes too long is wrong.

    In a process of its own: a hostile expression can keep the algebra busy for ever.
    """
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(1)
    try:
        return _pool.submit(_verify, expected, text).result(MATH_TIMEOUT_S)
    except (PoolTimeout, BrokenProcessPool):
        _end(_pool)
        _pool = None
        return False


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _verify(expected: str, text: str) -> bool:
    from math_verify import parse, verify

    gold = parse(expected if "$" in expected or "\\boxed" in expected else f"${expected}$")
    return bool(verify(gold, parse(text)))


# -- the user's -----------------------------------------------------------------------------------


def _user_grader(name: str, row: Row) -> IsCorrect:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--grader={name!r}: {error}; write module:function") from error
    return lambda text: bool(function(text, row))
