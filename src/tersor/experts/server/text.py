"""From text to tokens and back, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor.experts.host import ExpertHost
from tersor.experts.server.sampling import Picked

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
#: What a decoder puts where bytes are no whole character yet.
_PARTIAL = "\N{REPLACEMENT CHARACTER}"


class Tongue:
    """One tokenizer: a copy that encodes, one thread at a time, and a copy that decodes, for the event loop alone."""

    def __init__(self, encoder: Any, decoder: Any) -> None:
        self._encoder, self._decoder = encoder, decoder
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt."""
        with self._lock:
            return list(self._encoder(text)["input_ids"])

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(getattr(self._encoder, "chat_template", None))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation, up to where its answer begins.

        Raises:
            TersorError: If there is no chat template, or it refuses these messages.
        """
        if not self.chats:
            raise TersorError("this model has no chat template: ask /v1/completions with a prompt")
        from jinja2 import TemplateError

        with self._lock:
            try:
                ids = self._encoder.apply_chat_template(
                    [dict(each) for each in messages], add_generation_prompt=True, return_dict=False
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                raise TersorError(f"the chat template refuses these messages: {error}") from None
        return list(ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special ones are left out unless ``special``."""
        return str(self._decoder.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


class Tongues:
    """The tokenizers of the base and of all experts; those of the same files are one.

    Args:
        host: The experts.
    """

    def __init__(self, host: ExpertHost) -> None:
        self.host = host
        self._made: dict[str, Tongue] = {}
        self._of: dict[tuple[str | None, int], Tongue] = {}

    def of(self, name: str | None) -> Tongue:
        """The tokenizer of an expert, or of the base.

        Raises:
            TersorError: If its folder has none.
        """
        key = name, 0 if name is None else self.host.generation(name)
        if key not in self._of:
            encoder = self.host.tokenizer(name)
            mark = _mark(Path(encoder.name_or_path))
            if mark not in self._made:
                self._made[mark] = Tongue(encoder, self.host.tokenizer(name))
            self._of[key] = self._made[mark]
        return self._of[key]


def _mark(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _FILES:
        file = folder / name
        digest.update(f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


class TextStream:
    """Text of one answer as its tokens come.

    Args:
        tongue: Its tokenizer.
        stops: Strings that end the answer and are no part of it.
    """

    def __init__(self, tongue: Tongue, stops: Sequence[str] = ()) -> None:
        self._tongue, self._stops = tongue, stops
        self._ids: list[int] = []
        self._settled, self._read = 0, 0  # tokens whose text will not change, and those that are in `text`
        self.text = ""
        self._sent = 0
        self._held: list[tuple[int, Picked]] = []
        self.stopped = False

    def push(self, picked: Picked) -> tuple[str, list[Picked]]:
        """Add a token; returns the text that is certain by now, and the tokens that begin in it."""
        self._held.append((len(self.text), picked))
        self._ids.append(picked.token)
        before = self._tongue.decode(self._ids[self._settled : self._read])
        now = self._tongue.decode(self._ids[self._settled :])
        if not now.endswith(_PARTIAL) and len(now) >= len(before):
            self._grow(now[len(before) :])
            self._settled, self._read = self._read, len(self._ids)
        return self._release(len(self.text) - (0 if self.stopped else self._possible()))

    def finish(self) -> tuple[str, list[Picked]]:
        """The rest, when no token will follow."""
        if not self.stopped:
            before = self._tongue.decode(self._ids[self._settled : self._read])
            self._grow(self._tongue.decode(self._ids[self._settled :])[len(before) :])
        return self._release(len(self.text))

    def _grow(self, piece: str) -> None:
        """Add text, up to the first stop string in it."""
        longest = max(map(len, self._stops), default=1)
        start = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [place for stop in self._stops if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _possible(self) -> int:
        """Letters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _release(self, end: int) -> tuple[str, list[Picked]]:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        tokens = [picked for start, picked in self._held if start < self._sent]
        self._held = [each for each in self._held if each[0] >= self._sent]
        return piece, tokens
