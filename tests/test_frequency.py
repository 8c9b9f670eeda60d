"""frequency.py: closed forms, slow references, invariances, edge cases, the command line on a trained checkpoint."""
import csv
import json
import math
import random
import runpy
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

import clip
import data
import eval as evaluator
import frequency
from conftest import ROOT

BORROW = {  # how somebody who copied a part would call it; tests/test_house.py does
    "words": lambda f: f("a red circle"),
    "count": lambda f: f(["a red circle"], ["circle"]),
    "binned": lambda f: f([1, 10, 100], [1., 2., 3.]),
    "pearson": lambda f: f([1., 2., 3.], [1., 2., 4.]),
}



def captions_and_names(seed=0):
    """Captions of few different words, so that names of several words occur, and names that some of them hold."""
    rng = random.Random(seed)
    vocabulary = ["dog", "polar", "bear", "737", "200", "boeing", "a", "red", "car", "tree"]
    captions = [rng.choice([" ", "-", ", ", "_"]).join(rng.choices(vocabulary, k=rng.randint(0, 7)))
                for _ in range(500)]
    captions = [rng.choice([caption, caption.upper(), caption.title()]) for caption in captions]
    names = [" ".join(rng.sample(vocabulary, rng.randint(1, 4))) for _ in range(60)]
    return captions, names + ["unicorn", "polar unicorn"]


def slow_mentions(caption, name):
    """Whether each word of the name stands in the caption, letter by letter and without regular expressions."""
    def split(text):
        return "".join(c if c in "abcdefghijklmnopqrstuvwxyz0123456789" else " " for c in text.lower()).split()
    return bool(split(name)) and all(word in split(caption) for word in split(name))


# counts

def test_words():
    assert frequency.words("Boeing_737-200!") == frequency.words("boeing 737 200") == ["boeing", "737", "200"]
    assert frequency.words("") == frequency.words("♪ 〒 — '") == []
    assert frequency.words("It's a café") == ["it", "s", "a", "caf"]


def test_count_is_a_slow_count():
    captions, names = captions_and_names()
    counts = frequency.count(captions, names)
    assert counts.dtype == np.int64
    assert counts.tolist() == [sum(slow_mentions(caption, name) for caption in captions) for name in names]
    assert 0 < (counts > 0).sum() < len(names)


def test_count_invariances():
    captions, names = captions_and_names(1)
    counts = frequency.count(captions, names)
    assert (frequency.count(captions[::-1], names) == counts).all()  # no order
    parts = [frequency.count(captions[:123], names), frequency.count(captions[123:], names)]
    assert (sum(parts) == counts).all()  # shards add up
    assert (frequency.count(iter(captions), names[::-1])[::-1] == counts).all()
    assert (frequency.count([f"{caption} {caption}" for caption in captions], names) == counts).all()  # once a caption
    assert (frequency.count(captions, [name.upper().replace(" ", "_") for name in names]) == counts).all()
    assert (frequency.count(captions, [f"{name} dog" for name in names]) <= counts).all()  # more words, fewer captions
    for name, number in zip(names, counts):
        assert number <= min(frequency.count(captions, name.split()))


@pytest.mark.parametrize("captions, name, number", [
    (["a polar bear", "a bear", "polar night, a bear", "polarbear"], "polar bear", 2),  # the released code: 3
    (["a dog", "a unicorn"], "dog unicorn", 0),
    (["Austria in winter", "austria"], "Austria", 2),  # the released code: 1
    (["Boeing 737-200", "boeing 737"], "Boeing_737-200", 1),  # the released code: 0
    (["a crane", "a bird", "a crane, a bird", "a kite"], "crane, bird", 3),
    (["a cat", "my kitten", "a catkin"], "cat|kitten", 2),
    (["flag of Burma", "myanmar"], "flag: Myanmar (Burma)", 1),
    (["", "  ", "a b"], "b a", 1),
    (["♪", "!", ""], "♪", 0),  # no word: in no caption, not in all
    ([], "dog", 0),
])
def test_count_by_hand(captions, name, number):
    assert frequency.count(captions, [name]).tolist() == [number]
    assert frequency.count(captions, []).tolist() == []


def test_integrated_is_a_slow_intersection():
    captions, names = captions_and_names(2)
    rng = random.Random(0)
    pictures = [set(rng.sample(range(len(names)), rng.choice([0, 1, 3]))) for _ in captions]
    said = [{i for i, name in enumerate(names) if slow_mentions(caption, name)} for caption in captions]
    counts, both, misaligned = frequency.integrated(captions, pictures, names)
    assert counts.tolist() == [sum(i in s and i in p for s, p in zip(said, pictures)) for i in range(len(names))]
    assert both == sum(len(s) > 0 and len(p) > 0 for s, p in zip(said, pictures))
    assert misaligned == sum(len(s) > 0 and len(p) > 0 and s.isdisjoint(p) for s, p in zip(said, pictures))
    assert 0 < misaligned < both < len(captions)
    everything = [set(range(len(names)))] * len(captions)  # a tagger that sees everything leaves the counts of text
    counts, both, misaligned = frequency.integrated(captions, everything, names)
    assert (counts == frequency.count(captions, names)).all() and misaligned == 0 and both == sum(map(bool, said))


# trend

def slow_binned(count, acc, bins):
    """One concept at a time, edges by hand."""
    log = [math.log(max(n, 1)) for n in count]
    edges = [min(log) + i * (max(log) - min(log)) / (bins - 1) for i in range(bins)]
    groups = [[] for _ in edges]
    for x, a in zip(log, acc):
        groups[next((i for i, edge in enumerate(edges) if x <= edge), bins - 1)].append(a)
    return edges, [sum(g) / len(g) if g else None for g in groups], [len(g) for g in groups]


@pytest.mark.parametrize("bins", [12, 5])
def test_binned_is_a_slow_loop(bins):
    rng = random.Random(0)
    count = [0, 1, 0, 1] + [int(10 ** rng.uniform(.4, 4.7)) for _ in range(40)]
    acc = [rng.uniform(0, 100) for _ in count]
    edges, means, numbers = slow_binned(count, acc, bins)
    x, mean, n = frequency.binned(np.array(count), np.array(acc), bins)
    assert x == pytest.approx(edges, abs=1e-12) and n.tolist() == numbers
    assert x.shape == mean.shape == n.shape == (bins,)
    assert [None if math.isnan(value) else pytest.approx(value, abs=1e-12) for value in mean] == means
    assert n[0] == 4 and x[0] == 0  # only 0 and 1, which are the same
    assert sum(n) == len(count)


def test_binned_edge_cases():
    x, mean, n = frequency.binned([7, 7, 7], [1, 2, 6])  # the released code raises
    assert n.tolist() == [3] + 11 * [0] and mean[0] == 3 and np.isnan(mean[1:]).all() and (x == math.log(7)).all()
    x, mean, n = frequency.binned([0], [50])
    assert n.tolist() == [1] + 11 * [0] and mean[0] == 50 and x[0] == 0
    x, mean, n = frequency.binned([1, 10 ** 6], [10, 90])
    assert n.tolist() == [1] + 10 * [0] + [1] and mean[11] == 90 and x[11] == pytest.approx(6 * math.log(10))


@pytest.mark.parametrize("n, p_of", [
    (3, lambda r: 1 - 2 * math.asin(r) / math.pi),
    (4, lambda r: 1 - r),
    (5, lambda r: 1 - 2 / math.pi * (r * math.sqrt(1 - r * r) + math.asin(r))),
    (6, lambda r: 1 - (3 * r - r ** 3) / 2),
    (8, lambda r: 1 - (15 * r - 10 * r ** 3 + 3 * r ** 5) / 8)])
def test_p_in_closed_form(n, p_of):
    """The density of r integrates in closed form for few points."""
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = rng.normal(size=(2, n))
        r, p = frequency.pearson(x, y)
        assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
        assert p == pytest.approx(p_of(abs(r)), rel=1e-8)
        assert frequency.pearson(y, -3 * x + 1) == pytest.approx((-r, p), rel=1e-8)


SCIPY = [  # n, step, and scipy.stats.pearsonr(k, sin(k * step) + k / n) of k = 0 .. n-1 by scipy 1.17.1
    (3, 2., -0.06050863274176703, 0.9614554630678804), (5, 1., -0.0575056188997878, 0.9268219463034142),
    (10, 1.3, 0.060759345143167304, 0.8675785141418506), (10, .3, 0.8479719986491859, 0.0019371341579824744),
    (50, .7, 0.3850417642588751, 0.005760140820038521), (400, 1.1, 0.36969402298787185, 2.118837657287674e-14),
    (400, .01, -0.052704358126505715, 0.29302012581761194), (4469, .9, 0.37709087305616884, 5.252899035509963e-151),
    (4469, .002, 0.38251796312367686, 1.0998185072580446e-155)]


@pytest.mark.parametrize("n, step, r, p", SCIPY)
def test_p_is_that_of_scipy(n, step, r, p):
    k = np.arange(n)
    assert frequency.pearson(k, np.sin(k * step) + k / n) == (pytest.approx(r, rel=1e-10), pytest.approx(p, rel=1e-6))


def test_pearson_edge_cases():
    assert np.isnan(frequency.pearson([], [])).all() and np.isnan(frequency.pearson([1], [2])).all()
    assert np.isnan(frequency.pearson([3, 3, 3], [1, 2, 4])).all()
    assert np.isnan(frequency.pearson([1, 2, 4], [.1, .1, .1])).all()
    assert frequency.pearson([1, 2], [5, 3]) == (pytest.approx(-1), 1)
    assert frequency.pearson([1, 2, 3], [10, 20, 30]) == pytest.approx((1, 0), abs=1e-7)


def test_planted_slope_is_found_and_shuffled_counts_have_none():
    rng = np.random.default_rng(0)
    count = (10 ** rng.uniform(0, 4, 300)).astype(int)
    slope, r, p, n = frequency.trend(np.log(count), 5 + 7.5 * np.log10(count))
    assert slope == pytest.approx(7.5, abs=1e-9) and r == pytest.approx(1, abs=1e-12) and p < 1e-100 and n == 300
    acc = 5 + 7.5 * np.log10(count) + rng.normal(0, 10, 300)
    slope, r, p, n = frequency.trend(np.log(count), acc)
    assert abs(slope - 7.5) < 2 and p < 1e-10
    x, mean, _ = frequency.binned(count, acc)
    assert frequency.trend(x[1:-1], mean[1:-1])[1] > r  # bins average the noise away
    shuffled = [frequency.trend(np.log(rng.permutation(count)), acc) for _ in range(400)]
    slopes = np.array([slope for slope, *_ in shuffled])
    assert abs(slopes.mean()) < 4 * slopes.std() / 20 and slopes.std() < 1.5
    ps = np.array([p for _, _, p, _ in shuffled])
    assert .02 < (ps < .05).mean() < .09 and .4 < ps.mean() < .6


def test_trend_skips_empty_bins():
    x, y = np.log([1., 10., 100., 1000.]), np.array([1., math.nan, 5., 7.])
    assert frequency.trend(x, y) == (pytest.approx(2), pytest.approx(1), pytest.approx(0, abs=1e-6), 3)
    slope, r, p, n = frequency.trend(x[:0], y[:0])
    assert n == 0 and math.isnan(slope) and math.isnan(r) and math.isnan(p)


def rows(counts, accuracies, checkpoint="runs/a"):
    return [frequency.Row(checkpoint, "test", "a name", n, None, a) for n, a in zip(counts, accuracies)]


def test_table_by_hand():
    mine = rows([0, 0, 1, 9, 10, 99, 100], [0, 2, 10, 20, 30, 40, 50]) + rows([0], [7], "runs/b")
    lines = list(frequency.table(mine, "count"))
    found = {line[:15].strip(): line[15:] for line in lines[1:]}
    assert [found[label].split()[:2] for label in ("all", "0", "1-9", "10-99", "100-999")] == [
        ["21.7", "(7)"], ["1.0", "(2)"], ["15.0", "(2)"], ["35.0", "(2)"], ["50.0", "(1)"]]
    assert found["1-9"].split()[-1] == "-" and found["never mentioned"].split() == ["29", "%", "100", "%"]
    assert lines[-1].startswith("nan:")  # runs/b has one concept, never mentioned


# command line

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two steps, tested on a folder of 40 of the toy's kinds; and that folder."""
    folder = tmp_path_factory.mktemp("frequency")
    scenes = data.ToyDataset(400, None)
    for i in range(400):
        kind = scenes.classnames[scenes.label(i)]
        if i < 100 or kind.startswith("red"):
            (folder / "kinds" / "val" / kind).mkdir(parents=True, exist_ok=True)
            (folder / "kinds" / "val" / kind / f"{i}.jpg").write_bytes(scenes.image(i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        clip.main(["--limit", "256", "--epochs", "1", "--warmup", "1", "--recipe", "toy", "--batch-size", "128",
                   "--workers", "0", "--eval", str(folder / "kinds" / "val"), "--out", str(folder / "run")])
    return str(folder / "run" / "last.pt"), str(folder / "kinds" / "val")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *argv):
    frequency.main([str(a) for a in argv])
    return capsys.readouterr().out


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_command_line(trained, tmp_path, capsys, monkeypatch):
    """Data, limit and test from the checkpoint; counts and accuracies of the functions; the cache."""
    checkpoint, test = trained
    out = run(capsys, checkpoint, "--csv", tmp_path / "a.csv")
    assert "slope by concept" in out and "slope by bin" in out and "never mentioned" in out and "256 pairs" in out
    names = evaluator.open_test(test).classnames
    found = read_csv(tmp_path / "a.csv")
    toy = data.open_dataset("toy", None, 256)
    captions = [caption for i in range(256) for caption in toy.captions(i)]
    assert [row["concept"] for row in found] == names and {row["test"] for row in found} == {test}
    assert [int(row["count"]) for row in found] == frequency.count(captions, names).tolist()
    result, = evaluator.evaluate(*evaluator.load(checkpoint), [test]).values()
    assert [float(row["accuracy"]) for row in found] == pytest.approx([100 * a for a in result["per_class"]])
    monkeypatch.setattr(frequency, "count_pairs", None)
    assert run(capsys, checkpoint, "--csv", tmp_path / "b.csv") == out
    assert read_csv(tmp_path / "b.csv") == found

    monkeypatch.setattr(evaluator, "evaluate", None)  # accuracies from what eval.py writes of one checkpoint or several
    (tmp_path / "one.json").write_text(json.dumps({"kinds": result}))
    (tmp_path / "two.json").write_text(json.dumps({"elsewhere.pt": {}, checkpoint: {"kinds": result}}))
    for name in ("one.json", "two.json"):
        assert run(capsys, checkpoint, "--json", tmp_path / name, "--csv", tmp_path / "b.csv") == out
        assert read_csv(tmp_path / "b.csv") == found


@pytest.mark.slow
def test_subset_limit_and_counts(trained, tmp_path, capsys):
    checkpoint, test = trained
    names = evaluator.open_test(test).classnames
    (tmp_path / "a.json").write_text(json.dumps({"kinds": {"per_class": [.5] * len(names)}}))
    common = [checkpoint, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"]
    toy = data.open_dataset("toy", None, 256)

    def counts(*argv):
        run(capsys, *common, *argv)
        return [int(row["count"]) for row in read_csv(tmp_path / "a.csv")]

    whole = counts()
    (tmp_path / "all.txt").write_text("".join(f"{toy.key(i)}\n" for i in range(256)))
    (tmp_path / "even.txt").write_text("".join(f"{toy.key(i)}\n" for i in range(0, 256, 2)))
    assert counts("--subset", tmp_path / "all.txt") == whole
    part = counts("--subset", tmp_path / "even.txt")
    assert all(a <= b for a, b in zip(part, whole)) and 0 < sum(part) < sum(whole)
    assert sum(counts("--data", "toy")) > sum(whole)  # all pairs, without the run's --limit
    assert counts("--counts", tmp_path / "counts.json") == whole  # written
    stored = json.loads((tmp_path / "counts.json").read_text())
    (tmp_path / "counts.json").write_text(json.dumps({name: 3 for name in stored}))
    assert counts("--counts", tmp_path / "counts.json", "--data", "nowhere") == [3] * len(whole)  # read, without data
    assert "nan: a slope" in run(capsys, *common, "--counts", tmp_path / "counts.json")


@pytest.mark.slow
def test_two_checkpoints_with_different_tests(trained, tmp_path, capsys, monkeypatch):
    """A table by test, with the checkpoints that have it, and one of all tests; a name without letters; a picture."""
    checkpoint, test = trained
    other = tmp_path / "other"
    for name in ("red circle", "日本", "a green box"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / name / "a.png")
    state = clip.load_checkpoint(checkpoint)
    state["flags"]["eval"] = f"{test},{other}"
    clip.save_checkpoint(tmp_path / "best.pt", **state)
    out = run(capsys, checkpoint, tmp_path / "best.pt", "--csv", tmp_path / "a.csv")
    assert out.count("slope by concept") >= 3 and "all tests" in out and "'日本' holds no letter" in out
    found = read_csv(tmp_path / "a.csv")
    assert [row["count"] for row in found if row["concept"] == "日本"] == ["0"]
    assert {row["checkpoint"] for row in found if row["test"] == str(other)} == {str(tmp_path / "best.pt")}
    assert len({row["checkpoint"] for row in found if row["test"] == test}) == 2
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "a.csv"), test])
    runpy.run_path(str(ROOT / "tests" / "curves.py"), run_name="__main__")
    lines = ElementTree.fromstring(capsys.readouterr().out).findall("{http://www.w3.org/2000/svg}polyline")
    mine = [(int(row["count"]), float(row["accuracy"])) for row in found
            if row["test"] == test and row["checkpoint"] in checkpoint]
    points = sum(n > 0 for n in frequency.binned(*zip(*mine))[2])
    assert [len(line.get("points").split()) for line in lines] == [points, points] and points > 1


@pytest.mark.slow
def test_tags(trained, tmp_path, capsys):
    """Tags of a file: the toy's own kinds for the first half, a wrong one for the rest."""
    checkpoint, test = trained
    names = evaluator.open_test(test).classnames
    toy = data.open_dataset("toy", None, 256)
    tags = {toy.key(i): [toy.classnames[toy.label(i)], "blue whale"] for i in range(128)}
    tags |= {toy.key(i): ["no such thing"] for i in range(128, 256)}
    tags[toy.key(200)] = [name for name in names if name not in toy.captions(200)[0]]
    (tmp_path / "tags.txt").write_text("".join(f"{key}\t{kind}\n" for key, kinds in tags.items() for kind in kinds))
    (tmp_path / "a.json").write_text(json.dumps({"kinds": {"per_class": [.5] * len(names)}}))
    out = run(capsys, checkpoint, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv",
              "--tags", tmp_path / "tags.txt")
    shown = [{names.index(kind) for kind in tags[toy.key(i)] if kind in names} for i in range(256)]
    counts, both, misaligned = frequency.integrated([toy.captions(i)[0] for i in range(256)], shown, names)
    assert [int(row["integrated"]) for row in read_csv(tmp_path / "a.csv")] == counts.tolist()
    assert 0 < misaligned < both and counts.sum() > 5
    assert f"in {both} caption and picture have a concept, and in {misaligned} of these none in common" in out
    assert out.count("slope by concept") == 2 and "agree on the concept" in out


def test_misaligned_share_of_the_toy_is_the_generators():
    """Where no scene has a second object, misaligned are the pairs with the caption of a picture of another kind."""
    toy = data.ToyDataset(6000, None)
    names = toy.classnames
    alone = [i for i in range(5999) if len(toy.tags(i)[0]) == len(toy.tags(i + 1)[0]) == 1]
    captions, kinds = [toy.captions(i)[0] for i in alone], [toy.tags(i)[0][0] for i in alone]
    said = list(frequency.mentions(captions, names))
    wrong = sum(bool(s) and toy.tags(i)[1] and toy.tags(i + 1)[0][0] != kind
                for s, i, kind in zip(said, alone, kinds))
    counts, both, misaligned = frequency.integrated(captions, [{names.index(kind)} for kind in kinds], names)
    assert misaligned == wrong and both == sum(map(bool, said)) == counts.sum() + wrong
    tags = [f"{toy.key(i)}\t{kind}" for i in range(6000) for kind in toy.tags(i)[0]]
    found = frequency.count_pairs(toy, names, tags)
    share = float(found["about"].split("(")[1].split()[0])
    assert abs(share - 100 * data.TOY["mismatch"]) < 4, found["about"]  # of some 700 pairs that name a kind


@pytest.mark.slow
def test_let_it_wag(trained, tmp_path, capsys):
    for i in range(290):
        (tmp_path / "wag" / f"thing_{i}").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "wag" / f"thing_{i}" / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"wag": {"per_class": [.25] * 289 + [None]}}))
    out = run(capsys, trained[0], "--json", tmp_path / "a.json", "--eval", tmp_path / "wag")
    assert "37.9 / 19.3" in out and "25.0 (289)" in out and "100 %" in out and "nan: a slope" in out


@pytest.mark.slow
@pytest.mark.parametrize("argv, sentence", [
    (["nowhere.pt"], "there is no checkpoint nowhere.pt"),
    (["RUN", "RUN"], "each checkpoint once"),
    (["RUN", "--json", "a.json", "b.json"], "one file or as many"),
    (["RUN", "--json", "nowhere.json"], "--json nowhere.json has no results"),
    (["RUN", "--json", "FEW"], "but results of 2"),
    (["RUN", "--json", "EMPTY"], "has no results by eval.py"),
    (["RUN", "COPY", "--json", "FEW"], "has no results by eval.py"),
    (["RUN", "--counts", "EMPTY"], "has no number for each concept"),
    (["RUN", "--counts", "no/such/folder.json"], "cannot be written"),
    (["RUN", "--csv", "."], "cannot be written"),
    (["RUN", "--tags", "nowhere.txt"], "nowhere.txt"),
    (["RUN", "--subset", "nowhere.txt"], "nowhere.txt"),
    (["RUN", "--data", "nowhere"], "nowhere"),
    (["RUN", "--eval", "nowhere"], "there is no test set nowhere"),
    (["UNTESTED"], "was trained without tests"),
    (["FOREIGN", "--eval", "TEST"], "does not say what it was trained on"),
    (["RUN", "FOREIGN", "--eval", "TEST", "--counts", "new.json"], "give --data too"),
])
def test_mistakes_end_in_a_sentence(trained, tmp_path, monkeypatch, argv, sentence):
    checkpoint, test = trained
    monkeypatch.chdir(tmp_path)
    state = clip.load_checkpoint(checkpoint)
    clip.save_checkpoint("untested.pt", **{**state, "flags": {**state["flags"], "eval": ""}})
    clip.save_checkpoint("foreign.pt", **{key: value for key, value in state.items() if key != "flags"})
    clip.save_checkpoint("copy.pt", **state)
    (tmp_path / "few.json").write_text('{"kinds": {"per_class": [0.5, 0.5]}}')
    (tmp_path / "empty.json").write_text("{}")
    places = {"RUN": checkpoint, "TEST": test, "UNTESTED": "untested.pt", "FOREIGN": "foreign.pt", "COPY": "copy.pt",
              "FEW": "few.json", "EMPTY": "empty.json"}
    with pytest.raises(SystemExit, match=r"[\w ]{8}") as caught:
        frequency.main([places.get(a, a) for a in argv])
    assert sentence in str(caught.value)
