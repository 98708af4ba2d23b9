"""Evaluation protocols: how text is cut and which estimate is computed, as in published tables.

The perplexity of a model depends on the protocol. Fields that a protocol does not set are taken
from the model: its tokenizer, its length, its way of cutting text. See ``docs/evaluation.md``.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sedd.errors import UserError, did_you_mean
from sedd.evaluation.estimators import Estimator, check_draws

# The data sets of the published zero-shot tables.
ZEROSHOT = ("lambada", "wikitext2", "ptb", "wikitext103", "lm1b", "ag_news", "pubmed", "arxiv")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a text is cut into rows, and how these are evaluated.

    Raises ``ValueError`` if ``draws``, ``t_min``, ``length`` or ``drop_every`` is out of range, or
    ``drop_every`` is given and ``cut`` is not "wrapped".
    """

    estimator: Estimator = "auto"
    """auto: exact (the likelihood itself) for blocks of one token, ordered for any-subset models,
    k_dce (mean over orders) for other time-independent absorbing ones (t_dce, over the orders of
    the noise, with the schedule by_position), else score_entropy. ordered: the likelihood in one
    order, by default forward. Autoregressive models always have exact."""
    outer_terms: bool = True
    """Add the prior and the reconstruction to a score entropy. Without them the figure is no bound,
    but the mean of the loss over t in [t_min, 1]."""
    t_min: float = 1e-3
    """The smallest time of a score entropy, in (0, 1)."""
    draws: int = 64
    """Noise levels for each sequence; a multiple of 4."""
    length: int | None = None
    """Tokens in a row; the model's own by default."""
    tokenizer: str | None = None
    """The name of the tokenizer that the model must have; any by default."""
    cut: Literal["as_trained", "wrapped", "whole", "truncated"] = "as_trained"
    """as_trained: as in the model's training. wrapped: documents, each followed by its end token,
    are joined and cut into rows; the remainder is dropped. whole: the same, but the remainder
    becomes a padded last row, so that every token is scored exactly once. truncated: one row for
    each document; tokens of a document beyond its row are dropped."""
    drop_every: int | None = None
    """If ``cut`` is "wrapped": join this number of documents at a time, cut each group into rows,
    and drop the remainder of each group. None joins all documents into one group."""
    specials: bool = False
    """Begin every row with the token for the beginning of a document and end it with the token for
    the end; both are scored."""
    detokenize: bool = False
    """Undo the data set's tokenisation into words, if the project has a detokenizer for it."""

    def __post_init__(self):
        check_draws(self.draws)
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min must be in (0, 1), got {self.t_min}")
        for name in ("length", "drop_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.drop_every is not None and self.cut != "wrapped":
            raise ValueError(f"drop_every needs cut wrapped, got cut {self.cut}")

    def to_json(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dataclasses.asdict(self)


GPT2 = {"tokenizer": "gpt2", "length": 1024, "cut": "wrapped", "drop_every": 1000}
# default cuts text as in training; sedd and mdlm are the zero-shot tables of these papers, whose
# figures are no bounds; text8 and lm1b are the usual settings of these data sets.
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
# The split of each data set in the published tables; others use their validation split.
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
    """Return the protocol called ``name``, one of ``PROTOCOLS``.

    Raises:
        UserError: if there is none of that name; the message suggests a similar one.
    """
    if name not in PROTOCOLS:
        near = did_you_mean(name, PROTOCOLS)
        raise UserError(f"unknown protocol {name!r}{near or ';'} there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe(name: str, chosen: Protocol) -> str:
    """Return the protocol's name and the fields that depart from it: ``sedd (draws 64)``."""
    before = PROTOCOLS[name].to_json()
    changed = [f"{k} {v}" for k, v in chosen.to_json().items() if v != before[k]]
    return f"{name} ({', '.join(changed)})" if changed else name


def check_fit(
    name: str, chosen: Protocol, *, tokenizer: str, length: int, spelled_out: Collection[str] = ()
) -> None:
    """Check that a model has the tokenizer and the length that a protocol expects.

    Args:
        name: the protocol's name, for the message.
        chosen: the protocol, possibly with some fields changed.
        tokenizer: the name of the model's tokenizer.
        length: tokens in a training row of the model.
        spelled_out: fields that the user set explicitly; a length among them is not checked.

    Raises:
        UserError: if they differ; the message names flags that accept the difference.
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
            f"protocol {name} expects {expected}, and the model has {own}; to evaluate all the "
            f"same, give {flags}: the table then states the departure from the protocol"
        )
