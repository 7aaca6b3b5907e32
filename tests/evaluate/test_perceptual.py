"""LPIPS and DISTS with a random VGG-16: against their papers' formulas; against torchmetrics where it is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ppcl_ds.errors import UserError
from ppcl_ds.evaluate import perceptual
from ppcl_ds.evaluate.compared import _worst
from ppcl_ds.evaluate.scores import Scorer, open_scorer
from ppcl_ds.prompt_sets import Score

CPU = torch.device("cpu")
WIDTHS: list[int | str] = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool"]
WIDTHS += [512, 512, 512, "pool", 512, 512, 512, "pool"]
"""VGG-16 (arXiv 1409.1556, configuration D)."""


def vgg(divisor: int = 1, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    """The whole network as torchvision numbers it, a `divisor`th as wide."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        if isinstance(width, str):
            layers.append(pool(2, 2))
        else:
            layers += [nn.Conv2d(before, width // divisor, 3, padding=1), nn.ReLU()]
            before = width // divisor
    return nn.Sequential(*layers)


class Hanning(nn.Module):
    """DISTS's pool, a pixel at a time."""

    def __init__(self, side: int, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        window = torch.tensor(np.outer(np.hanning(5)[1:-1], np.hanning(5)[1:-1]), dtype=x.dtype)
        padded = nn.functional.pad(x.square(), (1, 1, 1, 1))
        rows = []
        for i in range(0, x.shape[2], self.stride):
            parts = [padded[:, :, i : i + 3, j : j + 3] for j in range(0, x.shape[3], self.stride)]
            rows.append(torch.stack([(part * window / window.sum()).sum((2, 3)) for part in parts], -1))
        return (torch.stack(rows, 2) + 1e-12).sqrt()


def stages(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What goes into each pool."""
    found = []
    for layer in list(network)[:-1]:
        if not isinstance(layer, nn.Conv2d | nn.ReLU):
            found.append(x)
        x = layer(x)
    return [*found, x]


@pytest.fixture
def learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Tensor]:
    """Random heads for a network of an eighth of the width, laid where torchmetrics' are looked for."""
    torch.manual_seed(1)
    widths = [8, 16, 32, 64, 64]
    heads = {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(widths)}
    weights = {name: torch.rand(1, 3 + sum(widths), 1, 1) for name in ("alpha", "beta")}
    torch.save(heads, tmp_path / "lpips")
    torch.save(weights, tmp_path / "dists")
    monkeypatch.setattr(perceptual, "learnt_file", lambda name: tmp_path / name)
    return heads | weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in vgg(8).state_dict().items()}, path)
    return path


def images(folder: Path, count: int, seed: int, side: int = 20) -> list[Path]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        found.append(folder / f"{seed}-{number}.png")
        Image.fromarray(random.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)).save(found[-1])
    return found


def apart(name: str, model: Path, own: list[Path], others: list[Path]) -> list[float]:
    found = open_scorer(Score(score=name, model=model), CPU)
    assert found.kind == "to teacher"
    assert not found.more
    assert found.to_teacher
    return found.to_teacher(own, others)


def pixels(path: Path) -> Tensor:
    return torch.tensor(np.asarray(Image.open(path)) / 255, dtype=torch.float32).movedim(2, 0)[None]


def test_lpips_is_what_its_paper_says(tmp_path: Path, learnt: Mapping[str, Tensor], weights: Path) -> None:
    own, others = images(tmp_path, 2, 0), images(tmp_path, 2, 1)
    shift, scale = (torch.tensor(c).view(3, 1, 1) for c in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    network = vgg(8)
    for found, *pair in zip(apart("lpips", weights, own, others), own, others, strict=True):
        total = 0.0
        with torch.no_grad():
            a, b = (stages(network, (pixels(path) * 2 - 1 - shift) / scale) for path in pair)
        for n, (x, y) in enumerate(zip(a, b, strict=True)):  # equation 1: unit length along the channels, w, squares
            difference = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
            weighted = learnt[f"lin{n}.model.1.weight"][0] * difference[0] ** 2
            total += float(weighted.sum(0).mean())
        assert found == pytest.approx(total, rel=1e-4)
    assert apart("lpips", weights, own, own) == [0.0, 0.0]


def test_dists_is_what_its_paper_says(tmp_path: Path, learnt: Mapping[str, Tensor], weights: Path) -> None:
    own, others = images(tmp_path, 1, 0), images(tmp_path, 1, 1)
    mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = vgg(8, Hanning)
    with torch.no_grad():
        a, b = ([p, *stages(network, (p - mean) / deviation)] for p in (pixels(own[0]), pixels(others[0])))
    alpha, beta = (
        learnt[name].flatten() / (learnt["alpha"].sum() + learnt["beta"].sum()) for name in ("alpha", "beta")
    )
    total, channel = 0.0, 0
    for x, y in zip(a, b, strict=True):
        for p, q in zip(x[0].flatten(1).double().numpy(), y[0].flatten(1).double().numpy(), strict=True):
            (var_p, cov), (_, var_q) = np.cov(p, q, bias=True)
            texture = (2 * p.mean() * q.mean() + 1e-6) / (p.mean() ** 2 + q.mean() ** 2 + 1e-6)
            structure = (2 * cov + 1e-6) / (var_p + var_q + 1e-6)
            total += float(alpha[channel]) * texture + float(beta[channel]) * structure
            channel += 1
    assert channel == len(alpha)
    assert apart("dists", weights, own, others) == pytest.approx([1 - total], rel=1e-3)
    assert apart("dists", weights, own, own) == pytest.approx([0.0], abs=1e-5)


def test_the_prompts_farthest_from_the_teacher_are_the_worst(tmp_path: Path) -> None:
    pictures: Any = SimpleNamespace(
        recipe=SimpleNamespace(run=tmp_path),
        of=lambda laid, model, position, k: SimpleNamespace(path=tmp_path / f"{model}{position}"),
    )
    laid: Any = SimpleNamespace(prompts=[SimpleNamespace(text=text) for text in "abc"])
    for more, expected in ((False, ["b", "c", "a"]), (True, ["a", "c", "b"])):
        judge = Scorer("some", "to teacher", more=more, to_teacher=lambda own, others: [])
        found = _worst(pictures, laid, judge, {"small": [0.1, 0.7, 0.3]})
        assert [each.prompt for each in found] == expected


@pytest.mark.usefixtures("learnt")
def test_what_is_missing_is_one_line(tmp_path: Path, weights: Path) -> None:
    own = images(tmp_path, 1, 0, side=8)
    save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.pth").write_bytes(weights.read_bytes()[:1000])
    for model, words in (
        (tmp_path / "nowhere.pth", "no such file or folder; it is a file, torchvision's VGG-16"),
        (tmp_path, "no such file or folder"),
        (tmp_path / "other.safetensors", "no VGG-16 of torchvision: it has no 'features.0.bias'"),
        (tmp_path / "torn.pth", "cannot be read"),
        (weights, "'lpips' cannot be taken of 12 x 8 pixels"),
    ):
        with pytest.raises(UserError, match=words) as fault:
            apart("lpips", model, own, own)
        assert "\n" not in str(fault.value)
    assert apart("dists", weights, own, own) == pytest.approx([0.0], abs=1e-5)


def test_a_missing_package_is_one_line(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    for name in ("lpips", "dists"):
        with pytest.raises(UserError, match=f"'{name}' needs torchmetrics; run pip install 'ppcl-ds.scores.'"):
            open_scorer(Score(score=name, model=weights), CPU)


@pytest.mark.tools
def test_both_are_what_torchmetrics_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the two scores have really learnt, on a random VGG-16 of the whole width."""
    lpips: Any = import_module("torchmetrics.functional.image.lpips")
    dists: Any = import_module("torchmetrics.functional.image.dists")
    models: Any = import_module("torchvision.models")
    network = models.vgg16().eval()
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: network.features)
    monkeypatch.setattr(dists, "vgg16", lambda weights: network)
    references = {"lpips": lpips._LPIPS(net="vgg"), "dists": dists.DISTSNetwork()}
    own, others = images(tmp_path, 2, 0, 64), images(tmp_path, 2, 1, 64)
    for name, reference in references.items():
        options = {"normalize": True} if name == "lpips" else {}
        with torch.no_grad():
            expected = [float(reference(pixels(a), pixels(b), **options)) for a, b in zip(own, others, strict=True)]
        assert apart(name, tmp_path / "vgg16.pth", own, others) == pytest.approx(expected, rel=1e-4)
        assert all(number > 0 for number in expected)
