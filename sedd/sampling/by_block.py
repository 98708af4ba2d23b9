"""Draw texts block by block, and hand out each block when it is done: ``sedd.stream``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from sedd.constraints.clamp import Clamp
from sedd.data.tokenizers import Tokenizer
from sedd.denoiser import Denoiser
from sedd.errors import FieldError
from sedd.model import Model
from sedd.networks.mesh import Placement, on_host
from sedd.samplers.base import Sampler, SamplerOptions, State
from sedd.samplers.semi_autoregressive import SemiAutoregressive
from sedd.sampling.arguments import Asked, ask
from sedd.sampling.batch import Prepared, check_drawn, prepare
from sedd.types import Array, Bool, Key, Params

REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What became final since the last piece, for each sequence in the order of the keys."""

    tokens: list[np.ndarray]
    """New token ids; none for a sequence that had ended before. Given tokens are among them."""
    text: list[str] | None
    """New text; None without a tokenizer. The pieces of a sequence join to its text in
    ``sedd.sample``. A character of several tokens comes when it is whole."""
    done: np.ndarray
    """Which sequences are finished, [B]."""
    calls: np.ndarray
    """Network calls of each sequence so far, [B]; they include the second calls of guidance."""


def stream(
    model: Model,
    key: Key[Array, "..."] | int,
    *,
    num: int | None = None,
    length: int | None = None,
    sampler: str | SamplerOptions | Sampler | None = None,
    prompt: str | Sequence[str] | None = None,
    suffix: str | Sequence[str] | None = None,
    infill: str | Sequence[str] | None = None,
    messages: Sequence[Any] | None = None,
    clamp: Clamp | Sequence[Clamp] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Draw sequences by blocks, and yield what is final after each block.

    The sequences are those that ``sedd.sample`` draws with the same arguments, and its arguments
    have the same meaning here. The sampler must be ``semi_autoregressive``, which is the default of
    block models. From piece to piece each unfinished sequence advances by a block or more; the
    iterator ends when all are finished. Two programs are compiled, whatever the number of blocks.

    Args:
        model: from ``sedd.load``.
        key: an integer seed, one key, or a key for each sequence.
        num: number of sequences.
        length: tokens in a sequence, the given ones included.
        sampler: ``"semi_autoregressive"``, or options of it, or built.
        prompt: text at the start.
        suffix: text at the end.
        infill: text with gaps.
        messages: a conversation to answer; its pieces are those of the answer.
        clamp: the given tokens, instead of texts.
        options: options of the sampler and of the ``Reshape``.

    Raises:
        UserError: as ``sedd.sample``, at the call; or, while iterating, if probabilities are nan.
        FieldError: for a bad value, or another sampler.

    Example:
        >>> import sedd
        >>> model = sedd.load("runs/block")
        >>> pieces = sedd.stream(model, 0, prompt=["the ", "a "], length=24)
        >>> texts = ["".join(parts) for parts in zip(*(piece.text for piece in pieces))]
        >>> texts == sedd.sample(model, 0, prompt=["the ", "a "], length=24).text
        True
    """
    texts = {"prompt": prompt, "suffix": suffix, "infill": infill, "messages": messages}
    asked = ask(model, key, texts, options, num=num, length=length, sampler=sampler, clamp=clamp)
    if not isinstance(asked.sampler, SemiAutoregressive):
        name = type(asked.sampler).__module__.rpartition(".")[2]
        raise FieldError(
            "sampler",
            f"must be semi_autoregressive, which finishes a text block by block, got {name}",
        )
    keys_B, sampler, clamps, spans, reshape = asked
    prepared = prepare(model, keys_B, sampler, clamps, spans, reshape=reshape)
    return _pieces(model.tokenizer, asked, prepared)


def _pieces(tokenizer: Tokenizer | None, asked: Asked, prepared: Prepared) -> Iterator[Piece]:
    """The body of ``stream``: a program for the start, and then one for each block."""
    sampler, clamps = asked.sampler, asked.clamps
    assert isinstance(sampler, SemiAutoregressive)
    denoiser, given, placement = prepared
    params, bare = denoiser.params, replace(denoiser, params={})
    calls_each = np.asarray(denoiser.calls_each)
    static = {"sampler": sampler, "placement": placement}
    rows = (bare, *given)
    if placement is not None:
        rows = placement.spread(rows)
    state = _start(params, rows, **static)
    readers = [_Reader(clamp, tokenizer) for clamp in clamps]
    going = True
    while going:
        state, final_BL, active_B = _next_block(params, rows[0], state, **static)
        x_BL, final_BL, active_B, calls_B = on_host((state.x_BL, final_BL, active_B, state.calls_B))
        going = bool(active_B[: len(clamps)].any())
        check_drawn(np.where(final_BL, x_BL, 0)[: len(clamps)], asked.spans)
        new = [
            reader.read(x_BL[b], int(final_BL[b].sum()), done=not active_B[b])
            for b, reader in enumerate(readers)
        ]
        yield Piece(
            tokens=[tokens for tokens, _ in new],
            text=None if tokenizer is None else [text for _, text in new],
            done=~active_B[: len(clamps)],
            calls=(calls_B * calls_each)[: len(clamps)],
        )


class _Reader:
    """What of a sequence was handed out so far."""

    def __init__(self, clamp: Clamp, tokenizer: Tokenizer | None):
        self.clamp, self.tokenizer = clamp, tokenizer
        self.count, self.text = 0, ""

    def read(self, x_L: np.ndarray, final: int, *, done: bool) -> tuple[np.ndarray, str]:
        """Return the new tokens and the new text, given that the first ``final`` are final."""
        final = min(final, self.clamp.length)
        tokens_L, self.count = x_L[self.count : final], final
        if self.tokenizer is None:
            return tokens_L, ""
        clamp = replace(
            self.clamp, tokens_L=self.clamp.tokens_L[:final], fixed_L=self.clamp.fixed_L[:final]
        )
        whole = clamp.text(x_L[:final], self.tokenizer)
        if not done:  # the next token may complete the last character
            whole = whole.rstrip(REPLACEMENT)
        if not whole.startswith(self.text):
            return tokens_L, ""
        text, self.text = whole[len(self.text) :], whole
        return tokens_L, text


@partial(jax.jit, static_argnames=("sampler", "placement"))
def _start(
    params: Params, rows, *, sampler: SemiAutoregressive, placement: Placement | None
) -> State:
    """The state before the first block; ``rows`` as for ``sedd.sampling.batch.run_sampler``."""

    def on_device(params, _, rows):
        denoiser, *given = rows
        return sampler.start(replace(denoiser, params=params), *given)

    if placement is None:
        return on_device(params, None, rows)
    return placement.run(on_device, params, None, rows)


@partial(jax.jit, static_argnames=("sampler", "placement"), donate_argnames="state")
def _next_block(
    params: Params,
    denoiser: Denoiser,
    state: State,
    *,
    sampler: SemiAutoregressive,
    placement: Placement | None,
) -> tuple[State, Bool[Array, "B L"], Bool[Array, " B"]]:
    """Run rounds until every unfinished sequence has left the block in which it is.

    Returns:
        The state, which tokens are final, and which sequences are unfinished.
    """

    def on_device(params, _, rows):
        denoiser, state = rows
        denoiser = replace(denoiser, params=params)
        before_B = state.plan.block_B

        def unfinished(state):
            here_B = state.plan.block_B == before_B
            return denoiser.anywhere(sampler.active(denoiser, state) & here_B)

        state = jax.lax.while_loop(unfinished, partial(sampler.advance, denoiser), state)
        active_B = sampler.active(denoiser, state)
        return state, sampler.finished(state) | ~active_B[:, None], active_B

    if placement is None:
        return on_device(params, None, (denoiser, state))
    return placement.run(on_device, params, None, (denoiser, state))
