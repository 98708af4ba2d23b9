"""The judges of ``sedd evaluate``, which score texts: by name, or the one that needs no name."""

from pathlib import Path

import jax
import jax.numpy as jnp

from sedd.commands.evaluate_flags import EvaluateCommand
from sedd.errors import UserError, did_you_mean
from sedd.evaluating.frontier import ngram_judge
from sedd.evaluation.estimators import REPLICATES
from sedd.evaluation.judges import Judge, Scorer, WindowJudge, hugging_face_judge
from sedd.evaluation.monte_carlo import sequence_nats
from sedd.evaluation.smollm2 import load_smollm2
from sedd.model import Model, load


def offline_judge(command: EvaluateCommand, model: Model) -> Scorer:
    """The judge of ``--frontier``: n-grams for ``--judge ngram``, smollm2 without ``--judge``.

    Raises:
        UserError: it cannot be loaded.
    """
    if command.judge == "ngram":
        try:
            return ngram_judge(model)
        except UserError as error:
            raise UserError(f"--judge ngram: {error}") from error
    try:
        return judge_of("smollm2")
    except UserError as error:
        raise UserError(
            f"--frontier needs a judge: {error}; or name one by --judge, such as ngram"
        ) from error


def judge_of(name: str) -> Judge:
    """Load a judge: an autoregressive model that scores texts and gives their features.

    Args:
        name: ``smollm2``, ``hf:NAME`` for a causal model of the Hugging Face hub, or the directory
            of an autoregressive run.

    Raises:
        UserError: there is no such model, or it is not autoregressive; the message says which names
            are judges.
    """
    if name == "smollm2":
        return load_smollm2().judge()
    if name.startswith("hf:"):
        return hugging_face_judge(name.removeprefix("hf:").removeprefix("//"))
    if not Path(name).expanduser().is_dir():
        near = did_you_mean(name, ["smollm2"])
        raise UserError(
            f"--judge {name}: no such directory{near or f'; did you mean hf:{name}?'} A judge is "
            "smollm2, hf:NAME (a causal model of the Hugging Face hub), or the directory of an "
            "autoregressive run"
        )
    model = load(name)
    if not model.denoiser.causal or model.tokenizer is None:
        raise UserError(
            f"--judge {name}: a judge is an autoregressive model with a tokenizer, and this is not "
            "one; smollm2 and hf:NAME are judges too"
        )
    tokenizer = model.tokenizer

    def hidden(ids_BL):
        # The network sees token i at position i + 1, so the state there has seen tokens 0 to i.
        # One column of padding is needed for that; the second one gives cuDNN an even length.
        return model.denoiser.hidden(jnp.pad(ids_BL, ((0, 0), (0, 2))))[0][:, 1:-1]

    def nats(ids_BL, scored_BL):
        keys_B = jax.random.split(jax.random.key(0), len(ids_BL))  # unused: the value is exact
        scored = sequence_nats(
            model.denoiser, model.schedule, keys_B, ids_BL, scored_BL, draws=REPLICATES
        )
        return scored.diffusion_BR[:, 0]

    return WindowJudge(
        name=name,
        encode=tokenizer.encode_batch,
        nats=jax.jit(nats),
        hidden=jax.jit(hidden),
        context=model.length,
        scores_first=True,
    )
