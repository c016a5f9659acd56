"""What the identity coder learns, and that it computes what it was trained to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedder.evaluating import Task, cosines, score
from embedder.families import Relative
from embedder.identity import (
    CHANNEL_PARTS,
    DIMENSION,
    FEATURES,
    PAIR_PARTS,
    PARTS,
    STREAMS,
    IdentityCoder,
    Tokens,
    unit_rows,
    untrained,
)
from embedder.matching import (
    KEPT,
    MATCHED,
    MOST,
    agreement,
    evidence,
    of_pieces,
    packed,
    reranked,
    turned,
    unpacked,
)
from embedder.training import (
    IdentityNetwork,
    Member,
    Settings,
    batch_of,
    contrastive_loss,
    discriminating,
    train_identity,
)
from embedder.unit_codes import root_of_moment

NONE = Tokens(np.zeros((0, 64), np.float32), np.zeros(0, bool))
LOUD = 12
"""Directions of a code in which all models are much alike, and training moves them."""


def parts_of(codes: np.ndarray) -> dict[str, Tokens]:
    """Return units of the first layer, and nothing else."""
    pairs = Tokens(np.zeros((0, 128), np.float32), np.zeros(0, bool))
    every = (*PARTS, *CHANNEL_PARTS)
    found = {part: pairs if part in PAIR_PARTS else NONE for part in every}
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    even = np.zeros(len(codes), bool)
    return {**found, "first read": Tokens((codes / lengths).astype(np.float32), even)}


def population(families: int, seed: int, units: int = 24) -> list[Member]:
    """Return families of three whose codes vary, and move, mostly in a few directions."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(64) < LOUD, 1.5, 0.25)
    members = []
    for family in range(families):
        base = rng.normal(size=(units, 64)) * scale
        for step in range(3):
            moved = base + step * 0.8 * rng.normal(size=base.shape) * scale**2
            name = f"{seed}-{family}"
            twins = f"{seed}-{family // 2}"
            members.append(Member(name, "", twins, 3.0 + step, parts_of(rng.permutation(moved))))
    return members


def rows_of(codes: np.ndarray) -> Tokens:
    """Return the codes of units, of unit length."""
    return Tokens(unit_rows(codes), np.zeros(len(codes), bool))


def with_stream(member: Member, rows: np.ndarray) -> Member:
    """Return a model that has a residual stream too."""
    stream = Tokens(rows.astype(np.float32), np.zeros(len(rows), bool))
    return replace(member, tokens={**member.tokens, STREAMS: stream})


@pytest.fixture(scope="module")
def trained() -> IdentityCoder:
    torch.set_num_threads(1)
    return train_identity(population(120, 1), Settings(steps=30, families=40))


def recall(coder: IdentityCoder, members: list[Member]) -> float:
    """Return how often the second child of a family is nearest to its base."""
    codes = np.array([coder.code_of(member.tokens) for member in members])
    scores = cosines(codes[2::3], codes[::3])
    return float((scores.argmax(axis=1) == np.arange(len(scores))).mean())


class TestTraining:
    def test_families_that_were_not_seen_are_told_better(self, trained: IdentityCoder) -> None:
        unseen = population(150, 2)
        closed = train_identity(population(120, 1), Settings(steps=0))
        before, first, after = (recall(coder, unseen) for coder in (untrained(), closed, trained))
        assert before < 0.7 < first
        assert after > before + 0.25

    def test_a_seed_gives_the_same_coder_and_another_one_another(
        self, trained: IdentityCoder
    ) -> None:
        again = train_identity(population(120, 1), Settings(steps=30, families=40))
        other = train_identity(population(120, 1), Settings(steps=30, families=40, seed=1))
        assert again.version == trained.version
        assert other.version != trained.version

    def test_the_network_computes_what_the_coder_does(self, trained: IdentityCoder) -> None:
        rng = np.random.default_rng(0)
        members = [with_stream(member, rng.normal(size=(64, 64))) for member in population(5, 3)]
        with torch.no_grad():
            batch = IdentityNetwork(trained)(batch_of(members)).numpy()
        alone = np.array([trained.code_of(member.tokens) for member in members])
        np.testing.assert_allclose(batch, alone, atol=2e-5)

    def test_a_batch_gives_what_each_gives_alone(self, trained: IdentityCoder) -> None:
        members = population(4, 4)
        network = IdentityNetwork(trained)
        with torch.no_grad():
            together = network(batch_of(members))
            alone = torch.cat([network(batch_of([member])) for member in members])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    def test_one_family_is_too_few(self) -> None:
        with pytest.raises(ValueError, match="at least two families"):
            train_identity(population(1, 1), Settings(steps=1))


class TestLoss:
    def test_it_falls_as_relatives_come_near(self) -> None:
        family = torch.tensor([0, 0, 1, 1])
        near = torch.nn.functional.normalize(
            torch.tensor([[1, 0.1], [1, -0.1], [0.1, 1], [-0.1, 1.0]]), dim=1
        )
        far = near[[0, 2, 1, 3]]
        none = torch.full((4,), -1)
        assert contrastive_loss(near, family, none) < 0.1 < contrastive_loss(far, family, none)

    def test_a_common_start_counts_in_neither_role(self) -> None:
        codes = torch.nn.functional.normalize(torch.randn(6, 8), dim=1).requires_grad_()
        family = torch.tensor([0, 0, 1, 1, 2, 2])
        start = torch.tensor([5, 5, 5, 5, -1, -1])
        # Families 0 and 1 share a start, so that moving one changes nothing for the other.
        contrastive_loss(codes[:4], family[:4], start[:4]).backward()  # type: ignore[no-untyped-call]
        assert codes.grad is not None
        assert codes.grad[:4].abs().max() < 1e-6  # the only relative is the only one left to score
        kept = contrastive_loss(codes, family, start)
        assert kept > 0


def test_a_discriminating_projection_drops_what_changes_within_families() -> None:
    rng = np.random.default_rng(0)
    between = rng.normal(size=(200, 300))
    rows = np.repeat(between, 3, axis=0)
    rows[:, 40:] = rng.normal(size=(600, 260)) * 3
    projection = discriminating(rows.astype(np.float32), [str(n) for n in np.arange(600) // 3])
    assert projection.shape == (DIMENSION, 300)
    share = np.square(projection[:, :40]).sum() / np.square(projection).sum()
    assert share > 2 * 40 / 300  # by chance 40 of 300 features would have 40/300


class TestCoder:
    def test_a_saved_coder_is_the_same(self, trained: IdentityCoder, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        save_file(dict(trained.arrays), tmp_path / "coder.safetensors")
        assert IdentityCoder.load(tmp_path / "coder.safetensors").version == trained.version

    @pytest.mark.parametrize("wrong", ["text", "older"])
    def test_another_file_is_refused(self, wrong: str, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        from embedder.errors import MalformedError

        path = tmp_path / "coder.safetensors"
        if wrong == "text":
            path.write_text("no encoder")
        else:
            save_file({"projection": np.zeros((4, 4), np.float32)}, path)
        with pytest.raises(MalformedError, match=r"holds no encoder|of another version"):
            IdentityCoder.load(path)

    def test_each_part_has_its_place(self) -> None:
        coder = untrained()
        assert coder.arrays["projection"].shape == (DIMENSION, FEATURES * len(PARTS))


class TestMatching:
    def test_reordered_units_pair_off_and_strangers_do_not(self, trained: IdentityCoder) -> None:
        base, child, grandchild, stranger, *_ = (
            turned(member.tokens, trained) for member in population(2, 5)
        )
        itself, near, far, none = (
            np.nanmean(agreement(base, other)) for other in (base, child, grandchild, stranger)
        )
        assert itself == pytest.approx(1, abs=1e-5)
        assert near > far > none

    def test_a_rotated_stream_is_the_same_and_another_is_not(self) -> None:
        rng = np.random.default_rng(1)
        (member, *_) = population(1, 7)
        rows, other = rng.normal(size=(2, 20, 64))
        rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
        base, copy, stranger = (
            turned(with_stream(member, root_of_moment(codes)[0]).tokens, untrained())
            for codes in (rows, 3 * rotation @ rows, other)
        )
        assert agreement(base, copy)[-1] == pytest.approx(1, abs=1e-5)
        assert agreement(base, stranger)[-1] < 0.5

    def test_channels_pair_off_in_any_order_and_enter_no_code(self) -> None:
        rng = np.random.default_rng(1)
        (member, *_) = population(1, 7)
        codes = rng.normal(size=(2, 20, 64)).astype(np.float32)
        order = rng.permutation(20)
        plain, copy = (
            dict(member.tokens, **dict(zip(CHANNEL_PARTS, map(rows_of, codes[:, at]), strict=True)))
            for at in (np.arange(20), order)
        )
        shown = agreement(turned(plain, untrained()), turned(copy, untrained()))
        assert shown[5:7] == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(
            untrained().code_of(plain), untrained().code_of(member.tokens)
        )

    def test_one_part_that_stands_out_is_enough(self) -> None:
        rng = np.random.default_rng(2)
        shown = rng.normal(0.4, 0.02, size=(50, 8))
        shown[7, 3], shown[:, 7] = 0.6, np.nan
        assert evidence(shown).argmax() == 7

    def test_of_too_many_units_the_same_are_matched_in_any_order(self) -> None:
        units = np.random.default_rng(3).normal(size=(MOST + 90, 64))
        one, other = (turned(parts_of(codes), untrained()) for codes in (units, units[::-1]))
        assert len(one["first read"].even) == MOST
        assert agreement(one, other)[0] == pytest.approx(1, abs=1e-5)

    def test_of_too_many_flipped_units_the_same_are_kept(self) -> None:
        rng = np.random.default_rng(3)
        codes = unit_rows(rng.normal(size=(MOST, 64))).astype(np.float32)
        flipped = codes * rng.choice(np.array([-1, 1], np.float32), (MOST, 1))
        one, other = (
            turned(
                {**parts_of(codes), "first read": Tokens(some, np.ones(MOST, bool))}, untrained()
            )
            for some in (codes, flipped[::-1])
        )
        shown = agreement(unpacked(packed(one)), unpacked(packed(other)))
        assert shown[0] == pytest.approx(1, abs=1e-3)

    def test_pieces_of_a_large_model_give_what_the_whole_does(self) -> None:
        units = np.random.default_rng(4).normal(size=(3 * MOST, 64))
        whole = turned(parts_of(units), untrained())
        pieces = (turned(parts_of(some), untrained()) for some in np.array_split(units, 7))
        assert agreement(of_pieces(pieces), whole)[0] == pytest.approx(1, abs=1e-5)

    @given(counts=st.lists(st.integers(0, 2 * KEPT), min_size=7, max_size=7), stream=st.booleans())
    def test_what_a_catalogue_keeps_pairs_off_with_the_model(
        self, counts: list[int], stream: bool
    ) -> None:
        rng = np.random.default_rng(sum(counts))
        sizes = dict(zip(MATCHED, [*counts, int(stream)], strict=True))
        units = {
            part: Tokens(
                unit_rows(rng.normal(size=(size, 4096 if part == STREAMS else 64))).astype("f4"),
                rng.random(size) < 0.5,
            )
            for part, size in sizes.items()
        }
        body = packed(units)
        kept = unpacked(body)
        assert [len(kept[part].even) for part in MATCHED] == [min(n, KEPT) for n in sizes.values()]
        assert len(body) <= 16 + 7 * KEPT * 65 + 4097
        shown = agreement(units, kept)
        assert np.isnan(shown).tolist() == [size == 0 for size in sizes.values()]
        assert np.nanmin(shown, initial=1) > 0.999
        assert packed(kept) == body

    @given(st.binary(max_size=300))
    def test_other_bytes_are_no_units(self, body: bytes) -> None:
        try:
            kept = unpacked(body)
        except ValueError:
            return
        assert len(packed(kept)) == len(body)

    def test_ranking_anew_moves_only_the_best(self, trained: IdentityCoder) -> None:
        parts = [turned(member.tokens, trained) for member in population(4, 6)]
        scores = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 10)).astype(np.float32)
        found = reranked(scores, parts[:2], parts[2:], count=3)
        for before, after in zip(scores, found, strict=True):
            best = np.argsort(-before)[:3]
            rest = np.setdiff1d(np.arange(10), best)
            assert after[best].min() > after[rest].max()
            np.testing.assert_array_equal(after[rest], before[rest])


class TestScore:
    def relatives(self, drifts: list[float]) -> Task:
        def relative(name: str, drift: float) -> Relative:
            row = {"id": name, "kind": "mlp", "recipe_group": "r", "family": name, "role": "base"}
            return Relative(row, Member(name, "", "", 0, {}), drift)

        queries = [relative(f"q{n}", drift) for n, drift in enumerate(drifts)]
        return Task(queries, [relative(n, 0) for n in "abc"], np.array([0, 1, 2, 0][: len(drifts)]))

    def test_recall_is_told_by_drift(self) -> None:
        task = self.relatives([0.1, 0.2, 0.7])
        scores = np.array([[3, 2, 1], [3, 2, 1], [1, 2, 3]], np.float32)
        cells = {(cell.group, cell.low): cell for cell in score(task, scores)}
        assert (cells["all", 0.0].first, cells["all", 0.0].queries) == (0.5, 2)
        assert cells["all", 0.0].twins == 0.5
        assert (cells["mlp", 0.6].first, cells["mlp", 0.6].ten) == (1.0, 1.0)

    def test_a_tie_and_a_number_that_is_none_are_no_answers(self) -> None:
        task = self.relatives([0.1, 0.1])
        scores = np.array([[1, 1, 1], [np.nan, np.nan, 0]], np.float32)
        (cell,) = [cell for cell in score(task, scores) if cell.group == "all"]
        assert (cell.first, cell.twins) == (0, 0)
