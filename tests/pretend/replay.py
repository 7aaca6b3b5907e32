"""All ranks' programs side by side, as if nothing went on before everybody concerned was there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Call = tuple[str, tuple[int, ...], Any]
"""An operation, the ranks of its group, and what they have to agree on; see `collectives.Program`."""
Group = tuple[str, tuple[int, ...], bool]
"""Backend, members, and whether only they make it."""

_ANY_SIZE = frozenset(("all_gather_object", "broadcast_object", "barrier"))


class StuckError(AssertionError):
    """Ranks that wait for each other."""


def replay(programs: Sequence[Sequence[Call]]) -> int:
    """Run programs of collectives that all block; how many there were.

    Raises:
        StuckError: some rank does not come to its end; the message says where each stands.
        AssertionError: ranks meet in a collective and disagree on its size.
    """
    at, done = [0] * len(programs), 0
    heads = [program[0] if program else None for program in programs]

    def passed(ranks: Sequence[int]) -> None:
        for rank in ranks:
            at[rank] += 1
            heads[rank] = programs[rank][at[rank]] if at[rank] < len(programs[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(len(programs)):
            while (ranks := _meeting(rank, heads)) is not None:
                passed(ranks)
                done, moved = done + 1, True
    if any(heads):
        raise StuckError("; ".join(f"rank {rank} at {head and head[:2]}" for rank, head in enumerate(heads)))
    return done


def _meeting(rank: int, heads: Sequence[Call | None]) -> Sequence[int] | None:
    """The ranks that have all come to what `rank` is at; None while it has to wait."""
    head = heads[rank]
    if head is None:
        return None
    what, ranks, agreed = head
    if what in ("send", "recv"):
        other = heads[agreed[0]]
        if other is None or {what, other[0]} != {"send", "recv"} or other[2][0] != rank:
            return None
        assert agreed[1] == other[2][1], f"ranks {rank} and {agreed[0]} send and receive different sizes"
        return rank, agreed[0]
    together = [heads[member] for member in ranks]
    found = [each for each in together if each is not None and each[0] == what and each[1] == ranks]
    if len(found) < len(ranks):
        return None
    if what == "all_to_all":
        for i, (_, _, (sent, _)) in enumerate(found):
            for j, (_, _, (_, received)) in enumerate(found):
                assert sent[j] == received[i], f"{what} of {ranks}: {i} sends {sent[j]} to {j}, which waits for others"
    elif what not in _ANY_SIZE:
        assert len({json.dumps(each[2]) for each in found}) == 1, f"{what} of {ranks} in different sizes"
    return ranks


def make_groups(made: Sequence[Sequence[Group]], barrier: bool) -> int:
    """Make every rank's groups as torch does where the default group is bound to a device.

    A group of NCCL is split off the default one, which takes all ranks: members give their colour, the others none. A
    gloo group makes every rank that is not in it take part in such a split, too, for nothing; its members meet in the
    store instead. So ranks do not know which of the others' splits theirs is paired with, and whether it comes out even
    is a matter of counting. A group that only its members make (`use_local_synchronization`) asks nobody else.

    Args:
        made: of each rank, the groups that it makes, in order.
        barrier: whether a barrier of all who make a group ends its making (TORCH_DIST_INIT_BARRIER).

    Returns:
        Splits that were for nothing.

    Raises:
        StuckError: some rank waits for ever.
    """
    world = tuple(range(len(made)))
    programs: list[list[Call]] = []
    for rank, groups in enumerate(made):
        program: list[Call] = []
        for backend, ranks, local in groups:
            if local and rank not in ranks:
                continue
            inside = backend == "gloo" and rank in ranks
            program.append(("store", ranks, str(ranks)) if inside else ("split", world, ""))
            if barrier:
                program.append(("barrier", ranks if local else world, str(ranks)))
        programs.append(program)
    replay(programs)
    return sum(
        backend == "gloo" and not local and rank not in ranks for rank in world for backend, ranks, local in made[rank]
    )
