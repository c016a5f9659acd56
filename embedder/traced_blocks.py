"""Attention and gated maps in a graph, where each of their matrices was noted as a linear map.

Where the units of a linear map are cut into heads and channels, heads are followed on from there.
In the end those maps whose heads met as in attention become one step, and the units of each are its
heads, with their channels. All other units that were cut keep their places. Two maps of which one
was activated and multiplied with the other become one step with the map that reads the product.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from embedder.followed import Label, Trail, Value
from embedder.noted import NotedAxes
from embedder.steps import Op, Step

_READ = ("query", "key", "value")
Steps = dict[int, Step]
"""Number → step, which names units by their numbers."""
Maps = Mapping[str, int]
"""Role → number of the step that stood for it."""


@dataclass
class TracedBlocks(NotedAxes):
    """Heads that units were cut into, the maps that read what heads saw, and gated products."""

    _writers: dict[int, int] = field(default_factory=dict)
    """Units → number of the linear map that made them."""
    _heads: dict[int, int] = field(default_factory=dict)
    """Units of a map → its heads."""
    _groups: dict[int, int] = field(default_factory=dict)
    """Heads of queries → heads of the keys that so many of them share."""
    _parts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Units of a joint map → its queries, keys and values."""
    _by_head: set[int] = field(default_factory=set)
    """Joint maps that hold query, key and value of each head in turn."""
    _thirds: dict[int, int] = field(default_factory=dict)
    """Units that stand for an axis along which queries, keys and values lie → their joint map."""
    _seen: dict[int, Trail] = field(default_factory=dict)
    """Number of the step that reads what heads saw → where that comes from."""
    _opened: dict[int, Trail] = field(default_factory=dict)
    """Number of the step that reads a gated product → the units of gate and map."""
    _leaks: set[int] = field(default_factory=set)
    """Units of maps that something else reads, too: their channels have a basis of their own."""
    _gone: set[int] = field(default_factory=set)
    """Units that have become heads, or heads that have become groups of heads."""

    @property
    def cut_for_nothing(self) -> bool:
        """Whether, in the end, some units were cut and have not become heads."""
        return bool(self._heads.keys() - self._gone)

    def cut(self, units: int, heads: int) -> Label:
        """Return the heads that the units of a map are cut into, which have no scale."""
        if units not in self._heads:
            self._heads[units] = self.new_units(heads)
            self.fix(Value({-1: Label(self._heads[units])}))
        found = Label(self._heads[units])
        if self.size(found) != heads:  # they are cut in two ways
            self.keep(Value({-1: found, -2: Label(units)}))
        return found

    def thirds(self, units: int, *, by_head: bool) -> Label:
        """Return what lies along an axis of queries, keys and values that a joint map is cut into.

        `by_head` says whether each head has such an axis of its own.
        """
        found = self.new_units(len(_READ), named=True)
        self._thirds[found] = units
        if by_head:
            self._by_head.add(units)
        return Label(found)

    def is_thirds(self, label: Label | None, units: int) -> bool:
        """Say whether queries, keys and values of a joint map lie along an axis."""
        return label is not None and self._thirds.get(label.units) == units

    def part(self, units: int, place: int, *, by_head: bool) -> int:
        """Return the queries, keys or values of a joint map; they have its heads, if it has some.

        `by_head` says whether they are cut from each of its heads.
        """
        if units not in self._parts:
            size = self.size(Label(units)) // len(_READ)
            self._parts[units] = tuple(self.new_units(size) for _ in _READ)
        part = self._parts[units][place]
        if units in self._heads:
            self._heads[part] = self._heads[units]
        if by_head:
            self._by_head.add(units)
        return part

    def channels_of(self, units: int) -> int | None:
        """Return the channels of each head that units are cut into; None if they are not."""
        heads = self._heads.get(units)
        return None if heads is None else self.size(Label(units)) // self.size(Label(heads))

    def grouped(self, one: Value, other: Value) -> Value:
        """Return a value with its heads in groups, if so many of them meet each head of another."""
        labels, cut = dict(one.labels), set(self._heads.values())
        for place in one.labels.keys() & other.labels.keys():
            query, key = one.labels[place], other.labels[place]
            several = key.before == 1 and key.inner == self.size(query) // self.size(key)
            if query == Label(query.units) and several and {query.units, key.units} <= cut:
                if query.units in self._groups:
                    self.join(self._groups[query.units], key.units)
                if key.inner != 1:
                    self._groups[query.units], labels[place] = key.units, key
        return replace(one, labels=labels)

    def reads(self, number: int, trail: Trail | None) -> None:
        """Note that a step reads what heads saw, or a gated product, if its trail says so."""
        if trail is not None and trail.gated:
            self._opened[number] = trail
        elif trail is not None and len(trail.maps) == len(_READ):
            self._seen[number] = trail

    def use_trail(self, trail: Trail, result: Value) -> None:
        """Note that a node with a result reads a value with a trail, and where this leads."""
        scored = len(trail.maps) == 2 and not trail.gated  # which no basis of channels changes
        follows = result.trail is not None and set(trail.maps) <= set(result.trail.maps)
        number = -1 if result.single is None else self._writers.get(result.single, -1)
        read = trail in (self._seen.get(number), self._opened.get(number))
        if not (scored or follows or read or result.single in self._parts.get(trail.maps[0], ())):
            self._leaks.update(trail.maps)

    def in_blocks(self, steps: Steps, normed: Iterable[int]) -> Steps:
        """Return the steps with attention and gated maps in place of what they were noted as.

        Args:
            steps: What was noted.
            normed: Numbers of steps that a batch norm follows.
        """
        free = {
            number
            for number, step in steps.items()
            if step.op is Op.LINEAR and all(self.times(n) == 1 for n in step.tensors.values())
        } - set(normed)
        writers = {int(steps[number].target): number for number in free}
        for units, parts in self._parts.items():
            writers |= dict.fromkeys(parts, writers[units]) if units in writers else {}
        made = dict(steps)
        for maps in self._attentions(steps, free, writers):
            self._give_heads(steps, maps)
            made[maps["output"]] = self._attention(steps, maps)
            for number in {maps[role] for role in _READ}:
                del made[number]
        for maps in self._gated(steps, free, writers):
            gate, up, output = (steps[maps[role]] for role in ("gate", "up", "output"))
            tensors = {role: steps[maps[role]].tensors["weight"] for role in maps}
            step = replace(output, op=Op.GATED, source=up.source, inside=output.source)
            made[maps["output"]] = replace(step, tensors=tensors)
            self._lie(int(gate.target))
            del made[maps["gate"]], made[maps["up"]]
        return made

    def _attentions(self, steps: Steps, free: set[int], writers: Mapping[int, int]) -> list[Maps]:
        """Return the maps of each attention; units that were cut for nothing are kept."""
        left: list[Maps] = []
        for number, trail in self._seen.items():
            if number in free and all(units in writers for units in trail.maps):
                maps = (writers[units] for units in trail.maps)
                left.append({**dict(zip(_READ, maps, strict=True)), "output": number})
        while True:
            found = [maps for maps in left if self._is_attention(steps, maps)]
            taken = {units for maps in found for units in self._seen[maps["output"]].maps}
            for units in set(self._heads) - taken - set(self._parts):
                self.keep(Value({-1: Label(units), -2: Label(self._heads[units])}))
            for units, parts in self._parts.items():
                if not taken.issuperset(parts):
                    kept = (units, *parts, self._heads.get(units, units))
                    self.keep(Value({-n: Label(other) for n, other in enumerate(kept, 1)}))
            if len(found) == len(left):
                return found
            left = found

    def _is_attention(self, steps: Steps, maps: Maps) -> bool:
        """Say whether four maps are query, key, value and output of the same heads."""
        parts = self._seen[maps["output"]].maps
        joint = next((units for units, own in self._parts.items() if own == parts), None)
        targets = list(parts) if joint is None else [*parts, joint]
        cut = [units for units in targets if units in self._heads]
        if any(units not in self._heads for units in parts) or len(set(parts)) < len(parts):
            return False
        if joint is None and len({maps[role] for role in _READ}) < len(_READ):
            return False
        roots = {self.find(self._root_heads(units)) for units in cut}
        grouped = [[self._heads[u]] for u in parts if self._heads[u] in self._groups]
        return (
            len(roots) == len({self.channels_of(units) for units in parts}) == 1
            and not any(self.units[root].named for root in roots)
            and not self._leaks & {parts[-1], joint}
            and self._is_read_by(steps, roots, maps["output"])
            and all(self._is_read_by(steps, {units}) for units in targets)
            and all(self._is_alone(units) for units in [*grouped, *([u] for u in targets)])
            and self._is_one(steps, maps)
        )

    def _root_heads(self, units: int) -> int:
        """Return the heads of a map, of queries those of the keys that they share."""
        return self._groups.get(self._heads[units], self._heads[units])

    def _gated(self, steps: Steps, free: set[int], writers: Mapping[int, int]) -> list[Maps]:
        """Return the maps of each gated map; none of them may have a bias."""
        found: list[Maps] = []
        for number, trail in self._opened.items():
            numbers = [*(writers.get(units, -1) for units in trail.maps), number]
            maps = dict(zip(("gate", "up", "output"), numbers, strict=True))
            if (
                free.issuperset(numbers)
                and trail.maps[-1] not in self._leaks
                and self._is_read_by(steps, {self.find(trail.maps[0])}, number)
                and self._is_alone(trail.maps)
                and not any("bias" in steps[place].tensors for place in numbers)
                and self._is_one(steps, maps)
            ):
                found.append(maps)
        return found

    def _is_read_by(self, steps: Steps, roots: set[int], *numbers: int) -> bool:
        """Say whether these steps and no others read units."""
        return {n for n, s in steps.items() if self.find(int(s.source)) in roots} == set(numbers)

    def _is_alone(self, units: Sequence[int]) -> bool:
        """Say whether units have no meaning and were joined with each other alone."""
        root = self.find(units[0])
        same = {other for other in range(len(self.units)) if self.find(other) == root}
        return same == set(units) and not self.units[root].named

    def _is_one(self, steps: Steps, maps: Maps) -> bool:
        """Say whether maps of one source lie alike, with the one that reads what they give."""
        sources = {self.find(int(steps[n].source)) for role, n in maps.items() if role != "output"}
        return len(sources) == len({steps[number].turned for number in maps.values()}) == 1

    def _attention(self, steps: Steps, maps: Maps) -> Step:
        """Return the step that stands for four maps, or for two of which one is joint."""
        first, last, trail = steps[maps["query"]], steps[maps["output"]], self._seen[maps["output"]]
        joint = maps["query"] == maps["key"]
        roles = {"joint": maps["query"], "output": maps["output"]} if joint else maps
        tensors = {}
        for role, number in roles.items():
            given = steps[number].tensors
            tensors[role] = given["weight"]
            if "bias" in given:
                tensors[f"{role}_bias"] = given["bias"]
        step = replace(last, op=Op.ATTENTION, source=first.source, inside=last.source)
        by_head = int(first.target) in self._by_head
        fixed = not trail.plain or bool(self._leaks & set(trail.maps))
        return replace(step, tensors=tensors, fixed=fixed, by_head=by_head)

    def _give_heads(self, steps: Steps, maps: Maps) -> None:
        """Describe what runs over the units of the maps as heads with their channels."""
        for role, part in zip(_READ, self._seen[maps["output"]].maps, strict=True):
            units, heads = int(steps[maps[role]].target), self._root_heads(part)
            inner = self.size(Label(part)) // self.size(Label(heads))
            label = Label(heads, inner=inner)
            if units != part and units in self._by_head:
                label = replace(label, inner=len(_READ) * inner)
            elif units != part:
                label = replace(label, before=len(_READ))
            self._lie(units, label)
            self._gone |= {units, part}
            if self._heads[part] != heads:
                self._gone.add(self._heads[part])
        self._lie(int(steps[maps["output"]].source), read=True)

    def _lie(self, units: int, label: Label | None = None, *, read: bool = False) -> None:
        """Say how axes lie over units, and over none that were joined with them, without a scale.

        Args:
            units: The units.
            label: How they lie; as they do by default.
            read: Whether it is the axes that read them; else those that write them.
        """
        for drafts in self.axes.values():
            for draft in drafts:
                if draft and draft.label.units == units and (draft.power < 0) == read:
                    draft.label, draft.power = label or draft.label, 0
