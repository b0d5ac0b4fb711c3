"""Checkpoint folder, lock file and model card of tiny-repvgg and tiny-mobileone."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from repvgg.train import Plan
from shared.lock import write_lock
from shared.run import Progress

from tersor.bench.measure import wilson_interval
from tersor.bench.runs import markdown
from tersor.ptq.bench.data import SOURCE, Split
from tersor.ptq.networks import RepNet
from tersor.ptq.reparam import merge


@torch.no_grad()
def export(net: RepNet, plan: Plan, progress: Progress, split: Split, *, seed: int, out: Path) -> dict[str, Any]:
    """Write float32 weights, lock and card; returns the lock.

    Bfloat16 would move the norms' statistics, which decide how large the merged kernels' entries are.
    """
    net.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    right = sum(
        int((net(net.normalize(pixels)).argmax(1) == labels).sum())
        for pixels, labels in zip(split.held_out.pixels.split(500), split.held_out.labels.split(500), strict=True)
    )
    net.save_pretrained(out)
    found = wilson_interval(right, len(split.held_out))
    lock = {
        "recipe": f"recipes/{out.name.replace('-', '_')}.py", "data": SOURCE, "sha256": split.sha256, "seed": seed,
        "plan": asdict(plan), "parameters": sum(each.numel() for each in net.parameters()),
        "minutes": round(progress.seconds / 60, 1),
        "scores": {"accuracy": found.value, "low": found.low, "high": found.high, "n": len(split.held_out)},
        "kernels": _kernels(net, split), "curve": progress.curve,
    }  # fmt: skip
    return write_lock(out, lock, partial(card, out.name, net))


def _kernels(net: RepNet, split: Split) -> dict[str, float]:
    """How unruly merged kernels are: largest over median entry of a row, by layer the worst row."""
    merged = merge(net, net.normalize(split.train.pixels[:8]))
    worst = {}
    for name, layer in merged.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            rows = layer.weight.abs().flatten(1)
            worst[name.removesuffix(".merged")] = round(float((rows.amax(1) / rows.median(1).values).max()), 1)
    return worst


_ABOUT = {
    "repvgg": "3 x 3, 1 x 1 and identity branches",
    "mobileone": "depthwise blocks of two 3 x 3, a 1 x 1 and an identity branch, each before a pointwise one",
}


def card(name: str, net: RepNet, lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    plan, scores, config = lock["plan"], lock["scores"], net.config
    percent = [f"{100 * scores[key]:.1f}" for key in ("accuracy", "low", "high")]
    blocks = sum(config.depths) + 1
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A `tersor.ptq.networks.RepNet` of {blocks} blocks with {_ABOUT[config.kind]}, {lock['parameters']:,} "
            f"parameters in training form, for colour images of {config.image_size} x {config.image_size} pixels. It "
            "was trained to be quantized: see `tersor quantize` and the documentation of RepAPQ. Weights are stored "
            "in float32.",
            "",
            "## Score on held-out images",
            "",
            f"{percent[0]} % right [{percent[1]}, {percent[2]}] (95 % Wilson) of the {scores['n']:,} test images.",
            "",
            "## Training",
            "",
            f"Trained on CIFAR-10. `python {lock['recipe']} --data FOLDER --out OUT`, seed {lock['seed']}: "
            f"{plan['epochs']} epochs of batches of {plan['batch']} in {lock['minutes']:.0f} minutes "
            f"({lock['machine']['cpu']}, {lock['machine']['threads']} thread). Data: {lock['data']}. The set was "
            "collected from the web for research and has no licence; none of its images is part of this package.",
            "",
            *markdown(
                ("epoch", "loss of its last batch"), ((row["epoch"], row["loss"]) for row in lock["curve"]), names=0
            ),
            "",
            "## Merged kernels",
            "",
            "Largest entry of a row over its median one, by block the worst row. Nothing was done to bring that about.",
            "",
            *markdown(("block", "ratio"), ((name, f"{ratio:,.0f}") for name, ratio in lock["kernels"].items())),
            "",
        ]
    )
