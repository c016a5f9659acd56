"""What is said of models that may be kin, though it was not decided."""

from pathlib import Path

import pytest

from catalogue_writer import entry_for, near_code, printed, units_like, units_of, weights_of
from embedder.identity import Tokens
from index.catalogue import Catalogue, open_catalogue
from index.search import AMONG
from lineage.known import Known
from lineage.models import Model
from lineage.relatives import Relatives, find_relatives

BASE = 1000


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """Return a catalogue of strangers, whose codes are as near, and one base."""
    opened = open_catalogue(str(tmp_path / "c"), create=True)
    for seed in (*range(2 * AMONG), BASE):
        keep(opened, f"m{seed}", seed, units_of(seed))
    return opened


def keep(catalogue: Catalogue, name: str, seed: int, units: dict[str, Tokens]) -> None:
    fingerprint = printed(weights_of(seed))
    catalogue.add(entry_for(name, fingerprint), fingerprint, near_code(seed, units))


def relatives(catalogue: Catalogue, noise: float, of: int = BASE) -> Relatives:
    """Return the kin of a model whose units lie so near those of another, and no weight does."""
    code = near_code(5000, units_like(units_of(of), noise, 1))
    model = Model("q", printed(weights_of(5000)), Path("q"), code=code)
    return find_relatives(model, Known(catalogue))


def test_units_that_stand_out_are_a_lead(catalogue: Catalogue) -> None:
    found = relatives(catalogue, 3.0)
    (limit,) = found.limits[1:]
    assert "a lead and no evidence" in limit
    assert limit.endswith(f"not decided: m{BASE}")
    assert found.parents() == found.children() == []


def test_partners_are_more_than_a_lead(catalogue: Catalogue) -> None:
    (limit,) = relatives(catalogue, 0.5).limits[1:]
    assert "find partners as those of relatives do" in limit
    assert limit.endswith(f"not decided: m{BASE}")


def test_a_lead_is_for_who_has_nothing_better(catalogue: Catalogue) -> None:
    query = units_like(units_of(BASE), 3.0, 1)
    keep(catalogue, "copy", 5000, query)  # of itself, and so nothing better
    (limit,) = relatives(catalogue, 3.0).limits[1:]
    assert limit.endswith(f"not decided: m{BASE}")
    keep(catalogue, "partner", 5001, units_like(query, 0.5, 2))
    (limit,) = relatives(catalogue, 3.0).limits[1:]
    assert limit.endswith("not decided: partner")


def test_where_no_kin_is_nobody_is_named(catalogue: Catalogue) -> None:
    assert relatives(catalogue, 3.0, of=2000).limits[1:] == ()
