"""Training data of tiny-lm: prose with notes stated and asked for, quotes, and copied random strings.

Batch `step` is a pure function of (seed, step, length, batch), so a resumed run sees the same data. Every byte
carries a loss weight: prose counts 1, what can be recalled counts more, what is random counts nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tersor import _atomic, zoo
from tersor.kv.bench.tasks import ascii_fold, ask, draw_keys, draw_prose, draw_values, note

# A fixed commit: in another version of the repository the same books lack their headers, hence differ in checksum.
BOOKS_COMMIT = "f9edc0ac68ef4d4bc6b16cbc1a3d68d5783a7e28"
BOOKS_URL = f"https://github.com/mlschmitt/classic-books-markdown/archive/{BOOKS_COMMIT}.zip"
TEST_BOOK = "Robert Louis Stevenson - Treasure Island"
VALIDATION_BOOKS = (
    "H.G. Wells - The First Men in the Moon",
    "Henry James - The Turn of the Screw",
    "Lewis Carroll - Through the Looking-Glass",
)
W_PROSE, W_ANSWER, W_QUOTE, W_COPY, W_SYNTAX = 1.0, 8.0, 2.0, 1.0, 0.1
QUOTE_BLIND = 6  # first bytes of a quote, which nothing can predict


@dataclass(frozen=True)
class Books:
    """Folded text of the books, split by book; sha256 of the raw files by name."""

    train: list[str]
    validation: str
    test: str
    sha256: dict[str, str]


def fetch_books(folder: Path, url: str = BOOKS_URL) -> Path:
    """Fetch the public-domain books (65, 39 MB) into ``folder`` as ``Author - Title.txt``; finished ones stay.

    Raises ValueError when a book is missing or differs from the one that the shipped checkpoint was trained on.
    """
    wanted = json.loads((zoo.path("tiny-lm") / "recipe.lock.json").read_text(encoding="utf-8"))["sha256"]
    if all((folder / f"{name}.txt").is_file() for name in wanted):
        return folder
    with urllib.request.urlopen(url, timeout=60) as answer:
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    found = {}
    for entry in archive.namelist():
        path = Path(entry)
        if path.suffix == ".md":
            found[f"{path.parent.name} - {path.stem}"] = archive.read(entry)
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in wanted.items():
        if name not in found or hashlib.sha256(found[name]).hexdigest() != digest:
            raise ValueError(f"{url}: {name!r} is missing or has changed; give a folder of the books with --data")
        _atomic.write_text(folder / f"{name}.txt", found[name].decode("utf-8"))
    return folder


def read_books(folder: Path, min_bytes: int = 40_000) -> Books:
    """Read *.txt and split by book; raises ValueError when the folder cannot serve as training data."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"no *.txt books in {folder}")
    texts = {f.stem: ascii_fold(f.read_text(encoding="utf-8")) for f in files}
    held_out = {TEST_BOOK, *VALIDATION_BOOKS}
    if missing := sorted(held_out - set(texts)):
        raise ValueError(f"the held-out books are missing from {folder}: {', '.join(missing)}")
    train = [t for name, t in texts.items() if name not in held_out and len(t) >= min_bytes]
    if not train:
        raise ValueError(f"no training book of at least {min_bytes} bytes in {folder}")
    sums = {f.stem: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return Books(train, "\n".join(texts[v] for v in VALIDATION_BOOKS), texts[TEST_BOOK], sums)


class Writer:
    """One training sequence under construction: bytes with a loss weight each."""

    def __init__(self, rng: np.random.Generator, prose: str, length: int) -> None:
        self.rng, self.prose, self.length = rng, prose, length
        self.at = 0  # next byte of the prose to use
        self.text: list[str] = []
        self.weights: list[float] = []
        self.keys = draw_keys(rng, 64)
        self.values = draw_values(rng, 64)
        self.stated: list[tuple[str, str]] = []  # (key, answer) of every note so far, aliases included
        self.roots: list[tuple[str, str]] = []

    def put(self, text: str, weight: float) -> None:
        self.text.append(text)
        self.weights.extend([weight] * len(text))

    @property
    def full(self) -> bool:
        return len(self.weights) >= self.length

    def read_on(self, n_bytes: int) -> None:
        """About n_bytes more of the book, up to the end of a word."""
        if n_bytes < 2:
            return
        end = self.prose.find(" ", self.at + n_bytes)
        end = len(self.prose) if end < 0 else end + 1
        self.put(self.prose[self.at : end], W_PROSE)
        self.at = end

    def state(self, alias: bool) -> None:
        """A new note; an alias points at an earlier root."""
        key, value = self.keys.pop(), self.values.pop()
        if alias and self.roots:
            root, root_value = self.roots[int(self.rng.integers(len(self.roots)))]
            self.stated.append((key, f"{root}={root_value}"))
            text = note(key, root)
        else:
            self.roots.append((key, value))
            self.stated.append((key, value))
            text = note(key, value)
        self.put(text[:3], W_SYNTAX)
        self.put(text[3:-3], 0.0)
        self.put(text[-3:], W_SYNTAX)

    def ask(self, key: str, answer: str) -> None:
        self.put(ask(key), 0.0)
        self.put("=", W_SYNTAX)
        self.put(answer, W_ANSWER)
        self.put("}}\n", W_SYNTAX)

    def quote(self) -> None:
        """Quote a stretch of what has been written so far, anywhere."""
        written = "".join(self.text)
        size = int(self.rng.integers(20, 48))
        if len(written) < 2 * size:
            return
        start = int(self.rng.integers(0, len(written) - size))
        if "{{" in written[max(0, start - 1) : start + size + 1]:  # a question is not part of the book
            return
        self.put("\n{{", W_SYNTAX)
        self.put(written[start : start + QUOTE_BLIND], 0.0)
        self.put(written[start + QUOTE_BLIND : start + size], W_QUOTE)
        self.put("}}\n", W_SYNTAX)

    def question(self, p_quote: float) -> None:
        if not self.stated or self.rng.random() < p_quote:
            self.quote()
        else:
            self.ask(*self.stated[int(self.rng.integers(len(self.stated)))])


def notes_sequence(w: Writer, dense: float) -> None:
    """Prose with notes; questions either run all through it or are kept for the tail."""
    rng = w.rng
    gap = float(np.exp(rng.uniform(np.log(3), np.log(3 + 100 * (1 - dense) + 10))))
    limit = int(rng.integers(1, 1 + min(24, max(4, w.length // 40))))
    p_alias = float(rng.choice([0.0, 0.3, 0.5]))
    p_quote = float(rng.choice([0.1, 0.5, 0.9]))
    tail = w.length * (rng.uniform(0.3, 0.9) if rng.random() < 0.5 else 2.0)
    p_state = limit / (limit + w.length / (gap + 14))  # spread the notes over the sequence
    p_state = max(p_state, 0.3) if tail > w.length else 1.0
    every = gap if tail > w.length else max(gap, tail / limit - 13)
    while not w.full:
        if len(w.weights) < tail:
            w.read_on(int(rng.exponential(every)))
        if len(w.stated) < limit and rng.random() < p_state and len(w.weights) < tail:
            w.state(rng.random() < p_alias)
        elif len(w.weights) >= tail or tail > w.length:
            w.question(p_quote)


def copy_sequence(w: Writer) -> None:
    """Random strings that repeat: what makes induction heads form fastest."""
    rng = w.rng
    low, high = ((32, 127), (65, 91), (48, 58), (97, 123))[int(rng.integers(4))]
    size = int(rng.integers(8, w.length // 2))
    block = "".join(map(chr, rng.integers(low, high, size=size)))
    w.put(block, 0.0)
    while not w.full:
        start = int(rng.integers(0, size // 2))
        part = block[start : start + int(rng.integers(size // 4, size + 1))]
        w.put(part[:4], 0.0)
        w.put(part[4:], W_COPY)


def sequence(rng: np.random.Generator, books: list[str], length: int, dense: float) -> tuple[bytes, list[float]]:
    """`length` bytes and their weights; `dense` in [0, 1] moves the mix from prose to recall supervision."""
    sizes = np.array([len(b) for b in books], dtype=float) ** 0.5
    book = books[int(rng.choice(len(books), p=sizes / sizes.sum()))]
    w = Writer(rng, draw_prose(rng, book, 2 * length + 256), length)
    kind = rng.random()
    if kind < 0.05 + 0.25 * dense:
        copy_sequence(w)
    elif kind < 0.30 + 0.10 * dense:
        w.read_on(length)
    else:
        notes_sequence(w, dense)
    return "".join(w.text).encode("ascii")[:length], w.weights[:length]


def batch(
    books: list[str], *, seed: int, step: int, length: int, size: int, dense: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [size, length] int64 and loss weights [size, length] float32 of one step."""
    tokens = np.empty((size, length), dtype=np.int64)
    weights = np.empty((size, length), dtype=np.float32)
    for row in range(size):
        rng = np.random.default_rng([seed, step, row])
        text, weight = sequence(rng, books, length, dense)
        tokens[row] = np.frombuffer(text, dtype=np.uint8)
        weights[row] = weight
    weights[:, 0] = 0.0
    return tokens, weights
