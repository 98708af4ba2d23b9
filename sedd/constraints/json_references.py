"""The references of one JSON Schema document: where they lead, and which are recursive.

A ``$ref`` is a URI reference. It is resolved against the base URI of the schema around it, which
the nearest ``$id`` sets, and its fragment is a JSON pointer or the name of an ``$anchor``.
"""

import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sedd.constraints.json_keywords import draft_of
from sedd.constraints.json_text import Path

VALUES = ("enum", "const", "default", "examples", "example")  # hold no schemas, whatever they show


class References:
    """Resolves the references of a document.

    Args:
        root: the document, as ``json.loads`` returns it.

    Attributes:
        recursive: the paths of the schemas that can be reached from themselves by following
            references.
    """

    def __init__(self, root: Any):
        self.root, self.draft = root, draft_of(root)
        self._identified: dict[str, Path] = {}  # by the URI of each $id and $anchor
        self._bases: dict[Path, str] = {}  # the base URI that each schema with an $id sets
        references = list(self._walk())
        self.recursive = _in_cycles(self._edges(references))

    def find(self, reference: str, path: Path) -> Path | None:
        """The path of the target of a reference that stands at ``path``; None if there is none.

        Source: RFC 3986, section 5 (base URIs), and RFC 6901, section 6 (pointers).
        """
        prefixes = (path[:end] for end in range(len(path), -1, -1))
        base = next((self._bases[each] for each in prefixes if each in self._bases), "")
        resource, _, fragment = urllib.parse.urljoin(base, reference).partition("#")
        if fragment and not fragment.startswith("/"):
            return self._identified.get(f"{resource}#{fragment}")
        start = self._identified.get(resource, () if resource == base == "" else None)
        if start is None:
            return None
        target, where = self.at(start), start
        for token in urllib.parse.unquote(fragment).split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = {str(index): each for index, each in enumerate(target)}
            if not isinstance(target, Mapping) or key not in target:
                return None
            target, where = target[key], (*where, key)
        return where

    def at(self, path: Path) -> Any:
        """The part of the document at a path."""
        target = self.root
        for key in path:
            target = target[int(key)] if isinstance(target, list) else target[key]
        return target

    def _walk(self) -> Iterator[tuple[str, Path]]:
        """Every reference with the path of its schema. Also records the URIs of all schemas."""
        stack: list[tuple[Any, Path, str]] = [(self.root, (), "")]
        while stack:
            schema, path, base = stack.pop()
            if isinstance(schema, list):
                stack += [(each, (*path, str(i)), base) for i, each in enumerate(schema)]
            if not isinstance(schema, Mapping):
                continue
            reference = schema.get("$ref")
            for key in ("$id", "id"):
                name = schema.get(key)
                if isinstance(name, str) and not (isinstance(reference, str) and self.draft < 2019):
                    base = urllib.parse.urljoin(base, name)
                    self._identified.setdefault(base.removesuffix("#"), path)
                    if not name.startswith("#"):
                        self._bases[path] = base.removesuffix("#")
            if isinstance(name := schema.get("$anchor"), str):
                self._identified.setdefault(f"{base.partition('#')[0]}#{name}", path)
            if isinstance(reference, str):
                yield reference, path
            for key, each in schema.items():
                if key not in VALUES and isinstance(each, Mapping | list):
                    stack.append((each, (*path, str(key)), base))

    def _edges(self, references: Iterable[tuple[str, Path]]) -> Iterator[tuple[Path, Path]]:
        """Pairs of targets of references: the first contains a reference to the second."""
        found = [(path, self.find(reference, path)) for reference, path in references]
        targets = {where for _, where in found if where is not None}
        for path, where in found:
            if where is not None:
                prefixes = (path[:end] for end in range(len(path) + 1))
                yield from ((prefix, where) for prefix in prefixes if prefix in targets)


def _in_cycles(edges: Iterable[tuple[Path, Path]]) -> frozenset[Path]:
    """The nodes of a directed graph that lie on a cycle.

    A node lies on a cycle if one of its edges ends in its own strongly connected component.
    """
    pairs = list(edges)
    number: dict[Path, int] = {}
    for pair in pairs:
        for node in pair:
            number.setdefault(node, len(number))
    if not pairs:
        return frozenset()
    source, target = np.array([[number[node] for node in pair] for pair in pairs]).T
    graph = coo_array((np.ones(len(pairs)), (source, target)), shape=(len(number),) * 2)
    _, label = connected_components(graph, connection="strong")
    cyclic = set(label[source[label[source] == label[target]]].tolist())
    return frozenset(node for node, index in number.items() if int(label[index]) in cyclic)
