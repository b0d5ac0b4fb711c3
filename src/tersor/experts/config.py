"""How an expert is compressed, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any

import torch

from tersor._errors import TersorError, WrongTypeError

BITS = (1, 2, 3, 4, 8)
GRIDS = ("signed", "midrise")
STEP_INITS = ("mse", "lsq", "minmax")
#: What the salient channels are chosen by; the paper's is the first, the others are there to compare with.
SELECTIONS = ("reconstruction", "magnitude", "weight_error", "activation", "wanda", "random")
DISTILLATIONS = (None, "codes", "closed_form")
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class DeltaFormatError(TersorError):
    """A delta's files are corrupt, cut off, inconsistent, or of a newer format."""


class BaseMismatchError(TersorError):
    """A delta was made against another base."""


class ConfigMismatchError(TersorError):
    """Raised when base and expert differ in architecture or size; names the first field that differs."""


class UnknownExpertError(TersorError):
    """No expert of that name is registered."""


class ExpertBusyError(RuntimeError):
    """An expert has running requests, or memory is short because all others have."""


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Settings of `compress_expert`; the defaults are the paper's headline where it gives one.

    Raises:
        ValueError: If a setting is out of range, before any work.
        TypeError: If a setting has another type.
    """

    bits: int = 2
    """Bits of a code: 1, 2, 3, 4 or 8. One bit is a sign, whatever ``grid`` says."""
    grid: str = "signed"
    """"signed" has a code for zero; "midrise" has none and a lower error in the weights."""
    num_salient: int | float | Mapping[str, int | float] = 8
    """Input channels of each linear that stay in 16 bits: a number, a share of them (rounded up), or either by the last
    part of the linear's name; a linear that no name fits then has none."""
    selection: str = "reconstruction"
    """One of `SELECTIONS`: "reconstruction" is the paper's, the error that quantizing a channel makes at the output."""
    selection_rounds: int = 1
    """Times that channels are chosen; a second round scores with the steps of the first choice."""
    step_init: str = "mse"
    """"mse": search for the least error of each row; "lsq": from the mean size; "minmax": from the largest."""
    distill: str | None = None
    """None, "codes" (gradient descent on the steps against the expert's logits) or "closed_form"."""
    distill_steps: int = 100
    distill_rate: float = 0.02
    """Rate of Adam, relative to the mean step of a linear."""
    step_dtype: str = "float16"
    salient_dtype: str = "float16"
    full_modules: tuple[str, ...] = ()
    """Names, or last parts of names, of modules below the decoder layers that are stored complete."""

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        _one_of("grid", self.grid, GRIDS)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("step_init", self.step_init, STEP_INITS)
        _one_of("distill", self.distill, DISTILLATIONS)
        _one_of("step_dtype", self.step_dtype, ("float16", "float32"))
        _one_of("salient_dtype", self.salient_dtype, tuple(FLOATS))
        for value in self.num_salient.values() if isinstance(self.num_salient, Mapping) else (self.num_salient,):
            _check_count(value)
        for name, least in (("selection_rounds", 1), ("distill_steps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TersorError(f"{name}={value!r} must be an integer of at least {least}")
        if not 0 < self.distill_rate < 1:
            raise TersorError(f"distill_rate={self.distill_rate!r} must be between 0 and 1")
        object.__setattr__(self, "full_modules", tuple(self.full_modules))

    @property
    def midrise(self) -> bool:
        """Whether codes stand for numbers between multiples of the step."""
        return self.grid == "midrise" or self.bits == 1

    def salient_of(self, name: str, dim: int) -> int:
        """How many of ``dim`` input channels of the linear ``name`` are salient."""
        wanted = self.num_salient
        if isinstance(wanted, Mapping):
            wanted = wanted.get(name.rpartition(".")[2], 0)
        return min(dim, ceil(wanted * dim) if isinstance(wanted, float) else wanted)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = asdict(self)
        values["full_modules"] = list(self.full_modules)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaConfig:
        """What `to_dict` gave; raises `DeltaFormatError` for anything else."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise DeltaFormatError(f"the delta's config has fields {sorted(values)}, expected {sorted(names)}")
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise DeltaFormatError(f"the delta's config is invalid: {error}") from error


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise TersorError(f"{name}={value!r} is not possible; choose one of {allowed}")


def _check_count(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongTypeError(f"num_salient={value!r} must be a number of channels, a share, or a mapping to these")
    if value < 0 or (isinstance(value, float) and value > 1):
        raise TersorError(f"num_salient={value!r} must be an integer from 0 on, or a share from 0.0 to 1.0")
