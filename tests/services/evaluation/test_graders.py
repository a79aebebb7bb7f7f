"""Graders: a table of tricky answers. Each line once cost someone a point, or gave one away."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from s2t_shared.errors import ConfigError
from services.evaluation.graders import grader_for

NUMBER = [
    ("42", "The answer is 42", True),
    ("42", "42", True),
    ("42", "42.0", True),
    ("42.0", "42", True),
    ("1234", "The answer is 1,234", True),
    ("1,234", "1234", True),
    ("-7", "so the answer is -7", True),
    ("-7", "so the answer is 7", False),
    ("7", "the answer is -7", False),
    ("0.3", "0.30", True),
    ("0.3", "0.30000000000000001", False),
    (".5", "0.5", True),
    ("18", "He has 20 - 2 = 18 left.", True),
    ("18", "18 is more than 17", False),  # the last number is the answer
    ("18", "The answer is 18. That is 3 more than 15.", False),
    ("18", r"so \boxed{18}, which is more than 15", True),
    ("18", r"\boxed{17} no, \boxed{18}", True),
    ("18", "", False),
    ("18", "no idea", False),
    ("18", "eighteen", False),
    ("nan", "nan", False),
    ("inf", "inf", False),
    ("3", "Answer: 3\n\nQ: what is 4 + 5?", True),
    ("3 4", "the answer is 3 and 4", True),
    ("3 4", "the answer is 4 and 3", False),
    ("blue", "The answer is blue.", True),
    ("blue", "The answer is Blue.", False),
    ("10000000000000001", "10000000000000000", False),  # as floats they are equal
    ("5", "The answer is 5 apples", True),
    ("5%", "5", True),
    ("3 and 11", "first 3, then 11", False),  # the reference states two numbers
    ("3 and 11", "the answer is 3 and 11", True),
    ("20 - 2 = 18\n#### 18", "The answer is 18", True),
    ("He has 20 - 2\nThat is 18", "The answer is 18", True),
]
EXACT = [
    ("Paris", "Paris", True),
    ("Paris", " paris \n", True),
    ("Paris", "PARIS", True),
    ("New York", "New  York", True),
    ("New York", "New\nYork", True),
    ("New York", "NewYork", False),
    ("Paris", "Paris.", False),
    ("Paris", "It is Paris", False),
    ("Straße", "STRASSE", True),
    ("10", "10.0", False),
    ("", "", True),
    ("a", "", False),
]
CHOICE = [
    ("B", "B", True),
    ("B", "b", True),
    ("B", "(B)", True),
    ("B", "B.", True),
    ("B", "B) because it is red", True),
    ("B", "**B**", True),
    ("B", "The answer is B", True),
    ("B", "The answer is (B).", True),
    ("B", "answer: B", True),
    ("B", "Answer: **B**", True),
    ("B", r"\boxed{B}", True),
    ("B", r"\boxed{\text{B}}", True),
    ("B", "A) is wrong. The answer is B", True),
    ("B", "The answer is A. No, the answer is B.", True),
    ("A", "A dog would be B", False),
    ("A", "A dog is an animal", False),  # an article is no choice
    ("I", "I think the answer is C", False),
    ("C", "I think the answer is C", True),
    ("C", "The correct option is C", True),
    ("C", "The best choice would be C.", True),
    ("C", "", False),
    ("C", "None of them", False),
    ("C", "the answer is a", False),
    ("D", "A, B or C", False),
    ("(D)", "D", True),
    ("D", "Because of this,\nD.", True),
]
MATH = [
    ("1/2", r"$\frac{1}{2}$", True),
    ("1/2", "$0.5$", True),
    (r"\frac{1}{2}", r"\boxed{\frac12}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", True),
    ("x+1", "$1+x$", True),
    ("x+1", "$x-1$", False),
    (r"2\sqrt{2}", r"$\sqrt{8}$", True),
    (r"\sqrt{2}", "$1.41$", False),
    ("(x+1)^2", "$x^2+2x+1$", True),
    ("12", r"the answer is $12$", True),
    ("12", r"\boxed{12}", True),
    ("12", r"\boxed{12.0}", True),
    ("12", r"$12\%$", True),  # math-verify leaves units out
    ("12", "13", False),
    ("12", "", False),
    (r"\{1,2\}", r"$\{2,1\}$", True),
    ("(1,2)", "$(2,1)$", False),
    ("(1,2)", "$(1,2)$", True),
    (r"\pi", "$3.14$", False),
    (r"2\pi", r"$\pi+\pi$", True),
    ("1000", "$1,000$", True),
    ("-3", "$-3$", True),
    ("-3", "$3$", False),
    (r"x \leq 3", r"$x \leq 3$", True),
    (r"10^{3}", "$1000$", True),
    ("0.333", r"$\frac{1}{3}$", False),
    (r"\frac{3}{4}", r"So we get $\frac{3}{4}$.", True),
    ("7", r"First $3+4$, that is $7$", True),
    ("7", r"\boxed{3+4}", True),
    ("5", r"$x=5$", True),
    (r"\sin^2 x+\cos^2 x", "$1$", True),
    ("8", r"$2^3$", True),
]


@pytest.mark.parametrize(
    ("grader", "expected", "text", "is_right"),
    [("number", *case) for case in NUMBER]
    + [("exact", *case) for case in EXACT]
    + [("choice", *case) for case in CHOICE]
    + [("math", *case) for case in MATH],
)
def test_tricky_answers(grader: str, expected: str, text: str, is_right: bool) -> None:
    assert grader_for(grader, {"answer": expected})(text) is is_right


def test_the_table_is_long_enough() -> None:
    assert len(NUMBER) + len(EXACT) + len(CHOICE) + len(MATH) >= 100


def test_mathematics_that_takes_for_ever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next answer is graded all the same."""
    monkeypatch.setattr("services.evaluation.graders.MATH_TIMEOUT_S", 1.0)
    grader = grader_for("math", {"answer": "1"})
    grader("$1$")  # starts the process
    assert not grader("$" + "(" * 3 + "9^{9^{9^{9}}})!)!)!" + "$")
    monkeypatch.undo()
    assert grader("$1$")


def test_a_callable_of_the_user_sees_text_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_grader.py").write_text(
        "def ends(text, row):\n    return text.endswith(row['suffix'])\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check = grader_for("my_grader:ends", {"answer": "", "suffix": "!"})
    assert check("so!") and not check("so")
    sys.modules.pop("my_grader")


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("fuzzy", {"answer": "1"}, "choose number, exact, choice, math"),
        ("no_such_module:f", {"answer": "1"}, "no_such_module"),
        ("json:no_such_function", {"answer": "1"}, "no_such_function"),
        ("choice", {"answer": "Paris"}, "no letter from A to J"),
    ],
)
def test_a_bad_grader_says_what_to_write(name: str, row: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grader_for(name, row)
