"""What runs in a process of its own: libhdf5 on a file that nobody vouches for.

libhdf5 crashes and hangs on damaged files, so `embedder.readers.hdf5` starts this module by its
path, with limits on time, memory and output, and takes nothing that it says on trust. It imports
only h5py and numpy, reads the file through a descriptor that it inherits, and cannot open another
one, so that no link and no external storage leads out of the file.

    python -P hdf5_child.py directory|values IN BASE SIZE OUT MEMORY OUTPUT SECONDS

`directory` writes one JSON object: root attributes, data sets, what was left out, and which order
the layers have. `values`
writes the contents of the data sets that the parent cannot read by itself, one after the other.
"""

import io
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

MOST_OBJECTS = 200_000
MOST_DEPTH = 100
LARGEST_TEXT = 32 << 20
PIECE_BYTES = 16 << 20
CACHE_BYTES = 64 << 20  # of decoded chunks: a chunk that spans many rows is decoded once

ATTRIBUTES = ("keras_version", "backend", "model_config")
"""Root attributes that are reported, if they are texts."""

PLAIN_KINDS = frozenset("fiubc")


class Window(io.RawIOBase):
    """A part of an open file as a file of its own: HDF5 inside a zip archive, unpacked or not."""

    def __init__(self, descriptor: int, base: int, size: int) -> None:
        self._descriptor, self._base, self._size, self._place = descriptor, base, size, 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, and return the new place."""
        self._place = offset + {0: 0, 1: self._place, 2: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def readinto(self, target: Any) -> int:
        """Fill a buffer, as far as the part goes."""
        view = memoryview(target)
        want = max(0, min(len(view), self._size - self._place))
        part = os.pread(self._descriptor, want, self._base + self._place)
        view[: len(part)] = part
        self._place += len(part)
        return len(part)


def set_limits(memory_bytes: int, output_bytes: int, seconds: int) -> None:
    """Bound what this process may use: memory, size of a written file, processor time."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def walk(file: Any, left_out: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield path, data set and the `name` of its group for all that hard links lead to.

    Links that are not followed are added to `left_out`.
    """
    import h5py

    seen = {h5py.h5o.get_info(file.id).addr}
    waiting = [("", file)]
    objects = 0
    while waiting:
        path, group = waiting.pop()
        label = text_of(group, "name")
        below: list[tuple[str, Any]] = []
        for name in group:
            objects += 1
            full = f"{path}/{name}" if path else name
            if objects > MOST_OBJECTS or full.count("/") > MOST_DEPTH:
                raise ValueError(f"more than {MOST_OBJECTS:,} objects, or nested too deep")
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                left_out.append(f"{full!r} is {describe(link)}, which was not followed")
                continue
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:  # a second name, or a loop
                continue
            seen.add(address)
            if isinstance(item, h5py.Group):
                below.append((full, item))
            elif isinstance(item, h5py.Dataset):
                yield full, item, label
        waiting.extend(reversed(below))


def describe(link: Any) -> str:
    """Return what a link is, in words."""
    kind = type(link).__name__
    target = getattr(link, "path", "?")
    if kind == "ExternalLink":
        return f"a link to {target!r} in the file {link.filename!r}"
    return f"a soft link to {target!r}"


def problem_of(item: Any) -> str:
    """Return why the values of a data set are not read; empty if they are."""
    if item.is_virtual:
        return "is a virtual data set, whose sources were not followed"
    if item.external:
        return "is stored in other files, which were not opened"
    if item.shape is None:
        return "is empty"
    if type_of(item) is None:
        return "does not hold numbers"
    return ""


def type_of(item: Any) -> str | None:
    """Return the type of the numbers as numpy writes it, or None if they are none."""
    try:
        dtype = item.dtype
    except TypeError:  # numpy has no such type
        return None
    # Keras stores bfloat16 as opaque pairs of bytes, and says so beside them.
    if text_of(item, "dtype") == "bfloat16" and dtype.itemsize == 2:
        return "bfloat16"
    if dtype.kind in PLAIN_KINDS and dtype.names is None and not dtype.subdtype:
        return str(dtype.newbyteorder("<").str)
    return None


def place_of(item: Any) -> int | None:
    """Return where the bytes of a data set lie if they lie there as they are read."""
    as_read = item.dtype.kind == "V" or item.dtype == item.dtype.newbyteorder("<")
    if item.chunks is not None or not as_read:
        return None
    offset = item.id.get_offset()
    return None if offset is None else int(offset)


def text_of(item: Any, name: str) -> str:
    """Return an attribute if it is a text, else nothing."""
    try:
        found = item.attrs.get(name)
    except (OSError, TypeError, ValueError, RuntimeError, KeyError):
        return ""  # of a type that h5py does not know; it is not needed
    if isinstance(found, bytes):
        found = found.decode("utf-8", "replace")
    return found if isinstance(found, str) and len(found) <= LARGEST_TEXT else ""


def texts_of(item: Any, name: str) -> list[str]:
    """Return an attribute if it is a list of short texts, else nothing."""
    try:
        found = item.attrs.get(name)
        if found is None or not 0 < found.size <= MOST_OBJECTS or found.dtype.itemsize > 1 << 12:
            return []
        texts = found.ravel().tolist()
        return [t if isinstance(t, str) else t.decode("utf-8", "replace") for t in texts]
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return []  # of a type that h5py does not know; it is not needed


def order_of(places: Mapping[str, Any]) -> list[str]:
    """Return the paths of the weights in the order of their layers, as Keras 2 notes it."""
    import h5py

    found: list[str] = []
    for prefix, place in places.items():
        for layer in texts_of(place, "layer_names"):
            if layer and isinstance(place.get(layer, getlink=True), h5py.HardLink):
                weights = texts_of(place[layer], "weight_names")
                found += [f"{prefix}{layer}/{weight}" for weight in weights]
    return found[:MOST_OBJECTS]


def directory(file: Any) -> dict[str, Any]:
    """Return what is in a file: attributes, data sets, and what was left out."""
    left_out: list[str] = []
    sets = []
    for path, item, label in walk(file, left_out):
        problem = problem_of(item)
        if problem:
            left_out.append(f"{path!r} {problem}")
            continue
        sets.append(
            {
                "name": path,
                "group": label,
                "shape": [int(length) for length in item.shape],
                "type": type_of(item),
                "offset": place_of(item),
                "stored_bytes": int(item.id.get_storage_size()),
            }
        )
    import h5py

    places = {"": file}
    if isinstance(file.get("model_weights", getlink=True), h5py.HardLink):
        places["model_weights/"] = file["model_weights"]  # whole models have versions there too
    texts = {
        name: next(filter(None, (text_of(place, name) for place in places.values())), "")
        for name in ATTRIBUTES
    }
    return {"attributes": texts, "sets": sets, "left_out": left_out, "order": order_of(places)}


def pieces(item: Any) -> Iterator[Any]:
    """Yield the values of a data set in order, about 16 MiB at a time."""
    import numpy as np

    shape, width = item.shape, item.dtype.itemsize
    whole = int(np.prod(shape, dtype=object)) * width
    if not shape or whole <= PIECE_BYTES:
        yield item[()]
        return
    axis = 0
    while axis < len(shape) - 1 and whole // shape[axis] > PIECE_BYTES:
        whole //= shape[axis]
        axis += 1
    rows = max(1, PIECE_BYTES // (whole // shape[axis]))
    chunk = item.chunks[axis] if item.chunks else 1
    step = max(rows // chunk, 1) * chunk
    for prefix in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            yield item[(*prefix, slice(start, start + step))]


def write_values(file: Any, output: BinaryIO) -> None:
    """Write the contents of all data sets that have no place of their own in the file."""
    import numpy as np

    for _, item, _ in walk(file, []):
        if problem_of(item) or place_of(item) is not None:
            continue
        for values in pieces(item):
            little = np.asarray(values).astype(item.dtype.newbyteorder("<"), copy=False)
            output.write(little.tobytes())


def main(arguments: list[str]) -> int:
    """Do what the command line says and return the exit status: 0, or 3 for a bad file."""
    mode = arguments[0]
    source, base, size, target, memory, most_output, seconds = map(int, arguments[1:])
    set_limits(memory, most_output, seconds)
    import encodings.ascii
    import encodings.latin_1  # noqa: F401  codecs of attributes: later no file can be opened

    import h5py

    with open(target, "wb", closefd=False) as output:
        try:
            with h5py.File(Window(source, base, size), "r", rdcc_nbytes=CACHE_BYTES) as file:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # open files stay open
                if mode == "values":
                    write_values(file, output)
                else:
                    output.write(json.dumps(directory(file)).encode())
        # On a damaged file h5py raises nearly every exception that there is.
        except Exception as error:
            output.seek(0)
            output.truncate()
            output.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode())
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
