"""The command line: options, one call on the engine, printing.

This is the only file that prints or exits. It imports click and rich-click alone; each command
imports what it needs when it runs, so that `lineage --help` stays fast.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import rich_click as click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lineage.adding import Watcher
    from lineage.engine import LineageEngine
    from lineage.rendering import Table

Command = TypeVar("Command", bound=Callable[..., Any])

DONE, FAILED, USAGE, GATE, UNDECIDED, INTERRUPTED = 0, 1, 2, 3, 4, 130
SHOWN_ROWS = 20
STOPPED = "Stopped. What was finished is kept; run the same command to go on."

click.rich_click.USE_MARKDOWN = False
_GROUPS = {
    "Look": "demo info doctor completion",
    "Build": "add list remove check export import",
    "Ask": "parents children ancestors descendants path duplicates tree",
    "Prove": "compare verify",
}
click.rich_click.COMMAND_GROUPS = {
    "*": [{"name": name, "commands": words.split()} for name, words in _GROUPS.items()]
}


class Commands(click.RichGroup):
    """The group of all commands: turns errors into a line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; exit with the codes of the manual."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as error:
            code = _report(error, given)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else DONE)
        return code


def _report(error: Exception, given: Sequence[str]) -> int:
    """Say what went wrong and return the exit code for it."""
    from embedder.errors import ModelLineageError

    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader has gone, and nothing is wrong
        return DONE
    if isinstance(error, click.exceptions.Exit):  # type: ignore[attr-defined]
        return int(error.exit_code)
    if isinstance(error, click.Abort):
        click.echo(STOPPED, err=True)
        return INTERRUPTED
    expected = isinstance(error, click.ClickException | ModelLineageError | OSError | ValueError)
    if not expected or ("--debug" in given and not isinstance(error, click.ClickException)):
        raise error
    code = USAGE if isinstance(error, click.UsageError) else FAILED
    if "--json" in given:
        from lineage.answers import problem_json

        click.echo(json.dumps(problem_json(error, code)), err=True)
    elif isinstance(error, click.ClickException):
        error.show()
    else:
        click.echo(f"Error: {error}", err=True)
    return code


# ------------------------------------------------------------------ options that commands share


@dataclass(frozen=True)
class Output:
    """The catalogue that is asked, and how its answers are printed."""

    catalogue: str
    form: str | None = None
    limit: int | None = None

    @contextmanager
    def engine(self, *, create: bool = False, optional: bool = False) -> "Iterator[LineageEngine]":
        """Open the catalogue."""
        from lineage.engine import LineageEngine

        with LineageEngine(self.catalogue, create=create, optional=optional) as engine:
            yield engine

    def show(self, answer: dict[str, Any], table: "Table") -> int:
        """Print an answer as the user asked for it; return exit code 0."""
        from lineage.rendering import to_text, to_tsv

        if self.limit is not None:
            table = replace(table, rows=table.rows[: self.limit])
        if self.form == "json":
            click.echo(json.dumps(_limited(answer, self.limit), ensure_ascii=False))
        elif self.form == "tsv":
            click.echo(to_tsv(table))
        elif self.form == "names":
            for row in table.rows:
                click.echo(row[0])
        else:
            click.echo(to_text(table, SHOWN_ROWS if self.limit is None else None))
        return DONE


def _limited(answer: dict[str, Any], limit: int | None) -> dict[str, Any]:
    lists = ("parents", "children", "models", "groups", "claims", "tensors", "edges", "findings")
    return {
        key: value[:limit] if limit is not None and key in lists else value
        for key, value in answer.items()
    }


def _default_catalogue() -> str:
    from lineage.settings import read_settings

    return str(read_settings(Path.cwd())["catalogue"][0])


def with_catalogue(command: Command) -> Command:
    """Add --catalogue and --debug, and hand the command an `Output`."""
    return _collected(command, _CATALOGUE_OPTIONS)


def answering(command: Command) -> Command:
    """Add --json, --tsv, -q, --limit, --catalogue and --debug, and hand over an `Output`."""
    return _collected(command, (*_ANSWER_OPTIONS, *_CATALOGUE_OPTIONS))


def _collected(command: Command, options: Sequence[Callable[[Any], Any]]) -> Command:
    @wraps(command)
    def run(catalogue: str, debug: bool, **given: Any) -> Any:
        output = Output(catalogue, given.pop("form", None), given.pop("limit", None))
        return command(output, **given)

    found: Any = run
    for option in reversed(options):
        found = option(found)
    return cast("Command", found)


_ANSWER_OPTIONS = (
    click.option("--json", "form", flag_value="json", help="Print JSON."),
    click.option("--tsv", "form", flag_value="tsv", help="Print tab-separated columns."),
    click.option("-q", "--quiet", "form", flag_value="names", help="Print names only."),
    click.option("--limit", type=click.IntRange(min=0), help="Cut the list after so many."),
)
_CATALOGUE_OPTIONS = (
    click.option(
        "--catalogue",
        envvar="LINEAGE_CATALOGUE",
        default=_default_catalogue,
        show_default="lineage-catalogue",
        metavar="URL",
        help="The catalogue: a folder.",
    ),
    click.option("--debug", is_flag=True, help="Show a traceback on errors."),
)


# ------------------------------------------------------------------ the commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-lineage", prog_name="lineage")
def cli() -> None:
    """Read neural-network weights and tell where a model came from.

    It works offline, runs nothing that a model file holds, and sends nothing anywhere.
    """


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("lineage-demo"))
def demo(folder: Path) -> int:
    """Make a small family with known descent, index it and draw it."""
    from lineage.demo import run_demo

    click.echo(run_demo(folder))
    return DONE


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@answering
def info(output: Output, model: Path) -> int:
    """Say what a file is, from its header alone."""
    from lineage import answers, tables
    from lineage.looking import look_at

    checkpoint, whole = look_at(model)
    with checkpoint:
        answer = answers.info_json(checkpoint, str(model), output.catalogue)
    output.show(answer, tables.info_table(answer))
    return DONE if whole else UNDECIDED


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", default="", help="Name of the model, if it is one.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Processes for small models.")
@click.option("--dry-run", is_flag=True, help="Say what would be read, and read nothing.")
@click.option(
    "--allow-partial", is_flag=True, help="Read what is there of models with parts missing."
)
@answering
def add(
    output: Output,
    models: tuple[Path, ...],
    name: str,
    jobs: int,
    dry_run: bool,
    allow_partial: bool,
) -> int:
    """Read models, take their fingerprints and remember them.

    What has not changed is not read again. What was finished stays when the run is stopped.
    """
    from lineage import answers, tables

    with output.engine(create=not dry_run, optional=dry_run) as engine:
        if dry_run:
            planned = engine.plan(models, name=name, allow_partial=allow_partial)
            answer = answers.plan_json(*planned, output.catalogue)
            return output.show(answer, tables.plan_table(answer))
        with _watching() as watcher:
            result = engine.add(
                models, name=name, allow_partial=allow_partial, workers=jobs, watcher=watcher
            )
        answer = answers.add_json(result, output.catalogue)
    output.show(answer, tables.add_table(answer))
    if not result.failed:
        return DONE
    return UNDECIDED if result.added or result.unchanged else FAILED


@contextmanager
def _watching() -> "Iterator[Watcher | None]":
    """Show a bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from lineage.progress import Bar

    with Bar() as bar:
        yield bar


@cli.command(name="list")
@click.argument("pattern", default="*")
@answering
def list_(output: Output, pattern: str) -> int:
    """List the catalogued models."""
    from lineage import answers, tables

    with output.engine() as engine:
        answer = answers.list_json(engine.entries(pattern), output.catalogue)
    return output.show(answer, tables.list_table(answer))


@cli.command()
@click.argument("models", nargs=-1, required=True)
@with_catalogue
def remove(output: Output, models: tuple[str, ...]) -> int:
    """Forget models; their files stay."""
    with output.engine() as engine:
        for model in models:
            engine.catalogue.remove(model)
    click.echo(f"Removed {', '.join(models)}; the files stay.", err=True)
    return DONE


@cli.command()
@with_catalogue
def check(output: Output) -> int:
    """Look whether the catalogue is whole."""
    with output.engine() as engine:
        problems = engine.catalogue.check()
        count = len(engine.catalogue)
    for problem in problems:
        click.echo(problem)
    click.echo(f"{count:,} models, {len(problems)} problems.", err=True)
    return UNDECIDED if problems else DONE


@cli.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--redact-paths", is_flag=True, help="Leave out where the files lie.")
@with_catalogue
def export(output: Output, target: Path, redact_paths: bool) -> int:
    """Write the catalogue to one file."""
    with output.engine() as engine:
        count = engine.export(target, redact=redact_paths)
    click.echo(f"{count:,} models written to {target}.", err=True)
    return DONE


@cli.command(name="import")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@with_catalogue
def import_(output: Output, source: Path) -> int:
    """Add the models of an exported file."""
    with output.engine(create=True) as engine:
        added, kept = engine.import_from(source)
    click.echo(f"{len(added):,} models added, {len(kept):,} were there already.", err=True)
    return DONE


@cli.command()
@click.argument("model")
@answering
def parents(output: Output, model: str) -> int:
    """Name the catalogued models that a model may come from."""
    from lineage import answers, tables

    with output.engine() as engine:
        answer = answers.parents_json(engine.relatives(model), output.catalogue)
    return output.show(answer, tables.relatives_table(answer, "parents"))


@cli.command()
@click.argument("model")
@answering
def children(output: Output, model: str) -> int:
    """Name the catalogued models that may come from a model."""
    from lineage import answers, tables

    with output.engine() as engine:
        answer = answers.children_json(engine.relatives(model), output.catalogue)
    return output.show(answer, tables.relatives_table(answer, "children"))


@cli.command()
@click.argument("model")
@answering
def ancestors(output: Output, model: str) -> int:
    """Name all ancestors of a catalogued model, the nearest first."""
    return _descent(output, model, "ancestors")


@cli.command()
@click.argument("model")
@answering
def descendants(output: Output, model: str) -> int:
    """Name all descendants of a catalogued model, the nearest first."""
    return _descent(output, model, "descendants")


def _descent(output: Output, model: str, way: str) -> int:
    from lineage import answers, tables

    with output.engine() as engine:
        tree, node = engine.family(model)
    answer = answers.descent_json(tree, node, way, output.catalogue)
    return output.show(answer, tables.descent_table(answer, way))


@cli.command()
@click.argument("first")
@click.argument("second")
@answering
def path(output: Output, first: str, second: str) -> int:
    """Show how two catalogued models are joined in the tree."""
    from lineage import answers, tables

    with output.engine() as engine:
        tree, start = engine.family(first)
        end = engine.node_of(tree, second)
    answer = answers.path_json(tree, start, end, output.catalogue)
    return output.show(answer, tables.path_table(answer))


@cli.command()
@answering
def duplicates(output: Output) -> int:
    """Group models that are the same file, the same tensors or the same weights."""
    from lineage import answers, tables

    with output.engine() as engine:
        answer = answers.duplicates_json(engine.duplicates(), output.catalogue)
    return output.show(answer, tables.duplicates_table(answer))


@cli.command()
@click.argument("pattern", default="*")
@click.option(
    "--format",
    "text_format",
    default="text",
    show_default=True,
    type=click.Choice(["text", "newick", "nexus", "graphml", "dot", "mermaid", "svg"]),
)
@answering
def tree(output: Output, pattern: str, text_format: str) -> int:
    """Draw the family trees of the catalogued models, or of those that a pattern names."""
    from lineage import answers, tables
    from lineage.formats import FORMATS

    with output.engine() as engine:
        found = engine.tree(pattern)
    if output.form is None:
        click.echo(FORMATS[text_format](found))
        return DONE
    answer = answers.tree_json(found, output.catalogue)
    return output.show(answer, tables.tree_table(answer))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--allow", default="", help="Answers that are no reason for exit code 4: cannot-say.")
@answering
def compare(output: Output, a: str, b: str, allow: str) -> int:
    """Show the evidence for one pair of models."""
    from lineage import answers, tables

    with output.engine(optional=True) as engine:
        answer = answers.compare_json(engine.compare(a, b), output.catalogue)
    output.show(answer, tables.compare_table(answer))
    undecided = answer["relation"] == "cannot-say" and "cannot-say" not in _words(allow)
    return UNDECIDED if undecided else DONE


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


@cli.command()
@click.argument("model")
@click.option("--parent", "claimed", multiple=True, help="A base to check, in place of the card's.")
@click.option(
    "--fail-on",
    default="refuted",
    show_default=True,
    help="Answers or relations that fail the gate (exit code 3).",
)
@click.option("--allow", default="", help="Answers that are no reason for exit code 4: cannot-say.")
@answering
def verify(output: Output, model: str, claimed: tuple[str, ...], fail_on: str, allow: str) -> int:
    """Check what is claimed of a model against its weights; the gate for CI."""
    from lineage import answers, tables
    from lineage.answers import gate

    with output.engine(optional=True) as engine:
        answer = answers.verify_json(engine.verify(model, claimed), output.catalogue)
    output.show(answer, tables.verify_table(answer))
    code = {"failed": GATE, "undecided": UNDECIDED}
    return code.get(gate(answer, _words(fail_on), _words(allow)), DONE)


@cli.command()
@answering
def doctor(output: Output) -> int:
    """Say what this installation can do and where its settings come from."""
    from lineage import answers, tables
    from lineage.doctor import findings
    from lineage.settings import read_settings

    answer = answers.doctor_json(findings(read_settings(Path.cwd())), output.catalogue)
    whole = replace(output, limit=1000) if output.limit is None else output
    whole.show(answer, tables.doctor_table(answer))
    return UNDECIDED if any(f["state"] == "clash" for f in answer["findings"]) else DONE


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes commands in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(cli, {}, "lineage", "_LINEAGE_COMPLETE").source())
    return DONE


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
