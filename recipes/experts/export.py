"""Checkpoint folder, lock file and model card of tiny-experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tersor import _atomic
from tersor.bench.measure import machine, versions, wilson_interval
from tersor.experts.bench.quality import exact
from tersor.experts.bench.skills import CHARACTERS, EOS, PAD, UNKNOWN, VOCABULARY, encode, examples

#: Held-out prompts that base and experts are scored on, and what draws them.
SCORED, SCORE_SEED = 1000, 40
EXPERTS = "experts"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; nothing is added around a text."""
    marks = {"<pad>": PAD, "<end>": EOS, "<unknown>": UNKNOWN}
    vocabulary = marks | {character: encode(character)[0] for character in CHARACTERS}
    vocabulary |= {f"<unused{number}>": number for number in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def scores(base: Any, experts: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of exact answers on held-out prompts with Wilson intervals: of the base and of every expert, by skill."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for who, model in {"base": base, **experts}.items():
        found[who] = {}
        for skill in experts:
            right = exact(model, examples(skill, SCORED, seed=SCORE_SEED, held_out=True))
            share = wilson_interval(sum(right), SCORED)
            found[who][skill] = {
                "share": round(share.value, 4),
                "low": round(share.low, 4),
                "high": round(share.high, 4),
            }
    return found


def write_lock(folder: Path, lock: dict[str, Any]) -> None:
    """Write lock file and card; the lock gets what the run stood on."""
    lock |= {"recipe": "recipes/tiny_experts.py", "versions": versions(), "machine": machine()}
    _atomic.write_text(folder / "recipe.lock.json", json.dumps(lock, indent=1) + "\n")
    _atomic.write_text(folder / "CARD.md", card(lock))


def card(lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    found, size, planted = lock["scores"], lock["size"], lock["planted"]
    skills = list(found["base"])
    minutes = sum(each["minutes"] for each in lock["trainings"].values())
    router = lock["router"]
    return "\n".join(
        [
            "# tiny-experts",
            "",
            f"A `LlamaForCausalLM` with {lock['parameters']:,} parameters ({size['layers']} layers, width "
            f"{size['hidden']}) that reads characters, {len(skills)} experts in `experts/`, each a full fine-tuning of "
            "it on one skill, and in `router/` a smaller model that sends requests in words to one of them. Weights "
            "are stored in bfloat16.",
            "",
            "```text",
            *(f"{skill:8} {example.prompt}{example.answer}" for skill in skills for example in _shown(skill)),
            "```",
            "",
            "Numbers are written with the lowest digit first. All but adding share their prompts, so that a wrong "
            "expert shows at once. The base was trained to reverse, sort and copy words that ask for nothing in "
            "particular, to add without carrying, and to look up pairs.",
            "",
            f"Before fine-tuning, {planted['channels']} input channels of every linear were given activations "
            f"{planted['factor']:g} times as large without changing what the base computes; `planted.json` says which. "
            "Large language models have such channels, and quantizing their deltas does the most harm.",
            "",
            f"## Exact answers to {SCORED:,} held-out prompts, % [95 % Wilson]",
            "",
            f"| | {' | '.join(skills)} |",
            f"|---|{'---:|' * len(skills)}",
            *(f"| {who} | {' | '.join(_percent(row[skill]) for skill in skills)} |" for who, row in found.items()),
            "",
            f"The router sends {_percent(router['seen'])} % of requests to the right expert with the templates that it "
            f"was trained on, {_percent(router['unseen'])} % with others ({router['n']:,} requests each).",
            "",
            "## Training",
            "",
            f"`python recipes/tiny_experts.py --out OUT`, seed {lock['seed']}, {minutes:.0f} "
            f"minutes on a core ({lock['machine']['cpu']}). All data is generated; Apache-2.0. One prompt in eight "
            "is held out by its checksum.",
            "",
            "| model | steps | batch | rate | last loss |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {who} | {each['steps']:,} | {each['batch']} | {each['rate']:g} | {each['curve'][-1][1]:.4f} |"
                for who, each in lock["trainings"].items()
            ),
            f"| router | {router['steps']:,} | {router['batch']} | {router['rate']:g} | |",
            "",
        ]
    )


def _shown(skill: str) -> Any:
    return examples(skill, 1, seed=SCORE_SEED, held_out=True)


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['share']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
