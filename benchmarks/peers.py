"""Put other tools beside ours on the real pairs of the corpus.

    python -m benchmarks.peers            about five minutes on two cores

It needs the corpus (`python -m benchmarks.corpus.fetch --all`) and writes
benchmarks/results/peers.json. The peers:

- `modeldna` 0.1.0 (PyPI), in an environment of its own that is made below the corpus's cache. It is
  made for large language models: it reads safetensors and GGUF folders, knows tensors by the names
  of Llama-like models, compares samples, and asks "is A derived from B".
- *plain cosine*: all tensors that have one name and shape in both files, read by our readers, put
  into one vector each; the cosine, with a threshold. It is what many people would write first.

To be fair. *As published*: each tool gets the files as they are (an archive is unpacked for the
peer); a pair that it cannot read counts neither for nor against it. *Converted*: what our readers
read and our pairing paired, as float32 safetensors in which corresponding tensors have one name,
turned to one order of axes. That gives the peers our reading and our pairing, which are most of the
work, and what is hard for them there (a folded norm, a cast) stays. For modeldna matrices are named
as the output projections of so many Llama layers, because no other names exist for it; nets like
these are outside its field, and on language models it would do better than here. We wrote this
comparison and the list was known to us, so our own column is no forecast for other models.

Scored are the pairs that the list calls kin or not; `same_initialisation` and `ambiguous` pairs are
left out. Kinship is what counts here, not the word for it. A *false accusation* is kinship said of
strangers. Both programs are started anew for every pair; the cosine runs in this process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.corpus.expected import UNREADABLE, UNSCORED, is_negative
from benchmarks.corpus.fetch import say
from benchmarks.corpus.listed import Known, Listed, corpus_folder, is_there, listed, pairs, path_of
from benchmarks.machine import load, write_result
from benchmarks.speed import environment, lineage
from embedder.checkpoint import Checkpoint, is_parameter
from embedder.errors import ModelLineageError
from embedder.fingerprint import fingerprinted, take_fingerprint
from embedder.opening import open_checkpoint
from lineage.pairing import pair_tensors

Json = dict[str, Any]
Weights = dict[str, NDArray[np.float32]]

MODELDNA = "modeldna==0.1.0"
THRESHOLDS = (0.5, 0.9, 0.99)
CANNOT_READ = "cannot read"
KIN, STRANGERS, ABSTAINED = "kin", "strangers", "abstained"

_MODELDNA_SAYS = {
    "EXACT_COPY": KIN,
    "QUANTIZED_COPY": KIN,
    "FINE_TUNE": KIN,
    "SAME_LINEAGE": KIN,
    "LIKELY_MERGE": KIN,
    "SAME_FAMILY_UNRESOLVED": ABSTAINED,
    "INSUFFICIENT": CANNOT_READ,
    "NO_MATCH": STRANGERS,
}
_NOT_COMPARED = ("no comparable signals", "layer count mismatch", "incompatible tensor shapes")


@dataclass(frozen=True, slots=True)
class Said:
    """What one tool said of a pair.

    Args:
        kinship: `kin`, `strangers`, `abstained` or `cannot read`.
        words: In the tool's own words.
        seconds: How long it took.
    """

    kinship: str
    words: str
    seconds: float


def scored_pairs() -> Iterator[tuple[Listed, Listed, Known]]:
    """Yield the listed pairs of which kinship is known, unless a file is incomplete."""
    for first, second, known in pairs(listed()):
        unscored = known.kind in (UNSCORED, "same_initialisation")
        if not unscored and not {first.id, second.id} & UNREADABLE.keys():
            yield first, second, known


# ------------------------------------------------------------------ the tools


def modeldna_program() -> Path:
    """Return modeldna's program, installed into an environment of its own if it is not there."""
    folder = corpus_folder() / "peers" / MODELDNA.replace("==", "-")
    program = folder / "bin" / "modeldna"
    if not program.is_file():
        say(f"installing {MODELDNA} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", MODELDNA]
        subprocess.run(pip, check=True)
    return program


def ask_modeldna(program: Path, first: Path, second: Path, home: Path) -> Said:
    """Ask modeldna whether the model of one folder derives from that of another.

    Args:
        program: From `modeldna_program`.
        first: Folder of the one.
        second: Folder of the other.
        home: Where it may keep what it keeps.
    """
    alone = {"HOME": str(home), "MODELDNA_DB": str(home / "db"), "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(program), "compare", str(first), str(second), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, env=kept | alone, cwd=home, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode or not done.stdout.lstrip().startswith("{"):
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        words = "".join(last).partition(str(home))[0]
        return Said(CANNOT_READ, words.strip(), seconds)
    verdict = json.loads(done.stdout)["verdict"]
    reason = (verdict["candidates"] or [{}])[0].get("ruled_out") or ""
    kinship = CANNOT_READ if reason in _NOT_COMPARED else _MODELDNA_SAYS[verdict["verdict"]]
    return Said(kinship, reason or verdict["verdict"], seconds)


def ask_ours(first: Path, second: Path, nowhere: Path) -> Said:
    """Ask our own command, without a catalogue."""
    command = lineage("compare", first, second, "--json", "--catalogue", nowhere)
    start = time.perf_counter()
    done = subprocess.run(
        command, env=environment(), cwd=nowhere.parent, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if not done.stdout:
        return Said(CANNOT_READ, done.stderr[-160:], seconds)
    answer = json.loads(done.stdout)
    kinship = {True: KIN, False: STRANGERS, None: ABSTAINED}[answer["related"]]
    return Said(kinship, answer["relation"], seconds)


def plain_cosine(first: Weights, second: Weights) -> float | None:
    """Return the cosine of all tensors of one name and shape; None if there are none.

    Example:
        >>> x = {"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32)}
        >>> plain_cosine(x, {"a": 2 * x["a"], "c": x["b"]})
        1.0
    """
    common = [name for name in first if name in second and first[name].shape == second[name].shape]
    sums = np.zeros(3)
    for name in common:
        x, y = (side[name].astype(np.float64).reshape(-1) for side in (first, second))
        sums += [x @ y, x @ x, y @ y]
    return float(sums[0] / np.sqrt(sums[1] * sums[2])) if sums[1] > 0 and sums[2] > 0 else None


def weights_of(path: Path) -> Weights:
    """Return all floating tensors of a file, as our readers read them."""
    with open_checkpoint(path) as checkpoint:
        return {
            tensor.name: np.asarray(tensor.read(), np.float32)
            for tensor in fingerprinted(checkpoint)
            if tensor.size
        }


# ------------------------------------------------------------------ the two tables


def as_published(first: Listed, second: Listed, folder: Path, program: Path) -> Json:
    """Give every tool the files as they are; return what each said."""
    folders = _folder_of(first, folder / "a"), _folder_of(second, folder / "b")
    start = time.perf_counter()
    cosine = plain_cosine(weights_of(path_of(first)), weights_of(path_of(second)))
    seconds = time.perf_counter() - start
    return {
        "ours": ask_ours(path_of(first), path_of(second), folder / "none"),
        "modeldna": ask_modeldna(program, *folders, folder),
        "cosine": cosine,
        "cosine_seconds": seconds,
    }


def _folder_of(model: Listed, folder: Path) -> Path:
    """Return a folder with one model's file alone, and its config if there is one."""
    folder.mkdir(parents=True)
    source = path_of(model)
    archive, mark, member = str(source).partition("!")
    if mark:
        with zipfile.ZipFile(archive) as opened:
            wanted = {member, str(Path(member).with_name("config.json"))}
            opened.extractall(folder, wanted & set(opened.namelist()))
        return folder / Path(member).parent
    (folder / source.name).symlink_to(source)
    config = source.parent / "config.json"
    if config.is_file() and source.suffix == ".safetensors":
        (folder / "config.json").symlink_to(config)
    return folder


def converted(first: Listed, second: Listed, folder: Path, program: Path) -> Json:
    """Give every tool float32 safetensors in which corresponding tensors have one name."""
    sides, layers = paired_weights(path_of(first), path_of(second))
    files, folders = [], []
    for side, weights in zip("ab", sides, strict=True):
        files.append(folder / f"{side}.safetensors")
        save_file(weights, files[-1])
        folders.append(folder / side)
        folders[-1].mkdir()
        save_file(_as_matrices(weights), folders[-1] / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": layers}
        (folders[-1] / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    cosine = plain_cosine(*sides)
    seconds = time.perf_counter() - start
    return {
        "ours": ask_ours(files[0], files[1], folder / "none"),
        "modeldna": ask_modeldna(program, folders[0], folders[1], folder),
        "cosine": cosine,
        "cosine_seconds": seconds,
    }


def _as_matrices(weights: Weights) -> Weights:
    """Return kernels as matrices, out × the rest, which modeldna looks at more closely."""
    return {
        name: values.reshape(len(values), -1) if values.ndim > 2 else values
        for name, values in weights.items()
    }


def paired_weights(first: Path, second: Path) -> tuple[tuple[Weights, Weights], int]:
    """Return the tensors of two models under common names, and the number of paired matrices.

    Paired matrices come first, as the output projections of so many layers; what has no partner
    keeps a name of its own.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in (first, second)]
        prints = [take_fingerprint(checkpoint) for checkpoint in opened]
        left, right = (_canonical(checkpoint) for checkpoint in opened)
        sides: tuple[Weights, Weights] = ({}, {})
        layers = 0
        for match in pair_tensors(prints[0], prints[1]):
            if match.grown:
                continue
            x, y = left.pop(match.first), right.pop(match.second)
            shape = prints[0].tensors[match.first].squeezed
            y = np.transpose(y.reshape(prints[1].tensors[match.second].squeezed), match.order)
            name = f"model.layers.{layers}.self_attn.o_proj.weight"
            sides[0][name] = np.ascontiguousarray(x.reshape(shape))
            sides[1][name] = np.ascontiguousarray(y)
            layers += 1
        for side, rest, word in zip(sides, (left, right), ("a", "b"), strict=True):
            for place, values in rest.items():
                side[f"{word}.{place}.weight"] = np.ascontiguousarray(np.squeeze(values))
        return sides, layers


def _canonical(checkpoint: Checkpoint) -> dict[int, NDArray[np.float32]]:
    return {
        place: np.asarray(tensor.canonical(), np.float32)
        for place, tensor in enumerate(fingerprinted(checkpoint))
        if tensor.size
        and is_parameter(tensor)  # as floats, sizes and indices would pass for weights
    }


# ------------------------------------------------------------------ the scores


def row_of(first: Listed, second: Listed, known: Known, found: Json) -> Json:
    """Return one row of the result file."""
    row: Json = {"a": first.id, "b": second.id, "kind": known.kind}
    for tool in ("ours", "modeldna"):
        said: Said = found[tool]
        row[tool] = {
            "kinship": said.kinship,
            "words": said.words,
            "seconds": round(said.seconds, 2),
        }
    cosine = found["cosine"]
    row["cosine"] = None if cosine is None else round(cosine, 4)
    row["cosine_seconds"] = round(found["cosine_seconds"], 2)
    return row


def table(rows: Sequence[Json]) -> Json:
    """Return for each tool false accusations, kin found, and seconds a pair."""
    result = {}
    for tool in ("ours", "modeldna"):
        said = [row[tool]["kinship"] for row in rows]
        result[tool] = _counted(rows, said, [row[tool]["seconds"] for row in rows])
    for threshold in THRESHOLDS:
        said = [_by_threshold(row["cosine"], threshold) for row in rows]
        seconds = [row["cosine_seconds"] for row in rows]
        result[f"cosine from {threshold}"] = _counted(rows, said, seconds)
    return result


def _by_threshold(cosine: float | None, threshold: float) -> str:
    if cosine is None:
        return CANNOT_READ
    return KIN if cosine >= threshold else STRANGERS


def _counted(rows: Sequence[Json], said: Sequence[str], seconds: Sequence[float]) -> Json:
    both = list(zip(rows, said, strict=True))
    strangers = [word for row, word in both if is_negative(row["kind"])]
    kin = [word for row, word in both if not is_negative(row["kind"])]
    return {
        "false_accusations": strangers.count(KIN),
        "of_strangers_read": len(strangers) - strangers.count(CANNOT_READ),
        "kin_found": kin.count(KIN),
        "kin_denied": kin.count(STRANGERS),
        "of_kin_read": len(kin) - kin.count(CANNOT_READ),
        "abstained": said.count(ABSTAINED),
        "cannot_read": said.count(CANNOT_READ),
        "seconds_a_pair": round(median(seconds), 2),
    }


def shown(tables: Json) -> str:
    """Return the tables as text."""
    lines = []
    for name, by_tool in tables.items():
        lines += ["", name]
        head = f"  {'':18}{'accused':>9}{'of':>5}{'kin found':>11}{'denied':>8}{'of':>5}"
        lines.append(f"{head}{'abstained':>11}{'cannot read':>13}{'seconds':>9}")
        for tool, counts in by_tool.items():
            lines.append(
                f"  {tool:18}{counts['false_accusations']:>9}{counts['of_strangers_read']:>5}"
                f"{counts['kin_found']:>11}{counts['kin_denied']:>8}{counts['of_kin_read']:>5}"
                f"{counts['abstained']:>11}{counts['cannot_read']:>13}"
                f"{counts['seconds_a_pair']:>9}"
            )
    return "\n".join(lines)


def main() -> int:
    """Ask all tools about all pairs and write the result; return 0."""
    missing = [model.id for model in listed() if not is_there(model)]
    if missing:
        print(f"{len(missing)} models are not fetched: python -m benchmarks.corpus.fetch --all")
        return 1
    program = modeldna_program()
    result: Json = {"modeldna": MODELDNA, "load": load(), "as published": [], "converted": []}
    wanted = list(scored_pairs())
    for place, (first, second, known) in enumerate(wanted, 1):
        say(f"[{place}/{len(wanted)}] {first.id} – {second.id}")
        for name, ask in (("as published", as_published), ("converted", converted)):
            with tempfile.TemporaryDirectory(prefix="lineage-peers-") as folder:
                try:
                    found = ask(first, second, Path(folder), program)
                except ModelLineageError as error:
                    say(f"  {name}: {error}")
                    continue
                result[name].append(row_of(first, second, known, found))
    tables = {name: table(result[name]) for name in ("as published", "converted")}
    print(shown(tables))
    print(f"written to {write_result('peers', {'tables': tables, **result})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
