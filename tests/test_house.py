"""The rules of the house: copies are identical, a script is clip.py plus its method, losses stand alone, few imports,
plain and short prose, short lines."""
import ast
import importlib
import os
import random
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import sync
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / f"{name}.py" for name in sync.SCRIPTS]
FILES = SCRIPTS + [ROOT / "data.py", ROOT / "eval.py"]
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "PIL"}

FREE = {"frequency", "nmtune", "flame", "lexvla"}  # no two trained towers, so they need not follow clip.py's lines
OPTIONAL = {"flame", "lexvla"}  # scripts that read a language model by transformers
HELPERS = {"frequency.count": {"words", "mentions"}, "nmtune.regularisers": {"singular_values"},
           "nmtune.spectrum": {"singular_values"}}  # what may be copied beside gather, where it has to be


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


BORROW = {  # how somebody who copied a part would call it
    "Gather": lambda Gather: Gather,  # through gather
    "gather": lambda gather: gather(unit(4, 8)),
    "clip_loss": lambda f: f(unit(4, 8), unit(4, 8), 10.0),
    "lr_at": lambda f: f(3, 10, 2, 1e-3),
    "param_groups": lambda f: f(torch.nn.Linear(2, 2), 0.1),
    # declip
    "multi_view_clip_loss": lambda f: f(unit(2, 4, 8), unit(2, 4, 8), 10.0),
    "nearest_neighbor_loss": lambda f: f(unit(2, 4, 8), unit(2, 4, 8), 10.0),
    "simsiam_loss": lambda f: f(*unit(4, 5, 8)),
    "SimSiam": lambda SimSiam: SimSiam(8, 16, 4)(unit(5, 8)),
    "FeatureQueue": lambda FeatureQueue: (lambda queue: (queue.enqueue(unit(4, 8)), queue.nearest(unit(4, 8))))(
        FeatureQueue(16, 8)
    ),
    "mask_tokens": lambda f: f(torch.tensor([[38, 1, 2, 39, 0]]), torch.tensor([3]), 40, 41),
    "pack_labels": lambda f: f(torch.tensor([[-100, 1, -100], [-100, -100, -100]]), 3),
    "mlm_loss": lambda f: f(unit(4, 8), torch.tensor([1, -100, 2, -100])),
    "eda": lambda f: f("a red circle", random.Random(0)),
    # protoclip
    "sample_episode": lambda f: f(0, 1, 8, 100),
    "kmeans": lambda f: f(unit(20, 4), 3, 4, 2, 0),
    "cluster_means": lambda f: f(unit(20, 4), torch.arange(20) % 3, 3),
    "expected_target": lambda f: f(unit(3, 6), unit(3, 4), 0.01),
    "proto_loss": lambda f: f(unit(5, 4), unit(3, 4), unit(3, 4), torch.arange(5) % 3, 10.0),
    "projection_head": lambda f: f(8, 16, 4)(unit(5, 8)),
    "caption_features": lambda f: f([[1, 2], [2, 3], [1]], 5, 2),
    # aclip
    "three_crops": lambda f: f((40, 30), random.Random(0)),
    "attentive_keep": lambda f: f(torch.rand(2, 64), torch.tensor([[[0, 0, 9, 9], [1, 1, 9, 9], [0, 0, 10, 10]]] * 2)),
    "random_keep": lambda f: f(2, 16, 8),
    "ntxent_loss": lambda f: f(unit(4, 8), unit(4, 8), 0.1),
    "byol_loss": lambda f: f(unit(4, 8), unit(4, 8)),
    "SyncBatchNorm": lambda SyncBatchNorm: SyncBatchNorm(8)(unit(4, 8)),
    "update_ema": lambda f: f(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), 0.9),
    # tinyclip
    "affinity_loss": lambda f: f(unit(4, 8), unit(4, 8), 50.0, unit(4, 6), unit(4, 6), 50.0),
    "inherit": lambda f: f(
        {"ln_final.weight": unit(1, 8)[0], "logit_scale": unit(1)[0]},
        {"ln_final.weight": unit(1, 4)[0], "logit_scale": unit(1)[0]},
    ),
    "Gates": lambda Gates: Gates(128, [2, 2], [512, 512]).sample(),
    "sparsity_loss": lambda f: f(torch.tensor(9.0), 10.0, 0.5, torch.tensor([1.0, 1.0])),
    "MaskedLayerNorm": lambda MaskedLayerNorm: MaskedLayerNorm(torch.nn.LayerNorm(8))(unit(4, 8)),
    "shrink": lambda f: f(
        {
            "visual.conv1.weight": torch.zeros(128, 3, 4, 4),
            "visual.proj": torch.zeros(128, 8),
            "text_projection": torch.zeros(64, 8),
            "ln_final.weight": torch.zeros(64),
            "transformer.resblocks.0.ln_1.weight": torch.zeros(64),
        },
        0.5,
    ),
    "prune": lambda f: f(
        {"visual.proj": torch.ones(4, 2), "logit_scale": torch.zeros(())},
        *[{"hidden": torch.tensor([1.0, 0.0, 1.0, 0.5]), "heads": torch.ones(1, 1), "ffn": torch.ones(1, 16)}] * 2,
    ),
}
for name in sync.SCRIPTS:  # a new script says it in its own tests
    BORROW |= getattr(importlib.import_module(f"test_{name}"), "BORROW", {})


@lru_cache(None)
def definitions(path):
    """{name: (node, source)} of the functions and classes at the top level of a file."""
    source, found = path.read_text(), {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            found[node.name] = node, "\n".join(lines[first - 1:node.end_lineno])
    return found


@pytest.mark.parametrize("script", sync.SCRIPTS)
def test_same_name_same_code(script):
    """What tests/sync.py --check prints: each block that differs, with its first differing line."""
    found = {other: sync.differences(script, other) for other in sync.SCRIPTS}
    assert not any(found.values()), found


def test_sync_copies_blocks_and_spares_uncommitted_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "SCRIPTS", ("clip", "slip"))
    block = "@decorated\ndef f():\n    return {}\n\n\n"
    (tmp_path / "clip.py").write_text(block.format(1) + "TABLE = {\n    1: 2,\n}\n\n\ndef main():\n    pass\n")
    (tmp_path / "slip.py").write_text("import os\n\n\n" + block.format(2) + "TABLE = {}\n\n\ndef main():\n    own\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert sync.main(["--check"]) == 1 and "return 2" in capsys.readouterr().out
    assert sync.main([]) == 0
    copied = (tmp_path / "slip.py").read_text()
    assert copied == "import os\n\n\n" + block.format(1) + "TABLE = {\n    1: 2,\n}\n\n\ndef main():\n    own\n"
    assert sync.main(["--check"]) == 0
    (tmp_path / "clip.py").write_text(block.format(3))
    with pytest.raises(SystemExit, match="slip.py has uncommitted changes"):
        sync.main([])
    assert (tmp_path / "slip.py").read_text() == copied
    with pytest.raises(SystemExit, match="The scripts: clip, slip"):
        sync.main(["nosuch"])


def bare(path):
    """A script without docstring, RECIPES, views and picture, which differ by design."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for i, node in reversed(list(enumerate(ast.parse(source).body))):
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if i == 0 or name in {"RECIPES", "views", "picture"}:
            del lines[node.lineno - 1:node.end_lineno]
    return "".join(lines)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in FREE], ids=lambda p: p.stem)
def test_the_diff_is_the_method(path, tmp_path):
    """Scripts insert into clip.py: at most 40 of its lines are missing or changed (the loop over episodes gets 40
    more)."""
    (tmp_path / "a").write_text(bare(ROOT / "clip.py"))
    (tmp_path / "b").write_text(bare(path))
    diff = subprocess.run(
        ["git", "diff", "--no-index", "--patience", "--numstat", "a", "b"], cwd=tmp_path, capture_output=True, text=True
    )
    removed = int(diff.stdout.split()[1]) if diff.stdout else 0
    assert removed <= (80 if path.stem == "protoclip" else 40)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in FREE], ids=lambda p: p.stem)
def test_what_stands_before_the_encoders_can_be_borrowed(path):
    first = path.read_text().splitlines().index("# encoders: OpenAI's towers under open_clip's parameter names")
    names = {name for name, (node, _) in definitions(path).items() if node.lineno <= first}
    assert names <= set(BORROW), f"say in BORROW how one calls {names - set(BORROW)}"


@pytest.mark.parametrize("path, name", [(p, n) for p in SCRIPTS for n in definitions(p) if n in BORROW],
                         ids=lambda v: v if isinstance(v, str) else v.stem)
def test_borrowable(path, name):
    """Each loss, head, queue, sampler and schedule runs in an empty module with nothing but torch and its standard
    sub-modules, and gather where it needs it."""
    known = definitions(path)
    needed, todo = [], [name]
    while todo:
        current = todo.pop()
        needed.insert(0, current)
        nodes = list(ast.walk(known[current][0]))
        names = {n.id for n in nodes if isinstance(n, ast.Name)} - {n.arg for n in nodes if isinstance(n, ast.arg)}
        todo += [n for n in sorted(names & set(known)) if n not in needed + todo]
    allowed = {name, "gather", "Gather"} | HELPERS.get(f"{path.stem}.{name}", set())
    assert set(needed) <= allowed, f"{name} needs {set(needed) - allowed}"
    code = (
        "import math\nimport random\nimport re\nfrom collections import Counter\nimport numpy as np\n"
        "import torch\nimport torch.nn.functional as F\n"
        "import torch.distributed as dist\nfrom torch import nn\n" + "\n\n".join(known[n][1] for n in needed)
    )
    module = {"__name__": "borrowed"}
    exec(compile(code, f"{name} of {path.name}", "exec"), module)
    BORROW[name](module[name])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports(path):
    """Only the five packages (PIL comes with torchvision), the standard library, and data and eval in scripts. One
    function of a script that reads a language model may import transformers."""
    local = {"data", "eval"} if path in SCRIPTS else {"data"} if path.stem == "eval" else set()
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    optional = [node for node in imports if node.names[0].name == "transformers"]
    assert len(optional) <= (path.stem in OPTIONAL) and not {*optional} & {*tree.body}
    for node in {*ast.walk(tree)} - {*optional}:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) else []
        )
        for name in names:
            top = name.split(".")[0]
            assert (
                top in PACKAGES | local or top in sys.stdlib_module_names
            ), f"{path.name}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_public_names_have_docstrings(path):
    for name, (node, _) in definitions(path).items():
        assert (
            name.startswith("_") or name == "parse_args" or name == "main" or ast.get_docstring(node)
        ), f"{path.name}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_begin_with_a_short_docstring(path):
    doc = ast.get_docstring(ast.parse(path.read_text()), clean=False)
    assert len(doc.splitlines()) <= 40 and len(doc.split()) <= 450
    assert path not in SCRIPTS or "arXiv" in doc and ("torchrun" in doc or path.stem in FREE)


@pytest.mark.parametrize("path", FILES + sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.stem)
def test_width(path):
    assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_names_another(path):
    """Outside prose and the names of augmentations, which are names of recipes."""
    tree = ast.parse(path.read_text())
    doubles = [
        node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in ("AUGMENT", "RECIPES")
    ]
    allowed = {id(child) for node in doubles for child in ast.walk(node)}
    words = {node.value for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed}
    assert not words & {*sync.SCRIPTS} - {"clip"}  # "clip" is the name of a loss, too


def test_readme_is_short():
    """At most 1,200 words of prose (without code, tables and the licence) and 2,200 in all."""
    text = (ROOT / "README.md").read_text()
    fenced = "".join(text.split("```")[::2]).split("\n## Licen")[0]
    prose = [line for line in fenced.splitlines() if not line.startswith(("|", "    "))]
    assert len(" ".join(prose).split()) <= 1200 and len(text.split()) <= 2200


def test_layout():
    """Nothing else stands at the top level."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    allowed = {"README.md", "requirements.txt", "data.py", "eval.py", "tests", ".ci", ".gitignore"}
    allowed |= {f"{name}.py" for name in sync.SCRIPTS}
    assert {t.split("/")[0] for t in tracked} <= allowed
