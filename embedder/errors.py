"""Everything that we raise on purpose, lowest layer first.

    ModelLineageError
    ├── CheckpointError               something is wrong with a model's files
    │   ├── NotFoundError             the path does not exist
    │   ├── UnknownFormatError        no reader recognises the content
    │   ├── MalformedError            the file breaks the rules of its format
    │   │   └── TruncatedError        the file ends before its content does
    │   ├── MissingPartError          a shard or data file is not there
    │   ├── RefusedError              reading on would be unsafe; nothing was run
    │   ├── UnsupportedError          a storage type that we cannot turn into numbers
    │   └── EmptyModelError           there is no weight in it
    └── MissingExtraError             an optional package is not installed

Each message says what is wrong, where, and what to do next. Where a builtin fits, it is a second
base, so that callers may catch what they would expect.
"""


class ModelLineageError(Exception):
    """Root of all errors that this project raises on purpose."""


class CheckpointError(ModelLineageError):
    """Something is wrong with a model's files."""

    def __init__(self, location: object, problem: str, cure: str = "") -> None:
        message = f"{location}: {problem}"
        super().__init__(f"{message}; {cure}" if cure else message)
        self.location = str(location)
        self.problem = problem
        self.cure = cure

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # The default would call the class with the joined message when a worker process
        # sends the error home.
        return type(self), (self.location, self.problem, self.cure)


class NotFoundError(CheckpointError, FileNotFoundError):
    """The path does not exist, or holds no model."""

    def __str__(self) -> str:
        # OSError's own __str__ would look for errno and strerror.
        return str(self.args[0])


class UnknownFormatError(CheckpointError, ValueError):
    """No reader recognises the content."""


class MalformedError(CheckpointError, ValueError):
    """The file breaks the rules of its format."""


class TruncatedError(MalformedError):
    """The file ends before its content does."""


class MissingPartError(CheckpointError, FileNotFoundError):
    """A shard or data file that the model needs is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class RefusedError(CheckpointError, PermissionError):
    """Reading on would be unsafe. Nothing from the file was executed."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedError(CheckpointError, NotImplementedError):
    """A storage type that we cannot turn into numbers."""


class EmptyModelError(CheckpointError, ValueError):
    """There is no weight in it."""


class ArchitectureError(ModelLineageError, ValueError):
    """A model does not have the tensors that an architecture describes, or none describes it."""


class MissingExtraError(ModelLineageError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}; install it with: "
            f'pip install "model-lineage[{extra}]"'
        )
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)
