"""Tokenizer and train_bpe. With $CLIP_BPE (OpenAI's merges) known ids are checked too."""
import gzip
import os
import random
import sys
import time
import unicodedata
from collections import Counter

import pytest
import torch

import data


@pytest.fixture(scope="module")
def small():
    return data.Tokenizer(data.train_bpe([caption for _, caption in data.captions("toy", 500)], 700), context=20)


@pytest.fixture(scope="module")
def official():
    if "CLIP_BPE" not in os.environ:
        pytest.skip("$CLIP_BPE is not set")
    return data.Tokenizer(os.environ["CLIP_BPE"])


def naive_bpe(captions, size):
    """The same rule, counted from scratch for every merge."""
    words = Counter(data.spell(p) for text in captions for p in data.piece_pattern().findall(data.clean(text)))
    merges = []
    while len(merges) < size - 514:
        total = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                total[pair] += count
        if not total:
            break
        best = min(total, key=lambda pair: (-total[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, count in words.items():
            out = []
            for symbol in word:
                if out and (out[-1], symbol) == best:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            merged[tuple(out)] += count
        words = merged
    return merges


def test_train_bpe_by_hand():
    # p+u 17 times; then pu+n</w> 12; h+u and u+g</w> 10 each, the smaller first; hu+g</w> 10; pu+g</w> 5; b+u 4;
    # bu+n</w>
    text = ["hug " * 10 + "pug " * 5, "PUN " * 12 + "bun " * 4]
    merges = [("p", "u"), ("pu", "n</w>"), ("h", "u"), ("hu", "g</w>"), ("pu", "g</w>"), ("b", "u"), ("bu", "n</w>")]
    assert data.train_bpe(text, 514 + 3) == merges[:3]
    assert data.train_bpe(text, 10_000) == merges  # the words are whole: no pair is left
    assert data.train_bpe(text, 514) == [] == data.train_bpe([], 1000)


@pytest.mark.parametrize("seed", range(3))
def test_train_bpe_equals_naive(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aaabbc é!1 ", k=40)) for _ in range(60)]  # runs such as aaaa make overlapping pairs
    found = data.train_bpe(texts, 514 + 150)
    assert found == naive_bpe(texts, 514 + 150) and len(found) == 150
    assert data.train_bpe(reversed(texts), 514 + 150) == found


def test_ids(small):
    assert small.vocab_size == 514 + len(small.merges)
    assert (small.sot, small.eot) == (small.vocab_size - 2, small.vocab_size - 1)
    assert small.encode("") == [] and small.encode(" \t\n ") == []
    tokens = small(["a red circle", "", "x" * 500])
    assert tokens.shape == (3, 20) and tokens.dtype == torch.int64
    ids = small.encode("a red circle")
    assert tokens[0].tolist() == [small.sot, *ids, small.eot] + [0] * (18 - len(ids))
    assert tokens[1, :3].tolist() == [small.sot, small.eot, 0]
    assert tokens[2, -1] == small.eot and (tokens[2] == small.eot).sum() == 1 and (tokens[2] != 0).all()
    assert small.encode("a<|endoftext|>b") == [*small.encode("a"), small.eot, *small.encode("b")]


def test_bytes_come_first():
    """Without merges an id is the place of the byte among the printable ones, + 256 at the end of a word."""
    tokenizer = data.Tokenizer([])
    assert tokenizer.encode("!") == [256] and tokenizer.encode("!a") == [256, 256 + ord("a") - 33]
    assert tokenizer.encode("ab") == [ord("a") - 33, 256 + ord("b") - 33]
    assert tokenizer.encode("é") == [BYTES.index(0xC3), 256 + BYTES.index(0xA9)]


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]


@pytest.mark.parametrize(
    "text", ["a small red circle", "it's 2 o'clock, isn't it?", "日本語 ünïcödé 🙂 -- x_y", "</w> <b>"]
)
def test_decode_inverts_encode(small, text):
    plain = " ".join(data.piece_pattern().findall(text))
    assert small.decode(small.encode(text)) == plain
    assert small.decode(small([text])[0][:19]) == small.decode(small.encode(text)[:18])


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  Two   Words\n", "two words"),
        ("it’s “fine”", "it's \"fine\""),
        ("&amp;amp;lt;b&gt;", "<b>"),
        ("caf&eacute;", "café"),
        ("ﬁne ﬂoor Ĳ ﬅ", "fine floor ij ſt"),
        ("ＡＢＣ　１", "abc 1"),
        ("a\u2028b\rc\x85 \x93d\x94", "a b c… \"d\""),
        ("a\x07b\ufeffc", "abc"),
        ("cafe\u0301", "café"),
        ("<i>&rsquo;", "<i>’"),
    ],
)
def test_clean(text, plain):
    assert data.clean(text) == plain


@pytest.mark.parametrize("text, pieces", [
    ("it's we'll i'd o'ſa", ["it", "'s", "we", "'ll", "i", "'d", "o", "'ſ", "a"]), ("a12b", ["a", "1", "2", "b"]),
    ("x²½ Ⅷ", ["x", "²", "½", "Ⅷ"]),
    ("a_b--c!?", ["a", "_", "b", "--", "c", "!?"]), ("<|startoftext|>a", ["<|startoftext|>", "a"]),
    ("ก็ดี", ["ก", "็", "ด", "ี"])])
def test_pieces(text, pieces):
    assert data.piece_pattern().findall(text) == pieces


@pytest.mark.slow
def test_every_character_has_its_class():
    """\\p{L}+ | \\p{N} | the rest that is no space, for all of Unicode."""
    characters = [c for c in map(chr, range(sys.maxunicode + 1)) if not c.isspace()]
    expected = [piece for c in characters for piece in ([c, c] if unicodedata.category(c)[0] == "N" else [c + c])]
    assert data.piece_pattern().findall(" ".join(c + c for c in characters)) == expected
    mixed = ["a" + c for c in characters if not c.isascii()]  # a letter goes on, anything else is a piece of its own
    expected = [piece for a, c in mixed for piece in ([a + c] if unicodedata.category(c)[0] == "L" else [a, c])]
    assert data.piece_pattern().findall(" ".join(mixed)) == expected


def test_file_formats(tmp_path, small):
    lines = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in small.merges) + "\n"
    (tmp_path / "merges.txt").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "merges.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    text = "a photo of a turquoise hoop, café"
    for path in (tmp_path / "merges.txt", str(tmp_path / "merges.gz")):
        assert data.Tokenizer(path).merges == small.merges and data.Tokenizer(path).encode(text) == small.encode(text)
    (tmp_path / "wrong.txt").write_text("header\none two three\n")
    with pytest.raises(SystemExit, match="--bpe.*two symbols"):
        data.Tokenizer(tmp_path / "wrong.txt")
    for name, content in (("binary.txt", b"\xff\xfe\0"), ("not.gz", b"text"),
                          ("cut.gz", (tmp_path / "merges.gz").read_bytes()[:99])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=f"--bpe.*{name}"):
            data.Tokenizer(tmp_path / name)


def test_pieces_met_before_are_bounded(small):
    for n in range(60_000):
        small.cache[str(n)] = [0]
    text = "never seen zyxw"
    ids = small.encode(text)
    assert len(small.cache) < 50_000 and small.encode(text) == ids


def test_junk_does_not_hang(small):
    start = time.process_time()
    assert small(["".join(random.Random(0).choices("abcdefghijklm", k=200_000))])[0, -1] == small.eot
    assert time.process_time() - start < 5


def test_find_tokenizer(tmp_path, monkeypatch, small):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "BPE_FILE", "not-there.txt.gz")
    monkeypatch.delenv("CLIP_BPE", raising=False)
    toy = data.find_tokenizer(None, "toy")
    assert 600 < toy.vocab_size < 1500 and all(len(toy.encode(name)) == 2 for name in data.ToyDataset.classnames)
    (tmp_path / "some.tsv").write_text("filepath\ttitle\n1.jpg\tabcabc abc\n2.jpg\t \n")
    assert data.find_tokenizer("train", str(tmp_path / "some.tsv")).merges == data.train_bpe(["abcabc abc"], 8192)
    (tmp_path / "my.txt").write_text("header\na b</w>\n")
    assert data.find_tokenizer(str(tmp_path / "my.txt"), "cc3m").encode("ab") == [512]
    monkeypatch.setenv("CLIP_BPE", str(tmp_path / "my.txt"))
    assert data.find_tokenizer(None, "cc3m").vocab_size == 515
    monkeypatch.setenv("CLIP_BPE", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="nowhere"):
        data.find_tokenizer(None, "cc3m")


def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "BPE_FILE", "other.txt")
    monkeypatch.delenv("CLIP_BPE", raising=False)
    source = tmp_path / "source.txt"
    monkeypatch.setattr(data, "BPE_URL", source.as_uri())
    with pytest.raises(SystemExit, match=f"{data.BPE_SHA256}.*--bpe"):  # offline
        data.find_tokenizer(None, "cc3m")
    source.write_text("header\na b</w>\n")
    with pytest.raises(SystemExit, match="sha256"):  # not the right file
        data.find_tokenizer(None, "cc3m")
    monkeypatch.setattr(data, "BPE_SHA256", data.hashlib.sha256(source.read_bytes()).hexdigest())
    assert data.find_tokenizer(None, "cc3m").vocab_size == 515
    source.unlink()
    assert data.find_tokenizer(None, "cc3m").vocab_size == 515  # from the cache
    assert sorted(p.name for p in (tmp_path / "cache/data-efficient-clip").iterdir()) == ["other.txt", "other.txt.lock"]


@pytest.mark.parametrize("text, ids", [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]), ("hello world!", [3306, 1002, 256]), ("it’s", [585, 568])])
def test_official_ids(official, text, ids):
    assert official.vocab_size == 49408 and official.eot == 49407 and official.context == 77
    assert official.encode(text) == ids
    assert official.decode(ids) == " ".join(data.piece_pattern().findall(data.clean(text)))
