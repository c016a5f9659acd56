"""Groups of models that are the same file, the same tensors, or the same weights."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from index.catalogue import Entry
from lineage.comparison import compare_models
from lineage.known import Known
from lineage.verdict import Relation

_LIKE = 0.97
_SHARED = 0.5
"""What a candidate must have in common for its weights to be compared: an inner product of the
vectors, or a share of its values in tensors of equal size and norm."""


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are duplicates of each other.

    Args:
        kind: `identical-file`, `same-tensors` or `same-weights`.
        models: Their names, sorted.
    """

    kind: Relation
    models: tuple[str, ...]


def find_duplicates(known: Known) -> list[Group]:
    """Return all groups of duplicates in a catalogue.

    Groups are complete and nested: a same-tensors group holds all members of its identical-file
    groups, a same-weights group all of both. A group equal to a narrower one is left out.
    """
    entries = list(known.catalogue.entries())
    files = _grouped((entry.sha256 or f"#{entry.id}", entry.name) for entry in entries)
    tensors = _grouped((entry.content, entry.name) for entry in entries)
    groups = [Group(Relation.IDENTICAL_FILE, names) for names in files]
    taken = {group.models for group in groups}
    for names in tensors:
        if names not in taken:
            groups.append(Group(Relation.SAME_TENSORS, names))
    taken = {group.models for group in groups}
    for names in _same_weights(entries, known):
        if names not in taken:
            groups.append(Group(Relation.SAME_WEIGHTS, names))
    return groups


def _grouped(keyed: Iterable[tuple[Hashable, str]]) -> list[tuple[str, ...]]:
    """Return the names that share a key, as sorted groups of two or more, in order."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for key, name in keyed:
        groups[key].append(name)
    return sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1)


def _same_weights(entries: Sequence[Entry], known: Known) -> list[tuple[str, ...]]:
    """Return groups of models whose contents are equal once layout, type and scales are undone."""
    of_content: dict[bytes, Entry] = {entry.content: entry for entry in reversed(entries)}
    group_of = {content: content for content in of_content}

    def root(content: bytes) -> bytes:
        while group_of[content] != content:
            content = group_of[content]
        return content

    by_id = {entry.id: entry for entry in entries}
    for content, entry in of_content.items():
        model = known.model(entry)
        for candidate in known.candidates(model.fingerprint):
            other = by_id.get(candidate.model)
            if other is None or root(other.content) == root(content):
                continue
            if candidate.cosine < _LIKE and candidate.shared < _SHARED:
                continue
            found = compare_models(model, known.model(other), known)
            if found.relation in (Relation.SAME_WEIGHTS, Relation.SAME_TENSORS):
                group_of[root(other.content)] = root(content)
    return _grouped((root(entry.content), entry.name) for entry in entries)
