"""slip.py: the whole step against a slow definition in float64, W ranks against one process, views, runs. The closed
forms of ntxent_loss are in test_aclip.py, which has the same function."""
import json
import os
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

import clip
import data
import eval as evaluator
import slip
from ranks import spawn
from test_aclip import slow_heads, slow_ntxent
from test_clip import SMALL, captions, losses, slow_clip_loss, weights

TINY = SMALL | dict(ssl_mlp_dim=24)


def crops(n, views=3):
    return torch.rand(views, n, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def example(n=8):
    torch.manual_seed(0)
    return slip.SLIP(**TINY).double(), crops(n), captions(n)


def step(model, images, tokens):
    """clip and ntxent, as main computes them."""
    image_features, text_features, scale, projections = model(images, tokens)
    return slip.clip_loss(image_features, text_features, scale), slip.ntxent_loss(*projections, .1)


def gradients(model, both):
    model.zero_grad()
    sum(both).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_step_is_its_definition():
    """Three passes of the tower, each crop with the batch norm of its own, sample by sample for SimCLR."""
    model, images, tokens = example()
    h = []
    for view in images:
        x = model.visual.embed(view)
        for block in model.visual.transformer.resblocks:
            x = block(x)
        h.append(model.visual.ln_post(x[:, 0]))
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (h[0] @ model.visual.proj, model.encode_text(tokens)))
    slow = [slow_clip_loss(x, y, model.logit_scale.exp()),
            slow_ntxent(slow_heads(model.simclr, h[1]), slow_heads(model.simclr, h[2]), .1)]
    fast = step(model, images, tokens)
    assert all(abs(a - b) < 1e-10 for a, b in zip(fast, slow))
    fast, slow = gradients(model, fast), gradients(model, slow)
    assert all((fast[name] - slow[name]).abs().max() < 1e-10 for name in slow)


def test_who_learns_from_what():
    model, images, tokens = example()
    names = [name for name, _ in model.named_parameters()]

    def reached(loss):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        return {name.split(".")[0] for name, g in zip(names, found) if g is not None and g.abs().max() > 1e-12}

    contrast, ntxent = step(model, images, tokens)
    assert reached(ntxent) == {"visual", "simclr"} and "simclr" not in reached(contrast)
    assert torch.autograd.grad(ntxent, model.visual.proj, allow_unused=True)[0] is None


def test_without_simclr_it_is_clip():
    torch.manual_seed(0)
    model = slip.SLIP(**SMALL | dict(ssl_mlp_dim=0)).double()
    plain = clip.build(model.state_dict()).double()
    images, tokens = crops(4, 1), captions(4)
    image_features, text_features, scale, projections = model(images, tokens)
    expected = clip.clip_loss(*plain(images[0], tokens))
    assert projections is None and abs(slip.clip_loss(image_features, text_features, scale) - expected) < 1e-12
    model, plain = (sum(p.numel() for p in m.parameters()) for m in (model, plain))
    assert model == plain


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    model, images, tokens = example()
    both = step(model, images, tokens)
    truth, both = gradients(model, both), torch.stack(both).detach()
    dist.init_process_group("gloo", rank=rank, world_size=world)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    own = step(parallel, images.chunk(world, 1)[rank], tokens.chunk(world)[rank])
    found = gradients(model, own)
    own = torch.stack(own).detach()
    dist.all_reduce(own)
    if rank == world - 1:
        torch.save((own / world - both, {name: (found[name] - truth[name]).abs().max() for name in truth}), path)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_process(tmp_path):
    spawn(on_ranks, (2, 29500 + os.getpid() % 2000 + 9, tmp_path / "found"), 2)
    difference, worst = torch.load(tmp_path / "found")
    assert difference.abs().max() < 1e-10 and max(worst.values()) < 1e-10 and len(worst) > 40


def test_parameters_of_the_released_model():
    """170.6 M, 21.0 of them in the head."""
    with torch.device("meta"):
        model = slip.build("ViT-B-16", slip.SLIP)
    assert sum(p.numel() for p in model.simclr.parameters()) / 1e6 == pytest.approx(21.0, abs=.1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(170.6, abs=.3)


def sample(**changes):
    options = dict(tokenizer=data.Tokenizer([("a", "b")]), size=32, augment="slip", count=3) | changes
    return slip.slip_views(data.ToyDataset(3, None).image(0), "a b", random.Random(1), **options)


def test_views_of_a_sample():
    three, one, plain = sample(), sample(count=1), sample(augment="clip")
    assert three["images"].shape == (3, 3, 32, 32) and three["images"].dtype == torch.uint8
    assert torch.equal(three["images"][:1], one["images"])  # the caption's crop does not know of the others
    unchanged = torch.tensor([0., 1, 1, 1, 0, 0, 0, 0])
    assert torch.equal(three["colors"][0], unchanged) and (three["colors"][1] != three["colors"][2]).any()
    assert "colors" not in plain and (plain["images"][1] != plain["images"][2]).any()


RUN = ["--limit", "64", "--batch-size", "16", "--epochs", "3", "--warmup", "2", "--log-every", "1", "--eval", "",
       "--ssl-mlp-dim", "32"]


def rows(out):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    slip.main(RUN + ["--augment", "slip", "--out", str(out)])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished):
    state = slip.load_checkpoint(finished / "last.pt")
    assert state["script"] == "slip" and state["step"] == 12 == len(rows(finished))
    assert all(r["loss"] == pytest.approx(r["clip"] + r["ntxent"], abs=1e-5) for r in rows(finished))
    assert rows(finished)[0]["lr"] == pytest.approx(1e-6) and rows(finished)[-1]["lr"] > 1e-5
    model, tokenizer, _ = evaluator.load(finished / "last.pt")
    assert isinstance(model, slip.SLIP) and model.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
    assert {key.split(".")[0] for key in evaluator.load_clip_state(finished / "last.pt")} == {*evaluator.ENCODERS}


@pytest.mark.slow
def test_interrupted_and_resumed_is_bit_identical(finished, tmp_path, monkeypatch):
    calls, exact = [], slip.ntxent_loss

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return exact(*arguments)

    flags = RUN + ["--augment", "slip", "--out", str(tmp_path)]
    monkeypatch.setattr(slip, "ntxent_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        slip.main(flags)
    monkeypatch.setattr(slip, "ntxent_loss", exact)
    slip.main(flags)
    expected, found = weights(finished / "last.pt"), weights(tmp_path / "last.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(finished) == losses(tmp_path)


@pytest.mark.slow
def test_weight_zero_leaves_simclr_out(tmp_path):
    slip.main(RUN + ["--epochs", "1", "--warmup", "1", "--ssl", "0", "--out", str(tmp_path)])
    assert not any(name.startswith("simclr") for name in weights(tmp_path / "last.pt"))
    assert all(r["ntxent"] == 0 and r["loss"] == r["clip"] for r in rows(tmp_path))


def test_wrong_use_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--model RN50.*class token"):
        slip.main(RUN + ["--model", "RN50", "--out", str(tmp_path)])


def test_recipes_are_complete():
    parsed = vars(slip.parse_args([]))
    assert set(slip.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}
    for recipe in slip.RECIPES.values():
        assert set(recipe) <= set(parsed) and recipe["model"] in slip.MODELS and recipe["augment"] in slip.AUGMENT
        assert {"batch_size", "epochs", "lr", "warmup", "weight_decay", "ssl_mlp_dim"} <= set(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    slip.main(RUN + ["--out", str(tmp_path), "--amp", amp, "--augment", "slip"])
    assert any(row["loss"] for row in rows(tmp_path))
