"""The rules of the house: copies are identical, a script is clip.py plus its method, losses stand alone, few imports."""
import ast
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
METHODS = ("clip", "declip", "protoclip", "aclip", "tinyclip")
SCRIPTS = [ROOT / f"{name}.py" for name in METHODS if (ROOT / f"{name}.py").exists()]
FILES = SCRIPTS + [ROOT / "data.py", ROOT / "eval.py"]
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "PIL"}
RESNET = {"Bottleneck", "AttentionPool2d", "ModifiedResNet"}  # stand only where they are used

# what makes a script run rather than what one borrows from it
VIEWS = {"declip_views", "neighbor_picture", "prototype_picture", "aclip_views", "masks_picture", "affinity_picture", "survivors_picture"}
TOWERS = {"MaskedVisionTransformer", "Headless"}  # a method's own, on the blocks of clip.py
PLUMBING = RESNET | VIEWS | TOWERS | {"Attention", "QuickGELU", "Block", "Transformer", "VisionTransformer", "build", "views", "picture",
                     "save_checkpoint", "load_checkpoint", "load_clip_state", "init_distributed", "positive", "parse_args", "main"}
MODELS = {"CLIP", "DeCLIP", "ProtoCLIP", "ACLIP", "TinyCLIP"}


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


BORROW = {  # how somebody who copied a part would call it
    "Gather": lambda Gather: Gather,  # through gather
    "gather": lambda gather: gather(unit(4, 8)),
    "clip_loss": lambda f: f(unit(4, 8), unit(4, 8), 10.),
    "lr_at": lambda f: f(3, 10, 2, 1e-3),
    "param_groups": lambda f: f(torch.nn.Linear(2, 2), .1),
    # declip
    "multi_view_clip_loss": lambda f: f(unit(2, 4, 8), unit(2, 4, 8), 10.),
    "nearest_neighbor_loss": lambda f: f(unit(2, 4, 8), unit(2, 4, 8), 10.),
    "simsiam_loss": lambda f: f(*unit(4, 5, 8)),
    "SimSiam": lambda SimSiam: SimSiam(8, 16, 4)(unit(5, 8)),
    "FeatureQueue": lambda FeatureQueue: (lambda queue: (queue.enqueue(unit(4, 8)), queue.nearest(unit(4, 8))))(FeatureQueue(16, 8)),
    "mask_tokens": lambda f: f(torch.tensor([[38, 1, 2, 39, 0]]), torch.tensor([3]), 40, 41),
    "pack_labels": lambda f: f(torch.tensor([[-100, 1, -100], [-100, -100, -100]]), 3),
    "mlm_loss": lambda f: f(unit(4, 8), torch.tensor([1, -100, 2, -100])),
    "eda": lambda f: f("a red circle", random.Random(0)),
    "read_synonyms": lambda f: f(os.devnull),
    # protoclip
    "sample_episode": lambda f: f(0, 1, 8, 100),
    "kmeans": lambda f: f(unit(20, 4), 3, 4, 2, 0),
    "cluster_means": lambda f: f(unit(20, 4), torch.arange(20) % 3, 3),
    "expected_target": lambda f: f(unit(3, 6), unit(3, 4), .01),
    "proto_loss": lambda f: f(unit(5, 4), unit(3, 4), unit(3, 4), torch.arange(5) % 3, 10.),
    "projection_head": lambda f: f(8, 16, 4)(unit(5, 8)),
    "caption_features": lambda f: f([[1, 2], [2, 3], [1]], 5, 2),
    # aclip
    "three_crops": lambda f: f((40, 30), random.Random(0)),
    "attentive_keep": lambda f: f(torch.rand(2, 64), torch.tensor([[[0, 0, 9, 9], [1, 1, 9, 9], [0, 0, 10, 10]]] * 2)),
    "random_keep": lambda f: f(2, 16, 8),
    "ntxent_loss": lambda f: f(unit(4, 8), unit(4, 8), .1),
    "byol_loss": lambda f: f(unit(4, 8), unit(4, 8)),
    "SyncBatchNorm": lambda SyncBatchNorm: SyncBatchNorm(8)(unit(4, 8)),
    "update_ema": lambda f: f(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), .9),
    # tinyclip
    "affinity_loss": lambda f: f(unit(4, 8), unit(4, 8), 50., unit(4, 6), unit(4, 6), 50.),
    "inherit": lambda f: f({"ln_final.weight": unit(1, 8)[0], "logit_scale": unit(1)[0]}, {"ln_final.weight": unit(1, 4)[0], "logit_scale": unit(1)[0]}),
    "Gates": lambda Gates: Gates(128, [2, 2], [512, 512]).sample(),
    "sparsity_loss": lambda f: f(torch.tensor(9.), 10., .5, torch.tensor([1., 1.])),
    "MaskedLayerNorm": lambda MaskedLayerNorm: MaskedLayerNorm(torch.nn.LayerNorm(8))(unit(4, 8)),
    "shrink": lambda f: f({"visual.conv1.weight": torch.zeros(128, 3, 4, 4), "visual.proj": torch.zeros(128, 8), "text_projection":
                           torch.zeros(64, 8), "ln_final.weight": torch.zeros(64), "transformer.resblocks.0.ln_1.weight": torch.zeros(64)}, .5),
    "prune": lambda f: f({"visual.proj": torch.ones(4, 2), "logit_scale": torch.zeros(())}, *[
        {"hidden": torch.tensor([1., 0., 1., .5]), "heads": torch.ones(1, 1), "ffn": torch.ones(1, 16)}] * 2),
    "prunable": lambda f: f({"transformer.resblocks.0.mlp.c_fc.bias": torch.ones(4)}),
    "encode_captions": lambda f: f(SimpleNamespace(encode_text=lambda t: torch.ones(len(t), 8)), lambda t: torch.zeros(len(t), 4),
                                   type("", (), {"__len__": lambda s: 3, "captions": lambda s, i: ["a"]})(), torch.device("cpu")),
}


def definitions(path):
    """{name: (node, source)} of the functions and classes at the top level of a file."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            found[node.name] = node, "\n".join(source.splitlines()[first - 1:node.end_lineno])
    return found


def first_difference(a, b):
    for i, (x, y) in enumerate(zip(a.splitlines() + ["(end)"], b.splitlines() + ["(end)"])):
        if x != y:
            return f"line {i + 1}:\n  {x}\n  {y}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_same_name_same_code(path):
    mine = definitions(path)
    for other in SCRIPTS:
        for name, (_, source) in definitions(other).items():
            if name in mine and name not in ("main", "parse_args"):
                difference = first_difference(mine[name][1], source)
                assert difference is None, f"{name} differs between {path.name} and {other.name}, {difference}"


def bare(path):
    """A script without docstring, RECIPES, views and picture, which differ by design, and without the ResNet."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for i, node in reversed(list(enumerate(ast.parse(source).body))):
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if i == 0 or name in RESNET | {"RECIPES", "views", "picture"}:
            del lines[node.lineno - 1:node.end_lineno]
    return "".join(lines)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_diff_is_the_method(path, tmp_path):
    """Scripts insert into clip.py: at most 40 of its lines are missing or changed (the loop over episodes gets 40 more)."""
    (tmp_path / "a").write_text(bare(ROOT / "clip.py"))
    (tmp_path / "b").write_text(bare(path))
    diff = subprocess.run(["git", "diff", "--no-index", "--patience", "--numstat", "a", "b"], cwd=tmp_path, capture_output=True, text=True)
    removed = int(diff.stdout.split()[1]) if diff.stdout else 0
    assert removed <= (80 if path.stem == "protoclip" else 40)


@pytest.mark.parametrize("path, name", [(p, n) for p in SCRIPTS for n in definitions(p) if n not in PLUMBING | MODELS],
                         ids=lambda v: v if isinstance(v, str) else v.stem)
def test_borrowable(path, name):
    """Each loss, head, queue, sampler and schedule runs in an empty module with nothing but torch, and gather where it needs it."""
    known = definitions(path)
    needed, todo = [], [name]
    while todo:
        current = todo.pop()
        needed.insert(0, current)
        names = {n.id for n in ast.walk(known[current][0]) if isinstance(n, ast.Name)}
        todo += [n for n in sorted(names & set(known)) if n not in needed + todo]
    assert set(needed) <= {name, "gather", "Gather"}, f"{name} needs {needed}"
    code = ("import math\nimport random\nimport torch\nimport torch.nn.functional as F\nimport torch.distributed as dist\n"
            "from torch import nn\n" + "\n\n".join(known[n][1] for n in needed))
    module = {"__name__": "borrowed"}
    exec(compile(code, f"{name} of {path.name}", "exec"), module)
    assert name in BORROW, f"say in BORROW how one calls {name}"
    BORROW[name](module[name])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports(path):
    """Only the five packages (PIL comes with torchvision), the standard library, and data and eval in scripts."""
    local = {"data", "eval"} if path in SCRIPTS else {"data"} if path.stem == "eval" else set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top in PACKAGES | local or top in sys.stdlib_module_names, f"{path.name}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_public_names_have_docstrings(path):
    for name, (node, _) in definitions(path).items():
        assert name.startswith("_") or name == "parse_args" or name == "main" or ast.get_docstring(node), f"{path.name}: {name}"


@pytest.mark.parametrize("name", METHODS)
def test_scripts_begin_with_the_idea(name):
    path = ROOT / f"{name}.py"
    if not path.exists():
        pytest.skip("not written yet")
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc and "torchrun" in doc and "arXiv" in doc


def test_layout():
    """Nothing else stands at the top level."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    allowed = {"README.md", "requirements.txt", "data.py", "eval.py", "tests", ".ci", ".gitignore"} | {f"{m}.py" for m in METHODS}
    assert {t.split("/")[0] for t in tracked} <= allowed
