"""Text <-> token ids: prompts and chat templates in, text that never splits a character out.

Knows tokenizers; no models. Also home of two facts that both models must agree on: the tokenizer's
digest and the reserved ids R.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer

from s2t_shared.errors import InvalidRequestError, ModelLoadError, TokenizerMismatchError
from s2t_shared.types import Prompt

RESERVED_COUNT = 16
REPLACEMENT = "\ufffd"
WINDOW, WINDOW_CONTEXT = (
    16,
    4,
)  # tokens decoded at once while streaming, and kept of them for the next window
PROBES = (
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
        return dict(self.hf.get_vocab())

    @property
    def size(self) -> int:
        """One more than the largest id that stands for text (spare rows of a model lie at and above
        it)."""
        return max(self.vocabulary.values()) + 1

    @cached_property
    def digest(self) -> str:
        """16 hex digits of vocabulary and behaviour on a few probes; equal for interchangeable
        tokenizers."""
        content = json.dumps([sorted(self.vocabulary.items()), [self._plain(p) for p in PROBES]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def template_digest(self) -> str:
        """16 hex digits of the chat template in use; "" for none."""
        template = self.hf.chat_template
        return hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16] if template else ""

    def _plain(self, text: str) -> list[int]:
        return list(self.hf.encode(text, add_special_tokens=False))

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Text gets the tokenizer's special tokens; messages get the chat
        template, which brings its own; ids are taken as they are.

        Raises: InvalidRequestError: not exactly one form given, empty, or a template that refuses
            the messages.
        """
        given = [prompt.text is not None, bool(prompt.messages), bool(prompt.token_ids)]
        if sum(given) != 1 or prompt.text == "":
            raise InvalidRequestError("give exactly one non-empty of: prompt, messages, token_ids")
        if prompt.token_ids:
            return prompt.token_ids
        ids = self._encode_messages(prompt) if prompt.messages else self.hf.encode(prompt.text)
        if not len(ids):
            raise InvalidRequestError("the prompt is empty: it has no tokens")
        return tuple(int(i) for i in ids)

    def _encode_messages(self, prompt: Prompt) -> list[int]:
        if not self.hf.chat_template:
            raise InvalidRequestError(
                "messages: this model has no chat template; send prompt or token_ids, "
                "or configure chat_template"
            )
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        try:
            text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the border to Jinja: templates raise what they like
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidRequestError(
                f"messages: the chat template refuses them: {reason}"
            ) from error
        return self._plain(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self.hf.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class StopMatcher:
    """Looks for one stop string in text that comes in pieces (Knuth-Morris-Pratt): linear in the
    text.

    `matched`: the longest end of the text so far that begins the stop string, in characters.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        # Of each beginning of the stop string, by its length: its longest proper end that is a
        # beginning too.
        self._borders = [0, 0]
        for character in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def feed(self, piece: str) -> int | None:
        """Characters of `piece` up to the end of the first stop string; None: it is not there
        yet."""
        for read, character in enumerate(piece, 1):
            self.matched = self._longer(self.matched, character)
            if self.matched == len(self.stop):
                return read
        return None

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched]
        return matched + (self.stop[matched] == character)


class TextStream:
    """Folds token ids into text pieces; holds back a piece that ends inside a character or may
    begin a stop string.

    >>> stream.push(token_id)   # "" while a character is incomplete
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [StopMatcher(s) for s in stop if s]
        self._ids: list[int] = []
        self._anchor = 0  # decode from here: a window is enough, and keeps long answers linear
        self._anchor_text = ""
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token; returns the new text that is final."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        window = self._tokenizer.decode(self._ids[self._anchor :])
        if window.endswith(REPLACEMENT):
            return ""
        new, self._anchor_text = window[len(self._anchor_text) :], window
        if len(self._ids) - self._anchor >= WINDOW:
            # The last tokens stay as context: without any text before it, a word may lose its
            # leading space.
            context = self._tokenizer.decode(self._ids[-WINDOW_CONTEXT:])
            if context.strip():
                self._anchor, self._anchor_text = len(self._ids) - WINDOW_CONTEXT, context
        return self._release(new, final=False)

    def finish(self) -> str:
        """The rest, at the end of the answer (an incomplete character shows as U+FFFD)."""
        if self.stopped:
            return ""
        window = self._tokenizer.decode(self._ids[self._anchor :])
        new, self._anchor_text = window[len(self._anchor_text) :], window
        return self._release(new, final=True)

    def _release(self, new: str, final: bool) -> str:
        ends = [(stop, stop.feed(new)) for stop in self._stops]
        found = [len(self.text) + end - len(stop.stop) for stop, end in ends if end is not None]
        self.text += new
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text)
        if not (final or self.stopped):
            end -= max((stop.matched for stop in self._stops), default=0)
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def reserved_ids(tokenizer: Tokenizer, vocab_rows: int) -> tuple[int, ...]:
    """The reserved ids R, ascending = bins 0..15 (paper, S2T-LOCAL): the first 16 of Gemma's
    `<unused*>`, the last 16 of Llama's `<|reserved_special_token_*>`, else the last 16 rows above
    the tokenizer. A model without spare rows gets virtual ones, numbered from `vocab_rows` on: zero
    rows outside its vocabulary."""
    vocabulary = tokenizer.vocabulary
    unused = sorted(i for token, i in vocabulary.items() if token.startswith("<unused"))
    if len(unused) >= RESERVED_COUNT:
        return tuple(unused[:RESERVED_COUNT])
    named = sorted(
        i for token, i in vocabulary.items() if token.startswith("<|reserved_special_token_")
    )
    if len(named) >= RESERVED_COUNT:
        return tuple(named[-RESERVED_COUNT:])
    if vocab_rows - tokenizer.size >= RESERVED_COUNT:
        return tuple(range(vocab_rows - RESERVED_COUNT, vocab_rows))
    return tuple(range(vocab_rows, vocab_rows + RESERVED_COUNT))


def check_same_tokenizer(slm: Tokenizer, llm: Tokenizer) -> None:
    """Raises TokenizerMismatchError saying what differs. The models' numbers of rows are not
    compared."""
    if slm.digest == llm.digest:
        return
    a, b = slm.vocabulary, llm.vocabulary
    differing = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
    if differing:
        shown = ", ".join(
            f"{token!r} is {a.get(token, 'absent')} / {b.get(token, 'absent')}"
            for token in differing[:3]
        )
        what = f"{len(differing)} entries differ ({shown}; vocabulary sizes {len(a)} / {len(b)})"
    else:
        probe = next(p for p in PROBES if slm._plain(p) != llm._plain(p))
        what = (
            f"the vocabularies agree but {probe!r} becomes {slm._plain(probe)} / "
            f"{llm._plain(probe)}"
        )
    raise TokenizerMismatchError(
        f"SLM and LLM must share a tokenizer, but (SLM / LLM) {what}; "
        "choose two models of one family"
    )
