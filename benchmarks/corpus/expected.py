"""What the product should answer about the listed models: the list's words in the product's.

`docs` and CONTRACTS 3 say how the kinds of the list read. Three sorts of answers are kept apart:
*right*; *abstained* (`cannot-say`, which accuses nobody); and *wrong*, of which the worst is an
*accusation*: kinship said of models that have none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.corpus.listed import Known, Listed, pairs
from lineage.direction import BACKWARD, FORWARD, UNKNOWN
from lineage.verdict import Relation

_SAME = frozenset({Relation.SAME_TENSORS, Relation.SAME_WEIGHTS})
_RIGHT = {
    "identical_file": frozenset({Relation.IDENTICAL_FILE}),
    "identical_weights": _SAME,
    "same_weights_other_format": _SAME,
    "same_weights_reexport": _SAME,
    "same_weights_repackaged": _SAME,
    "layout_permuted": _SAME,
    "bn_folded": _SAME,
    "int8_quantised": frozenset({Relation.QUANTISED}),
    "subset_of": frozenset({Relation.PART_OF}),
    "input_widened": frozenset({Relation.EXTENDED}),
    "fine_tuned": frozenset({Relation.FINE_TUNE}),
    "partly_fine_tuned": frozenset({Relation.FINE_TUNE}),
    "siblings_common_parent": frozenset({Relation.SIBLING}),
    "same_initialisation": frozenset({Relation.SAME_START, Relation.CANNOT_SAY}),
}
"""Kind in the list → the relations that are right. Every `negative_…` is `unrelated`."""

UNSCORED = "ambiguous"

_DUPLICATES = frozenset({"identical_file", "identical_weights"})

CHILD_OF = {
    ("nagl/0.1.0-rc.2", "nagl/0.1.0-rc.1"),
    ("nagl/1.0.0", "nagl/0.1.0-rc.3"),
    ("minilm/int8", "minilm/gt"),
    ("basicpitch/onnx", "basicpitch/savedmodel"),
}
"""(child, parent) of the listed pairs whose direction is known."""

HOLDS_MORE = 0.005
"""Share of parameters from which one of two files holds more than the other. Files of one model
differ by up to .0005 through constants; the pooler that one rendering of MiniLM lacks is .0065."""

HOLDS_ANOTHER = 0.02
"""Share from which that is another net, and not constants beside the weights (.0113 at most)."""


@dataclass(frozen=True, slots=True)
class Count:
    """A number of parameters that differs from the list's, and why ours is the right one."""

    parameters: int
    reason: str


_WHISPER = "1,089 biases are stored as int32 with a scale; the list counts floats and int8 alone"
_INFINITE = "a constant of −∞ (one value) is left out of the list's number"

COUNTS = {
    "smartturn/3.0": Count(8_000_387, _WHISPER),
    "smartturn/3.1": Count(8_000_390, _WHISPER),
    "smartturn/3.2": Count(8_000_390, _WHISPER),
    "ppocr/v4-cls.onnx": Count(
        133_700, "2,136 gains of batch norms are named *_scale and were taken for scales"
    ),
    "basicpitch/savedmodel": Count(16_864, "the list counts two moments of Adam a weight"),
    "resemblyzer": Count(1_423_618, "the list counts two moments of Adam a weight"),
    "magika/v3_2": Count(784_223, _INFINITE),
    "magika/v3_3": Count(784_223, _INFINITE),
    "magika/v3_3@1.0.3": Count(784_223, _INFINITE),
}
"""Id → the number of parameters as CONTRACTS 6 counts, where the list has another."""

UNREADABLE = {"gemma3-270m/part1": "268,098,176 values"}
"""Id → words of the reason with which a file must be refused: it is the first of four chunks, and
its header is whole."""


def parameters_of(model: Listed) -> int | None:
    """Return how many parameters the product should count."""
    return COUNTS[model.id].parameters if model.id in COUNTS else model.parameters


def holds_more(first: Listed, second: Listed, share: float = HOLDS_MORE) -> bool:
    """Say whether one of two files holds more weights than the other, by a share of them."""
    counts = sorted(parameters_of(model) or 0 for model in (first, second))
    return counts[1] - counts[0] > share * counts[1]


def is_negative(kind: str) -> bool:
    """Say whether the list calls a pair unrelated."""
    return kind.startswith("negative_")


def right_relations(first: Listed, second: Listed, known: Known) -> frozenset[Relation]:
    """Return the relations that are right for a listed pair."""
    if is_negative(known.kind):
        return frozenset({Relation.UNRELATED})
    right = _RIGHT[known.kind]
    if known.kind != "same_initialisation" and holds_more(first, second):
        right |= {Relation.PART_OF}
    return right


def is_accusation(kind: str, relation: Relation) -> bool:
    """Say whether an answer calls two models kin that the list says are not."""
    unfounded = is_negative(kind) or kind == "same_initialisation"
    return unfounded and relation.related is True


def mark(first: Listed, second: Listed, known: Known, relation: Relation) -> str:
    """Return `right`, `abstained`, `accused`, `wrong` or `unscored`."""
    if known.kind == UNSCORED:
        return "unscored"
    if is_accusation(known.kind, relation):
        return "accused"
    if relation in right_relations(first, second, known):
        return "right"
    return "abstained" if relation.related is None else "wrong"


def right_direction(first: str, second: str) -> str | None:
    """Return the known direction of a pair of ids, None where none is known."""
    if (second, first) in CHILD_OF:
        return FORWARD
    return BACKWARD if (first, second) in CHILD_OF else None


def direction_mark(first: str, second: str, known: Known, answer: str) -> str:
    """Return `right`, `unknown` (an abstention), `wrong`, or `unscored` where none is known.

    Copies, siblings and strangers have no direction, so any is wrong there.
    """
    right = right_direction(first, second)
    if right is not None:
        return "right" if answer == right else "unknown" if answer == UNKNOWN else "wrong"
    without = known.kind in _DUPLICATES or known.kind.startswith(("siblings_", "negative_"))
    if without:
        return "right" if answer == UNKNOWN else "wrong"
    return "unscored"


def claim_mark(first: str, second: str, known: Known, answer: str) -> str:
    """Return how well the claim "the second is the base of the first" was answered.

    Returns:
        `right`, `abstained`, `wrong` or `unscored`. A stranger or sibling must not be supported
        as a base, and kin other than siblings must not be refuted.
    """
    if known.kind == UNSCORED:
        return "unscored"
    if answer == "cannot-say":
        return "right" if known.kind == "same_initialisation" else "abstained"
    if known.kind == "same_initialisation":
        return "wrong"
    backward = right_direction(first, second) == FORWARD  # the claim turns parent and child round
    false = is_negative(known.kind) or known.kind.startswith("siblings_") or backward
    return "right" if (answer == "refuted") == false else "wrong"


# ------------------------------------------------------------------ what follows from the list


class Groups:
    """Models joined by listed relations, so that what holds for two can be told of all.

    Files of equal SHA-256 are joined from the start.
    """

    def __init__(self, models: Sequence[Listed]) -> None:
        first_of = {model.sha256: model.id for model in reversed(models)}
        self._of = {model.id: first_of[model.sha256] for model in models}

    def join(self, first: str, second: str) -> None:
        """Put two models, and all that are with them, into one group."""
        ours, theirs = self.root(first), self.root(second)
        self._of[theirs] = ours

    def root(self, model: str) -> str:
        """Return the model that stands for a group."""
        while self._of[model] != model:
            model = self._of[model]
        return model

    def together(self, first: str, second: str) -> bool:
        """Say whether two models are in one group."""
        return self.root(first) == self.root(second)

    def members(self) -> list[list[str]]:
        """Return the groups of two or more."""
        found: dict[str, list[str]] = {}
        for model in self._of:
            found.setdefault(self.root(model), []).append(model)
        return [group for group in found.values() if len(group) > 1]


def kin_groups(models: Sequence[Listed]) -> Groups:
    """Return the models that listed relations join, in any number of steps."""
    groups = Groups(models)
    for first, second, known in pairs(models):
        if not is_negative(known.kind) and known.kind != UNSCORED:
            groups.join(first.id, second.id)
    return groups


def duplicate_pairs(models: Sequence[Listed]) -> set[frozenset[str]]:
    """Return all pairs that are one model in other bytes, those that follow from others too."""
    groups = Groups(models)
    for first, second, known in pairs(models):
        same = known.kind in _DUPLICATES or known.kind.startswith("same_weights_")
        if same and not holds_more(first, second, HOLDS_ANOTHER):
            groups.join(first.id, second.id)
    return {frozenset(two) for group in groups.members() for two in combinations(group, 2)}


def stranger_pairs(models: Sequence[Listed]) -> set[frozenset[str]]:
    """Return all pairs that must not be called kin: of two families, or kin of listed strangers."""
    kin = kin_groups(models)
    between = {
        frozenset((kin.root(first.id), kin.root(second.id)))
        for first, second, known in pairs(models)
        if is_negative(known.kind)
    }
    return {
        frozenset((first.id, second.id))
        for first, second in combinations(models, 2)
        if first.family != second.family
        or frozenset((kin.root(first.id), kin.root(second.id))) in between
    }


def unlisted(models: Sequence[Listed], found: Iterable[frozenset[str]]) -> list[list[str]]:
    """Return found kin of one family that no chain of listed relations joins: worth a look."""
    kin, strangers = kin_groups(models), stranger_pairs(models)
    rest = [two for two in found if two not in strangers and not kin.together(*two)]
    return sorted(sorted(two) for two in rest)
