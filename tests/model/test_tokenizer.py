"""Prompts become token ids: text, messages through the chat template, or ids as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors

from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import Message, Prompt
from tests.helpers.models import word_tokenizer
from tests.helpers.tokenizers import byte_level


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(),
        Prompt(text="w1", token_ids=(1,)),
        Prompt(text="w1", messages=(Message("user", "w1"),)),
        Prompt(text="", token_ids=(1,)),
        Prompt(text=""),
        Prompt(messages=(), token_ids=()),
        Prompt(messages=(Message("tool", "w1"),)),
    ],
)
def test_wrong_prompts_are_refused(prompt: Prompt) -> None:
    """None, two forms, empty, a role the template refuses: the client's error, never a crash in the
    loop."""
    with pytest.raises(InvalidRequestError):
        Tokenizer(word_tokenizer()).encode(prompt)


def test_messages_without_a_template_say_what_to_do() -> None:
    """A base model has no template: guessing one would give silently bad answers."""
    with pytest.raises(InvalidRequestError, match="chat_template"):
        byte_level().encode(Prompt(messages=(Message("user", "hi"),)))


def test_messages_go_through_the_template() -> None:
    """The answer must begin after the generation prompt, and special tokens in it must be single
    ids."""
    tokenizer = Tokenizer(word_tokenizer())
    ids = tokenizer.encode(Prompt(messages=(Message("user", "w1 7"),)))
    assert [tokenizer.hf.convert_ids_to_tokens(i) for i in ids] == [
        "<user>",
        "w1",
        "7",
        "<eos>",
        "<assistant>",
    ]
    assert tokenizer.encode(Prompt(token_ids=(5, 6))) == (5, 6)


def test_there_is_never_a_second_bos() -> None:
    """Llama's template writes <bos> itself; encoding its text with special tokens would give
    two."""
    hf = word_tokenizer()
    hf._tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", 5)]
    )
    hf.chat_template = "w0 {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = Tokenizer(hf)
    assert tokenizer.encode(Prompt(text="w1 w2")) == (5, 6, 7)
    assert tokenizer.encode(Prompt(messages=(Message("user", "w1 w2"),))) == (5, 6, 7)


def test_a_configured_chat_template_replaces_the_folders_own(models: dict[str, Path]) -> None:
    """An operator's template that is ignored leaves a base model without chat."""
    tokenizer = Tokenizer.load(models["slm"], chat_template="w3 {{ messages[0].content }}")
    assert tokenizer.encode(Prompt(messages=(Message("user", "w1"),))) == (8, 6)


def test_a_folder_without_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    """The operator sees which folder, not a stack of transformers."""
    with pytest.raises(ModelLoadError, match="tokenizer"):
        Tokenizer.load(tmp_path)
