"""LPIPS and DISTS: how far apart two images are to a VGG-16, whose weights are a file that the recipe names.

The packages that hold the two scores build torchvision's network, and download its weights. Here are the network's
thirteen convolutions by themselves; only what each score has learnt on top of it comes from a package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ppcl_ds.errors import UserError, brief, missing

_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of the convolutions in torchvision's `features`; each is followed by a ReLU, each stage by a pool."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours, in [0, 1]; LPIPS writes its own, in [-1, 1]."""
_LEARNT = {"lpips": "lpips_models/vgg.pth", "dists": "dists_models/weights.pt"}
"""Where torchmetrics keeps what the scores have learnt, in its `functional/image`."""

Pool = Callable[[Tensor], Tensor]


class Perceptual:
    """One of the two scores, ready; 0 is no difference.

    Args:
        name: `lpips` or `dists`.
        file: torchvision's VGG-16, in `.pth` or `.safetensors`; its `features` are read.

    Raises:
        UserError: the package or the file is missing, or is something else.
    """

    def __init__(self, name: str, file: Path, device: torch.device) -> None:
        if not file.is_file():
            raise UserError(
                f"evaluate.scores: the model of '{name}': {missing(file)}; it is a file, torchvision's VGG-16"
            )
        self.name, self.device = name, device
        self.learnt = {key: tensor.float().to(device) for key, tensor in _read(learnt_file(name), name).items()}
        found = _read(file, name)
        try:
            self.layers = [
                [tuple(found[f"features.{n}.{part}"].float().to(device) for part in ("weight", "bias")) for n in stage]
                for stage in _STAGES
            ]
        except KeyError as fault:
            raise UserError(
                f"evaluate.scores: {file} is no VGG-16 of torchvision: it has no {brief(fault)}; '{name}' needs one"
            ) from None

    @torch.no_grad()
    def apart(self, images: Sequence[Path], others: Sequence[Path]) -> list[float]:
        """A number for each pair, which is of one size."""
        measure = {"lpips": self._lpips, "dists": self._dists}[self.name]
        found = []
        for pair in zip(images, others, strict=True):
            one, other = (self._pixels(path) for path in pair)
            try:
                found.append(float(measure(one, other)))
            except RuntimeError as fault:
                height, width = one.shape[2:]
                raise UserError(
                    f"evaluate.scores: '{self.name}' cannot be taken of {width} x {height} pixels ({brief(fault)})"
                ) from None
        return found

    def _pixels(self, path: Path) -> Tensor:
        """(1, 3, H, W) in [0, 1]."""
        values = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(values).permute(2, 0, 1)[None].to(self.device)

    def _features(self, pixels: Tensor, pool: Pool) -> list[Tensor]:
        """What each stage puts out, (1, C, H / 2^n, W / 2^n)."""
        found: list[Tensor] = []
        for layers in self.layers:
            pixels = pool(found[-1]) if found else pixels
            for weight, bias in layers:
                pixels = F.conv2d(pixels, weight, bias, padding=1).relu()
            found.append(pixels)
        return found

    def _lpips(self, one: Tensor, other: Tensor) -> Tensor:
        """Zhang et al., arXiv 1801.03924, version 0.1 with VGG: its own shift and scale are of pixels in [-1, 1]."""
        shift, scale = (self._colours(c) for c in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        a, b = (self._features((2 * p - 1 - shift) / scale, lambda x: F.max_pool2d(x, 2)) for p in (one, other))
        total = one.new_zeros(())
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = (z / (1e-8 + z.square().sum(1, keepdim=True)).sqrt() for z in (x, y))
            total = total + ((x - y).square() * self.learnt[f"lin{n}.model.1.weight"]).sum(1).mean()
        return total

    def _dists(self, one: Tensor, other: Tensor) -> Tensor:
        """Ding et al., arXiv 2004.07728, at the images' own size; the pixels count as a stage, too."""
        mean, deviation = self._colours(_MEAN), self._colours(_DEVIATION)
        a, b = ([p, *self._features((p - mean) / deviation, _hanning)] for p in (one, other))
        alpha, beta = (self.learnt[name].flatten() for name in ("alpha", "beta"))
        x, y = (_moments(each) for each in (a, b))
        between = torch.cat([(p * q).mean((2, 3))[0] for p, q in zip(a, b, strict=True)]) - x[0] * y[0]
        texture = (2 * x[0] * y[0] + 1e-6) / (x[0].square() + y[0].square() + 1e-6)
        structure = (2 * between + 1e-6) / (x[1] + y[1] + 1e-6)
        return 1 - (alpha * texture + beta * structure).sum() / (alpha.sum() + beta.sum())

    def _colours(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, 3, 1, 1)


def _moments(stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of all stages, (C,)."""
    mean = [each.mean((2, 3))[0] for each in stages]
    return torch.cat(mean), torch.cat([each.var((2, 3), unbiased=False)[0] for each in stages])


def _hanning(x: Tensor) -> Tensor:
    """DISTS's pool: the root of the squares' mean under a window of 3 x 3, every other pixel."""
    side = torch.tensor([0.25, 0.5, 0.25], device=x.device)
    window = (side[:, None] * side).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def learnt_file(name: str) -> Path:
    """What a score has learnt on top of VGG-16, as torchmetrics brings it.

    Raises:
        UserError: the package is not installed, or a release without the file.
    """
    package = find_spec("torchmetrics")
    found = Path(str(package.origin)).parent / "functional" / "image" / _LEARNT[name] if package else None
    if found is None or not found.is_file():
        raise UserError(f"evaluate.scores: '{name}' needs torchmetrics; run pip install 'ppcl-ds[scores]'")
    return found


def _read(file: Path, name: str) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
        return {str(key): tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, UnpicklingError, SafetensorError) as fault:
        raise UserError(f"evaluate.scores: the model of '{name}' in {file} cannot be read ({brief(fault)})") from None
