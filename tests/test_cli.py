"""Command lines: flags into values, mistakes into one line, and exit codes."""

import contextlib
import dataclasses
import inspect
import io
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import docstring_parser
import jax
import jax.numpy as jnp
import pytest
import tyro
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.text import Text
from tiny_run import RECIPE, ROOT, Outcome

import sedd
import sedd.data.base
import sedd.training.checkpoint
from sedd.commands.cli import (
    Terminal,
    console,
    note,
    parse,
    parse_config,
    run,
    take,
)
from sedd.commands.field_help import document_fields
from sedd.configuration.build import build_parts
from sedd.configuration.components import (
    COMPONENTS,
    makers,
    options,
    options_type,
)
from sedd.configuration.config import Config
from sedd.errors import FieldError, UserError, printable
from sedd.evaluation.report import Table
from sedd.networks.rotary import RopeScaling
from sedd.progress import Activity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    where: Path
    count: int = 1
    rate: float = 1.0
    kind: Literal["one", "two"] = "one"
    limit: int | None = None
    share: float | None = None
    step: int | Literal["best"] | None = None
    quick: bool = False
    others: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A command with a configuration."""

    workdir: Path
    config: Annotated[Config, tyro.conf.arg(name="")]


@pytest.mark.parametrize(
    ("arguments", "value", "rest"),
    [
        (["--x", "1", "--y"], "1", ["--y"]),
        (["--y", "--x=1"], "1", ["--y"]),
        (["--x", "1", "--x", "2"], "2", []),
        (["--xy", "1", "--x.y", "2"], None, ["--xy", "1", "--x.y", "2"]),
        (["--x="], "", []),
    ],
)
def test_take(arguments, value, rest):
    assert take(arguments, "--x") == (value, rest)


@pytest.mark.parametrize("arguments", [["--x"], ["--x", "--y"]])
def test_take_without_a_value(arguments):
    with pytest.raises(UserError, match="--x needs a value"):
        take(arguments, "--x")


def test_parse():
    expected = Command(where=Path("a b"), count=3, kind="two", quick=True)
    arguments = ["--where", "a b", "--count=3", "--kind", "two", "--quick"]
    assert parse(Command, arguments) == expected


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("~/x y", Path.home() / "x y"),
        ("~", Path.home()),
        ("a/~/b", Path("a/~/b")),
        ("~no_such_user_here/x", Path("~no_such_user_here/x")),
        ("-", Path("-")),
    ],
)
def test_a_tilde_is_the_home_directory(written, path):
    """A shell expands ``--where ~/x``, and leaves ``--where=~/x`` to the command."""
    command = parse(Command, [f"--where={written}", f"--others={written}", "--others", written])
    assert (command.where, command.others) == (path, (path, path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "missing --where PATH; see --help"),
        ("--were x", "missing --where PATH; unrecognized option --were; did you mean --where?"),
        ("--where x --cuont 3", "unrecognized option --cuont; did you mean --count?"),
        ("--where x --zzz 3", "unrecognized option --zzz; see --help"),
        ("--where x y", "unrecognized option y; see --help"),
        (
            "--where x --quick true",
            "unrecognized option true; a switch is written --name or --no-name; see --help",
        ),
        ("--where x --count", "--count needs a value (--count=VALUE); see --help"),
        (
            "--where x --count 1e3",
            "--count: not a whole number: '1e3'; expected --count INT; see --help",
        ),
        (
            "--where x --rate fast",
            "--rate: not a number: 'fast'; expected --rate FLOAT; see --help",
        ),
        ("--where x --kind three", "--kind must be one of one, two, got 'three'; see --help"),
        (
            "--where x --limit 1.5",
            "--limit: not a whole number: '1.5'; expected --limit {None}|INT; see --help",
        ),
        (
            "--where x --share all",
            "--share: not a number: 'all'; expected --share {None}|FLOAT; see --help",
        ),
        (
            "--where x --step first",
            "--step: invalid value: 'first'; expected --step {None}|INT|{best}; see --help",
        ),
        ("--where x --count 0", "count must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(UserError) as caught:
        parse(Command, arguments.split())
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line_on_a_terminal():
    ours, theirs = pty.openpty()
    result = subprocess.run(
        [sys.executable, "train.py", *RECIPE, "--workdir", "x", "--training.stpes", "3"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    message = "unrecognized option --training.stpes; did you mean --training.steps?"
    assert Outcome(result.returncode, "", result.stderr).errors == [f"error: {message}"]
    assert result.returncode == 2


def test_help_goes_to_standard_output(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Command, ["--help"])
    assert stop.value.code == 0
    assert "--count INT" in capsys.readouterr().out


def config_of(*arguments) -> Config:
    if "--config" not in arguments:
        arguments = ("--config", str(ROOT / "configs/quickstart.py"), *arguments)
    return parse_config(["--workdir", "x", *arguments], Training, "").config


def test_without_a_recipe_nothing_starts():
    with pytest.raises(UserError, match=r"missing --config: a FILE.* by name \(.*quickstart"):
        parse_config(["--workdir", "x"], Training, "")


@pytest.mark.parametrize("flag", ["--confg", "--conf", "--confing"])
def test_a_misspelt_config_is_named(flag):
    for given in ([flag, "quickstart"], [f"{flag}=quickstart"]):
        with pytest.raises(UserError, match=f"unknown flag {flag}; did you mean --config"):
            parse_config(["--workdir", "x", *given], Training, "")


def test_flags_override_the_file():
    config = config_of(
        "--config", str(ROOT / "configs/quickstart.py"), "--optimizer.learning-rate", "1e-4"
    )
    assert (config.optimizer.learning_rate, config.optimizer.beta2) == (1e-4, 0.99)
    assert config.network.num_layers == 4


def test_underscores_and_none():
    config = config_of("--training.batch_size", "8", "--training.eval-every", "None")
    assert (config.training.batch_size, config.training.eval_every) == (8, None)


def test_components_by_name_and_their_own_flags():
    config = config_of(
        *("--process", "uniform", "--parameterization", "score", "--objective=score_entropy"),
        *("--schedule", "geometric", "--schedule.sigma-max", "10"),
        *("--sampler", "euler", "--sampler.steps", "9"),
    )
    assert config.process == options("processes", "uniform")
    assert config.schedule == options("schedules", "geometric", sigma_max=10.0)
    assert config.sampler == options("samplers", "euler", steps=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--process unifrom",
            "--process unifrom: .*did you mean 'uniform'.*absorbing, hybrid, uniform",
        ),
        ("--process", "--process needs a value"),
        ("--schedule cosine --schedule.sigma-max 3", "unrecognized option --schedule.sigma-max"),
        ("--steps 3", r"--steps; did you mean --training.steps or --sampler.steps\?"),
        ("--batch_size 3", r"did you mean --training.batch-size or --evaluation.batch-size\?"),
        ("--optimizer.lr 3", r"--optimizer.lr; did you mean --optimizer.learning-rate\?"),
        ("--lr 3", r"--lr; did you mean --optimizer.learning-rate\?"),
        ("--optimizer.wd=3", r"--optimizer.wd; did you mean --optimizer.weight-decay\?"),
        ("--network.hidden_dims=3", r"did you mean --network.hidden-dim\?"),
        ("--Seed 3", r"--Seed; did you mean --seed\?"),
        ("--netwrok ddit", r"--netwrok; did you mean --network\?"),
        ("--optimizer.learning-rate -1", "^optimizer.learning_rate must be positive, got -1.0"),
        ("--data.length 0", "^data.length must be at least 1, got 0"),
        ("--training.fsdp 2", "^training.fsdp is 2, which needs --training.parallel fsdp"),
        ("--training.log-every 0", "^training.log_every must be at least 1, got 0"),
        ("--evaluation.draws 3", "^evaluation.draws must be a positive multiple of 4, got 3"),
        ("--seed -1", "^seed must be in"),
        ("--config=", "--config .*no such file"),
    ],
)
def test_a_mistake_in_the_configuration(arguments, message):
    with pytest.raises(UserError, match=message):
        config_of(*arguments.split())


@pytest.mark.parametrize(
    ("field", "where", "line"),
    [
        ("top_p", "", "error: --top-p must be so\n"),
        ("optimizer.learning_rate", "", "error: --optimizer.learning-rate must be so\n"),
        ("inner.steps", "samplers 'x'", "error: samplers 'x': --inner.steps must be so\n"),
    ],
)
def test_an_error_of_a_field_shows_its_flag(field, where, line, capsys, monkeypatch):
    error = FieldError(field, "must be so", where)
    assert outcome(raising(error), capsys, monkeypatch) == (2, "", line)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ("--network ddit --network.dropout 1", "network.dropout"),
        ("--network.hidden-dim 3", "network.hidden_dim"),
        ("--schedule.eps 0", "schedule.eps"),
        ("--sampler.steps 0", "sampler.steps"),
        ("--objective mdlm --objective.num-steps 0", "objective.num_steps"),
        ("--schedule geometric --schedule.sigma-min 0", "schedule.sigma_min"),
        ("--network decoder --network.num-kv-heads 5", "network.num_kv_heads"),
    ],
)
def test_an_error_of_a_component_carries_its_place_in_the_configuration(arguments, field):
    config = config_of("--sampler", "tweedie", *arguments.split())
    with pytest.raises(FieldError) as caught:
        build_parts(config, num_tokens=3)
    assert caught.value.field == field


def test_an_option_may_have_options_of_its_own():
    long = ("--network", "decoder", "--network.rope-scaling.kind", "yarn")
    config = config_of(*long, "--network.rope-scaling.factor", "4")
    assert config.network.rope_scaling == RopeScaling(kind="yarn", factor=4.0)
    with pytest.raises(FieldError) as caught:
        config_of(*long, "--network.rope-scaling.factor", "0.5")
    assert caught.value.field == "network.rope_scaling.factor"


def outcome(main, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, *capsys.readouterr()


def raising(error):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file\n"),
        (OSError("strange"), 2, "error: strange\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, line, capsys, monkeypatch):
    assert outcome(raising(error), capsys, monkeypatch) == (code, "", line)


def test_an_interrupted_command_may_leave_at_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    codes = []
    run(raising(KeyboardInterrupt()), interrupted=codes.append)
    assert codes == [130]


def test_what_was_printed_before_leaving_at_once_is_not_lost():
    program = (
        "import os; from sedd.commands.cli import run\n"
        "def main(arguments):\n    print('before')\n    raise KeyboardInterrupt\n"
        "run(main, interrupted=os._exit)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "before\n", "")


def test_a_full_device_is_one_line(capsys, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmuch more")
    code, _, line = outcome(raising(error), capsys, monkeypatch)
    assert code == 2
    assert line.startswith("error: the device's memory is full (RESOURCE_EXHAUSTED: Out of memory.")


def test_success_and_a_returned_code(capsys, monkeypatch):
    assert outcome(lambda arguments: None, capsys, monkeypatch)[0] == 0
    assert outcome(lambda arguments: 2, capsys, monkeypatch)[0] == 2


def test_debug_shows_the_error_and_is_no_argument(monkeypatch):
    seen = []

    def main(arguments):
        seen.extend(arguments)
        raise UserError("mistake")

    monkeypatch.setattr(sys, "argv", ["command", "--debug", "--x"])
    with pytest.raises(UserError, match="mistake"):
        run(main)
    assert seen == ["--x"]


def test_a_bug_is_not_dressed_up(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run(lambda arguments: 1 // 0)


def test_a_reader_that_has_seen_enough_is_no_error():
    program = (
        "from sedd.commands.cli import run; run(lambda _: print('\\n'.join(['x' * 99] * 9999)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_makes_printing_fail(encoding, monkeypatch):
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(arguments):
        print("plain é ≤ 国 😀 \ud800")
        console.print("console é ≤ 国 \ud800")
        console.rule("rule é 国")
        note("note é 国 \ud800")
        raise UserError("mistake é 国")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert "plain" in out
    assert "console" in out
    assert err.splitlines()[-1].startswith("error: mistake ")
    assert r"\ud800" in out


@pytest.mark.parametrize("missing", ["stdout", "stderr"])
def test_a_closed_descriptor_makes_no_difference(missing, monkeypatch):
    """Python's stream is None after ``>&-``."""
    monkeypatch.setattr(sys, missing, None)
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(arguments):
        print("text")
        console.print("text")
        note("text")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 0


@pytest.mark.parametrize("printed", [print, console.print, "write"])
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_closed_pipe_ends_a_command_with_success(printed, size, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "argv", ["command"])
        write = stdout.write if printed == "write" else printed

        def main(arguments):
            write("x" * size)

        with pytest.raises(SystemExit) as stop:
            run(main)
    assert stop.value.code == 0
    monkeypatch.undo()
    with console.capture():  # rich keeps what it could not write: let it not be in another test
        pass


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 国\n\ttext", "plain é 国\n\ttext"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("bell\x07 back\x08 return\r", r"bell\x07 back\x08 return\r"),
        ("\x9b2J", r"\x9b2J"),  # the one-byte form of ESC [
        ("\u202egnirts", r"\u202egnirts"),
        ("\ud800", r"\ud800"),
        ("👩\u200d💻", "👩\u200d💻"),  # a joiner within a character is harmless
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text, shown):
    assert printable(text) == shown


def say_on_a_console(text):
    table = Table(title=text, columns=("data", "nats"), rows=[(text, 1.0)])
    shown = Terminal(file=sys.stderr, width=90, soft_wrap=False)
    for renderable in (text, Text(text), table):
        shown.print(renderable)
    shown.rule(text)


def say_what_is_done(text):
    with Activity(text, stream=sys.stderr) as activity:
        activity.update(text)
        print(activity._beat(), file=sys.stderr)


@pytest.mark.parametrize(
    "say",
    [
        note,
        lambda text: outcome_of(UserError(text)),
        sedd.data.base.say,
        sedd.training.checkpoint._say,
        say_on_a_console,
        say_what_is_done,
    ],
)
@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\u202e"])
def test_messages_hold_no_control_characters(say, character, capsys):
    say(f"a{character}[2Jb")
    printed = capsys.readouterr().err
    escaped = character.encode("unicode_escape").decode()
    assert f"a{escaped}[2Jb" in printed
    assert character not in printed


def outcome_of(error):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command"])
        with pytest.raises(SystemExit):
            run(raising(error))


def test_every_command_has_a_version(capsys, monkeypatch):
    result = outcome(raising(AssertionError()), capsys, monkeypatch, "--version")
    assert result == (0, f"{sedd.__version__}\n", "")


@pytest.fixture
def own_programs(tmp_path, monkeypatch):
    """A folder of compiled programs of this test's own, in a cache folder of its own."""
    before = jax.config.jax_compilation_cache_dir
    settings = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_max_size")
    values = {name: getattr(jax.config, name) for name in settings}
    monkeypatch.setenv("SEDD_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield tmp_path / "cache" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)
    for name, value in values.items():
        jax.config.update(name, value)
    reset_cache()


def compile_something(arguments=()):
    jax.clear_caches()
    # Any compile time counts here: a program that takes long enough would slow the tests.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert jax.jit(lambda x: jnp.sin(x) * 2 + jnp.arange(7.0))(0.0)[6] == 6


def damage_nothing(path):
    pass


def truncate(path):
    path.write_bytes(path.read_bytes()[:50])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_nothing, truncate, empty, flip, remove])
def test_programs_are_kept_and_damaged_ones_are_ignored(own_programs, damage, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            reset_cache()
            with pytest.raises(SystemExit) as stop:
                run(compile_something)
            assert stop.value.code == 0
            kept = list(own_programs.glob("*-cache"))
            assert kept
            for path in kept:
                damage(path)
    assert said == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flag", "environment"), [("--no-compile-cache", None), (None, "elsewhere")]
)
def test_programs_are_not_kept_where_it_is_not_wanted(
    own_programs, tmp_path, flag, environment, monkeypatch
):
    if environment is not None:  # as by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / environment))
    monkeypatch.setattr(sys, "argv", ["command", *([flag] if flag else [])])
    with pytest.raises(SystemExit):
        run(compile_something)
    assert not own_programs.exists()


def test_a_cache_folder_that_cannot_be_made_is_no_error(own_programs, capfd, monkeypatch):
    own_programs.parent.write_text("a file in its place")
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        run(compile_something)
    assert stop.value.code == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in COMPONENTS.values() for name in sorted(makers(family))],
)
def test_help_says_what_each_option_of_a_component_is(family, name):
    """All options but those that a run determines have a line of help."""
    kind = options_type(family, name)
    document_fields(kind)
    said = docstring_parser.parse(inspect.getdoc(kind))
    described = {param.arg_name for param in said.params if param.description.strip()}
    assert {field.name for field in dataclasses.fields(kind)} <= described
    before = kind.__doc__
    document_fields(kind)
    assert kind.__doc__ == before


def test_the_help_of_training_shows_them():
    """In a process of its own: tyro keeps the docstrings of the first command line it parses."""
    command = [sys.executable, "-m", "sedd", "train", "--config", "quickstart", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    words = " ".join(result.stdout.replace("│", " ").split())
    assert "--network.num-layers INT Number of blocks, each attention and an MLP." in words
