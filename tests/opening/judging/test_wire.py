"""The wire format: addresses, pictures, and replies of every shape."""

from __future__ import annotations

import base64
import io
import math

import pytest
from PIL import Image

from tersor.opening.judging.wire import BrokenReplyError, chat_url, error_text, messages, read_completion, retry_after
from tersor.opening.prompts import Message

END = "/chat/completions"


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h:8000", f"http://h:8000/v1{END}"), ("http://h/", f"http://h/v1{END}"),
        ("http://h/v1", f"http://h/v1{END}"),
        ("http://h/v1/", f"http://h/v1{END}"), (f"http://h/v1{END}", f"http://h/v1{END}"),
        ("https://h/api/v3/openai", f"https://h/api/v3/openai{END}"),
    ],
)  # fmt: skip
def test_a_base_becomes_an_address(base, url) -> None:
    assert chat_url(base) == url


def test_pictures_are_sent_as_the_jpegs_that_they_are(tmp_path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.jpg", "PNG")  # the name lies
    talk = messages(Message("Judge.", ["before", tmp_path / "a.jpg", "after"]), 112, "side")
    assert talk[0] == {"role": "system", "content": "Judge."}
    kinds = [part["type"] for part in talk[1]["content"]]
    assert kinds == ["text", "image_url", "text"]
    head, _, data = talk[1]["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (112, 75))


def reply(message: dict, **choice) -> dict:
    return {"choices": [{"message": message, **choice}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def test_replies_of_every_shape_are_read() -> None:
    plain = read_completion(reply({"content": "A"}))
    assert (plain.text, plain.thought, plain.cut, plain.refused, plain.tokens_in, plain.tokens_out) == (
        "A", False, False, False, 7, 2,
    )  # fmt: skip
    parts = [{"type": "text", "text": "A is "}, {"type": "other"}, {"type": "text", "text": "better"}]
    assert read_completion(reply({"content": parts})).text == "A is better"
    assert read_completion(reply({"content": "A", "reasoning_content": "hm"})).thought
    assert read_completion(reply({"content": None, "reasoning": "hm"}, finish_reason="length")).cut
    assert read_completion(reply({"content": None, "refusal": "no"})).refused
    assert read_completion(reply({"content": "x"}, finish_reason="content_filter")).refused
    candidates = {"A": 0.3, " B": 0.1, "C": 0.5}
    tokens = [{"token": token, "logprob": math.log(chance)} for token, chance in candidates.items()]
    chances = {"content": [{"top_logprobs": tokens}]}
    assert read_completion(reply({"content": "A"}, logprobs=chances)).first_better == pytest.approx(0.75)


@pytest.mark.parametrize(
    "payload",
    [None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "x"}]}, reply({"content": None}),
     reply({"content": ""}), reply({"content": 5})],
)  # fmt: skip
def test_a_reply_without_a_reply_is_broken(payload) -> None:
    with pytest.raises(BrokenReplyError):
        read_completion(payload)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2", 2.0), ("0.5", 0.5), ("900", 120.0), ("-3", 0.0), ("Thu, 01 Jan 1970 00:01:00 GMT", 30.0), ("soon", None),
     ("nan", None), ("", None)],
)  # fmt: skip
def test_a_wait_may_be_seconds_or_a_date_and_has_an_end(value, seconds) -> None:
    assert retry_after({"retry-after": value}, now=30.0) == seconds


def test_errors_are_told_in_one_line() -> None:
    assert error_text({"error": {"message": "a\n b"}}, "") == error_text({"error": "a b"}, "") == "a b"
    assert error_text(None, "<html>") == "<html>" and len(error_text(None, "x" * 9000)) == 300
