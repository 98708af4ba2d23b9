"""The share of JSON schemas that compile, and the cost of their automata over GPT-2's vocabulary.

A suite is a file, or a folder whose `.json` files are read in order. A file is one of these:

- BFCL's form, one question a line as JSON: its schemas are the parameters of each function, with
  BFCL's names of types replaced by JSON Schema's;
- JSON-Schema-Test-Suite: a list of objects, each with a `schema`;
- any other file: one schema, as in SchemaStore.

Without `--suites`, BFCL's `live_simple` from the package `bfcl-eval` is read (its data alone:
`pip install --no-deps bfcl-eval`). The first row of a suite is about the schemas that compile; each
other row is about one reason for which schemas are refused. The columns:

- `schemas`, `share`: how many schemas of the suite the row is about.
- `s`: seconds from a schema to its automaton, measured once. The vocabulary is indexed beforehand.
- `states`, `classes`: the size of the automaton over tokens. `median` and `worst` (the largest
  value) are over schemas.

    python benchmarks/json_schemas.py --suites JSON-Schema-Test-Suite/tests/draft7 schemastore/src
"""

import collections
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from report import report, start

from sedd.configuration.config import default_cache_dir
from sedd.constraints.json_schema import schema_to_regex
from sedd.constraints.token_automaton import TokenAutomaton, Vocabulary, compile_tokens
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.errors import UserError

FILE = "BFCL_v4_live_simple.json"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The schemas and the vocabulary."""

    suites: tuple[Path, ...] = ()
    """Files and folders of schemas; by default BFCL's `live_simple` of the installed package."""
    tokenizer: str = "gpt2"
    cache_dir: Path = Path(default_cache_dir()).expanduser()
    """Where the tokenizer is kept, if it has to be downloaded."""


def installed() -> Path:
    """The path of ``FILE`` in the installed package ``bfcl-eval``.

    The package is not imported, because its dependencies need not be installed.
    """
    try:
        files = metadata.files("bfcl-eval") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == FILE and file.parent.name == "data":
            return Path(str(file.locate()))
    raise SystemExit(f"error: no {FILE}: pip install --no-deps bfcl-eval, or give --suites")


def schemas(suite: Path) -> Iterator[Any]:
    """The schemas of a file, or of all `.json` files in a folder."""
    if not suite.exists():
        raise UserError(f"--suites {suite}: no such file or folder")
    for path in sorted(suite.rglob("*.json")) if suite.is_dir() else [suite]:
        text = path.read_text("utf-8-sig")
        try:
            read = json.loads(text)
        except json.JSONDecodeError:
            read = [json.loads(line) for line in text.splitlines()]
        questions = read if isinstance(read, list) else [read]
        for question in questions:
            if isinstance(question, dict) and "function" in question:
                yield from (renamed(call["parameters"]) for call in question["function"])
            else:
                yield question["schema"] if isinstance(read, list) else question


def renamed(schema: Any) -> Any:
    """Replace BFCL's names of types by JSON Schema's, at all depths; the type "any" is removed."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.get("type") == "any":
        del schema["type"]
    elif "type" in schema:
        schema["type"] = TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        schema["properties"] = {name: renamed(s) for name, s in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = renamed(schema["items"])
    return schema


def main(settings: Settings) -> None:
    """Convert and compile every schema, and count what is refused and why."""
    tokenizer = build_tokenizer(settings.tokenizer, None, cache_dir=settings.cache_dir)
    start = time.perf_counter()
    vocabulary = Vocabulary.of(tokenizer.token_bytes(), eos_id=tokenizer.eos_id)
    indexing = time.perf_counter() - start
    rows = []
    for suite in settings.suites or (installed(),):
        rows += measured(suite, vocabulary)
    report(
        "json_schemas",
        rows,
        tokenizer=settings.tokenizer,
        indexing_s=round(indexing, 3),
    )


def measured(suite: Path, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The rows of a suite: the schemas that compile, then one row for each reason of a refusal."""
    compiled: list[tuple[float, TokenAutomaton]] = []
    refused: collections.Counter[str] = collections.Counter()
    for schema in schemas(suite):
        start = time.perf_counter()
        try:
            automaton = compile_tokens(schema_to_regex(schema), vocabulary)
        except UserError as error:
            refused[reason(error)] += 1
        else:
            compiled.append((time.perf_counter() - start, automaton))
    total = len(compiled) + refused.total()
    row = {
        "suite": suite.name,
        "outcome": "compiled",
        "schemas": len(compiled),
        "share": len(compiled) / total if total else None,
        **spread("s", [taken for taken, _ in compiled]),
        **spread("states", [automaton.num_states for _, automaton in compiled]),
        **spread("classes", [automaton.num_classes for _, automaton in compiled]),
    }
    return [row] + [
        {
            **dict.fromkeys(row),
            "suite": suite.name,
            "outcome": f"refused: {why}",
            "schemas": n,
            "share": n / total,
        }
        for why, n in refused.most_common()
    ]


def reason(error: UserError) -> str:
    """The message of a refusal, with the last part of the path only: ``KEYWORD: PROBLEM``."""
    path, _, problem = str(error).partition(": ")
    return f"{path.rpartition('/')[2]}: {problem}"


def spread(name: str, values: list[Any]) -> dict[str, Any]:
    """The columns ``NAME, median`` and ``NAME, worst`` (the largest value); None without values."""
    return {
        f"{name}, median": statistics.median(values) if values else None,
        f"{name}, worst": max(values, default=None),
    }


if __name__ == "__main__":
    start(main, Settings, __doc__)
