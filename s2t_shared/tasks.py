"""Prompts to calibrate on, and problems from files. Training prompts only: an evaluation split is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.pair import SLM_DIR
from s2t_shared.pair import problems as pair_problems
from s2t_shared.text import Tokenizer
from s2t_shared.types import Message, Prompt

GENERIC_QUESTIONS = (
    "A baker makes 14 trays of 12 rolls and sells 95 rolls in the morning. How many rolls are left?",
    "Explain in a few sentences why the sky is blue during the day and red at sunset.",
    "Write a Python function that returns the second largest number of a list.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "If 3x + 7 = 34, what is x? Show the steps.",
    "Summarise the causes of the French Revolution in three points.",
    "Tom has twice as many marbles as Ann. Together they have 51. How many does Tom have?",
    "What happens to the pressure of a gas when its volume is halved at constant temperature, and why?",
    "Write an SQL query for the three customers with the highest total of orders.",
    "A shirt costs 40 euros after a 20 % discount. What was the price before?",
    "Describe how a binary search works and why it is fast.",
    "How many different three-digit numbers can be made from the digits 1, 2, 3 and 4 without repeating one?",
    "Give the prime factorisation of 360 and say how you found it.",
    "Why do ships made of steel float?",
    "A tank fills in 6 hours by one pipe and in 4 hours by another. How long do both take together?",
    "Write a short polite e-mail that moves a meeting from Monday to Wednesday.",
    "What is the sum of all even numbers from 2 to 100?",
    "Explain the difference between a list and a tuple in Python with an example.",
    "A rectangle is 5 cm longer than wide and has an area of 84 square centimetres. What are its sides?",
    "Which is larger, 7/12 or 5/8? Explain.",
    "Write a Bash command that counts the lines of all .txt files below the current folder.",
    "A car uses 6.5 litres per 100 km. How much does it use for 340 km?",
    "Explain how vaccines protect people who are not vaccinated.",
    "Three friends share 2,450 euros in the ratio 2 : 3 : 5. How much does each get?",
)


def calibration_prompts(tokenizer: Tokenizer, count: int, file: Path | None = None) -> list[Prompt]:
    """Training prompts to calibrate thresholds on: the operator's file, else the bundled pair's training problems
    where its tokenizer is in use, else a few generic questions (through the chat template, if there is one).

    Raises:
        ConfigError: the file is unreadable or holds no prompt.
    """
    if file is not None:
        prompts = [prompt for _, prompt in read_prompts(file) if isinstance(prompt, Prompt)][:count]
        if not prompts:
            raise ConfigError(f"calibration prompts {str(file)!r}: no usable line")
        return prompts
    if tokenizer.digest == Tokenizer.load(SLM_DIR).digest:
        return [Prompt(text=p.prompt) for p in pair_problems.problems("train", count)]
    if tokenizer.hf.chat_template:
        return [Prompt(messages=(Message("user", q),)) for q in GENERIC_QUESTIONS[:count]]
    return [Prompt(text=q) for q in GENERIC_QUESTIONS[:count]]


def read_prompts(file: Path) -> Iterator[tuple[dict[str, Any], Prompt | InvalidRequestError]]:
    """The lines of a JSONL file: {"id", and one of "prompt" | "messages" | "token_ids"}.

    A broken line yields its error, which names the line's number; an unreadable file raises ConfigError.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"input {str(file)!r} cannot be read: {error}") from error
    return _parse(lines)


def _parse(lines: Iterable[str]) -> Iterator[tuple[dict[str, Any], Prompt | InvalidRequestError]]:
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row: dict[str, Any] = {"line": number}
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise InvalidRequestError("not a JSON object")
            row |= content
            if not isinstance(row.get("id"), (str, int)):
                raise InvalidRequestError('"id" is missing; give a string')
            row["id"] = str(row["id"])
            if row["id"] in seen:
                raise InvalidRequestError(f'"id" {row["id"]!r} was used before')
            seen.add(row["id"])
            yield row, _prompt(row)
        except ValueError as error:
            yield row, InvalidRequestError(f"line {number}: not JSON ({error})")
        except InvalidRequestError as error:
            yield row, InvalidRequestError(f"line {number}: {error}")


def _prompt(row: dict[str, Any]) -> Prompt:
    given = [key for key in ("prompt", "messages", "token_ids") if row.get(key) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f'give exactly one of "prompt", "messages", "token_ids" (found {given or "none"})')
    value = row[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str) or not value:
            raise InvalidRequestError('"prompt" must be a non-empty string')
        return Prompt(text=value)
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f'"{given[0]}" must be a non-empty list')
    if given[0] == "token_ids":
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise InvalidRequestError('"token_ids" must hold whole numbers')
        return Prompt(token_ids=tuple(value))
    try:
        return Prompt(messages=tuple(Message(str(m["role"]), str(m["content"])) for m in value))
    except (TypeError, KeyError) as error:
        raise InvalidRequestError('"messages" must hold objects with "role" and "content"') from error
