"""Shop problems: find the two prices that spend all the coins. Needs no model.

    Eva has 20 coins . Prices are 13 , 10 , 8 , 9 , 11 . Which two cost 20 ?
    Let us see . Eva takes the 11 first . 20 - 11 = 9 is left . So Eva buys 11 and 9 .

An answer holds one decision (which price to take first: it needs the whole search) among many
easy steps (copying, one subtraction). It comes at step 7, after the engine's warm-up, and is
1 of 26 steps, so that a 5 % budget reaches it in every answer.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Split = Literal["train", "test"]

NAMES = ("Ann", "Bob", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
NUM_PRICES = 5
MIN_PRICE, MAX_PRICE = 2, 20
DECISION_STEP = 7  # the index, in the solution, of the price that is taken first
TEST_SHARE = 10  # one content in so many belongs to the test split

ANSWER_PATTERN = r"\bbuys (\d+) and (\d+)\b"


@dataclass(frozen=True)
class Problem:
    """One problem with its reference solution.

    Problem(id="shop-test-000000", prompt="Eva has 20 coins . Prices are 13 , 10 , 8 , 9 , 11 .
            Which two cost 20 ?", solution="Let us see . Eva takes the 11 first . 20 - 11 = 9 is
            left . So Eva buys 11 and 9 .", answer="9 and 11")
    """

    id: str
    prompt: str
    solution: str
    answer: str  # the two prices, the lower one first


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split: deterministic, no content twice.

    A larger `count` only appends. The splits are disjoint for all seeds and counts, because a
    problem's split is a function of its content alone, see `_split_of`.
    """
    rng = random.Random(f"shop {split} {seed}")
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found: list[Problem] = []
    for total, prices in _contents(rng):
        if len(found) >= count:
            break
        name = rng.choice(NAMES)
        if _split_of(total, prices) != split or (total, prices) in seen:
            continue
        seen.add((total, prices))
        found.append(_render(f"shop-{split}-{len(found):06d}", name, total, prices))
    return found


def extract_answer(text: str) -> str | None:
    """The last "buys X and Y" of a text, the lower price first; None if there is none."""
    matches = re.findall(ANSWER_PATTERN, text)
    if not matches:
        return None
    low, high = sorted(int(price) for price in matches[-1])
    return f"{low} and {high}"


def is_correct(problem: Problem, text: str) -> bool:
    """Whether `text` ends in the right pair, in either order."""
    return extract_answer(text) == problem.answer


def _contents(rng: random.Random) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Endless (total, prices) in which exactly one pair of prices makes the total."""
    while True:
        prices = tuple(rng.sample(range(MIN_PRICE, MAX_PRICE + 1), NUM_PRICES))
        total = sum(rng.sample(prices, 2))
        if len(_pairs(total, prices)) == 1:
            yield total, prices


def _pairs(total: int, prices: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pairs of prices that make the total, each in the order of the prices."""
    return [(a, b) for a, b in combinations(prices, 2) if a + b == total]


def _split_of(total: int, prices: tuple[int, ...]) -> Split:
    """By a hash of total and prices without their order: a reshuffle never changes sides."""
    content = f"{total}:{sorted(prices)}".encode()
    digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return "test" if digest % TEST_SHARE == 0 else "train"


def _render(id: str, name: str, total: int, prices: tuple[int, ...]) -> Problem:
    """The problem in words. The solution takes the later one of the two prices first."""
    second, first = _pairs(total, prices)[0]
    low, high = sorted((first, second))
    listed = " , ".join(map(str, prices))
    return Problem(
        id=id,
        prompt=f"{name} has {total} coins . Prices are {listed} . Which two cost {total} ?",
        solution=(
            f"Let us see . {name} takes the {first} first . {total} - {first} = {second} is left . "
            f"So {name} buys {first} and {second} ."
        ),
        answer=f"{low} and {high}",
    )
