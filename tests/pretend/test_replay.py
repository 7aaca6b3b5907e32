"""The replay itself: it tells programs that end from those that do not."""

from __future__ import annotations

import pytest

from tests.pretend.replay import Call, StuckError, make_groups, replay

BOTH, ALL = (0, 1), (0, 1, 2)


def test_programs_that_meet_come_to_their_end() -> None:
    first: list[Call] = [("all_reduce", ALL, 4), ("send", BOTH, (1, 8)), ("barrier", BOTH, 0)]
    second: list[Call] = [("all_reduce", ALL, 4), ("recv", BOTH, (0, 8)), ("barrier", BOTH, 0)]
    assert replay([first, second, [("all_reduce", ALL, 4)]]) == 3


@pytest.mark.parametrize(
    "second",
    [
        [("barrier", BOTH, 0), ("all_reduce", BOTH, 4)],
        [("all_reduce", BOTH, 4)],
    ],
    ids=["another order", "one call less"],
)
def test_programs_that_do_not_meet_are_stuck(second: list[Call]) -> None:
    with pytest.raises(StuckError):
        replay([[("all_reduce", BOTH, 4), ("barrier", BOTH, 0)], second])


def test_sizes_have_to_agree() -> None:
    with pytest.raises(AssertionError, match="different sizes"):
        replay([[("all_reduce", BOTH, 4)], [("all_reduce", BOTH, 8)]])
    with pytest.raises(AssertionError, match="0 sends 3 to 1"):
        replay([[("all_to_all", BOTH, ([0, 3], [0, 0]))], [("all_to_all", BOTH, ([0, 0], [2, 0]))]])


def test_a_gloo_group_of_some_ranks_waits_for_the_others_unless_only_its_members_make_it() -> None:
    pair = ("gloo", BOTH, False)
    with pytest.raises(StuckError):
        make_groups([[pair]] * 3, barrier=False)  # rank 2 splits the default group, alone
    alone = ("gloo", BOTH, True)
    assert make_groups([[alone], [alone], []], barrier=True) == 0
