"""aclip.py: masks, losses and the whole step against slow definitions in float64, W ranks against one process, runs."""
import copy
import json
import math
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import aclip
import data
import eval as evaluator
from ranks import spawn
from test_clip import SMALL, captions, slow_clip_loss, unit

TINY = SMALL | dict(patch_size=4, ssl_mlp_dim=24)  # 8x8 patches
LONE = dict(SMALL, ssl_mlp_dim=0)


def boxes(n, seed=0, size=(400, 300)):
    rng = random.Random(seed)
    return torch.stack([aclip.three_crops(size, rng) for _ in range(n)])


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# crops

@pytest.mark.parametrize("size", ((400, 300), (37, 41), (1000, 20), (20, 1000), (1, 1), (2, 3)))
def test_three_crops_lie_in_one_another(size):
    width, height = size
    for (t1, l1, h1, w1), (t2, l2, h2, w2), (t, l, h, w) in boxes(300, size=size).tolist():
        assert min(h1, w1, h2, w2) > 0 and 0 <= t <= min(t1, t2) and 0 <= l <= min(l1, l2)
        assert max(t1 + h1, t2 + h2) <= t + h <= height and max(l1 + w1, l2 + w2) <= l + w <= width
    assert torch.equal(aclip.three_crops(size, random.Random(5)), aclip.three_crops(size, random.Random(5)))


def test_three_crops_are_spread():
    found = boxes(4000, size=(300, 300)).double()
    share = found[..., 2] * found[..., 3] / 300 ** 2
    assert share[:, :2].min() > .49 and .53 < share[:, :2].mean() < .8 and share[:, 2].mean() > .85
    assert (found[:, 0] - found[:, 1]).abs().mean() > 10  # independent views
    assert (found[:, 2, :2] == 0).all(1).double().mean() < .5 and (share[:, 2] < 1).double().mean() > .5


# masks

def bilinear(image, y, x):
    """The value of image [s, s] at (y, x) in units of its pixels, centres at .5, edges continued."""
    s = len(image)
    y, x = min(max(y - .5, 0), s - 1), min(max(x - .5, 0), s - 1)
    a, b = min(int(y), s - 2), min(int(x), s - 2)
    y, x = y - a, x - b
    return (
        image[a][b] * (1 - y) * (1 - x)
        + image[a][b + 1] * (1 - y) * x
        + image[a + 1][b] * y * (1 - x)
        + image[a + 1][b + 1] * y * x
    )


def slow_keep(score, boxes, grid):
    rows = []
    for v in (0, 1):
        for s, found in zip(score, boxes.tolist()):
            n = math.isqrt(len(s))
            image, (t, l, h, w), (top, left, height, width) = s.view(n, n).tolist(), found[v], found[2]
            value = [
                [
                    bilinear(
                        image,
                        (t + (i + 0.5) / grid * h - top) / height * n,
                        (l + (j + 0.5) / grid * w - left) / width * n,
                    )
                    for j in range(grid)
                ]
                for i in range(grid)
            ]
            side = 2 if grid in (8, 10, 12, 14) else 1
            cells = {}
            for i in range(grid):
                for j in range(grid):
                    cells.setdefault((i // side, j // side), []).append((value[i][j], i * grid + j))
            ranked = sorted(cells.values(), key=lambda cell: -sum(v for v, _ in cell))[:len(cells) // 2 + 1]
            rows.append(sorted(patch for cell in ranked for _, patch in cell))
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "seen, grid, kept",
    ((14, 14, 100), (7, 14, 100), (8, 8, 36), (16, 8, 36), (7, 7, 25), (4, 4, 9), (6, 6, 19), (9, 9, 41)),
)
def test_attentive_keep_is_its_definition(seen, grid, kept):
    score, found = rand(6, seen ** 2), boxes(6)
    keep = aclip.attentive_keep(score, found, grid)
    assert keep.dtype == torch.int64 and keep.shape == (12, kept)
    assert torch.equal(keep.sort(1).values, slow_keep(score, found, grid))
    for other in (score * 7 + 3, score.float() * 1e-3):
        assert (aclip.attentive_keep(other, found, grid).sort(1).values == keep.sort(1).values).double().mean() > .99
    if seen == grid:  # a view that is the EMA view
        same = found[:, 2:].expand(-1, 3, -1)
        pooled = F.avg_pool2d(score.view(6, 1, grid, grid), 2).flatten(1) if kept in (100, 36) else score
        keep = aclip.attentive_keep(score, same)
        expected = torch.zeros(pooled.shape).scatter_(1, pooled.topk(pooled.shape[1] // 2 + 1).indices, 1)
        if kept in (100, 36):
            expected = expected.view(6, 1, grid // 2, -1).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)
        assert torch.equal(torch.zeros(12, grid ** 2).scatter_(1, keep, 1), expected.repeat(2, 1))


def test_kept_patches_are_those_of_the_released_code():
    """ACLIP.get_mask: the map enlarged to the EMA crop's pixels, cut out, reduced to the view's patches. Interpolation
    twice instead of once: a few cells at the border of the choice differ."""
    smooth = F.interpolate(rand(20, 1, 4, 4), (14, 14), mode="bicubic").flatten(1)
    common = []
    for i, (found, keep) in enumerate(
        zip(boxes(20), aclip.attentive_keep(smooth, boxes(20)).unflatten(0, (2, 20)).transpose(0, 1))
    ):
        *crops, (top, left, height, width) = found.tolist()
        large = F.interpolate(smooth[i].view(1, 1, 14, 14), (height, width), mode="bilinear")
        for (t, l, h, w), own in zip(crops, keep.tolist()):
            cells = F.interpolate(large[..., t - top:t - top + h, l - left:l - left + w], (14, 14), mode="bilinear")
            best = F.interpolate(cells, (7, 7), mode="bilinear").flatten().topk(25).indices.tolist()
            common.append(sum(p // 28 * 7 + p % 14 // 2 in best for p in own))
    assert sum(common) / len(common) > 99 and min(common) >= 92


def test_bright_rectangle_is_kept():
    """Bright in the picture: rows 100..200, columns 50..150 of 400 x 400; each view keeps what it shows of that."""
    score = torch.zeros(16, 16)
    score[4:8, 2:6] = 1
    found = torch.tensor([[[50, 0, 300, 200], [100, 40, 300, 320], [0, 0, 400, 400]]])
    for (t, l, h, w), keep in zip(found[0, :2].tolist(), aclip.attentive_keep(score.view(1, -1), found)):
        centre = [(t + (p // 16 + .5) / 16 * h, l + (p % 16 + .5) / 16 * w) for p in range(256)]
        inside = {p for p, (y, x) in enumerate(centre) if 100 < y < 200 and 50 < x < 150}
        assert len(inside) > 15 and inside <= set(keep.tolist())


def test_random_keep():
    keep = aclip.random_keep(50, 64, 32, torch.Generator().manual_seed(0))
    assert (
        keep.shape == (50, 32)
        and all(len({*row}) == 32 for row in keep.tolist())
        and 0 <= keep.min()
        and keep.max() < 64
    )
    assert torch.equal(keep, aclip.random_keep(50, 64, 32, torch.Generator().manual_seed(0)))
    assert torch.bincount(keep.flatten(), minlength=64).float().std() < 6


# losses

def slow_ntxent(a, b, temperature):
    z = torch.cat([a, b])
    z = z / z.norm(dim=1, keepdim=True)
    n, total = len(a), 0.
    for i in range(2 * n):
        logits = {j: (z[i] * z[j]).sum() / temperature for j in range(2 * n) if j != i}
        total = total + torch.stack([*logits.values()]).logsumexp(0) - logits[(i + n) % (2 * n)]
    return total / (2 * n)


def test_ntxent_is_its_definition():
    a, b = (rand(6, 5, seed=s).sub(.5).requires_grad_() for s in (0, 1))
    fast, slow = aclip.ntxent_loss(a, b, .3), slow_ntxent(a, b, .3)
    assert fast.dtype == torch.float64 and abs(fast - slow) < 1e-12
    for x, y in zip(torch.autograd.grad(fast, (a, b)), torch.autograd.grad(slow, (a, b))):
        assert (x - y).abs().max() < 1e-12
    order = torch.randperm(6)
    for x, y in ((b, a), (a[order], b[order]), (a * 3, b * rand(6, 1))):
        assert aclip.ntxent_loss(x, y, .3).item() == pytest.approx(fast.item(), abs=1e-12)


def test_ntxent_closed_forms():
    eye = torch.eye(5, 8, dtype=torch.float64)
    assert aclip.ntxent_loss(eye, 2 * eye, .1).item() == pytest.approx(math.log(1 + 8 * math.exp(-10)), abs=1e-12)
    assert aclip.ntxent_loss(torch.ones(5, 3), torch.ones(5, 3), .1).item() == pytest.approx(math.log(9), abs=1e-5)
    a = unit(7, 4)  # the released code's slip, view 1 with itself: a push apart and nothing else
    push = (((a @ a.T - 1) / .1).exp().sum(1) - 1).mul(2).add(1).log().mean()
    assert aclip.ntxent_loss(a, a, .1).item() == pytest.approx(push.item(), abs=1e-10)


def test_byol_closed_forms():
    q, y = torch.eye(4, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for target, expected in ((5 * q, 0), (y[2:], 2), (-q, 4), (q + y[2:], 2 - 2 ** .5)):
        assert aclip.byol_loss(3 * q, target).item() == pytest.approx(expected, abs=1e-12)
    q, y = unit(4, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_()
    aclip.byol_loss(q, y).backward()
    assert y.grad is None and q.grad.abs().max() > 0


def test_losses_are_fp32_under_autocast():
    a, b = unit(16, 32).float(), unit(16, 32, seed=1).float()
    for loss in (lambda x, y: aclip.ntxent_loss(x, y, .1), aclip.byol_loss):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(a.bfloat16(), b.bfloat16())
        assert found.dtype == torch.float32 and abs(found - loss(a.bfloat16().double(), b.bfloat16().double())) < 1e-5


def test_batch_norm_is_pytorchs():
    ours, theirs = aclip.SyncBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = rand(6), rand(6, seed=1)
    x = rand(9, 6, seed=2).requires_grad_()
    assert (ours(x) - theirs(x)).abs().max() < 1e-12
    a, b = (torch.autograd.grad(norm(x).pow(3).sum(), (x, norm.weight)) for norm in (ours, theirs))
    assert all((g - h).abs().max() < 1e-10 for g, h in zip(a, b))
    shifted = 1e4 + torch.randn(64, 6)  # where E[x^2] - E[x]^2 would be noise
    assert (aclip.SyncBatchNorm(6)(shifted).var(0, correction=0) - 1).abs().max() < 1e-2


# the average of the weights

def test_update_ema():
    torch.manual_seed(0)
    online, start = nn.Linear(3, 2), nn.Linear(3, 2)
    for momentum in (1., 0., .75, torch.tensor(1.), torch.tensor(0.), torch.tensor(.75)):
        for dtype in (torch.float32, torch.float64):
            ema, new = copy.deepcopy(start).to(dtype), copy.deepcopy(online).to(dtype)
            places = [p.data_ptr() for p in ema.parameters()]
            aclip.update_ema(ema, new, momentum)
            assert places == [p.data_ptr() for p in ema.parameters()]
            for e, s, o in zip(ema.parameters(), start.parameters(), online.parameters()):
                expected = float(momentum) * s + (1 - float(momentum)) * o
                assert torch.equal(e, expected.to(dtype)) if momentum in (0, 1) else (e - expected).abs().max() < 1e-6


def test_momentum_goes_from_its_start_to_one():
    m = [aclip.lr_at(t, 100, 0, .996, end=1.) for t in range(101)]
    assert m[0] == pytest.approx(.996) and m[100] == 1 and m == sorted(m)
    assert m[37] == pytest.approx(1 + .5 * (.996 - 1) * (1 + math.cos(math.pi * .37)))


# the tower

def test_masked_tower():
    torch.manual_seed(0)
    visual = aclip.ACLIP(**TINY).double().visual
    images, keep = rand(3, 3, 32, 32), aclip.random_keep(3, 64, 20)
    masked, order = visual.class_token(images, keep), torch.randperm(20)
    assert (visual.class_token(images, keep[:, order]) - masked).abs().max() < 1e-12
    assert (visual.class_token(images, torch.arange(64).expand(3, -1)) - visual.class_token(images)).abs().max() < 1e-12
    assert (visual.class_token(images) @ visual.proj - visual(images)).abs().max() < 1e-12
    mask = torch.zeros(3, 64, dtype=torch.float64).scatter_(1, keep, 1).view(3, 1, 8, 8)
    mask = F.interpolate(mask, (32, 32))
    assert (
        visual.class_token(images * mask + 9 * (1 - mask), keep) - masked
    ).abs().max() < 1e-12  # what is dropped has no say
    assert (visual.class_token(images * mask, keep) - visual.class_token(images * mask)).abs().max() > 1e-3


def test_same_start_as_clip():
    """Comparisons begin at clip.py's weights; the patches' projection is computed once a pass."""
    towers = []
    for cls in (aclip.CLIP, aclip.ACLIP):
        torch.manual_seed(0)
        towers.append(cls(**(SMALL | dict(quick_gelu=True))))
    ours = towers[1].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in towers[0].state_dict().items())
    images, calls = torch.rand(2, 3, 32, 32), []
    assert torch.equal(towers[1].encode_image(images), towers[0].encode_image(images))  # QuickGELU too
    towers[1].visual.conv1.register_forward_hook(lambda *_: calls.append(1))
    towers[1].visual.class_token(images)
    assert calls == [1]


def full_attention(visual, images):
    """The score by PyTorch's own attention with all its weights; and the class token."""
    x, score = visual.embed(images), 0
    for block in visual.transformer.resblocks:
        theirs = nn.MultiheadAttention(x.shape[-1], x.shape[-1] // 64, batch_first=True).double()
        theirs.load_state_dict(block.attn.state_dict())
        h = block.ln_1(x)
        out, weights = theirs(h, h, h)  # the mean over heads
        score, x = score + weights[:, 0, 1:], x + out
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]), score / len(visual.transformer.resblocks), weights


def test_score_is_full_attention():
    torch.manual_seed(0)
    visual = aclip.ACLIP(**(TINY | dict(vision_width=128))).double().visual
    for p in visual.transformer.parameters():
        p.data += .1 * torch.randn_like(p)  # biases too
    images = rand(3, 3, 32, 32)
    (token, score), (expected_token, expected_score, weights) = visual.attend(images), full_attention(visual, images)
    assert score.shape == (3, 64) and score.min() >= 0 and (score.sum(1) < 1).all()
    assert (score - expected_score).abs().max() < 1e-12 and (token - expected_token).abs().max() < 1e-10
    assert (token - visual.class_token(images)).abs().max() < 1e-10
    assert score.std(1).min() > 1e-4


def test_tower_at_half_the_size():
    torch.manual_seed(0)
    visual = aclip.ACLIP(**TINY).double().visual
    images = rand(2, 3, 16, 16)
    half = copy.deepcopy(visual)
    table = (
        visual.positional_embedding[1:].view(4, 2, 4, 2, -1).mean((1, 3)).view(16, -1)
    )  # the mean of the four positions that meet
    half.positional_embedding = nn.Parameter(torch.cat([visual.positional_embedding[:1], table]))
    (token, score), (expected_token, expected_score) = visual.attend(images), half.attend(images)
    assert (
        score.shape == (2, 16)
        and (score - expected_score).abs().max() < 1e-12
        and (token - expected_token).abs().max() < 1e-10
    )


# the whole step

def slow_heads(head, x):
    for layer in head:
        x = (
            F.batch_norm(x, None, None, layer.weight, layer.bias, True, eps=1e-5)
            if isinstance(layer, aclip.SyncBatchNorm)
            else layer(x)
        )
    return x


def slow_step(model, ema, view_1, view_2, wide, found, tokens):
    """Losses of the masked and self-supervised step, sample by sample, from the description of the method."""
    grid = math.isqrt(len(model.visual.positional_embedding) - 1)
    with torch.no_grad():
        class_token, score, _ = full_attention(ema.visual, wide)
        target, keep = slow_heads(ema.projector, class_token), slow_keep(score, found, grid)
    h = []
    for image, kept in zip(torch.cat([view_1, view_2]), keep):
        x = torch.cat([model.visual.embed(image[None])[:, :1], model.visual.embed(image[None])[:, 1:][:, kept]], 1)
        for block in model.visual.transformer.resblocks:
            x = block(x)
        h.append(model.visual.ln_post(x[0, 0]))
    h = torch.stack(h)
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (h @ model.visual.proj, model.encode_text(tokens)))
    B, s = len(y), model.logit_scale.exp()
    clip = .5 * slow_clip_loss(x[:B], y, s) + .5 * slow_clip_loss(x[B:], y, s)
    g = slow_heads(model.simclr, h)
    p = slow_heads(model.predictor, slow_heads(model.projector, h))
    byol = sum(2 - 2 * (p[i] @ target[i % B]) / p[i].norm() / target[i % B].norm() for i in range(2 * B)) / (2 * B)
    return clip, slow_ntxent(g[:B], g[B:], .1), byol


def step(model, ema, view_1, view_2, wide, found, tokens, parallel=None):
    """The same with the parts of the script, as its main does it."""
    with torch.no_grad():
        class_token, score = ema.visual.attend(wide)
        keep, target = aclip.attentive_keep(score, found), ema.projector(class_token).repeat(2, 1)
    x, y, scale, simclr, prediction = (model if parallel is None else parallel)(
        torch.cat([view_1, view_2]), tokens, keep
    )
    clip = torch.stack([aclip.clip_loss(v, y, scale) for v in x.chunk(2)]).mean()
    return clip, aclip.ntxent_loss(*simclr.chunk(2), .1), aclip.byol_loss(prediction, target)


def example(n=8):
    torch.manual_seed(0)
    model = aclip.ACLIP(**TINY).double()
    ema = copy.deepcopy(model).requires_grad_(False)
    for p in ema.parameters():
        p.data += .02 * torch.randn_like(p)
    return model, ema, [rand(n, 3, 32, 32, seed=s) for s in range(3)] + [boxes(n), captions(n)]


def gradients(model, losses):
    model.zero_grad()
    clip, ntxent, byol = losses
    (clip + ntxent + 2 * byol).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_step_is_its_definition():
    model, ema, batch = example()
    fast, slow = step(model, ema, *batch), slow_step(model, ema, *batch)
    assert all(abs(a - b) < 1e-10 for a, b in zip(fast, slow))
    fast, slow = gradients(model, fast), gradients(model, slow)
    assert all((fast[name] - slow[name]).abs().max() < 1e-10 for name in fast)


def test_gradients_that_must_be_absent():
    model, ema, batch = example()
    clip, ntxent, byol = step(model, ema, *batch)
    assert all(p.grad is None for p in ema.parameters()) and not model.visual.conv1.weight.requires_grad

    def reached(loss):
        grads = torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True, allow_unused=True
        )
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {name for name, g in zip(names, grads) if g is not None and g.abs().max() > 1e-12}

    text = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(evaluator.ENCODERS) and not name.startswith("visual")
    }
    assert not reached(clip) & {
        n for n, _ in model.named_parameters() if n.split(".")[0] in ("simclr", "projector", "predictor")
    }
    assert all(not reached(loss) & (text | {"visual.proj"}) for loss in (ntxent, byol))
    assert {n.split(".")[0] for n in reached(byol)} == {"visual", "projector", "predictor"}
    assert {n.split(".")[0] for n in reached(ntxent)} == {"visual", "simclr"}


def test_without_masks_and_heads_it_is_clip():
    torch.manual_seed(0)
    model = aclip.ACLIP(**LONE).double()
    plain = aclip.build(model.state_dict()).double()
    images, tokens = rand(4, 3, 32, 32), captions(4)
    x, y, scale, *none = model(torch.cat([images, images]), tokens)
    expected = aclip.clip_loss(*plain(images, tokens))
    assert none == [None, None] and all(abs(aclip.clip_loss(v, y, scale) - expected) < 1e-12 for v in x.chunk(2))
    assert not any(name.startswith(("simclr", "pro", "pre")) for name in model.state_dict())


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    model, ema, batch = example()
    losses = step(model, ema, *batch)
    truth, losses = gradients(model, losses), torch.stack(losses).detach()
    dist.init_process_group("gloo", rank=rank, world_size=world)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    own = step(model, ema, *(x.chunk(world)[rank] for x in batch), parallel)
    found = gradients(model, own)
    own = torch.stack(own).detach()
    dist.all_reduce(own)
    if rank == world - 1:
        torch.save((own / world - losses, {name: (found[name] - truth[name]).abs().max() for name in truth}), path)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_process(tmp_path):
    spawn(on_ranks, (2, 29500 + os.getpid() % 2000 + 7, tmp_path / "found"), 2)
    losses, worst = torch.load(tmp_path / "found")
    assert losses.abs().max() < 1e-10 and max(worst.values()) < 1e-10 and len(worst) > 50


# sizes, checkpoints

def test_parameters_of_the_paper():
    with torch.device("meta"):
        model = aclip.build("ViT-B-16", aclip.ACLIP)
    count = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in model.named_children()}
    assert count["simclr"] == pytest.approx(21.0, abs=.1) and count["projector"] == pytest.approx(4.2, abs=.1)
    assert count["predictor"] == pytest.approx(2.1, abs=.1)
    trainable = aclip.param_groups(model, .5)
    assert sum(p is model.visual.conv1.weight for group in trainable for p in group["params"]) == 0
    for name in ("ViT-B-32", "ViT-S-16", "tiny", "tiny-4"):
        with torch.device("meta"):
            aclip.build(name, aclip.ACLIP)


def sample_of(image, caption, rng, **changes):
    options = dict(tokenizer=data.Tokenizer([("a", "b")]), size=32, augment="aclip", views=2, ema_size=16,
                   random_patches=0)
    return aclip.aclip_views(image, caption, rng, **options | changes)


def sample(**changes):
    return sample_of(data.ToyDataset(3, None).image(0), "a b", random.Random(1), **changes)


def test_views_of_a_sample():
    two, one = sample(), sample(views=1)
    assert (
        two["images"].shape == (2, 3, 32, 32)
        and two["colors"].shape == (2, 8)
        and two["ema_images"].shape == (3, 16, 16)
    )
    assert (
        two["images"].dtype == torch.uint8
        and two["boxes"].shape == (3, 4)
        and (two["colors"][0] != two["colors"][1]).any()
    )
    assert torch.equal(one["images"], two["images"][:1]) and torch.equal(one["boxes"], two["boxes"])
    random_masks = sample(random_patches=64)
    assert random_masks["keep"].shape == (2, 32) and torch.equal(
        random_masks["keep"], sample(random_patches=64)["keep"]
    )
    assert (
        "colors" not in sample(augment="clip") and not sample(augment="declip")["colors"][:, 0].any()
    )  # a flip would break the mapping
    whole = data.decode(data.ToyDataset(3, None).image(0))
    for box, image in zip(two["boxes"].tolist(), two["images"]):
        assert torch.equal(image, data.resize_crop(whole, box, 32))


class Knows:
    """An EMA tower whose attention depends on where the object is: to its centre, away from it, or to nothing."""

    def __init__(self, toward, scenes, boxes, middle=0):
        self.visual, self.logit_scale = self, torch.zeros(())
        self.positional_embedding = torch.zeros(65, 1)
        self.toward, self.middle, self.scenes, self.boxes = toward, middle, scenes, boxes

    def attend(self, images):
        score = torch.zeros(len(images), 8, 8)
        for b in range(len(images)):
            scene, (top, left, height, width) = self.scenes[b], self.boxes[b][2].tolist()
            for i in range(8):
                for j in range(8):
                    y, x = top + height * (i + .5) / 8, left + width * (j + .5) / 8
                    score[b, i, j] -= self.toward * math.dist((y, x), (40 * scene["y"], 40 * scene["x"]))
                    score[b, i, j] -= self.middle * math.dist((y, x), (20, 20))
        return None, score.flatten(1)


@pytest.mark.parametrize("size", (32, 8))
def test_object_kept(size):
    """Masks that know where the object is keep all of it, those that shun it little, those that like the middle as much
    as by another picture's attention."""
    dataset = data.ToyDataset(150, None, variant="toy-busy")
    dataset.transform = lambda image, caption, rng: sample_of(image, caption, rng, augment="clip", size=size)
    scenes, samples = [dataset.scene(i) for i in range(150)], [dataset[i, i] for i in range(150)]
    if size == 8:  # decode gives half of the picture's side
        assert all(sample["boxes"][2, 2:].max() <= 20 for sample in samples)
        scenes = [scene | {"y": scene["y"] / 2, "x": scene["x"] / 2} for scene in scenes]
    towers = {name: Knows(sign, scenes, [sample["boxes"] for sample in samples], middle)
              for name, sign, middle in (("toward", 1, 0), ("away", -1, 0), ("middle", 0, 1))}
    kept = {name: aclip.object_kept(tower, data.Preprocess(size), dataset) for name, tower in towers.items()}
    assert kept["toward"][0] > .99 and kept["toward"][0] > kept["toward"][1] + .1
    assert kept["away"][0] < .1 and kept["away"][0] < kept["away"][1] - .1
    assert kept["middle"][0] > .7 and kept["middle"][0] == pytest.approx(kept["middle"][1], abs=.05)


# runs

RUN = [
    "--limit",
    "96",
    "--batch-size",
    "16",
    "--epochs",
    "2",
    "--warmup",
    "3",
    "--eval",
    "",
    "--eval-every",
    "1",
    "--log-every",
    "1",
    "--model",
    "tiny",
    "--ssl-mlp-dim",
    "32",
]


def rows(out, key="loss"):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    aclip.main(RUN + ["--out", str(out), "--eval", "toy", "--eval-every", "9"])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished):
    state = aclip.load_checkpoint(finished / "last.pt")
    assert state["script"] == "aclip" and state["step"] == 12 == len(rows(finished))
    assert {"loss", "clip", "ntxent", "byol"} <= set(rows(finished)[0]) and (
        finished / "masks.png"
    ).stat().st_size > 1000
    assert all(r["loss"] == pytest.approx(r["clip"] + r["ntxent"] + 2 * r["byol"], abs=1e-4) for r in rows(finished))
    results = rows(finished, "eval")[-1]["eval"]
    assert set(results) == {"toy", "toy by EMA"}
    row, = rows(finished, "object_kept")
    assert 0 < row["object_kept"] < 1 and 0 < row["object_kept_by_chance"] < 1
    best = aclip.load_checkpoint(finished / "best.pt")["best"]
    assert best == state["best"] == results["toy"]["top1"]  # of the trained model
    model, tokenizer, preprocess = evaluator.load(finished / "last.pt")
    assert isinstance(model, aclip.ACLIP) and model.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
    online = {name: p.clone() for name, p in model.state_dict().items()}
    model, *_ = evaluator.load(finished / "last.pt", weights="ema")  # the averaged model
    assert all(torch.equal(p, online[name]) == (name == "visual.conv1.weight") for name, p in model.named_parameters())
    assert set(evaluator.load_clip_state(finished / "last.pt")) == {
        n for n in online if n.startswith(evaluator.ENCODERS)
    }
    torch.manual_seed(0)
    drawn = aclip.build("tiny", aclip.ACLIP, vocab=tokenizer.vocab_size, ssl_mlp_dim=32).state_dict()
    assert torch.equal(drawn["visual.conv1.weight"], online["visual.conv1.weight"])  # never trained


@pytest.mark.slow
def test_interrupted_and_resumed_is_bit_identical(finished, tmp_path, monkeypatch):
    calls, update = [], aclip.update_ema

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        update(*arguments)

    flags = RUN + ["--out", str(tmp_path)]
    monkeypatch.setattr(aclip, "update_ema", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aclip.main(flags)
    monkeypatch.setattr(aclip, "update_ema", update)
    aclip.main(flags)
    expected, found = (torch.load(out / "last.pt", weights_only=True) for out in (finished, tmp_path))
    assert all(torch.equal(expected[part][k], found[part][k]) for part in ("model", "ema") for k in expected[part])
    assert [r["loss"] for r in rows(finished)] == [r["loss"] for r in rows(tmp_path)]


@pytest.mark.slow
def test_step_of_main_is_the_definition(tmp_path, monkeypatch):
    """Losses of the first three steps in the log, against the slow step on what main read, with its own average of the
    weights."""
    models, build, batches, loader = [], aclip.build, [], data.loader
    monkeypatch.setattr(aclip, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    monkeypatch.setattr(data, "loader", lambda *a: (batches.append(batch) or batch for batch in loader(*a)))
    seen, clip_loss = [], aclip.clip_loss  # the weights in each step
    monkeypatch.setattr(aclip, "clip_loss", lambda *a: seen.append(copy.deepcopy(models[0])) or clip_loss(*a))
    aclip.main(
        RUN
        + [
            "--limit",
            "24",
            "--batch-size",
            "8",
            "--epochs",
            "1",
            "--warmup",
            "0",
            "--lr",
            "1e-2",
            "--out",
            str(tmp_path),
            "--augment",
            "aclip",
            "--ema-momentum",
            ".6",
        ]
    )
    ema, normalize = copy.deepcopy(seen[0]).double(), data.Preprocess(32).normalize
    for t, (row, batch) in enumerate(zip(rows(tmp_path), batches)):
        model = seen[2 * t].double()
        aclip.update_ema(ema, model, 1 + .5 * (.6 - 1) * (1 + math.cos(math.pi * t / 3)))
        views = [normalize(data.augment(batch["images"][:, v], batch["colors"][:, v])).double() for v in (0, 1)]
        expected = slow_step(
            model, ema, *views, normalize(batch["ema_images"]).double(), batch["boxes"], batch["tokens"]
        )
        for name, value in zip(("clip", "ntxent", "byol"), expected):
            assert row[name] == pytest.approx(value.item(), abs=2e-3), (t, name)


@pytest.mark.slow
def test_bad_step_leaves_no_trace(monkeypatch, tmp_path):
    """A gradient that is not finite at step 3: weights and average of steps 2 and 3 are the same."""
    seen, exact, models, build = [], aclip.byol_loss, [], aclip.build
    averages, update = [], aclip.update_ema

    def watched(*arguments):
        seen.append([p.detach().clone() for p in models[-1].parameters()])
        return exact(*arguments) * (math.nan if len(seen) == 3 else 1)

    def recorded(ema, *rest):
        update(ema, *rest)
        averages.append([p.clone() for p in ema.parameters()])

    monkeypatch.setattr(aclip, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    monkeypatch.setattr(aclip, "byol_loss", watched)
    monkeypatch.setattr(aclip, "update_ema", recorded)
    aclip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
    for states, still in ((seen, [2]), (averages, [1, 4])):  # the last momentum is 1
        change = [max((a - b).abs().max().item() for a, b in zip(*pair)) for pair in zip(states, states[1:])]
        assert [i for i, c in enumerate(change) if c == 0] == still
    assert rows(tmp_path)[2]["bad_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    (
        "--model tiny-4 --ema-size 16",
        "--mask random --views 1 --ssl 0",
        "--mask none",
        "--mask none --views 1 --ssl 0 --augment clip",
        "--views 1 --ssl 0 --checkpoint-activations --image-size 40 --ema-size 32",
    ),
)
def test_every_variant_runs(flags, tmp_path):
    aclip.main(RUN + ["--limit", "32", "--epochs", "1", "--warmup", "1", "--out", str(tmp_path), *flags.split()])
    assert len(rows(tmp_path)) == 2 and all(
        math.isfinite(r["loss"]) and ("--ssl 0" in flags) == (r["byol"] == 0) for r in rows(tmp_path)
    )
    evaluator.load(tmp_path / "last.pt")


def test_wrong_use_is_one_sentence(tmp_path):
    for flags, message in (("--ssl 1 --views 1", "--ssl 0"), ("--ema-size 33", "--ema-size 33")):
        with pytest.raises(SystemExit, match=message):
            aclip.main(RUN + ["--out", str(tmp_path), *flags.split()])


def test_recipes_are_complete():
    parsed = vars(aclip.parse_args([]))
    assert set(aclip.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}
    for recipe in aclip.RECIPES.values():
        assert set(recipe) <= set(parsed) and recipe["model"] in aclip.MODELS and recipe["augment"] in aclip.AUGMENT
        assert {"model", "batch_size", "epochs", "lr", "warmup", "weight_decay", "ssl_mlp_dim", "ema_momentum"} <= set(
            recipe
        )
        assert recipe["ema_momentum"] == (.996 if recipe["model"] == "ViT-B-16" else .9)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    aclip.main(RUN + ["--out", str(tmp_path), "--amp", amp, "--epochs", "6"])
    seen = [row["loss"] for row in rows(tmp_path) if row["loss"] is not None]  # fp16's first scale may be too large
    assert seen[-1] < seen[0]
