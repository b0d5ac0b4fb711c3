"""Recall tasks planted in real prose: what a compressed cache must still be able to look up.

The protocol is the one of RULER and kvpress: `context` is prefilled and compressed, then `question` and
`answer_prefix` arrive, then the model must produce `answer` greedily, byte for byte.

A note is written into the prose as ``[[KX=4827]]`` on a line of its own; it is asked for with ``{{KX`` ``=``.
Text is ASCII throughout, so one character is one byte is one token of a byte-level model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tersor._errors import TersorError

#: Facts planted in the prose; the score that is quoted as "recall" is over these.
PLANTED: tuple[str, ...] = ("line_retrieval", "needle", "multikey_needle", "variable_tracking")
#: All tasks; a quotation is of the book itself, and far harder for a small model.
TASKS: tuple[str, ...] = (*PLANTED, "quote")
KEY_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KEY_LENGTH = 2
VALUE_DIGITS = 4
QUOTE_SHOWN = 24  # bytes of the book that the question quotes ...
QUOTE_PREFIX = 8  # ... of which this many stand in the answer prefix
QUOTE_ASKED = 8  # bytes of the book that the answer must continue with
MIN_CONTEXT_BYTES = 192

_FOLD = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
        "\u2026": "...", "\u00e6": "ae", "\u0153": "oe", "\u00c6": "Ae", "\u0152": "Oe",
        # the note syntax and markdown marks must not occur in the prose itself
        "[": None, "]": None, "{": None, "}": None, "=": None, "*": None, "_": None, "#": None, "\\": None,
    }
)  # fmt: skip
_SPACES = re.compile(r"\s+")
_CONTROL = re.compile(r"[^\n\t -~]")


@dataclass(frozen=True)
class RecallSample:
    """One question on one context; lengths are constant within a task, so batches need no padding."""

    task: str
    context: str
    question: str
    answer_prefix: str
    answer: str


def ascii_fold(text: str) -> str:
    """Prose as printable ASCII with `\\n` between paragraphs; idempotent."""
    plain = unicodedata.normalize("NFKD", text.translate(_FOLD)).encode("ascii", "ignore").decode("ascii")
    plain = plain.translate(_FOLD)
    return _SPACES.sub(lambda m: "\n" if "\n" in m.group() else " ", _CONTROL.sub("", plain)).strip()


def note(key: str, value: str) -> str:
    """A statement as it stands in a context."""
    return f"\n[[{key}={value}]]\n"


def ask(key: str) -> str:
    """The question for a note; the answer prefix is always `=`."""
    return "\n{{" + key


def draw_keys(rng: np.random.Generator, n: int) -> list[str]:
    """n distinct keys."""
    base = len(KEY_LETTERS)
    codes = rng.choice(base**KEY_LENGTH, size=n, replace=False)
    return ["".join(KEY_LETTERS[int(code) // base**i % base] for i in range(KEY_LENGTH)) for code in codes]


def draw_values(rng: np.random.Generator, n: int) -> list[str]:
    """n distinct values, so that a right answer can only come from the right note."""
    codes = rng.choice(10**VALUE_DIGITS, size=n, replace=False)
    return [f"{int(code):0{VALUE_DIGITS}d}" for code in codes]


def draw_prose(rng: np.random.Generator, prose: str, n_bytes: int) -> str:
    """A random stretch of exactly n_bytes of folded prose that starts at a word."""
    start = int(rng.integers(0, len(prose) - n_bytes - 64))
    return prose[(start := _word_start(prose, start)) : start + n_bytes]


def plant(prose: str, notes: list[str], offsets: list[int]) -> str:
    """Insert notes[i] at the word boundary at or after prose offset offsets[i]; offsets must be sorted."""
    parts: list[str] = []
    done = 0
    for text, offset in zip(notes, offsets, strict=True):
        at = max(done, min(_word_start(prose, offset), len(prose)))
        parts += (prose[done:at], text)
        done = at
    return "".join([*parts, prose[done:]])


def recall_samples(task: str, *, n: int, prose: str, seed: int, context_bytes: int = 1024) -> list[RecallSample]:
    """n samples of one task; sample i depends on (task, seed, i, context_bytes) and the prose only.

    len(context + question + answer_prefix) is exactly context_bytes in every sample.
    """
    if task not in TASKS:
        raise TersorError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if n < 1:
        raise TersorError(f"n must be at least 1, got {n}")
    if seed < 0:
        raise TersorError(f"seed must not be negative, got {seed}")
    if context_bytes < MIN_CONTEXT_BYTES:
        raise TersorError(f"context_bytes must be at least {MIN_CONTEXT_BYTES}, got {context_bytes}")
    folded = ascii_fold(prose)
    if len(folded) < 2 * context_bytes + 128:
        raise TersorError(
            f"prose is too short: {len(folded)} bytes after ASCII folding, need {2 * context_bytes + 128}"
        )
    make = _MAKERS[task]
    index = TASKS.index(task)
    return [make(np.random.default_rng([seed, index, i]), folded, context_bytes) for i in range(n)]


def _word_start(text: str, offset: int) -> int:
    """The first offset at or after `offset` where a word starts (0 and len(text) count as such)."""
    if offset <= 0:
        return 0
    space = re.compile(r"[ \n]").search(text, offset - 1)
    return len(text) if space is None else space.end()


def _offsets(rng: np.random.Generator, n: int, low: int, high: int) -> list[int]:
    return sorted(int(x) for x in rng.integers(low, high + 1, size=n))


def _finish(
    rng: np.random.Generator, prose: str, size: int, task: str, notes: list[str], asked: tuple[str, str],
    window: int | None = None,
) -> RecallSample:  # fmt: skip
    """Fill up with prose to `size` bytes, scatter the notes over it (or over a `window` of it) and ask."""
    key, answer = asked
    question, prefix = ask(key), "="
    n_prose = size - len(question) - len(prefix) - sum(map(len, notes))
    text = draw_prose(rng, prose, n_prose)
    low = 0 if window is None else int(rng.integers(0, n_prose - window + 1))
    high = n_prose if window is None else low + window
    return RecallSample(task, plant(text, notes, _offsets(rng, len(notes), low, high)), question, prefix, answer)


def _keyed(
    rng: np.random.Generator, prose: str, size: int, task: str, n_notes: int, window: int | None = None
) -> RecallSample:
    keys, values = draw_keys(rng, n_notes), draw_values(rng, n_notes)
    which = int(rng.integers(n_notes))
    notes = [note(k, v) for k, v in zip(keys, values, strict=True)]
    return _finish(rng, prose, size, task, notes, (keys[which], values[which]), window)


def _line_retrieval(rng: np.random.Generator, prose: str, size: int) -> RecallSample:
    """A block of lines with scraps of prose between them, somewhere in the context (LongEval)."""
    n_lines = max(4, min(24, size // 48))
    return _keyed(rng, prose, size, "line_retrieval", n_lines, window=6 * n_lines)


def _needle(rng: np.random.Generator, prose: str, size: int) -> RecallSample:
    return _keyed(rng, prose, size, "needle", 1)


def _multikey_needle(rng: np.random.Generator, prose: str, size: int) -> RecallSample:
    return _keyed(rng, prose, size, "multikey_needle", max(4, min(12, size // 128)))


def _variable_tracking(rng: np.random.Generator, prose: str, size: int) -> RecallSample:
    """Chains `[[AB=4827]]` ... `[[CD=AB]]`; asked for CD, the answer resolves both hops: `AB=4827`."""
    n_chains = max(2, min(4, size // 256))
    keys, values = draw_keys(rng, 2 * n_chains), draw_values(rng, n_chains)
    roots, aliases = keys[:n_chains], keys[n_chains:]
    # slot order: each chain owns two slots of a shuffled list, the earlier one states the value
    slots = rng.permutation(np.repeat(np.arange(n_chains), 2))
    notes, seen = [], set()
    for chain in map(int, slots):
        notes.append(note(aliases[chain], roots[chain]) if chain in seen else note(roots[chain], values[chain]))
        seen.add(chain)
    which = int(rng.integers(n_chains))
    answer = f"{roots[which]}={values[which]}"
    return _finish(rng, prose, size, "variable_tracking", notes, (aliases[which], answer))


def _quote(rng: np.random.Generator, prose: str, size: int) -> RecallSample:
    """Nothing planted: quote 24 bytes that occur once in the context, ask for the 8 that follow."""
    opening = "\n{{"
    while True:
        context = draw_prose(rng, prose, size - len(opening) - QUOTE_SHOWN)
        for _ in range(8):
            at = int(rng.integers(0, len(context) - QUOTE_SHOWN - QUOTE_ASKED + 1))
            shown = context[at : at + QUOTE_SHOWN]
            if context.count(shown) == 1:
                head, prefix = shown[:-QUOTE_PREFIX], shown[-QUOTE_PREFIX:]
                answer = context[at + QUOTE_SHOWN : at + QUOTE_SHOWN + QUOTE_ASKED]
                return RecallSample("quote", context, opening + head, prefix, answer)


_MAKERS: dict[str, Callable[[np.random.Generator, str, int], RecallSample]] = {
    "line_retrieval": _line_retrieval,
    "needle": _needle,
    "multikey_needle": _multikey_needle,
    "variable_tracking": _variable_tracking,
    "quote": _quote,
}
