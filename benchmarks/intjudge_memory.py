"""What a training of a 7B judge needs in memory, counted on the meta device: nothing is loaded, no GPU is needed.

    python benchmarks/intjudge_memory.py --out benchmarks/results/intjudge_memory.jsonl

The model has Qwen2-VL-7B's shapes and the adapters of `tersor train intjudge`. Weights, adapters, gradients and
optimizer are counted exactly; activations are those of one row after the other, with checkpointing: what each layer
keeps, and the largest that one layer needs while it is computed again. Of the 24 GB or 80 GB of a card, what the CUDA
context and fragments take is left for the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tersor._compat import older_checkpointing_names
from tersor.bench.records import write_jsonl
from tersor.bench.runs import markdown, record_maker
from tersor.opening.intjudge.lora import adapters

#: Shapes of Qwen2-VL-7B-Instruct that are not the library's defaults.
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
#: Bits of a weight in NF4 with its constants quantized a second time (arXiv 2305.14314, section 3).
NF4_BITS = 4.127
GB = 10**9
#: Cards, in GB, and how much of one is planned with.
CARDS, USED = {"24 GB": 24.0, "80 GB": 80.0}, 0.9


def shapes(text: dict[str, int] | None = None) -> Qwen2VLForConditionalGeneration:
    """The model without its numbers."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=dict(text or TEXT))).to(torch.bfloat16)


def tokens(pictures: int, side: int, text: int) -> int:
    """Of a battle: a picture has a token for 28 by 28 pixels."""
    return pictures * round(side / 28) ** 2 + text


def count(
    model: Qwen2VLForConditionalGeneration, *, rank: int, four_bits: bool, length: int, rows: int
) -> dict[str, float]:
    """Bytes by what they are for.

    Args:
        model: On the meta device; it gets adapters.
        rank: Of the adapters.
        four_bits: Whether the linear layers of the language model are kept in NF4.
        length: Tokens of a row.
        rows: Of a forward.
    """
    text = model.config.text_config
    packed = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "visual" not in name and "lm_head" not in name
    )
    total = sum(weight.numel() for weight in model.parameters())
    weights = (2 * (total - packed) + NF4_BITS / 8 * packed) if four_bits else 2 * total
    with older_checkpointing_names():
        trained = sum(w.numel() for w in get_peft_model(model, adapters(rank)).parameters() if w.requires_grad)
    held, hidden, inner = length * rows, text.hidden_size, text.intermediate_size
    kept = 2 * held * hidden * text.num_hidden_layers
    # One layer again: input, norms, queries, keys, values and output of attention, three of the MLP; and gradients.
    again = 2 * 2 * held * (10 * hidden + 3 * inner)
    return {"weights": weights, "adapters, gradients, optimizer": 16 * trained, "activations": kept + again}


def main(argv: list[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--text", type=int, default=800)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    args = parser.parse_args(argv)
    length = tokens(args.pictures, args.side, args.text)
    command = "python benchmarks/intjudge_memory.py"
    make = record_maker(
        "intjudge", model="Qwen2-VL-7B", seed=0, shapes="shapes of Qwen2-VL-7B, nothing loaded", command=command
    )
    records, lines = [], []
    for name, four_bits in (("bfloat16", False), ("4 bits (--qlora)", True)):
        found = count(shapes(), rank=args.rank, four_bits=four_bits, length=length, rows=args.rows)
        found["together"] = sum(found.values())
        fits = [card for card, size in CARDS.items() if found["together"] / GB <= USED * size]
        seen = (
            f"{args.pictures} pictures of {args.side} pixels, {args.rows} rows of {length:,} tokens, rank {args.rank}"
        )
        records += [make(f"{name}: {seen}", what, "GB", size / GB, 1) for what, size in found.items()]
        lines.append([name, *(f"{size / GB:.1f}" for size in found.values()), ", ".join(fits) or "none"])
    print("\n".join(markdown(("weights in", *found, "fits on"), lines)))
    if args.out is not None:
        write_jsonl(args.out, records)


if __name__ == "__main__":
    main()
