"""Sets up JAX for all tests: simulated devices, quick compilation, checked array types."""

import gc
import os
from pathlib import Path

# With the two threads of a two-core machine, the collectives of four devices can deadlock.
os.environ.setdefault("NPROC", "16")
# Compiling a toy program takes longer than running it. The settings are environment variables, so
# that child processes have them too. Without the fusion emitters compilation takes half as long.
# Nor are the parts of one program compiled side by side: the workers keep the cores busy.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# All workers, their child processes and later runs share the compiled programs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache/programs")
# Smaller programs compile as quickly as they are read.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# As ``sedd harness`` sets it, too late for a package that another test has imported.
os.environ["TQDM_DISABLE"] = "1"

import jax
import pytest
from jax._src import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
PROGRAMS = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
MAX_BYTES = 2**29  # of compiled programs that are kept for the next run

# The annotated shapes and types of the mathematics are checked in tests only: users pay nothing.
CHECKED = ("schedules", "processes", "networks", "parameterizations", "denoiser", "objectives")
CHECKED += ("samplers", "evaluation")
install_import_hook([f"sedd.{name}" for name in CHECKED], "beartype.beartype").__enter__()


# The files that take longest start first, so that workers end at the same time.
LONGEST = (
    *("test_sample_command", "test_conformance", "test_sampling", "test_docs"),
    *("test_bad_input", "test_searches", "test_spans", "test_hmm_head", "test_marginals"),
    *("test_objectives", "test_conditional_laws", "test_reshape", "test_watermark"),
    *("test_protocols", "test_event_jump", "test_loop", "test_model", "test_hybrid"),
    *("test_ddit", "test_train_command", "test_evaluation_report", "test_end_to_end"),
    *("test_zero_order", "test_causal_head", "test_processes", "test_block", "test_step"),
    *("test_mesh", "test_cli", "test_bound", "test_multiprocess", "test_one_file_each"),
    *("test_checkpoint", "test_large_models", "test_decode", "test_blocks"),
)


def pytest_collection_modifyitems(items):
    """Order files by their duration as measured, longest first; the others keep their order."""
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config):
    """Collect garbage less often, and clean the cache of compiled programs once a run."""
    # Tracing makes many objects and few cycles: by Python's default 5 % of a run are collections.
    gc.set_threshold(50_000, 20, 20)
    if not hasattr(config, "workerinput"):
        clean_programs(PROGRAMS, MAX_BYTES)


def clean_programs(directory: Path, max_bytes: int) -> None:
    """Delete damaged programs, and the least recently written ones beyond ``max_bytes``.

    JAX writes an entry in place, without a lock. A process that is killed while it writes leaves a
    part of the entry. Later runs would warn of it, compile the program, and never replace it.
    JAX's own bound (``jax_compilation_cache_max_size``) reads the whole directory at every write.
    """
    entries = sorted(directory.glob("*-cache"), key=lambda path: -path.stat().st_mtime)
    total = 0
    for path in entries:
        content = path.read_bytes()
        total += len(content)
        if total > max_bytes or not is_whole(content):
            path.unlink(missing_ok=True)


def is_whole(entry: bytes) -> bool:
    """Whether an entry of the cache of compiled programs can be decompressed."""
    try:
        return bool(compilation_cache.decompress_executable(entry))
    except Exception:  # of the compression library that JAX has found
        return False


@pytest.fixture(autouse=True, scope="module")
def _collected():
    """Collect garbage and forget compiled programs after each module.

    Reads that orbax could not complete complain when they are collected. The complaint parses
    source code, which breaks a parse under way (CPython's issue 106905), so it must not come in a
    test.
    A process may map only so many pieces of code (Linux's max_map_count), hence the programs.
    """
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of text to train on."""
    import tiny_run  # imports sedd, after the checks of types are installed

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_run.text())
    return path


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, text):
    """A RADD run on this text, with random weights, for networks that start from one."""
    import tiny_run

    config = tiny_run.config("radd", corpus=str(text))
    return tiny_run.make_run(tmp_path_factory.mktemp("trunk") / "run", config)
