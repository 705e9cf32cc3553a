"""The tables of fields in docs/kubernetes.md, from the CRDs.

`python tools/fields.py` writes them anew, `--check` compares. A table stands between `<!-- fields: NAME -->` and
`<!-- end -->`. Invariant: each field of both CRDs is in exactly one table and has a description; a list is one field.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton_common.kube.objects import Json, at, items, mapping, text, texts
from baton_operator.api import AcceleratorProfile, InferenceService
from baton_operator.crd import structural

PAGE = Path(__file__).resolve().parent.parent / "docs/kubernetes.md"
_BLOCK = re.compile(r"(<!-- fields: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_POOLS = ("prefill", "decode", "colocated")


class Undescribed(Exception):
    """A field of which the models do not say what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    values: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.values} | {self.default} | {self.meaning} |"


def tables() -> dict[str, list[Row]]:
    """By the name in the page."""
    service, profile = structural(InferenceService), structural(AcceleratorProfile)
    spec = at(service, "properties", "spec")
    sections = {name: at(spec, "properties", name) for name in mapping(spec, "properties")}
    deep = [name for name, schema in sections.items() if _has_fields(schema) and name not in _POOLS]
    made = {"spec": [_row(name, sections[name], name in texts(spec, "required")) for name in sections]}
    made |= {name: list(_rows(sections[name])) for name in deep}
    made["pool"] = list(_rows(sections[_POOLS[0]]))
    made["status"] = list(_rows(at(service, "properties", "status")))
    made["profile"] = list(_rows(at(profile, "properties", "spec")))
    return made


def filled(page: str) -> str:
    """The page with every table as it should be."""
    made = tables()

    def table(found: re.Match[str]) -> str:
        head = "| field | values | default | meaning |\n|---|---|---|---|\n"
        return f"{found[1]}{head}" + "".join(f"{row}\n" for row in made[found[2]]) + found[3]

    return _BLOCK.sub(table, page)


def _rows(schema: Json, path: str = "") -> Iterator[Row]:
    """Fields of an object and of the objects in it, dotted."""
    required = texts(schema, "required")
    for name, field in mapping(schema, "properties").items():
        whole, inner = path + name, list(mapping(field, "properties").values())
        if not inner or mapping(field, "properties").keys() == {"requests", "limits"}:
            yield _row(whole, field, name in required)
        elif len(inner) > 1 and all(one == inner[0] for one in inner):  # the same for each role
            yield from _rows(inner[0], f"{whole}.*.")
        else:
            yield from _rows(field, f"{whole}.")


def _row(name: str, schema: Json, required: bool) -> Row:
    meaning = text(schema, "description")
    if not meaning:
        raise Undescribed(f"{name} has no description: add one to its field in baton_operator.api")
    default = at(schema, "default")
    shown = "required" if required else "" if default in (None, "") or isinstance(default, Mapping) else f"`{default}`"
    return Row(name=name, values=_values(schema), default=shown, meaning=meaning.replace("|", "\\|"))


def _values(schema: Json) -> str:
    if choices := items(schema, "enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if at(schema, "x-kubernetes-int-or-string"):
        return "number or text"
    kind = text(schema, "type")
    if kind == "integer":
        least, most = at(schema, "minimum"), at(schema, "maximum")
        return f"{least} to {most}" if least is not None and most is not None else "number"
    if kind == "array":
        return "list"
    return {"string": "text", "object": "map" if at(schema, "additionalProperties") else "object"}.get(kind, kind)


def _has_fields(schema: Json) -> bool:
    return bool(mapping(schema, "properties"))


def main(arguments: list[str]) -> int:
    page = PAGE.read_text()
    if "--check" in arguments:
        if filled(page) != page:
            print("the tables of fields are not as the models: run python tools/fields.py", file=sys.stderr)
        return int(filled(page) != page)
    PAGE.write_text(filled(page))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
