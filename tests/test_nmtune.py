"""nmtune.py: slow references in float64, the identities of its spec, edge cases, the command line."""
import io
import json
import math
import random
import re
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from torch import nn

import clip
import data
import eval as evaluator
import nmtune

BORROW = {  # how somebody who copied a part would call it; tests/test_house.py does
    "singular_values": lambda f: f(torch.randn(4, 8)),
    "regularisers": lambda f: f(torch.randn(4, 8), torch.randn(4, 8)),
    "spectrum": lambda f: f(torch.randn(4, 8)),
    "NMTune": lambda NMTune: NMTune(8, 3)(torch.randn(4, 8)),
}



def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(n, D, dtype=torch.float64):
    """Frozen and transformed features with a common mean, as raw features have."""
    f = 1 + rand(n, D, dtype=dtype)
    return f, (f + .3 * rand(n, D, seed=1, dtype=dtype)).requires_grad_()


def reference(f, z, k):
    """The three terms by loops and by the singular value decomposition."""
    n, D = z.shape
    B = n // 2
    mse = sum(((z[B + i] / z[B + i].norm() - f[i] / f[i].norm()) ** 2).sum() for i in range(B)) / (B * D)
    cov = 0
    for a in range(D):
        for b in range(D):
            if a != b:
                cov = cov + (((z[:, a] - z[:, a].mean()) * (z[:, b] - z[:, b].mean())).sum() / (n - 1)) ** 2 / D
    s = torch.linalg.svd(z)[1]
    return mse, cov, (s / s.sum())[:k].mean()


# regularisers

@pytest.mark.parametrize("n, D", [(2, 5), (6, 3), (8, 8), (8, 20), (20, 8)])
@pytest.mark.parametrize("k", [1, 5])
def test_regularisers_and_gradients_equal_slow_references(n, D, k):
    f, z = pair(n, D)
    for mine, slow in zip(nmtune.regularisers(f, z, k), reference(f, z, k)):
        torch.testing.assert_close(mine, torch.as_tensor(slow), rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (mine, slow)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("D", [40, 300])
def test_fp32_is_close_and_autocast_changes_nothing(D):
    f, z = pair(64, D, torch.float32)
    terms = nmtune.regularisers(f, z)
    exact = nmtune.regularisers(f.double(), z.double())
    torch.testing.assert_close([t.double() for t in terms], list(exact), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert nmtune.regularisers(f, z) == terms
    assert all(term.dtype == torch.float32 for term in nmtune.regularisers(f.bfloat16(), z.bfloat16()))


def test_mse_is_a_cosine_that_ignores_lengths():
    f, z = pair(12, 7)
    mse = nmtune.regularisers(f, z)[0]
    cosine = torch.cosine_similarity(z[6:], f[:6])  # the second view of z, the first of f
    torch.testing.assert_close(mse, 2 * (1 - cosine.mean()) / 7)
    torch.testing.assert_close(mse, nmtune.regularisers(3 * f, .2 * z)[0])
    assert nmtune.regularisers(f, torch.cat([z[:6], 5 * f[:6]]))[0] < 1e-30


def test_cov_identities():
    f, z = pair(12, 7)
    cov = nmtune.regularisers(f, z)[1]
    torch.testing.assert_close(nmtune.regularisers(f, z + rand(7, seed=2))[1], cov)  # blind to the mean
    torch.testing.assert_close(nmtune.regularisers(f, 2 * z)[1], 16 * cov)
    assert nmtune.regularisers(f[:, :1], z[:, :1])[1].abs() < 1e-15  # one column
    columns = torch.linalg.qr(torch.cat([torch.ones(12, 1, dtype=torch.float64), rand(12, 7)], 1))[0][:, 1:]
    assert nmtune.regularisers(f, columns)[1] < 1e-30  # decorrelated


def test_top_identities():
    f, z = pair(12, 30)
    top = nmtune.regularisers(f, z)[2]
    rows, columns = torch.linalg.qr(rand(12, 12, seed=3))[0], torch.linalg.qr(rand(30, 30, seed=4))[0]
    for other in (9 * z, rows @ z, z @ columns):
        torch.testing.assert_close(nmtune.regularisers(f, other)[2], top)
    assert top < .2
    low = rand(12, 5, seed=5) @ rand(5, 30, seed=6)
    torch.testing.assert_close(nmtune.regularisers(f, low)[2].item(), .2)
    for n in (2, 4, 12):  # orthonormal rows
        torch.testing.assert_close(nmtune.regularisers(f[:n], columns[:n])[2].item(), 1 / n)


def test_a_view_given_twice():
    """Both halves equal: cov is a known multiple of the single view's, top does not change."""
    f, z = pair(10, 6)
    single, double = nmtune.regularisers(f, z), nmtune.regularisers(torch.cat([f, f]), torch.cat([z, z]))
    torch.testing.assert_close(double[1], single[1] * (2 * 9 / 19) ** 2)
    torch.testing.assert_close(double[2], single[2])


def test_stored_features_get_no_gradient():
    f, z = pair(8, 5)
    f.requires_grad_()
    sum(nmtune.regularisers(f, z + 0 * f.detach())).backward()
    assert f.grad is None and z.grad.abs().sum() > 0


@pytest.mark.parametrize("value, n, D", [(0, 6, 4), (1, 6, 4), (1, 2, 9)])
def test_degenerate_batches_have_finite_terms_and_gradients(value, n, D):
    z = torch.full((n, D), float(value)).requires_grad_()
    terms = nmtune.regularisers(torch.ones_like(z), z)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms) and z.grad.isfinite().all()


# spectrum

def test_spectrum_equals_its_definition():
    x = rand(30, 12) + 1
    p = torch.linalg.svd(x)[1]
    p = p / p.sum()
    sve, lsvr = nmtune.spectrum(x)
    assert math.isclose(sve, -sum(v * math.log(v) for v in p.tolist()), rel_tol=1e-12)
    assert math.isclose(lsvr, -math.log(p[0]), rel_tol=1e-12)
    for other in (7 * x, x @ torch.linalg.qr(rand(12, 12, seed=1))[0], x.T, x.flip(0)):
        torch.testing.assert_close(nmtune.spectrum(other), (sve, lsvr))
    torch.testing.assert_close(nmtune.spectrum(x.float()), (sve, lsvr), rtol=1e-6, atol=0)


def test_spectrum_of_known_matrices():
    for value in nmtune.spectrum(torch.outer(rand(20), rand(7))):
        assert abs(value) < 1e-9
    for value in nmtune.spectrum(torch.eye(9)):
        assert math.isclose(value, math.log(9))
    x = torch.cat([torch.eye(4), torch.zeros(4, 30)], 1)  # D above n, zeros among the singular values
    assert nmtune.spectrum(torch.cat([x, x]))[0].item() == pytest.approx(math.log(4))


def test_spectrum_without_an_answer():
    for x in (torch.zeros(5, 3), torch.full((5, 3), math.nan), torch.full((2, 4), math.inf)):
        assert all(map(math.isnan, nmtune.spectrum(x)))
    assert str(nmtune.spectrum(torch.ones(1, 4))[0].item()) == "0.0"  # not -0


def test_lsvr_is_never_above_sve():
    for seed in range(50):
        rng = random.Random(seed)
        n, D = rng.randint(1, 20), rng.randint(1, 20)
        sve, lsvr = nmtune.spectrum(rand(n, D, seed=seed) * rand(D, seed=seed + 1).exp() ** 2)
        assert -1e-12 <= lsvr <= sve + 1e-12 <= math.log(min(n, D)) + 1e-11


# model and training

def clusters(classes=3, each=20, D=6, views=2):
    """Linearly separable features [V, N, D] and their labels."""
    y = torch.arange(classes * each) % classes
    return (4 * torch.eye(classes, D)[y] + .1 * rand(views, len(y), D).float()), y


def weights_of(model):
    return torch.cat([t.flatten().double() for t in model.state_dict().values()])


def build(D=6, classes=3, **arguments):
    torch.manual_seed(0)
    return nmtune.NMTune(D, classes, **arguments)


def test_weights_of_0_are_a_plain_mlp_bit_for_bit():
    x, y = clusters()
    model, plain = build(), build()
    nmtune.fit(model, x, y, epochs=2)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=1e-4)
    plain.train()
    for step in range(2):  # 60 samples are one batch
        rows, (a, b) = torch.randperm(60, generator=generator), torch.randperm(2, generator=generator).tolist()
        f = torch.cat([x[a, rows], x[b, rows]])
        loss = nn.functional.cross_entropy(plain.head(f + plain.scale * plain.mlp(f)), torch.cat([y[rows], y[rows]]))
        optimizer.param_groups[0]["lr"] = 1e-3 * .5 * (1 + math.cos(math.pi * step / 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(weights_of(model), weights_of(plain))


def test_each_weight_counts_and_gradients_add_up(monkeypatch):
    """One step of plain gradient descent moves by the gradient: it is linear in the three weights."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr))
    x, y = clusters()
    x = x.double()

    def move(*weights):
        model = build().double()
        start = weights_of(model)
        nmtune.fit(model, x, y, weights, lr=1, epochs=1)
        return weights_of(model) - start

    plain = move(0, 0, 0)
    single = [move(*row) - plain for row in (3 * torch.eye(3)).tolist()]
    torch.testing.assert_close(move(3, 3, 3) - plain, sum(single), rtol=1e-6, atol=1e-9)
    assert all(part.abs().max() > 1e-6 for part in single)


@pytest.mark.parametrize("arguments, weights", [(dict(linear=True), (0, 0, 0)), ({}, (0, 0, 0)), ({}, (1, .04, .001))])
def test_separable_features_are_learnt(arguments, weights):
    x, y = clusters()
    model, before = build(**arguments), x.clone()
    first, last = nmtune.fit(model, x, y, weights, lr=1e-2, epochs=200)
    assert (nmtune.apply(model, x[0])[1].argmax(1) == y).all() and torch.equal(x, before)
    assert last[0] < first[0] and (last[2] < first[2] if any(weights) else math.isnan(last[1]))


def test_training_is_repeatable_and_a_row_does_not_depend_on_the_others():
    x, y = clusters()
    models = [build(), build()]
    for model in models:
        nmtune.fit(model, x, y, (1, .04, .001), epochs=2)
    assert torch.equal(*map(weights_of, models))
    whole = nmtune.apply(models[0], x[0].repeat(100, 1))[1]  # 6000 rows: two blocks
    torch.testing.assert_close(whole[-60:], torch.cat([nmtune.apply(models[0], row[None])[1] for row in x[0]]))


@pytest.mark.parametrize("n, D, views", [(1, 4, 1), (1, 300, 2), (65, 80, 1), (5, 300, 4)])
def test_few_samples_and_many_dimensions(n, D, views):
    """One sample, a last batch of one, one sample a class, more dimensions than rows."""
    y = torch.arange(n) % 5
    first, last = nmtune.fit(build(D, 5), rand(views, n, D).float(), y, (1, .04, .001), epochs=2)
    assert all(map(math.isfinite, first + last))


def test_a_loss_that_is_not_finite_is_a_sentence():
    x, y = clusters()
    with pytest.raises(SystemExit, match="not finite in epoch 1"):
        nmtune.fit(build(), 1e12 * x, y, (1, .04, .001))
    for weights in ((1, .04, .001), (0, 0, 0)):
        with pytest.raises(SystemExit, match="not finite in epoch 1"):
            nmtune.fit(build(), x.masked_fill(x > 1, math.nan), y, weights)


def test_parameters_start_as_in_the_released_code():
    model = build(50, 400)
    assert not model.head.bias.any() and (model.scale == 1).all()
    assert model.head.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 50), rel=.01)
    assert [tuple(p.shape) for p in model.mlp.parameters()] == [(200, 50), (200,), (200,), (200,), (50, 200), (50,)]
    assert len(list(build(linear=True).parameters())) == 2


def test_weights_of_paper_and_released_code():
    assert nmtune.WEIGHTS == {"released": (1, .04, .001, 5), "paper": (.01, .01, .01, 1)}


# caption noise

def pairs(n):
    return {f"k{i}": [f"caption {i}"] for i in range(n)}


@pytest.mark.parametrize("share, count", [(0, 0), (.1, 20), (.333, 67), (1, 200)])
def test_swap_changes_exactly_the_share(share, count):
    before = pairs(200)
    after = nmtune.swap(before, share, 0)
    assert sum(before[key] != after[key] for key in before) == count and list(after) == list(before)
    assert sorted(after.values()) == sorted(before.values())
    assert after == nmtune.swap(before, share, 0) and (not count or after != nmtune.swap(before, share, 1))


def test_regularisers_refuse_what_has_no_two_views():
    for f, z, k in ((rand(3, 4), rand(3, 4), 5), (rand(4, 4), rand(2, 4), 5), (rand(0, 4), rand(0, 4), 5),
                    (rand(4, 4), rand(4, 4), 0)):
        with pytest.raises(ValueError, match="2B, D"):
            nmtune.regularisers(f, z, k)


def test_covariance_of_one_large_column_is_zero():
    z = torch.zeros(64, 8)
    z[:, 0] = 1000 * rand(64).float()
    assert nmtune.regularisers(z, z)[1].item() == pytest.approx(0, abs=1e-3)  # of 1e12 that cancel


def test_swap_among_equal_captions():
    before = {f"k{i}": ["A  dog" if i % 2 else "a dog"] if i < 40 else [f"caption {i % 7}"] for i in range(100)}
    after = nmtune.swap(before, 1, 0)
    assert all(data.clean(before[key][0]) != data.clean(after[key][0]) for key in before)
    with pytest.raises(SystemExit, match="100 pairs share a caption, one is in 60"):
        nmtune.swap({f"k{i}": ["a dog"] if i < 60 else [str(i)] for i in range(100)}, 1, 0)
    for share, count in ((.1, 1), (.01, 0)):
        with pytest.raises(SystemExit, match=f"that is {count} of 10 pairs, and a swap takes two"):
            nmtune.swap(pairs(10), share, 0)


def test_swap_of_lists_of_captions():
    """No pair gets one of its own captions, also where lists overlap or stand in another order."""
    before = {f"k{i}": [f"c{i // 2}", f"c{i // 2 + 1}", f"d{i}"][::(-1) ** i] for i in range(0, 40)}
    after = nmtune.swap(before, 1, 0)
    assert all(not {*before[key]} & {*after[key]} for key in before)
    assert sorted(map(str, before.values())) == sorted(map(str, after.values()))
    chain = {f"k{i}": [f"c{i}", f"c{i + 1}"] for i in range(10)}
    after = nmtune.swap(chain, 1, 0)
    assert all(not {*chain[key]} & {*after[key]} for key in chain)
    with pytest.raises(SystemExit, match="2 pairs share a caption, one is in 2"):
        nmtune.swap({"a": ["x", "y"], "b": ["y", "x"]}, 1, 0)


def test_swap_writes_a_subset_file(tmp_path, capsys):
    texts = [[f"one\t{i}", f" two \n {i}"] if i % 2 else f"é {i}" for i in range(20)]
    rows = [{"filename": f"{i}.jpg", "caption": text} for i, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nmtune.main(["--swap", ".5", "--data", str(tmp_path / "pairs.jsonl"), "--limit", "10"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) == 2 for line in lines) and {line[0] for line in lines} == {f"{i}.jpg" for i in range(10)}
    wrong = {key for key, text in lines if text.split()[-1] != key.split(".")[0]}
    assert len(wrong) == 5 and Counter(key for key, _ in lines) != Counter(range(10))
    rows[3]["filename"] = "a\tb.jpg"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="tab"):
        nmtune.main(["--swap", ".5", "--data", str(tmp_path / "pairs.jsonl")])


# the command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model that was trained for two steps, and the cache of indexes."""
    path = tmp_path_factory.mktemp("nmtune")
    clip.main(["--limit", "256", "--epochs", "1", "--warmup", "1", "--eval", "", "--out", str(path / "clip")])
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(folder, capsys, *arguments):
    """Output and results {row: {"seconds", "tests"}} of a call."""
    nmtune.main([str(folder / "clip/last.pt"), "--workers", "0", "--epochs", "1", "--views", "2", "--limit", "40",
                 "--out", str(folder / "features"), "--json", str(folder / "table.json"), *map(str, arguments)])
    return capsys.readouterr().out, json.loads((folder / "table.json").read_text())


def write_set(path, keys, names=("red", "green", "blue"), broken=()):
    """Tars of plain pictures: key "artist_3" has the class 3 % 3; a classnames.txt."""
    path.mkdir()
    (path / "classnames.txt").write_text("\n".join(names))
    with tarfile.open(path / "0.tar", "w") as tar:
        for key in keys:
            number = int(key.split("_")[1])
            file = io.BytesIO()
            Image.new("RGB", (20 + number, 24), [(200, 9, 9), (9, 200, 9), (9, 9, 200)][number % 3]).save(file, "PNG")
            content = b"no" if key in broken else file.getvalue()
            for ending, content in (("png", content), ("cls", str(number % 3).encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


KEYS = [f"{artist}_{i}" for artist in ("ann", "bob", "eve") for i in range(8)]


@pytest.mark.slow
def test_the_toy(folder, capsys):
    text, rows = run(folder, capsys)
    assert list(rows) == ["zero-shot", "linear probe", "MLP", "NMTune"]
    assert re.search(r"in domain +out 1 +SVE +LSVR +seconds\n", text) and text.count("step: cross-entropy") == 2
    for row in rows.values():
        inside, outside = row["tests"]
        assert (inside["set"], outside["set"], inside["n"], outside["n"]) == ("toy-seen", "toy", 40, 40)
        assert len(inside["per_class"]) == 8 and 0 <= inside["lsvr"] <= inside["sve"] <= math.log(40)
    spectra = [[(test["sve"], test["lsvr"]) for test in row["tests"]] for row in rows.values()]
    assert spectra[0] == spectra[1] != spectra[2] != spectra[3]  # the first two classify the features themselves
    kept = sorted((folder / "features").iterdir())
    for path in kept:  # each test set's features are the model's own of its pictures
        x = torch.load(path, weights_only=True)["x"]
        assert x.shape in ((1, 40, 128), (2, 40, 128)) and (len(x) == 1 or (x[0] != x[1]).any())
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    _, again = run(folder, capsys)  # reads them
    _, paper = run(folder, capsys, "--paper")
    assert times == [path.stat().st_mtime_ns for path in sorted((folder / "features").iterdir())]
    for name, row in rows.items():
        assert row["tests"] == again[name]["tests"] and (row["tests"] == paper[name]["tests"]) == (name != "NMTune")


@pytest.mark.slow
def test_kept_features_belong_to_one_checkpoint_and_one_set(folder, capsys, tmp_path):
    state = torch.load(folder / "clip/last.pt", weights_only=True)
    state["model"]["visual.proj"].mul_(2)
    (tmp_path / "clip").mkdir()
    torch.save(state, tmp_path / "clip/last.pt")
    for _ in range(2):
        _, rows = run(folder, capsys)
        _, twice = run(tmp_path, capsys, "--out", folder / "features")
    for one, two in zip(rows["zero-shot"]["tests"], twice["zero-shot"]["tests"]):  # lengths do not matter to it
        assert all(one[key] == pytest.approx(two[key]) for key in ("top1", "sve", "lsvr"))
    sizes = {float(torch.load(path, weights_only=True)["x"].norm()) for path in (folder / "features").iterdir()}
    assert len(sizes) == len(list((folder / "features").iterdir())) >= 6
    a = write_set(tmp_path / "a", KEYS)
    run(tmp_path, capsys, "--train", f"{a}@/ann", "--test", f"{a}@/bob", "--ood", f"{a}@/eve")
    before = len(list((tmp_path / "features").iterdir()))
    (a / "0.tar").unlink()
    (a / "classnames.txt").unlink()
    a.rmdir()
    write_set(a, KEYS[1:])  # another set under the same name
    run(tmp_path, capsys, "--train", f"{a}@/ann", "--test", f"{a}@/bob", "--ood", f"{a}@/eve")
    assert len(list((tmp_path / "features").iterdir())) == before + 3


@pytest.mark.slow
def test_domains_by_keys(folder, capsys, tmp_path):
    """One set parted by SET@PATTERN; broken pictures are left out of all views; other classes are left out too."""
    a = write_set(tmp_path / "a", KEYS, broken=("ann_2", "bob_7"))
    other = write_set(tmp_path / "other", KEYS[:6], ("blue", "red", "mauve"))
    text, rows = run(folder, capsys, "--train", f"{a}@/(ann|bob)_[0-5]", "--test", f"{a}@/(ann|bob)_[67]", "--ood",
                     f"{a}@eve,{other}", "--epochs", 40)
    assert [test["n"] for test in rows["MLP"]["tests"]] == [3, 8, 4]
    assert f"training: {a}@/(ann|bob)_[0-5], 11 pictures (left out: 1 unreadable, 0 of" in text
    assert f"{other}, 4 pictures (left out: 0 unreadable, 2 of other classes)" in text
    assert rows["MLP"]["tests"][1]["top1"] == rows["NMTune"]["tests"][1]["top1"] == 1
    assert rows["MLP"]["tests"][2]["per_class"] == [0, None, 0]  # its "blue" are red: names count, not numbers


@pytest.mark.slow
def test_folders_of_classes(folder, capsys, tmp_path):
    for artist in ("ann", "bob"):
        for number, color in enumerate(("red", "green")):
            (tmp_path / artist / color).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (30, 30), color).save(tmp_path / artist / color / f"{i}.png")
    text, rows = run(folder, capsys, "--train", f"{tmp_path / 'ann'}@[01].png", "--test", f"{tmp_path / 'ann'}@2.png",
                     "--ood", tmp_path / "bob")
    assert ", 4 pictures" in text and [test["n"] for test in rows["NMTune"]["tests"]] == [2, 6]
    text, rows = run(folder, capsys, "--train", tmp_path / "ann", "--test", tmp_path / "bob", "--limit", "2")
    assert None not in rows["NMTune"]["tests"][0]["per_class"]  # not the first two pictures, which have one class


@pytest.mark.slow
@pytest.mark.parametrize("arguments, sentence", [
    ([], "checkpoint, or --swap"),
    (["--swap", "1.5"], "from 0 to 1"),
    (["--swap", ".1", "--data", "nowhere.tsv"], "nowhere.tsv"),
    (["none.pt"], "no checkpoint none.pt"),
    (["CHECKPOINT", "--views", "0"], "begin at 1"),
    (["CHECKPOINT", "--limit", "0"], "begin at 1"),
    (["CHECKPOINT", "--classnames", "nowhere.txt"], "--classnames"),
    (["CHECKPOINT", "--json", "nowhere/table.json"], "--json nowhere"),
    (["CHECKPOINT", "--train", "SET@/ann", "--test", "SET"], "pictures that --train has too"),
    (["CHECKPOINT", "--train", "SET", "--test", "SET"], "pictures that --train has too"),
    (["CHECKPOINT", "--train", "SET@(", "--test", "SET"], "no regular expression"),
    (["CHECKPOINT", "--train", "SET@ann_3", "--test", "SET@/bob"], "no readable picture"),
    (["CHECKPOINT", "--train", "SET@zoe", "--test", "SET"], "example, 0/ann_0"),
    (["CHECKPOINT", "--train", "SET@/ann", "--test", "toy"], "no picture of a class of"),
    (["CHECKPOINT", "--train", "SET@/ann", "--test", "SET@/bob", "--ood", "nowhere"], "no test set nowhere"),
    (["CHECKPOINT", "--train", "SET@/ann", "--test", "SET@/bob", "--ood", "toy-seen,"], "without a name"),
    (["NAN"], "not finite"),
])
def test_a_sentence_for_each_mistake(folder, tmp_path, capsys, arguments, sentence):
    a = write_set(tmp_path / "a", KEYS, broken=("ann_3",))
    state = torch.load(folder / "clip/last.pt", weights_only=True)
    state["model"]["visual.proj"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    known = {"CHECKPOINT": str(folder / "clip/last.pt"), "NAN": str(tmp_path / "nan.pt")}
    arguments = [known.get(argument, argument.replace("SET", str(a))) for argument in arguments]
    if arguments:
        arguments = ["--workers", "0", "--limit", "30", "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit) as error:
        nmtune.main(arguments)
    assert sentence in (str(error.value) + capsys.readouterr().err)
