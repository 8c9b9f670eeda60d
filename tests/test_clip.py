"""clip.py: the loss against its definition, the towers against PyTorch's own modules, W ranks against one process."""
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import clip
import eval as evaluator
from conftest import ROOT
from ranks import spawn

SMALL = dict(embed_dim=32, image_size=32, patch_size=16, vision_width=64, vision_layers=2, context=12, vocab=40,
             text_width=64, text_layers=2)
RESNET = SMALL | dict(patch_size=None, vision_width=64, vision_layers=(1, 1, 1, 1))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def captions(n, length=12, vocab=40, seed=0):
    """Token ids of n captions of various lengths: start 38, words, end 39, zeros."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n, length, dtype=torch.int64)
    for row in tokens:
        words = int(torch.randint(1, length - 2, (), generator=g))
        row[0], row[1 : 1 + words], row[1 + words] = (
            vocab - 2,
            torch.randint(1, vocab - 2, (words,), generator=g),
            vocab - 1,
        )
    return tokens


# the loss

def slow_clip_loss(x, y, s):
    """The definition, one log-softmax a row."""
    n, total = len(x), 0.
    for i in range(n):
        row = torch.stack([s * (x[i] * y[j]).sum() for j in range(n)])
        column = torch.stack([s * (x[j] * y[i]).sum() for j in range(n)])
        total = total - (row[i] - row.logsumexp(0)) - (column[i] - column.logsumexp(0))
    return total / (2 * n)


def test_clip_loss_is_its_definition():
    x, y = unit(7, 5).requires_grad_(), unit(7, 5, seed=1).requires_grad_()
    s = torch.tensor(9., dtype=torch.float64, requires_grad=True)
    fast, slow = clip.clip_loss(x, y, s), slow_clip_loss(x, y, s)
    assert fast.dtype == torch.float64 and abs(fast - slow) < 1e-12
    for a, b in zip(torch.autograd.grad(fast, (x, y, s)), torch.autograd.grad(slow, (x, y, s))):
        assert (a - b).abs().max() < 1e-12


def test_clip_loss_closed_forms():
    same = unit(1, 6).expand(5, 6)
    assert clip.clip_loss(same, same, 20.).item() == pytest.approx(math.log(5), abs=1e-12)
    eye = torch.eye(6, dtype=torch.float64)
    assert clip.clip_loss(eye, eye, 3.).item() == pytest.approx(math.log(1 + 5 * math.exp(-3)), abs=1e-12)
    x, y, order = unit(8, 6), unit(8, 6, seed=1), torch.randperm(8)
    loss = clip.clip_loss(x, y, 5.)
    assert clip.clip_loss(y, x, 5.) == pytest.approx(loss.item(), abs=1e-12)
    assert clip.clip_loss(x[order], y[order], 5.) == pytest.approx(loss.item(), abs=1e-12)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert clip.clip_loss(x @ turn, y @ turn, 5.) == pytest.approx(loss.item(), abs=1e-12)


def test_clip_loss_gradient_formula():
    """dL/dX = s G Y with G = (softmax_rows + softmax_columns - 2 I) / 2N."""
    x, y, s = unit(6, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_(), 7.
    clip.clip_loss(x, y, s).backward()
    S = s * x.detach() @ y.detach().T
    G = (S.softmax(1) + S.softmax(0) - 2 * torch.eye(6)) / 12
    assert (x.grad - s * G @ y.detach()).abs().max() < 1e-12
    assert (y.grad - s * G.T @ x.detach()).abs().max() < 1e-12
    u = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)  # before it is made unit its length means nothing
    clip.clip_loss(F.normalize(u, dim=1), y.detach(), s).backward()
    assert (u.grad * u.detach()).sum(1).abs().max() < 1e-12 and u.grad.abs().max() > .01


def test_clip_loss_is_fp32_under_autocast():
    x, y = unit(16, 32).float(), unit(16, 32, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = clip.clip_loss(x.bfloat16(), y.bfloat16(), torch.tensor(100.))
    exact = clip.clip_loss(x.bfloat16().double(), y.bfloat16().double(), 100.)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 1e-5


# W ranks are one process

def loss_and_gradients(model, images, tokens):
    model.zero_grad()
    loss = clip.clip_loss(*model(images, tokens))
    loss.backward()
    return loss.detach()


def no_gradient_gather(x):
    """What SLIP does: the columns are constants."""
    if not dist.is_initialized():
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach())
    return torch.cat(rows)


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = clip.CLIP(**SMALL).double()
    images, tokens = torch.randn(8, 3, 32, 32, dtype=torch.float64), captions(8)
    truth = loss_and_gradients(model, images, tokens)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    b = 8 // world
    own = slice(rank * b, rank * b + b)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    found = {}
    exact_gather = clip.gather
    for name, gather in (("exact", exact_gather), ("no gradient", no_gradient_gather)):
        clip.gather = gather
        loss = loss_and_gradients(parallel, images[own], tokens[own])
        dist.all_reduce(loss)
        worst = max((p.grad - gradients[n]).abs().max().item() for n, p in model.named_parameters())
        found[name] = abs(loss.item() / world - truth.item()), worst
    clip.gather = exact_gather
    x = torch.arange(b * 6.).view(b, 2, 3) + 100 * rank
    rows = clip.gather(x)
    found["order"] = rows.shape == (8, 2, 3) and bool((rows[own] == x).all())
    if rank == world - 1:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 4))
def test_ranks_equal_one_process(world, tmp_path):
    spawn(on_ranks, (world, 29500 + os.getpid() % 2000 + world, tmp_path / "found"), world)
    found = torch.load(tmp_path / "found")
    assert max(found["exact"]) < 1e-10
    assert found["no gradient"][0] < 1e-10 and found["no gradient"][1] > 1e-4  # same loss, another gradient
    assert found["order"]


# the towers

def test_attention_is_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = clip.Attention(128).double(), nn.MultiheadAttention(128, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 9, 128, dtype=torch.float64)
    mask = torch.ones(9, 9).triu(1).bool()
    assert (ours(x) - theirs(x, x, x)[0]).abs().max() < 1e-12
    assert (ours(x, causal=True) - theirs(x, x, x, attn_mask=mask)[0]).abs().max() < 1e-12


def test_text_tower_is_causal_and_reads_the_end_token():
    torch.manual_seed(0)
    model, tokens = clip.CLIP(**SMALL).double(), captions(6)
    features, eot = model.encode_text(tokens), tokens.argmax(-1)
    noisy = torch.where(torch.arange(12) > eot[:, None], torch.randint(0, 38, (6, 12)), tokens)
    assert (model.encode_text(noisy) - features).abs().max() < 1e-12
    assert (model.encode_text(tokens[:, :eot.max() + 1]) - features).abs().max() < 1e-12
    assert (model.encode_text(tokens, eot) - features).abs().max() == 0
    changed = tokens.clone()
    changed[:, 1] = changed[:, 1] % 37 + 1
    assert (model.encode_text(changed) - features).abs().max(1).values.min() > 1e-6
    assert (model.text_tokens(changed)[:, 0] - model.text_tokens(tokens)[:, 0]).abs().max() == 0


def test_vit_does_not_know_the_order_of_patches_beyond_their_positions():
    torch.manual_seed(0)
    model = clip.VisionTransformer(32, 32, 8, 64, 2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features, order = model(images), torch.randperm(16)
    assert model.embed(images).shape == (2, 17, 64)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, order]  # [2, 3, 16, 8, 8]
    moved = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    model.positional_embedding.data[1:] = model.positional_embedding.data[1:][order]
    assert (model(moved) - features).abs().max() < 1e-12


def test_resnet_at_init_and_in_eval():
    torch.manual_seed(0)
    model = clip.ModifiedResNet(32, 64, 64, (2, 1, 1, 1)).double()
    x = torch.randn(4, 256, 16, 16, dtype=torch.float64)
    assert (model.layer1[1](x) - x.relu()).abs().max() == 0  # the branch is zero
    model.eval()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert (model(images)[:1] - model(images[:1])).abs().max() < 1e-12


def test_attention_pool_is_multihead_attention():
    torch.manual_seed(0)
    pool, x = clip.AttentionPool2d(2, 128, 32).double(), torch.randn(3, 128, 2, 2, dtype=torch.float64)
    tokens = x.flatten(2).permute(2, 0, 1)  # [P, B, C]
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        128,
        2,
        None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None,
        None,
        False,
        0.0,
        pool.c_proj.weight,
        pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    assert (pool(x) - expected[0]).abs().max() < 1e-12


def test_sizes_and_init():
    torch.manual_seed(0)
    model = clip.build("ViT-B-32")
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert sum(p.numel() for p in model.parameters()) == 151_277_313  # OpenAI's ViT-B/32
    assert count["visual"] == 87_849_216 and count["token_embedding"] == 49408 * 512
    block = model.transformer.resblocks[3]
    for weight, std in (
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (block.attn.in_proj_weight, 512**-0.5),
        (block.attn.out_proj.weight, 512**-0.5 * 24**-0.5),
        (block.mlp.c_proj.weight, 512**-0.5 * 24**-0.5),
        (block.mlp.c_fc.weight, 1024**-0.5),
        (model.text_projection, 512**-0.5),
        (model.visual.proj, 768**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=.02)
    assert block.attn.in_proj_bias.abs().max() == 0 and block.attn.out_proj.bias.abs().max() == 0
    assert model.logit_scale.exp().item() == pytest.approx(1 / .07)
    with torch.device("meta"):
        assert sum(p.numel() for p in clip.build("RN50").parameters()) == 102_007_137


@pytest.mark.parametrize("sizes", (SMALL, RESNET), ids=("vit", "resnet"))
def test_build_reads_the_sizes_from_a_state(sizes):
    torch.manual_seed(0)
    model = clip.CLIP(**sizes, quick_gelu=True).eval()
    again = clip.build(model.state_dict(), quick_gelu=True).eval()
    images, tokens = torch.randn(2, 3, 32, 32), captions(2)
    assert all(torch.equal(a, b) for a, b in zip(model(images, tokens), again(images, tokens)))


# schedule, groups, checkpoints

def test_lr_at():
    lr = [clip.lr_at(k, 100, 10, 1.) for k in range(100)]
    assert lr[0] == .1 and lr[9] == lr[10] == 1. and 0 < lr[99] < 1e-3 and lr[55] == pytest.approx(.5)
    assert clip.lr_at(0, 100, 10, 1., start=.2) == .2 and clip.lr_at(9, 100, 10, 1., start=.2) == pytest.approx(1.)
    assert clip.lr_at(55, 100, 10, 1., end=.4) == pytest.approx(.7) and clip.lr_at(0, 100, 0, 1.) == 1.


@pytest.mark.parametrize("sizes", (SMALL, RESNET), ids=("vit", "resnet"))
def test_param_groups(sizes):
    model = clip.CLIP(**sizes)
    model.visual.conv1.requires_grad_(False)
    decay, none = clip.param_groups(model, .3, no_decay=("token_embedding",))
    assert decay["weight_decay"] == .3 and none["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    decay, none = ({names[id(p)] for p in g["params"]} for g in (decay, none))
    assert not decay & none and decay | none | {"visual.conv1.weight"} == set(names.values())
    assert none == {n for n, p in model.named_parameters() if p.ndim < 2 or n == "token_embedding.weight"}


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = clip.CLIP(**SMALL)
    images, tokens = torch.randn(16, 3, 32, 32), captions(16)
    optimizer = torch.optim.AdamW(clip.param_groups(model, .1), 1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = clip.clip_loss(*model(images, tokens))
        loss.backward()
        optimizer.step()
    assert loss.item() < .05


# runs

RUN = [
    "--limit",
    "192",
    "--batch-size",
    "32",
    "--epochs",
    "3",
    "--warmup",
    "4",
    "--eval",
    "",
    "--eval-every",
    "1",
    "--log-every",
    "1",
    "--model",
    "tiny",
]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def losses(out):
    return [row["loss"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 18 steps."""
    out = tmp_path_factory.mktemp("finished")
    clip.main(RUN + ["--out", str(out)])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished, capsys):
    state = clip.load_checkpoint(finished / "last.pt")
    assert state["script"] == "clip" and state["step"] == 18
    assert len(losses(finished)) == 18 and (finished / "captions.png").stat().st_size > 1000
    row = json.loads((finished / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "lr", "logit_scale", "pairs_per_second", "waited", "skipped", "bad_steps"} <= set(row)
    model, tokenizer, preprocess = evaluator.load(finished / "last.pt")
    assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 128) and preprocess.size == 32
    clip.main(RUN + ["--out", str(finished)])  # finished: says so, changes nothing
    assert "finished" in capsys.readouterr().out and len(losses(finished)) == 18


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(finished, tmp_path):
    """kill -9 once, SIGTERM once, then to the end, with two workers."""
    command = [sys.executable, str(ROOT / "clip.py")] + RUN + ["--out", str(tmp_path), "--workers", "2"]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for how, after in ((signal.SIGKILL, 8), (signal.SIGTERM, 10)):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)
        log = tmp_path / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= after):
            time.sleep(.02)
        os.killpg(process.pid, how)  # workers too, as torchrun does
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0, output
    assert "stopped by SIGTERM" in output and "resumed at step 6" in output
    clip.main(RUN + ["--out", str(tmp_path)])
    expected, found = weights(finished / "last.pt"), weights(tmp_path / "last.pt")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert losses(finished) == losses(tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(finished, tmp_path):
    """--max-restarts: kill -9 of one of two ranks; the second attempt resumes and ends as one process does without a
    kill."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=1",
        str(ROOT / "clip.py"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command + RUN + ["--out", str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 8):
        time.sleep(.02)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "clip.py"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed at step 6" in output, output
    assert losses(tmp_path) == pytest.approx(losses(finished), abs=1e-4)


@pytest.mark.slow
def test_bad_step_leaves_no_trace(monkeypatch, tmp_path):
    """A gradient that is not finite at step 3: the weights of steps 2 and 3 are the same; 20 in a row end the run."""
    seen, exact = [], clip.clip_loss

    def watched(x, y, s, bad=range(3, 4)):
        seen.append([p.detach().clone() for p in optimizer_state()])
        return exact(x, y, s) * (math.nan if len(seen) in bad else 1)

    models, build = [], clip.build
    monkeypatch.setattr(clip, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    optimizer_state = lambda: models[-1].parameters()
    monkeypatch.setattr(clip, "clip_loss", watched)
    clip.main(RUN + ["--epochs", "1", "--out", str(tmp_path / "a")])
    steps = [max((a - b).abs().max().item() for a, b in zip(*pair)) for pair in zip(seen, seen[1:])]
    assert steps[2] == 0 and all(change > 0 for i, change in enumerate(steps) if i != 2)
    first = json.loads((tmp_path / "a/log.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx(math.log(32), rel=.1)  # a new model knows nothing
    rows = [json.loads(row) for row in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert (
        rows[2]["bad_steps"] == 1
        and [row["loss"] is None for row in rows if "loss" in row] == [False] * 2 + [True] + [False] * 3
    )

    seen.clear()
    monkeypatch.setattr(clip, "clip_loss", lambda *features: watched(*features, bad=range(2, 99)))
    with pytest.raises(SystemExit, match="20 steps in a row .* are in .*last.pt"):
        clip.main(RUN + ["--epochs", "9", "--log-every", "6", "--out", str(tmp_path / "b")])
    assert len(seen) == 24  # steps 2 to 24, over log lines


@pytest.mark.slow
def test_restart_forgets_the_run_before(monkeypatch, tmp_path, capsys):
    """Even if it dies before it saves: the next attempt of torchrun must not find the old run."""
    clip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
    (tmp_path / "best.pt").touch()
    monkeypatch.setattr(clip, "clip_loss", lambda *features: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        clip.main(RUN + ["--epochs", "1", "--out", str(tmp_path), "--restart"])
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
    output = capsys.readouterr().out
    assert all(text in output for text in ("--seed 0", "--workers 0", "192 pairs (0 left out)"))


@pytest.mark.slow
def test_a_kill_during_the_tests_loses_nothing(monkeypatch, tmp_path):
    results = [{"toy": {"metric": "top1", "top1": value}} for value in (.2, .1)]
    monkeypatch.setattr(clip.evaluator, "summary", str)
    monkeypatch.setattr(clip.evaluator, "evaluate", lambda *arguments, **more: 1 / 0)
    flags = RUN + ["--epochs", "2", "--out", str(tmp_path), "--eval", "toy"]
    with pytest.raises(ZeroDivisionError):
        clip.main(flags)
    assert clip.load_checkpoint(tmp_path / "last.pt")["step"] == 6
    monkeypatch.setattr(clip.evaluator, "evaluate", lambda *arguments, **more: results.pop(0) if results else 1 / 0)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "eval": {}}\n{"note": "by hand"}\n{"step": 6, "eval": {"cut": {"x": 1}')
    clip.main(flags)
    clip.main(flags)  # has nothing left to test
    tested = [row for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "eval" in row]
    assert [(row["step"], row["eval"]["toy"]["top1"]) for row in tested] == [(6, .2), (12, .1)]
    assert clip.load_checkpoint(tmp_path / "best.pt")["step"] == 6 and len(losses(tmp_path)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("ends", ("well", "badly"))
def test_main_puts_the_handler_of_sigterm_back(ends, monkeypatch, tmp_path):
    handler = lambda *_: None
    before = signal.signal(signal.SIGTERM, handler)
    try:
        if ends == "badly":
            monkeypatch.setattr(clip, "clip_loss", lambda *features: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                clip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
        else:
            clip.main(RUN + ["--epochs", "1", "--out", str(tmp_path)])
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_the_same_data_by_another_name_resumes(tmp_path, capsys):
    """Data that were moved or spelled differently are the same data; more epochs stretch the schedule, and it says
    so."""
    toy = clip.data.ToyDataset(64, None)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        rows = [json.dumps({"filename": f"{i}.jpg", "caption": toy.captions(i)[0]}) + "\n" for i in range(64)]
        (tmp_path / folder / "pairs.jsonl").write_text("".join(rows))
        for i in range(64):
            (tmp_path / folder / f"{i}.jpg").write_bytes(toy.image(i))
    flags = RUN + [
        "--bpe",
        "train",
        "--workers",
        "0",
        "--epochs",
        "1",
        "--warmup",
        "1",
        "--limit",
        "64",
        "--out",
        str(tmp_path / "run"),
    ]
    clip.main(flags + ["--data", str(tmp_path / "here/pairs.jsonl")])
    clip.main(flags + ["--data", str(tmp_path / "there/../there/pairs.jsonl"), "--epochs", "2"])
    output = capsys.readouterr().out
    assert "resumed at step 2" in output and "--epochs 2 (was 1): the learning rate follows the new schedule" in output
    (tmp_path / "here/pairs.jsonl").write_text(
        "".join(rows[:-1] + [rows[-1].replace("caption\": \"", "caption\": \"x ")])
    )
    with pytest.raises(SystemExit, match="other pairs"):
        clip.main(flags + ["--data", str(tmp_path / "here/pairs.jsonl")])


@pytest.mark.slow
def test_compiled_model_has_the_same_losses(monkeypatch, finished, tmp_path):
    """Traced as with --compile, but run by PyTorch's own kernels, since compiling them takes minutes on a CPU."""
    calls, exact = [], nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: calls.append(exact(self, backend="aot_eager", fullgraph=True))
    )
    clip.main(RUN + ["--compile", "--out", str(tmp_path)])
    assert calls and losses(tmp_path) == pytest.approx(losses(finished), abs=1e-4)


@pytest.mark.slow
def test_wrong_use_is_one_sentence(finished, tmp_path):
    def message(*flags):
        with pytest.raises(SystemExit) as error:
            clip.main(RUN + ["--out", str(tmp_path / "run"), *flags])
        assert error.value.code not in (0, None)
        return str(error.value)

    assert "nowhere" in message("--data", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty" in message("--data", str(tmp_path / "empty"))
    assert "--warmup" in message("--warmup", "99") and "--batch-size" in message("--batch-size", "500")
    assert "--lr" in message("--out", str(finished), "--lr", ".5") and "--seed" in message("--seed", "-1")
    assert "needs at least 8 pixels" in message("--image-size", "7")
    assert "--out" in message("--out", str(ROOT / "clip.py"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes((finished / "last.pt").read_bytes()[:5000])
    assert "last.pt" in message() and "--restart" in message()
    state = torch.load(finished / "last.pt")
    clip.save_checkpoint(tmp_path / "run/last.pt", **(state | {"script": "declip"}))
    assert "declip" in message()
    for other, why in ((dict(data="0" * 64), "other pairs"), (dict(merges="a b"), "other merges")):
        clip.save_checkpoint(tmp_path / "run/last.pt", **(state | other))
        assert why in message()
    clip.save_checkpoint(tmp_path / "other.pt", **(state | dict(merges="a b")))
    assert "merges" in message("--restart", "--init", str(tmp_path / "other.pt"))
    with pytest.raises(SystemExit, match="last.pt cannot be written"):
        clip.save_checkpoint(tmp_path / "no folder/last.pt", step=1)
    clip.save_checkpoint(tmp_path / "weights.pt", **state)
    assert "--init" in message("--restart", "--init", str(tmp_path / "weights.pt"), "--image-size", "64")
    assert "bpe" in message("--restart", "--bpe", str(tmp_path / "no.txt")).lower()
    assert message("--model", "huge") == "2"  # argparse's own


@pytest.mark.slow
def test_logit_scale_stays_within_its_bounds(finished, tmp_path):
    """An absurd learning rate throws it out on both sides; at the bound it still has a gradient."""
    clip.main(RUN + ["--epochs", "1", "--lr", "9", "--out", str(tmp_path)])
    scales = [
        row["logit_scale"]
        for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert any(abs(scale - bound) < 1e-3 for scale in scales for bound in (1, 100)) and all(
        0.999 < scale < 100.001 for scale in scales
    )
    model, *_ = evaluator.load(finished / "last.pt")
    nn.init.constant_(model.logit_scale, math.log(100))
    clip.clip_loss(*model(torch.randn(4, 3, 32, 32), torch.tensor([[7, 9]] * 4))).backward()
    assert model.logit_scale.grad != 0


@pytest.mark.slow
def test_init_starts_from_weights(finished, tmp_path):
    clip.main(RUN + ["--out", str(tmp_path), "--init", str(finished / "last.pt"), "--epochs", "1", "--lr", "0"])
    expected, found = weights(finished / "last.pt"), weights(tmp_path / "last.pt")
    assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.slow
@pytest.mark.parametrize("augment", clip.AUGMENT)
def test_every_augmentation_and_recipe_runs(augment, tmp_path):
    clip.main(RUN + ["--out", str(tmp_path), "--augment", augment, "--epochs", "1", "--checkpoint-activations"])
    assert all(map(math.isfinite, losses(tmp_path)))


def test_recipes_are_complete():
    parsed = vars(clip.parse_args([]))
    assert set(clip.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}
    for recipe in clip.RECIPES.values():
        assert set(recipe) <= set(parsed) and recipe["model"] in clip.MODELS and recipe["augment"] in clip.AUGMENT
        assert {"model", "batch_size", "epochs", "lr", "warmup", "weight_decay", "augment"} <= set(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    clip.main(RUN + ["--out", str(tmp_path), "--amp", amp, "--epochs", "6"])
    seen = [loss for loss in losses(tmp_path) if loss is not None]  # fp16's first scale may be too large
    assert seen[-1] < seen[0]


@pytest.mark.slow
def test_batch_norms_survive_a_bad_step(monkeypatch, tmp_path):
    """A picture that makes everything infinite leaves running means and variances finite."""
    monkeypatch.setitem(clip.MODELS, "tiny", RESNET | dict(image_size=32))
    normalize, calls = clip.data.Preprocess.normalize, []
    monkeypatch.setattr(
        clip.data.Preprocess,
        "normalize",
        lambda self, x: (calls.append(1), normalize(self, x) * (math.inf if len(calls) == 3 else 1))[1],
    )
    clip.main(
        [
            "--limit",
            "96",
            "--batch-size",
            "16",
            "--epochs",
            "1",
            "--warmup",
            "2",
            "--eval=",
            "--log-every",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    assert all(v.isfinite().all() for v in weights(tmp_path / "last.pt").values())
    assert clip.load_checkpoint(tmp_path / "last.pt")["meter"]["bad"] == 1
