"""From a configuration to the objects of a run."""

from dataclasses import dataclass
from pathlib import Path

from sedd.config import Config
from sedd.data.corpora import Corpus, Mixture, open_corpus, parse_mixture
from sedd.data.packing import Packed, pack
from sedd.data.tokenizers import Tokenizer, build_tokenizer
from sedd.denoiser import Denoiser
from sedd.errors import UserError
from sedd.networks.base import Attend, Network
from sedd.objectives.base import Objective
from sedd.parameterizations.base import Parameterization
from sedd.processes.base import Process
from sedd.samplers.base import Sampler
from sedd.schedules import NoiseSchedule
from sedd.types import Params


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of a model, built and fitted to each other."""

    process: Process
    schedule: NoiseSchedule
    parameterization: Parameterization
    network: Network
    objective: Objective
    sampler: Sampler

    def denoiser(self, params: Params, attend: Attend | None = None) -> Denoiser:
        """The network with these parameters."""
        return Denoiser(
            params=params,
            network=self.network,
            parameterization=self.parameterization,
            attend=attend,
        )


def build_parts(config: Config, num_tokens: int) -> Parts:
    """Every component for a vocabulary of ``num_tokens``; UserError where two do not fit."""
    process = config.process.build(num_tokens=num_tokens)
    schedule = config.schedule.build()
    parameterization = config.parameterization.build(process=process)
    return Parts(
        process=process,
        schedule=schedule,
        parameterization=parameterization,
        network=config.network.build(
            num_states=process.num_states,
            time_conditioned=not parameterization.time_independent,
        ),
        objective=config.objective.build(schedule=schedule, parameterization=parameterization),
        sampler=config.sampler.build(schedule=schedule),
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenizer, and the packed splits of every part of the mixture with its weight."""

    tokenizer: Tokenizer
    train: list[tuple[Packed, float]]
    validation: list[tuple[Packed, float]]

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the validation tokens' own frequencies, over all parts."""
        import numpy as np

        counts = sum(packed.token_counts for packed, _ in self.validation)
        frequency = counts[counts > 0] / counts.sum()
        return float(-(frequency * np.log(frequency)).sum())


def build_data(config: Config, *, tokenizer: Tokenizer | None = None, progress=None) -> Data:
    """Open, tokenise and pack; ``tokenizer`` is that of the run that is resumed, if any."""
    cache_dir = Path(config.data.cache_dir).expanduser()
    weighted = parse_mixture(config.data.corpus)
    corpora = [open_corpus(spec, cache_dir=cache_dir) for spec, _ in weighted]
    if tokenizer is None:
        whole: Corpus = corpora[0] if len(corpora) == 1 else Mixture(corpora)
        tokenizer = build_tokenizer(config.data.tokenizer, whole, cache_dir=cache_dir)

    def packed(split: str) -> list[tuple[Packed, float]]:
        return [
            (
                pack(
                    corpus,
                    tokenizer,
                    split,
                    length=config.data.length,
                    wrap=config.data.wrap,
                    cache_dir=cache_dir,
                    progress=progress,
                ),
                weight,
            )
            for corpus, (_, weight) in zip(corpora, weighted, strict=True)
        ]

    for corpus in corpora:
        if "validation" not in corpus.splits:
            raise UserError(
                f"corpus {corpus.name} declares no validation split, only {', '.join(corpus.splits)}"
            )
    return Data(tokenizer=tokenizer, train=packed("train"), validation=packed("validation"))
