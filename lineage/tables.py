"""Answers as tables: the columns that people see and that `--tsv` writes.

A column means the same for ever; `docs/columns.md` describes each one. The first column is what
`-q` prints.
"""

from typing import Any

from lineage.rendering import Table, number

Json = dict[str, Any]


def plural(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> plural(1, "model"), plural(1234, "model")
        ('1 model', '1,234 models')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def relatives_table(answer: Json, key: str) -> Table:
    """Return the table of `parents` or `children`."""
    rows = [
        (
            found["model"],
            found["relation"],
            " + ".join(found["operations"]),
            found["agreement"],
            found["distance"],
            found["chance"],
            found["direction"]["answer"],
        )
        for found in answer[key]
    ]
    columns = ("model", "relation", "operations", "agreement", "distance", "chance", "direction")
    searched = plural(answer["searched"], "model")
    noun = "parent" if key == "parents" else "child"
    closing = f"{plural(len(rows), 'relative')} of {answer['model']} among {searched}."
    if not rows:
        closing = f"No relative of {answer['model']} found as a {noun} among {searched}."
    limits = [f"limit   {limit}" for limit in answer["limits"]]
    return Table(columns, rows, "\n".join([closing, *limits]))


def compare_table(answer: Json) -> Table:
    """Return the table of `compare`: one row a pair of tensors."""
    rows = [
        (
            pair["a"],
            pair["b"],
            "×".join(map(str, pair["shape"])),
            pair["cosine"],
            pair["distance"],
            pair["equal"],
            pair["operation"] or "",
            pair["detail"] or "",
        )
        for pair in answer["tensors"]
    ]
    columns = ("a", "b", "shape", "cosine", "distance", "equal", "operation", "detail")
    return Table(columns, rows, opening="\n".join(_compare_lines(answer)))


def _compare_lines(answer: Json) -> list[str]:
    related = {True: "related", False: "not related", None: "not decided"}[answer["related"]]
    lines = [f"{answer['relation']}   ({related})"]
    if answer["operations"]:
        lines.append(f"done        {' + '.join(answer['operations'])}")
    for name in ("agreement", "distance"):
        if answer[name] is not None:
            lines.append(f"{name:<11} {number(answer[name])}")
    shares = f"{answer['share_of_a']:.1%} of A, {answer['share_of_b']:.1%} of B"
    lines.append(f"share       {shares}")
    if answer["chance"] is not None:
        (by,) = answer["chance_by"]
        lines.append(
            f"chance      {number(answer['chance'])}   (law of {by['controls']:,} controls)"
        )
    direction = answer["direction"]
    sure = "" if direction["answer"] == "unknown" else f", {direction['confidence']:.2f}"
    lines.append(f"direction   {direction['answer']}{sure}")
    lines += [f"            {reason}" for reason in direction["reasons"]]
    lines += [f"because     {reason}" for reason in answer["reasons"]]
    lines += [f"limit       {limit}" for limit in answer["limits"]]
    return lines


def verify_table(answer: Json) -> Table:
    """Return the table of `verify`."""
    rows = [
        (claim["claim"], claim["value"], claim["answer"], claim["evidence"]["reason"])
        for claim in answer["claims"]
    ]
    closing = "" if rows else "Nothing is claimed of this model; name a base with --parent."
    return Table(("claim", "value", "answer", "reason"), rows, closing)


def duplicates_table(answer: Json) -> Table:
    """Return the table of `duplicates`: one row a model."""
    rows = [
        (model, group["kind"], place)
        for place, group in enumerate(answer["groups"], 1)
        for model in group["models"]
    ]
    return Table(("model", "kind", "group"), rows, plural(len(answer["groups"]), "group") + ".")


def tree_table(answer: Json) -> Table:
    """Return the table of `tree`: one row an edge."""
    rows = [
        (e["child"], e["parent"], e["relation"], e["direction"], e["length"], e["support"])
        for e in answer["edges"]
    ]
    columns = ("child", "parent", "relation", "direction", "length", "support")
    names = [name for n in answer["nodes"] if n["observed"] for name in (n["name"], *n["also"])]
    return Table(columns, rows, names=names)


def list_table(answer: Json) -> Table:
    """Return the table of `list`."""
    rows = [
        (m["name"], m["format"], m["parameters"], m["bytes"], m["sha256"]) for m in answer["models"]
    ]
    columns = ("name", "format", "parameters", "bytes", "sha256")
    return Table(columns, rows, plural(len(rows), "model") + ".")


def add_table(answer: Json) -> Table:
    """Return the table of `add`: one row a model."""
    rows = [(name, "added", "") for name in answer["added"]]
    rows += [(name, "unchanged", "") for name in answer["unchanged"]]
    rows += [(failed["model"], "failed", failed["reason"]) for failed in answer["failed"]]
    counts = [
        plural(len(answer[what]), word)
        for what, word in (("added", "model"), ("unchanged", "model"), ("failed", "model"))
    ]
    closing = [f"limit   {limit}" for limit in answer["limits"]]
    closing.append(f"{counts[0]} added, {counts[1]} unchanged, {counts[2]} failed.")
    if answer["failed"]:
        kept = "What was added is kept" if answer["added"] else "Nothing was added"
        closing.append(f"{kept}; mend the rest and run the same command.")
    return Table(("model", "outcome", "reason"), rows, "\n".join(closing))


def remove_table(answer: Json) -> Table:
    """Return the table of `remove`: one row a model."""
    rows = [(name, "removed") for name in answer["removed"]]
    return Table(("model", "outcome"), rows, "The files stay.")


def check_table(answer: Json) -> Table:
    """Return the table of `check`: one row a problem."""
    rows = [(problem,) for problem in answer["problems"]]
    closing = f"{plural(answer['models'], 'model')}, {plural(len(rows), 'problem')}."
    return Table(("problem",), rows, closing)


def export_table(answer: Json) -> Table:
    """Return the table of `export`: one row."""
    return Table(("file", "models"), [(answer["file"], answer["models"])])


def plan_table(answer: Json) -> Table:
    """Return the table of `add --dry-run`: one row a model."""
    rows = [(m["name"], m["format"], m["bytes"]) for m in answer["models"]]
    number_of_all = len(rows) + len(answer["unchanged"])
    closing = (
        f"Would read {len(rows):,} of {plural(number_of_all, 'model')}, {answer['bytes']:,} bytes, "
        f"in about {answer['seconds']:.0f} s. Nothing was read."
    )
    return Table(("model", "format", "bytes"), rows, closing)


def info_table(answer: Json) -> Table:
    """Return the table of `info`: one row a fact."""
    rows = [
        ("model", answer["model"]),
        ("format", answer["format"]),
        ("parameters", answer["parameters"]),
        ("bytes", answer["bytes"]),
        ("tensors", answer["tensors"]),
        ("types", ", ".join(f"{name} {count}" for name, count in answer["dtypes"].items())),
    ]
    for place, facts in answer["declared"].items():
        for name, value in facts.items() if isinstance(facts, dict) else (("", facts),):
            rows.append((f"declared {place} {name}".strip(), _short(value)))
    rows += [("limit", limit) for limit in answer["limits"]]
    return Table(("fact", "value"), rows, names=[answer["model"]], whole=True)


def _short(value: Any, most: int = 100) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def doctor_table(answer: Json) -> Table:
    """Return the table of `doctor`: one row a finding."""
    rows = [(found["what"], found["state"], found["note"]) for found in answer["findings"]]
    return Table(("what", "state", "note"), rows, whole=True)


def descent_table(answer: Json, way: str) -> Table:
    """Return the table of `ancestors` or `descendants`: one row a model."""
    rows = [
        (f["model"], f["steps"], f["relation"], f["direction"], f["through"]) for f in answer[way]
    ]
    columns = ("model", "steps", "relation", "direction", "through")
    closing = f"{plural(len(rows), way[:-1])} of {answer['model']}."
    return Table(columns, rows, closing)


def path_table(answer: Json) -> Table:
    """Return the table of `path`: one row a step."""
    rows = [
        (s["from"], s["to"], s["relation"], s["direction"], s["length"]) for s in answer["steps"]
    ]
    closing = "" if answer["joined"] else "No line of kin joins the two."
    names = [s["from"] for s in answer["steps"][:1]] + [s["to"] for s in answer["steps"]]
    return Table(("from", "to", "relation", "direction", "length"), rows, closing, names=names)
