"""One class of transformers under every promise of a session: what becomes of it, in a word and a reason."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from small_configs import small_model
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tersor import ZipCache, ZipVL

#: Verdicts. The last three are faults.
VERDICTS = ("identical", "compressed in part", "refused", "not run", "wrong", "traceback", "silent")
RAW = ZipCache(high_bits=16, low_bits=16, streaming_gap=8, min_tokens_to_compress=8)
DEFAULT = ZipCache(streaming_gap=8, min_tokens_to_compress=8)
SPARSE = ZipVL(tau=0.5, min_tokens=0, policy="keep")
TOKENS, WRITTEN = 40, 12


@dataclass(frozen=True)
class Outcome:
    """What became of a class.

    Args:
        name: The class.
        verdict: One of `VERDICTS`.
        reason: Why, in one line; which layers are compressed where not all are.
    """

    name: str
    verdict: str
    reason: str = ""


def classes(kind: str) -> dict[str, str]:
    """Class -> model type, of the installed transformers: kind "causal" or "image-text"; every class once."""
    names = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found: dict[str, str] = {}
    for model_type, name in names[kind].items():
        found.setdefault(name if isinstance(name, str) else name[0], model_type)
    return dict(sorted(found.items()))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def ids(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def write(model: Any, inputs: torch.Tensor, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and logits ``[rows, written, vocabulary]``; the first row begins with ``padding``."""
    mask = torch.ones_like(inputs)
    mask[0, :padding] = 0
    out = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, 1)


def implementations(model: Any) -> list[Any]:
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [config._attn_implementation for config in configs]


def same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """How two runs differ, None if they do not."""
    if not torch.isfinite(ours[1]).all() and torch.isfinite(theirs[1]).all():
        return "logits are not finite"
    if not torch.equal(ours[0], theirs[0]):
        return "other tokens"
    difference = (ours[1] - theirs[1]).nan_to_num().abs().max() / theirs[1].nan_to_num().abs().max()
    return None if difference < 1e-3 else f"logits differ by {float(difference):.0e}"


def check(kind: str, name: str, model_type: str) -> Outcome:
    """Build the class small and hold a session to its promises."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = small_model(model_type, name)
            before = implementations(model)
            plain = write(model, ids(1))
            batch = write(model, ids(2), padding=9)
            if same(write(model, ids(1)), plain):
                return Outcome(name, "not run", "the model is not reproducible without tersor")
        except Exception as error:
            return Outcome(name, "not run", one_line(error)[:120])
        outcome = _raw(model, name, plain, batch)
        if outcome.verdict in VERDICTS[:2]:
            outcome = _default(model, outcome, plain) or (kind == "image-text" and _sparse(model, outcome)) or outcome
        if implementations(model) != before or same(write(model, ids(1)), plain):
            return Outcome(name, "wrong", "the model is not as it was before the session")
        return outcome


def _raw(model: Any, name: str, plain: Any, batch: Any) -> Outcome:
    """With nothing rounded every token and logit is the library's own, also in a padded batch."""
    try:
        with RAW.on(model) as session:
            if different := same(write(model, ids(1)), plain):
                return Outcome(name, "wrong", different)
            cache = session.cache
            if different := same(write(model, ids(2), padding=9), batch):
                return Outcome(name, "wrong", f"in a padded batch: {different}")
    except NotImplementedError as error:
        return Outcome(name, "refused", " ".join(str(error).split()))
    except Exception as error:
        return Outcome(name, "traceback", one_line(error))
    compressed = [layer for layer in cache.compressed_layers() if layer.segments]
    if not compressed:
        return Outcome(name, "silent", "nothing was compressed")
    if len(compressed) == len(cache.layers):
        return Outcome(name, "identical")
    return Outcome(name, "compressed in part", f"{len(compressed)} of {len(cache.layers)} layers")


def _default(model: Any, outcome: Outcome, plain: Any) -> Outcome | None:
    try:
        with DEFAULT.on(model):
            finite = bool(torch.isfinite(write(model, ids(1))[1]).all()) or not bool(torch.isfinite(plain[1]).all())
    except Exception as error:
        return Outcome(outcome.name, "traceback", f"in 4 and 2 bits: {one_line(error)}")
    return None if finite else Outcome(outcome.name, "wrong", "in 4 and 2 bits: logits are not finite")


def _sparse(model: Any, outcome: Outcome) -> Outcome | None:
    """A sparse prefill leaves tokens out and says how many, or is refused."""
    try:
        with SPARSE.on(model) as session:
            write(model, ids(1))
            ratio = session.stats.token_ratio
    except NotImplementedError:
        return Outcome(outcome.name, outcome.verdict, f"{outcome.reason}; no sparse prefill".lstrip("; "))
    except Exception as error:
        return Outcome(outcome.name, "traceback", f"sparse prefill: {one_line(error)}")
    return None if ratio < 1 else Outcome(outcome.name, "silent", "a sparse prefill left nothing out")


def table(outcomes: list[Outcome]) -> str:
    """The table of the docs: one class a row, and how many of each verdict."""
    counts = ", ".join(f"{n} {verdict}" for verdict in VERDICTS if (n := sum(o.verdict == verdict for o in outcomes)))
    rows = [f"| `{o.name}` | {o.verdict} | {o.reason.replace('|', '/')} |" for o in outcomes]
    head = f"{len(outcomes)} classes of transformers {transformers.__version__}: {counts}."
    return "\n".join([head, "", "| class | with nothing rounded | why, or which layers |", "|---|---|---|", *rows, ""])
