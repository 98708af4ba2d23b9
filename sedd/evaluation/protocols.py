"""How a perplexity is measured: published tables differ in it, and their figures with it.

The same model scores differently under each protocol. What a protocol does not fix it leaves to the
model: its tokenizer, its length, its way of cutting text. See ``docs/evaluation.md``.
"""

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sedd.errors import UserError
from sedd.evaluation.bound import Estimator, check_draws

ZEROSHOT = ("lambada", "wikitext2", "ptb", "wikitext103", "lm1b", "ag_news", "pubmed", "arxiv")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is evaluated, and how."""

    estimator: Estimator = "auto"
    """auto: k_dce (the mean over orders) for time-independent absorbing models, else the other."""
    outer_terms: bool = True
    """Add the prior and the reconstruction to a score entropy. Left out, the figure is no bound: it
    is the mean of the loss over t in [t_min, 1]."""
    t_min: float = 1e-3
    """The smallest time of a score entropy."""
    draws: int = 64
    """Noise levels a sequence; a multiple of 4."""
    length: int | None = None
    """Tokens in a row; the model's own by default."""
    tokenizer: str | None = None
    """The tokenizer that the model must have; any by default."""
    cut: Literal["as_trained", "wrapped", "truncated"] = "as_trained"
    """wrapped: documents joined, each with its end, cut into rows. truncated: a document a row, its
    rest cut off."""
    drop_every: int | None = None
    """Documents after which the remainder is dropped; once at the end by default (wrapped)."""
    specials: bool = False
    """Open every row with the beginning of a document and close it with the end, both scored."""
    detokenize: bool = False
    """Undo the data set's separation of words, where it has a detokenizer."""

    def __post_init__(self):
        check_draws(self.draws)
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min must be in (0, 1), got {self.t_min}")
        for name in ("length", "drop_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.drop_every is not None and self.cut != "wrapped":
            raise ValueError("drop_every is a rule of wrapped text: it takes --cut wrapped")

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self)


GPT2 = {"tokenizer": "gpt2", "length": 1024, "cut": "wrapped", "drop_every": 1000}
PROTOCOLS = {
    "default": Protocol(),
    "sedd": Protocol(
        **GPT2, estimator="score_entropy", outer_terms=False, draws=1000, detokenize=True
    ),
    "mdlm": Protocol(
        **GPT2, estimator="score_entropy", outer_terms=False, specials=True, detokenize=True
    ),
    "text8": Protocol(tokenizer="text8", length=256, cut="wrapped"),
    "lm1b": Protocol(tokenizer="bert-base-uncased", length=128, cut="truncated", detokenize=True),
}
# Which split of a data set was published; elsewhere the one that validates.
SPLITS = {
    "sedd": {
        **dict.fromkeys(("lambada", "ptb", "wikitext103", "lm1b", "ag_news", "text8"), "test"),
        "wikitext2": "train",
    },
    "mdlm": dict.fromkeys(("lambada", "lm1b", "ag_news", "text8"), "test"),
    "text8": {"text8": "test"},
    "lm1b": {"lm1b": "test"},
}


def protocol(name: str) -> Protocol:
    """The protocol of that name; UserError with a suggestion where there is none."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise UserError(f"unknown protocol {name!r}{hint} There are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe(name: str, chosen: Protocol) -> str:
    """The name, with what was changed: ``sedd (draws 64)``."""
    before = PROTOCOLS[name].to_json()
    changed = [f"{k} {v}" for k, v in chosen.to_json().items() if v != before[k]]
    return f"{name} ({', '.join(changed)})" if changed else name


def check_fit(
    name: str, chosen: Protocol, *, tokenizer: str, length: int, spelled_out: Collection[str] = ()
) -> None:
    """UserError where the protocol expects another tokenizer or length than the model has.

    A length among the fields that were ``spelled_out`` is meant as it is.
    """
    wrong = []
    if chosen.tokenizer not in (None, tokenizer):
        wrong.append(("tokenizer", chosen.tokenizer, tokenizer))
    if chosen.length not in (None, length) and "length" not in spelled_out:
        wrong.append(("length", chosen.length, length))
    if wrong:
        expected = " and ".join(f"{what} {value}" for what, value, _ in wrong)
        own = " and ".join(str(has) for *_, has in wrong)
        flags = " ".join(f"--{what} {has}" for what, _, has in wrong)
        raise UserError(
            f"protocol {name} expects {expected}, and the model has {own}; with {flags} it is "
            "departed from, and the table says so"
        )
