"""Groups of commands that are made when one is asked for, so that all others start fast."""

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import rich_click as click


class Later(click.RichGroup):
    """A group whose commands `lineage.NAME_commands` makes.

    Args:
        answering: Adds the options that all commands share.
        name: What it is called.
        help: What it is for.
    """

    def __init__(self, answering: Callable[[Any], Any], *, name: str, help: str) -> None:
        super().__init__(name=name, help=help)
        self._answering = answering

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands."""
        return self._made.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command."""
        return self._made.get_command(ctx, cmd_name)

    @cached_property
    def _made(self) -> click.Group:
        module = import_module(f"lineage.{self.name}_commands")
        made: click.Group = module.commands(self._answering)
        return made
