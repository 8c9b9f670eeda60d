"""ProtoCLIP: CLIP that also groups; prototypes of one modality, found by K-means, teach the other modality its groups.

The idea. CLIP pushes every picture away from every caption but its own, also where both show a dog. ProtoCLIP adds a task
above the level of single pairs. Training goes in episodes of m pairs, drawn with replacement and far fewer than an
epoch's, so that groups stay fresh however large the data are. Before each, the features h of its m pairs are extracted
(model in eval mode, pictures cropped and recoloured anew, one of several captions drawn anew) and K-means makes K = m /
10 prototypes of each modality. Then each picture is taught to recognise the group of its *caption*, and each caption the
group of its *picture*. Groups are handed over without asking the modalities to lie in one place ("prototypical back
translation"): a picture is not scored against the prototypes of captions, but against the mean of the pictures whose
captions share a group. So a third grouping can come from a space of its own, such as a language model's features of the
captions.

The loss. z is a tower's output and h = g(z) / |g(z)| its feature behind a head g, which serves training alone (the two heads
start equal). A student modality learns the groups of a teacher modality: t_i is the teacher's group of pair i, C the teacher's
centroids and C' their transpose (plain means, not of unit norm), D the student's means, T targets, tau = --target-temperature.
r is a learned scale of its own, beside CLIP's s: the two softmaxes have other numbers of classes.

    D_k = mean of the student's h_i with t_i = k         T = softmax(C C' / tau) D   (T = D for the external teacher: hard)
    P(h, D, T, t) = mean_i [ log sum_k exp(r <h_i, D_k>)  -  r <h_i, T_(t_i)> ]
    L = L_clip + 1/2 [ P(image; text) + P(text; image) ] + 1/2 [ P(image; external) + P(text; external) ]

where P(student; teacher) is the P above. It is the authors' cross-entropy with the soft targets q = softmax(C_t C' / tau),
for sum_k q_k r <h, D_k> = r <h, sum_k q_k D_k> = r <h, T_t>; so no step needs the K x K similarities. A target is a function
of the label alone, nearly one-hot at tau = .01 but shared by groups that lie close together, which K-means may have cut at
chance. D, T and t are constants of an episode (no momentum encoder, no queue): the gradient goes through h and r alone. P is
a mean over samples against constants, so W ranks need no gather for it, and DDP's mean is exact. In the first --warmup-
episodes L = L_clip: what an untrained model groups means nothing yet.

The cost in FLOPs (RN50): one more forward pass over each pair, +33 %; K-means +1 %, the losses below +1 %. Each pair is
also read and decoded twice, which is why the authors' runs took 1.8 times as long as CLIP's with as many epochs (on one
GPU). (Their "third of the time" on YFCC15M was "4x fewer epochs" in an earlier version: 4/3 of the FLOPs on a quarter of
the epochs.)

How to run.
    python protoclip.py                                                  drawn toy data, any machine, minutes
    torchrun --nproc_per_node=8 protoclip.py --data cc3m --eval /imagenet/val       see RECIPES for the settings
    torchrun --nproc_per_node=8 protoclip.py --data cc3m --teacher-features roberta.npy --out runs/roberta        the authors' best
    torchrun --nproc_per_node=8 protoclip.py --data cc3m --w-proto 0 --out runs/baseline        CLIP, nothing extracted, but with these
                                                                         pictures and settings; the authors' had fewer augmentations

The file of --teacher-features: floats [M, any], row i for the i-th pair in use, saved by numpy.save. The authors' can be
made with transformers' roberta-large: last_hidden_state of each caption, cut to 77 ids, mean over the positions (theirs
takes in the padding, unmasked and with id 0, RoBERTa's start token; leaving it out is saner), rows to unit norm, PCA to 64
dimensions without whitening. Only its groups are used: a rotation changes nothing. "captions" in place of a file makes one
of the captions alone: TF-IDF, ours and not the authors', made by rank 0 in two minutes a million pairs; it stays in --out.

What to expect (authors' README, RN50, 2.5 M pairs of CC3M, 32 epochs = 400 episodes, both with batch 512; with RoBERTa):
zero-shot ImageNet 21.47 % (CLIP 19.46), linear probe 55.22 (49.41), COCO mean recall 35.69 (36.48). With one GPU, batch 64,
lr 5e-4 / 10, warm-up 2000 and 8 epochs 14.50 (12.29), 44.55 (38.95), 28.26 (26.20). On YFCC15M, CLIP's accuracy in a third
of its time. But their CLIP was augmented less (the fair one is --w-proto 0; at equal FLOPs with --epochs 43), and their
probe reads the training set in order of class and reports the best of 100 accuracies on the test set.

Where released code and this file part. The body of the paper was not at hand: "authors" are their code and README here.
    - gradients are those of the whole batch; theirs, gathered without gradient, are divided by W in towers and heads (not
      in scales). AdamW hides it, the bound on the gradient's norm does not: --clip-grad bites W times earlier here (see the
      log's grad_norm);
    - an episode's sample is a function of (seed, episode). Theirs comes from NumPy's global generator: a resumed run begins
      with the first samples again; once rank 0 has drawn a t-SNE picture, which moves its generator, the external labels it
      hands out belong to other samples on other ranks; clustering every second episode draws new samples under the old
      labels. Ours is whole batches (199,680 of 200,000 with 512; theirs groups an incomplete last one, not trained on);
    - K-means runs on all ranks, which exchange sums (theirs: on one, results through files, so one machine); the rules are
      faiss's, the random choices our own; the best restart is that of the best final objective (theirs: one step before);
    - no "locked image" (LiT): theirs sets the prototype losses and the image tower's learning rate to 0 in the last two
      episodes, when all learning rates are near 0 anyway. Prototypes, heads and soft targets are on by default (theirs:
      each by a flag of its own; without flags it trains CLIP);
    - towers are ours (GELU for QuickGELU), long captions keep their end token, the blur is at the scale of the picture;
    - augmentations differ between ranks; theirs have one seed on all;
    - a bad step leaves no trace in the running statistics of batch norms, with which features are extracted.
Batch norm, in heads too, uses the statistics of its own rank, and rank 0's running ones, as theirs does.

Sources: Chen et al., ProtoCLIP (arXiv 2206.10996, TNNLS 2023) and github.com/megvii-research/protoclip.
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


# prototypes

def sample_episode(seed, episode, size, length):
    """Numbers of the samples of an episode: int64 [size] out of range(length), uniform, with replacement. A function of its
    arguments alone, so the same on all ranks and after a restart (released code: training/data.py, where it is not)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + episode)
    return torch.randint(length, (size,), generator=generator)


@torch.no_grad()
def kmeans(x, k, iters=20, restarts=3, seed=0):
    """Lloyd's algorithm under the rules of faiss.Kmeans, which the released code calls (training/clustering.py): Euclidean,
    centroids are plain means; an empty cluster (equal captions make equal rows) moves beside another, drawn by its size; the best
    of some restarts.

    x: this rank's rows [n, d], r, r + W, ... of the whole; all ranks call it, and sums alone travel, in float64.
    Returns the labels [n] of these rows, centroids [k, d] and objective (float, the sum over the whole of the squared
    distances to the centroids returned). ValueError if there are fewer than k rows in all.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parallel = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    split = (1 - torch.arange(x.shape[1], device=x.device) % 2 * 2) / 1024  # 1, -1, 1, ... of these

    def total(sums):
        if parallel:
            dist.all_reduce(sums)
        return sums

    def nearest(centroids):  # -> labels [n], squared distances [n]
        norms = centroids.square().sum(1)
        with torch.autocast(x.device.type, enabled=False):  # |x|^2 is the same for all centroids
            labels = torch.cat([torch.addmm(norms, rows, centroids.T, alpha=-2).argmin(1) for rows in x.split(4096)])
        return labels, (x - centroids[labels]).square().sum(1)

    rows = int(total(torch.tensor(len(x), device=x.device)))
    if k > rows:
        raise ValueError(f"{rows} rows cannot make {k} clusters")
    best = None
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed + restart)  # the same on all ranks
        picked = torch.randperm(rows, generator=generator)[:k].to(x.device)  # rows to start from; row p is p // W of rank p % W
        centroids, mine, last = x.new_zeros(k, x.shape[1]), picked % world == rank, None
        centroids[mine] = x[picked[mine] // world]
        total(centroids)
        for _ in range(iters):
            labels, distances = nearest(centroids)
            sums = torch.cat([x, x.new_ones(len(x), 1), distances[:, None]], 1).double()
            sums = total(sums.new_zeros(k, sums.shape[1]).index_add_(0, labels, sums))  # [k, d+2]
            count, objective = sums[:, -2], sums[:, -1].sum().item()
            if objective == last:  # no label has changed
                break
            last, centroids = objective, (sums[:, :-2] / count.clamp(min=1)[:, None]).to(x.dtype)
            empty = (count == 0).nonzero()[:, 0]
            if len(empty):  # copies of large clusters' centroids, a little apart
                spare = (count - 1).clamp(min=0).cpu()
                few = int((spare > 0).sum()) < len(empty)
                donors = torch.multinomial(spare, len(empty), replacement=few, generator=generator).to(x.device)
                centroids[empty] = centroids[donors] * (1 + split)
                centroids[donors] = centroids[donors] * (1 - split)
        labels, distances = nearest(centroids)
        objective = total(distances.double().sum()).item()
        if best is None or objective < best[2]:
            best = labels, centroids, objective
    return best


@torch.no_grad()
def cluster_means(x, labels, k):
    """Prototypical back translation: the mean of a student's rows under a teacher's labels (released code: training/clustering.py).

    x: this rank's rows [n, d]; labels [n] in range(k). Returns [k, d], the means over all ranks, not of unit norm; a cluster
    without a row is a row of zeros and stays one: it has logit 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    sums = sums.new_zeros(k, sums.shape[1]).index_add_(0, labels, sums)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).to(x.dtype)


@torch.no_grad()
def expected_target(teacher_centroids, student_centroids, temperature):
    """What a sample of each teacher's cluster is to look like on average: the student's centroids, weighted by the similarity
    of the teacher's, softmax(C C' / temperature) D (released code: training/loss.py, where it is made anew each step).

    teacher_centroids [k, e], student_centroids [k, d], neither of unit norm. Returns [k, d]; temperature <= 0: hard targets,
    the student's centroids themselves.
    """
    with torch.autocast(student_centroids.device.type, enabled=False):
        C, D = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (teacher_centroids, student_centroids))
        return torch.cat([(rows @ C.T / temperature).softmax(1) @ D for rows in C.split(4096)]) if temperature > 0 else D


def proto_loss(features, student_centroids, target, labels, logit_scale):
    """Cross-entropy of a student's features over its prototypes with a teacher's soft targets (released code: training/loss.py).

    features: unit rows [B, d]; student_centroids [k, d]; target [k, d], of expected_target (student_centroids: hard targets);
    labels [B], the teacher's; logit_scale: the factor. Returns a scalar, computed in at least fp32 also under autocast: a
    mean over the rows of this rank, which the mean over ranks makes that of the whole batch. ln k for uninformative features.
    """
    with torch.autocast(features.device.type, enabled=False):
        h, D, T = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (features, student_centroids, target))
        return ((logit_scale * h @ D.T).logsumexp(1) - logit_scale * (h * T[labels]).sum(1)).mean()


def projection_head(dim, hidden, out):
    """The head between a tower and its prototypes: [B, dim] -> [B, out], not of unit norm (released code: open_clip/model.py)."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def caption_features(ids, vocab, dim=64):
    """Features of captions without any model: TF-IDF of their tokens, unit rows, at the best `dim` dimensions (ours).

    ids: a list of M lists of token ids below vocab. Returns float32 [M, dim] (fewer where M or vocab is less).
    """
    row = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(words) for words in ids]))
    token = torch.tensor([token for words in ids for token in words], dtype=torch.int64)
    shape, ones = (len(ids), vocab), torch.ones(len(row))
    counts = torch.sparse_coo_tensor(torch.stack([row, token]), ones, shape, check_invariants=True).coalesce()
    row, token = counts.indices()
    weight = counts.values() * torch.log(len(ids) / token.bincount(minlength=vocab)[token])
    norm = torch.zeros(len(ids)).index_add_(0, row, weight.square()).sqrt()
    tfidf = torch.sparse_coo_tensor(counts.indices(), weight / norm[row].clamp(min=1e-12), shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(tfidf, min(dim, len(ids), vocab))
    return u * s


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


class ProtoCLIP(CLIP):
    """CLIP with a head behind each tower, for training alone, and a second temperature. The heads start out equal."""

    def __init__(self, embed_dim, proj_hidden=2048, proj_dim=128, **sizes):
        super().__init__(embed_dim, **sizes)
        self.image_head, self.text_head = (projection_head(embed_dim, proj_hidden, proj_dim) for _ in range(2))
        self.image_head.load_state_dict(self.text_head.state_dict())
        self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def forward(self, images, tokens):
        """Images [B, 3, S, S], tokens [B, L] -> unit rows image_features, text_features [B, D], image_projections,
        text_projections [B, d], and the factors logit_scale, logit_scale_proto. The heads take features not of unit norm."""
        z_i, z_t = self.encode_image(images), self.encode_text(tokens)
        rows = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
                for x in (z_i, z_t, self.image_head(z_i), self.text_head(z_t)))
        return *rows, self.logit_scale.exp(), self.logit_scale_proto.exp()


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


def prototype_picture(path, dataset, samples, labels, size, rows=12, members=5):
    """Writes a row for each of the largest prototypes: its size, and members with their captions.

    samples: number of the sample at each place of the episode [m]; labels: its prototype [m]; both on the CPU.
    """
    counts, order = labels.bincount().sort(descending=True)
    images, captions = [], []
    for prototype, count in zip(order[:rows].tolist(), counts.tolist()):
        found = samples[labels == prototype].unique()[:members].tolist()
        found = (found * members)[:members]  # a prototype of few samples shows them again
        images += [data.center_crop(dataset.image(i), size) for i in found]
        captions += [f"{prototype} ({count} pairs): {dataset.captions(i)[0]}" for i in found]
    data.grid(images, captions, path, columns=members)


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

RECIPES = {  # batch size is global, warm-up in steps; episodes of m pairs with K = m / 10 prototypes, as in the released README
    "toy": dict(model="tiny", batch_size=128, epochs=2, lr=5e-4, warmup=50, weight_decay=.1, augment="clip", eval="toy",
                episode_size=4096, prototypes=400, warmup_episodes=6),  # ours, half of the episodes; no other colours: they are named
    "small": dict(model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="protoclip",
                  episode_size=20_000, prototypes=2000, warmup_episodes=1),  # ours
    # README of the released code, 8 GPUs: 21.47 % zero-shot with the external teacher (CLIP: 19.46), on 2.5 M of the pairs
    "cc3m": dict(model="RN50", batch_size=512, epochs=32, lr=5e-4, warmup=15_625, weight_decay=.5, augment="protoclip",
                 episode_size=200_000, prototypes=20_000, warmup_episodes=1),
    # none was released: clip.py's, with the episodes of cc3m (ours)
    "cc12m": dict(model="ViT-B-16", batch_size=4096, epochs=35, lr=5e-4, warmup=2600, weight_decay=.5, augment="protoclip",
                  episode_size=200_000, prototypes=20_000, warmup_episodes=1),
    "yfcc15m": dict(model="ViT-B-16", batch_size=4096, epochs=25, lr=5e-4, warmup=3600, weight_decay=.5, augment="protoclip",
                    episode_size=200_000, prototypes=20_000, warmup_episodes=1),
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
    add = parser.add_argument_group("ProtoCLIP").add_argument
    add("--episode-size", type=positive, help="m, pairs between two clusterings; cut to the data's and to whole batches")
    add("--prototypes", type=positive, help="K, clusters of each modality; at most a tenth of the episode")
    add("--kmeans-iters", type=positive, default=20)
    add("--kmeans-restarts", type=positive, default=3)
    add("--target-temperature", type=float, default=.01, help="of the soft targets; 0: hard targets")
    add("--w-proto", type=float, default=1., help="weight of the prototypes of the other modality")
    add("--w-teacher", type=float, default=1., help="weight of the prototypes of --teacher-features")
    add("--teacher-features", help="a .npy [pairs, any] in the order of the data, or captions: TF-IDF made of them (default: none)")
    add("--warmup-episodes", type=int, help="first episodes, which train by the loss of CLIP alone")
    add("--proj-hidden", type=positive, default=2048, help="width of the heads")
    add("--proj-dim", type=positive, default=128, help="dimensions in which is clustered")
    add("--clip-grad", type=float, default=10., help="largest norm of the gradient")
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
    epoch_steps = len(batches)
    args.episode_size = min(args.episode_size, len(dataset)) // args.batch_size * args.batch_size
    args.prototypes = min(args.prototypes, args.episode_size // 10)
    if not args.prototypes:
        raise SystemExit(f"--episode-size: {args.episode_size} pairs, whole batches of {args.batch_size}, are too few for a prototype")
    steps = args.episode_size // args.batch_size  # of an episode
    episodes = max(1, round(args.epochs * epoch_steps / steps))
    total = steps * episodes
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
    heads = dict(proj_hidden=args.proj_hidden, proj_dim=args.proj_dim)
    model = build(args.model, ProtoCLIP, **sizes, **heads).to(device)
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
    betas, eps = ((.9, .999), 1e-8) if args.model == "RN50" else ((.9, .98), 1e-6)  # the authors', OpenAI's for ViTs
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, ("image_head.", "text_head.")), args.lr, betas, eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step, tested, best, failed, bad = 0, 0, -1., 0, 0
    teacher, path = None, args.teacher_features
    if path == "captions":
        path = out / "teacher.npy"
        if rank == 0 and not (saved and path.exists()):
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SystemExit(f"--out {out}: {error.strerror}") from None
            ids = [tokenizer.encode(" ".join(dataset.captions(i))) for i in range(len(dataset))]
            np.save(out / "tmp.npy", caption_features(ids, tokenizer.vocab_size).numpy())
            os.replace(out / "tmp.npy", path)
        if world > 1:
            dist.barrier()
    if path:
        try:
            teacher = np.load(path, mmap_mode="r", allow_pickle=False)
            if np.ndim(teacher) != 2 or len(teacher) != len(dataset):
                raise ValueError(f"it holds {list(np.shape(teacher))}")
        except (OSError, ValueError, EOFError) as error:
            raise SystemExit(f"--teacher-features {path} is no .npy of {len(dataset)} rows, one a pair in use: {error}") from None
    # the constants of an episode, of each term: image by text, text by image, image and text by the external teacher
    terms = 2 if teacher is None else 4
    prototypes = torch.zeros(terms, 2, args.prototypes, args.proj_dim, device=device)  # D and T; zeros give ln K and no gradient
    labels = torch.zeros(terms, args.episode_size, dtype=torch.int64, device=device)  # by place in the episode: samples repeat
    samples = torch.zeros(args.episode_size, dtype=torch.int64, device=device)  # number in the data set, by place
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        step, tested, best, failed, bad = (saved[name] for name in ("step", "tested", "best", "failed", "bad"))
        prototypes, labels, samples = (saved[name].to(device) for name in ("prototypes", "labels", "samples"))
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
                            rng=torch.get_rng_state(), sizes=dict(quick_gelu=args.quick_gelu, **heads), preprocess=vars(preprocess),
                            prototypes=prototypes, labels=labels, samples=samples,
                            pairs=len(dataset), merges=merges, context=tokenizer.context)

    def evaluate():
        """After an epoch whose tests are due, or in a run that was killed before them."""
        nonlocal tested, best
        every = args.eval_every * epoch_steps  # steps between tests
        if step % steps or step == tested or (step // every == (step - steps) // every and step < total):
            return
        results = evaluator.evaluate(model, tokenizer, preprocess, tests, amp, args.workers, root=args.data_root) if tests else {}
        if rank == 0:
            picture(out / "captions.png", model, tokenizer, preprocess, shown[0])
            if prototypes.any():
                for name, row in (("image", labels[1]), ("text", labels[0])):  # the labels of one teach the other
                    prototype_picture(out / f"{name}-prototypes.png", dataset, samples.cpu(), row.cpu(), preprocess.size)
            tqdm.write(f"step {step}: {evaluator.summary(results)}" if tests else f"step {step} of {total}")
        tested = step
        log(eval=results)
        score = sum(r[r["metric"]] for r in results.values())
        if tests and score > best:
            best = score
            save("best.pt")
        save("last.pt")

    def find_prototypes():
        """Groups the samples of an episode -> prototypes, labels, samples, the same on all ranks."""
        start, rows, k, tau = time.perf_counter(), [], args.prototypes, args.target_temperature
        bar.set_postfix_str("extracting features")
        model.eval()
        with torch.no_grad():
            for batch in loader:
                images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
                if "colors" in batch:
                    images = data.augment(images, batch["colors"].to(device, non_blocking=True))
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    _, _, *h, _, _ = parallel(preprocess.normalize(images), tokens)  # DDP: with rank 0's running statistics
                rows.append([gather(x)[rank::world] for x in (*h, batch["index"].to(device))])  # rank, rank + W, ... of the episode
        model.train()
        h_image, h_text, index = map(torch.cat, zip(*rows))  # [m/W, d], [m/W, d], [m/W]
        # in fp16 a new RN50 may overflow in eval mode, while its running statistics are still 0 and 1
        h_image, h_text = h_image.nan_to_num(0, 0, 0), h_text.nan_to_num(0, 0, 0)
        extracted = time.perf_counter()
        with evaluator.full_fp32():
            cluster = partial(kmeans, k=k, iters=args.kmeans_iters, restarts=args.kmeans_restarts, seed=args.seed)
            by_image, C_image, image_objective = cluster(h_image)
            by_text, C_text, text_objective = cluster(h_text)
            taught = [(h_image, by_text, C_text, tau), (h_text, by_image, C_image, tau)]  # student, teacher
            if teacher is not None:
                features = torch.from_numpy(teacher[index.cpu().numpy()]).to(device, torch.float32)
                by_teacher, C_teacher, _ = cluster(features.nan_to_num(0, 0, 0))
                taught += [(h_image, by_teacher, C_teacher, 0), (h_text, by_teacher, C_teacher, 0)]  # hard targets
            found = []
            for h, t, C, temperature in taught:
                D = cluster_means(h, t, k)
                found.append(torch.stack([D, expected_target(C, D, temperature)]))
        columns = gather(torch.stack([*(t for _, t, _, _ in taught), index])[None])  # [W, terms + 1, m/W]
        columns = columns.permute(1, 2, 0).flatten(1)  # [terms + 1, m]: column j of rank r is place j W + r
        # the row belongs to the step that follows: a run that resumes here cuts it and writes it again
        log(step=step + 1, episode=episode, extract_seconds=extracted - start, cluster_seconds=time.perf_counter() - extracted,
            image_objective=image_objective / args.episode_size, text_objective=text_objective / args.episode_size)
        return torch.stack(found), columns[:-1], columns[-1]

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

    # training
    evaluate()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, mininterval=1)
    logged, sums, skipped, waited, start = step, 0, 0, 0., time.perf_counter()  # since the last log line
    streak = torch.zeros((), device=device)  # bad steps, one after the other
    for episode in range(step // steps, episodes):
        batches.epoch, batches.indices = episode, sample_episode(args.seed, episode, args.episode_size, len(dataset))
        grouped = episode >= args.warmup_episodes  # a factor, 0 or 1: the heads run before too, as DDP waits for them
        w_proto, w_teacher = grouped * args.w_proto, grouped * args.w_teacher * (teacher is not None)
        if step % steps == 0 and (w_proto or w_teacher):
            batches.start, batches.stream = 0, 1  # the same samples in the same order, in crops of their own
            prototypes, labels, samples = find_prototypes()
            start = time.perf_counter()
        batches.start, batches.stream, tick = step % steps, 0, time.perf_counter()
        for batch in loader:
            waited += time.perf_counter() - tick
            skipped += int(batch["skipped"].sum())
            images, tokens = (batch[name].to(device, non_blocking=True) for name in ("images", "tokens"))
            if "colors" in batch:
                images = data.augment(images, batch["colors"].to(device, non_blocking=True))
            statistics = [buffer.clone() for buffer in model.buffers()]  # of batch norms
            with torch.autocast(device.type, amp, enabled=amp is not None):
                image_features, text_features, h_image, h_text, logit_scale, r = parallel(preprocess.normalize(images), tokens)
            first = step % steps * args.batch_size + rank * len(images)  # place of this batch in the episode
            t = labels[:, first:first + len(images)]  # [terms, B]
            clip = clip_loss(image_features, text_features, logit_scale)
            proto = (proto_loss(h_image, *prototypes[0], t[0], r) + proto_loss(h_text, *prototypes[1], t[1], r)) / 2
            external = torch.zeros_like(clip)
            if teacher is not None:
                external = (proto_loss(h_image, *prototypes[2], t[2], r) + proto_loss(h_text, *prototypes[3], t[3], r)) / 2
            loss = clip + w_proto * proto + w_teacher * external
            losses = {"loss": loss, "clip": clip, "proto": proto, "external": external}

            # the step; where the gradient (of all ranks, DDP has averaged it) is not finite, everything stays as it was
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup, args.lr)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            losses["grad_norm"] = norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grads_with_norm_(model.parameters(), args.clip_grad, norm)
            good = norm.isfinite()
            optimizer.found_inf = 1 - good.float()  # 1 makes fused AdamW leave weights and moments alone, without asking the host
            optimizer.step()
            scaler.update()
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), statistics):
                    buffer.copy_(buffer.where(good, before))
                model.logit_scale.clamp_(0, math.log(100))  # the parameter: clamping its exp would end its gradient at the bound
                model.logit_scale_proto.clamp_(0, math.log(100))
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
                log(episode=episode, **means, lr=group["lr"], logit_scale=logit_scale.item(), pairs_per_second=speed, waited=waits,
                    skipped=failed, bad_steps=bad, logit_scale_proto=r.item(), **memory)
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
