"""Labels of the zoo: each is what its name says, measured by other means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder.zoo.data import TASKS, Task, is_there, task_kind, task_named
from embedder.zoo.designs import Config
from embedder.zoo.labels import (
    EPSILON,
    MOST,
    NAMES,
    Labels,
    calibration_error,
    group_gaps,
    measure,
    shifts_of,
    worst_class,
)
from embedder.zoo.nets import Array, new_start
from embedder.zoo.recipes import Recipe, draw_examples
from embedder.zoo.training import train

CONFIG = Config("mlp", 64, 10, (16,))


def measured(recipe: Recipe, config: Config = CONFIG) -> tuple[Labels, dict[str, Array]]:
    task = task_named(recipe.task)
    found = train(config, [new_start(config, 1)], [recipe], task)
    return measure(config, found.models, found.examples, task)[0], found.models[0]


def number(labels: Labels, name: str) -> float:
    value = labels[name]
    assert value is not None
    return value


def test_accuracies_and_gap_are_those_of_plain_arithmetic() -> None:
    recipe = Recipe("textures8", 1, steps=150, rate=0.01, size=200)
    labels, w = measured(recipe)
    task = task_named("textures8")

    def share(x: Array, wanted: np.ndarray) -> float:
        hidden = np.maximum(x.reshape(len(x), -1) @ w["0.weight"].T + w["0.bias"], 0)
        guesses = (hidden @ w["2.weight"].T + w["2.bias"]).argmax(axis=1)
        return float(np.mean(guesses == wanted))

    rows = draw_examples(recipe, task).rows
    test = share(task.test[:MOST], task.test_labels[:MOST])
    known = share(task.train[rows], task.train_labels[rows])
    assert number(labels, "test_accuracy") == pytest.approx(test, abs=0.004)
    assert number(labels, "train_accuracy") == pytest.approx(known, abs=0.006)
    assert number(labels, "gap") == pytest.approx(known - test, abs=0.01)


def test_a_network_that_fits_wrong_labels_is_seen_to_remember_them() -> None:
    learned = Recipe("textures8", 1, steps=900, rate=0.01, size=60, label_noise=0.4)
    fitted, _ = measured(learned, replace(CONFIG, widths=(64,)))
    unfitted, _ = measured(replace(learned, steps=5))
    assert number(fitted, "memorised") > 0.5
    assert number(unfitted, "memorised") < 0.3
    clean, _ = measured(replace(learned, label_noise=0.0, steps=5))
    assert clean["memorised"] is None


def test_attacks_hurt_more_than_random_steps_of_their_size_and_shifts_hurt() -> None:
    labels, _ = measured(Recipe("textures8", 1, steps=300, rate=0.01, size=900))
    plain, fgsm, pgd = (number(labels, f"{n}_accuracy") for n in ("test", "fgsm", "pgd"))
    assert fgsm < number(labels, "sign_noise_accuracy") - 0.1
    # Several steps find what one overlooks; on 300 examples they differ by a few.
    assert pgd <= fgsm + 0.02
    assert fgsm < plain
    assert number(labels, "rotation_accuracy") < plain


@pytest.mark.parametrize("name", ["textures8", "sounds", "library-code", "digits-grid", "wine"])
def test_a_shift_is_always_the_same_and_leaves_shape_and_neighbours(name: str) -> None:
    task = task_named(name)
    x = task.test[:40]
    before = x.copy()
    for label, change in shifts_of(task).items():
        found = change(x)
        np.testing.assert_array_equal(found, shifts_of(task)[label](x))
        np.testing.assert_array_equal(x, before)
        assert found.shape == x.shape
        assert not np.array_equal(found, x)
        if task.values:
            np.testing.assert_array_equal(found[..., task.values :], x[..., task.values :])


def test_what_cannot_be_measured_is_none() -> None:
    config = Config("transformer", 50, 50, (8,), "gelu", "layer", heads=2, places=16, causal=True)
    labels, _ = measured(Recipe("library-code", 1, steps=3, size=100), config)
    missing = {name for name in NAMES if labels[name] is None}
    assert missing == {
        *("worst_class_accuracy", "memorised", "parity_gap", "opportunity_gap"),
        *("blur_accuracy", "rotation_accuracy", "shift_accuracy"),
        *("fgsm_accuracy", "pgd_accuracy", "sign_noise_accuracy"),
    }


def test_a_network_without_numbers_is_measured_all_the_same() -> None:
    broken = {name: np.full_like(values, np.nan) for name, values in new_start(CONFIG, 1).items()}
    task = task_named("textures8")
    examples = draw_examples(Recipe("textures8", 1), task)
    (labels,) = measure(CONFIG, [broken], [examples], task)
    assert 0 <= number(labels, "test_accuracy") <= 0.3
    assert np.isnan(number(labels, "test_loss"))


# ------------------------------------------------------------------ single labels


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=50))
@settings(deadline=None)
def test_a_calibration_error_is_a_share(pairs: list[tuple[float, bool]]) -> None:
    sure = np.array([pair[0] for pair in pairs], np.float32)
    right = np.array([pair[1] for pair in pairs])
    found = calibration_error(sure, right)
    assert 0 <= found <= 1
    # No model errs by less than its mean confidence does.
    assert found >= abs(float(sure.mean()) - right.mean()) - 1e-5


def test_a_model_as_sure_as_it_is_right_is_calibrated() -> None:
    sure = np.full(10, 0.7, np.float32)
    assert calibration_error(sure, np.arange(10) < 7) == pytest.approx(0, abs=1e-6)
    assert calibration_error(sure, np.arange(10) < 2) == pytest.approx(0.5, abs=1e-6)


def test_the_worst_class_counts_each_class_alone() -> None:
    labels = np.array([0] * 98 + [1] * 2)
    right = np.array([True] * 98 + [False] * 2)
    assert worst_class(right, labels) == 0


def test_gaps_between_groups_are_differences_of_rates() -> None:
    member = np.arange(40) < 20
    labels = np.tile([0, 1], 20)
    guesses = np.where(member, 1, labels)[None]
    task = a_task(labels, member)
    found = group_gaps(guesses, labels, task)
    assert found == {"parity_gap": [0.5], "opportunity_gap": [0.0]}
    assert group_gaps(guesses, labels, replace(task, group=None)) == {}


def test_too_small_a_group_says_nothing() -> None:
    labels = np.tile([0, 1], 20)
    found = group_gaps(labels[None], labels, a_task(labels, np.arange(40) < 3))
    assert found == {"parity_gap": [None], "opportunity_gap": [None]}


def a_task(labels: np.ndarray, member: np.ndarray) -> Task:
    x = np.zeros((len(labels), 1, 2), np.float32)
    return Task("t", "tabular", x, labels, x, labels, 2, group=member, protected="g")


# ------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("name", [name for name in TASKS if is_there(name)])
def test_a_task_is_scaled_finite_and_cut_without_overlap(name: str) -> None:
    task = task_named(name)
    assert task_kind(name) == task.kind
    for x, labels in ((task.train, task.train_labels), (task.test, task.test_labels)):
        assert np.isfinite(x).all()
        assert len(x) == len(labels)
        assert 0 <= labels.min() <= labels.max() < task.classes
    if task.kind in ("vision", "audio"):
        assert float(task.train.mean(dtype=np.float64)) == pytest.approx(0, abs=1e-5)
        assert float(task.train.std(dtype=np.float64)) == pytest.approx(1, abs=1e-4)
    if task.group is not None:
        assert len(task.group) == len(task.test)
        assert 0.2 < task.group.mean() < 0.8
    assert (task.kind in EPSILON) == (task.kind != "language")


def test_neighbours_of_a_graph_are_shares() -> None:
    for name in ("digits-grid", "digits-nearest"):
        task = task_named(name)
        around = task.train[..., task.values :]
        np.testing.assert_allclose(around.sum(axis=2), 1, rtol=1e-5)
        assert (around.diagonal(axis1=1, axis2=2) > 0).all()


def test_predictions_do_not_depend_on_how_many_are_measured_together() -> None:
    task = task_named("textures8")
    models = [new_start(CONFIG, seed) for seed in range(4)]
    examples = [draw_examples(Recipe("textures8", seed), task) for seed in range(4)]
    torch.manual_seed(0)
    together = measure(CONFIG, models, examples, task)
    alone = [measure(CONFIG, [m], [e], task)[0] for m, e in zip(models, examples, strict=True)]
    for a, b in zip(together, alone, strict=True):
        for name in ("test_accuracy", "gap", "fgsm_accuracy"):
            assert number(a, name) == pytest.approx(number(b, name), abs=0.01)
