from __future__ import annotations

import pytest

from tersor.web.tokens import Signer


@pytest.mark.parametrize("text", ["", "Anna", "Zoë 王:;=", "x" * 500])
def test_what_was_signed_is_read_back(text: str) -> None:
    signer = Signer()
    token = signer.sign("visitor", text)
    assert signer.read("visitor", token) == (text or None)
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def test_what_was_not_signed_here_and_for_this_is_no_token() -> None:
    signer = Signer(b"key")
    token = signer.sign("visitor", "Anna")
    other = signer.sign("visitor", "Eve").partition(".")[0] + "." + token.partition(".")[2]
    for wrong in (None, "", ".", "x", "x.y", token[:-1], token + "a", other, "é.é", "A.A"):
        assert signer.read("visitor", wrong) is None, wrong
    assert signer.read("form", token) is None and Signer().read("visitor", token) is None
    assert Signer(b"key").read("visitor", token) == "Anna"
