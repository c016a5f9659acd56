"""Training of the zoo: optimisers are those of PyTorch, seeds decide, groups do not mix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embedder.errors import ArchitectureError
from embedder.zoo.copies import head_of
from embedder.zoo.data import Task, task_named
from embedder.zoo.designs import Config
from embedder.zoo.nets import Array, forward, new_start
from embedder.zoo.recipes import VARIANTS, Recipe, draw_examples, variants_of
from embedder.zoo.training import Layout, Trained, from_table, to_table, train

CONFIG = Config("mlp", 64, 10, (12,))
CNN = Config("cnn", 1, 10, (4, 4), norm="batch")
PLAIN = Recipe("textures8", 3, steps=40, rate=0.01, size=200)


def task() -> Task:
    return task_named("textures8")


def trained(*recipes: Recipe, config: Config = CONFIG, **options: object) -> Trained:
    starts = [new_start(config, seed) for seed in range(len(recipes))]
    return train(config, starts, recipes, task(), **options)  # type: ignore[arg-type]


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_optimiser_is_that_of_pytorch(optimiser: str, decay: float) -> None:
    recipe = replace(PLAIN, optimiser=optimiser, decay=decay)
    ours = trained(recipe).models[0]
    theirs = by_pytorch(recipe)
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], atol=2e-5, err_msg=name)


def by_pytorch(recipe: Recipe) -> dict[str, Array]:
    """Train the same network with PyTorch's own modules and optimisers."""
    module = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    start = new_start(CONFIG, 0)
    module.load_state_dict({name: torch.from_numpy(values) for name, values in start.items()})
    weights = [p for p in module.parameters() if p.dim() > 1]
    biases = [p for p in module.parameters() if p.dim() == 1]
    parts: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.decay},
        {"params": biases},
    ]
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "adam":
        optimiser = torch.optim.AdamW(parts, lr=recipe.rate, weight_decay=0)
    else:
        # Decoupled decay is not that of SGD, so it is done by hand below.
        optimiser = torch.optim.SGD([*weights, *biases], lr=recipe.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 1 - 0.9 * s / recipe.steps)
    examples = draw_examples(recipe, task())
    for order in examples.order:
        rows = examples.rows[order]
        x = torch.from_numpy(task().train[rows]).flatten(1)
        loss = nn.functional.cross_entropy(module(x), torch.from_numpy(examples.labels[rows]))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.optimiser == "sgd":
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1 - schedule.get_last_lr()[0] * recipe.decay)
        optimiser.step()
        schedule.step()
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("config", [CONFIG, CNN], ids=["mlp", "cnn"])
def test_a_group_gives_the_same_bits_each_time(config: Config) -> None:
    recipes = (replace(PLAIN, dropout=0.2), replace(PLAIN, seed=4, augment=0.5))
    first, again = (trained(*recipes, config=config) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first.models, again.models, strict=True))


def test_a_network_does_not_depend_on_its_neighbours() -> None:
    other = replace(PLAIN, seed=9, optimiser="sgd", rate=0.05, label_noise=0.3)
    alone, together = trained(PLAIN).models[0], trained(PLAIN, other).models[0]
    for name in alone:
        np.testing.assert_allclose(alone[name], together[name], atol=1e-5)


def test_another_seed_or_another_start_gives_another_network() -> None:
    first = trained(PLAIN).models[0]
    assert not same(first, trained(replace(PLAIN, seed=4)).models[0])
    start = new_start(CONFIG, 1)
    assert not same(first, train(CONFIG, [start], [PLAIN], task()).models[0])


def test_training_learns() -> None:
    found = trained(replace(PLAIN, steps=200)).models
    table = to_table(CONFIG, found)
    x = torch.from_numpy(task().test)[None]
    with torch.no_grad():
        guesses = forward(CONFIG, Layout(CONFIG).views(table), x).argmax(-1)[0]
    # Of ten classes; 900 guesses at chance stay below .13 with probability .999.
    assert (guesses.numpy() == task().test_labels).mean() > 0.2


def test_what_is_frozen_stays_and_the_rest_moves() -> None:
    start = new_start(CONFIG, 0)
    body = frozenset(start) - frozenset(head_of(CONFIG))
    found = trained(PLAIN, frozen=body).models[0]
    assert {name for name in start if np.array_equal(start[name], found[name])} == body


def test_a_low_rank_training_adds_steps_of_that_rank_to_matrices_alone() -> None:
    start = new_start(CONFIG, 0)
    found = trained(PLAIN, rank=2).models[0]
    for name in start:
        step = found[name].astype(np.float64) - start[name]
        if step.ndim == 1:
            assert np.array_equal(found[name], start[name])
        else:
            values = np.linalg.svd(step, compute_uv=False)
            assert values[1] > 0.01
            assert values[2] < 1e-5


def test_a_diverged_network_is_told_and_keeps_finite_weights() -> None:
    wild = replace(PLAIN, optimiser="sgd", rate=1e6)
    found = trained(PLAIN, wild)
    assert found.diverged.tolist() == [False, True]
    assert all(np.isfinite(values).all() for values in found.models[1].values())
    assert all(np.abs(values).max() < 10 for values in found.models[0].values())


def test_a_snapshot_is_what_a_shorter_look_would_have_seen() -> None:
    found = trained(PLAIN, snapshots=[1, 40])
    assert sorted(found.snapshots) == [1, 40]
    assert same(found.snapshots[40][0], found.models[0])
    assert not same(found.snapshots[1][0], found.models[0])


def test_a_teacher_that_gives_the_labels_is_no_other_than_the_labels() -> None:
    certain = np.eye(10, dtype=np.float32)[task().train_labels][None]
    taught, plain = trained(PLAIN, teacher=certain).models[0], trained(PLAIN).models[0]
    for name in plain:
        np.testing.assert_allclose(taught[name], plain[name], atol=1e-4)


def test_running_statistics_are_remembered_also_where_the_body_is_frozen() -> None:
    start = new_start(CNN, 0)
    body = frozenset(start) - frozenset(head_of(CNN))
    found = trained(PLAIN, config=CNN, frozen=body).models[0]
    moved = {name for name in start if not np.array_equal(start[name], found[name])}
    statistics = {name for name in start if "running" in name}
    assert moved == statistics | set(head_of(CNN))


def test_recipes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one task, number of steps"):
        trained(PLAIN, replace(PLAIN, steps=50))


def test_a_start_of_another_design_is_refused() -> None:
    start = new_start(replace(CONFIG, widths=(13,)), 0)
    with pytest.raises(ArchitectureError, match=r"0\.weight"):
        train(CONFIG, [start], [PLAIN], task())


def test_a_table_gives_the_weights_back() -> None:
    models = [new_start(CNN, seed) for seed in range(3)]
    back = from_table(CNN, to_table(CNN, models))
    assert all(same(a, b) for a, b in zip(models, back, strict=True))


# ------------------------------------------------------------------ examples

recipes = st.builds(
    Recipe,
    task=st.just("textures8"),
    seed=st.integers(0, 2**31 - 1),
    steps=st.just(4),
    size=st.integers(20, 900),
    label_noise=st.sampled_from([0.0, 0.1, 0.4]),
    imbalance=st.sampled_from([0.05, 0.5, 1.0]),
    augment=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(recipes)
@settings(deadline=None, max_examples=40)
def test_wrong_labels_are_as_many_as_asked_and_never_the_true_one(recipe: Recipe) -> None:
    examples = draw_examples(recipe, task())
    true, given_ = task().train_labels[examples.rows], examples.labels[examples.rows]
    assert np.array_equal(true != given_, examples.wrong)
    assert examples.wrong.sum() == round(recipe.label_noise * len(examples.rows))
    assert given_.max() < 10


@given(recipes)
@settings(deadline=None, max_examples=40)
def test_examples_are_drawn_once_and_batches_come_from_them(recipe: Recipe) -> None:
    examples = draw_examples(recipe, task())
    assert len(np.unique(examples.rows)) == len(examples.rows) <= recipe.size
    assert examples.order.max() < len(examples.rows)
    changed = float((examples.variants > 0).mean())
    assert abs(changed - recipe.augment) <= 0.25


@given(recipes)
@settings(deadline=None, max_examples=20)
def test_rare_classes_are_rare(recipe: Recipe) -> None:
    rows = draw_examples(replace(recipe, size=2000, imbalance=0.05), task()).rows
    counts = np.bincount(task().train_labels[rows], minlength=10)
    assert counts[9] < 0.25 * counts[0]


@pytest.mark.parametrize("name", ["textures8", "sounds", "library-code"])
def test_the_first_copy_of_an_example_is_the_example(name: str) -> None:
    found = variants_of(task_named(name))
    np.testing.assert_array_equal(found[0], task_named(name).train)
    assert len(found) == (1 if name == "library-code" else VARIANTS)


def test_a_shift_moves_pictures_by_a_place() -> None:
    found = variants_of(task())
    shifts: list[Callable[[Array], Array]] = [
        lambda x: np.roll(x, 1, 1),
        lambda x: np.roll(x, -1, 1),
    ]
    for number, shift in enumerate(shifts, 1):
        np.testing.assert_array_equal(found[number], shift(task().train))
