"""What a constraint costs: to compile it for GPT-2's vocabulary, and a step of decoding with it.

Compile time is that of a pattern to a ready automaton, after the vocabulary was indexed once. The
steps are for the product of 64 positions' distributions at batch 1, beside one call of a network of
GPT-2-small's shape on the same 64 tokens. `temporary` is what the compiled step holds on the device
beside its arguments; states × vocabulary in float32 would be `dense`.

    python benchmarks/constrained.py
    python benchmarks/constrained.py --checkpoint runs/quickstart
"""

import dataclasses
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from report import report, seconds

import sedd
from sedd.components import build
from sedd.config import default_cache_dir
from sedd.constraints import compile_regex, decode
from sedd.constraints.decode import Automaton
from sedd.constraints.json_schema import schema_to_regex
from sedd.constraints.token_automaton import Vocabulary, compile_tokens
from sedd.data.tokenizers import build_tokenizer

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
    """What to measure."""

    length: int = 64
    repeats: int = 3
    tokenizer: str = "gpt2"
    cache_dir: Path = Path(default_cache_dir()).expanduser()
    """Where the tokenizer is kept, if it has to be downloaded."""
    hidden_dim: int = 768
    num_layers: int = 12
    checkpoint: Path | None = None
    """Draw with this model instead, and count what matches."""
    num: int = 50


def steps(automaton: Automaton, length: int, repeats: int):
    """Milliseconds of each question, and the bytes that the likeliest string's program holds."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((length, len(automaton.class_of))), jnp.float32)
    log_probs = jax.nn.log_softmax(2 * logits)
    (padded, fixed, final), start, size = automaton._ask(log_probs)
    asked = (automaton.tables, padded, fixed, final, jnp.asarray(start), jnp.asarray(size))
    keys = jax.random.split(jax.random.key(0), (1, len(padded)))
    program = decode._most_likely.lower(*asked).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "most likely": 1e3 * seconds(lambda: decode._most_likely(*asked), repeats),
        "sample": 1e3 * seconds(lambda: decode._sample(*asked, keys), repeats),
        "marginals": 1e3 * seconds(lambda: decode._marginals(*asked), repeats),
        "temporary MB": memory.temp_size_in_bytes / 1e6,
        "dense MB": 4e-6 * automaton.num_states * len(automaton.class_of),
    }


def network_call(num_tokens: int, settings: Settings) -> float:
    """Milliseconds of a call, output layer included."""
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
    """Compile times and steps, with GPT-2's vocabulary."""
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
        row["of a call"] = f"{row['most likely'] / call:.1%}"
        rows.append(row)
    report(
        "Constrained decoding, milliseconds a step",
        rows,
        length=settings.length,
        indexed_seconds=round(indexed, 3),
        network_call_ms=round(call, 2),
    )


REGEXES = [
    r"\d{4}-\d\d-\d\d",
    "[A-Z][a-z]+ [A-Z][a-z]+",
    r"(Mr|Mrs|Dr)\. [A-Z][a-z]{2,10}",
    r"\$\d{1,3}(,\d{3})*( million| billion)?",
    r"The [a-z ]{5,30} of the [a-z]+\.",
    '"[^"]*"',
    "(yes|no)(, (yes|no))*",
    r"[a-z]+@[a-z]+\.(gov|org)",
    r"\(\d+( [-+*] \d+)*\)",
    r"[^aeiou]+",
]


def match(settings: Settings, checkpoint: Path) -> None:
    """How much of what a trained model draws matches, by sampler and steps; all of it should."""
    model = sedd.load(checkpoint)
    assert model.tokenizer is not None
    vocabulary, eos_id = model.tokenizer.token_bytes(), model.tokenizer.eos_id
    patterns = [REGEXES[i % len(REGEXES)] for i in range(settings.num)]
    automata = {p: compile_regex(p, vocabulary, eos_id=eos_id) for p in set(patterns)}
    rows = []
    for sampler in ("tweedie", "euler", "event_jump", "confidence", "token_confidence", "remdm"):
        for count in (1, 4, settings.length):
            result = sedd.sample(
                model,
                jax.random.key(0),
                num=settings.num,
                length=settings.length,
                sampler=sampler,
                steps=count,
                constraint=[automata[p] for p in patterns],
            )
            assert result.text is not None
            good = sum(
                re.fullmatch(p, text, re.ASCII) is not None
                for p, text in zip(patterns, result.text, strict=True)
            )
            rows.append({"sampler": sampler, "steps": count, "match": f"{good}/{settings.num}"})
    report("Samples that match their regex", rows, checkpoint=str(checkpoint))


def main(settings: Settings) -> None:
    """Measure, or with a checkpoint count matches."""
    if settings.checkpoint is None:
        measure(settings)
    else:
        match(settings, settings.checkpoint)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
