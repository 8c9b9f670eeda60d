"""ModifiedResNet with checkpoint_activations: the same numbers and statistics for less memory."""
import copy

import clip
import pytest
import torch
from torch import nn


def resnet():
    torch.manual_seed(0)
    tower = clip.ModifiedResNet(64, 64, 16, (1, 2, 2, 1)).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, .5, 1)  # the last of a block starts at 0
    other = copy.deepcopy(tower)
    other.checkpoint_activations = True
    return tower, other


def train(tower, images, amp=False):
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            features = tower(images)
        features.float().square().mean().backward()
    return features


@pytest.mark.parametrize("amp", (False, True), ids=("fp32", "bf16"))
def test_checkpointed_stages_change_nothing(amp):
    plain, checkpointed = resnet()
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(train(plain, images, amp), train(checkpointed, images, amp))
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(a, b), name
    norms = [module for module in checkpointed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.momentum == .1 and norm.num_batches_tracked == 2 for norm in norms)


def test_checkpointed_stages_keep_less():
    def kept(tower):
        sizes = {}

        def pack(x):
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tower(torch.randn(4, 3, 64, 64))
        return sum(sizes.values())

    plain, checkpointed = map(kept, resnet())
    assert checkpointed < .6 * plain, (checkpointed, plain)


def test_checkpointing_does_not_go_with_compile(tmp_path):
    with pytest.raises(SystemExit, match="--checkpoint-activations of a ResNet"):
        flags = ["--model", "RN50", "--compile", "--checkpoint-activations", "--limit", "256", "--warmup", "1"]
        clip.main(flags + ["--out", str(tmp_path)])
