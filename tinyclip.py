"""TinyCLIP: a small CLIP that inherits its weights from a large one and mimics the large one's image-text affinities.

The idea. A trained teacher knows more of a batch than who belongs to whom: how close every caption is to every picture.
The student learns those rows of similarities, softmaxed, in place of the labels "the i-th to the i-th" ("affinity
mimicking"). And it starts as a part of the teacher ("weight inheritance"): either by hand, the leading heads and channels
of every k-th layer, or automatically, by gates on heads and channels that learn under a budget which to keep; what they
close is cut out. To reach a quarter of the size this is done in stages, each inheriting from the last one's student but
mimicking the same first teacher: more than about 70 % cut at once loses much (section 3.3).

The loss. With unit rows x (image), y (text) of the student, u, v of the teacher, and one fixed scale s = 50 for both:

    A = softmax_row(s x y^T)    A* = softmax_row(s u v^T)    L_i2t = mean_i -sum_j A*_ij log A_ij    L_t2i: x and y, u and v swapped
    L = alpha (L_i2t + L_t2i) / 2 + (1 - alpha) L_CLIP        alpha = 1 by default: no label is ever used

Only N x N affinities are compared, so the teacher's features may have another dimension and need no adapter. The loss is
KL(A*, A) plus A*'s entropy: gradient 0 for equal models, CLIP's loss for a teacher that ranks each own pair first, with s
to infinity. No factor s^2, as other distillation has. No gradient enters the teacher; it sees the student's crops and
tokens.

The gates (--auto). Each gate has a logit a, and one draw a step for the whole batch:

    z = clip(1.2 sigmoid((logit(u) + a) / (2/3)) - .1, 0, 1)    u uniform; 0 and 1 have mass     P(z > 0) = sigmoid(a - 2/3 ln(.1/1.1))
    L += l1 h + l2 h^2      h = max(0, target - removed)    removed: share of attention and FFN weights, both towers, by P(z > 0)

z_hidden [C] multiplies what is written to the residual stream: the embeddings (of the image tower before ln_pre) and what
each attention and FFN adds; z_heads [L, H] a head's output; z_ffn [L, F] a channel after GELU. LayerNorms see open channels
alone; whole layers, what follows the last norm and D have no gates. l1 and l2 are maximised: they grow while too little is
gone, and target rises to --auto over --sparsity-warmup steps. After --prune-step steps z without noise is multiplied in and
zeros are cut out: a ragged dense model whose outputs are those of the model gated by these z; with a new optimizer it
trains on. Each rank scores its rows against the columns of all, gathered with gradient; gates are drawn alike on all ranks:
W ranks compute the loss and gradient of one process with all their pairs.

The cost. Over CLIP on the same student the teacher's forward: 1.7 times the FLOPs for ViT-40M-32 from ViT-B-32, 1.3 to 1.7
for ViT-39M-16 from ViT-B-32 or -16; --cache-teacher-text saves its text half (captions are not augmented: the same but for
fp16). Under gates the student still has its full size. Claimed (README), on ImageNet with YFCC-15M: 63.5 % for
ViT-39M-16-Text-19M; 41.1 % for ViT-8M-16-Text-3M (millions without the token table, here 12.6), where a CLIP ViT-B-16,
eleven times its size, has 37.6 (SLIP's figure; the authors trained none). On LAION-400M, from a ViT-B-32 of LAION-2B (65.6;
of 400M: 62.9): gates leave 75, 50, 25 %: 63.9, 61.4, 53.7; by hand 75, 50 %: 62.4, 59.8; training 1.4 to 7.8 times faster
through inheritance.

How to run.
    python clip.py && python tinyclip.py                     a teacher on the toy data, then a student of half its size
    torchrun --nproc_per_node=8 tinyclip.py --data yfcc15m --teacher ViT-B-16.pt --teacher-quick-gelu --eval /imagenet/val
    i=clip-toy; for s in 75 50 25; do python tinyclip.py --auto .$((100 - s)) --init runs/$i/last.pt --out runs/tiny-$s; i=tiny-$s; done

Where paper and released code part, and what this file does.
    - The paper also punishes removing too much; the code, and this file, only removing too little: beyond the budget the
      task alone pulls.
    - The code's pruning is not exact: it multiplies z_hidden into proj and text_projection, whose input no gate multiplies
      (wrong where z is not 0 or 1), and drops the output bias of attentions without heads. Here gated and pruned model
      agree. Logits end at +-ln 100, where P(z > 0) is .998 and .05: of 100 closed gates five survive, of 768 open ones two
      are cut, in both codes.
    - The code re-inflates a pruned model with closed gates to put gates on it again (order within an axis is free); here
      they stand on what is left: what is cut cannot return, nor count as .05 left. Shares are of the teacher's size, in
      both.
    - The code's gates differ between ranks; its student has the scale 14.3 in the first step, since 50 is set after each
      step only (without their --logit-scale it is learned, and the teacher keeps its own, near 100); each tower has
      multipliers of its own for the one budget, averaged. Its alpha 1, scale 50, gate lr .02 (.04 in short recipes), first
      multipliers of 10 and new optimizer after pruning are ours too.
    - The released scripts train on one black image (--dataset-type synthetic), and their webdataset path does not run; the
      sparsity they log ignores the gates.
    - "Uniform" layers are the first ones unless the depth is halved or more (12 -> 9: 0..8). The paper adds the two directions of
      the loss, the code halves the sum.
    - ResNets keep the AdamW of ViTs; towers with batch norm the statistics of their rank (eval mode in the teacher).
    - On a GPU the teacher computes in fp16, as in the official code; here its matrices are stored so, too.
    - The activation is that of what is inherited; the code's students have exact GELU even from OpenAI's QuickGELU weights.

Sources: Wu et al. 2023 (arXiv 2309.12314), github.com/microsoft/Cream TinyCLIP; gates: princeton-nlp/CoFiPruning, Louizos
et al. 2018.
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


# affinity mimicking

def affinity_loss(image_features, text_features, logit_scale, teacher_image_features, teacher_text_features, teacher_scale):
    """Affinity mimicking (section 3.1; clip_soft_loss.py): cross-entropy of the student's rows of image-text and text-image
    affinities to the teacher's, for the rows of this rank against the columns of all ranks.

    image_features, text_features: the student's unit rows [B, D]; teacher_*: the teacher's [B, D'], which get no gradient.
    logit_scale, teacher_scale: the factors themselves. Returns a scalar, computed in at least fp32 also under autocast.
    The mean over ranks is the loss of the whole batch; its least value is the mean entropy of the teacher's rows, not 0.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        x, y, u, v = rows = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in (
            image_features, text_features, teacher_image_features.detach(), teacher_text_features.detach())]
        all_x, all_y, all_u, all_v = gather(torch.cat(rows, 1)).split([f.shape[1] for f in rows], 1)  # [N, D] or [N, D'], one gather
        image_target = (teacher_scale * u @ all_v.T).softmax(1).detach()  # [B, N]
        text_target = (teacher_scale * v @ all_u.T).softmax(1).detach()  # [B, N]
        return (F.cross_entropy(logit_scale * x @ all_y.T, image_target) + F.cross_entropy(logit_scale * y @ all_x.T, text_target)) / 2


# weight inheritance by hand

def inherit(teacher_state, student_state, head_dim=64):
    """A student's weights cut out of a larger model's (section 3.2; weight_inherit.py).

    Of L layers the student's l take layers 0, L//l, 2 L//l, ...; of every axis of channels the leading ones; of q, k and v the
    leading heads each. teacher_state, student_state: state dicts {open_clip's name: tensor} of ViTs or ResNets; the second says
    names and shapes. Returns a new state of those shapes, all of it from the teacher but logit_scale, which stays the student's.
    ValueError where the teacher is too small, or has another kind, patch size, picture size or context.
    """
    def depth(state, prefix):
        return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})

    inherited = {"logit_scale": student_state["logit_scale"].clone()}
    for key, own in student_state.items():
        if key == "logit_scale":
            continue
        parts = key.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)  # of the layer's number
        if place is not None:
            prefix = ".".join(parts[:place]) + "."  # a transformer, or one of a ResNet's stages
            parts[place] = str(int(parts[place]) * max(1, depth(teacher_state, prefix) // depth(student_state, prefix)))
        source = ".".join(parts)
        value = teacher_state.get(source, own.new_empty(0))
        if value.numel() and "in_proj" in key:  # [3 * heads * 64, C] or [3 * heads * 64]
            value = value.unflatten(0, (3, -1, head_dim))[:, :len(own) // (3 * head_dim)].flatten(0, 2)
        part = value[tuple(map(slice, own.shape))] if value.ndim == own.ndim else value  # the leading channels of each axis
        whole = (2, 3) if own.ndim == 4 else (0,) if "positional" in key else ()  # axes of space, of positions
        if part.shape != own.shape or any(value.shape[axis] != own.shape[axis] for axis in whole):
            raise ValueError(f"{key} {list(own.shape)} cannot be cut out of {source} {list(value.shape)}")
        inherited[key] = part.detach().clone()
    return inherited


def shrink(state, share):
    """Sizes (arguments of CLIP) of a student with about `share` of the parameters of the model whose weights are `state`, token
    embedding aside. As in the paper's students the image tower, redundant in width, narrows by whole heads (a ResNet by 4), and the
    text tower, redundant in depth, drops layers: as many as bring the sum close to the share (the paper: in proportion)."""
    def find(prefix):  # layers, parameters
        keys = [key for key in state if key.startswith(prefix)]
        return len({key[len(prefix):].split(".")[0] for key in keys}), sum(state[key].numel() for key in keys)

    conv, resnet = state["visual.conv1.weight"], "visual.proj" not in state
    (layers, text), (_, image) = find("transformer.resblocks."), find("visual.")
    width, step = (2 * len(conv), 4) if resnet else (len(conv), 64)
    narrow = step * max(1, round(width * share ** .5 / step))
    # solves image (narrow / width)^2 + text kept / layers = share (image + text)
    kept = round(layers * (share + (share - (narrow / width) ** 2) * image / text))
    return dict(embed_dim=state["text_projection"].shape[1], patch_size=None if resnet else conv.shape[-1], vision_width=narrow,
                vision_layers=tuple(find(f"visual.layer{i}.")[0] for i in (1, 2, 3, 4)) if resnet else find("visual.transformer.resblocks.")[0],
                text_width=len(state["ln_final.weight"]), text_layers=min(layers, max(1, kept)))


# weight inheritance by gates

class Gates(nn.Module):
    """Hard concrete gates of one ViT tower (section 3.2; l0module.py, after CoFiPruning and Louizos et al. 2018).

    hidden [C] gates what enters the residual stream, heads [L, H] the output of each head, ffn [L, F] each channel after GELU;
    the parameters are logits. width: C; heads, ffn: their numbers in each layer, lists of L ints; where these differ the surplus
    of a row is absent: always closed, and free.
    """

    def __init__(self, width, heads, ffn):
        super().__init__()
        for kind, counts in (("hidden", width), ("heads", heads), ("ffn", ffn)):
            counts = torch.tensor(counts)[..., None]  # [1] or [L, 1]
            present = torch.arange(counts.max()) < counts  # [C], [L, H] or [L, F]
            self.register_buffer(f"{kind}_present", present, persistent=False)
            setattr(self, kind, nn.Parameter(torch.full(present.shape, 10.)))  # open; ln 100 = 4.6 after the first step's clamp

    def each(self, function):
        """{kind: function(logits), 0 where a gate is absent}."""
        return {kind: function(getattr(self, kind)) * getattr(self, f"{kind}_present") for kind in ("hidden", "heads", "ffn")}

    def sample(self, generator=None):
        """{kind: z in [0, 1]}, a concrete variable of temperature 2/3, stretched to (-.1, 1.1) and cut: 0 and 1 have mass, and there
        the logit gets no gradient in this step."""
        def draw(logits):
            noise = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6).logit()
            return (((noise + logits) / (2 / 3)).sigmoid() * 1.2 - .1).clamp(0, 1)

        return self.each(draw)

    def probability(self):
        """{kind: P(z > 0)}."""
        return self.each(lambda logits: (logits - 2 / 3 * math.log(.1 / 1.1)).sigmoid().clamp(1e-6, 1 - 1e-6))

    @torch.no_grad()
    def hard(self):
        """{kind: z} without noise: sigmoid(1.2 logits) (the official slope); of each layer (hidden: of the tower) the
        round(sum of 1 - P(z > 0)) smallest are 0."""
        z = self.each(lambda logits: (1.2 * logits).sigmoid())
        for kind, p in self.probability().items():
            closed = (p.shape[-1] - p.sum(-1, keepdim=True)).round()
            z[kind] = z[kind] * (z[kind].argsort(stable=True).argsort() >= closed)
        return z

    def expected_params(self):
        """Weights of attention and FFN that are expected to stay: 4 * 64 a pair of hidden channel and head (and its share of the
        biases), 2 a pair of hidden and FFN channel; biases of the FFN are left out, as in the official code (prunable counts them)."""
        p = {kind: value.sum() for kind, value in self.probability().items()}
        return p["hidden"] * (p["heads"] * (4 * 64 + 4 / max(1, self.heads.shape[1])) + 2 * p["ffn"])


def sparsity_loss(expected, original, target, multipliers):
    """l1 h + l2 h^2 with h = max(0, target - share removed) (l0module.py; in the paper without the max).

    expected: parameters expected to stay, both towers together; original: those of the whole teacher; multipliers: [l1, l2],
    which an optimizer group with maximize=True raises as long as h > 0.
    """
    h = F.relu(target - (1 - expected / original))
    return multipliers[0] * h + multipliers[1] * h ** 2


def prune(state, image_gates, text_gates, cut=True):
    """A ViT's weights with its gates multiplied in and what they close cut out (model.py, prune()).

    state: {open_clip's name: tensor}; *_gates: {"hidden": [C], "heads": [L, H], "ffn": [L, F]}, as from Gates. Returns the state of
    a ragged model, whose layers differ in heads and FFN channels; of an attention without heads the output's bias is left.
    cut=False cuts nothing and adds a mask `keep` for each LayerNorm: the gated model, whose outputs are the ragged one's.
    """
    writers = "conv1", "class_embedding", "token_embedding", "positional_embedding", "out_proj", "c_proj"  # into the residual stream
    pruned = {}
    for key, value in state.items():
        gates, parts = image_gates if key.startswith("visual.") else text_gates, key.split(".")
        name = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        layer = int(parts[parts.index("resblocks") + 1]) if "resblocks" in parts else 0
        hidden, heads, ffn = gates["hidden"], gates["heads"][layer].repeat_interleave(64), gates["ffn"][layer]
        axes = {"in_proj_weight": (None, heads, hidden), "in_proj_bias": (None, heads), "out_proj": (hidden, heads), "c_fc": (ffn, hidden),
                "c_proj": (hidden, ffn), "token_embedding": (None, hidden), "positional_embedding": (None, hidden)}.get(name, (hidden,))
        if cut and ("in_proj" in name or key.endswith("out_proj.weight")) and not heads.any():
            continue
        if "in_proj" in name:
            value = value.unflatten(0, (3, -1))  # [3, heads * 64, C] or [3, heads * 64]
        for axis, z in enumerate(axes[:value.ndim]):  # the gates of each axis
            if z is not None:
                z = z[:value.shape[axis]]  # this layer's
                if name in writers:
                    value = value * z.view(-1, *[1] * (value.ndim - axis - 1))
                if cut:
                    value = value.index_select(axis, z.nonzero().flatten())
        pruned[key] = value.flatten(0, 1) if "in_proj" in name else value
        if not cut and name.startswith("ln_"):
            pruned[f"{key.rpartition('.')[0]}.keep"] = hidden != 0
    return pruned


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels in `keep` alone, 0 elsewhere; it takes over the parameters of norm."""

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
    # the paper's students (README), and one of half the parameters of tiny
    "ViT-61M-32-Text-29M": dict(embed_dim=512, patch_size=32, vision_width=640, vision_layers=12, text_width=512, text_layers=9),
    "ViT-40M-32-Text-19M": dict(embed_dim=512, patch_size=32, vision_width=512, vision_layers=12, text_width=512, text_layers=6),
    "ViT-39M-16-Text-19M": dict(embed_dim=512, patch_size=16, vision_width=512, vision_layers=12, text_width=512, text_layers=6),
    "ViT-8M-16-Text-3M": dict(embed_dim=512, patch_size=16, vision_width=256, vision_layers=10, text_width=256, text_layers=3),
    "ResNet-30M-Text-29M": dict(embed_dim=1024, patch_size=None, vision_width=56, vision_layers=(3, 4, 6, 3), text_width=512, text_layers=9),
    "ResNet-19M-Text-19M": dict(embed_dim=1024, patch_size=None, vision_width=44, vision_layers=(3, 4, 6, 3), text_width=512, text_layers=6),
    "tiny-half": dict(embed_dim=128, image_size=32, patch_size=8, vision_width=64, vision_layers=4, text_width=128, text_layers=3),
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


class Headless(nn.Module):
    """An attention that lost all its heads: the bias of its output."""

    def __init__(self, width):
        super().__init__()
        self.out_proj = nn.ParameterDict({"bias": torch.zeros(width)})

    def forward(self, x, causal=False):  # [B, L, C]
        return self.out_proj["bias"].expand_as(x)


class TinyCLIP(CLIP):
    """A CLIP whose layers may differ in heads and FFN channels; load_state_dict takes those from the state. From open_gates() on
    it can run under gates, and dense() is what is left of it."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's, for a state of any number of heads (none, too) and FFN channels."""
        for name, module in list(self.named_modules()):
            if isinstance(module, Block) and isinstance(module.attn, Attention) and f"{name}.attn.in_proj_weight" not in state_dict:
                module.attn = Headless(len(module.ln_1.weight)).to(module.ln_1.weight.device)
        for name, parameter in list(self.named_parameters()):
            if (".attn." in name or ".mlp." in name) and name in state_dict and parameter.shape != state_dict[name].shape:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, nn.Parameter(parameter.new_empty(state_dict[name].shape)))
        return super().load_state_dict(state_dict, strict, assign)

    @staticmethod
    def from_pretrained(path, flag, quick_gelu):
        """A trained model, its tokenizer (None if the file has none) and preprocessing, from a checkpoint of any of these scripts or
        from OpenAI's or open_clip's weights (then with QuickGELU if quick_gelu). SystemExit, which names the flag, if there is no file."""
        if not Path(path).is_file():
            raise SystemExit(f"{flag}: there is no file {path}; run clip.py on the same --data first, or give the path of a trained model")
        state = load_clip_state(path)
        try:
            trained, tokenizer, preprocess = evaluator.load(path)
            quick_gelu = type(trained.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
        except SystemExit:  # not of these scripts
            name, patch = ("visual.", state["visual.conv1.weight"].shape[-1]) if "visual.proj" in state else ("visual.attnpool.", 32)
            tokenizer = None
            preprocess = data.Preprocess(math.isqrt(len(state[f"{name}positional_embedding"]) - 1) * patch)
        return build(state, TinyCLIP, quick_gelu=quick_gelu).eval(), tokenizer, preprocess

    def towers(self):
        """The parameters without gates and multipliers, by name."""
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in ENCODERS}

    def open_gates(self, lr):
        """Puts gates on both towers; returns their optimizer groups: the logits, and the multipliers, which are maximised."""
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.LayerNorm):
                self.set_submodule(name, MaskedLayerNorm(module))
        self.gates = nn.ModuleDict({name: Gates(
            len(tower.resblocks[0].ln_1.weight),
            [block.attn.out_proj.weight.shape[1] // 64 if isinstance(block.attn, Attention) else 0 for block in tower.resblocks],
            [len(block.mlp.c_fc.weight) for block in tower.resblocks])
            for name, tower in (("image", self.visual.transformer), ("text", self.transformer))})
        self.multipliers = nn.Parameter(torch.full((2,), 10.))  # one pair for the one budget of both towers
        self.to(self.logit_scale.device)
        group = dict(lr=lr, betas=(.9, .999), eps=1e-8, weight_decay=0.)
        return dict(params=list(self.gates.parameters()), **group), dict(params=[self.multipliers], maximize=True, **group)

    def forward(self, images, tokens, seed=None):
        """As CLIP's; with a seed under gates drawn from it, whatever the rank."""
        if seed is None:
            return super().forward(images, tokens)
        generator = torch.Generator(images.device).manual_seed(seed)
        weights = prune(self.towers(), *(gates.sample(generator) for gates in self.gates.values()), cut=False)
        return torch.func.functional_call(self, weights, (images, tokens))

    def dense(self):
        """The model itself, or, if it has gates, a pruned copy that keeps as much as they are expected to."""
        if not hasattr(self, "gates"):
            return self
        state = prune(self.towers(), *(gates.hard() for gates in self.gates.values()))
        model = build(state, TinyCLIP, quick_gelu=isinstance(self.transformer.resblocks[0].mlp.gelu, QuickGELU))
        model.logit_scale.requires_grad_(self.logit_scale.requires_grad)
        return model.to(self.logit_scale.device)


def prunable(state):
    """Parameters in attention and FFN of both towers: what a share to be removed is a share of."""
    return sum(value.numel() for key, value in state.items() if ".attn." in key or ".mlp." in key)


@torch.no_grad()
def encode_captions(teacher, tokenizer, dataset, device):
    """The teacher's unit text features [n, D'] of all captions, fp16; the ranks share the work. SystemExit if a picture has several."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = torch.arange(math.ceil(len(dataset) / world) * world).clamp(max=len(dataset) - 1).chunk(world)[rank]  # as many on each rank
    rows = []
    for part in own.split(1024):
        texts = [dataset.captions(i) for i in part.tolist()]
        if any(len(text) != 1 for text in texts):
            raise SystemExit("--cache-teacher-text needs data with one caption a picture")
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            rows.append(F.normalize(teacher.encode_text(tokenizer([text for text, in texts]).to(device)).float(), dim=-1).half())
    return gather(torch.cat(rows))[:len(dataset)]


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


def affinity_picture(path, student, teacher, count=16):
    """Writes what the student mimics: the affinities of a batch's first pairs. student, teacher: unit (image, text) features [B, .]."""
    maps = [(255 * (50 * x[:count].float() @ y[:count].float().T).softmax(1)).byte().expand(3, -1, -1) for x, y in (teacher, student)]
    data.grid(maps, ["teacher: a row a picture, a column a caption", "student"], path, columns=2)


def survivors_picture(path, source, student):
    """Writes which parts of the source's ViT towers stay in the student: by its gates if it has some, else what inherit() took. A row
    a layer of the source; on the left its heads, on the right the share of its FFN channels."""
    maps, captions = [], []
    for name, old, new in (("image", source.visual, student.visual), ("text", source, student)):
        if isinstance(old, ModifiedResNet):
            continue
        if hasattr(student, "gates"):
            hidden, heads, ffn = (z.cpu() != 0 for z in student.gates[name].hard().values())
        else:
            old, new = old.transformer.resblocks, new.transformer.resblocks
            layer, step = torch.arange(len(old))[:, None], len(old) // len(new)
            sizes = [[len(b.ln_1.weight), len(b.attn.in_proj_bias) // 192, len(b.mlp.c_fc.weight)] for b in (old[0], new[0])]
            hidden, heads, ffn = (torch.arange(n) < kept for n, kept in zip(*sizes))
            heads, ffn = (part & (layer % step == 0) & (layer < step * len(new)) for part in (heads, ffn))
        share = torch.arange(80) < 80 * ffn.float().mean(1, keepdim=True)
        cells = torch.cat([heads.repeat_interleave(80 // heads.shape[1], 1), torch.full((len(heads), 4), .3), share], 1)
        maps.append((225 - 185 * cells).byte().repeat_interleave(10, 0).expand(3, -1, -1))
        captions.append(f"{name} tower, layer by layer: heads | FFN channels; {hidden.sum():.0f} of {len(hidden)} hidden channels")
    data.grid(maps, captions, path, columns=2)


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

SIZES = ("vision_width", "vision_layers", "text_width", "text_layers")
# manual_ and auto_weight_inherit_100to75.sh (there batch 32,768, 6 epochs of 400 M pairs, crop (.9, 1); the next stages, to .5 and .75,
# prune at 5000 and 8000); 25 epochs: microsoft/Cream#244
OFFICIAL = dict(
    model="ViT-39M-16-Text-19M", batch_size=4096, epochs=25, lr=1e-4, warmup=2000, weight_decay=.2, augment="clip",
    prune_step=3000, sparsity_warmup=1000, gate_lr=.02)
RECIPES = {  # batch size is global, warm-up in steps; with --auto the warm-up is --prune-step, as in the official scripts
    "toy": dict(model="tiny-half", batch_size=128, epochs=2, lr=1e-3, warmup=20, weight_decay=.2, augment="clip", eval="toy",
                prune_step=192, sparsity_warmup=160, gate_lr=.04),  # ours
    "small": dict(model="tiny-half", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.2, augment="clip",
                  prune_step=200, sparsity_warmup=160, gate_lr=.04),  # ours
    "cc3m": OFFICIAL | dict(batch_size=1024),  # nothing official for cc3m and cc12m
    "cc12m": OFFICIAL,
    "yfcc15m": OFFICIAL,  # README: 63.5 %; from which teacher, in how many stages, it does not say
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
    add("--init", help="inherit from these weights: a checkpoint of ours, OpenAI's or open_clip's (default: --teacher); none: from nothing")
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
    add = parser.add_argument_group("TinyCLIP (--model is the student)").add_argument
    add("--teacher", help="a checkpoint of ours, OpenAI's or open_clip's (default: runs/clip-<data>/last.pt, which clip.py leaves)")
    add("--teacher-quick-gelu", action="store_true", help="a teacher of OpenAI's or open_clip's was trained with QuickGELU")
    add("--cache-teacher-text", action="store_true", help="encode all captions by the teacher beforehand and keep them on the device")
    add("--alpha", type=float, default=1., help="weight of affinity mimicking; 1 - alpha is that of CLIP's loss")
    add("--logit-scale", type=float, default=50., help="fixed scale of teacher and student, at most 100; 0: the teacher's own, the student's learned")
    add("--shrink", type=float, metavar="SHARE", help="student: sizes that KEEP about this share of all the teacher's parameters")
    for size, what in zip(SIZES, ("image-width", "image-layers", "text-width", "text-layers")):
        add(f"--{what}", dest=size, type=positive, help="in place of the student's")
    add("--auto", type=float, metavar="SPARSITY", help="student: --init, whose gates REMOVE this share of the teacher's attention and FFN weights")
    add("--prune-step", type=positive, help="steps under gates, which are the warm-up too")
    add("--sparsity-warmup", type=positive, help="steps until all of SPARSITY is asked for; few of them, and Adam's momentum overshoots")
    add("--gate-lr", type=float, help="of gates and multipliers; a logit moves by about this a step, from 4.6; at -1.6 P(z > 0) is half: "
        "too low for --prune-step, and less goes than asked (removed in the log)")
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
    if args.logit_scale > 100:
        raise SystemExit(f"--logit-scale {args.logit_scale} is above 100, where the student's is cut")
    if args.auto:
        args.model, args.warmup = None, args.prune_step
        if args.init == "none" or args.checkpoint_activations or any(getattr(args, name) for name in ("shrink", *SIZES)):
            raise SystemExit("--auto begins with --init as it is: leave out --init none, --checkpoint-activations, --shrink and sizes")
    args.teacher = args.teacher or f"runs/clip-{Path(args.data).stem or 'data'}/last.pt"
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
    loaded = {"--teacher": TinyCLIP.from_pretrained(args.teacher, "--teacher", args.teacher_quick_gelu)}
    if args.init not in (None, "none"):
        loaded["--init"] = TinyCLIP.from_pretrained(args.init, "--init", args.quick_gelu)
    teacher, tokenizer, preprocess = loaded["--teacher"]
    source, *_ = loaded.get("--init", loaded["--teacher"])
    tokenizer = (not args.bpe and tokenizer) or data.find_tokenizer(args.bpe, args.data, args.data_root)
    for flag, (net, words, pictures) in loaded.items():
        if (words or tokenizer).merges != tokenizer.merges or (
                len(net.token_embedding.weight), len(net.positional_embedding)) != (tokenizer.vocab_size, tokenizer.context):
            raise SystemExit(f"{flag} was trained with another tokenizer than this run's, see --bpe")
        if vars(pictures) != vars(preprocess):
            raise SystemExit(f"{flag} and --teacher know other pictures: {vars(pictures)}, {vars(preprocess)}")
    merges = "\n".join(map(" ".join, tokenizer.merges))
    if saved and saved["merges"] != merges:
        raise SystemExit(f"{out} holds a run with other merges of the tokenizer; choose another --out, or --restart to begin anew")
    dataset.transform = partial(views, tokenizer=tokenizer, size=preprocess.size, augment=args.augment)
    loader = data.loader(dataset, batches, args.workers, device)
    gated = bool(args.auto) and not (saved and saved["gated"] is None)  # before --prune-step
    state = saved["model"] if saved and not gated else source.state_dict()  # gives the shapes; a gated run's own weights come below
    original = prunable(teacher.state_dict())
    removed = 1 - prunable(state) / original
    if gated and not ("visual.proj" in state and isinstance(teacher.visual, VisionTransformer) and removed < args.auto < 1):
        raise SystemExit(f"--auto takes a share of the teacher between what has gone already, {removed:.3f}, and 1, and ViTs for both")
    quick_gelu = args.quick_gelu if args.init == "none" else isinstance(source.transformer.resblocks[0].mlp.gelu, QuickGELU)
    if saved or args.auto:
        model = build(state, TinyCLIP, quick_gelu=quick_gelu)
    else:
        sizes = MODELS[args.model] | (shrink(teacher.state_dict(), args.shrink) if args.shrink else {})
        sizes |= {name: getattr(args, name) for name in SIZES if getattr(args, name)}
        if sizes["vision_width"] % 64 and sizes["patch_size"] or sizes["text_width"] % 64 or (args.vision_layers and not sizes["patch_size"]):
            raise SystemExit("widths are multiples of 64, the width of a head; stages of ResNets keep their depth")
        sizes |= dict(image_size=preprocess.size, vocab=tokenizer.vocab_size, context=tokenizer.context, quick_gelu=quick_gelu)
        model = build(args.model, TinyCLIP, **sizes)
        if args.init != "none":
            try:
                model.load_state_dict(inherit(state, model.state_dict()))
            except ValueError as error:
                raise SystemExit(f"the student cannot inherit from {args.init or args.teacher}: {error}") from None
    model.to(device)
    if args.logit_scale:
        model.logit_scale.requires_grad_(False).fill_(math.log(args.logit_scale))
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpoint_activations = args.checkpoint_activations
    for net in (model, teacher):
        if isinstance(net.visual, ModifiedResNet):
            net.visual.to(memory_format=torch.channels_last)
    # OpenAI's for ViTs, here for all towers; OpenAI's for ResNets: (.9, .999), 1e-8
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, betas=(.9, .98), eps=1e-6, fused=True)
    if gated:
        for group in model.open_gates(args.gate_lr):
            optimizer.add_param_group(group)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step, tested, best, failed, bad = 0, 0, -1., 0, 0
    if saved:
        model.load_state_dict(saved["gated"] or saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        step, tested, best, failed, bad = (saved[name] for name in ("step", "tested", "best", "failed", "bad"))
    everywhere = gather(torch.tensor([[step, tested, len(dataset)]], device=device))  # [W, 3]
    if (everywhere != everywhere[0]).any():
        raise SystemExit(f"ranks disagree on (step, tested step, pairs): {everywhere.tolist()}; --out and --data must be the same on all machines")
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph of the whole model
        if not gated:  # what functional_call runs is not compiled
            model.compile()
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    teacher.to(device).requires_grad_(False)
    if device.type == "cuda":  # norms, biases and embeddings stay in fp32, in which autocast wants them
        for name, parameter in teacher.named_parameters():
            parameter.data = parameter.half() if parameter.ndim > 1 and "embedding" not in name else parameter
    teacher_scale = args.logit_scale or teacher.logit_scale.exp()
    teacher_texts = encode_captions(teacher, tokenizer, dataset, device) if args.cache_teacher_text else None
    expected = torch.tensor(float(prunable(model.state_dict())), device=device)  # parameters in attention and FFN

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
        if not saved and not args.auto and args.init != "none":
            survivors_picture(out / "survivors.png", source, model)
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
                            flags=vars(args), model=model.dense().state_dict(), gated=model.state_dict() if gated else None, optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict(), rng=torch.get_rng_state(), sizes=dict(quick_gelu=quick_gelu), preprocess=vars(preprocess),
                            pairs=len(dataset), merges=merges, context=tokenizer.context)

    def evaluate():
        """After an epoch whose tests are due, or in a run that was killed before them."""
        nonlocal tested, best
        if step % steps or step == tested or (step // steps % args.eval_every and step < total):
            return
        student = model.dense()
        results = evaluator.evaluate(student, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root) if tests else {}
        if rank == 0:
            picture(out / "captions.png", student, tokenizer, preprocess, shown[0])
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
            images = preprocess.normalize(images)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                image_features, text_features, logit_scale = parallel(images, tokens, (args.seed * 1_000_003 + step) % 2 ** 63 if gated else None)
            affinity = clip = sparsity = torch.zeros((), device=device)
            if args.alpha > 0:
                with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                    teacher_image = F.normalize(teacher.encode_image(images).float(), dim=-1)
                    teacher_text = (F.normalize(teacher.encode_text(tokens).float(), dim=-1) if teacher_texts is None
                                    else teacher_texts[batch["index"].to(device, non_blocking=True)])
                affinity = affinity_loss(image_features, text_features, logit_scale, teacher_image, teacher_text, teacher_scale)
            if args.alpha < 1:
                clip = clip_loss(image_features, text_features, logit_scale)
            if gated:
                expected = sum(gates.expected_params() for gates in model.gates.values())
                target = removed + (args.auto - removed) * min(1, step / args.sparsity_warmup)
                sparsity = sparsity_loss(expected, original, target, model.multipliers)
            loss = args.alpha * affinity + (1 - args.alpha) * clip + sparsity
            losses = {"loss": loss, "affinity": affinity, "clip": clip, "sparsity": sparsity, "removed": 1 - expected / original}

            # the step; where the gradient (of all ranks, DDP has averaged it) is not finite, everything stays as it was
            for group in optimizer.param_groups[:2]:  # the gates' is constant
                group["lr"] = lr_at(step, total, args.warmup, args.lr)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grads_with_norm_(model.parameters(), 5., norm)  # the official scripts' bound, gates and multipliers included
            good = norm.isfinite()
            optimizer.found_inf = 1 - good.float()  # 1 makes fused AdamW leave weights and moments alone, without asking the host
            optimizer.step()
            scaler.update()
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), statistics):
                    buffer.copy_(buffer.where(good, before))
                model.logit_scale.clamp_(0, math.log(100))  # the parameter: clamping its exp would end its gradient at the bound
                for parameter in model.gates.parameters() if gated else ():
                    parameter.copy_(parameter.clamp(-math.log(100), math.log(100)).where(good, parameter))
            step += 1
            if gated and step == args.prune_step:  # from here the ragged model, with a new optimizer
                if rank == 0:
                    survivors_picture(out / "survivors.png", source, model)
                model, gated, best = model.dense(), False, -1.
                expected = torch.tensor(float(prunable(model.state_dict())), device=device)
                optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, betas=(.9, .98), eps=1e-6, fused=True)
                if args.compile:
                    model.compile()
                parallel = model if world == 1 else DistributedDataParallel(
                    model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

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
        if rank == 0 and args.alpha > 0:
            affinity_picture(out / "affinity.png", (image_features, text_features), (teacher_image, teacher_text))
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
