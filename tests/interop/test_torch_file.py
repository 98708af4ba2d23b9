import collections
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_writer import Payload, Storage, View, pickled, write

from sedd.errors import UserError
from sedd.interop.published import WEIGHTS, load_published
from sedd.interop.torch_file import LEGACY, read_torch

RNG = np.random.default_rng(0)
GOLDEN = Path(__file__).parents[1] / "golden" / "radd"
FLAT = RNG.standard_normal(40).astype(np.float32)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int64]
)
def test_numbers_are_those_that_were_saved(tmp_path, dtype):
    array = (10 * RNG.standard_normal((3, 4))).astype(dtype)
    read = read_torch(write(tmp_path / "a.bin", {"x": View.of(array)}))["x"]
    assert read.shape == (3, 4)
    assert np.asarray(read).dtype == dtype
    np.testing.assert_array_equal(np.asarray(read), array)


def test_offsets_strides_and_shared_storages(tmp_path):
    storage = Storage(FLAT)
    views = {
        "all": View(storage, 0, (40,), (1,)),
        "rows": View(storage, 10, (2, 5), (5, 1)),
        "transposed": View(storage, 0, (5, 8), (1, 5)),
        "strided": View(storage, 3, (4, 2), (8, 3)),
        "expanded": View(storage, 7, (3, 2), (0, 0)),
        "scalar": View(storage, 39, (), ()),
        "empty": View(Storage(FLAT[:0]), 0, (0, 4), (4, 1)),
        "parameter": View(storage, 0, (2, 20), (20, 1), parameter=True),
    }
    read = {k: np.asarray(v) for k, v in read_torch(write(tmp_path / "a.bin", views)).items()}
    strides = [(3 + 8 * i + 3 * j) for i in range(4) for j in range(2)]
    expected = {
        "all": FLAT,
        "rows": FLAT[10:20].reshape(2, 5),
        "transposed": FLAT.reshape(8, 5).T,
        "strided": FLAT[strides].reshape(4, 2),
        "expanded": np.full((3, 2), FLAT[7]),
        "scalar": FLAT[39],
        "empty": np.zeros((0, 4)),
        "parameter": FLAT.reshape(2, 20),
    }
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_containers_and_scalars_are_read_as_they_are(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": ("text", {"c": collections.OrderedDict(x=3)})}
    assert read_torch(write(tmp_path / "a.bin", content)) == content


def test_attributes_of_a_state_dict_are_nothing(tmp_path):
    state = collections.OrderedDict(x=View.of(FLAT))
    state._metadata = collections.OrderedDict(version=1)  # pyright: ignore
    read = read_torch(write(tmp_path / "a.bin", state))
    assert list(read) == ["x"]
    assert not hasattr(read, "_metadata")


# ------------------------------------------------------- payloads


def places(payload):
    """The payload as all of a file, deep inside it, as a tensor's hook, and as a key."""
    return {
        "alone": payload,
        "nested": {"model": {"deep": [1, ("x", {"y": payload})]}},
        "beside_tensors": {"x": View.of(FLAT), "y": payload},
        "ordered": collections.OrderedDict(a=payload),
    }


@pytest.mark.parametrize("place", [*places(None)])
@pytest.mark.parametrize("name", [w for w in WEIGHTS if "safetensors" not in w])
def test_a_payload_in_any_file_is_not_run_and_is_named(tmp_path, place, name):
    made = tmp_path / "made"
    path = write(tmp_path / name, places(Payload(made))[place])
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(UserError) as error:
        load_published(tmp_path)
    assert not made.exists()
    assert str(path) in str(error.value)
    assert ".system" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_not_run_and_is_named(tmp_path, protocol):
    made, path = tmp_path / "made", tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": Payload(made)}, protocol))
    with pytest.raises(UserError, match=r"pytorch_model.bin is refused: .* call \w+\.system"):
        read_torch(path)
    assert not made.exists()
    pickle.loads(path.read_bytes())  # control: it would have been run
    assert made.exists()


def test_a_payload_after_the_legacy_header_is_named(tmp_path):
    path = tmp_path / "a.bin"
    header = LEGACY + b"." + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    path.write_bytes(header + pickle.dumps(Payload(tmp_path / "made"), 2))
    with pytest.raises(UserError, match=r"a.bin is refused: loading it would call \w+\.system"):
        read_torch(path)
    path.write_bytes(header + pickle.dumps({}, 2))
    with pytest.raises(UserError, match=r"a.bin is in the format of torch.save before PyTorch 1.6"):
        read_torch(path)
    assert not (tmp_path / "made").exists()


def test_a_pickle_in_the_place_of_safetensors_is_not_run(tmp_path):
    made = tmp_path / "made"
    shutil.copy(GOLDEN / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        load_published(tmp_path)
    assert not made.exists()


GLOBAL = "c{}\n{}\n"  # opcodes of protocol 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch.FloatStorage", "from_file"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy", "load"),
        ("omegaconf_evil", "run"),
        ("sedd.interop.torch_file", "STORAGES"),
        ("functools", "partial"),
    ],
)
def test_only_known_names_are_taken(tmp_path, module, name):
    path = write(tmp_path / "a.bin", None, raw=(GLOBAL.format(module, name) + ".").encode())
    with pytest.raises(UserError, match=f"would call {module}.{name}, "):
        read_torch(path)


def test_what_is_passed_over_is_never_imported_or_called(tmp_path):
    """Objects of omegaconf, as Lightning saves them: any use of them by a pickle does nothing."""
    config = GLOBAL.format("omegaconf.dictconfig", "DictConfig")
    uses = [
        f"{config}.",
        f"{config}(S'a'\ntR.",  # called
        f"{config})\x81}}S'_content'\nI1\nsb.",  # made by __new__, and given a state
        f"{config})\x81(I1\nI2\ne.",  # extended
        f"{config})\x81(I1\nI2\nu.",  # filled as a dictionary
        f"({config}S'x'\no.",  # made as in protocol 1
        "(S'x'\niomegaconf\nOmegaConf\n.",  # and in protocol 0
    ]
    for number, use in enumerate(uses):
        read_torch(write(tmp_path / f"{number}.bin", None, raw=use.encode("latin1")))
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize(
    "target",
    [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "FloatStorage"),
        ("collections", "OrderedDict"),
        ("omegaconf", "DictConfig"),
    ],
)
@pytest.mark.parametrize("state", ["}S'__init__'\nI1\ns", "(N}S'__init__'\nI1\nst"])
def test_a_pickle_cannot_change_what_it_is_given(tmp_path, target, state):
    """BUILD sets attributes; of a class that would outlive the file."""
    raw = (GLOBAL.format(*target) + state + "b.").encode()
    with pytest.raises(UserError, match="is damaged"):
        read_torch(write(tmp_path / "a.bin", None, raw=raw))
    content = {"x": View.of(FLAT, parameter=True)}
    np.testing.assert_array_equal(
        np.asarray(read_torch(write(tmp_path / "b.bin", content))["x"]), FLAT
    )


# ------------------------------------------------------- damage


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (41,), (1,)),
        (1, (40,), (1,)),
        (0, (2, 2), (39, 2)),
        (10**30, (1,), (1,)),
        (0, (2,), (10**30,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, arguments):
    read = read_torch(write(tmp_path / "a.bin", [View(Storage(FLAT), *arguments)]))
    with pytest.raises(UserError, match=r"a.bin is damaged: a tensor reaches beyond its storage"):
        np.asarray(read[0])


@pytest.mark.parametrize("arguments", [(-1, (2,), (1,)), (0, (-2,), (1,)), (0, ("a",), (1,))])
def test_a_tensor_without_sense_is_refused(tmp_path, arguments):
    with pytest.raises(UserError, match="not described by whole numbers"):
        read_torch(write(tmp_path / "a.bin", [View(Storage(FLAT), *arguments)]))


def test_other_files_are_refused_by_what_they_are(tmp_path):
    content = {"x": View.of(FLAT)}
    with pytest.raises(UserError, match=r"a.bin was written on a big-endian machine"):
        read_torch(write(tmp_path / "a.bin", content, byteorder="big"))
    with pytest.raises(UserError, match=r"a.bin: a/\w+ is compressed, which is not read"):
        read_torch(write(tmp_path / "a.bin", content, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(UserError, match=r"a zip archive with 0 entries data\.pkl"):
        read_torch(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"not anything")
    with pytest.raises(UserError, match="it is not a zip archive, or it is incomplete"):
        read_torch(tmp_path / "a.bin")
    with pytest.raises(UserError, match="No such file"):
        read_torch(tmp_path / "nothing.bin")


def test_any_damage_is_named(tmp_path):
    """Whichever byte is wrong, the file is refused, or its numbers are as they were."""
    whole = write(tmp_path / "a.bin", {"x": View.of(FLAT)}).read_bytes()
    path = tmp_path / "b.bin"
    refused = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            (array,) = [np.asarray(each) for each in read_torch(path).values()]
            np.testing.assert_array_equal(array, FLAT)
        except UserError as error:
            refused += str(path) in str(error)
        path.write_bytes(whole[:position])
        with pytest.raises(UserError, match=r"b\.bin"):
            read_torch(path)
    assert refused > 30


def test_a_missing_storage_is_named(tmp_path):
    entries = {}
    raw = pickled({"x": View.of(FLAT)}, entries)
    read = read_torch(write(tmp_path / "a.bin", None, raw=raw))
    with pytest.raises(UserError, match=r"a.bin is damaged: it lacks a/data/0"):
        np.asarray(read["x"])
