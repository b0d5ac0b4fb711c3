"""What the recipes of the NAR models share: their command line, and a process that is ready to train."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from training_state import keep_memory
from transformers.utils import logging


def arguments(name: str, argv: list[str] | None, *, kinds: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of the recipe of ``name``, whose ``--kind`` is one of ``kinds`` if there are any."""
    compared = ", or what it is compared with" if kinds else ""
    parser = argparse.ArgumentParser(description=f"Rebuild {name}{compared}.")
    parser.add_argument("--data", default="mnist", help="folder with mnist_png.zip, 'mnist' to fetch, or 'procedural'")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    if kinds:
        parser.add_argument("--kind", choices=kinds, default="nar")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, for a test of the recipe")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_memory()
    logging.disable_progress_bar()
    return args
