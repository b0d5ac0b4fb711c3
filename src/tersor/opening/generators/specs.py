"""Generators by their text, such as ``gold``, ``scripted:strong`` or ``chat:MODEL``."""

from __future__ import annotations

from dataclasses import dataclass

from tersor._errors import TersorError
from tersor.opening.generators.base import ImageBackend, InterleavedGenerator
from tersor.opening.generators.scripted import LADDER, GoldGenerator

#: What ``--model`` takes.
MODELS = "gold, scripted:strong|medium|weak, chat:MODEL, images:BACKEND or loop:MODULE:FUNCTION"
#: What ``--images`` takes.
BACKENDS = "endpoint:MODEL, diffusers:CHECKPOINT, tiny-nar-text, tiny-raster or tiny-raster:WINDOW"


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """What the kinds of generators take; each uses its own.

    Args:
        images: The image backend of ``chat:``.
        base_url: Of endpoints.
        key_env: Environment variable with their key.
        device: Of checkpoints.
    """

    images: str | None = None
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    device: str = "cpu"

    def url(self, what: str) -> str:
        """The base of endpoints; refused where it is missing."""
        if self.base_url is None:
            raise TersorError(f"{what} needs --base-url, such as http://127.0.0.1:8000/v1")
        return self.base_url


def generator_of(text: str, options: GeneratorOptions | None = None) -> InterleavedGenerator:
    """The generator that a text names.

    Raises:
        TersorError: If it names none, or an option that it needs is missing.
    """
    options = options or GeneratorOptions()
    kind, _, name = text.partition(":")
    ladder = {each.name: each for each in LADDER}
    if text == "gold":
        return GoldGenerator()
    if kind == "scripted" and name in ladder:
        return ladder[name]
    if kind == "loop" and name:
        from tersor.opening.generators.loop import StepLoop

        return StepLoop.from_text(name)
    if kind in ("chat", "images") and name:
        from tersor.opening.generators.chat import ChatPlusImage, ChatWriter, no_text
        from tersor.opening.judging.client import ChatClient

        if kind == "images":
            return ChatPlusImage(no_text, backend_of(name, options), name=name)
        if options.images is None:
            raise TersorError(f"--model {text} needs --images: {BACKENDS}")
        writer = ChatWriter(ChatClient(options.url(f"--model {text}"), name, key_env=options.key_env))
        return ChatPlusImage(writer, backend_of(options.images, options), name=f"{name}+{options.images}")
    raise TersorError(f"--model {text!r} must be {MODELS}")


def backend_of(text: str, options: GeneratorOptions) -> ImageBackend:
    """The image backend that a text names.

    Raises:
        TersorError: If it names none.
    """
    kind, _, name = text.partition(":")
    if kind == "endpoint" and name:
        from tersor.opening.generators.chat import EndpointImages

        return EndpointImages(options.url(f"--images {text}"), name, key_env=options.key_env)
    if kind == "diffusers" and name:
        from tersor.opening.generators.chat import DiffusersImages

        return DiffusersImages(name, device=options.device)
    if text == "tiny-nar-text":
        from tersor.opening.generators.images import CaptionImages

        return CaptionImages()
    if kind == "tiny-raster" and (name.isdecimal() or not name):
        from tersor.opening.generators.images import ClassImages

        return ClassImages(int(name) if name else None)
    raise TersorError(f"image backend {text!r} must be {BACKENDS}")
