"""A user's texts as pieces of equal length: a piece is mostly prompt, and its end is what the model must foresee."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor._errors import TersorError

#: Pieces that there must be: half of them choose, and the others say what the choice is worth.
LEAST = 8


def read_texts(file: Path) -> list[str]:
    """The texts in ``file``: of a ``.jsonl`` each row's "text", of any other file the whole.

    Raises:
        ValueError: If there is no such file, or none of that in it.
    """
    if not file.is_file():
        raise TersorError(f"--texts {file}: no such file")
    try:
        whole = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TersorError(f"--texts {file} is not UTF-8 text") from None
    if file.suffix != ".jsonl":
        return [whole]
    texts = []
    for number, line in enumerate(whole.splitlines(), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, RecursionError):
                texts.append(None)
            if not isinstance(texts[-1], str):
                raise TersorError(f'--texts {file}: line {number} must be an object with a "text", a string')
    return texts


def cut(texts: list[str], tokenizer: Any, tokens: int) -> Tensor:
    """Pieces ``[pieces, tokens]`` of the texts, one after the other and each by itself; shorter rests are left out.

    Every piece begins as the tokenizer begins a text.

    Raises:
        ValueError: If there are fewer than `LEAST`.
    """
    start = tokenizer("")["input_ids"]
    start = start[:1] if start[:1] == [tokenizer.bos_token_id] else []
    own = tokens - len(start)
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [start + ids[at : at + own] for at in range(0, len(ids) - own + 1, own)]
    if len(pieces) < LEAST:
        raise TersorError(
            f"--texts holds {len(pieces)} pieces of {tokens} tokens, and it takes {LEAST}; give more text, or shorter "
            "pieces with --tokens"
        )
    return torch.tensor(pieces)


def halves(pieces: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two halves of at most ``count`` pieces, drawn by ``seed``: those that choose, and those held out."""
    drawn = np.random.default_rng(seed).permutation(len(pieces))[: min(count, len(pieces)) // 2 * 2]
    first, second = np.split(drawn, 2)
    return pieces[first], pieces[second]
