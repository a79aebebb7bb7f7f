"""Text in and out: characters are never split, stop strings are found, both models agree on
reserved ids."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from s2t_shared.errors import InvalidRequestError, ModelLoadError, TokenizerMismatchError
from s2t_shared.model.tokenizer import (
    REPLACEMENT,
    TextStream,
    Tokenizer,
    check_same_tokenizer,
    reserved_ids,
)
from s2t_shared.types import Message, Prompt
from tests.helpers.models import TEXT_IDS, word_tokenizer

CORPUS = [
    "the answer is 3.14 and the end",
    "东京 北京 你好世界",
    "🙂🙃👍🏽 family 👩‍👩‍👧",
    "naïve café the the answer",
] * 3


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE (GPT/Qwen/Llama-3 style) so small that most emoji and hanzi are several
    tokens."""
    core = tokenizers.Tokenizer(token_models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"))


@cache
def metaspace() -> Tokenizer:
    """A SentencePiece-like tokenizer (Llama-2/Gemma style): decoding drops the leading space of a
    text."""
    words = ["<unk>", "<sep>", "\u2581", *(f"\u2581{w}" for w in "abcdefgh"), *"abcdefgh"]
    core = tokenizers.Tokenizer(
        token_models.Unigram([(w, -float(len(words) - i)) for i, w in enumerate(words)], 0)
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", additional_special_tokens=["<sep>"]
        )
    )


def stream_text(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()], stream


texts = st.text(alphabet="the answer is 0.你好东京🙂👍🏽👩‍é\n", max_size=60)


@given(texts)
def test_a_stream_never_splits_a_character(text: str) -> None:
    """One emoji is 4 byte tokens: decoding token by token shows U+FFFD four times instead of the
    emoji."""
    ids = byte_level()._plain(text)
    pieces, stream = stream_text(byte_level(), ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == stream.text == byte_level().decode(ids) == text


def test_the_corpus_really_splits_characters() -> None:
    """Guards the test above: were every character one token, it could not fail."""
    assert len(byte_level()._plain("🙂")) >= 2 and REPLACEMENT in byte_level().decode(
        byte_level()._plain("🙂")[:1]
    )


@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_token_ids_stream_to_what_they_decode_to(ids: list[int]) -> None:
    """A model may emit broken bytes and special tokens: the pieces must still add up to the decoded
    whole."""
    ids = [i % byte_level().size for i in ids]
    pieces, _ = stream_text(byte_level(), ids)
    assert "".join(pieces) == byte_level().decode(ids)


@given(st.lists(st.integers(2, 18), max_size=60))
def test_spaces_survive_the_window(ids: list[int]) -> None:
    """Decoding a window from its middle loses the space in front of it (SentencePiece); the text
    would run together."""
    pieces, _ = stream_text(metaspace(), ids)
    assert "".join(pieces) == metaspace().decode(ids)


def test_spaces_survive_a_window_that_begins_with_unprinted_tokens() -> None:
    """When the kept context is special tokens only it decodes to "", and the next word then loses
    its space."""
    a = metaspace().vocabulary["\u2581a"]
    separator = metaspace().vocabulary["<sep>"]
    for words in range(8, 17):
        ids = [a] * words + [separator] * 5 + [a] * 3
        pieces, _ = stream_text(metaspace(), ids)
        assert "".join(pieces) == metaspace().decode(ids), (
            f"{words} words before the special tokens"
        )


@given(texts, st.sampled_from(["answer", "is 0", "🙂👍", "\n\n", "e", "你好", "rr"]))
def test_a_stop_string_ends_the_text_wherever_token_borders_fall(text: str, stop: str) -> None:
    """A stop string over two tokens must be held back, not sent and then regretted; nothing before
    it is lost."""
    text = text.replace("x", stop)
    pieces, stream = stream_text(byte_level(), byte_level()._plain(text), (stop,))
    assert "".join(pieces) == stream.text == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@given(st.lists(st.sampled_from(["ab", "abc", "b", "c", "ca", " "]), max_size=12).map("".join))
def test_several_stop_strings_that_overlap(text: str) -> None:
    """Stops that begin inside each other: no stop string may ever be sent, whichever completes
    first."""
    stops = ("abca", "bc", "cc")
    pieces, stream = stream_text(byte_level(), byte_level()._plain(text), stops)
    sent = "".join(pieces)
    assert sent == stream.text and text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops) and (
        stream.stopped or sent == text
    )


def longest_overlap(text: str, stops: tuple[str, ...]) -> int:
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3).map(tuple),
)
def test_what_is_held_back_is_what_may_still_begin_a_stop_string(
    text: str, stops: tuple[str, ...]
) -> None:
    """Stop strings that repeat themselves ("aabaab"): after each token, all is sent but the longest
    end of the text that begins a stop string, and the answer ends where the first one found
    begins."""
    stream, sent, so_far = TextStream(byte_level(), stops), "", ""
    for token in (byte_level().vocabulary[character] for character in text):
        sent, so_far = sent + stream.push(token), so_far + byte_level().decode([token])
        if found := [so_far.find(stop) for stop in stops if stop in so_far]:
            assert stream.stopped and sent == stream.text == so_far[: min(found)]
            return
        assert not stream.stopped and sent == so_far[: len(so_far) - longest_overlap(so_far, stops)]
    assert sent + stream.finish() == text


class CountedText(str):
    """Counts how many of its characters are looked at."""

    looked_at = 0

    def __getitem__(self, key: Any) -> str:
        found = super().__getitem__(key)
        CountedText.looked_at += len(found)
        return found


def test_a_long_stop_string_costs_a_few_looks_for_each_character() -> None:
    """Copying every beginning of the stop string for every token froze a replica: 12 ms a token at
    30,000 characters. The text keeps beginning the stop string, which is the worst case."""
    stop, pieces = CountedText("a" * 3000), 200
    a, b = byte_level().vocabulary["a"], byte_level().vocabulary["b"]
    CountedText.looked_at = 0
    stream_text(byte_level(), ([a] * 9 + [b]) * (pieces // 10), (stop,))
    assert CountedText.looked_at <= 4 * (len(stop) + pieces)


def test_nothing_is_said_after_a_stop() -> None:
    """Tokens that were in flight when the stop was found must not leak behind it."""
    ids = byte_level()._plain("the end the answer")
    stream = TextStream(byte_level(), ("end",))
    for i in ids:
        stream.push(i)
    assert stream.text == "the " and stream.push(ids[0]) == "" and stream.finish() == ""


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    """An answer cut inside a character must not lose its last bytes silently, nor show them
    early."""
    ids = byte_level()._plain("the 🙂")[:-1]
    pieces, _ = stream_text(byte_level(), ids)
    assert "".join(pieces[:-1]) in ("the", "the ") and REPLACEMENT in pieces[-1]


# -- reserved ids ---------------------------------------------------------------------------------


def named(tokens: list[str]) -> Tokenizer:
    core = tokenizers.Tokenizer(
        token_models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0])
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, unk_token=tokens[0]))


def test_reserved_ids_of_gemma_are_its_first_unused() -> None:
    """SLM and LLM of a family must mask the same rows: any other choice breaks published
    versions."""
    assert reserved_ids(named(["a", *(f"<unused{i}>" for i in range(20)), "b"]), 64) == tuple(
        range(1, 17)
    )


def test_reserved_ids_of_llama_are_its_last_named() -> None:
    """The first Llama reserved tokens are in use (tool calls): only the last 16 are free."""
    tokenizer = named(["a", *(f"<|reserved_special_token_{i}|>" for i in range(20)), "b"])
    assert reserved_ids(tokenizer, 64) == tuple(range(5, 21))


def test_reserved_ids_from_padding_rows_or_virtual() -> None:
    """Rows above the tokenizer, the last 16; a model with 15 spare rows must not lose a text row to
    R."""
    tokenizer = named([f"w{i}" for i in range(20)])
    assert reserved_ids(tokenizer, 40) == tuple(range(24, 40))
    assert reserved_ids(tokenizer, 36) == tuple(range(20, 36))
    assert reserved_ids(tokenizer, 35) == tuple(range(35, 51))
    assert reserved_ids(tokenizer, 20) == tuple(range(20, 36))


def test_a_few_named_tokens_are_not_enough() -> None:
    """With fewer than 16 names the rule falls through, it does not return a short R."""
    assert reserved_ids(named(["a", *(f"<unused{i}>" for i in range(15))]), 40) == tuple(
        range(24, 40)
    )


def test_reserved_ids_of_the_test_models(models: dict[str, Path]) -> None:
    """The same rules through a folder: every engine test leans on these ids."""
    found = {
        name: reserved_ids(Tokenizer.load(models[name]), rows)
        for name, rows in (("slm", 64), ("padding", 72), ("virtual", 48))
    }
    assert found == {
        "slm": tuple(range(48, 64)),
        "padding": tuple(range(56, 72)),
        "virtual": tuple(range(48, 64)),
    }


# -- prompts --------------------------------------------------------------------------------------


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


# -- one tokenizer for both models ----------------------------------------------------------------


def test_equal_tokenizers_agree_and_row_counts_do_not_matter(models: dict[str, Path]) -> None:
    """Rows differ inside a family; refusing those would refuse Qwen."""
    check_same_tokenizer(Tokenizer.load(models["slm"]), Tokenizer.load(models["wide_llm"]))
    assert Tokenizer.load(models["padding"]).size == TEXT_IDS


def test_a_vocabulary_mismatch_names_the_entries() -> None:
    """Candidate ids of another vocabulary are other words: the service must refuse to start and say
    why."""
    with pytest.raises(
        TokenizerMismatchError,
        match=r"2 entries differ \('b' is 1 / 2; 'c' is 2 / 1|'b' is 1 / 2, ",
    ):
        check_same_tokenizer(named(["a", "b", "c"]), named(["a", "c", "b"]))
    with pytest.raises(TokenizerMismatchError, match="'d' is absent / 3"):
        check_same_tokenizer(named(["a", "b", "c"]), named(["a", "b", "c", "d"]))


def test_a_behaviour_mismatch_shows_a_probe() -> None:
    """The same vocabulary with another pre-tokenizer splits text differently; comparing
    vocabularies misses it."""
    other = word_tokenizer()
    other._tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerMismatchError, match="the vocabularies agree but"):
        check_same_tokenizer(Tokenizer(word_tokenizer()), Tokenizer(other))
