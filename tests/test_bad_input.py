"""A user's mistakes: one line that names the value, exit code 2, and nothing that is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pyarrow
import pytest
import tiny_run
from pyarrow import parquet
from tiers import nightly
from tiny_run import ROOT, TINY, call

import sedd.files
from sedd.training.checkpoint import Checkpoints

CODE = """\
import numpy as np
x = 3

def score(texts):
    return [0.0] * len(texts)

def raises(log_probs, tokens, positions):
    raise ValueError("two\\nlines")

def leaves(log_probs, tokens, positions):
    raise SystemExit(3)

def takes_numpy(log_probs, tokens, positions):
    return np.exp(log_probs)

def branches(log_probs, tokens, positions):
    return log_probs if log_probs.max() > 0 else -log_probs

def takes_two(log_probs, tokens):
    return log_probs

def narrow(log_probs, tokens, positions):
    return log_probs[..., :-1]

def whole(log_probs, tokens, positions):
    return tokens

def nothing(log_probs, tokens, positions):
    pass

def many(log_probs, tokens, positions):
    return [log_probs]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every sort, and runs that are whole, damaged and incomplete."""
    top = tmp_path_factory.mktemp("place")
    (top / "text.txt").write_text(tiny_run.text())
    (top / "null.json").write_text("null")
    (top / "loop").symlink_to(top / "loop")
    (top / "empty.txt").write_text("")
    (top / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (top / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 99)
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), top / "body.parquet")
    (top / "bad.jsonl.zst").write_bytes(b"no frame of zstd")
    (top / "nothing.py").write_text("x = 1\n")
    (top / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (top / "mistaken.py").write_text(
        "from sedd.configuration.config import Config, TrainingOptions\n\n"
        "def get_config():\n    return Config(training=TrainingOptions(steps=0))\n"
    )
    (top / "unknown.py").write_text("import sedd.nothing_of_the_name\n")
    (top / "returns.py").write_text("def get_config():\n    return {'steps': 3}\n")
    (top / "uncallable.py").write_text("get_config = 3\n")
    (top / "syntax.py").write_text("def get_config(:\n")
    (top / "stops.py").write_text("import sys\n\nsys.exit(3)\n")
    (top / "leaves.py").write_text("def get_config():\n    exit('no')\n")
    (top / "lacks.py").write_text("import nothing_beside_it_is_named_so\n")
    (top / "recipe.yaml").write_text("training:\n  steps: 3\n")
    (top / "broken.json").write_text("{training: 3}")
    (top / "wrong.json").write_text('{"training": {"steps": 0}}')
    (top / "code.py").write_text(CODE)
    (top / "requests.jsonl").write_text('{"id": "good"}\n{"id": "bad", "prompt": 7}\n')
    config = tiny_run.config(corpus=str(top / "text.txt"))
    config = replace(config, training=replace(config.training, batch_size=8))
    whole = tiny_run.make_run(top / "run", config)
    for kind in ("sedd", "uniform"):
        (top / kind).mkdir()
        tiny_run.make_run(top / kind, tiny_run.config(kind))
    tiny_run.profile_of(sedd.load(whole)).save(top / "price.json")
    for name in ("truncated", "other", "no_config", "no_checkpoint"):
        shutil.copytree(whole, top / name)
    tiny_run.truncate(top / "truncated" / "checkpoints" / "4" / "ema_params")
    described = json.loads((whole / "config.json").read_text())
    described["network"]["mlp_ratio"] = 2
    (top / "other" / "config.json").write_text(json.dumps(described))
    (top / "no_config" / "config.json").unlink()
    shutil.rmtree(top / "no_checkpoint" / "checkpoints")
    return top


TRAIN = [
    ("--data.corpus stdlb", "--data.corpus: unknown corpus 'stdlb', did you mean 'stdlib'?"),
    ("--data.corpus {place}/none.txt", "--data.corpus: {place}/none.txt: no such file, folder"),
    ("--data.corpus {place}/a*.md", "--data.corpus: {place}/a*.md: no such file, folder or pat"),
    ("--data.corpus {place}/empty.txt", "empty.txt is empty"),
    ("--data.corpus {place}/binary.bin", "binary.bin is not text"),
    ("--data.corpus {place}/latin1.txt", "latin1.txt, line 1: not UTF-8"),
    (
        "--data.corpus {place}/body.parquet",
        "body.parquet: no column 'text', the columns are 'body'",
    ),
    ("--data.corpus {place}/bad.jsonl.zst", "cannot read {place}/bad.jsonl.zst: ZSTD decompress"),
    ("--data.corpus {text} --data.length 99999", "length 99999 is longer than the data"),
    ("--data.corpus {text} --data.tokenizer chars", "unknown tokenizer 'chars'"),
    ("--data.corpus {text} --data.tokenizer bpe:9", "tokenizer 'bpe:9': expected bpe:SIZE"),
    (
        "--data.corpus {text}*0+sotu",
        ": the weight of {text} must be positive, got 0",
    ),
    ("--trainig.steps 3", "unrecognized option --trainig.steps"),
    ("--training.stpes 3", "--training.stpes; did you mean --training.steps?"),
    ("--data.corpus", "--data.corpus needs a value"),
    ("--training.steps many", "--training.steps: not a whole number: 'many'; expected"),
    ("--optimizer.learning-rate fast", "--optimizer.learning-rate: not a number: 'fast'"),
    (
        "--optimizer.schedule linaer",
        "--optimizer.schedule must be one of .*, got 'linaer'",
    ),
    ("--optimizer.learning-rate 0", "--optimizer.learning-rate must be positive, got 0.0"),
    ("--optimizer.ema-decay 1", "--optimizer.ema-decay must be in [0, 1), got 1.0"),
    ("--training.steps 0", "--training.steps must be at least 1, got 0"),
    ("--training.eval-every 0", "--training.eval-every must be at least 1, got 0"),
    ("--training.keep 0", "--training.keep must be at least 1, got 0"),
    ("--evaluation.draws 6", "--evaluation.draws must be a positive multiple of 4, got 6"),
    ("--data.length 0", "--data.length must be at least 1, got 0"),
    ("--data.workers 0", "--data.workers must be at least 1, got 0"),
    ("--seed -1", "--seed must be in [0, 2**32), got -1"),
    (
        "--network.num-heads 3",
        "'ddit': --network.hidden-dim must be .* got 16 with 3 heads",
    ),
    ("--network.dropout 1", "networks 'ddit': --network.dropout must be in [0, 1), got 1.0"),
    ("--schedule.eps 2", "schedules 'log_linear': --schedule.eps must be in (0, 1), got 2.0"),
    ("--sampler.steps 0", "samplers 'tweedie': --sampler.steps must be at least 1, got 0"),
    ("--process unifrom", "--process unifrom: processes has no 'unifrom'; did you mean 'uniform'"),
    ("--process uniform", "parameterizations 'conditional': it needs an absorbing process; score"),
    ("--parameterization score", "objectives 'lambda_dce': a cross entropy needs the para"),
    (
        "--parameterization any_subset",
        "--objective lambda_dce does not train the passes over an order of the parameterization",
    ),
    (
        "--objective any_subset",
        "objectives 'any_subset': it trains the parameterization any_subset only, got conditional",
    ),
    (
        "--parameterization any_subset --objective any_subset --objective.min-rate 2",
        "objectives 'any_subset': --objective.min-rate must be in [0, 1], got 2.0",
    ),
    ("--training.batch-size 6", "batch_size must be divisible by devices × accumulate = 4 × 1"),
    ("--training.batch-size 8 --training.accumulate 4", "4 × 4 = 16, got 8; the nearest"),
    ("--config {place}/none.py", "--config {place}/none.py: no such file"),
    ("--config {place}/syntx.py", "no such file or recipe; did you mean '{place}/syntax.py'?"),
    ("--config quikstart", "--config quikstart: no such file or recipe; did you mean 'quickstart'"),
    ("--config {place}/quickstart.py", "no such file or recipe; did you mean 'quickstart'?"),
    ("--config {place}/stops.py", "stops.py, line 3: SystemExit: 3"),
    ("--config {place}/leaves.py", "leaves.py, line 2: SystemExit: no"),
    ("--config {place}/lacks.py", "lacks.py, line 1: ModuleNotFoundError: No module named"),
    ("--config {place}/recipe.yaml", "a configuration is a Python file (.py) with get_config()"),
    ("--config {place}/text.txt", "with get_config(), or the config.json of a run, got .txt"),
    ("--config {place}/null.json", "null.json: configuration: the file must be an object, got N"),
    ("--config {place}/broken.json", "broken.json: not JSON (Expecting"),
    ("--config {place}/wrong.json", "wrong.json: configuration: training.steps must be at least"),
    ("--config {place}", "--config {place}: no such file"),
    ("--config {place}/nothing.py", "nothing.py: it defines no get_config()"),
    ("--config {place}/raises.py", "raises.py, line 2: ZeroDivisionError: division by zero"),
    ("--config {place}/mistaken.py", "mistaken.py, line 4: steps must be at least 1"),
    ("--config {place}/unknown.py", "unknown.py, line 1: ModuleNotFoundError: No module named"),
    ("--config {place}/returns.py", "get_config() must return a Config, got dict"),
    ("--config {place}/uncallable.py", "TypeError: 'int' object is not callable"),
    ("--config {place}/syntax.py", "SyntaxError: .*(syntax.py, line 1)"),
    ("--workdir {text}", "--workdir {text}: {text} is a file, not a directory"),
    ("--workdir=", "--workdir: invalid value: ''; expected --workdir PATH"),
    ("--workdir {place}/loop", "--workdir {place}/loop: a link that leads back to itself"),
    ("--workdir {text}/a/b", "{text} is a file, not a directory"),
    ("--workdir {run} --data.corpus {text} --seed 3", "seed was 0 and is now 3"),
    ("--workdir {run} --data.corpus sotu", 'data.corpus was "{text}" and is now "sotu"'),
    ("--workdir {place}/no_config", "it holds checkpoints but no config.json"),
    ("--init-from {place}/none", "--init-from {place}/none: checkpoint {place}/none: no such"),
    ("--init-from {run} --data.tokenizer bytes", "its tokenizer is characters, and --data.token"),
    ("--init-from {run} --data.corpus {text} --network.mlp-ratio 2", "of another configuration"),
]
SAMPLE = [
    ("--checkpoint {place}/none", "checkpoint {place}/none: no such directory"),
    ("--checkpoint {text}", "checkpoint {text}: no such directory"),
    ("--checkpoint=", "checkpoint '': an empty path"),
    ("--output=", "--output: invalid value: ''; expected --output FILE.jsonl"),
    ("--output {place}/loop", "--output {place}/loop: a link that leads back to itself"),
    ("--trace {place}/loop", "--trace {place}/loop: a link that leads back to itself"),
    ("--checkpoint {place}", "not a run's directory (it has no config.json)"),
    ("--checkpoint {run}/checkpoints", "(it has no config.json); did you mean {run}?"),
    ("--checkpoint {place}/no_checkpoint", "no checkpoint in {place}/no_checkpoint"),
    ("--checkpoint {place}/truncated", "all checkpoints in .*truncated/checkpoints are damaged"),
    ("--checkpoint {place}/other", "of another configuration: .* in it, and .* in the conf"),
    ("--step 3", "no checkpoint of step 3 in {run}/checkpoints; there are [4]"),
    ("--step newest", "--step: invalid value: 'newest'"),
    ("--num 0", "num must be at least 1, got 0"),
    ("--batch-size 0", "--batch-size must be at least 1, got 0"),
    ("--steps 0", "samplers 'event_jump': --steps must be at least 1, got 0"),
    ("--steps -3", "samplers 'event_jump': --steps must be at least 1, got -3"),
    ("--steps 1.5", "--steps: not a whole number: '1.5'; expected --steps INT"),
    ("--steps 3000000000", "--steps must be below 2**31, got 3000000000"),
    ("--sampler tweedi", "samplers has no 'tweedi'; did you mean 'tweedie'"),
    ("--sampler", "--sampler needs a value"),
    ("--sampler=", "--sampler : samplers has no ''; it has best_of_n, confidence"),
    ("--sampler event_jmp", "--sampler event_jmp: .*did you mean 'event_jump'?; it has best_of_n"),
    ("options", "unrecognized option options"),
    ("--seed 4294967295 --num 2", "--seed 4294967295: with --num 2 the last seed is beyond"),
    ("--seed -3", "seed must be in [0, 2**32), got -3"),
    ("--length 0", "length must be in 1.."),
    ("--length 99999999999", "length must be in 1.."),
    ("--prompt farawayfromhere", "prompt (15 tokens) do not fit into the length of 12"),
    ("--prompt sat --suffix farawayfrom", "prompt (3 tokens) and suffix (11 tokens) do not fit"),
    ("--prompt Zebra", "--prompt: character 'Z' (U+005A) is not among the"),
    ("--infill a{{mask:x}}", "infill gap '{{mask:x}}': the size must be a whole number"),
    ("--infill a{{mask:3", "infill gap '{{mask:3' cannot be read"),
    ("--infill abc", "has no gap; write {{mask:12}}"),
    ("--infill a{{mask:9}} --length 5", "(10 tokens) does not fit into the length of 5"),
    ("--infill a{{mask}} --prompt b", "infill already holds its context"),
    ("--requests {place}/none.jsonl", "--requests {place}/none.jsonl: No such file"),
    ("--requests {place}/empty.txt", "--requests {place}/empty.txt: the file is empty"),
    ("--requests {place}/binary.bin", "binary.bin: not a file of JSON lines"),
    ("--requests {place}/requests.jsonl --prompt a", "--requests holds the prompts"),
    ("--requests {place}/requests.jsonl --num 3", "--num 3: --requests says how many sequences"),
    (
        "--requests {place}/requests.jsonl --output {place}/requests.jsonl",
        "--output {place}/requests.jsonl: it would replace the file of --requests",
    ),
    ("--trace {place}/x --output {place}/x", "--trace {place}/x: it would replace the file of --o"),
    ("--output {text}/x.jsonl --num 1000000 --steps 1000000", "--output {text}/x.jsonl: {text} is"),
    ("--output {text}/x.jsonl", "--output {text}/x.jsonl: {text} is a file, not a directory"),
    ("--output {place}", "--output {place}: it is a directory, not a file"),
    ("--trace {text}/x.html", "--trace {text}/x.html: {text} is a file, not a directory"),
    ("--trace {place}/t.png", "--trace {place}/t.png: the name must end in .html or .htm"),
    ("--trace {place}/trace", "--trace {place}/trace: the name must end in .html or .htm"),
    ("--trace {place}/t.html.gz", "--trace {place}/t.html.gz: the name must end in .html or .htm"),
    ("--trace -", "--trace -: the name must end in .html or .htm"),
]
DEPTH = "--json-schema-depth must be in 0..64, got "
MODEL = "act on the conditional of clean tokens, which exists on the absorbing process only"
LATER = "needs a time-independent model: this one depends on the noise level (euler, tweedie and"
UNMASKED = "needs a model of the absorbing process; in the process of this model visible tokens"
NEEDS = " needs --verifier FILE.py:FUNCTION, a function from a list of texts to a score each"
PROCESSOR = "--sampler ordered --logit-processor {place}/code.py"
WRAPS = "confidence, entropy_bounded, euler, event_jump, ordered, remdm, self_corr"  # not planned
SAMPLERS = [  # of the options of sampling
    ("--temperature -1", "--temperature must be finite and at least 0, got -1.0"),
    ("--temperature nan", "--temperature must be finite and at least 0, got nan"),
    ("--temperature inf", "--temperature must be finite and at least 0, got inf"),
    ("--temperature hot", "--temperature: not a number: 'hot'; expected --temperature FLOAT"),
    ("--top-p 0", "--top-p must be in (0, 1], got 0.0"),
    ("--top-p 1.1", "--top-p must be in (0, 1], got 1.1"),
    ("--top-p nan", "--top-p must be in (0, 1], got nan"),
    ("--top-p most", "--top-p: not a number: 'most'; expected --top-p FLOAT"),
    ("--top-k 0", "--top-k must be a whole number of at least 1, got 0"),
    ("--top-k 1.5", "--top-k: not a whole number: '1.5'; expected --top-k INT"),
    ("--regex a(b", "--regex, position 1: "),
    ("--regex (?<=a)b", "--regex, position 0: "),
    ("--regex a{{50}}", "--regex: 'a{{50}}' needs at least 50 tokens, but has room for 12;"),
    ("--regex [0-9]+", "--regex: the vocabulary cannot spell anything that regex '[0-9]+' matches"),
    ("--regex a --prompt {long}", "nothing to draw: the given text takes all of the 12 tokens"),
    ("--prompt a --suffix b --length 2", "nothing to draw: the given text takes all of the 2 tok"),
    (
        "--infill abc --length 3",
        "there is nothing to draw: the given text takes all of the 3 tokens",
    ),
    ("--json-schema {{}}}}", "--json-schema: not JSON"),
    ('--json-schema {{"type":3}}', "--json-schema: #/type"),
    ('--json-schema {{"enum":[true]}} --length 3', "--json-schema: 'true' needs at least 4 tok"),
    (
        '--json-schema {{"type":"array","items":{{"$ref":"#"}}}} --json-schema-depth 40',
        "#/items: the regex has more than 262144 characters; try a depth below 40",
    ),
    (
        '--json-schema {{"type":"object","required":["a"],"properties":{{"a":{{"$ref":"#"}}}}}} '
        "--json-schema-depth 0",
        "no value ends at depth 0",
    ),
    ('--json-schema {{"anyOf":[{{"const":1}},{{"$ref":"#"}}]}} --json-schema-depth 65', DEPTH),
    ("--json-schema {{}} --json-schema-depth -1", DEPTH),
    ("--json-schema-depth 3", "--json-schema-depth 3: it limits a JSON schema, and none is given"),
    ("--regex a --json-schema-depth 0", "--json-schema-depth 0: it limits a JSON schema, and non"),
    ("--requests {text} --json-schema-depth 1", "write json_schema_depth into its lines"),
    ("--regex a b", "--regex: 2 constraints for 1 gaps"),
    (
        "--regex [ab]+ --infill {{mask:2}}z{{mask:2}}",
        "--regex: the token 27, 'z', that is given at position 2 con",
    ),
    ("--regex a --json-schema {place}/none", "--regex and --json-schema: give one of them"),
    ("--json-schema {place}/none", "--json-schema {place}/none: No such file or directory"),
    ("--json-schema {text}", "--json-schema {text}: not JSON"),
    ("--json-schema {place}/null.json", "null.json: a schema is an object, got null"),
    ("--regex a --requests {text}", "--requests holds the constraints: give no --regex"),
    ("--regex a --rule dingoo", "--rule"),
    ("--guidance -1 --prompt a", "--guidance must be finite and at least 0, got -1.0"),
    ("--guidance nan --prompt a", "--guidance must be finite and at least 0, got nan"),
    ("--guidance 2", "--guidance 2.0 has no effect without given text; give --prompt, --suff"),
    ("--guidance 2 --infill {{mask:3}}", "--guidance 2.0 has no effect without given text; gi"),
    ("--checkpoint {place}/uniform --guidance 2 --prompt a", MODEL),
    ("--checkpoint {place}/uniform --temperature 0.5", MODEL),
    ("--checkpoint {place}/uniform --logit-processor {place}/code.py:raises", MODEL),
    ("--checkpoint {place}/uniform --sampler event_jump", f"sampler 'event_jump' {UNMASKED}"),
    ("--checkpoint {place}/uniform --sampler remdm", f"sampler 'remdm' {UNMASKED}"),
    (
        "--checkpoint {place}/uniform --sampler best_of_n --verifier {place}/code.py:score",
        f"--inner event_jump: sampler 'event_jump' {UNMASKED}",
    ),
    ("--checkpoint {place}/sedd --sampler ordered", f"sampler 'ordered' {LATER}"),
    (
        "--checkpoint {place}/sedd --sampler semi_autoregressive --inner confidence",
        f"--inner confidence: sampler 'confidence' {LATER}",
    ),
    ("--sampler entropy_bounded --gamma -0.1", "--gamma must be finite and at least 0, got -0.1"),
    ("--sampler entropy_bounded --gamma nan", "--gamma must be finite and at least 0, got nan"),
    ("--sampler remdm --eta 2", "samplers 'remdm': --eta must be in [0, 1], got 2.0"),
    ("--sampler remdm --strategy capp", "--strategy must be one of "),
    (
        "--sampler remdm --t-on 0.1 --t-off 0.5",
        "--t-off must be above 0 and at most the time t_on, 0.1",
    ),
    ("--sampler semi_autoregressive --block 0", "--block must be at least 1, got 0"),
    ("--sampler token_confidence --threshold 0", "--threshold must be in (0, 1], got 0.0"),
    (
        "--sampler token_confidence --threshold 0.5 --steps 3",
        "--threshold decides how many are kept: give no steps beside it",
    ),
    ("--sampler confidence --by entrpy", "--by must be one of "),
    ("--sampler ordered --order 3,3", "--order must be forward, .* such as 3,0,2, got '3,3'"),
    ("--sampler ordered --order x", "--order must be forward, .* such as 3,0,2, got 'x'"),
    ("--sampler ordered --order -1,2", "--order must be forward, .* such as 3,0,2, got '-1,2'"),
    ("--sampler speculative --draft stael", "--draft must be one of stale, batch, self, ngram, "),
    (
        "--sampler speculative --draft ngram --bonus",
        "--bonus does not go with the draft ngram, which drafts without a call; leave it out",
    ),
    (
        "--sampler speculative --draft self",
        "sampler 'speculative' with the draft self needs an any-",
    ),
    (
        "--sampler speculative --draft head",
        "sampler 'speculative' with the draft head needs a network with a causal head, got DDiT",
    ),
    (
        "--sampler speculative --verifications 2",
        "--verifications is for the draft head only: got 2 with stale",
    ),
    ("--sampler speculative --lookahead 0", "--lookahead must be at least 1, got 0"),
    (
        "--sampler speculative --draft ngram --lookahead 1",
        "--lookahead must be at least 2, got 1: a single draft saves no call",
    ),
    ("--sampler speculative --order 1,1", "--order must be forward, .* such as 3,0,2, got '1,1'"),
    ("--sampler speculative --order 12", "--order: there is no position 12 in a length of 12"),
    ("--sampler speculative --regex a+", "sampler 'speculative' takes no constraint: the tokens"),
    (
        "--sampler semi_autoregressive --inner speculative --regex a+",
        "sampler 'speculative' takes no constraint: the tokens",
    ),
    ("--checkpoint {place}/sedd --sampler speculative", f"sampler 'speculative' {LATER}"),
    ("--sampler ordered --order 3,12", "--order: there is no position 12 in a length of 12"),
    ("--sampler ordered --order 99999999999", "--order: there is no position 99999999999 in a"),
    (
        "--sampler best_of_n --inner ordered --inner.order 12 {score}",
        "--inner.order: there is no p",
    ),
    ("--sampler best_of_n --n 0 {score}", "samplers 'best_of_n': --n must be at least 1, got 0"),
    ("--sampler particle --particles 0 {score}", "--particles must be at least 1, got 0"),
    ("--sampler particle --resample-every 0 {score}", "--resample-every must be at least 1, got 0"),
    ("--sampler particle --tilt nan {score}", "--tilt must be finite, got nan"),
    # Flags of another sampler.
    ("--gamma 0.1", "--gamma: it is a flag of entropy_bounded, not of event_jump"),
    ("--sampler euler --block=3", "--block: it is a flag of semi_autoregressive, no"),
    ("--sampler tweedie --order x", "--order: it is a flag of ordered and speculative, not of tw"),
    ("--sampler best_of_n --t_on 1 {score}", "--t_on: it is a flag of remdm, not of best_of_n"),
    ("--sampler entropy_bounded --gama 1", "unrecognized option --gama; did you mean --gamma?"),
    ("--smapler ordered", "unrecognized option --smapler; did you mean --sampler?"),
    ("--sampler best_of_n --inner.t-on 1 {score}", "--inner.t-on: .* of remdm, not of event_jump"),
    ("--sampler best_of_n --steps 3 {score}", "--steps: .* of event_jump: write --inner.steps"),
    ("--sampler ordered --inner.steps 3", "--inner.steps: ordered wraps no other sampler"),
    ("--sampler best_of_n --inner.steps 0 {score}", "'event_jump': --inner.steps must be at least"),
    (
        "--sampler particle --inner remdm --inner.t-off 1 {score}",
        "'remdm': --inner.t-off must be a",
    ),
    ("--sampler best_of_n --inner.steps 9999999999 {score}", "--inner.steps must be below 2**31,"),
    # What wraps what.
    ("--inner event_jump", "--inner event_jump: event_jump wraps no other sampler"),
    ("--sampler ordered --inner euler", "--inner euler: ordered wraps no other sampler"),
    ("--sampler best_of_n --inner", "--inner needs a value"),
    ("--sampler best_of_n --inner orderd", "--inner orderd: .*did you mean 'ordered'?"),
    ("--sampler semi_autoregressive --inner best_of_n", f"--inner best_of_n: .* wraps {WRAPS}"),
    ("--sampler semi_autoregressive --inner semi_autoregressive", f": .* wraps {WRAPS}"),
    ("--sampler semi_autoregressive --inner planned", f"--inner planned: .* wraps {WRAPS}"),
    ("--sampler planned", "sampler 'planned' needs --profile FILE.json, which evaluate.py --price"),
    ("--sampler best_of_n --inner planned {score}", "sampler 'planned' needs --profile FILE.json"),
    ("--profile {place}/price.json", "price.json: sampler 'event_jump' takes no profile; planned"),
    ("--sampler planned --profile {place}/none", "--profile {place}/none: No such file or dir"),
    ("--sampler planned --profile {text}", "--profile {text}: not readable as JSON"),
    ("--sampler planned --profile {place}/null.json", "null.json: holds no price profile; eval"),
    (
        "--sampler planned {profile} --calls 0",
        "'planned': --calls must be from 1 to 12, the",
    ),
    ("--sampler planned {profile} --calls 13", "--calls must be from 1 to 12, .* got 13"),
    ("--sampler planned {profile} --length 9", "--profile: it was measured on sequences of 12 tok"),
    (
        "--sampler planned {profile} --checkpoint {place}/sedd",
        "--profile: it was measured with another model than {place}/sedd",
    ),
    ("--sampler best_of_n --inner particle {score}", "--inner particle: best_of_n wraps"),
    (
        "--sampler search_paths --inner tweedie {score}",
        "--inner tweedie: search_paths wraps confidence, entropy_bounded, event_jump, ordered, pla",
    ),
    # Searches.
    ("--sampler zero_order --rho 1.5 {score}", "--rho must be in [0, 1], got 1.5"),
    ("--sampler zero_order --rounds 0 {score}", "'zero_order': --rounds must be at least 1, got 0"),
    ("--sampler zero_order --tilt inf {score}", "--tilt must be finite, got inf"),
    (
        "--sampler search_paths --remask 0.3 --reveal 0.2 {score}",
        "--reveal must be above remask, 0.3, by at",
    ),
    ("--sampler particle --sweeps 0 {score}", "'particle': --sweeps must be at least 1, got 0"),
    ("--sampler particle {score} self", "--verifier must be one where the law is tilted, got an"),
    (
        "--sampler best_of_n --verifier self:x",
        '--verifier must be a function, "self" or "self:DRAW',
    ),
    ("--sampler best_of_n --verifier self:0", "--draws must be at least 1, got 0"),
    (
        "--checkpoint {place}/sedd --sampler best_of_n --inner tweedie --verifier self",
        "the verifier self needs a time-independent model of the absorbing process that is no",
    ),
    # The user's functions.
    ("--sampler best_of_n", f"--sampler best_of_n{NEEDS}"),
    ("--sampler particle --inner tweedie", f"--sampler particle{NEEDS}"),
    (
        "{score}",
        "--verifier {place}/code.py:score: sampler 'event_jump' takes no verifier; best_of_n, p",
    ),
    ("--sampler best_of_n --verifier {place}/code.py", "code.py: it must be file.py:function"),
    ("--sampler best_of_n --verifier :score", "--verifier :score: it must be file.py:function"),
    ("--sampler best_of_n --verifier {place}/none.py:f", "{place}/none.py: no such file"),
    ("--sampler best_of_n --verifier {place}:f", "--verifier {place}:f: {place}: no such file"),
    ("--sampler best_of_n --verifier {place}/code.py:f", "code.py defines no function 'f'"),
    ("--sampler best_of_n --verifier {place}/code.py:x", "code.py defines no function 'x'"),
    ("--sampler best_of_n --verifier {place}/syntax.py:f", "syntax.py:f: SyntaxError: .*line 1)"),
    ("--sampler best_of_n --verifier {place}/unknown.py:f", "unknown.py:f, line 1: ModuleNotFound"),
    ("--sampler best_of_n --verifier {place}/stops.py:f", "stops.py:f, line 3: SystemExit: 3"),
    ("--logit-processor {place}/code.py", "--logit-processor {place}/code.py: it must be file.py:"),
    ("--logit-processor {place}/none.py:f", "{place}/none.py: no such file"),
    ("--logit-processor {place}/code.py:f", "code.py defines no function 'f'"),
    (f"{PROCESSOR}:raises", "{place}/code.py:raises, line 8: ValueError: two lines"),
    (f"{PROCESSOR}:leaves", "{place}/code.py:leaves, line 11: SystemExit: 3"),
    (f"{PROCESSOR}:takes_numpy", ", line 14: TracerArrayConversionError: .*; it runs inside jit: "),
    (f"{PROCESSOR}:branches", ", line 17: TracerBoolConversionError: .*; it runs inside jit: "),
    (f"{PROCESSOR}:takes_two", ":takes_two: TypeError: takes_two() takes 2 positional arguments b"),
    (f"{PROCESSOR}:narrow", "the shape that it was given, (12, 1, 33), got (12, 1, 32)"),
    (f"{PROCESSOR}:whole", "it must return an array of floats, got an array of int32"),
    (f"{PROCESSOR}:nothing", "it must return an array of floats, got NoneType"),
    (f"{PROCESSOR}:many", "it must return an array of floats, got list"),
]
EVALUATE = [
    ("", "missing --data STR"),
    ("--data {text} --checkpoint {place}/none", "checkpoint {place}/none: no such directory"),
    ("--data {text} --draws 6", "draws must be a positive multiple of 4, got 6"),
    ("--data {text} --draws 0", "draws must be a positive multiple of 4, got 0"),
    ("--data {text} --max-sequences 0", "max_sequences must be at least 1, got 0"),
    ("--data {text} --price 13", "--price 13: calls must be from 1 to 12, the tokens of a row"),
    (
        "--data {text} --price 4 --checkpoint {place}/sedd",
        "--price: the price of parallelism needs a time-independent absorbing model",
    ),
    ("--data {text} --seed -1", "seed must be in [0, 2**32), got -1"),
    ("--data {text} --split tset", "has no split 'tset': it has train, validation, all"),
    ("--data corpus:stdlb", "--data corpus:stdlb: unknown corpus 'stdlb', did you mean 'stdlib'?"),
    ("--data {place}/empty.txt", "--data {place}/empty.txt: {place}/empty.txt is empty"),
    ("--data {place}/none.txt", "--data {place}/none.txt: no such file, folder or pattern"),
    ("--data corpus:sotu", "is not among the"),
    ("--data {text} --json {place}", "--json {place}: it is a directory, not a file"),
    ("--data {text} --json=", "--json: invalid value: ''; expected --json FILE.json"),
    ("--data {text} --json {place}/loop/x", "--json {place}/loop/x: a link that leads back"),
    ("--data {text} --json {text}/x.json", "{text} is a file, not a directory"),
]
CASES = [
    *(("train", arguments, message) for arguments, message in TRAIN),
    *(("sample", arguments, message) for arguments, message in [*SAMPLE, *SAMPLERS]),
    *(("evaluate", arguments, message) for arguments, message in EVALUATE),
]


def matches(message: str, line: str) -> bool:
    """Whether the parts of ``message`` between ``.*`` occur in the line in order."""
    end = 0
    for part in message.split(".*"):
        end = line.find(part, end)
        if end < 0:
            return False
        end += len(part)
    return True


@pytest.mark.parametrize(("command", "arguments", "message"), CASES)
def test_a_mistake_is_one_line(place, tmp_path, command, arguments, message):
    names = {"place": place, "run": place / "run", "text": place / "text.txt"}
    names["long"] = "abcdefghijkl"
    names["score"] = f"--verifier {place}/code.py:score"
    names["profile"] = f"--profile {place}/price.json"
    given = arguments.format(**names).split()
    cache = [f"--{'data.' if command == 'train' else ''}cache-dir", tmp_path / "cache"]
    before = {
        "train": ["--workdir", tmp_path / "new", *TINY, *cache],
        "sample": ["--checkpoint", place / "run"],
        "evaluate": ["--checkpoint", place / "run", *cache],
    }[command]
    result = call(command, *before, *given)
    if "truncated" in arguments:
        tiny_run.collect_failed_reads()
    assert result.code == 2
    assert len(result.errors) == 1
    assert matches(message.format(**names), result.errors[0]), result.errors[0]
    assert result.out == "" or "parameters" in result.out
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_flag_that_is_not_utf8_is_one_line(place):
    result = call("sample", "--checkpoint", place / "run", "--prompt", "a\udcff")
    assert (result.code, result.errors) == (
        2,
        ["error: --prompt contains a lone surrogate (U+D800 to U+DFFF), which is not valid text"],
    )


def test_refused_requests_do_not_stop_the_others(place, tmp_path):
    lines = [{"id": "good", "prompt": "the"}, {"prompt": 7}, {"id": "[/red]", "infill": "{mask:3}"}]
    path, output = tmp_path / "requests.jsonl", tmp_path / "new" / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = call(
        *("sample", "--checkpoint", place / "run", "--steps", 2),
        *("--requests", path, "--output", output),
    )
    assert result.code == 2
    assert result.errors == [f"error: {path}, line 2: prompt must be a string, got 7"]
    assert "[/red] · seed 2 · " in result.out  # text, not the console's markup
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [
        "good",
        "[/red]",
    ]


def test_a_file_of_anything_but_requests_does_not_fill_the_screen(place):
    result = call("sample", "--checkpoint", place / "run", "--requests", place / "text.txt")
    assert result.code == 2
    assert len(result.errors) == 21
    assert result.errors[0].startswith(f"error: {place}/text.txt, line 1: not JSON")
    assert result.errors[-1].endswith("180 more lines were refused")


@pytest.mark.parametrize("flag", ["--output", "--trace"])
def test_samples_are_printed_though_they_cannot_be_written(place, tmp_path, monkeypatch, flag):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    path = "/dev/full" if flag == "--output" else tmp_path / "out.html"
    result = call(
        *("sample", "--checkpoint", place / "run", "--steps", 2, "--prompt", "the cat", flag, path)
    )
    assert result.code == 2
    assert "the cat" in result.out
    assert result.errors == [f"error: cannot write {path}: No space left on device"]
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_figures_are_printed_though_they_cannot_be_written(place, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out.json"
    monkeypatch.setattr(sedd.files, "_write_whole", full)
    result = call(
        *("evaluate", "--checkpoint", place / "run", "--data", place / "text.txt", "--draws", 4),
        *("--max-sequences", 4, "--cache-dir", tmp_path / "cache", "--json", path),
    )
    assert result.code == 2
    assert "nats per token" in result.out
    assert result.errors == [f"error: cannot write {path}: No space left on device"]


# Nothing is forbidden to root but what it gives up for good: hence a process of its own.
ORDINARY = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    ("command", "flag"), [("train", "--workdir"), nightly("sample", "--output")]
)
def test_a_place_without_permission(place, tmp_path, command, flag):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    given = tiny_run.RECIPE if command == "train" else ["--checkpoint", place / "run"]
    words = [*ORDINARY, sys.executable, f"{command}.py", *given, flag, closed / "new"]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    outcome = tiny_run.Outcome(result.returncode, result.stdout, result.stderr)
    assert outcome.errors == [f"error: {flag} {closed}/new: no permission to write there"]
    assert list(closed.iterdir()) == []


@pytest.mark.nightly
def test_a_full_disk_during_a_save(place, tmp_path):
    """The commands' own process: a limit on the size of files stands in for the disk's."""
    program = (
        "import resource, runpy, sys; "
        "sys.dont_write_bytecode = True; "  # a limit would cut what Python caches, for good
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    flags = [
        *tiny_run.RECIPE,
        *("--workdir", workdir, "--data.corpus", place / "text.txt", "--data.cache-dir", cache),
        *("--network.hidden-dim", 32, "--network.num-layers", 1, "--network.num-heads", 2),
        *("--data.length", 8, "--training.batch-size", 4, "--training.steps", 2),
        *("--training.checkpoint-every", 1, "--training.sample-every", "None"),
        *("--sampler.steps", 1, "--evaluation.max-sequences", 4, "--evaluation.draws", 4),
    ]
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"},  # the limit would cut its files
        check=False,
    )
    outcome = tiny_run.Outcome(result.returncode, result.stdout, result.stderr)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith(f"error: cannot write a checkpoint to {workdir}/checkpoints: File too l")
    assert line.endswith("make room and start again; no checkpoint is complete")
    assert Checkpoints(workdir / "checkpoints").latest_good() is None


@pytest.mark.nightly
def test_debug_shows_where(place):
    result = subprocess.run(
        [sys.executable, "sample.py", "--checkpoint", str(place / "none"), "--debug"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no such directory" in result.stderr
