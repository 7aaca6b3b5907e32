"""After every command that has changed a run: its page is made anew."""

from __future__ import annotations

from ppcl_ds import launch
from ppcl_ds.errors import brief
from ppcl_ds.recipe import Recipe
from ppcl_ds.record import write_down


def renew(recipe: Recipe, command: str, page: bool = True) -> None:
    """After a command: write down that it was, and make the page anew; the first process of a launch does it.

    A page that cannot be written is said, and ends no command that has done its work.

    Args:
        page: whether the command has left anything that is shown; else it is only written down.
    """
    if not launch.is_first_rank():
        return
    from ppcl_ds.report.page import PAGE, write_page

    try:
        write_down(recipe, command)
        if page:
            print(f"wrote {write_page(recipe)}")
    except OSError as fault:
        print(f"{recipe.run / PAGE} is not renewed ({brief(fault)}); `ppcl report` makes it from what is there")
