"""Everything that is to be measured on one GPU, in one run of at most nine minutes.

    python benchmarks/device/campaign.py --wheels wheels --output results
    python benchmarks/device/campaign.py --rehearse --output results     # tiny, on the CPU

The machine needs Python, JAX for its device and PyTorch, and no network: ``wheels.py`` makes the
folder of everything else. The stages run one after the other, each in a process of its own:

1. the wheels are installed into a temporary folder, beside the machine's own JAX;
2. device and versions;
3. ``pytest -m gpu``;
4. training steps of SEDD, RADD and an autoregressive model, of this package and plain PyTorch;
5. event-jump sampling, and a cached loop in plain PyTorch;
6. training on the embedded corpora in the time that is left; the weights are exported.

A stage that fails or takes too long is reported with its last lines, and the next one runs.
``results.json`` and ``results.md`` are written anew after each stage, so that an interruption
leaves what was measured before; ``log.txt`` has all output. Times are medians, without compilation.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
MODELS = ("sedd", "radd", "ar")
GRACE = 10  # seconds between SIGTERM and SIGKILL
LEAST = 5  # seconds that a stage needs to be started

GPT2_SMALL: dict[str, Any] = {
    "models": MODELS,
    "batches": (8, 64),
    "width": 768,
    "layers": 12,
    "heads": 12,
    "tokens": 50257,
    "length": 1024,
    "batch": 32,
    "steps": 20,
    "sampling_steps": 1024,
    "seconds": 10,  # of the plain sampling loop, at each batch size
}
TINY = GPT2_SMALL | {
    "batches": (1, 2),
    "width": 32,
    "layers": 1,
    "heads": 2,
    "tokens": 61,
    "length": 16,
    "batch": 4,
    "steps": 2,
    "sampling_steps": 8,
}
# 6.8 million parameters: 14 MB in bfloat16.
RUN = """--config sotu_radd --data.corpus sotu+stdlib --data.length 256
--network.num-heads 4 --network.dropout 0.1 --network.dtype bfloat16
--optimizer.learning-rate 4e-3 --optimizer.schedule linear --optimizer.ema-decay 0.999
--training.batch-size 256 --training.log-every 100 --training.eval-every 2000
--training.sample-every 1000000 --training.checkpoint-every 2000
--evaluation.max-sequences 512 --sampler.steps 256"""
TINY_RUN = """--config sotu_radd --data.corpus {text} --data.tokenizer bytes --data.length 16
--network.hidden-dim 16 --network.num-layers 1 --network.num-heads 2 --network.dtype bfloat16
--optimizer.schedule linear --optimizer.warmup-steps 1
--training.batch-size 4 --training.log-every 1 --training.eval-every 1000000
--training.sample-every 1000000 --training.checkpoint-every None
--evaluation.max-sequences 4 --evaluation.draws 4 --sampler.steps 4"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A process, the most seconds that it may take, and what it needs."""

    name: str
    command: list[str]
    seconds: float
    needs: str | None = None
    """A module without which the stage is not run."""


@dataclasses.dataclass(kw_only=True)
class Campaign:
    """The stages that have run, and where their results are written.

    Args:
        output: the directory of the results.
        deadline: the time, of ``time.monotonic``, at which all must be done.
        environment: of the stages' processes.
        reserve: seconds that the stages before the training leave for it.
    """

    output: Path
    deadline: float
    environment: dict[str, str]
    reserve: float
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, stage: Stage, *, last: bool = False) -> dict[str, Any]:
        """Run a stage, and write the results so far; returns the stage's record."""
        limit = min(stage.seconds, self.left() - (0 if last else self.reserve))
        most = max(limit, 0)
        print(f"[{self.left():4.0f} s left] {stage.name}, at most {most:.0f} s", flush=True)
        start = time.monotonic()
        record: dict[str, Any] = {"stage": stage.name, "rows": []}
        if stage.needs is not None and not self.has(stage.needs):
            record["status"] = f"{stage.needs} is not installed"
        elif limit < LEAST:
            record["status"] = "not run: no time was left"
        else:
            record |= self.process(stage, limit)
        record["seconds"] = time.monotonic() - start
        print(f"    {record['status']} after {record['seconds']:.0f} s", flush=True)
        self.stages.append(record)
        self.write()
        return record

    def has(self, module: str) -> bool:
        """Whether the stages' Python finds a module."""
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        return not subprocess.run([sys.executable, "-c", code], env=self.environment).returncode

    def process(self, stage: Stage, limit: float) -> dict[str, Any]:
        """Run the stage's process with its output in the log, for at most ``limit`` seconds."""
        log = self.output / "log.txt"
        with log.open("ab") as file:
            file.write(f"\n=== {stage.name}\n".encode())
            file.flush()
            begin = file.tell()
            process = subprocess.Popen(
                stage.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                status = f"stopped: it took more than {limit:.0f} s"
            finally:
                stop(process)
        lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
        rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW {")]
        if errors := [row["error"] for row in rows if "error" in row]:
            status += f", {len(errors)} of {len(rows)} cases failed"
        record: dict[str, Any] = {"status": status, "rows": rows}
        if status != "ok":
            record["last lines"] = lines[-12:]
        elif lines and not rows:  # of pytest, the numbers of tests
            record["summary"] = lines[-1]
        return record

    def write(self) -> None:
        """Write ``results.json`` and ``results.md``, each complete or not at all."""
        content = json.dumps({"stages": self.stages}, indent=1) + "\n"
        for name, text in (("results.json", content), ("results.md", markdown(self.stages))):
            partial = self.output / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.output / name)


def stop(process: subprocess.Popen) -> None:
    """End a process and its children, by SIGTERM and after some seconds by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue


def rows_of(stages: list[dict], name: str, key: str) -> dict[Any, dict]:
    """The rows of a stage by their model or batch size."""
    return {r[key]: r for stage in stages if stage["stage"] == name for r in stage["rows"]}


def cell(value: float | None, scale: float = 1, form: str = ".3g") -> str:
    """A figure times ``scale``, for a table; None as "not measured"."""
    return "not measured" if value is None else format(value * scale, form)


def over(ours: float | None, plain: float | None) -> float | None:
    """The second figure divided by the first; None unless both were measured."""
    return plain / ours if ours and plain else None


def markdown(stages: list[dict]) -> str:
    """The results as Markdown; what has no figure is marked as not measured."""
    about: dict[str, Any] = next(
        (row for stage in stages if stage["stage"] == "device" for row in stage["rows"]), {}
    )
    lines = [f"Device: {about.get('device', 'not known')}."]
    lines += [", ".join(f"{k} {v}" for k, v in about.items() if k != "device"), ""]
    lines += ["| stage | result | s |", "|---|---|--:|"]
    for stage in stages:
        result = ": ".join([stage["status"], *filter(None, [stage.get("summary")])])
        lines.append(f"| {stage['stage']} | {result} | {stage['seconds']:.0f} |")
    lines += ["", *step_table(stages), "", *sampling_table(stages), "", *training_table(stages)]
    for stage in stages:
        if "last lines" in stage:
            title = f"Last lines of {stage['stage']}:"
            lines += ["", title, "", "```", *stage["last lines"], "```"]
    return "\n".join(lines) + "\n"


def step_table(stages: list[dict]) -> list[str]:
    """The training steps of this package and of PyTorch."""
    ours, plain = (rows_of(stages, f"{name} steps", "model") for name in ("sedd", "PyTorch"))
    lines = [
        "| training step | form | ms | PyTorch / sedd | tokens/s | MFU | memory, GB | compile, s "
        "| first loss | cuDNN attention |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for model in MODELS:
        both = ours.get(model, {}), plain.get(model, {})
        ratio = over(*(row.get("s/step") for row in both))
        flops, peak = both[0].get("FLOPs"), both[0].get("peak FLOP/s")
        for form, row in zip(("sedd", "PyTorch"), both, strict=True):
            time_s = row.get("s/step")
            used = over(peak and time_s and peak * time_s, flops)
            compiled = row.get("compile, s", row.get("compile and first step, s"))
            cells = [
                cell(time_s, 1e3),
                cell(ratio) if form == "sedd" else "",
                cell(row.get("tokens/s"), form=",.0f"),
                cell(used, form=".1%"),
                cell(row.get("memory, GB")),
                cell(compiled),
                cell(row.get("first loss"), form=".4f"),
                {True: "yes", False: "no"}.get(row.get("cuDNN attention"), ""),  # pyright: ignore
            ]
            lines.append(f"| {model} | {form} | {' | '.join(cells)} |")
    return lines


def sampling_table(stages: list[dict]) -> list[str]:
    """Event-jump sampling, and PyTorch's loop."""
    ours, plain = (rows_of(stages, f"{name} sampling", "batch") for name in ("sedd", "PyTorch"))
    lines = [
        "| batch | sedd, s a sample | calls of the batch | PyTorch, s a sample "
        "| calls of the batch | steps timed | PyTorch / sedd |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for batch in sorted(ours.keys() | plain.keys()):
        a, b = ours.get(batch, {}), plain.get(batch, {})
        seconds = a.get("s/sample"), b.get("s/sample")
        cells = [
            cell(seconds[0]),
            cell(a.get("calls of the batch"), form=".0f"),
            cell(seconds[1]),
            cell(b.get("calls of the batch"), form=".0f"),
            cell(b.get("steps run"), form=".0f"),
            cell(over(*seconds)),
        ]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return lines


def training_table(stages: list[dict]) -> list[str]:
    """The figures of the training run, and its texts."""
    rows = [row for stage in stages if stage["stage"] == "training" for row in stage["rows"]]
    if not rows:
        return ["Training run: not measured."]
    texts = rows[-1].get("samples")
    lines = ["| training run | figure |", "|---|--:|"]
    figures = {name: value for name, value in rows[-1].items() if name != "samples"}
    for name, value in figures.items():
        lines.append(f"| {name} | {cell(value, 1, ',d' if isinstance(value, int) else '.5g')} |")
    return [*lines, *(["", "```", texts.strip(), "```"] if texts else [])]


def plan(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    """The stages before the training."""
    python, shape = sys.executable, json.dumps(TINY if arguments.rehearse else GPT2_SMALL)
    ours, plain = [python, str(HERE / "stages.py")], [python, str(HERE / "torch_plain.py")]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-m", "gpu"]
    tests += ["-W", "ignore::DeprecationWarning"]  # of another JAX than the locked one
    stages = []
    if arguments.wheels is not None:
        wheels = sorted(str(path) for path in arguments.wheels.glob("*.whl"))
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        install += ["--no-compile", "--target", str(work / "site"), *wheels]
        stages.append(Stage(name="installation", command=install, seconds=60))
    return [
        *stages,
        Stage(name="device", command=[*ours, "about", shape], seconds=45),
        Stage(name="pytest -m gpu", command=[*tests, str(ROOT / "tests/test_gpu.py")], seconds=90),
        Stage(name="sedd steps", command=[*ours, "steps", shape], seconds=120),
        Stage(name="PyTorch steps", command=[*plain, "steps", shape], seconds=110, needs="torch"),
        Stage(name="sedd sampling", command=[*ours, "sampling", shape], seconds=110),
        Stage(
            name="PyTorch sampling", command=[*plain, "sampling", shape], seconds=75, needs="torch"
        ),
    ]


def training_stage(arguments: argparse.Namespace, work: Path, left: float) -> Stage:
    """The training run, in the seconds that are left: 80 of them are for what follows it."""
    flags, seconds = RUN, left - 80
    if arguments.rehearse:
        text = work / "text.txt"
        text.write_text("the cat sat on the mat and saw my dog run far away.\n" * 200)
        flags, seconds = TINY_RUN.format(text=text), 1
    shape = {
        "seconds": seconds,
        "workdir": str(work / "run"),
        "output": str(arguments.output),
        "flags": flags.split(),
    }
    command = [sys.executable, str(HERE / "stages.py"), "training", json.dumps(shape)]
    return Stage(name="training", command=command, seconds=left - GRACE)


def environment_of(arguments: argparse.Namespace, work: Path) -> dict[str, str]:
    """The variables of the stages' processes: module paths, and where programs are kept."""
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    rehearsal = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    kept = {"JAX_COMPILATION_CACHE_DIR": str(work / "programs")}
    mine = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the machine's may be for another pytest
        "PYTHONUNBUFFERED": "1",
        "SEDD_CACHE": str(work / "cache"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return {**kept, **os.environ, **mine, **(rehearsal if arguments.rehearse else {})}


def read_settings(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line. The package and its parser may not be installed yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels; by default none is needed")
    parser.add_argument("--seconds", type=float, default=530, help="time for everything")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    arguments = parser.parse_args(words)
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {arguments.wheels}: there is no wheel; wheels.py makes the folder")
    return arguments


def main() -> int:
    """Run all stages; returns 0 if every one of them succeeded."""
    arguments = read_settings(sys.argv[1:])
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # stop the stage
    deadline = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        work = Path(folder)
        campaign = Campaign(
            output=arguments.output,
            deadline=deadline,
            environment=environment_of(arguments, work),
            reserve=0 if arguments.rehearse else 140,
        )
        for stage in plan(arguments, work):
            if arguments.rehearse:  # beside other work, a CPU takes longer
                stage = dataclasses.replace(stage, seconds=arguments.seconds)
            rows = campaign.run(stage)["rows"]
            if not arguments.rehearse and any(row.get("platform") == "cpu" for row in rows):
                print("JAX finds no accelerator: nothing is measured (--rehearse runs on a CPU)")
                return 1
        campaign.run(training_stage(arguments, work, campaign.left()), last=True)
    print((arguments.output / "results.md").read_text("utf-8").encode("ascii", "replace").decode())
    return 0 if all(stage["status"] == "ok" for stage in campaign.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
