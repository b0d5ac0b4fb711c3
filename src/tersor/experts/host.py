"""Many experts on one base: registered, switched, and mixed in a batch, while the base's weights stay as they are."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tersor._errors import TersorError, UnsupportedError
from tersor.experts.architecture import check_same_architecture
from tersor.experts.bank import Budget, ExpertBank
from tersor.experts.config import BaseMismatchError, ConfigMismatchError, ExpertBusyError
from tersor.experts.delta import ExpertDelta, Manifest, generation_settings, read_manifest
from tersor.experts.generation import chat_inputs, generate_rows, own_settings
from tersor.experts.identity import check_base
from tersor.experts.linear import (
    PackedRoutes,
    ResidentExpert,
    Routes,
    RowwiseModule,
    Switch,
    has_inner_weights,
    replaced_tensors,
)
from tersor.experts.sources import Anatomy, Source, local_folder, module_of
from tersor.zoo.inspection import refused

#: Names of tables that are looked up by distance, and not by row.
RELATIVE = re.compile(r"relative|rel_embed|rel_pos")
#: No names were given: whoever is set answers.
AS_SET: Any = object()
#: Ways of generating whose drafts come from another model or place, and would be checked against the wrong expert.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of tensors: the base's, and of each expert by part; the parts are "codes", "steps", "salient", "full" and
    "derived" (made for this base). An expert on disk has none.
    """

    base: int
    experts: dict[str, dict[str, int]]
    tiers: dict[str, str]

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + sum(sum(parts.values()) for parts in self.experts.values())


class ExpertHost:
    """Serves experts on a base model, which it wraps in place (ME-Switch, arXiv 2406.09041).

        host = ExpertHost(base, max_resident=4)
        host.load_expert("math", "math-delta")
        host.generate(**inputs, expert_names=["math", None])    # one a row, None is the base
        with host.use("math"): base(**inputs)

    The base's tensors are neither copied nor written. Safe to use from several threads and tasks: each answers as the
    experts of its own `use` or `generate`, and as the expert that is set where it is in neither.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_resident: int | None = None,
        max_cpu: int | None = None,
        max_resident_bytes: int | None = None,
        max_cpu_bytes: int | None = None,
    ) -> None:
        """
        Args:
            model: A `PreTrainedModel`, on the device that experts shall be on.
            max_resident: Experts on the device; None is no limit, here and below.
            max_resident_bytes: Their bytes.
            max_cpu: Copies in host memory.
            max_cpu_bytes: Their bytes.
        """
        self.model = model
        self._switch = Switch()
        self._wrapped: dict[str, RowwiseModule] = {}
        self._active: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._anatomies: dict[tuple[str, ...], Anatomy] = {}
        self._bank = ExpertBank(
            self._place,
            resident=Budget(count=max_resident, nbytes=max_resident_bytes),
            cached=Budget(count=max_cpu, nbytes=max_cpu_bytes),
        )

    # ---- registration -----------------------------------------------------------------------------------------------

    def load_expert(
        self, name: str, delta: str | os.PathLike[str] | ExpertDelta, *, pin: bool = False, allow_mismatch: bool = False
    ) -> None:
        """Register an expert; its tensors are read when it is first used, or now where ``pin`` keeps it on the device.

        Raises:
            BaseMismatchError: If the delta is of another base, unless ``allow_mismatch``, which warns.
            ConfigMismatchError: If the base lacks modules that the delta changes.
            DeltaFormatError: If files are broken.
            ValueError: If the name is taken or impossible.
        """
        source = delta if isinstance(delta, ExpertDelta) else local_folder(delta)
        manifest = source.manifest if isinstance(source, ExpertDelta) else read_manifest(source)
        self._check_base(name, manifest, allow_mismatch=allow_mismatch)
        with self._lock:
            self._wrap(manifest)  # first: whoever uses the name at once finds every module ready
            self._bank.register(name, source, manifest)
        try:
            if pin:
                self._bank.pin(name)
                self._bank.acquire(name)
                self._bank.release(name)
        except BaseException:
            self._bank.remove(name)
            raise

    def unload_expert(self, name: str) -> None:
        """Forget an expert; the name may be used again at once.

        Raises:
            UnknownExpertError: If the name is not registered.
            ExpertBusyError: If the expert is set or answers requests.
        """
        self._bank.remove(name)

    def list_experts(self) -> dict[str, str]:
        """Registered names and where each is: "disk", "cpu" or "device"."""
        return {entry.name: entry.tier for entry in self._bank.entries()}

    def tier(self, name: str) -> str:
        """Where one expert is."""
        return self._bank.entry(name).tier

    def vocabulary(self, name: str) -> int:
        """Number of an expert's tokens, which may be more or fewer than the base's."""
        own = self._bank.entry(name).manifest.expert_config
        return int(own.get("text_config", own)["vocab_size"])

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Keep an expert on the device whatever else is loaded, or let it go again."""
        self._bank.pin(name, pinned=pinned)

    def generation(self, name: str) -> int:
        """A number that differs between two contents of one name: what caches of its results are keyed by."""
        return self._bank.entry(name).generation

    # ---- switching --------------------------------------------------------------------------------------------------

    def set_expert(self, name: str | None) -> None:
        """Answer every row as this expert until further notice; None is the base.

        Raises:
            UnknownExpertError: If the name is not registered.
            ValueError: Inside `use`, whose block answers as its own experts to its end.
        """
        self._activate(() if name is None else (name,))

    def disable_experts(self) -> None:
        """Answer as the base."""
        self._activate(())

    def _activate(self, names: tuple[str, ...]) -> None:
        if self._switch.names is not None:
            raise TersorError("an expert cannot be set inside `use`: leave the block first, or nest another `use`")
        with self._lock:
            before, self._active = self._active, ()
            self._switch.standing = None
            self._release(before)  # first, so that a host with room for one expert can switch
            try:
                self._hold(names)
            except BaseException:
                self._hold(before)
                raise

    def _hold(self, names: tuple[str, ...]) -> None:
        self._switch.standing = self._acquire(names) if names else None
        self._active = names

    @contextmanager
    def use(self, names: str | Sequence[str | None] | None) -> Iterator[Any]:
        """Answer as one expert, or each row as its own, inside the block; then as before. Yields the model.

        The block is for the thread or task that enters it; others may be in one of their own meanwhile.

        Raises:
            UnknownExpertError: If a name is not registered.
            ExpertBusyError: If there is no room for the experts, or a continuous batch runs.
        """
        if self._switch.batch is not None:
            raise ExpertBusyError("a continuous batch runs on this host; add requests to it, or wait until it ends")
        wanted: tuple[str | None, ...] = (names,) if names is None or isinstance(names, str) else tuple(names)
        if not wanted:
            raise TersorError("expert_names is empty; give one name a row, None for the base")
        routes = self._acquire(wanted)
        try:
            with self._switch.own(wanted, routes):
                yield self.model
        finally:
            self._release(wanted)

    def generate(
        self,
        *args: Any,
        expert_names: str | Sequence[str | None] | None = AS_SET,
        messages: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``model.generate`` with an expert for each row of the prompt; arguments and results are the library's.

        Beams and returned sequences of a row stay with its expert. Settings that the call does not give are those of
        each row's expert, such as the tokens that end its answer, and its padding fills up what follows them.

        Args:
            *args: Of ``model.generate``.
            expert_names: One for all rows, or one a row; None is the base. As `use` and `set_expert` say by default.
            messages: Instead of ids a conversation, or one a row, which is put into its expert's own chat template;
                `tokenizer` decodes the answers.
            **kwargs: Of ``model.generate``.

        Raises:
            ValueError: If there are not as many names as rows.
            NotImplementedError: If decoding is assisted.
        """
        if used := [name for name in ASSISTED if kwargs.get(name) is not None]:
            raise UnsupportedError(f"generate with experts does not take {used[0]}; leave it out")
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs", kwargs.get("inputs_embeds")))
        if expert_names is AS_SET:
            standing = self._switch.names or self._active or (None,)
            expert_names = standing if len(standing) > 1 else standing[0]
        if expert_names is not None and not isinstance(expert_names, str) and ids is not None:
            expert_names = list(expert_names)
            if len(expert_names) != len(ids):
                raise TersorError(f"{len(expert_names)} expert names for {len(ids)} rows; give one a row")
        if messages is not None:
            kwargs |= self._chat(messages, expert_names, args, kwargs)
        if expert_names is None:
            with self.use(None) as model:
                return model.generate(*args, **kwargs)
        names = [expert_names] if isinstance(expert_names, str) else list(expert_names)

        def within(rows: list[int] | None) -> Any:
            return self.use(names if rows is None else [names[row] for row in rows])

        own = [self.settings(name) for name in names]
        return generate_rows(self.model, own, args, {**kwargs, "within": within})

    def tokenizer(self, name: str | None) -> Any:
        """The tokenizer that an expert brings, or the base's.

        Raises:
            TersorError: If there is none in the folder of either.
        """
        from transformers import AutoTokenizer

        source = None if name is None else self._bank.entry(name).source
        folder = source.folder if isinstance(source, ExpertDelta) else source
        place = local_folder(self.model.name_or_path) if name is None else folder
        if place is None or not (place / "tokenizer_config.json").is_file():
            raise TersorError(
                f"{'the base' if name is None else f'expert {name!r}'} brings no tokenizer; give input_ids"
            )
        with refused(f"the tokenizer of {place}"):
            return AutoTokenizer.from_pretrained(place, local_files_only=True)

    def settings(self, name: str | None) -> dict[str, Any]:
        """How an expert, or the base, generates where a call does not say."""
        if name is None:
            return own_settings(self.model, self.model.config, None)
        entry = self._bank.entry(name)
        folder = entry.source.folder if isinstance(entry.source, ExpertDelta) else entry.source
        return generation_settings(entry.manifest, folder)

    def _chat(self, messages: Sequence[Any], names: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        if args or kwargs.keys() & {"input_ids", "inputs", "inputs_embeds", "attention_mask"}:
            raise TersorError("generate takes ids or messages, not both")
        rows = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        owners = [names] * len(rows) if names is None or isinstance(names, str) else names
        if not rows or len(owners) != len(rows):
            raise TersorError(f"{len(owners)} expert names for {len(rows)} conversations; give one a conversation")
        made = {name: self.tokenizer(name) for name in dict.fromkeys(owners)}
        inputs = chat_inputs(rows, [made[name] for name in owners])
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _acquire(self, names: Sequence[str | None]) -> Routes:
        held: list[str] = []
        found: dict[str, ResidentExpert] = {}
        try:
            for name in dict.fromkeys(each for each in names if each is not None):
                found[name] = self._bank.acquire(name)
                held.append(name)
        except BaseException:
            self._release(held)
            raise
        return Routes([None if name is None else found[name] for name in names], self.model.device)

    def _release(self, names: Sequence[str | None]) -> None:
        for name in dict.fromkeys(each for each in names if each is not None):
            self._bank.release(name)

    # ---- for whoever runs the model in the host's place --------------------------------------------------------------

    def hold(self, name: str) -> ResidentExpert:
        """An expert on the device, kept there until as many `release` calls; raises as `use` does."""
        return self._bank.acquire(name)

    def release(self, name: str) -> None:
        """Take one `hold` back."""
        self._bank.release(name)

    @property
    def batching(self) -> bool:
        """Whether a continuous batch runs."""
        return self._switch.batch is not None

    def route(self, routes: PackedRoutes | None) -> None:
        """Answer the following forward passes as ``routes`` say; their experts must be held. None ends the batch."""
        self._switch.batch = routes

    # ---- what it is made of -----------------------------------------------------------------------------------------

    def merge(self, name: str) -> Any:
        """A new plain model with the expert's weights, for any other engine; the base is not touched."""
        resident = self._bank.acquire(name)
        try:
            return merge_expert(self.model, resident.delta)
        finally:
            self._bank.release(name)

    def memory_report(self) -> MemoryReport:
        """Bytes that are held, counted tensor by tensor; what two places share is counted once."""
        seen: set[int] = set()

        def count(tensors: Iterator[Tensor]) -> int:
            total = 0
            for tensor in tensors:
                if tensor.data_ptr() not in seen or tensor.nbytes == 0:
                    seen.add(tensor.data_ptr())
                    total += tensor.nbytes
            return total

        base = count(iter([*self.model.parameters(), *self.model.buffers()]))
        experts: dict[str, dict[str, int]] = {}
        for entry in self._bank.entries():
            parts = dict.fromkeys(("codes", "steps", "salient", "full", "derived"), 0)
            deltas = [] if entry.cached is None else [entry.cached]
            if entry.resident is not None:
                deltas.append(entry.resident.delta)
            for delta in deltas:
                if not all(t.data_ptr() in seen for t in delta.tensors.values() if t.nbytes):
                    count(iter(delta.tensors.values()))
                    for part, size in delta.bytes_by_part().items():
                        parts[part] += size
            if entry.resident is not None:
                parts["derived"] = count(iter(entry.resident.derived))
            experts[entry.name] = parts
        return MemoryReport(base, experts, self.list_experts())

    def close(self) -> None:
        """Give the model its own modules back; experts are forgotten."""
        self.disable_experts()
        for name in self._bank.names():
            self._bank.remove(name)
        for wrapper in self._wrapped.values():
            wrapper.detach()
        self._wrapped.clear()

    def _place(self, delta: ExpertDelta) -> ResidentExpert:
        return ResidentExpert(delta.to(self.model.device), self.model)

    def _wrap(self, manifest: Manifest) -> None:
        first = self.model.get_input_embeddings()  # always, because it tells how many rows a pass has
        names = {name for name, module in self.model.named_modules() if module is first}
        names |= {*manifest.modules, *(module_of(n)[0] for n in replaced_tensors(self.model, manifest))}
        for name in sorted(names - self._wrapped.keys()):
            module = self.model.get_submodule(name)
            self._wrapped[name] = RowwiseModule(module, name, self._switch, counts=module is first)

    def _check_base(self, name: str, manifest: Manifest, *, allow_mismatch: bool) -> None:
        base = Source(self.model, full_modules=manifest.config.full_modules, anatomies=self._anatomies)
        here = base.anatomy.linears
        for module, linear in manifest.modules.items():
            shape = here.get(f"{module}.weight")
            if shape is None or tuple(shape) != linear.shape:
                there = "is missing" if shape is None else f"is {list(shape)}"
                raise ConfigMismatchError(f"expert {name!r} changes {module} {list(linear.shape)}, which {there} here")
        state = set(self.model.state_dict())
        if unknown := sorted({*manifest.full, *manifest.tied} - state):
            raise ConfigMismatchError(f"expert {name!r} replaces {unknown[0]}, which this base does not have")
        self._check_rowwise(name, manifest)
        try:
            check_base(base, manifest.base_tensors, manifest.base_model_name_or_path, full=False)
        except BaseMismatchError as error:
            if not allow_mismatch:
                raise BaseMismatchError(f"expert {name!r}: this base is another one: {error}") from None
            warnings.warn(f"expert {name!r}: {error}; its answers will differ from the expert's", stacklevel=3)
        check_same_architecture(base.config, type(base.config).from_dict(dict(manifest.expert_config)))

    def _check_rowwise(self, name: str, manifest: Manifest) -> None:
        """See that each row of a batch can have its own version of what an expert replaces."""
        for tensor in replaced_tensors(self.model, manifest):
            path, own = module_of(tensor)
            module = self.model.get_submodule(path)
            inner = has_inner_weights(module)
            if inner or RELATIVE.search(path):
                why = "has modules of its own" if inner else "makes one bias for all rows of a batch"
                raise UnsupportedError(
                    f"expert {name!r} replaces {own} of {path} ({type(module).__name__}), which {why}, so that rows "
                    "cannot differ in it: merge the expert (`tersor experts merge`) and serve it on its own"
                )


@torch.no_grad()
def merge_expert(base: Any, delta: ExpertDelta) -> Any:
    """A new model of the base's class with the expert's weights ``W0 + D^``, in the base's dtype.

    The sum is float32 and rounded once. Merging again starts from the same base, so nothing drifts.
    """
    config = type(base.config).from_dict(dict(delta.manifest.expert_config))
    model = type(base)._from_config(config, dtype=base.dtype)
    old = base.state_dict()
    transposed = Source(base, full_modules=delta.manifest.config.full_modules).anatomy.transposed
    state = {}
    for name, tensor in model.state_dict().items():
        module, own = module_of(name)
        if own == "weight" and module in delta.manifest.modules:
            added = delta.dense(module).cpu()
            merged = old[name].float().cpu() + (added.T if name in transposed else added)
        else:
            kept = delta.tensor(name)
            merged = old[name] if kept is None else kept
        state[name] = merged.to(tensor.dtype)
    model.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig(**generation_settings(delta.manifest, delta.folder))
    assert isinstance(model, nn.Module)
    return model.to(base.device).eval()
