"""CLIP: contrastive language-image pre-training, the baseline that the other four scripts are measured against.

The idea. An image tower and a text tower map pictures and captions to unit vectors of one space. In a batch of N pairs
every picture is asked which of the N captions is its own, and every caption which of the N pictures: two N-way
classifications whose only labels are the pairs themselves. After training, class names written as captions make a
classifier for any set of classes without a single labelled picture ("zero-shot").

The loss. Unit rows x_i (image) and y_j (text), a learned scale s = exp(logit_scale), 14.3 at first and clamped to [1, 100]:

    S_ij = s <x_i, y_j>        L = 1/2 [ mean_i -log softmax_row(S)_ii  +  mean_j -log softmax_column(S)_jj ]

All captions but its own are wrong for a picture, also one that would fit. Without s the loss could not get low, as cosines
end at 1: 4,096 perfect pairs, all other cosines 0, leave ln(1 + 4095 e^-s), 7.3 of ln N = 8.3 at s = 1, but .003 at 14.3.
The gradient:

    G = (softmax_row(S) + softmax_column(S) - 2 I) / 2N        dL/dx = s G y    dL/dy = s G^T x    dL/dlogit_scale = sum_ij G_ij S_ij

The gradient of a feature before its normalisation is orthogonal to it.

W ranks with B pairs each score their own rows against the columns of all ranks ([B, N] logits, not [N, N]), gathered *with*
gradient. The gather's backward sums over ranks, DDP's mean divides by W: together the loss and gradient of one process with
the batch N = W*B. The loader keeps B equal (it drops an epoch's last, smaller batch and puts another pair in the place of a
broken one) and the batch of a step the same for any W and after a restart: a function of seed, epoch and position.

The negatives are the batch: k small batches in a row (gradient accumulation) would be another, easier loss. Exact
accumulation computes all features without gradient, then each small batch anew, with gradient, among the others' features:
one more forward pass; batch norm would see small batches. It is not in here.

Precision. On a GPU that has it towers run in bf16, which has fp32's range and so needs no loss scaling (fp16 does, and
large ViTs have diverged in it); normalisation, logits and loss in fp32.

Zero-shot (eval.py): pictures with the shorter side at the model's size, cut to the centre square; a class is the normalised
mean of the unit features of its name in all prompts.

A healthy run: the loss starts near ln N or a little above, s rises from 14 to 50-100; s falling towards 1 means that the
learning rate is too high.

The cost. 44 GFLOP a pair for ViT-B-32, 55 for RN50, 123 for ViT-B-16, three times the forward pass; the loss is 0.1 % of
it.

How to run.
    python clip.py                                                       drawn toy data, any machine, minutes
    torchrun --nproc_per_node=8 clip.py --data cc3m --eval /imagenet/val     see RECIPES for the settings
    python eval.py runs/clip-toy/last.pt --images cat.jpg --texts "a cat" "a dog"

Where published code differs from this file.
    - SLIP scores local rows against columns gathered without gradient: a feature learns as a question (row) alone, not as
      an answer (column), which is another direction. It is part of why its CLIP ViT-B-16 on CC12M has 36.5 % on ImageNet
      and LaCLIP's, with gradient, a larger batch and QK-norm, 40.2 % (CC3M: LaCLIP 15.8, SLIP 17.1).
    - open_clip by default scores [N, N] on each rank, its own features alone with gradient: the encoders' gradients are
      divided by W, logit_scale's is not. Adam hides that; its eps and gradient clipping do not. Its large runs set
      --local-loss --gather-with-grad, which is ours (all [N, N] with gradient is right too, at W times the logits).
    - SLIP cuts long captions without an end token. The largest id is then the start token at place 0, which sees only
      itself: one constant feature for all of them. Here the last token becomes the end token.
    - OpenAI used QuickGELU; we use GELU (--quick-gelu for their weights). The wrong one loads without a word and costs
      points, so our checkpoints name theirs, and --init compares. SLIP's ViT is timm's (no norm before the blocks, a bias
      on patches); ours is OpenAI's.
    - Batch norm (RN50) uses the statistics of its own rank, as everyone's does: the one thing that W ranks do not share.
      All ranks evaluate with rank 0's running ones, which are saved.

Sources: Radford et al. 2021 (arXiv 2103.00020) and github.com/openai/CLIP; github.com/mlfoundations/open_clip for recipes.
"""
import argparse
import json
import math
import os
import re
import signal
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import eval as evaluator


# loss

class Gather(torch.autograd.Function):
    """all_gather along dimension 0 whose backward gives each rank the sum of the gradients that all ranks hold for its rows."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all ranks, rank-major: [B, ...] -> [N, ...], with gradient; x itself where there is no process group."""
    return Gather.apply(x) if dist.is_available() and dist.is_initialized() else x


def clip_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE of CLIP (section 2.3, figure 3) over all ranks, for the rows of this rank.

    image_features, text_features: unit rows [B, D], row i of one belonging to row i of the other; B equal on all ranks.
    logit_scale: the factor itself (not its log). Returns a scalar, computed in at least fp32 also under autocast: near
    100, bf16 knows multiples of .5 alone.
    The mean over ranks is the loss of the whole batch; ln N for uninformative features.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x, y = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (image_features, text_features))
        all_x, all_y = gather(torch.cat([x, y], 1)).chunk(2, 1)  # [N, D] each
        rank = dist.get_rank() if len(all_x) > len(x) else 0  # one process has no process group
        labels = torch.arange(len(x), device=x.device) + rank * len(x)  # where the own pairs stand among the N
        image_logits = logit_scale * x @ all_y.T  # [B, N]
        text_logits = logit_scale * y @ all_x.T  # [B, N]
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


# encoders: OpenAI's towers under open_clip's parameter names

class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; their weights need it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with heads of 64, under the parameter names of nn.MultiheadAttention."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal=False):  # [B, L, C]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1, 64))  # [B, L, 3, heads, 64]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, 64] each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, quick_gelu=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU() if quick_gelu else nn.GELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False):  # [B, L, C]
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after the other; with checkpoint_activations each is recomputed in the backward pass to save memory."""

    def __init__(self, width, layers, quick_gelu=False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, quick_gelu) for _ in range(layers))
        self.checkpoint_activations = False

    def forward(self, x, causal=False):  # [B, L, C]
        for block in self.resblocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """OpenAI's ViT: patches and a class token through pre-norm blocks; the class token is the picture's feature."""

    def __init__(self, embed_dim, image_size, patch_size, width, layers, quick_gelu=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -.5 * torch.randn(1 + (image_size // patch_size) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -.5 * torch.randn(width, embed_dim))

    def embed(self, images):
        """Tokens that enter the first block, class token first: [B, 3, S, S] -> [B, 1+P, C]."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, P, C]
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], 1) + self.positional_embedding)

    def forward(self, images):  # [B, 3, S, S] -> [B, D]
        return self.ln_post(self.transformer(self.embed(images))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """ResNet bottleneck whose stride is an average pool in front of a convolution of stride 1, in both branches."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # every block starts as its shortcut
        self.avgpool = nn.AvgPool2d(stride)
        self.downsample = nn.Sequential(OrderedDict([
            ("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False)), ("1", nn.BatchNorm2d(4 * planes))
        ])) if stride > 1 or inplanes != 4 * planes else nn.Identity()

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(self.avgpool(out)))
        return (out + self.downsample(x)).relu()


class AttentionPool2d(nn.Module):
    """One attention step in which the mean of the grid asks and the mean and the grid answer (heads of 64)."""

    def __init__(self, grid, width, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(width ** -.5 * torch.randn(1 + grid ** 2, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width ** -.5)

    def forward(self, x):  # [B, C, h, w] -> [B, D]
        x = x.flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = (p(t).unflatten(-1, (-1, 64)).transpose(1, 2)
                   for p, t in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x)))
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, 64]
        return self.c_proj(x.flatten(1))


class ModifiedResNet(nn.Module):
    """OpenAI's ResNet. Where it has three stem convolutions, a mean pool, average pools for strides and attention at the end, torchvision's
    has one 7x7, a max pool, strided convolutions and a mean."""

    def __init__(self, embed_dim, image_size, width, layers):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for i, depth in enumerate(layers):
            planes = width * 2 ** i
            blocks = [Bottleneck(inplanes if j == 0 else 4 * planes, planes, 2 if i > 0 and j == 0 else 1) for j in range(depth)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = 4 * planes
        self.attnpool = AttentionPool2d(image_size // 32, 32 * width, embed_dim)

    def forward(self, images):  # [B, 3, S, S] -> [B, D]
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.avgpool(self.bn3(self.conv3(x)).relu())
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)


class CLIP(nn.Module):
    """The two towers and the temperature. vision_layers: a number for a ViT, four for the stages of a ResNet."""

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers, context, vocab, text_width, text_layers,
                 quick_gelu=False):
        super().__init__()
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(embed_dim, image_size, patch_size, vision_width, vision_layers, quick_gelu)
        else:
            self.visual = ModifiedResNet(embed_dim, image_size, vision_width, vision_layers)
        self.transformer = Transformer(text_width, text_layers, quick_gelu)
        self.token_embedding = nn.Embedding(vocab, text_width)
        self.positional_embedding = nn.Parameter(.01 * torch.randn(context, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))  # the log; section 2.5
        nn.init.normal_(self.token_embedding.weight, std=.02)
        for block in self.transformer.resblocks:  # of out_proj and c_proj 2 x layers add up, so each starts smaller by the root
            nn.init.normal_(block.attn.in_proj_weight, std=text_width ** -.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * text_layers * text_width) ** -.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text_width) ** -.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * text_layers * text_width) ** -.5)

    def encode_image(self, images):
        """Normalised pictures [B, 3, S, S] -> features [B, D], not of unit norm."""
        return self.visual(images)

    def text_tokens(self, tokens):
        """Token ids [B, L] -> the text tower's output at every position [B, L, C], before the projection. Causal:
        position j knows nothing of what follows it, so the loader cuts captions after the longest one's end token."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        return self.ln_final(self.transformer(x, causal=True))

    def encode_text(self, tokens, eot=None):
        """Token ids [B, L] -> features [B, D], not of unit norm, read at the end token (eot [B]; the largest id if not given)."""
        x = self.text_tokens(tokens)
        return x[torch.arange(len(x), device=x.device), tokens.argmax(-1) if eot is None else eot] @ self.text_projection

    def forward(self, images, tokens):
        """Images [B, 3, S, S], tokens [B, L] -> unit image_features [B, D], unit text_features [B, D], logit_scale (the factor)."""
        image_features, text_features = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
                                         for x in (self.encode_image(images), self.encode_text(tokens)))
        return image_features, text_features, self.logit_scale.exp()


ENCODERS = "visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale"
MODELS = {  # sizes from OpenAI and open_clip; 224 pixels and 12 text layers where nothing else is said
    "ViT-B-32": dict(embed_dim=512, patch_size=32, vision_width=768, vision_layers=12, text_width=512),
    "ViT-B-16": dict(embed_dim=512, patch_size=16, vision_width=768, vision_layers=12, text_width=512),
    "ViT-S-16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_layers=12, text_width=384),
    "RN50": dict(embed_dim=1024, patch_size=None, vision_width=64, vision_layers=(3, 4, 6, 3), text_width=512),
    "tiny": dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=4, text_width=128, text_layers=4),  # ours
}


def build(source, cls=CLIP, **overrides):
    """A model of class cls, either new (source: a name in MODELS) or from weights (source: a state dict, whose shapes say the
    sizes). overrides: keyword arguments of cls that replace or complete the sizes; a state dict does not tell quick_gelu."""
    if isinstance(source, str):
        return cls(**{"image_size": 224, "text_layers": 12, "context": 77, "vocab": 49408, **MODELS[source], **overrides})

    def depth(prefix):
        return len({key[len(prefix):].split(".")[0] for key in source if key.startswith(prefix)})

    conv, positions = source["visual.conv1.weight"], source["positional_embedding"]
    sizes = dict(embed_dim=source["text_projection"].shape[1], context=len(positions), vocab=len(source["token_embedding.weight"]),
                 text_width=positions.shape[1], text_layers=depth("transformer.resblocks."))
    if "visual.proj" in source:
        grid = math.isqrt(len(source["visual.positional_embedding"]) - 1)
        sizes |= dict(patch_size=conv.shape[-1], image_size=grid * conv.shape[-1], vision_width=len(conv),
                      vision_layers=depth("visual.transformer.resblocks."))
    else:
        grid = math.isqrt(len(source["visual.attnpool.positional_embedding"]) - 1)
        sizes |= dict(patch_size=None, image_size=grid * 32, vision_width=2 * len(conv),
                      vision_layers=tuple(depth(f"visual.layer{i}.") for i in (1, 2, 3, 4)))
    model = cls(**{**sizes, **overrides})
    model.load_state_dict(source)
    return model


# views and picture

AUGMENT = {  # share of the area that a crop has; jitter: probability, then brightness, contrast, saturation, hue; rest: probabilities
    "clip": ((.5, 1.), dict()),  # SLIP's and DeCLIP's CLIP baselines; open_clip (.9, 1); OpenAI any square; none colours
    "declip": ((.2, 1.), dict(flip=.5, jitter=(.8, .4, .4, .4, .1), grey=.2, blur=.5)),  # MoCo v2
    "protoclip": ((.5, 1.), dict(flip=.5, jitter=(.2, .8, .8, .8, .2), grey=.2, blur=.2)),
    "aclip": ((.5, 1.), dict(jitter=(.8, .4, .4, .2, .1), grey=.2, blur=.1, solarize=.2)),  # no flip: crops map onto each other
}


def views(image, caption, rng, tokenizer, size, augment):
    """One sample in the worker: image bytes and a caption -> uint8 picture [3, S, S], its colour parameters [8], tokens [L]."""
    area, colors = AUGMENT[augment]
    sample = {"images": data.random_resized_crop(image, size, area, rng), "tokens": tokenizer([caption])[0]}
    return sample | {"colors": data.color_params(rng, **colors)} if colors else sample


def picture(path, model, tokenizer, preprocess, dataset, count=64, show=12):
    """Writes twelve pictures of a data set, each over the three texts that the model ranks highest among those of 64 pictures:
    captions, or class names where there are none. A star marks its own."""
    device, training = model.logit_scale.device, model.training
    places = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    images = [(i, image) for image, i in map(evaluator.Pictures(dataset, preprocess.size).__getitem__, places) if i >= 0][:show]
    own = {i: (dataset.captions(i) or [dataset.classnames[dataset.label(i)]])[0] for i in places}
    texts = sorted(set(own.values()))
    model.eval()
    with torch.inference_mode():
        image_features = model.encode_image(preprocess.normalize(torch.stack([image for _, image in images]).to(device)))
        text_features = F.normalize(model.encode_text(tokenizer(texts).to(device)), dim=-1)
        best = (image_features @ text_features.T).topk(min(3, len(texts)), 1).indices.tolist()
    model.train(training)
    data.grid([image for _, image in images], ["\n".join(("* " if texts[j] == own[i] else "- ") + texts[j] for j in row)
                                               for row, (i, _) in zip(best, images)], path)


# training: schedule, parameter groups, checkpoints

def lr_at(step, total, warmup, lr, start=0., end=0.):
    """Learning rate of step 0 .. total-1: linear to lr over the warmup steps, then half a cosine down to end. From 0 the first
    step already takes lr / warmup (open_clip); from a start > 0 both ends of the line are included (SLIP, DeCLIP)."""
    if step < warmup:
        return start + (lr - start) * (step / max(1, warmup - 1) if start else (step + 1) / warmup)
    return end + (lr - end) * .5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def param_groups(model, weight_decay, no_decay=()):
    """Two AdamW groups of the trainable parameters: matrices decay (token table too, and positions, which newer
    open_clip spares); vectors and scalars (biases, norms, class token, logit_scale) and names that start with one of no_decay do not."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name.startswith(tuple(no_decay))]["params"].append(parameter)
    return groups


def save_checkpoint(path, **state):
    """Writes state (tensors and plain Python values only) in one move, so that a kill leaves the old file or the new one."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # RuntimeError: on a full disk
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written: {error}") from None


def load_checkpoint(path):
    """The state that save_checkpoint wrote, on the CPU. SystemExit with a sentence if the file is cut off or foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["script"], state["model"], state["tested"], state["pairs"]
    except Exception as error:
        raise SystemExit(f"{path} is no whole checkpoint of these scripts ({type(error).__name__}): delete it, begin anew with "
                         "--restart, or choose another --out") from None
    return state


def load_clip_state(path, quick_gelu=None, merges=None):
    """The towers' weights {open_clip's name: fp32 tensor} out of a checkpoint of these scripts, a TorchScript archive or state
    dict of OpenAI's, a state dict or .safetensors of open_clip's, or TinyCLIP's released files. SystemExit with a sentence if
    path is none of them, or if it is ours and was trained with another activation than quick_gelu or with other merges of the
    tokenizer (None: not compared)."""
    try:
        if str(path).endswith(".safetensors"):  # the header's length in 8 bytes, the header in JSON, the tensors
            content = bytearray(Path(path).read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            header = {key: entry for key, entry in json.loads(content[8:start]).items() if key != "__metadata__"}
            kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
            state = {key: torch.frombuffer(content, dtype=kinds[entry["dtype"]], count=math.prod(entry["shape"]),
                                           offset=start + entry["data_offsets"][0]).view(entry["shape"]) for key, entry in header.items()}
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError:  # what torch.load says to OpenAI's TorchScript archives
                state = torch.jit.load(path, map_location="cpu").state_dict()
        script, activation, words = state.get("script"), state.get("sizes", {}).get("quick_gelu"), state.get("merges")
        state = state.get("model", state.get("state_dict", state))
        wrapped = re.compile(r"((module|text|_image_encoder|_text_encoder|_logit_scale)\.)*")  # by DDP, open_clip, TinyCLIP
        state = {key[wrapped.match(key).end():]: value.float() if value.is_floating_point() else value for key, value in state.items()}
        state["text_projection"], state["visual.conv1.weight"]
        if script == "declip":  # its last token is the mask
            state["token_embedding.weight"] = state["token_embedding.weight"][:-1]
    except Exception as error:
        raise SystemExit(f"{path} holds no CLIP weights under OpenAI's or open_clip's names ({type(error).__name__}: {error})") from None
    if None not in (activation, quick_gelu) and activation != quick_gelu:
        raise SystemExit(f"{path} was trained with{'out' * quick_gelu} --quick-gelu: {'leave it out' if quick_gelu else 'give it'}")
    if None not in (words, merges) and words != merges:
        raise SystemExit(f"{path} was trained with other merges of the tokenizer: see --bpe")
    return {key: value for key, value in state.items() if key.split(".")[0] in ENCODERS}


def init_distributed():
    """rank, world size and device of this process, from the environment that torchrun sets; 0, 1 without it."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs on this machine")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it still has what a crashed attempt left in it
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


# recipes and flags

RECIPES = {  # batch size is global, warm-up in steps; percentages: zero-shot ImageNet
    "toy": dict(model="tiny", batch_size=128, epochs=2, lr=5e-4, warmup=50, weight_decay=.1, augment="clip", eval="toy"),  # ours
    "small": dict(model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="clip"),  # ours
    # OpenAI, to compare: 400 M pairs, 32 epochs, batch 32,768, lr 5e-4 (ViT-B), weight decay .2, warm-up 2000. OpenAI,
    # open_clip and SLIP clip no gradients. open_clip's README: near 20 %, with crops of (.9, 1) and a warm-up of 10,000
    # steps, of 85,000 (of 21,000 with batch 4096: too long); its maintainer now advises 1000 to 2000. Below 15 M pairs RN50
    # beats ViT-B-32; SLIP's ViT-B-16 here loses 3 points after its best epoch
    "cc3m": dict(model="RN50", batch_size=1024, epochs=30, lr=1e-3, warmup=2000, weight_decay=.1, augment="clip"),
    # SLIP's CLIP baselines, 36.5 % and 37.6 %: warm-up of one epoch (there lr from 1e-6, at the end 1e-5; eps 1e-8; ImageNet's mean)
    "cc12m": dict(model="ViT-B-16", batch_size=4096, epochs=35, lr=5e-4, warmup=2600, weight_decay=.5, augment="clip"),
    "yfcc15m": dict(model="ViT-B-16", batch_size=4096, epochs=25, lr=5e-4, warmup=3600, weight_decay=.5, augment="clip"),
}


def positive(text):
    """argparse's type for the whole numbers from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="A flag not given takes the value of the recipe.")
    add = parser.add_argument
    add("--data", default="toy", help="toy, cc3m, cc12m, yfcc15m, or a path: folder or pattern of webdataset tars, .tsv, .csv, .jsonl")
    add("--data-root", help="where the folders cc3m, cc12m and yfcc15m are (default $CLIP_DATA or ./datasets)")
    add("--recipe", choices=RECIPES, help="default: by the name of --data; for a path small under 100,000 pairs, else cc3m")
    add("--model", choices=MODELS)
    add("--image-size", type=positive, help="side of the pictures in pixels (default: the model's)")
    add("--quick-gelu", action="store_true", help="OpenAI's activation, for --init with weights that were trained with it")
    add("--batch-size", type=positive, help="pairs a step, all ranks together")
    add("--epochs", type=positive)
    add("--lr", type=float)
    add("--warmup", type=int, help="steps")
    add("--weight-decay", type=float)
    add("--augment", choices=AUGMENT, help="the image augmentation of that method")
    add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 on a GPU that has it, fp16 on others, off on the CPU")
    add("--eval", help="comma list of test sets: toy, folders, names that eval.py knows")
    add("--eval-every", type=positive, default=1, help="epochs")
    add("--init", help="start from these weights: a checkpoint of ours, OpenAI's or open_clip's")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpoint-activations", action="store_true", help="transformers keep less and compute a third more")
    add("--workers", type=int, help="processes a rank that read data (default: its share of the cores; none for toy)")
    add("--seed", type=int, default=0)
    add("--limit", type=positive, help="only the first N pairs")
    add("--subset", help="only the pairs whose keys stand in this file, one a line")
    add("--bpe", help="merges of the tokenizer: a file, or train (default: train for toy, else $CLIP_BPE or OpenAI's)")
    add("--log-every", type=positive, default=20, help="steps")
    add("--out", help="default runs/<script>-<data>; a run that finds its own checkpoint there resumes")
    add("--restart", action="store_true", help="delete the checkpoints in --out and begin anew")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data and settings
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    args.recipe = args.recipe or (args.data if args.data in RECIPES else "small" if len(dataset) < 100_000 else "cc3m")
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.image_size = args.image_size or MODELS[args.model].get("image_size", 224)
    args.amp = args.amp or ("off" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    args.out = args.out or f"runs/{Path(__file__).stem}-{Path(args.data).stem or 'data'}"
    if args.workers is None:
        args.workers = 0 if args.data == "toy" else min(12, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if min(args.lr, args.warmup, args.weight_decay, args.workers, args.seed) < 0:
        raise SystemExit("--lr, --warmup, --weight-decay, --workers and --seed cannot be negative")
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of the {world} ranks")
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    steps = len(batches)  # of an epoch
    total = steps * args.epochs
    if not steps or args.warmup >= total:
        raise SystemExit(f"{len(dataset)} pairs make {total} steps in {args.epochs} epochs of batches of {args.batch_size}: too few "
                         f"for --warmup {args.warmup}; lower --batch-size or --warmup, or raise --epochs")

    # resume
    out = Path(args.out)
    restart = args.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # not after each crash under torchrun
    saved = load_checkpoint(out / "last.pt") if (out / "last.pt").exists() and not restart else None
    if saved:
        changed = [f"{len(dataset)} pairs (was {saved['pairs']})"] * (saved["pairs"] != len(dataset))
        changed += [f"--{name.replace('_', '-')} {value} (was {saved['flags'].get(name)})" for name, value in vars(args).items()
                    if name not in ("epochs", "workers", "out", "restart") and value != saved["flags"].get(name)]
        if saved["script"] != Path(__file__).stem or changed:
            raise SystemExit(f"{out} holds a run of {saved['script']}.py with other flags or data: {', '.join(changed)}; give the same ones "
                             "to resume it, another --out, or --restart to begin anew")

    # model
    torch.manual_seed(args.seed)
    tokenizer = data.find_tokenizer(args.bpe, args.data, args.data_root)
    merges = "\n".join(map(" ".join, tokenizer.merges))
    if saved and saved["merges"] != merges:
        raise SystemExit(f"{out} holds a run with other merges of the tokenizer; choose another --out, or --restart to begin anew")
    preprocess = data.Preprocess(args.image_size)
    dataset.transform = partial(views, tokenizer=tokenizer, size=args.image_size, augment=args.augment)
    loader = data.loader(dataset, batches, args.workers, device)
    sizes = dict(image_size=args.image_size, vocab=tokenizer.vocab_size, context=tokenizer.context, quick_gelu=args.quick_gelu)
    model = build(args.model, CLIP, **sizes).to(device)
    if args.init and not saved:
        state = load_clip_state(args.init, args.quick_gelu, merges)
        if {key: value.shape for key, value in state.items()} != {
                key: value.shape for key, value in model.state_dict().items() if key.split(".")[0] in ENCODERS}:
            raise SystemExit(f"--init {args.init} is not a {args.model} of {args.image_size} pixels and {tokenizer.vocab_size} tokens")
        model.load_state_dict(state, strict=False)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpoint_activations = args.checkpoint_activations
    if args.model == "RN50":
        model.visual.to(memory_format=torch.channels_last)
    # OpenAI's for ViTs, here for all towers; OpenAI's for ResNets: (.9, .999), 1e-8
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, betas=(.9, .98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step, tested, best, failed, bad = 0, 0, -1., 0, 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        step, tested, best, failed, bad = (saved[name] for name in ("step", "tested", "best", "failed", "bad"))
    everywhere = gather(torch.tensor([[step, tested, len(dataset)]], device=device))  # [W, 3]
    if (everywhere != everywhere[0]).any():
        raise SystemExit(f"ranks disagree on (step, tested step, pairs): {everywhere.tolist()}; --out and --data must be the same on all machines")
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph of the whole model
        model.compile()
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # what the run leaves behind
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    tests = args.eval.split(",") if args.eval else []
    shown = [evaluator.open_test(test, root=args.data_root) for test in tests] or [dataset]  # a wrong name should not cost an epoch
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name in ("last.pt", "best.pt") if args.restart and not saved else ():
                (out / name).unlink(missing_ok=True)  # of the run before
            rows = (out / "log.jsonl").read_text().splitlines(keepends=True) if saved and (out / "log.jsonl").exists() else []
            rows = [row for row in rows
                    if row.endswith("}\n") and json.loads(row).get("step", 0) <= (tested if '"eval"' in row else step)]
            (out / "log.tmp").write_text("".join(rows))
            os.replace(out / "log.tmp", out / "log.jsonl")
        except OSError as error:
            raise SystemExit(f"--out {out}: {error.strerror}") from None
        print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                       if value not in (None, "") and value is not False))
        print(f"{len(dataset)} pairs ({sum(dataset.skipped.values())} broken ones left out), {total} steps on {world} x {device.type}, "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters" + (f", resumed at step {step}" if saved else ""))
    saved = None  # gigabytes, of no more use

    def log(**row):
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    def save(name):
        if rank == 0:
            save_checkpoint(out / name, script=Path(__file__).stem, step=step, tested=tested, best=best, failed=failed, bad=bad,
                            flags=vars(args), model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            rng=torch.get_rng_state(), sizes=dict(quick_gelu=args.quick_gelu), preprocess=vars(preprocess),
                            pairs=len(dataset), merges=merges, context=tokenizer.context)

    def evaluate():
        """After an epoch whose tests are due, or in a run that was killed before them."""
        nonlocal tested, best
        if step % steps or step == tested or (step // steps % args.eval_every and step < total):
            return
        results = evaluator.evaluate(model, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root) if tests else {}
        if rank == 0:
            picture(out / "captions.png", model, tokenizer, preprocess, shown[0])
            tqdm.write(f"step {step}: {evaluator.summary(results)}" if tests else f"step {step} of {total}")
        tested = step
        log(eval=results)
        score = sum(r[r["metric"]] for r in results.values())
        if tests and score > best:
            best = score
            save("best.pt")
        save("last.pt")

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

    # training
    evaluate()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, mininterval=1)
    logged, sums, skipped, waited, start = step, 0, 0, 0., time.perf_counter()  # since the last log line
    streak = torch.zeros((), device=device)  # bad steps, one after the other
    for epoch in range(step // steps, args.epochs):
        batches.epoch, batches.start, tick = epoch, step % steps, time.perf_counter()
        for batch in loader:
            waited += time.perf_counter() - tick
            skipped += int(batch["skipped"].sum())
            images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
            if "colors" in batch:
                images = data.augment(images, batch["colors"].to(device, non_blocking=True))
            statistics = [buffer.clone() for buffer in model.buffers()]  # of batch norms
            with torch.autocast(device.type, amp, enabled=amp is not None):
                image_features, text_features, logit_scale = parallel(preprocess.normalize(images), tokens)
            loss = clip_loss(image_features, text_features, logit_scale)
            losses = {"loss": loss}

            # the step; where the gradient (of all ranks, DDP has averaged it) is not finite, everything stays as it was
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup, args.lr)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            good = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).isfinite()
            optimizer.found_inf = 1 - good.float()  # 1 makes fused AdamW leave weights and moments alone, without asking the host
            optimizer.step()
            scaler.update()
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), statistics):
                    buffer.copy_(buffer.where(good, before))
                model.logit_scale.clamp_(0, math.log(100))  # the parameter: clamping its exp would end its gradient at the bound
            step += 1

            # the host looks at the device only here
            streak = (streak + 1).where(~good, 0)
            sums = sums + torch.stack([good, *losses.values()]).detach().where(good, 0)  # good steps, losses summed over them
            if step % args.log_every == 0 or step % steps == 0 or (stop and world == 1):
                totals = torch.cat([sums, streak[None], sums.new_tensor([skipped, waited, len(stop)])])
                fine, *means, bad_in_a_row, skips, waits, stopped = gather(totals[None]).mean(0).tolist()
                count = step - logged
                failed += round(skips * world)
                bad += round(count - fine)
                means = {name: mean / fine if fine else None for name, mean in zip(losses, means)}
                speed = count * args.batch_size / (time.perf_counter() - start)
                memory = {"memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30} if device.type == "cuda" else {}
                log(epoch=epoch, **means, lr=group["lr"], logit_scale=logit_scale.item(), pairs_per_second=speed, waited=waits,
                    skipped=failed, bad_steps=bad, **memory)
                bar.set_postfix_str(f"loss {means['loss'] or math.nan:.3f}, {speed:.0f} pairs/s")
                bar.update(step - bar.n)
                data.check_skipped(failed, step * args.batch_size)
                if bad_in_a_row >= 20:
                    raise SystemExit("20 steps in a row without a finite gradient; the last good weights are in "
                                     f"{out / 'last.pt' if (out / 'last.pt').exists() else 'no file yet'}")
                if stopped:
                    save("last.pt")
                    if world > 1:
                        dist.barrier()
                    raise SystemExit(f"stopped by SIGTERM and saved at step {step}; the same command goes on from there")
                logged, sums, skipped, waited, start = step, 0, 0, 0., time.perf_counter()
            if step % 1000 == 0 and step % steps:
                save("last.pt")
            tick = time.perf_counter()
        save("last.pt")  # before the tests, which take their time
        evaluate()
        start = time.perf_counter()
    bar.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank == 0:
        print(f"finished {total} steps; {out} holds {', '.join(sorted(path.name for path in out.iterdir()))}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
