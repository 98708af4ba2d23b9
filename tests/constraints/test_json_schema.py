"""JSON Schema to a regex: all that it matches validates, and what is not converted is refused."""

import json
import math
import random
import re
import time as time_of
from datetime import date, datetime, time, timedelta
from itertools import combinations, product

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from sedd.constraints import compile_json_schema
from sedd.constraints.automaton import compile_bytes
from sedd.constraints.json_schema import MAX_NESTING, schema_to_regex
from sedd.constraints.json_text import FORMATS, show
from sedd.errors import UserError

CHECKER = FormatChecker(formats=())
CHECKER.checkers.update(Draft202012Validator.FORMAT_CHECKER.checkers)


# jsonschema checks these two only where another package is installed.
@CHECKER.checks("date-time", ValueError)
def _is_date_time(value):
    return not isinstance(value, str) or (
        value[10:11] == "T" and datetime.fromisoformat(value).tzinfo is not None
    )


@CHECKER.checks("time", ValueError)
def _is_time(value):
    return not isinstance(value, str) or time.fromisoformat(value).tzinfo is not None


def validator(schema):
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=CHECKER)


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def matches(schema, text, **options):
    return re.fullmatch(schema_to_regex(schema, **options), text, re.ASCII) is not None


class Draws:
    """Random texts of a regex: a walk over its automaton that turns to the nearest end in time."""

    def __init__(self, regex, seed=0):
        automaton = compile_bytes(regex)
        self.rng = random.Random(seed)
        self.accepting = automaton.accepting.tolist()
        distance = np.where(automaton.accepting, 0.0, np.inf)
        padded = np.append(distance, np.inf)  # a transition of -1 leads nowhere
        while True:
            nearer = np.minimum(padded[:-1], 1 + padded[automaton.transitions].min(1))
            if (nearer == padded[:-1]).all():
                break
            padded[:-1] = nearer
        self.distance = padded
        self.moves = []
        for row in automaton.transitions.tolist():
            bytes_to = {}
            for byte, target in enumerate(row):
                if target >= 0:
                    bytes_to.setdefault(target, []).append(byte)
            self.moves.append(bytes_to)

    def draw(self, length):
        state, text = 0, []
        while True:
            targets = list(self.moves[state])
            if self.accepting[state] and (
                not targets or len(text) >= length or self.rng.random() < 0.1
            ):
                return bytes(text).decode()
            if len(text) >= length:
                target = min(targets, key=self.distance.__getitem__)
            else:
                target = self.rng.choice(targets)
            text.append(self.rng.choice(self.moves[state][target]))
            state = target


def invalid_draws(schema, regex, count, seed=0):
    """The texts, of some drawn, that are no JSON or do not validate."""
    draws, check = Draws(regex, seed), validator(schema)
    for length in np.linspace(0, 120, count):
        text = draws.draw(length)
        assert re.fullmatch(regex, text, re.ASCII)
        try:
            valid = check.is_valid(json.loads(text))
        except ValueError:
            valid = False
        if not valid:
            yield text


def string(**keywords):
    return {"type": "string", **keywords}


def integer(**keywords):
    return {"type": "integer", **keywords}


def number(**keywords):
    return {"type": "number", **keywords}


def array(items, **keywords):
    return {"type": "array", "items": items, **keywords}


def record(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.com/person",
    "title": "A person",
    "type": "object",
    "properties": {
        "name": string(minLength=1, description="in full"),
        "born": string(format="date"),
        "score": number(minimum=0, maximum=1, default=0.5),
        "tags": array({"enum": ["a", "b"]}, maxItems=2, uniqueItems=False),
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "home"],
    "additionalProperties": False,
    "$defs": {"place": record(["city"], city=string(), zip={"type": ["string", "null"]})},
}
SHAPES = {
    "oneOf": [
        record(["kind", "r"], kind={"const": "circle"}, r=number(minimum=0)),
        record(["kind"], kind={"const": "square"}, a=integer(), b=integer()),
        string(pattern="^none$"),
    ]
}
# name: a schema, documents that it must match and documents that it must not
CASES = {
    "string": (string(), ["", "a", 'q"\\\n\t', "é漢😀", "\x7f"], [1, None, ["a"]]),
    "string_length": (
        string(minLength=2, maxLength=3),
        ["ab", '"\n', "😀😀😀"],
        ["", "a", "abcd", "\n\n\n\n"],
    ),
    "string_max": (string(maxLength=1.0), ["", "a", '"'], ["ab"]),
    "pattern_search": (string(pattern="b+c"), ["bc", "xbbcx", '"bc\n'], ["b", "cb", ""]),
    "pattern_whole": (
        string(pattern="^(?:ab|c){2}$"),
        ["abc", "cc", "abab"],
        ["ab", "xcc", "abcab"],
    ),
    "pattern_starts": (string(pattern="^a|b$"), ["a", "ax", "b", "xb"], ["xa", "bx", ""]),
    "pattern_quotes": (
        string(pattern=r'^[^"]"\\[\n-\r]$'),
        ['a"\\\n', '\\"\\\r', 'é"\\\f'],
        ['""\\\n', 'a"\\\\', 'a"\\n'],
    ),
    "pattern_classes": (
        string(pattern=r"^\w\s[\d_-]\S[^\d,]$"),
        ["a 1xy", "_\t-~.", "0\n_\\\\"],
        ["a_1xy", "a 1 y", "a 1x1", "a 1x,"],
    ),
    "pattern_dot": (string(pattern="^.$"), ["a", '"', "\t", "é"], ["", "\n", "ab"]),
    "pattern_escapes": (string(pattern=r"^\x41\u00e9\/\.[\]\^-]$"), ["Aé/.]", "Aé/.-"], ["Aé/xx"]),
    "pattern_lazy": (
        string(pattern="^(?:(a|b){1,2}?)+?c??$"),
        ["ab", "abac", "a"],
        ["c"],
    ),
    "pattern_group_of_counts": (string(pattern="^(a{2})*$"), ["", "aa", "aaaa"], ["a", "aaa"]),
    "pattern_brackets": (string(pattern=r"^{a}]x{2}}{$"), ["{a}]xx}{"], ["{a}]x{2}}{"]),
    "pattern_group_of_anchors": (string(pattern="^(a|^b$)$"), ["a", "b"], ["ab", "xb"]),
    "pattern_anchors_in_group": (string(pattern="(^a$|^b)"), ["a", "b", "bx"], ["ax", "xb"]),
    "pattern_caret": (string(pattern=r"^[\^a]$"), ["^", "a"], ["b", "\\"]),
    "pattern_length_of_groups": (
        string(pattern="^(?:ab){2,3}$", minLength=4, maxLength=6),
        ["abab", "ababab"],
        ["ab", "ab" * 4],
    ),
    "pattern_length": (string(pattern="^[a-z]+$", maxLength=3), ["a", "abc"], ["", "abcd", "A"]),
    "pattern_length_implied": (
        string(pattern="^\\d{2}-?$", minLength=2, maxLength=3),
        ["12"],
        ["1"],
    ),
    "pattern_range_to_the_end": (
        string(pattern="^[!-\U0010ffff]$"),
        ["!", "\\", '"', "\uffff"],
        [" ", "\n"],
    ),
    "date": (
        string(format="date"),
        ["2024-02-29", "0001-01-01", "9999-12-31"],
        ["2023-02-29", "0000-01-01", "2024-13-01", "2024-1-1"],
    ),
    "time": (
        string(format="time"),
        ["00:00:00Z", "23:59:59.5+05:30"],
        ["24:00:00Z", "12:60:00Z", "12:00:00"],
    ),
    "date_time": (
        string(format="date-time", maxLength=32),
        ["2000-02-29T12:00:00Z", "1985-04-12T23:20:50.52-08:00"],
        ["1900-02-29T12:00:00Z", "2000-02-28 12:00:00Z"],
    ),
    "email": (
        string(format="email", minLength=5),
        ["a@b.c", "o'brien.x+y@mail-1.example.com"],
        ["a.b.c", ""],
    ),
    "uuid": (
        string(format="uuid"),
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "g23e4567-e89b-12d3-a456-426614174000"],
    ),
    "ipv4": (
        string(format="ipv4"),
        ["0.0.0.0", "255.249.199.10"],
        ["256.0.0.1", "1.2.3", "01.2.3.4"],
    ),
    "integer": (integer(), [0, -1, 10, 999999999999999], [1.5, "1", True]),
    "integer_bounds": (
        integer(minimum=-3.5, exclusiveMaximum=20, multipleOf=1),
        [-3, 0, 19],
        [-4, 20, -30],
    ),
    "integer_above": (integer(minimum=2**53), [2**53, 10**18], [2**53 - 1, 0]),
    "integer_float_bound": (integer(maximum=2.0**60), [2**60], [2**60 + 1]),
    "integer_64": (
        integer(minimum=-(2**63), maximum=2**63 - 1),
        [2**63 - 1, -(2**63), 0],
        [2**63, -(2**63) - 1],
    ),
    "number": (number(), [0, -1, 1.5, 10.25, -0.001, 0.0], ["1", False, None]),
    "number_bounds": (
        number(exclusiveMinimum=0, maximum=0.3),
        [0.1, 0.3, 0.0001],
        [0, 0.0, 0.300001, -0.1],
    ),
    "boolean": ({"type": "boolean"}, [True, False], [0, 1, None, "true"]),
    "null": ({"type": "null"}, [None], [0, False, ""]),
    "types": ({"type": ["integer", "null", "string"]}, [1, None, "a"], [1.5, True, []]),
    "const": (
        {"const": {"a": [1, "x.y", None], "é": True}},
        [{"a": [1, "x.y", None], "é": True}],
        [{}],
    ),
    "const_control": ({"const": "\x01\u2028"}, ["\x01\u2028"], [""]),
    "enum": (
        {"enum": [1, True, "1", None, 2.5, [], {}]},
        [1, True, "1", None, 2.5, [], {}],
        [False, 2],
    ),
    "enum_of_type": (
        {"type": ["string", "number"], "enum": ["a", 1, None, 2.5]},
        ["a", 1, 2.5],
        [None, 2],
    ),
    "enum_of_integers": ({"type": "integer", "enum": [1, 2.5, 2.0, True]}, [1, 2.0], [2.5, True]),
    "record": (
        record(["b"], a=integer(), b={"type": "boolean"}, c=string()),
        [{"b": True}, {"a": 1, "b": False}, {"b": True, "c": ""}, {"a": 1, "b": True, "c": "x"}],
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "c": ""}],
    ),
    "record_closed": (
        {"properties": {"a": integer()}, "additionalProperties": False},
        [{}, {"a": 1}],
        [{"a": "1"}, {"b": 1}],
    ),
    "record_open": (
        {"type": "object", "properties": {"a": integer()}, "additionalProperties": integer()},
        [{"a": 1}, {}],
        [{"a": None}],
    ),
    "record_names": (
        record(['a"b', "c.d/~", "é\n"], **{'a"b': integer(), "c.d/~": integer(), "é\n": integer()}),
        [{'a"b': 1, "c.d/~": 2, "é\n": 3}],
        [{'a"b': 1, "cxd/~": 2, "é\n": 3}],
    ),
    "record_empty": (record(), [{}], [[], None]),
    "record_counts": (
        {**record(["a"], a=integer(), b=integer()), "minProperties": 1, "maxProperties": 2},
        [{"a": 1}, {"a": 1, "b": 2}],
        [{}],
    ),
    "map": (
        {"type": "object", "additionalProperties": integer(minimum=0)},
        [{}, {"x": 1}, {"": 0, "é": 12}],
        [{"x": -1}, {"x": "1"}],
    ),
    "map_none": ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    "array": (array(integer()), [[], [1], [1, -2, 3]], [["1"], [1.5], {}]),
    "array_counts": (
        array(integer(), minItems=2, maxItems=3),
        [[1, 2], [1, 2, 3]],
        [[], [1], [1] * 4],
    ),
    "array_at_least": (array(integer(), minItems=1), [[1], [1] * 5], [[]]),
    "array_none": (array(integer(), maxItems=0), [[]], [[1]]),
    "array_one": (array(integer(), maxItems=1), [[], [1]], [[1, 1]]),
    "array_false": ({"type": "array", "items": False}, [[]], [[1]]),
    "prefix": (
        {"prefixItems": [integer(), string()], "items": {"type": "null"}, "type": "array"},
        [[], [1], [1, "a"], [1, "a", None, None]],
        [["a"], [1, 2], [1, "a", 3]],
    ),
    "prefix_counts": (
        array({"type": "null"}, prefixItems=[integer(), string()], minItems=1, maxItems=4),
        [[1], [1, "a"], [1, "a", None], [1, "a", None, None]],
        [[], [1, "a", None, None, None], [1, None]],
    ),
    "prefix_cut": (
        array(True, prefixItems=[integer(), string()], maxItems=1),
        [[], [1]],
        [[1, "a"], ["a"]],
    ),
    "prefix_closed": (
        {"type": "array", "prefixItems": [integer(), string()], "minItems": 2},
        [[1, "a"]],
        [[1], ["a", 1]],
    ),
    "anyOf": (
        {"anyOf": [integer(), string(maxLength=1), array(integer())]},
        [1, "a", [1]],
        [1.5, "ab", ["a"]],
    ),
    "anyOf_typed": (
        {"type": "integer", "anyOf": [number(minimum=5), {"enum": [1, "a"]}]},
        [7, 1],
        [7.5, "a", 2],
    ),
    "oneOf_types": ({"oneOf": [integer(), string(), {"type": "null"}]}, [1, "a", None], [1.5]),
    "oneOf_types_of_values": ({"oneOf": [integer(), {"enum": ["a", 2.5]}]}, [1, 2.5], [3.5]),
    "oneOf_values": ({"oneOf": [{"const": 1}, {"enum": [2, "1", True]}]}, [1, 2, "1", True], [3]),
    "oneOf_shapes": (
        SHAPES,
        [{"kind": "circle", "r": 1}, {"kind": "square", "b": 2}, "none"],
        [{"kind": "circle"}, {"kind": "round"}, {"r": 1}, "n"],
    ),
    "oneOf_closed": (
        {
            "type": "object",
            "oneOf": [
                {"properties": {"a": integer()}, "required": ["a"], "additionalProperties": False},
                {"properties": {"b": integer()}, "required": ["b"], "additionalProperties": False},
            ],
        },
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "oneOf_required": (
        {
            "type": "object",
            "properties": {"a": integer(), "b": integer()},
            "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "oneOf_bounds": (
        {"oneOf": [integer(minimum=5), integer(maximum=9)]},
        [1, 4, 10, 99],
        [5, 7, 9, "a"],
    ),
    "oneOf_repeated_constant": ({"oneOf": [{"const": 1}, {"enum": [2, 1.0]}]}, [2], [1, 3]),
    "oneOf_number": ({"oneOf": [integer(), number()]}, [1.5, -0.25], [1, "1"]),
    "allOf_objects": (
        {"allOf": [record(["a"], a=integer()), record(["b"], b=string(), a={"minimum": 3})]},
        [{"a": 3, "b": "x"}],
        [{"a": 2, "b": "x"}, {"a": 3}, {"b": "x"}],
    ),
    "allOf_beside": (
        {"type": "array", "allOf": [{"minItems": 1}, {"maxItems": 2}], "items": integer()},
        [[1], [1, 2]],
        [[], [1, 2, 3], ["a"]],
    ),
    "allOf_closed": (
        {
            "allOf": [
                {"properties": {"a": integer(), "b": integer()}},
                {"properties": {"a": {"minimum": 1}}, "additionalProperties": False},
            ],
            "type": "object",
        },
        [{}, {"a": 1}],
        [{"a": 0}, {"b": 1}],
    ),
    "ref_beside": (
        {"$ref": "#/$defs/a", "maximum": 5, "$defs": {"a": integer(minimum=3)}},
        [3, 5],
        [2, 6],
    ),
    "anchor": (
        {
            "items": {"$ref": "#it"},
            "type": "array",
            "$defs": {"x": {"$anchor": "it", "type": "null"}},
        },
        [[None]],
        [[1]],
    ),
    "not_type": ({"not": {"type": ["string", "object"]}}, [1, None, [1], 2.5], ["a", {}]),
    "not_values": ({"enum": [1, 2, "a"], "not": {"const": 2}}, [1, "a"], [2]),
    "not_required": (
        {**record(a=integer(), b=integer()), "not": {"required": ["a"]}},
        [{}, {"b": 1}],
        [{"a": 1}, {"a": 1, "b": 1}],
    ),
    "not_length": (string(**{"not": {"minLength": 3}}), ["", "ab"], ["abc"]),
    "not_not": ({"not": {"not": integer(minimum=3)}}, [3, 10], [2, "a"]),
    "not_properties": (
        {**record(a=integer()), "not": {"properties": {"a": {"minimum": 5}}}},
        [{"a": 4}],
        [{"a": 5}, {}],
    ),
    "if_then_else": (
        {
            **record(["k"], k={"enum": ["a", "b"]}, v={"type": ["integer", "string"]}),
            "if": {"properties": {"k": {"const": "a"}}},
            "then": {"properties": {"v": integer()}},
            "else": {"properties": {"v": string()}, "required": ["v"]},
        },
        [{"k": "a"}, {"k": "a", "v": 1}, {"k": "b", "v": "x"}],
        [{"k": "a", "v": "x"}, {"k": "b"}, {"k": "b", "v": 1}],
    ),
    "if_alone": ({"if": integer(), "type": "integer"}, [1], ["a"]),
    "dependent_required": (
        {**record(a=integer(), b=integer()), "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "dependent_schemas": (
        {**record(a=integer(), b=integer()), "dependentSchemas": {"a": {"required": ["b"]}}},
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "pattern_properties": (
        {"type": "object", "patternProperties": {"^x-": integer(), "^y": string(maxLength=1)}},
        [{}, {"x-a": 1}, {"y": "a", "x-": 2}],
        [{"x-a": "1"}, {"y": "ab"}],
    ),
    "pattern_properties_overlap": (
        {"type": "object", "patternProperties": {"a": {"minimum": 3}, "b$": integer()}},
        [{"ab": 3}, {"xab": 4}],
        [{"ab": 2}, {"ab": 3.5}],
    ),
    "pattern_properties_closed": (
        {
            "type": "object",
            "properties": {"a": {"minimum": 2}},
            "patternProperties": {"^a": integer()},
            "additionalProperties": False,
        },
        [{}, {"a": 2}],
        [{"a": 2.5}, {"a": 1}, {"b": 1}],
    ),
    "property_names": (
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]{2}$"},
            "additionalProperties": integer(),
        },
        [{}, {"ab": 1, "cd": 2}],
        [{"a": 1}, {"ab": "1"}, {"abc": 1}],
    ),
    "property_names_of_record": (
        {**record(a=integer(), bcd=integer()), "propertyNames": {"maxLength": 2}},
        [{}, {"a": 1}],
        [{"bcd": 1}],
    ),
    "required_only": ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": [None]}], [{}]),
    "map_at_least_one": (
        {
            "type": "object",
            "additionalProperties": integer(),
            "minProperties": 1,
            "maxProperties": 2,
        },
        [{"a": 1}, {"a": 1, "b": 2}],
        [{}, {"a": 1, "b": 2, "c": 3}],
    ),
    "record_exactly_one": (
        {**record(a=integer(), b=integer()), "minProperties": 1, "maxProperties": 1},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "multiple_of": (integer(multipleOf=7), [0, 7, -14, 7000], [1, 8, -3]),
    "multiple_of_bounds": (
        integer(multipleOf=25, minimum=26, maximum=100),
        [50, 100],
        [25, 60, 125],
    ),
    "multiple_of_tens": (number(multipleOf=100, minimum=-200), [-200, 0, 12300], [-300, 50, 1.5]),
    "multiple_of_both": (
        {"allOf": [integer(multipleOf=4), {"multipleOf": 6}], "maximum": 30, "minimum": -12},
        [-12, 0, 12, 24],
        [4, 6, 36],
    ),
    "unique_enum": (
        array({"enum": ["a", "b", 1]}, uniqueItems=True),
        [[], ["a"], [1, "b", "a"]],
        [["a", "a"], ["c"]],
    ),
    "unique_larger_enum": (
        array({"enum": list("abcdefgh")}, uniqueItems=True, minItems=1),
        [["a"], ["a", "c", "h"]],
        [["a", "a"], []],
    ),
    "enum_beside": (
        {"enum": [1, 2.5, 8, "a", "bc"], "minimum": 2, "maxLength": 1},
        [2.5, 8, "a"],
        [1, "bc"],
    ),
    "enum_of_objects": (
        {
            "enum": [{"a": 1}, {"a": "x"}, [1], [1, 1]],
            "properties": {"a": integer()},
            "uniqueItems": True,
        },
        [{"a": 1}, [1]],
        [{"a": "x"}, [1, 1]],
    ),
    "false_branch": ({"anyOf": [False, integer(), {"allOf": [string(), integer()]}]}, [1], ["a"]),
    "false_property": (record(a=False, b=integer()), [{}, {"b": 1}], [{"a": 1}]),
    "allOf": ({"allOf": [{"type": "boolean"}], "title": "x"}, [True], [None]),
    "references": (
        {
            "properties": {
                "a": {"$ref": "#/$defs/x~1y%25", "description": "escaped"},
                "b": {"$ref": "#/properties/a"},
                "c": {"$ref": "#/$defs/list/prefixItems/1"},
            },
            "$defs": {"x/y%": integer(), "list": {"prefixItems": [True, string()]}},
        },
        [{"a": 1, "b": 2, "c": "x"}],
        [{"a": "1"}, {"b": "1"}, {"c": 1}],
    ),
    "anything": (True, [1, "a", None, [[1], {"a": 2}], {"a": {"b": 1}}], []),
    "any_list": ({"type": "array"}, [[], [1, [2], {"a": None}]], [{}]),
    "any_map": ({"type": "object"}, [{}, {"a": [1], "b": {"c": 1}}], [[]]),
    "untyped": ({"minimum": 3, "maxLength": 1}, [3, "a", 4.5], [2, "ab"]),
    "person": (
        PERSON,
        [
            {"name": "A", "home": {"city": "B"}},
            {"name": "Ü", "born": "2000-01-31", "score": 0.25, "home": {"city": "", "zip": None}},
            {"name": "A", "tags": ["a", "a"], "home": {"city": "B", "zip": "1"}},
        ],
        [
            {"name": "", "home": {"city": "B"}},
            {"name": "A"},
            {"name": "A", "tags": ["c"], "home": {"city": "B"}},
            {"name": "A", "score": 1.01, "home": {"city": "B"}},
            {"name": "A", "home": {"city": "B"}, "x": 1},
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_documents(name):
    schema, valid, invalid = CASES[name]
    check = validator(schema)
    for document in valid:
        assert check.is_valid(document)
        assert matches(schema, dumps(document)), document
    for document in invalid:
        assert not check.is_valid(document)
        assert not matches(schema, dumps(document)), document


@pytest.mark.parametrize("address", ["a@b.1", "a@b.c2", "a@1.2.3.4"])
def test_an_email_does_not_end_in_digits(address):
    """Stricter than ``jsonschema``, which asks for an @ alone."""
    schema = string(format="email", minLength=5)
    assert matches(schema, dumps("a@b.c"))
    assert not matches(schema, dumps(address))


@pytest.mark.parametrize("name", CASES)
def test_draws_validate(name):
    schema = CASES[name][0]
    assert not list(invalid_draws(schema, schema_to_regex(schema), 40))
    compact = schema_to_regex(schema, compact=True)
    assert not list(invalid_draws(schema, compact, 5, seed=1))


@pytest.mark.parametrize(
    ("schema", "regex"),
    [
        (integer(maximum=255), "[0-9]{1,3}"),
        (string(maxLength=3), '"[a-z]*"'),
        (string(format="date"), '"[0-9]{4}-[01][0-9]-[0-3][0-9]"'),
        (string(pattern="a"), '"[a-z]*"'),
        (SHAPES, r'\{"kind": "circle"\}|"none"'),
    ],
)
def test_control_draws_that_do_not_validate_are_found(schema, regex):
    assert list(invalid_draws(schema, regex, 100))


@pytest.mark.parametrize(
    ("schema", "valid", "compact", "wrong"),
    [
        (
            record(a=integer(), b=integer()),
            '{"a": 1, "b": 2}',
            '{"a":1,"b":2}',
            ['{"a": 1, }', '{, "b": 2}', '{"a": 1 "b": 2}', '{"b": 2, "a": 1}', '{"a": 1,"b": 2}'],
        ),
        (array(integer()), "[1, 2]", "[1,2]", ["[1, ]", "[, 1]", "[1 2]", "[01]", "[-0]", "[ ]"]),
        ({"const": {"a": [1, 2]}}, '{"a": [1, 2]}', '{"a":[1,2]}', ['{"a": [1,2]}']),
        (string(), '"a b"', '"a b"', ['"\n"', '"\\"', '"\\x"', '"\x01"', "a", '"a" ', '"\\/"']),
        (number(), "0.50", "0.50", ["-0", "-0.0", ".5", "5.", "1e3", "+1", "00.5", "1.1234567"]),
    ],
)
def test_one_way_to_write(schema, valid, compact, wrong):
    assert matches(schema, valid)
    assert matches(schema, compact, compact=True)
    assert valid == compact or not matches(schema, valid, compact=True)
    for text in wrong:
        assert not matches(schema, text), text


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"description": "anything"},
        {"type": "array"},
        {"type": "array", "items": True},
        {"type": "array", "items": {"title": "x"}},
        {"anyOf": [{"type": "array"}, {"type": "null"}]},
    ],
)
def test_anything_nests_two_deep(schema):
    assert matches(schema, '[[1], {"a": null}]')
    assert not matches(schema, "[[[1]]]")
    assert not matches(schema, '[{"a": []}]')


@pytest.mark.parametrize(
    ("source", "agreed", "disputed"),
    [
        (r"^\w$", "a", "é"),  # ECMAScript's is ASCII, Python's Unicode
        (r"^\d$", "1", "٣"),
        (r"^\D$", "a", "٣"),
        (r"^[^\d]$", "a", "٣"),
        (r"^[^\W]$", "_", "é"),
        (r"^\s$", " ", "\u3000"),
        (r"^\S+$", "éa漢", "\u3000"),
        (r"^[^\s]+$", "é", "\xa0"),
        (r"^\D$", "é", "٣"),
        (r"^\W$", "—", "é"),
        (r"^[^\w,]$", "😀", "ß"),
        (r"^[\S]$", "a", "\ufeff"),
        ("^.$", "é", "\u2028"),  # a line ends there in ECMAScript
        ("^a$", "a", "a\n"),  # Python's $ stands before it too
    ],
)
def test_what_dialects_dispute_is_not_matched(source, agreed, disputed):
    assert matches(string(pattern=source), dumps(agreed))
    assert not matches(string(pattern=source), dumps(disputed))


@pytest.mark.parametrize("needed", list(product([False, True], repeat=5)))
def test_any_subset_of_optional_properties(needed):
    names = ["a", "b", "c", "d", "e"]
    required = {name for name, need in zip(names, needed, strict=True) if need}
    pattern = re.compile(
        schema_to_regex(record(required, **{name: {"const": 1} for name in names}))
    )
    for count in range(len(names) + 1):
        for chosen in combinations(names, count):
            found = pattern.fullmatch(dumps(dict.fromkeys(chosen, 1)))
            assert bool(found) == (required <= set(chosen)), chosen


def test_many_optional_properties_stay_small():
    schema = record(**{f"property{i}": {"type": "boolean"} for i in range(64)})
    regex = schema_to_regex(schema)
    assert regex.count("true") <= 64 * 4  # 64/2 · log2(64) + 64
    assert compile_bytes(regex).num_states < 64 * 30


@pytest.mark.parametrize("low", range(-13, 14))
def test_integer_ranges(low):
    for high in range(low, 14):
        pattern = re.compile(schema_to_regex(integer(minimum=low, maximum=high)))
        for value in range(-140, 141):
            assert bool(pattern.fullmatch(str(value))) == (low <= value <= high)


@pytest.mark.parametrize("seed", range(12))
def test_wide_integer_ranges(seed):
    rng = random.Random(seed)
    low, high = sorted(rng.randint(-(10 ** rng.randint(1, 4)), 10**4) for _ in range(2))
    pattern = re.compile(
        schema_to_regex(integer(exclusiveMinimum=low - 1, exclusiveMaximum=high + 1))
    )
    for value in range(-10_010, 10_020, rng.randint(1, 3)):
        assert bool(pattern.fullmatch(str(value))) == (low <= value <= high)


NEAR = [-10.05, -1, -0.3, -0.01, 0, 0.01, 0.1, 0.30000000000000004, 0.97, 1, 9.5, 10, 0.2500001]
TEXTS = [
    sign + f"{value / 100:.2f}"[: -cut or None]
    for value in range(1106)
    for sign in ("", "-")
    for cut in (0, 1, 3)
    if value or not sign
]


@pytest.mark.parametrize(("least", "most"), list(product(*[["", "exclusive"]] * 2)))
def test_number_ranges_as_the_validator_compares(least, most):
    for low, high in combinations(sorted(NEAR), 2):
        bounds = {
            "exclusiveMinimum" if least else "minimum": low,
            "exclusiveMaximum" if most else "maximum": high,
        }
        pattern = re.compile(schema_to_regex(number(**bounds)))
        for text in random.Random(str(bounds)).sample(TEXTS, 500):
            value = json.loads(text)
            inside = (low < value if least else low <= value) and (
                value < high if most else value <= high
            )
            # A zero with a sign is not written.
            inside &= value != 0 or text[0] != "-"
            assert bool(pattern.fullmatch(text)) == inside, (bounds, text)


@pytest.mark.parametrize(
    "bound", [0, 0.1, -0.1, 1, 0.3, 0.30000000000000004, 123456.789, 1e9, -1e9, 999999999.999999]
)
def test_numbers_next_to_a_bound(bound):
    around = [round(bound * 10**6) + step for step in range(-3, 4)]
    texts = [f"{'-' * (n < 0)}{abs(n) // 10**6}.{abs(n) % 10**6:06}" for n in around]
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        schema = number(**{keyword: bound})
        pattern, check = re.compile(schema_to_regex(schema)), validator(schema)
        for text in texts:
            assert bool(pattern.fullmatch(text)) == check.is_valid(json.loads(text)), text


def test_numbers_of_ranges_are_whole_languages():
    """All of a finite language, against all decimals of its width."""
    pattern = re.compile(schema_to_regex(number(minimum=0.99999, maximum=1.00001)))
    found = {
        n for n in range(999_900, 1_000_100) if pattern.fullmatch(f"{n // 10**6}.{n % 10**6:06}")
    }
    assert found == set(range(999_990, 1_000_011))


def test_every_date():
    pattern = re.compile(schema_to_regex(string(format="date")))
    real, day = set(), date(1896, 1, 1)
    while day.year < 2106:
        real.add(day.isoformat())
        day += timedelta(days=1)
    for year, month, number_ in product(range(1896, 2106), range(14), range(33)):
        text = f"{year}-{month:02}-{number_:02}"
        assert bool(pattern.fullmatch(f'"{text}"')) == (text in real), text


def test_every_leap_day():
    pattern = re.compile(schema_to_regex(string(format="date")))
    for year in range(10_000):
        leap = year > 0 and year % (4 if year % 100 else 400) == 0
        assert bool(pattern.fullmatch(f'"{year:04}-02-29"')) == leap
        assert bool(pattern.fullmatch(f'"{year:04}-02-28"')) == (year > 0)


@pytest.mark.parametrize("name", FORMATS)
def test_lengths_of_formats(name):
    """The shortest and the longest that a format declares."""
    draws = Draws(FORMATS[name].text)
    lengths = {len(draws.draw(length)) for length in range(60) for _ in range(10)}
    assert min(lengths) >= FORMATS[name].low
    assert max(lengths) <= FORMATS[name].high
    assert min(lengths) == FORMATS[name].low


class Schemas:
    """Random schemas, each with random documents that are valid and of the form that is written."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def schema(self, depth):
        """A schema, and a function that draws a document."""
        kinds = ["string", "integer", "number", "enum", "simple", "format", "pattern"]
        if depth:
            kinds += ["object", "array", "any", "one", "map", "tuple"] * 2
        return getattr(self, f"_{self.rng.choice(kinds)}")(depth - 1)

    def _text(self, length):
        return "".join(self.rng.choice('ab"\\/\n\té漢😀{}[]:,.') for _ in range(length))

    def _string(self, _):
        low = self.rng.randint(0, 2)
        high = low + self.rng.randint(0, 3)
        return string(minLength=low, maxLength=high), lambda: self._text(
            self.rng.randint(low, high)
        )

    def _integer(self, _):
        low, high = sorted(self.rng.randint(-1200, 1200) for _ in range(2))
        return integer(minimum=low, maximum=high), lambda: self.rng.randint(low, high)

    def _number(self, _):
        low, high = sorted(
            round(self.rng.uniform(-12, 12), self.rng.randint(0, 3)) for _ in range(2)
        )
        high += 0.5

        def draw():
            return min(max(round(self.rng.uniform(low, high), 3), low), high) or 0  # not -0.0

        return number(minimum=low, maximum=high), draw

    def _enum(self, _):
        pool = [1, 1.5, True, None, "a", 'b"\n', [1, {"a": []}], {"é": 1, "b": [2, None]}, 0, ""]
        values = self.rng.sample(pool, self.rng.randint(1, 4))
        return {"enum": values}, lambda: self.rng.choice(values)

    def _simple(self, _):
        names = self.rng.sample(["boolean", "null"], self.rng.randint(1, 2))
        values = {"boolean": [True, False], "null": [None]}
        return {"type": names}, lambda: self.rng.choice(values[self.rng.choice(names)])

    def _format(self, _):
        days = self.rng.randint(0, 3 * 10**6)
        texts = {
            "date": (date(1, 1, 1) + timedelta(days=days)).isoformat(),
            "time": "23:59:01Z",
            "ipv4": "10.20.0.255",
            "email": "a.b@c.de",
        }
        name = self.rng.choice(list(texts))
        return string(format=name), lambda: texts[name]

    def _pattern(self, _):
        pairs = {
            "^[a-f]{2}$": "af",
            "x|y$": "--y",
            r"^\d+(?:\.\d\d)?": "12.34é",
            r'^"?\\[^"\s]$': '"\\e',
            "(ab?)+c": "é\nabaac",
            "": "",
        }
        source = self.rng.choice(list(pairs))
        return string(pattern=source), lambda: pairs[source]

    def _object(self, depth):
        names = self.rng.sample(["a", 'b"', "c.", "é", "e/~"], self.rng.randint(0, 4))
        made = {name: self.schema(depth) for name in names}
        needed = [name for name in names if self.rng.random() < 0.5]
        schema = record(needed, **{name: made[name][0] for name in names})
        if self.rng.random() < 0.5:
            schema["additionalProperties"] = False

        def draw():
            chosen = [name for name in names if name in needed or self.rng.random() < 0.5]
            return {name: made[name][1]() for name in chosen}

        return schema, draw

    def _map(self, depth):
        schema, draw = self.schema(depth)
        return {"type": "object", "additionalProperties": schema}, lambda: {
            self._text(2): draw() for _ in range(self.rng.randint(0, 2))
        }

    def _array(self, depth):
        low = self.rng.randint(0, 2)
        high = low + self.rng.randint(0, 2)
        schema, draw = self.schema(depth)
        return array(schema, minItems=low, maxItems=high), lambda: [
            draw() for _ in range(self.rng.randint(low, high))
        ]

    def _tuple(self, depth):
        made = [self.schema(depth) for _ in range(2)]
        low = self.rng.randint(0, 2)
        schema = {"type": "array", "prefixItems": [each for each, _ in made], "minItems": low}
        return schema, lambda: [draw() for _, draw in made][: self.rng.randint(low, 2)]

    def _any(self, depth):
        made = [self.schema(depth) for _ in range(2)]
        return {"anyOf": [each for each, _ in made]}, lambda: self.rng.choice(made)[1]()

    def _one(self, depth):
        made = [self.schema(depth) for _ in range(2)]
        branches = [
            {"type": "object", "properties": {"k": {"const": k}, "v": each}, "required": ["k"]}
            for k, (each, _) in enumerate(made)
        ]

        def draw():
            k = self.rng.randrange(2)
            return {"k": k, "v": made[k][1]()}

        return {"oneOf": branches}, draw


RANDOM = [Schemas(seed).schema(2) for seed in range(200)]


@pytest.mark.parametrize("seed", range(200))
def test_random_schemas(seed):
    schema, draw = RANDOM[seed]
    regex, check = schema_to_regex(schema), validator(schema)
    for _ in range(5):
        document = draw()
        assert check.is_valid(document)
        assert re.fullmatch(regex, dumps(document), re.ASCII), document
    assert not list(invalid_draws(schema, regex, 8, seed))


def test_random_documents_that_match_are_valid():
    documents = [draw() for _, draw in RANDOM for _ in range(2)]
    invalid = 0
    for schema, _ in RANDOM[::4]:
        pattern, check = re.compile(schema_to_regex(schema), re.ASCII), validator(schema)
        for document in documents:
            valid = check.is_valid(document)
            invalid += not valid
            assert valid or not pattern.fullmatch(dumps(document))
    assert invalid > 1000


def combined(rng, depth):
    """A random schema of the keywords that combine, in which most pairs of keywords meet."""
    leaves = [
        {"type": rng.sample(["string", "integer", "number", "null", "object", "array"], 2)},
        {"minimum": rng.randint(-3, 3)},
        {"maximum": rng.randint(-3, 3)},
        {"multipleOf": rng.randint(1, 12)},
        {"maxLength": rng.randint(0, 3)},
        {"minLength": rng.randint(0, 2)},
        {"pattern": rng.choice(["^a", "b$", "^[ab]*$"])},
        {"enum": rng.sample([0, 1, 2.5, "a", None, True, [], [1, 1], {"a": 1}, {"b": "x"}], 3)},
        {"const": rng.choice([1, "a", None, {"a": 1}])},
        {"required": rng.sample(["a", "b", "c"], rng.randint(1, 2))},
        {"minProperties": 1},
        {"maxProperties": rng.randint(0, 2)},
        {"minItems": rng.randint(0, 2)},
        {"maxItems": rng.randint(0, 3)},
        {"uniqueItems": True, "items": {"enum": [1, 2, "a"]}},
        {"propertyNames": rng.choice([{"maxLength": 1}, {"pattern": "^a"}, {"enum": ["a", "b"]}])},
        {"dependentRequired": {"a": ["b"]}},
    ]
    if not depth or rng.random() < 0.25:
        return rng.choice(leaves)
    one, two, three = (combined(rng, depth - 1) for _ in range(3))
    combinations_ = [
        {"allOf": [one, two]},
        {"anyOf": [one, two]},
        {"oneOf": [one, two]},
        {"not": one},
        {"if": one, "then": two, "else": three},
        {"if": one, "then": two},
        {"properties": {"a": one, "c": two}},
        {"patternProperties": {"^a": one, "b": two}},
        {"additionalProperties": rng.choice([False, one])},
        {"dependentSchemas": {"a": one}},
        {"items": one},
        {"prefixItems": [one], "items": two},
    ]
    return {**rng.choice([*combinations_, *leaves]), **rng.choice(combinations_)}


@pytest.mark.parametrize("seed", range(4))
def test_draws_of_random_combinations_validate(seed):
    rng = random.Random(seed)
    drawn = 0
    for _ in range(40):
        schema = combined(rng, 2)
        try:
            regex = schema_to_regex(schema, depth=1)
        except UserError:
            continue
        if len(regex) < 5_000:  # larger ones take seconds to compile
            assert not list(invalid_draws(schema, regex, 12)), schema
            drawn += 1
    assert drawn >= 10


def nested(depth):
    return record(a=nested(depth - 1)) if depth else integer()


def within(keyword, depth):
    """Schemas of one keyword within each other, which need no object or array in between."""
    schema = {"const": 0}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword.endswith("Of") else schema}
        schema |= {"then": True} if keyword == "if" else {}
    return schema


def doubling(count):
    last = {f"d{count}": string(pattern="^abc$")}
    return {
        "$ref": "#/$defs/d0",
        "$defs": last
        | {f"d{i}": array({"$ref": f"#/$defs/d{i + 1}"}, minItems=1) for i in range(count)},
    }


def inside(schema):
    return {"properties": {"age": schema}}


AGE = "#/properties/age"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
REFUSED = [
    # keywords outside the subset
    (inside(array({}, contains={})), f"{AGE}/contains: outside"),
    ({"unevaluatedProperties": False}, "#/unevaluatedProperties: outside"),
    ({"typo": 1}, "#/typo: outside"),
    ({"items": {"anyOf": [True, {"typo": 1}]}}, "#/items/anyOf/1/typo: outside"),
    ({"$schema": 7}, "#/$schema: expected the URI of a draft"),
    ({"$schema": DRAFT_7, "prefixItems": [{}]}, "#/prefixItems: unknown to draft 7"),
    ({"properties": {"a/b~c\n": {"contains": {}}}}, "#/properties/a~1b~0c\\n/contains: outside"),
    (string(format=7), "#/format: expected the name of a format, got 7"),
    (string(format="date", pattern="a"), "#/pattern: not supported beside another format"),
    (
        {"allOf": [string(pattern="a"), string(pattern="b")]},
        "#/allOf/1/pattern: not supported beside another pattern",
    ),
    (
        array(string(), uniqueItems=True),
        "#/uniqueItems: true is supported only for items of",
    ),
    ({"type": "object", "minProperties": 2}, "#/minProperties: supported up to 1"),
    ({**record(a={}), "minProperties": 2}, "#/minProperties: must be at most 1, the number"),
    (
        {**record(a={}, b={}, c={}), "maxProperties": 2},
        "#/maxProperties: supported are 0 (the required properties) and 3 (all properties) or more",
    ),
    (
        {**record(["a"], a={}, b={}, c={}), "minProperties": 2},
        "#/minProperties: supported are 0 to 1 (the required properties) and 3 (all properties)",
    ),
    ({"not": string(pattern="a"), "type": "string"}, "#/not/pattern: has no supported negation"),
    ({"not": array(integer()), "type": "array"}, "#/not/items: has no supported negation"),
    (integer(multipleOf=0.5), "#/multipleOf: only whole numbers"),
    (
        {"patternProperties": {"a": {}}, "propertyNames": {}},
        "#/propertyNames: not supported beside",
    ),
    ({"not": {"const": "a"}, "type": "string"}, '#: excluding the constant "a" is not supported'),
    # references
    (inside({"$ref": "#/$defs/x"}), f"{AGE}/$ref: '#/$defs/x' names nothing"),
    (inside({"$ref": "other.json"}), f"{AGE}/$ref: 'other.json' names nothing"),
    (inside({"$ref": "#name"}), f"{AGE}/$ref: '#name' names nothing"),
    (inside({"$ref": 3}), f"{AGE}/$ref: expected a reference"),
    (inside({"$ref": "#/properties/age/$ref/x"}), f"{AGE}/$ref: '#/properties/age/$ref/x' names"),
    ({"$ref": "#"}, "#/$ref: '#' is recursive, and no value ends at depth 2; a larger"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": record(["a"], a={"$ref": "#/$defs/a"})}},
        "#/$defs/a/properties/a/$ref: '#/$defs/a' is recursive",
    ),
    # unions whose parts may overlap
    (
        {"oneOf": [string(), string(format="date")]},
        "#/oneOf: cannot prove that no value validates against both branch 0 and branch 1",
    ),
    ({"oneOf": [string(pattern="a"), string(pattern="b")]}, "#/oneOf: cannot prove"),
    # malformed
    (3, "#: a schema is an object or a boolean, got 3"),
    (inside([]), f"{AGE}: a schema is an object or a boolean, got []"),
    ({"type": "dict"}, "#/type: expected one of string"),
    ({"type": []}, "#/type: expected one of string"),
    ({"type": ["string", 3]}, "#/type: expected one of string"),
    (string(minLength="3"), "#/minLength: expected a count up to 4294967294, got '3'"),
    (string(maxLength=-1), "#/maxLength: expected a count up to 4294967294, got -1"),
    (string(maxLength=1.5), "#/maxLength: expected a count up to 4294967294, got 1.5"),
    (string(maxLength=True), "#/maxLength: expected a count up to 4294967294, got True"),
    (string(maxLength=None), "#/maxLength: expected a count up to 4294967294, got None"),
    (string(maxLength=10**5000), "#/maxLength: expected a count up to 4294967294, got a number of"),
    ({"const": 10**5000}, "#/const: a number of too many digits is not JSON"),
    (string(maxLength=math.inf), "#/maxLength: expected a count up to 4294967294, got inf"),
    (array({}, minItems=3, maxItems=2), "#/minItems: 3 exceeds maxItems 2"),
    ({"properties": []}, "#/properties: expected an object, got []"),
    ({**record(), "required": "a"}, "#/required: expected a list of names, got 'a'"),
    ({**record(), "required": [1]}, "#/required: expected a list of names, got [1]"),
    ({"type": "object", "additionalProperties": 1}, "#/additionalProperties: a schema is"),
    ({"prefixItems": {}}, "#/prefixItems: expected a list of schemas, got {}"),
    ({"prefixItems": []}, "#/prefixItems: expected a list of schemas, got []"),
    ({"items": [{}], "prefixItems": [{}]}, "#/items: a schema is an object or a boolean"),
    ({"prefixItems": [{}, 3]}, "#/prefixItems/1: a schema is"),
    (array({}, uniqueItems="no"), "#/uniqueItems: expected true or false"),
    ({"enum": []}, "#/enum: expected a list of values, got []"),
    ({"enum": "ab"}, "#/enum: expected a list of values, got 'ab'"),
    ({"anyOf": []}, "#/anyOf: expected a list of schemas, got []"),
    ({"anyOf": [{}, 1]}, "#/anyOf/1: a schema is"),
    (integer(minimum="1"), "#/minimum: expected a number, got '1'"),
    (integer(minimum=True), "#/minimum: expected a number, got True"),
    (number(maximum=math.nan), "#/maximum: expected a magnitude below 1000000000000000, got nan"),
    (integer(multipleOf=True), "#/multipleOf: only whole numbers"),
    ({"const": math.nan}, "#/const: nan is not JSON"),
    ({"const": "\ud800"}, "#/const: '\\ud800' is not JSON"),
    ({"properties": {"\ud800": True}}, "#/properties/\\ud800: '\\ud800' is not JSON"),
    # no value
    (False, "#: false allows no value"),
    (record(["a"], a=False), "#/properties/a: false allows no value"),
    (record(["a"], a=integer(minimum=3, maximum=2)), "#/properties/a: no integer lies between"),
    (integer(exclusiveMinimum=1, exclusiveMaximum=2), "#: no integer lies"),
    (number(minimum=1, exclusiveMaximum=1), "#: no number with at most 6 digits"),
    (number(exclusiveMinimum=0, maximum=1e-7), "#: no number with at most 6 digits"),
    ({"type": "string", "enum": [1]}, "#/enum: allows no value: no constant fits"),
    ({"type": "string", "anyOf": [integer()]}, "#/anyOf: allows no value: string is not integer"),
    ({"type": "array", "prefixItems": [{}], "minItems": 2}, "#/minItems: more than the 1 items"),
    (string(format="uuid", maxLength=3), "#/maxLength: no string of that format"),
    (string(pattern="^ab$", minLength=3), "#/minLength: no string of that pattern"),
    # beyond what a number or a regex can hold
    (integer(maximum=10**19), "#/maximum: expected a magnitude below"),
    (integer(maximum=10**5000), "#/maximum: expected a magnitude below"),
    (number(maximum=1e15), "#/maximum: expected a magnitude below"),
    (number(exclusiveMinimum=-2e9), "#/exclusiveMinimum: expected a magnitude below"),
    (nested(MAX_NESTING), "/properties/a: schemas nest more than"),
    (within("allOf", 2000), "#: its schemas nest too deep to be read"),
    (within("oneOf", 400), "#: its schemas nest too deep to be read"),
    (within("not", 800), "#: its schemas nest too deep to be read"),
    (within("if", 800), "#: its schemas nest too deep to be read"),
    (doubling(25), ": the regex has more than"),
    # patterns
    (string(pattern=3), "#/pattern: expected a regular expression, got 3"),
    (string(pattern="a.*b", maxLength=3), "#/maxLength: not supported beside this pattern"),
    (string(pattern="^(ab)*$", minLength=1), "#/minLength: not supported beside this pattern"),
    (string(pattern="^(a{2})*$", maxLength=3), "#/maxLength: not supported beside this pattern"),
    (string(format="email", maxLength=30), "#/maxLength: not supported beside this format"),
    *(
        (string(pattern=source), f"#/pattern: {show(source)} at position {position}: ")
        for source, position in [
            ("(?=a)", 0),
            ("(?P<n>a)", 0),
            ("(?i)a", 0),
            ("a(b", 1),
            ("ab)", 2),
            ("(^a)b", 1),
            ("a^", 1),
            ("a$b", 1),
            ("a(b$|c)", 3),
            ("*a", 0),
            ("a**", 2),
            ("a*+", 1),
            ("a{2}{3}", 4),
            ("a{3,2}", 1),
            ("a{,2}", 1),
            (r"\d{1, 3}", 2),
            ("[[:alpha:]]", 0),
            ("[a", 0),
            ("[]a]", 0),
            ("[^]", 0),
            ("[b-a]", 1),
            (r"[\d-z]", 1),
            (r"[\w-_.]", 1),
            (r"\b", 0),
            (r"\1", 0),
            (r"\012", 0),
            (r"\p{L}", 0),
            (r"\Z", 0),
            ("\\", 0),
            (r"\x4", 0),
            (r"\ud83d", 0),
            ("\x01", 0),
            (r"[\x00-\x07]", 0),
            ("(" * 500 + "a" + ")" * 500, 100),
            ("(?:a|" * 1000, 500),
        ]
    ),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_refusals_name_the_path(schema, message):
    with pytest.raises(UserError) as error:
        schema_to_regex(schema)
    found = str(error.value)
    assert "\n" not in found
    assert message in found if message.startswith((":", "/")) else found.startswith(message), found


LARGE = {"type": "string", "maxLength": 50_000}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (LARGE, "#"),
        ({"properties": {"a": {"type": "string"}, "b": LARGE}}, "#/properties/b"),
        (
            {"prefixItems": [{"const": 1}, {"$ref": "#/$defs/it"}], "$defs": {"it": LARGE}},
            "#/$defs/it",
        ),
        ({"items": {"items": {"maxLength": 900}, "maxItems": 90}, "maxItems": 2}, "#/items"),
        ({"additionalProperties": {"pattern": "(a|b)*a(a|b){20}"}}, "#/additionalProperties"),
    ],
)
def test_what_grows_too_large_is_named(schema, path):
    with pytest.raises(UserError, match="pattern is too large") as caught:
        compile_json_schema(schema, [bytes([byte]) for byte in range(256)])
    assert str(caught.value).startswith(f"{path}: the pattern is too large: ")


@pytest.mark.parametrize(
    ("schema", "inner", "around"),
    [
        (record(next={"$ref": "#"}), {}, lambda x: {"next": x}),
        ({"type": "array", "items": {"$ref": "#"}}, [], lambda x: [x]),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {
                    "b": record(["c"], c={"$ref": "#/$defs/a"}),
                    "a": {"anyOf": [integer(), record(["b"], b={"$ref": "#/$defs/b"})]},
                },
            },
            7,
            lambda x: {"b": {"c": x}},
        ),
        (
            {"$id": "https://x.org/t", "anyOf": [{"const": 1}, array({"$ref": "https://x.org/t#"})]},
            1,
            lambda x: [x],
        ),
    ],
)  # fmt: skip
def test_recursion_ends_at_the_depth(schema, inner, around):
    for depth in range(4):
        document = inner
        for _ in range(depth):
            document = around(document)
        assert validator(schema).is_valid(around(document))
        assert matches(schema, dumps(document), depth=depth)
        assert not matches(schema, dumps(around(document)), depth=depth)
    assert not list(invalid_draws(schema, schema_to_regex(schema), 30))


def cycle(length):
    """Definitions, each of which is 0 or the next, without an object or array in between."""
    names = [f"d{i}" for i in range(length)]
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    made = {n: {"anyOf": [{"const": 0}, {"$ref": f"#/$defs/{following[n]}"}]} for n in names}
    return {"$ref": "#/$defs/d0", "$defs": made}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "try a depth below 64"),
        ({"type": "array", "items": {"$ref": "#"}}, "try a depth below 64"),
        (record(l={"$ref": "#"}, r={"$ref": "#"}), "try a depth below 64"),
        (cycle(2), "references nest more than 64 deep"),
        (cycle(5), "references nest more than 64 deep"),
    ],
)
def test_the_largest_depth_is_refused_in_one_line(schema, message):
    with pytest.raises(UserError, match=message):
        schema_to_regex(schema, depth=64)


@pytest.mark.parametrize("depth", [-1, 65, 10**9, True, 1.5, "2", None])
def test_a_depth_out_of_range(depth):
    with pytest.raises(UserError, match=r"^depth must be a whole number in 0\.\.64, got "):
        schema_to_regex({}, depth=depth)


def chain(depth, kind):
    return record(["a"], a=chain(depth - 1, kind)) if depth else {"type": kind}


def doubled(count):
    twice = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**twice, f"d{count}": integer()}}


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [chain(18, "string"), chain(18, "integer")]},
        {"oneOf": [array(chain(15, "null")), chain(17, "boolean")]},
        doubled(30),
        {"allOf": [doubled(24), {"minimum": 3}]} | {"$defs": doubled(24)["$defs"]},
        {"oneOf": [{"const": i, "title": f"number {i}"} for i in range(1000)]},
        {"oneOf": [*({"enum": [f"a{i}", i]} for i in range(500)), record(["a"], a=integer())]},
        {"oneOf": [record(["k"], k={"const": f"v{i}"}, v=string()) for i in range(400)]},
        {"oneOf": [record(["k", "l"], k={"enum": [i, -1 - i]}, l=integer()) for i in range(400)]},
    ],
    ids=[
        "chains",
        "other chains",
        "references",
        "references beside",
        "constants",
        "enums",
        "tags",
        "sets",
    ],
)
def test_work_does_not_multiply(schema):
    start = time_of.process_time()
    schema_to_regex(schema)
    assert time_of.process_time() - start < 3  # without memory these take minutes


def test_drafts_differ_beside_references_alone():
    schema = {"$ref": "#/definitions/a", "type": "string", "definitions": {"a": {"maxLength": 1}}}
    for name in ("draft-04", "draft-06", "draft-07"):
        older = {"$schema": f"https://json-schema.org/{name}/schema#", **schema}
        assert matches(older, "3")
    for name in ("draft/2019-09", "draft/2020-12"):
        assert not matches({"$schema": f"https://json-schema.org/{name}/schema", **schema}, "3")


@pytest.mark.parametrize(
    "annotation",
    [
        {"example": "a"}, {"x-order": 3}, {"format": "int64"}, {"nullable": True},
        {"markdownDescription": "*a*"}, {"examples": ["a", 1]}, {"contentMediaType": "a/b"},
        {"$anchor": "here"}, {"deprecated": False, "title": "T", "$comment": "c"},
    ],
    ids=str,
)  # fmt: skip
def test_annotations_change_nothing(annotation):
    for schema in (string(maxLength=2), integer(minimum=2), record(a=integer())):
        assert schema_to_regex({**schema, **annotation}) == schema_to_regex(schema)
        assert schema_to_regex(record(a={**schema, **annotation})) == schema_to_regex(
            record(a=schema)
        )


def test_what_is_refused_is_only_just_refused():
    """Control: the neighbours of refusals that depend on a value convert."""
    for schema in (
        integer(maximum=10**19 - 1),
        number(maximum=1e15 - 1),
        number(exclusiveMinimum=-1e9),
        nested(MAX_NESTING - 1),
        doubling(8),
        number(exclusiveMinimum=0, maximum=1e-6),
        {"oneOf": [record(["a"], a=integer()), record(["a"], a=string())]},
        {"properties": {"a": integer(), "b": {"$ref": "#/properties/a"}}},
        {"$schema": DRAFT_7, "items": {"$ref": "#/definitions/a"}, "definitions": {"a": True}},
    ):
        assert schema_to_regex(schema)
