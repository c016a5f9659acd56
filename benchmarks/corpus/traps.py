"""The ten traps that the corpus is known to hold, each as checks of answers.

The numbers are those of the corpus's own description: a tool that trusts file names, versions or
one global cosine falls into several of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.corpus.asking import Answer
from benchmarks.corpus.listed import Listed, pairs
from lineage.verdict import Relation

Check = Callable[[Answer], bool]

_SAME = (Relation.IDENTICAL_FILE, Relation.SAME_TENSORS, Relation.SAME_WEIGHTS)


def _no_kin(answer: Answer) -> bool:
    return answer.relation.related is not True


def _same(answer: Answer) -> bool:
    return answer.relation in _SAME


def _not_same(answer: Answer) -> bool:
    return answer.relation not in _SAME


def _identical(answer: Answer) -> bool:
    return answer.relation is Relation.IDENTICAL_FILE


def _part(answer: Answer) -> bool:
    return answer.relation is Relation.PART_OF and "cast" not in answer.operations


def _third_of_it(answer: Answer) -> bool:
    return answer.shares[0] > 0.99 and answer.shares[1] < 0.9


def _kin(answer: Answer) -> bool:
    return answer.relation.related is True


@dataclass(frozen=True, slots=True)
class Trap:
    """One trap.

    Args:
        number: Its number in the corpus's description.
        words: What it is.
        checks: Two ids each, and what the answer to them must be.
    """

    number: int
    words: str
    checks: tuple[tuple[str, str, Check], ...]


_SILERO = ("silero/5.1.2/jit", "silero/6.0.0/jit", "silero/6.2.3/jit")
_LPIPS = ("alex", "vgg", "squeeze")

TRAPS = (
    Trap(
        1,
        "a file named half in 6.2.3 is a part of 5.1.2, and no half precision",
        (
            ("silero/6.2.3/half", "silero/5.1.2/jit", _part),
            ("silero/6.2.3/half", "silero/6.2.3/jit", _no_kin),
        ),
    ),
    Trap(
        2,
        "a safetensors file is no conversion of the TorchScript file beside it",
        (("silero/6.2.3/safetensors", "silero/6.2.3/jit", _not_same),),
    ),
    Trap(
        3,
        "three trainings share an STFT basis bit by bit",
        tuple(
            (first, second, _no_kin)
            for place, first in enumerate(_SILERO)
            for second in _SILERO[place + 1 :]
        ),
    ),
    Trap(
        4,
        "a net named sparse is no pruned copy",
        (("mpjs/face_full_range_sparse", "mpjs/face_full_range", _no_kin),),
    ),
    Trap(
        5,
        "one of the wake words in two formats is two networks, the others are one each",
        (
            ("oww/hey_rhasspy_v0.1.tflite", "oww/hey_rhasspy_v0.1.onnx", _no_kin),
            ("oww/alexa_v0.1.tflite", "oww/alexa_v0.1.onnx", _same),
            ("oww/hey_jarvis_v0.1.tflite", "oww/hey_jarvis_v0.1.onnx", _same),
            ("oww/timer_v0.1.tflite", "oww/timer_v0.1.onnx", _same),
        ),
    ),
    Trap(
        6,
        "one name in two versions is two trainings, another name is the same one",
        (
            ("ddddocr/1.0.6/common", "ddddocr/1.6.1/common_old", _same),
            ("ddddocr/1.0.6/common", "ddddocr/1.6.1/common", _no_kin),
            ("ddddocr/1.6.1/common_old", "ddddocr/1.6.1/common", _no_kin),
        ),
    ),
    Trap(7, "packages ship other projects' files", ()),  # all identical files of the list
    Trap(
        8,
        "optimiser state is no weight",
        (("basicpitch/onnx", "basicpitch/savedmodel", _kin),),
    ),
    Trap(
        9,
        "heads refitted on one frozen net agree without descent",
        tuple((f"lpips/v0.0/{net}", f"lpips/v0.1/{net}", _no_kin) for net in _LPIPS),
    ),
    Trap(
        10,
        "the share of A found in B is not the share of B found in A",
        tuple((f"mtcnn/facenet/{net}", "mtcnn/npy", _third_of_it) for net in ("pnet", "rnet")),
    ),
)


@dataclass(frozen=True, slots=True)
class Sprung:
    """What became of a trap.

    Args:
        trap: The trap.
        asked: How many of its pairs are among the models.
        fallen: The pairs whose answer was not as it must be.
    """

    trap: Trap
    asked: int
    fallen: tuple[tuple[str, str, str], ...]


def spring(models: Sequence[Listed], compare: Callable[[str, str], Answer]) -> list[Sprung]:
    """Ask about the pairs of every trap; return what became of each."""
    ids = {model.id for model in models}
    found = []
    for trap in TRAPS:
        checks = trap.checks or tuple(
            (first.id, second.id, _identical)
            for first, second, known in pairs(models)
            if known.kind == "identical_file"
        )
        asked = [check for check in checks if {check[0], check[1]} <= ids]
        answers = [(first, second, compare(first, second), must) for first, second, must in asked]
        fallen = tuple(
            (first, second, str(answer.relation))
            for first, second, answer, must in answers
            if not must(answer)
        )
        found.append(Sprung(trap, len(asked), fallen))
    return found
