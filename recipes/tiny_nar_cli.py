"""What the recipes of the NAR models share: their command line, and a process that is ready to train."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training_state import command_line, started
from transformers.utils import logging


def arguments(name: str, argv: list[str] | None, *, kinds: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of the recipe of ``name``, whose ``--kind`` is one of ``kinds`` if there are any."""
    compared = ", or what it is compared with" if kinds else ""
    parser = command_line(f"{name}{compared}", seeded=False)
    parser.add_argument("--data", default="mnist", help="folder with mnist_png.zip, 'mnist' to fetch, or 'procedural'")
    if kinds:
        parser.add_argument("--kind", choices=kinds, default="nar")
    args = started(parser, argv)
    logging.disable_progress_bar()
    return args
