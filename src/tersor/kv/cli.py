"""`tersor generate`: text from any local or hub checkpoint, with a compressed cache."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._lazy import require
from tersor.zoo import loading as _checkpoints

if TYPE_CHECKING:
    from tersor.kv.recipe import Recipe


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-lm",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    image: Annotated[Path | None, typer.Option(help="Ask about this picture; needs a vision-language model.")] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="'zipcache', 'minicache', 'zipvl', several as 'zipcache+minicache', or 'none' for the library's own."
        ),
    ] = "zipcache",
    saliency_ratio: Annotated[float | None, typer.Option(help="zipcache: share of tokens in --high-bits.")] = None,
    high_bits: Annotated[
        int | None, typer.Option(help="zipcache, zipvl: bits of salient tokens: 2, 3, 4, 8 or 16.")
    ] = None,
    low_bits: Annotated[
        int | None, typer.Option(help="zipcache, zipvl: bits of the others: 2, 3, 4, 8 or 16; zipcache: 0 evicts.")
    ] = None,
    tau: Annotated[float | None, typer.Option(help="zipvl: share of the attention to keep, e.g. 0.975.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="zipvl: what becomes of other tokens: 'evict', 'quantize' or 'keep'.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(help="zipvl: shorter prompts are read densely.")] = None,
    start_layer: Annotated[
        float | None, typer.Option(help="minicache: first layer to pair, an index or a share of the layers.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="minicache: how much stays unmerged, from 0 to 1.")] = None,
    bits: Annotated[int | None, typer.Option(help="minicache: bits of the directions: 2, 3, 4, 8 or 16.")] = None,
    streaming_gap: Annotated[int | None, typer.Option(help="New tokens that are compressed together.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Write text with a compressed KV cache; the closing line on standard error says what the cache took.

    Example: tersor generate --saliency-ratio 0.6 --max-new-tokens 200 "It was the best of times"

    Example: tersor generate --model path/to/Qwen2.5-VL --image pic.png --cache zipvl --tau 0.975 "What is this?"
    """
    recipe = _recipe(
        cache,
        saliency_ratio=saliency_ratio,
        high_bits=high_bits,
        low_bits=low_bits,
        # The command line has floats only: 16 is a layer, 0.5 a share.
        start_layer=int(start_layer) if start_layer is not None and start_layer >= 1 else start_layer,
        gamma=gamma,
        bits=bits,
        tau=tau,
        policy=policy,
        min_tokens=min_tokens,
        streaming_gap=streaming_gap,
    )
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature} must not be negative")
    if image is not None and not image.is_file():
        raise ValueError(f"--image {image}: no such file")
    location = _checkpoints.resolve(model)
    if image is not None and Path(location).is_dir() and not _checkpoints.is_multimodal(location):
        raise ValueError(f"--model {model} reads no pictures; give a vision-language model, or leave --image out")
    text = _read_prompt(prompt, prompt_file)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    _write(location, text, image, recipe, options, seed=seed, chat=chat, device=device, as_json=as_json)


def _recipe(name: str, **settings: Any) -> Recipe | None:
    """The recipe called ``name``, or the composition of several joined by '+'; None for 'none'.

    Raises:
        ValueError: for an unknown name, and for a setting that none of them has.
    """
    from tersor.kv import METHODS, get_method
    from tersor.kv.compose import compose

    given = {option: value for option, value in settings.items() if value is not None}
    names = [] if name == "none" else name.split("+")
    if not set(names) <= set(METHODS):
        raise ValueError(
            f"--cache {name!r} is unknown; choose one of {['none', *sorted(METHODS)]}, or several joined by '+'"
        )
    recipes, used = [], set()
    for each in map(get_method, names):
        own = {field.name for field in fields(each)} & set(given)  # type: ignore[arg-type]
        recipes.append(each(**{option: given[option] for option in own}))
        used |= own
    if unused := sorted(set(given) - used):
        raise ValueError(f"--{unused[0].replace('_', '-')} is no setting of --cache {name}")
    if len(recipes) < 2:
        return recipes[0] if recipes else None
    return compose(*recipes)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise ValueError("give a prompt or --prompt-file, not both")
        if not file.is_file():
            raise ValueError(f"--prompt-file {file}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--prompt-file {file} is not UTF-8 text") from None
    elif prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, with --prompt-file, or on standard input")
    else:
        text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
    if not text:
        raise ValueError("the prompt is empty")
    return text


def _write(
    location: str,
    text: str,
    image: Path | None,
    recipe: Recipe | None,
    options: dict[str, Any],
    *,
    seed: int,
    chat: bool,
    device: str,
    as_json: bool,
) -> None:
    import torch
    from transformers import DynamicCache, TextStreamer

    model, tokenizer = _checkpoints.load(location, device)
    inputs = _inputs(location, tokenizer, text, image, chat=chat).to(model.device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = inputs["input_ids"].shape[1]
    if limit is not None and tokens + options["max_new_tokens"] > limit:
        raise ValueError(
            f"the prompt's {tokens} tokens and --max-new-tokens {options['max_new_tokens']} exceed the model's {limit} "
            "positions; shorten one of them"
        )
    torch.manual_seed(seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    used = DynamicCache(config=model.config) if recipe is None else recipe.cache(model.config)
    call = {**inputs, **options, "past_key_values": used, "streamer": streamer}
    sparsity: dict[str, Any] = {}
    if recipe is None:
        output = model.generate(**call)
        summary = _dense_summary(used)
    else:
        with recipe.on(model) as session:
            output = model.generate(**call)
        summary = used.summary()
        if session.state is not None:
            sparsity = {"sparsity": session.stats.to_dict()}
    if as_json:
        written = tokenizer.decode(output[0, tokens:], skip_special_tokens=True)
        typer.echo(json.dumps({"text": written, "prompt_tokens": tokens, "cache": summary, **sparsity}))
    else:
        typer.echo(
            f"[{summary['method']}] {summary['tokens']:,} tokens cached in {summary['cache_bytes']:,} bytes, "
            f"{summary['compression_ratio']:.2f} times smaller than in 16 bits ({summary['fp16_bytes']:,} bytes)"
            + _sparsity_line(**sparsity),
            err=True,
        )


def _inputs(location: str, tokenizer: Any, text: str, image: Path | None, *, chat: bool) -> Any:
    """The model's keywords for a prompt; one with a picture always goes through the chat template."""
    if image is None:
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        return tokenizer(text, return_tensors="pt")
    pictures = require("PIL.Image", "images")
    processor = _checkpoints.load_processor(location)
    try:
        picture = pictures.open(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"--image {image} is no picture that can be read: {error}") from None
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[prompt], images=[picture], return_tensors="pt")


def _sparsity_line(sparsity: dict[str, Any] | None = None) -> str:
    if sparsity is None:
        return ""
    if sparsity["skipped_reason"] is not None:
        return f"; every token took part in the prompt's attention ({sparsity['skipped_reason']})"
    return (
        f"; {sparsity['token_ratio']:.1%} of the prompt's tokens took part in its attention, "
        f"{sparsity['attn_flops_reduction_exact']:.1%} of its operations saved"
    )


def _dense_summary(cache: Any) -> dict[str, Any]:
    from tersor.bench.measure import storage_bytes

    held = storage_bytes([(layer.keys, layer.values) for layer in cache.layers])
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return {
        "method": "none",
        "tokens": cache.get_seq_length(),
        "cache_bytes": held,
        "fp16_bytes": 2 * numbers,
        "compression_ratio": 2 * numbers / held,
    }
