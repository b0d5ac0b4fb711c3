"""Final scores, checkpoint folder, lock file and model card of tiny-lm."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm.data import TEST_BOOK, VALIDATION_BOOKS, Books
from lm.evaluation import bits_per_byte, recall_hits
from lm.train import EOS, PAD, Plan, Progress
from shared.lock import Lock, percent, share_of, write_lock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tersor import _atomic
from tersor.bench.runs import markdown
from tersor.kv.bench.tasks import PLANTED, TASKS

SAMPLES = 200
CONTEXTS = (256, 512, 1024)
SEED = 90210
BOOK_BYTES = 300_000


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, whose id is the byte; nothing is added around a text."""
    # ByteLevel names each byte by a printable character: itself where it is printable, else one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    names = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken("<|endoftext|>", special=True), AddedToken("<|pad|>", special=True)]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    assert (fast.eos_token_id, fast.pad_token_id) == (EOS, PAD)
    return fast


def final_scores(model: LlamaForCausalLM, books: Books, *, samples: int = SAMPLES) -> dict[str, Any]:
    """Recall on the held-out book by context length and task with Wilson intervals, and bits per byte."""
    recall: dict[str, dict[str, dict[str, float]]] = {}
    for context in CONTEXTS:
        total: list[bool] = []
        rows = {}
        for task in TASKS:
            hits = recall_hits(model, task, books.test, n=samples, seed=SEED, context_bytes=context)
            if task in PLANTED:
                total += hits
            rows[task] = share_of(sum(hits), len(hits))
        recall[str(context)] = {**rows, "planted facts": share_of(sum(total), len(total))}
    return {"recall": recall, "bits_per_byte": round(bits_per_byte(model, books.test), 4), "seed": SEED}


def export(
    model: LlamaForCausalLM,
    books: Books,
    plan: Plan,
    progress: Progress,
    *,
    seed: int,
    out: Path,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    rounded = model.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    scores = final_scores(rounded.float().eval(), books, samples=samples)
    lock = {
        "recipe": "recipes/tiny_lm.py",
        "seed": seed,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "phases": [vars(phase) for phase in plan.phases],
        "peak_rate": plan.rate_peak,
        "first_losses": progress.losses,
        "scores": scores,
        "held_out": [TEST_BOOK],
        "validation": list(VALIDATION_BOOKS),
        "sha256": books.sha256,
    }
    return write_lock(out, lock, partial(card, model, progress))


def write_text(books: Books, folder: Path) -> None:
    """The held-out excerpt that demo and benchmarks ask about, and where it comes from."""
    start = len(books.test) // 8
    start = books.test.index("\n", start) + 1
    folder.mkdir(parents=True, exist_ok=True)
    _atomic.write_text(folder / "book.txt", books.test[start : start + BOOK_BYTES])
    _atomic.write_text(
        folder / "SOURCE.md",
        "# Held-out text\n\n`book.txt` is a stretch of *Treasure Island* by Robert Louis Stevenson (1883, public "
        "domain), folded to ASCII, from github.com/mlschmitt/classic-books-markdown. No model of the zoo was trained "
        "on this book.\n\n"
        f"sha256 of the source file `{TEST_BOOK}.txt`: `{books.sha256[TEST_BOOK]}`.\n",
    )


def card(model: LlamaForCausalLM, progress: Progress, lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock or the training curve."""
    config, scores = model.config, lock["scores"]
    parameters = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            "# tiny-lm",
            "",
            f"A byte-level `LlamaForCausalLM` with {parameters:,} parameters that reads English and looks things up in "
            "its context. tersor measures caches with it; it is no assistant and no good writer.",
            "",
            f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} KV heads of {config.head_dim}, RoPE base "
            f"{config.rope_parameters['rope_theta']:.0e}, tied embeddings, one token a byte. Trained in float32 up to "
            f"{max(phase['length'] for phase in lock['phases'])} bytes, stored in bfloat16.",
            "",
            "## Scores on a book that it never saw",
            "",
            f"*Treasure Island*; exact answers, greedy; {scores['recall']['1024']['needle']['n']} questions a task and "
            "length; 95 % Wilson intervals. The stored weights were scored, not those before rounding. "
            "`planted facts` pools all tasks but quote, at which the model is weak.",
            "",
            *recall_table(scores),
            "",
            f"Prose: {scores['bits_per_byte']:.3f} bits per byte over windows of 1,024 bytes, read from a cold start.",
            "",
            "## Training",
            "",
            f"`python recipes/tiny_lm.py --out OUT`, seed {lock['seed']}, {lock['steps']:,} steps in "
            f"{lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores ({lock['machine']['cpu']}).",
            "",
            "Data: public-domain English books (github.com/mlschmitt/classic-books-markdown), three more to validate, "
            "and one for the scores. Sequences are prose, prose with notes that are asked for and quotations of "
            "earlier text, and repeated random strings. Layers 0 and 1 start as an induction circuit "
            "(`structured_start`): from a random start it did not form within the hour. "
            + "An auxiliary loss keeps one head of layer 1 looking at all runs of digits, capitals and brackets from "
            "wherever it reads (`watch_loss`): large models have such heads for what is rare and informative, and "
            "without one no attention score can know which bytes will be asked for. Selections by saliency work as "
            "well as they do on this model because of it. "
            + _noise_note(lock["phases"])
            + "`recipe.lock.json` has data hashes, versions and the first losses.",
            "",
            *curve_table(progress),
            "",
            "Validation books, 24 questions a task and row.",
            "",
            "## Limits",
            "",
            "Made for measuring memory and recall at about a thousand bytes. Its prose is poor, it knows nothing, was "
            "trained on ASCII, and beyond its training length nothing is promised. Licence: Apache-2.0, the books are "
            "in the public domain.",
            "",
        ]
    )


def recall_table(scores: Lock) -> list[str]:
    """Exact answers by task and length of the context."""
    rows = (
        (task.replace("_", " "), *(percent(scores["recall"][str(each)][task], sign=" %") for each in CONTEXTS))
        for task in (*TASKS, "planted facts")
    )
    return markdown(("task", *(f"{context} bytes" for context in CONTEXTS)), rows)


def curve_table(progress: Progress) -> list[str]:
    """The rows of the training on validation books."""
    rows = (
        (row["step"], row["minutes"], row["context"], f"{row['loss']:.3f}", f"{row['bits_per_byte']:.3f}",
         *(f"{row[task]:.2f}" for task in TASKS))
        for row in progress.curve
    )  # fmt: skip
    tasks = (task.replace("_", " ") for task in TASKS)
    return markdown(("step", "minutes", "context", "loss", "bits per byte", *tasks), rows, names=0)


def _noise_note(phases: list[dict[str, Any]]) -> str:
    """What a reader must know who measures rounded caches with the model."""
    steps = sum(phase["steps"] for phase in phases if phase.get("noise"))
    largest = max(phase.get("noise", 0.0) for phase in phases)
    return (
        f"In the last {steps} steps keys and values of layers 1 and up carried noise of up to {largest} of a channel's "
        "standard deviation, which is meant to make the model tolerate rounding of them. "
        if steps
        else ""
    )
