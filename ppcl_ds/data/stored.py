"""How encoded samples lie on disk: a safetensors file a sample, and one for what all samples share.

Its metadata says how the tensors of a caption were put together, see `text.to_stored`.
Shapes: C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.guiding import Guiding
from ppcl_ds.data.text import Joining, from_stored, to_stored
from ppcl_ds.errors import brief

EMPTY = "empty"
"""Beside a source image the empty caption has a text of its own; it stands among the captions under this name."""


@dataclass(frozen=True)
class Stored:
    """What is stored of a sample.

    Attributes:
        latents: (C, H, W) or (C, F, H, W), the mean of what the VAE says.
        prompts: by the captions' names, the main one's is ``; `EMPTY` is the empty one's, if it has its own.
    """

    latents: Tensor
    size: Size
    prompts: Mapping[str, Prompt]

    def write(self) -> bytes:
        """As a safetensors file; floats in bfloat16."""
        size = torch.tensor([self.size.frames, self.size.height, self.size.width])
        # A copy: what is a part of a batch would be stored with all of it.
        latents = self.latents.to("cpu", torch.bfloat16).clone(memory_format=torch.contiguous_format)
        tensors = {"latents": latents, "size": size}
        words: dict[str, str] = {}
        for name, prompt in self.prompts.items():
            _put(tensors, words, f"text.{name}" if name else "text", prompt)
        return _closed(tensors, words)

    @classmethod
    def read(cls, data: bytes) -> Stored:
        """From a safetensors file; floats are float32.

        Raises:
            ValueError: it is damaged, or something is missing in it.
        """
        tensors, words = _opened(data)
        if "prompt_embeds" in tensors:
            raise ValueError("encoded by an earlier release; run `ppcl-data encode RECIPE` again")
        if not {"latents", "size"} <= tensors.keys() or "text" not in words:
            lacking = next(name for name in ("latents", "size", "text") if name not in {**tensors, **words})
            raise ValueError(f"no tensor `{lacking}`")
        frames, height, width = tensors["size"].flatten().tolist()
        names = [word for word in words if word.partition(".")[0] == "text"]
        prompts = {name.partition(".")[2]: _taken(tensors, words, name) for name in names}
        return cls(tensors["latents"].float(), Size(height, width, frames, prompts[""].source), prompts)


@dataclass(frozen=True)
class Texts:
    """What all samples share.

    Attributes:
        empty: what the empty caption became.
        joining: how captions are joined.
        guiding: how they are read with guidance; None: only the pipeline itself can say.
    """

    empty: Prompt
    joining: Joining
    guiding: Guiding | None

    @staticmethod
    def write(empty: Prompt, long: Prompt, both: Prompt, guided: Prompt | None) -> bytes:
        """The examples from which it is learned, as a safetensors file.

        Args:
            empty: the empty caption.
            long: another one, of more tokens.
            both: these two, encoded together.
            guided: the other one, encoded as it is read with guidance.
        """
        tensors: dict[str, Tensor] = {}
        words: dict[str, str] = {}
        for name, prompt in (("empty", empty), ("long", long), ("both", both), ("guided", guided)):
            if prompt is not None:
                _put(tensors, words, name, prompt)
        return _closed(tensors, words)

    @classmethod
    def read(cls, data: bytes) -> Texts:
        """From that file.

        Raises:
            ValueError: it is damaged, or captions are put together in a way that is not known.
        """
        tensors, words = _opened(data)
        if not {"empty", "long", "both"} <= words.keys():
            raise ValueError("it is not complete")
        prompts = {name: _taken(tensors, words, name) for name in words}
        empty, long = prompts["empty"], prompts["long"]
        joining = Joining.learn(tuple(empty.text), tuple(long.text), tuple(prompts["both"].text))
        guiding = None
        if "guided" in prompts:
            guiding = Guiding.learn(tuple(long.text), tuple(empty.text), tuple(prompts["guided"].text))
        return cls(empty, joining, guiding)


def _put(tensors: dict[str, Tensor], words: dict[str, str], name: str, prompt: Prompt) -> None:
    """Add a prompt to what will be stored."""
    made, word = to_stored({"text": tuple(prompt.text), "images": tuple(prompt.images)}, name)
    tensors |= made
    words[name] = json.dumps({"tree": word, "source": prompt.source})


def _taken(tensors: Mapping[str, Tensor], words: Mapping[str, str], name: str) -> Prompt:
    """The prompt of that name.

    Raises:
        ValueError: it is damaged.
    """
    try:
        word = json.loads(words[name])
        made, source = word["tree"], tuple(word["source"]) if word["source"] else None
        tree = from_stored(tensors, made)
        return Prompt(tree["text"], tree["images"], source)
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as fault:
        raise ValueError(f"its text cannot be put together ({fault})") from None


def _closed(tensors: dict[str, Tensor], words: dict[str, str]) -> bytes:
    """A safetensors file. Several entries of its metadata would lie in another order each time, so there is one."""
    return safetensors.torch.save(tensors, {"words": json.dumps(words)})


def _opened(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and words of such a file; no words, if it was written by somebody else."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        words = dict(json.loads(header.get("__metadata__", {}).get("words", "{}")))
    except Exception as fault:  # whatever the broken byte led to
        raise ValueError(f"damaged ({brief(fault)})") from None
    return tensors, words
