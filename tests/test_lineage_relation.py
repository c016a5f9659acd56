"""What two models are to each other, decided from their weights."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from embedder.checkpoint import Checkpoint, Kind, tensor_of
from embedder.fingerprint import take_fingerprint
from kinship import Weights, judged, measured, network, normal, printed, stepped
from lineage.measure import Measurement, measure
from lineage.relation import decide
from lineage.simulate import make_family, new_network, train
from lineage.verdict import Relation

MATRICES = ("0.weight", "1.weight", "2.weight")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, NDArray[np.float32]]]:
    folder = tmp_path_factory.mktemp("family")
    make_family(folder)
    return {file.stem: load_file(file) for file in Path(folder).glob("*.safetensors")}


def relation(first: Weights, second: Weights, *, exact: bool = True) -> str:
    return str(judged(first, second, exact=exact)[0].relation)


class TestProven:
    def test_equal_tensors_under_other_names_and_in_another_order(self) -> None:
        first = network(1)
        second = {f"x{name}": values for name, values in reversed(first.items())}
        assert relation(first, second) == "same-tensors"

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_a_cast_copy_is_the_same_weights(self, dtype: type) -> None:
        first = network(1)
        second: dict[str, NDArray[np.generic]] = {n: v.astype(dtype) for n, v in first.items()}
        verdict, direction = judged(first, second)  # type: ignore[arg-type]
        assert verdict.relation is Relation.SAME_WEIGHTS
        assert verdict.operations == ("cast",)
        assert direction.answer == "parent→child"

    def test_a_cast_copy_is_known_from_fingerprints_alone(self) -> None:
        first = network(1)
        second = {name: values.astype(np.float16) for name, values in first.items()}
        assert relation(first, second, exact=False) == "same-weights"

    def test_another_layout_is_the_same_weights_without_a_direction(self) -> None:
        first = network(1)
        second = {name: np.ascontiguousarray(values.T) for name, values in first.items()}
        verdict, direction = judged(first, second)
        assert verdict.relation is Relation.SAME_WEIGHTS
        assert direction.answer == "unknown"
        assert verdict.agreement == pytest.approx(1)
        assert verdict.distance == 0

    def test_a_folded_batch_norm_is_the_same_weights_and_the_folded_one_the_child(self) -> None:
        kernel, other = normal(12, 5, 3, 3), normal(9, 12, seed=1)
        gain, offset, mean = normal(12, seed=2), normal(12, seed=3), normal(12, seed=4)
        variance = np.exp(normal(12, seed=5))
        scale = gain / np.sqrt(variance + 1e-5)
        apart = Checkpoint(
            "apart",
            "live",
            (
                tensor_of("conv.weight", kernel),
                tensor_of("bn.weight", gain),
                tensor_of("bn.bias", offset),
                tensor_of("bn.running_mean", mean),
                tensor_of("bn.running_var", variance, kind=Kind.STATISTIC),
                tensor_of("head.weight", other),
            ),
        )
        folded = Checkpoint(
            "folded",
            "live",
            (
                tensor_of("conv.weight", (kernel * scale[:, None, None, None])),
                tensor_of("conv.bias", offset - mean * scale),
                tensor_of("head.weight", other),
            ),
        )
        prints = take_fingerprint(apart), take_fingerprint(folded)
        verdict = decide(*prints, measure(*prints, (apart, folded)))
        assert verdict.relation is Relation.SAME_WEIGHTS
        assert verdict.operations == ("fold-norm",)

    def test_reordered_hidden_units_are_the_same_weights(
        self, family: dict[str, dict[str, NDArray[np.float32]]]
    ) -> None:
        assert relation(family["base-a"], family["base-reordered"]) == "same-weights"

    def test_a_part_is_a_part_both_ways(self) -> None:
        whole = network(1)
        part = {name: values for name, values in whole.items() if not name.startswith("2")}
        assert relation(whole, part) == relation(part, whole) == "part-of"

    def test_a_part_in_half_precision_is_a_part(self) -> None:
        whole = network(1)
        part = {name: whole[name].astype(np.float16) for name in ("0.weight", "1.weight")}
        verdict, _ = judged(whole, part)
        assert verdict.relation is Relation.PART_OF
        assert verdict.operations == ("cast", "part-of")
        assert verdict.second_share == 1
        assert 0 < verdict.first_share < 1

    def test_added_classes_extend(self) -> None:
        first = network(1)
        second = {**first, "2.weight": np.concatenate([first["2.weight"], normal(2, 32, seed=9)])}
        verdict, direction = judged(first, second)
        assert verdict.relation is Relation.EXTENDED
        assert direction.answer == "parent→child"
        assert relation(second, first) == "extended"

    def test_quantised_and_pruned_copies_are_children(
        self, family: dict[str, dict[str, NDArray[np.float32]]]
    ) -> None:
        for child, parent, word in (
            ("legal-int8", "legal", "quantised"),
            ("base-pruned", "base-a", "pruned"),
        ):
            verdict, direction = judged(family[parent], family[child])
            assert verdict.relation == word
            assert direction.answer == "parent→child"
            _, backwards = judged(family[child], family[parent])
            assert backwards.answer == "child→parent"

    def test_hidden_units_taken_out_prune(self) -> None:
        base = network(1)
        kept = np.arange(0, 40, 2)
        smaller = {
            **base,
            "0.weight": base["0.weight"][kept],
            "0.bias": base["0.bias"][kept],
            "1.weight": base["1.weight"][:, kept],
        }
        verdict, direction = judged(base, smaller)
        assert verdict.relation is Relation.PRUNED
        assert direction.answer == "parent→child"


class TestTrained:
    def test_a_small_step_in_every_tensor_is_a_fine_tune(self) -> None:
        base = network(1)
        verdict, direction = judged(base, stepped(base, 0.05, 2))
        assert verdict.relation is Relation.FINE_TUNE
        assert verdict.distance == pytest.approx(0.05, rel=0.01)
        assert direction.answer == "unknown"

    def test_a_frozen_trunk_with_a_new_head_is_a_fine_tune(self) -> None:
        base = network(1)
        child = {**base, "2.weight": normal(10, 32, seed=5), "2.bias": normal(10, seed=6)}
        verdict, _ = judged(base, child)
        assert verdict.relation is Relation.FINE_TUNE
        assert "replace-head" in verdict.operations

    def test_a_quantised_trunk_with_a_new_head_is_one_too(self) -> None:
        base = network(1)
        child = {n: np.round(v * 20) / np.float32(20) if v.ndim > 1 else v for n, v in base.items()}
        head = {"2.weight": normal(7, 32, 2, seed=5), "2.bias": normal(7, seed=6)}
        verdict, _ = judged(base, child | head)
        assert verdict.relation is Relation.FINE_TUNE
        assert verdict.operations == ("quantise", "replace-head")

    def test_a_head_of_another_shape_is_a_fine_tune(self) -> None:
        base = network(1)
        child = {**base, "2.weight": normal(7, 32, 2, seed=5), "2.bias": normal(7, seed=6)}
        assert relation(base, child) == "fine-tune"

    def test_trained_biases_alone_are_a_fine_tune(self) -> None:
        base = network(1)
        moved = stepped(base, 0.2, 3)
        child = {name: base[name] if "weight" in name else moved[name] for name in base}
        assert relation(base, child) == "fine-tune"

    def test_a_fine_tune_that_is_quantised_names_both(
        self, family: dict[str, dict[str, NDArray[np.float32]]]
    ) -> None:
        verdict, _ = judged(family["base-a"], family["legal-int8"])
        assert verdict.relation is Relation.FINE_TUNE
        assert verdict.operations == ("fine-tune", "quantise")


class TestFalseAccusation:
    """The worst outcome: a stranger or a twin of one start that is called kin."""

    @given(st.integers(0, 10**6))
    @settings(deadline=None, max_examples=25)
    def test_strangers_are_unrelated_whatever_their_names(self, seed: int) -> None:
        assert relation(network(seed), network(seed + 10**7)) == "unrelated"

    @given(st.integers(0, 10**6))
    @settings(deadline=None, max_examples=15)
    def test_strangers_are_unrelated_by_their_fingerprints(self, seed: int) -> None:
        assert relation(network(seed), network(seed + 10**7), exact=False) == "unrelated"

    def test_strangers_of_one_design_trained_on_the_same_data_are_unrelated(self) -> None:
        rng = np.random.default_rng(5)
        founders = [train(new_network(rng), rng, steps=200, rate=1e-2) for _ in range(6)]
        for place, first in enumerate(founders):
            for second in founders[:place]:
                assert relation(first, second) == "unrelated"

    @pytest.mark.parametrize(("steps", "rate"), [(30, 3e-4), (100, 3e-3), (300, 1e-3), (600, 1e-2)])
    def test_twins_of_one_start_are_not_called_kin(self, steps: int, rate: float) -> None:
        for seed in range(3):
            rng = np.random.default_rng(seed)
            start = new_network(rng)
            twins = [train(start, rng, steps=steps, rate=rate) for _ in range(2)]
            verdict, _ = judged(*twins)
            assert verdict.relation.related is not True, verdict

    @pytest.mark.parametrize("drawn", ["uniform", "normal"])
    def test_what_still_looks_like_a_random_start_is_not_called_kin(self, drawn: str) -> None:
        rng = np.random.default_rng(3)
        start = {
            name: getattr(rng, drawn)(-1, 1, values.shape).astype(np.float32)
            for name, values in network(0).items()
        }
        verdict, _ = judged(stepped(start, 0.04, 1), stepped(start, 0.04, 2))
        assert verdict.relation is Relation.CANNOT_SAY
        assert any("random start" in limit for limit in verdict.limits)

    def test_a_shared_formula_is_no_kinship(self) -> None:
        basis = np.cos(np.pi * np.outer(np.arange(64), np.arange(128) + 0.5) / 128)
        first = {**network(1), "basis": basis.astype(np.float32)}
        second = {**network(2), "basis": basis.astype(np.float32)}
        assert relation(first, second) == "unrelated"

    def test_one_equal_tensor_alone_is_named_and_not_decided(self) -> None:
        table = normal(64, 30, seed=9)
        verdict, _ = judged({**network(1), "table": table}, {**network(2), "table": table})
        assert verdict.relation is Relation.CANNOT_SAY
        assert "equal in both, and given by no known formula: table" in verdict.limits

    def test_such_a_tensor_is_passed_over_once_it_is_known_as_a_constant(self) -> None:
        table = normal(64, 30, seed=9)
        first, second = {**network(1), "table": table}, {**network(2), "table": table}
        prints = printed(first), printed(second)
        constant = next(t.values for t in prints[0].tensors if t.name == "table")
        verdict = decide(*prints, measured(first, second), frozenset({constant}))
        assert verdict.relation is Relation.UNRELATED

    def test_norms_alone_say_nothing(self) -> None:
        gains = {f"norm.{i}": 1 + 0.01 * normal(40, seed=i) for i in range(5)}
        verdict, _ = judged({**network(1), **gains}, {**network(2), **gains})
        assert verdict.relation is Relation.UNRELATED

    def test_a_few_values_are_too_few_to_tell(self) -> None:
        tiny = {"w": normal(3, 2)}, {"w": normal(3, 2, seed=1)}
        assert relation(*tiny) == "cannot-say"


class TestNumbers:
    @given(st.integers(0, 10**6), st.floats(0.01, 0.1))
    @settings(deadline=None, max_examples=10)
    def test_the_word_does_not_depend_on_the_order(self, seed: int, step: float) -> None:
        base = network(seed)
        for other in (stepped(base, step, seed), network(seed + 1)):
            assert relation(base, other) == relation(other, base)

    def test_agreement_and_distance_are_what_their_formulas_give(self) -> None:
        base = network(1)
        child = stepped(base, 0.08, 2)
        verdict, _ = judged(base, child)
        x = [base[name].astype(np.float64) for name in MATRICES]
        y = [child[name].astype(np.float64) for name in MATRICES]
        steps = sum(float(np.sum((b - a) ** 2)) for a, b in zip(x, y, strict=True))
        energy = sum(float(np.sum(a**2)) for a in x)
        assert verdict.distance == pytest.approx(np.sqrt(steps / energy), rel=1e-9)
        cosines = [
            float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1])
            for a, b in zip(x, y, strict=True)
        ]
        sizes = [a.size for a in x]
        mean = float(np.average(cosines, weights=sizes))
        assert verdict.agreement == pytest.approx((mean - 0.0053) / (1 - 0.0053), abs=1e-3)

    def test_fingerprints_estimate_what_weights_say(self) -> None:
        base = network(1, (200, 180, 160, 40))
        child = stepped(base, 0.1, 2)
        exact, _ = judged(base, child)
        estimate, _ = judged(base, child, exact=False)
        assert exact.distance is not None
        assert estimate.distance == pytest.approx(exact.distance, rel=0.2)
        assert estimate.relation is exact.relation
        assert any("estimated from sketches" in limit for limit in estimate.limits)

    def test_a_measurement_comes_back_from_its_text(self) -> None:
        base = network(1)
        found = measured(base, stepped(base, 0.1, 2))
        assert Measurement.from_text(found.to_text()) == found
        assert found.reversed().reversed() == found

    def test_values_that_are_not_finite_are_named_and_the_rest_is_compared(self) -> None:
        base = network(1)
        broken = {name: values.copy() for name, values in base.items()}
        broken["0.weight"][3, 4] = np.nan
        verdict, _ = judged(base, broken)
        assert verdict.relation is Relation.PART_OF
        assert any("NaN" in limit for limit in printed(broken).limits)


class TestReordered:
    """Units in another order and trained further: never refuted as strangers."""

    def test_reordered_and_trained_units_are_not_called_unrelated(
        self, family: dict[str, dict[str, NDArray[np.float32]]]
    ) -> None:
        for child in ("chat", "legal", "legal-v2"):
            verdict, _ = judged(family["base-reordered"], family[child])
            assert verdict.relation is Relation.CANNOT_SAY, child
            assert "another order" in verdict.reasons[0]

    @pytest.mark.parametrize("drift", [0.1, 0.3, 0.6])
    def test_they_are_found_up_to_the_drift_that_the_answer_names(self, drift: float) -> None:
        base = network(1, (64, 96, 80, 10))
        order = np.random.default_rng(3).permutation(96)
        child = stepped(base, drift, 2)
        child["0.weight"], child["0.bias"] = child["0.weight"][order], child["0.bias"][order]
        child["1.weight"] = child["1.weight"][:, order]
        assert relation(base, child) != "unrelated"

    def test_an_unrelated_answer_names_that_limit(self) -> None:
        verdict, _ = judged(network(1), network(2))
        assert any("reordered units are found up to" in limit for limit in verdict.limits)
