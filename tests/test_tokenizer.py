"""Round trips, streams that never break a character, and metas that are whole, refused or absent."""

import dataclasses
import functools
import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import UserError
from jaxgpt.corpus import sources
from jaxgpt.tokenizer import (
    GPT2_FILES,
    GPT2_IDENTITY,
    PROGRESS,
    CharTokenizer,
    FastGPT2Tokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    Meta,
    Stream,
    byte_level,
    check_same_language,
    corpus_meta,
    gpt2,
    gpt2_cache_name,
    identity_of,
    load_tokenizer,
    meta_for,
    read_meta,
    token_bytes,
    write_meta,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PROSE = "First Citizen:\nBefore we proceed any further, “we'll” naïve 日本語 🙂👩‍👩‍👧 <|endoftext|> x  y\n\n"


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A byte-level BPE trained here, with an end-of-text token."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(made("byte-level", special=("<|endoftext|>", "<doc>")).to_str(), encoding="utf-8")
    return path


KINDS = ("byte-level", "metaspace", "llama", "wordlevel", "unigram", "wordpiece")


@functools.cache
def made(kind: str, size: int = 300, special: tuple[str, ...] = ("<|endoftext|>", "<unk>")) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` library, trained on PROSE."""
    models, pre, decoders, trainers = (
        getattr(tokenizers, name) for name in ("models", "pre_tokenizers", "decoders", "trainers")
    )
    how = {"special_tokens": list(special), "show_progress": False, "vocab_size": size}
    byte_names = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "byte-level":
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre.ByteLevel.alphabet(), **how)
    elif kind == "metaspace":
        bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        bpe.pre_tokenizer, bpe.decoder = pre.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(**how)
    elif kind == "llama":
        bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        normalizers = tokenizers.normalizers
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        bpe.decoder = decoders.Sequence(parts)
        how["special_tokens"] = [*special, *byte_names]
        trainer = trainers.BpeTrainer(**how)
    elif kind == "wordlevel":
        bpe = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        bpe.pre_tokenizer = pre.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**how)
    elif kind == "unigram":
        bpe = tokenizers.Tokenizer(models.Unigram())
        bpe.pre_tokenizer, bpe.decoder = pre.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **how)
    else:
        bpe = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        bpe.pre_tokenizer, bpe.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**how)
    bpe.train_from_iterator([PROSE.replace("<|endoftext|>", "")] * 20, trainer)
    if kind == "llama":  # the bytes are no special tokens
        content = json.loads(bpe.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in byte_names]
        bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
    return bpe


def loaded(folder: Path, content: dict | str, name: str = "tokenizer.json", **how) -> JsonTokenizer:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=3), encoding="utf-8")
    return JsonTokenizer(path, **how)


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


PIECES = [" ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "\u200b", "'s", "'S", "'re", "'ll", "'", "7",
          "²", "é", "語", "🙂", ".", "<|endoftext|>", "!?", "\u0301", "\u2028", "ⅷ", "\0", "\ufeff", "ǅ", "_", "٣",
          "\ud83d"]  # fmt: skip
MIXED = st.lists(st.sampled_from(PIECES) | st.characters() | st.text("ab ", max_size=9), max_size=60).map("".join)


@given(st.lists(st.tuples(MIXED, st.booleans()), max_size=4))
@settings(max_examples=400)
def test_the_fast_tokens_are_the_same(fast, documents):
    """Documents in one go, cut before white space as corpora are cut; else none, and each is encoded by tiktoken."""
    parts = []
    for text, cut in documents:
        at = next((i for i in range(1, len(text)) if cut and text[i] in " \n" and text[i - 1] not in " \t\r\n"), 0)
        parts += [(text[:at], False)] * (at > 0) + [(text[at:], True)]
    ids = fast.encode_documents(parts)
    text = "".join(text for text, _ in documents)
    if ids is None:
        assert "<|endoftext|>" in text or "\ud83d" in text
    else:
        expected = [[*gpt2().encode_array(text).tolist(), gpt2().eot] for text, _ in documents]
        assert ids.tolist() == [i for of_one in expected for i in of_one]


@pytest.fixture(scope="module")
def fast(gpt2_files) -> FastGPT2Tokenizer:
    return FastGPT2Tokenizer()


def test_the_fast_tokenizer_is_made_anew(fast, monkeypatch):
    """Where memory has grown by so much, or may have where nothing tells; and it goes on with the same tokens."""
    monkeypatch.setattr(FastGPT2Tokenizer, "RENEW_AFTER", 10_000)
    monkeypatch.setattr(FastGPT2Tokenizer, "LOOK_EVERY", 50)
    fast._fast = None
    for memory, text, anew in (
        (5_000, PROSE, True),
        (14_000, PROSE, False),
        (2_000, PROSE, False),
        (12_001, PROSE, True),
        (None, "", False),
        (None, 40 * PROSE, False),
        (None, PROSE, True),
    ):
        monkeypatch.setattr("jaxgpt.tokenizer.own_memory", lambda memory=memory: memory)
        before = fast._fast
        text = text.replace("<|endoftext|>", "")
        assert fast.encode_documents([(text, False)]).tolist() == gpt2().encode_array(text).tolist()
        assert (fast._fast is not before) == anew, (memory, text)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match=r"--fast needs gigatoken; run: pip install 'jaxgpt\[fast\]'"):
        FastGPT2Tokenizer()


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"lacks '#ß'"):
        CharTokenizer("abc").encode("abß#a")


def test_gpt2_without_its_files_fails_fast(gpt2_files, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(UserError, match="gpt2_bpe.py FOLDER, or put vocab.bpe as .* TIKTOKEN_CACHE_DIR=FOLDER"):
        GPT2Tokenizer()
    assert time.monotonic() - began < 5 and not os.listdir(tmp_path)

    path = tmp_path / gpt2_cache_name("vocab.bpe")
    path.write_bytes((gpt2_files / path.name).read_bytes()[:-1])
    with pytest.raises(UserError, match="wrong sha256"):
        GPT2Tokenizer()
    assert path.exists()  # a user's file is not ours to delete
    assert len(GPT2_FILES) == len(os.listdir(gpt2_files))


# ---- Encoding is one function of text, whatever the file asks for beside


NORMALIZERS = {
    "none": None,
    "NFC": {"type": "NFC"},
    "NFKC": {"type": "NFKC"},
    "lowercase": {"type": "Lowercase"},
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "bert": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
             "lowercase": True},
}  # fmt: skip
MORE = {
    "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Left"},
    "padding": {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                       "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["?"]}}},
}  # fmt: skip


@functools.cache
def variant(kind: str, normalizer: str, added: str, more: tuple[str, ...]) -> JsonTokenizer:
    """A tokenizer of `made`, with a normalizer, tokens added after training, and some of MORE in its file.

    added: "special" and "ordinary" tokens; "eot": the end-of-text token was added as an ordinary one, or is only in the
    model's vocabulary ("vocabulary").
    """
    content = json.loads(made(kind).to_str())
    ours = [NORMALIZERS[normalizer], content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": [each for each in ours if each]}
    content |= {key: MORE[key] for key in more}
    if added in ("eot", "vocabulary"):
        for token in content["added_tokens"]:
            token["special"] = False
    if added == "vocabulary":
        content["added_tokens"] = []
    bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
    if added == "special":
        bpe.add_special_tokens(["<|user|>", "any"])
    if added == "ordinary":
        bpe.add_tokens(["Citizen", "日本", "x  y"])
    with tempfile.TemporaryDirectory() as folder:
        return loaded(Path(folder), bpe.to_str())


def variants_of(kinds: st.SearchStrategy[str]) -> st.SearchStrategy[JsonTokenizer]:
    return st.builds(
        variant,
        kinds,
        st.sampled_from(sorted(NORMALIZERS)),
        st.sampled_from(["none", "special", "ordinary", "eot", "vocabulary"]),
        st.sets(st.sampled_from(sorted(MORE))).map(sorted).map(tuple),
    )


VARIANTS = variants_of(st.sampled_from(KINDS))
OF_ONE_KIND = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(*[variants_of(st.just(kind))] * 2))
PLAIN = ["First", "Citizen", "proceed", "any", "naïve", "日本語", "🙂", "“we'll”", "zzz", "E\u0301", "7", ".", ":"]
WORDS = st.sampled_from(PLAIN)
SPECIAL = st.sampled_from(["<|endoftext|>", "<unk>", "<|user|>", "</s>", "[SEP]"])
SPACES = st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\n\n", "\u3000", ""])
TEXTS = st.lists(st.tuples(WORDS | SPECIAL | TEXT, SPACES).map("".join), max_size=60).map("".join)


@given(VARIANTS, TEXTS, st.integers(20, 200))
@settings(max_examples=150)
def test_parts_of_a_document_have_the_tokens_of_the_whole(tokenizer, text, limit):
    """For every kind of tokenizer: pieces as a corpus is cut, each encoded with the text around it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", limit)
        patch.setattr(sources, "CONTEXT", 120)
        pieces = list(sources.split_text([text[i : i + limit] for i in range(0, len(text), limit)]))
    apart = [i for piece in pieces for i in tokenizer.encode_array(piece.text, piece.before, piece.after).tolist()]
    assert apart == tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


@given(VARIANTS, TEXTS)
@settings(max_examples=150)
def test_ordinary_text_has_no_special_tokens(tokenizer, text):
    """Not those of the text's own words, however the file has them; `special` asks for them. And no more than that."""
    ids = tokenizer.encode(text)
    unknown = tokenizer._bpe.token_to_id("<unk>")
    assert not tokenizer.special_ids() - {unknown} & set(ids)
    assert tokenizer.eot not in ids and tokenizer.eot == 0
    assert tokenizer.eot in tokenizer.encode("any<|endoftext|>", special=True)
    assert (tokenizer.eot in tokenizer.encode(text, special=True)) == ("<|endoftext|>" in text)


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
@settings(max_examples=30)
def test_ordinary_text_is_encoded_as_by_the_library(kind, text):
    """Where no word of it is a special token: the ids that `tokenizers` gives for the file without those additions."""
    for name in ("<|endoftext|>", "<unk>", "<0x"):
        text = text.replace(name, "")
    expected = made(kind).encode(text, add_special_tokens=False).ids
    assert variant(kind, "none", "none", tuple(sorted(MORE))).encode(text) == expected


@given(VARIANTS, TEXTS, TEXTS, st.lists(st.integers(1, 9), max_size=9))
@settings(max_examples=150)
def test_a_continuation_is_the_whole_less_the_prompt(tokenizer, prompt, text, sizes):
    """In any portions, and with whatever spaces the decoder puts between the two."""
    prompt_ids, ids = tokenizer.encode(prompt, special=True), tokenizer.encode(prompt + " " + text)
    stream, shown, rest = Stream(tokenizer, prompt=prompt_ids), tokenizer.decode(prompt_ids), list(ids)
    for size in [*sizes, len(ids)]:
        shown += stream.push(rest[:size])
        del rest[:size]
    assert shown + stream.flush() == tokenizer.decode([*prompt_ids, *ids])


def test_the_space_after_the_prompt(tmp_path):
    """Metaspace's and Llama's decoders leave out the space at the beginning of what they decode."""
    for kind in ("metaspace", "llama", "wordlevel", "unigram", "wordpiece"):
        tokenizer = loaded(tmp_path, made(kind).to_str())
        whole = tokenizer.encode("Before we proceed any")
        for cut in range(1, len(whole)):
            stream = Stream(tokenizer, prompt=whole[:cut])
            text = tokenizer.decode(whole[:cut]) + stream.push(whole[cut:]) + stream.flush()
            assert text == tokenizer.decode(whole) == "Before we proceed any"


def test_text_that_a_vocabulary_lacks(tmp_path):
    """BPE without unk_token drops what it does not know: an error here. An unknown word is no end of text either."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, " ": 3}, [("a", "b")]))
    tokenizer = loaded(tmp_path, bpe.to_str())
    assert tokenizer.encode("ab ba") == [2, 3, 1, 0]
    for text in ("abc", "é"):
        with pytest.raises(UserError, match=f"cannot encode '{text[-1]}'"):
            tokenizer.encode(text)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "</s>": 1}, unk_token="</s>"))
    with pytest.raises(UserError, match="cannot encode it"):  # which would end the document
        loaded(tmp_path, words.to_str()).encode("there")
    content = json.loads(bpe.to_str())
    content["model"] |= {"vocab": {"\ufffd": 0, "b": 1}, "merges": []}
    assert loaded(tmp_path, content).encode("b\ud83db") == [1, 0, 1]


def test_random_merges_are_left_out(tmp_path):
    """BPE-dropout, which a file may ask for: the same text has the same tokens."""
    content = json.loads(made("byte-level").to_str())
    plain = loaded(tmp_path, content)
    content["model"]["dropout"] = 0.9
    dropping = loaded(tmp_path, content)
    assert all(dropping.encode(PROSE) == plain.encode(PROSE) for _ in range(5))


# ---- Identity: equal exactly when ids mean the same


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_what_ids_mean_and_not_what_the_file_says(kind, tmp_path):
    """Truncation, padding, a post-processor, other merges: the same. Any two ids exchanged, one renamed: another."""
    content = json.loads(made(kind).to_str())
    ours = loaded(tmp_path, content)
    trainer = {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    template = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    more = made(kind).from_str(json.dumps(content))
    more.post_processor = template
    same = [content | trainer, content | {"padding": pad | {"pad_token": "<unk>"}}, json.loads(more.to_str())]
    for changed in same:
        theirs = loaded(tmp_path, changed, "same.json")
        assert theirs.identity == ours.identity and theirs.encode("proceed any") == ours.encode("proceed any")

    tokens = [made(kind).id_to_token(i) for i in range(ours.vocab_size)]
    for i, j in ((2, 3), (5, ours.vocab_size - 1)):
        exchanged = dict(zip([tokens[i], tokens[j]], [tokens[j], tokens[i]], strict=True))
        theirs = loaded(tmp_path, renamed(content, exchanged), "other.json")
        assert theirs.vocab_size == ours.vocab_size and theirs.identity != ours.identity
    assert loaded(tmp_path, renamed(content, {tokens[9]: "Ġnew"}), "other.json").identity != ours.identity


def renamed(content: dict, names: dict[str, str]) -> dict:
    """The tokenizer with other names for some tokens of its vocabulary, without merges."""
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = []
    return content | {"model": model}


@given(OF_ONE_KIND | st.tuples(VARIANTS, VARIANTS))
@settings(max_examples=200)
def test_identity_is_equal_exactly_when_ids_mean_the_same(two):
    """Of two of the variants: where all ids have the same texts, alone and between others, and nowhere else."""
    ours, theirs = two
    texts = [
        [tokenizer.decode(ids) for i in range(tokenizer.vocab_size) for ids in ([i], [i, i], [40, i, 41])]
        for tokenizer in two
    ]
    # an id that is half a character has no text of its own, but a name
    names = [[t._bpe.id_to_token(i) for i in range(t.vocab_size)] for t in two]
    assert (ours.identity == theirs.identity) == (texts[0] == texts[1] and names[0] == names[1])


@given(st.permutations("abcé語"), st.permutations("abcé語"), st.integers(0, 3))
def test_identity_of_characters(ours, theirs, padding):
    identity = CharTokenizer(ours).identity
    assert (CharTokenizer(theirs).identity == identity) == (ours == theirs)
    assert CharTokenizer([*ours, *[""] * padding]).identity == identity
    assert CharTokenizer(ours[:-1]).identity != identity != CharTokenizer(["x", *ours]).identity


def test_one_vocabulary_in_several_forms(gpt2_files, tmp_path):
    """GPT-2 by tiktoken, as a constant and as a tokenizer.json; characters, and the WordLevel that exports them."""
    vocab = json.loads((gpt2_files / gpt2_cache_name("encoder.json")).read_text())
    merges = (gpt2_files / gpt2_cache_name("vocab.bpe")).read_text().splitlines()[1:]
    bpe = tokenizers.ByteLevelBPETokenizer(vocab, [tuple(line.split()) for line in merges if line])
    bpe.add_special_tokens(["<|endoftext|>"])
    theirs = loaded(tmp_path, bpe.to_str())
    assert identity_of(gpt2().meanings()) == gpt2().identity == theirs.identity == GPT2_IDENTITY == Meta(50304).identity
    by_id = sorted(vocab, key=vocab.__getitem__)
    assert identity_of([byte_level(token) for token in by_id]) == GPT2_IDENTITY  # from vocab.json alone

    characters = CharTokenizer("\n abé語")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(characters.itos)}, "a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    assert loaded(tmp_path, words.to_str()).identity == characters.identity


def test_corpora_of_other_tokens_are_told_apart(tmp_path, caplog):
    ours = meta_for(CharTokenizer("\n abc"), "char")
    padded = dataclasses.replace(ours, vocab_size=128)
    for model in (ours, padded):
        check_same_language(model, ours, "data")
        for theirs in (meta_for(CharTokenizer("\n ABC"), "char"), Meta(5, "tokenizer.json", identity="x"), Meta(50257)):
            with pytest.raises(UserError, match="train a new model on it"):
                check_same_language(model, theirs, "data")
    with pytest.raises(
        UserError, match="data has 6 characters, the model 5 characters: id 2 is 'A' here and 'a' there"
    ):
        check_same_language(ours, meta_for(CharTokenizer("\n Aabc"), "char"), "data")
    a, b = (Meta(280, "tokenizer.json", identity=name * 64, eot=0) for name in "ab")
    with pytest.raises(UserError, match=r"280 tokens of a tokenizer.json \(bbbbbbbb\), the run .* \(aaaaaaaa\)"):
        check_same_language(a, b, "data", "the run")
    with pytest.raises(UserError, match="documents end with token 3 in data, with 0 in the model"):
        check_same_language(a, dataclasses.replace(a, eot=3), "data")
    check_same_language(a, dataclasses.replace(a, eot=None), "data")
    assert not caplog.records
    check_same_language(a, Meta(280, "none"), "data")
    assert "nothing says which tokenizer made the tokens of data" in caplog.text
    with pytest.raises(UserError, match="data has a vocabulary of 281, the model one of 280"):
        check_same_language(a, Meta(281, "none"), "data")


def test_older_folders_get_their_identity_from_the_file(json_file, tmp_path):
    """And a tokenizer.json that was exchanged is found out."""
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    write_meta(tmp_path, Meta(300, "tokenizer.json", eot=0))
    meta = read_meta(tmp_path)
    assert meta and meta.identity == JsonTokenizer(json_file).identity
    write_meta(tmp_path, meta)
    assert json.loads((tmp_path / "meta.json").read_text())["identity"] == meta.identity
    assert load_tokenizer(meta, tmp_path).vocab_size == 300
    loaded(tmp_path, renamed(json.loads(json_file.read_text()), {"a": "Ġ€€"}))
    with pytest.raises(UserError, match="is not the tokenizer that made the tokens"):
        load_tokenizer(meta, tmp_path)


def test_bytes_of_each_token(gpt2_files, json_file, tmp_path):
    """The text of ids is as long as their bytes add up to; special tokens count nothing."""
    for tokenizer in (gpt2(), JsonTokenizer(json_file), CharTokenizer(sorted(set(PROSE)))):
        counts = token_bytes(tokenizer)
        assert counts is not None and len(counts) == tokenizer.vocab_size
        assert counts[tokenizer.encode(PROSE)].sum() == len(PROSE.encode())
        assert [i for i in range(tokenizer.vocab_size) if not counts[i]] == sorted(tokenizer.special_ids())
    for kind in ("metaspace", "llama", "wordlevel", "unigram", "wordpiece"):
        assert token_bytes(loaded(tmp_path, made(kind).to_str())) is None


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


def test_nanogpt_meta_with_other_contents(tmp_path):
    """What nanoGPT's train.py takes: a size alone, a padded size, words, gaps, things that are no text."""
    chars, words = dict(enumerate("abc")), {0: "word ", 1: "word", 2: "s", 3: "\n"}
    for content, expected in (
        ({"vocab_size": 50}, Meta(50, "none")),
        ({"vocab_size": 64, "itos": chars, "stoi": {}}, Meta(64, "char", itos=["a", "b", "c"])),
        ({"vocab_size": 3, "itos": ["a", "b", "c"]}, Meta(3, "char", itos=["a", "b", "c"])),
        ({"vocab_size": 4, "itos": words}, Meta(4, "words", itos=list(words.values()))),
        ({"vocab_size": 4, "itos": {0: "a", 2: "b"}}, Meta(4, "words", itos=["a", "", "b"])),
        ({"vocab_size": 2, "itos": {0: 440.0, 1: 466.2}}, Meta(2, "none")),
    ):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
        assert (meta := read_meta(tmp_path)) == expected
        if meta and meta.tokenizer == "none":
            with pytest.raises(UserError, match="came without a tokenizer"):
                load_tokenizer(meta, tmp_path)
    tokenizer = CharTokenizer(list(words.values()))
    assert tokenizer.encode("wordsword \n") == [1, 2, 0, 3] and tokenizer.decode([1, 2, 0, 3]) == "wordsword \n"
    with pytest.raises(UserError, match="lacks '-' *"):
        tokenizer.encode("word-")
    for content in ({"vocab_size": 2, "itos": chars}, {"vocab_size": "2"}, {"itos": chars}, ["vocab_size"]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="meta.pkl is damaged"):
            read_meta(tmp_path)


def test_half_made_corpora_are_no_gpt2_corpora(tmp_path):
    assert corpus_meta(tmp_path) == Meta(50257, eot=50256) and corpus_meta(tmp_path, 300) == Meta(300, "none")
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(UserError, match="is half made"):
        corpus_meta(tmp_path)
    write_meta(tmp_path, Meta(50257))  # written before progress.json goes
    assert corpus_meta(tmp_path) == Meta(50257)


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
@settings(max_examples=100)
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
        {"vocab_size": 2},
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


def test_a_pipe_in_place_of_meta_json_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(UserError, match=r"meta.json is a pipe"):
        read_meta(tmp_path)
