"""`lineage train encoder` and `lineage evaluate encoder` as people use them, on a small zoo."""

import json
from pathlib import Path

import pytest

from command import answer_of, lineage
from embedder.function import PROPERTIES, FunctionCoder
from embedder.identity import IdentityCoder


@pytest.fixture(scope="module")
def encoder(zoo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("encoder") / "mine.safetensors"
    done = lineage("train", "encoder", zoo_folder, target, "--steps", "2", "--json")
    assert done.code == 0, done.err
    assert done.answer["version"] == IdentityCoder.load(target).version
    return target


def test_training_writes_an_encoder_and_its_card(encoder: Path) -> None:
    card = json.loads(encoder.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["version"] == IdentityCoder.load(encoder).version
    assert (card["steps"], card["seed"]) == (2, 0)
    assert card["families"] < card["models"]


def test_the_same_seed_trains_the_same_encoder(
    encoder: Path, zoo_folder: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    assert lineage("train", "encoder", zoo_folder, again, "--steps", "2").code == 0
    assert again.read_bytes() == encoder.read_bytes()


EVERY_FOLD = [word for fold in range(10) for word in ("--fold", str(fold))]


def test_every_method_is_asked_the_same(encoder: Path, zoo_folder: Path) -> None:
    answer = answer_of("evaluate", "encoder", zoo_folder, "--encoder", encoder, *EVERY_FOLD)
    asked = {
        (cell["method"], cell["from"]): cell["queries"]
        for cell in answer["recall"]
        if cell["group"] == "all"
    }
    methods = {method for method, _ in asked}
    assert {"encoder", "encoder, matched", "untrained", "flat"} <= methods
    for low in {low for _, low in asked}:
        assert len({asked[method, low] for method in methods}) == 1
    assert (
        0 < sum(n for (method, _), n in asked.items() if method == "flat") <= len(answer["queries"])
    )


def test_predictions_of_others_are_scored(zoo_folder: Path, tmp_path: Path) -> None:
    asked = answer_of("evaluate", "encoder", zoo_folder, "--method", "flat", *EVERY_FOLD)
    families = {
        model: answer_of("zoo", "describe", zoo_folder, model)["made"]["family"]
        for model in asked["queries"]
    }
    assert set(families.values()) <= set(asked["bases"])
    file = tmp_path / "answers.csv"
    rows = [f"{model},{family},1" for model, family in families.items()]
    file.write_text("\n".join(["query,base,score", *rows]), encoding="utf-8")
    done = lineage("evaluate", "encoder", zoo_folder, "--predictions", file, "--json", *EVERY_FOLD)
    assert done.code == 0, done.err
    assert {cell["first"] for cell in done.answer["recall"]} == {1.0}


def test_nothing_held_back_is_said(zoo_folder: Path) -> None:
    folds = {
        answer_of("zoo", "describe", zoo_folder, model["id"])["made"]["fold"]
        for model in answer_of("zoo", "list", zoo_folder)["models"]
    }
    other = min(set(range(10)) - folds)
    done = lineage("evaluate", "encoder", zoo_folder, "--fold", str(other))
    assert done.code == 1
    assert "no model of it was held back" in done.err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n", "needs the columns query, base and score"),
        ("query,base,score\nnobody,nothing,1\n", "line 2"),
    ],
)
def test_predictions_that_cannot_be_read(
    zoo_folder: Path, tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "answers.csv"
    file.write_text(text, encoding="utf-8")
    done = lineage("evaluate", "encoder", zoo_folder, "--predictions", file, *EVERY_FOLD)
    assert done.code == 1
    assert problem in done.err


def test_no_zoo_is_a_clear_error(tmp_path: Path) -> None:
    done = lineage("train", "encoder", tmp_path / "nothing", tmp_path / "out.safetensors")
    assert done.code == 1
    assert "lineage zoo build" in done.err
    assert not list(tmp_path.iterdir())


FUNCTION = ("--code", "function")


@pytest.fixture(scope="module")
def function(zoo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("function") / "mine.safetensors"
    words = ("train", "encoder", zoo_folder, target, *FUNCTION, "--steps", "2", "--json")
    done = lineage(*words)
    assert done.code == 0, done.err
    assert done.answer["schema"] == "lineage/train-function-encoder/1"
    assert done.answer["version"] == FunctionCoder.load(target).version
    return target


def test_training_writes_a_function_encoder_and_its_card(function: Path) -> None:
    card = json.loads(function.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["version"] == FunctionCoder.load(function).version
    assert (card["steps"], card["seed"]) == (2, 0)
    assert card["families"] < card["models"]
    assert set(card["libraries"]) == {"numpy", "torch", "torch-geometric"}
    assert card["settings"]["seed"] == card["encoder"]["seed"] == 0
    names = {path.name for path in function.parent.iterdir()}
    assert names == {"mine.safetensors", "mine.json"}


def test_the_same_seed_trains_the_same_function_encoder(
    function: Path, zoo_folder: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    assert lineage("train", "encoder", zoo_folder, again, *FUNCTION, "--steps", "2").code == 0
    assert again.read_bytes() == function.read_bytes()


def test_a_function_encoder_is_scored_on_all_that_was_measured(
    function: Path, zoo_folder: Path
) -> None:
    words = ("evaluate", "encoder", zoo_folder, *FUNCTION)
    answer = answer_of(*words, "--encoder", function, *EVERY_FOLD)
    assert answer["schema"] == "lineage/evaluate-function-encoder/1"
    assert answer["version"] == FunctionCoder.load(function).version
    scores = {score["property"]: score for score in answer["scores"]}
    assert set(scores) <= {*PROPERTIES, "task"}
    assert {"test_accuracy", "task"} <= set(scores)
    for score in scores.values():
        assert score["models"] >= 1
        assert score["worst_score"] == min(score["kinds"].values(), default=None)
    assert scores["task"]["score"] <= 1
    assert answer_of(*words, *EVERY_FOLD)["version"] != answer["version"]  # the shipped one


def test_an_identity_encoder_is_no_function_encoder(
    encoder: Path, function: Path, zoo_folder: Path
) -> None:
    asked = ("evaluate", "encoder", zoo_folder, "--encoder")
    done = lineage(*asked, encoder, *FUNCTION, *EVERY_FOLD)
    assert done.code == 1
    assert "holds no function encoder; train it anew" in done.err
    done = lineage(*asked, function, *EVERY_FOLD)
    assert done.code == 1
    assert "is an encoder of another version" in done.err


def test_no_other_method_tells_what_was_measured(zoo_folder: Path) -> None:
    done = lineage("evaluate", "encoder", zoo_folder, *FUNCTION, "--method", "flat")
    assert done.code == 2
    assert "for identity codes" in done.err


@pytest.mark.parametrize("code", ["identity", "function"])
def test_what_cannot_be_trained_is_said_before_training(
    code: str, zoo_folder: Path, tmp_path: Path
) -> None:
    asked = ("train", "encoder", zoo_folder)
    done = lineage(*asked, tmp_path / "none" / "mine.safetensors", "--code", code)
    assert done.code == 1
    assert "no such folder; make it first" in done.err
    done = lineage(*asked, tmp_path / "mine.safetensors", "--code", code, *EVERY_FOLD)
    assert done.code == 1
    assert "at least two families with two members" in done.err
    assert not list(tmp_path.iterdir())
