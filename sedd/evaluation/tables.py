"""Tables of evaluation results: one row for each data set, or all figures of one.

The titles and the signs ≤ state whether figures are bounds, exact likelihoods, or neither.
"""

from collections.abc import Sequence

from sedd.evaluation.measured import Measured
from sedd.evaluation.report import Cell, Table
from sedd.evaluation.scoring import EvaluationResult


def summary_table(results: Sequence[EvaluationResult]) -> Table:
    """Make a table with a row for each data set.

    Errors are standard errors over sequences. The error of a perplexity is that of its logarithm
    times the perplexity, to first order.

    Args:
        results: one or more results of one protocol.
    """
    at_most = _at_most(results[0])
    rows = [
        (
            result.data.label,
            result.data.split,
            Measured(result.nats_per_token, result.standard_error),
            Measured(result.perplexity, result.perplexity * result.standard_error),
            result.num_sequences,
            result.num_tokens,
            result.data.num_dropped,
            result.draws or None,
            result.protocol_text,
        )
        for result in results
    ]
    columns = ("data", "split", f"nats/token{at_most}", f"perplexity{at_most}")
    columns += ("sequences", "tokens", "dropped", "draws", "protocol")
    return Table(columns=columns, rows=rows, title=title(results[0]))


def detail_table(result: EvaluationResult) -> Table:
    """Make a table of all figures of one data set, a row each.

    Only a score entropy has a prior and a reconstruction. If the protocol leaves them out of the
    bound, their rows say so.
    """
    at_most, nats, error = _at_most(result), result.nats_per_token, result.standard_error
    rows: list[tuple[Cell, Cell]] = [
        (f"nats per token{at_most}", Measured(nats, error)),
    ]
    if result.standard_error_draws:  # 0 if it is not estimated, or nothing is drawn
        rows.append(("  of it the error of the draws", result.standard_error_draws))
    perplexity = Measured(result.perplexity, result.perplexity * error)
    rows.append((f"perplexity{at_most}", perplexity))
    for name in ("bits_per_character", "bits_per_byte"):
        value = getattr(result, name)
        if value is not None:
            rows.append(
                (f"{name.replace('_', ' ')}{at_most}", Measured(value, value * error / nats))
            )
    if result.estimator == "score_entropy":
        left_out = "" if result.is_bound else ", left out"
        rows += [
            (f"  prior{left_out}", result.prior),
            ("  diffusion", result.diffusion),
            (f"  reconstruction{left_out}", result.reconstruction),
        ]
    if result.unigram_nats is not None:
        rows.append(("cross entropy of training frequencies", result.unigram_nats))
    rows += [
        ("entropy of these tokens' own frequencies", result.data.unigram_entropy),
        ("sequences", result.num_sequences),
    ]
    if result.data.num_rows_not_evaluated:
        rows.append(
            ("sequences not evaluated (--max-sequences)", result.data.num_rows_not_evaluated)
        )
    rows += [
        ("tokens scored", result.num_tokens),
        ("tokens dropped by the cut", result.data.num_dropped),
    ]
    if not result.exact:
        rows.append((f"draws ({result.estimator})", result.draws))
    data = result.data
    about = f"{title(result)}: {data.label} · {data.split} · protocol {result.protocol_text}"
    return Table(columns=("", "value ± s.e."), rows=rows, title=about)


def title(result: EvaluationResult) -> str:
    """Return a title that states whether figures are a bound, an exact likelihood, or neither."""
    if result.exact and result.estimator != "exact":
        return f"Exact negative log likelihood of the tokens in one order ({result.estimator})"
    if result.exact:
        return "Negative log likelihood"
    if result.is_bound:
        return "Upper bound on the negative log likelihood"
    return "NOT a bound: the prior and the reconstruction are left out, as the protocol says"


def _at_most(result: EvaluationResult) -> str:
    """The sign that follows the name of a figure, if the figure is an upper bound."""
    return " ≤" if result.is_bound else ""
