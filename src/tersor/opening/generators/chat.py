"""An integrated pipeline: one model writes texts with marks, another draws a picture for each (arXiv 2411.18499)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from tersor._lazy import require
from tersor.opening.generators.base import MOST_STEPS, Family, ImageBackend
from tersor.opening.judging.client import TRIES, ChatClient, EndpointRefusedError
from tersor.opening.judging.limiter import Limiter
from tersor.opening.judging.wire import error_text, messages
from tersor.opening.outputs import Answer
from tersor.opening.prompts import Message
from tersor.opening.records import Instance

#: Stands after a part of the text that gets a picture.
MARK = "<IMG>"
SYSTEM = (
    f"You write answers in which texts and pictures take turns. You write the texts; put {MARK} after each part that a "
    "picture belongs to, and another model draws it from that part. Describe in the part what its picture shows."
)
#: Tokens of an answer.
TOKENS = 4096

#: From an instance and a number of steps to the texts of the steps.
Writer: TypeAlias = Callable[[Instance, "int | None"], "list[str]"]


class ChatPlusImage:
    """A writer and an image backend as one contestant.

    Args:
        writer: Writes the texts, such as a `ChatWriter`.
        images: Draws a picture from a prompt.
        name: Of the contestant.
    """

    family: Family = "integrated"

    def __init__(self, writer: Writer, images: ImageBackend, *, name: str) -> None:
        self.writer, self.images, self.name = writer, images, name

    def generate(self, instance: Instance, *, n_steps: int | None, seed: int) -> Answer:
        """See `InterleavedGenerator`; a part's picture is drawn from the first instruction and the part."""
        parts = self.writer(instance, n_steps)[: n_steps if n_steps is not None else MOST_STEPS]
        prompts = [f"{instance.inputs[0].text}\n{part}".strip() for part in parts]
        drawn = [self.images.draw(prompt, seed=seed + number) for number, prompt in enumerate(prompts)]
        return Answer(tuple(zip(parts, drawn, strict=True)))


def no_text(instance: Instance, n_steps: int | None) -> list[str]:
    """A writer without words: pictures are drawn from the instruction, and they alone are compared."""
    return [""] * (n_steps or 1)


class ChatWriter:
    """A chat endpoint that writes texts with marks.

    Args:
        client: The endpoint.
        side: Longest side of a picture that it is shown.
        backoff: Seconds of the first wait after a failure; it doubles.
    """

    def __init__(self, client: ChatClient, *, side: int = 512, backoff: float = 0.5) -> None:
        self.client, self.side, self.backoff = client, side, backoff

    def __call__(self, instance: Instance, n_steps: int | None) -> list[str]:
        """The texts that the endpoint writes.

        Raises:
            EndpointRefusedError: If it refuses every request.
            TersorError: If it cannot answer this one, after several tries.
        """
        return split(asyncio.run(self._write(instance, n_steps)))

    async def _write(self, instance: Instance, n_steps: int | None) -> str:
        steps = f"exactly {n_steps}" if n_steps is not None else f"up to {MOST_STEPS}"
        message = Message(SYSTEM)
        message.say(f"Answer with {steps} parts of text, each with a picture.\n")
        for step in instance.inputs:
            message.say(step.text + "\n")
            if step.image is not None:
                message.parts.append(step.image)
        talk = messages(message, self.side, "side")
        async with self.client.open() as client:
            rng = random.Random(instance.uid)
            return (await self.client.say(client, Limiter(1), talk, TOKENS, rng, backoff=self.backoff)).text


class EndpointImages:
    """An endpoint of images that speaks OpenAI's ``/images/generations``.

    Args:
        base_url: With its path, such as ``https://api.openai.com/v1``.
        model: Its name there.
        key_env: Environment variable of the key.
        timeout: Seconds of a picture.
    """

    def __init__(self, base_url: str, model: str, *, key_env: str = "OPENAI_API_KEY", timeout: float = 120.0) -> None:
        chat = ChatClient(base_url, model, key_env=key_env)
        self.url = chat.url.removesuffix("/chat/completions") + "/images/generations"
        self.model, self.key_env, self.timeout = model, key_env, timeout
        self._form: dict[str, str] = {"response_format": "b64_json"}

    def draw(self, prompt: str, *, seed: int) -> Any:
        """A picture of Pillow; the endpoint takes no seed.

        Raises:
            EndpointRefusedError: If there is no picture in the reply.
        """
        httpx2: Any = require("httpx2", "arena")
        key = os.environ.get(self.key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for turn in range(TRIES):
            body = {"model": self.model, "prompt": prompt, "n": 1, **self._form}
            try:
                reply = httpx2.post(self.url, json=body, headers=headers, timeout=self.timeout)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}"
                continue
            if reply.status_code == 200:
                return self._picture(reply)
            said = f"status {reply.status_code}: {error_text(_json(reply), reply.text)}"
            if reply.status_code == 400 and "response_format" in said and self._form:
                self._form = {}  # some models always answer so, and refuse to be asked for it
            elif reply.status_code < 500 and reply.status_code != 429:
                break
            elif turn + 1 < TRIES:
                time.sleep(min(30.0, 0.5 * 2**turn))
        raise EndpointRefusedError(f"{self.url}: {said.replace(key, '***') if key else said}")

    def _picture(self, reply: Any) -> Any:
        image: Any = require("PIL.Image", "arena")
        try:
            data = base64.b64decode(_json(reply)["data"][0]["b64_json"], validate=True)
            picture = image.open(io.BytesIO(data))
            return picture.convert("RGB")
        except (KeyError, IndexError, TypeError, binascii.Error, OSError):
            raise EndpointRefusedError(f"{self.url} answers without a picture in b64_json") from None


class DiffusersImages:
    """A text-to-image pipeline of diffusers.

    Args:
        location: Folder or hub name.
        device: Of torch.
    """

    def __init__(self, location: str, *, device: str = "cpu") -> None:
        diffusers: Any = require("diffusers", "images")
        self.pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(location, use_safetensors=True).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompt: str, *, seed: int) -> Any:
        """A picture of Pillow."""
        import torch

        return self.pipeline(prompt, generator=torch.Generator().manual_seed(seed)).images[0]


def split(text: str) -> list[str]:
    """The parts of a text that a picture belongs to; what stands after the last mark has one, too."""
    return [part.strip() for part in text.replace("**", "").split(MARK) if part.strip()]


def _json(reply: Any) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None
