"""Round trips, streams that never break a character, and metas that are whole, refused or absent."""

import json
import os
import pickle
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.tokenizer import (
    GPT2_FILES,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    Meta,
    Stream,
    gpt2,
    gpt2_cache_name,
    load_tokenizer,
    meta_for,
    read_meta,
    write_meta,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PROSE = "First Citizen:\nBefore we proceed any further, “we'll” naïve 日本語 🙂👩‍👩‍👧 <|endoftext|> x  y\n\n"


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A byte-level BPE trained here, with an end-of-text token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<doc>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([PROSE] * 20, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="module")
def all_tokenizers(gpt2_files, json_file):
    return [gpt2(), JsonTokenizer(json_file), CharTokenizer(sorted(set(PROSE)))]


@given(TEXT)
def test_round_trip(all_tokenizers, text):
    for tokenizer in all_tokenizers:
        known = text if tokenizer is not all_tokenizers[2] else "".join(c for c in text if c in PROSE)
        ids = tokenizer.encode(known)
        assert tokenizer.decode(ids) == known
        assert tokenizer.encode_array(known).tolist() == ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.data())
def test_stream_adds_up_to_decode(all_tokenizers, data):
    """Any ids, of text or not, in any portions; and of text no portion holds a replacement character."""
    text = data.draw(TEXT)
    for tokenizer in all_tokenizers:
        if tokenizer is all_tokenizers[2]:
            text = "".join(c for c in text if c in PROSE)
        of_text = tokenizer.encode(text)
        at_random = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
        for ids in (of_text, at_random):
            stream, out, i = Stream(tokenizer), [], 0
            while i < len(ids):
                n = data.draw(st.integers(1, 5))
                out.append(stream.push(ids[i : i + n]))
                i += n
            out.append(stream.flush())
            assert "".join(out) == tokenizer.decode(ids)
            if ids is of_text and "\ufffd" not in text:
                assert not any("\ufffd" in part for part in out)


def test_stream_holds_back_half_a_character(gpt2_files):
    stream, ids = Stream(gpt2()), gpt2().encode("語")
    assert len(ids) > 1
    assert [stream.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["語"]
    assert stream.push(ids[:1]) == "" and stream.flush() == "\ufffd"


@given(
    text=st.text("ab€", max_size=30),
    stop=st.text("ab€", max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_text_ends_before_the_stop_text(text, stop, cuts):
    tokenizer = CharTokenizer("ab€")
    sample, shown = Stream(tokenizer, stop), ""
    want = text.split(stop)[0] if stop else text
    edges = sorted([0, *cuts, len(text)])
    for begin, end in zip(edges, edges[1:], strict=False):
        shown += sample.push(tokenizer.encode(text[begin:end]))
        assert want.startswith(shown)
        assert sample.done == bool(stop and stop in text[:end])
    assert shown + sample.flush() == want and sample.done


def test_special_tokens_only_where_asked(all_tokenizers):
    for tokenizer in all_tokenizers[:2]:
        assert tokenizer.encode("a<|endoftext|>", special=True)[-1] == tokenizer.eot
        assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>")
        assert tokenizer.eot not in tokenizer.encode_array("a<|endoftext|>")
        assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_json_tokenizer_names_its_end(json_file, tmp_path):
    assert JsonTokenizer(json_file).eot == 0 and JsonTokenizer(json_file, "<doc>").eot == 1
    with pytest.raises(UserError, match="no token '<end>'"):
        JsonTokenizer(json_file, "<end>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        JsonTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="missing"):
        load_tokenizer(Meta(10, "other.json"), tmp_path)
    with pytest.raises(UserError, match="prepare the corpus again"):
        load_tokenizer(Meta(10, "tokenizer.json"), json_file.parent)


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"lacks '#ß'"):
        CharTokenizer("abc").encode("abß#a")


def test_gpt2_without_its_files_fails_fast(gpt2_files, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()
    assert time.monotonic() - began < 5 and not os.listdir(tmp_path)

    path = tmp_path / gpt2_cache_name("vocab.bpe")
    path.write_bytes((gpt2_files / path.name).read_bytes()[:-1])
    with pytest.raises(UserError, match="wrong sha256"):
        GPT2Tokenizer()
    assert path.exists()  # a user's file is not ours to delete
    assert len(GPT2_FILES) == len(os.listdir(gpt2_files))


# ---- meta.json and meta.pkl


@given(st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=90, unique=True))
@settings(max_examples=30)
def test_meta_round_trip(tmp_path_factory, itos):
    folder = tmp_path_factory.mktemp("meta")
    meta = meta_for(CharTokenizer(itos), "char", source="x", settings={"a": 1})
    write_meta(folder, meta)
    assert read_meta(folder) == meta and os.listdir(folder) == ["meta.json"]
    assert load_tokenizer(meta, folder).encode("".join(itos)) == list(range(len(itos)))


def test_meta_of_large_vocabularies_and_of_none(tmp_path):
    assert read_meta(tmp_path) is None and read_meta(tmp_path / "nothing") is None
    tokenizer = CharTokenizer([chr(i) for i in range(0x10000, 0x10000 + 65_537)])
    assert meta_for(tokenizer, "char").dtype == "uint32"
    assert meta_for(CharTokenizer(tokenizer.itos[:-1]), "char").dtype == "uint16"


def test_nanogpt_meta_is_read(tmp_path):
    chars = sorted(set(PROSE))
    content = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol))
        meta = read_meta(tmp_path)
        assert meta == Meta(len(chars), "char", itos=chars)
        assert load_tokenizer(meta, tmp_path).decode(range(len(chars))) == "".join(chars)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_pickle_is_refused(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = {"vocab_size": 1, "itos": {0: "a"}, "x": Hostile(tmp_path / "made")}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match="only plain data"):
            read_meta(tmp_path)
    assert os.listdir(tmp_path) == ["meta.pkl"]


@given(st.binary(max_size=40), st.integers(0, 200), st.sampled_from(["meta.json", "meta.pkl"]))
@settings(max_examples=300)
def test_damaged_meta_is_a_user_error(tmp_path_factory, junk, place, name):
    """Junk written anywhere into a good file: still good, or a UserError; never another exception."""
    folder = tmp_path_factory.mktemp("meta")
    content = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    meta = {"vocab_size": 3, "tokenizer": "char", "itos": ["a", "b", "c"], "shards": {"train": []}}
    good = pickle.dumps(content) if name == "meta.pkl" else json.dumps(meta).encode()
    place %= len(good)
    (folder / name).write_bytes(good[:place] + junk + good[place + len(junk) :])
    try:
        assert read_meta(folder) is not None
    except UserError as error:
        assert name in str(error) and "prepare the corpus again" in str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": True},
        {"vocab_size": 4},
        {"vocab_size": 0},
        {"dtype": "float32"},
        {"tokenizer": "../tokenizer.json"},
        {"itos": ["a", "b", "b"]},
        {"itos": ["a", "bc", "d"]},
        {"itos": ["a", "b", "\ud800"]},
        {"eot": 3},
        {"shards": {"train": [{"file": "/etc/passwd", "tokens": 1, "sha256": ""}]}},
        {"shards": {"train": [{"file": "a", "tokens": 1}]}},
        {"shards": [1]},
    ],
)
def test_wrong_meta_is_a_user_error(tmp_path, change):
    good = {"vocab_size": 3, "tokenizer": "char", "itos": ["a", "b", "c"], "unknown": "is ignored"}
    (tmp_path / "meta.json").write_text(json.dumps(good))
    assert read_meta(tmp_path) == Meta(3, "char", itos=["a", "b", "c"])
    (tmp_path / "meta.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match="meta.json is damaged"):
        read_meta(tmp_path)
