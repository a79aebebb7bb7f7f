"""Prompts of one template are one group, whatever fills it; other templates are other groups."""

from __future__ import annotations

import pytest

from s2t_shared.data.templates import prompt_group, template_of
from s2t_shared.types import Message, Prompt

SHARED = [
    "Maria has 14 apples. She gives 3 of them to her brother and buys 2.5 more. How many are left?",
    "Tom has 5 old coins. He gives 1 of them to his sister and buys 12 more. How many are left?",
]
OTHER = "A train leaves at 9 and is 40 km from the town after an hour. When will it be there?"


def test_numbers_names_and_things_do_not_tell_templates_apart() -> None:
    groups = {prompt_group(Prompt(text=text)) for text in SHARED}
    assert len(groups) == 1
    assert prompt_group(Prompt(text=OTHER)) not in groups


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("Add 12 and 3.5", "@ # and #"),
        ("sort: pear, Plum, fig", "sort pear @ fig"),
        ("Solve for x: 3*x = 12", "@ for @ # @ #"),
        ("", ""),
    ],
)
def test_a_text_with_few_function_words_keeps_its_other_words(text: str, template: str) -> None:
    assert template_of(text) == template


def test_messages_count_as_their_text_and_token_ids_have_no_template() -> None:
    chat = Prompt(messages=(Message("user", SHARED[0]),))
    assert prompt_group(chat) == prompt_group(Prompt(text=SHARED[1]))
    assert prompt_group(Prompt(token_ids=(1, 2))) == ""


def test_what_stands_in_quotation_marks_is_content() -> None:
    question = 'How many times does the letter "{}" appear in the text: "{}"? Give only the number.'
    first = question.format("h", "and then there were none of them")
    second = question.format("a", "a cat with a hat")
    assert template_of(first) == template_of(second)
