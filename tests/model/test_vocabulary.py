"""What both models must agree on: one tokenizer, and the reserved ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from s2t_shared.errors import TokenizerMismatchError
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import check_same_tokenizer, reserved_ids
from tests.helpers.models import TEXT_IDS, word_tokenizer
from tests.helpers.tokenizers import word_level

# -- reserved ids ---------------------------------------------------------------------------------


def test_reserved_ids_of_gemma_are_its_first_unused() -> None:
    """SLM and LLM of a family must mask the same rows: any other choice breaks published
    versions."""
    unused = [f"<unused{i}>" for i in range(20)]
    assert reserved_ids(word_level(["a", *unused, "b"]), 64) == tuple(range(1, 17))


def test_reserved_ids_of_llama_are_its_last_named() -> None:
    """The first Llama reserved tokens are in use (tool calls): only the last 16 are free."""
    named = [f"<|reserved_special_token_{i}|>" for i in range(20)]
    assert reserved_ids(word_level(["a", *named, "b"]), 64) == tuple(range(5, 21))


def test_reserved_ids_from_padding_rows_or_virtual() -> None:
    """Rows above the tokenizer, the last 16; a model with 15 spare rows must not lose a text row to
    R."""
    tokenizer = word_level([f"w{i}" for i in range(20)])
    assert reserved_ids(tokenizer, 40) == tuple(range(24, 40))
    assert reserved_ids(tokenizer, 36) == tuple(range(20, 36))
    assert reserved_ids(tokenizer, 35) == tuple(range(35, 51))
    assert reserved_ids(tokenizer, 20) == tuple(range(20, 36))


def test_a_few_named_tokens_are_not_enough() -> None:
    """With fewer than 16 names the rule falls through, it does not return a short R."""
    unused = [f"<unused{i}>" for i in range(15)]
    assert reserved_ids(word_level(["a", *unused]), 40) == tuple(range(24, 40))


def test_reserved_ids_of_the_test_models(models: dict[str, Path]) -> None:
    """The same rules through a folder: every engine test leans on these ids."""
    found = {}
    for name, rows in (("slm", 64), ("padding", 72), ("virtual", 48)):
        found[name] = reserved_ids(Tokenizer.load(models[name]), rows)
    assert found == {
        "slm": tuple(range(48, 64)),
        "padding": tuple(range(56, 72)),
        "virtual": tuple(range(48, 64)),
    }


# -- one tokenizer for both models ----------------------------------------------------------------


def test_equal_tokenizers_agree_and_row_counts_do_not_matter(models: dict[str, Path]) -> None:
    """Rows differ inside a family; refusing those would refuse Qwen."""
    check_same_tokenizer(Tokenizer.load(models["slm"]), Tokenizer.load(models["wide_llm"]))
    assert Tokenizer.load(models["padding"]).size == TEXT_IDS


def test_a_vocabulary_mismatch_names_the_entries() -> None:
    """Candidate ids of another vocabulary are other words: the service must refuse to start and say
    why."""
    slm = word_level(["a", "b", "c"])
    swapped = r"2 entries differ \('b' is 1 / 2, 'c' is 2 / 1; vocabulary sizes 3 / 3\)"
    with pytest.raises(TokenizerMismatchError, match=swapped):
        check_same_tokenizer(slm, word_level(["a", "c", "b"]))
    with pytest.raises(TokenizerMismatchError, match="'d' is absent / 3"):
        check_same_tokenizer(slm, word_level(["a", "b", "c", "d"]))


def test_a_behaviour_mismatch_shows_a_probe() -> None:
    """The same vocabulary with another pre-tokenizer splits text differently; comparing
    vocabularies misses it."""
    other = word_tokenizer()
    other._tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerMismatchError, match="the vocabularies agree but"):
        check_same_tokenizer(Tokenizer(word_tokenizer()), Tokenizer(other))
