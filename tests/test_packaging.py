"""What the wheel ships, and what no file may say."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("embedder", "index", "lineage")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel."""
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_ships_only_our_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cli.py", *SHIPPED}
    assert len(top) == 5


def test_the_wheel_has_every_source_and_data_file(wheel: zipfile.ZipFile) -> None:
    files = [
        str(file.relative_to(ROOT))
        for package in SHIPPED
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    assert {"index/schema/001.sql", "lineage/controls.json"} <= set(files)
    assert set(files) <= set(wheel.namelist())


def test_the_wheel_has_no_tests_caches_or_leftovers(wheel: zipfile.ZipFile) -> None:
    kinds = {Path(name).suffix for name in wheel.namelist() if ".dist-info/" not in name}
    assert kinds <= {".py", ".sql", ".json", ".safetensors", ".html", ".css", ".js"}


def test_the_wheel_makes_the_command_and_names_its_extras(wheel: zipfile.ZipFile) -> None:
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "lineage = cli:main" in wheel.read(entries).decode()
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    facts = Parser().parsestr(wheel.read(metadata).decode())
    assert facts["Name"] == "model-lineage"
    assert {"cpu", "formats"} <= set(facts.get_all("Provides-Extra", []))
    needed = facts.get_all("Requires-Dist", [])
    assert not [line for line in needed if "@" in line], "a dependency with an address of its own"


def kept_files() -> list[Path]:
    """Return the files that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and file != Path(__file__)]


MACHINE = re.compile(r"(?<![\w.~}*/-])/(?:work|root|home|Users|mnt|opt|srv)/\w")
REGISTRY = re.compile(r"index-url|find-links|trusted-host|https?://[^\s)\"']*/simple\b")


def test_no_file_names_a_package_registry_or_a_place_on_some_machine() -> None:
    found = []
    for file in kept_files():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            # A test that looks for such places has to name them.
            if "re.compile" not in line and (MACHINE.search(line) or REGISTRY.search(line)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_no_file_of_the_tests_is_larger_than_100_kilobytes() -> None:
    files = [file for file in kept_files() if ROOT / "tests" in file.parents]
    assert [file.name for file in files if file.stat().st_size > 100_000] == []
