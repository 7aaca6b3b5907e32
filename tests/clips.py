"""Small clips of noise, made with PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

LOSSLESS: dict[str, Any] = {"codec": "ffv1", "pix_fmt": "bgr0"}
RATE = 8


def noise(frames: int, width: int = 16, height: int = 16, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)]


def write_clip(
    path: Path, frames: list[Image.Image], codec: str = "libx264", pix_fmt: str = "yuv420p", turned: int = 0
) -> None:
    """A clip of 8 frames a second; what its suffix says. `turned`: degrees by which a viewer turns it to the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = pix_fmt
        if turned:
            stream.set_display_rotation(turned)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def long_enough(pipe: Any) -> None:
    """Give a tiny Wan as many places as a clip of its pipeline's own length has; it has few, to be tiny."""
    config = dict(pipe.transformer.config) | {"rope_max_seq_len": 1024}
    weights = pipe.transformer.state_dict()
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    pipe.transformer.load_state_dict(weights)
