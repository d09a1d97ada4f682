"""`/docs`: the OpenAPI description as one plain page, which asks nothing of anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}code,pre{font-family:ui-monospace,monospace}summary{cursor:pointer}
td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}"""


def manual(told: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    info = told["info"]
    head = f"<title>{escape(info['title'])}: API</title><style>{STYLE}</style>"
    body = "".join([*_paths(told["paths"]), *_schemas(told.get("components", {}).get("schemas", {}))])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">{head}<h1>{escape(info["title"])} '
        f'{escape(info["version"])}</h1><p>For programs: <a href="/openapi.json">/openapi.json</a></p>'
        f"{body}</html>"
    )


def _paths(paths: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, each in methods.items():
            words = escape(each.get("description", "")).replace("`", "")
            yield (
                f"<details><summary><code><b>{method.upper()}</b> {escape(path)}</code> "
                f"{escape(each.get('summary', ''))}</summary><p>{words}</p>"
                f"{_table(_parameters(each))}</details>"
            )


def _parameters(each: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for parameter in each.get("parameters", ()):
        yield f"{parameter['name']} ({parameter['in']})", _type(parameter.get("schema", {}))
    for kind, content in each.get("requestBody", {}).get("content", {}).items():
        yield "body", f"{kind} {_type(content.get('schema', {}))}"


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, each in schemas.items():
        fields = ((field, _type(schema)) for field, schema in each.get("properties", {}).items())
        yield f"<h2>{escape(name)}</h2><p>{escape(each.get('description', ''))}</p>{_table(fields)}"


def _type(schema: Mapping[str, Any]) -> str:
    """What a value may be, in words where there are some."""
    members = [schema, *schema.get("anyOf", ())]
    words = next((str(each["description"]) for each in members if "description" in each), "")
    name = next((str(each[key]) for each in members for key in ("type", "$ref") if key in each), "")
    return words or name.rpartition("/")[2]


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"<tr><th><code>{escape(a)}</code></th><td>{escape(b)}</td></tr>" for a, b in rows]
    return f"<table>{''.join(lines)}</table>" if lines else ""
