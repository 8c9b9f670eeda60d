"""ProtoCLIP: CLIP that also learns clusters. Clusters of one modality, found by K-means, teach the other.

The idea. CLIP pushes a picture away from every caption but its own, even if both show a dog. ProtoCLIP adds a task
about clusters of pairs. It trains in episodes of m random pairs, with two passes over each episode. The first pass only
extracts features; K-means then finds K = m/10 clusters of pictures and K of captions. The second pass trains. Beside
CLIP's task, each picture must tell the cluster of its caption, and each caption that of its picture. For this a picture
is compared not with captions, but with the mean picture of each cluster of captions, so the modalities need not lie in
one place. This is prototypical back translation. An external teacher, such as a language model, may add its own
clusters.

The loss. The student is the modality that learns; the teacher is the other modality or the external teacher. h_i is the
student's unit feature of pair i, behind a projection head. t_i is the teacher's cluster of pair i, and C_k is the
teacher's centroid of cluster k. r = exp(logit_scale_proto) is a second learned scale. tau is --target-temperature.

    D_k  = mean of the extracted h_i with t_i = k        the student's centroids
    q_tk = softmax over k of <C_t, C_k> / tau            the soft targets of cluster t
    T_t  = sum_k q_tk D_k                                for the external teacher T = D
    P(student; teacher) = mean_i [ log sum_k exp(r <h_i, D_k>) - r <h_i, T_(t_i)> ]
    L = L_clip + w_proto/2 [P(image; text) + P(text; image)]
               + w_external/2 [P(image; external) + P(text; external)]

P is the cross-entropy of the logits r <h_i, D_k> with the targets q of cluster t_i. D, T and t come from the first pass
and are constants of the second.

What it costs and brings. The first pass adds 33 % to the FLOPs, and each pair is decoded twice. On one GPU the authors'
runs took 1.8 times CLIP's time. On 2.5 M pairs of CC3M, with RoBERTa as external teacher, they report 21.5 % zero-shot
on ImageNet (CLIP: 19.5). Their CLIP had weaker augmentation; --w-proto 0 is the fair baseline. In small runs here
ProtoCLIP with --teacher-features captions reaches CLIP's recall in .35 to .75 of the time.

How to run. tests/RESULTS.md says how to make roberta.npy.
    python protoclip.py                                                       built-in pictures, minutes
    torchrun --nproc_per_node=8 protoclip.py --data cc3m --teacher-features roberta.npy
    torchrun --nproc_per_node=8 protoclip.py --data cc3m --w-proto 0 --out runs/baseline   CLIP on the same pictures

Sources: Chen et al. 2023 (arXiv 2206.10996), github.com/megvii-research/protoclip. "The authors" are their README and
code; the paper's body was not at hand.
"""
import argparse
import json
import math
import os
import signal
import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
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


# prototypes

def sample_episode(seed, episode, size, length):
    """Numbers of the pairs of an episode: int64 [size], drawn evenly from range(length), with replacement. They depend
    on the arguments only, so they are the same on all ranks and after a restart. The released code (training/data.py)
    draws them from NumPy's global generator, whose state it does not save."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + episode)  # different for each seed and episode
    return torch.randint(length, (size,), generator=generator)


@torch.no_grad()
def kmeans(x, k, iters=20, restarts=3, seed=0):
    """K-means by Lloyd's algorithm, with the rules of faiss.Kmeans, which the released code calls
    (training/clustering.py). The random draws are ours. Distances are Euclidean. Centroids are plain means, also of
    unit rows. Equal captions make equal rows, so a cluster can run empty. It then moves beside another cluster, which
    is drawn with a probability proportional to its count less one. The restart with the smallest objective counts.

    x: rows [n, d] of this rank. On rank r they are the rows r, r + W, ... of the whole. All ranks call it. They
    exchange the k rows to start from, and the sums over each cluster in float64. The released code clusters on rank 0.
    Returns the labels [n] of these rows, the centroids [k, d], and the objective, a float: the sum over all rows of the
    squared distance to the nearest centroid. ValueError if there are fewer than k rows in all.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parallel = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    split = (1 - torch.arange(x.shape[1], device=x.device) % 2 * 2) / 1024  # 1/1024, -1/1024, 1/1024, ...

    def total(sums):
        if parallel:
            dist.all_reduce(sums)
        return sums

    def nearest(centroids):  # -> labels [n], squared distances [n]
        norms = centroids.square().sum(1)
        with torch.autocast(x.device.type, enabled=False):  # |x|^2 is left out of |x - c|^2: it is the same for all c
            labels = torch.cat([torch.addmm(norms, part, centroids.T, alpha=-2).argmin(1) for part in x.split(4096)])
        return labels, (x - centroids[labels]).square().sum(1)

    rows = int(total(torch.tensor(len(x), device=x.device)))  # of all ranks
    if k > rows:
        raise ValueError(f"{rows} rows cannot make {k} clusters")
    best = None
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed + restart)  # the same on all ranks
        picked = torch.randperm(rows, generator=generator)[:k].to(x.device)  # rows to start from
        mine = picked % world == rank  # row p of the whole is row p // W of rank p % W
        centroids, last = x.new_zeros(k, x.shape[1]), None
        centroids[mine] = x[picked[mine] // world]
        total(centroids)  # each centroid is 0 on all ranks but one
        for _ in range(iters):
            labels, distances = nearest(centroids)
            columns = torch.cat([x, x.new_ones(len(x), 1), distances[:, None]], 1).double()  # [n, d+2]
            sums = total(columns.new_zeros(k, columns.shape[1]).index_add_(0, labels, columns))  # [k, d+2]
            count, objective = sums[:, -2], sums[:, -1].sum().item()
            if objective == last:  # converged
                break
            last, centroids = objective, (sums[:, :-2] / count.clamp(min=1)[:, None]).to(x.dtype)
            empty = (count == 0).nonzero()[:, 0]
            if len(empty):  # each takes the centroid of another cluster, and the two move a little apart
                spare = (count - 1).clamp(min=0).cpu()
                few = int((spare > 0).sum()) < len(empty)  # then one donor may serve several
                donors = torch.multinomial(spare, len(empty), replacement=few, generator=generator).to(x.device)
                centroids[empty] = centroids[donors] * (1 + split)
                centroids[donors] = centroids[donors] * (1 - split)
        labels, distances = nearest(centroids)
        objective = total(distances.double().sum()).item()
        # faiss compares restarts by the objective before the last update of the centroids.
        if best is None or objective < best[2]:
            best = labels, centroids, objective
    return best


@torch.no_grad()
def cluster_means(x, labels, k):
    """Prototypical back translation: the mean of a student's rows in each of a teacher's clusters (released code:
    training/clustering.py).

    x: rows [n, d] of this rank. labels [n] in range(k): their clusters. Returns the means [k, d] over the rows of all
    ranks, not of unit norm. The mean of an empty cluster is 0, and so is its logit in proto_loss.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    columns = torch.cat([x, x.new_ones(len(x), 1)], 1).double()  # [n, d+1]
    sums = columns.new_zeros(k, columns.shape[1]).index_add_(0, labels, columns)  # [k, d+1], the last column counts
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).to(x.dtype)


@torch.no_grad()
def expected_target(teacher_centroids, student_centroids, temperature):
    """Targets T [k, d] of a teacher's clusters. Row t is the mean of the student's centroids D [k, d] with the weights
    q_t, row t of softmax(C C^T / temperature). C [k, e] are the teacher's centroids. Neither C nor D has unit norm.

    At temperature .01 the target of a cluster is close to the student's centroid of that cluster. Where clusters of the
    teacher lie close together, perhaps because K-means has cut one group, their targets are mixtures. A temperature
    <= 0 gives hard targets, T = D. The released code (training/loss.py) makes the weights in every step.
    """
    with torch.autocast(student_centroids.device.type, enabled=False):
        C, D = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (teacher_centroids, student_centroids))
        if temperature <= 0:
            return D
        return torch.cat([(rows @ C.T / temperature).softmax(1) @ D for rows in C.split(4096)])


def proto_loss(features, student_centroids, target, labels, logit_scale):
    """P of this file's docstring: cross-entropy of a student's features over its centroids, with soft targets.

    features: unit rows [B, d]. student_centroids [k, d]: D. target [k, d]: T, of expected_target. labels [B]: the
    teacher's cluster of each row. logit_scale: the factor r itself, not its log. Returns a scalar in at least fp32,
    also under autocast. If all logits are equal, it is ln k. Each row is compared with constants only, so no rank needs
    the features of another, and the mean over ranks is the loss of the whole batch. The released code
    (training/loss.py) gathers the features without gradient, and each rank scores all of them.
    """
    with torch.autocast(features.device.type, enabled=False):
        h, D, T = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (features, student_centroids, target))
        # the cross-entropy is linear in the targets: sum_k q_tk <h, D_k> = <h, T_t>
        return ((logit_scale * h @ D.T).logsumexp(1) - logit_scale * (h * T[labels]).sum(1)).mean()


def projection_head(dim, hidden, out):
    """The projection head behind a tower, with the layers of the released code (open_clip/model.py): [B, dim] ->
    [B, out], not of unit norm. Its batch norm uses the statistics of its own rank, as there."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def caption_features(ids, vocab, dim=64):
    """Features of captions for an external teacher that needs no model: TF-IDF of the tokens in rows of unit norm,
    reduced to dim columns by a randomised SVD. This teacher is ours; the authors have RoBERTa.

    ids: a list of M lists of token ids below vocab. Returns float32 [M, dim], not of unit norm, with fewer columns
    if M or vocab is less.
    """
    row = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(caption) for caption in ids]))
    token = torch.tensor([token for caption in ids for token in caption], dtype=torch.int64)
    shape, ones = (len(ids), vocab), torch.ones(len(row))
    counts = torch.sparse_coo_tensor(torch.stack([row, token]), ones, shape, check_invariants=True).coalesce()
    row, token = counts.indices()  # now each token of a caption once
    weight = counts.values() * torch.log(len(ids) / token.bincount(minlength=vocab)[token])  # tf * log(M / df)
    norm = torch.zeros(len(ids)).index_add_(0, row, weight.square()).sqrt()
    tfidf = torch.sparse_coo_tensor(counts.indices(), weight / norm[row].clamp(min=1e-12), shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(tfidf, min(dim, len(ids), vocab))
    return u * s


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


class ProtoCLIP(CLIP):
    """CLIP with a projection head behind each tower, and with a second scale, r = exp(logit_scale_proto), for
    proto_loss. Only training uses them. The two heads start equal, as in the released code."""

    def __init__(self, embed_dim, proj_hidden=2048, proj_dim=128, **sizes):
        super().__init__(embed_dim, **sizes)
        self.image_head, self.text_head = (projection_head(embed_dim, proj_hidden, proj_dim) for _ in range(2))
        self.image_head.load_state_dict(self.text_head.state_dict())
        self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def forward(self, images, tokens):
        """Images [B, 3, S, S], tokens [B, L] -> unit rows image_features and text_features [B, D], unit rows h_image
        and h_text [B, d] behind the heads, and the factors s and r. What enters the heads is not of unit norm."""
        x, y = self.encode_image(images), self.encode_text(tokens)
        image_features, text_features, h_image, h_text = (
            F.normalize(f.to(torch.promote_types(f.dtype, torch.float32)), dim=-1)
            for f in (x, y, self.image_head(x), self.text_head(y)))
        return image_features, text_features, h_image, h_text, self.logit_scale.exp(), self.logit_scale_proto.exp()


# episodes

def plan_episodes(pairs, batch_size, epochs, episode_size, prototypes, warmup):
    """Returns the size m of an episode, the number K of prototypes, the steps of an episode and the steps of the run.
    m is at most the number of pairs, and a multiple of the batch size. K is at most m / 10. The run has as many
    episodes as come nearest to its epochs, at least one. SystemExit if K would be 0, or if the warm-up is no shorter
    than the run."""
    # The authors also cluster an incomplete last batch, on which they do not train.
    episode_size = min(episode_size, pairs) // batch_size * batch_size
    prototypes = min(prototypes, episode_size // 10)
    if not prototypes:
        raise SystemExit(f"--episode-size: {episode_size} pairs in whole batches of {batch_size} are too few, because "
                         "a prototype needs 10; raise --episode-size, or lower --batch-size")
    steps = episode_size // batch_size
    total = steps * max(1, round(epochs * (pairs // batch_size) / steps))
    if warmup >= total:
        raise SystemExit(f"the run has {total} steps in episodes of {steps}: too few for --warmup {warmup}; lower "
                         "--warmup or raise --epochs")
    return episode_size, prototypes, steps, total


class Episode(nn.Module):
    """The constants of an episode of m pairs, as buffers, so that they join the checkpoint. The module stands outside
    DDP, which would broadcast them in each step.

    Places 0 to m - 1 number the pairs of the episode in the order in which training takes them. A pair that is drawn
    twice has two places. The loss has 2 terms, or 4 with an external teacher. In term 0 the text teaches the image, in
    term 1 the image the text; in terms 2 and 3 the external teacher teaches image and text.

    samples [m]: the number in the data set of the pair at each place. labels [terms, m]: the teacher's cluster of each
    place. centroids, targets [terms, K, d]: D and T of each term.
    """

    def __init__(self, size, prototypes, dim, external=False):
        super().__init__()
        terms = 4 if external else 2
        self.register_buffer("samples", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("labels", torch.zeros(terms, size, dtype=torch.int64))
        # before the first clustering all centroids are 0: the loss is ln K, and features get no gradient
        self.register_buffer("centroids", torch.zeros(terms, prototypes, dim))
        self.register_buffer("targets", torch.zeros(terms, prototypes, dim))

    @torch.no_grad()
    def find_prototypes(self, h_image, h_text, samples, teacher, iters, restarts, temperature, seed):
        """Clusters the pairs of an episode and fills the buffers, which become equal on all ranks.

        h_image, h_text [m/W, d], samples [m/W]: of this rank, as extract_features returns them. teacher: None, or the
        external teacher's features of all M pairs of the data set, an array [M, any]. iters, restarts and seed go to
        kmeans, temperature goes to expected_target. Returns a dict for the log: the seconds of clustering, and for each
        modality the mean squared distance to the nearest centroid.
        """
        start, k, m = time.perf_counter(), self.centroids.shape[1], len(self.samples)
        with evaluator.full_fp32():
            by_image, C_image, image_objective = kmeans(h_image, k, iters, restarts, seed)
            by_text, C_text, text_objective = kmeans(h_text, k, iters, restarts, seed)
            # of each term: the student's features, the teacher's labels and centroids, tau
            terms = [(h_image, by_text, C_text, temperature), (h_text, by_image, C_image, temperature)]
            if teacher is not None:
                features = torch.from_numpy(teacher[samples.cpu().numpy()]).to(h_image.device, torch.float32)
                by_external, C_external, _ = kmeans(features.nan_to_num(0, 0, 0), k, iters, restarts, seed)
                terms += [(h_image, by_external, C_external, 0), (h_text, by_external, C_external, 0)]  # hard targets
            for i, (h, labels, C, tau) in enumerate(terms):
                self.centroids[i] = cluster_means(h, labels, k)
                self.targets[i] = expected_target(C, self.centroids[i], tau)
        columns = gather(torch.stack([samples, *(labels for _, labels, _, _ in terms)])[None])  # [W, 1 + terms, m/W]
        columns = columns.permute(1, 2, 0).flatten(1)  # [1 + terms, m]: column j of rank r is place j W + r
        self.samples.copy_(columns[0])
        self.labels.copy_(columns[1:])
        return dict(cluster_seconds=time.perf_counter() - start, image_objective=image_objective / m,
                    text_objective=text_objective / m)


@torch.no_grad()
def extract_features(model, loader, augment, preprocess, amp, rank, world):
    """The first pass over an episode. Returns the features behind the heads at the places rank, rank + W, ...: unit
    rows h_image and h_text [m/W, d], and samples [m/W], the numbers of these pairs in the data set. All ranks call it.

    model: a ProtoCLIP, which runs in eval mode. With several ranks it is inside DDP, which gives all ranks the running
    statistics of rank 0. loader: gives the batches of the episode. augment: data.augment, perhaps compiled. amp: dtype
    of autocast, or None.
    """
    device, rows = next(model.parameters()).device, []
    model.eval()
    for batch in loader:
        images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
        if "colors" in batch:
            images = augment(images, batch["colors"].to(device, non_blocking=True))
        with torch.autocast(device.type, amp, enabled=amp is not None):
            _, _, h_image, h_text, _, _ = model(preprocess.normalize(images), tokens)
        # kmeans wants place p on rank p % W. So its starting rows are the same places for any number of ranks.
        rows.append([gather(x)[rank::world] for x in (h_image, h_text, batch["index"].to(device))])
    model.train()
    h_image, h_text, samples = map(torch.cat, zip(*rows))
    # with --warmup-episodes 0 the batch norms of an RN50 still have mean 0 and variance 1, and fp16 may overflow
    return h_image.nan_to_num(0, 0, 0), h_text.nan_to_num(0, 0, 0), samples


def open_teacher(path, dataset, tokenizer, out, rank, anew):
    """The external teacher's features: an array [M, any] that stays on disk, whose row i belongs to pair i of the data
    set; None if path is None. path: a .npy file, or "captions". For "captions" rank 0 makes teacher.npy in the folder
    out, if the file is not there or anew is true. All ranks call it. SystemExit if the file cannot be written or does
    not fit the data set."""
    if path is None:
        return None
    if path == "captions":
        path = Path(out, "teacher.npy")
        # Rank 0 takes two minutes for a million pairs, and NCCL gives up on a rank after ten minutes. So the other
        # ranks wait in a process group with a longer limit.
        waiting = dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if dist.is_initialized() else None
        if rank == 0 and (anew or not path.exists()):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(f"{path}.tmp", "wb") as file:
                    ids = [tokenizer.encode(" ".join(dataset.captions(i))) for i in range(len(dataset))]
                    np.save(file, caption_features(ids, tokenizer.vocab_size).numpy())
                os.replace(f"{path}.tmp", path)
            except OSError as error:
                raise SystemExit(f"--out {out}: teacher.npy cannot be written: {error}") from None
        if waiting is not None:
            dist.barrier(waiting)
    try:
        teacher = np.load(path, mmap_mode="r", allow_pickle=False)
        if np.ndim(teacher) != 2 or len(teacher) != len(dataset):
            raise ValueError(f"it holds {list(np.shape(teacher))}")
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"--teacher-features {path} is no .npy of {len(dataset)} rows, one a pair in use: "
                         f"{error}") from None
    return teacher


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


def prototype_picture(out, dataset, episode, size, rows=12, members=5):
    """Writes image-prototypes.png and text-prototypes.png into the folder out, once there are clusters. Each row shows
    some pairs of one of the largest clusters. Their captions begin with the cluster's number and count. size: side of a
    picture in pixels."""
    if not episode.centroids.any():
        return
    samples = episode.samples.cpu()
    for name, labels in (("text", episode.labels[0].cpu()), ("image", episode.labels[1].cpu())):
        counts, order = labels.bincount().sort(descending=True)
        images, captions = [], []
        for cluster, count in zip(order[:rows].tolist(), counts.tolist()):
            found = samples[labels == cluster].unique()[:members].tolist()
            found = (found * members)[:members]  # a cluster of few pairs shows them again
            images += [data.center_crop(dataset.image(i), size) for i in found]
            captions += [f"{cluster} ({count} pairs): {dataset.captions(i)[0]}" for i in found]
        data.grid(images, captions, Path(out, f"{name}-prototypes.png"), columns=members)


RECIPES = {  # batch size of all ranks together, warm-up in steps; K = m / 10 as in the README of the released code
    # toy and small are ours. An episode of toy has as many pairs as its data. It keeps colours, because captions name
    # them.
    "toy": dict(
        model="tiny", batch_size=128, epochs=48, lr=5e-4, warmup=50, weight_decay=.1, augment="clip",
        eval="toy-tune,toy", eval_every=6, episode_size=1024, prototypes=100, warmup_episodes=6),
    "small": dict(
        model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="protoclip",
        episode_size=20_000, prototypes=2000, warmup_episodes=1),
    # README of the released code, for 8 GPUs and 2.5 M of the pairs: 21.5 % (CLIP: 19.5). Its run on one GPU has batch
    # 64, lr 5e-5, warm-up 2000 and 8 epochs, and reaches 14.5 % (CLIP: 12.3).
    "cc3m": dict(
        model="RN50", batch_size=512, epochs=32, lr=5e-4, warmup=15_625, weight_decay=.5, augment="protoclip",
        episode_size=200_000, prototypes=20_000, warmup_episodes=1),
    # No recipe was released. These are clip.py's values, with the augmentation and the episodes of cc3m.
    "cc12m": dict(
        model="ViT-B-16", batch_size=4096, epochs=35, lr=5e-4, warmup=2600, weight_decay=.5, augment="protoclip",
        episode_size=200_000, prototypes=20_000, warmup_episodes=1),
    "yfcc15m": dict(
        model="ViT-B-16", batch_size=4096, epochs=25, lr=5e-4, warmup=3600, weight_decay=.5, augment="protoclip",
        episode_size=200_000, prototypes=20_000, warmup_episodes=1),
}


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    epoch_steps = fill_in(args, dataset, world, device)
    # steps: of an episode; total: of the run
    args.episode_size, args.prototypes, steps, total = plan_episodes(
        len(dataset), args.batch_size, args.epochs, args.episode_size, args.prototypes, args.warmup)
    args.image_size = args.image_size or MODELS[args.model].get("image_size", 224)
    tokenizer = data.find_tokenizer(args.bpe, args.data, args.data_root)
    preprocess = data.Preprocess(args.image_size)
    dataset.transform = partial(views, tokenizer=tokenizer, size=args.image_size, augment=args.augment)
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    loader = data.loader(dataset, batches, args.workers, device)

    # model
    torch.manual_seed(args.seed)
    sizes = dict(quick_gelu=args.quick_gelu, proj_hidden=args.proj_hidden, proj_dim=args.proj_dim)
    model = build(args.model, ProtoCLIP, image_size=args.image_size, vocab=tokenizer.vocab_size,
                  context=tokenizer.context, **sizes).to(device)
    about = describe(args, dataset, tokenizer, preprocess, sizes)
    saved = find_run(args, about, device)
    if args.init and not saved:
        load_towers(model, evaluator.load_clip_state(args.init, args.quick_gelu, about["merges"]), args)
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = args.checkpoint_activations
    if isinstance(model.visual, ModifiedResNet):
        model.visual.to(memory_format=torch.channels_last)
    # The authors' betas and eps differ between ResNets and ViTs. Their heads have no weight decay.
    betas, eps = ((.9, .999), 1e-8) if isinstance(model.visual, ModifiedResNet) else ((.9, .98), 1e-6)
    optimizer = torch.optim.AdamW(
        param_groups(model, args.weight_decay, ("image_head.", "text_head.")), args.lr, betas, eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    meter = Meter(args.out, args.batch_size, device)
    teacher = open_teacher(args.teacher_features, dataset, tokenizer, args.out, rank, anew=not saved)
    episode = Episode(args.episode_size, args.prototypes, args.proj_dim, external=teacher is not None).to(device)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter, episode=episode)  # what is saved
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
        start_log(args, saved, dataset, model, f"{total} steps in {total // steps} episodes on {world} x {device.type}")
    saved = None  # gigabytes that nobody needs any more

    def save(name):
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(Path(args.out, name), **about, **states, step=step, tested=tested, best=best,
                            rng=torch.get_rng_state())

    def evaluate():
        """Tests the model after an episode with tests due, or at the start of a resumed run that was killed before its
        tests."""
        nonlocal tested, best
        period = args.eval_every * epoch_steps  # tests are due in the episode that completes a period
        due = step % steps == 0 and (step // period > (step - steps) // period or step == total)
        if not due or step == tested:
            return
        tests = args.eval.split(",") if args.eval else []
        results = evaluator.evaluate(model, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root)
        if rank == 0:
            shown = evaluator.open_test(tests[0], root=args.data_root) if tests else dataset
            picture(Path(args.out, "captions.png"), model, tokenizer, preprocess, shown)
            prototype_picture(args.out, dataset, episode, preprocess.size)
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
        for number in range(step // steps, total // steps):
            batches.epoch = number
            batches.indices = sample_episode(args.seed, number, args.episode_size, len(dataset))
            # In the first episodes the weights are 0, because clusters of an untrained model mean nothing. The heads
            # run all the same: DDP waits for their gradients. The authors also have weights of 0 in the last two
            # episodes, where all learning rates are near 0 anyway.
            warm = number >= args.warmup_episodes
            w_proto, w_external = (args.w_proto, args.w_external) if warm else (0., 0.)
            if step % steps == 0 and (w_proto or (w_external and teacher is not None)):
                bar.set_postfix_str("extracting features")
                batches.start, batches.stream = 0, 1  # the order of training, but other crops
                h_image, h_text, samples = extract_features(parallel, loader, augment, preprocess, amp, rank, world)
                row = episode.find_prototypes(h_image, h_text, samples, teacher, args.kmeans_iters,
                                              args.kmeans_restarts, args.target_temperature, args.seed)
                row["extract_seconds"] = time.perf_counter() - meter.start - row["cluster_seconds"]
                if rank == 0:  # under the next step: a run that resumes here clusters again and drops this line
                    write_log(args.out, step=step + 1, episode=number, **row)
                meter.clear(step)
            batches.start, batches.stream = step % steps, 0
            for batch in meter.watch(loader):
                images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
                if "colors" in batch:
                    images = augment(images, batch["colors"].to(device, non_blocking=True))
                statistics = torch.cat(running) if running else None  # put back if the gradient is not finite
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    image_features, text_features, h_image, h_text, logit_scale, logit_scale_proto = parallel(
                        preprocess.normalize(images), tokens)
                clip = clip_loss(image_features, text_features, logit_scale)
                first = step % steps * args.batch_size + rank * len(images)  # place of this batch in the episode
                labels = episode.labels[:, first:first + len(images)]  # [terms, B]
                terms = [proto_loss(h, D, T, t, logit_scale_proto) for h, D, T, t in zip(
                    (h_image, h_text, h_image, h_text), episode.centroids, episode.targets, labels)]
                proto = (terms[0] + terms[1]) / 2
                external = (terms[2] + terms[3]) / 2 if teacher is not None else torch.zeros_like(clip)
                loss = clip + w_proto * proto + w_external * external
                losses = {"loss": loss, "clip": clip, "proto": proto, "external": external}

                # the step. If the gradient is not finite, the step is bad: weights, moments and statistics stay as they
                # are. DDP has averaged the gradient, so all ranks agree on that.
                lr = lr_at(step, total, args.warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                # The authors' gradient of towers and heads is divided by the number of GPUs, and so clipped less often.
                nn.utils.clip_grads_with_norm_(model.parameters(), args.clip_grad, norm)
                losses["grad_norm"] = norm
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
                    model.logit_scale_proto.clamp_(0, math.log(100))
                step += 1

                # meter.row makes the host wait for the device, so it is not called in every step. After SIGTERM one
                # process stops at once. Several ranks tell each other in meter.row, so they stop at the next log line.
                meter.add(good, losses)
                if step % args.log_every == 0 or step % steps == 0 or (stop and world == 1):
                    row, stopped = meter.row(step, stop)
                    if rank == 0:
                        row |= dict(lr=lr, logit_scale=logit_scale.item())
                        row |= dict(logit_scale_proto=logit_scale_proto.item())
                        write_log(args.out, step=step, episode=number, **row)
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
    add = parser.add_argument_group("ProtoCLIP").add_argument
    add("--episode-size", type=positive, help="m, pairs of an episode; cut to all pairs and to whole batches")
    add("--prototypes", type=positive, help="K, clusters of each modality; cut to a tenth of the episode")
    add("--kmeans-iters", type=positive, default=20, help="steps of K-means, at most")
    add("--kmeans-restarts", type=positive, default=3, help="runs of K-means, of which the best counts")
    add("--target-temperature", type=float, default=.01, help="tau of the soft targets; 0: hard targets")
    add("--w-proto", type=float, default=1., help="weight of what the other modality's clusters teach")
    add("--w-external", type=float, default=1., help="weight of what the clusters of --teacher-features teach")
    add("--teacher-features", help="the external teacher: a .npy [pairs, any] in the order of the data, or the word "
        "captions for features made of the captions' words (default: no external teacher)")
    add("--warmup-episodes", type=int, help="how many episodes at the start have CLIP's loss only")
    add("--proj-hidden", type=positive, default=2048, help="width of the projection heads")
    add("--proj-dim", type=positive, default=128, help="dimensions of the features that are clustered")
    add("--clip-grad", type=float, default=10., help="a gradient of a larger norm is scaled down to this norm")
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
