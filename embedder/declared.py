"""What people say of a model: its card, its config, its tokenizer. Never what the weights say."""

import json
from pathlib import Path
from typing import Any

import yaml

_LARGEST_BYTES = 16 << 20
_CARD_KEYS = (
    "base_model",
    "base_model_relation",
    "license",
    "license_name",
    "language",
    "tags",
    "datasets",
    "pipeline_tag",
    "library_name",
)
_CONFIG_KEYS = (
    "model_type",
    "architectures",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "vocab_size",
    "quantization_config",
    "transformers_version",
)
_ADAPTER_KEYS = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules")
_TOKENIZER_KEYS = ("tokenizer_class", "model_max_length", "chat_template")


def folder_facts(folder: Path) -> dict[str, Any]:
    """Return the declared facts of a model's folder, by where they stand.

    The keys are `card`, `config`, `adapter` and `tokenizer`, those that say anything.

    A file that is missing, too large or not what its name says adds nothing: a declaration is
    never needed, and never an error.

    Example:
        >>> folder_facts(Path("/nonexistent"))
        {}
    """
    facts = {
        "card": _chosen(_card(folder / "README.md"), _CARD_KEYS),
        "config": _chosen(_json(folder / "config.json"), _CONFIG_KEYS),
        "adapter": _chosen(_json(folder / "adapter_config.json"), _ADAPTER_KEYS),
        "tokenizer": _chosen(_json(folder / "tokenizer_config.json"), _TOKENIZER_KEYS),
    }
    return {name: found for name, found in facts.items() if found}


def _chosen(found: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: found[key] for key in keys if found.get(key) is not None}


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_BYTES:
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _card(file: Path) -> dict[str, Any]:
    """Return the front matter of a model card: the YAML between two lines of dashes."""
    text = _text(file)
    if not text.startswith("---"):
        return {}
    front = text[3:].partition("\n---")[0]
    try:
        found = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
