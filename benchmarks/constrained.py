"""The cost of a constraint: compiling it for GPT-2's vocabulary, and decoding a step with it.

A step decodes 64 positions at batch 1 from the product of their distributions. It is compared with
one call of a network of GPT-2-small's shape on 64 tokens. The columns:

- ``compile s``: time from a pattern to its automaton, with the vocabulary indexed beforehand.
- ``states``, ``classes``, ``edges``: the size of the automaton over tokens.
- ``program s``: time to compile the sampling program.
- ``most likely``, ``sample``, ``marginals``: milliseconds of one decoding.
- ``temporary MB``: device memory of the sampling program beside its arguments.
- ``dense MB``: the size of a float32 array of states × vocabulary, which is never formed.
- ``check s``: time to check 1,024 positions, of which every second one is given.
- ``sample of a call``: ``sample`` divided by the time of the network call.

With ``--checkpoint`` nothing is timed. Samples are drawn by every sampler under 50 regexes, and the
number of samples that match their regex is printed.

    python benchmarks/constrained.py
    python benchmarks/constrained.py --checkpoint runs/quickstart --length 32
"""

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import report, seconds, start

import sedd
from sedd.configuration.components import build
from sedd.configuration.config import default_cache_dir
from sedd.constraints import compile_regex, decode
from sedd.constraints.decode import Automaton
from sedd.constraints.json_schema import schema_to_regex
from sedd.constraints.token_automaton import Vocabulary, compile_tokens
from sedd.data.tokenizer_sources import build_tokenizer

FIVE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "born", "member"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "status": {"enum": ["open", "paid", "shipped", "returned"]},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "email": {"type": "string", "format": "email"},
            },
            "required": ["name"],
        },
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "size": {"enum": ["S", "M", "L", "XL"]},
                },
                "required": ["sku", "count"],
            },
        },
    },
    "required": ["id", "status", "items"],
}
PATTERNS = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "e-mail": r"[\w.+-]+@[\w-]+(\.[\w-]+)+",
    "arithmetic": r"\d+( [-+*/] \d+)* = -?\d+",
    "object of five fields": schema_to_regex(FIVE),
    "nested object": schema_to_regex(NESTED),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The shapes to measure, or the model to draw with."""

    length: int = 64
    """Positions of a step; with a checkpoint, tokens of a sample."""
    repeats: int = 3
    """Timed runs of each program, of which the fastest counts."""
    tokenizer: str = "gpt2"
    cache_dir: Path = Path(default_cache_dir()).expanduser()
    """Where the tokenizer is kept, if it has to be downloaded."""
    hidden_dim: int = 768
    """Width of the network to compare with."""
    num_layers: int = 12
    """Layers of the network to compare with."""
    checkpoint: Path | None = None
    """Do not measure time; draw samples with this model and count how many match their regex."""


def steps(automaton: Automaton, length: int, repeats: int):
    """Measure one decoding of random distributions: the columns from ``program s`` on.

    Args:
        automaton: the compiled pattern.
        length: the number of positions.
        repeats: timed runs of each program.
    """
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((length, len(automaton.class_of))), jnp.float32)
    log_probs = jax.nn.log_softmax(2 * logits)
    (padded, fixed, final), start, size = automaton._padded(log_probs)
    asked = (automaton.tables, padded, fixed, final, jnp.asarray(start), jnp.asarray(size))
    keys = jax.random.split(jax.random.key(0), (1, len(padded)))
    begun = time.perf_counter()
    program = decode._sample.lower(*asked, keys).compile()
    compiled = time.perf_counter() - begun
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "program s": compiled,
        "most likely": 1e3 * seconds(lambda: decode._most_likely(*asked), repeats),
        "sample": 1e3 * seconds(lambda: decode._sample(*asked, keys), repeats),
        "marginals": 1e3 * seconds(lambda: decode._marginals(*asked), repeats),
        "temporary MB": memory.temp_size_in_bytes / 1e6,
        "dense MB": 4e-6 * automaton.num_states * len(automaton.class_of),
        "check s": check_seconds(automaton),
    }


def check_seconds(automaton: Automaton, length: int = 1024) -> float:
    """Seconds of ``check_span`` on ``length`` positions, with every second token of a match given.

    The match is a random path through the automaton.
    """
    rng = np.random.default_rng(0)
    ways_LS = automaton._ways(np.full(length, -1), automaton.accepting)
    _, token_of = np.unique(automaton.class_of, return_index=True)
    token_of = token_of[-automaton.num_classes :]
    fixed, state = np.full(length, -1), 0
    for position in range(length):
        edges_E = (automaton.edge_source == state) & ways_LS[position + 1][automaton.edge_target]
        edge = rng.choice(np.flatnonzero(edges_E))
        state = automaton.edge_target[edge]
        if position % 2:
            fixed[position] = token_of[automaton.edge_class[edge]]
    begun = time.perf_counter()
    automaton.check_span(length, fixed=fixed)
    return time.perf_counter() - begun


def network_call(num_tokens: int, settings: Settings) -> float:
    """Milliseconds of one network call at batch 1, with the output layer at all positions."""
    network = build(
        "networks",
        "ddit",
        num_states=num_tokens + 1,
        time_conditioned=False,
        hidden_dim=settings.hidden_dim,
        num_layers=settings.num_layers,
        num_heads=max(settings.hidden_dim // 64, 1),
    )
    params = jax.jit(network.init)(jax.random.key(0))

    @jax.jit
    def call(params, tokens):
        weight, bias = network.head(params)
        return network.hidden(params, tokens) @ weight + bias

    tokens = jnp.zeros((1, settings.length), jnp.int32)
    return 1e3 * seconds(lambda: call(params, tokens), settings.repeats)


def measure(settings: Settings) -> None:
    """Measure compile times and steps with the tokenizer's vocabulary, and print the table."""
    tokenizer = build_tokenizer(settings.tokenizer, None, cache_dir=settings.cache_dir)
    tokens = tokenizer.token_bytes()
    begun = time.perf_counter()
    vocabulary = Vocabulary.of(tokens, eos_id=tokenizer.eos_id)
    indexed = time.perf_counter() - begun
    print(f"{len(tokens)} tokens indexed in {indexed:.3g} s")
    call = network_call(len(tokens), settings)
    print(f"a network call of this shape: {call:.4g} ms")
    rows = []
    for name, pattern in PATTERNS.items():
        begun = time.perf_counter()
        automaton = Automaton.of(compile_tokens(pattern, vocabulary))
        compiled = time.perf_counter() - begun
        row = {
            "pattern": name,
            "compile s": compiled,
            "states": automaton.num_states,
            "classes": automaton.num_classes,
            "edges": len(automaton.edge_source),
            **steps(automaton, settings.length, settings.repeats),
        }
        row["sample of a call"] = f"{row['sample'] / call:.1%}"
        rows.append(row)
    report(
        "Constrained decoding, milliseconds a step",
        rows,
        length=settings.length,
        indexed_seconds=round(indexed, 3),
        network_call_ms=round(call, 2),
    )


# Of the characters of the State of the Union addresses, a dozen of them of several bytes.
REGEXES = r"""
\d{4}-\d\d-\d\d
\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])
(January|February|March) \d{1,2}, 1[89]\d\d
[01]\d:[0-5]\d
\d{3}-\d{3}-\d{4}
\d+(\.\d+)?
-?(0|[1-9]\d*)
\$\d{1,3}(,\d{3})*( million| billion)?
[$£]\d+
\d+¢
(\d|[1-9]\d|100) per cent
\(\d+( [-+*/] \d+)*\)
\d+( [-+*] \d+)* = \d+
\d+[¼½]
\d+°
[IVXLCDM]+
(0|1)+
(a|b)*abb
(ab|cd)*
(a?){5}
((a|b)(c|d)){1,4}
a{0}b
x?y?z?
.*
.{32}
.
|a
[^a]+
[^aeiou]+
[A-Z]+
[A-Z][a-z]+ [A-Z][a-z]+
(Mr|Mrs|Dr)\. [A-Z][a-z]{2,10}
The [a-z ]{5,20} of the [a-z]+\.
(we|the people|Congress) (shall|must|will) [a-z]+
(yes|no)(, (yes|no))*
true|false|null
no+!
"[^"]*"
“[^“”]*”
'\w+'
\w+(—|–)\w+
[áéíó]+
caf(é|e)s?
[^\x00-\x7f]{1,8}
(• \w+)+
\[(\d+(, \d+)*)?\]
[a-z]+(-[a-z]+)*
\s*\w\s*
\W{2,6}
[\w.]+\?
""".strip().split("\n")


def shorter(texts: list[str]) -> list[float]:
    """The verifier of the searching samplers: shorter texts have higher scores."""
    return [-len(text) / 10 for text in texts]


SAMPLERS: dict[str, dict] = {  # the options of each, beside its steps
    "euler": {},
    "tweedie": {},
    "event_jump": {},
    "ordered": {},
    "confidence": {},
    "entropy_bounded": {},
    "token_confidence": {},
    "remdm": {},
    "semi_autoregressive": {"inner": "event_jump", "block": 8},
    "best_of_n": {"inner": "event_jump", "n": 2, "verifier": shorter},
    "particle": {"inner": "event_jump", "particles": 2, "verifier": shorter},
}


def match(settings: Settings, checkpoint: Path) -> None:
    """Count the samples that match their regex, for each sampler and number of steps.

    The trained model and one with random weights draw them. Exits with code 1 if any sample does
    not match.
    """
    model = sedd.load(checkpoint)
    assert model.tokenizer is not None
    vocabulary, eos_id = model.tokenizer.token_bytes(), model.tokenizer.eos_id
    automata = [compile_regex(pattern, vocabulary, eos_id=eos_id) for pattern in REGEXES]

    def matches(model: sedd.Model, sampler: str, steps: int | None) -> str:
        options: Any = SAMPLERS[sampler] | ({} if steps is None else {"steps": steps})
        result = sedd.sample(
            model,
            jax.random.key(0),
            num=len(automata),
            length=settings.length,
            sampler=sampler,
            constraint=automata,
            **options,
        )
        assert result.text is not None
        pairs = zip(REGEXES, result.text, strict=True)
        good = sum(re.fullmatch(p, text, re.ASCII) is not None for p, text in pairs)
        return f"{good}/{len(automata)}"

    models = {"trained": model, "random": with_noise(model)}
    rows = []
    for sampler in SAMPLERS:
        # entropy_bounded chooses its own number of steps.
        counts = (None,) if sampler == "entropy_bounded" else (1, 4, settings.length)
        for count in counts:
            found = {name: matches(model, sampler, count) for name, model in models.items()}
            rows.append({"sampler": sampler, "steps": count, **found})
            print(*rows[-1].values(), flush=True)
    report("Samples that match their regex", rows, checkpoint=str(checkpoint))
    all_match = f"{len(automata)}/{len(automata)}"
    if any(row[name] != all_match for row in rows for name in models):
        sys.exit(1)


def with_noise(model: sedd.Model) -> sedd.Model:
    """The model with random weights: independent normal numbers with standard deviation 0.3."""
    leaves, tree = jax.tree.flatten(model.denoiser.params)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    return dataclasses.replace(model, denoiser=model.parts.denoiser(tree.unflatten(leaves)))


def main(settings: Settings) -> None:
    """Measure times; with a checkpoint, count matches instead."""
    if settings.checkpoint is None:
        measure(settings)
    else:
        match(settings, settings.checkpoint)


if __name__ == "__main__":
    start(main, Settings, __doc__)
