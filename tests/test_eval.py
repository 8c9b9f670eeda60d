"""eval.py: closed forms, brute force in float64, one process against several ranks, files of every kind."""
import copy
import io
import json
import os
import math
import random
import tarfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import eval as evaluator
from ranks import spawn

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "dark_blue": (20, 20, 160)}
NAMES = ["dark blue", "green", "red"]  # as ImageFolder sorts them


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, classes, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


class Stub(nn.Module):
    """Two small towers in float64 with what makes evaluation hard: batch norm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(48), nn.Linear(48, 8), nn.Dropout(.5)
        self.tokens = nn.Embedding(600, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.))
        self.double()

    def encode_image(self, images):  # [B, 3, S, S] -> [B, 8]
        return self.dropout(self.linear(self.norm(F.adaptive_avg_pool2d(images.double(), 4).flatten(1))))

    def encode_text(self, tokens):  # [B, L] -> [B, 8], deaf to padding
        return (self.tokens(tokens) * (tokens > 0)[..., None]).sum(1)


class Means(Stub):
    """Knows colours: the picture's feature is its mean, a text's the colour it names. Zero-shot is perfect."""

    def encode_image(self, images):
        return images.double().mean((2, 3))

    def encode_text(self, tokens):
        texts = [TOKENIZER.decode(row) for row in tokens]
        found = [[rgb for name, rgb in COLORS.items() if name.split("_")[-1] in text][0] for text in texts]
        return ((torch.tensor(found).double() / 255 - torch.tensor(data.MEAN)) / torch.tensor(data.STD)).double()


TOKENIZER = data.Tokenizer([], 64)
PREPROCESS = data.Preprocess(16)


def encoded(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def picture(i, color=None):
    rng = random.Random(i)
    image = Image.new("RGB", (24, 20), COLORS[color] if color else tuple(rng.randrange(256) for _ in range(3)))
    image.putpixel((i % 24, i % 20), (255, 255, 255))
    return encoded(image)


def image_folder(path, counts, broken=0):
    """counts: pictures of each colour; the first `broken` of the first colour are no pictures."""
    for name, count in zip(sorted(COLORS), counts):
        (path / name).mkdir(parents=True)
        for i in range(count):
            bad = i < broken and name == sorted(COLORS)[0]
            (path / name / f"{i:03d}.png").write_bytes(b"<html>" if bad else picture(i, name))
    return str(path)


def write_tar(path, samples):
    """samples: dicts {extension: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# metrics

def brute_recall(scores, positives, k):
    """Share of the rows that have a positive among the first k of a stable sort; of rows that have a positive."""
    hits = [bool(set(row.argsort(descending=True, stable=True)[:k].tolist()) & set(wanted))
            for row, wanted in zip(scores, positives) if wanted]
    return sum(hits) / len(hits)


def test_retrieval_equals_brute_force_with_many_positives_and_ties():
    x, t = rand(40, 6), rand(90, 6, seed=1).round()
    x[5:15], t[40:60] = x[20:30].clone(), t[:20].clone()  # equal candidates
    x = x.round()
    generator = torch.Generator().manual_seed(2)
    pairs = torch.stack([torch.randint(most, (130,), generator=generator) for most in (38, 88)], 1)
    result = evaluator.retrieval(x, t, pairs, ks=(1, 2, 5, 10, 50))
    texts = [pairs[pairs[:, 0] == i, 1].tolist() for i in range(40)]
    images = [pairs[pairs[:, 1] == j, 0].tolist() for j in range(90)]
    assert min(map(len, texts)) == 0 and max(map(len, texts)) > 5
    for k in (1, 2, 5, 10, 50):
        assert result[f"i2t@{k}"] == pytest.approx(brute_recall(x @ t.T, texts, k), abs=1e-12)
        assert result[f"t2i@{k}"] == pytest.approx(brute_recall(t @ x.T, images, k), abs=1e-12)


def test_retrieval_closed_forms():
    x = F.normalize(rand(50, 16), dim=1)
    same = torch.arange(50)[:, None].expand(-1, 2)
    assert evaluator.retrieval(x, x, same) == {f"{way}@{k}": 1. for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert evaluator.retrieval(x, -x, same, ks=(49, 50, 99)) == {
        f"{way}@{k}": k > 49 for way in ("i2t", "t2i") for k in (49, 50, 99)}
    one = torch.ones(8, 3)  # all scores tie: picture i finds text i at place i
    assert evaluator.retrieval(one, one, torch.arange(8)[:, None].expand(-1, 2), ks=(1, 4)) == {
        "i2t@1": 1 / 8, "i2t@4": .5, "t2i@1": 1 / 8, "t2i@4": .5}
    diagonal = torch.arange(3000)[:, None].expand(-1, 2)
    many = evaluator.retrieval(rand(3000, 8), rand(3000, 8, seed=1), diagonal, ks=(300,))
    assert many["i2t@300"] == pytest.approx(.1, abs=.02) and many["t2i@300"] == pytest.approx(.1, abs=.02)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    t = x + .8 * rand(50, 16, seed=4)
    moved = torch.stack([torch.arange(50), order.argsort()], 1)
    assert evaluator.retrieval(x, t, same) == evaluator.retrieval(x, t[order], moved)


def test_nan_never_counts_as_a_hit():
    x = torch.full((4, 3), torch.nan)
    assert evaluator.retrieval(x, torch.ones(4, 3), torch.arange(4)[:, None].expand(-1, 2), ks=(1, 9)) == dict.fromkeys(
        ("i2t@1", "i2t@9", "t2i@1", "t2i@9"), 0.)
    assert evaluator.zero_shot(x, torch.arange(4) % 2, torch.ones(2, 3))["top5"] == 0


@pytest.mark.slow
def test_ranks_in_chunks():
    x, t = rand(5000, 2), rand(2 ** 13, 2, seed=1)  # 4096 queries a chunk
    pairs = torch.cat([torch.stack([torch.arange(5000), labels(5000, 2 ** 13, seed=seed)], 1) for seed in (1, 2)])
    place = evaluator.ranks(x, t, pairs)
    for i in (0, 4095, 4096, 4999):
        scores = t @ x[i]
        assert place[i] == (scores > scores[pairs[pairs[:, 0] == i, 1]].max()).sum()


def test_zero_shot_by_hand():
    x = torch.eye(4)[[0, 0, 1, 2, 2, 2]]  # says 0 0 1 2 2 2
    result = evaluator.zero_shot(x, torch.tensor([0, 1, 1, 2, 2, 0]), torch.eye(4))
    assert result["top1"] == pytest.approx(4 / 6) and result["top5"] == 1 and result["n"] == 6
    assert result["per_class"] == [.5, .5, 1., None] and result["mean_per_class"] == pytest.approx(2 / 3)


def test_zero_shot_equals_brute_force():
    x, w, y = rand(500, 5), rand(12, 5, seed=1), torch.arange(500) % 10  # balanced, two classes absent
    result = evaluator.zero_shot(x, y, w)
    top = (x @ w.T).topk(5, 1).indices
    assert result["top1"] == pytest.approx((top[:, 0] == y).double().mean().item())
    assert result["top5"] == pytest.approx((top == y[:, None]).any(1).double().mean().item())
    assert result["mean_per_class"] == pytest.approx(result["top1"]) and result["per_class"][10:] == [None, None]
    for c in range(10):
        assert result["per_class"][c] == pytest.approx((top[y == c, 0] == c).double().mean().item())


# linear probe and nearest neighbours

def newton(x, y, l2, classes, steps=30):
    """The probe's optimum by Newton's method on the whole Hessian, with a pseudo-inverse for the free shift of b."""
    n, D = x.shape
    z = torch.cat([x, x.new_ones(n, 1)], 1)  # [n, D + 1]
    w, target = x.new_zeros(classes, D + 1), F.one_hot(y, classes).to(x.dtype)
    decay = l2 * torch.cat([torch.ones(D), torch.zeros(1)]).to(x.dtype).repeat(classes)
    for _ in range(steps):
        p = (z @ w.T).softmax(1)
        gradient = ((p - target).T @ z / n).flatten() + decay * w.flatten()
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # [n, C, C]
        hessian = torch.einsum("nab,ni,nj->aibj", curvature, z, z).reshape(len(gradient), -1) / n + decay.diag()
        w = w - (torch.linalg.pinv(hessian, hermitian=True) @ gradient).view_as(w)
    return w[:, :-1], w[:, -1]


def centred(b):
    return b - b.mean()


@pytest.mark.parametrize("l2, shift", [(1., 0.), (1e-2, 0.), (1e-4, 5.)])
def test_probe_is_the_optimum(l2, shift):
    y = labels(300, 4)
    x = rand(4, 6, seed=2)[y] + rand(300, 6, seed=1) + shift
    W, b = evaluator.linear_probe(x, y, l2, 4)
    assert W.dtype == torch.float64 and W.shape == (4, 6) and b.shape == (4,)
    W_free, b_free = W.clone().requires_grad_(), b.clone().requires_grad_()
    (F.cross_entropy(x @ W_free.T + b_free, y) + l2 / 2 * W_free.square().sum()).backward()
    assert W_free.grad.abs().max() < 1e-7 and b_free.grad.abs().max() < 1e-7
    W_newton, b_newton = newton(x, y, l2, 4)
    torch.testing.assert_close(W, W_newton, rtol=0, atol=2e-6)
    torch.testing.assert_close(centred(b), centred(b_newton), rtol=0, atol=1e-5)
    W_single, b_single = evaluator.linear_probe(x.float(), y, l2, 4)
    assert W_single.dtype == torch.float32
    loss, best = (F.cross_entropy(x @ w.double().T + c.double(), y) + l2 / 2 * w.double().square().sum()
                  for w, c in ((W_single, b_single), (W, b)))
    assert best - 1e-12 <= loss < best + 1e-7


def test_probe_in_chunks(monkeypatch):
    y, x = labels(2 ** 14 + 77, 3), rand(2 ** 14 + 77, 4, seed=1)
    x[:, 0] += y
    W, b = evaluator.linear_probe(x, y, .01, 3)
    W_newton, b_newton = newton(x, y, .01, 3, steps=8)
    torch.testing.assert_close(W, W_newton, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probe_of_infinite_l2_gives_the_priors(dtype):
    y = (torch.arange(200) % 10).clamp(max=3)  # .1 .1 .1 .7
    W, b = evaluator.linear_probe((rand(200, 5) + 3).to(dtype), y, 1e8, 4)
    assert W.abs().max() < 1e-7
    torch.testing.assert_close(b.softmax(0).double(), torch.tensor([.1, .1, .1, .7]).double(), rtol=0, atol=1e-6)


def test_sweep_finds_the_right_strength():
    y = labels(80, 3)
    useful = rand(80, 30, seed=1).float()
    useful[:, :3] += 2 * F.one_hot(y, 3)  # three features of thirty say the class: too weak an l2 fits the noise
    l2, state = evaluator.best_l2(useful, y, 3), torch.get_rng_state()
    assert 1e-3 < l2 < 1e3 and evaluator.best_l2(useful, y, 3) == l2  # the split is a fixed one
    assert torch.equal(torch.get_rng_state(), state)


def brute_knn(train, y, test, k, temperature):
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    votes = torch.zeros(len(test), int(y.max()) + 1, dtype=torch.float64)
    for i, row in enumerate(similarity):
        for j in row.argsort(descending=True)[:k]:
            votes[i, y[j]] += math.exp(row[j] / temperature)
    return votes.argmax(1)


def test_knn():
    y = labels(300, 7)
    train, test = rand(7, 5, seed=3)[y] + rand(300, 5, seed=1), 3 * rand(70, 5, seed=2)
    for k, temperature in ((1, .07), (20, .07), (20, 10.), (1000, .2)):
        assert torch.equal(evaluator.knn(train, y, test, k, temperature), brute_knn(train, y, test, k, temperature))
    assert torch.equal(evaluator.knn(train.float(), y, train.float(), k=1), y)
    hot = evaluator.knn(train, y, test, 300, 1e9)  # all vote alike: the largest class wins everywhere
    assert (hot == y.bincount().argmax()).all()


def test_knn_in_blocks():
    y = labels(2 ** 16 + 500, 5)
    train, test = rand(len(y), 3, seed=1), rand(1030, 3, seed=2)
    few = torch.tensor([0, 1023, 1024, 1029])  # rows of both blocks of test
    assert torch.equal(evaluator.knn(train, y, test)[few], brute_knn(train, y, test[few], 20, .07))


def test_scores_are_not_tf32():
    torch.set_float32_matmul_precision("high")
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    try:
        with Spy():
            x, y = torch.randn(6, 3), torch.arange(6) % 2
            evaluator.zero_shot(x, y, torch.randn(2, 3))
            evaluator.knn(x, y, x)
            evaluator.linear_probe(x, y, 1., 2)
        assert len(seen) > 3 and set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# features

def test_text_classifier():
    model = Stub().eval()
    names = ["red thing", "b", "cat|a long-haired kitten"]
    templates = ("{}", "a photo of a {}.", "the {} in the dark of the night")

    def feature(text):
        return F.normalize(model.encode_text(TOKENIZER([text])), dim=1)[0]

    w = evaluator.text_classifier(model, TOKENIZER, names, templates)
    for row, alternatives in zip(w, (["red thing"], ["b"], ["cat", "a long-haired kitten"])):
        expected = torch.stack([feature(t.replace("{}", name)) for name in alternatives for t in templates]).mean(0)
        torch.testing.assert_close(row, F.normalize(expected, dim=0))
    torch.testing.assert_close(evaluator.text_classifier(model, TOKENIZER, names, templates[::-1]), w)
    with torch.no_grad():
        model.tokens.weight *= 9  # the length of a feature says nothing
    torch.testing.assert_close(evaluator.text_classifier(model, TOKENIZER, names, templates), w)
    assert not w.requires_grad


def test_texts_are_cut_to_the_longest_of_a_batch():
    widths, model = [], Stub()
    whole = model.encode_text
    model.encode_text = lambda tokens: widths.append(tokens.shape[1]) or whole(tokens)
    texts = ["ab", "abcd", "!", "a" * 200]
    x = evaluator.encode_texts(model, TOKENIZER, texts, batch_size=2)
    assert widths == [6, 64]
    torch.testing.assert_close(x, whole(TOKENIZER(texts)).detach(), rtol=0, atol=1e-12)


class Endless:
    """One picture, but no error for another number."""

    def __len__(self):
        return 1

    def image(self, i):
        return picture(i)


class Listed(list):
    def image(self, i):
        return self[i]


def test_encode_images_leaves_out_what_cannot_be_read():
    pictures = [picture(i) for i in range(7)]
    pictures[2], pictures[6] = b"", pictures[6][:60]
    model = Stub().eval()
    x, index = evaluator.encode_images(model, Listed(pictures), PREPROCESS, batch_size=3)
    assert index.tolist() == [0, 1, 3, 4, 5]
    expected = model.encode_image(torch.stack([PREPROCESS(pictures[i]) for i in index]))
    torch.testing.assert_close(x, expected.detach(), rtol=0, atol=1e-12)
    assert not x.requires_grad


def test_autocast_gives_fp32_features():
    model = Stub().eval()
    model.encode_image = lambda images: images.flatten(1)[:, :8] @ torch.ones(8, 4)
    x, _ = evaluator.encode_images(model, Listed([picture(i) for i in range(3)]), PREPROCESS, amp=torch.bfloat16)
    exact, _ = evaluator.encode_images(model, Listed([picture(i) for i in range(3)]), PREPROCESS)
    assert x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float()) and not torch.equal(x, exact)


# whole evaluations

def test_image_folder(tmp_path):
    folder = image_folder(tmp_path / "shades" / "val", (5, 3, 2), broken=1)
    results = evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [folder])
    assert list(results) == ["shades"]
    r = results["shades"]
    assert r["top1"] == r["mean_per_class"] == r["top5"] == 1 and r["per_class"] == [1, 1, 1]
    assert (r["n"], r["unreadable"], r["metric"]) == (9, 1, "top1") and "i2t@1" not in r
    assert "9 pictures, 1 unreadable" in evaluator.summary(results) and "top1 100.0" in evaluator.summary(results)
    json.dumps(results, allow_nan=False)
    (tmp_path / "shades" / "val" / "classnames.txt").write_text("red\ngreen\nblue\n")  # first and last exchanged
    assert evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [folder])["shades"]["per_class"] == [0, 1, 0]
    assert evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [folder], classnames=NAMES)["shades"]["top1"] == 1
    with pytest.raises(SystemExit, match="--classnames"):
        evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [folder], classnames=["red", "green"])


def test_tars_with_classes_and_captions(tmp_path):
    samples = [{"png": picture(i, color), "txt": f"the {color} one".encode(),
                "cls": str(NAMES.index(color.replace("_", " "))).encode()} for i, color in enumerate([*COLORS] * 3)]
    samples[4]["png"] = b"nothing"
    del samples[3]["txt"]
    write_tar(tmp_path / "set" / "test" / "0.tar", samples)  # CLIP_benchmark's layout: names one folder up
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(NAMES))
    folder = str(tmp_path / "set")
    r = evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [folder])["set"]
    assert r["top1"] == 1 and (r["n"], r["unreadable"]) == (8, 1)
    assert r["i2t@1"] == r["t2i@1"] == 1  # three texts, each the text of all pictures of its colour
    dataset = evaluator.open_test(folder)
    texts, pairs = evaluator.captions_of(dataset, torch.tensor([0, 1, 2, 3, 5]))
    assert texts == ["the red one", "the green one", "the dark_blue one"] and pairs == [(0, 0), (1, 1), (2, 2), (4, 2)]
    assert evaluator.open_test(folder + "/test/0.tar").classnames == NAMES


def test_tars_and_tables_of_captions_alone(tmp_path):
    captions = [f"{color} {i}\n\n a {color} thing " + "\nmore" * 9 for i, color in enumerate(COLORS)]
    write_tar(tmp_path / "pairs" / "0.tar", [{"png": picture(i, color), "txt": text.encode()}
                                             for i, (color, text) in enumerate(zip(COLORS, captions))])
    dataset = evaluator.open_test(str(tmp_path / "pairs"))
    texts, pairs = evaluator.captions_of(dataset, torch.arange(3))
    assert texts[:3] == ["red 0", "a red thing", "more"] and len(pairs) == 3 * 5 and len(texts) == 7
    with open(tmp_path / "table.jsonl", "w") as file:
        for i, color in enumerate(COLORS):
            (tmp_path / f"{i}.png").write_bytes(picture(i, color))
            file.write(json.dumps({"filename": f"{i}.png", "caption": [color, f"so {color}"]}) + "\n")
    r = evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [str(tmp_path / "table.jsonl")])["table.jsonl"]
    assert r["metric"] == "i2t@1" and r["i2t@1"] == r["t2i@1"] == 1 and "top1" not in r


def test_rows_of_one_picture_are_its_captions(tmp_path):
    """Tables of COCO and Flickr30k have a row a caption and five rows a picture."""
    captions = {color: [f"{color} {i}" for i in range(5)] for color in COLORS}
    for color in COLORS:
        (tmp_path / f"{color}.png").write_bytes(picture(0, color))
    rows = [(f"{'./' if i else ''}{color}.png", captions[color][i]) for i in range(5) for color in COLORS]
    (tmp_path / "five.tsv").write_text("filepath\ttitle\n" + "".join(f"{name}\t{text}\n" for name, text in rows))
    with open(tmp_path / "five.jsonl", "w") as file:
        for color in COLORS:
            file.write(json.dumps({"filename": f"{color}.png", "caption": captions[color]}) + "\n")
    paths = [str(tmp_path / "five.tsv"), str(tmp_path / "five.jsonl")]
    reads, model = [], Means()
    whole = model.encode_image
    model.encode_image = lambda images: reads.append(len(images)) or whole(images)
    results = evaluator.evaluate(model, TOKENIZER, PREPROCESS, paths)
    assert results["five.tsv"] == results["five.jsonl"] and reads == [3, 3]  # each picture is encoded once
    assert results["five.tsv"]["n"] == 3 and results["five.tsv"]["i2t@1"] == results["five.tsv"]["t2i@1"] == 1
    texts, pairs = evaluator.captions_of(evaluator.open_test(paths[0]), torch.arange(3))
    assert texts == sum(captions.values(), []) and pairs == [(i // 5, i) for i in range(15)]


def test_a_caption_of_a_table_is_one_text_and_five_of_a_picture_count(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    captions = ["a red\nthing\twith a tab", *(f"red {i}" for i in range(6))]
    (tmp_path / "t.jsonl").write_text(json.dumps({"filename": "a.png", "caption": captions}))
    texts, pairs = evaluator.captions_of(evaluator.open_test(str(tmp_path / "t.jsonl")), torch.arange(1))
    assert texts == ["a red thing with a tab", "red 0", "red 1", "red 2", "red 3"] and len(pairs) == 5


# folders of classes and files of names

def numbered(path, count):
    """Folders 0, 1, ..., count - 1, each with one picture whose file name says the folder."""
    for i in range(count):
        (path / str(i)).mkdir(parents=True)
        (path / str(i) / f"of-{i}.png").write_bytes(picture(i))
    return str(path)


def test_numbers_as_folders_are_in_the_order_of_the_numbers(tmp_path):
    folder = numbered(tmp_path / "v2", 12)
    for names in (None, [f"name {i}" for i in range(12)]):
        if names:
            (tmp_path / "v2" / "classnames.txt").write_text("\n".join(names))
        for split in ("test", "train"):
            dataset = evaluator.open_test(folder, split)
            assert dataset.classnames == (names or [str(i) for i in range(12)])
            assert sorted(dataset.label(i) for i in range(12)) == [*range(12)]
            for i in range(12):
                assert dataset.image(i).endswith(f"of-{dataset.label(i)}.png")
    mixed = numbered(tmp_path / "mixed", 12)
    (tmp_path / "mixed" / "0").rename(tmp_path / "mixed" / "zero")
    assert evaluator.open_test(mixed).classnames == ["1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9", "zero"]


def test_a_parent_of_val_is_no_test(tmp_path):
    image_folder(tmp_path / "set" / "val", (1, 1, 1))
    with pytest.raises(SystemExit, match="set holds only the sub-folders val.*at least two classes"):
        evaluator.open_test(str(tmp_path / "set"))
    image_folder(tmp_path / "set" / "train", (1, 1, 1))
    with pytest.raises(SystemExit, match="set holds only the sub-folders train, val"):
        evaluator.open_test(str(tmp_path / "set"))
    assert len(evaluator.open_test(str(tmp_path / "set" / "val"))) == 3


@pytest.mark.parametrize("where", ["beside", "above", "folder", "flag"])
def test_files_of_class_names(tmp_path, where):
    """The same rules beside a tar, one folder up, in a folder of folders, and for --classnames."""
    sample = {"png": picture(0), "cls": b"0"}
    if where == "folder":
        image_folder(tmp_path / "set", (1, 1, 1))
    else:
        write_tar(tmp_path / "set" / ("test" if where == "above" else "") / "0.tar", [sample])
    path = tmp_path / "names.txt" if where == "flag" else tmp_path / "set" / "classnames.txt"

    def names(content):
        path.write_bytes(content)
        if where == "flag":
            return evaluator.read_classnames(str(path), "--classnames")
        return evaluator.open_test(str(tmp_path / "set")).classnames

    for content in ("a\nb\ncafé", "\ufeffa\r\nb\r\ncafé\r\n", "a\rb\rcafé\r", "a\nb\ncafé\n\n \n\t\n"):
        assert names(content.encode()) == ["a", "b", "café"]
    assert names("a\u2028x\nb\x0cy\nc|d".encode()) == ["a\u2028x", "b\x0cy", "c|d"]  # no line ends
    for wrong, reason in (("a\nb\ncafé".encode("latin-1"), f"{path} is not UTF-8"),
                          (b"a\n\nc", "line 2 .*blank name"),
                          (b"a\nb|\nc", "line 2 .*blank name"), (b"\n\n", "empty")):
        with pytest.raises(SystemExit, match=reason):
            names(wrong)


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff\r\nsee {}!\r\n\r\n  \r\n{}\r\n\r\n".encode())
    assert evaluator.read_templates(str(path)) == ["see {}!", "{}"]
    for wrong, reason in ((b"{}\n\nsee it", "--templates: line 3"), (b" \n", "--templates: .*empty"),
                          ("{} café".encode("latin-1"), "--templates")):
        path.write_bytes(wrong)
        with pytest.raises(SystemExit, match=reason):
            evaluator.read_templates(str(path))


def test_equal_short_names_stay_apart(tmp_path):
    folders = [image_folder(tmp_path / name / "shades", (1, 1, 1)) for name in "ab"]
    assert list(evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, folders)) == ["shades", folders[1]]


def test_torchvision_sets(tmp_path):
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    listed = {"apple_red": ["apple_red/1", "apple_red/2"], "bean_green": ["bean_green/1"]}
    for split in ("train", "test"):
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
    for label, names in listed.items():
        (tmp_path / "food-101" / "images" / label).mkdir(parents=True)
        for name in names:
            image = Image.new("RGB", (20, 20), COLORS[label.split("_")[1]])
            (tmp_path / "food-101" / "images" / f"{name}.jpg").write_bytes(encoded(image, "JPEG"))
    dataset = evaluator.open_test("food101", root=str(tmp_path))
    assert dataset.classnames == ["apple red", "bean green"] and [dataset.label(i) for i in range(3)] == [0, 0, 1]
    prompts = []
    model = Means()
    tokenizer = lambda texts: prompts.extend(texts) or TOKENIZER(texts)  # noqa: E731
    assert evaluator.evaluate(model, tokenizer, PREPROCESS, ["food101"], root=str(tmp_path))["food101"]["top1"] == 1
    assert "a photo of a apple red, a kind of food." in prompts  # our templates take the phrase, a user's do not
    prompts.clear()
    evaluator.evaluate(model, tokenizer, PREPROCESS, ["food101"], root=str(tmp_path), templates=("my {}",))
    assert prompts == ["my apple red", "my bean green"]


def test_every_torchvision_name_exists_and_explains_its_absence(tmp_path):
    for name, (_, _, _, metric, phrase) in evaluator.DATASETS.items():
        assert metric in ("top1", "mean_per_class") and phrase.count("{}") == 1
        for split in ("test", "train"):
            with pytest.raises(SystemExit, match=f"^{name} .*--download"):
                evaluator.open_test(name, split, root=str(tmp_path / "nowhere"))


def test_unknown_tests_are_explained(tmp_path):
    with pytest.raises(SystemExit, match="toy, .*cifar10, .*pets"):
        evaluator.open_test("cifar11")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(picture(0))
    with pytest.raises(SystemExit, match="sub-folder"):
        evaluator.open_test(str(tmp_path / "flat"))
    (tmp_path / "flat" / "class").mkdir()
    with pytest.raises(SystemExit, match="sub-folder"):
        evaluator.open_test(str(tmp_path / "flat"))
    for number in ("n01440764", "n01443537"):
        (tmp_path / "imagenet" / number).mkdir(parents=True)
        (tmp_path / "imagenet" / number / "a.png").write_bytes(picture(0))
    with pytest.raises(SystemExit, match="classnames.txt"):
        evaluator.open_test(str(tmp_path / "imagenet"))
    names = ["tench", "goldfish"]
    assert evaluator.open_test(str(tmp_path / "imagenet"), classnames=names).classnames == names
    assert len(evaluator.open_test(str(tmp_path / "imagenet"), "train")) == 2  # a probe needs no names
    write_tar(tmp_path / "bare" / "0.tar", [{"png": picture(0), "cls": b"0"}])
    with pytest.raises(SystemExit, match="--classnames"):
        evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [str(tmp_path / "bare")])
    with pytest.raises(SystemExit, match="no readable picture"):
        evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [image_folder(tmp_path / "bad", (2, 0, 0), broken=2)])


def test_probe_and_neighbors(tmp_path):
    test = image_folder(tmp_path / "shades" / "val", (4, 4, 4))
    train = image_folder(tmp_path / "shades" / "train", (9, 9, 9), broken=1)
    r = evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [test], probe=True, neighbors=True, train=[train])["shades"]
    assert r["probe"] == r["knn"] == 1 and 1e-9 < r["probe_l2"] < 1e4
    for wrong in (None, [test], [train, train]):
        with pytest.raises(SystemExit, match="--train"):
            evaluator.evaluate(Means(), TOKENIZER, PREPROCESS, [test], probe=True, train=wrong)
    toy_test, toy_train = (evaluator.open_test("toy", split) for split in ("test", "train"))
    assert {toy_test.label(i) for i in range(300)} == {toy_train.label(i) for i in range(300)}
    assert toy_test.image(0) != toy_train.image(0)


def test_evaluation_leaves_the_model_and_the_random_state_alone(tmp_path):
    folder = image_folder(tmp_path / "shades", (2, 2, 2))
    model = Stub().train()
    model.linear.eval()  # a frozen part
    before = copy.deepcopy(model)
    random.seed(1), torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    first = evaluator.evaluate(model, TOKENIZER, PREPROCESS, [folder], probe=True, train=[folder + "/"], workers=1)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    again = evaluator.evaluate(model, TOKENIZER, PREPROCESS, [folder], probe=True, train=[folder + "/"])
    assert again == first  # no dropout
    model.encode_text = lambda tokens: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluator.evaluate(model, TOKENIZER, PREPROCESS, [folder])
    assert model.training and not model.linear.training
    model.linear(torch.ones(1, 48).double()).sum().backward()  # inference mode has left nothing behind


def test_folders_that_are_no_classes_are_refused(tmp_path):
    test, train = (image_folder(tmp_path / name, (2, 2, 2)) for name in ("test", "train"))
    (tmp_path / "train/green").rename(tmp_path / "train/yellow")
    for flags, why in ((dict(train=[train], probe=True), "--train"), (dict(classnames=["a", "b"]), "3 folders"),
                       (dict(tests=[test, ""]), "comma")):
        with pytest.raises(SystemExit, match=why):
            evaluator.evaluate(Stub(), TOKENIZER, PREPROCESS, **(dict(tests=[test]) | flags))
    (tmp_path / "test/.hidden").mkdir()
    with pytest.raises(SystemExit, match="hidden"):
        evaluator.open_test(test)
    (tmp_path / "train/yellow").rename(os.fsdecode(os.fsencode(tmp_path / "train") + b"/gr\xfcn"))
    with pytest.raises(SystemExit, match="not UTF-8"):
        evaluator.open_test(train)


# several ranks

def rank_main(rank, path):
    """Three processes; then two of them."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{path}/group{world}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=300))
            model = Stub().eval()
            with torch.no_grad():
                model.norm.running_mean += 3 * rank  # batch norms drift apart between ranks
            results = evaluator.evaluate(model, TOKENIZER, PREPROCESS, [f"{path}/shades"], batch_size=3)
            x, index = evaluator.encode_images(model, evaluator.open_test(f"{path}/shades"), PREPROCESS, batch_size=3)
            one, where = evaluator.encode_images(model, Endless(), PREPROCESS)  # most ranks have nothing
            torch.save((results, x, index, one, where), f"{path}/result-{world}-{rank}.pt")
            # torch 2.6: destroying gloo deadlocks while its threads hold the last tensors (pytorch 154976)
            time.sleep(.5)
            dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_together_equal_one_process(tmp_path):
    colors, folder = [*COLORS] * 8, str(tmp_path / "shades")
    samples = [{"png": b"" if i == 0 else picture(i, colors[i]), "cls": str(i % 3).encode(), "txt": colors[i].encode()}
               for i in range(23)]  # in batches of 3: all is ragged
    write_tar(tmp_path / "shades" / "0.tar", samples)
    (tmp_path / "shades" / "classnames.txt").write_text("\n".join(COLORS))
    model = Stub().eval()
    expected = evaluator.evaluate(model, TOKENIZER, PREPROCESS, [folder], batch_size=3)
    x, index = evaluator.encode_images(model, evaluator.open_test(folder), PREPROCESS, batch_size=3)
    assert index.tolist() == list(range(1, 23))
    one = model.encode_image(PREPROCESS(picture(0))[None]).detach()
    spawn(rank_main, (str(tmp_path),), 3)
    for world in (3, 2):
        for rank in range(world):
            results, x_rank, index_rank, one_rank, where = torch.load(tmp_path / f"result-{world}-{rank}.pt")
            assert results == expected and torch.equal(index_rank, index) and where.tolist() == [0]
            torch.testing.assert_close(x_rank, x, rtol=0, atol=1e-12)
            torch.testing.assert_close(one_rank, one, rtol=0, atol=1e-12)


# checkpoints and the command line

@pytest.fixture
def saved(tmp_path):
    """A checkpoint as clip.py writes it, and the model in it."""
    import clip
    torch.manual_seed(0)
    model = clip.build("tiny", image_size=16, patch_size=8, vocab=516, context=64, quick_gelu=True)
    state = dict(script="clip", model=model.state_dict(), sizes=dict(quick_gelu=True), step=1,
                 preprocess=vars(data.Preprocess(16)), merges="t h\nth e</w>", context=64)
    torch.save(state, tmp_path / "last.pt")
    return str(tmp_path / "last.pt"), state, model


def test_load(saved):
    path, _, expected = saved
    model, tokenizer, preprocess = evaluator.load(path)
    assert type(model) is type(expected) and not model.training
    images, tokens = torch.randn(2, 3, 16, 16), TOKENIZER(["some red thing", "x"])
    assert torch.equal(model(images, tokens)[0], expected.eval()(images, tokens)[0])  # quick_gelu came along
    assert torch.equal(model(images, tokens)[1], expected(images, tokens)[1])
    assert tokenizer.merges == [("t", "h"), ("th", "e</w>")] and tokenizer.context == 64
    assert (preprocess.size, tuple(preprocess.mean), tuple(preprocess.std)) == (16, data.MEAN, data.STD)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("change", [
    dict(script="../clip"), dict(script="os"), dict(script="Clip"), dict(script="clip\n"), dict(script="tests"),
    dict(script=7), dict(script="data"), dict(script=None), dict(extra=Evil())])
def test_load_refuses(saved, change):
    path, state, _ = saved
    torch.save(state | change, path)
    with pytest.raises(SystemExit, match="last.pt"):
        evaluator.load(path)


def test_load_explains(saved, tmp_path):
    path, state, model = saved
    content = open(path, "rb").read()
    for bad, reason in ((content[:len(content) // 2], "whole"), (b"", "whole"), (b"<html>", "whole")):
        open(path, "wb").write(bad)
        with pytest.raises(SystemExit, match=reason):
            evaluator.load(path)
    torch.save({key: value for key, value in state.items() if key != "merges"}, path)
    with pytest.raises(SystemExit, match="without merges"):
        evaluator.load(path)
    torch.save(state, path)
    with pytest.raises(SystemExit, match="without ema"):
        evaluator.load(path, weights="ema")
    for nothing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(SystemExit, match="no checkpoint"):
            evaluator.load(nothing)


# weights of others

@pytest.fixture
def weights():
    """State of a small clip.CLIP in fp16 numbers, so that a copy in fp16 is exact."""
    import clip
    torch.manual_seed(0)
    model = clip.build("tiny", image_size=16, patch_size=8, vocab=516, context=64)
    return {name: value.half().float() for name, value in model.state_dict().items()}


@pytest.fixture
def merges(tmp_path, monkeypatch):
    """OpenAI's merges, were they only two."""
    (tmp_path / "merges.txt").write_text("#version\nt h\nth e</w>\n")
    monkeypatch.setenv("CLIP_BPE", str(tmp_path / "merges.txt"))


def save_archive(state, path):
    """As OpenAI's: TorchScript, fp16, with three numbers beside the weights."""
    archive = nn.Module()
    numbers = dict(input_resolution=torch.tensor(16), context_length=torch.tensor(64), vocab_size=torch.tensor(516))
    for key, value in (state | numbers).items():
        *path_of, name = key.split(".")
        module = archive
        for part in path_of:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(name, value.half() if value.is_floating_point() else value)
    torch.jit.script(archive).save(path)


def save_safetensors(state, path):
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        raw = value.half().numpy().tobytes()
        offsets = [len(content), len(content) + len(raw)]
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": offsets}
        content += raw
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


def is_text(name):
    return not name.startswith(("visual", "logit"))


def check_same(loaded, state):
    assert set(loaded) == set(state)
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


def tinyclip_prefix(name):
    if name == "logit_scale":
        return "_logit_scale."
    return "_text_encoder.module." if is_text(name) else "_image_encoder.module."


FORMS = {  # how others save what is in a state
    "plain": lambda state: state,
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "open_clip": lambda state: {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "compiled then DDP": lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "DDP then compiled": lambda state: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "tower compiled": lambda state: {k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()},
    "CustomText": lambda state: {f"text.{k}" if is_text(k) else k: v for k, v in state.items()} | {
        "text.attn_mask": torch.zeros(64, 64), "logit_bias": torch.zeros(())},
    "CustomText in DDP": lambda state: {f"module._orig_mod.text.{k}" if is_text(k) else f"module.{k}": v
                                        for k, v in state.items()},
    "logit_scale [1]": lambda state: state | {"logit_scale": state["logit_scale"][None]},
    "OpenAI's state dict": lambda state: state | {"input_resolution": torch.tensor(16), "vocab_size": torch.tensor(9)},
    "TinyCLIP": lambda state: {"state_dict": {tinyclip_prefix(k) + k: v for k, v in state.items()} | {
        "image_encoder_without_ddp.visual.proj": torch.zeros(2), "l0_module.z": torch.zeros(2)}},
    "ours": lambda state: dict(script="clip", step=1, model=state | {
        "projector.weight": torch.zeros(2), "logit_scale_proto": torch.zeros(())}),
    "ours with a mask token": lambda state: dict(script="any", merges="t h\nth e</w>", model=state | {
        "token_embedding.weight": torch.cat([state["token_embedding.weight"], torch.ones(1, 128)])}),
}


@pytest.mark.parametrize("form", FORMS)
def test_load_clip_state_of_dicts(weights, tmp_path, form):
    torch.save(FORMS[form](weights), tmp_path / "weights.pt")
    check_same(evaluator.load_clip_state(tmp_path / "weights.pt"), weights)


def test_load_clip_state_of_archives_and_safetensors(weights, tmp_path, recwarn):
    save_archive(weights, tmp_path / "openai.pt")
    save_safetensors(FORMS["CustomText"](weights), tmp_path / "hub.safetensors")
    recwarn.clear()
    for name in ("openai.pt", "hub.safetensors"):
        check_same(evaluator.load_clip_state(tmp_path / name), weights)
    assert not recwarn.list  # torch.jit.load is deprecated


def test_load_clip_state_of_a_resnet(tmp_path):
    import clip
    sizes = dict(embed_dim=64, image_size=64, patch_size=None, vision_width=16, vision_layers=(1, 1, 1, 1), context=64,
                 vocab=516, text_width=64, text_layers=1)
    state = clip.CLIP(**sizes).state_dict()
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "resnet.pt")
    check_same(evaluator.load_clip_state(tmp_path / "resnet.pt"), state)
    assert evaluator.image_size(state) == 64


def test_what_a_file_says_is_compared(weights, tmp_path):
    path = tmp_path / "quick.pt"
    torch.save(dict(script="clip", model=weights, sizes=dict(quick_gelu=True), merges="t h\nth e</w>"), path)
    check_same(evaluator.load_clip_state(path, True, "t h\nth e</w>"), weights)
    with pytest.raises(SystemExit, match="quick.pt was trained with --quick-gelu: give it"):
        evaluator.load_clip_state(path, False)
    with pytest.raises(SystemExit, match="quick.pt was trained with other merges"):
        evaluator.load_clip_state(path, merges="t h")
    torch.save(dict(script="clip", model=weights, sizes=dict(quick_gelu=False)), path)
    with pytest.raises(SystemExit, match="quick.pt was trained without --quick-gelu: leave it out"):
        evaluator.load_clip_state(path, True)
    save_archive(weights, tmp_path / "openai.pt")
    with pytest.raises(SystemExit, match="openai.pt was trained with --quick-gelu: give it"):
        evaluator.load_clip_state(tmp_path / "openai.pt", False)
    torch.save(weights, path)  # says nothing
    for quick_gelu in (True, False):
        check_same(evaluator.load_clip_state(path, quick_gelu, "t h"), weights)


def without(state, start):
    return {name: value for name, value in state.items() if not name.startswith(start)}


FOREIGN = {  # other towers, and what the sentence names
    "timm": (lambda state: without(state, "visual.") | {"visual.trunk.patch_embed.proj.weight": torch.zeros(8, 3, 8)},
             "visual.trunk.patch_embed.proj.weight, but no visual.conv1.weight"),
    "SigLIP": (lambda state: {f"text.{k}" if is_text(k) else k: v for k, v in without(state, "text_proj").items()} | {
        "text.text_projection.weight": torch.zeros(8, 8), "logit_bias": torch.zeros(())}, "no text_projection"),
    "CoCa": (lambda state: {f"text.{k}" if is_text(k) else k: v for k, v in state.items()} | {
        "text.cls_emb": torch.zeros(128), "text_decoder.text_projection": torch.zeros(8, 8)}, "cls_emb"),
    "LayerScale": (lambda state: state | {"visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(128)}, "ls_1.gamma"),
    "pooling": (lambda state: state | {"visual.attn_pool.query": torch.zeros(1, 8)}, "visual.attn_pool.query"),
    "transformers": (lambda state: {"vision_model.embeddings.class_embedding": torch.zeros(8)},
                     "vision_model.embeddings.class_embedding, but no visual.conv1.weight"),
    "wide": (lambda state: state | {"visual.conv1.weight": torch.zeros(1280, 3, 8, 8)}, "1280 wide"),
    "scale": (lambda state: without(state, "logit_scale"), "no logit_scale"),
    "else": (lambda state: {"weight": torch.zeros(2)}, "it has weight, but no visual.conv1.weight"),
    "nothing": (lambda state: {}, "no tensor"),
    "list": (lambda state: [1, 2], "no whole file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_towers_are_refused(weights, tmp_path, merges, kind):
    make, reason = FOREIGN[kind]
    torch.save(make(weights), tmp_path / "foreign.pt")
    for read in (evaluator.load_clip_state, evaluator.load):
        with pytest.raises(SystemExit, match=f"foreign.pt.*{reason}"):
            read(tmp_path / "foreign.pt")


def test_no_files_of_weights(weights, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, hello, hello")
    save_safetensors(weights, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-100])
    save_archive(weights, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-100])
    for name in ("text.pt", "text.safetensors", "cut.safetensors", "cut.pt"):
        with pytest.raises(SystemExit, match=f"{name} is no whole file"):
            evaluator.load_clip_state(tmp_path / name)
    with pytest.raises(SystemExit, match="no checkpoint .*missing.pt"):
        evaluator.load_clip_state(tmp_path / "missing.pt")


def test_a_torch_without_torchscript_says_what_to_take(weights, tmp_path, monkeypatch):
    save_archive(weights, tmp_path / "openai.pt")
    monkeypatch.delattr(torch.jit, "load")
    with pytest.raises(SystemExit, match="openai.pt is a TorchScript archive.*state dict.*safetensors"):
        evaluator.load_clip_state(tmp_path / "openai.pt")


@pytest.mark.parametrize("form, given, quick_gelu", [
    ("archive", None, True), ("archive", False, True), ("OpenAI's state dict", None, True),
    ("plain", None, False), ("plain", False, False), ("plain", True, True), ("compiled then DDP", None, False)])
def test_load_of_others(weights, merges, tmp_path, capsys, form, given, quick_gelu):
    import clip
    path = tmp_path / "other.pt"
    if form == "archive":
        save_archive(weights, path)
    else:
        torch.save(FORMS[form](weights), path)
    model, tokenizer, preprocess = evaluator.load(path, quick_gelu=given)
    expected = clip.build(weights, quick_gelu=quick_gelu).eval()
    images, tokens = torch.randn(2, 3, 16, 16), TOKENIZER(["some red thing", "x"])
    assert type(model) is clip.CLIP and not model.training
    for ours, theirs in zip(model(images, tokens), expected(images, tokens)):
        assert torch.equal(ours, theirs)
    assert tokenizer.merges == [("t", "h"), ("th", "e</w>")] and tokenizer.context == 64
    assert (preprocess.size, preprocess.mean, preprocess.std) == (16, data.MEAN, data.STD)
    said = capsys.readouterr().out
    if "archive" in form or "OpenAI" in form or given is not None:
        assert not said
    else:
        assert said.count("\n") == 1 and "other.pt" in said and "GELU is assumed" in said and "--quick-gelu" in said


def test_load_of_others_explains(weights, merges, tmp_path, monkeypatch):
    path = tmp_path / "other.pt"
    torch.save(weights, path)
    with pytest.raises(SystemExit, match="other.pt is no checkpoint of these scripts.*ema"):
        evaluator.load(path, weights="ema")
    (tmp_path / "merges.txt").write_text("#version\nt h\n")
    with pytest.raises(SystemExit, match="other.pt has 516 tokens.*515.*--bpe"):
        evaluator.load(path)
    monkeypatch.setenv("CLIP_BPE", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CLIP_BPE.*nowhere"):
        evaluator.load(path)
    torch.save(without(weights, "visual.ln_pre.weight"), path)
    with pytest.raises(SystemExit, match="other.pt.*ln_pre.weight"):
        evaluator.load(path)


def test_several_checkpoints_in_one_table(saved, weights, merges, tmp_path, capsys):
    ours, other, folder = saved[0], str(tmp_path / "other.pt"), image_folder(tmp_path / "shades", (2, 2, 2))
    torch.save(weights, other)
    arguments = ["--data", f"{folder},{folder}/", "--workers", "0", "--json", str(tmp_path / "out.json")]
    evaluator.main([ours, other, "--quick-gelu", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [path, test] for path in (ours, other) for test in ("shades", f"{folder}/")]
    table = json.loads((tmp_path / "out.json").read_text())
    assert list(table) == [ours, other]
    for path, results in table.items():
        evaluator.main([path, "--quick-gelu", *arguments])
        assert json.loads((tmp_path / "out.json").read_text()) == results
    capsys.readouterr()
    evaluator.main([ours, other, "--no-quick-gelu", "--images", f"{folder}/red/000.png", "--texts", "a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[::4] == [f"{ours}:", f"{other}:"]
    with pytest.raises(SystemExit, match="no checkpoint .*missing.pt"):
        evaluator.main([ours, str(tmp_path / "missing.pt"), *arguments])
    assert not capsys.readouterr().out  # before the first one is tested


def test_load_refuses_a_module_that_stands_in_front(saved, tmp_path, monkeypatch):
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "clip.py").write_text("raise RuntimeError('this was run')")
    monkeypatch.syspath_prepend(tmp_path / "front")
    monkeypatch.delitem(evaluator.importlib.sys.modules, "clip")
    with pytest.raises(SystemExit, match="beside"):
        evaluator.load(saved[0])


def test_command_line(saved, tmp_path, capsys):
    folder, (path, _, model) = image_folder(tmp_path / "shades", (2, 2, 2)), saved
    (tmp_path / "prompts.txt").write_text("see {}!\n{}\n")
    (tmp_path / "names.txt").write_text("blue|navy\ngreen\nred\n")
    evaluator.main([path, "--data", f"{folder},{folder}/", "--workers", "0", "--json", str(tmp_path / "out.json"),
                    "--templates", str(tmp_path / "prompts.txt"), "--classnames", str(tmp_path / "names.txt"),
                    "--knn", "--train", f"{image_folder(tmp_path / 'more', (1, 1, 1))},{tmp_path}/more"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["shades"] == results[f"{folder}/"] and len(results["shades"]["per_class"]) == 3
    assert capsys.readouterr().out.count("top1") == 2
    expected = evaluator.evaluate(*evaluator.load(path), [folder], templates=["see {}!", "{}"],
                                  classnames=["blue|navy", "green", "red"])
    assert expected["shades"].items() <= results["shades"].items()

    picture_path = f"{folder}/red/000.png"
    evaluator.main([path, "--images", picture_path, "--texts", "a cat", "a dog"])
    lines = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        x, t, scale = model.eval()(PREPROCESS(picture_path)[None], evaluator.load(path)[1](["a cat", "a dog"]))
    p, best = (scale * x @ t.T).softmax(1)[0].max(0)
    assert lines[0] == picture_path and lines[1].split("%")[1].strip() == ["a cat", "a dog"][best]
    assert float(lines[1].split("%")[0]) == pytest.approx(100 * p.item(), abs=.051) and len(lines) == 3

    for arguments, reason in ((["--data", folder, "--templates", picture_path], "--templates"),
                              (["--data", folder, "--classnames", "nowhere"], "--classnames"),
                              (["--images", "nowhere.png", "--texts", "a"], "nowhere.png")):
        with pytest.raises(SystemExit, match=reason):
            evaluator.main([path, *arguments])
