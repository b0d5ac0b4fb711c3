"""Videos side by side as one moving picture inside an SVG."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from tersor._images import gif_bytes
from tersor.drag.bench.world import SIDE, Sample

#: Screen pixels of a video's pixel, and of the lines of text above and between.
_SCALE, _LINE, _GAP = 4, 16, 6
#: Milliseconds of a frame, and of the last one.
_FRAME, _LAST = 200, 900


def side_by_side(samples: Sequence[Sample], rows: Mapping[str, Sequence[np.ndarray]], description: str) -> str:
    """An SVG: a column a sample, a row of videos for each name, paths drawn over the first.

    Args:
        samples: Their kinds are the titles, their scenes the paths.
        rows: Name -> videos of the samples, float ``[frames, side, side, 3]`` from 0 to 1.
        description: For those who do not see it.
    """
    step, left = SIDE * _SCALE + _GAP, 110
    width, height = left + step * len(samples), _LINE + step * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="11" '
        f'font-family="sans-serif" fill="currentColor"><title>{escape(description)}</title>'
    ]
    for column, sample in enumerate(samples):
        parts.append(f'<text x="{left + column * step}" y="11">{escape(sample.kind)}</text>')
    for row, (name, videos) in enumerate(rows.items()):
        top = _LINE + row * step
        parts.append(f'<text x="0" y="{top + SIDE * _SCALE // 2}">{escape(name)}</text>')
        for column, video in enumerate(videos):
            place = left + column * step
            parts.append(
                f'<image x="{place}" y="{top}" width="{SIDE * _SCALE}" height="{SIDE * _SCALE}" '
                f'style="image-rendering:pixelated" href="data:image/gif;base64,{_gif(video)}"/>'
            )
            if row == 0:
                parts += [_path(path, place, top) for path in _paths(samples[column])]
    return "\n".join([*parts, "</svg>"])


def _gif(video: np.ndarray) -> str:
    frames = [Image.fromarray(np.rint(255 * np.clip(each, 0, 1)).astype(np.uint8)) for each in video]
    return base64.b64encode(gif_bytes(frames, [*[_FRAME] * (len(frames) - 1), _LAST])).decode()


def _paths(sample: Sample) -> list[np.ndarray]:
    scene = sample.clip.scene()
    return [each.centers(scene.num_frames) for each in scene.entities]


def _path(points: np.ndarray, left: int, top: int) -> str:
    told = " ".join(f"{left + (x + 0.5) * _SCALE:.1f},{top + (y + 0.5) * _SCALE:.1f}" for x, y in points)
    x, y = points[-1]
    end = f'<circle cx="{left + (x + 0.5) * _SCALE:.1f}" cy="{top + (y + 0.5) * _SCALE:.1f}" r="3" fill="#fff"/>'
    return f'<polyline points="{told}" fill="none" stroke="#fff" stroke-width="1.5"/>{end}'
