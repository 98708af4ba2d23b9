"""Command lines: typed flags in, one clear line out when the user made a mistake."""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from sedd.components import makers
from sedd.config import COMPONENTS, Config, load_config, with_component
from sedd.errors import UserError

Command = TypeVar("Command")


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command and exit: 0, or 2 with one ``error: …`` line for a user's mistake.

    ``--debug`` shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = main(arguments) or 0
    except UserError as error:
        if debug:
            raise
        code = fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).partition("\n")[0][:200]


def fail(message: str, code: int = 2) -> int:
    """Print the one line and return the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def note(message: str) -> None:
    """Say on standard error what the user should know."""
    print(f"note: {' '.join(message.split())}", file=sys.stderr, flush=True)


def first_sentence(thing: Any) -> str:
    """What its docstring says first."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """``file.py:function``, from the user's own file; UserError where there is none.

    The same function for the same words.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"{flag} {spec}: it must be file.py:function")
    if not Path(path).is_file():
        raise UserError(f"{flag} {spec}: {path}: no such file")
    try:
        found = _run_file(path).get(name)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{flag} {spec}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{flag} {spec}: {path} defines no function {name!r}")
    return found


@functools.cache
def _run_file(path: str) -> dict[str, Any]:
    return runpy.run_path(path)


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
