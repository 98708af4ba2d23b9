"""Command lines: typed flags in, one clear line out when the user made a mistake."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

import sedd
from sedd.configuration.components import makers
from sedd.configuration.config import COMPONENTS, Config, load_config, with_component
from sedd.errors import UserError, first_line
from sedd.training.distributed import leave_libtpu_alone

Command = TypeVar("Command")


class Terminal(Console):
    """A rich console for plain text, on which a reader that closes the pipe ends the command."""

    def __init__(self, **settings: Any):
        plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        super().__init__(**{**plain, **settings})

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, which ``run`` takes for a success; rich would exit with 1."""
        raise BrokenPipeError


console = Terminal()  # of every command: standard output

# Control characters but newline and tab; line and paragraph separators; marks that change the
# direction of text; halves of surrogate pairs. A terminal may act on the first and reorder by them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with characters that a terminal acts on written as escapes, such as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def run(
    main: Callable[[Sequence[str]], int | None], *, interrupted: Callable[[int], Any] = sys.exit
) -> None:
    """Run a command and exit: 0, or 2 with one ``error: …`` line for a user's mistake.

    ``--debug`` shows the traceback instead, ``--version`` the version. A reader of the output that
    has seen enough (``| head``) is no error.

    Args:
        main: the command, from its arguments to an exit code or None.
        interrupted: what exits after Ctrl-C, given the code 130.
    """
    leave = sys.exit
    prepare_streams()
    leave_libtpu_alone()
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
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
        code = fail(str(error))
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


def flush_streams() -> None:
    """Flush what was printed; a stream whose reader is gone is led to the null device."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would try again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, code: int = 2) -> int:
    """Print the one line of an error and return the exit code."""
    _print_line(f"error: {message}")
    return code


def note(message: str) -> None:
    """Print a line that the user should know of on standard error."""
    _print_line(f"note: {message}")


def _print_line(message: str) -> None:
    print(printable(" ".join(message.split())), file=sys.stderr, flush=True)


PATHS = tyro.constructors.ConstructorRegistry()  # how flags become paths


@PATHS.primitive_rule
def _path_rule(info: Any) -> Any:
    """``~`` in a path is the home directory, in ``--flag=~/x`` as well, which no shell expands."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def parse(
    kind: type[Command], arguments: Sequence[str], *, default=None, description=""
) -> Command:
    """Typed flags from a dataclass by tyro, whose boxes become the one line of a UserError."""
    # tyro draws its messages for a terminal's width: give it room, so that no line is broken.
    complaint = io.StringIO()
    columns = os.environ.get("COLUMNS")
    wants_help = any(a in ("-h", "--help") for a in arguments)
    try:
        if not wants_help:
            os.environ["COLUMNS"] = "10000"
        with contextlib.redirect_stderr(complaint):
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
        raise UserError(one_line(complaint.getvalue())) from None
    except ValueError as error:  # of a dataclass around the others, which tyro does not catch
        raise UserError(str(error)) from error
    finally:
        if not wants_help:
            os.environ.pop("COLUMNS")
            if columns is not None:
                os.environ["COLUMNS"] = columns


def one_line(boxes: str) -> str:
    """The first complaint of tyro's boxes, and its suggestion."""
    boxes = re.sub(r"\x1b\[[0-9;]*m", "", boxes)  # colours, where standard output is a terminal
    lines = [re.sub(r"^[│┃|]|[│┃|]$", "", line.strip()).strip() for line in boxes.splitlines()]
    lines = [line for line in lines if line and not re.match(r"^[╭╰─┌└━]|-{3,}$", line)]
    if "╭" not in boxes:
        lines = lines[1:]  # a box's title, where the terminal's encoding has no borders to hold it
    if not lines:
        return "the command line could not be read; see --help"
    message = lines[0]
    perhaps = next((i for i, line in enumerate(lines) if "you mean" in line), len(lines))
    suggestions = [line.split()[0] for line in lines[perhaps:] if line.startswith("--")]
    argument = next((line for line in lines[1:] if line.startswith("--")), "")
    if message.startswith("Unrecognized options:"):
        unknown = message.split(":", 1)[1].split(",")[0].strip()
        message = f"unrecognized option {unknown}"
        leaves = [s for s in suggestions if s.rpartition(".")[2] == unknown.removeprefix("--")]
        suggestions = leaves or suggestions[:1]
        if unknown.lower() in ("true", "false"):
            message += "; a switch is written --name or --no-name"
    elif message.startswith("Error parsing "):
        message = message.removeprefix("Error parsing ").rstrip(".")
        message = re.sub(r"no type matching (\S+) could be .* from \['(.*)'\]$", _none_of, message)
        message = message.replace("invalid literal for int() with base 10:", "not a whole number:")
        message = message.replace("could not convert string to float:", "not a number:")
        if argument and len(argument.split()) > 1:
            message += f"; expected {argument}"
    elif message.startswith("Missing from"):
        end = lines.index("Unrecognized options:") if "Unrecognized options:" in lines else None
        required = [line for line in lines[1:end] if line.startswith("--")]
        message = f"missing {', '.join(required)}"
        if end is not None:
            message += f"; unrecognized option {lines[end + 1]}"
    message = re.sub(r"^config\.(\w+): (?:\1\.)?", r"\1.", message)
    message = re.sub(
        r"^Missing value for argument '(.*?)'.*", r"\1 needs a value (\1=VALUE)", message
    )
    message = re.sub(r"^(?:config|\w*Command): ", "", message)
    if suggestions:
        return f"{message}; did you mean {' or '.join(suggestions)}?"
    return f"{message.rstrip('.')}; see --help"


def _none_of(match: re.Match[str]) -> str:
    """What is wrong with the value of a union, said as of a single type where that can be."""
    kinds = [kind.strip("{}") for kind in match[1].split("|") if kind != "{None}"]
    single = {"INT": "not a whole number", "FLOAT": "not a number"}
    return f"{single.get('|'.join(kinds), f'no type matching {match[1]}')}: {match[2]!r}"


def take(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``flag VALUE`` or ``flag=VALUE``, and the arguments without it."""
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


def parse_config(arguments: Sequence[str], command: type[Any], description: str) -> Any:
    """A command whose field ``config`` is a Config: first the file and the components, then flags.

    ``--config FILE`` gives the defaults, ``--process uniform`` (or any other component by name)
    swaps a component, and every remaining flag is a field: ``--optimizer.learning-rate 1e-3``.
    """
    path, rest = take(arguments, "--config")
    if path is None and not {"-h", "--help"} & set(arguments):
        raise UserError("missing --config FILE, a recipe such as configs/quickstart.py")
    config = Config() if path is None else load_config(path)
    for name in COMPONENTS:
        chosen, rest = take(rest, f"--{name}")
        if chosen is not None:
            try:
                config = with_component(config, name, chosen)
            except UserError as error:
                raise UserError(f"--{name} {chosen}: {error}") from error
    choices = "\n".join(
        f"  --{name} {{{','.join(sorted(makers(family)))}}}" for name, family in COMPONENTS.items()
    )
    required: Any = {
        f.name: f.default if f.default is not dataclasses.MISSING else tyro.MISSING
        for f in dataclasses.fields(command)
        if f.name != "config"
    }
    return parse(
        command,
        rest,
        default=command(**required, config=config),
        description=f"{description}\n\n--config FILE gives the defaults. Components:\n{choices}",
    )
