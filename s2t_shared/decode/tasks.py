"""Prompts to calibrate on. Training prompts only: an evaluation split is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from s2t_shared.bundled import SLM_DIR
from s2t_shared.bundled import problems as pair_problems
from s2t_shared.data.prompts import PromptSource, read
from s2t_shared.errors import ConfigError
from s2t_shared.model.tokenizer import Tokenizer
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
        ConfigError: the file is unreadable or holds no prompt. EvaluationSplitError: its name says that it is
            for evaluation.
    """
    if file is not None:
        rows = read(PromptSource(str(file)))
        prompts = list(islice((prompt for _, prompt in rows if isinstance(prompt, Prompt)), count))
        if not prompts:
            raise ConfigError(f"calibration prompts {str(file)!r}: no usable line")
        return prompts
    if tokenizer.digest == Tokenizer.load(SLM_DIR).digest:
        return [Prompt(text=p.prompt) for p in pair_problems.problems("train", count)]
    if tokenizer.hf.chat_template:
        return [Prompt(messages=(Message("user", q),)) for q in GENERIC_QUESTIONS[:count]]
    return [Prompt(text=q) for q in GENERIC_QUESTIONS[:count]]
