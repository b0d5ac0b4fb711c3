"""Tokens that only this process can make: who somebody is, and that a form is from one of our pages."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets


class Signer:
    """Signs texts with a key that no other process has.

    Args:
        key: Secret bytes; drawn if None, so that a restart ends all sessions.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = secrets.token_bytes(32) if key is None else key

    def sign(self, purpose: str, text: str) -> str:
        """``text`` with its signature, in letters that a cookie takes."""
        return f"{_letters(text.encode())}.{self.mark(purpose, text)}"

    def read(self, purpose: str, token: str | None) -> str | None:
        """The text of a token that `sign` made for this purpose; None if it is none."""
        packed, _, mark = (token or "").partition(".")
        try:
            text = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)).decode()
        except ValueError:
            return None
        return text if packed and hmac.compare_digest(mark.encode(), self.mark(purpose, text).encode()) else None

    def mark(self, purpose: str, text: str) -> str:
        """The signature of ``text`` alone."""
        return _letters(hmac.digest(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256))


def _letters(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
