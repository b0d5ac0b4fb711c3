"""What switching and mixing packed experts costs in time, on a model of real size with random weights.

How fast a weight is read does not depend on its value, so codes and steps are random here. Everything that is compared
is timed in turns in one run.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.bench.measure import PairedTimes, time_paired
from tersor.experts.config import DeltaConfig
from tersor.experts.delta import PARTS, ExpertDelta, Linear, Manifest
from tersor.experts.host import ExpertHost
from tersor.experts.identity import Hashes, model_hash, tensor_hashes
from tersor.experts.sources import Source, module_of
from tersor.lowbit.packing import packed_width

#: Sizes by name: "1b" is that of Llama-3.2-1B.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "100m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "50m": {
        "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip
#: Tokens in the cache while a token is decoded.
CONTEXT = 16
BASE, EXPERT = "base", "expert"
MIXED, SEQUENTIAL = "one batch", "one pass an expert"
DELTA, WHOLE = "delta", "whole model"


def random_model(shape: str, *, seed: int) -> Any:
    """A bfloat16 Llama of one of `SHAPES` with random weights.

    Raises:
        ValueError: If the shape is unknown.
    """
    if shape not in SHAPES:
        raise TersorError(f"shape {shape!r} is not known; choose one of {tuple(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=None, eos_token_id=None)
    with no_init_weights():
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    # Drawing billions of numbers takes longer than timing them: a block of them stands again and again.
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)  # of norms
            continue
        for part in torch.split(parameter.detach().view(-1), len(block)):
            part.copy_(block[: len(part)])
    return model.eval().requires_grad_(False)


def base_hashes(base: Any) -> Hashes:
    """What binds deltas to ``base``; reads all of it."""
    return tensor_hashes(Source(base))


def random_expert(base: Any, config: DeltaConfig, *, seed: int, hashes: Hashes | None = None) -> ExpertDelta:
    """A delta of ``base`` that changes every linear of the decoder layers, with random codes.

    ``hashes`` are those of `base_hashes`, where several experts share them.
    """
    generator = torch.Generator().manual_seed(seed)
    anatomy = Source(base).anatomy
    hashes = base_hashes(base) if hashes is None else hashes
    tensors: dict[str, Tensor] = {}
    linears: dict[str, Linear] = {}
    for name, shape in anatomy.linears.items():
        module, (out, dim) = module_of(name)[0], shape
        kept = config.salient_of(module, dim)
        index = torch.randperm(dim, generator=generator)[:kept].sort().values
        parts = (
            _random_bytes(out, packed_width(dim, config.bits), generator),
            torch.full((out,), 1e-3).half(),
            index.int(),
            (torch.randn(out, kept, generator=generator) * 1e-3).half(),
        )
        tensors |= {f"{module}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
        linears[module] = Linear((out, dim), config.bits, kept, config.midrise, 0.0, config.salient_dtype)
    manifest = Manifest(
        base_model_name_or_path="random weights", base_revision=None,
        base_fingerprint=model_hash(hashes), base_tensors=hashes, expert_fingerprint=f"random {seed}", calibration=None,
        expert_model_name_or_path=f"random {seed}",
        architectures=[type(base).__name__], config=config, expert_config=base.config.to_dict(), generation_config={},
        modules=linears,
        full=[], same=sorted(anatomy.others), tied={},
    )  # fmt: skip
    return ExpertDelta(manifest, tensors)


def _random_bytes(rows: int, width: int, generator: torch.Generator) -> Tensor:
    words = torch.empty(-(-rows * width // 8), dtype=torch.int64).random_(generator=generator)
    return words.view(torch.uint8)[: rows * width].view(rows, width)


class Decoder:
    """One token for each row of a batch, again and again at the same place behind `CONTEXT` tokens."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        ids = torch.arange(rows * CONTEXT).view(rows, CONTEXT) % model.config.vocab_size
        with torch.inference_mode():
            model(input_ids=ids, **with_cache(self.cache))
        self.ids = ids[:, :1]

    @torch.inference_mode()
    def __call__(self, tokens: int = 1) -> None:
        """Decode ``tokens`` steps and forget them."""
        for _ in range(tokens):
            self.model(input_ids=self.ids, **with_cache(self.cache))
        self.cache.crop(-tokens)


def with_expert(host: ExpertHost, names: str | Sequence[str] | None, work: Callable[[], object]) -> Callable[[], None]:
    """``work`` as one expert, as a batch of several, or as the base."""

    def call() -> None:
        with host.use(names) if names is not None else nullcontext():
            work()

    return call


def time_decoding(host: ExpertHost, name: str, *, tokens: int, repeats: int) -> PairedTimes:
    """``tokens`` decoded as the base and as an expert that is resident, batch 1."""
    decode_some = partial(Decoder(host.model, 1), tokens)
    work = {BASE: with_expert(host, None, decode_some), EXPERT: with_expert(host, name, decode_some)}
    return time_paired(work, repeats=repeats)


def time_switches(host: ExpertHost, names: Sequence[str], *, repeats: int) -> PairedTimes:
    """Seconds, as "expert", of each of ``repeats`` calls of `ExpertHost.set_expert` among experts that are resident."""
    for name in names:
        host.set_expert(name)
    seconds = []
    for number in range(repeats):
        start = time.perf_counter()
        host.set_expert(names[number % len(names)])
        seconds.append(time.perf_counter() - start)
    host.disable_experts()
    return PairedTimes({EXPERT: tuple(seconds)})


def time_mixing(host: ExpertHost, names: Sequence[str], *, rows: int, repeats: int) -> PairedTimes:
    """A token for each of ``rows`` rows that ``names`` share evenly: as one batch, and in one pass for each expert."""
    each = rows // len(names)
    whole, part = Decoder(host.model, rows), Decoder(host.model, each)
    passes = [with_expert(host, name, part) for name in names]

    def sequential() -> None:
        for run in passes:
            run()

    mixed = with_expert(host, [name for name in names for _ in range(each)], whole)
    return time_paired({MIXED: mixed, SEQUENTIAL: sequential}, repeats=repeats)


def time_registered(
    host: ExpertHost, experts: Iterable[ExpertDelta], counts: Sequence[int], *, tokens: int, repeats: int
) -> dict[int, list[float]]:
    """Seconds of ``tokens`` decoded by the newest expert while 1, 2, ... are registered and resident, by their number.

    Counts cannot take turns, since experts only come; so each is timed beside the base, and what is returned is the
    time divided by the base's of the same round, times the base's median over all rounds.
    """
    ratios: dict[int, list[float]] = {}
    bases: list[float] = []
    for number, delta in enumerate(experts, 1):
        name = f"registered-{number}"
        host.load_expert(name, delta, pin=True)
        if number in counts:
            times = time_decoding(host, name, tokens=tokens, repeats=repeats)
            pairs = zip(times.samples[EXPERT], times.samples[BASE], strict=True)
            ratios[number] = [ours / base for ours, base in pairs]
            bases += times.samples[BASE]
    middle = float(torch.tensor(bases, dtype=torch.float64).median())
    return {number: [ratio * middle for ratio in each] for number, each in ratios.items()}


def time_loading(
    work: Path, shape: str, config: DeltaConfig, *, seed: int, repeats: int
) -> tuple[PairedTimes, dict[str, int]]:
    """From files that are not in the system's cache to the first token: a delta on a base in memory, and a whole model.

    Returns:
        Times of "delta", "whole model" and, of the parts before the first token, "delta, load" and "whole model, load";
        and the bytes of both on disk.
    """
    model = random_model(shape, seed=seed)
    folders = {WHOLE: work / "whole", DELTA: work / "delta"}
    model.save_pretrained(folders[WHOLE])
    random_expert(model, config, seed=seed).save_pretrained(folders[DELTA])
    ids = torch.ones(1, 1, dtype=torch.int64)
    host = ExpertHost(model)
    loads: dict[str, list[float]] = {DELTA: [], WHOLE: []}

    @torch.inference_mode()
    def delta() -> None:
        start = time.perf_counter()
        host.load_expert("cold", folders[DELTA], pin=True)
        loads[DELTA].append(time.perf_counter() - start)
        with host.use("cold"):
            model(input_ids=ids)

    @torch.inference_mode()
    def whole() -> None:
        start = time.perf_counter()
        loaded = LlamaForCausalLM.from_pretrained(folders[WHOLE], dtype=torch.bfloat16, local_files_only=True)
        loads[WHOLE].append(time.perf_counter() - start)
        loaded(input_ids=ids)

    times: dict[str, list[float]] = {DELTA: [], WHOLE: []}
    for number in range(repeats + 1):  # the first round warms what is not files
        for name, run in ((DELTA, delta), (WHOLE, whole)):
            gc.collect()
            _forget(folders[name])
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
        host.unload_expert("cold")
    samples = {name: tuple(each) for name, each in times.items()}
    samples |= {f"{name}, load": tuple(each[1:]) for name, each in loads.items()}
    sizes = {name: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for name, folder in folders.items()}
    return PairedTimes(samples), sizes


def _forget(folder: Path) -> None:
    """Have the system drop a folder's files from its cache, where it can, so that reading them is reading the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
