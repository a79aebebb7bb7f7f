"""Streamed text: characters are never split, stop strings are found and never sent."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.model.text_stream import REPLACEMENT, TextStream
from s2t_shared.model.tokenizer import Tokenizer
from tests.helpers.tokenizers import byte_level, metaspace


def stream_text(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    """The pieces of a streamed answer, the last from `finish`, and the stream."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()], stream


texts = st.text(alphabet="the answer is 0.你好东京🙂👍🏽👩‍é\n", max_size=60)

# -- characters and spaces ------------------------------------------------------------------------


@given(texts)
def test_a_stream_never_splits_a_character(text: str) -> None:
    """One emoji is 4 byte tokens: decoding token by token shows U+FFFD four times instead of the
    emoji."""
    ids = byte_level().encode_text(text)
    pieces, stream = stream_text(byte_level(), ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == stream.text == byte_level().decode(ids) == text


def test_the_corpus_really_splits_characters() -> None:
    """Guards the test above: were every character one token, it could not fail."""
    emoji = byte_level().encode_text("🙂")
    assert len(emoji) >= 2
    assert REPLACEMENT in byte_level().decode(emoji[:1])


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
        expected = metaspace().decode(ids)
        assert "".join(pieces) == expected, f"{words} words before the special tokens"


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    """An answer cut inside a character must not lose its last bytes silently, nor show them
    early."""
    ids = byte_level().encode_text("the 🙂")[:-1]
    pieces, _ = stream_text(byte_level(), ids)
    assert "".join(pieces[:-1]) in ("the", "the ")
    assert REPLACEMENT in pieces[-1]


# -- stop strings ---------------------------------------------------------------------------------


@given(texts, st.sampled_from(["answer", "is 0", "🙂👍", "\n\n", "e", "你好", "rr"]))
def test_a_stop_string_ends_the_text_wherever_token_borders_fall(text: str, stop: str) -> None:
    """A stop string over two tokens must be held back, not sent and then regretted; nothing before
    it is lost."""
    text = text.replace("x", stop)
    pieces, stream = stream_text(byte_level(), byte_level().encode_text(text), (stop,))
    assert "".join(pieces) == stream.text == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@given(st.lists(st.sampled_from(["ab", "abc", "b", "c", "ca", " "]), max_size=12).map("".join))
def test_several_stop_strings_that_overlap(text: str) -> None:
    """Stops that begin inside each other: no stop string may ever be sent, whichever completes
    first."""
    stops = ("abca", "bc", "cc")
    pieces, stream = stream_text(byte_level(), byte_level().encode_text(text), stops)
    sent = "".join(pieces)
    assert sent == stream.text
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert stream.stopped or sent == text


def longest_overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = 0
    for stop in stops:
        for n in range(1, len(stop)):
            if text.endswith(stop[:n]):
                longest = max(longest, n)
    return longest


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
    stream = TextStream(byte_level(), stops)
    sent = ""
    so_far = ""
    for character in text:
        token = byte_level().vocabulary[character]
        sent += stream.push(token)
        so_far += byte_level().decode([token])
        found = [so_far.find(stop) for stop in stops if stop in so_far]
        if found:
            assert stream.stopped
            assert sent == stream.text == so_far[: min(found)]
            return
        assert not stream.stopped
        assert sent == so_far[: len(so_far) - longest_overlap(so_far, stops)]
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
    stop = CountedText("a" * 3000)
    tokens = 200
    a = byte_level().vocabulary["a"]
    b = byte_level().vocabulary["b"]
    CountedText.looked_at = 0
    stream_text(byte_level(), ([a] * 9 + [b]) * (tokens // 10), (stop,))
    assert 0 < CountedText.looked_at <= 4 * (len(stop) + tokens)


def test_nothing_is_said_after_a_stop() -> None:
    """Tokens that were in flight when the stop was found must not leak behind it."""
    ids = byte_level().encode_text("the end the answer")
    stream = TextStream(byte_level(), ("end",))
    for i in ids:
        stream.push(i)
    assert stream.text == "the "
    assert stream.push(ids[0]) == ""
    assert stream.finish() == ""
