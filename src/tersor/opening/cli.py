"""`tersor opening`: from instances to a ranking. Each command may be given again, and says what comes next."""

from __future__ import annotations

import typer

from tersor.opening.cli_data import generate, import_outputs, init, sample
from tersor.opening.cli_judging import doctor, import_verdicts, judge, score
from tersor.opening.cli_results import RESULTS
from tersor.opening.intjudge.cli import references

opening = typer.Typer(
    help="Open-ended answers in text and pictures, compared in pairs: the OpenING benchmark and its arena.",
    no_args_is_help=True,
)
for command in (init, generate, import_outputs, sample, judge, import_verdicts, score, doctor, references):
    opening.command(command.__name__.replace("_", "-"))(command)
for name, function in RESULTS.items():
    opening.command(name)(function)
