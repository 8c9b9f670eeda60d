"""flame.py: the losses against slow definitions, SigLIP and CLIP, W ranks against one process, the facets of a tiny
random language model (skipped without transformers), the store and what it refuses, runs."""
import json
import os
import random
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import clip
import data
import eval as evaluator
import flame
from ranks import spawn
from test_clip import losses, unit, weights

BORROW = {
    "gather_constant": lambda f: f(torch.rand(2, 3)),
    "sigmoid_loss": lambda f: f(torch.eye(4), torch.eye(4)[:, None], 10., -10.),
    "nce_loss": lambda f: f(torch.eye(4), torch.eye(4)[:, None], 10.),
    "facet_mask": lambda f: f(3, [2, 2]),
}
SMALL = dict(embed_dim=32, image_size=32, patch_size=16, vision_width=64, vision_layers=2, dim=24, rows=5)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# the losses

def slow_sigmoid(x, text, s, b):
    """The definition: one term for each image and each row of text."""
    N, K, _ = text.shape
    total = 0.
    for i in range(N):
        for n in range(N):
            for j in range(K):
                logit = s * (x[i] * text[n, j]).sum() + b
                total = total - ((1 if i == n else -1) * logit).sigmoid().log()
    return total / (K * N)


def slow_nce(x, text, s):
    """The definition: for each slot a softmax over the batch, from images to texts and from texts to images."""
    N, K, _ = text.shape
    total = 0.
    for j in range(K):
        for n in range(N):
            row = torch.stack([s * (x[n] * text[m, j]).sum() for m in range(N)])
            column = torch.stack([s * (x[m] * text[n, j]).sum() for m in range(N)])
            total = total - row.log_softmax(0)[n] - column.log_softmax(0)[n]
    return total / (2 * N * K)


def test_losses_are_their_definitions():
    x, text = unit(6, 5).requires_grad_(), unit(6, 3, 5, seed=1).requires_grad_()
    s, b = scalar(9.), scalar(-2.)
    for fast, slow, inputs in ((flame.sigmoid_loss(x, text, s, b), slow_sigmoid(x, text, s, b), (x, s, b)),
                               (flame.nce_loss(x, text, s), slow_nce(x, text, s), (x, s))):
        assert fast.dtype == torch.float64 and abs(fast - slow) < 1e-12
        for a, c in zip(torch.autograd.grad(fast, inputs, retain_graph=True), torch.autograd.grad(slow, inputs)):
            assert (a - c).abs().max() < 1e-12
    for given in (None, text):  # texts are constants
        for loss in (flame.sigmoid_loss(x, text, s, b, given), flame.nce_loss(x, text, s, given)):
            assert torch.autograd.grad(loss, text, allow_unused=True)[0] is None


def test_one_row_is_siglip_and_clip():
    """SigLIP's pseudocode (arXiv 2303.15343, algorithm 1), and clip.py's loss with its gradients."""
    x, y, s, b = unit(7, 5).requires_grad_(), unit(7, 5, seed=1), scalar(9.), scalar(-3.)
    labels = 2 * torch.eye(7, dtype=torch.float64) - 1
    siglip = -F.logsigmoid(labels * (x @ y.T * s + b)).sum() / 7
    for one, other, inputs in ((flame.sigmoid_loss(x, y[:, None], s, b), siglip, (x, s, b)),
                               (flame.nce_loss(x, y[:, None], s), clip.clip_loss(x, y, s), (x, s))):
        assert abs(one - other) < 1e-12
        for a, c in zip(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs)):
            assert (a - c).abs().max() < 1e-12


def test_closed_forms():
    for K in (1, 3):
        x, text = torch.eye(8, dtype=torch.float64)[:4], torch.eye(8, dtype=torch.float64)[4:, None].expand(4, K, 8)
        expected = F.softplus(torch.tensor(10.)) + 3 * F.softplus(torch.tensor(-10.))  # all cosines are 0
        for s in (1., 50.):
            assert flame.sigmoid_loss(x, text, s, -10.).item() == pytest.approx(expected.item(), abs=1e-6)
            assert flame.nce_loss(x, text, s).item() == pytest.approx(np.log(4), abs=1e-12)


def test_repeated_and_permuted_rows():
    x, text, order = unit(6, 5), unit(6, 3, 5, seed=1), torch.tensor([2, 0, 1])
    loss = partial(flame.sigmoid_loss, logit_scale=9., bias=-2.)
    assert loss(x, text.repeat(1, 2, 1)) == pytest.approx(loss(x, text).item(), abs=1e-12)
    mixed = text.clone()
    mixed[2] = text[2, order]
    assert loss(x, mixed) == pytest.approx(loss(x, text).item(), abs=1e-12)
    before = flame.nce_loss(x, text, 9.)
    assert flame.nce_loss(x, text[:, order], 9.) == pytest.approx(before.item(), abs=1e-12)
    assert abs(flame.nce_loss(x, mixed, 9.) - before) > 1e-4  # slots meet across images


def test_losses_are_fp32_under_autocast():
    x, text = unit(16, 32).bfloat16(), unit(16, 2, 32, seed=1).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = flame.sigmoid_loss(x, text, torch.tensor(100.), -10.), flame.nce_loss(x, text, torch.tensor(100.))
    exact = flame.sigmoid_loss(x.double(), text, 100., -10.), flame.nce_loss(x.double(), text, 100.)
    assert all(a.dtype == torch.float32 and abs(a - b) < 1e-4 for a, b in zip(found, exact))


# W ranks are one process

def example(bias, n=8):
    torch.manual_seed(0)
    model = flame.FLAME(**SMALL, bias=bias).double()
    return model, torch.rand(n, 3, 32, 32, dtype=torch.float64), unit(n, 3, 24, seed=2)


def step(model, images, text):
    """The loss, as main computes it, and all gradients."""
    model.zero_grad()
    all_text, arrived = flame.gather_constant(text)
    x, s, b = model(images)
    arrived()
    loss = flame.nce_loss(x, text, s, all_text) if b is None else flame.sigmoid_loss(x, text, s, b, all_text)
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None}


def on_ranks(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    truth = [step(*example(bias)) for bias in (True, False)]
    dist.init_process_group("gloo", rank=rank, world_size=world)
    worst = []
    for bias, (expected, gradients) in zip((True, False), truth):
        model, images, text = example(bias)
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        mine = images.chunk(world)[rank], text.chunk(world)[rank]
        loss, found = step(parallel, *mine)
        dist.all_reduce(loss)
        x, s, b = model(mine[0])
        alone = flame.nce_loss(x, mine[1], s) if b is None else flame.sigmoid_loss(x, mine[1], s, b)  # gathers itself
        dist.all_reduce(alone)
        worst += [abs(loss / world - expected), abs(alone / world - expected).detach(),
                  *((found[name] - gradients[name]).abs().max() for name in gradients)]
        assert found.keys() == gradients.keys()
    if rank == world - 1:
        torch.save(torch.stack(worst), path)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", (2,))
def test_ranks_equal_one_process(world, tmp_path):
    spawn(on_ranks, (world, 29500 + os.getpid() % 2000 + 11, tmp_path / "found"), world)
    worst = torch.load(tmp_path / "found")
    assert worst.max() < 1e-10 and len(worst) > 60


# the image branch

def test_image_branch():
    """The MLP and its norm work on each patch before the mean, and the class token's output plays no part."""
    model, images, _ = example(True)
    features, scale, bias = model(images)
    assert (features.norm(dim=1) - 1).abs().max() < 1e-12
    tokens = model.visual.transformer(model.visual.embed(images))
    slow = torch.stack([torch.stack([model.projector(patch) for patch in image]).mean(0) for image in tokens[:, 1:]])
    assert (model.encode_image(images) - slow).abs().max() < 1e-12
    pooled = model.projector(tokens[:, 1:].mean(1))
    assert (pooled - slow).abs().max() > 1e-3
    outputs = []

    def replaced(module, inputs, output):
        outputs.append(output)
        return torch.cat([torch.full_like(output[:, :1], 7.), output[:, 1:]], 1)

    handle = model.visual.transformer.register_forward_hook(replaced)
    assert torch.equal(model.encode_image(images), model.encode_image(images)) and len(outputs) == 2
    assert (model.encode_image(images) - slow).abs().max() < 1e-12
    handle.remove()
    assert scale.item() == pytest.approx(10, abs=1e-5) and bias.item() == -10
    model = example(False)[0]
    assert model.logit_bias is None and model.logit_scale.exp().item() == pytest.approx(1 / .07, abs=1e-5)


def test_who_learns_and_who_decays():
    model = example(True)[0]
    decay, free = ({id(p) for p in group["params"]} for group in flame.param_groups(model, .5))
    groups = {name: id(p) in decay for name, p in model.named_parameters() if id(p) in decay | free}
    frozen = {name for name, _ in model.named_parameters()} - {*groups}
    assert frozen == {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj", "centre"}
    assert groups["visual.positional_embedding"] and groups["projector.0.weight"] and groups["visual.conv1.weight"]
    vectors = ("visual.class_embedding", "logit_scale", "logit_bias", "projector.3.weight", "projector.0.bias")
    assert not any(groups[name] for name in vectors)
    gradients = step(*example(True))[1]
    assert gradients.keys() == groups.keys() and all(g.abs().max() > 0 for g in gradients.values())


def test_parameters_of_the_released_model():
    """85.8 M used in the ViT, 30.17 M in the MLP."""
    with torch.device("meta"):
        sizes = {name: flame.MODELS["ViT-B-16"][name] for name in
                 ("embed_dim", "patch_size", "vision_width", "vision_layers")}
        model = flame.FLAME(**sizes, image_size=224, dim=5120, rows=11)
    used = sum(p.numel() for p in model.visual.parameters() if p.requires_grad)
    assert used / 1e6 == pytest.approx(85.8, abs=.05)
    assert sum(p.numel() for p in model.projector.parameters()) / 1e6 == pytest.approx(30.17, abs=.01)


# prompts, facets

def test_prompts():
    assert flame.tidy('a  "red"\ncar ') == "a 'red' car."
    assert flame.tidy("why?") == "why." and flame.tidy("ok.") == "ok." and flame.tidy("it's") == "it's."
    raw, short, long = (flame.PROMPTS[kind] for kind in ("raw", "short", "long"))
    assert raw[0].format(flame.tidy("a car")) + flame.FACET.format(flame.FACETS[0]) == (
        'Image description : "a car." . After thinking step by step , this image description means in just one word:"')
    assert raw[0] == short[0] and long[0] == "Detailed " + raw[0] and (raw[1], short[1], long[1]) == (1, 3, 7)


def test_facet_mask_is_its_definition():
    prefix, lengths = 3, [2, 1, 3]
    mask, owner = flame.facet_mask(prefix, lengths), [0, 0, 0, 1, 1, 2, 3, 3, 3]
    slow = [[k <= q and owner[k] in (0, owner[q]) for k in range(9)] for q in range(9)]
    assert mask.tolist() == slow
    tril = torch.ones(9, 9).tril().bool()  # the closed form: each facet forgets the facets before it
    for start, end in ((3, 5), (5, 6), (6, 9)):
        tril[start:end, 3:start] = False
    assert torch.equal(mask, tril)
    assert torch.equal(flame.facet_mask(4, [3]), torch.ones(7, 7).tril().bool())


def test_words_stand_in():
    lm = flame.WordVectors()
    a, b, c = lm("long", ["a red car", "Car, red: a!", "a blue car"])
    assert a.shape == (7, 64) and (a - b).abs().max() < 1e-6 and (a * c).sum(1).mean() < .95
    assert (a.norm(dim=1) - 1).abs().max() < 1e-6 and (a[0] - a[1]).abs().max() > .01
    assert torch.equal(lm("raw", ["a red car"])[0], a[:1]) and lm("short", ["🙂"]).isfinite().all()


@pytest.fixture(scope="module")
def lms(tmp_path_factory):
    """Folders with tiny random language models of transformers' own classes, by kind, and one tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    root = tmp_path_factory.mktemp("lms")
    text = " ".join([*(prompt for prompt, _ in flame.PROMPTS.values()), *flame.FACETS, flame.FACET, "red car dog blue"])
    words = {piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)} | {"one", "two", "three"}
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    sizes = dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=.5)
    for kind in ("Llama", "Mistral", "Qwen2"):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
        model.save_pretrained(root / kind)
        fast.save_pretrained(root / kind)
    wrong = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)
    wrong.save_pretrained(root / "GPT2")
    return root


CPU = torch.device("cpu")
TEXTS = ["red car", "dog", "one two three one two three one two three blue", "blue dog"]


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ("Llama", "Mistral", "Qwen2"))
def test_vectors_are_hidden_states_of_the_last_block_but_one(lms, kind):
    """The raw prompt against the whole model's hidden states; a batch against texts one by one, with and without
    restarted positions; with restarted positions against separate prompts."""
    import transformers
    whole = transformers.AutoModelForCausalLM.from_pretrained(lms / kind).eval()

    def hidden(ids):  # of the last token, unit norm
        with torch.inference_mode():
            states = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert len(states) == 4  # the input of the first block, then the output of each; the last one normed
        return F.normalize(states[-2][0, -1], dim=0)

    lm, restarted = (flame.LanguageModel(lms / kind, CPU, restart) for restart in (False, True))
    assert lm.about["layer"] == 1 and lm.dim == 32 and lm.about["weights"] == restarted.about["weights"]
    for text, row in zip(TEXTS, lm("raw", TEXTS)):
        assert (hidden(lm.prefix("raw", text) + lm.facets["raw"][0]) - row[0]).abs().max() < 1e-5
    for model in (lm, restarted):
        for kind_of in ("raw", "short", "long"):
            alone = torch.cat([model(kind_of, [text]) for text in TEXTS])
            assert (model(kind_of, TEXTS) - alone).abs().max() < 1e-4
    for text, rows in zip(TEXTS, restarted("long", TEXTS)):
        for facet, row in zip(restarted.facets["long"], rows):
            assert (hidden(restarted.prefix("long", text) + facet) - row).abs().max() < 1e-5
    assert (lm("long", TEXTS) - restarted("long", TEXTS))[:, 0].abs().max() < 1e-5  # the first facet is the same
    assert (lm("long", TEXTS) - restarted("long", TEXTS))[:, 1:].abs().max() > 1e-3


@pytest.mark.transformers
def test_facets_do_not_see_each_other(lms):
    lm = flame.LanguageModel(lms / "Llama", CPU)
    before = lm("long", TEXTS)
    lm.facets["long"][2] = lm.facets["long"][2][:3] + lm.prefix("raw", "dog")[:1] + lm.facets["long"][2][4:]
    changed = (lm("long", TEXTS) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False, False, False, False]


@pytest.mark.transformers
def test_the_first_of_several_facets_begins_with_a_start_token(lms):
    lm = flame.LanguageModel(lms / "Llama", CPU)
    bos, raw = lm.tokenizer.bos_token_id, lm.facets["raw"][0]
    assert raw[0] != bos and lm.facets["long"][0] == [bos, *raw] == lm.facets["short"][0]
    assert lm.facets["long"][1][0] != bos and lm.length("raw", "dog") == len(lm.prefix("raw", "dog")) + len(raw)


@pytest.mark.transformers
def test_a_language_model_fills_a_store(lms, tmp_path, capsys):
    """11 rows from three captions; another model, or positions that restart, are refused; texts can be added."""
    table = pictures(tmp_path, [["red car", "car", "one two red car"], ["dog", "dog", "blue dog three"]])
    flame.main(["embed", "--lm", str(lms / "Llama"), "--data", table, "--rewritten", "--out", str(tmp_path / "out")])
    store = flame.TextStore(tmp_path / "out")
    rows, lm = np.load(store.path), flame.LanguageModel(lms / "Llama", CPU)
    expected = torch.cat([lm("raw", ["dog"]), lm("short", ["dog"]), lm("long", ["blue dog three"])], 1)[0]
    assert rows.shape == (2, 11, 32) and np.abs(rows[1] - expected.numpy()).max() < 1e-3
    assert store.about["caption_rows"] == [4, 5, 6, 7, 8, 9, 10] and store.about["layer"] == 1
    (tmp_path / "lines").write_text("a blue car\n\n")
    add = ["embed", "--out", str(tmp_path / "out"), "--lines", str(tmp_path / "lines")]
    flame.main(add)
    store = flame.TextStore(tmp_path / "out")
    assert store(["a  blue car"]).tolist() == [[1]]
    assert np.abs(store.vectors[0] - lm("raw", ["a blue car"])[0, 0].numpy()).max() < 1e-3
    for flags in (["--lm", str(lms / "Mistral")], ["--restart-positions"]):
        if flags[0] == "--lm":  # another model of the same width
            torch.manual_seed(1)
            import transformers
            config = transformers.AutoConfig.from_pretrained(lms / "Llama")
            transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
            shutil.copytree(lms / "Llama", tmp_path / "other", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
            flags = ["--lm", str(tmp_path / "other")]
        with pytest.raises(SystemExit, match="vectors that differ in: (weights|restart_positions)"):
            flame.main(add + flags)


@pytest.mark.transformers
def test_wrong_language_models_are_one_sentence(lms, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is a gpt2; embed reads .* llama, mistral, qwen2"):
        flame.LanguageModel(lms / "GPT2", CPU)
    with pytest.raises(SystemExit, match="cannot be loaded"):
        flame.LanguageModel(tmp_path / "nothing", CPU)
    table = pictures(tmp_path, [["dog"], ["one " * 300]])
    with pytest.raises(SystemExit, match="'one one .* has 3.. tokens in its prompt, and .* reads 256.*--subset"):
        flame.main(["embed", "--lm", str(lms / "Llama"), "--data", table, "--out", str(tmp_path / "out")])
    (tmp_path / "lines").write_text("dog " * 300)
    with pytest.raises(SystemExit, match="tokens in its prompt"):
        flame.embed_texts(flame.LanguageModel(lms / "Llama", CPU), ["dog " * 300], [], tmp_path)


@pytest.mark.transformers
def test_fine_tuned_models_are_told_apart_and_no_code_runs(lms, tmp_path):
    import transformers
    shutil.copytree(lms / "Llama", tmp_path / "tuned")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    model.model.layers[0].self_attn.q_proj.weight.data += .01
    model.save_pretrained(tmp_path / "tuned")
    one, other = (flame.LanguageModel(folder, CPU).about for folder in (lms / "Llama", tmp_path / "tuned"))
    assert one["weights"] != other["weights"] and flame.identity(one) != flame.identity(other)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    )).save_pretrained(tmp_path / "short")
    shutil.copytree(lms / "Llama", tmp_path / "short", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    with pytest.raises(SystemExit, match="has one block"):
        flame.LanguageModel(tmp_path / "short", CPU)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SystemExit, match="cannot be loaded"):
        flame.LanguageModel(tmp_path / "evil", CPU)
    assert not (tmp_path / "ran").exists()


def test_an_end_token_of_the_tokenizer_is_left_out():
    class Tokenizer:
        eos_token_id = 7

        def __call__(self, text):
            return type("", (), {"input_ids": [1, *map(ord, text), 7]})

    lm = object.__new__(flame.LanguageModel)
    lm.tokenizer = Tokenizer()
    assert lm.ids("ab") == [1, 97, 98]


def test_without_transformers_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install 'transformers>=4.56'"):
        flame.main(["embed", "--lm", "any", "--data", "toy", "--limit", "8", "--out", str(tmp_path)])


# the store

def pictures(folder, captions):
    """A .jsonl with pictures of the toy and these lists of captions."""
    with open(folder / "pairs.jsonl", "w") as file:
        for i, texts in enumerate(captions):
            (folder / f"{i}.jpg").write_bytes(data.ToyDataset(64, None).image(i))
            file.write(json.dumps({"filename": f"{i}.jpg", "caption": texts}) + "\n")
    return str(folder / "pairs.jsonl")


def embed(out, *flags):
    flame.main(["embed", "--lm", "words", "--data", "toy", "--limit", "64", "--out", str(out), *flags])
    return flame.TextStore(out)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    out = tmp_path_factory.mktemp("stored")
    embed(out, "--tests", "toy")
    return out


def test_store_holds_the_rows_of_each_caption(stored):
    store, dataset, lm = flame.TextStore(stored), data.open_dataset("toy", None, 64), flame.WordVectors()
    rows = np.load(store.path)
    assert rows.shape == (64, 8, 64) and rows.dtype == np.float16
    for i in range(64):
        text = dataset.captions(i)
        expected = torch.cat([lm("raw", text), lm("long", text)], 1)[0].numpy()
        assert np.abs(rows[i] - expected).max() < 1e-3
    prompts, captions = evaluator.texts_of("toy", evaluator.open_test("toy"))
    assert {*store.names} == {*prompts, *captions} and store(prompts[:2]).shape == (2, 1)
    where = store.names.index(captions[0])
    assert not store.raw[where] and store.raw[store.names.index(prompts[0])]
    expected = lm("long", captions[:1]).mean(1)[0].numpy()
    assert np.abs(store.vectors[where] - expected).max() < 1e-3
    assert sorted(os.listdir(stored)) == ["embeddings.json", "embeddings.lock", "embeddings.npy", "texts.npz"]


class Counted(flame.WordVectors):
    """Counts the texts it is given; is interrupted before a call."""
    def __init__(self, stop=None):
        super().__init__()
        self.calls, self.texts, self.stop = 0, 0, stop

    def __call__(self, kind, texts):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.texts += len(texts)
        return super().__call__(kind, texts)


def test_embedding_is_sharded_and_resumed(tmp_path):
    """Two ranks and a resumed job write what one process writes; equal captions are embedded once."""
    dataset = data.open_dataset("toy", None, 40)
    captions = flame.captions_to_embed(dataset, False)
    captions[5] = captions[30] = captions[2]
    about = flame.about_rows(flame.WordVectors(), dataset, False)
    lm, cut, rest, ranks = Counted(), Counted(stop=4), Counted(), [Counted(), Counted()]
    assert flame.embed_captions(lm, captions, about, tmp_path / "one", chunk=8)
    different = len({*captions})
    assert different <= 38 and lm.texts == 2 * different
    with pytest.raises(KeyboardInterrupt):
        flame.embed_captions(cut, captions, about, tmp_path / "cut", chunk=8)
    with pytest.raises(SystemExit, match="was interrupted; the same command goes on"):
        flame.TextStore(tmp_path / "cut")
    assert flame.embed_captions(rest, captions, about, tmp_path / "cut", chunk=8) and cut.texts == 24
    assert rest.texts == 2 * different - 16  # the first chunk was kept
    assert not flame.embed_captions(ranks[1], captions, about, tmp_path / "two", 1, 2, chunk=8)
    assert flame.embed_captions(ranks[0], captions, about, tmp_path / "two", 0, 2, chunk=8)
    assert min(r.texts for r in ranks) > 0 and sum(r.texts for r in ranks) == 2 * different
    files = [(tmp_path / name / "embeddings.npy").read_bytes() for name in ("one", "cut", "two")]
    assert files[0] == files[1] == files[2]
    again = Counted()
    assert flame.embed_captions(again, captions, about, tmp_path / "one", chunk=8) and again.texts == 0


def test_a_text_that_is_prompt_and_caption_counts_as_prompt(tmp_path):
    lm = Counted()
    flame.embed_texts(lm, [], ["red car", "dog"], tmp_path)
    assert flame.read_texts(tmp_path, lm.about)[2].tolist() == [False, False]
    flame.embed_texts(lm, ["red  car"], ["red car", "dog", "cat"], tmp_path, {"cat": np.ones(64, np.float16)})
    names, vectors, raw = flame.read_texts(tmp_path, lm.about)
    assert names == ["red car", "dog", "cat"] and raw.tolist() == [True, False, False] and lm.texts == 3
    assert (vectors[2] == 1).all() and np.abs(vectors[0] - lm("raw", ["red car"])[0, 0].numpy()).max() < 1e-3


def test_captions_of_training_are_not_embedded_twice(tmp_path, monkeypatch):
    table, made = pictures(tmp_path, [["red car"], ["dog"]]), []
    monkeypatch.setattr(flame, "WordVectors", lambda: made.append(Counted()) or made[0])
    flame.WordVectors.name = "words"
    flame.main(["embed", "--lm", "words", "--data", table, "--out", str(tmp_path / "out"), "--tests", table])
    store = flame.TextStore(tmp_path / "out")
    expected = made[0]("long", ["red car"]).mean(1)[0].numpy()
    assert np.abs(store.vectors[store.names.index("red car")] - expected).max() < 1e-3
    assert made[0].texts == 2 * 2 + 1  # raw and long of two captions; the last is this test's own


def test_sampled_rows(stored):
    store = flame.TextStore(stored)
    sample = [flame.flame_views(data.ToyDataset(3, None).image(0), "", random.Random(i), 8, 6, 32, "clip") |
              {"index": i, "skipped": 0} for i in range(5)]
    numbers = np.array([7, 3, 60, 1, 2, 9])
    batch = flame.flame_collate(sample, store.path, numbers)
    rows = np.load(store.path)
    assert batch["texts"].shape == (5, 6, 64) and batch["texts"].dtype == torch.float16
    for i in range(5):
        facets = batch["facets"][i].tolist()
        assert len({*facets}) == 6 and {*facets} <= {*range(8)}
        assert np.array_equal(batch["texts"][i].numpy(), rows[numbers[i], facets])
    assert (batch["facets"] != batch["facets"][0]).any()


def test_ddp_has_nothing_to_broadcast():
    """A broadcast before the forward pass would wait for the texts, which travel meanwhile."""
    assert not [*flame.FLAME(**SMALL).buffers()]


def test_centring(stored):
    """Means over the run's rows; centred rows have mean 0 before they are of unit norm; texts of tests lose the mean of
    the raw prompt, captions that of the long one's facets."""
    store = flame.TextStore(stored)
    rows = np.load(store.path).astype(np.float64)
    mean = flame.mean_rows(store.path, np.arange(32))
    assert np.abs(mean.numpy() - rows[:32].mean(0)).max() < 1e-6
    model = flame.FLAME(**SMALL | dict(dim=64, rows=8))
    model.store = store
    prompt, caption = store.names.index("red circle"), int(np.flatnonzero(~store.raw)[0])
    tokens = torch.tensor([[prompt + 1], [caption + 1]])
    plain = model.encode_text(tokens)
    assert np.abs(plain.numpy() - store.vectors[[prompt, caption]]).max() < 1e-6
    model.centre.copy_(mean)
    moved = plain - model.encode_text(tokens)
    assert (moved[0] - mean[0]).abs().max() < 1e-6 and (moved[1] - mean[1:].mean(0)).abs().max() < 1e-6
    facets = torch.tensor([[3, 0]])
    text = torch.from_numpy(rows[5, [3, 0]])[None]
    expected = F.normalize(text[0] - mean[[3, 0]].double(), dim=1)
    assert (model.centred(text.half(), facets)[0] - expected).abs().max() < 2e-3


def as_of_another_model(folder, copy):
    """A copy of a store that says of itself that another language model of the same width has made it."""
    shutil.copytree(folder, copy)
    about = json.loads((folder / "embeddings.json").read_text())
    about["weights"] = "f" * 16
    (copy / "embeddings.json").write_text(json.dumps(about))
    texts = flame.read_texts(folder, flame.WordVectors().about)
    flame.write_texts(copy, *texts, about)
    return copy


def test_texts_of_another_language_model_are_one_sentence(stored, tmp_path):
    other = as_of_another_model(stored, tmp_path / "other")
    assert flame.TextStore(other).names == flame.TextStore(stored).names
    shutil.copy(stored / "texts.npz", other / "texts.npz")
    with pytest.raises(SystemExit, match="texts.npz is of another language model"):
        flame.TextStore(other)
    shutil.copy(other / "embeddings.json", tmp_path / "damaged")
    (tmp_path / "damaged").write_text("{")
    with pytest.raises(SystemExit, match="is damaged"):
        flame.read_about(tmp_path / "damaged")


def test_lines_do_not_change_what_a_test_has_stored(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "store")
    store = flame.TextStore(stored)
    caption = store.names[int(np.flatnonzero(~store.raw)[0])]
    (tmp_path / "lines").write_text(f"{caption}\na zebra\n")
    flame.main(["embed", "--out", str(tmp_path / "store"), "--lines", str(tmp_path / "lines")])
    after = flame.TextStore(tmp_path / "store")
    assert not after.raw[after.names.index(caption)] and after.raw[after.names.index("a zebra")]


def test_an_interrupted_store_with_a_damaged_count_begins_its_chunks_again(tmp_path):
    """A kill between two writes leaves done.part empty; nothing counts as embedded then."""
    dataset = data.open_dataset("toy", None, 20)
    captions, lm = flame.captions_to_embed(dataset, False), flame.WordVectors()
    about = flame.about_rows(lm, dataset, False)
    with pytest.raises(KeyboardInterrupt):
        flame.embed_captions(Counted(stop=1), captions, about, tmp_path, chunk=8)
    (tmp_path / "done.part").write_bytes(b"")
    assert flame.embed_captions(lm, captions, about, tmp_path, chunk=8)
    assert (np.abs(np.linalg.norm(np.load(tmp_path / "embeddings.npy").astype(np.float32), axis=2) - 1) < 1e-2).all()


def test_a_store_of_other_data_or_damaged_is_one_sentence(stored, tmp_path):
    store = flame.TextStore(stored)
    assert store.rows_of(data.open_dataset("toy", None, 64), "toy", None).tolist() == [*range(64)]
    for spec, pairs in (("toy", 65), ("toy-busy", 64)):
        with pytest.raises(SystemExit, match="vectors of other data .64 pairs., not of these"):
            store.rows_of(data.open_dataset(spec, None, pairs), spec, None)
    with pytest.raises(SystemExit, match="no vector of the text 'a zebra' .1 of 2 are missing.: python flame.py embed"):
        store(["red circle", "a zebra"])

    def spoil(name, change):
        folder = tmp_path / name
        shutil.copytree(stored, folder)
        change(folder)
        with pytest.raises(SystemExit) as error:
            flame.TextStore(folder)
        return str(error.value)

    def cut(folder):
        content = (folder / "embeddings.npy").read_bytes()
        (folder / "embeddings.npy").write_bytes(content[:-9])

    def scale(folder):
        rows = np.load(folder / "embeddings.npy")
        rows[63, 7] *= 2
        np.save(folder / "embeddings.npy", rows)

    assert "is damaged" in spoil("cut", cut) and "norm 2.0" in spoil("scale", scale)
    half = np.load(stored / "embeddings.npy")[:32]
    assert "shape (32, 8, 64)" in spoil("half", lambda f: np.save(f / "embeddings.npy", half))
    assert "texts.npz is damaged" in spoil("texts", lambda f: (f / "texts.npz").write_bytes(b"x"))
    assert "holds no embeddings.json" in spoil("none", lambda f: (f / "embeddings.json").unlink())


def test_a_part_of_the_embedded_data(tmp_path):
    """--limit and --subset find their rows in a store of all pairs, or of the first ones; captions that --subset
    replaces do not."""
    table = pictures(tmp_path, [["red car"], ["dog"], ["blue star"]])
    flame.main(["embed", "--lm", "words", "--data", table, "--out", str(tmp_path / "out")])
    store = flame.TextStore(tmp_path / "out")
    (tmp_path / "keys").write_text("2.jpg\n0.jpg\n")
    assert store.rows_of(data.open_dataset(table, None, None, tmp_path / "keys"), table, None).tolist() == [0, 2]
    assert store.rows_of(data.open_dataset(table, None, 2), table, None).tolist() == [0, 1]
    flame.main(["embed", "--lm", "words", "--data", table, "--limit", "2", "--out", str(tmp_path / "two")])
    two = flame.TextStore(tmp_path / "two")
    assert two.rows_of(data.open_dataset(table, None, 1), table, None).tolist() == [0]
    with pytest.raises(SystemExit, match="other data"):
        two.rows_of(data.open_dataset(table, None), table, None)
    (tmp_path / "keys").write_text("2.jpg\tanother caption\n")
    with pytest.raises(SystemExit, match="other data"):
        store.rows_of(data.open_dataset(table, None, None, tmp_path / "keys"), table, None)


def test_wrong_use_of_embed_is_one_sentence(stored, tmp_path, capsys):
    with pytest.raises(SystemExit, match="--lm: name the language model"):
        flame.main(["embed", "--data", "toy", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--data: name the data first"):
        flame.main(["embed", "--lm", "words", "--tests", "toy", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="holds vectors that differ in: count, data"):
        flame.main(["embed", "--data", "toy", "--limit", "63", "--out", str(stored)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file"):
        embed(tmp_path / "file")
    table = pictures(tmp_path, [["red car", "a car"], ["dog"]])
    with pytest.raises(SystemExit, match="--rewritten: 0.jpg has 2 captions in place of three"):
        flame.main(["embed", "--lm", "words", "--data", table, "--rewritten", "--out", str(tmp_path / "out")])
    flame.main(["embed", "--lm", "words", "--data", table, "--out", str(tmp_path / "out")])
    assert "1 of 2 pairs have several captions" in capsys.readouterr().out


# runs

RUN = ["--limit", "64", "--batch-size", "16", "--epochs", "3", "--warmup", "2", "--log-every", "1", "--eval", ""]


def rows(out):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    flame.main(RUN + ["--out", str(out)])
    return out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished, capsys):
    state = flame.load_checkpoint(finished / "last.pt")
    assert state["script"] == "flame" and state["step"] == 12 == len(rows(finished))
    assert rows(finished)[0]["logit_scale"] == pytest.approx(10, abs=.1)
    assert rows(finished)[0]["logit_bias"] == pytest.approx(-10, abs=.1)
    assert {"facets.png", "last.pt", "log.jsonl"} <= {*os.listdir(finished)}
    model, tokenizer, preprocess = evaluator.load(finished / "last.pt")
    assert isinstance(model, flame.FLAME) and isinstance(tokenizer, flame.TextStore)
    assert model.encode_text(tokenizer(["red circle", "a photo of a red circle."])).shape == (2, 64)
    with pytest.raises(SystemExit, match="--init|holds no CLIP"):  # no towers for other scripts
        evaluator.load_clip_state(finished / "last.pt")


@pytest.mark.slow
def test_eval_tests_a_checkpoint(finished, tmp_path, capsys):
    """Zero-shot, retrieval and probe; a picture against texts; a text that is not stored; a store that has moved."""
    path, out = str(finished / "last.pt"), tmp_path / "results.json"
    small = partial(data.ToyDataset, 64, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "open_test", lambda *_, **__: small("test"))
        evaluator.main([path, "--data", "toy", "--probe", "--json", str(out)])
    result = json.loads(out.read_text())["toy"]
    assert {"top1", "probe", "i2t@1", "t2i@10"} <= {*result} and result["n"] == 64
    (tmp_path / "a.jpg").write_bytes(small().image(0))
    evaluator.main([path, "--images", str(tmp_path / "a.jpg"), "--texts", "red circle", "blue star"])
    assert "red circle" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no vector of the text 'a zebra'.*embed --out .*--lines"):
        evaluator.main([path, "--images", str(tmp_path / "a.jpg"), "--texts", "a zebra"])
    shutil.copy(path, tmp_path / "moved.pt")
    with pytest.raises(SystemExit, match="FLAME_TEXTS"):
        evaluator.load(tmp_path / "moved.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAME_TEXTS", str(next(finished.glob("words-*"))))
        evaluator.load(tmp_path / "moved.pt")
        other = as_of_another_model(next(finished.glob("words-*")), tmp_path / "other")
        patch.setenv("FLAME_TEXTS", str(other))
        with pytest.raises(SystemExit, match="vectors of another language model"):
            evaluator.load(tmp_path / "moved.pt")


def test_texts_of_a_test_are_those_that_eval_encodes():
    """Our own templates get the phrase of torchvision's sets, a user's own do not."""
    class Food:
        classnames = ["pie|tart"]

        def __len__(self):
            return 1

        def captions(self, i):
            return ["a pie\ntwo pies"]

    prompts, captions = evaluator.texts_of("food101", Food())
    assert prompts[0] == "pie, a kind of food" and len(prompts) == 16 and captions == ["a pie", "two pies"]
    assert evaluator.texts_of("food101", Food(), ["a {}"])[0] == ["a pie", "a tart"]
    assert evaluator.texts_of("x", Food(), ["a {}"], ["cake"])[0] == ["a cake"]
    assert all(len(prompt.encode()) + 7 * len(flame.FACET) + sum(map(len, flame.FACETS)) < 1000
               for prompt, _ in flame.PROMPTS.values())  # what check_length takes for granted


def test_eval_knows_no_script():
    """The seam has no name of a script in it."""
    source = (flame.Path(evaluator.__file__)).read_text()
    assert "FLAME" not in source and "flame" not in source


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--loss", "nce", "--centre", "--augment", "declip", "--workers", "1"]),
                         ids=("sigmoid", "nce"))
def test_interrupted_and_resumed_is_bit_identical(flags, finished, tmp_path, monkeypatch):
    whole = finished
    if flags:
        whole = tmp_path / "whole"
        flame.main(RUN + flags + ["--out", str(whole)])
    calls, name = [], "nce_loss" if flags else "sigmoid_loss"
    exact = getattr(flame, name)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return exact(*arguments)

    again = RUN + flags + ["--out", str(tmp_path / "cut")]
    monkeypatch.setattr(flame, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        flame.main(again)
    monkeypatch.setattr(flame, name, exact)
    flame.main(again)
    expected, found = weights(whole / "last.pt"), weights(tmp_path / "cut/last.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(whole) == losses(tmp_path / "cut")
    assert bool(flags) == bool(found["centre"].abs().max() > 0) and ("logit_bias" in found) == (not flags)


@pytest.mark.slow
def test_scale_stays_in_its_range(tmp_path):
    flame.main(RUN + ["--lr", "1", "--out", str(tmp_path)])
    assert all(1 <= row["logit_scale"] <= 100.001 for row in rows(tmp_path))
    assert 0 <= weights(tmp_path / "last.pt")["logit_scale"] <= np.log(100) + 1e-6


@pytest.mark.slow
def test_it_learns(tmp_path):
    """48 steps on vectors of words, tested on the kinds of training: chance is 5 of 64 classes and 10 of 192 texts."""
    flame.main(["--limit", "384", "--batch-size", "64", "--epochs", "8", "--warmup", "10", "--loss", "nce", "--eval",
                "toy-seen", "--eval-every", "8", "--out", str(tmp_path)])
    result = [row["eval"]["toy-seen"] for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
              if "eval" in row][-1]
    assert result["top5"] > .2 and result["i2t@10"] > .15


@pytest.mark.slow
def test_a_long_caption_is_read_to_its_end(tmp_path):
    """Two captions of 120 words that differ in the last one only: CLIP's tokenizer cuts both to the same 77 tokens."""
    filler = " ".join(f"word{i}" for i in range(119))
    captions = [[f"{filler} {'red' if i % 2 else 'blue'}"] for i in range(8)]
    table = pictures(tmp_path, captions)
    flame.main(["embed", "--lm", "words", "--data", table, "--tests", table, "--out", str(tmp_path / "out")])
    store = flame.TextStore(tmp_path / "out")
    a, b = torch.from_numpy(store.vectors[(store(captions[0] + captions[1]) - 1)[:, 0].numpy()]).float()
    assert (a - b).abs().max() > 1e-3
    tokens = data.Tokenizer([("a", "b")])(captions[0] + captions[1])
    assert torch.equal(tokens[0], tokens[1])


def test_wrong_use_is_one_sentence(stored, tmp_path):
    with pytest.raises(SystemExit, match="--model RN50.*choose a ViT"):
        flame.main(RUN + ["--model", "RN50", "--out", str(tmp_path)])
    table = pictures(tmp_path, [["red car"]] * 20)
    with pytest.raises(SystemExit, match="--texts: give the folder .* embed --lm"):
        flame.main(RUN + ["--data", table, "--limit", "20", "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="holds no embeddings.json: it must be a folder"):
        flame.main(RUN + ["--texts", str(tmp_path / "none"), "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="vectors of other data"):
        flame.main(RUN + ["--texts", str(stored), "--limit", "65", "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="no vector of the text .* --tests"):
        flame.main(RUN + ["--texts", str(stored), "--eval", table, "--out", str(tmp_path / "a")])
    torch.save(clip.build("tiny", vision_layers=1, text_layers=1, vocab=600).state_dict(), tmp_path / "clip.pt")
    with pytest.raises(SystemExit, match="--init .* no image tower of a tiny of 32 pixels"):
        flame.main(RUN + ["--init", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "a")])


@pytest.mark.slow
def test_starts_from_an_image_tower(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = clip.build("tiny", text_layers=1, vocab=600).state_dict()
    torch.save(state, tmp_path / "clip.pt")
    flame.main(RUN + ["--init", str(tmp_path / "clip.pt"), "--lr", "0", "--epochs", "1", "--out", str(tmp_path / "a")])
    found = weights(tmp_path / "a/last.pt")
    assert all(torch.equal(value, found[name]) for name, value in state.items() if name.startswith("visual."))


@pytest.mark.slow
def test_vectors_that_changed_end_a_resume(tmp_path):
    texts, flags = tmp_path / "texts", RUN + ["--texts", str(tmp_path / "texts"), "--out", str(tmp_path / "run")]
    embed(texts)
    flame.main(flags + ["--epochs", "1"])
    vectors = np.load(texts / "embeddings.npy")
    np.save(texts / "embeddings.npy", vectors[::-1])
    with pytest.raises(SystemExit, match="other flags or data: other pairs"):
        flame.main(flags)


def test_recipes_are_complete():
    parsed = vars(flame.parse_args([]))
    assert set(flame.RECIPES) == {"toy", "small", "cc3m", "cc12m", "yfcc15m"}
    for recipe in flame.RECIPES.values():
        assert set(recipe) <= set(parsed) and recipe["model"] in flame.MODELS and recipe["augment"] in flame.AUGMENT
        assert {"batch_size", "epochs", "lr", "warmup", "weight_decay", "facets"} <= set(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_trains_on_the_gpu(amp, tmp_path):
    flame.main(RUN + ["--out", str(tmp_path), "--amp", amp, "--augment", "declip"])
    assert any(row["loss"] for row in rows(tmp_path))
