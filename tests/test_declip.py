"""declip.py: each loss against its definition, the queue, the views, W ranks against one process, resume."""
import json
import math
import os
import random
import re
from collections import Counter, deque
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import clip
import data
import declip
import eval as evaluator
from ranks import spawn
from test_clip import RESNET, SMALL, captions, losses, slow_clip_loss, unit

VOCAB, MASK = 41, 40  # captions() makes words below 38, start 38, end 39
SIZES = SMALL | dict(vocab=VOCAB)


def views(B=5, D=8, seed=0):
    return unit(2, B, D, seed=seed).requires_grad_(), unit(2, B, D, seed=seed + 1).requires_grad_()


def same_gradients(a, b, inputs, tolerance=1e-12):
    """Two scalars and their gradients are equal."""
    assert abs(a - b) < tolerance
    for x, y in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (a, b))):
        assert (x - y).abs().max() < tolerance


# the losses

def test_multi_view_clip_loss_is_the_mean_of_four():
    (x, y), s = views(), torch.tensor(9., dtype=torch.float64, requires_grad=True)
    slow = sum(slow_clip_loss(x[k], y[v], s) for k in (0, 1) for v in (0, 1)) / 4
    same_gradients(declip.multi_view_clip_loss(x, y, s), slow, (x, y, s))
    twice = x[:1].expand(2, -1, -1), y[:1].expand(2, -1, -1)
    assert abs(declip.multi_view_clip_loss(*twice, s) - clip.clip_loss(x[0], y[0], s)) < 1e-12
    same = unit(1, 1, 6).expand(2, 5, 6)
    assert declip.multi_view_clip_loss(same, same, 20.).item() == pytest.approx(math.log(5), abs=1e-12)


def slow_nearest_neighbor_loss(x, n, s):
    total = 0.
    for k in (0, 1):
        for v in (0, 1):
            for i in range(x.shape[1]):
                scores = torch.stack([s * (x[k, i] * n[v, j]).sum() for j in range(x.shape[1])])
                total = total + scores.logsumexp(0) - scores[i]
    return total / (4 * x.shape[1])


def test_nearest_neighbor_loss_is_its_definition():
    (x, n), s = views(), torch.tensor(9., dtype=torch.float64, requires_grad=True)
    loss = declip.nearest_neighbor_loss(x, n, s)
    same_gradients(loss, slow_nearest_neighbor_loss(x, n, s), (x, s))
    assert torch.autograd.grad(declip.nearest_neighbor_loss(x, n, s), n, allow_unused=True) == (None,)
    same = unit(1, 1, 6).expand(2, 5, 6)
    assert declip.nearest_neighbor_loss(same, same, 20.).item() == pytest.approx(math.log(5), abs=1e-12)


def test_neighbors_that_are_the_captions_give_the_image_half_of_clip():
    x, y = (f.detach() for f in views(B=6))
    queue = declip.FeatureQueue(12, 8)
    queue.enqueue(y[1])
    queue.enqueue(y[0])
    neighbors = queue.nearest(y.flatten(0, 1)).unflatten(0, (2, -1))
    assert neighbors.dtype == torch.float64 and torch.equal(neighbors, y)
    half = sum(F.cross_entropy(7. * x[k] @ y[v].T, torch.arange(6)) for k in (0, 1) for v in (0, 1)) / 4
    assert abs(declip.nearest_neighbor_loss(x, neighbors, 7.) - half) < 1e-12


def test_simsiam_loss():
    p1, p2, z1, z2 = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(4))
    cosine = lambda a, b: sum((u @ v) / (u.norm() * v.norm()) for u, v in zip(a, b)) / 6
    loss = declip.simsiam_loss(p1, p2, z1, z2)
    same_gradients(loss, -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2, (p1, p2))
    assert torch.autograd.grad(declip.simsiam_loss(p1, p2, z1, z2), (z1, z2), allow_unused=True) == (None, None)
    assert abs(declip.simsiam_loss(p2, p1, z2, z1) - loss) < 1e-15
    assert declip.simsiam_loss(3 * z2, .1 * z1, z1, z2).item() == pytest.approx(-1)


def test_simsiam_stops_at_z_and_normalises_each_view():
    torch.manual_seed(0)
    head = declip.SimSiam(8, 16, 4).double()
    names = [type(m).__name__ for m in [*head.projector, *head.predictor]]
    layer = ["Linear", "BatchNorm1d", "ReLU"]
    assert names == layer + layer + ["Linear", "BatchNorm1d"] + layer + ["Linear"]
    x1, x2 = torch.randn(2, 6, 8, dtype=torch.float64)
    (p1, z1), (p2, z2) = head(x1), head(x2)
    assert p1.shape == z1.shape == (6, 16) and (z1.mean(0).abs() < 1e-12).all()
    assert (torch.cat([z1, z2]) - head(torch.cat([x1, x2]))[1]).abs().max() > 1e-3
    constant = z1.clone().detach(), z2.clone().detach()
    same_gradients(declip.simsiam_loss(p1, p2, z1, z2), declip.simsiam_loss(p1, p2, *constant), [*head.parameters()])


def test_mlm_loss():
    torch.manual_seed(0)
    logits = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 8, -100, -100, 1])
    slow = sum(logits[i].logsumexp(0) - logits[i, t] for i, t in enumerate(targets.tolist()) if t >= 0) / 4
    same_gradients(declip.mlm_loss(logits, targets), slow, (logits,))
    assert declip.mlm_loss(torch.zeros(5, 49409), torch.arange(5)).item() == pytest.approx(10.8079, abs=1e-4)
    for nothing in (torch.zeros(0, 9, requires_grad=True), torch.zeros(2, 9, requires_grad=True)):
        loss = declip.mlm_loss(nothing, torch.full(nothing.shape[:1], -100))
        assert loss == 0 and torch.autograd.grad(loss, nothing)[0].abs().sum() == 0


def test_losses_are_fp32_under_autocast():
    x, y = (f.detach().float().bfloat16() for f in views(B=16, D=32))
    inputs = {"multi_view_clip_loss": (x, y, 100.), "nearest_neighbor_loss": (x, y, 100.),
              "simsiam_loss": (x[0], x[1], y[0], y[1]), "mlm_loss": (x[0], torch.arange(16))}
    for name, arguments in inputs.items():
        with torch.autocast("cpu", torch.bfloat16):
            loss = getattr(declip, name)(*arguments)
        doubles = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
        exact = getattr(declip, name)(*doubles)
        assert loss.dtype == torch.float32 and exact.dtype == torch.float64 and abs(loss - exact) < 1e-5, name


# the queue

def test_queue_is_first_in_first_out_over_the_wrap():
    queue, memory = declip.FeatureQueue(10, 6), deque(maxlen=10)
    memory.extend((row, -1) for row in queue.rows)
    assert queue.rows.norm(dim=1).sub(1).abs().max() < 1e-6
    for step, n in enumerate((4, 4, 3, 1, 10, 7, 13)):
        x, samples = unit(n, 6, seed=step).float(), torch.arange(n) + 100 * step
        before = {name: value.clone() for name, value in queue.state_dict().items()}
        queue.enqueue(x + math.nan, samples, torch.tensor(False))  # a bad step
        assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())
        asked = unit(5, 6, seed=50 + step).float()
        rows = torch.stack([row for row, _ in memory])
        slow = torch.stack([max(rows, key=lambda row: float(row @ a)) for a in asked])
        assert torch.equal(queue.nearest(asked), slow)
        queue.enqueue(x, samples)
        memory.extend(zip(x, samples.tolist()))
        order = (torch.arange(10) + queue.pointer) % 10 if n <= 10 else slice(None)
        if n > 10:
            assert {*queue.samples.tolist()} == {number for _, number in memory}
        else:
            assert queue.samples[order].tolist() == [number for _, number in memory]
            assert torch.equal(queue.rows[order], torch.stack([row for row, _ in memory]))


def test_queue_is_a_module_with_a_state():
    queue, x = declip.FeatureQueue(6, 8), unit(4, 8)
    assert not [*queue.parameters()] and {*queue.state_dict()} == {"rows", "samples", "pointer"}
    queue.enqueue(x.float())
    again = declip.FeatureQueue(6, 8)
    again.load_state_dict(queue.state_dict())
    for q in (queue, again):
        q.enqueue(x[:3].float(), torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), again.buffers()))
    assert queue.samples.tolist() == [2, -1, -1, -1, 0, 1] and queue.pointer == 1
    double = declip.FeatureQueue(6, 8).double()
    assert double.rows.dtype == torch.float64 and double.samples.dtype == double.pointer.dtype == torch.int64
    double.enqueue(x)
    assert torch.equal(double.nearest(x), x) and not double.nearest(x.requires_grad_()).requires_grad
    assert declip.FeatureQueue(6, 8).to("meta").rows.device.type == "meta"


def test_queue_search_is_exact_among_float64_rows():
    """Two rows that fp32 does not tell apart."""
    a = unit(1, 8)[0]
    b = F.normalize(a + 1e-10 * unit(1, 8, seed=1)[0], dim=0)
    queue = declip.FeatureQueue(2, 8)
    queue.enqueue(torch.stack([a, b]))
    direction = b - a
    assert torch.equal(a.float(), b.float())
    assert queue.search(torch.stack([-direction, direction])).tolist() == [0, 1]


@pytest.mark.slow
def test_queue_is_asked_before_it_is_filled_and_edited_captions_go_first(monkeypatch, tmp_path):
    calls, search, enqueue = [], declip.FeatureQueue.search, declip.FeatureQueue.enqueue
    monkeypatch.setattr(declip.FeatureQueue, "search", lambda q, x: calls.append(x.clone()) or search(q, x))
    monkeypatch.setattr(declip.FeatureQueue, "enqueue", lambda q, x, *a: calls.append(x.clone()) or enqueue(q, x, *a))
    monkeypatch.setattr(declip, "neighbor_picture", lambda *a: None)
    declip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
    assert len(calls) == 12
    for asked, edited, masked in zip(calls[::3], calls[1::3], calls[2::3]):
        assert torch.equal(asked, torch.cat([masked, edited])) and not torch.equal(masked, edited)


# the views

def test_mask_tokens_rates_and_places():
    tokens = captions(40_000)
    eot, place = tokens.argmax(-1), torch.arange(12)
    generator = torch.Generator().manual_seed(1)
    masked, labels = declip.mask_tokens(tokens, eot, MASK, VOCAB, generator=generator)
    words = (place > 0) & (place < eot[:, None])
    chosen = labels != -100
    assert torch.equal(masked[~chosen], tokens[~chosen]) and torch.equal(labels[chosen], tokens[chosen])
    assert not chosen[~words].any() and torch.equal((masked == 39).float().argmax(1), eot)

    def rate(event, of, p):
        assert abs(event.sum() / of - p) < 3 * math.sqrt(p * (1 - p) / of)

    n = int(chosen.sum())
    rate(chosen, int(words.sum()), .15)
    rate(masked[chosen] == MASK, n, .8)
    # random words, few of which are the old one
    rate((masked != tokens)[chosen] & (masked[chosen] != MASK), n, .1 * 36.97 / 38)
    random_words = masked[chosen & (masked != tokens) & (masked != MASK)]
    assert random_words.min() == 0 and random_words.max() == 37 and random_words.float().mean().sub(18.5).abs() < .5
    again = declip.mask_tokens(tokens, eot, MASK, VOCAB, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], masked) and torch.equal(again[1], labels)
    everything, _ = declip.mask_tokens(tokens, eot, MASK, VOCAB, p=1.)
    assert ((everything != 39) & (everything != 38))[words].all()
    nothing, labels = declip.mask_tokens(tokens, eot, MASK, VOCAB, p=0.)
    assert torch.equal(nothing, tokens) and (labels == -100).all()


def test_pack_labels_finds_the_same_positions():
    labels = torch.full((6, 12), -100)
    labels[0, 3], labels[4, 1], labels[4, 7] = 9, 0, 5
    places, targets = declip.pack_labels(labels, 8)
    hidden = torch.randn(6, 8, 3)
    assert len(places) == len(targets) == 6 and targets.tolist() == [9, 0, 5, -100, -100, -100]
    assert torch.equal(hidden.flatten(0, 1)[places][:3], hidden[labels[:, :8] != -100])
    assert [len(x) for x in declip.pack_labels(torch.full((6, 12), -100), 8)] == [0, 0]


def test_labels_are_packed_in_the_loader():
    """Batches of worker processes hold the places among the tokens as they were cut, and no labels."""
    dataset = data.open_dataset("toy", None, 32)
    tokenizer = data.Tokenizer(data.train_bpe((t for _, t in data.captions("toy", 64)), 700))
    dataset.transform = partial(declip.declip_views, tokenizer=tokenizer, size=32, augment="clip", p=.5, synonyms=None)
    loader = data.loader(dataset, data.EpochBatches(32, 8), 2)
    loader.collate_fn = declip.declip_collate
    for batch in loader:
        masked, clean = batch["tokens"][:, 0].flatten(), []
        for i in batch["index"].tolist():
            clean.append(tokenizer(dataset.captions(i))[0][:batch["tokens"].shape[-1]])
        clean = torch.stack(clean).flatten()
        kept = batch["targets"] != -100
        assert "labels" not in batch and len(kept) % 8 == 0 and kept.sum() > 8
        assert torch.equal(clean[batch["places"][kept]], batch["targets"][kept])
        masked[batch["places"][kept]] = batch["targets"][kept]
        assert torch.equal(masked, clean)


SYNONYMS = {"dog": ["hound", "puppy"], "runs": ["dashes"]}


def test_eda_changes_what_it_says():
    caption, kinds, changed = "A Dog runs to the old dog .", Counter(), 0
    for seed in range(3000):
        text = declip.eda(caption, random.Random(seed), SYNONYMS)
        old, new = caption.split(), text.split()
        if new == old:
            kinds["same"] += 1
        elif sorted(new) == sorted(old):
            kinds["swap"] += 1
            assert sum(a != b for a, b in zip(old, new)) == 2
        elif len(new) < len(old):
            kinds["delete"] += 1
            rest = iter(old)
            assert new and all(word in rest for word in new)
        else:
            kinds["replace"] += 1
            pairs = {(a.lower(), b) for a, b in zip(old, new) if a != b}
            assert len(new) == len(old) and pairs in ({("dog", "hound")}, {("dog", "puppy")}, {("runs", "dashes")})
    kept = .9 ** 8 / 3  # a deletion that drops nothing
    for kind, p in (("swap", 1 / 3), ("delete", 1 / 3 - kept), ("replace", 1 / 3), ("same", kept)):
        assert abs(kinds[kind] / 3000 - p) < 3 * math.sqrt(p * (1 - p) / 3000), kind
    for seed in range(50):
        assert declip.eda("cat", random.Random(seed), SYNONYMS) == "cat"
        assert declip.eda("dog", random.Random(seed), SYNONYMS) in ("dog", "hound", "puppy")
        assert sorted(declip.eda("a b", random.Random(seed)).split()) in (["a", "b"], ["a"], ["b"])
        assert declip.eda(" ", random.Random(seed)) == ""


def test_views_of_a_sample():
    dataset = data.open_dataset("toy", None, 64)
    tokenizer = data.Tokenizer(data.train_bpe((t for _, t in data.captions("toy", 64)), 700))

    def make(i, p):
        image, caption = dataset.image(i), dataset.captions(i)[0]
        return declip.declip_views(image, caption, random.Random(i), tokenizer, 32, "declip", p, None)

    masked = 0
    for i in range(20):
        sample, again, clean = make(i, .5), make(i, .5), make(i, 0.)
        assert {k: tuple(v.shape) for k, v in sample.items()} == {
            "images": (2, 3, 32, 32), "tokens": (2, 77), "eot": (2,), "labels": (77,), "colors": (2, 8)}
        assert all(torch.equal(sample[k], again[k]) for k in sample)
        assert not torch.equal(*sample["images"]) and torch.equal(clean["tokens"][0], tokenizer(dataset.captions(i))[0])
        assert (sample["tokens"].gather(1, sample["eot"][:, None]) == tokenizer.eot).all()
        assert (clean["labels"] == -100).all()
        masked += int((sample["tokens"][0] == tokenizer.vocab_size).sum())
        assert torch.equal(sample["labels"].where(sample["labels"] >= 0, sample["tokens"][0]), clean["tokens"][0])
    assert masked > 20


def test_synonyms_from_wordnet_by_the_recipe(tmp_path, monkeypatch):
    """The lines of tests/RESULTS.md make a table that read_synonyms reads."""
    page = Path(__file__).with_name("RESULTS.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    os.mkdir("dict")
    (tmp_path / "dict/data.noun").write_text(
        "  1 This software and database is being provided to you, the LICENSEE\n"
        "02084071 05 n 04 dog 0 domestic_dog 0 Canis_familiaris 0 hound 1 001 @ 02083346 n 0000 | a kind of Canis\n")
    (tmp_path / "dict/data.adj").write_text("00000001 00 a 02 large(p) 0 big 0 000 | above average\n")
    exec(re.search(r"```python\n(import collections.*?)```", page, re.S)[1], {})
    table = declip.read_synonyms("synonyms.tsv")
    assert table["dog"] == ["hound"] and table["big"] == ["large"] and table["large"] == ["big"]


def test_synonyms_of_any_editor(tmp_path):
    """A mark at the start, line ends of Windows, blank lines and blanks around words change nothing."""
    path = tmp_path / "table.tsv"
    path.write_bytes("\ufeffDog\thound, puppy\r\n\r\n été\tsaison,\r\n\r\n".encode())
    assert declip.read_synonyms(path) == {"dog": ["hound", "puppy"], "été": ["saison"]}
    for wrong in ("a dog\n", "dog\t\n", "dog\t,\n", "\thound\n", "dog\thound\tpuppy\n"):
        path.write_text("cat\ttom\n" + wrong)
        with pytest.raises(SystemExit, match="--synonyms .*table.tsv: line 2"):
            declip.read_synonyms(path)
    path.write_bytes("été\tsaison\n".encode("latin-1"))
    for name in (path, tmp_path / "missing.tsv"):
        with pytest.raises(SystemExit, match=f"--synonyms.*{name.name}"):
            declip.read_synonyms(name)


# the model

def batch(B=6, size=32, seed=0):
    """images [2, B, 3, S, S], tokens [2, B, 12] (masked, edited), eot, places, targets"""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.stack([captions(B, seed=seed), captions(B, seed=seed + 1)])
    eot = tokens.argmax(-1)
    masked, labels = declip.mask_tokens(tokens[0], eot[0], MASK, VOCAB, .5, g)
    return (torch.randn(2, B, 3, size, size, dtype=torch.float64, generator=g), torch.stack([masked, tokens[1]]), eot,
            *declip.pack_labels(labels, 12))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", (SIZES, RESNET | dict(vocab=VOCAB)), ids=("vit", "resnet"))
def test_model_is_its_towers_on_each_view(sizes):
    torch.manual_seed(0)
    model = declip.DeCLIP(**sizes).double()
    images, tokens, eot, places, targets = batch()
    image_views, text_views, logit_scale, ssl, logits = model(images, tokens, eot, places)
    x = [model.encode_image(view) for view in images]
    for k in (0, 1):
        assert (image_views[k] - F.normalize(x[k], dim=-1)).abs().max() < 1e-12
        assert (text_views[k] - F.normalize(model.encode_text(tokens[k], eot[k]), dim=-1)).abs().max() < 1e-12
    p1, z1 = model.simsiam(x[0])
    assert (ssl[0] - p1).abs().max() < 1e-10 and (ssl[2] - z1).abs().max() < 1e-10
    everywhere = model.mlm_head(model.text_tokens(tokens[0])).flatten(0, 1)
    assert (logits - everywhere[places]).abs().max() < 1e-12 and logits.shape[1] == VOCAB
    if sizes["vision_layers"] == 2:
        assert not model.visual.conv1.weight.requires_grad
    else:  # the statistics of both views together are others
        assert model.visual.conv1.weight.requires_grad
        assert (model.encode_image(images.flatten(0, 1))[:6] - x[0]).abs().max() > 1e-6
    assert logit_scale.item() == pytest.approx(math.exp(3))
    again = declip.build(model.state_dict(), declip.DeCLIP).double()
    again.load_state_dict(model.state_dict())
    assert (again.eval().encode_text(tokens[1]) - model.eval().encode_text(tokens[1], eot[1])).abs().max() == 0


def test_which_parameters_each_term_moves():
    torch.manual_seed(0)
    model = declip.DeCLIP(**SIZES).double()
    images, tokens, eot, places, targets = batch()
    image_views, text_views, logit_scale, ssl, logits = model(images, tokens, eot, places)
    terms = dict(clip=declip.multi_view_clip_loss(image_views, text_views, logit_scale),
                 nns=declip.nearest_neighbor_loss(image_views, text_views, logit_scale),
                 ssl=declip.simsiam_loss(*ssl), mlm=declip.mlm_loss(logits, targets))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = {"visual": "visual.", "text": ("transformer.", "token_embedding.", "positional_embedding", "ln_final."),
             "projection": "text_projection", "scale": "logit_scale", "simsiam": "simsiam.", "mlm": "mlm_head."}
    moved = {}
    for term, loss in terms.items():
        parameters = [dict(model.named_parameters())[n] for n in names]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        touched = [n for n, g in zip(names, found) if g is not None and g.abs().max() > 0]
        moved[term] = {part for part, prefix in parts.items() if any(n.startswith(prefix) for n in touched)}
    assert moved == dict(clip={"visual", "text", "projection", "scale"}, nns={"visual", "scale"},
                         ssl={"visual", "simsiam"}, mlm={"text", "mlm"})


@pytest.mark.slow
def test_overfits_one_batch_in_every_term():
    torch.manual_seed(0)
    model, (images, tokens, eot, places, targets) = declip.DeCLIP(**SIZES), batch(8)
    queue, optimizer, history = declip.FeatureQueue(64, 32), torch.optim.AdamW(clip.param_groups(model, .1), 2e-3), []
    for _ in range(40):
        image_views, text_views, logit_scale, ssl, logits = model(images.float(), tokens, eot, places)
        neighbors = queue.nearest(text_views.flatten(0, 1)).unflatten(0, (2, -1))
        terms = torch.stack([declip.multi_view_clip_loss(image_views, text_views, logit_scale),
                             declip.nearest_neighbor_loss(image_views, neighbors, logit_scale),
                             declip.simsiam_loss(*ssl), declip.mlm_loss(logits, targets)])
        optimizer.zero_grad()
        terms.dot(torch.tensor([.4, .2, .2, .2])).backward()
        optimizer.step()
        for view in (1, 0):
            queue.enqueue(text_views[view])
        history.append(terms.tolist())
    first, last = history[0], history[-1]
    assert last[0] < .2 and last[1] < .5 and last[2] < first[2] - .3 and last[3] < 1, (first, last)


# W ranks are one process

def two_steps(model, queue, images, tokens, eot, places, targets, ssl_weight):
    """The sum of the losses of two steps on the same batch with the queue filled between them; gradients add up."""
    total = 0.
    model.zero_grad()
    for _ in range(2):
        image_views, text_views, logit_scale, ssl, logits = model(images, tokens, eot, places)
        neighbors = queue.nearest(text_views.flatten(0, 1)).unflatten(0, (2, -1))
        loss = (.4 * declip.multi_view_clip_loss(image_views, text_views, logit_scale)
                + .2 * declip.nearest_neighbor_loss(image_views, neighbors, logit_scale)
                + ssl_weight * declip.simsiam_loss(*ssl) + .2 * declip.mlm_loss(logits, targets))
        loss.backward()
        for view in (1, 0):
            queue.enqueue(text_views[view])
        total += loss.detach()
    return total


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = declip.DeCLIP(**SIZES).double()
    images, tokens, eot, places, targets = batch(8)
    labels = torch.full((8 * 12,), -100).scatter(0, places, targets.where(targets >= 0, -100)).view(8, 12)
    labels[:4, 2:] = -100  # few masked words on the first rank
    truth, b = {}, 8 // world
    own = slice(rank * b, rank * b + b)
    for ssl in (0., .2):
        queue = declip.FeatureQueue(20, 32)
        loss = two_steps(model, queue, images, tokens, eot, *declip.pack_labels(labels, 12), ssl)
        truth[ssl] = loss, queue, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    parallel, found = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), {}
    for ssl in (0., .2):
        queue = declip.FeatureQueue(20, 32)
        mine = images[:, own], tokens[:, own], eot[:, own], *declip.pack_labels(labels[own], 12)
        loss = two_steps(parallel, queue, *mine, ssl)
        dist.all_reduce(loss)
        worst = max((p.grad - truth[ssl][2][n]).abs().max().item()
                    for n, p in model.named_parameters() if p.grad is not None)
        found[ssl] = abs(loss.item() / world - truth[ssl][0].item()), worst
        rows = [torch.empty_like(queue.rows) for _ in range(world)]
        dist.all_gather(rows, queue.rows)
        found["queue", ssl] = max((r - truth[ssl][1].rows).abs().max().item() for r in rows), int(queue.pointer)
    if rank == world - 1:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    spawn(on_ranks, (2, 31500 + os.getpid() % 2000, tmp_path / "found"), 2)
    found = torch.load(tmp_path / "found")
    assert max(found[0.]) < 1e-10
    assert found[.2][0] > 1e-6 and found[.2][1] > 1e-6  # batch norm is local
    assert found["queue", 0.][0] < 1e-12 and found["queue", 0.][1] == 32 % 20


# runs

RUN = ["--limit", "32", "--batch-size", "8", "--epochs", "3", "--warmup", "2", "--eval", "", "--log-every", "1",
       "--eval-every", "1", "--model", "tiny"]


def rows(out):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("finished")
    declip.main(RUN + ["--out", str(out)])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished):
    state = declip.load_checkpoint(finished / "last.pt")
    assert state["script"] == "declip" and state["step"] == 12 and state["queue"]["rows"].shape == (16, 128)
    assert state["queue"]["pointer"] == 0 and (state["queue"]["samples"] >= 0).all()
    assert not any("queue" in name for name in state["model"])
    assert (finished / "neighbors.png").stat().st_size > 1000
    for row in rows(finished):
        total = .4 * row["clip"] + .2 * row["nns"] + .2 * row["ssl"] + .2 * row["mlm"]
        assert row["loss"] == pytest.approx(total, abs=1e-5)
        assert math.exp(3) - 1e-4 < row["logit_scale"] <= 100 + 1e-4
    first = rows(finished)[0]
    assert first["clip"] == pytest.approx(math.log(8), abs=.5)
    assert first["own_neighbors"] == 0 and -1 <= first["ssl"] <= 1
    model, tokenizer, preprocess = evaluator.load(finished / "last.pt")
    assert isinstance(model, declip.DeCLIP) and len(model.token_embedding.weight) == tokenizer.vocab_size + 1
    assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 128) and preprocess.size == 32
    torch.manual_seed(0)  # what main does
    start = declip.build("tiny", declip.DeCLIP, vocab=tokenizer.vocab_size + 1)
    assert torch.equal(start.visual.conv1.weight, state["model"]["visual.conv1.weight"])
    assert not torch.equal(start.visual.proj, state["model"]["visual.proj"])


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_identical(finished, tmp_path, monkeypatch):
    """Stopped at step 7, so that steps 5 and 6 are done again; then to the end with two workers."""
    class Stop(Exception):
        pass

    seen, exact = [], declip.multi_view_clip_loss

    def stopping(*arguments):
        seen.append(1)
        if len(seen) == 7:
            raise Stop
        return exact(*arguments)

    monkeypatch.setattr(declip, "multi_view_clip_loss", stopping)
    with pytest.raises(Stop):
        declip.main(RUN + ["--out", str(tmp_path)])
    monkeypatch.undo()
    assert declip.load_checkpoint(tmp_path / "last.pt")["step"] == 4
    declip.main(RUN + ["--out", str(tmp_path), "--workers", "2"])
    expected, found = (torch.load(out / "last.pt", weights_only=True) for out in (finished, tmp_path))
    for part in ("model", "queue"):
        assert all(torch.equal(expected[part][k], found[part][k]) for k in expected[part])
    assert losses(finished) == losses(tmp_path)


def test_bad_step_leaves_no_trace(monkeypatch, tmp_path):
    """A gradient that is not finite at the second step: weights and queue before and after it are the same."""
    seen, made, exact, build, queue = [], [], declip.multi_view_clip_loss, declip.build, declip.FeatureQueue

    def watched(x, y, s):
        model, memory = made[-2:]
        seen.append([p.detach().clone() for p in (*model.parameters(), *memory.buffers())])
        return exact(x, y, s) * (math.nan if len(seen) == 2 else 1)

    monkeypatch.setattr(declip, "build", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    monkeypatch.setattr(declip, "FeatureQueue", lambda *a: made.append(queue(*a)) or made[-1])
    monkeypatch.setattr(declip, "multi_view_clip_loss", watched)
    declip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
    same = [[torch.equal(a, b) for a, b in zip(*pair)] for pair in zip(seen, seen[1:])]
    assert all(same[1]) and not any(s[-3] for s in (same[0], same[2])) and not all(same[0])
    assert [row["bad_steps"] for row in rows(tmp_path)] == [0, 1, 1, 1]
    assert [row["loss"] is None for row in rows(tmp_path)] == [False, True, False, False]


def test_a_weight_of_zero_takes_the_part_out(tmp_path):
    off = ["--w-nns", "0", "--w-ssl", "0", "--w-mlm", "0", "--w-clip", "1"]
    declip.main(RUN + off + ["--epochs", "1", "--out", str(tmp_path)])
    state = declip.load_checkpoint(tmp_path / "last.pt")
    assert "queue" not in state and all(name.split(".")[0] in evaluator.ENCODERS for name in state["model"])
    assert all(row["loss"] == row["clip"] and row["nns"] == row["ssl"] == row["mlm"] == 0 for row in rows(tmp_path))
    evaluator.load(tmp_path / "last.pt")


def test_a_batch_of_one_a_rank_is_a_sentence(tmp_path):
    """SimSiam's batch norm would raise; without SimSiam one pair is a batch."""
    one = ["--limit", "3", "--batch-size", "1", "--epochs", "1", "--warmup", "0", "--model", "tiny", "--eval", ""]
    with pytest.raises(SystemExit, match="--batch-size must be at least 2 a rank"):
        declip.main(one + ["--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())
    declip.main(one + ["--w-ssl", "0", "--out", str(tmp_path)])
    state = declip.load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 3 and len(state["queue"]["rows"]) == state["flags"]["queue"] == 1  # half the pairs


@pytest.mark.slow
def test_init_from_clip_and_from_declip(finished, tmp_path):
    command = RUN + ["--epochs", "1", "--lr", "0"]
    clip.main(command + ["--out", str(tmp_path / "clip")])
    run = tmp_path / "run"
    for start in (tmp_path / "clip", finished):
        declip.main(command + ["--out", str(run), "--restart", "--init", str(start / "last.pt")])
        expected, found = (evaluator.load_clip_state(folder / "last.pt") for folder in (start, run))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected if name != "logit_scale")
        mask = declip.load_checkpoint(run / "last.pt")["model"]["token_embedding.weight"][-1]
        assert torch.equal(mask, expected["token_embedding.weight"].mean(0))
    torch.save(clip.build("tiny", text_width=64).state_dict(), tmp_path / "narrow.pt")
    for wrong in ([str(finished / "last.pt"), "--image-size", "64"], [str(tmp_path / "narrow.pt")]):
        with pytest.raises(SystemExit, match="--init"):
            declip.main(command + ["--out", str(run), "--restart", "--init", *wrong])


def test_synonyms_and_resnet_run(tmp_path):
    (tmp_path / "table.tsv").write_text("circle\tdisc,dot\nred\tcrimson\n")
    declip.main(RUN + ["--epochs", "1", "--augment", "clip", "--synonyms", str(tmp_path / "table.tsv"),
                       "--checkpoint-activations", "--out", str(tmp_path / "a")])
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "a"))
    with pytest.raises(SystemExit, match="--synonyms"):
        declip.main(RUN + ["--out", str(tmp_path / "b"), "--synonyms", str(tmp_path / "none.tsv")])


def test_recipes_are_complete():
    parsed = vars(declip.parse_args([]))
    assert set(declip.RECIPES) == set(clip.RECIPES)
    for recipe in declip.RECIPES.values():
        assert set(recipe) <= set(parsed) and recipe["model"] in declip.MODELS and recipe["augment"] in declip.AUGMENT
        assert {"model", "batch_size", "epochs", "lr", "warmup", "weight_decay", "augment"} <= set(recipe)
    assert sum(parsed[name] for name in ("w_clip", "w_nns", "w_ssl", "w_mlm")) == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    declip.main(RUN + ["--out", str(tmp_path), "--amp", amp, "--epochs", "12"])
    seen = [loss for loss in losses(tmp_path) if loss is not None]  # fp16's first scale may be too large
    assert seen[-1] < seen[0]
