"""Text as it comes: joined it is what the tokens say, and nothing is shown that must be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import TEMPLATE

from tersor import zoo
from tersor._errors import TersorError
from tersor.experts.server.sampling import Picked
from tersor.experts.server.text import TextStream, Tongue


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is special."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return bytes(each for each in ids if each < 256).decode("utf-8", errors="replace")


def streamed(
    text: str, stops: Sequence[str] = (), ids: Sequence[int] | None = None
) -> tuple[list[str], TextStream, int]:
    """The pieces, the stream, and how many tokens were pushed."""
    tongue: Any = Bytes()
    stream = TextStream(tongue, stops)
    pieces, count = [], 0
    for token in text.encode() if ids is None else ids:
        pieces.append(stream.push(Picked(token))[0])
        count += 1
        if stream.stopped:
            break
    return [*pieces, stream.finish()[0]], stream, count


@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_characters_stay_whole(text: str) -> None:
    pieces, stream, _ = streamed(text)
    assert "".join(pieces) == stream.text == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text


LETTERS = st.text(alphabet="ab", min_size=1, max_size=4)


@given(st.text(alphabet="ab", max_size=20), st.lists(LETTERS, min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_wherever_chunks_begin(text: str, stops: list[str]) -> None:
    pieces, stream, count = streamed(text, stops)
    # The first one that is complete ends the text; of two that are at once, the longer one is cut off.
    ends = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert stream.stopped == (ends is not None) and count == (len(text) if ends is None else ends)
    wanted = text if ends is None else text[: min(ends - len(stop) for stop in stops if text[:ends].endswith(stop))]
    assert "".join(pieces) == stream.text == wanted


def test_what_may_begin_a_stop_is_held_back_and_given_out_when_it_does_not() -> None:
    pieces, _, _ = streamed("xaby", ["abc"])
    assert pieces == ["x", "", "", "aby", ""]
    pieces, _, _ = streamed("xab", ["abc"])
    assert pieces == ["x", "", "", "ab"]


def test_a_character_that_never_becomes_whole_is_shown_as_what_it_is() -> None:
    pieces, _, _ = streamed("", ids=[97, 0xE2, 0x82])
    assert "".join(pieces) == b"a\xe2\x82".decode(errors="replace")


def test_tokens_come_with_the_text_that_they_begin_in() -> None:
    tongue: Any = Bytes()
    stream = TextStream(tongue, ["b!"])
    came = [stream.push(Picked(token)) for token in "a\u20acb".encode()] + [stream.finish()]
    assert [(text, [each.token for each in picked]) for text, picked in came] == [
        ("a", [97]), ("", []), ("", []), ("\u20ac", [0xE2, 0x82, 0xAC]), ("", []), ("b", [98]),
    ]  # fmt: skip
    stopped = TextStream(tongue, ["b!"])
    tokens = [each.token for token in b"ab!" for each in stopped.push(Picked(token))[1]]
    assert tokens == [97] and stopped.stopped and stopped.finish() == ("", [])


def test_a_special_token_has_no_text() -> None:
    pieces, stream, _ = streamed("", ids=[97, 256])
    assert pieces == ["a", "", ""] and stream.text == "a"


def test_a_conversation_needs_a_template_that_takes_it() -> None:
    _, tokenizer = zoo.load("tiny-experts")
    with pytest.raises(TersorError, match="no chat template"):
        Tongue(tokenizer, tokenizer).chat([{"role": "user", "content": "a"}])
    tokenizer.chat_template = TEMPLATE
    tongue = Tongue(tokenizer, tokenizer)
    assert tongue.chat([{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]) == tongue.encode("abc")
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(TersorError, match="only one turn"):
        tongue.chat([{"role": "user", "content": "a"}])
