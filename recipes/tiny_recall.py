"""Rebuild tiny-recall: a two-layer Llama that looks up pair tokens, trained in about two minutes on two CPU cores.

    python recipes/tiny_recall.py --out OUT

The data is generated; nothing is fetched. The run is short enough to start over after an interruption.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from shared.lock import percent, write_lock
from shared.run import refused, set_rate
from transformers import LlamaConfig, LlamaForCausalLM

from tersor.bench.runs import markdown
from tersor.kv.bench.contenders import FULL, pick
from tersor.kv.bench.pair_recall import CONTEXT, VOCABULARY, pair_samples, score_pairs

BATCH = 32
#: Training rows are drawn with seeds from here on, far from those of any evaluation.
FIRST_SEED = 10_000_000
EVALUATION_SEED = 4


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model, a pure function of ``seed``."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(model: LlamaForCausalLM, *, steps: int, seed: int, rate: float = 3e-3) -> list[list[float]]:
    """AdamW on the loss of the values alone; returns rows of (step, loss, share of values right)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    curve = []
    for step in range(steps):
        rows = pair_samples(BATCH, seed=FIRST_SEED + seed * 100_000 + step)
        logits = model(rows[:, :-1], use_cache=False).logits[:, CONTEXT + 1 :: 2]
        values = rows[:, CONTEXT + 2 :: 2]
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, rate * min(1.0, (step + 1) / 50) * min(1.0, 4 * (steps - step) / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            curve.append(
                [step + 1, round(loss.item(), 4), round((logits.argmax(-1) == values).float().mean().item(), 4)]
            )
            print(*curve[-1], flush=True)
    return curve


def card(lock: dict) -> str:
    """The model card as Markdown."""
    score = lock["scores"]
    return "\n".join(
        [
            "# tiny-recall",
            "",
            "A two-layer `LlamaForCausalLM` (hidden size 64, 4 heads, 2 KV heads) that looks up pair tokens: 16 of "
            "them among 64 fillers, each one key with its value, then 16 questions. It has no tokenizer and no "
            "language. tersor compares saliency metrics with it, because each fact is one token.",
            "",
            f"Accuracy with the full cache on {score['n']} held-out samples of 16 questions: "
            f"{percent(score, digits=2, sign=' %')}, 95 % bootstrap over samples.",
            "",
            f"`python recipes/tiny_recall.py --out OUT`, seed {lock['seed']}, {lock['steps']} steps in "
            f"{lock['minutes']:.1f} minutes on {lock['machine']['cores']} cores. Generated data; Apache-2.0.",
            "",
            *markdown(("step", "loss", "values right"), lock["curve"], names=0),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild tiny-recall.")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    if args.steps < 1:
        return refused("tiny_recall", ValueError(f"--steps {args.steps} must be at least 1"))
    started = time.monotonic()
    model = new_model(args.seed)
    curve = train(model, steps=args.steps, seed=args.seed)
    minutes = round((time.monotonic() - started) / 60, 2)
    model.to(torch.bfloat16).save_pretrained(args.out / "tiny-recall")
    scores = score_pairs(model.float().eval(), pick([]), n=500, seed=EVALUATION_SEED)[FULL]
    mean = scores.mean()
    lock = {
        "recipe": "recipes/tiny_recall.py",
        "seed": args.seed,
        "steps": args.steps,
        "minutes": minutes,
        "curve": curve,
        "scores": {"share": mean.value, "low": mean.low, "high": mean.high, "n": len(scores.values)},
    }
    print(write_lock(args.out / "tiny-recall", lock, card)["scores"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
