"""DeCLIP: CLIP learns from fewer pairs, because each pair teaches in several ways.

The idea. A pair says more than "this picture, this caption". Each picture is cropped and recoloured twice. Each caption
is written twice: once with some words masked, once edited (two words swapped, some dropped, or one replaced by a
synonym). Four losses use these views:

    clip   CLIP's loss for all four combinations of a crop and a text (the paper's multi-view supervision).
    nns    Nearest-neighbour supervision. A queue holds the latest captions' features. The caption nearest to a text
           often fits its picture too. So each crop must also match this neighbour's feature.
    ssl    Self-supervision of the image tower: each crop predicts the other crop's feature (SimSiam).
    mlm    Masked language modelling: the text tower guesses each masked word from the words to its left.

Only the two towers are kept for use. There is no teacher and no momentum encoder.

The losses. f_k is the image feature of crop k = 1, 2; x_k is f_k at unit length. y_1 is the masked text's unit feature,
y_2 the edited text's. n_v is the queue's row nearest to y_v. z_k = projector(f_k), p_k = predictor(z_k). s is CLIP's
scale.

    clip = mean over k, v of clip_loss(x_k, y_v)
    nns  = mean over k, v of cross-entropy(s <x_k, n_v>): a crop picks its text's neighbour among those of the batch
    ssl  = -1/2 [ cos(p_1, z_2) + cos(p_2, z_1) ]
    mlm  = cross-entropy of the masked words, predicted by the text tower before its projection
    L    = .4 clip + .2 nns + .2 ssl + .2 mlm

Targets get no gradient. In each cosine of ssl, z is detached and only the other side has a predictor; SimSiam collapses
if one is missing. In nns, the neighbours are detached, so this term trains only the image tower and s. Its negatives
are the batch's other neighbours, not the whole queue. Search before you enqueue, or each caption finds itself.

Results (zero-shot ImageNet). RN50 has 60.4 % from 56 M pairs; OpenAI's CLIP has 59.6 % from 400 M (paper). On
YFCC15M-V2, ViT-B-32 has 43.2 %, CLIP 32.8 % (authors' benchmark). DeCLIP's stronger augmentation may explain
part of that gain; clip.py --augment declip is the baseline with the same. A step takes twice CLIP's FLOPs, because each
tower runs twice. Heads, queue and words add 2 %.

How to run.
    python declip.py                                                         built-in pictures, any machine, minutes
    torchrun --nproc_per_node=8 declip.py --data cc3m --synonyms synonyms.tsv --eval /imagenet/val
    python declip.py --w-nns 0 --w-ssl 0 --w-mlm 0 --out runs/views          only clip, on all pairs of views

Sources: Li et al. 2022 (arXiv 2110.05208), Cui et al. 2022 (arXiv 2203.05796), github.com/Sense-GVT/DeCLIP at 5d99a85.
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


def multi_view_clip_loss(image_views, text_views, logit_scale):
    """Mean of clip_loss over the four pairs of an image view and a text view (multi-view supervision, section 3.3 of
    the DeCLIP paper).

    image_views, text_views: unit rows [2, B, D]. logit_scale: the factor. Returns a scalar in at least fp32. The mean
    over ranks is the loss of the whole batch. The four pairs weigh the same, as in the released declip_solver.py.
    """
    with torch.autocast(image_views.device.type, enabled=False):
        x, y = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (image_views, text_views))
        rows = gather(torch.cat([x, y]).transpose(0, 1))  # [N, 4, D]; gather joins ranks along dimension 0
        all_x, all_y = rows.transpose(0, 1).chunk(2)  # [2, N, D] each
        rank = dist.get_rank() if all_x.shape[1] > x.shape[1] else 0
        labels = torch.arange(x.shape[1], device=x.device) + rank * x.shape[1]  # the columns of this rank's own pairs
        total = 0.
        for k in (0, 1):
            for v in (0, 1):
                image_logits = logit_scale * x[k] @ all_y[v].T  # [B, N]
                text_logits = logit_scale * y[v] @ all_x[k].T  # [B, N]
                total = total + (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2
        return total / 4


def nearest_neighbor_loss(image_views, neighbors, logit_scale):
    """Mean cross-entropy over the four pairs of an image view and a text view (nearest-neighbour supervision, section
    3.3 of the DeCLIP paper). Each text of the whole batch has one neighbour, so a view has N of them. Each image view
    has to pick its own text's neighbour among these.

    image_views: unit rows [2, B, D]. neighbors: unit rows [2, B, D], the neighbour of each text of each view; they get
    no gradient. logit_scale: the factor. Returns a scalar in at least fp32. The mean over ranks is the loss of the
    whole batch.
    """
    with torch.autocast(image_views.device.type, enabled=False):
        dtype = torch.promote_types(image_views.dtype, torch.float32)
        x, n = image_views.to(dtype), neighbors.detach().to(dtype)
        n = gather(n.transpose(0, 1)).transpose(0, 1)  # [2, N, D]; gather joins ranks along dimension 0
        rank = dist.get_rank() if n.shape[1] > x.shape[1] else 0
        labels = torch.arange(x.shape[1], device=x.device) + rank * x.shape[1]  # columns of this rank's own texts
        # Only one direction, as in the released code: pictures pick neighbours, but neighbours do not pick pictures.
        total = 0.
        for k in (0, 1):
            for v in (0, 1):
                total = total + F.cross_entropy(logit_scale * x[k] @ n[v].T, labels)  # [B, N]
        return total / 4


class FeatureQueue(nn.Module):
    """A queue of unit feature rows, in DeCLIP those of the latest captions of all ranks (section 3.3 of the DeCLIP
    paper). It is the same on each rank and starts with random unit rows. size: number of rows; dim: their length D.

    DDP must not see it: if it were a part of the wrapped model, DDP would broadcast its buffers at each step, 134 MB
    for 65,536 rows of 512 numbers.
    """

    def __init__(self, size, dim):
        super().__init__()
        rows = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("rows", F.normalize(rows, dim=1))  # [size, D]
        self.register_buffer("samples", torch.full((size,), -1))  # place of each row's sample in the data set; -1: none
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # place of the oldest row, replaced next

    @torch.no_grad()
    def search(self, x):
        """Places [n] in the queue of the rows that have the largest inner products with x [n, D]. Search before
        enqueue(x), or x finds itself."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, self.rows.dtype)
            return (x.to(dtype) @ self.rows.to(dtype).T).argmax(1)

    def nearest(self, x):
        """The rows [n, D] that search finds for x [n, D], without gradient."""
        return self.rows[self.search(x)]

    @torch.no_grad()
    def enqueue(self, x, samples=None, good=True):
        """Replaces the oldest rows by the unit rows x [B, D] of all ranks.

        samples: for each row the number of its sample in the data set, int64 [B]. good: bool, or a bool tensor on the
        device; if it is false, nothing changes. Ranks must agree on good, so that their queues stay equal.
        """
        size, good = len(self.rows), torch.as_tensor(good, device=x.device)
        if samples is None:
            samples = self.samples.new_full((len(x),), -1)
        # In the released code each rank has a queue of its own captions only, and a restart loses the queues.
        x, samples = gather(x)[-size:], gather(samples)[-size:]
        self.rows = self.rows.to(torch.promote_types(self.rows.dtype, x.dtype))  # float64 features are kept exactly
        # At the end of the queue a batch goes on at the start. The released code drops the rows beyond the end.
        place = (self.pointer + torch.arange(len(x), device=x.device)) % size
        # good is on the device: an if would make the host wait for it, so a bad step writes the old values again
        self.rows[place] = x.to(self.rows.dtype).where(good, self.rows[place])
        self.samples[place] = samples.where(good, self.samples[place])
        self.pointer.copy_(((self.pointer + len(x)) % size).where(good, self.pointer))


def simsiam_loss(p1, p2, z1, z2):
    """-1/2 [cos(p1, z2) + cos(p2, z1)], mean over rows, in [-1, 1] (Chen & He 2021, algorithm 1).

    p1, p2: predictions; z1, z2: projections, which get no gradient. All are [B, d] and need not have unit norm. Returns
    a scalar in at least fp32.
    """
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, z1, z2 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p1, p2, z1.detach(), z2.detach()))
        return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2


class SimSiam(nn.Module):
    """Projector and predictor (Chen & He 2021): image features x [B, D], not of unit norm -> p, z [B, hidden].

    Call it once for each view. As in the released code, its batch norms take their statistics from one view on one
    rank. So ssl depends on how many ranks a batch is split over. The other losses do so only through a ResNet's batch
    norms.
    """

    def __init__(self, dim, hidden=1024, bottleneck=512):
        super().__init__()
        # The sizes are those of the released prototype/model/declip.py. SimSiam's own differ: its heads are 2,048 wide;
        # its projector reads the backbone's feature before any projection; its last batch norm has no scale and shift;
        # and the learning rate of its predictor is constant.
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden))
        self.predictor = nn.Sequential(
            nn.Linear(hidden, bottleneck), nn.BatchNorm1d(bottleneck), nn.ReLU(inplace=True),
            nn.Linear(bottleneck, hidden))

    def forward(self, x):
        z = self.projector(x)
        return self.predictor(z), z


def mask_tokens(tokens, eot, mask_id, vocab, p=.15, generator=None):
    """BERT's masking (Devlin et al. 2019, section 3.1). Each word is chosen with probability p. Of the chosen words
    80 % become the mask token, 10 % become a random word, and 10 % stay.

    tokens [B, L]: start token, words, end token at the places eot [B], padding. Only words are chosen. mask_id: id of
    the mask token. vocab: number of ids, the mask token's included. Returns masked [B, L] and labels [B, L]: the
    original id where a word was chosen, else -100.
    """
    # for each token three random numbers: whether it is chosen, what it becomes, and which random word that would be
    choice, kind, draw = torch.rand(3, *tokens.shape, device=tokens.device, generator=generator)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    # a mask token that the caption already has is no word
    chosen = (choice < p) & (place > 0) & (place < eot[:, None]) & (tokens != mask_id)
    # A random word is any id that is smaller than vocab, than mask_id and than the start token's id. The start token
    # stands in column 0. The released code also draws the end token as a random word. It then takes that word for the
    # end of the text.
    limit = tokens[:, :1].clamp(max=min(vocab, mask_id))
    word = (draw * limit).long()
    masked = torch.where(kind < .8, mask_id, torch.where(kind < .9, word, tokens))
    return masked.where(chosen, tokens), tokens.where(chosen, -100)


def pack_labels(labels, length):
    """Where the masked words are, so that the MLM head reads only these. labels [B, L] are those of mask_tokens.
    Returns their places [M] in the flattened tokens [B, length], and their original ids as targets [M].

    length may be less than L, because the loader cuts tokens but not labels. M is the number of masked words rounded up
    to a multiple of B. Therefore M takes few different values, and memory and compiled
    code can be used again. The places added are 0
    and their targets -100, which mlm_loss leaves out. Call it on the CPU: on a GPU the host would have to wait for M.
    """
    row, column = (labels != -100).nonzero(as_tuple=True)
    padding = (0, -len(row) % len(labels))  # none in front, at the end up to the next multiple of B
    return F.pad(row * length + column, padding), F.pad(labels[row, column], padding, value=-100)


def mlm_loss(logits, targets):
    """Mean cross-entropy of logits [M, V] for the targets [M]; targets of -100 do not count. Returns a scalar in at
    least fp32, 0 if no target counts on any rank. The mean over ranks is the mean over the targets of all ranks,
    however unevenly the ranks hold them."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The released code takes the mean of each rank and averages these means. The mean of a rank is NaN on a rank
        # without a masked word.
        counts = gather((targets != -100).sum()[None])  # [W]
        return F.cross_entropy(logits, targets, reduction="sum") * len(counts) / counts.sum().clamp(min=1)


def eda(caption, rng, synonyms=None):
    """The caption after one random change: swap two words, drop each word with probability .1, or replace one
    word, at all its places, by the same synonym. The three are equally likely. At least one word is left. A change that
    is not possible leaves the caption as it is.

    rng: random.Random. synonyms: {lower-case word: list of synonyms}; without it there are only the first two changes.
    Source: EDA (Wei & Zou 2019). There a fourth change inserts words, and swap and replacement change a tenth of the
    words.
    """
    # The released code looks synonyms up in WordNet. Its synonyms may be phrases, and it never replaces stop words;
    # ours are single words from a table.
    words = caption.split()
    change = rng.choice(("swap", "delete", "replace") if synonyms else ("swap", "delete"))
    # each word once; not a set, whose order would differ from process to process
    known = [word for word in dict.fromkeys(map(str.lower, words)) if synonyms and word in synonyms]
    if change == "swap" and len(words) > 1:
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    elif change == "delete" and len(words) > 1:
        words = [word for word in words if rng.random() >= .1] or [rng.choice(words)]
    elif change == "replace" and known:
        old = rng.choice(known)
        new = rng.choice(synonyms[old])
        words = [new if word.lower() == old else word for word in words]
    return " ".join(words)


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


class DeCLIP(CLIP):
    """CLIP with two heads. ssl, mlm: whether to build the head of that loss. The token embedding has one more row than
    CLIP's, the last: the mask token."""

    def __init__(self, ssl=True, mlm=True, **sizes):
        super().__init__(**sizes)
        self.simsiam = SimSiam(sizes["embed_dim"]) if ssl else None
        self.mlm_head = nn.Linear(sizes["text_width"], sizes["vocab"]) if mlm else None  # not tied to the embedding
        if isinstance(self.visual, VisionTransformer):
            # The patch embedding is not trained, as in the released code. MoCo v3 found that training is then more
            # stable.
            self.visual.conv1.requires_grad_(False)
        # This is s = e^3 = 20.1. The released code starts at 14.3 and raises s to 20.1 in the first step.
        nn.init.constant_(self.logit_scale, 3.)

    def forward(self, images, tokens, eot, places=None):
        """images [2, B, 3, S, S]: both crops. tokens [2, B, L]: masked texts, then edited texts. eot [2, B]: the places
        of their end tokens. places [M]: those of masked words in the flattened masked texts [B, L].

        Returns unit image_views [2, B, D], unit text_views [2, B, D], the factor s, the arguments p1, p2, z1, z2 of
        simsiam_loss (None without the ssl head), and logits [M, V] of the masked words (None without the mlm head).
        """
        if isinstance(self.visual, VisionTransformer):
            x = self.encode_image(images.flatten(0, 1)).unflatten(0, (2, -1))  # [2, B, D]
        else:  # one view at a time, because batch norm would mix their statistics
            x = torch.stack([self.encode_image(view) for view in images])
        hidden = self.text_tokens(tokens.flatten(0, 1))  # [2B, L, C]
        y = hidden[torch.arange(len(hidden), device=hidden.device), eot.flatten()] @ self.text_projection
        y = y.unflatten(0, (2, -1))  # [2, B, D]
        image_views, text_views = (
            F.normalize(f.to(torch.promote_types(f.dtype, torch.float32)), dim=-1) for f in (x, y))
        siamese = logits = None
        if self.simsiam:
            (p1, z1), (p2, z2) = self.simsiam(x[0]), self.simsiam(x[1])
            siamese = p1, p2, z1, z2
        if self.mlm_head:
            # As in the released code, the tower is causal: a masked word is guessed from the words to its left. The
            # released code computes logits at all 77 places, for a quarter of CLIP's FLOPs, but its loss reads only
            # those of masked words.
            masked, _ = hidden.chunk(2)  # [B, L, C]; the second half are the edited texts
            logits = self.mlm_head(masked.flatten(0, 1)[places])
        return image_views, text_views, self.logit_scale.exp(), siamese, logits


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


def read_synonyms(path):
    """Reads a text file with lines word<TAB>synonym,synonym. Returns {lower-case word: list of synonyms}. SystemExit if
    a line has another form. tests/RESULTS.md says how to make such a file from WordNet."""
    table = {}
    for number, line in enumerate(data.read_lines(path, "--synonyms"), 1):
        word, _, rest = line.partition("\t")
        synonyms = [synonym.strip() for synonym in rest.split(",") if synonym.strip()]
        if word.strip() and synonyms and "\t" not in rest:
            table[word.strip().lower()] = synonyms
        elif line.strip():
            raise SystemExit(f"--synonyms {path}: line {number} is not word<TAB>synonym,synonym")
    return table


def declip_views(image, caption, rng, tokenizer, size, augment, p, synonyms):
    """One sample, made in a worker from image bytes and a caption. Returns a dict: "images" are two crops, uint8 [2, 3,
    S, S]; "colors" [2, 8] are their colour parameters, if the augmentation changes colours; "tokens" [2, L] are the
    masked and the edited text; "eot" [2] are the places of their end tokens; "labels" [L] are the original ids of the
    masked words, -100 elsewhere. rng: random.Random. p: share of words to mask. synonyms: table of eda."""
    area, colors = AUGMENT[augment]
    tokens = tokenizer([caption, eda(caption, rng, synonyms)])
    eot = tokens.argmax(-1)  # found before masking, because the mask token has the largest id
    # In the paper the masked text is only for mlm, and the clean caption is matched with pictures. In the released code
    # and here the masked text serves both purposes. The mask token's id comes after all ids of the tokenizer.
    masked, labels = mask_tokens(tokens[:1], eot[:1], mask_id=tokenizer.vocab_size, vocab=tokenizer.vocab_size + 1, p=p,
                                 generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    sample = {"images": data.random_resized_crops(image, size, area, rng, 2),
              "tokens": torch.cat([masked, tokens[1:]]), "eot": eot, "labels": labels[0]}
    if colors:
        sample["colors"] = torch.stack([data.color_params(rng, **colors) for _ in range(2)])
    return sample


def declip_collate(samples):
    """data.collate, except that "places" [M] and "targets" [M] of pack_labels take the place of "labels" [B, L]."""
    batch = data.collate(samples)
    batch["places"], batch["targets"] = pack_labels(batch.pop("labels"), batch["tokens"].shape[-1])
    return batch


def neighbor_picture(path, model, tokenizer, dataset, queue, count=8):
    """Writes a picture to path: both crops of a few samples, the masked text under the first crop and the edited text
    under the second. After "->" stands the caption of the text's nearest row in the queue. nearest_neighbor_loss makes
    both crops match the nearest rows of both texts."""
    device = model.logit_scale.device
    places = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    batch = data.collate([dataset[i, 0] for i in places])
    images, tokens, eot = (batch[name].to(device).flatten(0, 1) for name in ("images", "tokens", "eot"))
    if "colors" in batch:
        images = (data.augment(images, batch["colors"].to(device).flatten(0, 1)) * 255).byte()
    blank = tokenizer.encode("_")[0]  # shown in place of the mask token, which the tokenizer does not know
    lines = []
    for row, end in zip(tokens.tolist(), eot.tolist()):
        lines.append(tokenizer.decode([i if i < tokenizer.vocab_size else blank for i in row[1:end]]))
    if queue:
        with torch.inference_mode():
            text_features = F.normalize(model.encode_text(tokens, eot).float(), dim=-1)
            found = queue.samples[queue.search(text_features)].tolist()
        own_samples = batch["index"].repeat_interleave(2).tolist()  # each sample has two texts
        for n, (i, own) in enumerate(zip(found, own_samples)):
            neighbor = dataset.captions(i)[0] if i >= 0 else "a random row"
            lines[n] += f"\n-> {neighbor}" + (" (its own)" if i == own else "")
    data.grid(list(images), lines, path)


RECIPES = {  # batch size of all ranks together, warm-up in steps; percentages are zero-shot ImageNet
    # toy and small are ours. toy does not change colours, because its captions name them.
    "toy": dict(
        model="tiny", batch_size=128, epochs=48, lr=5e-4, warmup=50, weight_decay=.1, augment="clip",
        eval="toy-tune,toy", eval_every=6),
    "small": dict(model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="declip"),
    # Batch size and the optimizer's values are clip.py's, so that the two scripts can be compared. Model and epochs are
    # those of the paper's ablation on CC3M, in which CLIP has 20.6 % and DeCLIP 27.2 %. We found no other value of that
    # ablation.
    "cc3m": dict(model="RN50", batch_size=1024, epochs=32, lr=1e-3, warmup=2000, weight_decay=.1, augment="declip"),
    # The authors publish no run on only CC12M. These are the values of yfcc15m with 32 epochs instead of 34.
    "cc12m": dict(
        model="ViT-B-32", batch_size=4096, epochs=32, lr=1e-3, warmup=2500, weight_decay=.1, augment="declip"),
    # All values are those of the released configurations, which reach 43.2 % with ViT-B-32 and 44.4 % with RN50. They
    # train in fp32 for 128,001 steps. These are 34 epochs, though the authors call them 32. On 88 M pairs the paper has
    # a batch of 10,240. There AdamW trains the ViT, and SGD trains RN50 and the text towers.
    "yfcc15m": dict(
        model="ViT-B-32", batch_size=4096, epochs=34, lr=1e-3, warmup=2500, weight_decay=.1, augment="declip"),
}


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    steps = fill_in(args, dataset, world, device)  # steps of an epoch
    total = steps * args.epochs
    args.image_size = args.image_size or MODELS[args.model].get("image_size", 224)
    if args.w_ssl and args.batch_size < 2 * world:
        raise SystemExit("--batch-size must be at least 2 a rank, because SimSiam's batch norm needs two rows; or give "
                         "--w-ssl 0")
    # a longer queue would still hold captions of the batch from the epoch before
    args.queue = min(args.queue, max(1, len(dataset) // 2))
    synonyms = read_synonyms(args.synonyms) if args.synonyms else None
    tokenizer = data.find_tokenizer(args.bpe, args.data, args.data_root)
    preprocess = data.Preprocess(args.image_size)
    dataset.transform = partial(declip_views, tokenizer=tokenizer, size=args.image_size, augment=args.augment,
                                p=.15 if args.w_mlm else 0., synonyms=synonyms)  # without mlm no word is masked
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    loader = data.loader(dataset, batches, args.workers, device)
    loader.collate_fn = declip_collate

    # model
    torch.manual_seed(args.seed)
    sizes = dict(quick_gelu=args.quick_gelu, ssl=bool(args.w_ssl), mlm=bool(args.w_mlm))  # what the weights do not tell
    model = build(args.model, DeCLIP, image_size=args.image_size, vocab=tokenizer.vocab_size + 1,
                  context=tokenizer.context, **sizes).to(device)
    queue = FeatureQueue(args.queue, model.text_projection.shape[1]).to(device) if args.w_nns else None
    about = describe(args, dataset, tokenizer, preprocess, sizes)
    saved = find_run(args, about, device)
    if args.init and not saved:
        state = evaluator.load_clip_state(args.init, args.quick_gelu, about["merges"])
        table = state["token_embedding.weight"]
        # the mask token, which is not in the file, starts as the mean of all other tokens
        state["token_embedding.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
        load_towers(model, state, args)
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    if isinstance(model.visual, ModifiedResNet):
        model.visual.to(memory_format=torch.channels_last)
    # OpenAI's values for ViTs, here for all towers; for ResNets OpenAI has betas (.9, .999) and eps 1e-8
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr, (.9, .98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    meter = Meter(args.out, args.batch_size, device)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)  # what is saved
    if args.w_nns:
        parts["queue"] = queue
    step, tested, best = 0, 0, -1.
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        step, tested, best = saved["step"], saved["tested"], saved["best"]
    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # statistics of batch norms
    augment = torch.compile(data.augment) if args.compile else data.augment
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graph at its buckets
        model.compile()
    parallel = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    # bf16 has the range of fp32. fp16 does not, so it needs a GradScaler, and large ViTs have diverged in it.
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    if rank == 0:
        start_log(args, saved, dataset, model, f"{total} steps on {world} x {device.type}")
        print("edited captions: words are swapped, dropped or replaced by synonyms" if synonyms else
              "edited captions: words are swapped or dropped; --synonyms would also replace some")
    saved = None  # gigabytes that nobody needs any more

    def save(name):
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(Path(args.out, name), **about, **states, step=step, tested=tested, best=best,
                            rng=torch.get_rng_state())

    def evaluate():
        """Tests the model if tests are due after this epoch and were not made before the run was killed."""
        nonlocal tested, best
        due = step % steps == 0 and (step // steps % args.eval_every == 0 or step == total)
        if not due or step == tested:
            return
        tests = args.eval.split(",") if args.eval else []
        results = evaluator.evaluate(model, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root)
        if rank == 0:
            neighbor_picture(Path(args.out, "neighbors.png"), model, tokenizer, dataset, queue)
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
                images, tokens, eot = (batch[name].to(device, non_blocking=True).transpose(0, 1)  # [2, B, ...]
                                       for name in ("images", "tokens", "eot"))
                places, targets, index = (batch[name].to(device, non_blocking=True)
                                          for name in ("places", "targets", "index"))
                if "colors" in batch:
                    colors = batch["colors"].to(device, non_blocking=True).transpose(0, 1)
                    images = augment(images.flatten(0, 1), colors.flatten(0, 1)).unflatten(0, (2, -1))
                statistics = torch.cat(running) if running else None  # put back if the gradient is not finite
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    image_views, text_views, logit_scale, siamese, logits = parallel(
                        preprocess.normalize(images), tokens, eot, places)
                clip = multi_view_clip_loss(image_views, text_views, logit_scale)
                nns = ssl = mlm = own = torch.zeros((), device=device)
                if args.w_nns:
                    found = queue.search(text_views.flatten(0, 1))  # [2B]; also for the log's own_neighbors
                    neighbors = queue.rows[found].unflatten(0, (2, -1))  # [2, B, D]
                    nns = nearest_neighbor_loss(image_views, neighbors, logit_scale)
                    # The share of texts whose nearest row is that of their own caption, from an earlier epoch. Such a
                    # row says nothing new about the picture. If the share grows, take a smaller --queue.
                    own = (queue.samples[found] == index.repeat(2)).float().mean()
                if args.w_ssl:
                    ssl = simsiam_loss(*siamese)
                if args.w_mlm:
                    mlm = mlm_loss(logits, targets)
                loss = args.w_clip * clip + args.w_nns * nns + args.w_ssl * ssl + args.w_mlm * mlm
                losses = {"loss": loss, "clip": clip, "nns": nns, "ssl": ssl, "mlm": mlm, "own_neighbors": own}

                # the step. If the gradient is not finite, the step is bad: weights, moments and statistics stay as they
                # are. DDP has averaged the gradient, so all ranks agree on that.
                lr = lr_at(step, total, args.warmup, args.lr, start=args.lr / 10)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                good = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).isfinite()
                # Fused AdamW skips the step, on the device, if found_inf is 1. GradScaler uses this for overflows of
                # fp16; here it stands for any bad step.
                optimizer.found_inf = 1 - good.float()
                optimizer.step()
                scaler.update()
                with torch.no_grad():
                    if running:
                        kept = torch.cat(running).where(good, statistics)
                        torch._foreach_copy_(running, kept.split([len(buffer) for buffer in running]))
                    # The released code lets logit_scale grow to 6, that is s = 403. Above s = 100 it clips s in its
                    # loss, but not in the gradient of logit_scale.
                    model.logit_scale.clamp_(3, math.log(100))  # a clamp in the forward pass would stop the gradient
                if args.w_nns:
                    for view in (1, 0):  # edited, then masked captions, as in the released code
                        queue.enqueue(text_views[view], index, good)
                step += 1

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
    add("--image-size", type=positive, help="side of the pictures in pixels (default: the model's)")
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
    add("--init", help="start from these weights: a checkpoint of ours, OpenAI's or open_clip's")
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
    add = parser.add_argument_group("DeCLIP").add_argument
    # These are the weights of the released code: .4 for the mean of four pairs of views is .1 for each. In the paper
    # the pair of the original picture and the original caption has .4, and the other three pairs have .2 together.
    add("--w-clip", type=float, default=.4, help="weight of clip, over all pairs of views (default: %(default)s)")
    add("--w-nns", type=float, default=.2, help="weight of nns, the nearest neighbours; 0: off (default: %(default)s)")
    add("--w-ssl", type=float, default=.2, help="weight of ssl, SimSiam; 0: off (default: %(default)s)")
    add("--w-mlm", type=float, default=.2, help="weight of mlm, the masked words; 0: off (default: %(default)s)")
    add("--queue", type=positive, default=65536,
        help="rows of the queue, two for each pair; cut to half the number of pairs (default: %(default)s)")
    add("--synonyms", help="file of lines word<TAB>synonym,synonym for the edited captions (default: none is replaced)")
    return parser.parse_args(argv)


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


def load_towers(model, state, args):
    """Loads state, the weights of two towers, into a model that may have other parts too. SystemExit if names or shapes
    differ."""
    own = {key: value.shape for key, value in model.state_dict().items() if key.split(".")[0] in evaluator.ENCODERS}
    if {key: value.shape for key, value in state.items()} != own:
        raise SystemExit(f"--init {args.init} is not a {args.model} of {args.image_size} pixels and "
                         f"{len(model.token_embedding.weight)} tokens")
    model.load_state_dict(state, strict=False)


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
