"""Text <-> token ids, by a Hugging Face tokenizer and its chat template. Knows no models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer

from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.types import Prompt

PROBES = (  # texts whose tokens are part of a tokenizer's digest
    "The answer is 3.14, isn't it?",
    "  x = [1, 2]\n\treturn x",
    "12345 67890",
    "naïve café – 東京 🙂",
    "Q A . + -",
)


class TextTokenizer(Protocol):
    """What turns prompts into ids and ids into text: `Tokenizer`, or a scripted one in tests."""

    @property
    def digest(self) -> str: ...

    @property
    def template_digest(self) -> str: ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Tokenizer:
    """A Hugging Face tokenizer with the few operations the service needs."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> Tokenizer:
        """Load from a model folder; `chat_template` (Jinja text) replaces the folder's own.

        Raises:
            ModelLoadError: there is no usable tokenizer.
        """
        try:
            hf = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ModelLoadError(f"no usable tokenizer in {folder.name!r}: {reason}") from error
        if chat_template is not None:
            hf.chat_template = chat_template
        return cls(hf)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token ids by token."""
        return dict(self.hf.get_vocab())

    @property
    def size(self) -> int:
        """The largest id that stands for text, plus one. Spare rows of a model start here."""
        return max(self.vocabulary.values()) + 1

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the vocabulary and of the tokens of a few probe texts.

        Interchangeable tokenizers have equal digests.
        """
        probes = [self.encode_text(probe) for probe in PROBES]
        return _digest([sorted(self.vocabulary.items()), probes])

    @cached_property
    def template_digest(self) -> str:
        """16 hex digits of the chat template; "" without one."""
        template = self.hf.chat_template
        return _digest(template) if template else ""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, without the special tokens that start or end a prompt."""
        return list(self.hf.encode(text, add_special_tokens=False))

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Text gets the tokenizer's special tokens. Messages get the chat template, which brings its
        own. Ids are taken as they are.

        Raises:
            InvalidRequestError: not exactly one form given, empty, or a template that refuses the
                messages.
        """
        forms = [prompt.text is not None, bool(prompt.messages), bool(prompt.token_ids)]
        if sum(forms) != 1 or prompt.text == "":
            raise InvalidRequestError(
                "give exactly one non-empty of: prompt, messages, token_ids", field="prompt"
            )
        if prompt.token_ids:
            return prompt.token_ids
        if prompt.messages:
            ids = self.encode_text(self._rendered_messages(prompt))
        else:
            ids = self.hf.encode(prompt.text)
        if len(ids) == 0:
            raise InvalidRequestError("the prompt is empty: it has no tokens", field="prompt")
        return tuple(int(i) for i in ids)

    def _rendered_messages(self, prompt: Prompt) -> str:
        """The messages as the chat template writes them."""
        if not self.hf.chat_template:
            raise InvalidRequestError(
                "messages: this model has no chat template; send prompt or token_ids, "
                "or configure chat_template",
                field="messages",
            )
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        try:
            text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the border to Jinja: templates raise what they like
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidRequestError(
                f"messages: the chat template refuses them: {reason}", field="messages"
            ) from error
        return str(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text = self.hf.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _digest(content: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
