"""A teacher on disk: its class, configuration and tensors, described without loading and loaded when asked for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ppcl_ds.errors import UserError
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
        self._file_of = self._index() if weights else {}

    def _index(self) -> dict[str, Path]:
        """Parameter name -> the safetensors file that holds it."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        single = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            if index.exists():
                names = dict(json.loads(index.read_text())["weight_map"])
                files = {key: self.folder / name for key, name in names.items()}
                if not files:
                    raise ValueError("the index lists no tensors")
                for file in sorted(set(files.values())):
                    if not file.exists():
                        raise UserError(f"teacher {self.folder}: weights file {file.name} is missing; copy it again")
                return files
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as fault:
            raise UserError(f"teacher {self.folder}: cannot read {single.name} or its index: {fault}") from None

    @cached_property
    def keys(self) -> frozenset[str]:
        """Names of all stored tensors; where none will be read, of those that the class has."""
        return frozenset(self._file_of or self._shapes)

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
        file = self._file_of[key]
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as fault:
            raise UserError(f"teacher {self.folder}: {file.name} cannot be read ({fault}); copy it again") from None

    def tensor(self, key: str) -> Tensor:
        with self._open(key) as opened:
            return opened.get_tensor(key)

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
        if not self._file_of:
            return Source(self._shapes[key], torch.float32, partial(self.tensor, key))
        with self._open(key) as opened:
            stored = opened.get_slice(key)
            shape = torch.Size(stored.get_shape())
            sample = stored[:0] if shape else opened.get_tensor(key)
        return Source(shape, sample.dtype, partial(self.tensor, key))

    def flat_range(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start:stop` of a stored tensor laid flat; reads only the rows that hold them."""
        with self._open(key) as opened:
            stored = opened.get_slice(key)
            shape = stored.get_shape()
            if len(shape) == 0:
                return opened.get_tensor(key).reshape(1)[start:stop]
            row = max(1, torch.Size(shape[1:]).numel())
            first, last = start // row, -(-stop // row)
            return stored[first:last].reshape(-1)[start - first * row : stop - first * row]
