"""Training of the function encoder: what it is told, it learns, and the same from the same seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from embedder.encoder import DIMENSION, EncoderConfig
from embedder.encoder_input import graph_data
from embedder.encoder_training import Example, FunctionSettings, draws, train_function
from embedder.function import PROPERTIES, FunctionCoder, Heads
from embedder.graph import weight_graph
from test_embedder_anchors import CHANGES, drawn, mlp

SMALL = EncoderConfig(width=16, rounds=1, heads=2)
FAMILIES = 8


def examples() -> list[Example]:
    """Return families of three: a small network with random weights, and two that moved from it.

    Networks of even families have a small first layer, which makes what they should tell.
    """
    network, rng = mlp("relu"), np.random.default_rng(0)
    found = []
    for family in range(FAMILIES):
        base = drawn(network, family)
        if family % 2:
            base["ab"] = base["ab"] * 5
        for steps in range(3):
            moved = {
                name: values + steps * 0.1 * np.abs(values).mean() * rng.normal(size=values.shape)
                for name, values in base.items()
            }
            found.append(
                Example(
                    family=str(family),
                    start="",
                    twins=str(family // 2),
                    complexity=3.0 + steps,
                    graph=graph_data(weight_graph(moved, network)),
                    values=(float(family % 2), 0.1, float("nan"), 0.0, float(family)),
                    task=("even", "odd")[family % 2],
                )
            )
    return found


EXAMPLES = examples()
GRAPHS = [example.graph for example in EXAMPLES]


@pytest.fixture(scope="module")
def trained() -> FunctionCoder:
    torch.set_num_threads(1)
    return train_function(EXAMPLES, SMALL, FunctionSettings(steps=60, batch=16))


class TestWhatIsLearned:
    def test_relatives_are_nearer_than_strangers(self, trained: FunctionCoder) -> None:
        codes = trained.tell(GRAPHS).codes
        cosines = codes @ codes.T
        family = np.arange(len(codes)) // 3
        same = (family[:, None] == family[None, :]) & ~np.eye(len(codes), dtype=bool)
        assert cosines[same].min() > cosines[family[:, None] != family[None, :]].mean() + 0.1
        nearest = np.where(np.eye(len(codes), dtype=bool), -1, cosines).argmax(axis=1)
        assert (family[nearest] == family).mean() > 0.9

    def test_heads_tell_what_was_measured(self, trained: FunctionCoder) -> None:
        told = trained.tell(GRAPHS)
        assert told.tasks == [example.task for example in EXAMPLES]
        wanted = np.array([example.values[0] for example in EXAMPLES])
        assert np.abs(told.values[:, 0] - wanted).mean() < 0.25
        assert np.isfinite(told.values).all()

    def test_the_batch_does_not_matter(self, trained: FunctionCoder) -> None:
        together, alone = trained.tell(GRAPHS), trained.tell(GRAPHS, batch=1)
        np.testing.assert_allclose(together.codes, alone.codes, atol=1e-5)
        assert together.tasks == alone.tasks

    @pytest.mark.parametrize("change", ["permuted", "rescaled"])
    def test_no_symmetry_changes_a_code_after_training_either(
        self, trained: FunctionCoder, change: str
    ) -> None:
        network = mlp("relu")
        for seed in range(FAMILIES):
            weights = drawn(network, seed)
            other = CHANGES[change](weights, network, np.random.default_rng(seed))
            moved = trained.encoder.code(weights, network) - trained.encoder.code(other, network)
            assert np.linalg.norm(moved) < 1e-5


class TestReproduction:
    def test_a_seed_gives_the_same_encoder_and_another_seed_another(self) -> None:
        versions = [
            train_function(EXAMPLES, SMALL, FunctionSettings(seed=seed, steps=3)).version
            for seed in (4, 4, 5)
        ]
        assert versions[0] == versions[1] != versions[2]

    def test_training_leaves_the_random_state_alone(self) -> None:
        torch.manual_seed(1)
        wanted = torch.rand(1)
        torch.manual_seed(1)
        train_function(EXAMPLES, SMALL, FunctionSettings(steps=1))
        assert torch.equal(torch.rand(1), wanted)


class TestDraws:
    def test_simple_models_come_first(self) -> None:
        seen: dict[bool, list[float]] = {}
        for curriculum in (True, False):
            settings = FunctionSettings(steps=40, batch=16, curriculum=curriculum)
            batches = list(draws(EXAMPLES, settings))
            means = [np.mean([e.complexity for e in batch]) for batch in batches]
            seen[curriculum] = [float(np.mean(means[:10])), float(np.mean(means[-10:]))]
        assert seen[True][0] < seen[True][1] - 0.2
        assert abs(seen[False][0] - seen[False][1]) < 0.2

    def test_other_seeds_of_a_recipe_are_in_the_same_batch(self) -> None:
        for batch in draws(EXAMPLES, FunctionSettings(steps=20, batch=4)):
            families = {example.family for example in batch}
            for twins in {example.twins for example in batch}:
                assert {e.family for e in EXAMPLES if e.twins == twins} <= families

    def test_every_recipe_comes_once_before_any_comes_again(self) -> None:
        batches = list(draws(EXAMPLES, FunctionSettings(steps=8, batch=4)))
        for start in (0, 4):
            recipes = [e.twins for batch in batches[start : start + 4] for e in batch]
            assert {recipes.count(twins) for twins in recipes} == {4}
            assert len(set(recipes)) == FAMILIES // 2

    def test_too_few_families_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least two families with two members"):
            train_function(EXAMPLES[:3], SMALL, FunctionSettings(steps=1))
        with pytest.raises(ValueError, match="at least two families with two members"):
            train_function([], SMALL, FunctionSettings(steps=1))


class TestHeads:
    def heads(self) -> Heads:
        torch.manual_seed(0)
        return Heads(("even", "odd"), torch.zeros(5), torch.ones(5))

    def test_what_was_not_measured_has_no_say(self) -> None:
        heads = self.heads()
        codes = nn.functional.normalize(torch.randn(3, DIMENSION), dim=1)
        known = EXAMPLES[:3]
        blank = [replace(e, values=(float("nan"),) * len(PROPERTIES)) for e in known]
        heads.loss(codes, blank).backward()  # type: ignore[no-untyped-call]
        reached = {
            name
            for name, values in heads.named_parameters()
            if values.grad is not None and values.grad.any()
        }
        assert {name.partition(".")[0] for name in reached} == {"task", "log_variance"}

    def test_what_cannot_be_told_weighs_less(self) -> None:
        """The variance of a property that is noise grows above that of one that is known."""
        heads, rng = self.heads(), np.random.default_rng(0)
        optimiser = torch.optim.Adam(heads.parameters(), lr=1e-2)
        direction = rng.normal(size=DIMENSION)
        for _ in range(150):
            raw = rng.normal(size=(24, DIMENSION))
            unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
            batch = [
                replace(e, values=(float(c @ direction), float(rng.normal()), 0.0, 0.0, 0.0))
                for e, c in zip(EXAMPLES, unit, strict=True)
            ]
            loss = heads.loss(torch.tensor(unit, dtype=torch.float32), batch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        assert heads.log_variance[1] > heads.log_variance[0] + 0.3
