"""What tersor refuses: one family of errors, which commands answer with one line and exit code 2."""

from __future__ import annotations


class TersorError(ValueError):
    """Input that tersor refuses; the message says what was given, what is allowed and what to do."""


class UnsupportedError(TersorError, NotImplementedError):
    """Refused because tersor cannot do it, although it would make sense."""


class WrongTypeError(TersorError, TypeError):
    """Refused because it is of another type."""
