"""The JSON Schema of sweep files, for editors that complete and check."""

from __future__ import annotations

from typing import get_args

from fpt.backbones import BACKBONES
from fpt.config import TrainSet, TrialConfig
from fpt.spec import JSON
from fpt.tasks import TASKS
from sweep.sweepfile.classes import models, names_of
from sweep.sweepfile.fields import FieldNames
from sweep.sweepfile.schema import BUILT_IN, NAMED, OBJECTS, SweepFile


def json_schema(spec: SweepFile | None = None) -> JSON:
    """Return the JSON Schema of sweep files, by which editors complete and check them.

    It is made of the models that also judge a file. What it cannot say (that an axis exists, that
    two points differ) it leaves open.

    Args:
        spec: A file whose own classes the schema is to know, with their fields.
    """
    named = names_of(spec) if spec is not None else {}
    of_file = models(named)
    schema = SweepFile.model_json_schema()
    trial = TrialConfig.model_json_schema()
    definitions: JSON = schema["$defs"] | trial.pop("$defs")
    own = {
        name: model
        for of_field in of_file.values()
        for name, model in of_field.items()
        if name not in TASKS and name not in BACKBONES
    }
    for name, model in own.items():
        definition = model.model_json_schema(ref_template=f"#/$defs/{name}/$defs/{{model}}")
        definition["properties"]["name"] = {"const": name}
        definition["properties"]["label"] = {"type": ["string", "number"]}
        definitions[name] = definition
    for definition in (*definitions.values(), trial):
        if definition.get("title") not in {"TableSpec", "ClaimSpec", "TuneSpec"}:
            definition.pop("required", None)  # A trial's fields are given piece by piece.
    definitions["TuneSpec"]["additionalProperties"] = {"$ref": "#/$defs/RangeSpec"}
    definitions["BackboneConfig"]["properties"]["size"] = {
        "enum": list(dict.fromkeys(size for row in BACKBONES.values() for size in row.sizes)),
        "description": "A named size, in place of layers, width and heads.",
    }
    backbones = dict.fromkeys((*BACKBONES, *named.get("backbone", ())))
    definitions["BackboneConfig"]["properties"]["name"]["enum"] = list(backbones)

    fields: dict[str, JSON] = trial["properties"]
    for name, words in (("task", TASKS), ("backbone", BACKBONES)):
        known = dict.fromkeys((*words, *named.get(name, ())))
        refs = [one.__name__ for one in OBJECTS[name]]
        refs += [one for one in of_file.get(name, ()) if one in own]
        fields[name] = {
            "description": fields[name].get("description", ""),
            "anyOf": [
                {"enum": list(known)},
                *({"$ref": f"#/$defs/{ref}"} for ref in refs),
            ],
        }
    fields["pretraining"]["anyOf"] = [{"enum": list(BUILT_IN)}, {"type": "string"}]
    groups = {"enum": [*get_args(TrainSet), "fpt", "all"]}
    fields["train"]["anyOf"] = [groups, {"type": "array", "items": groups}]
    for name in ("pretraining", "train"):
        fields[name].pop("type", None)

    field_names = FieldNames(of_file)
    dotted: dict[str, JSON] = {
        f"{name}.{inner}": {} for name in OBJECTS for inner in field_names.all_under(name)
    }
    definitions["Fields"] = {
        "type": "object",
        "description": "Fields of a trial, by name or by dotted path.",
        "properties": fields | dotted,
        "additionalProperties": False,
    }
    labelled = {
        "type": "object",
        "description": "Several fields under one label.",
        "properties": {"label": {"type": ["string", "number"]}} | fields | dotted,
        "required": ["label"],
        "additionalProperties": False,
    }
    definitions["LabelledPoint"] = labelled
    either = {"$ref": "#/$defs/LabelledPoint"}

    def axis(point: JSON) -> JSON:
        return {"type": "array", "minItems": 1, "items": {"anyOf": [point, either]}}

    definitions["Axes"] = {
        "type": "object",
        "properties": {name: axis(field) for name, field in fields.items()}
        | {name: axis({}) for name in dotted},
        "additionalProperties": {"type": "array", "minItems": 1, "items": either},
    }
    # A task or backbone as a point of its own axis may carry a label.
    for name in NAMED:
        for one in OBJECTS[name]:
            definitions[one.__name__]["properties"]["label"] = {"type": ["string", "number"]}

    ref = "#/$defs/"
    place = {"type": "string", "minLength": 1}
    conditions = {
        "missing": place | {"description": "Only where this path is not there."},
        "present": place | {"description": "Only where this path is there."},
    }
    pattern = {"type": "object", "minProperties": 1, "properties": conditions}
    patterns = {"type": "array", "items": pattern}
    for block in (schema["properties"], definitions["Block"]["properties"]):
        block["trial"] = _described(block["trial"], {"$ref": ref + "Fields"})
        block["axes"] = _described(block["axes"], {"$ref": ref + "Axes"})
        zipped = {"type": "array", "items": {"$ref": ref + "Axes"}}
        block["zip"] = _described(block["zip"], zipped)
        block["exclude"] = _described(block["exclude"], patterns)
    by_name = {"type": "object", "additionalProperties": {"$ref": ref + "Fields"}}
    properties = schema["properties"]
    properties["backbones"] = _described(properties["backbones"], by_name)
    properties["defaults"] = _described(
        properties["defaults"], {"type": "object", "additionalProperties": by_name}
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": definitions,
        "title": "fpt-sweep: a sweep file",
    }


def _described(was: JSON, now: JSON) -> JSON:
    return {"description": was.get("description", ""), **now}
