"""What holds for the options of every command: finite numbers, an --out that can be written, messages in options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from tersor._errors import TersorError
from tersor._options import FOLDER, SettingsCommand, check_options


def call(function: Any, *arguments: str, **how: Any) -> Any:
    """What a command of one function gives, its options checked."""
    app = typer.Typer()
    app.command("it", **how)(function)
    app.command("other")(lambda: None)
    command = get_command(app)
    check_options(command)
    return command.main(["it", *arguments], standalone_mode=False)


def number(share: float = 0.5, count: int = 1, shares: Annotated[list[float] | None, typer.Option()] = None) -> None:
    if share > 1:
        raise TersorError(f"share={share} must be at most 1, size=3 is another's, a.count=4 too")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(TersorError, match=r"--share .* must be a finite number"):
        call(number, "--share", value)
    with pytest.raises(TersorError, match=r"--shares .* must be a finite number"):
        call(number, "--shares", "0.1", "--shares", value)


def test_whole_numbers_fit_into_a_tensor() -> None:
    call(number, "--count", str(2**63 - 1))
    with pytest.raises(TersorError, match="--count"):
        call(number, "--count", str(2**63))


def test_a_refusal_speaks_of_the_options_that_were_typed() -> None:
    with pytest.raises(TersorError, match=r"^--share 2\.0 must be at most 1, size=3 is another's, a\.count=4 too$"):
        call(number, "--share", "2")


def to_file(out: Path = Path("a.txt")) -> None:
    """Writes a file."""


def to_folder(out: Annotated[Path, typer.Option(metavar=FOLDER)] = Path("a")) -> None:
    """Writes a folder."""


def test_out_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    call(to_file, "--out", str(tmp_path / "new" / "a.txt"))
    call(to_folder, "--out", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for function, place in ((to_file, tmp_path), (to_folder, tmp_path / "file"), (to_file, tmp_path / "file" / "x")):
        with pytest.raises(TersorError, match="--out"):
            call(function, "--out", str(place))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def settings(
    prompt: str, given: Annotated[list[str] | None, typer.Option("--set")] = None, name: str = "", on: bool = False
) -> None:
    raise LookupError(prompt, given, name, on)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--skip-layers", "0", "hi"], ("hi", ["skip-layers=0"], "", False)),
        (["--tau=0.9", "hi", "--on"], ("hi", ["tau=0.9"], "", True)),
        (["--set", "a=1", "--gap", "-3", "hi"], ("hi", ["a=1", "gap=-3"], "", False)),
        (["--name", "--tau", "hi"], ("hi", None, "--tau", False)),
        (["--", "--tau"], ("--tau", None, "", False)),
    ],
)
def test_unknown_options_are_settings(arguments: list[str], found: tuple[Any, ...]) -> None:
    with pytest.raises(LookupError) as seen:
        call(settings, *arguments, cls=SettingsCommand)
    assert seen.value.args == found


def test_an_unknown_option_without_a_value_is_refused() -> None:
    with pytest.raises(typer.BadParameter.__bases__[0]) as seen:
        call(settings, "hi", "--tau", cls=SettingsCommand)
    assert "--tau" in str(seen.value.format_message())
