"""The image models of this toolkit as image backends."""

from __future__ import annotations

import re
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require


class CaptionImages:
    """`tiny-nar-text`: captions of its own small vocabulary become pictures, a front of the grid a pass.

    Args:
        name: Of the zoo.
    """

    def __init__(self, name: str = "tiny-nar-text") -> None:
        from tersor import zoo
        from tersor.grids.nar.pipeline import NARPipeline

        self.pipeline = NARPipeline(zoo.load_model(name), zoo.load_image_tokenizer(name), zoo.load_text_encoder(name))

    def draw(self, prompt: str, *, seed: int) -> Any:
        """A picture of Pillow; a word that the model does not know is refused."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return self.pipeline(prompt=prompt, generator=generator).images[0].convert("RGB")


class ClassImages:
    """`tiny-raster`: the digit in a prompt becomes a picture, token by token or by ZipAR.

    Args:
        window: ZipAR's window in cells; None decodes token by token.
        name: Of the zoo.
    """

    def __init__(self, window: int | None = None, *, name: str = "tiny-raster") -> None:
        from tersor import zoo

        self.model, self.tokenizer, self.window = zoo.load_model(name), zoo.load_image_tokenizer(name), window
        if window is not None:
            from tersor.grids.schedule import resolve_window

            resolve_window(window, self.model.config.grid_size[1])

    def draw(self, prompt: str, *, seed: int) -> Any:
        """A picture of Pillow.

        Raises:
            TersorError: If there is not exactly one digit in the prompt.
        """
        import torch

        from tersor.grids.zipar.generation import zipar_generate

        digits = re.findall(r"\b\d\b", prompt)
        if len(set(digits)) != 1:
            raise TersorError(f"tiny-raster draws one digit; prompt {prompt!r} has {len(set(digits))}")
        given = torch.tensor([int(digits[0])])
        settings: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "do_sample": True, "top_k": 0}
        if self.window is None:
            ids = self.model.generate(given, **settings)
        else:
            ids = zipar_generate(self.model, given, window_size=self.window, **settings)
        pixels = self.tokenizer.decode(ids.view(1, *self.model.config.grid_size))[0].clamp(0, 1)
        levels = (pixels * 255).round().byte().movedim(0, -1).numpy()
        return (
            require("PIL.Image", "arena").fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).convert("RGB")
        )
