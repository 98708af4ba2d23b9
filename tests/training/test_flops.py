"""Model FLOPs are those of the products that the mathematics needs."""

from types import SimpleNamespace

import jax
import pytest
from training_toy import ADAMW, run

from sedd.errors import UserError
from sedd.networks.ddit import DDiT
from sedd.networks.mesh import device_mesh, split_axes
from sedd.training.flops import peak_flops, step_flops
from sedd.training.metrics import read_metrics


@pytest.mark.parametrize("timed", [False, True])
def test_flops_are_counted_product_by_product(timed):
    d, layers, v, length, batch, c, read = 16, 3, 11, 8, 4, 6, 13
    network = DDiT(
        num_states=v,
        time_conditioned=timed,
        hidden_dim=d,
        num_layers=layers,
        num_heads=2,
        condition_dim=c,
    )
    tokens = batch * length
    block = 2 * tokens * (d * 3 * d + d * d + d * 4 * d + 4 * d * d)
    attention = 2 * 2 * batch * length * length * d  # q·k, and the weights times v
    forward = layers * (block + attention) + 2 * read * d * v
    if timed:
        forward += 2 * batch * (256 * c + c * c + layers * c * 6 * d + c * 2 * d)
    assert step_flops(network, batch, length, read=read) == 3 * forward


def test_the_peak_is_that_of_the_kind():
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(SimpleNamespace(device_kind="TPU v5 lite")) == 197e12
    assert peak_flops(SimpleNamespace(device_kind="TPU v5p")) == 459e12
    assert peak_flops(SimpleNamespace(device_kind="cpu")) is None


def test_a_run_records_its_flops_waiting_and_profile(tmp_path):
    run(tmp_path, 21, ADAMW, flops=lambda read: 1e9 * read, profile=3)
    record = read_metrics(tmp_path)[-1]
    assert record["tflops_per_second"] > 0
    assert "mfu" not in record  # nobody knows a CPU's peak
    assert 0 <= record["waiting_for_data"] < 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("fsdp", [0, 3, 8])
def test_a_mesh_that_cannot_be_is_refused(fsdp):
    with pytest.raises(UserError, match=f"divide the 4 devices, got {fsdp}; these do: 1, 2, 4"):
        device_mesh(fsdp=fsdp)


def test_the_axis_of_the_layers_is_never_split():
    shapes = {
        "embed": jax.ShapeDtypeStruct((50258, 768), float),
        "blocks": {"kernel": jax.ShapeDtypeStruct((4096, 768, 3), float)},
        "bias": jax.ShapeDtypeStruct((768,), float),
    }
    axes = split_axes(shapes, device_mesh(fsdp=4), "blocks")
    assert axes == {"embed": -1, "blocks": {"kernel": -2}, "bias": 0}
