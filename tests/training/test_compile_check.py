"""The real step compiles for a TPU that is not there, and moves what it must and nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import nightly

from sedd.commands import compile_check
from sedd.commands.program_text import collectives_of, exhausted, sizes, tensor_bytes
from sedd.errors import UserError

ROOT = Path(__file__).parents[2]
LENGTH, ROWS = 640, 3  # a length that is no width of the models
SMALL = ["--network.hidden-dim", "128", "--network.num-heads", "2", "--network.num-layers", "2"]
GROUPED = ["--network", "decoder", "--network.num-kv-heads", "1", "--network.mlp-dim", "2048"]


def check(*arguments):
    flags = ["--config", "configs/owt_radd_small.py", "--data.length", str(LENGTH)]
    flags += ["--training.batch-size", str(4 * ROWS), *map(str, arguments)]
    return subprocess.run(
        [sys.executable, "-m", "sedd", "compile_check", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.nightly
def test_sampling_and_evaluation_gather_parameters_and_move_no_hidden_state(tmp_path):
    for what in ("evaluate", "sample"):
        program = tmp_path / "program.txt"
        flags = ("--topology", "v5e:2x2", "--training.parallel", "fsdp", "--program", program)
        ran = check(*flags, *SMALL, "--what", what, "--evaluation.draws", "4")
        assert ran.returncode == 0, ran.stderr
        assert f"{what} on v5e:2x2, fsdp" in ran.stdout
        kinds = collectives_of(program.read_text())
        assert set(kinds) <= {"all-gather", "all-reduce"}
        shapes = moved_sizes(program.read_text())
        assert 50258 in shapes
        assert not shapes & {LENGTH, ROWS * LENGTH, 4 * ROWS * LENGTH}


def moved_sizes(text):
    """The lengths of all axes of the arrays that collectives move."""
    moved = re.findall(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter)(?:-start)?\(", text)
    return {int(n) for result in moved for n in re.findall(r"[\[,](\d+)(?=[\],])", result)}


@pytest.mark.parametrize(
    ("parallel", "network", "parameters"),
    [
        nightly("pmap", SMALL, 13_312_082),
        nightly("fsdp", [*SMALL, *GROUPED], 14_537_856),
        nightly("pmap", [], 162_265_682),
        nightly("fsdp", [], 162_265_682),
    ],
)
def test_a_step_fits_four_chips_and_no_hidden_state_travels(
    parallel, network, parameters, tmp_path
):
    program = tmp_path / "program.txt"
    flags = ("--topology", "v5e:2x2", "--training.parallel", parallel, "--program", program)
    ran = check(*flags, *network)
    assert ran.returncode == 0, ran.stderr
    assert "fits" in ran.stdout
    assert f"{parameters:,}" in ran.stdout
    text = program.read_text()
    kinds = collectives_of(text)
    assert ("all-gather" in kinds) == (parallel == "fsdp")
    assert ("reduce-scatter" in kinds) == (parallel == "fsdp")
    shapes = moved_sizes(text)
    assert 50258 in shapes  # the output layer's, of its weights
    assert not shapes & {LENGTH, ROWS * LENGTH, 4 * ROWS * LENGTH}
    # One attention of each direction: the backward pass does not run the forward kernel again.
    kernels = re.findall(r"%(splash_mha_[a-z]+)[\w.]* = .* custom-call\(", text)
    assert sorted(kernels) == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
    # Of hidden states nothing, and of parameters no more than each once in each direction.
    total = sum(size for _, size in kinds.values())
    assert total < 3 * 4 * parameters


def test_a_slice_that_does_not_exist_is_one_line():
    ran = check("--topology", "v5e:3x5")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: --topology v5e:3x5: ")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:2x2"), "--topology v9:2x2: the generation must be one of v4, v5e"),
        (
            ("--topology", "v5e:2x2", "--data.tokenizer", "characters"),
            "give it with --num-tokens",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        compile_check.main(["--config", str(ROOT / "configs/owt_radd_small.py"), *arguments])


def test_what_a_program_moves_is_counted():
    text = """
HloModule jit_run, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%gather.1 (x: bf16[4]) -> bf16[32] {
  ROOT %b = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%x), dimensions={0}
}

%body.2 (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = f32[8,16]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %f = bf16[32]{0} fusion(%x), kind=kLoop, calls=%gather.1
}

%cond.4 (p: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%chained.5 (x: bf16[4]) -> bf16[32] {
  %b = bf16[32]{0} all-gather(%x), dimensions={0}, frontend_attributes={chain_id="5"}
}

%never (p: f32[]) -> f32[] {
  %a = f32[99]{0} all-reduce(%x), to_apply=%add
}

ENTRY %main.3 (p: f32[8,16]) -> f32[2] {
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%body.2, backend_config={"known_trip_count":{"n":"12"}}
  %v = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond.4, body=%body.2
  %u = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%body.2
  %h = bf16[32]{0} fusion(%x), kind=kLoop, calls=%chained.5
  %i = bf16[32]{0} fusion(%x), kind=kLoop, calls=%chained.5
  %e = f32[7]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %g = f32[7]{0} all-reduce(%x), replica_groups=[2,1]<=[2], to_apply=%add
  ROOT %d = (f32[2]{0}, f32[6]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
}
"""  # noqa: E501
    assert collectives_of(text) == {
        "all-reduce": (17, 16 * 512 + 32),
        "all-gather": (17, 17 * 64),
    }
    assert sizes("(f32[2,3]{1,0}, u32[], pred[7]{0})") == [24, 4, 7]


def test_lack_of_memory_names_the_largest_arrays():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM (32G) exceeds (15G).\nmore"
    program = "%0 : tensor<8x1024xbf16>, tensor<64x1024x3072xbf16> tensor<4xf32> tensor<f32>"
    assert tensor_bytes("8x1024xbf16") == 2**14
    assert exhausted(message, program) == (
        "Ran out of memory on HBM (32G) exceeds (15G); the largest arrays are "
        "64x1024x3072xbf16 (0.38 GiB), 8x1024xbf16 (0.0 MiB), 4xf32 (0.0 MiB)"
    )
