"""Tokenizer, scores and model card of tiny-experts."""

from __future__ import annotations

from typing import Any

from shared.lock import percent, share_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tersor.bench.runs import markdown
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
            found[who][skill] = share_of(sum(right), SCORED)
    return found


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
            *markdown(
                ("", *skills), ((who, *(percent(row[each]) for each in skills)) for who, row in found.items()), names=1
            ),
            "",
            f"The router sends {percent(router['seen'])} % of requests to the right expert with the templates that it "
            f"was trained on, {percent(router['unseen'])} % with others ({router['n']:,} requests each).",
            "",
            "## Training",
            "",
            f"`python recipes/tiny_experts.py --out OUT`, seed {lock['seed']}, {minutes:.0f} "
            f"minutes on a core ({lock['machine']['cpu']}). All data is generated; Apache-2.0. One prompt in eight "
            "is held out by its checksum.",
            "",
            *markdown(
                ("model", "steps", "batch", "rate", "last loss"),
                (
                    (
                        who,
                        f"{each['steps']:,}",
                        each["batch"],
                        f"{each['rate']:g}",
                        f"{each['curve'][-1][1]:.4f}" if "curve" in each else "",
                    )
                    for who, each in {**lock["trainings"], "router": router}.items()
                ),
            ),
            "",
        ]
    )


def _shown(skill: str) -> Any:
    return examples(skill, 1, seed=SCORE_SEED, held_out=True)
