"""`tersor generate`: text from any local or hub checkpoint, with a compressed cache."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor._images import read_frames, read_picture
from tersor.zoo import loading
from tersor.zoo.inspection import refused


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-lm",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Ask about this picture; needs a vision-language model. May be repeated."),
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="Ask about this video: an animated GIF or WebP, or a folder of its frames.")
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="'zipcache', 'minicache', 'zipvl', several as 'zipcache+minicache', a plan of `tersor tune` as "
            "'plan.json', or 'none' for the library's own."
        ),
    ] = "zipcache",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the cache method, such as high_bits=8, or --high-bits 8; may be repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write; 0 with --save-cache only reads.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    save_cache: Annotated[
        Path | None, typer.Option(help="Save the cache to this file at the end, for --load-cache.")
    ] = None,
    load_cache: Annotated[
        Path | None, typer.Option(help="Go on from this file of --save-cache: the prompt follows what it has read.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Write text with a compressed KV cache; the closing line on standard error says what the cache took.

    Example: tersor generate --set saliency_ratio=0.6 --max-new-tokens 200 "It was the best of times"

    Example: tersor generate --prompt-file document.txt --save-cache document.cache --max-new-tokens 0

    Example: tersor generate --model path/to/Qwen2.5-VL --image pic.png --cache zipvl --set tau=0.975 "What is this?"
    """
    from tersor.kv.settings import recipe_from_text

    recipe: Any = recipe_from_text(cache, settings or [])
    if max_new_tokens < (0 if save_cache else 1):
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be at least 1, or 0 with --save-cache")
    if temperature < 0:
        raise TersorError(f"--temperature {temperature} must not be negative")
    location = loading.resolve(model)
    if save_cache and recipe is None:
        raise TersorError("--save-cache keeps compressed caches only; leave --cache none out")
    if (save_cache or load_cache) and (image or video):
        raise TersorError("--save-cache and --load-cache are for text; leave --image and --video out")
    if load_cache and (chat or settings or cache != "zipcache"):
        raise TersorError(
            "--load-cache goes on with the method and the text of its file; leave --cache, --set and --chat out"
        )
    pictures, frames = _seen(location, model, image or [], video)
    text = _read_prompt(prompt, prompt_file)
    earlier = None if load_cache is None else _earlier(load_cache, location, device)
    import torch
    from transformers import DynamicCache, TextStreamer

    from tersor.kv.engine.cache import NothingToCompressError

    network, tokenizer = loading.load(location, device)
    if earlier is None:
        inputs = _inputs(location, tokenizer, text, pictures, frames, chat=chat).to(network.device)
    else:
        new = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(network.device)
        inputs = {"input_ids": torch.cat([earlier.input_ids, new], dim=1)}
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokens = inputs["input_ids"].shape[1]
    if not tokens:
        raise TersorError("the prompt has no tokens; write more")
    if limit is not None and tokens + max_new_tokens > limit:
        raise TersorError(
            f"the prompt's {tokens} tokens and --max-new-tokens {max_new_tokens} exceed the model's {limit} "
            "positions; shorten one of them"
        )
    torch.manual_seed(seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    nothing, used = None, DynamicCache(config=network.config)
    try:
        used = used if recipe is None else recipe.cache(network.config)
    except NothingToCompressError as error:
        if save_cache:
            raise
        recipe, nothing = None, f"--cache {cache} has nothing to do: {error}"
    if earlier is not None:
        recipe, used = earlier.choices, earlier
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    call = {**inputs, **sampling, "max_new_tokens": max_new_tokens, "streamer": streamer, **with_cache(used)}
    with nullcontext() if recipe is None else recipe.on(network) as session:
        if max_new_tokens:
            output = network.generate(**call)
        else:
            with torch.no_grad():
                network(**inputs, **with_cache(used), logits_to_keep=1)
            output = inputs["input_ids"]
    if save_cache:
        used.save(save_cache, input_ids=output)
    facts = _facts(used, session) if nothing is None else {**_facts(used, session), "note": nothing}
    if as_json:
        written = tokenizer.decode(output[0, tokens:], skip_special_tokens=True)
        typer.echo(json.dumps({"text": written, "prompt_tokens": tokens, **facts}))
    else:
        typer.echo(closing_line(facts), err=True)


def _earlier(file: Path, location: str, device: str) -> Any:
    """The cache of ``--load-cache``, read before the model is."""
    from transformers import AutoConfig

    from tersor.kv.saved import load_cache

    with refused(f"the configuration of {location}"):
        config = AutoConfig.from_pretrained(location)
    cache = load_cache(file, config, device=loading.target_device(device))
    if cache.input_ids is None or len(cache.input_ids) != 1:
        raise TersorError(f"--load-cache {file} holds no tokens of one text to go on from; save it with --save-cache")
    return cache


def _seen(location: str, model: str, pictures: list[Path], video: Path | None) -> tuple[list[Any], list[Any]]:
    """The pictures and the video's frames, read before anything heavy is loaded."""
    if not pictures and video is None:
        return [], []
    option = "--image" if pictures else "--video"
    if Path(location).is_dir() and not loading.is_multimodal(location):
        raise TersorError(f"--model {model} reads no pictures; give a vision-language model, or leave {option} out")
    for file in pictures:
        if not file.is_file():
            raise TersorError(f"--image {file}: no such file")
    frames = [] if video is None else read_frames(video, option="--video")
    return [read_picture(file, option="--image") for file in pictures], frames


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


def _inputs(
    location: str, tokenizer: Any, text: str, pictures: Any = None, frames: Any = None, *, chat: bool = False
) -> Any:
    """The model's keywords for a prompt; one with pictures always goes through the chat template.

    A template writes all special tokens itself, so that the tokenizer must not add them again.
    """
    if not pictures and not frames:
        if not chat:
            return tokenizer(text, return_tensors="pt")
        rendered = _rendered(tokenizer, location, [{"role": "user", "content": text}])
        return tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    processor = loading.load_processor(location)
    if frames and getattr(processor, "video_processor", None) is None:
        raise TersorError(
            f"the processor of {location} takes no videos, or its video part needs another package (most need "
            "torchvision: pip install torchvision); or give frames as --image, once each"
        )
    content: list[dict[str, str]] = [{"type": "image"} for _ in pictures or ()]
    content += [{"type": "video"}] if frames else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    prompt = _rendered(processor, location, messages)
    given = {"images": list(pictures)} if pictures else {}
    if frames:
        given["videos"] = [frames]
    start = getattr(processor.tokenizer, "bos_token", None)
    adds = start is None or not prompt.startswith(start)
    with refused(f"a prompt with pictures for {location}"):
        return processor(text=[prompt], **given, add_special_tokens=adds, return_tensors="pt")


def _rendered(by: Any, location: str, messages: list[dict[str, Any]]) -> str:
    """The prompt by the chat template of a tokenizer or processor."""
    if not getattr(by, "chat_template", None):
        raise TersorError(f"{location} has no chat template; leave --chat out, or save one with the model")
    with refused(f"the chat template of {location}"):
        return str(by.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _facts(cache: Any, session: Any) -> dict[str, Any]:
    """What a run took; the text is written, so that whatever fails here becomes a note."""
    facts: dict[str, Any] = {}
    try:
        facts["cache"] = {**(_dense_summary(cache) if session is None else cache.summary()), **_sizes(cache)}
        state = None if session is None else session.state
        if state is not None and not state.records:
            facts["note"] = "no layer of this model may be sparse, so that every token took part in the attention"
        elif state is not None:
            facts["sparsity"] = session.stats.to_dict()
    except Exception as error:
        facts["note"] = f"what the cache took is not known ({type(error).__name__})"
    return facts


def _sizes(cache: Any) -> dict[str, Any]:
    """Bytes that all layers hold, bytes of the library's cache in the model's precision, and tokens compressed."""
    from tersor.bench.measure import storage_bytes

    compressed = [each for each in getattr(cache, "compressed_layers", list)() if each.is_initialized]
    rest = [each for each in cache.layers if getattr(each, "attention", each) not in compressed]
    others = [each for each in rest if getattr(each, "keys", None) is not None]
    plain = storage_bytes([(each.keys, each.values) for each in others])
    held, library, done, dtype = plain, plain, 0, None
    if compressed:
        dtype = compressed[0].keys.dtype
        held += cache.memory_footprint()
        library += cache.dense_footprint() // 2 * dtype.itemsize
        done = max(each.get_seq_length() - each.waiting for each in compressed)
    return {
        "held_bytes": held, "library_bytes": library, "library_dtype": str(dtype).removeprefix("torch."),
        "compressed_tokens": done,
    }  # fmt: skip


def closing_line(facts: dict[str, Any]) -> str:
    """What is said below the text: what the cache took, against the library's cache in the model's precision.

    Args:
        facts: Of a run, as ``--json`` prints them: "cache", "sparsity" where there is one, and perhaps a "note".
    """
    parts = []
    if (cache := facts.get("cache")) is not None:
        held, dense = cache["held_bytes"], cache["library_bytes"]
        parts.append(f"[{cache['method']}] {cache['tokens']:,} tokens cached in {held:,} bytes")
        if cache["method"] == "none":
            parts.append("the library's own cache, nothing is compressed")
        elif held < dense:
            kind = cache["library_dtype"]
            parts.append(f"{dense / held:.2f} times smaller than the library's cache in {kind} ({dense:,} bytes)")
            if kind == "float32" and cache["compression_ratio"] > 1:
                parts.append(f"{cache['compression_ratio']:.2f} times smaller than in 16 bits")
        elif cache["compressed_tokens"]:
            parts.append(f"no smaller than the library's cache ({dense:,} bytes): most tokens wait to be compressed")
        else:
            parts.append("nothing is compressed yet: the prompt is too short, or the settings keep every token")
    if (sparsity := facts.get("sparsity")) is not None:
        parts.append(_sparsity_line(sparsity))
    return "; ".join([*parts, *([facts["note"]] if "note" in facts else [])])


def _sparsity_line(sparsity: dict[str, Any]) -> str:
    if sparsity["skipped_reason"] is not None:
        return f"every token took part in the prompt's attention ({sparsity['skipped_reason']})"
    return (
        f"{sparsity['token_ratio']:.1%} of the prompt's tokens took part in its attention, "
        f"{sparsity['attn_flops_reduction_exact']:.1%} of its operations saved"
    )


def _dense_summary(cache: Any) -> dict[str, Any]:
    from tersor.bench.measure import storage_bytes

    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = storage_bytes([(layer.keys, layer.values) for layer in layers])
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    return {
        "method": "none",
        "tokens": cache.get_seq_length(),
        "cache_bytes": held,
        "fp16_bytes": 2 * numbers,
        "compression_ratio": 2 * numbers / held if held else 1.0,
    }
