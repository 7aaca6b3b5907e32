"""What the command lines have in common: help on a bare command, the version, the recipe and changes of it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, such as recipes/digits.yaml.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Use this value instead of the recipe's, such as distill.steps=10; repeat for several. Values are YAML.",
    ),
]


def group(help: str, **settings: Any) -> typer.Typer:
    """Commands under one name, which by itself shows its help and exits with code 0."""
    app = typer.Typer(help=help, invoke_without_command=True, **settings)

    @app.callback()
    def bare(context: typer.Context) -> None:
        _help_if_bare(context)

    return app


def program(help: str, **settings: Any) -> typer.Typer:
    """A command line: a group with `--version` and shell completion."""
    app = typer.Typer(help=help, invoke_without_command=True, pretty_exceptions_enable=False, **settings)

    @app.callback()
    def bare(
        context: typer.Context,
        show_version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
        ] = False,
    ) -> None:
        _help_if_bare(context)

    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ppcl-ds {version('ppcl-ds')}")
        raise typer.Exit()


def _help_if_bare(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        if text := context.get_help():  # with rich it is printed, not returned
            print(text)
        raise typer.Exit()
