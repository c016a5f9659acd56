"""A pickle machine that builds plain records and runs nothing.

A pickle is a program for a stack machine, and Python's own machine calls whatever the program
names. `pickle.Unpickler` can be told what may be imported, but it still allocates what a header
promises (a memo index of four bytes makes it clear 34 GB), hashes keys that the file chose (deep
tuples overflow the C stack), and lets BUILD write to any object. So this is a machine of our own:

- a name that is not on the caller's list ends the reading, and the error names it;
- a name that is on the list becomes a `Global`, whose `make` is one of our functions;
- mappings become a `Table` of pairs, so nothing from the file is hashed;
- long runs of bytes are not read: they become a `Part` of the file;
- operations are counted, so the memory that a small file can ask for is bounded.
"""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

from embedder.errors import CheckpointError, MalformedError, RefusedError, TruncatedError
from embedder.readers.views import Part
from embedder.storage import Storage

MOST_OPERATIONS = 10_000_000
"""A checkpoint of 28,000 pickled Python objects takes 1.6 million."""

_WINDOW_BYTES = 1 << 20
_LARGEST_INLINE_BYTES = 4096
_LONGEST_LINE_BYTES = 1 << 16
_LONGEST_INTEGER_BYTES = 256
_MOST_ARGUMENTS = 32

Make = Callable[..., object]
Allowed = Callable[[str], Make | None]
"""`module.name` → what to build in its place, or None to refuse."""


class Record:
    """Something that a pickle builds. State that it is given is dropped."""

    __slots__ = ()

    def build(self, state: object) -> None:
        """Take the state that the pickle gives to this object."""


class Global(Record):
    """A name that the pickle imports, and our function that stands in for it."""

    __slots__ = ("make", "path")

    def __init__(self, path: str, make: Make) -> None:
        self.path, self.make = path, make


class Table(Record):
    """A mapping, as the pairs that the pickle sets, in order; a later pair replaces an earlier.

    Nothing is copied when records are made from one another: a short program could otherwise ask
    for the same million entries a million times.
    """

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[object, object]] = []

    def get(self, name: str) -> object:
        """Return the value of a key that is text, or None."""
        return next((value for key, value in reversed(self.pairs) if key == name), None)


class Bag(Table):
    """Stands in for an object whose class is not imported: its arguments, state and entries."""

    __slots__ = ("args", "path", "states")

    def __init__(self, path: str, args: tuple[object, ...] = ()) -> None:
        super().__init__()
        self.path, self.args = path, args
        self.states: list[object] = []

    def build(self, state: object) -> None:
        """Keep the state."""
        self.states.append(state)


class Unpickler:
    """Reads one pickle from a storage.

    Args:
        source: Where the pickle lies.
        path: The file, for messages.
        allowed: What may be imported, and what stands in for it.
        start: Place of the pickle's first byte.
        persistent: Turns a persistent id into an object.
    """

    def __init__(
        self,
        source: Storage,
        path: Path,
        *,
        allowed: Allowed,
        start: int = 0,
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        self._source, self._path = source, path
        self._allowed, self._persistent = allowed, persistent
        self._window, self._base, self._at = b"", start, 0
        self._stack: list[object] = []
        self._outer: list[list[object]] = []  # the stacks below each mark
        self._memo: dict[int, object] = {}
        self._globals: dict[str, Global] = {}

    @property
    def place(self) -> int:
        """The next byte that will be read: after `load`, the byte after the pickle."""
        return self._base + self._at

    def load(self) -> object:
        """Return what the pickle describes, as records.

        Raises:
            RefusedError: It imports a name that is not allowed, or asks for too much memory.
            TruncatedError: The file ends inside it.
            MalformedError: It breaks the rules of the format.
        """
        operations, next_code = _OPERATIONS, self._byte
        try:
            for _ in range(MOST_OPERATIONS):
                code = next_code()
                if code == _STOP:
                    return self._stack.pop()
                operations[code](self)
        except CheckpointError:
            raise
        except (
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            ArithmeticError,
            struct.error,
            MemoryError,
            RecursionError,
        ) as error:
            raise MalformedError(
                self._path,
                f"the pickle is damaged before byte {self.place:,} "
                f"({type(error).__name__}: {str(error)[:200]})",
                "get the file again",
            ) from error
        raise RefusedError(
            self._path,
            f"the pickle takes more than {MOST_OPERATIONS:,} operations, which could fill the "
            "memory; nothing was executed",
            "save the weights as safetensors",
        )

    # Reading bytes.

    def _fill(self, wanted: int) -> None:
        """Move the window to the next byte; it holds at least `wanted`."""
        place = self.place
        self._check(wanted)
        stop = min(place + max(wanted, _WINDOW_BYTES), self._source.size_bytes)
        self._window, self._base, self._at = bytes(self._source.read(place, stop)), place, 0

    def _check(self, wanted: int) -> None:
        if self.place + wanted > self._source.size_bytes:
            raise TruncatedError(
                self._path,
                f"TRUNCATED: the pickle wants byte {self.place + wanted:,} and "
                f"{self._source.size_bytes:,} are there",
                "get the file again, then run the same command",
            )

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._window):
            self._fill(size)
        start = self._at
        self._at = start + size
        return self._window[start : self._at]

    def _byte(self) -> int:
        at = self._at
        if at >= len(self._window):
            self._fill(1)
            at = 0
        self._at = at + 1
        return self._window[at]

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> bytes:
        """Return the text up to the next line end."""
        end = self._window.find(b"\n", self._at)
        if end < 0:
            rest = self._source.size_bytes - self.place
            self._fill(min(rest, _LONGEST_LINE_BYTES))
            end = self._window.find(b"\n", self._at)
        if end < 0 or end - self._at > _LONGEST_LINE_BYTES:
            raise ValueError("a line without an end")
        return self._take(end + 1 - self._at)[:-1]

    def _bytes(self, size: int) -> bytes | Part:
        """Return a run of bytes, or where it lies if it is long."""
        if size <= _LARGEST_INLINE_BYTES:
            return self._take(size)
        self._check(size)
        start = self.place
        self._window, self._base, self._at = b"", start + size, 0
        return Part(self._source, start, size)

    def _text(self, size: int) -> str:
        return self._take(size).decode("utf-8", "surrogatepass")

    def _long(self, size: int) -> int:
        if size > _LONGEST_INTEGER_BYTES:
            raise ValueError(f"an integer of {size:,} bytes")
        return int.from_bytes(self._take(size), "little", signed=True)

    # The stack.

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[object]:
        """Return what lies above the last mark, and take it off."""
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._outer.pop()

    def _tuple(self, size: int) -> None:
        items = tuple(self._stack[-size:])
        if len(items) < size:
            raise IndexError("the stack is too short")
        self._stack[-size:] = [items]

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Bag):
            target.pairs.extend(enumerate(items, len(target.pairs)))
        else:
            raise TypeError(f"appends to a {type(target).__name__}")

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Table):
            raise TypeError(f"sets items of a {type(target).__name__}")
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _dict(self) -> None:
        items = self._to_mark()
        self._push(Table())
        self._set_items(items)

    # The memo.

    def _put(self, number: int) -> None:
        if not 0 <= number < 1 << 32:  # also keeps a file from choosing numbers that collide
            raise ValueError(f"memo number {number}")
        self._memo[number] = self._stack[-1]

    # Objects.

    def _find(self, module: str, name: str) -> Global:
        path = f"{module}.{name}"
        found = self._globals.get(path)
        if found is None:
            make = self._allowed(path)
            if make is None:
                # A name with control characters must not reach a terminal as it is.
                shown = path[:200] if path.isprintable() else ascii(path[:200])
                raise RefusedError(
                    self._path,
                    f"the pickle imports {shown}, which is not on the list of names that "
                    "cannot run code; nothing was executed",
                    "if you trust the file, save its state dict as safetensors in an "
                    "environment of its own",
                )
            found = self._globals[path] = Global(path, make)
        return found

    def _global(self) -> None:
        module, name = self._line().decode(), self._line().decode()
        self._push(self._find(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("the name of an import is not text")
        self._push(self._find(module, name))

    def _call(self, function: object, args: object) -> None:
        if not isinstance(function, Global):
            raise TypeError(f"calls a {type(function).__name__}")
        if not isinstance(args, tuple):
            raise TypeError(f"passes a {type(args).__name__} as arguments")
        if len(args) > _MOST_ARGUMENTS:  # they are copied, and the file may pass them again
            raise ValueError(f"passes {len(args):,} arguments")
        self._push(function.make(*args))

    def _reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._call(function, args)

    def _new_with_keywords(self) -> None:
        keywords, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._call(function, args)
        made = self._stack[-1]
        if isinstance(made, Record):
            made.build(keywords)

    def _instance(self) -> None:
        module, name = self._line().decode(), self._line().decode()
        args = tuple(self._to_mark())
        self._call(self._find(module, name), args)

    def _object(self) -> None:
        function, *args = self._to_mark()
        self._call(function, tuple(args))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Record):
            raise TypeError(f"gives a state to a {type(target).__name__}")
        target.build(state)

    def _persist(self, identity: object) -> None:
        if self._persistent is None:
            raise ValueError("refers to an object outside the pickle")
        self._push(self._persistent(identity))

    def _extension(self, number: int) -> None:
        raise RefusedError(
            self._path,
            f"the pickle imports entry {number} of copyreg's extension registry; nothing was "
            "executed",
            "save the weights as safetensors",
        )

    def _protocol(self, number: int) -> None:
        if number > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"pickle protocol {number}")

    def _number(self, line: bytes) -> int | bool:
        return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)

    def _unknown(self) -> None:
        raise ValueError(f"operation {self._window[self._at - 1]:#04x} is not supported")


_STOP = pickle.STOP[0]
_FLOAT = struct.Struct(">d")
_INT = struct.Struct("<i")

_BY_CODE: dict[bytes, Callable[[Unpickler], object]] = {
    pickle.PROTO: lambda m: m._protocol(m._byte()),
    # A frame only says that its content can be read at once, which changes nothing here.
    pickle.FRAME: lambda m: m._check(m._unsigned(8)),
    # Values.
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.BININT: lambda m: m._push(_INT.unpack(m._take(4))[0]),
    pickle.BININT1: lambda m: m._push(m._byte()),
    pickle.BININT2: lambda m: m._push(m._unsigned(2)),
    pickle.LONG1: lambda m: m._push(m._long(m._byte())),
    pickle.LONG4: lambda m: m._push(m._long(m._unsigned(4))),
    pickle.INT: lambda m: m._push(m._number(m._line())),
    pickle.LONG: lambda m: m._push(int(m._line().rstrip(b"L"))),
    pickle.BINFLOAT: lambda m: m._push(_FLOAT.unpack(m._take(8))[0]),
    pickle.FLOAT: lambda m: m._push(float(m._line())),
    pickle.SHORT_BINUNICODE: lambda m: m._push(m._text(m._byte())),
    pickle.BINUNICODE: lambda m: m._push(m._text(m._unsigned(4))),
    pickle.BINUNICODE8: lambda m: m._push(m._text(m._unsigned(8))),
    pickle.UNICODE: lambda m: m._push(m._line().decode("raw-unicode-escape")),
    pickle.STRING: lambda m: m._push(m._line().strip(b"'\"")),
    pickle.SHORT_BINSTRING: lambda m: m._push(m._bytes(m._byte())),
    pickle.BINSTRING: lambda m: m._push(m._bytes(m._unsigned(4))),
    pickle.SHORT_BINBYTES: lambda m: m._push(m._bytes(m._byte())),
    pickle.BINBYTES: lambda m: m._push(m._bytes(m._unsigned(4))),
    pickle.BINBYTES8: lambda m: m._push(m._bytes(m._unsigned(8))),
    pickle.BYTEARRAY8: lambda m: m._push(m._bytes(m._unsigned(8))),
    # Containers. A set is a list here: its members are never compared.
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.TUPLE: lambda m: m._push(tuple(m._to_mark())),
    pickle.EMPTY_LIST: lambda m: m._push([]),
    pickle.LIST: lambda m: m._push(m._to_mark()),
    pickle.EMPTY_SET: lambda m: m._push([]),
    pickle.FROZENSET: lambda m: m._push(m._to_mark()),
    pickle.APPEND: lambda m: m._append([m._stack.pop()]),
    pickle.APPENDS: lambda m: m._append(m._to_mark()),
    pickle.ADDITEMS: lambda m: m._append(m._to_mark()),
    pickle.EMPTY_DICT: lambda m: m._push(Table()),
    pickle.DICT: lambda m: m._dict(),
    pickle.SETITEM: lambda m: m._set_item(),
    pickle.SETITEMS: lambda m: m._set_items(m._to_mark()),
    # Stack and memo.
    pickle.MARK: lambda m: m._mark(),
    pickle.POP: lambda m: m._pop(),
    pickle.POP_MARK: lambda m: m._to_mark(),
    pickle.DUP: lambda m: m._push(m._stack[-1]),
    pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
    pickle.BINPUT: lambda m: m._put(m._byte()),
    pickle.LONG_BINPUT: lambda m: m._put(m._unsigned(4)),
    pickle.PUT: lambda m: m._put(int(m._line())),
    pickle.BINGET: lambda m: m._stack.append(m._memo[m._byte()]),
    pickle.LONG_BINGET: lambda m: m._stack.append(m._memo[m._unsigned(4)]),
    pickle.GET: lambda m: m._stack.append(m._memo[int(m._line())]),
    # Objects.
    pickle.GLOBAL: lambda m: m._global(),
    pickle.STACK_GLOBAL: lambda m: m._stack_global(),
    pickle.REDUCE: lambda m: m._reduce(),
    pickle.NEWOBJ: lambda m: m._reduce(),
    pickle.NEWOBJ_EX: lambda m: m._new_with_keywords(),
    pickle.INST: lambda m: m._instance(),
    pickle.OBJ: lambda m: m._object(),
    pickle.BUILD: lambda m: m._build(),
    pickle.BINPERSID: lambda m: m._persist(m._stack.pop()),
    pickle.PERSID: lambda m: m._persist(m._line()),
    pickle.EXT1: lambda m: m._extension(m._byte()),
    pickle.EXT2: lambda m: m._extension(m._unsigned(2)),
    pickle.EXT4: lambda m: m._extension(m._unsigned(4)),
}
_OPERATIONS: tuple[Callable[[Unpickler], object], ...] = tuple(
    _BY_CODE.get(bytes([code]), Unpickler._unknown) for code in range(256)
)
