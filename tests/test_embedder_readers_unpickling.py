"""The pickle machine: what it builds, what it refuses, and what a hostile pickle cannot do."""

import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedder.errors import CheckpointError, MalformedError, RefusedError, TruncatedError
from embedder.readers.allowed import allowed
from embedder.readers.unpickling import Bag, Table, Unpickler
from embedder.readers.views import Part
from embedder.storage import MemoryStorage

HERE = Path("x.pkl")

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=20,
)


def load(program: bytes) -> object:
    return Unpickler(MemoryStorage(program), HERE, allowed=allowed).load()


def as_python(value: object) -> object:
    """Return records as the Python values that they stand for."""
    if isinstance(value, Table):
        return {as_python(key): as_python(child) for key, child in value.pairs}
    if isinstance(value, list):
        return [as_python(child) for child in value]
    if isinstance(value, tuple):
        return tuple(as_python(child) for child in value)
    return bytes(value.read(0, value.size_bytes)) if isinstance(value, Part) else value


def op_import(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


@given(value=plain_values, protocol=st.sampled_from([3, 4, 5]))
def test_plain_values_come_back_as_pickle_gives_them(value: object, protocol: int) -> None:
    assert as_python(load(pickle.dumps(value, protocol))) == value


@given(program=st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error_of_ours(program: bytes) -> None:
    try:
        load(b"\x80\x04" + program)
    except CheckpointError as error:
        assert str(error).startswith("x.pkl: ")  # noqa: PT017  either outcome is right


@given(cut=st.integers(0, 200))
def test_a_pickle_cut_anywhere_is_named_truncated(cut: int) -> None:
    program = pickle.dumps({"a": [1, 2.0, "three"], "b": (None, True, b"raw" * 20)}, 4)
    with pytest.raises(TruncatedError, match="TRUNCATED: the pickle wants byte"):
        load(program[: min(cut, len(program) - 1)])


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "os.system",
        "nt.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "builtins.__import__",
        "__builtin__.apply",
        "importlib.import_module",
        "runpy.run_path",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.serialization.load",
        "numpy.load",
        "numpy.testing._private.utils.runstring",
        "operator.attrgetter",
        "__main__.Model",
        "pickle.loads",
        "transformers.pipelines.pipeline",
        "collections.OrderedDict.__init__",
    ],
)
def test_an_import_outside_the_list_is_refused_by_name(name: str) -> None:
    module, _, last = name.rpartition(".")
    with pytest.raises(
        RefusedError, match=rf"imports {name.replace('__builtin__', '.*')}.*nothing"
    ):
        load(pickle.PROTO + b"\4" + op_import(module, last) + b"(tR.")


def test_every_way_to_import_is_refused() -> None:
    stack = pickle.BINUNICODE + struct.pack("<I", 5) + b"posix"
    stack += pickle.BINUNICODE + struct.pack("<I", 6) + b"system" + pickle.STACK_GLOBAL
    for program in (stack, b"(S'true'\niposix\nsystem\n", b"cposix\nsystem\n(S'true'\no"):
        with pytest.raises(RefusedError, match=r"imports posix\.system"):
            load(program + b".")
    with pytest.raises(RefusedError, match="entry 7 of copyreg's extension registry"):
        load(pickle.EXT1 + b"\7.")


def test_a_name_with_control_characters_is_shown_escaped() -> None:
    with pytest.raises(RefusedError, match=r"imports 'evil\\x1b\[2J\.run'"):
        load(op_import("evil\x1b[2J", "run") + b".")


def test_a_class_of_a_training_framework_becomes_a_bag() -> None:
    name = op_import("pytorch_lightning.utilities.parsing", "AttributeDict")
    found = load(name + b")\x81}(X\1\0\0\0aK\1ub.")
    assert isinstance(found, Bag)
    assert found.path == "pytorch_lightning.utilities.parsing.AttributeDict"
    assert [as_python(state) for state in found.states] == [{"a": 1}]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (b"K\1)R.", "calls a int"),
        (b"ccollections\nOrderedDict\nK\1R.", "passes a int as arguments"),
        (b"ccollections\nOrderedDict\n(" + b"N" * 40 + b"tR.", "passes 40 arguments"),
        (b"K\1}b.", "gives a state to a int"),
        (b"K\1K\2s.", "IndexError"),
        (b"]K\1K\2s.", "sets items of a list"),
        (b"}K\1a.", "appends to a Table"),
        (b"h\5.", "KeyError"),
        (b"t.", "pop from empty list"),
        (b"Q.", "pop from empty list"),
        (b"NQ.", "refers to an object outside the pickle"),
        (b"\x80\x09.", "pickle protocol 9"),
        (b"\xff.", "operation 0xff is not supported"),
        (b"p-1\n.", "memo number -1"),
        (b"p" + b"9" * 5000 + b"\n.", "ValueError"),
        (b"\x8b\xff\xff\0\0" + bytes(70000), "an integer of 65,535 bytes"),
    ],
)
def test_nonsense_is_malformed_and_says_why(program: bytes, problem: str) -> None:
    if program[:1] == b"p":
        program = b"N" + program
    with pytest.raises(MalformedError, match=problem):
        load(program)


@pytest.mark.parametrize(
    "program",
    [
        pickle.BINBYTES8 + struct.pack("<Q", 1 << 62),
        pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 40),
        pickle.BINUNICODE8 + struct.pack("<Q", 1 << 62),
        pickle.BINBYTES + struct.pack("<I", 0xFFFFFFFF),
        pickle.FRAME + struct.pack("<Q", 1 << 62),
    ],
)
def test_a_length_beyond_the_file_is_truncated_not_allocated(program: bytes) -> None:
    with pytest.raises(TruncatedError):
        load(program + b".")


def test_a_memo_index_of_four_bytes_costs_no_memory() -> None:
    # pickle.Unpickler of Python 3.11 would clear 34 GB for it.
    tracemalloc.start()
    try:
        assert load(b"Nr\xff\xff\xff\xff.") is None
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_nesting_of_any_depth_is_no_recursion() -> None:
    depth = 200_000
    found = load(b"]" * depth + b"a" * (depth - 1) + b".")
    levels = 0
    while isinstance(found, list) and found:
        found, levels = found[0], levels + 1
    assert levels == depth - 1


def test_a_deep_tuple_may_be_a_key_for_it_is_not_hashed() -> None:
    found = load(b"})" + b"\x85" * 200_000 + b"Ns.")
    assert isinstance(found, Table)
    assert len(found.pairs) == 1


def test_too_many_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.readers.unpickling.MOST_OPERATIONS", 1000)
    with pytest.raises(RefusedError, match="takes more than 1,000 operations"):
        load(b"N0" * 2000 + b"N.")


def test_long_bytes_are_left_in_the_file() -> None:
    program = pickle.dumps(b"x" * 100_000, 4)
    found = load(program)
    assert isinstance(found, Part)
    assert bytes(found.read(0, 3)) == b"xxx"
    assert found.size_bytes == 100_000
