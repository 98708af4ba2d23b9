"""The examples in the docstrings of the public entry points print what they say, on a tiny run."""

import doctest

import pytest
import tiny_run
from tiers import daily

import sedd
from sedd.constraints import compile_json_schema, compile_regex
from sedd.data.corpora import open_corpus
from sedd.data.packing import pack
from sedd.data.tokenizer_sources import build_tokenizer
from sedd.interop.published import load_published

ENTRY_POINTS = {
    function.__qualname__: function
    for function in (
        sedd.load,
        sedd.sample,
        sedd.evaluate,
        sedd.price,
        sedd.diagnose,
        sedd.frontier,
        sedd.marginals,
        sedd.stream,
        sedd.samplers.options,
        sedd.Model.log_score,
        sedd.Model.log_conditional,
        compile_regex,
        compile_json_schema,
        load_published,
        open_corpus,
        pack,
        build_tokenizer,
    )
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The files that the examples name: a run, its export, and a text."""
    place = tmp_path_factory.mktemp("examples")
    (place / "training.txt").write_text(tiny_run.text(400))
    config = tiny_run.config("radd", corpus=str(place / "training.txt"))
    run = tiny_run.make_run(place / "runs" / "tiny", config)
    for kind in ("block", "marginal"):
        tiny_run.make_run(place / "runs" / kind, tiny_run.config(kind))
    exported = tiny_run.call("export", "--checkpoint", run, "--output", place / "exports" / "radd")
    assert exported.code == 0, exported.err
    words = tiny_run.text(200)
    (place / "my.txt").write_text(f"the cat {words}")
    return place


def run_example(name, docstring):
    """How many lines fail, and how many are tried."""
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    return doctest.DocTestRunner(verbose=False).run(test)


@pytest.mark.parametrize("name", daily(ENTRY_POINTS, ENTRY_POINTS.keys() - {"stream", "frontier"}))
def test_the_example_of_an_entry_point(place, monkeypatch, name):
    monkeypatch.chdir(place)
    results = run_example(name, ENTRY_POINTS[name].__doc__)
    assert results.attempted > 1
    assert results.failed == 0


def test_control_a_wrong_example_fails():
    assert run_example("wrong", ">>> 1 + 1\n3\n").failed == 1
