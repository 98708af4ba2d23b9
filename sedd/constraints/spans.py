"""Joint draws over spans of positions, each under its own automaton, for the samplers.

A span is a stretch of one sequence that must match. ``spans_of`` builds the spans of a sequence
from its gaps and checks that they can match; ``batch_spans`` packs those of a batch into ``Spans``,
the constraint that samplers call. ``decode`` has the same dynamic programs for one sequence, with
no sampler involved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.arrays import NAN, bucket, position_keys
from sedd.constraints.base import Constraint
from sedd.constraints.clamp import Clamp
from sedd.constraints.decode import Automaton
from sedd.constraints.recursions import (
    ZERO,
    class_tokens,
    given_masses,
    gumbel,
    masses,
    no_noise,
    suffix_values,
    walk,
)
from sedd.constraints.tables import Sizes, Tables, sizes_of, tables
from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.networks.rows import CHUNK_BYTES, COPIES
from sedd.types import Array, Bool, Float, Int, Key

Rule = Literal["joint", "most_likely", "dingo"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A requirement: the ``length`` positions from ``start`` on spell a match of the automaton."""

    start: int
    length: int
    automaton: Automaton


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Spans(Constraint):
    """The spans of a batch, and the rule by which a step proposes tokens for them.

    The rules, all given the revealed tokens of a span:

    - ``joint``: a sample from the product of the positions' conditionals, restricted to matching
      strings. It is exact for one step. Several steps do not draw from the model's law, with or
      without a constraint, because each step takes the positions as independent.
    - ``most_likely``: the most likely matching string under that product.
    - ``dingo``: as ``most_likely``, but every token has log probability 0 at the positions that the
      step does not reveal (arXiv:2505.23061). It can commit to a branch that the model finds
      unlikely.

    Tokens that ``Reshape`` excludes are proposed only where the language allows no other token.

    All spans of all sequences are processed together, without a loop. Log conditionals are read for
    a chunk of positions at a time and reduced to token classes at once. The memory is [B, K, W, C]
    and one chunk of rows of the vocabulary.

    Attributes:
        rule: one of the rules above.
        width: W, the padded length of the spans.
        tables: the automaton of every span; each array has the leading axes [B, K].
        start_BK: the first position of each of K spans a sequence.
        length_BK: the length of each span, 0 for padding where a sequence has fewer spans.
    """

    rule: Rule = field(metadata={"static": True})
    width: int = field(metadata={"static": True})
    tables: Tables
    start_BK: Int[Array, "B K"]
    length_BK: Int[Array, "B K"]

    @property
    def wants_commit(self):
        return self.rule == "dingo"

    def inside(self, length):
        index_L = jnp.arange(length)
        start_BK1, length_BK1 = self.start_BK[..., None], self.length_BK[..., None]
        return ((index_L >= start_BK1) & (index_L < start_BK1 + length_BK1)).any(1)

    def propose(self, keys_B, x_BL, commit_BL, read, mask_id):
        """See ``Constraint.propose``.

        The spans of all sequences are flattened to one axis, S = B·K. First the log conditionals of
        masked positions are reduced to draws, chunk by chunk. Then each span runs the backward and
        the forward pass of ``recursions`` in the semiring of the rule.
        """
        batch, length = x_BL.shape
        count = self.start_BK.shape[1]
        start_S, length_S = self.start_BK.ravel(), self.length_BK.ravel()
        table_S = jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), self.tables)
        offset_W = jnp.arange(self.width)
        place_SW = jnp.minimum(start_S[:, None] + offset_W, length - 1)
        inside_SW = offset_W < length_S[:, None]

        def of_spans(values_BL):
            """The values at the positions of the spans: [B, L] to [S, W]."""
            by_span = values_BL[:, None].repeat(count, 1).reshape(batch * count, length)
            return jnp.take_along_axis(by_span, place_SW, 1)

        x_SW, commit_SW = of_spans(x_BL), of_spans(commit_BL)
        masked_SW = inside_SW & (x_SW == mask_id)
        best = self.rule != "joint"

        def read_chunk(place_SR):
            """The draws at some positions of each span."""
            log_probs_BRN = read(place_SR.reshape(batch, -1))
            log_probs_SRN = log_probs_BRN.reshape(*place_SR.shape, -1)
            key_SR = None
            if not best:
                sequence_SR = jnp.arange(batch * count)[:, None] // count
                sequence_SR = jnp.broadcast_to(sequence_SR, place_SR.shape)
                keys_R = position_keys(keys_B, sequence_SR.ravel(), place_SR.ravel())
                key_SR = keys_R.reshape(place_SR.shape)
            return jax.vmap(partial(class_draws, best=best))(table_S, log_probs_SRN, key_SR)

        draws = _in_chunks(masked_SW, place_SW, table_S, read_chunk)

        def one(table, length, x_W, free_W, wild_W, draws):
            """The tokens of one span; positions of ``wild_W`` may have any token at no cost."""
            mass_WC = given_masses(table, draws.mass_WC, jnp.where(free_W, -1, x_W))
            mass_WC = jnp.where(wild_W[:, None], 0.0, mass_WC)
            final_S = jnp.where(table.accepting_S, 0.0, ZERO)
            value_WS = suffix_values(table, mass_WC, final_S, length, best=best)
            noisy_WC = mass_WC + draws.noise_WC
            start = jnp.zeros((), jnp.int32)
            return walk(table, noisy_WC, draws.token_WC, value_WS, start, length)

        # Under the rule dingo, positions that are not revealed now have masses of 1.
        wild_SW = masked_SW & ~commit_SW if self.rule == "dingo" else jnp.zeros_like(masked_SW)
        drawn_SW = jax.vmap(one)(table_S, length_S, x_SW, masked_SW, wild_SW, draws)
        drawn_SW = jnp.where(masked_SW, jnp.where(draws.nan_W, NAN, drawn_SW), x_SW)
        into_SW = jnp.where(inside_SW, place_SW, length)  # out of range, and dropped, as padding
        rows_S1 = (jnp.arange(batch * count) // count)[:, None]
        return x_BL.at[rows_S1, into_SW].set(drawn_SW, mode="drop")

    def repeat(self, count):
        arrays = (self.tables, self.start_BK, self.length_BK)
        repeated = jax.tree.map(lambda each: jnp.repeat(each, count, 0), arrays)
        tables, start_BK, length_BK = repeated
        return replace(self, tables=tables, start_BK=start_BK, length_BK=length_BK)


class Draws(NamedTuple):
    """The log conditionals of a span, reduced to what the backward and forward pass need.

    Attributes:
        mass_WC: the log mass of each token class at each position.
        token_WC: a token drawn from each class.
        noise_WC: Gumbel noise of each class, for the draw of a class.
        nan_W: whether the log conditionals of the position contain nan.
    """

    mass_WC: Float[Array, "*s W C"]
    token_WC: Int[Array, "*s W C"]
    noise_WC: Float[Array, "*s W C"]
    nan_W: Bool[Array, "*s W"]


def class_draws(
    table: Tables, log_probs_RN: Float[Array, "R N"], keys_R: Key[Array, " R"] | None, *, best: bool
) -> Draws:
    """The draws of R positions. If ``best``, the most likely tokens and no noise."""
    mass = masses(table, log_probs_RN, best=best)
    noise = no_noise(table, len(log_probs_RN)) if keys_R is None else gumbel(table, keys_R)
    token_CR = class_tokens(table, mass, noise)
    return Draws(mass.class_CR.T, token_CR.T, noise.class_CR.T, jnp.isnan(log_probs_RN).any(1))


def _in_chunks(
    masked_SW: Bool[Array, "S W"],
    place_SW: Int[Array, "S W"],
    table_S: Tables,
    read_chunk: Callable[[Array], Draws],
) -> Draws:
    """The draws at the masked positions of every span; unspecified values elsewhere.

    Each span's masked positions are sorted to its front and read R at a time, where R is such that
    the log conditionals of a chunk fit into ``CHUNK_BYTES``. The span with the most masked
    positions sets the number of chunks. So no array has the rows of a whole span, and revealed
    positions cost no work.

    Args:
        masked_SW: whether each position of each span is masked.
        place_SW: its position in the sequence.
        table_S: the automata of the spans.
        read_chunk: the draws at some positions [S, R].
    """
    spans, width = masked_SW.shape
    num_tokens, classes = table_S.class_of_N.shape[1], table_S.num_classes
    rows = min(max(CHUNK_BYTES // (4 * COPIES * num_tokens * spans), 1), width)
    order_SW = jnp.argsort(~masked_SW, axis=1, stable=True)
    most = masked_SW.sum(1).max()

    def chunk(i, draws):
        # ``dynamic_slice`` moves the last chunk back over positions that are done. Their draws are
        # the same again, because the noise depends on the position alone.
        order_SR = jax.lax.dynamic_slice_in_dim(order_SW, i * rows, rows, 1)
        new = read_chunk(jnp.take_along_axis(place_SW, order_SR, 1))
        index = (jnp.arange(spans)[:, None], order_SR)
        return jax.tree.map(lambda old, values: old.at[index].set(values), draws, new)

    empty = Draws(
        mass_WC=jnp.zeros((spans, width, classes)),
        token_WC=jnp.zeros((spans, width, classes), jnp.int32),
        noise_WC=jnp.zeros((spans, width, classes)),
        nan_W=jnp.zeros((spans, width), bool),
    )
    return jax.lax.fori_loop(0, -(-most // rows), chunk, empty)


Given = Automaton | Sequence[Automaton | None] | None


def spans_of(clamp: Clamp, given: Given, tokenizer: Tokenizer | None = None) -> list[Span]:
    """The spans of a sequence, checked to be satisfiable.

    Args:
        clamp: the given tokens of the sequence.
        given: one automaton for everything from the first free position to the last, given tokens
            in between included; or a list with an automaton or None for each gap of the clamp.
        tokenizer: decodes the tokens that messages show.

    Raises:
        UserError: the list and the gaps differ in number, or no match has the length and the given
            tokens of a span.
    """
    if given is None:
        return []
    gaps = clamp.gaps
    if not gaps:
        raise UserError("a constraint needs a gap, and every token is given")
    over = ""  # a note for messages, where one automaton covers several gaps
    if isinstance(given, Automaton):
        first, end = gaps[0][0], sum(gaps[-1])
        spans = [Span(start=first, length=end - first, automaton=given)]
        if len(gaps) > 1:
            over = (
                f" (one constraint for {len(gaps)} gaps must match the whole stretch from the "
                "first gap to the last, the given text between included; to constrain each gap "
                "alone, give a list with one constraint for each gap)"
            )
    else:
        if len(gaps) != len(given):
            shown = ", ".join(f"{start} to {start + size - 1}" for start, size in gaps)
            raise UserError(
                f"{len(given)} constraints for {len(gaps)} gaps (positions {shown}): every {{mask}}"
                " is a gap, and so are free tokens before, between or behind given ones; a gap "
                "without a constraint has null"
            )
        spans = [
            Span(start=start, length=size, automaton=automaton)
            for (start, size), automaton in zip(gaps, given, strict=True)
            if automaton is not None
        ]

    def text_of(token):
        return "" if tokenizer is None else tokenizer.decode([token], keep_eos=True)

    for span in spans:
        inside = slice(span.start, span.start + span.length)
        fixed = np.where(clamp.fixed_L[inside], clamp.tokens_L[inside], -1)
        try:
            span.automaton.check_span(span.length, fixed=fixed, first=span.start, text_of=text_of)
        except UserError as error:
            raise UserError(f"{error}{over}") from None
    return spans


class Shape(NamedTuple):
    """The padded sizes of a ``Spans``; batches of the same sizes share a compiled program.

    Attributes:
        tables: the sizes of the automata.
        spans: the number of spans a sequence.
        width: the length of a span.
    """

    tables: Sizes
    spans: int
    width: int

    def joined(self, other: "Shape") -> "Shape":
        """The smallest shape into which both fit."""
        sizes = map(max, self.tables, other.tables)
        return Shape(Sizes(*sizes), max(self.spans, other.spans), max(self.width, other.width))


def shape_of(spans_B: Sequence[Sequence[Span]]) -> Shape:
    """The smallest shape into which the spans of some sequences fit; at least one has a span."""
    each = [span for row in spans_B for span in row]
    return Shape(
        tables=sizes_of({id(span.automaton): span.automaton for span in each}.values()),
        spans=bucket(max(len(row) for row in spans_B)),
        width=bucket(max(span.length for span in each)),
    )


def batch_spans(spans_B: Sequence[Sequence[Span]], rule: Rule, shape: Shape | None = None) -> Spans:
    """Pack the spans of a batch.

    Args:
        spans_B: the spans of each sequence; at least one sequence has a span.
        rule: the rule of ``Spans``.
        shape: the sizes to pad to, by default the smallest ones. Batches of one shape share a
            program, so the batches of one file should have the shape of the whole file.
    """
    shape = shape_of(spans_B) if shape is None else shape
    first, *_ = (span for row in spans_B for span in row)
    nothing = Span(start=0, length=0, automaton=first.automaton)
    rows = [[*row, *[nothing] * (shape.spans - len(row))] for row in spans_B]
    made: dict[int, Tables] = {}
    for span in (span for row in rows for span in row):
        if id(span.automaton) not in made:
            made[id(span.automaton)] = tables(span.automaton, shape.tables)
    each = [made[id(span.automaton)] for row in rows for span in row]

    def stacked(*arrays):
        return jnp.asarray(np.stack(arrays).reshape(len(rows), shape.spans, *arrays[0].shape))

    return Spans(
        rule=rule,
        width=shape.width,
        tables=jax.tree.map(stacked, *each),
        start_BK=jnp.asarray([[span.start for span in row] for row in rows], jnp.int32),
        length_BK=jnp.asarray([[span.length for span in row] for row in rows], jnp.int32),
    )
