"""Families of the zoo: descent is as written down, and copies are what they are called."""

import re
from itertools import combinations

import numpy as np
import pytest

from embedder.zoo.copies import MERGES, OPERATIONS, head_of, merged
from embedder.zoo.growing import log_spaced
from embedder.zoo.labels import NAMES
from embedder.zoo.member import Member, drift_between
from embedder.zoo.nets import shapes_of
from embedder.zoo.plan import SIZES, fold_of, jobs_of, one_factor_apart, populations
from embedder.zoo.recipes import Recipe
from lineage.verdict import Relation
from zoo_made import members_of

# A perceptron, a convolutional net with batch norm, a transformer with a gated product: between
# them they allow every operation but flips.
FAMILIES = ("f000", "f006", "f008")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> dict[str, Member]:
    """Return the members of a job by their identifiers."""
    return {member.id: member for member in members_of(request.param)}


def same(a: Member, b: Member, names: tuple[str, ...] = ()) -> bool:
    chosen = names or tuple(a.weights)
    return all(np.array_equal(a.weights[name], b.weights[name]) for name in chosen)


def test_parents_come_before_their_children(family: dict[str, Member]) -> None:
    order = list(family)
    for place, member in enumerate(family.values()):
        assert all(parent in order[:place] for parent in member.parents)
        assert member.relation in ({""} if not member.parents else set(Relation)) | {
            Relation.UNRELATED
        }
        assert (member.role in ("child", "copy")) <= bool(member.parents)


def test_every_line_of_descent_ends_at_the_base_that_it_names(family: dict[str, Member]) -> None:
    for member in family.values():
        line = member
        while line.parents and line.role not in ("base", "checkpoint"):
            parent = family[line.parents[0]]
            assert (parent.family, parent.group) == (member.family, member.group)
            assert parent.generation < line.generation
            line = parent
        assert family[line.family].role in ("base", "student")


def test_there_are_chains_and_stars_and_every_kind_of_child(family: dict[str, Member]) -> None:
    assert max(member.generation for member in family.values()) >= 3
    children = [m.parents[0] for m in family.values() if m.role == "child"]
    assert max(children.count(parent) for parent in children) >= 2
    relations = {member.relation for member in family.values()}
    assert relations >= {"fine-tune", "lora", "merge", "unrelated", "same-weights"}
    operations = {re.sub(r"\d+", "#", member.operation) for member in family.values()}
    assert operations >= {"train", "train-on", "train-on-other", "new-head", "distil", "step-#"}


def test_the_distance_to_the_parent_is_what_it_says(family: dict[str, Member]) -> None:
    for member in family.values():
        if member.parents and member.drift is not None and member.relation != "same-weights":
            parent = family[member.parents[0]]
            replaced = member.operation in ("new-head", "train-on-other")
            but = head_of(member.config) if replaced else ()
            assert member.drift == drift_between(parent.weights, member.weights, but=but)
            assert (member.operation == "new-head") <= (member.drift == 0)
            assert member.diverged or member.drift < 20


def test_weights_have_the_shapes_of_their_design(family: dict[str, Member]) -> None:
    for member in family.values():
        shapes = {name: values.shape for name, values in member.weights.items()}
        assert shapes == shapes_of(member.config)
        assert all(np.isfinite(values).all() for values in member.weights.values())


def test_every_member_has_every_label(family: dict[str, Member]) -> None:
    for member in family.values():
        assert list(member.labels) == list(NAMES)
        for name, value in member.labels.items():
            if value is not None and name.endswith(("accuracy", "error")):
                assert 0 <= value <= 1


def test_twins_share_a_recipe_and_only_some_a_start(family: dict[str, Member]) -> None:
    bases = [member for member in family.values() if member.role == "base"]
    for group in {base.group for base in bases}:
        first, other, apart = [base for base in bases if base.group == group]
        assert first.start_seed == apart.start_seed != other.start_seed
        assert len({base.recipe.seed for base in (first, other, apart)}) == 3
        assert {base.recipe.rate for base in (first, other, apart)} == {first.recipe.rate}
        assert not any(same(a, b) for a, b in combinations((first, other, apart), 2))
    starts = {(base.group, base.start_seed) for base in bases}
    assert len({seed for _, seed in starts}) == len(starts)


def test_a_copy_that_keeps_the_function_keeps_every_label(family: dict[str, Member]) -> None:
    keeping = {operation.name for operation in OPERATIONS if operation.keeps}
    for member in family.values():
        if member.operation not in keeping or member.diverged:
            continue
        parent = family[member.parents[0]]
        assert not same(member, parent)
        assert member.drift == 0
        for name, value in member.labels.items():
            expected = parent.labels[name]
            # A guess may turn where two classes are as likely, to float error.
            assert value == expected or abs((value or 0) - (expected or 0)) < 0.02


def test_only_the_head_is_new_where_only_the_head_was_trained(family: dict[str, Member]) -> None:
    for member in family.values():
        if member.operation == "new-head":
            body = set(member.weights) - set(head_of(member.config))
            still = tuple(name for name in body if "running" not in name)
            assert same(member, family[member.parents[0]], still)
            assert not same(member, family[member.parents[0]], head_of(member.config)[:1])


def test_a_student_has_a_start_of_its_own_and_no_parent(family: dict[str, Member]) -> None:
    for member in family.values():
        if member.role == "student":
            assert member.teacher in family
            assert member.parents == ()
            assert member.start_seed != family[member.teacher].start_seed


def test_lora_steps_have_their_rank(family: dict[str, Member]) -> None:
    for member in family.values():
        if member.relation == "lora" and not member.diverged:
            rank = int(member.operation.removeprefix("lora-"))
            parent = family[member.parents[0]]
            for name, values in member.weights.items():
                if values.ndim > 1 and min(values.shape[0], values[0].size) > rank:
                    step = (values - parent.weights[name]).reshape(len(values), -1)
                    found = np.linalg.svd(step.astype(np.float64), compute_uv=False)
                    assert found[rank] <= 1e-4 * max(found[0], 1e-3)


# ------------------------------------------------------------------ single operations


def done_to(name: str, member: Member) -> tuple[Member, Member] | None:
    """Return a member and what an operation makes of it, if its design allows that."""
    (operation,) = [operation for operation in OPERATIONS if operation.name == name]
    changed = operation.change(member, np.random.default_rng(0))
    if changed is None:
        return None
    child = Member(
        "x",
        changed[0],
        changed[1],
        member.recipe,
        member.examples,
        "copy",
        name,
        member.family,
        member.group,
        0,
    )
    return member, child


@pytest.mark.parametrize("operation", [operation.name for operation in OPERATIONS])
@pytest.mark.parametrize("shard", FAMILIES)
def test_an_operation_changes_the_copy_and_not_the_parent(operation: str, shard: str) -> None:
    parent = next(member for member in members_of(shard) if member.role == "base")
    before = {name: values.copy() for name, values in parent.weights.items()}
    pair = done_to(operation, parent)
    assert all(np.array_equal(before[name], parent.weights[name]) for name in before)
    if pair is None:
        # Blocks are repeated, and heads turned, in transformers; signs flip under odd activations.
        assert operation in ("rotate", "drop-block", "repeat-block", "flip")
        return
    shapes = {name: values.shape for name, values in pair[1].weights.items()}
    assert shapes == shapes_of(pair[1].config)
    assert {values.dtype for values in pair[1].weights.values()} == {np.dtype(np.float32)}
    assert set(shapes) != set(before) or any(
        not np.array_equal(before[name], pair[1].weights[name]) for name in before
    )


@pytest.mark.parametrize(("operation", "share"), [("prune-30", 0.3), ("prune-70", 0.7)])
def test_pruning_leaves_as_many_zeros_as_it_says(operation: str, share: float) -> None:
    parent = next(member for member in members_of("f000") if member.role == "base")
    pair = done_to(operation, parent)
    assert pair is not None
    zeros = np.mean(pair[1].weights["0.weight"] == 0)
    assert zeros == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_of_two_equal_children_is_that_child_and_of_none_the_base(kind: str) -> None:
    members = members_of("f000")
    base = next(member for member in members if member.role == "base")
    child = next(member for member in members if member.operation == "train-on")
    rng = np.random.default_rng(1)
    idle = merged(kind, base, (base, base), rng)
    assert all(np.allclose(idle[name], base.weights[name], atol=1e-6) for name in idle)
    if kind in ("linear", "slerp", "task"):
        both = merged(kind, child, (child, child), rng)
        assert all(np.allclose(both[name], child.weights[name], atol=1e-6) for name in both)


# ------------------------------------------------------------------ plans


def test_control_sets_differ_in_one_thing_alone() -> None:
    members = members_of("c00")
    by_factor = {member.factor: member for member in members}
    reference = by_factor.pop("reference")
    assert set(by_factor) == set(one_factor_apart(reference.recipe, np.random.default_rng(0))) - {
        "reference"
    }
    for factor, member in by_factor.items():
        differing = {
            name
            for name in Recipe.__slots__
            if getattr(member.recipe, name) != getattr(reference.recipe, name)
        }
        # Plain descent needs other steps than Adam.
        assert len(differing - {"rate"} if factor == "optimiser" else differing) == (
            factor != "start"
        )
        assert (member.start_seed == reference.start_seed) == (factor != "start")
        assert not same(member, reference)


def test_every_size_has_every_population_and_the_full_one_enough_models() -> None:
    everyone = {population.name for population in populations()}
    for name in ("sample", "slice", "full"):
        jobs = [job for job in jobs_of(SIZES[name], 0) if job.kind == "family"]
        assert {job.population.name for job in jobs} == everyone
    # A job has three bases a recipe and at least as many descendants again, checkpoints aside.
    assert sum(6 * job.recipes for job in jobs) > 12_000


def test_jobs_have_seeds_and_names_of_their_own_and_the_zoo_s_seed_moves_all() -> None:
    for size in SIZES.values():
        jobs, others = jobs_of(size, 0), jobs_of(size, 1)
        assert len({job.name for job in jobs}) == len(jobs)
        assert len({job.seed for job in jobs}) == len(jobs)
        assert not {job.seed for job in jobs} & {job.seed for job in others}


def test_strangers_are_as_many_as_asked() -> None:
    jobs = jobs_of(SIZES["strangers"], 0)
    assert sum(job.recipes for job in jobs) == 16_000
    assert len({job.population.name for job in jobs}) == 1


def test_recipes_are_dealt_evenly() -> None:
    counts = np.bincount([fold_of(f"f{number:03d}/r1") for number in range(1000)], minlength=10)
    # A tenth each; 60 is more than four standard deviations below 100.
    assert counts.min() > 60


@pytest.mark.parametrize("steps", [30, 100, 450])
def test_checkpoints_are_spaced_by_equal_factors(steps: int) -> None:
    found = np.array(log_spaced(steps), dtype=float)
    assert found[0] == 4
    assert found[-1] <= 0.9 * steps
    ratios = found[1:] / found[:-1]
    assert ratios.max() / ratios.min() < 1.6
