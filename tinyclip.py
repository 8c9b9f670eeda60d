"""TinyCLIP: a small CLIP that inherits its weights from a large one and mimics the large one's image-text affinities.

The idea. A trained teacher knows more about a batch than its pairs: it knows how close every caption is to every
picture. The student learns these similarities instead of labels (affinity mimicking). It also starts as part of the
teacher (weight inheritance). By hand, that is the leading heads and channels of some layers. With --auto, gates on
heads and channels learn under a budget what to keep, and the rest is cut out. A quarter of the size is reached in
stages: each inherits from the student before, but mimics the first teacher.

The loss. The rows of x and y are the student's unit features of pictures and captions, those of u and v the teacher's.
s = 50 (--logit-scale) is one fixed scale for both. clip is CLIP's loss. alpha is 1 by default (--alpha), so no label is
used.

    A = softmax of the rows of s x y^T        A* = softmax of the rows of s u v^T
    affinity = 1/2 [ mean_i -sum_j A*_ij log A_ij  +  the same with x and y, u and v swapped ]
    L = alpha affinity + (1 - alpha) clip

The gates. A gate z multiplies the output of its head or channel. It is drawn once a step, for the whole batch, from a
learned logit a and noise r, uniform in (0, 1):

    z = clip(1.2 sigmoid((logit(r) + a) / (2/3)) - .1, 0, 1)        P(z > 0) = sigmoid(a - 2/3 ln(.1/1.1))
    L += l1 h + l2 h^2        h = max(0, target - removed)

removed is the share of attention and FFN weights that P(z > 0) expects to be gone. target rises to --auto within
--sparsity-warmup steps. The multipliers l1 and l2 are maximised: they grow while too little is gone. After --prune-step
steps, z without noise is multiplied into the weights, and zeros are cut out. The rest trains on.

What it brought (zero-shot ImageNet, authors' README). ViT-39M-16-Text-19M has 63.5 % on YFCC15M. On LAION-400M, gates
that leave 75, 50 and 25 % of a ViT-B-32 with 65.6 % reach 63.9, 61.4 and 53.7 %. Inheritance makes training 1.4 to 7.8
times faster (paper). A step of ViT-39M-16 costs 1.3 times as much with ViT-B-32 as teacher, 1.7 with ViT-B-16.

How to run.
    python clip.py --limit 24576 --epochs 4 --out runs/teacher-toy      the toy's teacher (7 minutes)
    python tinyclip.py                                    half its size
    torchrun --nproc_per_node=8 tinyclip.py --data yfcc15m --teacher ViT-B-16.pt --teacher-quick-gelu
    python tinyclip.py --auto .5 --out runs/half          gates; next stage: --auto .75 --init runs/half/last.pt

Sources: Wu et al. 2023 (arXiv 2309.12314), github.com/microsoft/Cream TinyCLIP.
"""
import argparse
import json
import math
import os
import signal
import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
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


# losses

class Gather(torch.autograd.Function):
    """all_gather along dimension 0. The backward pass gives each rank the sum of all ranks' gradients for its rows."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(rows.chunk(dist.get_world_size())), x.contiguous())  # fills rows, as chunks are views
        return rows

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all ranks, rank 0's first: [B, ...] -> [N, ...], with gradient. Without a process group it returns x."""
    return Gather.apply(x) if dist.is_available() and dist.is_initialized() else x


def clip_loss(image_features, text_features, logit_scale):
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3) over the pairs of all ranks.

    image_features, text_features: unit rows [B, D]; row i of one belongs to row i of the other. B is equal on all
    ranks. logit_scale: the factor s itself, not its log. Returns a scalar in at least fp32, also under autocast,
    because bf16 rounds logits near 100 to multiples of 0.5. The mean over the W ranks is the loss of the whole batch of
    N = W B pairs. If all logits are equal, the loss is ln N.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x, y = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (image_features, text_features))
        # The released code of SLIP gathers without gradient. There a feature learns only as a query (a row of the
        # logits), never as a candidate (a column), so its gradient has another direction. open_clip's towers get the
        # gradient of the whole batch divided by W, unless its flags --local-loss and --gather-with-grad are given
        # together.
        all_x, all_y = gather(torch.cat([x, y], 1)).chunk(2, 1)  # [N, D] each
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        labels = torch.arange(len(x), device=x.device) + rank * len(x)  # the columns of this rank's own pairs
        image_logits = logit_scale * x @ all_y.T  # [B, N]
        text_logits = logit_scale * y @ all_x.T  # [B, N]
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


# affinity mimicking

def affinity_loss(image_features, text_features, logit_scale, teacher_image_features, teacher_text_features,
                  teacher_scale):
    """Affinity mimicking (section 3.1; released: clip_soft_loss.py): the cross-entropy between the teacher's affinities
    and the student's, for each picture over the captions of all ranks, and for each caption over the pictures.

    image_features, text_features: the student's unit rows [B, D]. teacher_image_features, teacher_text_features: the
    teacher's unit rows [B, D'], which get no gradient. logit_scale, teacher_scale: the factors themselves, not their
    logs. Returns a scalar in at least fp32, also under autocast. The mean over ranks is the loss of the whole batch.
    Its least value is the mean entropy of the teacher's affinities, not 0. The paper adds the two directions; the
    released code, and this function, halve the sum.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x, y, u, v = rows = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in (
            image_features, text_features, teacher_image_features.detach(), teacher_text_features.detach())]
        widths = [f.shape[1] for f in rows]  # D, D, D', D'
        all_x, all_y, all_u, all_v = gather(torch.cat(rows, 1)).split(widths, 1)  # N rows each
        image_target = (teacher_scale * u @ all_v.T).softmax(1).detach()  # [B, N]
        text_target = (teacher_scale * v @ all_u.T).softmax(1).detach()  # [B, N]
        image_loss = F.cross_entropy(logit_scale * x @ all_y.T, image_target)
        text_loss = F.cross_entropy(logit_scale * y @ all_x.T, text_target)
        return (image_loss + text_loss) / 2


# weight inheritance by hand

def inherit(teacher_state, student_state, head_dim=64):
    """A student's weights cut out of a larger model's (section 3.2; released: weight_inherit.py).

    teacher_state, student_state: state dicts {open_clip's name: tensor} of two ViTs or two ResNets. The student's only
    says which names and shapes are wanted. From a teacher of L layers a student of l layers takes layers 0, L // l,
    2 (L // l), ... The paper calls that uniform, but 9 of 12 layers are simply the first 9. From every axis of channels
    it takes the leading ones, and from q, k and v the leading heads each. Returns a new state of the student's shapes,
    all of it from the teacher except logit_scale. ValueError if the teacher is too small, is of the other kind, or has
    another patch size, picture size or context.
    """
    def depth(state, prefix):  # number of layers whose names begin with the prefix
        return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})

    inherited = {"logit_scale": student_state["logit_scale"].clone()}
    for key, own in student_state.items():
        if key == "logit_scale":
            continue
        parts = key.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)  # where the layer's number stands
        if place is not None:
            prefix = ".".join(parts[:place]) + "."  # a transformer, or one of a ResNet's stages
            step = max(1, depth(teacher_state, prefix) // depth(student_state, prefix))
            parts[place] = str(int(parts[place]) * step)
        source = ".".join(parts)
        value = teacher_state.get(source, own.new_empty(0))  # if the name is missing, the shape is refused below
        if value.numel() and "in_proj" in key:  # [3 * heads * head_dim, C] or [3 * heads * head_dim]
            value = value.unflatten(0, (3, -1, head_dim))[:, :len(own) // (3 * head_dim)].flatten(0, 2)
        part = value[tuple(map(slice, own.shape))] if value.ndim == own.ndim else value  # leading channels of each axis
        whole = (2, 3) if own.ndim == 4 else (0,) if "positional" in key else ()  # axes of pixels or positions: uncut
        if part.shape != own.shape or any(value.shape[axis] != own.shape[axis] for axis in whole):
            raise ValueError(f"{key} {list(own.shape)} cannot be cut out of {source} {list(value.shape)}")
        inherited[key] = part.detach().clone()
    return inherited


def shrink(state, share):
    """Sizes (arguments of CLIP) of a student with about `share` of a model's parameters, not counting the token table.

    state: the model's weights. As in most of the paper's students, the image tower gets narrower, by whole heads (a
    ResNet by 4 channels), and the text tower loses layers. It loses as many as bring the sum of both towers close to
    the share. In the paper it keeps this share of its layers.
    """
    def find(prefix):  # number of layers and of parameters under a prefix
        keys = [key for key in state if key.startswith(prefix)]
        return len({key[len(prefix):].split(".")[0] for key in keys}), sum(state[key].numel() for key in keys)

    conv, resnet = state["visual.conv1.weight"], "visual.proj" not in state
    (layers, text), (_, image) = find("transformer.resblocks."), find("visual.")
    width, step = (2 * len(conv), 4) if resnet else (len(conv), 64)
    narrow = step * max(1, round(width * share ** .5 / step))
    depths = tuple(find(f"visual.layer{i}.")[0] for i in (1, 2, 3, 4))  # of a ResNet's stages
    # solves image (narrow / width)^2 + text kept / layers = share (image + text) for kept
    kept = round(layers * (share + (share - (narrow / width) ** 2) * image / text))
    return dict(
        embed_dim=state["text_projection"].shape[1], patch_size=None if resnet else conv.shape[-1], vision_width=narrow,
        vision_layers=depths if resnet else find("visual.transformer.resblocks.")[0],
        text_width=len(state["ln_final.weight"]), text_layers=min(layers, max(1, kept)))


# weight inheritance by gates

class Gates(nn.Module):
    """Hard concrete gates of one ViT tower (section 3.2; released: l0module.py, after princeton-nlp/CoFiPruning,
    Louizos et al. 2018).

    The parameters are logits. hidden [C] are those of the gates on what enters the residual stream, heads [L, H] on the
    output of each head, ffn [L, F] on each FFN channel after GELU. L is the number of layers here. width: C. heads,
    ffn: how many of them each layer has, lists of L ints, whose maxima are H and F. A layer with fewer has surplus
    gates. These are absent: always closed, and not counted.
    """

    def __init__(self, width, heads, ffn):
        super().__init__()
        for kind, counts in (("hidden", width), ("heads", heads), ("ffn", ffn)):
            counts = torch.tensor(counts)[..., None]  # [1] or [L, 1]
            present = torch.arange(counts.max()) < counts  # [C], [L, H] or [L, F]
            self.register_buffer(f"{kind}_present", present, persistent=False)
            setattr(self, kind, nn.Parameter(torch.full(present.shape, 10.)))  # open; clamped to ln 100 = 4.6

    def each(self, function):
        """{kind: function(logits), 0 where a gate is absent}."""
        return {kind: function(getattr(self, kind)) * getattr(self, f"{kind}_present")
                for kind in ("hidden", "heads", "ffn")}

    def sample(self, generator=None):
        """{kind: z in [0, 1]}: a concrete variable of temperature 2/3, stretched to (-.1, 1.1) and clipped to [0, 1].
        So z is often exactly 0 or 1, and then its logit gets no gradient in this step."""
        def draw(logits):
            noise = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6).logit()
            return (((noise + logits) / (2 / 3)).sigmoid() * 1.2 - .1).clamp(0, 1)

        return self.each(draw)

    def probability(self):
        """{kind: P(z > 0)}."""
        return self.each(lambda logits: (logits - 2 / 3 * math.log(.1 / 1.1)).sigmoid().clamp(1e-6, 1 - 1e-6))

    @torch.no_grad()
    def hard(self):
        """{kind: z} without noise. z is sigmoid(1.2 logits), as in the released code, but 0 for as many gates as are
        expected to be closed: the round(sum of 1 - P(z > 0)) smallest of each layer, for hidden those of the tower."""
        z = self.each(lambda logits: (1.2 * logits).sigmoid())
        for kind, p in self.probability().items():
            closed = (p.shape[-1] - p.sum(-1, keepdim=True)).round()
            rank = z[kind].argsort(stable=True).argsort()  # 0 for the smallest of a row
            z[kind] = z[kind] * (rank >= closed)
        return z

    def expected_params(self):
        """Number of attention and FFN weights that are expected to stay. A pair of a hidden channel and a head that
        both stay counts 4 * 64, for q, k, v and the output, and its part of the biases. A pair of a hidden and an FFN
        channel counts 2. The FFN's biases are left out, as in the released code; prunable() counts them."""
        p = {kind: value.sum() for kind, value in self.probability().items()}
        return p["hidden"] * (p["heads"] * (4 * 64 + 4 / max(1, self.heads.shape[1])) + 2 * p["ffn"])


def sparsity_loss(expected, original, target, multipliers):
    """l1 h + l2 h^2 with h = max(0, target - share removed), as in the released l0module.py. The paper has no max: it
    also punishes removing too much.

    expected: number of attention and FFN weights that are expected to stay, both towers together. original: number of
    them in the teacher. multipliers: [l1, l2]. An optimizer group with maximize=True raises them as long as h > 0.
    """
    h = F.relu(target - (1 - expected / original))
    return multipliers[0] * h + multipliers[1] * h ** 2


def prune(state, image_gates, text_gates, cut=True):
    """A ViT's weights with its gates multiplied in, and without what they close (released: model.py, prune()).

    state: {open_clip's name: tensor}. image_gates, text_gates: {"hidden": [C], "heads": [L, H], "ffn": [L, F]}, as from
    Gates. Returns the state of a ragged model, whose layers differ in heads and FFN channels. An attention that loses
    all its heads keeps the bias of its output. With cut=False nothing is cut out, and each LayerNorm gets a mask `keep`
    instead. That is the gated model, whose outputs equal the ragged one's. The released pruning is not exact: it
    multiplies hidden gates into proj and text_projection, whose input no gate multiplies, and drops the bias of
    attentions without heads.
    """
    # These write into the residual stream, so hidden gates are multiplied into them. (out_proj and c_proj also read
    # gated heads and FFN channels.) Others only lose the channels that are closed.
    writers = {"conv1", "class_embedding", "token_embedding", "positional_embedding", "out_proj", "c_proj"}
    pruned = {}
    for key, value in state.items():
        gates, parts = image_gates if key.startswith("visual.") else text_gates, key.split(".")
        name = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        layer = int(parts[parts.index("resblocks") + 1]) if "resblocks" in parts else 0
        hidden, heads, ffn = gates["hidden"], gates["heads"][layer].repeat_interleave(64), gates["ffn"][layer]
        # the gates of each axis; of a bias only the first counts
        axes = {"in_proj_weight": (None, heads, hidden), "in_proj_bias": (None, heads), "out_proj": (hidden, heads),
                "c_fc": (ffn, hidden), "c_proj": (hidden, ffn), "token_embedding": (None, hidden),
                "positional_embedding": (None, hidden)}.get(name, (hidden,))
        if cut and ("in_proj" in name or key.endswith("out_proj.weight")) and not heads.any():
            continue
        if "in_proj" in name:
            value = value.unflatten(0, (3, -1))  # [3, heads * 64, C] or [3, heads * 64]
        for axis, z in enumerate(axes[:value.ndim]):
            if z is not None:
                z = z[:value.shape[axis]]  # without the gates that this layer does not have
                if name in writers:
                    value = value * z.view([-1] + [1] * (value.ndim - axis - 1))
                if cut:
                    value = value.index_select(axis, z.nonzero().flatten())
        pruned[key] = value.flatten(0, 1) if "in_proj" in name else value
        if not cut and name.startswith("ln_"):
            pruned[f"{key.rpartition('.')[0]}.keep"] = hidden != 0
    return pruned


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels in the mask `keep` only; its output is 0 elsewhere. It takes over norm's
    parameters."""

    def __init__(self, norm):
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("keep", torch.ones_like(norm.weight, dtype=torch.bool), persistent=False)

    def forward(self, x):  # [..., C]
        x, n = x.to(torch.promote_types(x.dtype, torch.float32)), self.keep.sum()
        x = (x - (x * self.keep).sum(-1, keepdim=True) / n) * self.keep
        return x * (x.square().sum(-1, keepdim=True) / n + self.eps).rsqrt() * self.weight + self.bias * self.keep


# encoders: OpenAI's towers under open_clip's parameter names

class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU. OpenAI's weights need it; with plain GELU they load, but lose points."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with heads of width 64, under the parameter names of nn.MultiheadAttention."""

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
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False):  # [B, L, C]
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. With checkpoint_activations the backward pass computes each block again, to save memory."""

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
    """OpenAI's ViT: a class token and patches go through pre-norm blocks; the class token becomes the image feature."""

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
    """ResNet bottleneck. Where other ResNets have a convolution with a stride, both branches have an average pool and a
    convolution of stride 1."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # every block starts as its shortcut
        self.avgpool = nn.AvgPool2d(stride)
        self.downsample = nn.Identity()
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(OrderedDict([  # under OpenAI's names
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * planes))]))

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(self.avgpool(out)))
        return (out + self.downsample(x)).relu()


class AttentionPool2d(nn.Module):
    """One attention step with heads of width 64. The only query is the mean of the grid's vectors; keys and values come
    from this mean and from all vectors."""

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


@contextmanager
def frozen_statistics(module):
    """Inside the with statement, the module's batch norms normalise as in training, but do not update their running
    statistics."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0., None  # change no mean or variance, count no batch
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


def update_once(module):
    """context_fn of torch.utils.checkpoint for a module with batch norms. Returns two contexts: one for the forward
    pass, and one for its repetition in the backward pass, which must not update the running statistics again."""
    return nullcontext(), frozen_statistics(module)


class ModifiedResNet(nn.Module):
    """OpenAI's ResNet. It differs from torchvision's in its three stem convolutions, in average pools in place of
    strides and of the max pool, and in attention as the last pooling."""

    def __init__(self, embed_dim, image_size, width, layers):
        super().__init__()
        # Batch norms use the statistics of their own rank, as in all released code. Because of them, W ranks with a
        # ResNet do not equal one process exactly.
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for i, depth in enumerate(layers):
            planes = width * 2 ** i
            blocks = [Bottleneck(inplanes, planes, 2 if i > 0 else 1)]
            blocks += [Bottleneck(4 * planes, planes) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = 4 * planes
        self.attnpool = AttentionPool2d(image_size // 32, 32 * width, embed_dim)
        self.checkpoint_activations = False

    def forward(self, images):  # [B, 3, S, S] -> [B, D]
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.avgpool(self.bn3(self.conv3(x)).relu())
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False,
                               context_fn=partial(update_once, stage))
            else:
                x = stage(x)
        return self.attnpool(x)


class CLIP(nn.Module):
    """The two towers and the scale. vision_layers: one number for a ViT, four (one a stage) for a ResNet."""
    image_tower = VisionTransformer  # a script with another ViT puts its class here

    def __init__(self, embed_dim, image_size, patch_size, vision_width, vision_layers, context, vocab, text_width,
                 text_layers, quick_gelu=False):
        super().__init__()
        if isinstance(vision_layers, int):
            self.visual = self.image_tower(embed_dim, image_size, patch_size, vision_width, vision_layers, quick_gelu)
        else:
            self.visual = ModifiedResNet(embed_dim, image_size, vision_width, vision_layers)
        self.transformer = Transformer(text_width, text_layers, quick_gelu)
        self.token_embedding = nn.Embedding(vocab, text_width)
        self.positional_embedding = nn.Parameter(.01 * torch.randn(context, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))  # the log of s
        nn.init.normal_(self.token_embedding.weight, std=.02)
        # The outputs of out_proj and c_proj of all blocks, 2 * text_layers of them, add up in the residual stream. So
        # these two start smaller by the square root of that number.
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=text_width ** -.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * text_layers * text_width) ** -.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text_width) ** -.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * text_layers * text_width) ** -.5)

    def encode_image(self, images):
        """Normalised pictures [B, 3, S, S] -> features [B, D], not of unit norm."""
        return self.visual(images)

    def text_tokens(self, tokens):
        """Token ids [B, L] -> the text tower's output at every position [B, L, C], before the projection. The tower is
        causal: what follows the end token does not change its feature. So the loader cuts a batch near the end of its
        longest caption."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        return self.ln_final(self.transformer(x, causal=True))

    def encode_text(self, tokens, eot=None):
        """Token ids [B, L] -> features [B, D], not of unit norm, read at the end token. eot: positions [B] of the end
        tokens. By default that is the position of the largest id, which is the end token unless a method adds an id. If
        a caption is too long, our tokenizer puts the end token in the last place. The released code of SLIP only cuts.
        Then the largest id is the start token, and its feature is the same for all long captions."""
        x = self.text_tokens(tokens)
        eot = tokens.argmax(-1) if eot is None else eot
        return x[torch.arange(len(x), device=x.device), eot] @ self.text_projection

    def forward(self, images, tokens):
        """Images [B, 3, S, S], tokens [B, L] -> unit image_features [B, D], unit text_features [B, D], the factor s."""
        x, y = self.encode_image(images), self.encode_text(tokens)
        image_features, text_features = (
            F.normalize(f.to(torch.promote_types(f.dtype, torch.float32)), dim=-1) for f in (x, y))
        return image_features, text_features, self.logit_scale.exp()


MODELS = {  # OpenAI's and open_clip's sizes, tiny ones ours; 224 pixels and 12 text layers if none are given
    "ViT-B-32": dict(embed_dim=512, patch_size=32, vision_width=768, vision_layers=12, text_width=512),
    "ViT-B-16": dict(embed_dim=512, patch_size=16, vision_width=768, vision_layers=12, text_width=512),
    "ViT-S-16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_layers=12, text_width=384),
    "RN50": dict(embed_dim=1024, patch_size=None, vision_width=64, vision_layers=(3, 4, 6, 3), text_width=512),
    "tiny": dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=4, text_width=128,
                 text_layers=4),
    "tiny-4": dict(embed_dim=128, image_size=32, patch_size=4, vision_width=128, vision_layers=4, text_width=128,
                   text_layers=4),  # 64 patches, where tiny has 16
}
STUDENTS = {  # the paper's (README), named by millions of parameters without the token table, and one of half of tiny
    "ViT-61M-32-Text-29M": dict(
        embed_dim=512, patch_size=32, vision_width=640, vision_layers=12, text_width=512, text_layers=9),
    "ViT-40M-32-Text-19M": dict(
        embed_dim=512, patch_size=32, vision_width=512, vision_layers=12, text_width=512, text_layers=6),
    "ViT-39M-16-Text-19M": dict(
        embed_dim=512, patch_size=16, vision_width=512, vision_layers=12, text_width=512, text_layers=6),
    "ViT-8M-16-Text-3M": dict(
        embed_dim=512, patch_size=16, vision_width=256, vision_layers=10, text_width=256, text_layers=3),
    "ResNet-30M-Text-29M": dict(
        embed_dim=1024, patch_size=None, vision_width=56, vision_layers=(3, 4, 6, 3), text_width=512, text_layers=9),
    "ResNet-19M-Text-19M": dict(
        embed_dim=1024, patch_size=None, vision_width=44, vision_layers=(3, 4, 6, 3), text_width=512, text_layers=6),
    "tiny-half": dict(
        embed_dim=128, image_size=32, patch_size=8, vision_width=64, vision_layers=4, text_width=128, text_layers=3),
}
MODELS |= STUDENTS


def build(source, cls=CLIP, **overrides):
    """A model of class cls. source is a name in MODELS for a new model, or a state dict, whose shapes say the sizes.
    overrides: keyword arguments of cls that replace or complete the sizes, such as quick_gelu, which no shape says."""
    if isinstance(source, str):
        sizes = {"image_size": 224, "text_layers": 12, "context": 77, "vocab": 49408, **MODELS[source]}
        return cls(**{**sizes, **overrides})

    def depth(prefix):  # how many modules a list has
        return len({key[len(prefix):].split(".")[0] for key in source if key.startswith(prefix)})

    conv, positions = source["visual.conv1.weight"], source["positional_embedding"]
    sizes = dict(
        embed_dim=source["text_projection"].shape[1], context=len(positions), text_width=positions.shape[1],
        vocab=len(source["token_embedding.weight"]), text_layers=depth("transformer.resblocks."))
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


class Headless(nn.Module):
    """An attention that lost all its heads: the bias of its output."""

    def __init__(self, width):
        super().__init__()
        self.out_proj = nn.ParameterDict({"bias": torch.zeros(width)})

    def forward(self, x, causal=False):  # [B, L, C]
        return self.out_proj["bias"].expand_as(x)


class GatedTransformer(nn.Module):
    """A Transformer for torch.func.functional_call, which lends a model other weights for one call. With
    checkpoint_activations the backward pass computes each block again. By then the lent weights are gone from the
    model, so each block is handed its own."""

    def __init__(self, transformer):
        super().__init__()
        self.resblocks, self.checkpoint_activations = transformer.resblocks, transformer.checkpoint_activations

    def forward(self, x, causal=False):  # [B, L, C]
        for block in self.resblocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}  # the lent ones
                x = checkpoint(torch.func.functional_call, block, weights, (x, causal), use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, causal)
        return x


class TinyCLIP(CLIP):
    """A CLIP whose layers may differ in heads and FFN channels. load_state_dict takes their numbers from the state.
    After open_gates() it can run under gates, and dense() is what the gates leave of it."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's. The state may have any number of heads, also none, and of FFN channels in each layer."""
        for name, module in list(self.named_modules()):
            if (isinstance(module, Block) and isinstance(module.attn, Attention)
                    and f"{name}.attn.in_proj_weight" not in state_dict):
                module.attn = Headless(len(module.ln_1.weight)).to(module.ln_1.weight.device)
        for name, parameter in list(self.named_parameters()):
            may_differ = ".attn." in name or ".mlp." in name
            if may_differ and name in state_dict and parameter.shape != state_dict[name].shape:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, nn.Parameter(parameter.new_empty(state_dict[name].shape)))
        return super().load_state_dict(state_dict, strict, assign)

    def towers(self):
        """The parameters without gates and multipliers, by name."""
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in evaluator.ENCODERS}

    def open_gates(self, lr):
        """Puts gates on both towers. Returns two optimizer groups: the gates' logits, and the multipliers, which are
        maximised. For the next stage, the released code first restores the original sizes with closed gates. Here the
        new gates stand on what is left, so nothing that was cut out can return."""
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.LayerNorm):
                self.set_submodule(name, MaskedLayerNorm(module))
        self.visual.transformer, self.transformer = map(GatedTransformer, (self.visual.transformer, self.transformer))
        self.gates = nn.ModuleDict()
        for name, tower in (("image", self.visual.transformer), ("text", self.transformer)):
            heads = [block.attn.out_proj.weight.shape[1] // 64 if isinstance(block.attn, Attention) else 0
                     for block in tower.resblocks]
            ffn = [len(block.mlp.c_fc.weight) for block in tower.resblocks]
            self.gates[name] = Gates(len(tower.resblocks[0].ln_1.weight), heads, ffn)
        # one pair for the one budget of both towers; the released code has a pair for each tower and averages them
        self.multipliers = nn.Parameter(torch.full((2,), 10.))
        self.to(self.logit_scale.device)
        group = dict(lr=lr, betas=(.9, .999), eps=1e-8, weight_decay=0.)
        return (dict(params=list(self.gates.parameters()), **group),
                dict(params=[self.multipliers], maximize=True, **group))

    def forward(self, images, tokens, seed=None):
        """As CLIP's. With a seed, the model runs under gates that are drawn by this seed and so are equal on all ranks.
        In the released code each rank draws its own."""
        if seed is None:
            return super().forward(images, tokens)
        generator = torch.Generator(images.device).manual_seed(seed)
        weights = prune(self.towers(), *(gates.sample(generator) for gates in self.gates.values()), cut=False)
        return torch.func.functional_call(self, weights, (images, tokens))

    def dense(self):
        """The model itself, or, if it has gates, a pruned copy that keeps as much as the gates are expected to."""
        if not hasattr(self, "gates"):
            return self
        state = prune(self.towers(), *(gates.hard() for gates in self.gates.values()))
        model = build(state, TinyCLIP, quick_gelu=uses_quick_gelu(self))
        model.logit_scale.requires_grad_(self.logit_scale.requires_grad)
        model.visual.transformer.checkpoint_activations = self.visual.transformer.checkpoint_activations
        model.transformer.checkpoint_activations = self.transformer.checkpoint_activations
        return model.to(self.logit_scale.device)


# the models of a run

def uses_quick_gelu(model):
    """Whether a model's activation is QuickGELU, by the class's name, because the model may be another script's."""
    return type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def load_trained(path, flag, quick_gelu, bpe):
    """A trained model as a TinyCLIP, its tokenizer and its preprocessing. path, quick_gelu, bpe: what eval.load takes.
    SystemExit, which names the flag, if there is no such file."""
    if not Path(path).is_file():
        raise SystemExit(f"{flag}: there is no file {path}; give the path of a trained model, or train one on the same "
                         "--data first, as the first lines of this file show")
    trained, tokenizer, preprocess = evaluator.load(path, quick_gelu=quick_gelu, bpe=bpe)
    model = build(evaluator.load_clip_state(path), TinyCLIP, quick_gelu=uses_quick_gelu(trained))
    return model.eval(), tokenizer, preprocess


def load_models(args):
    """The teacher, the source, from which the student inherits (--init, by default the teacher), and the tokenizer and
    preprocessing, which have to be the same for both. SystemExit if they are not, or if --auto cannot use these
    models."""
    teacher, tokenizer, preprocess = load_trained(
        args.teacher, "--teacher", args.teacher_quick_gelu or None, args.bpe)
    source, source_tokenizer, source_preprocess = teacher, tokenizer, preprocess
    if args.init not in (None, "none"):
        source, source_tokenizer, source_preprocess = load_trained(
            args.init, "--init", args.quick_gelu or None, args.bpe)
    if source_tokenizer.merges != tokenizer.merges or source_tokenizer.context != tokenizer.context:
        raise SystemExit("--init and --teacher were trained with different tokenizers")
    if vars(source_preprocess) != vars(preprocess):
        raise SystemExit(f"--init and --teacher know different pictures: {vars(source_preprocess)}, {vars(preprocess)}")
    if args.bpe and data.find_tokenizer(args.bpe, args.data, args.data_root).merges != tokenizer.merges:
        raise SystemExit("--bpe names another tokenizer than the one that --teacher was trained with")
    if args.auto and not all(isinstance(model.visual, VisionTransformer) for model in (teacher, source)):
        raise SystemExit("--auto needs ViTs for teacher and student")
    if args.auto and not removed_share(source, teacher) < args.auto < 1:
        raise SystemExit("--auto takes a share of the teacher between what has gone already, "
                         f"{removed_share(source, teacher):.3f}, and 1")
    return teacher, source, tokenizer, preprocess


def student_sizes(args, teacher):
    """Sizes (arguments of CLIP) of the student: those of --model or, if it is given, of --shrink. Each of the four size
    flags replaces one of them."""
    sizes = {**MODELS[args.model]}
    if args.shrink:
        sizes |= shrink(teacher.state_dict(), args.shrink)
    sizes |= {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    odd = sizes["text_width"] % 64 or (sizes["patch_size"] and sizes["vision_width"] % 64)
    if odd or (args.vision_layers and not sizes["patch_size"]):
        raise SystemExit("widths are multiples of 64, the width of a head; stages of ResNets keep their depth")
    return sizes


def make_student(args, saved, teacher, source, tokenizer, preprocess, quick_gelu):
    """The student as a TinyCLIP: with --auto all of the source, else a part of it; with --init none a new model. If
    saved is a checkpoint without gates, the student is what was saved. teacher, source, tokenizer, preprocess: what
    load_models returns."""
    if saved and saved["gated"] is None:
        return build(saved["model"], TinyCLIP, quick_gelu=quick_gelu)
    if args.auto:
        return build(source.state_dict(), TinyCLIP, quick_gelu=quick_gelu)
    sizes = dict(image_size=preprocess.size, vocab=tokenizer.vocab_size, context=tokenizer.context)
    student = build(args.model, TinyCLIP, **student_sizes(args, teacher) | sizes, quick_gelu=quick_gelu)
    if args.init != "none":
        try:
            student.load_state_dict(inherit(source.state_dict(), student.state_dict()))
        except ValueError as error:
            raise SystemExit(f"the student cannot inherit from {args.init or args.teacher}: {error}") from None
    return student


def new_optimizer(model, args):
    """AdamW for the parameters of a model without gates."""
    # OpenAI's values for ViTs, here for all towers; for ResNets OpenAI has betas (.9, .999) and eps 1e-8
    return torch.optim.AdamW(
        param_groups(model, args.weight_decay), args.lr, betas=(.9, .98), eps=1e-6, fused=True)


def freeze(teacher, device, amp):
    """Puts the teacher on the device, without gradients. amp: dtype of autocast, or None. The teacher's matrices are
    stored in it; norms, biases and embeddings stay in fp32, in which autocast wants them. The released code keeps all
    weights in fp32, and its autocast, always fp16, casts them anew at each step."""
    teacher.to(device).requires_grad_(False)
    if isinstance(teacher.visual, ModifiedResNet):
        teacher.visual.to(memory_format=torch.channels_last)
    for name, parameter in teacher.named_parameters():
        if amp and parameter.ndim > 1 and "embedding" not in name:
            parameter.data = parameter.to(amp)


def prunable(state):
    """Number of parameters in attention and FFN of both towers. Shares of --auto are shares of the teacher's number."""
    return sum(value.numel() for key, value in state.items() if ".attn." in key or ".mlp." in key)


def removed_share(model, teacher):
    """Share of the teacher's attention and FFN parameters that a model lacks."""
    return 1 - prunable(model.state_dict()) / prunable(teacher.state_dict())


@torch.no_grad()
def encode_captions(teacher, tokenizer, dataset, device, amp=None):
    """The teacher's unit text features [n, D'] of the n captions of a data set, in fp16. The ranks share the work. amp:
    dtype of autocast, or None. SystemExit if a picture has several captions, among which each epoch draws one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    padded = math.ceil(len(dataset) / world) * world  # equally many on each rank
    places = torch.arange(padded).clamp(max=len(dataset) - 1)
    own = places.chunk(world)[rank]
    rows = []
    for part in own.split(1024):
        texts = [dataset.captions(i) for i in part.tolist()]
        if any(len(text) != 1 for text in texts):
            raise SystemExit("--cache-teacher-text needs data with one caption a picture")
        tokens = tokenizer([text[0] for text in texts]).to(device)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features = teacher.encode_text(tokens)
        rows.append(F.normalize(features.float(), dim=-1).half())
    return gather(torch.cat(rows))[:len(dataset)]


@torch.no_grad()
def ask_teacher(teacher, images, tokens, index, texts, amp):
    """The teacher's unit features of a batch: image [B, D'], text [B, D']. images, tokens: those that the student sees.
    texts: the features that encode_captions made, of which rows index [B] are the batch's, or None. amp: dtype of
    autocast, or None."""
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        image_features = F.normalize(teacher.encode_image(images).float(), dim=-1)
        if texts is not None:
            return image_features, texts[index.to(images.device, non_blocking=True)]
        return image_features, F.normalize(teacher.encode_text(tokens).float(), dim=-1)


# views and picture

AUGMENT = {  # Two entries for each method: how much of a picture's area a crop keeps (a range), and arguments of
    # data.color_params. jitter holds a probability and the ranges of brightness, contrast, saturation and hue. The
    # other arguments are probabilities.
    "clip": ((.5, 1.), dict()),  # as in SLIP's and DeCLIP's baselines; open_clip has (.9, 1.), and no colours either
    "declip": ((.2, 1.), dict(flip=.5, jitter=(.8, .4, .4, .4, .1), grey=.2, blur=.5)),  # MoCo v2's
    "protoclip": ((.5, 1.), dict(flip=.5, jitter=(.2, .8, .8, .8, .2), grey=.2, blur=.2)),
    # SLIP changes only the two crops that SimCLR compares
    "slip": ((.08, 1.), dict(flip=.5, jitter=(.8, .4, .4, .4, .1), grey=.2, blur=.5)),
    # no flip, so that a place in one crop is found in another by shift and scale
    "aclip": ((.5, 1.), dict(jitter=(.8, .4, .4, .2, .1), grey=.2, blur=.1, solarize=.2)),
    "flame": ((.9, 1.), dict()),
}


def views(image, caption, rng, tokenizer, size, augment):
    """One sample, made in a worker from image bytes and a caption. Returns a dict: "images" is a crop, uint8 [3, S, S];
    "colors" [8] are its colour parameters, if the augmentation changes colours; "tokens" [L]. rng: random.Random."""
    area, colors = AUGMENT[augment]
    sample = {"images": data.random_resized_crop(image, size, area, rng), "tokens": tokenizer([caption])[0]}
    if colors:
        sample["colors"] = data.color_params(rng, **colors)
    return sample


def picture(path, model, tokenizer, preprocess, dataset, count=64, show=12):
    """Writes a sheet of some pictures of a data set (show of them). Under each stand the three texts that the model
    ranks highest among the texts of count pictures. Texts are captions, or class names where the data set has no
    captions. A star marks the picture's own text."""
    device, training = model.logit_scale.device, model.training
    pictures = evaluator.Pictures(dataset, preprocess.size)
    places = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    readable = [(i, image) for image, i in (pictures[place] for place in places) if i >= 0]  # i is -1 for the others
    images = readable[:show]
    own = {i: (dataset.captions(i) or [dataset.classnames[dataset.label(i)]])[0] for i in places}
    texts = sorted(set(own.values()))
    model.eval()
    with torch.inference_mode():
        batch = torch.stack([image for _, image in images]).to(device)
        image_features = model.encode_image(preprocess.normalize(batch))  # their norm does not change the ranking
        text_features = F.normalize(model.encode_text(tokenizer(texts).to(device)), dim=-1)
        best = (image_features @ text_features.T).topk(min(3, len(texts)), 1).indices.tolist()
    model.train(training)
    lines = [[("* " if texts[j] == own[i] else "- ") + texts[j] for j in row] for row, (i, _) in zip(best, images)]
    data.grid([image for _, image in images], ["\n".join(line) for line in lines], path)


def affinity_picture(path, student, teacher, count=16):
    """Writes what the student mimics: the affinities of a batch's first pairs, at scale 50. student, teacher: pairs of
    unit features (image [B, D], text [B, D])."""
    maps = []
    for x, y in (teacher, student):
        affinity = (50 * x[:count].float() @ y[:count].float().T).softmax(1)
        maps.append((255 * affinity).byte().expand(3, -1, -1))
    data.grid(maps, ["teacher: a row a picture, a column a caption", "student"], path, columns=2)


def survivors_picture(path, source, student):
    """Writes which parts of the source's ViT towers stay in the student: what its gates keep, or, if it has no gates,
    what inherit() took. A row of the picture is a layer of the source. On the left, its heads that stay are dark; on
    the right, a dark bar is the share of its FFN channels that stay."""
    maps, captions = [], []
    for name, old, new in (("image", source.visual, student.visual), ("text", source, student)):
        if isinstance(old, ModifiedResNet):
            continue
        # which stay, as bool: hidden [C], heads [L, H], ffn [L, F]
        if hasattr(student, "gates"):
            hidden, heads, ffn = (z.cpu() != 0 for z in student.gates[name].hard().values())
        else:
            old, new = old.transformer.resblocks, new.transformer.resblocks
            layer, step = torch.arange(len(old))[:, None], len(old) // len(new)
            taken = (layer % step == 0) & (layer < step * len(new))  # [L, 1]
            sizes = [[len(b.ln_1.weight), len(b.attn.in_proj_bias) // 192, len(b.mlp.c_fc.weight)]
                     for b in (old[0], new[0])]
            hidden, heads, ffn = (torch.arange(n) < kept for n, kept in zip(*sizes))  # the leading ones
            heads, ffn = heads & taken, ffn & taken
        # 80 pixels of heads, 4 of grey, 80 of FFN channels
        share = torch.arange(80) < 80 * ffn.float().mean(1, keepdim=True)
        cells = torch.cat([heads.repeat_interleave(80 // heads.shape[1], 1), torch.full((len(heads), 4), .3), share], 1)
        maps.append((225 - 185 * cells).byte().repeat_interleave(10, 0).expand(3, -1, -1))
        captions.append(f"{name} tower, layer by layer: heads | FFN channels; "
                        f"{hidden.sum():.0f} of {len(hidden)} hidden channels")
    data.grid(maps, captions, path, columns=2)


SIZES = ("vision_width", "vision_layers", "text_width", "text_layers")  # arguments of CLIP that have flags
# The values of the released manual_weight_inherit_100to75.sh and auto_weight_inherit_100to75.sh. These train on 400 M
# pairs for 6 epochs, with batches of 8,192 on one node (the documentation: 32,768 on four) and crops of (.9, 1). The
# scripts of the next stages, to .5 and .75, prune at steps 5000 and 8000. The 25 epochs are the maintainer's for
# YFCC15M (microsoft/Cream#244). Batch size and crops are ours.
OFFICIAL = dict(
    model="ViT-39M-16-Text-19M", batch_size=4096, epochs=25, lr=1e-4, warmup=2000, weight_decay=.2, augment="clip",
    prune_step=3000, sparsity_warmup=1000, gate_lr=.02)
RECIPES = {  # batch size of all ranks together, warm-up in steps; with --auto the warm-up is --prune-step, as released
    # toy and small are ours
    "toy": dict(model="tiny-half", batch_size=128, epochs=48, lr=5e-4, warmup=20, weight_decay=.2, augment="clip",
                eval="toy-tune,toy", eval_every=6, prune_step=192, sparsity_warmup=160, gate_lr=.04),
    "small": dict(model="tiny-half", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.2, augment="clip",
                  prune_step=200, sparsity_warmup=160, gate_lr=.04),
    "cc3m": OFFICIAL | dict(batch_size=1024),  # nothing is published for cc3m and cc12m
    "cc12m": OFFICIAL,
    "yfcc15m": OFFICIAL,  # the README's 63.5 %; it does not say from which teacher and in how many stages
}


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    steps = fill_in(args, dataset, world, device)  # steps of an epoch
    total = steps * args.epochs
    if args.auto:  # the student starts as all of --init; the warm-up lasts as long as the gates, as released
        args.model, args.warmup = None, args.prune_step
    torch.manual_seed(args.seed)
    teacher, source, tokenizer, preprocess = load_models(args)
    dataset.transform = partial(views, tokenizer=tokenizer, size=preprocess.size, augment=args.augment)
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    loader = data.loader(dataset, batches, args.workers, device)

    # model
    # the activation that the inherited weights know; released students have GELU even with OpenAI's weights
    quick_gelu = args.quick_gelu if args.init == "none" else uses_quick_gelu(source)
    about = describe(args, dataset, tokenizer, preprocess, dict(quick_gelu=quick_gelu))
    saved = find_run(args, about, device)
    gated = bool(args.auto) and not (saved and saved["gated"] is None)  # before --prune-step
    model = make_student(args, saved, teacher, source, tokenizer, preprocess, quick_gelu).to(device)
    if args.logit_scale:  # fixed from the first step on; the released student's scale is 14.3 in that step
        model.logit_scale.requires_grad_(False).fill_(math.log(args.logit_scale))
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    if isinstance(model.visual, ModifiedResNet):
        model.visual.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(model, args)
    if gated:
        for group in model.open_gates(args.gate_lr):
            optimizer.add_param_group(group)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    meter = Meter(args.out, args.batch_size, device)
    parts = dict(optimizer=optimizer, scaler=scaler, meter=meter)  # what is saved
    step, tested, best = 0, 0, -1.
    if saved:
        model.load_state_dict(saved["gated"] or saved["model"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        step, tested, best = saved["step"], saved["tested"], saved["best"]
    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # statistics of batch norms
    augment = torch.compile(data.augment) if args.compile else data.augment
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graph at its buckets
        if not gated:  # what functional_call runs is not compiled
            model.compile()
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    # bf16 has the range of fp32. fp16 does not, so it needs a GradScaler, and large ViTs have diverged in it.
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    freeze(teacher, device, amp)
    teacher_scale = args.logit_scale or teacher.logit_scale.exp()
    teacher_texts = encode_captions(teacher, tokenizer, dataset, device, amp) if args.cache_teacher_text else None
    original, removed = prunable(teacher.state_dict()), removed_share(source, teacher)
    expected = torch.tensor(float(prunable(model.state_dict())), device=device)  # parameters in attention and FFN
    if rank == 0:
        start_log(args, saved, dataset, model, f"{total} steps on {world} x {device.type}")
        if not saved and not args.auto and args.init != "none":
            survivors_picture(Path(args.out, "survivors.png"), source, model)
    saved = None  # gigabytes that nobody needs any more

    def save(name):
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            states |= dict(model=model.dense().state_dict(), gated=model.state_dict() if gated else None)
            save_checkpoint(Path(args.out, name), **about, **states, step=step, tested=tested, best=best,
                            rng=torch.get_rng_state())

    def evaluate():
        """Tests the model if tests are due after this epoch and were not made before the run was killed."""
        nonlocal tested, best
        due = step % steps == 0 and (step // steps % args.eval_every == 0 or step == total)
        if not due or step == tested:
            return
        tests = args.eval.split(",") if args.eval else []
        student = model.dense()
        results = evaluator.evaluate(student, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root)
        if rank == 0:
            shown = evaluator.open_test(tests[0], root=args.data_root) if tests else dataset
            picture(Path(args.out, "captions.png"), student, tokenizer, preprocess, shown)
            tqdm.write(f"step {step} of {total}: {evaluator.summary(results) or 'no tests'}")
            write_log(args.out, step=step, eval=results)
        tested = step
        scores = [result[result["metric"]] for result in results.values()]  # each test names its usual metric
        if scores and scores[0] > best:  # the first test decides
            best = scores[0]
            save("best.pt")
        save("last.pt")

    # training
    with catch_sigterm() as stop:
        evaluate()
        bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, mininterval=1)
        meter.clear(step)
        for epoch in range(step // steps, args.epochs):
            batches.epoch, batches.start = epoch, step % steps
            for batch in meter.watch(loader):
                images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
                if "colors" in batch:
                    images = augment(images, batch["colors"].to(device, non_blocking=True))
                images = preprocess.normalize(images)
                statistics = torch.cat(running) if running else None  # put back if the gradient is not finite
                seed = (args.seed * 1_000_003 + step) % 2 ** 63 if gated else None
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    image_features, text_features, logit_scale = parallel(images, tokens, seed)
                affinity = clip = sparsity = torch.zeros((), device=device)
                if args.alpha > 0:
                    mimicked = ask_teacher(teacher, images, tokens, batch["index"], teacher_texts, amp)
                    affinity = affinity_loss(image_features, text_features, logit_scale, *mimicked, teacher_scale)
                if args.alpha < 1:
                    clip = clip_loss(image_features, text_features, logit_scale)
                if gated:
                    expected = sum(gates.expected_params() for gates in model.gates.values())
                    target = removed + (args.auto - removed) * min(1, step / args.sparsity_warmup)
                    sparsity = sparsity_loss(expected, original, target, model.multipliers)
                loss = args.alpha * affinity + (1 - args.alpha) * clip + sparsity
                losses = {"loss": loss, "affinity": affinity, "clip": clip, "sparsity": sparsity,
                          "removed": 1 - expected / original}  # the released log ignores the gates

                # the step. If the gradient is not finite, the step is bad: weights, moments and statistics stay as they
                # are. DDP has averaged the gradient, so all ranks agree on that.
                lr = lr_at(step, total, args.warmup, args.lr)
                for group in optimizer.param_groups[:2]:  # the gates' learning rate is constant
                    group["lr"] = lr
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                nn.utils.clip_grads_with_norm_(model.parameters(), 5., norm)  # gates and multipliers too, as released
                good = norm.isfinite()
                # Fused AdamW skips the step, on the device, if found_inf is 1. GradScaler uses this for overflows of
                # fp16; here it stands for any bad step.
                optimizer.found_inf = 1 - good.float()
                optimizer.step()
                scaler.update()
                with torch.no_grad():
                    if running:
                        kept = torch.cat(running).where(good, statistics)
                        torch._foreach_copy_(running, kept.split([len(buffer) for buffer in running]))
                    model.logit_scale.clamp_(0, math.log(100))  # a clamp in the forward pass would stop the gradient
                    for parameter in model.gates.parameters() if gated else ():
                        parameter.copy_(parameter.clamp(-math.log(100), math.log(100)).where(good, parameter))
                step += 1
                if gated and step == args.prune_step:  # from here the ragged model, with a new optimizer
                    if rank == 0:
                        survivors_picture(Path(args.out, "survivors.png"), source, model)
                    model, gated, best = model.dense(), False, -1.
                    expected = torch.tensor(float(prunable(model.state_dict())), device=device)
                    parts["optimizer"] = optimizer = new_optimizer(model, args)
                    if args.compile:
                        model.compile()
                    parallel = model if world == 1 else DistributedDataParallel(
                        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

                # meter.row makes the host wait for the device, so it is not called in every step. After SIGTERM one
                # process stops at once. Several ranks tell each other in meter.row, so they stop at the next log line.
                meter.add(good, losses)
                if step % args.log_every == 0 or step % steps == 0 or (stop and world == 1):
                    row, stopped = meter.row(step, stop)
                    if rank == 0:
                        row |= dict(lr=lr, logit_scale=logit_scale.item())
                        write_log(args.out, step=step, epoch=epoch, **row)
                    bar.set_postfix_str(f"loss {row['loss'] or math.nan:.3f}, {row['pairs_per_second']:.0f} pairs/s")
                    bar.update(step - bar.n)
                    if stopped:
                        save("last.pt")
                        leave(f"stopped by SIGTERM and saved at step {step}; the same command goes on from there")
                if step % 1000 == 0 and step % steps:  # a multiple of steps is saved below
                    save("last.pt")
            save("last.pt")  # before the tests, which take their time
            if rank == 0 and args.alpha > 0:
                affinity_picture(Path(args.out, "affinity.png"), (image_features, text_features), mimicked)
            evaluate()
            meter.clear(step)  # the time of the tests does not count
    bar.close()
    if rank == 0:
        print(f"finished {total} steps; {args.out} holds {', '.join(sorted(os.listdir(args.out)))}")
    if world > 1:
        dist.destroy_process_group()


# the run: flags, schedule, parameter groups, resume, log, checkpoints, process group

def positive(text):
    """A whole number of at least 1, as a type for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="A flag that is not given takes the value of the recipe.")
    add = parser.add_argument
    add("--data", default="toy",
        help="toy, cc3m, cc12m, yfcc15m, or a path: folder or pattern of webdataset tars, .tsv, .csv, .jsonl")
    add("--data-root", help="where the folders cc3m, cc12m and yfcc15m are (default: $CLIP_DATA or ./datasets)")
    add("--recipe", choices=RECIPES, help="default: the one named as --data; else small (under 100,000 pairs) or cc3m")
    add("--model", choices=MODELS)
    add("--quick-gelu", action="store_true", help="OpenAI's activation, for --init with weights trained with it")
    add("--batch-size", type=positive, help="pairs a step, all ranks together")
    add("--epochs", type=positive)
    add("--lr", type=float)
    add("--warmup", type=int, help="steps in which the learning rate rises")
    add("--weight-decay", type=float)
    add("--augment", choices=AUGMENT, help="the image augmentation of that method")
    add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 or else fp16 on a GPU, off on a CPU")
    add("--eval", help="comma list of tests: toy, folders, names in eval.py; best.pt is chosen by the first")
    add("--eval-every", type=positive, help="epochs from test to test (default: 1)")
    add("--init", help="inherit from these weights (default: --teacher); none: from nothing")
    add("--compile", action="store_true", help="torch.compile the model and the augmentation")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more computation in the towers")
    add("--workers", type=int,
        help="processes that read data for each rank (default: its share of the cores, at most 12; toy on a CPU: none)")
    add("--seed", type=int, default=0)
    add("--limit", type=positive, help="only the first N pairs")
    add("--subset", help="only pairs whose keys are in this file, one a line; a caption after a tab replaces their own")
    add("--bpe", help="merges of the tokenizer: a file, or train, which learns them from the captions (default: train "
        "for toy, else $CLIP_BPE or OpenAI's)")
    add("--log-every", type=positive, default=20, help="steps from log line to log line")
    add("--out", help="default: runs/<script>-<data>; a run that finds its own checkpoint there resumes")
    add("--restart", action="store_true", help="delete the checkpoints in --out and begin anew")
    add = parser.add_argument_group("TinyCLIP (--model is the student)").add_argument
    add("--teacher", help="a checkpoint of ours, OpenAI's or open_clip's (default: "
        "runs/clip-<data>/last.pt, which clip.py leaves; on the toy runs/teacher-toy/last.pt)")
    add("--teacher-quick-gelu", action="store_true", help="the teacher has QuickGELU, which its file does not say")
    add("--cache-teacher-text", action="store_true",
        help="let the teacher encode all captions beforehand, and keep the features on the device")
    add("--alpha", type=float, default=1., help="weight of affinity mimicking; 1 - alpha is that of CLIP's loss")
    add("--logit-scale", type=float, default=50.,
        help="fixed scale of teacher and student, at most 100; 0: the teacher's own, the student's learned")
    add("--shrink", type=float, metavar="SHARE",
        help="in place of --model: sizes that KEEP about this share of the teacher's parameters, token table aside")
    add("--image-width", dest="vision_width", type=positive, help="in place of the one of --model or --shrink")
    add("--image-layers", dest="vision_layers", type=positive, help="the same")
    add("--text-width", type=positive, help="the same")
    add("--text-layers", type=positive, help="the same")
    add("--auto", type=float, metavar="SPARSITY", help="in place of --model: the student starts as all of --init, and "
        "gates REMOVE this share of the teacher's attention and FFN weights")
    add("--prune-step", type=positive, help="steps under gates; the warm-up of the learning rate lasts as long")
    add("--sparsity-warmup", type=positive,
        help="steps until all of SPARSITY is asked for; with few of them, Adam's momentum overshoots")
    add("--gate-lr", type=float,
        help="of gates and multipliers. A logit moves by about this a step, from 4.6; at -1.6 P(z > 0) is half. If it "
        "is too low for --prune-step, less goes than asked (removed in the log)")
    args = parser.parse_args(argv)
    # The toy's 1,024 pairs are too few for a teacher, so that one has a run of its own; the docstring has its command.
    name = "teacher" if args.data in data.TOYS else "clip"
    args.teacher = args.teacher or f"runs/{name}-{data.run_name(args.data)}/last.pt"
    if args.logit_scale > 100:
        raise SystemExit(f"--logit-scale {args.logit_scale} is above 100, where the student's is clamped")
    if args.auto and (args.init == "none" or any(getattr(args, name) for name in ("shrink", *SIZES))):
        raise SystemExit("--auto begins with --init as it is: leave out --init none, --shrink and sizes")
    return args


def fill_in(args, dataset, world, device):
    """Sets each flag that the command line left open, by the recipe, the data and the machine. Returns the number of
    steps in an epoch. SystemExit if the values do not fit together."""
    if not args.recipe and args.data in RECIPES:
        args.recipe = args.data
    elif not args.recipe and isinstance(dataset, data.ToyDataset):
        args.recipe = "toy"
    elif not args.recipe:
        args.recipe = "small" if len(dataset) < 100_000 else "cc3m"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_every = args.eval_every or 1
    if not args.amp and device.type == "cpu":
        args.amp = "off"
    elif not args.amp:
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.out = args.out or f"runs/{Path(__file__).stem}-{data.run_name(args.data)}"
    if args.workers is None:
        args.workers = data.default_workers(args.data, device)
    if min(args.lr, args.warmup, args.weight_decay, args.workers, args.seed) < 0:
        raise SystemExit("--lr, --warmup, --weight-decay, --workers and --seed cannot be negative")
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of the {world} ranks")
    least = MODELS[args.model]["patch_size"] or 32  # a ResNet makes 32 pixels one
    if (vars(args).get("image_size") or least) < least:  # a student has no such flag
        raise SystemExit(f"--image-size {args.image_size} is too small: {args.model} needs at least {least} pixels")
    steps = len(dataset) // args.batch_size
    if args.warmup >= steps * args.epochs:
        raise SystemExit(
            f"{len(dataset)} pairs make {steps * args.epochs} steps in {args.epochs} epochs of batches of "
            f"{args.batch_size}: too few for --warmup {args.warmup}; lower --batch-size or --warmup, or raise --epochs")
    if args.compile and args.checkpoint_activations and MODELS[args.model]["patch_size"] is None:
        raise SystemExit("--checkpoint-activations of a ResNet does not go with --compile, because torch.compile knows "
                         "no context_fn: leave one of them out")
    for test in args.eval.split(",") if args.eval else ():
        evaluator.open_test(test, root=args.data_root)  # so that a wrong name is found now, not after an epoch
    return steps


def lr_at(step, total, warmup, lr, start=0., end=0.):
    """Learning rate of a step; the first step is 0, the last total - 1. It rises on a straight line and is lr in the
    last warm-up step. Then it falls along half a cosine towards `end`. If start is 0, step 0 has lr / warmup,
    as in open_clip. If start is above 0, step 0 has start, as in SLIP and DeCLIP."""
    if step < warmup and start:
        return start + (lr - start) * (step / max(1, warmup - 1))
    if step < warmup:
        return lr * ((step + 1) / warmup)
    return end + (lr - end) * .5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def param_groups(model, weight_decay, no_decay=()):
    """The trainable parameters in two groups for AdamW. The first has weight decay: all parameters of two or more
    dimensions, the token table and positions included (newer open_clip does not decay positions). The second has none:
    vectors and scalars, and parameters whose name starts with one of no_decay."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2 and not name.startswith(tuple(no_decay)):
            groups[0]["params"].append(parameter)
        elif parameter.requires_grad:
            groups[1]["params"].append(parameter)
    return groups


def describe(args, dataset, tokenizer, preprocess, sizes):
    """What a checkpoint holds beside the states: enough to use the model, and to know whether a run may go on from
    it."""
    merges = "\n".join(map(" ".join, tokenizer.merges))
    return dict(script=Path(__file__).stem, flags=vars(args), data=data.fingerprint(dataset), sizes=sizes,
                preprocess=vars(preprocess), merges=merges, context=tokenizer.context)


def find_run(args, about, device):
    """The checkpoint in --out from which this run goes on, or None. about: what describe returns. SystemExit if the
    checkpoint is of another script, of other flags or of other data, or if the ranks see different checkpoints or
    data."""
    path, saved = Path(args.out, "last.pt"), None
    # After a crash torchrun starts the same command again. A --restart in it was meant for the first start only.
    crashed = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if path.exists() and (crashed or not args.restart):
        saved = load_checkpoint(path)
        # Flags that may differ. Pairs and merges may have another name or place, because their content is compared
        # below. A recipe only sets other flags, and these are compared.
        may_differ = ("epochs", "workers", "out", "restart", "recipe", "data", "data_root", "subset", "limit", "bpe")
        before = saved["flags"]
        changed = [f"--{name.replace('_', '-')} {value} (was {before.get(name)})"
                   for name, value in vars(args).items() if name not in may_differ and value != before.get(name)]
        for name, what in (("data", "other pairs"), ("merges", "other merges of the tokenizer")):
            if saved[name] != about[name]:
                changed.append(what)
        if saved["script"] != about["script"] or changed:
            raise SystemExit(
                f"{args.out} holds a run of {saved['script']}.py with other flags or data: {', '.join(changed)}; "
                "give the same ones to resume it, another --out, or --restart to begin anew")
    step, tested = (saved["step"], saved["tested"]) if saved else (0, 0)
    fingerprint = int(about["data"][:12], 16)  # the first 12 hexadecimal digits fit into int64
    everywhere = gather(torch.tensor([[step, tested, fingerprint]], device=device))  # [W, 3]
    if (everywhere != everywhere[0]).any():
        raise SystemExit(f"ranks disagree on (step, tested step, data): {everywhere.tolist()}; --out and --data must "
                         "be the same on all machines")
    return saved


def start_log(args, saved, dataset, model, plan):
    """Rank 0 calls it before the first step. It makes the folder --out. With --restart it deletes the checkpoints of an
    earlier run. If this run resumes, it cuts the log back to the checkpoint. Then it prints all values in force, the
    sizes of data and model, and plan, a text. SystemExit if --out cannot be written."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        if args.restart and not saved:
            (out / "last.pt").unlink(missing_ok=True)
            (out / "best.pt").unlink(missing_ok=True)
        if saved and (out / "log.jsonl").exists():
            # Keep rows of tests up to the step that was tested last, other rows up to the step of the checkpoint. A row
            # that a kill cut short goes too.
            rows = (out / "log.jsonl").read_text().splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("}\n") and
                    json.loads(row).get("step", 0) <= (saved["tested"] if '"eval"' in row else saved["step"])]
        (out / "log.tmp").write_text("".join(rows))
        os.replace(out / "log.tmp", out / "log.jsonl")
    except OSError as error:
        raise SystemExit(f"--out {out}: {error.strerror}") from None
    print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                   if value not in (None, "") and value is not False))
    print(f"{len(dataset)} pairs ({sum(dataset.skipped.values())} left out), {plan}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
          + (f", resumed at step {saved['step']}" if saved else ""))
    if saved and saved["flags"]["epochs"] != args.epochs:
        print(f"--epochs {args.epochs} (was {saved['flags']['epochs']}): the learning rate follows the new schedule")


def write_log(out, **row):
    """Adds a line to log.jsonl in the folder out."""
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")


class Meter:
    """Adds up what happens between two log lines. Losses are summed on the device, so that the host need not wait for
    the device in each step. Two numbers count from the start of the run: failed, the unreadable pictures, which the
    loader replaced by others; and bad, the steps whose gradient was not finite."""

    def __init__(self, out, batch_size, device):
        self.out, self.batch_size, self.device, self.failed, self.bad = out, batch_size, device, 0, 0
        self.streak = torch.zeros((), device=device)  # number of bad steps in a row, up to now
        self.clear(0)

    def state_dict(self):
        return {"failed": self.failed, "bad": self.bad}

    def load_state_dict(self, state):
        self.failed, self.bad = state["failed"], state["bad"]

    def clear(self, step):
        """Begins a new line after this step."""
        self.step, self.start = step, time.perf_counter()
        self.sums, self.skipped, self.waited = 0, 0, 0.

    def watch(self, loader):
        """Iterates over the loader. Adds up the seconds spent waiting for it, and the pictures that it replaced."""
        tick = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - tick
            self.skipped += int(batch["skipped"].sum())
            yield batch
            tick = time.perf_counter()

    def add(self, good, losses):
        """Adds one step. good: bool tensor []; losses: {name: scalar tensor}. The losses of a bad step do not count."""
        self.names = list(losses)
        self.streak = (self.streak + 1).where(~good, 0)
        row = torch.stack([good, *losses.values()]).detach()  # its first number is 1 if the step was good
        self.sums = self.sums + row.where(good, 0)

    def row(self, step, stop):
        """Returns the log line of all ranks, a dict, and whether any rank was told to stop. A loss is its mean over the
        good steps, or None if all were bad. Begins a new line. SystemExit if too many pictures failed or 20 steps in a
        row were bad."""
        # of each rank: number of good steps, sum of each loss over them, streak, skipped, waited, signals to stop
        here = self.sums.new_tensor([self.skipped, self.waited, len(stop)])
        everywhere = gather(torch.cat([self.sums, self.streak[None], here])[None])  # [W, columns]
        columns = everywhere.mean(0).tolist()  # means over the ranks
        good_steps, sums = columns[0], columns[1:-4]
        streak, skipped, waited, stopped = columns[-4:]
        count, seconds = step - self.step, time.perf_counter() - self.start
        self.failed += round(skipped * len(everywhere))
        self.bad += round(count - good_steps)
        data.check_skipped(self.failed, step * self.batch_size)
        if streak >= 20:
            last = Path(self.out, "last.pt")
            raise SystemExit("20 steps in a row without a finite gradient; "
                             f"the last good weights are in {last if last.exists() else 'no file yet'}")
        row = {name: total / good_steps if good_steps else None for name, total in zip(self.names, sums)}
        row |= dict(pairs_per_second=count * self.batch_size / seconds, waited=waited)
        row |= dict(skipped=self.failed, bad_steps=self.bad)
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
        self.clear(step)
        return row, stopped > 0


def save_checkpoint(path, **state):
    """Writes state (tensors and plain Python values only) to a temporary file, then renames that to path. So a kill
    leaves the old file or the new one. SystemExit if it cannot be written."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written: {error}") from None


def load_checkpoint(path):
    """The state that save_checkpoint wrote, on the CPU. SystemExit with a sentence if the file is cut off or
    foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "model", "tested", "data"} <= set(state):
            raise KeyError
    except Exception as error:
        raise SystemExit(f"{path} is no whole checkpoint of these scripts ({type(error).__name__}): delete it, begin "
                         "anew with --restart, or choose another --out") from None
    return state


@contextmanager
def catch_sigterm():
    """Yields a list that is empty until SIGTERM arrives, which torchrun and SLURM send before they kill. However the
    block ends, the earlier handler is put back."""
    stop, handler = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, handler)


def leave(message):
    """Waits until all ranks are here, so that rank 0 has saved. Then raises SystemExit with the message."""
    if dist.is_initialized():
        dist.barrier()
    raise SystemExit(message)


def init_distributed():
    """Rank, world size and device of this process, from the environment that torchrun sets. Without torchrun the rank
    is 0 and the world size 1."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs on this machine")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        # torchrun's store keeps what a crashed attempt left in it, so each attempt gets a prefix of its own
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


if __name__ == "__main__":
    main()
