"""The JSON forms of CONTRACTS 6 as JSON schemas: every key that is promised, with its type.

More keys are welcome everywhere, so none of them forbids any.
"""

from typing import Any

import jsonschema  # type: ignore[import-untyped]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
NUMBER: Schema = {"type": "number"}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
CHANCE: Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
FACTS: Schema = {"type": "object"}

RELATIONS = [
    "identical-file",
    "same-tensors",
    "same-weights",
    "merge",
    "layer-edit",
    "adapter",
    "lora",
    "fine-tune",
    "part-of",
    "extended",
    "pruned",
    "quantised",
    "perturbed",
    "sibling",
    "same-start",
    "unrelated",
    "cannot-say",
]
"""The words of CONTRACTS 3, in their order."""

LISTED = RELATIONS[: RELATIONS.index("perturbed") + 1]
"""What `parents` and `children` list."""

RELATION: Schema = {"enum": RELATIONS}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def record(**keys: Schema) -> Schema:
    return {"type": "object", "properties": keys, "required": list(keys)}


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def answer(kind: str, **keys: Schema) -> Schema:
    """Return the schema of an answer: its own keys and those that every answer carries."""
    return record(
        schema={"const": f"lineage/{kind}/1"},
        tool_version=TEXT,
        method_version=TEXT,
        catalogue=TEXT,
        limits=TEXTS,
        **keys,
    )


DIRECTION = record(
    answer=one_of("parent→child", "child→parent", "unknown"), confidence=SHARE, reasons=TEXTS
)
RELATIVE = record(
    model=TEXT,
    relation={"enum": LISTED},
    operations=TEXTS,
    agreement=MAYBE_NUMBER,
    distance=MAYBE_NUMBER,
    chance=CHANCE,
    direction=DIRECTION,
    share=MAYBE_NUMBER,
)
STEP = record(relation=RELATION, direction=one_of("known", "unknown"))
DESCENDED = record(model=TEXT, also=TEXTS, observed=FLAG, steps=COUNT, through=TEXT)

SCHEMAS: dict[str, Schema] = {
    "parents": answer("parents", model=TEXT, searched=COUNT, parents=several(RELATIVE)),
    "children": answer("children", model=TEXT, searched=COUNT, children=several(RELATIVE)),
    "compare": answer(
        "compare",
        a=TEXT,
        b=TEXT,
        relation=RELATION,
        related={"type": ["boolean", "null"]},
        operations=TEXTS,
        agreement=MAYBE_NUMBER,
        distance=MAYBE_NUMBER,
        share_of_a=SHARE,
        share_of_b=SHARE,
        chance=CHANCE,
        chance_by=several(record(method=TEXT, p=SHARE, controls=COUNT, extrapolated=FLAG)),
        direction=DIRECTION,
        tensors=several(record(a=TEXT, b=TEXT, shape=several(COUNT))),
    ),
    "verify": answer(
        "verify",
        model=TEXT,
        claims=several(
            record(
                claim=one_of(
                    "base_model",
                    "relation",
                    "quantisation",
                    "adapter_base",
                    "merge_recipe",
                    "derived_from_nothing",
                    "licence",
                ),
                value=TEXT,
                answer=one_of("supported", "refuted", "cannot-say"),
                evidence=FACTS,
            )
        ),
    ),
    "tree": answer(
        "tree",
        nodes=several(record(id=TEXT, name=TEXT, observed=FLAG, also=TEXTS)),
        edges=several(
            record(
                parent=TEXT,
                child=TEXT,
                relation=RELATION,
                direction=one_of("known", "unknown"),
                length=MAYBE_NUMBER,
                support=SHARE,
            )
        ),
    ),
    "duplicates": answer(
        "duplicates",
        groups=several(
            record(
                kind=one_of("identical-file", "same-tensors", "same-weights"),
                models={**TEXTS, "minItems": 2, "uniqueItems": True},
            )
        ),
    ),
    "info": answer(
        "info",
        model=TEXT,
        format=TEXT,
        tensors=COUNT,
        parameters=COUNT,
        bytes=COUNT,
        dtypes={"type": "object", "additionalProperties": COUNT},
        declared=FACTS,
    ),
    "add": answer(
        "add", added=TEXTS, unchanged=TEXTS, failed=several(record(model=TEXT, reason=TEXT))
    ),
    "list": answer(
        "list",
        models=several(record(name=TEXT, format=TEXT, parameters=COUNT, bytes=COUNT, sha256=TEXT)),
    ),
    # Not in CONTRACTS; held to what every answer carries, and to what scripts would look for.
    "ancestors": answer("ancestors", model=TEXT, ancestors=several(DESCENDED)),
    "descendants": answer("descendants", model=TEXT, descendants=several(DESCENDED)),
    "path": answer("path", joined=FLAG, steps=several(STEP)),
    "plan": answer("plan", models=several(record(name=TEXT, format=TEXT, bytes=COUNT))),
    "doctor": answer("doctor", findings=several(record(what=TEXT, state=TEXT, note=TEXT))),
}

PROBLEM = record(type=TEXT, title=TEXT, status=COUNT, detail=TEXT)
"""RFC 9457."""


def check(found: Any, kind: str) -> None:
    """Hold an answer to its schema; `problem` is an error's."""
    schema = PROBLEM if kind == "problem" else SCHEMAS[kind]
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)
