"""Budget -> threshold, measured by running the models on training prompts, and kept for the next
start.

Training prompts only: an evaluation split is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from s2t_shared.bundled import SLM_DIR
from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.data.prompts import PromptSource, read
from s2t_shared.decode.generate import Generator
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.files import private_folder, write_atomically
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.policy import Calibration
from s2t_shared.types import Answer, DecodeOptions, GenerateRequest, Message, Prompt

GENERIC_QUESTIONS = (
    "A baker makes 14 trays of 12 rolls and sells 95 rolls in the morning. How many rolls are "
    "left?",
    "Explain in a few sentences why the sky is blue during the day and red at sunset.",
    "Write a Python function that returns the second largest number of a list.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "If 3x + 7 = 34, what is x? Show the steps.",
    "Summarise the causes of the French Revolution in three points.",
    "Tom has twice as many marbles as Ann. Together they have 51. How many does Tom have?",
    "What happens to the pressure of a gas when its volume is halved at constant temperature, and "
    "why?",
    "Write an SQL query for the three customers with the highest total of orders.",
    "A shirt costs 40 euros after a 20 % discount. What was the price before?",
    "Describe how a binary search works and why it is fast.",
    "How many different three-digit numbers can be made from the digits 1, 2, 3 and 4 without "
    "repeating one?",
    "Give the prime factorisation of 360 and say how you found it.",
    "Why do ships made of steel float?",
    "A tank fills in 6 hours by one pipe and in 4 hours by another. How long do both take "
    "together?",
    "Write a short polite e-mail that moves a meeting from Monday to Wednesday.",
    "What is the sum of all even numbers from 2 to 100?",
    "Explain the difference between a list and a tuple in Python with an example.",
    "A rectangle is 5 cm longer than wide and has an area of 84 square centimetres. What are its "
    "sides?",
    "Which is larger, 7/12 or 5/8? Explain.",
    "Write a Bash command that counts the lines of all .txt files below the current folder.",
    "A car uses 6.5 litres per 100 km. How much does it use for 340 km?",
    "Explain how vaccines protect people who are not vaccinated.",
    "Three friends share 2,450 euros in the ratio 2 : 3 : 5. How much does each get?",
)


def measure_calibration(
    generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int, with_llm: bool
) -> Calibration:
    """Calibrate on greedy rollouts of training prompts.

    with_llm: each rollout is scored in one LLM prefill, for the KL thresholds.

    Raises:
        ConfigError: not one prompt could be rolled out.
    """
    requests = (
        calibration_request(i, prompt, max_new_tokens, with_llm) for i, prompt in enumerate(prompts)
    )
    return calibration_from([outcome for _, outcome in generator.generate(requests)])


def calibration_request(
    number: int, prompt: Prompt, max_new_tokens: int, with_llm: bool
) -> GenerateRequest:
    """The greedy rollout of one training prompt, whose answer keeps what is calibrated on."""
    options = DecodeOptions(
        max_new_tokens=max_new_tokens, score_rollout=with_llm, keep_support=True, version=""
    )
    return GenerateRequest(request_id=f"calibration-{number}", prompt=prompt, options=options)


def calibration_from(
    outcomes: Sequence[Answer | S2TError], llm_digest: str | None = None
) -> Calibration:
    """Calibrate on the rollouts that became whole.

    llm_digest: take those that this LLM has scored; None: whichever.

    Raises:
        ConfigError: there are none.
    """
    answers = [o for o in outcomes if isinstance(o, Answer) and not o.usage.degraded_steps]
    if llm_digest is not None:
        answers = [answer for answer in answers if answer.versions.llm == llm_digest]
    if not answers:
        reason = next((o for o in outcomes if isinstance(o, S2TError)), "the LLM did not answer")
        raise ConfigError(
            f"calibration failed: none of {len(outcomes)} training prompts could be rolled out "
            f"({reason})"
        )
    return Calibration.measure([answer.steps for answer in answers])


def load_calibration(folder: Path, slm_digest: str, llm_digest: str) -> Calibration | None:
    """What an earlier start measured for this pair, if it is there and readable."""
    try:
        text = _file(folder, slm_digest, llm_digest).read_text(encoding="utf-8")
        return Calibration.from_json(text)
    except (OSError, ValueError):
        return None


def store_calibration(
    folder: Path, slm_digest: str, llm_digest: str, calibration: Calibration
) -> None:
    """Keep a calibration for the next start."""
    private_folder(folder)
    write_atomically(_file(folder, slm_digest, llm_digest), calibration.to_json())


def _file(folder: Path, slm_digest: str, llm_digest: str) -> Path:
    return folder / f"{slm_digest}-{llm_digest or 'none'}.json"


def calibration_prompts(tokenizer: Tokenizer, count: int, file: Path | None = None) -> list[Prompt]:
    """Training prompts to calibrate on.

    The operator's file; else the bundled training problems where their tokenizer is in use; else
    generic questions, through the chat template if there is one.

    Raises:
        ConfigError: the file is unreadable or holds no prompt.
        EvaluationSplitError: the file's name says that it is for evaluation.
    """
    if file is not None:
        rows = read(PromptSource(source=str(file)))
        prompts = list(islice((p for _, p in rows if isinstance(p, Prompt)), count))
        if not prompts:
            raise ConfigError(f"calibration prompts {str(file)!r}: no usable line")
        return prompts
    if tokenizer.digest == Tokenizer.load(SLM_DIR).digest:
        return [Prompt(text=p.prompt) for p in bundled_problems.problems("train", count)]
    questions = GENERIC_QUESTIONS[:count]
    if tokenizer.hf.chat_template:
        return [Prompt(messages=(Message("user", question),)) for question in questions]
    return [Prompt(text=question) for question in questions]
