"""Rebuild the photographs that the demo of RepAPQ quantizes with: the Kodak suite, reduced to 192 x 128 pixels.

    python recipes/tiny_repvgg_photos.py --data FOLDER --out OUT

FOLDER holds the suite as kodak/*.png, which Eastman Kodak released for unrestricted use (r0k.us/graphics/kodak).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

#: The shorter and the longer side; some photographs are upright.
SIDES = (128, 192)


def main(argv: list[str] | None = None) -> int:
    """Reduce all of them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild the demo's photographs.")
    parser.add_argument("--data", type=Path, required=True, help="folder with kodak/*.png")
    parser.add_argument("--out", type=Path, required=True, help="where the .jpg files go")
    args = parser.parse_args(argv)
    files = sorted((args.data / "kodak").glob("*.png"))
    if not files:
        print(f"tiny_repvgg_photos: --data {args.data}: no kodak/*.png in this folder", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        with Image.open(file) as opened:
            size = SIDES[::-1] if opened.width > opened.height else SIDES
            opened.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(args.out / f"{file.stem}.jpg", quality=92)
    return 0


if __name__ == "__main__":
    sys.exit(main())
