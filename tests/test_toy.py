"""The built-in data: training pairs stay what they were, held-out kinds stay held out, variants are what they say."""
import hashlib
import pickle
import time
from collections import Counter

import numpy as np
import pytest

import data
import eval as evaluator


def words_of_kinds():
    return {word: name for names in (data.COLORS, data.SHAPES) for name, (_, *others) in names.items()
            for word in (name, *others)}


def test_it_is_a_function_of_variant_split_seed_and_number():
    a, b = data.ToyDataset(50, None), data.ToyDataset(5000, None)
    assert [(a.key(i), a.image(i), a.captions(i), a.label(i)) for i in range(50)] == \
        [(b.key(i), b.image(i), b.captions(i), b.label(i)) for i in range(50)]
    others = [data.ToyDataset(50, None, **other) for other in ({"split": "test"}, {"seed": 1}, {"variant": "toy-busy"})]
    assert len({x.image(i) for x in (a, *others) for i in range(50)}) == 200
    assert data.decode(a.image(0)).size == (data.TOY["side"],) * 2


def test_training_pairs_are_those_that_published_numbers_were_measured_on():
    toy = data.open_dataset("toy", None)
    assert len(toy) == 1024 and len(data.open_dataset("toy", None, 24_576)) == 24_576
    digest = hashlib.sha256("\n".join(toy.captions(i)[0] for i in range(1024)).encode()).hexdigest()
    assert digest == "17c790d128283ee872553c629a3469363ff68e821887795e17107fd329c7de6d"
    means = np.array([np.asarray(data.decode(toy.image(i))).mean((0, 1)) for i in range(3)])  # decoders differ a bit
    assert np.abs(means - [[87.8, 63.3, 57.9], [42.1, 67.5, 105.4], [101.2, 52.9, 79.2]]).max() < 1


def test_a_picture_is_drawn_once(monkeypatch):
    first = data.ToyDataset(4, None, seed=77)
    pictures = [first.image(i) for i in range(4)]
    monkeypatch.setattr(data, "toy_scene", None)  # drawing would fail
    again = pickle.loads(pickle.dumps(data.ToyDataset(4, None, seed=77)))
    assert [again.image(i) for i in range(4)] == pictures


def test_halves_of_what_is_held_out_are_balanced():
    reported, tuned = data.SPLITS["test"], data.SPLITS["tune"]
    assert len(data.HELD_OUT) == 16 and sorted(reported + tuned) == sorted(data.HELD_OUT) and len(data.TRAINED) == 48
    for half in (reported, tuned):
        for part in (0, 1):
            assert sorted(Counter(kind[part] for kind in half).values()) == [2, 2, 2, 2]
    for part in (0, 1):  # every colour and every shape is learnt, from several kinds
        assert min(Counter(kind[part] for kind in data.TRAINED).values()) >= 4


@pytest.mark.parametrize("variant", data.TOYS)
def test_training_never_shows_nor_names_what_is_held_out(variant):
    dataset, words = data.open_dataset(variant, None, 6000), words_of_kinds()
    for i in range(len(dataset)):
        assert data.KINDS[dataset.label(i)] in data.TRAINED
        for text in dataset.captions(i):
            named = {words[word] for word in text.split() if word in words}
            assert not any({color, shape} <= named for color, shape in data.HELD_OUT), text


@pytest.mark.parametrize("variant", data.TOYS)
@pytest.mark.parametrize("ending, split", (("", "test"), ("-tune", "tune"), ("-seen", "train")))
def test_test_sets(variant, ending, split):
    test, other = (evaluator.open_test(variant + ending, which) for which in ("test", "train"))
    for dataset in (test, other):
        shown = Counter(data.KINDS[dataset.label(i)] for i in range(len(dataset)))
        assert {*shown} == {*data.SPLITS[split]} and min(shown.values()) > .5 * len(dataset) / len(shown)
    assert not {test.image(i) for i in range(50)} & {other.image(i) for i in range(50)}
    assert len(test.classnames) == 64 == len({*test.classnames})
    for i in range(400):
        kinds, elsewhere = test.tags(i)
        assert kinds[0] == test.classnames[test.label(i)] and kinds[0] in test.captions(i)[0] and not elsewhere
    assert len({test.captions(i)[0] for i in range(400)}) >= 32  # retrieval can tell them apart


def test_busy_pictures_are_the_same_scenes_drawn_small_on_a_busy_ground():
    plain, busy = (data.open_dataset(name, None, 300) for name in ("toy", "toy-busy"))
    assert [plain.captions(i) for i in range(300)] == [busy.captions(i) for i in range(300)]
    assert [plain.label(i) for i in range(300)] == [busy.label(i) for i in range(300)]
    small, large = (np.array([data.toy_scene(*x.source, i)["radius"] for i in range(300)]) for x in (busy, plain))
    assert np.allclose(small / large, .5)

    def ground(dataset):
        """Mean variation of a corner, where the main object rarely is."""
        corners = [np.asarray(data.decode(dataset.image(i)), float)[:8, :8] for i in range(300)]
        return np.mean([corner.std((0, 1)).mean() for corner in corners])

    assert ground(busy) > 1.5 * ground(plain)


def test_kinds_follow_zipfs_law():
    zipf, toy = (data.open_dataset(name, None, 20_000) for name in ("toy-zipf", "toy"))
    counts = sorted(Counter(zipf.label(i) for i in range(20_000)).values(), reverse=True)
    expected = 1 / np.arange(1, 49)
    error = np.abs(counts / (20_000 * expected / expected.sum()) - 1)
    assert len(counts) == 48 and error.max() < .3 and error[:8].max() < .1
    scenes = [[data.toy_scene(*dataset.source, i) for i in range(500)] for dataset in (zipf, toy)]
    for name in ("x", "y", "radius"):  # places are as in toy
        assert [scene[name] for scene in scenes[0]] == [scene[name] for scene in scenes[1]]
    assert all(scene["other"] in data.BESIDE[scene["kind"]] for scene in scenes[0] if scene["other"])


def test_captions_are_noisy():
    """About a tenth speak of another picture, and tags say which; attributes are missing; synonyms occur."""
    dataset, words = data.ToyDataset(4000, None), words_of_kinds()
    stated = wrong = plain = elsewhere = 0
    for i in range(len(dataset)):
        (kind, *_), mismatch = dataset.tags(i)
        found = [word for word in dataset.captions(i)[0].split(" with a ")[0].split() if words.get(word) in data.COLORS]
        elsewhere += mismatch
        stated += bool(found)
        if found:
            plain += found[0] in data.COLORS
            other = words[found[0]] not in kind.split()
            wrong += other
            assert mismatch or not other  # only a caption of another picture has another colour
    toy = data.TOY
    for share, expected in ((stated / 4000, toy["color"]), (plain / stated, 1 - toy["synonym"]),
                            (elsewhere / 4000, toy["mismatch"]),
                            (wrong / stated, toy["mismatch"] * 7 / 8)):  # another picture may have the same colour
        assert abs(share - expected) < .03
    assert .05 < toy["mismatch"] < .15 and toy["color"] < 1 > toy["shape"]


def test_variants_have_the_tokenizer_of_toy():
    assert data.find_tokenizer(None, "toy-busy").merges == data.find_tokenizer(None, "toy").merges


def test_drawing_is_quick():
    dataset = data.ToyDataset(200, None, seed=5)
    start = time.process_time()
    for i in range(200):
        dataset.image(i), dataset.captions(i)
    assert (time.process_time() - start) / 200 < 3e-3  # some .2 ms; slow machines allowed for
