"""ME-Switch on tiny-experts: bytes of several experts, and what quantizing their deltas costs in answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tersor.bench.measure import Estimate, bootstrap_difference
from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Answer, Figure, Sample, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.bench.verdicts import judge_points
from tersor.experts.bench.quality import BASE, LSQ, MINMAX, MODEL, MSE, ROWS, SVD, Family, Kept, compress, quality_table
from tersor.experts.bench.routing import ENCODER, NGRAMS, route_requests
from tersor.experts.bench.skills import examples
from tersor.experts.host import ExpertHost
from tersor.experts.storage import ModelSize

SYSTEM = "meswitch"
#: The skill that suffers most from quantizing.
SKILL = "add"
PROMPTS, REQUESTS = 512, 400
SALIENT = 4
OURS, NAIVE = f"{MSE}, k=2", f"{MINMAX}, k=0 (naive)"
SHOWN = (OURS, NAIVE, f"{LSQ}, k=2", f"{LSQ}, k=0", f"{MSE}, k=0", "1 bit, k=2, distilled", "1 bit, k=0, distilled")
#: A point is lost for good when more answers than this are wrong that the expert has right.
ALLOWED_LOSS = 1.0
#: Sizes of the models that the paper has its ratios from.
ROUTER: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
}  # fmt: skip


def mistral_ratio(*, router: bool, experts: int = 3) -> float:
    """Bytes of so many Mistral-7B models in 16 bits over those of base, 2-bit deltas and the paper's router, if any."""
    size = ModelSize.of(MistralConfig(), MistralForCausalLM)
    extra = ModelSize.of(Qwen2Config(**ROUTER), Qwen2ForCausalLM).bytes_16 if router else 0
    return experts * size.bytes_16 / size.total_bytes(experts, bits=2, salient=SALIENT, router=extra)


def run(on_progress: OnProgress) -> DemoResult:
    """Pack one expert in several ways and ask it; ``on_progress`` is told what is being done."""
    family = Family.load()
    kept: dict[str, Kept] = {}
    for row, each in quality_table(family, SKILL, n=PROMPTS, seed=DEMO_SEED, rows=SHOWN):
        on_progress(f"expert {SKILL}: {row}")
        kept[row] = each
    on_progress("requests in words")
    routes = route_requests(unseen=True, n=REQUESTS, seed=DEMO_SEED)
    size = 2 * sum(parameter.numel() for parameter in family.base.parameters())
    section = Section(
        title="ME-Switch: many fine-tuned models on one base",
        intro=(
            "A base and four experts that were fine-tuned from it. A few input channels have huge activations, as in "
            "large language models; quantizing their deltas spoils the expert, and keeping two of them in 16 bits "
            "saves it."
        ),
        figures=drawn(lambda: _plot(kept, size)),
        samples=[_sample(family)],
    )
    return DemoResult(_records(kept, routes), section)


def _plot(kept: dict[str, Kept], size: int) -> Figure:
    points = []
    for row, each in kept.items():
        if row != BASE:
            mean = each.accuracy() * 100
            family = "k=2" if "k=2" in row else "SVD" if row == SVD else "k=0"
            points.append(Point(row, size / each.nbytes, mean.value, mean.low, mean.high, family))
    svg = plot_quality_vs_bytes(
        points,
        x_label="compression of an expert in 16 bits",
        y_label="sums answered exactly, %",
        description="Exact answers of the addition expert against compression, by bits and salient channels",
    )
    return Figure(
        svg, "Answers against compression: up and to the right is better. k is the number of salient channels."
    )


def _sample(family: Family) -> Sample:
    """One prompt to the base and to all experts, in one batch of a host."""
    example = examples("sort", 1, seed=DEMO_SEED, held_out=True)[0]
    answers = []
    with TemporaryDirectory() as folder:
        host = ExpertHost(family.base)
        names: list[str | None] = [None, *family.experts]
        for skill in family.experts:
            compress(family, skill, ROWS[OURS]).save_pretrained(Path(folder) / skill)
            host.load_expert(skill, Path(folder) / skill)
        from tersor import zoo

        tokenizer: Any = zoo.load(MODEL)[1]
        ids = tokenizer([example.prompt] * len(names), return_tensors="pt")["input_ids"]
        out = host.generate(ids, expert_names=names, max_new_tokens=len(example.answer) + 1, do_sample=False)
        for name, row in zip(names, out[:, ids.shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            answers.append(Answer(name or "base", text, text == example.answer if name == "sort" else None))
        host.close()
    return Sample(
        title="one prompt for all experts, in one batch",
        passage=example.prompt,
        question="",
        expected=f"{example.answer} (sorted)",
        answers=answers,
    )


def _against_expert(kept: Kept) -> Estimate:
    """Points of exact answers; the expert's own are those of a model that diverges by nothing."""
    return _points(kept.right, kept.expert_right)


def _points(right: Sequence[bool], other: Sequence[bool]) -> Estimate:
    """Difference of two models' right answers to the same questions, in points."""
    return bootstrap_difference(list(map(float, right)), list(map(float, other))) * 100


def _records(kept: dict[str, Kept], routes: dict[str, Any]) -> list[Record]:
    lost, naive, n = _against_expert(kept[OURS]), _against_expert(kept[NAIVE]), len(kept[OURS].right)
    record = demo_records(SYSTEM, MODEL)
    closer = kept[f"{LSQ}, k=0"].kl().value / kept[f"{LSQ}, k=2"].kl().value
    found = [
        record(
            f"{OURS}: sums answered exactly", "answers against the expert's", "points", lost, n,
            claim="nearly lossless", claim_source="abstract (arXiv 2406.09041)", baseline=0.0, peer=naive.value,
            peer_name="naive 2-bit",
            verdict=judge_points(lost, n, allowed=ALLOWED_LOSS, ahead=_points(kept[OURS].right, kept[NAIVE].right)),
        ),
        record(
            "2 bit LSQ, k=2: distance to the expert", "divergence of k=0 over that of k=2", "x", closer, n, baseline=1.0
        ),
    ]  # fmt: skip
    for router, claim in ((True, 1.74), (False, 2.04)):
        ratio = mistral_ratio(router=router)
        found.append(
            record(
                f"three experts {'with' if router else 'without'} router, from the configurations",
                "bytes of three models over base and deltas", "x", ratio, None, model="Mistral-7B", claim=claim,
                claim_source="three Mistral-7B experts (arXiv 2406.09041)", baseline=1.0, seed=None,
                shapes="sizes only", verdict="holds" if abs(ratio - claim) < 0.005 else "fails",
            )
        )  # fmt: skip
    routed, cheap = routes[ENCODER], routes[NGRAMS]
    found.append(
        record(
            "requests in words that the router has not seen the like of", "reach the right expert", "%",
            routed.accuracy * 100, routed.n, peer=100 * cheap.accuracy.value, peer_name="n-grams, linear",
        )
    )  # fmt: skip
    return found
