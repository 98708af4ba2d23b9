"""The ``sedd`` command: ``sedd train``, ``sedd sample`` and the others by name."""

import contextlib
import importlib
import signal
import sys

from sedd.errors import did_you_mean

COMMANDS = {
    "train": "train a model, or go on with a run",
    "sample": "draw or infill text",
    "evaluate": "bound the perplexity of a model",
    "detect": "test texts for a watermark",
    "harness": "evaluate a model on tasks of lm-evaluation-harness",
    "export": "write a model in a published layout",
    "inspect": "describe a checkpoint without reading its weights",
    "compile_check": "compile a training step for TPUs that are not there",
}


COMMON = """
flags of every command:
  --version           print the version
  --debug             show the traceback of an error
  --no-compile-cache  keep no compiled programs for later starts"""


def main() -> None:
    """Run the command that the first argument names; exit code 2 where there is none."""
    import sedd

    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {what}" for command, what in COMMANDS.items()]
        print(
            "usage: sedd COMMAND …; sedd COMMAND --help lists its flags\n", *lines, COMMON, sep="\n"
        )
        return
    if name == "--version":
        print(sedd.__version__)
        return
    name = name.replace("-", "_")
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: sedd has no command {name!r}{hint}; see sedd --help", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"sedd {name}", *rest]
    run_command(name)


def run_command(name: str) -> None:
    """Import the command ``name`` and run it with the arguments of ``sys.argv``.

    Ctrl-C during the imports ends the process as the system does by default: an exception there
    would show a traceback from the middle of a library, or leave one half imported. If the imports
    take long, a line says so. An ``Activity`` would not do: a process that Ctrl-C ends could not
    show the terminal's cursor again, which a live line hides.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sedd.progress import QUIET_SECONDS, Heartbeat

    waiting = contextlib.nullcontext()
    if sys.stderr is not None:  # its descriptor may be closed
        beat = Heartbeat(lambda: f"note: loading sedd {name}", sys.stderr, seconds=QUIET_SECONDS)
        waiting = contextlib.closing(beat)
    with waiting:
        cli = importlib.import_module("sedd.commands.cli")
        command = importlib.import_module(f"sedd.commands.{name}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run(command.main)


if __name__ == "__main__":
    main()
