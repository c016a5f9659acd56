"""`lineage verify`: answers to claims, and the gates that fail on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import save_file

import cli
import schemas
from command import Done, answer_of, lineage
from conftest import Family
from lineage.simulate import new_network

pytestmark = pytest.mark.usefixtures("somewhere")

SUPPORTED = ("legal-int8", "legal")
REFUTED = ("legal", "twin-b")
UNDECIDED = ("legal", "base-a")  # the same family, but not which came first
RELATION = {SUPPORTED: "quantised", REFUTED: "unrelated", UNDECIDED: "fine-tune"}


def verified(pair: tuple[str, str], family: Family, *options: str) -> Done:
    model, parent = (family.file(stem).name for stem in pair)
    known = ("--catalogue", str(family.catalogue))
    return lineage("verify", model, "--parent", parent, "--json", *known, *options)


@pytest.mark.parametrize(
    ("pair", "answer", "code"),
    [
        (SUPPORTED, "supported", cli.DONE),
        (REFUTED, "refuted", cli.GATE),
        (UNDECIDED, "cannot-say", cli.UNDECIDED),
    ],
    ids=lambda value: str(value),
)
def test_each_answer_has_its_evidence_and_its_code(
    pair: tuple[str, str], answer: str, code: int, family: Family
) -> None:
    done = verified(pair, family)
    schemas.check(done.answer, "verify")
    (claim,) = done.answer["claims"]
    assert (claim["claim"], claim["value"]) == ("base_model", family.file(pair[1]).name)
    assert claim["answer"] == answer
    assert claim["evidence"]["relation"] == RELATION[pair]
    assert claim["evidence"]["reason"]
    assert done.code == code
    assert done.err == ""


class TestGates:
    @pytest.mark.parametrize(
        ("pair", "options", "code"),
        [
            # what is named fails, also where it is good news
            (SUPPORTED, "--fail-on supported", cli.GATE),
            (UNDECIDED, "--fail-on cannot-say", cli.GATE),
            (SUPPORTED, "--fail-on quantised", cli.GATE),
            (UNDECIDED, "--fail-on same-weights,fine-tune", cli.GATE),
            # what is not named does not
            (REFUTED, "--fail-on same-weights", cli.DONE),
            (SUPPORTED, "--fail-on same-weights,refuted,cannot-say", cli.DONE),
            # a doubt may be allowed
            (UNDECIDED, "--allow cannot-say", cli.DONE),
            (REFUTED, "--allow cannot-say", cli.GATE),
            # 3 beats 4 and what is allowed
            (UNDECIDED, "--fail-on cannot-say --allow cannot-say", cli.GATE),
        ],
    )
    def test_gates_fail_on_what_they_are_told_to(
        self, pair: tuple[str, str], options: str, code: int, family: Family
    ) -> None:
        done = verified(pair, family, *options.split())
        assert done.code == code
        schemas.check(done.answer, "verify")

    def test_fail_on_same_weights_stops_a_copy_under_another_order(self, family: Family) -> None:
        pair = ("base-reordered", "base-a")
        assert verified(pair, family, "--fail-on", "same-weights").code == cli.GATE
        assert verified(pair, family, "--fail-on", "same-tensors").code == cli.UNDECIDED

    def test_a_failed_gate_beats_a_doubt(self, family: Family) -> None:
        done = lineage(
            *("verify", "legal.safetensors", "--parent", "base-a.safetensors"),
            *("--parent", "twin-b.safetensors", "--json", "--catalogue", family.catalogue),
        )
        assert [claim["answer"] for claim in done.answer["claims"]] == ["cannot-say", "refuted"]
        assert done.code == cli.GATE

    def test_the_report_is_there_for_people_too_when_a_gate_fails(self, family: Family) -> None:
        done = lineage(
            *("verify", "legal.safetensors", "--parent", "twin-b.safetensors"),
            *("--catalogue", family.catalogue),
        )
        assert done.code == cli.GATE
        assert "twin-b.safetensors" in done.out
        assert "refuted" in done.out

    def test_a_model_of_which_nothing_is_claimed_is_undecided(self, family: Family) -> None:
        known = ("verify", "legal.safetensors", "--catalogue", family.catalogue)
        assert lineage(*known).code == cli.UNDECIDED
        assert "name a base with --parent" in lineage(*known).out
        assert lineage(*known, "--allow", "cannot-say").code == cli.DONE


class TestAnswers:
    def test_a_base_that_descends_from_the_model_is_refuted(self, family: Family) -> None:
        done = verified(("base-a", "base-pruned"), family)
        (claim,) = done.answer["claims"]
        assert claim["answer"] == "refuted"
        assert "descendant" in claim["evidence"]["reason"]

    def test_a_base_that_cannot_be_read_leaves_the_claim_open_and_says_what_to_do(
        self, family: Family
    ) -> None:
        done = lineage(
            *("verify", "legal.safetensors", "--parent", "org/unseen", "--json"),
            *("--catalogue", family.catalogue),
        )
        (claim,) = done.answer["claims"]
        assert (claim["answer"], done.code) == ("cannot-say", cli.UNDECIDED)
        assert "org/unseen" in claim["evidence"]["reason"]
        assert claim["evidence"]["next_command"].startswith("lineage add")

    def test_it_works_on_files_without_a_catalogue(self, family: Family) -> None:
        pair = (family.file("legal-int8"), "--parent", family.file("legal"))
        answer = answer_of("verify", *pair)
        assert answer["claims"][0]["answer"] == "supported"
        assert not Path("lineage-catalogue").exists()

    def test_chance_is_corrected_for_the_number_of_claims(self, family: Family) -> None:
        stems = ("base-a", "twin-b")
        claims = [word for stem in stems for word in ("--parent", str(family.file(stem)))]
        both = lineage("verify", family.file("legal"), *claims, "--json").answer["claims"]
        alone = lineage("verify", family.file("legal"), *claims[2:], "--json").answer["claims"]
        one, two = alone[0]["evidence"]["chance"], both[1]["evidence"]["chance"]
        assert two == pytest.approx(1 - (1 - one) ** 2)

    def test_the_claim_of_a_card_is_checked(self, family: Family, tmp_path: Path) -> None:
        for stem, base in (("legal-int8", "legal"), ("twin-b", "base-a")):
            folder = tmp_path / stem
            folder.mkdir()
            shutil.copy(family.file(stem), folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({"model_type": "mlp"}))
            (folder / "README.md").write_text(f"---\nbase_model: {family.file(base).name}\n---\n")
        good = lineage("verify", tmp_path / "legal-int8", "--json", "--catalogue", family.catalogue)
        bad = lineage("verify", tmp_path / "twin-b", "--json", "--catalogue", family.catalogue)
        assert good.answer["claims"][0]["answer"] == "supported"
        assert good.answer["claims"][0]["evidence"]["claimed_by"] == "card"
        assert (bad.answer["claims"][0]["answer"], bad.code) == ("refuted", cli.GATE)

    def test_the_base_that_a_gguf_header_declares_is_a_claim(self, tmp_path: Path) -> None:
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, "some base")
        writer.add_base_model_repo_url(0, "https://huggingface.co/org/base")
        writer.add_tensor("w", np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        done = lineage("verify", tmp_path / "m.gguf", "--json")
        assert [claim["claim"] for claim in done.answer["claims"]] == ["base_model"]

    def test_too_small_a_model_cannot_be_judged(self, tmp_path: Path) -> None:
        for seed in range(2):
            rng = np.random.default_rng(seed)
            weights = {"w": rng.normal(size=(3, 4)).astype(np.float32)}
            save_file(weights, tmp_path / f"{seed}.safetensors")
        pair = (tmp_path / "0.safetensors", "--parent", tmp_path / "1.safetensors")
        done = lineage("verify", *pair, "--json")
        assert done.answer["claims"][0]["answer"] == "cannot-say"
        assert done.code == cli.UNDECIDED

    def test_another_seed_of_the_same_design_is_refuted(self, tmp_path: Path) -> None:
        for seed in range(2):
            weights = new_network(np.random.default_rng(seed))
            save_file(weights, tmp_path / f"{seed}.safetensors")
        pair = (tmp_path / "0.safetensors", "--parent", tmp_path / "1.safetensors")
        done = lineage("verify", *pair, "--json")
        assert done.answer["claims"][0]["answer"] == "refuted"
