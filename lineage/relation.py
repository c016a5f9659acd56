"""What two models are to each other, decided from what was measured between them.

The rules go from what cannot be doubted (equal bytes, equal bits, equal values) to what needs a
measure of chance, and end in *unrelated* only where a relative would have shown. Where two
explanations fit, the answer is `cannot-say`.
"""

import math

from embedder.checkpoint import Kind
from embedder.fingerprint import Fingerprint
from embedder.statistics import SAMPLE
from lineage.chance import has_power, spread_of
from lineage.measure import Measurement, PairMeasure
from lineage.operations import ON_LATTICE
from lineage.verdict import NUMERIC, Case, Relation, Verdict, numbers_of

CLOSE = 0.12
"""Relative step ‖Y − X‖/‖X‖ of a tensor up to which training went on from the other's values.
Networks of one start trained apart on the same data part by .13 or more in every larger tensor
(36 runs of six regimes); the fine-tunes of the corpus step by .03 to .12."""

CLOSE_SHARE = 0.5
"""Share of the matched values in close tensors from which a trained ancestor is told. In those 36
runs the largest share was .01."""

START_SHARE = 0.5
"""Share of the close values in tensors that still look as they were drawn (uniform or normal),
from which twins of one start cannot be told from a fine-tune. Of 131 trained files of the corpus
half have .008 of their values in such tensors, nine in ten at most .24, and seven more than .5;
twins of one start that stay within `CLOSE` have nearly all."""

UNIFORM_KURTOSIS = -0.5
"""Excess kurtosis below which values look drawn from a uniform (−1.2) or from a normal cut at two
deviations (−.63)."""

NORMAL_KURTOSIS = 0.05
"""Excess kurtosis up to which values look drawn from a normal, or three standard errors √(24/n)."""

SHOWN = 1e-6
"""Chance below which an agreement counts as shown; a search corrects it for its size."""

MOVED_VECTOR = 1e-3
"""Relative difference from which a bias or norm was changed and not only rounded."""

_WORDS = {
    "turned": "transpose",
    "shuffled": "reorder",
    "reordered": "reorder",
    "rounded": "re-export",
    "rescaled": "rescale",
    "cast": "cast",
    "quantised": "quantise",
    "pruned": "prune",
}


def decide(
    first: Fingerprint,
    second: Fingerprint,
    measured: Measurement,
    constants: frozenset[bytes] = frozenset(),
) -> Verdict:
    """Return what two models are to each other, from themselves alone.

    Third models may refine the answer; see `lineage.third`.

    Args:
        first: One model.
        second: The other.
        measured: What was measured between them.
        constants: Digests of values that are bit-equal in models that share nothing else.
    """
    case = Case(first, second, measured, constants)
    if first.sha256 and first.sha256 == second.sha256:
        return case.verdict(Relation.IDENTICAL_FILE, "equal bytes")
    if first.content == second.content:
        return case.verdict(
            Relation.SAME_TENSORS, "all tensors have equal shapes and bits", operations=_wrap(case)
        )
    if first.adapter or second.adapter:
        return _adapter(case)
    for rule in (_all_accounted_for, _trained_further, _nothing_in_common):
        found = rule(case)
        if found is not None:
            return found
    if not case.kin:
        return case.verdict(Relation.CANNOT_SAY, "most tensors differ in length")
    return case.verdict(
        Relation.CANNOT_SAY,
        "the agreement is beyond chance, and a common random start explains it as well as a "
        "common trained ancestor",
    )


def _wrap(case: Case) -> list[str]:
    return ["convert"] if case.first.format != case.second.format else ["repackage"]


def _adapter(case: Case) -> Verdict:
    case.limits.append("an adapter was compared by the shapes that it fits; its base is not in it")
    return case.verdict(Relation.CANNOT_SAY, "shapes alone tie an adapter to no base")


def _operations(case: Case) -> list[str]:
    """Return the words for what was done to the pairs, each once, in a plausible order."""
    done = {pair.operation for pair in case.matched}
    words = [word for name, word in _WORDS.items() if name in done]
    if "rescale" in words and _norm_folded(case):
        words[words.index("rescale")] = "fold-norm"
    return list(dict.fromkeys(words))


def _norm_folded(case: Case) -> bool:
    """Say whether one model has running statistics and the other lacks them."""
    counts = [
        sum(tensor.size for tensor in side.tensors if tensor.kind is Kind.STATISTIC)
        for side in (case.first, case.second)
    ]
    return min(counts) == 0 < max(counts)


def _all_accounted_for(case: Case) -> Verdict | None:
    """Every matched tensor is equal once a cast, layout, scale, lattice or zero is undone."""
    if case.moved or not case.matched:
        return None
    first_more, second_more = case.more
    operations = _operations(case)
    thinned = _units_taken_out(case)
    if thinned and not (first_more or second_more):
        return case.verdict(Relation.PRUNED, thinned, operations=[*operations, "prune"])
    if not case.explained and _moved_vectors(case) and not (first_more or second_more):
        return case.verdict(
            Relation.FINE_TUNE,
            "all matrices are equal; biases or norms were trained further",
            operations=[*operations, "fine-tune"],
        )
    if first_more and second_more:
        return _both_have_more(case, operations)
    if case.grown:
        operations.append("extend")
    if first_more or second_more:
        operations.append("part-of")
        whole = "first" if first_more else "second"
        reason = f"all counted tensors of one are in the {whole}, which has more"
        return case.verdict(Relation.PART_OF, reason, operations=operations)
    if case.grown:
        details = "; ".join(f"{pair.first}: {pair.detail}" for pair in case.grown[:3])
        return case.verdict(Relation.EXTENDED, details, operations=operations)
    kinds = {NUMERIC[pair.operation] for pair in case.explained}
    for relation in (Relation.PRUNED, Relation.QUANTISED):
        if relation in kinds:
            detail = case.explained[0].detail
            return case.verdict(relation, detail, operations=operations)
    return case.verdict(
        Relation.SAME_WEIGHTS,
        "all counted tensors are equal once layout, type and scales are undone",
        operations=operations or _wrap(case),
    )


def _units_taken_out(case: Case) -> str:
    """Say which hidden units one model lacks, or nothing.

    Rows missing from one tensor and as many columns from another are units between two layers;
    rows or columns alone are inputs, classes or words of a vocabulary.
    """
    lengths: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())
    for pair in case.grown:
        shapes = (
            case.first.tensors[pair.first_place].squeezed,
            case.second.tensors[pair.second_place].squeezed,
        )
        for axis in (0, 1):
            if shapes[0][axis] != shapes[1][axis]:
                lengths[axis].add((shapes[0][axis], shapes[1][axis]))
    units = lengths[0] & lengths[1]
    if not units:
        return ""
    return "; ".join(f"{max(pair)} hidden units against {min(pair)}" for pair in sorted(units))


def _both_have_more(case: Case, operations: list[str]) -> Verdict | None:
    """Equal tensors, and in both models others without a partner: another head, or one constant."""
    accounted = [*case.same, *case.explained]
    shared = sum(pair.size for pair in accounted)
    smaller = min(shared + more for more in case.more)
    undone = ", once layout, type and scales are undone," if case.explained else ""
    if shared >= smaller / 2 and len(accounted) >= 2:
        return case.verdict(
            Relation.FINE_TUNE,
            f"{len(accounted)} tensors are equal{undone} and each model has others of its own "
            "shape",
            operations=[*operations, "replace-head"],
        )
    return _few_equal(case)


def _few_equal(case: Case) -> Verdict:
    names = ", ".join(pair.first for pair in (*case.same, *case.explained)[:3])
    case.limits.append(f"equal in both, and given by no known formula: {names}")
    return case.verdict(
        Relation.CANNOT_SAY,
        "a few equal tensors and nothing else in common: a shared constant fits",
    )


def _moved_vectors(case: Case) -> bool:
    """Say whether biases or norms differ by more than rounding where weights do not explain it."""
    if any(pair.operation == "rescaled" for pair in case.same):
        return False
    moved = [
        pair
        for pair in case.measured.vectors
        if not pair.same_values
        and pair.difference > MOVED_VECTOR**2 * max(pair.first_energy, 1e-30)
    ]
    paired = sum(pair.size for pair in case.measured.vectors)
    return paired > 0 and sum(pair.size for pair in moved) > 0.5 * paired


def _trained_further(case: Case) -> Verdict | None:
    """Most of the matched values are equal or close to the other's: training went on from them."""
    total = sum(pair.size for pair in case.matched)
    if total == 0:
        return None
    equal = sum(pair.size for pair in case.same)
    explained = sum(pair.size for pair in case.explained)
    close = [
        pair
        for pair in case.moved
        if pair.difference <= CLOSE**2 * max(pair.first_energy, pair.second_energy)
        and pair.cosine > 0.9
    ]
    near = equal + explained + sum(pair.size for pair in close)
    if near < CLOSE_SHARE * total:
        return None
    if len(case.same) < 2 and equal > 0.9 * near:
        return None  # a single equal tensor may be a constant
    if equal + explained < 0.1 * total and _like_a_random_start(close):
        case.limits.append(
            "the weights still look as a random start draws them: twins of one start that were "
            "trained little look the same"
        )
        return None
    operations = ["fine-tune", *_operations(case)]
    if any(pair.detail == ON_LATTICE for pair in case.moved):
        operations.append("quantise")
    strangers = [pair for pair in case.moved if pair not in case.kin]
    if strangers or all(case.more):
        operations.append("replace-head")
    if case.grown:
        operations.append("extend")
    steps = [math.sqrt(pair.difference / max(pair.first_energy, 1e-30)) for pair in close]
    reason = f"{near / total:.0%} of the matched values are equal or close"
    if steps:
        reason += f"; close tensors step by {min(steps):.3f} to {max(steps):.3f} of their norm"
    return case.verdict(Relation.FINE_TUNE, reason, operations=operations)


def _like_a_random_start(close: list[PairMeasure]) -> bool:
    """Say whether most of the close values still look as they were drawn."""
    drawn = sum(pair.size for pair in close if _looks_drawn(pair))
    return drawn > START_SHARE * sum(pair.size for pair in close)


def _looks_drawn(pair: PairMeasure) -> bool:
    """Say whether either tensor has the kurtosis of a uniform or a normal distribution."""
    sample = pair.size if pair.exact else min(pair.size, SAMPLE)
    normal = max(3 * math.sqrt(24 / sample), NORMAL_KURTOSIS)
    return any(
        kurtosis < UNIFORM_KURTOSIS or abs(kurtosis) < normal
        for kurtosis in (pair.first_kurtosis, pair.second_kurtosis)
    )


def _nothing_in_common(case: Case) -> Verdict | None:
    """Unrelated, if a child would have shown; otherwise too little to tell."""
    if case.same:
        few = sum(pair.size for pair in case.same)
        kin_moved = [pair for pair in case.kin if pair in case.moved]
        if few and not kin_moved:
            return _few_equal(case)
        return None
    counted = [sum(tensor.size for tensor in side.counted) for side in (case.first, case.second)]
    if sum(pair.size for pair in case.uncompared) > 0.5 * min(counted):
        return None
    if not case.matched:
        if min(counted) < SMALLEST:
            return case.verdict(
                Relation.CANNOT_SAY, f"only {min(counted):,} counted values to compare"
            )
        case.limits.append("no two tensors have a shape in common; distillation does not show")
        return case.verdict(Relation.UNRELATED, "no two tensors have a shape in common")
    spread = spread_of(case.matched)
    _, _, chance = numbers_of(case)
    kin = case.kin
    kin_values = sum(pair.size for pair in kin) / sum(pair.size for pair in case.matched)
    beyond = chance is not None and chance.p < SHOWN
    if (kin_values >= 0.2 or len(kin) >= 0.3 * len(case.matched)) and (beyond or kin_values > 0.5):
        return None
    reordered = [pair for pair in case.moved if pair.units >= REORDERED]
    if reordered:
        names = ", ".join(f"{pair.first} ({pair.units:.2f})" for pair in reordered[:3])
        return case.verdict(
            Relation.CANNOT_SAY,
            "rows or columns find near partners in another order, as hidden units do that were "
            f"reordered and trained further: {names}",
        )
    if not has_power(spread):
        return case.verdict(
            Relation.CANNOT_SAY,
            "too few comparable values: a child at drift 1 would not have shown for sure",
        )
    case.limits.append(
        "reordered units are found up to a drift of .7 only, and seldom where rows and columns of "
        "one matrix are both in another order; distillation never"
    )
    return case.verdict(
        Relation.UNRELATED,
        f"{len(case.matched)} pairs of tensors agree no more than strangers do; a child at "
        "drift 1 would have shown with probability .999",
    )


REORDERED = 0.8
"""Mean cosine of rows or columns with partners that stand out, from which units may have been
reordered. No tensor of an unrelated pair of the corpus has such partners; a child at drift .7 has
.82."""

SMALLEST = 1000
"""Counted values below which nothing is said of models that share no shape."""
