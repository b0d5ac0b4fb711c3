"""`tersor generate`: text from any local or hub checkpoint, with a compressed cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.zoo import loading


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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the cache method, such as high_bits=8; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Write text with a compressed KV cache; the closing line on standard error says what the cache took.

    Example: tersor generate --set saliency_ratio=0.6 --max-new-tokens 200 "It was the best of times"

    Example: tersor generate --model path/to/Qwen2.5-VL --image pic.png --cache zipvl --set tau=0.975 "What is this?"
    """
    from tersor.kv.settings import recipe_from_text

    recipe = recipe_from_text(cache, settings or [])
    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise TersorError(f"--temperature {temperature} must not be negative")
    if image is not None and not image.is_file():
        raise TersorError(f"--image {image}: no such file")
    location = loading.resolve(model)
    if image is not None and Path(location).is_dir() and not loading.is_multimodal(location):
        raise TersorError(f"--model {model} reads no pictures; give a vision-language model, or leave --image out")
    text = _read_prompt(prompt, prompt_file)
    import torch
    from transformers import DynamicCache, TextStreamer

    network, tokenizer = loading.load(location, device)
    inputs = _inputs(location, tokenizer, text, image, chat=chat).to(network.device)
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokens = inputs["input_ids"].shape[1]
    if limit is not None and tokens + max_new_tokens > limit:
        raise TersorError(
            f"the prompt's {tokens} tokens and --max-new-tokens {max_new_tokens} exceed the model's {limit} "
            "positions; shorten one of them"
        )
    torch.manual_seed(seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    used = DynamicCache(config=network.config) if recipe is None else recipe.cache(network.config)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    call = {**inputs, **sampling, "max_new_tokens": max_new_tokens, "past_key_values": used, "streamer": streamer}
    sparsity: dict[str, Any] = {}
    if recipe is None:
        output = network.generate(**call)
        summary = _dense_summary(used)
    else:
        with recipe.on(network) as session:
            output = network.generate(**call)
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


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise TersorError("give a prompt or --prompt-file, not both")
        if not file.is_file():
            raise TersorError(f"--prompt-file {file}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise TersorError(f"--prompt-file {file} is not UTF-8 text") from None
    elif prompt is None and sys.stdin.isatty():
        raise TersorError("no prompt: give one as an argument, with --prompt-file, or on standard input")
    else:
        text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
    if not text:
        raise TersorError("the prompt is empty")
    return text


def _inputs(location: str, tokenizer: Any, text: str, image: Path | None, *, chat: bool) -> Any:
    """The model's keywords for a prompt; one with a picture always goes through the chat template."""
    if image is None:
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        return tokenizer(text, return_tensors="pt")
    pictures = require("PIL.Image", "images")
    processor = loading.load_processor(location)
    try:
        picture = pictures.open(image).convert("RGB")
    except OSError as error:
        raise TersorError(f"--image {image} is no picture that can be read: {error}") from None
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
