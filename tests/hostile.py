"""Files that mean harm, for the tests of the readers."""

import os
import zipfile
from pathlib import Path


class Evil:
    """Pickles to a program that makes a file when it is run.

    Args:
        marker: The file.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def claim_to_unpack_to(path: Path, size_bytes: int) -> None:
    """Make the directory of an archive claim that its last member unpacks to so many bytes.

    Writing such a member honestly takes seconds, and a reader must stop at the claim.
    """
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    assert entry >= place
    content[entry + 24 : entry + 28] = size_bytes.to_bytes(4, "little")
    path.write_bytes(content)
