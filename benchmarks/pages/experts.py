"""Tables and plot of ME-Switch: storage, quality by bits and channels, the router, and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages.shared import ASSETS, RESULTS, TABLES, Point, estimate, interval, percent, table
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.bench.scoreboard import format_number
from tersor.experts.bench.quality import BASE, SVD
from tersor.experts.demo import ROUTER, SALIENT
from tersor.experts.storage import ModelSize

ANSWERS, DIVERGENCE, BYTES = "exact answers", "divergence from the expert", "bytes beside the base"
FOUND = "planted channels found"


def storage_table() -> str:
    """Markdown: bytes of Mistral-7B experts, counted from the configurations."""
    size = ModelSize.of(MistralConfig(), MistralForCausalLM)
    router = ModelSize.of(Qwen2Config(**ROUTER), Qwen2ForCausalLM).bytes_16
    rows = []
    for experts, with_router, same in ((3, 0, 0), (3, 1, 0), (3, 0, 1), (16, 0, 0), (16, 1, 0)):
        settings: dict[str, Any] = {"bits": 2, "others_changed": not same, "router": router if with_router else 0}
        none, few = (size.total_bytes(experts, salient=k, **settings) for k in (0, SALIENT))
        whole = experts * size.bytes_16
        parts = ["embeddings as the base's"] * same + ["a router of 1.8 billion"] * with_router
        name = f"{experts} experts" + (f", {', '.join(parts)}" if parts else "")
        cells = [f"{number / 1e9:.2f}" for number in (whole, none, few)]
        rows.append([name, *cells, f"{whole / none:.3f}", f"{whole / few:.3f}"])
    titles = ["Mistral-7B", "apart, GB", "ME-Switch k=0, GB", f"k={SALIENT}, GB", "times smaller k=0", f"k={SALIENT}"]
    return table(titles, rows)


def by_item(records: list[Record]) -> dict[str, dict[str, Record]]:
    """Records by item and quantity, in order."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record.item, {})[record.quantity] = record
    return found


def quality_table(records: list[Record]) -> str:
    """Markdown: what each delta answers, how far it is from the expert, and what it takes."""
    rows = []
    for item, known in by_item(records).items():
        if ANSWERS in known:
            kl, size = known[DIVERGENCE], known[BYTES]
            assert size.measured is not None
            spread = f"{_short(kl.measured)} [{_short(kl.low)}, {_short(kl.high)}]"
            rows.append([item, f"{size.measured:,.0f}", interval(known[ANSWERS]), spread])
    titles = ["delta", "bytes", "exact answers, % [95 %]", "divergence, nats a token [95 %]"]
    return table(titles, rows) + "\n" + provenance(records)


def planted_table(records: list[Record]) -> str:
    """Markdown: which channels each selection finds."""
    rows = [
        [item, interval(known[FOUND]), f"{known[FOUND].n:,}"]
        for item, known in by_item(records).items()
        if FOUND in known
    ]
    return table(["selection", "planted channels found, % [95 %]", "channels"], rows)


def _short(value: float | None) -> str:
    assert value is not None
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def quality_plot(records: list[Record]) -> str:
    """SVG: divergence from the expert against bits, by way of choosing channels and steps."""
    curves: dict[str, list[Point]] = {}
    for item, known in by_item(records).items():
        if ANSWERS in known and item not in (BASE, SVD):
            kl = known[DIVERGENCE]
            for name, fits in _CURVES.items():
                if item in fits:
                    curves.setdefault(name, []).append((float(item.split()[0]), *estimate(kl)))
    return plot_lines(
        [Line(name, tuple(sorted(points))) for name, points in curves.items()],
        x_label="bits of a code",
        y_label="divergence from the expert, nats a token",
        description="Divergence from the expert against bits of a code, with and without salient channels",
        logarithmic=True,
    )


#: Rows of the quality table that a line of the plot joins.
_CURVES = {
    "no salient channels": ("1 bit, k=0", "2 bit MSE, k=0", "4 bit, k=0"),
    "two by reconstruction error": ("1 bit, k=2", "2 bit MSE, k=2", "4 bit, k=2"),
    "two, steps distilled": ("1 bit, k=2, distilled", "2 bit MSE, k=2, distilled"),
    "none, steps distilled": ("1 bit, k=0, distilled", "2 bit MSE, k=0, distilled"),
}


def router_table(records: list[Record]) -> str:
    """Markdown: both routers on templates that they have and have not seen."""
    rows = []
    for item, known in by_item(records).items():
        if "answered right" not in known:
            continue
        end, gap = known["answered right"], known["answered right, less the best choice"]
        time = known["time of a request"]
        rows.append(
            [
                item, interval(known["right expert"]), f"{known['calibration error'].measured:.3f}",
                percent(end.measured), f"{100 * (gap.measured or 0):+.1f}", f"{percent(end.peer)} ({end.peer_name})",
                f"{time.measured:.2f}",
            ]
        )  # fmt: skip
    titles = ["router", "right expert, % [95 %]", "calibration error", "answered right, %", "less the best choice",
              "best single expert, %", "ms a request"]  # fmt: skip
    return table(titles, rows) + "\n" + provenance(records)


def speed_table(records: list[Record]) -> str:
    """Markdown: every timing with its spread."""
    rows = [
        [
            each.item, each.quantity, _spread(each), each.unit,
            "" if each.peer is None else f"{format_number(each.peer)} {each.peer_name}",
        ]
        for each in records
    ]  # fmt: skip
    return table(["what", "quantity", "measured", "unit", "to compare with"], rows) + "\n" + provenance(records)


def provenance(records: list[Record]) -> str:
    """How the records were made, on what."""
    first, commands = records[0], dict.fromkeys(f"`{record.command}`" for record in records)
    return (
        f"{', '.join(commands)}: model {first.model} ({first.shapes}); {first.machine['cpu']}, "
        f"{first.machine['threads']} thread, torch {first.versions['torch']}, transformers "
        f"{first.versions['transformers']}.\n"
    )


def serving_table(records: list[Record]) -> str:
    """Markdown: what each kind of batch writes a second, how soon and how well, and a load beside streams."""
    kinds = (
        "tokens a second", "speed over one at a time", "time to the first token", "exact answers",
        "bytes of the cache over those of 16 bits",
    )  # fmt: skip
    rows = []
    for item, known in by_item(records).items():
        if not known.keys() & set(kinds):
            continue
        cells = [
            "" if kind not in known else interval(known[kind]) if kind == kinds[3] else _spread(known[kind])
            for kind in kinds
        ]
        rows.append([item, *cells])
    titles = [
        "requests",
        "tokens/s",
        "times one at a time",
        "first token, ms",
        "exact answers, % [95 %]",
        "cache / 16-bit",
    ]
    loads = [each for each in records if "streams" in each.item]
    beside = [[each.item, each.quantity, _spread(each), each.unit, _other(each)] for each in loads]
    about = table(["what", "quantity", "measured", "unit", "to compare with"], beside)
    return "\n".join([table(titles, rows), provenance(records), about, provenance(loads)])


def soak_table(records: list[Record]) -> str:
    """Markdown: what a server saw under load."""
    rows = [[each.quantity, _spread(each), each.unit, "" if each.n is None else f"{each.n:,}"] for each in records]
    return table([records[0].item, "measured", "unit", "n"], rows) + "\n" + provenance(records)


def cluster_table(records: list[Record]) -> str:
    """Markdown: what a cluster adds to an answer, and what a lost replica costs."""
    rows = [
        [each.item, each.quantity, _spread(each), each.unit, "" if each.n is None else f"{each.n:,}", _other(each)]
        for each in records
    ]
    return table(["what", "quantity", "measured", "unit", "n", "to compare with"], rows) + "\n" + provenance(records)


def _spread(record: Record) -> str:
    spread = "" if record.low is None else f" [{format_number(record.low)}, {format_number(record.high)}]"
    return f"{format_number(record.measured)}{spread}"


def _other(record: Record) -> str:
    if record.peer is not None:
        return f"{format_number(record.peer)} {record.peer_name}"
    return "" if record.baseline is None else format_number(record.baseline)


def build() -> dict[Path, str]:
    """The generated files with their text."""
    names = ("experts", "experts_router", "experts_speed", "experts_serving", "experts_soak", "experts_cluster")
    quality, routes, speed, serving, soak, cluster = (read_jsonl(RESULTS / f"{name}.jsonl") for name in names)
    return {
        TABLES / "meswitch_storage.md": storage_table(),
        TABLES / "meswitch.md": quality_table(quality) + "\n![Divergence by bits](assets/meswitch_bits.svg)\n",
        TABLES / "meswitch_planted.md": planted_table(quality),
        TABLES / "meswitch_router.md": router_table(routes),
        TABLES / "meswitch_speed.md": speed_table(speed),
        TABLES / "serving.md": serving_table(serving),
        TABLES / "serving_soak.md": soak_table(soak),
        TABLES / "serving_cluster.md": cluster_table(cluster),
        ASSETS / "meswitch_bits.svg": quality_plot(quality),
    }
