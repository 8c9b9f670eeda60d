"""A-CLIP: CLIP on two views with half of their patches each, the half that the class token of an averaged tower looks at.

The idea. A caption speaks of a part of its picture. Without half of its patches a view costs half as much. Chance (FLIP)
may take what the caption names; if the right half goes, what stays fits the caption better. Which half that is, a second
image tower says, whose weights are the running average (EMA) of the trained one's: it looks at a wide crop, whole and
without changed colours, and the patches to which its class token pays attention stay. No text enters that choice; the tower
has learned from text. For the price of one whole view there are two masked ones, which two losses compare: with each other
(SimCLR), and with the averaged tower's feature of the wide crop (BYOL). A trained model uses all patches, without the
tuning on whole pictures that FLIP ends with.

The loss. h_1, h_2: class tokens of the masked views after the last norm, W their projection, y: text features, h': the averaged
tower's class token (no gradient):

    score = mean over all layers and heads of softmax(<q_class, k> / 8), the patches' part of it     [B, P], one for both views
    view v keeps the better half of its cells of 2x2 patches, 25 of 49, by the score read inside its crop
    L = 1/2 [CLIP(W h_1, y) + CLIP(W h_2, y)] + NTXent(g(h_1), g(h_2); T = .1) + 2 mean_v (2 - 2 cos(r(p(h_v)), p'(h')))

g, p, r: small networks with batch norm; p' is p averaged, r is on the trained side only. Each CLIP term is over its own N x N
pairs; the text tower runs once. After each step ema <- m ema + (1 - m) weights, m from .996 (--ema-momentum) to 1 along half a
cosine: an average, because it changes slowly, and with it what is hidden and what BYOL aims at.

What it brings, by its README: ImageNet zero-shot, ViT-B-16, 25 epochs of YFCC15M, batch 4096, single runs (SLIP: 42.8 %).
    CLIP: all patches of one view            --mask none --views 1 --ssl 0 (and --augment clip)     37.6 %
    FLIP: a random half of one view, of two  --mask random --views 1 (or 2) --ssl 0     35.0, 38.0
    the attentive half of one view, of two   --views 1 (or 2) --ssl 0                   39.5, 41.3
    A-CLIP; A-CLIP-eff                       default; --ema-size 112                    43.9, 42.9
The paper has 28.5 for two views of the half that gets the least attention. So of 6.3 points masks and views bring 3.7,
SimCLR and BYOL 2.6. A-CLIP with 50 and 100 epochs: 46.3, 48.0; ViT-L-16, 25: 48.9 (CLIP's 40.4). Nothing is published for
CC3M and CC12M. (Random masks: 98 single patches; attentive: 25 cells = 100.)

The cost. ViT-B-16: 159 GFLOP a pair, 1.29 times CLIP's (two views of 101 tokens forward and backward, the average's 197
forward); 1.08 times with --ema-size 112 (A-CLIP-eff). Its README clocks 1.16 and 0.86 of CLIP's time, SLIP 2.67 (2.3 times
A-CLIP's), with unfused attention, whose matrices are half as large for two views of 101 tokens as for one of 197. We clock
1.42 and 1.21 on a CPU core (tests/cost.py; batches of 4, where updates of all weights count for much). Memory: one more
copy of the weights.

How to run.
    python aclip.py                                                      drawn toy data, any machine, minutes
    torchrun --nproc_per_node=8 aclip.py --data yfcc15m --eval /imagenet/val       see RECIPES for the settings
    python aclip.py --mask none --views 1 --ssl 0 --out runs/plain       CLIP, but for the frozen patch weights
    python eval.py runs/aclip-toy/last.pt --data toy --weights ema       the averaged model

Trained and averaged model are both tested (the latter's results: "by EMA") and both in a checkpoint, under "model" and "ema";
best.pt is best by their sum. masks.png is the paper's figure from your run: the attention, and what the masks leave.

Where the released code (microsoft/A-CLIP) does otherwise, by its slips; here is what was meant.
    - Masks are off in its README's command (needs --mask-ratio above 0). Two whole views: 2.1 times CLIP's work.
    - Its SimCLR compares view 1 with view 1: positives are equal, negatives alone have a gradient. Ours: view 1 with view 2.
    - Its EMA crop, by a wrong index (its left edge is drawn from a height) and a bound taken too early (before its corner
      moves), misses a part of a view in 70 % of the samples; that part scores 0 and is dropped first.
    - ViT-S hands the mask ratio to the EMA tower too. With accumulation negatives are those of a micro-batch, and the EMA
      moves once in each.
    - It does not start: a module is missing, and a name is misspelt.
    - Captions cut at 77 tokens lose their end token and are read at the start token, a constant, as in SLIP.
Where this file does otherwise, by choice.
    - OpenAI's ViT (a norm in front, eps 1e-5; ViT-S: heads of 64) for timm's; GELU for the text tower's QuickGELU; class
      token without decay; bicubic crops and OpenAI's mean.
    - EMA of the whole model, so that it can be tested. Theirs lacks token table, positions and last norm of the text tower
      and borrows the trained ones; which of the two models the published figures are of is not said.
    - All view crops of a score map are one grid_sample, without waiting for the GPU; theirs loops over pictures, and waits.
    - The paper's figure gives the EMA tower the whole picture; here, as in the code, a crop around both views.
    - A-CLIP-eff is only named in the paper; that its positions are interpolated is our guess.
    - Colours jitter on the device; a flip of another method's --augment is left out, because crops must map onto each other.
    - Batch norm (as theirs) is that of all ranks, for a head's input as a whole (both views), or losses would depend on the
      number of GPUs; it keeps no running statistics, since only training needs it: train and eval mode are one here.

Do the masks find the object? Where a new tower's class token looks is chance. The object's share that the averaged tower keeps:
    by chance (9 of 16 cells)                                                                     56 %
    eight untrained seeds on toy                                                               18-84 %
    emoji pictures, 126 steps of 128 pairs, --ssl 0: attentive masks on one view, two               69, 68 %
    the same with SimCLR and BYOL                                                                 61 %
    toy, the default run: 384 steps of 128                                                        62 %
    toy, CLIP's loss alone (--mask none --views 1 --ssl 0), 300 steps of 64                       88 %
    toy, from a start that keeps 25 %, 168 steps of 64: m from .9; from .996                        34, 16 %
So CLIP's loss finds it. On small data SimCLR and BYOL dilute that (we think because a background tells such pictures apart), and m
from .996, whose average of a few hundred steps stays near its start, prevents it: hence .9 in our short recipes. Look at masks.png
of your run before you trust the masks.

Sources: Yang et al. 2023 (arXiv 2212.08653) and github.com/microsoft/A-CLIP; SLIP (arXiv 2112.12750), on whose code it stands.
"""
import argparse
import copy
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


# the method: crops, masks, losses, batch norm of the heads, average of the weights

def three_crops(size, rng, scale=(.5, 1.), ratio=(3 / 4, 4 / 3)):
    """Boxes [3, 4] int64 (top, left, height, width) in a picture of size = (width, height): two random crops, as torchvision's
    RandomResizedCrop draws them, and a box around both for the EMA tower, each of whose sides lies anywhere between theirs
    and the picture's (the intent of datasets.py, GetThreeRandomResizedCrop). rng: random.Random."""
    width, height = size
    boxes = []
    for _ in range(2):
        for _ in range(10):
            area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                boxes.append((rng.randint(0, height - h), rng.randint(0, width - w), h, w))
                break
        else:  # the middle of a long picture
            w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
            boxes.append(((height - h) // 2, (width - w) // 2, h, w))
    top, left = (rng.randint(0, min(box[side] for box in boxes)) for side in (0, 1))
    bottom, right = (rng.randint(max(box[side] + box[side + 2] for box in boxes), end) for side, end in ((0, height), (1, width)))
    return torch.tensor([*boxes, (top, left, bottom - top, right - left)])


def attentive_keep(score, boxes, grid=None):
    """The patches of two views that the attention of a third, wider one calls important: [2B, kept] int64, view 1 first.

    score [B, P]: attention of the class token in the EMA view. boxes [B, 3, 4]: (top, left, height, width) of view 1, view 2
    and the EMA view in one picture, in any unit. grid: patches along a side of the views (default: as in the EMA view).
    The score is read (bilinear, edges continued) at the centre of each patch of a view; then floor(cells / 2) + 1 cells
    of 2x2 patches stay, of single ones where the grid is odd or below 8. A-CLIP, ACLIP.get_mask and get_att_mask, for all
    samples at once and without host sync.
    """
    with torch.autocast(score.device.type, enabled=False):
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        (B, P), boxes = score.shape, boxes.to(score.dtype)
        grid = grid or math.isqrt(P)
        side = 2 if grid % 2 == 0 and grid >= 8 else 1  # of a cell, in patches
        view_box, wide_box = boxes[:, :2].transpose(0, 1).flatten(0, 1), boxes[:, 2].repeat(2, 1)  # [2B, 4]
        centres = (torch.arange(grid, dtype=score.dtype, device=score.device) + .5) / grid  # of patches, along a side of a view
        pixels = view_box[:, :2, None] + view_box[:, 2:, None] * centres  # [2B, (y, x), g] in the picture
        y, x = (2 * (pixels - wide_box[:, :2, None]) / wide_box[:, 2:, None] - 1).unbind(1)  # in the EMA view, from -1 to 1
        places = torch.stack([x[:, None, :].expand(-1, grid, -1), y[:, :, None].expand(-1, -1, grid)], 3)  # [2B, g, g, (x, y)]
        maps = score.view(B, 1, math.isqrt(P), -1).repeat(2, 1, 1, 1)
        seen = F.grid_sample(maps, places, padding_mode="border", align_corners=False)  # [2B, 1, g, g]
        cells = F.avg_pool2d(seen, side).flatten(1)  # [2B, cells]
        best = cells.topk(cells.shape[1] // 2 + 1).indices  # [2B, k]
        patches = torch.arange(grid ** 2, device=score.device).view(grid // side, side, grid // side, side)
        return patches.transpose(1, 2).reshape(-1, side * side)[best].flatten(1)  # of each cell its patches


def random_keep(batch, patches, kept, generator=None):
    """FLIP's random masks: [batch, kept] int64, kept of the numbers below patches in each row, without repetition."""
    return torch.rand(batch, patches, generator=generator).argsort(1)[:, :kept]


def ntxent_loss(a, b, temperature):
    """NT-Xent of SimCLR (equation 1) over all ranks, for the rows of this rank.

    a, b [B, d]: two views, row i with row i; made unit here. Each of the 2N rows picks the other view of its picture among
    the 2N - 1 other rows. Returns a scalar in at least fp32; N orthogonal pairs of equal rows: log(1 + 2 (N-1) exp(-1/T)).
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (a, b))
        all_a, all_b = gather(torch.cat([a, b], 1)).chunk(2, 1)  # [N, d] each
        rank = dist.get_rank() if len(all_a) > len(a) else 0
        labels = torch.arange(len(a), device=a.device) + rank * len(a)

        def one_way(x, others, own):
            same = (x @ own.T).scatter(1, labels[:, None], -torch.inf)  # nobody picks itself
            return F.cross_entropy(torch.cat([x @ others.T, same], 1) / temperature, labels)  # [B, 2N]

        return (one_way(a, all_b, all_a) + one_way(b, all_a, all_b)) / 2


def byol_loss(prediction, target):
    """Mean over rows of 2 - 2 cos (BYOL, equation 2): prediction, target [n, d]; no gradient for the target. A scalar in at
    least fp32: 0 for the same direction, 2 for orthogonal rows, 4 for opposite ones. Local: the mean over ranks is exact."""
    with torch.autocast(prediction.device.type, enabled=False):
        p, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (prediction, target.detach()))
        return (2 - 2 * F.cosine_similarity(p, z, dim=-1)).mean()


class SyncBatchNorm(nn.Module):
    """Batch norm of x [n, C] with the mean and variance of the rows of all ranks (n equal on all), also on the CPU, in at least
    fp32. Keeps no running statistics: heads are for training only, so that there is nothing that a bad step could spoil."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(torch.promote_types(x.dtype, torch.float32))
            h = h - gather(h.mean(0, keepdim=True)).mean(0)
            variance = gather(h.square().mean(0, keepdim=True)).mean(0)  # two passes: E[x^2] - E[x]^2 cancels
            return (h * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


@torch.no_grad()
def update_ema(ema, online, momentum):
    """ema <- momentum * ema + (1 - momentum) * online, in place, for all parameters of two modules built alike. momentum: float
    or tensor without dimensions (no host sync). 1 leaves ema as it is, 0 copies."""
    for old, new in zip(ema.parameters(), online.parameters(), strict=True):
        old.lerp_(new, (1 - momentum).to(old.dtype) if torch.is_tensor(momentum) else 1 - momentum)


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


class MaskedVisionTransformer(VisionTransformer):
    """A ViT that can run on some of its patches, and tell where its class token looks."""

    def embed(self, images):
        """As VisionTransformer.embed; for pictures of another size than the model's, positions are interpolated (bilinear)."""
        grid, own = images.shape[-1] // self.conv1.kernel_size[0], math.isqrt(len(self.positional_embedding) - 1)
        if grid == own:
            return super().embed(images)
        table = self.positional_embedding[1:].T.unflatten(1, (own, own))[None]  # [1, C, own, own]
        positions = F.interpolate(table, (grid, grid), mode="bilinear")[0].flatten(1).T  # [P, C]
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [n, P, C]
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], 1) + torch.cat([self.positional_embedding[:1], positions]))

    def class_token(self, images, keep=None):
        """[n, 3, S, S] -> the class token before its projection [n, C]. keep [n, k]: the patches that enter the first block, each
        with the position that it has in the whole picture, in any order. None: all."""
        x = self.embed(images)
        if keep is not None:
            keep = F.pad(keep + 1, (1, 0))  # token 0, the class token, stays
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # [n, 1+k, C]
        return self.ln_post(self.transformer(x)[:, 0])

    def attend(self, images):
        """[n, 3, S, S] -> class token [n, C], score [n, P]: how much attention of the class token each patch gets, mean over all
        layers and heads (MaskVisionTransformer.forward_features). Block and Attention written out, for fused attention does not
        tell its weights; of these the class token's row alone is computed again."""
        x, score = self.embed(images), 0
        for block in self.transformer.resblocks:
            qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
            q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # [n, heads, 1+P, 64] each
            logits = (q[:, :, :1] @ k.mT).squeeze(2) / 8  # <q_class, k> / 8: [n, heads, 1+P]
            score = score + logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).mean(1)[:, 1:]
            x = x + block.attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return self.ln_post(x[:, 0]), score / len(self.transformer.resblocks)


ModifiedResNet = None  # CLIP's constructor names it; A-CLIP has none, since a ResNet has no patches to drop


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


class ACLIP(CLIP):
    """CLIP whose image tower can drop patches, with the heads of SimCLR and BYOL on its class token (none if ssl_mlp_dim is 0).
    The projection of the patches stays as it was drawn, which keeps a ViT's training stable (MoCo v3)."""

    def __init__(self, *args, ssl_mlp_dim=4096, **kwargs):
        super().__init__(*args, **kwargs)
        self.visual.__class__ = MaskedVisionTransformer  # the tower that CLIP drew, with more methods
        self.visual.conv1.requires_grad_(False)
        C, H = len(self.visual.class_embedding), ssl_mlp_dim
        if H:
            self.simclr = nn.Sequential(nn.Linear(C, H), SyncBatchNorm(H), nn.ReLU(), nn.Linear(H, H), SyncBatchNorm(H), nn.ReLU(),
                                        nn.Linear(H, 256))
            self.projector, self.predictor = (
                nn.Sequential(nn.Linear(width, H, bias=False), SyncBatchNorm(H), nn.ReLU(), nn.Linear(H, 256, bias=False))
                for width in (C, 256))

    def forward(self, images, tokens, keep=None):
        """Views [v*B, 3, S, S], view 1 first, tokens [B, L], patches to keep [v*B, k] or None for all -> unit image_features [v*B, D],
        unit text_features [B, D], logit_scale (the factor), SimCLR's projection and BYOL's prediction [v*B, 256] or None."""
        x = self.visual.class_token(images, keep)
        image_features, text_features = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
                                         for x in (x @ self.visual.proj, self.encode_text(tokens)))
        simclr, prediction = (self.simclr(x), self.predictor(self.projector(x))) if hasattr(self, "simclr") else (None, None)
        return image_features, text_features, self.logit_scale.exp(), simclr, prediction


ENCODERS = "visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale"
MODELS = {  # sizes from OpenAI and open_clip; 224 pixels and 12 text layers where nothing else is said
    "ViT-B-32": dict(embed_dim=512, patch_size=32, vision_width=768, vision_layers=12, text_width=512),
    "ViT-B-16": dict(embed_dim=512, patch_size=16, vision_width=768, vision_layers=12, text_width=512),
    "ViT-S-16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_layers=12, text_width=384),
    "tiny": dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=4, text_width=128, text_layers=4),  # ours
    "tiny-4": dict(embed_dim=128, image_size=32, patch_size=4, vision_width=128, vision_layers=4, text_width=128, text_layers=4),  # 8x8 patches
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


def aclip_views(image, caption, rng, tokenizer, size, augment, views, ema_size, random_patches):
    """One sample in the worker: image bytes and a caption -> one or two views, uint8 [v, 3, S, S], their colour parameters
    [v, 8], the EMA tower's picture without any, the three boxes [3, 4], tokens [L], and random masks [v, k] out of
    random_patches patches if that is not 0. All crops are of one decoded picture, none flipped, so that they map onto each other."""
    area, colors = AUGMENT[augment]
    image = data.decode(image, (2 * size, 2 * size))  # a crop of half the area has more than size pixels a side then
    boxes = three_crops(image.size, rng, area)
    *crops, wide = boxes.tolist()
    sample = {"images": torch.stack([data.resize_crop(image, box, size) for box in crops[:views]]), "boxes": boxes,
              "ema_images": data.resize_crop(image, wide, ema_size), "tokens": tokenizer([caption])[0]}
    if colors:
        sample["colors"] = torch.stack([data.color_params(rng, **colors | {"flip": 0}) for _ in range(views)])
    if random_patches:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        sample["keep"] = random_keep(views, random_patches, random_patches // 2, generator)
    return sample


def masks_picture(path, ema, preprocess, dataset, show=8):
    """The paper's figure from training pictures: what the EMA tower sees, where its class token looks (the greyer the less), and
    the views without the patches that attentive masks drop."""
    samples = [dataset[i, 0] for i in range(0, len(dataset), max(1, len(dataset) // show))][:show]
    wide, boxes = (torch.stack([sample[name] for sample in samples]).to(ema.logit_scale.device) for name in ("ema_images", "boxes"))
    with torch.no_grad():
        score = ema.visual.attend(preprocess.normalize(wide))[1]  # [B, P]
    grid = math.isqrt(len(ema.visual.positional_embedding) - 1)
    keep = attentive_keep(score, boxes, grid).cpu()  # [2B, k]
    kept = torch.zeros(len(keep), grid ** 2).scatter_(1, keep, 1).view(2, -1, grid, grid)
    low, high = score.aminmax(dim=1, keepdim=True)
    light = ((score - low) / (high - low).clamp(min=1e-12)).cpu().unflatten(1, (math.isqrt(score.shape[1]), -1))  # [B, g, g]

    def shade(image, light):  # grey where light [g, g] is 0
        return (128 + (image - 128.) * F.interpolate(light[None, None], image.shape[1:])[0]).byte()

    cells = []
    for b, sample in enumerate(samples):
        cells += [(sample["ema_images"], dataset.captions(int(sample["index"]))[0]), (shade(sample["ema_images"], light[b]), "attention")]
        cells += [(shade(view, kept[v, b]), f"view {v + 1}") for v, view in enumerate(sample["images"])]
    data.grid(*zip(*cells), path, columns=2 + len(sample["images"]))


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

RECIPES = {  # batch size is global, warm-up in steps
    # ours; colours are what the captions of toy name, so they stay; an average that follows within the few hundred steps
    "toy": dict(model="tiny", batch_size=128, epochs=2, lr=5e-4, warmup=50, weight_decay=.1, augment="clip", ssl_mlp_dim=512,
                ema_momentum=.9, eval="toy"),
    "small": dict(model="tiny-4", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="aclip", ssl_mlp_dim=512,
                  ema_momentum=.9),  # ours
    # YFCC15M: the values of A-CLIP's README command, with which (and masks, which it forgets) it reports 43.9 %; its argparse defaults
    # are others (lr 3e-3, weight decay .1). AdamW's values, schedule, no clipping: as released. Epochs of CC3M and CC12M are
    # SLIP's; a warm-up of one epoch
    "cc3m": dict(model="ViT-B-16", batch_size=4096, epochs=40, lr=5e-4, warmup=700, weight_decay=.5, augment="aclip", ssl_mlp_dim=4096,
                 ema_momentum=.996),
    "cc12m": dict(model="ViT-B-16", batch_size=4096, epochs=35, lr=5e-4, warmup=2600, weight_decay=.5, augment="aclip", ssl_mlp_dim=4096,
                  ema_momentum=.996),
    "yfcc15m": dict(model="ViT-B-16", batch_size=4096, epochs=25, lr=5e-4, warmup=3600, weight_decay=.5, augment="aclip", ssl_mlp_dim=4096,
                    ema_momentum=.996),
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
    add = parser.add_argument_group("A-CLIP (--mask none --views 1 --ssl 0 is CLIP; with --mask random FLIP)").add_argument
    add("--mask", choices=("attentive", "random", "none"), default="attentive", help="which half of the patches the trained tower sees")
    add("--views", type=int, choices=(1, 2), default=2, help="masked views of a picture")
    add("--ssl", type=int, choices=(0, 1), default=1, help="1: SimCLR between the views, BYOL from each to the EMA tower")
    add("--ssl-mlp-dim", type=positive, help="hidden width of the heads of these two losses")
    add("--ema-momentum", type=float, help="share of itself that the average keeps in the first step; it rises to 1 (half a cosine)")
    add("--ema-size", type=positive, help="side of the EMA tower's pictures (default: --image-size; half of it is A-CLIP-eff)")
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
    patch = MODELS[args.model]["patch_size"]
    args.ema_size = args.ema_size or args.image_size
    if args.ema_size % patch:
        raise SystemExit(f"--ema-size {args.ema_size} is not a multiple of the {patch} pixels of a patch of {args.model}")
    if args.ssl and args.views == 1:
        raise SystemExit("--views 1 leaves SimCLR no second view to compare: give --ssl 0 too")
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
    grid = args.image_size // patch
    dataset.transform = partial(aclip_views, tokenizer=tokenizer, size=args.image_size, augment=args.augment, views=args.views,
                                ema_size=args.ema_size, random_patches=grid ** 2 if args.mask == "random" else 0)
    loader = data.loader(dataset, batches, args.workers, device)
    sizes = dict(image_size=args.image_size, vocab=tokenizer.vocab_size, context=tokenizer.context, quick_gelu=args.quick_gelu)
    sizes["ssl_mlp_dim"] = args.ssl_mlp_dim if args.ssl else 0
    model = build(args.model, ACLIP, **sizes).to(device)
    if args.init and not saved:
        state = load_clip_state(args.init, args.quick_gelu, merges)
        if {key: value.shape for key, value in state.items()} != {
                key: value.shape for key, value in model.state_dict().items() if key.split(".")[0] in ENCODERS}:
            raise SystemExit(f"--init {args.init} is not a {args.model} of {args.image_size} pixels and {tokenizer.vocab_size} tokens")
        model.load_state_dict(state, strict=False)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpoint_activations = args.checkpoint_activations
    ema = copy.deepcopy(model).requires_grad_(False)  # equal on all ranks, as the weights are; no part of DDP
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, betas=(.9, .98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step, tested, best, failed, bad = 0, 0, -1., 0, 0
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
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
        ema.visual.attend = torch.compile(ema.visual.attend)
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # what the run leaves behind
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    tests = args.eval.split(",") if args.eval else []
    for test in tests:
        evaluator.open_test(test, root=args.data_root)  # a wrong name should not cost an epoch
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
                            flags=vars(args), model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            rng=torch.get_rng_state(), preprocess=vars(preprocess),
                            sizes=dict(quick_gelu=args.quick_gelu, ssl_mlp_dim=sizes["ssl_mlp_dim"]),
                            pairs=len(dataset), merges=merges, context=tokenizer.context)

    def evaluate():
        """After an epoch whose tests are due, or in a run that was killed before them."""
        nonlocal tested, best
        if step % steps or step == tested or (step // steps % args.eval_every and step < total):
            return
        results = {}
        for name, net in (("", model), (" by EMA", ema)) if tests else ():
            found = evaluator.evaluate(net, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root)
            results |= {test + name: result for test, result in found.items()}
        if rank == 0:
            masks_picture(out / "masks.png", ema, preprocess, dataset)
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
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            images, colors, keep = (batch[name].transpose(0, 1).flatten(0, 1) if name in batch else None  # [2B, ...], view 1 first
                                    for name in ("images", "colors", "keep"))
            if colors is not None:
                images = data.augment(images, colors)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                with torch.no_grad():  # what the EMA tower says about the wide crop
                    if args.mask == "attentive" or args.ssl:
                        class_token, score = ema.visual.attend(preprocess.normalize(batch["ema_images"]))
                    if args.mask == "attentive":
                        keep = attentive_keep(score, batch["boxes"], grid)[:len(images)]
                    if args.ssl:
                        target = ema.projector(class_token).repeat(2, 1)  # [2B, 256]
                image_features, text_features, logit_scale, simclr, prediction = parallel(preprocess.normalize(images), batch["tokens"], keep)
            clip = torch.stack([clip_loss(x, text_features, logit_scale) for x in image_features.chunk(args.views)]).mean()
            ntxent = ntxent_loss(*simclr.chunk(2), .1) if args.ssl else clip.new_zeros(())
            byol = byol_loss(prediction, target) if args.ssl else clip.new_zeros(())
            loss = clip + ntxent + 2 * byol
            losses = {"loss": loss, "clip": clip, "ntxent": ntxent, "byol": byol}

            # the step; where the gradient (of all ranks, DDP has averaged it) is not finite, everything stays as it was
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup, args.lr, 1e-6, 1e-5)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            good = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).isfinite()
            optimizer.found_inf = 1 - good.float()  # 1 makes fused AdamW leave weights and moments alone, without asking the host
            optimizer.step()
            scaler.update()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # the parameter: clamping its exp would end its gradient at the bound
            step += 1
            momentum = lr_at(step, total, 0, args.ema_momentum, end=1.)
            update_ema(ema, model, torch.where(good, momentum, 1.))

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
