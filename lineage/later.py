"""Groups of commands that are made when one is asked for, so that all others start fast."""

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import rich_click as click

if TYPE_CHECKING:
    from lineage.rendering import Table


class Output(Protocol):
    """What prints an answer as the user asked for it."""

    def show(self, answer: dict[str, Any], table: "Table") -> int:
        """Print an answer; return exit code 0."""


def group_of(
    name: str, commands: Mapping[str, Callable[..., int]], answering: Callable[[Any], Any]
) -> click.RichGroup:
    """Return a group of commands.

    Args:
        name: What it is called.
        commands: Name of each command → what it does, with its own options.
        answering: Adds the options that all commands share, and hands over an `Output`.
    """
    group = click.RichGroup(name=name)
    for word, command in commands.items():
        group.add_command(click.command(word)(answering(command)))
    return group


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
