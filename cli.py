"""The command line: options, one call on the engine, printing.

This is the only file that prints or exits. It imports click and rich-click alone; each command
imports what it needs when it runs, so that `lineage --help` stays fast.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import rich_click as click

from lineage.later import Later

if TYPE_CHECKING:
    from lineage.engine import LineageEngine
    from lineage.rendering import Table

Command = TypeVar("Command", bound=Callable[..., Any])

DONE, FAILED, USAGE, GATE, UNDECIDED, INTERRUPTED = 0, 1, 2, 3, 4, 130
# What cannot be read is no error of usage, so click does not look.
PATH = click.Path(path_type=Path, readable=False)
TREE_FORMATS = ("text", "newick", "nexus", "graphml", "dot", "mermaid", "svg")
STOPPED = "Stopped. What was finished is kept; run the same command to go on."

_GROUPS = {
    "Look": "demo info doctor completion",
    "Build": "add list remove check export import",
    "Ask": "parents children ancestors descendants path duplicates tree",
    "Prove": "compare verify",
    "Learn": "zoo train evaluate",
}
click.rich_click.COMMAND_GROUPS = {
    "cli": [{"name": name, "commands": words.split()} for name, words in _GROUPS.items()]
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

    told_by_click = isinstance(error, click.ClickException | click.Abort)
    expected = told_by_click or isinstance(error, ModelLineageError | OSError | ValueError)
    if not expected or ("--debug" in given and not told_by_click):
        raise error
    code = USAGE if isinstance(error, click.UsageError) else FAILED
    detail = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if isinstance(error, click.Abort):
        code, detail = INTERRUPTED, STOPPED
    if "--json" in given:
        from lineage.answers import problem_json

        _say(json.dumps(problem_json(error, code, detail)), err=True)
    elif isinstance(error, click.ClickException):
        error.show()
    else:
        _say(detail if code == INTERRUPTED else f"Error: {detail}", err=True)
    return code


def _say(text: str, *, err: bool = False) -> None:
    """Print a text; names of files and tensors in it may hold bytes that are no text."""
    from lineage.rendering import printable

    click.echo(printable(text), err=err)


# ------------------------------------------------------------------ options that commands share


@dataclass(frozen=True)
class Output:
    """The catalogue that is asked, and how its answers are printed."""

    catalogue: str
    form: str | None = None
    limit: int | None = None

    def engine(self, *, create: bool = False, optional: bool = False) -> "LineageEngine":
        """Open the catalogue; use it in a `with` statement."""
        from lineage.engine import LineageEngine

        return LineageEngine(self.catalogue, create=create, optional=optional)

    def show(self, answer: dict[str, Any], table: "Table") -> int:
        """Print an answer as the user asked for it; return exit code 0."""
        from lineage.answers import limited
        from lineage.rendering import rendered

        text = rendered(table, limited(answer, self.limit), form=self.form, limit=self.limit)
        if text:
            _say(text)
        return DONE

    def tell(self, command: str, facts: dict[str, Any]) -> int:
        """Print what a command did, which has little to say of it."""
        from lineage import answers, tables

        answer = answers.done_json(command, facts, self.catalogue)
        return self.show(answer, getattr(tables, f"{command}_table")(answer))


def _default_catalogue() -> str:
    from lineage.settings import read_settings

    return str(read_settings(Path.cwd())["catalogue"][0])


def answering(command: Command) -> Command:
    """Add --json, --tsv, -q, --limit, --catalogue and --debug, and hand over an `Output`."""

    @wraps(command)
    def run(catalogue: str, debug: bool, **given: Any) -> Any:
        output = Output(catalogue, given.pop("form", None), given.pop("limit", None))
        return command(output, **given)

    found: Any = run
    for option in reversed(_OPTIONS):
        found = option(found)
    return cast("Command", found)


_OPTIONS = (
    click.option("--json", "form", flag_value="json", help="Print JSON."),
    click.option("--tsv", "form", flag_value="tsv", help="Print tab-separated columns."),
    click.option("-q", "--quiet", "form", flag_value="names", help="Print names only."),
    click.option("--limit", type=click.IntRange(min=0), help="Cut the list after so many."),
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


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from lineage.answers import tool_version

        _say(f"lineage, version {tool_version()}")
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
def cli() -> None:
    """Read neural-network weights and tell where a model came from.

    It works offline, runs nothing that a model file holds, and sends nothing anywhere.
    """


@cli.command()
@click.argument("folder", type=PATH, default=Path("lineage-demo"))
def demo(folder: Path) -> int:
    """Make a small family with known descent, index it and draw it."""
    from lineage.demo import run_demo

    _say(run_demo(folder))
    return DONE


@cli.command()
@click.argument("model", type=PATH)
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
@click.argument("models", nargs=-1, required=True, type=PATH)
@click.option("--name", default="", help="Name of the model, if it is one.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Processes for small models.")
@click.option("--dry-run", is_flag=True, help="Say what would be read, and read nothing.")
@click.option(
    "--allow-partial", is_flag=True, help="Read what is there of models with parts missing."
)
@click.option("--codes/--no-codes", default=True, help="Identity codes too: another read of each.")
@answering
def add(output: Output, models: tuple[Path, ...], jobs: int, dry_run: bool, **options: Any) -> int:
    """Read models, take their fingerprints and remember them.

    What has not changed is not read again. What was finished stays when the run is stopped.
    """
    from lineage import answers, tables
    from lineage.watching import watching

    with output.engine(create=not dry_run, optional=dry_run) as engine:
        if dry_run:
            planned = engine.plan(models, **options)
            answer = answers.plan_json(*planned, output.catalogue)
            return output.show(answer, tables.plan_table(answer))
        with watching(sys.stderr) as watcher:
            result = engine.add(models, workers=jobs, watcher=watcher, **options)
        answer = answers.add_json(result, output.catalogue)
    output.show(answer, tables.add_table(answer))
    if not result.failed:
        return DONE
    return UNDECIDED if result.added or result.unchanged else FAILED


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
@answering
def remove(output: Output, models: tuple[str, ...]) -> int:
    """Forget models; their files stay."""
    with output.engine() as engine:
        engine.remove(models)
    return output.tell("remove", {"removed": list(models)})


@cli.command()
@answering
def check(output: Output) -> int:
    """Look whether the catalogue is whole."""
    with output.engine() as engine:
        facts = {"problems": engine.check(), "models": len(engine.catalogue)}
    output.tell("check", facts)
    return UNDECIDED if facts["problems"] else DONE


@cli.command()
@click.argument("target", type=PATH)
@click.option("--redact-paths", is_flag=True, help="Leave out where the files lie.")
@answering
def export(output: Output, target: Path, redact_paths: bool) -> int:
    """Write the catalogue to one file."""
    with output.engine() as engine:
        facts = {"file": str(target), "models": engine.export(target, redact=redact_paths)}
    return output.tell("export", facts)


@cli.command(name="import")
@click.argument("source", type=PATH)
@answering
def import_(output: Output, source: Path) -> int:
    """Add the models of an exported file."""
    from lineage import answers, tables

    with output.engine(create=True) as engine:
        added, kept = engine.import_from(source)
    facts = {"added": added, "unchanged": kept, "failed": []}
    answer = answers.done_json("import", facts, output.catalogue)
    return output.show(answer, tables.add_table(answer))


@cli.command()
@click.argument("model")
@answering
def parents(output: Output, model: str) -> int:
    """Name the catalogued models that a model may come from."""
    return _kin(output, model, "parents")


@cli.command()
@click.argument("model")
@answering
def children(output: Output, model: str) -> int:
    """Name the catalogued models that may come from a model."""
    return _kin(output, model, "children")


def _kin(output: Output, model: str, way: str) -> int:
    from lineage import answers, tables

    to_json = {"parents": answers.parents_json, "children": answers.children_json}[way]
    with output.engine() as engine:
        answer = to_json(engine.relatives(model), output.catalogue)
    return output.show(answer, tables.relatives_table(answer, way))


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
    "--format", "text_format", default="text", show_default=True, type=click.Choice(TREE_FORMATS)
)
@answering
def tree(output: Output, pattern: str, text_format: str) -> int:
    """Draw the family trees of the catalogued models, or of those that a pattern names."""
    from lineage import answers, tables
    from lineage.formats import FORMATS

    with output.engine() as engine:
        found = engine.tree(pattern)
    if output.form is None:
        _say(FORMATS[text_format](found))
        return DONE
    answer = answers.tree_json(found, output.catalogue)
    return output.show(answer, tables.tree_table(answer))


ALLOW = click.option(
    "--allow", type=click.Choice(["cannot-say"]), multiple=True, help="Let exit code 4 be 0."
)


@cli.command()
@click.argument("a")
@click.argument("b")
@ALLOW
@answering
def compare(output: Output, a: str, b: str, allow: tuple[str, ...]) -> int:
    """Show the evidence for one pair of models."""
    from lineage import answers, tables

    with output.engine(optional=True) as engine:
        answer = answers.compare_json(engine.compare(a, b), output.catalogue)
    output.show(answer, tables.compare_table(answer))
    return UNDECIDED if answer["relation"] == "cannot-say" and not allow else DONE


@cli.command()
@click.argument("model")
@click.option("--parent", "claimed", multiple=True, help="A base to check, in place of the card's.")
@click.option(
    "--fail-on",
    default="refuted",
    show_default=True,
    help="Answers or relations that fail the gate (exit code 3).",
)
@ALLOW
@answering
def verify(
    output: Output, model: str, claimed: tuple[str, ...], fail_on: str, allow: tuple[str, ...]
) -> int:
    """Check what is claimed of a model against its weights; the gate for CI."""
    from lineage import answers, tables

    words = [word.strip() for word in fail_on.split(",") if word.strip()]
    if unknown := sorted(set(words) - answers.GATE_WORDS):
        known = ", ".join(sorted(answers.GATE_WORDS))
        raise click.UsageError(f"--fail-on: {', '.join(unknown)} is none of {known}")
    with output.engine(optional=True) as engine:
        answer = answers.verify_json(engine.verify(model, claimed), output.catalogue)
    output.show(answer, tables.verify_table(answer))
    code = {"failed": GATE, "undecided": UNDECIDED}
    return code.get(answers.gate(answer, words, allow), DONE)


@cli.command()
@answering
def doctor(output: Output) -> int:
    """Say what this installation can do and where its settings come from."""
    from lineage import answers, tables
    from lineage.doctor import findings
    from lineage.settings import read_settings

    settings = read_settings(Path.cwd())
    if output.catalogue != settings["catalogue"][0]:
        settings["catalogue"] = (output.catalogue, "--catalogue")
    answer = answers.doctor_json(findings(settings), output.catalogue)
    output.show(answer, tables.doctor_table(answer))
    return UNDECIDED if any(f["state"] == "clash" for f in answer["findings"]) else DONE


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes commands in a shell."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    _say(kind(cli, {}, "lineage", "_LINEAGE_COMPLETE").source())
    return DONE


for _name, _help in (
    ("zoo", "Make and read small networks whose descent is known."),
    ("train", "Learn anew, from a zoo, what this program has learned."),
    ("evaluate", "Test what was learned on models that it has not seen."),
):
    cli.add_command(Later(answering, name=_name, help=_help))


def main() -> None:
    """Run the command line."""
    # Set before anything loads numpy: tensors are read side by side, and BLAS threads inside each
    # would only wait for each other (adding 2 GB took 2.3 times as long on two cores).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cli()


if __name__ == "__main__":
    main()
