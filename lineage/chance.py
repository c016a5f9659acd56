"""How likely an agreement is between models that have nothing to do with each other.

The law is that of control pairs: networks of one design trained on the same data from another
start, compared in place as every other pair is. Their size-weighted cosine has the mean c₀ and a
variance that a sum over tensors predicts,

    Var c = Σ wᵢ² (1/nᵢ + κ²/mᵢ),

where tensor i has the weight wᵢ, nᵢ values and mᵢ places on its shortest axis of channels. The
first term is that of independent values; the second stands for what strangers trained on the same
data share: a profile along one axis, such as dead pixels or the frequencies of classes. κ and c₀
are fitted in `benchmarks/controls.py` and shipped in `controls.json` with the number of controls;
the law was checked on unrelated pairs of the real corpus, which it never saw (docs/concepts.md).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from lineage.measure import PairMeasure


@dataclass(frozen=True, slots=True)
class Controls:
    """What the control pairs have shown.

    Args:
        pairs: Number of control pairs.
        mean: c₀, their mean cosine.
        kappa: κ of the law.
        source: Where they come from, in words.
    """

    pairs: int
    mean: float
    kappa: float
    source: str


@lru_cache(maxsize=1)
def shipped_controls() -> Controls:
    """Return the controls that come with the package."""
    found = json.loads(files("lineage").joinpath("controls.json").read_text(encoding="utf-8"))
    return Controls(found["pairs"], found["mean"], found["kappa"], found["source"])


@dataclass(frozen=True, slots=True)
class Chance:
    """The probability of an agreement without kinship, and how it was found.

    Args:
        p: Probability of at least this agreement.
        method: Which statistic.
        controls: Number of control pairs behind it.
        extrapolated: Whether p lies below 1/(controls + 1), where the law alone speaks.
        source: Where the controls come from.
    """

    p: float
    method: str
    controls: int
    extrapolated: bool
    source: str

    @property
    def limits(self) -> tuple[str, ...]:
        """What it cannot vouch for, in sentences."""
        if not self.extrapolated:
            return ()
        return (
            f"chance below 1 in {self.controls + 1:,} is extrapolated from the law of the controls",
        )


def spread_of(pairs: Sequence[PairMeasure], controls: Controls | None = None) -> float:
    """Return the standard deviation of the size-weighted cosine of strangers of these shapes.

    Args:
        pairs: The matched tensors; only their shapes are looked at.
        controls: The law; the shipped one if None.
    """
    controls = controls or shipped_controls()
    total = sum(pair.size for pair in pairs)
    if total == 0:
        return math.inf
    variance = sum(
        (pair.size / total) ** 2 * tensor_variance(pair, controls.kappa) for pair in pairs
    )
    return math.sqrt(variance)


def tensor_variance(pair: PairMeasure, kappa: float) -> float:
    """Return the variance of the cosine of one tensor between strangers."""
    estimated = 0.0 if pair.exact else _SKETCH_VARIANCE
    return 1 / max(pair.size, 1) + kappa**2 / shortest_axis(pair.shape) + estimated


_SKETCH_VARIANCE = 0.0076
"""Variance of a cosine that is estimated from sketches: .087² for 3 × 3 kernels, the worst of the
common shapes (.067² for matrices; see the tests of the sketch)."""


_LONG = 8


def shortest_axis(shape: tuple[int, ...]) -> int:
    """Return the length of the shortest axis along which strangers may share a profile.

    Where two axes are channels (longer than 8) those count and places in a kernel do not;
    depthwise kernels are smooth in strangers too (seen: a cosine of .13 in 480 kernels of 5 × 5),
    so with one channel axis all count.

    Example:
        >>> shortest_axis((64, 32, 3, 3)), shortest_axis((64, 5, 5)), shortest_axis((10, 128))
        (32, 5, 10)
    """
    long = [length for length in shape if length > _LONG]
    return min(long if len(long) >= 2 else [length for length in shape if length > 1] or [1])


def chance_of(cosine: float, spread: float, controls: Controls | None = None) -> Chance:
    """Return the probability that strangers reach a cosine.

    Args:
        cosine: Size-weighted cosine over the matched tensors.
        spread: From `spread_of`.
        controls: The law; the shipped one if None.

    Example:
        >>> law = Controls(pairs=1000, mean=0.0, kappa=0.25, source="an example")
        >>> chance_of(0.0, 0.1, law).p, chance_of(0.5, 0.1, law).extrapolated
        (0.5, True)
    """
    controls = controls or shipped_controls()
    if not math.isfinite(spread) or spread == 0:
        return Chance(1.0, "agreement in place", controls.pairs, False, controls.source)
    z = (cosine - controls.mean) / spread
    # erfc underflows beyond z = 38; no smaller p is ever told.
    p = max(0.5 * math.erfc(z / math.sqrt(2)), 1e-300)
    floor = 1 / (controls.pairs + 1)
    return Chance(p, "agreement in place", controls.pairs, p < floor, controls.source)


def corrected(p: float, number: int) -> float:
    """Return a probability corrected for the number of models searched or claims checked.

    Source:
        Šidák 1967, J. Am. Stat. Assoc. 62; equal to Bonferroni's n·p for small p.

    Example:
        >>> corrected(0.5, 2)
        0.75
    """
    if number <= 1:
        return p
    if p * number < 1e-4:
        return p * number
    return 1 - (1 - p) ** number


POWER = 0.999
"""Probability with which a child must show for its absence to mean something (CONTRACTS 4)."""

_Z_POWER = 3.0902  # the .999 quantile of the normal law
_CHILD_COSINE = 1 / math.sqrt(2)  # of a child at drift 1, whose step is orthogonal to its parent


def has_power(spread: float, p_critical: float = 1e-3) -> bool:
    """Say whether a child at drift 1 would have shown with probability .999.

    Args:
        spread: From `spread_of`; a child's cosine is taken to spread as much.
        p_critical: The probability below which an agreement would count as shown.
    """
    z_critical = _Z_POWER if p_critical >= 1e-3 else math.sqrt(-2 * math.log(p_critical))
    return (z_critical + _Z_POWER) * spread < _CHILD_COSINE
