"""Spans of sequences that must match a regex each, for the samplers. arXiv:2505.23061."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN, bucket
from sedd.constraints.base import Constraint
from sedd.constraints.clamp import Clamp
from sedd.constraints.decode import (
    ZERO,
    Automaton,
    Tables,
    clamp,
    class_mass,
    sizes,
    suffix_values,
    tables,
    walk,
)
from sedd.errors import UserError
from sedd.types import Array, Int

Rule = Literal["joint", "most_likely", "dingo"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """``length`` positions from ``start`` on whose text matches."""

    start: int
    length: int
    automaton: Automaton


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Spans(Constraint):
    """Each sequence's spans. By ``rule`` a proposal is

    - joint: a sample from the product of the positions' conditionals restricted to the language,
      given what is revealed. Exact per step; what several steps draw is another matter, as it is
      without a constraint;
    - most_likely: the string of the highest probability instead;
    - dingo: the same, but a position that is not revealed in this step may hold anything that the
      language allows, at no cost (arXiv:2505.23061). It can commit to a branch that the model finds
      unlikely.

    Tokens that ``Reshape`` has left out are used only where the language leaves no other.
    """

    rule: Rule = field(metadata={"static": True})
    width: int = field(metadata={"static": True})  # of the longest span, at least
    tables: Tables  # [A, …]
    automaton_BK: Int[Array, "B K"]
    start_BK: Int[Array, "B K"]
    length_BK: Int[Array, "B K"]  # 0 where a sequence has fewer spans

    @property
    def wants_commit(self):
        return self.rule == "dingo"

    def inside(self, length):
        index_L = jnp.arange(length)
        start_BK1, length_BK1 = self.start_BK[..., None], self.length_BK[..., None]
        return ((index_L >= start_BK1) & (index_L < start_BK1 + length_BK1)).any(1)

    def propose(self, keys_B, x_BL, commit_BL, read, mask_id):
        rows_B1 = jnp.arange(len(x_BL))[:, None]

        def one(tokens_BL, span):
            automaton_B, start_B, length_B = span
            offset_W = jnp.arange(self.width)
            places_BW = start_B[:, None] + offset_W
            within_BW = jnp.minimum(places_BW, x_BL.shape[1] - 1)

            def row(arguments):
                automaton, length, log_probs_WN, x_W, commit_W, key, places_W = arguments
                table = jax.tree.map(lambda stack: stack[automaton], self.tables)
                masked_W = x_W == mask_id
                log_probs_WN = clamp(log_probs_WN, jnp.where(masked_W, -1, x_W))
                if self.rule == "dingo":
                    wild_W = masked_W & ~commit_W
                    log_probs_WN = jnp.where(wild_W[:, None], 0.0, log_probs_WN)
                best = self.rule != "joint"
                mass_WC = class_mass(table, log_probs_WN, best=best)
                final_S = jnp.where(table.accepting_S, 0.0, ZERO)
                value_WS = suffix_values(table, mass_WC, final_S, length, best=best)
                keys_W = None if best else jax.vmap(jax.random.fold_in, (None, 0))(key, places_W)
                start = jnp.zeros((), int)
                drawn_W = walk(table, log_probs_WN, mass_WC, value_WS, start, length, keys_W)
                return jnp.where(jnp.isnan(log_probs_WN).any(1), NAN, drawn_W)

            def take(values_BL):
                return jnp.take_along_axis(values_BL, within_BW, 1)

            drawn_BW = jax.lax.map(
                row,
                (
                    automaton_B,
                    length_B,
                    read(within_BW),
                    take(x_BL),
                    take(commit_BL),
                    keys_B,
                    places_BW,
                ),
            )
            outside = x_BL.shape[1]
            into_BW = jnp.where(offset_W < length_B[:, None], places_BW, outside)
            return tokens_BL.at[rows_B1, into_BW].set(drawn_BW, mode="drop"), None

        spans = (self.automaton_BK.T, self.start_BK.T, self.length_BK.T)
        return jax.lax.scan(one, x_BL, spans)[0]

    def repeat(self, count):
        automaton_BK, start_BK, length_BK = (
            jnp.repeat(values_BK, count, 0)
            for values_BK in (self.automaton_BK, self.start_BK, self.length_BK)
        )
        return replace(self, automaton_BK=automaton_BK, start_BK=start_BK, length_BK=length_BK)


Given = Automaton | Sequence[Automaton | None] | None


def spans_of(clamp: Clamp, given: Given) -> list[Span]:
    """Where a sequence's constraints are: an automaton is that of all from its first free position
    to its last, given tokens in between included; a list has one, or None, for each of its gaps.

    UserError where there are not as many gaps, or no string goes with the lengths and the given
    tokens.
    """
    if given is None:
        return []
    free = np.flatnonzero(~clamp.fixed_L)
    if not len(free):
        raise UserError("a constraint needs a gap, and every token is given")
    if isinstance(given, Automaton):
        spans = [Span(start=int(free[0]), length=int(free[-1] - free[0] + 1), automaton=given)]
    else:
        gaps = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
        if len(gaps) != len(given):
            raise UserError(f"{len(given)} constraints for {len(gaps)} gaps")
        spans = [
            Span(start=int(gap[0]), length=len(gap), automaton=automaton)
            for gap, automaton in zip(gaps, given, strict=True)
            if automaton is not None
        ]
    for span in spans:
        inside = slice(span.start, span.start + span.length)
        fixed = np.where(clamp.fixed_L[inside], clamp.tokens_L[inside], -1)
        span.automaton.check_span(span.length, fixed=fixed, first=span.start)
    return spans


def batch_spans(spans_B: Sequence[Sequence[Span]], rule: Rule) -> Spans:
    """The spans of a batch, at least one in all, with its automata padded to one size."""
    automata = list({id(s.automaton): s.automaton for row in spans_B for s in row}.values())
    index = {id(automaton): i for i, automaton in enumerate(automata)}
    size = tuple(max(each) for each in zip(*map(sizes, automata), strict=True))
    stacked = [tables(automaton, size) for automaton in automata]
    stacked += stacked[:1] * (bucket(len(stacked)) - len(stacked))
    shape = (len(spans_B), bucket(max(len(row) for row in spans_B)))
    which, start, length = (np.zeros(shape, np.int32) for _ in range(3))
    for i, row in enumerate(spans_B):
        for j, span in enumerate(row):
            which[i, j], start[i, j] = index[id(span.automaton)], span.start
            length[i, j] = span.length
    return Spans(
        rule=rule,
        width=bucket(int(length.max())),
        tables=jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *stacked),
        automaton_BK=jnp.asarray(which),
        start_BK=jnp.asarray(start),
        length_BK=jnp.asarray(length),
    )
