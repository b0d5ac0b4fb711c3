"""What holds for the options of every command, whoever wrote the command."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from tersor._atomic import try_out
from tersor._errors import TersorError

#: The ``metavar`` of an ``--out`` that becomes a folder; every other one becomes a file.
FOLDER = "FOLDER"
#: What becomes a file or a folder; the second is diffusers' name.
_OUT = ("--out", "--output-dir", "--save-cache")
#: What a seed or a count may be at most: tensors hold no larger whole number.
_LARGEST = 2**63 - 1


def check_options(command: Any) -> None:
    """Have every command below ``command``, a click command or group, check its options before it starts."""
    for each in getattr(command, "commands", {}).values():
        check_options(each)
    if not hasattr(command, "commands"):
        command.callback = _checked(command.callback, {each.name: each for each in command.params})


def _checked(run: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def checked(**values: Any) -> Any:
        for name, value in values.items():
            if name in options:
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    _check(options[name], each)
        try:
            return run(**values)
        except TersorError as error:
            if (message := _in_options(str(error), options)) == str(error):
                raise
            raise TersorError(message) from error

    return checked


def _check(option: Any, value: Any) -> None:
    name = _name(option)
    if isinstance(value, float) and not math.isfinite(value):
        raise TersorError(f"{name} {value} must be a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise TersorError(f"{name} {value} must be at most {_LARGEST:,}")
    if name in _OUT and isinstance(value, Path):
        try_out(value, name, folder=option.metavar == FOLDER)


def _name(option: Any) -> str:
    """The long form of an option."""
    return str(max(option.opts, key=len))


def _in_options(message: str, options: dict[str, Any]) -> str:
    """``message`` with the options that were typed instead of the arguments that they became."""
    return re.sub(
        r"(?<![\w.])([a-z][a-z0-9_]*)=(?=[^\s=])",
        lambda found: f"{_name(options[found[1]])} " if found[1] in options else found[0],
        message,
    )


class SettingsCommand(TyperCommand):
    """A command whose unknown options are settings: ``--skip-layers 0`` means ``--set skip_layers=0``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        known = {name for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
        parsed, rest = [], list(args)
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            if name == "--":
                parsed += [name, *rest]
                break
            if not name.startswith("--") or name in known:
                parsed.append(name + equals + value)
                # The value of an option is no option, whatever it looks like.
                if name in self._with_value(ctx) and not equals and rest:
                    parsed.append(rest.pop(0))
                continue
            if not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)
            setting = name.removeprefix("--") + equals + value
            parsed += ["--set", setting] if equals else [name]  # without a value click refuses it
        return super().parse_args(ctx, parsed)

    def _with_value(self, ctx: Any) -> set[str]:
        return {name for each in self.get_params(ctx) if not getattr(each, "is_flag", False) for name in each.opts}
