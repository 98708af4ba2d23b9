"""The frame of every command: process settings, flags as dataclasses, errors as one line.

``run`` calls a command's ``main`` and turns what it raises into an exit code. ``parse`` fills a
dataclass from flags by means of tyro; ``parse_config`` does so for commands with a configuration,
whose recipe and components have to be known before the other flags exist. ``console`` is standard
output; notes and errors go to standard error.
"""

import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console
from tyro._errors import on_parse_error

import sedd
from sedd.commands.cpu import prepare_cpu
from sedd.commands.field_help import document
from sedd.commands.mistakes import as_flag, flags_of, reject
from sedd.configuration.build import with_default_sampler
from sedd.configuration.components import COMPONENTS, makers
from sedd.configuration.config import (
    Config,
    default_cache_dir,
    differences,
    load_config,
    recipes,
    with_component,
)
from sedd.errors import FieldError, UserError, did_you_mean, first_line, printable
from sedd.training.distributed import leave_libtpu_alone
from sedd.training.storage import quiet_orbax

Command = TypeVar("Command")
PROGRAMS_SIZE = 2**30  # bytes of compiled programs to keep in the cache folder


class Terminal(Console):
    """A rich console for plain text, with control characters in names and texts escaped.

    A reader that closes the pipe ends the command.
    """

    def __init__(self, **settings: Any):
        plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        super().__init__(**{**plain, **settings})

    def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
        """Yield the segments of a renderable, such as a table, each made ``printable``."""
        for segment in super().render(renderable, options):
            plain = segment.control is None
            yield segment._replace(text=printable(segment.text)) if plain else segment

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, which ``run`` takes for a success; rich would exit with 1."""
        raise BrokenPipeError


console = Terminal()  # of every command: standard output
errors = Terminal(stderr=True)  # tables, if standard output has the results


def run(
    main: Callable[[Sequence[str]], int | None], *, interrupted: Callable[[Any], Any] = sys.exit
) -> None:
    """Set up the process, run a command, and exit.

    The exit code is 0, or the command's own; 2 with one ``error: …`` line for a user's mistake, an
    error of the operating system or a full device memory; 130 after Ctrl-C. A reader of standard
    output that closes the pipe (``| head``) is no error. All other exceptions are raised.

    Flags of every command are handled here: ``--debug`` shows the traceback instead of the line,
    ``--version`` prints the version, ``--no-compile-cache`` keeps no compiled programs.

    Args:
        main: the command, a function from its arguments to an exit code or None.
        interrupted: the function that exits after Ctrl-C, called with 130.
    """
    leave: Callable[[Any], Any] = sys.exit
    prepare_streams()
    leave_libtpu_alone()
    prepare_cpu()
    quiet_orbax()
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", "--no-compile-cache")]
    debug = "--debug" in sys.argv[1:]
    if "--no-compile-cache" not in sys.argv[1:]:
        keep_programs()
    try:
        if arguments == ["--version"]:
            print(sedd.__version__)
            code = 0
        else:
            code = main(arguments) or 0
        sys.stdout.flush()
    except SystemExit as stop:  # after --help
        code = stop.code
    except UserError as error:
        if debug:
            raise
        named = isinstance(error, FieldError)
        code = fail(error.named(as_flag(error.field)) if named else str(error))
    except BrokenPipeError:
        code = 0
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = fail(f"{where}{error.strerror or error}")
    except jax.errors.JaxRuntimeError as error:
        if debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        code = fail(
            f"the device's memory is full ({first_line(error)}): use a smaller batch or length; "
            "while training, --training.accumulate splits a batch"
        )
    except KeyboardInterrupt:
        code, leave = 130, interrupted
    flush_streams()
    leave(code)


def prepare_streams() -> None:
    """Make printing safe: no encoding and no closed descriptor raises an exception."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor was closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that later starts read them.

    Nothing changes where JAX has been told of a folder already (``JAX_COMPILATION_CACHE_DIR``). An
    entry that cannot be read or written is compiled again. Beyond ``PROGRAMS_SIZE`` the programs
    that were used least recently are removed.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        return
    folder = Path(default_cache_dir()).expanduser() / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_max_size", PROGRAMS_SIZE)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def flush_streams() -> None:
    """Flush standard output and error; redirect one whose reader has gone to the null device."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would try again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, code: int = 2) -> int:
    """Print the one line of an error and return the exit code."""
    _print_line(f"error: {message}")
    return code


def unset(metavar: str) -> Any:
    """Mark an optional flag: its help shows ``metavar`` as the value, and no default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def note(message: str) -> None:
    """Print ``note: …`` on standard error: something that the user should know."""
    _print_line(f"note: {message}")


def _print_line(message: str) -> None:
    print(printable(" ".join(message.split())), file=sys.stderr, flush=True)


def _path(word: str) -> Path:
    if not word:
        raise ValueError("an empty path")
    return Path(os.path.expanduser(word))


PATHS = tyro.constructors.ConstructorRegistry()  # how flags become paths


@PATHS.primitive_rule
def _path_rule(info: Any) -> Any:
    """``~`` in a path is the home directory, in ``--flag=~/x`` as well, which no shell expands.

    An empty path, as an unset variable of the shell gives, is refused: Python takes it for ``.``.
    """
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def parse(
    kind: type[Command],
    arguments: Sequence[str],
    *,
    default=None,
    description="",
    taken: Sequence[str] = (),
) -> Command:
    """Fill a dataclass from flags.

    Args:
        kind: the dataclass; tyro makes a flag of each field, and its help of the field's docstring.
        arguments: the command line.
        default: an instance whose values are the defaults; by default those of the fields.
        description: the beginning of the help.
        taken: flags of the command that the caller has read already, to be suggested as well.

    Raises:
        UserError: the arguments were rejected.
        FieldError: the dataclass refused the value of a field.
        SystemExit: after ``--help``.
    """
    flags = [*taken, *flags_of(kind, default)]
    if {"-h", "--help"} & set(arguments):
        document(kind, default)
    try:
        with on_parse_error(lambda event: reject(event, arguments, flags)):
            return tyro.cli(
                kind,
                args=list(arguments),
                description=description,
                registry=PATHS,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError("the command line could not be read; see --help") from None


def take(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Remove one flag from a command line, and return its value.

    Returns:
        The value of ``flag VALUE`` or ``flag=VALUE`` (the last one if repeated; None if absent),
        and the remaining arguments.

    Raises:
        UserError: the flag has no value.
    """
    value, rest, remaining = None, [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == flag:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{flag} needs a value")
            value = remaining.pop(0)
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
        else:
            rest.append(argument)
    return value, rest


def check_suffix(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raise UserError where a file to be written has none of these suffixes, such as ``.html``."""
    if path.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")


def parse_config(
    arguments: Sequence[str],
    command: type[Any],
    description: str,
    *,
    saved: Config | None = None,
    complete: Callable[..., Config] | None = None,
) -> Any:
    """Parse the flags of a command that has a configuration.

    The flags that exist depend on the components, so parsing has three stages:

    1. ``--config FILE`` gives the defaults of all fields.
    2. ``--process uniform`` and the other components by name replace components. If the sampler is
       not named and the new model has another default sampler, it is replaced as well.
    3. Every remaining flag is a field, such as ``--optimizer.learning-rate 1e-3``.

    If flags change what the recipe would train, its ``aim`` is dropped.

    Args:
        arguments: the command line.
        command: the dataclass of the command, with a field ``config`` of type Config.
        description: the beginning of the help.
        saved: the configuration to use without --config: that of the run to resume.
        complete: completes the configuration between the first and the second stage, given the
            arguments, the configuration, and whether it is ``named`` by --config. With it,
            --config may be missing beside --init-from or --teacher.

    Returns:
        An instance of ``command``.

    Raises:
        UserError: there is no configuration, or a flag is wrong.
    """
    path, rest = take(arguments, "--config")
    starts = (take(arguments, flag)[0] for flag in ("--init-from", "--teacher"))
    begun = complete is not None and any(start is not None for start in starts)
    if path is None and saved is None and not begun and not {"-h", "--help"} & set(arguments):
        raise _missing_config(arguments)
    recipe = (saved or Config()) if path is None else load_config(path)
    config = recipe
    if complete is not None and (path is not None or saved is None):
        config = complete(arguments, recipe, named=path is not None)
    config, rest = _with_named_components(config, rest)
    required: Any = {
        f.name: f.default if f.default is not dataclasses.MISSING else tyro.MISSING
        for f in dataclasses.fields(command)
        if f.name != "config"
    }
    default = command(**required, config=config)
    described = f"{description}\n\n{_config_help()}"
    taken = ("--config", *(f"--{name}" for name in COMPONENTS))
    parsed = parse(command, rest, default=default, description=described, taken=taken)
    if parsed.config.aim == recipe.aim and differences(recipe, parsed.config):
        config = dataclasses.replace(parsed.config, aim="")
        parsed = dataclasses.replace(parsed, config=config)
    return parsed


def _missing_config(arguments: Sequence[str]) -> UserError:
    """The error for a command line without --config, which may be there with a wrong spelling."""
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag.startswith("--") and did_you_mean(flag, ["--config"]):
            return UserError(f"unknown flag {flag}; did you mean --config?")
    return UserError(f"missing --config: a FILE.py, or a recipe by name ({', '.join(recipes())})")


def _config_help() -> str:
    """The help of the flags that ``parse_config`` reads before all others."""
    choices = "\n".join(
        f"  --{name} {{{','.join(sorted(makers(family)))}}}" for name, family in COMPONENTS.items()
    )
    return (
        "--config FILE gives the defaults. --lora RANK is short for --network.lora.rank RANK. "
        f"Components:\n{choices}"
    )


def _with_named_components(recipe: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Replace the components that flags name; returns also the remaining arguments.

    ``--lora`` becomes ``--network.lora.rank`` among them.
    """
    config, rest, named = recipe, list(arguments), set()
    for name in COMPONENTS:
        chosen, rest = take(rest, f"--{name}")
        if chosen is not None:
            named.add(name)
            try:
                config = with_component(config, name, chosen)
            except UserError as error:
                raise UserError(f"--{name} {chosen}: {error}") from error
    if "sampler" not in named:
        config = with_default_sampler(config, recipe)
    rank, rest = take(rest, "--lora")
    return config, rest if rank is None else [*rest, "--network.lora.rank", rank]
