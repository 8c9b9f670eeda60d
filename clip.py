"""CLIP: contrastive language-image pre-training, the baseline that the other scripts are measured against.

The idea. An image tower and a text tower map pictures and captions to unit vectors of one space. A batch has N pairs.
For every picture the model must find the right caption among N, and for every caption the right picture. The pairs
themselves are the only labels. After training, class names written as captions classify pictures into any set of
classes without one labelled example. eval.py does this zero-shot classification.

The loss. x_i is the unit vector of picture i, y_j that of caption j. The learned scale s = exp(logit_scale) starts at
14.3 and is kept within [1, 100].

    S_ij = s <x_i, y_j>
    L = 1/2 [ mean_i -log softmax(row i of S)_i  +  mean_j -log softmax(column j of S)_j ]

Every other caption in the batch counts as wrong, even one that fits. Why a scale? Cosines stop at 1, so the loss has a
floor. With N = 4,096, perfect pairs and all other cosines 0, it is ln(1 + 4095 e^-s): 7.3 at s = 1 (chance is ln N =
8.3), 0.003 at s = 14.3. With the matrices x and y of the rows x_i and y_j, and G = (softmax of the rows of S +
softmax of its columns - 2 I) / 2N, the gradient is

    dL/dx = s G y        dL/dy = s G^T x        dL/dlogit_scale = sum_ij G_ij S_ij

Several GPUs. W ranks hold B pairs each, N = W B. Each rank scores its B rows against the columns of all ranks, which
it gathers with gradient. The backward pass of the gather sums over the ranks and DDP divides by W, so loss and gradient
are those of one process with all N pairs, except for a ResNet's batch norms. The loader gives each step the same N
pairs for any W, also after a restart.

Negatives come from the batch only. Gradient accumulation would leave fewer of them, so it is not offered.

A training step costs 44 GFLOP a pair with ViT-B-32, 55 with RN50 and 123 with ViT-B-16: three times the forward pass.
With N = 4,096 the loss is less than 0.1 % of that.

In a healthy run the loss starts near ln N and s rises to between 50 and 100. If s falls towards 1, the learning rate is
too high.

How to run.
    python clip.py                                                           built-in pictures, any machine, minutes
    torchrun --nproc_per_node=8 clip.py --data cc3m --eval /imagenet/val     the settings are in RECIPES
    python eval.py runs/clip-toy/last.pt --images cat.jpg --texts "a cat" "a dog"

Sources: Radford et al. 2021 (arXiv 2103.00020), github.com/openai/CLIP; recipes: github.com/mlfoundations/open_clip.
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


RECIPES = {  # batch_size is that of all ranks together, warmup counts steps; percentages are zero-shot on ImageNet
    # toy and small are ours. The learning rate of toy was chosen over 1,024 to 24,576 pairs. With 1e-3 and many pairs
    # the model learns each combination of the training captions by heart, and names no new one.
    "toy": dict(
        model="tiny", batch_size=128, epochs=48, lr=5e-4, warmup=50, weight_decay=.1, augment="clip",
        eval="toy-tune,toy", eval_every=6),
    "small": dict(model="tiny", batch_size=128, epochs=20, lr=1e-3, warmup=50, weight_decay=.1, augment="clip"),
    # With these values, but crops of (.9, 1.) and a warm-up of 10,000 of the 85,000 steps, open_clip's README reaches
    # about 20 %. Its maintainer now advises a warm-up of 1,000 to 2,000 steps. Below 15 M pairs RN50 beats ViT-B-32.
    # SLIP's ViT-B-16 loses 3 points on CC3M after its best epoch.
    "cc3m": dict(model="RN50", batch_size=1024, epochs=30, lr=1e-3, warmup=2000, weight_decay=.1, augment="clip"),
    # SLIP's CLIP baselines have 36.5 % (cc12m) and 37.6 % (yfcc15m). The warm-up is one epoch. SLIP's learning rate
    # starts at 1e-6 and ends at 1e-5, its eps is 1e-8, and it normalises with ImageNet's mean.
    "cc12m": dict(
        model="ViT-B-16", batch_size=4096, epochs=35, lr=5e-4, warmup=2600, weight_decay=.5, augment="clip"),
    "yfcc15m": dict(
        model="ViT-B-16", batch_size=4096, epochs=25, lr=5e-4, warmup=3600, weight_decay=.5, augment="clip"),
    # For comparison, OpenAI has 400 M pairs, 32 epochs, batch 32,768, lr 5e-4 (ViT-B), weight decay .2 and a warm-up of
    # 2,000 steps. Like OpenAI, open_clip and SLIP, this script does not clip gradients.
}


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()

    # data
    dataset = data.open_dataset(args.data, None, args.limit, args.subset, args.data_root)
    steps = fill_in(args, dataset, world, device)  # steps of an epoch
    total = steps * args.epochs
    args.image_size = args.image_size or MODELS[args.model].get("image_size", 224)
    tokenizer = data.find_tokenizer(args.bpe, args.data, args.data_root)
    preprocess = data.Preprocess(args.image_size)
    dataset.transform = partial(views, tokenizer=tokenizer, size=args.image_size, augment=args.augment)
    batches = data.EpochBatches(len(dataset), args.batch_size // world, args.seed, rank, world)
    loader = data.loader(dataset, batches, args.workers, device)

    # model
    torch.manual_seed(args.seed)
    sizes = dict(quick_gelu=args.quick_gelu)  # what the weights do not tell
    model = build(args.model, CLIP, image_size=args.image_size, vocab=tokenizer.vocab_size, context=tokenizer.context,
                  **sizes).to(device)
    about = describe(args, dataset, tokenizer, preprocess, sizes)
    saved = find_run(args, about, device)
    if args.init and not saved:
        load_towers(model, evaluator.load_clip_state(args.init, args.quick_gelu, about["merges"]), args)
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
            shown = evaluator.open_test(tests[0], root=args.data_root) if tests else dataset
            picture(Path(args.out, "captions.png"), model, tokenizer, preprocess, shown)
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
                statistics = torch.cat(running) if running else None  # put back if the gradient is not finite
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    image_features, text_features, logit_scale = parallel(preprocess.normalize(images), tokens)
                loss = clip_loss(image_features, text_features, logit_scale)
                losses = {"loss": loss}

                # the step. If the gradient is not finite, the step is bad: weights, moments and statistics stay as they
                # are. DDP has averaged the gradient, so all ranks agree on that.
                lr = lr_at(step, total, args.warmup, args.lr)
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
                    model.logit_scale.clamp_(0, math.log(100))  # a clamp in the forward pass would stop the gradient
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
