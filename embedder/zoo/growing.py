"""Makes one job: trains its networks, lets them have descendants, measures them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from embedder.zoo import copies
from embedder.zoo.data import Task, task_named
from embedder.zoo.designs import Config
from embedder.zoo.labels import measure
from embedder.zoo.member import Member, drift_between
from embedder.zoo.nets import Array, forward, new_start
from embedder.zoo.plan import Job, draw_further, draw_recipe, new_seed, one_factor_apart
from embedder.zoo.recipes import Recipe
from embedder.zoo.training import Layout, to_table, train

AT_ONCE = 32
"""Networks that are measured together: 64 convolutional ones took 1.8 GB."""

# Descendants for each recipe of a job.
_SHARES = {
    "same": 0.75,
    "other": 0.5,
    "head": 0.25,
    "lora": 0.375,
    "student": 0.25,
    "other-again": 0.375,
    "same-again": 0.25,
    "back": 0.25,
    "copy": 2.25,
    "merge": 0.3,
}


@dataclass(frozen=True, slots=True)
class _Start:
    """A random start: its seed, law and scale."""

    seed: int
    law: str
    scale: float

    def weights(self, config: Config) -> dict[str, Array]:
        return new_start(config, self.seed, law=self.law, scale=self.scale)


def _new_start(rng: np.random.Generator) -> _Start:
    law = str(rng.choice(["uniform", "normal"]))
    return _Start(new_seed(rng), law, float(np.exp(rng.uniform(-0.5, 0.5))))


def make(job: Job) -> list[Member]:
    """Make all networks of a job, with their labels.

    The same job gives the same bits on one kind of machine with one number of threads.

    Raises:
        MissingExtraError: A package that holds the data is not installed.
        NotFoundError: The task's archive was not fetched.
    """
    grown = _Growing(job, np.random.default_rng(job.seed))
    {"family": grown.family, "controls": grown.controls, "strangers": grown.strangers}[job.kind]()
    label(grown.members)
    return grown.members


def label(members: Sequence[Member]) -> None:
    """Measure members, those of one design and task together."""

    def alike(member: Member) -> str:
        return f"{member.config} {member.recipe.task}"

    for _, found in groupby(sorted(members, key=alike), key=alike):
        together = list(found)
        for start in range(0, len(together), AT_ONCE):
            some = together[start : start + AT_ONCE]
            task = task_named(some[0].recipe.task)
            weights, examples = [m.weights for m in some], [m.examples for m in some]
            for member, labels in zip(
                some, measure(some[0].config, weights, examples, task), strict=True
            ):
                member.labels = labels


def log_spaced(steps: int, count: int = 7) -> list[int]:
    """Return steps at which a training is looked at, from 4 to nine tenths.

    Example:
        >>> log_spaced(300)
        [4, 8, 16, 32, 66, 133, 270]
    """
    return sorted({int(step) for step in np.geomspace(4, 0.9 * steps, count)})


@dataclass(slots=True)
class _Growing:
    """The members of a job as they are made."""

    job: Job
    rng: np.random.Generator
    members: list[Member] = field(default_factory=list)

    def _id(self) -> str:
        return f"{self.job.name}-{len(self.members):03d}"

    def _share(self, what: str) -> int:
        return max(1, round(_SHARES[what] * self.job.recipes))

    # -------------------------------------------------------------- from a random start

    def _found(
        self,
        starts: Sequence[_Start],
        recipes: Sequence[Recipe],
        groups: Sequence[str],
        *,
        role: str,
        factors: Sequence[str] = (),
        followed: Sequence[int] = (),
    ) -> list[Member]:
        """Train from random starts; keep checkpoints of the networks at the followed places."""
        config = self.job.population.config
        steps = log_spaced(recipes[0].steps) if followed else []
        first = [start.weights(config) for start in starts]
        task = task_named(recipes[0].task)
        done = train(config, first, recipes, task, snapshots=steps)
        found = []
        for place, (start, recipe, group) in enumerate(zip(starts, recipes, groups, strict=True)):
            member = Member(
                "",
                config,
                done.models[place],
                recipe,
                done.examples[place],
                role,
                "train",
                "",
                f"{self.job.name}/{group}",
                start.seed,
                start.law,
                start.scale,
                diverged=bool(done.diverged[place]),
                factor=factors[place] if factors else "",
            )
            earlier = [done.snapshots[s][place] for s in steps] if place in followed else []
            found.append(self._settle(member, earlier, steps))
        return found

    def _settle(
        self, member: Member, earlier: Sequence[dict[str, Array]], steps: Sequence[int]
    ) -> Member:
        """Name a member, and its checkpoints before it, each the parent of the next."""
        member.family = f"{self.job.name}-{len(self.members) + len(earlier):03d}"
        line: list[Member] = []
        for step, weights in zip(steps, earlier, strict=False):
            line.append(replace(member, weights=weights, role="checkpoint", diverged=False))
            line[-1].operation = f"step-{step}"
        for before, after in zip([None, *line], [*line, member], strict=True):
            after.id = self._id()
            if before:
                after.parents, after.relation = (before.id,), "fine-tune"
                after.drift = drift_between(before.weights, after.weights)
            self.members.append(after)
        return member

    def _steps(self, choices: Sequence[float]) -> int:
        """Return a number of steps for a group, a multiple of the usual number."""
        return round(self.job.population.steps * float(self.rng.choice(choices)))

    def family(self) -> None:
        """Make bases, three a recipe, and their descendants.

        The second of a recipe is its twin with another seed, the third has the start of the first
        and other data: trained apart from one start.
        """
        steps = self._steps((0.5, 1, 1.5))
        starts: list[_Start] = []
        recipes: list[Recipe] = []
        groups: list[str] = []
        for number in range(self.job.recipes):
            recipe = draw_recipe(self.job.population, steps, self.rng)
            start = _new_start(self.rng)
            starts += [start, replace(start, seed=new_seed(self.rng)), start]
            recipes += [recipe, *(replace(recipe, seed=new_seed(self.rng)) for _ in range(2))]
            groups += [f"r{number}"] * 3
        followed = range(0, len(starts), 12)
        bases = self._found(starts, recipes, groups, role="base", followed=followed)
        self._descend(bases)

    def controls(self) -> None:
        """Make sets of networks that differ from a reference in one thing alone."""
        starts: list[_Start] = []
        recipes: list[Recipe] = []
        groups: list[str] = []
        factors: list[str] = []
        population = self.job.population
        for number in range(self.job.recipes):
            size = min(400, population.most)
            reference = Recipe(
                population.task,
                new_seed(self.rng),
                population.steps,
                rate=population.rate,
                size=size,
            )
            start = _Start(new_seed(self.rng), "uniform", 1.0)
            for factor, recipe in one_factor_apart(reference, self.rng).items():
                other = replace(start, seed=new_seed(self.rng))
                starts.append(other if factor == "start" else start)
                recipes.append(recipe)
                factors.append(factor)
                groups.append(f"r{number}")
        self._found(starts, recipes, groups, role="control", factors=factors)

    def strangers(self) -> None:
        """Make networks of one recipe that share nothing but design and task."""
        population = self.job.population
        number = self.job.recipes
        seeds = [new_seed(self.rng) for _ in range(2 * number)]
        starts = [_Start(seed, "uniform", 1.0) for seed in seeds[:number]]
        plain = Recipe(population.task, 0, population.steps, rate=population.rate, size=400)
        recipes = [replace(plain, seed=seed) for seed in seeds[number:]]
        self._found(starts, recipes, ["r0"] * number, role="stranger")

    # -------------------------------------------------------------- descendants

    def _descend(self, bases: Sequence[Member]) -> None:
        """Let the bases have children, these children, and all of them copies."""
        sound = [member for member in bases if not member.diverged]
        if not sound:
            return
        same, other = self.job.population.task, self.job.population.other
        star = [sound[0]] * min(3, self._share("same"))
        parents = [*star, *self._some(sound, self._share("same") - len(star))]
        near = self._trained_on(parents, same, "train-on")
        far = self._trained_on(self._some(sound, self._share("other")), other, "train-on-other")
        head = "head-only" if sound[0].config.causal else "new-head"
        self._trained_on(self._some(sound, self._share("head")), other, head, body=False)
        rank = int(self.rng.choice([1, 2, 4]))
        lora = self._some(sound, self._share("lora"))
        self._trained_on(lora, same, f"lora-{rank}", relation="lora", rank=rank)
        self._students(self._some(sound, self._share("student")))
        again = self._some(far, self._share("other-again"))
        far_again = self._trained_on(again, other, "train-on")
        self._trained_on(self._some(near, self._share("same-again")), same, "train-on")
        back = self._some(far_again, self._share("back"))
        self._trained_on(back, same, "train-on-other")
        for kind in range(self._share("merge")):
            self._merge(copies.MERGES[(self.job.seed + kind) % len(copies.MERGES)], star[0], near)
        for turn in range(self._share("copy")):
            self._copy(self.job.seed + turn)

    def _some(self, members: Sequence[Member], count: int) -> list[Member]:
        """Return members drawn at random, none twice if there are enough; the diverged never."""
        sound = [member for member in members if not member.diverged]
        if not sound:
            return []
        chosen = self.rng.choice(len(sound), count, replace=count > len(sound))
        return [sound[place] for place in chosen]

    def _trained_on(
        self,
        parents: Sequence[Member],
        task: str,
        operation: str,
        *,
        relation: str = "fine-tune",
        rank: int = 0,
        body: bool = True,
    ) -> list[Member]:
        """Train parents of one design further together.

        The head is drawn anew where the task is another one, except in a language model, which
        has the same tokens; without `body`, only the head is trained.
        """
        if not parents:
            return []
        population = self.job.population
        config = _design_for(task, parents[0], self.job)
        replaced = task != parents[0].recipe.task and not config.causal
        starts = [
            _with_head(p, config, new_seed(self.rng)) if replaced else p.weights for p in parents
        ]
        steps = self._steps((0.3, 0.6, 1))
        recipes = [draw_further(population, task, steps, self.rng) for _ in parents]
        head = copies.head_of(config)
        frozen = frozenset() if body else frozenset(starts[0]) - frozenset(head)
        done = train(config, starts, recipes, task_named(task), frozen=frozen, rank=rank)
        found = []
        for place, parent in enumerate(parents):
            child = replace(
                parent,
                config=config,
                weights=done.models[place],
                recipe=recipes[place],
                examples=done.examples[place],
                diverged=bool(done.diverged[place]),
            )
            self._add(child, (parent,), operation, relation)
            if replaced:
                child.drift = drift_between(parent.weights, child.weights, but=head)
            found.append(child)
        return found

    def _add(
        self,
        child: Member,
        parents: Sequence[Member],
        operation: str,
        relation: str,
        *,
        role: str = "child",
    ) -> None:
        """Name a child and write down from whom it descends."""
        child.id, child.role, child.operation, child.relation = (
            self._id(),
            role,
            operation,
            relation,
        )
        child.parents = tuple(parent.id for parent in parents)
        child.generation = max(parent.generation for parent in parents) + 1
        child.drift = drift_between(parents[0].weights, child.weights)
        self.members.append(child)

    def _students(self, teachers: Sequence[Member]) -> None:
        """Train networks from starts of their own on the answers of teachers (distillation).

        Not language models: the answers for all windows would take gigabytes.
        """
        if not teachers or teachers[0].config.causal:
            return
        population = self.job.population
        starts = [_new_start(self.rng) for _ in teachers]
        plain = [replace(t.recipe, label_noise=0.0, optimiser="adam") for t in teachers]
        rates = [replace(r, seed=new_seed(self.rng), rate=population.rate) for r in plain]
        config = population.config
        task = task_named(population.task)
        first = [start.weights(config) for start in starts]
        done = train(config, first, rates, task, teacher=_answers(config, teachers, task))
        for place, (teacher, start) in enumerate(zip(teachers, starts, strict=True)):
            student = replace(
                teacher,
                id=self._id(),
                weights=done.models[place],
                recipe=rates[place],
                examples=done.examples[place],
                role="student",
                operation="distil",
                relation="unrelated",
                parents=(),
                teacher=teacher.id,
                start_seed=start.seed,
                start_law=start.law,
                start_scale=start.scale,
                drift=None,
                diverged=bool(done.diverged[place]),
            )
            student.family = student.id
            self.members.append(student)

    def _merge(self, kind: str, base: Member, children: Sequence[Member]) -> None:
        """Merge two children of a base."""
        pair = [c for c in children if c.parents == (base.id,) and not c.diverged]
        if len(pair) < 2:
            return
        chosen = self.rng.choice(len(pair), 2, replace=False)
        parents = [pair[place] for place in chosen]
        child = replace(parents[0], weights=copies.merged(kind, base, parents, self.rng))
        whole = (*parents, base) if kind in ("task", "ties", "dare") else parents
        self._add(child, whole, f"merge-{kind}", "merge", role="copy")

    def _copy(self, turn: int) -> None:
        """Do the next operation that the design allows to a member, three in ten times a copy."""
        copied = [member for member in self.members if member.role == "copy"]
        trained = [m for m in self.members if m.role in ("base", "child")]
        parent = self._some(copied if copied and self.rng.random() < 0.3 else trained, 1)[0]
        for operation in _from(turn):
            changed = operation.change(parent, self.rng)
            if changed is not None:
                break
        config, weights = changed or (parent.config, parent.weights)
        child = replace(parent, config=config, weights=weights)
        self._add(child, (parent,), operation.name, operation.relation, role="copy")
        if operation.keeps:
            child.drift = 0.0
        elif operation.relation == "layer-edit":
            child.drift = None


def _design_for(task: str, parent: Member, job: Job) -> Config:
    """Return the design of a parent with as many classes as a task has."""
    population = job.population
    other = task == population.other and not parent.config.causal
    classes = population.other_classes if other else population.config.classes
    return replace(parent.config, classes=classes)


def _with_head(parent: Member, config: Config, seed: int) -> dict[str, Array]:
    """Return the weights of a parent with the head of a design, drawn anew."""
    fresh = new_start(config, seed)
    return {**parent.weights, **{name: fresh[name] for name in copies.head_of(config)}}


def _from(turn: int) -> Iterator[copies.Operation]:
    """Yield all operations, beginning with the one whose turn it is."""
    count = len(copies.OPERATIONS)
    for place in range(count):
        yield copies.OPERATIONS[(turn + place) % count]


def _answers(config: Config, teachers: Sequence[Member], task: Task) -> NDArray[np.float32]:
    """Return the probabilities that each teacher gives, (K, n, classes)."""
    table = to_table(config, [teacher.weights for teacher in teachers])
    weights = Layout(config).views(table)
    parts = []
    with torch.no_grad():
        # A thousand examples at once for all teachers is as much as the training takes.
        for start in range(0, len(task.train), 1000):
            x = torch.from_numpy(task.train[start : start + 1000]).to(table.device)
            logits = forward(config, weights, x[None].expand(len(table), *x.shape))
            parts.append(logits.softmax(dim=-1).cpu().numpy())
    return np.concatenate(parts, axis=1)
