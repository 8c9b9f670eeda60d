"""protoclip.py: K-means, back translation and the loss against slow references, ranks against one process, resume."""
import json
import math
import os
import signal
import time
from collections import Counter
from datetime import timedelta
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import clip
import data
import eval as evaluator
import protoclip
from ranks import spawn
from test_clip import RESNET, SMALL, captions, unit

HEADS = dict(proj_hidden=16, proj_dim=8)


def blobs(n, k, d=8, spread=.05, seed=0):
    """n rows around k far centres, in float64, and which centre each is of; every centre has n / k."""
    g = torch.Generator().manual_seed(seed)
    centres, label = 10 * torch.eye(k, d, dtype=torch.float64), torch.arange(n) % k
    order = torch.randperm(n, generator=g)
    return (centres[label] + spread * torch.randn(n, d, dtype=torch.float64, generator=g))[order], label[order]


# K-means

def brute_force(x, centroids):
    """Nearest centroid of each row, one distance at a time, and the sum of the squared distances."""
    distances = [[sum((a - b) ** 2 for a, b in zip(row, c)) for c in centroids.tolist()] for row in x.tolist()]
    return torch.tensor([row.index(min(row)) for row in distances]), sum(map(min, distances))


def slow_lloyd(x, centroids, iters):
    """Lloyd's algorithm by its definition, from given centroids; None where a cluster runs empty."""
    for _ in range(iters):
        labels, _ = brute_force(x, centroids)
        if len(labels.unique()) < len(centroids):
            return None
        clusters = [[row for row, label in zip(x, labels) if label == k] for k in range(len(centroids))]
        centroids = torch.stack([torch.stack(rows).mean(0) for rows in clusters])
    return *brute_force(x, centroids), centroids


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_lloyd(seed):
    x = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start = x[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:4]]
    for iters in (1, 2, 20):
        labels, centroids, objective = protoclip.kmeans(x, 4, iters, 1, seed)
        slow = slow_lloyd(x, start, iters)
        assert torch.equal(labels, slow[0]) and abs(objective - slow[1]) < 1e-10
        assert (centroids - slow[2]).abs().max() < 1e-12


def test_kmeans_properties():
    x, truth = blobs(120, 6)
    labels, centroids, objective = protoclip.kmeans(x, 6, 20, 10)
    assert len(set(zip(labels.tolist(), truth.tolist()))) == 6  # the blobs
    assert torch.equal(labels, brute_force(x, centroids)[0]) and labels.dtype == torch.int64
    assert (centroids - torch.stack([x[labels == k].mean(0) for k in range(6)])).abs().max() < 1e-12
    assert torch.equal(protoclip.kmeans(x, 6, 20, 10)[1], centroids)  # a function of the seed
    assert objective <= protoclip.kmeans(x, 6, 20, 1)[2]
    x = unit(80, 5)
    objectives = [protoclip.kmeans(x, 5, iters, 1, 3)[2] for iters in range(12)]  # no cluster runs empty here
    assert all(b <= a + 1e-12 for a, b in zip(objectives, objectives[1:])) and objectives[-1] < objectives[0]
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert torch.equal(protoclip.kmeans(x @ turn + 2, 5)[0], protoclip.kmeans(x, 5)[0])
    assert protoclip.kmeans(x, 1)[2] == pytest.approx((x - x.mean(0)).square().sum().item())


def test_kmeans_with_duplicates_and_as_many_clusters_as_rows():
    x = unit(20, 4)
    labels, centroids, objective = protoclip.kmeans(x, 20)
    assert objective < 1e-12 and len(labels.unique()) == 20
    with pytest.raises(ValueError, match="21"):
        protoclip.kmeans(x, 21)
    for k in (3, 8, 19):  # 5 distinct rows, four times each, and more clusters than that
        labels, centroids, objective = protoclip.kmeans(x[:5].repeat(4, 1), k)
        assert centroids.isfinite().all() and torch.equal(labels, labels[:5].repeat(4))
        assert k == 3 or objective < 1e-4
    labels, centroids, objective = protoclip.kmeans(torch.zeros(9, 4), 4)
    assert objective == 0 and centroids.abs().max() == 0
    # a far group found by no first centroid but through an empty cluster's repair
    x = torch.cat([torch.zeros(30, 2), unit(30, 2).float()])
    assert len(protoclip.kmeans(x, 12, 20, 1)[0].unique()) >= 11


def test_kmeans_in_half_precision_counts_in_fp32():
    x = blobs(64, 4)[0]
    labels, centroids, _ = protoclip.kmeans(x.bfloat16(), 4)
    assert centroids.dtype == torch.float32 and len(labels.unique()) == 4
    assert protoclip.kmeans(x, 4)[1].dtype == torch.float64
    x = unit(300, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = protoclip.kmeans(x, 30)
    assert torch.equal(found[0], protoclip.kmeans(x, 30)[0])  # its products are no bf16 either


def test_what_is_made_of_features_is_constant():
    x = unit(40, 6).requires_grad_()
    labels, centroids, objective = protoclip.kmeans(x, 5)
    means = protoclip.cluster_means(x, labels, 5)
    assert not any(y.requires_grad for y in (centroids, means, protoclip.expected_target(x[:5], x[5:10], .1)))
    assert type(objective) is float


# back translation, targets, the loss

def test_cluster_means():
    x, labels = unit(40, 6), torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(0))
    labels[labels == 4] = 5
    means = protoclip.cluster_means(x, labels, 9)
    for k in range(9):
        rows = [row for row, label in zip(x, labels) if label == k]
        assert (means[k] - (sum(rows) / len(rows) if rows else 0)).abs().max() < 1e-14
    assert (means[4] == 0).all() and means.dtype == torch.float64 and not means.requires_grad
    assert (labels.bincount(minlength=9)[:, None] * means - torch.zeros(9, 6)).sum(0).sub(x.sum(0)).abs().max() < 1e-13
    order = torch.randperm(40)
    assert (protoclip.cluster_means(x[order], labels[order], 9) - means).abs().max() < 1e-14
    own, centroids, _ = protoclip.kmeans(x, 5, iters=100)
    assert (protoclip.cluster_means(x, own, 5) - centroids).abs().max() < 1e-12  # converged: its own teacher


def slow_proto_loss(h, D, C, t, temperature, scale):
    """Cross-entropy with soft targets out of the K x K similarities, term by term, as the released code has it."""
    total = 0.
    for row, label in zip(h, t.tolist()):
        logits = torch.stack([scale * (row * d).sum() for d in D])
        similarity = torch.stack([(C[label] * c).sum() / temperature for c in C])
        target = (similarity - similarity.logsumexp(0)).exp()
        total = total - (target * (logits - logits.logsumexp(0))).sum()
    return total / len(h)


@pytest.mark.parametrize("temperature", (.01, .1, 1.))
def test_proto_loss_is_cross_entropy_with_soft_targets(temperature):
    h, s = unit(7, 5).requires_grad_(), torch.tensor(9., dtype=torch.float64, requires_grad=True)
    D, C, t = .7 * unit(6, 5, seed=1), .8 * unit(6, 4, seed=2), torch.tensor([0, 5, 2, 2, 1, 0, 3])
    D[3] = 0  # an empty cluster
    fast = protoclip.proto_loss(h, D, protoclip.expected_target(C, D, temperature), t, s)
    slow = slow_proto_loss(h, D, C, t, temperature, s)
    assert abs(fast - slow) < 1e-12 and fast.dtype == torch.float64
    for a, b in zip(torch.autograd.grad(fast, (h, s)), torch.autograd.grad(slow, (h, s))):
        assert (a - b).abs().max() < 1e-12


def test_proto_loss_closed_forms():
    h, D, t = unit(6, 5), .5 * unit(4, 5, seed=1), torch.tensor([0, 3, 1, 1, 2, 0])
    hard = F.cross_entropy(7 * h @ D.T, t).item()
    assert protoclip.proto_loss(h, D, D, t, 7.).item() == pytest.approx(hard, abs=1e-12)
    C = unit(4, 9)
    assert all(torch.equal(protoclip.expected_target(C, D, temperature), D) for temperature in (0, -1))
    assert (protoclip.expected_target(C, D, 1e-4) - D).abs().max() < 1e-12  # unit rows: each is most like itself
    assert (protoclip.expected_target(C, D, 1e9) - D.mean(0)).abs().max() < 1e-6
    same = D[:1].expand(4, 5)
    target = protoclip.expected_target(unit(4, 3), same, .1)
    assert protoclip.proto_loss(h, same, target, t, 9.).item() == pytest.approx(math.log(4))
    assert protoclip.proto_loss(h, D, D, t, 0.).item() == pytest.approx(math.log(4), abs=1e-12)
    h.requires_grad_()
    one = protoclip.proto_loss(h, D[:1], D[:1], torch.zeros(6, dtype=torch.int64), 5.)
    assert abs(one.item()) < 1e-15 and torch.autograd.grad(one, h)[0].abs().max() < 1e-15
    nothing = protoclip.proto_loss(h, 0 * D, 0 * D, t, 5.)  # what training begins with
    assert nothing.item() == pytest.approx(math.log(4)) and torch.autograd.grad(nothing, h)[0].abs().max() == 0


def test_losses_are_fp32_under_autocast():
    h, D, t = unit(16, 32).bfloat16(), unit(8, 32, seed=1).float(), torch.arange(16) % 8
    with torch.autocast("cpu", torch.bfloat16):
        T = protoclip.expected_target(D, D, .1)
        loss = protoclip.proto_loss(h, D, T, t, torch.tensor(100.))
    h, D = h.double(), D.double()
    exact = protoclip.proto_loss(h, D, protoclip.expected_target(D, D, .1), t, 100.)
    assert loss.dtype == torch.float32 and T.dtype == torch.float32 and abs(loss - exact) < 1e-4


# episodes, captions' features

def test_plan_episodes():
    plan = protoclip.plan_episodes
    assert plan(1000, 64, 2, 300, 20, 5) == (256, 20, 4, 32)  # 2 epochs of 15 steps are 7.5 episodes of 4
    assert plan(200, 64, 2, 300, 50, 5) == (192, 19, 3, 6)  # an episode of all whole batches, ten pairs a prototype
    assert plan(1000, 64, 1, 900, 20, 5) == (896, 20, 14, 14)  # one episode at least
    # the released run: 400 episodes of 390 batches
    size, prototypes, steps, total = plan(2_500_000, 512, 32, 200_000, 20_000, 15_625)
    assert (size, prototypes, steps) == (390 * 512, 390 * 512 // 10, 390) and total // steps in (400, 401)
    with pytest.raises(SystemExit, match="--episode-size.*--batch-size"):
        plan(1000, 8, 2, 8, 20, 5)
    with pytest.raises(SystemExit, match="--episode-size"):
        plan(1000, 64, 2, 63, 20, 5)
    with pytest.raises(SystemExit, match="--warmup 14"):  # an epoch has 15 steps
        plan(1000, 64, 1, 900, 20, 14)


def test_sample_episode():
    draws = [protoclip.sample_episode(seed, episode, 500, 300) for seed in (0, 1) for episode in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    for draw in draws:
        assert draw.dtype == torch.int64 and draw.shape == (500,) and draw.min() >= 0 and draw.max() < 300
        assert 200 < len(draw.unique()) < 275  # with replacement: 300 (1 - e^(-5/3)) = 243
    torch.manual_seed(5)
    assert torch.equal(protoclip.sample_episode(1, 1, 500, 300), draws[3])  # no global state


def test_caption_features():
    ids = [[1, 2, 3], [1, 2, 3], [4, 5], [5, 4, 6], [], [7, 7, 8, 1], [9]]
    state = torch.get_rng_state()
    x = protoclip.caption_features(ids, 12)
    assert torch.equal(state, torch.get_rng_state()) and x.shape == (7, 7)
    documents = Counter(token for words in ids for token in set(words))
    rows = torch.zeros(7, 12)
    for row, words in zip(rows, ids):
        for token in words:
            row[token] += math.log(7 / documents[token])
    rows = F.normalize(rows, dim=1)
    assert (x @ x.T - rows @ rows.T).abs().max() < 1e-5  # all dimensions kept: the same angles
    assert protoclip.caption_features(ids, 12, 2).shape == (7, 2)


# the model

def test_model_heads_and_gradients():
    torch.manual_seed(0)
    model = protoclip.ProtoCLIP(**SMALL, **HEADS)
    assert model.image_head is not model.text_head
    assert all(torch.equal(a, b) for a, b in zip(model.image_head.parameters(), model.text_head.parameters()))
    images, tokens = torch.randn(6, 3, 32, 32), captions(6)
    x, y, h_i, h_t, s, r = model(images, tokens)
    assert x.shape == y.shape == (6, 32) and h_i.shape == h_t.shape == (6, 8)
    assert s.item() == pytest.approx(1 / .07) == r.item()
    assert all((rows.norm(dim=1) - 1).abs().max() < 1e-5 for rows in (x, y, h_i, h_t))
    assert torch.equal(h_i, F.normalize(model.image_head(model.encode_image(images)), dim=-1))  # raw features enter
    D, t = .5 * unit(4, 8).float(), torch.arange(6) % 4
    protoclip.proto_loss(h_i, D, D, t, r).backward(retain_graph=True)
    for name, p in model.named_parameters():
        assert (p.grad is None) != name.startswith(("visual.", "image_head.", "logit_scale_proto")), name
    model.zero_grad()
    protoclip.clip_loss(x, y, s).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "head" in name or "proto" in name)
    with torch.device("meta"):
        head = protoclip.projection_head(1024, 2048, 128)
    assert sum(p.numel() for p in head.parameters()) == 2_365_568  # the released code's, for RN50
    for sizes in (SMALL, RESNET):
        model = protoclip.ProtoCLIP(**sizes, **HEADS)
        again = protoclip.build(model.state_dict(), protoclip.ProtoCLIP, **HEADS)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    decay, none = protoclip.param_groups(model, .5, ("image_head.", "text_head."))
    heads = {id(p) for head in (model.image_head, model.text_head) for p in head.parameters()}
    assert heads and not {id(p) for p in decay["params"]} & heads


def test_without_weight_or_prototypes_the_gradient_is_clips():
    torch.manual_seed(0)
    model, plain = protoclip.ProtoCLIP(**SMALL, **HEADS), clip.CLIP(**SMALL)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, tokens, t = torch.randn(6, 3, 32, 32), captions(6), torch.arange(6) % 4
    clip.clip_loss(*plain(images, tokens)).backward()
    for weight, D in ((0., unit(4, 8).float()), (1., torch.zeros(4, 8))):
        model.zero_grad()
        x, y, h_i, h_t, s, r = model(images, tokens)
        loss = protoclip.clip_loss(x, y, s) + weight * sum(protoclip.proto_loss(h, D, D, t, r) for h in (h_i, h_t)) / 2
        loss.backward()
        for name, p in model.named_parameters():
            if "head" in name or "proto" in name:
                assert p.grad.abs().max() == 0, name  # zero and not None: DDP waits for it
            else:
                assert torch.equal(p.grad, plain.get_parameter(name).grad), name


# W ranks are one process

RUN = ["--limit", "96", "--batch-size", "16", "--epochs", "2", "--warmup", "2", "--eval", "", "--log-every", "1",
       "--model", "tiny", "--augment", "clip", "--episode-size", "64", "--prototypes", "6", "--proj-hidden", "32",
       "--proj-dim", "16", "--warmup-episodes", "1", "--eval-every", "1"]
# one episode, of fresh weights
FIRST = ["--limit", "64", "--epochs", "1", "--warmup-episodes", "0", "--teacher-features", "captions"]


def proto_gradients(model, images, tokens, D, t):
    model.zero_grad()
    *_, h_i, h_t, _, r = model(images, tokens)
    loss = (protoclip.proto_loss(h_i, D, 2 * D, t, r) + protoclip.proto_loss(h_t, D, D, t, r)) / 2
    loss.backward()
    return loss.detach()


class Captions:
    """Six captions, and a tokenizer of three letters."""
    vocab_size = 3

    def __len__(self):
        return 6

    def captions(self, i):
        return [("a", "b c", "a b")[i % 3]]

    def encode(self, text):
        return ["abc".index(letter) for letter in text.split()]


def wait_for_captions(rank, port, path):
    """Two ranks that give up on each other after 2 seconds, where the features of the captions take 6."""
    os.environ.update(MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=2))
    make, start = protoclip.caption_features, time.perf_counter()
    protoclip.caption_features = lambda *args: time.sleep(6) or make(*args)
    teacher = protoclip.open_teacher("captions", Captions(), Captions(), path, rank, anew=True)
    seconds = time.perf_counter() - start
    protoclip.caption_features = make
    dist.destroy_process_group()
    torch.save((seconds, torch.tensor(teacher)), path / f"waited{rank}")


def on_ranks(rank, port, path):
    world = 3
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = protoclip.ProtoCLIP(**SMALL, **HEADS).double()
    for head in (model.image_head, model.text_head):
        head.eval()  # what batch norm shares only there
    images, tokens, t = torch.randn(6, 3, 32, 32, dtype=torch.float64), captions(6), torch.arange(6) % 4
    D = .5 * unit(4, 8)
    truth = proto_gradients(model, images, tokens, D, t)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    separate, noise = blobs(100, 6)[0], torch.cat([unit(70, 4), unit(1, 4).expand(31, 4)])
    one = [protoclip.kmeans(x, k) for x, k in ((separate, 6), (noise, 10), (noise, 65))]
    means = protoclip.cluster_means(noise, one[1][0], 12)

    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    shards = [protoclip.kmeans(x[rank::world], k) for x, k in ((separate, 6), (noise, 10), (noise, 65))]
    found["labels"] = all(torch.equal(a[0], b[0][rank::world]) for a, b in zip(shards, one))
    found["kmeans"] = max(max((a[1] - b[1]).abs().max().item(), abs(a[2] - b[2])) for a, b in zip(shards, one))
    own_means = protoclip.cluster_means(noise[rank::world], one[1][0][rank::world], 12)
    found["means"] = (own_means - means).abs().max().item()
    model.logit_scale.requires_grad_(False)
    own = slice(2 * rank, 2 * rank + 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss = proto_gradients(parallel, images[own], tokens[own], D, t[own])
    dist.all_reduce(loss)
    found["loss"] = abs(loss.item() / world - truth.item())
    found["gradients"] = max((model.get_parameter(name).grad - g).abs().max().item() for name, g in gradients.items())
    dist.destroy_process_group()
    torch.save(found, path / f"found{rank}")
    if rank < 2:  # and the script itself, on two
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port + 1))
        protoclip.main(RUN + FIRST + ["--out", str(path / "two")])
        wait_for_captions(rank, port + 2, path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which three processes have left what they found."""
    path = tmp_path_factory.mktemp("ranks")
    spawn(on_ranks, (29500 + os.getpid() % 2000, path), 3)
    return path


@pytest.mark.slow
def test_ranks_equal_one_process(ranks, tmp_path):
    for rank in range(3):
        found = torch.load(ranks / f"found{rank}")
        assert found.pop("labels") and max(found.values()) < 1e-10, found
    protoclip.main(RUN + FIRST + ["--out", str(tmp_path)])
    one, two = (protoclip.load_checkpoint(out / "last.pt")["episode"] for out in (tmp_path, ranks / "two"))
    assert torch.equal(one["samples"], two["samples"]) and one["labels"].shape == (4, 64)
    assert torch.equal(one["labels"], two["labels"])
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in ("centroids", "targets"))
    first = [json.loads((out / "log.jsonl").read_text().splitlines()[0]) for out in (tmp_path, ranks / "two")]
    assert first[0]["image_objective"] == pytest.approx(first[1]["image_objective"], rel=1e-4)


@pytest.mark.slow
def test_ranks_wait_for_a_slow_teacher(ranks):
    """Rank 0 takes longer for the features of the captions than the process group waits."""
    (slow, made), (waited, read) = (torch.load(ranks / f"waited{rank}") for rank in (0, 1))
    assert min(slow, waited) > 6 and torch.equal(made, read) and made.shape == (6, 3)


# runs

def weights(path):
    return torch.load(path, weights_only=True)["model"]


def rows_with(key, out):
    return [row[key] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in row]


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Trained once, for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "find_tokenizer", lru_cache(data.find_tokenizer))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 3 episodes of 4 steps, the first without prototypes."""
    out = tmp_path_factory.mktemp("finished")
    protoclip.main(RUN + ["--out", str(out)])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished):
    state = protoclip.load_checkpoint(finished / "last.pt")
    assert state["script"] == "protoclip" and state["step"] == 12 == len(rows_with("loss", finished))
    assert len(rows_with("extract_seconds", finished)) == 2  # none in the first episode
    episode = state["episode"]
    assert episode["centroids"].shape == episode["targets"].shape == (2, 6, 16)
    assert episode["labels"].shape == (2, 64) and episode["samples"].shape == (64,)
    assert sorted(episode["samples"].tolist()) == sorted(protoclip.sample_episode(0, 2, 64, 96).tolist())
    clips, protos, losses = (rows_with(key, finished) for key in ("clip", "proto", "loss"))
    assert losses[:4] == clips[:4] and all(p == pytest.approx(math.log(6)) for p in protos[:4])
    assert all(loss == pytest.approx(c + p, rel=1e-5) for loss, c, p in zip(losses[4:], clips[4:], protos[4:]))
    for name in ("captions", "image-prototypes", "text-prototypes"):
        assert (finished / f"{name}.png").stat().st_size > 1000
    model, tokenizer, _ = evaluator.load(finished / "last.pt")
    assert type(model) is protoclip.ProtoCLIP and model.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
    a, b = (list(head.parameters()) for head in (model.image_head, model.text_head))
    assert any(not torch.equal(p, q) for p, q in zip(a, b))
    assert 0 <= model.logit_scale_proto <= math.log(100)


class Killed(BaseException):
    """What ends a run at once."""


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(finished, tmp_path, monkeypatch):
    """Killed in extraction, in K-means, stopped inside an episode, killed in training, then to the end."""
    forward, kmeans, calls = protoclip.ProtoCLIP.forward, protoclip.kmeans, Counter()
    kills = (({"extraction": 3}, Killed, 4), ({"kmeans": 2}, Killed, 4), ({"training": 2}, SystemExit, 6),
             ({"training": 4}, Killed, 8))

    def watch(what):
        calls[what] += 1
        if calls[what] == end.get(what):
            if stop is Killed:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    def watched_forward(model, *batch):
        watch("training" if model.training else "extraction")
        return forward(model, *batch)

    def watched_kmeans(*args, **kwargs):
        watch("kmeans")
        return kmeans(*args, **kwargs)

    monkeypatch.setattr(protoclip.ProtoCLIP, "forward", watched_forward)
    monkeypatch.setattr(protoclip, "kmeans", watched_kmeans)
    for end, stop, step in kills:
        calls.clear()
        with pytest.raises(stop):
            protoclip.main(RUN + ["--out", str(tmp_path)])
        assert protoclip.load_checkpoint(tmp_path / "last.pt")["step"] == step
    end = {}
    protoclip.main(RUN + ["--out", str(tmp_path)])
    expected, found = (protoclip.load_checkpoint(out / "last.pt") for out in (finished, tmp_path))
    assert all(torch.equal(expected["model"][k], found["model"][k]) for k in expected["model"])
    assert all(torch.equal(value, found["episode"][name]) for name, value in expected["episode"].items())
    for key in ("loss", "image_objective"):
        assert rows_with(key, finished) == rows_with(key, tmp_path)


@pytest.mark.slow
def test_an_episode_is_its_definition(tmp_path, monkeypatch):
    """Features sample by sample, groups, back translation, targets and the first loss, written down slowly."""
    clusters, losses, models = [], [], []
    kmeans, proto_loss, build = protoclip.kmeans, protoclip.proto_loss, protoclip.build

    def watched_kmeans(x, *how):
        clusters.append((x.clone(), *kmeans(x, *how)))
        return clusters[-1][1:]

    def watched_loss(h, *rest):
        loss = proto_loss(h, *rest)
        losses.append((h.detach(), *rest, loss.item()))
        return loss

    monkeypatch.setattr(protoclip, "kmeans", watched_kmeans)
    monkeypatch.setattr(protoclip, "proto_loss", watched_loss)
    monkeypatch.setattr(protoclip, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    protoclip.main(RUN + FIRST + ["--out", str(tmp_path), "--lr", "0", "--target-temperature", ".1"])
    episode = protoclip.load_checkpoint(tmp_path / "last.pt")["episode"]
    labels, samples = episode["labels"], episode["samples"]

    # the order is that of training, the crops are others; one process without batches
    tokenizer, preprocess = data.find_tokenizer(None, "toy"), data.Preprocess(32)
    dataset = data.open_dataset("toy", lambda *sample: protoclip.views(*sample, tokenizer, 32, "clip"), 64)
    batch, = data.EpochBatches(64, 64, indices=protoclip.sample_episode(0, 0, 64, 64), stream=1)
    model, features = models[-1].eval(), []
    for head in (model.image_head, model.text_head):
        head[1].reset_running_stats()  # nothing else has changed since
    with torch.no_grad():
        for sample in map(dataset.__getitem__, batch):
            *_, h_i, h_t, _, _ = model(preprocess.normalize(sample["images"][None]), sample["tokens"][None])
            features.append((h_i[0], h_t[0], sample["index"]))
    (x_i, t_i, C_i, _), (x_t, t_t, C_t, _), (e, t_e, _, _) = clusters
    assert samples.tolist() == [f[2] for f in features] and len(set(samples.tolist())) < 64  # repeats keep their places
    for x, i in ((x_i, 0), (x_t, 1)):
        assert (x - torch.stack([f[i] for f in features])).abs().max() < 1e-5
    teacher = np.load(tmp_path / "teacher.npy")
    assert np.array_equal(e.numpy(), teacher[samples.numpy()])
    assert torch.equal(labels, torch.stack([t_t, t_i, t_e, t_e]))
    for row, (x, t) in enumerate(((x_i, t_t), (x_t, t_i), (x_i, t_e), (x_t, t_e))):
        D = torch.zeros(6, 16, dtype=torch.float64)
        for k in range(6):
            members = [x[i].double() for i in range(64) if t[i] == k]
            D[k] = sum(members) / len(members) if members else 0
        assert (episode["centroids"][row] - D).abs().max() < 1e-6
        if row < 2:
            C = (C_t, C_i)[row].double()
            T = torch.stack([sum(w * d for w, d in zip((C @ c / .1).softmax(0), D)) for c in C])
        else:
            T = D
        assert (episode["targets"][row] - T).abs().max() < 1e-6
    # the losses of the last step: places 48 .. 63 of the episode
    for row, (h, D, T, t, scale, loss) in enumerate(losses[-4:]):
        assert torch.equal(t, labels[row, 48:])
        C = (C_t, C_i)[row].double() if row < 2 else 100 * torch.eye(6, dtype=torch.float64)  # as good as hard
        slow = slow_proto_loss(h.double(), D.double(), C, t, .1, scale.double())
        assert loss == pytest.approx(slow.item(), abs=1e-5)


@pytest.mark.slow
def test_epochs_are_as_long_as_clips(tmp_path):
    """31 pairs are one batch of 16 an epoch, so one episode: the pairs that are left over do not make a further one."""
    flags = ["--limit", "31", "--epochs", "2", "--warmup", "1", "--prototypes", "1", "--out", str(tmp_path)]
    protoclip.main(RUN + flags)
    assert protoclip.load_checkpoint(tmp_path / "last.pt")["step"] == 2


@pytest.mark.slow
def test_tests_are_due_by_epochs(monkeypatch, tmp_path):
    """4 epochs of 6 steps are 6 episodes of 4 steps; tests follow the episode in which an even epoch ends."""
    monkeypatch.setattr(evaluator, "evaluate", lambda *args, **how: {})
    protoclip.main(RUN + ["--epochs", "4", "--eval-every", "2", "--w-proto", "0", "--out", str(tmp_path)])
    rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "eval" in row] == [12, 24]


@pytest.mark.slow
def test_bad_step_leaves_no_trace(monkeypatch, tmp_path):
    """A picture that makes everything NaN: weights and running statistics stay as they were."""
    seen, forward = [], protoclip.ProtoCLIP.forward

    def watched(model, images, tokens):
        # batch norms also count their batches, which nothing reads
        seen.append([v.clone() for v in model.state_dict().values() if v.is_floating_point()])
        return forward(model, images * (math.nan if len(seen) == 2 else 1), tokens)

    monkeypatch.setattr(protoclip.ProtoCLIP, "forward", watched)
    protoclip.main(RUN + ["--out", str(tmp_path), "--w-proto", "0"])
    changes = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(seen, seen[1:])]
    assert changes == [True, False] + [True] * 9 and rows_with("bad_steps", tmp_path)[-1] == 1
    assert not rows_with("extract_seconds", tmp_path)  # nothing to extract for
    assert not (tmp_path / "text-prototypes.png").exists()
    assert all(v.isfinite().all() for v in weights(tmp_path / "last.pt").values())


@pytest.mark.slow
def test_teacher_features_and_init(finished, tmp_path):
    towers = {k: v for k, v in weights(finished / "last.pt").items() if "head" not in k and "proto" not in k}
    clip.save_checkpoint(tmp_path / "clip.pt", **towers)
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(96, 5)).astype(np.float16))
    flags = RUN + ["--epochs", "1", "--warmup-episodes", "0", "--lr", "0", "--out", str(tmp_path / "run")]
    given = ["--teacher-features", str(tmp_path / "teacher.npy"), "--init", str(tmp_path / "clip.pt"), "--amp", "bf16"]
    protoclip.main(flags + given)
    state = protoclip.load_checkpoint(tmp_path / "run/last.pt")
    episode = state["episode"]
    assert episode["centroids"].shape == (4, 6, 16) and torch.equal(episode["centroids"][2:], episode["targets"][2:])
    assert torch.equal(episode["labels"][2], episode["labels"][3]) and rows_with("external", tmp_path / "run")
    assert all(torch.equal(v, state["model"][k]) for k, v in towers.items())
    for wrong in (np.zeros((95, 5)), np.zeros(96), np.array([None] * 96)):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(SystemExit, match="wrong.npy.*96 rows"):
            protoclip.main(flags + ["--restart", "--teacher-features", str(tmp_path / "wrong.npy")])
    with pytest.raises(SystemExit, match="missing.npy"):
        protoclip.main(flags + ["--restart", "--teacher-features", str(tmp_path / "missing.npy")])
    with pytest.raises(SystemExit, match="--episode-size"):
        protoclip.main(flags + ["--restart", "--episode-size", "8"])


def test_recipes_are_complete():
    parsed = vars(protoclip.parse_args([]))
    for name, recipe in protoclip.RECIPES.items():
        assert set(recipe) <= set(parsed), name
        assert set(recipe) - {"eval", "eval_every"} == set(protoclip.RECIPES["cc3m"]), name
        assert 10 <= recipe["episode_size"] / recipe["prototypes"] < 10.5
    assert set(protoclip.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    protoclip.main(RUN + FIRST + ["--limit", "96", "--epochs", "6", "--out", str(tmp_path), "--amp", amp])
    seen = [loss for loss in rows_with("clip", tmp_path) if loss is not None]  # fp16's first scale may be too large
    assert seen[-1] < seen[0] and len(rows_with("cluster_seconds", tmp_path)) > 1
