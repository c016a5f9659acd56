"""Cards and configs that say odd things: a declaration is never needed, and never an error."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import cli
from command import answer_of, lineage

pytestmark = pytest.mark.usefixtures("somewhere")


def folder_with(path: Path, *, card: str = "", config: str = '{"model_type": "x"}') -> Path:
    """Write a model in a folder with a card and a config."""
    path.mkdir()
    weights = {"w": np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(config)
    if card:
        (path / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return path


def declared(path: Path) -> Any:
    """Return what `info` says is declared, after holding `add` and `list` to reading it too."""
    done = lineage("info", path, "--json")
    assert done.code == cli.DONE, done.err
    assert lineage("info", path).code == cli.DONE
    added = answer_of("add", path)
    assert added["added"] == [path.name]
    assert lineage("check").code == cli.DONE

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(done.out, parse_constant=refuse)["declared"]


def test_what_a_card_and_a_config_say_is_told_apart(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "m", card="base_model: org/base\nlicense: mit")
    assert declared(path) == {
        "card": {"base_model": "org/base", "license": "mit"},
        "config": {"model_type": "x"},
    }


def test_a_date_in_a_card_is_text(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "m", card="tags: [2023-01-02]\nlanguage: {2024-05-06: x}")
    assert declared(path)["card"] == {"tags": ["2023-01-02"], "language": {"2024-05-06": "x"}}


def test_numbers_that_json_does_not_have_are_text(tmp_path: Path) -> None:
    config = '{"hidden_size": NaN, "vocab_size": -Infinity, "num_hidden_layers": 3}'
    found = declared(folder_with(tmp_path / "m", config=config, card="tags: [.nan, .inf]"))
    assert found["config"] == {
        "hidden_size": "nan",
        "vocab_size": "-inf",
        "num_hidden_layers": 3,
    }
    assert found["card"]["tags"] == ["nan", "inf"]


@pytest.mark.parametrize("kind", ["refers to itself", "multiplies"])
def test_a_card_that_never_ends_is_left_out_and_named(kind: str, tmp_path: Path) -> None:
    card = "tags: &a [*a]"
    if kind == "multiplies":
        rows = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
        card = "\n".join(["l0: &l0 [x, x, x]", *rows, "tags: *l8"])
    path = folder_with(tmp_path / "m", card=card)
    assert declared(path) == {"config": {"model_type": "x"}}
    limits = answer_of("info", path)["limits"]
    assert limits == ["declared card: endless or too long; left out"]


@pytest.mark.parametrize(
    "card",
    [
        "base_model: [",
        "- a list",
        "just text",
        "!!python/object/apply:os.system [touch ran]",
        "a: b",
    ],
)
def test_a_card_that_says_nothing_adds_nothing(card: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path / "m", card=card)
    assert declared(path) == {"config": {"model_type": "x"}}
    assert not Path("ran").exists()


@pytest.mark.parametrize("config", ["[]", "null", "{", '"text"'])
def test_a_config_that_is_no_table_adds_nothing(config: str, tmp_path: Path) -> None:
    assert declared(folder_with(tmp_path / "m", config=config)) == {}


def test_a_deeply_nested_config_adds_nothing(tmp_path: Path) -> None:
    config = '{"quantization_config": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert declared(folder_with(tmp_path / "m", config=config)) == {}


@pytest.mark.parametrize("form", [[], ["--tsv"], ["--json"], ["-q"]])
def test_what_would_steer_a_terminal_does_not_reach_it(form: list[str], tmp_path: Path) -> None:
    card = 'license: "\\e[31mred\\e[0m [bold]x[/bold] \\a\\b\\x9b2J"'
    path = folder_with(tmp_path / "m\x1b[2J", card=card)
    done = CliRunner().invoke(cli.cli, ["info", str(path), *form], color=True)
    assert done.exit_code == cli.DONE
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout)
    assert form == ["-q"] or "[bold]x[/bold]" in done.stdout
    failed = CliRunner().invoke(cli.cli, ["info", "gone\x1b[2J"], color=True)
    assert "gone\ufffd[2J: no such file" in failed.stderr


@pytest.mark.parametrize(
    "card",
    [
        "base_model: org/base",
        "base_model: [org/a, org/b]",
        "base_model: 5",
        "base_model: {a: b}",
        "base_model: [[x], 5]",
        "base_model_relation: [finetune]",
    ],
)
def test_any_claim_of_a_card_can_be_asked_about(card: str, tmp_path: Path) -> None:
    done = lineage("verify", folder_with(tmp_path / "m", card=card), "--json")
    assert done.code == cli.UNDECIDED
    assert all(claim["answer"] == "cannot-say" for claim in done.answer["claims"])
