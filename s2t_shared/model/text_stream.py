"""Streamed text: it never ends inside a character, and never contains a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from s2t_shared.model.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
WINDOW = 16  # tokens that are decoded at once
WINDOW_CONTEXT = 4  # tokens of a window that the next one starts with


class StopMatcher:
    """Finds one stop string in text that comes in pieces, in linear time (Knuth-Morris-Pratt).

    matched: length in characters of the longest end of the text that begins the stop string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # borders[n]: length of the longest proper end of stop[:n] that also begins the stop string.
        self._borders = [0, 0]
        for character in stop[1:]:
            self._borders.append(self._extended(self._borders[-1], character))

    def feed(self, piece: str) -> int | None:
        """Add a piece. Returns the characters of it up to the stop string's end; None: not found.

        Only the first stop string is found.
        """
        for read, character in enumerate(piece, 1):
            self.matched = self._extended(self.matched, character)
            if self.matched == len(self.stop):
                return read
        return None

    def _extended(self, matched: int, character: str) -> int:
        """The matched length after one more character."""
        while matched and self.stop[matched] != character:
            matched = self._borders[matched]
        return matched + (self.stop[matched] == character)


class TextStream:
    """Turns token ids into pieces of final text.

    Holds back what may be part of a character or of a stop string.

    >>> stream.push(token_id)   # "" while a character is incomplete
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [StopMatcher(string) for string in stop if string]
        self._ids: list[int] = []
        # Only a window of the last tokens is decoded: long answers take linear time.
        self._window_start = 0
        self._window_text = ""
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token. Returns the text that has become final."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        window = self._decode(self._window_start)
        if window.endswith(REPLACEMENT):
            return ""
        new = window[len(self._window_text) :]
        self._window_text = window
        if len(self._ids) - self._window_start >= WINDOW:
            self._move_window()
        return self._release(new, final=False)

    def finish(self) -> str:
        """Returns the rest at the end of the answer. An incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        window = self._decode(self._window_start)
        new = window[len(self._window_text) :]
        self._window_text = window
        return self._release(new, final=True)

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._ids[start:])

    def _move_window(self) -> None:
        # The last tokens stay as context: without text before it, a word may lose its space.
        start = len(self._ids) - WINDOW_CONTEXT
        context = self._decode(start)
        if context.strip():
            self._window_start = start
            self._window_text = context

    def _release(self, new: str, final: bool) -> str:
        """Add decoded text, cut it at the first stop string, and return what may be sent."""
        stop_starts = []
        for stop in self._stops:
            end = stop.feed(new)
            if end is not None:
                stop_starts.append(len(self.text) + end - len(stop.stop))
        self.text += new
        if stop_starts:
            self.text = self.text[: min(stop_starts)]
            self.stopped = True
        sendable = len(self.text)
        if not final and not self.stopped:
            sendable -= max((stop.matched for stop in self._stops), default=0)
        piece = self.text[self._sent : sendable]
        self._sent = max(self._sent, sendable)
        return piece
