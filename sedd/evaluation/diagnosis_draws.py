"""Draws masks at given rates, and reads what a model predicts at the masked positions.

The readings are sums over positions for each sequence, mask rate and distance to the nearest
revealed token. ``sedd.evaluation.diagnosis`` makes figures with errors over sequences from them.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from sedd.arrays import at, fold
from sedd.denoiser import Denoiser
from sedd.evaluation.stratified import tile
from sedd.networks.base import read_out
from sedd.networks.rows import Rows
from sedd.samplers.noise import tokens_at
from sedd.types import Array, Bool, Float, Int, Key

POSITIONS = ("count", "entropy", "nats", "accuracy", "kl_unigram", "commonest_top1")
PAIRS = ("neighbours", "neighbour_tv", "pairs", "pair_tv")
READINGS = (*POSITIONS, *PAIRS)  # K sums over positions or pairs of neighbours


@dataclass(frozen=True, kw_only=True)
class DiagnosisDraws:
    """Sums of the readings of each sequence of a batch, by mask rate and distance.

    Each draw masks every scored position with the probability of its rate, independently. It takes
    two network calls: one for the predictions of all masked positions, and one in which the first
    token of one pair of masked neighbours, drawn from its prediction, is revealed.

    Args:
        rates: R mask rates, in (0, 1).
        repeats: masks of each rate.
        padded: whether positions behind the last scored one are padding, which is no revealed
            token. Otherwise they are given.
    """

    rates: tuple[float, ...]
    repeats: int
    padded: bool

    def __call__(self, denoiser, schedule, keys_B, x0_BL, scored_BL, log_unigram_N) -> Array:
        """The sums [B, R, D, K]: over repeats, of D bins of ``distance_bins`` and K ``READINGS``.

        The masks of one rate tile a random order of the positions, so that each position is masked
        about equally often.
        """
        segment_BL = self._segments(denoiser, scored_BL)

        def draw(number):
            index, repeat = number // self.repeats, number % self.repeats
            rate = jnp.asarray(self.rates, jnp.float32)[index]
            own_B = fold(keys_B, index)
            whole_B = jnp.ones(len(x0_BL))
            begin = (repeat * rate) % 1
            place_BL = _uniform(fold(own_B, 0), x0_BL)
            chosen_BL = tile(place_BL, whole_B, begin * whole_B, rate * whole_B)
            masked_BL = chosen_BL & scored_BL & (segment_BL > 0)
            return readings(
                *(denoiser, fold(own_B, 1 + repeat), x0_BL, masked_BL, segment_BL),
                *(-jnp.log1p(-rate) * whole_B, log_unigram_N),
            )

        sums_MBDK = jax.lax.map(draw, jnp.arange(len(self.rates) * self.repeats))
        sums_RTBDK = sums_MBDK.reshape(len(self.rates), self.repeats, *sums_MBDK.shape[1:])
        return jnp.moveaxis(sums_RTBDK.sum(1), 0, 1)

    def _segments(self, denoiser: Denoiser, scored_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """The segment of each position; 0 for padding."""
        segment_BL = jnp.ones(scored_BL.shape, jnp.int32)
        if denoiser.attend is not None and denoiser.attend.segment_BL is not None:
            segment_BL = jnp.broadcast_to(denoiser.attend.segment_BL, scored_BL.shape)
        if not self.padded:
            return segment_BL
        behind_BL = jnp.cumsum(scored_BL[:, ::-1], 1)[:, ::-1] == 0
        return jnp.where(behind_BL, 0, segment_BL)


def readings(
    denoiser: Denoiser,
    keys_B: Key[Array, " B"],
    x0_BL: Int[Array, "B L"],
    masked_BL: Bool[Array, "B L"],
    segment_BL: Int[Array, "B L"],
    sigma_B: Float[Array, " B"],
    log_unigram_N: Float[Array, " N"],
) -> Float[Array, "B D K"]:
    """Read the predictions of masked tokens, and sum them up by distance; two network calls.

    Args:
        denoiser: the model.
        keys_B: draw a pair of masked neighbours and the first token of it.
        x0_BL: clean tokens.
        masked_BL: the positions that are masked.
        segment_BL: the segment of each position, consecutive positions each; 0 for padding.
        sigma_B: total noise that a time-dependent model is given, in both calls.
        log_unigram_N: log probabilities of the tokens by their frequencies.
    """
    length = x0_BL.shape[1]
    call = _Call.of(denoiser, jnp.where(masked_BL, denoiser.mask_id, x0_BL), sigma_B)
    right_BL = masked_BL & (segment_BL == jnp.roll(segment_BL, 1, 1)) & (jnp.arange(length) > 0)
    pair_BL = masked_BL & jnp.roll(right_BL, -1, 1)  # at the left one of two masked neighbours
    apart_BL = denoiser.map_rows(
        pair_BL,
        lambda rows: _total_variation(call.probs(rows), call.right_probs(rows)),
        jnp.float32,
        copies=2,
    )
    one_BL, dependence_BL = _dependence(call, keys_B, pair_BL, sigma_B)
    # The drawn pair stands for all pairs of its sequence.
    weight_BL = one_BL * pair_BL.sum(1, keepdims=True).astype(jnp.float32)
    of_pairs = (pair_BL.astype(jnp.float32), apart_BL, weight_BL, weight_BL * dependence_BL)
    distance_BL = nearest_revealed(~masked_BL & (segment_BL > 0), segment_BL)
    nearer_BL = jnp.minimum(distance_BL, jnp.roll(distance_BL, -1, 1))
    sums = (
        _sums(distance_BL, masked_BL, _predictions(call, x0_BL, masked_BL, log_unigram_N)),
        _sums(nearer_BL, pair_BL, jnp.stack(of_pairs, -1)),
    )
    return jnp.concatenate(sums, -1)


@dataclass(frozen=True)
class _Call:
    """A network call and its predictions at masked positions, normalised over real tokens."""

    denoiser: Denoiser
    x_BL: Int[Array, "B L"]
    hidden: tuple[Float[Array, "B L D"], ...]

    @classmethod
    def of(cls, denoiser: Denoiser, x_BL: Int[Array, "B L"], sigma_B: Float[Array, " B"]):
        return cls(denoiser, x_BL, denoiser.hidden(x_BL, sigma_B))

    def log_probs(self, rows: Rows) -> Float[Array, "R N"]:
        head = self.denoiser.network.head(self.denoiser.params)
        raw_RV = read_out(rows.pick(self.hidden[0]), *head)
        return jax.nn.log_softmax(self.denoiser.parameterization.masked_logits(raw_RV))

    def probs(self, rows: Rows) -> Float[Array, "R N"]:
        return jnp.exp(self.log_probs(rows))

    def right_probs(self, rows: Rows) -> Float[Array, "R N"]:
        """The probabilities at the right neighbour of each row."""
        last = self.x_BL.shape[1] - 1
        right = replace(rows, position_R=jnp.minimum(rows.position_R + 1, last))
        return self.probs(right)


def _predictions(
    call: _Call,
    x0_BL: Int[Array, "B L"],
    masked_BL: Bool[Array, "B L"],
    log_unigram_N: Float[Array, " N"],
) -> Float[Array, "B L Q"]:
    """``POSITIONS`` at masked positions."""

    def read(rows: Rows):
        log_p_RN = call.log_probs(rows)
        p_RN, top_R, token_R = jnp.exp(log_p_RN), log_p_RN.argmax(-1), rows.pick(x0_BL)
        entropy_R = jax.scipy.special.entr(p_RN).sum(-1)
        kl_R = jnp.maximum(-(p_RN * log_unigram_N).sum(-1) - entropy_R, 0)  # rounding
        columns = (
            *(jnp.ones_like(kl_R), entropy_R, -at(log_p_RN, token_R), top_R == token_R),
            *(kl_R, top_R == log_unigram_N.argmax()),
        )
        return jnp.stack([column.astype(jnp.float32) for column in columns], -1)

    return call.denoiser.map_rows(masked_BL, read, jnp.float32, (len(POSITIONS),), copies=2)


def _dependence(
    call: _Call,
    keys_B: Key[Array, " B"],
    pair_BL: Bool[Array, "B L"],
    sigma_B: Float[Array, " B"],
) -> tuple[Bool[Array, "B L"], Float[Array, "B L"]]:
    """Draw a pair of each sequence, and estimate its total variation from independence.

    The total variation between p(a) p(b | a) and p(a) p(b) is the mean of that between p(b | a) and
    p(b) over a ~ p(a). One token a is drawn, and one network call with it has p(b | a).

    Returns:
        Which pair was drawn, by its left position, and the estimate there.
    """
    noise_BL = jnp.where(pair_BL, _uniform(fold(keys_B, 0), call.x_BL), -1)
    one_BL = pair_BL & (jnp.arange(pair_BL.shape[1]) == noise_BL.argmax(1)[:, None])

    def left_token(rows: Rows):
        return tokens_at(fold(keys_B, 1), rows, call.log_probs(rows))

    left_BL = call.denoiser.map_rows(one_BL, left_token, call.x_BL.dtype, copies=2)
    given = _Call.of(call.denoiser, jnp.where(one_BL, left_BL, call.x_BL), sigma_B)

    def read(rows: Rows):
        return _total_variation(call.right_probs(rows), given.right_probs(rows))

    return one_BL, call.denoiser.map_rows(one_BL, read, jnp.float32, copies=2)


def nearest_revealed(
    revealed_BL: Bool[Array, "B L"], segment_BL: Int[Array, "B L"]
) -> Int[Array, "B L"]:
    """The distance of each position to the nearest revealed one of its segment; L if there is none.

    Args:
        revealed_BL: positions whose token the network sees.
        segment_BL: numbers of segments, each of consecutive positions.
    """
    length = revealed_BL.shape[1]
    place_L = jnp.arange(length)

    def before(revealed_BL, segment_BL):
        begins_BL = segment_BL != jnp.roll(segment_BL, 1, 1)
        first_BL = jax.lax.cummax(jnp.where(begins_BL, place_L, 0), axis=1)
        last_BL = jax.lax.cummax(jnp.where(revealed_BL, place_L, -1), axis=1)
        return jnp.where(last_BL >= first_BL, place_L - last_BL, length)

    behind_BL = before(revealed_BL[:, ::-1], segment_BL[:, ::-1])[:, ::-1]
    return jnp.minimum(before(revealed_BL, segment_BL), behind_BL)


def distance_bins(length: int) -> list[tuple[int, int]]:
    """The first and last distance of each bin (1, 2, 3 to 4, 5 to 8, …); then (0, 0) for none."""
    ends = [1]
    while ends[-1] < length - 1:
        ends.append(2 * ends[-1])
    firsts = [1, *(end + 1 for end in ends[:-1])]
    bins = [(first, min(end, max(length - 1, 1))) for first, end in zip(firsts, ends, strict=True)]
    return [*bins, (0, 0)]


def _sums(
    distance_BL: Int[Array, "B L"], select_BL: Bool[Array, "B L"], values_BLQ: Float[Array, "B L Q"]
) -> Float[Array, "B D Q"]:
    """Sums of the values of selected positions in each bin of distances."""
    length = distance_BL.shape[1]
    bins = distance_bins(length)
    bin_BL = jnp.searchsorted(jnp.array([end for _, end in bins[:-1]]), distance_BL)
    bin_BL = jnp.where(distance_BL == length, len(bins) - 1, bin_BL)
    in_bin_BLD = (bin_BL[..., None] == jnp.arange(len(bins))) & select_BL[..., None]
    return jnp.einsum(
        "bld,blq->bdq", in_bin_BLD.astype(jnp.float32), values_BLQ, precision="highest"
    )


def _uniform(keys_B: Key[Array, " B"], x_BL: Int[Array, "B L"]) -> Float[Array, "B L"]:
    return jax.vmap(lambda key: jax.random.uniform(key, x_BL.shape[1:], jnp.float32))(keys_B)


def _total_variation(p_RN: Float[Array, "R N"], q_RN: Float[Array, "R N"]) -> Float[Array, " R"]:
    return 0.5 * jnp.abs(p_RN - q_RN).sum(-1)
