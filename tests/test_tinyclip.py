"""tinyclip.py: the loss against its definition, inheritance by hand-made slices, gates by counting, pruning that
changes no output."""

import json
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import clip
import eval as evaluator
import tinyclip
from ranks import spawn
from test_clip import SMALL, captions, losses, unit, weights
from tinyclip import Gates, TinyCLIP, affinity_loss, build, inherit, prune

RESNET = SMALL | dict(patch_size=None, vision_width=64, vision_layers=(2, 1, 1, 2))


# affinity mimicking

def slow_affinity(x, y, s, u, v, t):
    """One row after the other: cross-entropy of the student's softmax to the teacher's."""
    total = 0.
    for a, b, c, d in ((x, y, u, v), (y, x, v, u)):
        for i in range(len(a)):
            own, target = (
                torch.stack([k * (p[i] * q[j]).sum() for j in range(len(a))]) for k, p, q in ((s, a, b), (t, c, d))
            )
            weight = (target - target.max()).exp() / (target - target.max()).exp().sum()
            total = total - sum(weight[j] * (own[j] - own.logsumexp(0)) for j in range(len(a)))
    return total / (2 * len(x))


def test_affinity_loss_is_its_definition():
    x, y = unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    u, v = (
        unit(6, 9, seed=2).requires_grad_(),
        unit(6, 9, seed=3).requires_grad_(),
    )  # the teacher's dimension is its own
    s = torch.tensor(9., dtype=torch.float64, requires_grad=True)
    fast, slow = affinity_loss(x, y, s, u, v, 20.), slow_affinity(x, y, s, u.detach(), v.detach(), 20.)
    assert fast.dtype == torch.float64 and abs(fast - slow) < 1e-12
    for a, b in zip(torch.autograd.grad(fast, (x, y, s), retain_graph=True), torch.autograd.grad(slow, (x, y, s))):
        assert (a - b).abs().max() < 1e-12
    fast.backward()
    assert u.grad is None and v.grad is None


def test_affinity_loss_closed_forms():
    x, y, order = unit(7, 5).requires_grad_(), unit(7, 5, seed=1).requires_grad_(), torch.randperm(7)
    u, v = unit(7, 5, seed=2), unit(7, 5, seed=3)
    same = affinity_loss(x, y, 10., x, y, 10.)
    S = (10 * x @ y.T).detach()
    entropy = -sum((p * p.log()).sum() for p in (S.softmax(1), S.T.softmax(1))) / 14
    assert abs(same - entropy) < 1e-12  # the student is the teacher: the entropy is left, and nothing to learn
    assert max(g.abs().max() for g in torch.autograd.grad(same, (x, y))) < 1e-12
    assert affinity_loss(x, y, 5., u, v, 10.) > affinity_loss(u, v, 10., u, v, 10.)
    loss = affinity_loss(x, y, 5., u, v, 8.)
    assert abs(affinity_loss(y, x, 5., v, u, 8.) - loss) < 1e-12
    assert abs(affinity_loss(x[order], y[order], 5., u[order], v[order], 8.) - loss) < 1e-12
    assert (
        abs(affinity_loss(x, y, 5.0, u, u, 1e4) - tinyclip.clip_loss(x, y, 5.0)) < 1e-10
    )  # a sure teacher: CLIP's labels


def test_affinity_loss_is_fp32_under_autocast():
    x, y, u, v = (unit(16, 32, seed=i).bfloat16() for i in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = affinity_loss(x, y, torch.tensor(50.), u, v, 50.)
    assert (
        loss.dtype == torch.float32
        and abs(loss - affinity_loss(x.double(), y.double(), 50.0, u.double(), v.double(), 50.0)) < 1e-5
    )


# inheritance

def state_of(**sizes):
    torch.manual_seed(sum(map(hash, map(str, sizes.values()))) % 1000)
    model = TinyCLIP(**SMALL | sizes)
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value + 7
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "deep, kept", ((12, range(9)), (12, (0, 2, 4, 6, 8, 10)), (12, (0, 4, 8)), (12, range(10)), (9, range(6)))
)
def test_inherit_takes_layers_by_a_whole_step(deep, kept):
    teacher, student = state_of(text_layers=deep, vision_layers=1), state_of(text_layers=len(kept), vision_layers=1)
    found = inherit(teacher, student)
    for i, j in enumerate(kept):
        for name in ("ln_1.bias", "attn.in_proj_weight", "mlp.c_proj.weight"):
            assert torch.equal(found[f"transformer.resblocks.{i}.{name}"], teacher[f"transformer.resblocks.{j}.{name}"])
    assert set(found) == set(student) and torch.equal(found["logit_scale"], student["logit_scale"])
    assert all(not torch.equal(found[key], student[key]) for key in student if key != "logit_scale")


def test_inherit_takes_leading_channels_and_heads():
    teacher, student = state_of(vision_width=192), state_of(vision_width=128)
    before = {key: value.clone() for key, value in student.items()}
    found, block = inherit(teacher, student), "visual.transformer.resblocks.1."
    expected = torch.cat(
        [teacher[block + "attn.in_proj_weight"][192 * i : 192 * i + 128, :128] for i in range(3)]
    )  # q, k, v
    assert torch.equal(found[block + "attn.in_proj_weight"], expected)
    assert torch.equal(
        found[block + "attn.in_proj_bias"], teacher[block + "attn.in_proj_bias"].view(3, 192)[:, :128].reshape(-1)
    )
    for name in ("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "ln_2.weight"):
        assert torch.equal(found[block + name], teacher[block + name][tuple(map(slice, student[block + name].shape))])
    assert torch.equal(found["visual.proj"], teacher["visual.proj"][:128])
    assert torch.equal(found["visual.positional_embedding"], teacher["visual.positional_embedding"][:, :128])
    assert all(torch.equal(student[key], before[key]) for key in student)
    found["visual.proj"].zero_()
    assert teacher["visual.proj"].abs().min() > 0  # copies, not views
    small = inherit(teacher, student, head_dim=32)[block + "attn.in_proj_weight"]
    assert torch.equal(small, expected)  # leading heads of any size are the leading channels of q, k and v


def test_inherit_of_the_same_size_is_a_copy_and_a_resnet_brings_its_statistics():
    for sizes in (SMALL, RESNET):
        torch.manual_seed(0)
        teacher = TinyCLIP(**sizes).eval()
        student = TinyCLIP(**sizes).eval()
        student.load_state_dict(inherit(teacher.state_dict(), student.state_dict()))
        images, tokens = torch.randn(2, 3, 32, 32), captions(2)
        assert all(torch.equal(a, b) for a, b in zip(teacher(images, tokens), student(images, tokens)))
    teacher, student = state_of(**RESNET), state_of(**RESNET | dict(vision_width=44, vision_layers=(1, 1, 1, 1)))
    found = inherit(teacher, student)
    assert torch.equal(found["visual.layer4.0.bn2.running_var"], teacher["visual.layer4.0.bn2.running_var"][:44 * 8])
    assert found["visual.layer4.0.bn2.num_batches_tracked"] == 7
    assert torch.equal(
        found["visual.attnpool.q_proj.weight"], teacher["visual.attnpool.q_proj.weight"][: 44 * 32, : 44 * 32]
    )


def test_survivors_picture_shows_what_inherit_takes(tmp_path, monkeypatch):
    maps = []
    monkeypatch.setattr(
        tinyclip.data, "grid", lambda images, captions, path, columns: maps.extend(zip(images, captions))
    )
    source, student = TinyCLIP(**SMALL | dict(text_layers=5, text_width=128)), TinyCLIP(**SMALL)
    tinyclip.survivors_picture(
        tmp_path, source, student
    )  # two of five layers: 0 and 2; one of two heads, half of the channels
    for picture, caption in maps:
        image = "image" in caption
        assert picture.shape[1] == (20 if image else 50) and ("64 of 64" if image else "64 of 128") in caption
        dark = picture[0, ::10] < 100
        assert dark[:, 0].tolist() == ([True] * 2 if image else [True, False, True, False, False])
        assert dark[0].sum() == (160 if image else 80)


@pytest.mark.parametrize(
    "sizes",
    (
        dict(vision_width=192),
        dict(patch_size=8),
        dict(image_size=64),
        dict(context=16),
        dict(vocab=80),
        dict(embed_dim=64),
        dict(text_layers=3),
    ),
    ids=str,
)
def test_inherit_refuses_what_is_no_part(sizes):
    with pytest.raises(ValueError, match="cannot be cut"):
        inherit(state_of(vision_width=128), state_of(**sizes))


@pytest.mark.parametrize(
    "name, image, text, macs",
    (
        ("ViT-61M-32-Text-29M", 61.41, 28.67, 5.32),
        ("ViT-40M-32-Text-19M", 39.69, 19.22, 3.49),
        ("ViT-39M-16-Text-19M", 38.59, 19.22, 9.48),
        ("ViT-8M-16-Text-3M", 8.28, 2.52, 1.98),
        ("ResNet-30M-Text-29M", 29.58, 28.94, 6.67),
        ("ResNet-19M-Text-19M", 18.60, 19.48, 4.23),
    ),
)
def test_students_have_the_papers_sizes(name, image, text, macs):
    """Parameters without the token embedding, and multiply-adds a pair (README of the released code). A ResNet's are
    .26 and .18 below the paper's 6.93 and 4.41: the attention pool asks for its first token alone, the released one
    also for the other 49.
    """
    with torch.device("meta"):
        model, images, tokens = build(name), torch.empty(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)
        count = FlopCounterMode(display=False)
        with torch.no_grad(), count:
            model(images, tokens)
    found = [
        sum(p.numel() for p in model.visual.parameters()),
        sum(
            p.numel()
            for n, p in model.named_parameters()
            if not n.startswith(("visual.", "token_embedding.", "logit_scale"))
        ),
    ]
    assert [round(n / 1e6, 2) for n in found] == [image, text] and round(count.get_total_flops() / 2e9, 2) == macs


def test_shrink_is_the_papers_manner():
    """A narrower image tower, as wide as the paper's students, and fewer text layers; together as close to the share as
    these steps allow."""
    def size(state):
        return sum(value.numel() for key, value in state.items() if not key.startswith("token_"))

    for name, rows in (
        ("ViT-B-32", ((1, 768, 12), (0.75, 640, 11), (0.5, 512, 8))),
        ("RN50", ((1, 64, 12), (0.75, 56, 9), (0.5, 44, 6))),
        ("tiny", ((0.5, 64, 3),)),
    ):
        with torch.device("meta"):
            state = build(name).state_dict()
            for share, width, layers in rows:
                sizes = tinyclip.shrink(state, share)
                assert (sizes["vision_width"], sizes["text_layers"]) == (width, layers)
                student = TinyCLIP(
                    **sizes, image_size=tinyclip.MODELS[name].get("image_size", 224), context=77, vocab=49408
                ).state_dict()
                assert abs(size(student) / size(state) - share) < .03
    assert sizes == {key: value for key, value in tinyclip.MODELS["tiny-half"].items() if key != "image_size"}


# gates

def test_gates_open_as_often_as_they_say():
    gates, g = Gates(5, [2], [3]), torch.Generator().manual_seed(0)
    gates.hidden.data = torch.tensor([0., math.log(100), -math.log(100), 1.5, -1.5])
    p = gates.probability()["hidden"]
    assert p[:3].tolist() == pytest.approx([.83182, .99798, .04713], abs=1e-5)
    z = torch.stack([gates.sample(g)["hidden"] for _ in range(5000)])
    assert z.min() == 0 and z.max() == 1 and ((z > 0).float().mean(0) - p).abs().max() < .025
    slow = Gates(5, [2], [3])
    slow.load_state_dict(gates.state_dict())
    u = 1e-6 + (1 - 2e-6) * torch.rand(5, generator=torch.Generator().manual_seed(1))
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + slow.hidden) / (2 / 3)))
    assert (slow.sample(torch.Generator().manual_seed(1))["hidden"] - (s * 1.2 - .1).clamp(0, 1)).abs().max() < 1e-5
    z = slow.sample(torch.Generator().manual_seed(3))["hidden"]
    gradient = torch.autograd.grad(z.sum(), slow.hidden)[0]
    assert (gradient[(z == 0) | (z == 1)] == 0).all() and (gradient[(z > 0) & (z < 1)] > 0).all()


def test_hard_gates_close_as_many_as_are_expected():
    torch.manual_seed(0)
    gates = Gates(100, [4, 2, 0], [50, 10, 30])
    for p in gates.parameters():
        nn.init.normal_(p, std=3)
    p, z = gates.probability(), gates.hard()
    for name, counts in (("hidden", [100]), ("heads", [4, 2, 0]), ("ffn", [50, 10, 30])):
        for n, probability, mask, logits in zip(counts, p[name].view(len(counts), -1), z[name].view(len(counts), -1),
                                                getattr(gates, name).view(len(counts), -1)):
            assert (mask[n:] == 0).all() and (probability[n:] == 0).all()
            closed = round(n - probability.sum().item())
            assert (mask[:n] == 0).sum() == closed
            kept = logits[:n].argsort()[closed:]
            assert torch.allclose(mask[kept], (1.2 * logits[kept]).sigmoid())
    assert all((z[:, n:] == 0).all() for n, z in ((4, gates.sample()["heads"]), (50, gates.sample()["ffn"])))


def test_expected_params():
    d, layers = 128, 3
    gates = Gates(d, [2] * layers, [4 * d] * layers)
    for p in gates.parameters():
        p.data.fill_(100.)
    block = layers * (12 * d * d + 9 * d)
    assert gates.expected_params().item() == pytest.approx(block - 5 * d * layers, rel=1e-5)
    assert (
        tinyclip.prunable(
            TinyCLIP(
                **SMALL | dict(vision_width=d, vision_layers=layers, text_width=d, text_layers=layers)
            ).state_dict()
        )
        == 2 * block
    )
    nn.init.normal_(gates.heads)
    p, slow = gates.probability(), 0.
    for i in range(layers):
        slow += (
            p["hidden"].sum() * p["heads"][i].sum() * (4 * d * d + 4 * d) / (2 * d)
            + p["hidden"].sum() * p["ffn"][i].sum() * 2
        )
    assert gates.expected_params().item() == pytest.approx(slow.item(), rel=1e-5)


def test_sparsity_loss():
    l = torch.tensor([3., 5.], requires_grad=True)
    expected = torch.tensor(80., requires_grad=True)
    loss = tinyclip.sparsity_loss(expected, 100, .3, l)  # .2 is gone, .1 too little
    assert loss.item() == pytest.approx(3 * .1 + 5 * .01, rel=1e-5)
    loss.backward()
    assert l.grad.tolist() == pytest.approx([0.1, 0.01], rel=1e-4) and expected.grad.item() == pytest.approx(
        (3 + 2 * 5 * 0.1) / 100, rel=1e-4
    )
    expected.grad = l.grad = None
    loss = tinyclip.sparsity_loss(expected, 100, .1, l)  # more than enough is gone: nothing pulls back
    loss.backward()
    assert loss == 0 and expected.grad == 0 and (l.grad == 0).all()


@pytest.mark.parametrize("recipe, target", (("toy", .25), ("small", .5)))
def test_gates_of_our_recipes_meet_the_budget(recipe, target):
    """The constraint alone, without a task, which holds gates open: with it toy's .25 ended as .261 (here .303). A
    slower gate_lr meets the budget here and misses it there (.02: .25 ended as .08); with an earlier target Adam's
    momentum overshoots more.
    """
    recipe, model = tinyclip.RECIPES[recipe], TinyCLIP(**SMALL | dict(vision_width=128, text_width=128))
    gates, multipliers = model.open_gates(recipe["gate_lr"])
    optimizer, original = torch.optim.AdamW([gates, multipliers]), tinyclip.prunable(model.state_dict())
    for step in range(recipe["prune_step"]):
        expected = sum(g.expected_params() for g in model.gates.values())
        loss = tinyclip.sparsity_loss(
            expected, original, target * min(1, step / recipe["sparsity_warmup"]), model.multipliers
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p in gates["params"]:
            p.data.clamp_(-math.log(100), math.log(100))
    assert target < 1 - expected.item() / original < target + .06


# the gated model and what is cut out of it

def random_gates(width, layers, soft, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        open_ = (torch.rand(*shape, generator=g) < .6).double()
        return open_ * (torch.rand(*shape, generator=g, dtype=torch.float64) * .9 + .1 if soft else 1)

    return {"hidden": draw(width), "heads": draw(layers, width // 64), "ffn": draw(layers, 4 * width)}


def slow_gated(model, images, tokens, image_gates, text_gates):
    """The gated towers as the paper has them: gates on activations, norms over the open channels."""
    def norm(ln, x, z):
        keep, out = z != 0, torch.zeros_like(x)
        out[..., keep] = F.layer_norm(x[..., keep], (int(keep.sum()),), ln.weight[keep], ln.bias[keep], ln.eps)
        return out

    def tower(blocks, x, gates, mask):
        z = gates["hidden"]
        for i, block in enumerate(blocks):
            y = norm(block.ln_1, x, z)
            q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
            heads = []
            for h in range(len(gates["heads"][i])):
                own = slice(64 * h, 64 * h + 64)
                a = (q[..., own] @ k[..., own].transpose(1, 2) / 8 + mask).softmax(-1) @ v[..., own]
                heads.append(a * gates["heads"][i, h])
            x = x + block.attn.out_proj(torch.cat(heads, -1)) * z
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(norm(block.ln_2, x, z))) * gates["ffn"][i]) * z
        return x

    visual = model.visual
    patches = F.conv2d(images, visual.conv1.weight, stride=visual.conv1.stride).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding
    x = norm(visual.ln_pre, x * image_gates["hidden"], image_gates["hidden"])
    x = tower(visual.transformer.resblocks, x, image_gates, 0.)
    image_features = norm(visual.ln_post, x, image_gates["hidden"])[:, 0] @ visual.proj
    x = (model.token_embedding(tokens) + model.positional_embedding[:tokens.shape[1]]) * text_gates["hidden"]
    x = tower(model.transformer.resblocks, x, text_gates, torch.full((tokens.shape[1],) * 2, -math.inf).triu(1))
    x = norm(model.ln_final, x, text_gates["hidden"])[torch.arange(len(x)), tokens.argmax(-1)]
    return image_features, x @ model.text_projection


@pytest.mark.parametrize("case", ("binary", "soft", "headless"))
def test_pruned_is_gated_is_its_definition(case):
    torch.manual_seed(0)
    model = TinyCLIP(**SMALL | dict(vision_width=128, text_width=192)).double()
    for p in model.parameters():
        p.data += .05 * torch.randn_like(p)
    gates = [random_gates(128, 2, case != "binary", 1), random_gates(192, 2, case != "binary", 2)]
    for g in gates:
        g["heads"][0, 0] = g["heads"][1, -1] = 1 if case == "binary" else .7
    if case == "headless":
        gates[0]["heads"][1] = gates[1]["heads"][0] = 0
    images, tokens = torch.randn(3, 3, 32, 32, dtype=torch.float64), captions(3)
    expected = slow_gated(model, images, tokens, *gates)
    state = prune(model.state_dict(), *gates)
    small = build(state, TinyCLIP)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    small = small.double()
    small.load_state_dict(state)
    model.open_gates(.02)
    folded = prune(model.towers(), *gates, cut=False)
    for encode, inputs, truth in (("encode_image", images, expected[0]), ("encode_text", tokens, expected[1])):
        assert (getattr(small, encode)(inputs) - truth).abs().max() < 1e-11
    features = torch.func.functional_call(model, folded, (images, tokens))
    assert all((F.normalize(a, dim=-1) - b).abs().max() < 1e-11 for a, b in zip(expected, features))
    count = 0
    for g in gates:
        width = int((g["hidden"] != 0).sum())
        for heads, ffn in zip((g["heads"] != 0).sum(1).tolist(), (g["ffn"] != 0).sum(1).tolist()):
            count += width + (4 * 64 * width + 3 * 64) * heads + (2 * width + 1) * ffn + width
    assert tinyclip.prunable(state) == count


def test_open_gates_change_nothing_and_the_seed_decides():
    torch.manual_seed(0)
    model, (images, tokens) = TinyCLIP(**SMALL), (torch.randn(3, 3, 32, 32), captions(3))
    plain = model(images, tokens)
    groups = model.open_gates(.02)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(plain, model(images, tokens)))
    for p in model.gates.parameters():
        p.data.fill_(100.)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(plain, model(images, tokens, 1)))
    for p in model.gates.parameters():
        p.data.fill_(0.)
    assert torch.equal(model(images, tokens, 1)[0], model(images, tokens, 1)[0])
    assert not torch.equal(model(images, tokens, 1)[0], model(images, tokens, 2)[0])
    model(images, tokens, 1)[0].square()[:, 0].sum().backward()
    assert all(g["params"] and g["lr"] == .02 for g in groups) and groups[1]["maximize"]
    assert model.gates["image"].heads.grad.abs().sum() > 0 and model.gates["image"].hidden.grad.abs().sum() > 0


def test_masked_norm_is_the_norm_of_what_is_open():
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    masked = tinyclip.MaskedLayerNorm(norm)
    assert (masked(x) - norm(x)).abs().max() < 1e-6
    masked.keep[5:] = False
    expected = F.layer_norm(x[:, :5], (5,), norm.weight[:5], norm.bias[:5])
    assert (masked(x)[:, :5] - expected).abs().max() < 1e-6 and masked(x)[:, 5:].abs().max() == 0


def test_a_pruned_model_can_be_gated_and_pruned_again():
    torch.manual_seed(0)
    model, (images, tokens) = TinyCLIP(**SMALL | dict(vision_width=128)), (torch.randn(3, 3, 32, 32), captions(3))
    gates = [random_gates(128, 2, False), random_gates(64, 2, False)]
    gates[0]["heads"][:] = torch.tensor([[1, 0], [0, 0]])
    gates[1]["heads"][:] = 1
    once = build(prune(model.state_dict(), *[{k: z.float() for k, z in g.items()} for g in gates]), TinyCLIP)
    once.open_gates(.02)
    assert [gate.ffn_present.sum(1).tolist() for gate in once.gates.values()] == [
        (g["ffn"] != 0).sum(1).tolist() for g in gates
    ]
    for p in once.gates.parameters():
        nn.init.normal_(p, 1.)
    assert once(images, tokens, 3)[0].isfinite().all()
    twice = once.dense()
    assert tinyclip.prunable(twice.state_dict()) < tinyclip.prunable(
        {n: p for n, p in once.named_parameters() if "gates" not in n}
    )
    hard = [once.gates[name].hard() for name in ("image", "text")]
    folded = prune(once.towers(), *hard, cut=False)
    gated = torch.func.functional_call(once, folded, (images, tokens))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(gated, twice(images, tokens)))


# W ranks are one process

def step(model, teacher, images, tokens, seed):
    model.zero_grad()
    x, y, s = model(images, tokens, seed)
    with torch.no_grad():
        u, v, t = teacher(images, tokens)
    inner = getattr(model, "module", model)
    loss = affinity_loss(x, y, s, u, v, t)
    if seed is not None:
        expected = sum(gates.expected_params() for gates in inner.gates.values())
        loss = loss + tinyclip.sparsity_loss(expected, 2e5, .9, inner.multipliers)
    loss.backward()
    return loss.detach()


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, teacher = {}, TinyCLIP(**SMALL | dict(embed_dim=48)).double()
    images, tokens = torch.randn(8, 3, 32, 32, dtype=torch.float64), captions(8)
    models = {"dense": TinyCLIP(**SMALL).double(), "gated": TinyCLIP(**SMALL).double()}
    models["gated"].open_gates(.02)
    models["gated"].double()
    for p in models["gated"].gates.parameters():
        p.data.fill_(1.)
    truth = {}
    for name, model in models.items():
        loss = step(model, teacher, images, tokens, 5 if name == "gated" else None)
        truth[name] = loss, {n: p.grad.clone() for n, p in model.named_parameters()}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    b = 8 // world
    own = slice(rank * b, rank * b + b)
    for name, model in models.items():
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        loss = step(parallel, teacher, images[own], tokens[own], 5 if name == "gated" else None)
        dist.all_reduce(loss)
        found[name] = (abs(loss.item() / world - truth[name][0].item()),
                       max((p.grad - truth[name][1][n]).abs().max().item() for n, p in model.named_parameters()))
    if rank == world - 1:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_process(tmp_path):
    spawn(on_ranks, (2, 29500 + os.getpid() % 2000, tmp_path / "found"), 2)
    found = torch.load(tmp_path / "found")
    assert max(found["dense"]) < 1e-10 and max(found["gated"]) < 1e-10, found


# runs

RUN = ["--limit", "64", "--batch-size", "16", "--epochs", "3", "--warmup", "2", "--eval", "", "--log-every", "1",
       "--eval-every", "1"]
AUTO = ["--auto", ".3", "--prune-step", "6", "--sparsity-warmup", "1", "--gate-lr", "1.2"]


def rows(out):
    return [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines() if "loss" in row]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A clip.py checkpoint of two steps, in which logits already differ; the runs below learn from it."""
    out = tmp_path_factory.mktemp("teacher")
    clip.main(
        ["--limit", "64", "--batch-size", "32", "--epochs", "1", "--warmup", "1", "--eval", "", "--out", str(out)]
    )
    return ["--teacher", str(out / "last.pt")]


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """Uninterrupted runs of 12 steps: one by hand, one with gates for the first half."""
    outs = [tmp_path_factory.mktemp(name) for name in ("manual", "auto")]
    for out, flags in zip(outs, ([], AUTO)):
        tinyclip.main(RUN + teacher + flags + ["--out", str(out)])
    return outs


@pytest.mark.slow
def test_run_leaves_what_it_promises(teacher, finished):
    before = weights(teacher[1])
    for out in finished:
        assert {path.name for path in out.iterdir()} == {
            "captions.png",
            "affinity.png",
            "survivors.png",
            "last.pt",
            "log.jsonl",
        }
        model, tokenizer, preprocess = evaluator.load(out / "last.pt")
        assert type(model).__name__ == "TinyCLIP" and model.logit_scale.exp().item() == pytest.approx(50)
        assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
        assert model(torch.randn(1, 3, 32, 32), tokenizer(["a red circle"]))[0].isfinite().all()
        assert len(rows(out)) == 12 and all(row["logit_scale"] == pytest.approx(50) for row in rows(out))
    manual, auto = map(rows, finished)
    assert {"step", "loss", "affinity", "clip"} <= set(manual[0]) and {"sparsity", "removed"} <= set(auto[0])
    assert auto[5]["removed"] > auto[0]["removed"] and auto[6]["sparsity"] == 0
    share = 1 - tinyclip.prunable(weights(finished[1] / "last.pt")) / tinyclip.prunable(before)
    assert auto[-1]["removed"] == pytest.approx(share, rel=1e-5) and share > .02


@pytest.mark.slow
@pytest.mark.parametrize("kind, stop_at", (("manual", 5), ("auto", 3), ("auto", 6)))
def test_resume_is_bit_identical(kind, stop_at, teacher, finished, tmp_path, monkeypatch):
    """Stopped as by SIGTERM before, at and after pruning; then to the end."""
    flags, count, exact = (
        RUN + teacher + (AUTO if kind == "auto" else []) + ["--out", str(tmp_path)],
        [0],
        tinyclip.affinity_loss,
    )
    handlers = []
    monkeypatch.setattr(tinyclip.signal, "signal", lambda _, handler: handlers.append(handler))

    def counted(*inputs):
        count[0] += 1
        if count[0] == stop_at:
            handlers[-1](None, None)
        return exact(*inputs)

    monkeypatch.setattr(tinyclip, "affinity_loss", counted)
    with pytest.raises(SystemExit, match=f"saved at step {stop_at}"):
        tinyclip.main(flags)
    evaluator.load(tmp_path / "last.pt")  # also with its gates on
    tinyclip.main(flags)
    out = finished[kind == "auto"]
    expected, found = weights(out / "last.pt"), weights(tmp_path / "last.pt")
    assert list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
    assert losses(out) == losses(tmp_path)


@pytest.mark.slow
def test_bad_step_leaves_no_trace(teacher, tmp_path, monkeypatch):
    """A gradient that is not finite, in the first step and in the third: weights, gates and multipliers stay as they
    were."""
    models, seen, exact, forward = [], [], tinyclip.affinity_loss, TinyCLIP.open_gates
    monkeypatch.setattr(TinyCLIP, "open_gates", lambda self, lr: models.append(self) or forward(self, lr))

    def watched(*inputs):
        seen.append([p.detach().clone() for p in models[-1].parameters()])
        return exact(*inputs) * (math.nan if len(seen) in (1, 3) else 1)

    monkeypatch.setattr(tinyclip, "affinity_loss", watched)
    tinyclip.main(RUN + teacher + AUTO + ["--epochs", "2", "--prune-step", "6", "--out", str(tmp_path)])
    changes = [max((a - b).abs().max().item() for a, b in zip(*pair)) for pair in zip(seen[:6], seen[1:6])]
    assert changes[0] == changes[2] == 0 and min(changes[1], changes[3], changes[4]) > 0
    gates = list(models[-1].gates.parameters())
    assert all(p.abs().max() <= math.log(100) + 1e-6 for p in gates) and (models[-1].multipliers > 10).all()
    assert rows(tmp_path)[-1]["bad_steps"] == 2 and all(
        row["loss"] is None or math.isfinite(row["loss"]) for row in rows(tmp_path)
    )


def merges_file(teacher, folder):
    """The merges of a checkpoint as a file of OpenAI's form, for weights that bring none."""
    (folder / "merges.txt").write_text("#version\n" + clip.load_checkpoint(teacher[1])["merges"])
    return str(folder / "merges.txt")


@pytest.mark.slow
def test_the_teacher_stays_as_it_is(teacher, tmp_path, monkeypatch):
    """Bit for bit, the running statistics of its batch norms too."""
    state = TinyCLIP(**RESNET | dict(vocab=len(weights(teacher[1])["token_embedding.weight"]), context=77)).state_dict()
    torch.save(state, tmp_path / "resnet.pt")
    loaded, exact = [], tinyclip.load_trained
    monkeypatch.setattr(tinyclip, "load_trained", lambda *arguments: loaded.append(exact(*arguments)) or loaded[-1])
    flags = ["--teacher", str(tmp_path / "resnet.pt"), "--bpe", merges_file(teacher, tmp_path), "--init", "none"]
    tinyclip.main(RUN + flags + ["--model", "tiny-half", "--epochs", "1", "--out", str(tmp_path / "out")])
    assert all(torch.equal(value, state[name]) for name, value in loaded[0][0].state_dict().items())
    assert rows(tmp_path / "out")


@pytest.mark.slow
def test_stages_chain_and_flags_do_what_they_say(teacher, finished, tmp_path):
    def run(name, *flags):
        tinyclip.main(RUN + teacher + ["--epochs", "1", "--out", str(tmp_path / name), *flags])
        return weights(tmp_path / name / "last.pt"), rows(tmp_path / name)

    size = tinyclip.prunable(weights(finished[1] / "last.pt"))
    again, _ = run(
        "again",
        "--init",
        str(finished[1] / "last.pt"),
        "--auto",
        ".6",
        "--prune-step",
        "3",
        "--gate-lr",
        "2",
        "--sparsity-warmup",
        "1",
    )
    assert tinyclip.prunable(again) < size
    plain, log = run("alpha", "--alpha", ".5", "--cache-teacher-text", "--logit-scale", "0")
    assert all(row["loss"] == pytest.approx((row["affinity"] + row["clip"]) / 2, rel=1e-5) for row in log)
    assert plain["logit_scale"] != pytest.approx(math.log(50)) and (plain["logit_scale"] - math.log(1 / .07)).abs() < .1
    cached, log = run("cached", "--cache-teacher-text")
    direct, other = run("direct")
    assert [row["affinity"] for row in log] == pytest.approx([row["affinity"] for row in other], rel=1e-3)
    none, log = run(
        "none", "--init", "none", "--alpha", "0", "--shrink", ".3", "--text-layers", "2", "--checkpoint-activations"
    )
    assert len(none["visual.conv1.weight"]) == 64 and "transformer.resblocks.2.ln_1.bias" not in none
    assert "transformer.resblocks.1.ln_1.bias" in none and all(row["affinity"] == 0 for row in log)
    start, _ = run("start", "--lr", "0", "--init", str(finished[0] / "last.pt"))
    expected = weights(finished[0] / "last.pt")
    assert all(torch.equal(start[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_wrong_use_is_one_sentence(teacher, finished, tmp_path, monkeypatch):
    def message(*flags):
        with pytest.raises(SystemExit) as error:
            tinyclip.main(RUN + teacher + ["--out", str(tmp_path / "run"), *flags])
        assert error.value.code not in (0, None)
        return str(error.value)

    monkeypatch.chdir(tmp_path)
    assert "there is no file runs/teacher-toy/last.pt" in message("--teacher", "") and "--init" in message(
        "--init", str(tmp_path / "nowhere.pt")
    )
    assert "multiples of 64" in message("--image-width", "100")
    assert "cannot inherit" in message("--model", "tiny", "--text-layers", "6")
    assert "--auto" in message("--auto", ".3", "--prune-step", "3", "--shrink", ".5") and "between" in message(
        "--auto", "1.5", "--prune-step", "3"
    )
    words = clip.load_checkpoint(teacher[1])
    words["merges"] = "\n".join(words["merges"].split("\n")[1:] + ["a b"])
    clip.save_checkpoint(tmp_path / "words.pt", **words)
    assert "tokenizer" in message("--init", str(tmp_path / "words.pt"))
    torch.save(
        TinyCLIP(**RESNET | dict(vocab=len(weights(teacher[1])["token_embedding.weight"]), context=77)).state_dict(),
        tmp_path / "resnet.pt",
    )
    flags = ["--init", str(tmp_path / "resnet.pt"), "--bpe", merges_file(teacher, tmp_path)]
    assert "ViTs" in message(*flags, "--auto", ".3", "--prune-step", "3")
    assert "another tokenizer" in message("--bpe", "train", "--limit", "64")
    assert "--alpha" in message("--out", str(finished[0]), "--alpha", ".5")


@pytest.mark.slow
def test_teachers_of_other_houses(teacher, tmp_path):
    """OpenAI's and open_clip's files give the same teacher as ours; --bpe names the merges that they do not hold."""
    state = weights(teacher[1])
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "open_clip.pt")
    model, tokenizer, preprocess = tinyclip.load_trained(
        tmp_path / "open_clip.pt", "--teacher", True, merges_file(teacher, tmp_path))
    assert preprocess.size == 32 and tinyclip.uses_quick_gelu(model)
    assert "\n".join(map(" ".join, tokenizer.merges)) == clip.load_checkpoint(teacher[1])["merges"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_gated_towers_recompute_what_the_gates_gave_them():
    """--auto with --checkpoint-activations: a block computed again in the backward pass sees the gated weights."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = TinyCLIP(**SMALL).double()
        model.open_gates(.1)
        model.double()
        with torch.no_grad():
            for parameter in model.gates.parameters():
                parameter.copy_(torch.randn_like(parameter))
        for tower in (model.visual.transformer, model.transformer):
            tower.checkpoint_activations = recompute
        images, tokens = torch.randn(4, 3, 32, 32).double(), torch.randint(1, 30, (4, 8))
        tinyclip.clip_loss(*model(images, tokens, seed=3)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*gradients))


def test_recipes_are_complete():
    parsed = vars(tinyclip.parse_args([]))
    assert set(tinyclip.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}
    for recipe in tinyclip.RECIPES.values():
        assert (
            set(recipe) <= set(parsed) and recipe["model"] in tinyclip.MODELS and recipe["augment"] in tinyclip.AUGMENT
        )
        assert {"batch_size", "epochs", "lr", "warmup", "weight_decay", "prune_step", "sparsity_warmup"} <= set(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, teacher, tmp_path):
    tinyclip.main(RUN + teacher + AUTO + ["--out", str(tmp_path), "--amp", amp, "--cache-teacher-text"])
    seen = [row["loss"] for row in rows(tmp_path) if row["loss"] is not None]  # fp16's first scale may be too large
    assert len(seen) > 1 and all(map(math.isfinite, seen))
