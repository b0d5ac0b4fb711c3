"""The first screen of README and of the docs: what is saved, a door for each reader, and what is not faster."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pages.shared import RESULTS, ROOT, table

from tersor.bench.records import Record, read_jsonl

#: Page -> what leads from it to the pages of the docs.
FRONT_PAGES = {ROOT / "README.md": "docs/", ROOT / "docs" / "index.md": ""}
TOKEN_TIME = "time per token over the base's"
OURS, PLAIN = "ZipCache 4/2 r=0.6", "uniform 3-bit"
MODELS = "bytes of three models over base and deltas"
ATTENTION = "decode attention, 16,384 tokens, 8 KV heads, group 4, dimension 128"
_PART = re.compile(r"(<!-- (\w+): made by benchmarks/tables\.py -->\n).*?(<!-- end -->\n)", re.DOTALL)
#: Finds a record by the file, the item and the quantity.
Find = Callable[[str, str, str], Record]
Row = tuple[str, str, str, str, str]


def committed(file: str, item: str, quantity: str) -> Record:
    """The only record of ``benchmarks/results/<file>.jsonl`` with this item and quantity."""
    (found,) = (r for r in read_jsonl(RESULTS / f"{file}.jsonl") if (r.item, r.quantity) == (item, quantity))
    return found


def number(record: Record, form: str, factor: float = 1.0) -> str:
    """What was measured; a difference that rounds to nothing has no sign."""
    assert record.measured is not None
    text = format(factor * record.measured, form)
    return (text if float(text) else text.lstrip("+-")).replace("-", "−")


def rows(find: Find) -> list[Row]:
    """System, page, what it saves, how much was measured here, and what that costs."""

    def smaller(file: str, name: str) -> str:
        return number(find(file, f"{name}: planted facts", "compression of a 16-bit cache"), ".1f") + "× smaller"

    def worse(name: str) -> str:
        loss = find("kv_agnostic", f"{name}: continuation", "loss")
        assert loss.measured is not None and loss.baseline is not None
        return f"+{100 * (loss.measured / loss.baseline - 1):.1f} % loss"

    def points(file: str, item: str, quantity: str) -> str:
        return number(find(file, item, quantity), "+.1f", 100) + " points"

    def fewer(name: str) -> str:
        return number(find("zipvl", f"{name}: prompt", "attention operations saved"), ".0f", 100) + " % less"

    def needed(way: str) -> float:
        ratio = find("zipr1", f"{way}: every layer sparse", "tokens in attention, sparse layers").measured
        assert ratio is not None
        return ratio

    def fast(file: str, item: str, quantity: str) -> str:
        return number(find(file, item, quantity), ".1f") + "× as fast"

    added = find("merging_bytes", "MiniCache 4-bit: added loss", "loss against the full cache").measured
    whole = find("merging_bytes", "full cache: continuation", "loss").measured
    right = find("experts", "2 bit MSE, k=2", "exact answers").measured
    assert added is not None and whole is not None and right is not None
    three = find("demo", "three experts without router, from the configurations", MODELS)
    sparse, against = "ZipVL evict 0.975", "accuracy against dense"
    return [
        ("ZipCache", "zipcache", "cache memory", smaller("kv_agnostic", OURS), worse(OURS)),
        ("plain 3 bits", "choosing", "cache memory", smaller("kv_agnostic", PLAIN), worse(PLAIN)),
        ("MiniCache", "minicache", "cache memory", smaller("merging_bytes", "MiniCache 4-bit"),
         f"+{100 * added / whole:.1f} % loss"),
        ("ZipVL", "zipvl", "picture attention", fewer(sparse), points("zipvl", f"{sparse}: all kinds", against)),
        ("ZipR1", "zipr1", "picture tokens", f"{100 * (1 - needed('pathwise') / needed('start')):.0f} % fewer",
         points("zipr1", "pathwise: every layer sparse", "right answers against the start")),
        ("ZipAR", "zipar", "image time", fast("images_speed", "window 9: batch 1", "speed-up over raster"),
         points("images", "window 9: samples", "accuracy against raster")),
        ("speculative decoding", "speculative", "image time",
         fast("speculative_paired", "speculative 28: batch 1", "speed-up over raster"),
         points("speculative", "speculative 28: samples", "accuracy against raster")),
        ("NAR", "nar", "image time", fast("nar_speed", "raster: batch 1", "speed-up of NAR"), "training"),
        ("ME-Switch", "meswitch", "model memory", number(three, ".1f") + "× smaller",
         f"{100 * (right - 1):+.1f} points".replace("-", "−")),
        ("RepAPQ", "repapq", "RepVGG time", fast("ptq_speed", "repvgg_a0: batch 1", "speed-up"),
         points("ptq_repvgg", "RepAPQ: w8a8", "accuracy against floating point")),
    ]  # fmt: skip


def saved(find: Find, docs: str) -> str:
    """Markdown: the table, each system linked to its page, and how to read it."""
    cells = [(f"[{name}]({docs}{page}.md)", *rest) for name, page, *rest in rows(find)]
    passes = [find(*each, "forward passes") for each in (("images", "window 9: samples"), ("nar", "NAR: samples"))]
    zipar, nar = (f"{each.measured:.0f} passes for {each.baseline:.0f}" for each in passes)
    distance = [number(find("nar", f"{name}: samples", "Fréchet distance"), ".1f") for name in ("NAR", "raster")]
    token = number(find("experts_speed", "decoding one row", TOKEN_TIME), ".1f")
    unmet = find("zipvl_never_left_out", "ZipVL evict 0.975: all kinds", "accuracy against dense")
    low = number(find("ptq_repvgg", "RepAPQ: w4a4", "accuracy against floating point"), "+.1f", 100)
    return (
        table(["system", "saves", "measured here", "costs"], cells, names=4)
        + "\nMeasured on small models that tersor trains, and on shapes of real ones. The *cache* is what a model "
        "keeps of a text it has read; *loss* says how badly it predicts new text; *points* are right answers, or "
        "pictures of what was asked, in a hundred. MiniCache's layers were trained to be alike. ZipVL's model was "
        "taught where to read a picture and met left-out words in training; one that never met them changes "
        f"by {number(unmet, '+.1f', 100)} points. ZipAR takes {zipar}; NAR takes {nar}, and its images are "
        f"{distance[0]} from real ones where those of one token after the other are {distance[1]}. ME-Switch "
        f"stores three models of 7B, and a token takes {token} times as long. RepAPQ is in 8 bits; "
        f"4 bits cost {low} points.\n"
    )


#: What a reader has -> the command to start with, and the page to read on.
DOORS = {
    "A 7B model on a GPU": (
        'tersor generate --model Qwen/Qwen2.5-7B-Instruct --chat "Why is the sky blue?"', "choosing"
    ),
    "A RepVGG on a CPU": (
        "tersor quantize --model repvgg_a0 --weights w.safetensors --calibration photos/ --out net.onnx", "repapq"
    ),
    "Ten fine-tunes of one model": (
        "tersor experts pack --base B --expert math=M --calibration math=math.txt --out bank/", "meswitch"
    ),
    "An image model": ("tersor images generate --method speculative --out grid.png", "decoding"),
    "Research on KV caches": ("tersor bench kv --peers", "structure"),
}  # fmt: skip


def doors(find: Find, docs: str) -> str:
    """Markdown: one command each for what a reader has."""
    return "".join(f"- **[{what}]({docs}{page}.md)**: `{command}`\n" for what, (command, page) in DOORS.items())


def slower(find: Find, docs: str) -> str:
    """Markdown: what is not faster, in one place; other pages link here."""
    kept = [f"sparse prefill, {share}% of tokens: 32768 tokens" for share in ("79.5", "52.8", "42.1")]

    def span(quantity: str) -> str:
        values = [find("zipvl_gpu", each, quantity).measured or 0.0 for each in kept]
        return f"{min(values):.2f} to {max(values):.2f}"

    # PyTorch's attention in the precision in which it is faster on the machine of the record.
    precisions = ("float32", "bfloat16")
    rival = min(precisions, key=lambda each: find("kv_cpu", f"{ATTENTION}: SDPA {each}", "time").measured or 0.0)
    long = number(find("kv_cpu", f"{ATTENTION}: {OURS}", f"speed-up over SDPA {rival}"), ".1f")
    short = number(find("demo", "one decoding step at 1,024 bytes", "time against the full cache"), ".1f")
    return (
        "On a GPU a single text is written **slower** with these caches than without: at "
        f"{span('decode speed-up')} times the speed, measured with [ZipVL]({docs}zipvl.md#speed) on a text of 32,768 "
        f"tokens, which is read at {span('prefill speed-up')} times the speed. Of packed caches, ZipCache's and "
        "MiniCache's, no time on a GPU is recorded yet. There, use them for memory. On a CPU a packed cache gains with "
        f"its length: after 16,384 tokens attention is {long} times as fast as PyTorch's in {rival}, but after 1,024 "
        f"bytes a step of a small model takes {short} times as long.\n"
    )


PARTS = {"saved": saved, "doors": doors, "slower": slower}


def fill(text: str, docs: str, find: Find = committed) -> str:
    """A page with its parts between the markers made anew."""
    return _PART.sub(lambda found: found[1] + "\n" + PARTS[found[2]](find, docs) + "\n" + found[3], text)


def build() -> dict[Path, str]:
    """Both pages with their text."""
    return {page: fill(page.read_text(encoding="utf-8"), docs) for page, docs in FRONT_PAGES.items()}
