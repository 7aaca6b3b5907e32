"""A teacher on disk: its class, configuration and tensors, described without loading and loaded when asked for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher import modeling_pruned


@dataclass(frozen=True)
class Source:
    """One tensor of a model, not loaded yet.

    Attributes:
        shape, dtype: what `load` will return.
        load: reads the tensor onto the CPU; may raise `UserError`.
        unit: name of the unit that it is of; empty for the teacher's own.
    """

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]
    unit: str = ""

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Source:
        """The same tensor in another dtype, converted when it is loaded."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, load=lambda: self.load().to(dtype))


QUANTISED = (
    *(".comfy_quant", ".weight_scale", ".weight_scale_inv", ".scale_weight", ".input_scale", ".scale_input"),
    *(".absmax", ".quant_map", ".qweight", ".wscales", ".SCB"),
)
"""How the names end that stand beside quantised weights: ComfyUI's, bitsandbytes', nunchaku's."""

Sources = Mapping[str, Source]
"""A model, or a part of one: tensor name -> where it comes from, in the order of the model's state dict."""


def held(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """Tensors that are in memory already, as sources."""
    return {name: Source(tensor.shape, tensor.dtype, lambda t=tensor: t) for name, tensor in tensors.items()}  # type: ignore[misc]


def find_class(name: str) -> Any:
    """The model class that a `config.json` names: diffusers' own, or one of `modeling_pruned.py`; else None."""
    found = getattr(diffusers, name, None) or getattr(modeling_pruned, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def pruned_class(name: str) -> str:
    """The class of `modeling_pruned.py` for a class of diffusers, or of that file already."""
    return f"Pruned{name.removeprefix('Pruned')}"


def empty_model(config: dict[str, Any]) -> nn.Module:
    """A model with parameters on the meta device and everything else (RoPE tables) real.

    Args:
        config: names the class, see `find_class`.
    """
    with init_empty_weights(include_buffers=False):
        model = find_class(str(config["_class_name"])).from_config(config)
    return model.eval().requires_grad_(False)


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype


def tensors_of(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name; none of it is loaded.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    found = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118, it is no mapping
            stored = opened.get_slice(key)
            shape = torch.Size(stored.get_shape())
            found[key] = Stored(file, shape, (stored[:0] if shape else opened.get_tensor(key)).dtype)
    return found


def _sides(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"


class ModelFiles:
    """A diffusers transformer folder (`config.json` and safetensors), or a pipeline folder that has one.

    Args:
        path: the folder.
        weights: whether tensors will be read; without them, `config.json` is enough.
        component: the transformer's folder in a pipeline's.

    Raises:
        UserError: the folder is missing, is no diffusers transformer, or lacks weights; the message names it.
    """

    def __init__(self, path: Path, weights: bool = True, component: str = "transformer") -> None:
        if path.is_file():
            raise UserError(
                f"teacher {path} is a file; give a pipeline folder, which `ppcl import FILE --base FOLDER` makes of one"
            )
        self.folder = path / component if (path / component).is_dir() else path
        try:
            self.config: dict[str, Any] = dict(json.loads((self.folder / "config.json").read_text()))
            self.class_name: str = self.config["_class_name"]
            # Of these, diffusers takes what its class says today instead, whatever stands in the file.
            self.config.pop("_use_default_values", None)
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"teacher {path}: no readable config.json in {component}/; give a folder that save_pretrained wrote"
            ) from None
        self.model_class = find_class(self.class_name)
        if self.model_class is None:
            raise UserError(
                f"teacher {path}: config.json names class '{self.class_name}', which diffusers does not have"
            )
        self._stored = self._index() if weights else {}

    def _index(self) -> dict[str, Stored]:
        """What the safetensors files hold."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        single = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            if not index.exists():
                self._refuse_variants(single)
                return tensors_of(single)
            names = dict(json.loads(index.read_text())["weight_map"])
            if not names:
                raise ValueError("the index lists no tensors")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as fault:
            raise UserError(f"teacher {self.folder}: cannot read {single.name} or its index: {brief(fault)}") from None
        found: dict[str, Stored] = {}
        for file in sorted({self.folder / str(name) for name in names.values()}):
            if not file.exists():
                raise UserError(f"teacher {self.folder}: weights file {file.name} is missing; copy it again")
            try:
                found |= tensors_of(file)
            except (OSError, SafetensorError) as fault:
                raise UserError(
                    f"teacher {self.folder}: {file.name} cannot be read ({brief(fault)}); copy it again"
                ) from None
        for name, file_name in names.items():
            if name not in found or found[name].file.name != file_name:
                raise UserError(
                    f"teacher {self.folder}: {index.name} says that {file_name} holds '{name}', which it does not; "
                    "copy the folder again"
                )
        return found

    def _refuse_variants(self, plain: Path) -> None:
        """Files such as `diffusion_pytorch_model.fp16.safetensors` are one of several sets of weights."""
        others = sorted(self.folder.glob(f"{plain.stem}*.safetensors"))
        if others and not plain.exists():
            raise UserError(
                f"teacher {self.folder}: {others[0].name} stands there without {plain.name}; load the pipeline by "
                "diffusers' from_pretrained(..., variant=...), save it anew, and give that folder"
            )

    def check(self, empty: nn.Module) -> None:
        """That the files hold what the configuration says, and no more.

        Args:
            empty: the model of the configuration.

        Raises:
            UserError: they do not, or what they hold is quantised; the message names a tensor.
        """
        where = f"teacher {self.folder}"
        if quantised := next((name for name in self._stored if name.endswith(QUANTISED)), None):
            raise UserError(f"{where}: is quantised ('{quantised}' is a scale); give the weights that it was made from")
        if "quantization_config" in self.config:
            raise UserError(f"{where}: is quantised, as its config.json says; give the weights that it was made from")
        expected, parameters = empty.state_dict(), dict(empty.named_parameters())
        if missing := sorted(parameters.keys() - self._stored.keys()):
            raise UserError(f"{where}: tensor '{missing[0]}' is missing from the safetensors files")
        ignored = getattr(self.model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
        known = expected.keys() | dict(empty.named_buffers()).keys()
        for name, stored in self._stored.items():
            if name not in known:
                if not any(re.search(pattern, name) for pattern in ignored):
                    raise UserError(
                        f"{where}: nothing of a {self.class_name} with this config.json reads tensor '{name}'; are "
                        "both of the same model?"
                    )
            elif name in expected and stored.shape != expected[name].shape:
                raise UserError(
                    f"{where}: tensor '{name}' is {_sides(stored.shape)}, but config.json asks for "
                    f"{_sides(expected[name].shape)}; are both of the same model?"
                )

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all stored tensors; where none will be read, of those that the class has."""
        return frozenset(self._stored or self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.empty_model().state_dict().items()}

    def empty_model(self, config: dict[str, Any] | None = None) -> nn.Module:
        """The stock class with parameters on the meta device and everything else (RoPE tables) real.

        Args:
            config: another configuration, of the same class or another one; None for the teacher's own.
        """
        return empty_model(config or self.config)

    def runs_as(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor in a model that runs as `dtype`: float32 where the family insists on it."""
        kept = set(getattr(self.model_class, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if kept & set(key.split(".")) else dtype

    @contextmanager
    def _open(self, key: str) -> Iterator[Any]:
        """The file that holds a tensor.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        file = self._stored[key].file
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as fault:
            raise UserError(f"teacher {self.folder}: {file.name} cannot be read ({fault}); copy it again") from None

    def tensor(self, key: str) -> Tensor:
        """One stored tensor, on the CPU.

        Raises:
            UserError: it cannot be read, or is not finite.
        """
        with self._open(key) as opened:
            return self._finite(key, opened.get_tensor(key))

    def _finite(self, key: str, values: Tensor) -> Tensor:
        """A stored tensor or a part of it, looked through."""
        wide = values.float() if values.dtype.itemsize == 1 and values.is_floating_point() else values
        if not bool(wide.isfinite().all()):
            raise UserError(f"teacher {self.folder}: tensor '{key}' has NaN or infinite values; give sound weights")
        return values

    def filled(self, module: nn.Module, key: str) -> nn.Module:
        """A copy of an empty part of the model with its stored weights, on the CPU.

        Args:
            key: of the part, such as `transformer_blocks.7` or `transformer_blocks.7.img_mlp`.
        """
        module = copy.deepcopy(module)
        module.load_state_dict({name: self.tensor(f"{key}.{name}") for name in module.state_dict()}, assign=True)
        return module

    def source(self, key: str) -> Source:
        """One stored tensor, looked at but not loaded; where none will be read, its shape alone is right."""
        if not self._stored:
            return Source(self._shapes[key], torch.float32, partial(self.tensor, key))
        stored = self._stored[key]
        return Source(stored.shape, stored.dtype, partial(self.tensor, key))

    def flat_range(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start:stop` of a stored tensor laid flat; reads only the rows that hold them."""
        with self._open(key) as opened:
            stored = opened.get_slice(key)
            shape = stored.get_shape()
            if len(shape) == 0:
                return self._finite(key, opened.get_tensor(key).reshape(1)[start:stop])
            row = max(1, torch.Size(shape[1:]).numel())
            first, last = start // row, -(-stop // row)
            rows = stored[first:last].reshape(-1)
            return self._finite(key, rows[start - first * row : stop - first * row])
