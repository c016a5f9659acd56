"""Numbers that the README and the concepts tell, taken from `benchmarks/results` as they are.

    python -m docs.numbers

writes them anew, each block between a comment with its name and the same comment with a slash.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
TELLING = (ROOT / "README.md", ROOT / "docs/concepts.md")
"""Pages that tell numbers."""


def scores() -> str:
    """Return what the README says of the last run of the corpus, the whole one if there is one."""
    file = next(
        (
            RESULTS / name
            for name in ("corpus.json", "corpus-core.json")
            if (RESULTS / name).exists()
        ),
        None,
    )
    if file is None:
        return "*Not measured yet: run `make corpus`.*\n"
    found = json.loads(file.read_text(encoding="utf-8"))
    summary = found["summary"]
    relations, claims = Counter(summary["relations"]), Counter[str]()
    for mark, count in summary["claims"].items():  # "refuted: right" is an answer and its mark
        claims[mark.split(": ")[1]] += count
    rows = [
        ("pairs judged, listed or not", f"{summary['pairs_judged']:,}"),
        ("strangers or twins called kin", summary["false_accusations"]),
        ("listed relations: right", relations["right"]),
        ("… not decided", relations["abstained"]),
        ("… wrong", relations["wrong"]),
        ("the same weights in another form, found", _of(summary["same_weights_found"])),
        ("fine-tunes found", _of(summary["fine_tunes_found"])),
        ("siblings found", _of(summary["siblings_found"])),
        ("claims of a base model: right", claims["right"]),
        ("… not decided", claims["abstained"]),
        ("… wrong", claims["wrong"]),
    ]
    words = (
        f"Measured on {found['models']} real models of other people whose relations are known\n"
        f"(`benchmarks/results/{file.name}`, {found['date']}; `make corpus` does it again):"
    )
    return f"{words}\n\n{as_table(('', ''), rows)}"


def _of(found: list[int]) -> str:
    return f"{found[0]} of {found[1]}"


def as_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    written = [
        "|" + "|".join(f" {cell} " if cell != "" else " " for cell in line) + "|" for line in lines
    ]
    return "\n".join(written) + "\n"


def share_of(value: float) -> str:
    """Return a share with three decimals, and with four if it would look whole and is not."""
    return f"{value:.3f}" if value == 1 or round(value, 3) < 1 else f"{value:.4f}"


def speeds() -> str:
    """Return what the README says of the last timings."""
    found = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    search = json.loads((RESULTS / "search.json").read_text(encoding="utf-8"))
    large, small, cold = found["add_large"], found["add_small"], found["cold"]
    models = search["filling"]["models"]
    rows = [
        (
            "`add` of a model of 2 GB, without identity codes",
            f"{large['add']['median']:.1f} s; {large['times_openssl']:.1f} × "
            "`openssl dgst -sha256`",
        ),
        (
            "with them",
            f"{large['add_codes']['median']:.1f} s; {large['times_openssl_with_codes']:.1f} × it",
        ),
        ("memory of that, all processes", f"{large['peak_pss_mb']} MB"),
        ("`add` of small models", f"{small['files_a_second']} a second"),
        (
            "`compare` of two models of a million parameters",
            f"{cold['compare kin']['median']:.2f} s",
        ),
        (
            f"`parents` among {models:,} models, in a running process",
            f"{search['parents']['seconds']['median']:.3f} s",
        ),
        ("… as a command", f"{search['parents_as_a_command']['median']:.2f} s"),
    ]
    words = (
        f"Medians on {found['machine']['cores']} cores of an {found['machine']['processor']} "
        f"(`benchmarks/results/speed.json` and\n`search.json`, {found['date']}):"
    )
    return f"{words}\n\n{as_table(('', ''), rows)}"


def peers() -> str:
    """Return what the README says of the last comparison with other tools."""
    found = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    rows = [
        (
            {"ours": "this program", "modeldna": f"`{found['modeldna']}`"}.get(
                tool, f"plain {tool}"
            ),
            way,
            f"{score['false_accusations']} of {score['of_strangers_read']}",
            f"{score['kin_found']} of {score['of_kin_read']}",
            score["abstained"],
            score["cannot_read"],
        )
        for way, tools in found["tables"].items()
        for tool, score in tools.items()
    ]
    columns = ("tool", "files", "strangers accused", "kin found", "not decided", "cannot read")
    return as_table(columns, rows)


def _matched(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows of the matched encoder without common starts, and of its worst kinds."""
    bins: dict[float, list[dict[str, Any]]] = {}
    for cell in cells:
        bins.setdefault(cell["drift"][0], []).append(cell)
    apart = [cell["apart"] for told in bins.values() for cell in told if cell["group"] == "all"]
    worst = [
        min((c for c in told if c["group"] != "all"), key=lambda cell: float(cell["first"]))
        for told in bins.values()
    ]
    return [
        ("encoder, matched; other starts", *(share_of(share) for share in apart)),
        ("encoder, matched; worst kind", *(f"{share_of(c['first'])} {c['group']}" for c in worst)),
    ]


def encoder() -> str:
    """Return what the README says of the last test of identity codes."""
    found = json.loads((RESULTS / "identity.json").read_text(encoding="utf-8"))
    zoo, rows = found["zoo"], []
    for method, told in found["methods"].items():
        cells = {tuple(cell["drift"]): cell for cell in told["cells"] if cell["group"] == "all"}
        rows.append((method, *(share_of(cell["first"]) for cell in cells.values())))
        if method == "encoder, matched":
            rows += _matched(told["cells"])
        counts = [f"{cell['queries']:,}" for cell in cells.values()]
        bins = [f"{low:g} to {high:g}" for low, high in cells]
    words = (
        f"{zoo['queries']:,} children and copies that the encoder has not seen, each reordered, "
        f"rescaled and\nflipped, among {zoo['bases']:,} bases of all designs: how often its base "
        "comes first, by how\nfar it has moved (`benchmarks/results/identity.json`, "
        f"{found['date']}):"
    )
    table = as_table(("drift", *bins), [("queries", *counts), *rows, *_crossed(found["crossed"])])
    return f"{words}\n\n{table}\n{_functional()}"


def _crossed(methods: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the rows of all recipes, each asked of an encoder that was trained without it."""
    cells = methods["encoder, matched"]
    every = [cell for cell in cells if cell["group"] == "all"]
    return [
        ("**all recipes**: queries", *(f"{cell['queries']:,}" for cell in every)),
        ("encoder, matched", *(share_of(cell["first"]) for cell in every)),
        *_matched(cells),
    ]


def parents() -> str:
    """Return what the README says of `parents` and disguised networks."""
    found = json.loads((RESULTS / "parents.json").read_text(encoding="utf-8"))
    bins = {tuple(row["drift"]): row for row in found["told"] if row["group"] == "all"}
    alone = {tuple(row["drift"]): row for row in found["without_kin"] if row["group"] == "all"}
    worst: dict[tuple[float, ...], str] = {}
    for row in found["told"]:
        span = tuple(row["drift"])
        if row["group"] != "all":
            worst[span] = min(worst.get(span, "2"), f"{row['said']:.2f} {row['group']}")

    def shares(name: str) -> tuple[str, ...]:
        return tuple(f"{row[name]:.2f}" for row in bins.values())

    def others(rows: Mapping[tuple[float, ...], dict[str, Any]]) -> tuple[str, ...]:
        names = ("others_listed", "others_partners", "with_others_ahead")
        return tuple("; ".join(str(rows[span][name]) for name in names) for span in bins)

    rows = [
        ("queries", *(str(row["queries"]) for row in bins.values())),
        ("its base is the first by its units", *shares("first")),
        ("… is called kin", *shares("listed")),
        ("… is named, for units are partners", *shares("partner")),
        ("… is named, for they stand out", *shares("ahead")),
        ("any of these", *shares("said")),
        ("… in the worst kind", *(worst[span] for span in bins)),
        ("others called kin; named as partners; because they stand out", *others(bins)),
        ("… of one start with the base", *(str(r["same_start"]) for r in bins.values())),
        ("these three where the base is not catalogued", *others(alone)),
        ("… of one start with the base", *(str(alone[s]["same_start"]) for s in bins)),
    ]
    words = (
        f"Disguised networks, equally many of each kind as far as there are, and "
        f"{found['catalogued']:,} bases in one\ncatalogue (`benchmarks/results/parents.json`, "
        f"{found['date']}), by drift:"
    )
    columns = ("drift", *(f"{low:g} to {high:g}" for low, high in bins))
    return f"{words}\n\n{as_table(columns, rows)}"


def partners() -> str:
    """Return what the concepts tell of the margins of pairs."""
    found = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    rows = []
    for kind, spread in found["pairs"].items():
        shares = {
            name: int(told.split(" of ")[0]) / int(told.split(" of ")[1])
            for name, told in spread["pass_by_kind"].items()
        }
        least = min(shares, key=lambda name: shares[name])
        kin = kind.startswith("kin")
        rows.append(
            (
                kind,
                f"{spread['pairs']:,}",
                f"{spread['median']:.2f}",
                f"{spread['largest']:.2f}",
                f"{spread['pass'] / spread['pairs']:.3f}" if spread["pass"] else "0",
                f"{shares[least]:.2f} {least}" if kin else "",
                f"{spread['put_in_place']:.2f}" if kin else "",
            )
        )
    words = (
        f"Pairs of networks of a zoo by what they are to each other "
        f"(`benchmarks/results/alignment.json`,\n{found['date']}); *in place*: the share of units "
        "that alignment puts where they were:"
    )
    columns = ("pairs", "number", "median margin", "largest", f"above {found['limit']}")
    return f"{words}\n\n{as_table((*columns, 'worst kind', 'in place'), rows)}"


def disguised() -> str:
    """Return what the concepts tell of `compare` and disguised networks."""
    found = json.loads((RESULTS / "disguised.json").read_text(encoding="utf-8"))
    said: dict[str, Counter[str]] = {}
    for kind, told in found["said"].items():
        turned = f"{kind}: " if kind.startswith("rotated") else ""
        for pair, answers in sorted(told.items()):
            said.setdefault(turned + pair, Counter()).update(answers)

    def row(pair: str, answers: Mapping[str, int]) -> tuple[str, ...]:
        undecided = {"cannot-say": 0, "unrelated": 0} | dict(answers)
        kin = sum(answers.values()) - undecided["cannot-say"] - undecided["unrelated"]
        same = answers.get("same-weights", 0)
        counts = (same, kin - same, undecided["cannot-say"], undecided["unrelated"])
        return (pair, *map(str, counts))

    rows = [row(pair, answers) for pair, answers in said.items()]
    words = (
        "What `compare` says of networks of a zoo, the second of each pair disguised in a bare\n"
        f"file (`benchmarks/results/disguised.json`, {found['date']}):"
    )
    columns = ("pairs", "same-weights", "other kin", "cannot-say", "unrelated")
    return f"{words}\n\n{as_table(columns, rows)}"


def _functional() -> str:
    """Return what neural functionals find, and the encoder of the same queries."""
    found = json.loads((RESULTS / "functional.json").read_text(encoding="utf-8"))
    theirs, ours = (
        ", ".join(share_of(row["first"]) for row in found[name]) for name in ("nfn", "encoder")
    )
    return (
        "Of the perceptrons among them, neural functionals (`nfn`), trained for each design and\n"
        f"told it, find {theirs}, the encoder {ours}\n"
        "(`benchmarks/results/functional.json`).\n"
    )


def function() -> str:
    """Return what the concepts tell of the last test of function codes."""
    found = json.loads((RESULTS / "encoder.json").read_text(encoding="utf-8"))["full"]
    rows, boosted = found["rows"], found["rows"]["statistics"]
    shapes, disguised = rows["shapes"]["scores"], boosted["disguised"]
    each = zip(rows["shipped"]["scores"], boosted["scores"], disguised, shapes, strict=True)
    table = [
        (
            ours["property"].replace("_", " "),
            f"{ours['score']:.2f}",
            f"{ours['worst_score']:.2f} ({ours['worst_kind']})",
            *(f"{other['score']:.2f}" for other in others),
        )
        for ours, *others in each
    ]
    words = (
        f"R² on {found['test']:,} networks of recipes that training has not seen, of the task the "
        f"share told right;\n{found['train']:,} trained (`benchmarks/results/encoder.json`, "
        f"{found['date']}). The others are gradient boosting on the same\nnetworks:"
    )
    columns = (
        "",
        "function code",
        "in the worst kind",
        "statistics",
        "… units disguised",
        "shapes alone",
    )
    return f"{words}\n\n{as_table(columns, table)}"


def streaming() -> str:
    """Return what the concepts tell of the codes of large models."""
    found = json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8"))
    told = [row for row in found.values() if isinstance(row, dict) and "parameters" in row]
    rows = [
        (
            f"{row['parameters'] / 1e6:,.0f} million",
            f"{row['seconds']['median']:.2f} s",
            f"{row['cpu_seconds']:.2f} s",
            f"{1e9 * row['cpu_seconds'] / row['parameters']:.1f} ns",
            f"{row['bytes_a_second'] / 1e9:.2f} GB/s",
            f"{row['share_of_limit']:.2f}",
            f"{row['peak_private_mb']} MB",
        )
        for row in told
    ]
    loads = [row["load_after"] for row in told]
    words = (
        f"Transformers of bfloat16, read and coded on {found['machine']['cores']} cores of an "
        f"{found['machine']['processor']} under a load of\n{min(loads):.1f} to {max(loads):.1f} "
        f"(`benchmarks/results/streaming.json`, {found['date']}; the last row is safetensors, "
        "the\nothers are ONNX). What is loaded once for all models took "
        f"{told[0]['once']['median']:.2f} s before. The *limit* is how fast two threads\n"
        "read such blocks, widen them and multiply them with 64 codes, and do nothing else, "
        "measured\nbetween the runs; most blocks are read twice:"
    )
    columns = ("parameters", "time", "all cores", "a parameter", "speed", "of the limit", "memory")
    return f"{words}\n\n{as_table(columns, rows)}"


def plain() -> str:
    """Return what the concepts tell of the code that needs no architecture."""
    found = json.loads((RESULTS / "plain.json").read_text(encoding="utf-8"))
    zoo, rows = found["zoo"], []
    for method, told in found["methods"].items():
        cells = [cell for cell in told["cells"] if cell["group"] == "all"]
        rows.append((method, *(f"{cell['first']:.2f}, {cell['ten']:.2f}" for cell in cells)))
    bins = ["{:g} to {:g}".format(*cell["drift"]) for cell in cells]
    words = (
        f"{zoo['queries']} children and copies, reordered, rescaled and flipped, among "
        f"{zoo['bases']:,} bases: how often the\nbase comes first, and among ten, by drift "
        f"(`benchmarks/results/plain.json`, {found['date']}); the *vector*\nis that of the "
        "fingerprint:"
    )
    return f"{words}\n\n{as_table(('drift', *bins), rows)}"


def million() -> str:
    """Return what the concepts tell of the search among many identity codes."""
    found = json.loads((RESULTS / "million.json").read_text(encoding="utf-8"))
    sizes, near = found["sizes"].values(), found["cosines_of_strangers"]
    loads = [size["nearest"][count]["load"] for size in sizes for count in ("100", "1000")]

    def taken(told: Mapping[str, float]) -> str:
        return f"{told['cpu_median_ms']:.1f}, {told['median_ms']:.1f} ms"

    rows: list[tuple[str, ...]] = []
    for count, words in (("100", "the 100 nearest"), ("1000", "the 1,000 nearest")):
        told = [size["nearest"][count] for size in sizes]
        rows += [
            (f"relatives among {words}", *(share_of(one["found"]) for one in told)),
            ("… by exact search", *(share_of(one["found_by_exact_search"]) for one in told)),
            ("… processor, clock", *(taken(one) for one in told)),
            (
                "… the same among 1 %",
                *(taken(size["filtered"][count]) for size in sizes),
            ),
        ]
    rows += [
        ("one exact scan", *(taken(size["scan"]) for size in sizes)),
        ("making the index", *(f"{size['index']['build_seconds']:.1f} s" for size in sizes)),
        (
            "reading the catalogue",
            *(f"{size['from_catalogue']['seconds']:.1f} s" for size in sizes),
        ),
        (
            "memory: codes, index",
            *(f"{size['index']['codes_mb']:,} MB, {size['index']['more_mb']} MB" for size in sizes),
        ),
    ]
    tail = "; ".join(
        f"one in {share} above {drawn:.2f}, of real ones above {true:.2f}"
        for share, drawn, true in zip(
            ("1,000", "10,000", "100,000"), near["drawn"][2:], near["real"][2:], strict=True
        )
    )
    words = (
        "Children and copies of recipes that the encoder has not seen, those of "
        f"{found['zoo']['queries']:,} that lie\nabove 99.9 % of the strangers; one thread of an "
        f"{found['machine']['processor']} under a load of {min(loads):.1f} to\n{max(loads):.1f} "
        f"(`benchmarks/results/million.json`, {found['date']}). Strangers are drawn like the\n"
        f"bases of the zoo, and their cosines with the queries are those of real ones:\n{tail}."
    )
    columns = ("codes", *(f"{int(size):,}" for size in found["sizes"]))
    return f"{words}\n\n{as_table(columns, rows)}"


NUMBERS: dict[str, Callable[[], str]] = {
    "scores": scores,
    "speeds": speeds,
    "peers": peers,
    "encoder": encoder,
    "parents": parents,
    "partners": partners,
    "disguised": disguised,
    "function": function,
    "streaming": streaming,
    "plain": plain,
    "million": million,
}


def block_of(name: str) -> re.Pattern[str]:
    """Return what finds the block of a name in a page."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)


def renew(page: Path) -> None:
    """Write all blocks of a page anew."""
    text = page.read_text(encoding="utf-8")
    for name, numbers in NUMBERS.items():
        if not block_of(name).search(text):
            continue
        fresh = numbers()
        text = block_of(name).sub(lambda _, fresh=fresh: fresh, text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the numbers of all pages that have some anew."""
    for page in TELLING:
        renew(page)


if __name__ == "__main__":
    main()
