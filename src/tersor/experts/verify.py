"""How close a delta comes to the expert that it stands for, in weights and in answers; and writing it out merged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tersor import _atomic
from tersor._errors import TersorError
from tersor.bench.measure import bootstrap_interval
from tersor.experts.adapters import merged_adapter
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import merge_expert
from tersor.experts.identity import check_base, model_hash, tensor_hashes
from tersor.experts.sources import Source, batches, load_model, local_folder
from tersor.zoo.inspection import refused

#: Tokens of a text that answers are compared on.
LENGTH = 512


def compare_weights(delta: ExpertDelta, base: Any, expert: Any, *, full: bool = False) -> dict[str, float]:
    """Error of each packed linear's delta, relative to the size of the true one.

    Args:
        delta: What is checked.
        base: Folder or hub name of the base.
        expert: The same of the uncompressed expert.
        full: Whether every number of base and expert is compared with those that the delta was made of.

    Raises:
        BaseMismatchError: If the delta was made against another base.
        ValueError: If a tensor that is stored complete, or is said to be the base's, is not the expert's.
    """
    manifest = delta.manifest
    errors = {}
    full_modules = manifest.config.full_modules
    other = Source(merged_adapter(base, expert), full_modules=full_modules)
    with Source(base, full_modules=full_modules) as old, other as new:
        check_base(old, manifest.base_tensors, manifest.base_model_name_or_path, full=full)
        for module in manifest.modules:
            name = f"{module}.weight"
            true = new.read(name).float() - old.read(name).float()
            errors[module] = float((true - delta.dense(module)).norm() / true.norm())
        for name in (*manifest.full, *manifest.same):
            wanted = delta.tensors[name] if name in delta.tensors else old.read(name)
            if not torch.equal(new.read(name).float(), wanted.float()):
                raise TersorError(f"{name} of the delta is not that of {expert}; was it made from another expert?")
        if full and model_hash(tensor_hashes(new)) != manifest.expert_fingerprint:
            raise TersorError(f"the delta was made from other weights than those of {expert}; pack it again")
    return errors


@torch.no_grad()
def compare_answers(delta: ExpertDelta, base: Any, expert: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Next-token distributions of the expert and of base plus delta.

    Returns:
        "kl": the mean over texts of the mean divergence a token, in nats, with its 95 % interval ("kl_low",
        "kl_high"); "same_top": the share of tokens with the same likeliest next one; "perplexity" and
        "expert_perplexity"; "texts" and "tokens".

    Raises:
        ValueError: If no text has two tokens.
    """
    from transformers import AutoTokenizer

    with refused(f"the tokenizer of {expert}"):
        tokenizer = AutoTokenizer.from_pretrained(local_folder(expert), local_files_only=True)
    merged = merged_adapter(base, expert)
    teacher = merged if isinstance(merged, nn.Module) else load_model(merged)
    student = merge_expert(load_model(base), delta)
    divergences: list[float] = []
    same = tokens = 0
    losses = torch.zeros(2, dtype=torch.float64)
    for ids, _ in batches(texts, tokenizer, length=LENGTH, size=1):
        if ids.shape[1] < 2:
            continue
        true, ours = (F.log_softmax(m(input_ids=ids).logits[0, :-1].double(), dim=-1) for m in (teacher, student))
        divergences.append(float((true.exp() * (true - ours)).sum(-1).mean()))
        same += int((true.argmax(-1) == ours.argmax(-1)).sum())
        losses -= torch.stack([each.gather(1, ids[0, 1:, None]).sum() for each in (ours, true)])
        tokens += ids.shape[1] - 1
    if not divergences:
        raise TersorError("no text has two tokens; give longer ones")
    kl = bootstrap_interval(divergences)
    perplexity, expert_perplexity = (losses / tokens).exp().tolist()
    return {
        "kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "same_top": same / tokens, "perplexity": perplexity,
        "expert_perplexity": expert_perplexity, "texts": len(divergences), "tokens": tokens,
    }  # fmt: skip


def merge_folder(delta: ExpertDelta, base: Any, out: Path) -> None:
    """Write base plus delta as a plain checkpoint with the expert's tokenizer; ``out`` appears when it is whole.

    Raises:
        BaseMismatchError: If the delta was made against another base.
    """
    with Source(base, full_modules=delta.manifest.config.full_modules) as source:
        check_base(source, delta.manifest.base_tensors, delta.manifest.base_model_name_or_path, full=False)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    merge_expert(load_model(base), delta).save_pretrained(unfinished)
    for file in unfinished.iterdir():
        _atomic.open_up(file)
    delta.copy_companions(unfinished)
    if out.is_dir():
        out.rmdir()  # empty, as was checked
    os.replace(unfinished, out)
