"""What must be said of a transformer family that neither its shapes nor its stock pipeline show: a file a family.

A file names the classes that it is for (`CLASSES`) and says what is special about them (`OWN`); a new file is found by
itself. Most families need none.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Own:
    """What is special about a family; every default is what most families need.

    Attributes:
        refused: why no block of it can be taken out, for a person.
        entries: configuration keys that hold an entry a block -> the block lists that they run over, end to end.
        modules: module lists that hold a module a block, likewise.
        behind: configuration keys with positions of blocks behind which something happens -> the block list. (Keys of
            positions that change the shapes of blocks are found without being named.)
        filled: for a configuration key whose default depends on the number of blocks: what it stands for, from the
            teacher's configuration.
        pruned: configuration keys of `modeling_pruned.py` that a shorter model needs, from the teacher's configuration
            and the positions that are kept of each block list.
        small: configuration keys with which a model of as many blocks is small; what is kept is then checked by numbers
            on such models, as tables of other lengths are read by other operations.
        options: of the pipeline's `__call__`, beside those that every pipeline is called with.
        real: components beside the transformer whose weights are needed to call it.
        noised: methods of the pipeline that make latents which are noised beside those of `prepare_latents`, in the
            order in which the transformer puts out what they are stepped by.
    """

    refused: str = ""
    entries: Mapping[str, Sequence[str]] = field(default_factory=dict)
    modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    filled: Any = None
    pruned: Any = None
    small: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    real: Sequence[str] = ()
    noised: Sequence[str] = ()

    @property
    def kinds(self) -> int:
        """How many kinds of latents are noised, each with an output of the transformer by which it is stepped."""
        return 1 + len(self.noised)


@cache
def _known() -> dict[str, Own]:
    """Class name -> what its file says."""
    files = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {name: file.OWN for file in files for name in file.CLASSES}


def own_of(class_name: str) -> Own:
    """What is special about a transformer class, or a pruned one of it."""
    return _known().get(class_name.removeprefix("Pruned"), Own())
