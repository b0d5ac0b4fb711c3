"""Modules of the base that answer each row of a batch as its expert would (ME-Switch, arXiv 2406.09041).

    y     = x W0^T                                  shared by the whole batch, whatever its experts
    y[g] += (x[g] v_g^T) s_g + x[g][:, S_g] R_g^T   for the rows g of each expert

The base's weights are never written, and no ``W0 + D`` exists. Norms, embeddings and heads that an expert replaces are
computed for its rows with its own. A module is changed by setting its ``forward``, so its weights keep their names,
and taking that back restores the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.experts.config import ConfigMismatchError
from tersor.experts.delta import ExpertDelta, Manifest
from tersor.lowbit.kernels import get_kernel
from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta


class ResidentExpert:
    """An expert whose tensors are on the base's device, ready to be looked up by module name.

    Attributes:
        packed: Deltas of linears.
        biases: What is added where biases differ.
        replaced: Modules that stand in for the base's; they share all that the expert does not replace.
        derived: Tensors made for this base: differences of biases, and complete tensors in the base's precision where
            the expert has another.
    """

    def __init__(self, delta: ExpertDelta, base: nn.Module) -> None:
        """``delta`` must be on the device of ``base``."""
        self.delta = delta
        self.packed: dict[str, PackedDelta] = {name: delta.packed(name) for name in delta.manifest.modules}
        self.biases: dict[str, Tensor] = {}
        self.derived: list[Tensor] = []
        self.replaced: dict[str, nn.Module] = {}
        for name in replaced_tensors(base, delta.manifest):
            module, _, own = name.rpartition(".")
            tensor = delta.tensor(name)
            assert tensor is not None  # these are the names of complete tensors
            target = base.get_submodule(module)
            if own == "bias" and module in self.packed:
                self.biases[module] = tensor.float() - target.get_parameter("bias").detach().float()
                self.derived.append(self.biases[module])
                continue
            if module not in self.replaced:
                self.replaced[module] = _shadow(target)
            placed = _replace(self.replaced[module], own, tensor)
            if placed.data_ptr() != tensor.data_ptr():
                self.derived.append(placed)

    def tensors(self) -> list[Tensor]:
        """Every tensor that it holds."""
        return [*self.delta.tensors.values(), *self.derived]


def replaced_tensors(base: nn.Module, manifest: Manifest) -> list[str]:
    """Tensors that an expert replaces in modules of the base.

    One that others are tied to, and that lies in a module around them, is used under their names alone, as the bias of
    BERT's head.
    """
    found = []
    for name in (*manifest.full, *manifest.tied):
        around = has_inner_weights(base.get_submodule(name.rpartition(".")[0]))
        if not (around and name in manifest.tied.values()):
            found.append(name)
    return found


def has_inner_weights(module: nn.Module) -> bool:
    """Whether a module is made of others that have weights."""
    return any(True for child in module.children() for _ in child.parameters())


def _shadow(module: nn.Module) -> nn.Module:
    """A module of the same class that shares its tensors, until one is replaced."""
    shadow = copy.copy(module)
    shadow.__dict__.pop("forward", None)
    shadow._parameters = dict(module._parameters)
    shadow._buffers = dict(module._buffers)
    return shadow


def _replace(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put ``tensor`` where a module has one of that name; returns what stands there now."""
    old = module.get_buffer(name) if name in module._buffers else module.get_parameter(name)
    if tensor.dim() != old.dim() or tensor.shape[1:] != old.shape[1:]:  # vocabularies may differ in size
        raise ConfigMismatchError(
            f"the expert replaces {name} {list(old.shape)} of {type(module).__name__} by {list(tensor.shape)}"
        )
    placed = tensor.to(old.dtype)
    if name in module._buffers:
        module._buffers[name] = placed
    else:
        module._parameters[name] = nn.Parameter(placed, requires_grad=False)
    return placed


Split = list[tuple[ResidentExpert | None, Tensor | None]]


class Routes:
    """Which rows of a batch go to which expert.

    One expert for all rows, or one a row (None is the base). A batch of several times as many rows, as beam search
    and ``num_return_sequences`` make it, has each row repeated in place.
    """

    def __init__(self, experts: Sequence[ResidentExpert | None], device: torch.device) -> None:
        self.experts, self.device = list(experts), device
        #: Rows of the pass that runs.
        self.rows = len(self.experts)
        self._splits: dict[int, Split] = {}

    def split(self, rows: int) -> Split:
        """The experts of a batch of ``rows`` rows, each with its rows (int64), or None for all of them.

        Raises:
            ValueError: If the rows cannot be shared out evenly among the names.
        """
        if rows not in self._splits:
            self._splits[rows] = self._split(rows)
        return self._splits[rows]

    def _split(self, rows: int) -> Split:
        count = len(self.experts)
        distinct = list(dict.fromkeys(self.experts))
        if len(distinct) == 1:
            return [(distinct[0], None)]
        if rows % count:
            raise TersorError(f"a batch of {rows} rows cannot be shared out among {count} expert names; give one a row")
        each = rows // count
        owners = torch.arange(rows) // each
        return [
            (expert, torch.isin(owners, _places(self.experts, expert)).nonzero().flatten().to(self.device))
            for expert in distinct
        ]


def _places(experts: list[ResidentExpert | None], expert: ResidentExpert | None) -> Tensor:
    return torch.tensor([place for place, each in enumerate(experts) if each is expert])


class PackedRoutes:
    """Which tokens go to which expert where a batch is one row ``[1, tokens, ...]``, as continuous batching packs it.

    The head may be computed for the last token of each request alone.
    """

    def __init__(
        self,
        tokens: Sequence[ResidentExpert | None],
        kept: Sequence[ResidentExpert | None],
        head: nn.Module,
        device: torch.device,
    ) -> None:
        """Routes of a pass.

        Args:
            tokens: The expert of each token.
            kept: The experts of the tokens that ``head`` is given, in order.
            head: The module that computes logits.
            device: Of the tokens.
        """
        self.tokens, self.kept, self.head = Routes(tokens, device), Routes(kept, device), head

    def of(self, module: nn.Module, rows: int) -> Routes:
        """The routes of the ``rows`` tokens that a module is given.

        A prompt that is not read to its end yields no logits: then as many tokens may be kept as there are, and they
        are others.

        Raises:
            ValueError: If the number of tokens is neither.
        """
        if module is self.head and rows == len(self.kept.experts):
            return self.kept
        if rows != len(self.tokens.experts):
            known = len(self.tokens.experts), len(self.kept.experts)
            raise TersorError(f"a pass of {rows} tokens where experts of {known} tokens are known")
        return self.tokens


Names = tuple[str | None, ...]


class Switch:
    """Which routes a forward pass takes: those of its own thread or task, else a running batch's, else the set ones."""

    def __init__(self) -> None:
        self.standing: Routes | None = None
        self.batch: PackedRoutes | None = None
        self._own: ContextVar[tuple[Names, Routes] | None] = ContextVar("routes", default=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        """A copy of the model is no host's: it answers as the base."""
        return Switch()

    @property
    def routes(self) -> Routes | PackedRoutes | None:
        """Of a pass that begins here and now; None answers as the base does."""
        if (own := self._own.get()) is not None:
            return own[1]
        return self.standing if self.batch is None else self.batch

    @property
    def names(self) -> Names | None:
        """The experts of this thread or task, None where it has none of its own."""
        own = self._own.get()
        return None if own is None else own[0]

    @contextmanager
    def own(self, names: Names, routes: Routes) -> Iterator[None]:
        """Take ``routes`` inside the block, in this thread or task alone."""
        token = self._own.set((names, routes))
        try:
            yield
        finally:
            self._own.reset(token)


class RowwiseModule:
    """Stands in for the ``forward`` of one module of the base."""

    def __init__(self, module: nn.Module, name: str, switch: Switch, *, counts: bool = False) -> None:
        """Takes the place of ``module.forward``.

        Args:
            module: Of the base.
            name: Its name there.
            switch: Tells of each pass which rows are whose.
            counts: Whether it is given all rows of a pass before any other module: the embeddings of its input.
        """
        self.module, self.name, self.switch, self.counts = module, name, switch, counts
        self.own = module.__dict__.get("forward")
        self.inner = module.forward
        module.forward = self

    def detach(self) -> None:
        """Give the module its own ``forward`` back."""
        if self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        routes = self.switch.routes
        if routes is None:
            return self.inner(x, *args, **kwargs)
        if isinstance(routes, PackedRoutes):  # tokens are rows, each of one token
            tokens = x.transpose(0, 1)
            return self._routed(tokens, routes.of(self.module, len(tokens)), *args, **kwargs).transpose(0, 1)
        return self._routed(x, routes, *args, **kwargs)

    def _routed(self, x: Tensor, routes: Routes, *args: Any, **kwargs: Any) -> Any:
        if self.counts:
            routes.rows = len(x)
        if len(x) == 1 < routes.rows and len(set(routes.experts)) > 1:  # positions, which all rows share
            x = x.expand(routes.rows, *x.shape[1:])
        split = routes.split(x.shape[0])
        y = self._computed(x, split, *args, **kwargs)
        added = [(e.packed[self.name], rows) for e, rows in split if e is not None and self.name in e.packed]
        if added:
            y = _add(x, y, added)
        for expert, rows in split:
            if expert is not None and self.name in expert.biases:
                bias = expert.biases[self.name]
                at = slice(None) if rows is None else rows
                y = y.clone()
                y[at] = (y[at].float() + bias).to(y.dtype)
        return y

    def _computed(self, x: Tensor, split: Split, *args: Any, **kwargs: Any) -> Any:
        """The base's outputs, or those of what experts put in the module's place, row by row."""
        if not any(expert is not None and self.name in expert.replaced for expert, _ in split):
            return self.inner(x, *args, **kwargs)
        if len(split) == 1:
            return self._of(split[0][0])(x, *args, **kwargs)
        parts = []
        for expert, rows in split:

            def mine(value: Any, rows: Any = rows) -> Any:
                return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == len(x) else value

            own = {name: mine(value) for name, value in kwargs.items()}
            parts.append((rows, self._of(expert)(x[rows], *map(mine, args), **own)))
        return _joined(parts, len(x))

    def _of(self, expert: ResidentExpert | None) -> Any:
        if expert is None or self.name not in expert.replaced:
            return self.inner
        return expert.replaced[self.name].forward


def _joined(parts: list[tuple[Any, Any]], count: int) -> Any:
    """Outputs of some rows each, put together; of a module that has several, one by one."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_joined([(rows, part[place]) for rows, part in parts], count) for place in range(len(first)))
    width = max(part.shape[-1] for _, part in parts)
    # Vocabularies may differ in size: what an expert's head does not have cannot be sampled.
    empty = -torch.inf if first.is_floating_point() else 0
    y: Tensor = first.new_full((count, *first.shape[1:-1], width), empty)
    for rows, part in parts:
        y[rows, ..., : part.shape[-1]] = part
    return y


def _add(x: Tensor, y: Tensor, added: list[tuple[PackedDelta, Tensor | None]]) -> Tensor:
    """Add the products of packed deltas to rows of ``y`` ``[rows, ..., out]``."""
    tokens = x[0].numel() // x.shape[-1] if len(x) else 0
    groups = [DeltaGroup(delta, _token_rows(rows, tokens)) for delta, rows in added]
    # The fast back ends write into y, which autograd must not miss.
    backend = "reference" if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad) else None
    kernel = get_kernel("delta_linear", backend, device=x.device.type)
    flat: Tensor = kernel(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), groups)
    return flat.view(y.shape)


def _token_rows(rows: Tensor | None, tokens: int) -> Tensor | None:
    """Rows of the flattened batch that belong to ``rows``, which have ``tokens`` tokens each."""
    if rows is None or tokens == 1:
        return rows
    return (rows[:, None] * tokens + torch.arange(tokens, device=rows.device)).flatten()
