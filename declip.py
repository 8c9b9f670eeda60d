"""DeCLIP: supervision exists everywhere, so CLIP learns from fewer pairs.

The idea. A pair holds more than "this picture, this caption". Each picture is cropped and recoloured twice, each caption
written twice (some words masked; two words swapped, some dropped or one replaced), and the views teach each other: all four
combinations of a picture and a text are contrasted (MVS); each crop predicts the feature of the other crop (SimSiam); the
text tower guesses the masked words (MLM); and a picture is also to match the caption most similar to its own among recent
ones, which lie in a queue, for captions of other pictures describe it too (NNS). Only the two towers are kept for use; there
is no teacher and no momentum encoder.

The loss. Unit rows x_k of the two crops, y_v of the masked and the edited caption, n_v the row of the queue nearest to y_v:

    clip = mean over k, v of clip_loss(x_k, y_v)          nns = mean over k, v of cross-entropy(s x_k n_v^T), pictures only
    ssl  = -1/2 [ cos(p_1, const z_2) + cos(p_2, const z_1) ]      z = projector(feature, not unit), p = predictor(z)
    mlm  = cross-entropy of the masked words, read from the causal text tower before its projection
    L    = .4 clip + .2 nns + .2 ssl + .2 mlm

One scale s serves clip and nns. As a target z is held constant, and the predictor stands on one side only: SimSiam found
that without either all features become one. n is constant too: nns trains the image tower and s alone, and its negatives
are the neighbours of the batch's other captions, not the queue. Each step first searches the queue, then puts both texts
in, so a caption can meet its own row only from an earlier epoch; the log has their share (own_neighbors: such a neighbour
teaches nothing new; if it grows, take a smaller --queue). 65,536 rows are the last 8 batches of 4,096 pairs.

clip, nns and mlm of W ranks are those of one process with the whole batch: the queue holds the captions of all ranks and is
the same on each, mlm divides by the words masked on all ranks. ssl is not, nor RN50: batch norm has its rank's statistics.

What it brought (ImageNet, zero-shot). RN50: 60.4 % from 56 M pairs, where OpenAI's CLIP has 59.6 from 400 M, 7.1 times as
many; from 88 M 62.5, ViT-B-32 66.2 (CLIP 63.2). On YFCC15M-V2 (authors' benchmark; CLIP with weak crops alone): ViT-B-32
43.2, CLIP 32.8; RN50 44.4, 37.2. Paper, RN50 on CC3M: CLIP 20.6, with MVS 24.8, SimSiam and MLM too 25.4, NNS too 27.2;
CLIP with twice the epochs and batch, 1.3 times DeCLIP's GPU hours, 22.3. But MVS came with stronger augmentation; the
baseline that has it too is clip.py --augment declip with this file's model and settings (cc3m: --epochs 32 alone).

The cost. Twice CLIP's FLOPs, for each tower runs twice (the paper: 1.5 times its time); heads, queue and masked words
add 2 % of CLIP's (ViT-B-32). The released code needs more for the same loss: word logits at all 77 positions, though masked
ones alone count (a quarter of CLIP, and 6 GB for 128 pairs instead of .3), a queue on the CPU, words edited and cut into
tokens inside the step.

How to run.
    python declip.py                                                      drawn toy data, any machine, minutes
    torchrun --nproc_per_node=8 declip.py --data cc3m --synonyms synonyms.tsv --eval /imagenet/val
    python declip.py --w-nn 0 --w-ssl 0 --w-mlm 0 --out runs/views        CLIP on all pairs of views
The table of synonyms comes from WordNet's text files (wordnet.princeton.edu) by

    import collections, glob
    table = collections.defaultdict(set)
    for fields in (line.split() for path in glob.glob("dict/data.*") for line in open(path) if line[0] != " "):
        words = [word.split("(")[0].lower() for word in fields[4:4 + 2 * int(fields[3], 16):2]]
        for word in (word for word in words if len(word) > 2):  # "in", "he" and "as" are chemical elements
            table[word] |= {other for other in words if other != word and other.isalpha()}
    with open("synonyms.tsv", "w") as file:
        for word in filter(table.get, sorted(table)):
            print(word, ",".join(sorted(table[word])), sep=chr(9), file=file)

Where paper and released code part, and what this file does.
    - The paper's sum is (1 - a - b - c) CLIP + a (SimSiam + MLM) + b MVS + c NNS with a = b = c = .2 (1.2 in all): .4 for
      the pair of the originals, .2 for the other three pairs together. The released code gives each of the four .1, and .2
      to SimSiam, MLM and NNS; so do we. --w-clip --w-nn --w-ssl --w-mlm.
    - The paper's original text is the clean caption; the code's, and ours, the masked one (clean if --w-mlm is 0).
    - Also as released: a ViT's patch embedding stays random, nns is asked of pictures alone, the queue holds both texts, the
      text tower stays causal, so that mlm sees only what is to the left.
    - Released: a queue of 65,536 rows for each rank (256 steps of its own 128 pairs, two texts each), on the CPU, not
      saved; mlm is the mean of the ranks' means. Ours: one queue, saved; one mean.
    - Released: logit_scale starts at ln(1/.07), is moved to [3, 6] at each optimizer step (s is 14.3 in the first forward
      pass, 20.1 in the second); where s is above 100 the loss is that of 100, but logit_scale's gradient has s. Ours:
      starts at 3, stays in [3, ln 100].
    - Released: WordNet with lemmas, phrases and a list of stop words, by textaugment. Ours: a table of single words; without
      one, swaps and deletions alone. Of several captions of a picture: theirs takes the first, ours any.
    - Broken in the released code: a random word may be an end token, and the text is then read there (ours are ids below
      the start token); mlm is nan where no word is masked (ours 0); a batch that crosses the queue's end loses its rest
      (ours goes on at the start). These raise errors: RN50 with synchronised batch norm, fp16, several neighbours (ours:
      one).
    - Towers and AdamW are clip.py's (GELU for QuickGELU; OpenAI's mean; no bias in the text projection; eps 1e-6; no
      decay of the class token and in_proj_bias, which their rule by kinds of layer overlooks). The mask token is the
      last row of the embedding: CLIP and open_clip expect token_embedding.weight[:-1]. (Theirs lies below start and end
      token, since the largest id marks the end; here the end is found before masking. Padding is id 0, a word, and
      never masked.)

Sources: Li et al. 2022 (arXiv 2110.05208), Cui et al. 2022 (arXiv 2203.05796), github.com/Sense-GVT/DeCLIP at 5d99a85.
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


def multi_view_clip_loss(image_views, text_views, logit_scale):
    """Mean of clip_loss over all pairs of an image view and a text view (section 3.3, multi-view supervision).

    image_views, text_views: unit rows [2, B, D]; logit_scale: the factor. Returns a scalar in at least fp32. The mean over
    ranks is the loss of the whole batch. The four pairs count alike, as in the released prototype/solver/declip_solver.py.
    """
    with torch.autocast(image_views.device.type, enabled=False):
        x, y = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (image_views, text_views))
        all_x, all_y = gather(torch.cat([x, y]).transpose(0, 1)).transpose(0, 1).chunk(2)  # [2, N, D] each
        rank = dist.get_rank() if all_x.shape[1] > x.shape[1] else 0
        labels = torch.arange(x.shape[1], device=x.device) + rank * x.shape[1]  # where the own pairs stand among the N
        return sum(F.cross_entropy(logit_scale * x[k] @ all_y[v].T, labels)  # [B, N]
                   + F.cross_entropy(logit_scale * y[v] @ all_x[k].T, labels) for k in (0, 1) for v in (0, 1)) / 8


def nearest_neighbor_loss(image_views, neighbors, logit_scale):
    """Cross-entropy of each picture over N neighbours, one a caption; its label is the neighbour of its own caption. Mean over
    all pairs of views (section 3.3, nearest-neighbor supervision; released: prototype/solver/declip_solver.py, which asks
    pictures alone, too). Neighbours get no gradient.

    image_views: unit rows [2, B, D]; neighbors: unit rows [2, B, D], of each text view; logit_scale: the factor. Returns a
    scalar in at least fp32. The mean over ranks is the loss of the whole batch.
    """
    with torch.autocast(image_views.device.type, enabled=False):
        dtype = torch.promote_types(image_views.dtype, torch.float32)
        x, y = image_views.to(dtype), neighbors.detach().to(dtype)
        y = gather(y.transpose(0, 1)).transpose(0, 1)  # [2, N, D]
        rank = dist.get_rank() if y.shape[1] > x.shape[1] else 0
        labels = torch.arange(x.shape[1], device=x.device) + rank * x.shape[1]
        return sum(F.cross_entropy(logit_scale * x[k] @ y[v].T, labels) for k in (0, 1) for v in (0, 1)) / 4  # of [B, N] each


class FeatureQueue:
    """The last `size` rows that were enqueued on all ranks, the same on all (section 3.3). Random unit rows until it is
    full. Plain tensors, since DDP would broadcast buffers at each step; vars(queue) is its state."""

    def __init__(self, size, dim, device=None):
        generator = torch.Generator().manual_seed(0)
        self.rows = F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(device)  # [size, D]
        self.samples = torch.full((size,), -1, device=device)  # whose row it is: a number that enqueue was given
        self.pointer = torch.zeros((), dtype=torch.int64, device=device)  # where the oldest row is, the next to go

    @torch.no_grad()
    def search(self, x):
        """Places [n] in the queue of the rows with the largest inner product with x [n, D]."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, self.rows.dtype)
            return (x.to(dtype) @ self.rows.to(dtype).T).argmax(1)

    def nearest(self, x):
        """The rows [n, D] nearest to x [n, D], without gradient."""
        return self.rows[self.search(x)]

    @torch.no_grad()
    def enqueue(self, x, samples=None, good=True):
        """Puts the unit rows x [B, D] of all ranks in place of the oldest. samples: int64 [B]; good: bool, may be a tensor on
        the device; if false nothing changes. Query first: a caption just enqueued is its own nearest."""
        size, good = len(self.rows), torch.as_tensor(good, device=x.device)
        if samples is None:
            samples = self.samples.new_full((len(x),), -1)
        x, samples = gather(x)[-size:], gather(samples)[-size:]
        self.rows = self.rows.to(torch.promote_types(self.rows.dtype, x.dtype))  # float64 stays float64
        place = (self.pointer + torch.arange(len(x), device=x.device)) % size
        self.rows[place] = x.to(self.rows.dtype).where(good, self.rows[place])
        self.samples[place] = samples.where(good, self.samples[place])
        self.pointer.add_(good * len(x)).remainder_(size)


def simsiam_loss(p1, p2, z1, z2):
    """-1/2 [cos(p1, z2) + cos(p2, z1)], mean over rows, in [-1, 1], z held constant (Chen & He 2021, algorithm 1).
    All [B, d], not normalised; predictions p and projections z of two views. At least fp32."""
    with torch.autocast(p1.device.type, enabled=False):
        p1, p2, z1, z2 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p1, p2, z1.detach(), z2.detach()))
        return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2


class SimSiam(nn.Module):
    """Projector and predictor: x [B, D], the image tower's output, not of unit norm -> p, z [B, hidden]. Sizes of the released
    prototype/model/declip.py (Chen & He: 2,048 wide, fed by the backbone, last batch norm without scale and shift, predictor at a
    constant lr). Batch norm has the statistics of this rank and of one view, so call it once for each view."""

    def __init__(self, dim, hidden=1024, bottleneck=512):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden))
        self.predictor = nn.Sequential(
            nn.Linear(hidden, bottleneck), nn.BatchNorm1d(bottleneck), nn.ReLU(inplace=True), nn.Linear(bottleneck, hidden))

    def forward(self, x):
        z = self.projector(x)
        return self.predictor(z), z


def mask_tokens(tokens, eot, mask_id, vocab, p=.15, generator=None):
    """BERT's masking (Devlin et al. 2019, section 3.1): each word is chosen with probability p; of those chosen 80 % become
    mask_id, 10 % a random word, 10 % stay. Released: prototype/model/utils/text_utils/mask_tokens.py.

    tokens [B, L]: start token, words, end token at eot [B], padding; only words are chosen. Random words are ids below
    vocab, mask_id and the start token, so that none is an end token. Returns masked [B, L] and labels [B, L]: the
    original id where chosen, else -100.
    """
    choice, kind, word = torch.rand(3, *tokens.shape, device=tokens.device, generator=generator)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    chosen = (choice < p) & (place > 0) & (place < eot[:, None]) & (tokens != mask_id)
    limit = tokens[:, :1].clamp(max=min(vocab, mask_id))  # column 0 is the start token
    word = (word * limit).long()
    masked = torch.where(kind < .8, mask_id, torch.where(kind < .9, word, tokens))
    return masked.where(chosen, tokens), tokens.where(chosen, -100)


def pack_labels(labels, length):
    """Where words are masked: labels [B, L] of mask_tokens -> places [M] in the flattened [B, length] (length: of the tokens
    after cutting) and targets [M], so that the head reads no other positions. Padded with place 0 and target -100, which
    counts for nothing, to a multiple of B: few shapes. On the host: a device would have to be waited for."""
    row, column = (labels != -100).nonzero(as_tuple=True)
    padding = 0, -len(row) % len(labels)
    return F.pad(row * length + column, padding), F.pad(labels[row, column], padding, value=-100)


def mlm_loss(logits, targets):
    """Cross-entropy of logits [M, V] over the targets [M] of all ranks that are not -100; 0 if there is none. At least fp32.
    The mean over ranks is the mean over all these targets, however unevenly the ranks hold them."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = gather((targets != -100).sum()[None])  # [W]
        return F.cross_entropy(logits, targets, reduction="sum") * len(counts) / counts.sum().clamp(min=1)


def eda(caption, rng, synonyms=None):
    """A caption with one kind of change, each as likely: two words swapped; each word dropped with probability .1; all
    occurrences of a word replaced by a synonym (Wei & Zou 2019, who also insert words and change a tenth of a caption; released:
    textaugment with n = 1).

    rng: random.Random. synonyms: {lower-case word: list of synonyms}; without it the first two. One word is left at least.
    """
    words = caption.split()
    change = rng.choice(("swap", "delete", "replace") if synonyms else ("swap", "delete"))
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


class DeCLIP(CLIP):
    """CLIP with the two heads; ssl, mlm: whether to build them. The last row of the token embedding is the mask token."""

    def __init__(self, ssl=True, mlm=True, **sizes):
        super().__init__(**sizes)
        self.simsiam = SimSiam(sizes["embed_dim"]) if ssl else None
        self.mlm_head = nn.Linear(sizes["text_width"], sizes["vocab"]) if mlm else None  # not tied to the embedding
        self.batched_views = isinstance(self.visual, VisionTransformer)  # a ResNet's batch norm would mix the views
        if self.batched_views:
            self.visual.conv1.requires_grad_(False)  # stays random, which MoCo v3 found more stable (released: so in every ViT)
        nn.init.constant_(self.logit_scale, 3.)  # the least that training allows

    def forward(self, images, tokens, eot, places=None):
        """images [2, B, 3, S, S], tokens [2, B, L] (masked, edited), eot [2, B], places [M] in the flattened masked [B, L]
        -> unit image_views [2, B, D], unit text_views [2, B, D], logit_scale (the factor), what simsiam_loss takes, logits
        of the masked words [M, V]; None for a head that was not built."""
        x = (self.encode_image(images.flatten(0, 1)).unflatten(0, (2, -1)) if self.batched_views else
             torch.stack([self.encode_image(view) for view in images]))  # [2, B, D]
        hidden = self.text_tokens(tokens.flatten(0, 1))  # [2B, L, C]
        y = (hidden[torch.arange(len(hidden), device=hidden.device), eot.flatten()] @ self.text_projection).unflatten(0, (2, -1))
        image_views, text_views = (F.normalize(f.to(torch.promote_types(f.dtype, torch.float32)), dim=-1) for f in (x, y))
        ssl = mlm = None
        if self.simsiam:
            (p1, z1), (p2, z2) = self.simsiam(x[0]), self.simsiam(x[1])
            ssl = p1, p2, z1, z2
        if self.mlm_head:
            mlm = self.mlm_head(hidden[:tokens.shape[1]].flatten(0, 1)[places])
        return image_views, text_views, self.logit_scale.exp(), ssl, mlm


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


def read_synonyms(path):
    """{word: list of synonyms} of a text file of lines word<TAB>synonym,synonym; SystemExit if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
        return {word.lower(): synonyms.split(",") for word, synonyms in rows}
    except (OSError, ValueError) as error:
        raise SystemExit(f"--synonyms {path} is no file of lines word<TAB>synonym,synonym ({error})") from None


def declip_views(image, caption, rng, tokenizer, size, augment, p, synonyms):
    """One sample in the worker: image bytes and a caption -> two crops, uint8 [2, 3, S, S], their colour parameters [2, 8],
    tokens [2, L] of the masked (p: share of the words) and the edited caption, their end tokens' places eot [2], and the
    labels [L] of the masked words. The places are found before masking: the mask token has the largest id."""
    area, colors = AUGMENT[augment]
    tokens = tokenizer([caption, eda(caption, rng, synonyms)])
    eot = tokens.argmax(-1)
    masked, labels = mask_tokens(tokens[:1], eot[:1], tokenizer.vocab_size, tokenizer.sot, p,
                                 torch.Generator().manual_seed(rng.getrandbits(63)))
    sample = {"images": torch.stack([data.random_resized_crop(image, size, area, rng) for _ in range(2)]),
              "tokens": torch.cat([masked, tokens[1:]]), "eot": eot, "labels": labels[0]}
    return sample | {"colors": torch.stack([data.color_params(rng, **colors) for _ in range(2)])} if colors else sample


def neighbor_picture(path, model, tokenizer, dataset, queue, count=8):
    """Writes both crops of a few samples, one over the masked and one over the edited caption, and under each ("->") the
    caption whose row in the queue is nearest: what the picture is taught to match by nearest_neighbor_loss."""
    device = model.logit_scale.device
    samples = data.default_collate([dataset[i, 0] for i in range(0, len(dataset), max(1, len(dataset) // count))][:count])
    images, tokens, eot = (samples[name].to(device).flatten(0, 1) for name in ("images", "tokens", "eot"))  # [2 count, ...]
    if "colors" in samples:
        images = (data.augment(images, samples["colors"].to(device).flatten(0, 1)) * 255).byte()
    blank, = tokenizer.encode("_")  # for the mask token, which the tokenizer does not know
    lines = [tokenizer.decode([i if i < tokenizer.vocab_size else blank for i in row[1:end]])
             for row, end in zip(tokens.tolist(), eot.tolist())]
    if queue:
        with torch.inference_mode():
            found = queue.samples[queue.search(F.normalize(model.encode_text(tokens, eot).float(), dim=-1))].tolist()
        own = samples["index"].repeat_interleave(2).tolist()
        lines = [f"{line}\n-> {'random' if i < 0 else dataset.captions(i)[0]}" + " (its own)" * (i == j)
                 for line, i, j in zip(lines, found, own)]
    data.grid(list(images), lines, path)


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
    # ours: one epoch, since it has the views of two (32 % of the unseen kinds are named, 27 % after two: one seed); crops alone,
    # since the captions name colours
    "toy": dict(model="tiny", batch_size=128, epochs=1, lr=5e-4, warmup=50, weight_decay=.1, augment="clip", eval="toy"),
    "small": dict(model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="declip"),  # ours
    # the optimiser of clip.py, so that the two compare; 32 epochs as in the paper's ablation on CC3M (RN50: 20.6 -> 27.2), whose
    # batch and other values are not in the code
    "cc3m": dict(model="RN50", batch_size=1024, epochs=32, lr=1e-3, warmup=2000, weight_decay=.1, augment="declip"),
    # no source trains on it: the values of yfcc15m
    "cc12m": dict(model="ViT-B-32", batch_size=4096, epochs=32, lr=1e-3, warmup=2500, weight_decay=.1, augment="declip"),
    # all released (in fp32, lr from 1e-4): 128,001 steps (34 epochs, called 32), 43.2 % with ViT-B-32, 44.4 % with RN50. The paper's runs
    # on 88 M pairs: batch 10,240, SGD for RN50 and for the text tower, AdamW for the ViT
    "yfcc15m": dict(model="ViT-B-32", batch_size=4096, epochs=34, lr=1e-3, warmup=2500, weight_decay=.1, augment="declip"),
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
    add = parser.add_argument_group("DeCLIP").add_argument
    add("--w-clip", type=float, default=.4, help="weight of the contrast over all views (default: %(default)s)")
    add("--w-nn", type=float, default=.2, help="of the nearest neighbours; 0 takes a part out (default: %(default)s)")
    add("--w-ssl", type=float, default=.2, help="of SimSiam (default: %(default)s)")
    add("--w-mlm", type=float, default=.2, help="of the masked words (default: %(default)s)")
    add("--queue", type=positive, default=65536, help="rows of the queue, two a pair; at most half the pairs (default: %(default)s)")
    add("--synonyms", help="file of lines word<TAB>synonym,synonym for the edited captions (default: swaps and deletions alone)")
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
    args.queue = min(args.queue, len(dataset) // 2)
    synonyms = read_synonyms(args.synonyms) if args.synonyms else None
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
    dataset.transform = partial(declip_views, tokenizer=tokenizer, size=args.image_size, augment=args.augment,
                                p=.15 if args.w_mlm else 0., synonyms=synonyms)
    loader = data.loader(dataset, batches, args.workers, device)
    sizes = dict(image_size=args.image_size, vocab=tokenizer.vocab_size + 1, context=tokenizer.context, quick_gelu=args.quick_gelu)
    heads = dict(ssl=bool(args.w_ssl), mlm=bool(args.w_mlm))
    model = build(args.model, DeCLIP, **sizes, **heads).to(device)
    queue = FeatureQueue(args.queue, model.text_projection.shape[1], device) if args.w_nn else None
    if args.init and not saved:
        state = load_clip_state(args.init, args.quick_gelu, merges)
        mask = model.token_embedding.weight[-1:].detach().cpu()  # towers have none
        state["token_embedding.weight"] = torch.cat([state["token_embedding.weight"], mask])
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
        if queue:
            vars(queue).update({name: value.to(device) for name, value in saved["queue"].items()})
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
        print("edited captions: words are swapped or dropped" + (f" or replaced, table of {len(synonyms)}" if synonyms else ""))
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
                            rng=torch.get_rng_state(), sizes=dict(quick_gelu=args.quick_gelu, **heads), preprocess=vars(preprocess),
                            queue=queue and vars(queue),
                            pairs=len(dataset), merges=merges, context=tokenizer.context)

    def evaluate():
        """After an epoch whose tests are due, or in a run that was killed before them."""
        nonlocal tested, best
        if step % steps or step == tested or (step // steps % args.eval_every and step < total):
            return
        results = evaluator.evaluate(model, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root) if tests else {}
        if rank == 0:
            neighbor_picture(out / "neighbors.png", model, tokenizer, dataset, queue)
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
            images, tokens, eot = (batch[name].to(device, non_blocking=True).transpose(0, 1)  # [2, B, ...]
                                   for name in ("images", "tokens", "eot"))
            places, targets, index = (x.to(device, non_blocking=True)
                                      for x in (*pack_labels(batch["labels"], tokens.shape[2]), batch["index"]))
            if "colors" in batch:
                colors = batch["colors"].to(device, non_blocking=True).transpose(0, 1)
                images = data.augment(images.flatten(0, 1), colors.flatten(0, 1)).unflatten(0, (2, -1))
            statistics = [buffer.clone() for buffer in model.buffers()]  # of batch norms
            with torch.autocast(device.type, amp, enabled=amp is not None):
                image_views, text_views, logit_scale, siamese, logits = parallel(
                    preprocess.normalize(images), tokens, eot, places)
            clip = multi_view_clip_loss(image_views, text_views, logit_scale)
            nns = ssl = mlm = own = torch.zeros((), device=device)
            if queue:
                found = queue.search(text_views.flatten(0, 1))  # [2B]
                nns = nearest_neighbor_loss(image_views, queue.rows[found].unflatten(0, (2, -1)), logit_scale)
                own = (queue.samples[found] == index.repeat(2)).float().mean()  # share that is the sample itself
            if args.w_ssl:
                ssl = simsiam_loss(*siamese)
            if args.w_mlm:
                mlm = mlm_loss(logits, targets)
            loss = args.w_clip * clip + args.w_nn * nns + args.w_ssl * ssl + args.w_mlm * mlm
            losses = {"loss": loss, "clip": clip, "nn": nns, "ssl": ssl, "mlm": mlm, "own_neighbors": own}

            # the step; where the gradient (of all ranks, DDP has averaged it) is not finite, everything stays as it was
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup, args.lr, start=args.lr / 10)
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
                model.logit_scale.clamp_(3, math.log(100))  # the parameter: clamping its exp would end its gradient at the bound
            if queue:
                for view in (1, 0):  # edited, then masked captions, as released
                    queue.enqueue(text_views[view], index, good)
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
