"""Requests from plain values."""

from __future__ import annotations

import pytest

from s2t_shared.errors import InvalidRequestError
from s2t_shared.requests import new_request
from s2t_shared.types import OnLLMFailure


@pytest.mark.parametrize("choice", OnLLMFailure)
def test_what_happens_without_the_llm_is_the_callers_choice(choice: OnLLMFailure) -> None:
    assert new_request("x", on_llm_failure=choice.value).options.on_llm_failure is choice


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match="choose from degrade, fail"):
        new_request("x", on_llm_failure="retry")
