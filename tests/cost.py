"""The table of cost: what a step of each script takes, against clip.py's at the same model, size and augmentation.

    python tests/cost.py                                       on a CPU: batches of 4 pairs, some minutes a row
    python tests/cost.py --batch-size 512 --amp bf16 --compile     on a GPU
    python tests/cost.py declip aclip                          these rows only
    python tests/cost.py open_clip [--compile]                 open_clip's own step beside clip.py's

Each script's own `main` trains here on one fixed batch, which is read once, so that no loader is measured. Captions
are 20 words of one token each, which the loader cuts to 24 tokens. The rate of a run is the median over its log
intervals but the first. The two commands of a row run in turn, --rounds times, and the fastest round counts.

MFU divides the FLOPs of forward and backward pass by the device's peak. It is printed twice: with the tokens as they
are fed (24), and as if all 77 positions had been computed. Torch counts the FLOPs in one eager step, without
augmentation.
"""
import argparse
import gc
import importlib
import itertools
import json
import random
import signal
import string
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

STUDENT = "tinyclip --model ViT-39M-16-Text-19M --teacher {folder}/teacher.pt"
ROWS = {  # script and flags; the same of its baseline; pairs of a batch on a GPU where --batch-size does not say
    "clip": ("clip --model ViT-B-16", "clip --model ViT-B-32", 512),
    "declip": ("declip --model ViT-B-32 --augment declip", "clip --model ViT-B-32 --augment declip", 512),
    "declip-rn50": ("declip --model RN50 --augment declip", "clip --model RN50 --augment declip", 128),
    "protoclip": ("protoclip --model RN50 --augment protoclip --warmup-episodes 0 --episode-size 9999999",
                  "clip --model RN50 --augment protoclip", 64),
    "aclip": ("aclip --model ViT-B-16 --augment aclip", "clip --model ViT-B-16 --augment aclip", 512),
    "aclip-eff": ("aclip --model ViT-B-16 --augment aclip --ema-size 112",
                  "clip --model ViT-B-16 --augment aclip", 512),
    "tinyclip": (STUDENT, f"{STUDENT} --init none --alpha 0 --logit-scale 0", 512),
    "slip": ("slip --model ViT-B-16 --augment slip", "clip --model ViT-B-16 --augment slip", 256),
    "flame": ("flame --model ViT-B-16 --augment clip --texts {folder}/texts", "clip --model ViT-B-16", 384),
    "tinyclip-cached": (f"{STUDENT} --cache-teacher-text", f"{STUDENT} --init none --alpha 0 --logit-scale 0", 512),
}
PEAKS = {"H100": 989, "H200": 989, "A100": 312}  # dense TFLOP/s in bf16 by name of the device, NVIDIA's data sheets


class FixedBatch:
    """A loader that reads the first batch of an epoch and yields it `steps` times. tokens: length to which captions are
    padded (0: as they are). each: called with the number of a step before it, and once after the last."""

    def __init__(self, steps, tokens=0, each=lambda i: None):
        self.steps, self.tokens, self.each = steps, tokens, each

    def __call__(self, dataset, batches, *_, **__):
        """What data.loader is called with."""
        self.dataset, self.batches, self.batch = dataset, batches, None
        self.collate_fn = None  # a script may set its own, as it does of a loader
        return self

    def __iter__(self):
        if self.batch is None:
            cut = data.collate

            def collate(samples):
                batch = cut(samples)
                if "tokens" in batch:
                    missing = max(0, self.tokens - batch["tokens"].shape[-1])
                    batch["tokens"] = F.pad(batch["tokens"], (0, missing))
                return batch

            with mock.patch.object(data, "collate", collate):  # a script's own calls it
                samples = [self.dataset[item] for item in next(iter(self.batches))]
                self.batch = (self.collate_fn or collate)(samples)
            if torch.cuda.is_available():
                self.batch = {name: value.pin_memory() for name, value in self.batch.items()}
        for i in range(self.steps):
            self.each(i)
            yield dict(self.batch)
        self.each(self.steps)


def run(script, flags, out, loader=None, *patches):
    """Runs main(flags) of a script in this process -> rows of its log. loader: takes the place of data.loader."""
    with ExitStack() as stack:
        for patch in (*patches, *([mock.patch.object(data, "loader", loader)] if loader else [])):
            stack.enter_context(patch)
        try:
            importlib.import_module(script).main([*flags, "--out", str(out)])
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch._dynamo.reset()
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def make_inputs(folder, pairs, teacher=True, texts=True):
    """Writes into a folder: merges for a vocabulary of CLIP's size, in which each word of three letters is one token;
    eight pictures; a table of that many pairs on them; a teacher of random weights; for each pair 11 random unit rows
    of width 5120 as texts."""
    letters, rng = string.ascii_lowercase, random.Random(0)
    merges = [f"{a} {b}" for a, b in itertools.product(letters, letters)]
    words = ["".join(word) for word in itertools.product(letters, repeat=3)]
    merges += [f"{word[:2]} {word[2]}</w>" for word in words] + [f"{word[:2]} {word[2]}" for word in words]
    merges += [f"{a}{b}{c} {d}</w>" for a, b, c, d in itertools.product(letters, repeat=4)]
    (folder / "merges.txt").write_text("\n".join(["#version", *merges[:49_408 - 514], ""]))
    for i in range(8):
        Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((256, 256), Image.BICUBIC).save(folder / f"{i}.jpg")
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(pairs):
            file.write(json.dumps({"filename": f"{i % 8}.jpg", "caption": " ".join(rng.choices(words, k=20))}) + "\n")
    if teacher:
        import clip
        torch.save(clip.build("ViT-B-16").state_dict(), folder / "teacher.pt")
    if texts:
        (folder / "texts").mkdir()
        rows = np.lib.format.open_memmap(folder / "texts/embeddings.npy", "w+", np.float16, (pairs, 11, 5120))
        rows[:] = F.normalize(torch.randn(11, 5120), dim=1).half().numpy()
        about = {"lm": "random rows", "weights": "", "layer": 0, "restart_positions": False,
                 "caption_rows": [*range(4, 11)], "rewritten": True, "prompts": ["{}"] * 11, "dim": 5120,
                 "count": pairs, "data": data.fingerprint(data.open_dataset(str(folder / "pairs.jsonl"), None))}
        (folder / "texts/embeddings.json").write_text(json.dumps(about))


def train(command, folder, args, batch_size, loader, *patches, more=""):
    """Rows of the log of a run over args.steps batches of the inputs in a folder, which saves no checkpoints."""
    script, *flags = command.format(folder=folder).split()
    flags += ["--data", str(folder / "pairs.jsonl"), *more.split()]
    if hasattr(importlib.import_module(script).parse_args([]), "bpe"):
        flags += ["--bpe", str(folder / "merges.txt")]
    flags += (f"--recipe cc3m --epochs 1 --warmup 1 --lr 1e-5 --eval= --workers 0 --restart --amp {args.amp} "
              f"--batch-size {batch_size} --limit {args.steps * batch_size}").split()
    no_saving = mock.patch.object(importlib.import_module(script), "save_checkpoint", lambda path, **state: None)
    return run(script, flags, folder / "out", loader, no_saving, *patches)


def measure(command, folder, args, batch_size, compiled=False):
    """Seconds a step, with a step's share of ProtoCLIP's clustering, and peak memory in GiB (None on a CPU)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    more = f"--log-every {max(1, args.steps // 5)}" + (" --compile" if compiled else "")
    rows = train(command, folder, args, batch_size, FixedBatch(args.steps), more=more)
    steps = [row for row in rows if "loss" in row]
    seconds = median(batch_size / row["pairs_per_second"] for row in steps[1:])  # the first interval holds the start
    clusterings = [row["extract_seconds"] + row["cluster_seconds"] for row in rows if "extract_seconds" in row]
    seconds += sum(clusterings) / args.steps
    return seconds, steps[-1].get("memory_gb")


def gigaflops(command, folder, args, batch_size, tokens):
    """GFLOP a pair of one training step, captions padded to that many tokens; augmentation is left out."""
    counter = FlopCounterMode(display=False)
    loader = FixedBatch(1, tokens, lambda i: counter.__exit__(None, None, None) if i else counter.__enter__())
    plain = mock.patch.object(data, "augment", lambda images, colors: images / 255)
    train(command, folder, args, batch_size, loader, plain)
    return counter.get_total_flops() / batch_size / 1e9


def profile(command, folder, args, batch_size):
    """Table of the operations that take the most time in five steps."""
    cuda, first = torch.cuda.is_available(), args.steps // 2
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    profiler = torch.profiler.profile(activities=activities)

    def each(i):
        if i == first:
            profiler.start()
        if i == min(first + 5, args.steps):
            if cuda:
                torch.cuda.synchronize()
            profiler.stop()

    train(command, folder, args, batch_size, FixedBatch(args.steps, each=each), more="--log-every 99999")
    order = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


def compare(name, folder, args, say=print):
    """Measures a row and its baseline in turn and says what they take."""
    method, baseline, batch_size = ROWS[name]
    batch_size = args.batch_size or batch_size
    few = min(batch_size, 16)  # a pair's share does not depend on the size of the batch
    commands = {command: [gigaflops(command, folder, args, few, tokens) for tokens in (0, 77)]
                for command in (method, baseline)}
    for compiled in (False, True) if args.compile else (False,):
        mode = "compiled" if compiled else "eager"
        rounds = [[measure(command, folder, args, batch_size, compiled) for command in commands]
                  for _ in range(args.rounds)]
        best = [min(found) for found in zip(*rounds)]
        for (command, flops), (seconds, memory) in zip(commands.items(), best):
            rate = batch_size / seconds
            line = f"{command.replace('{folder}/', '')}, {mode}: {1e3 * seconds:.1f} ms a step of {batch_size}"
            line += f", {rate:.1f} pairs/s"
            line += ", {:.1f} GFLOP a pair as fed, {:.1f} at 77 tokens".format(*flops)
            if args.peak:
                line += ", MFU {:.1%} as fed, {:.1%} at 77 tokens".format(*(f * rate / args.peak / 1e3 for f in flops))
            say(line + (f", {memory:.1f} GiB" if memory else ""))
        say(f"{name}, {mode}: {best[0][0] / best[1][0]:.2f} of its baseline's time")


def against_open_clip(args, say=print):
    """A step of open_clip's model and loss and of ours on one batch with the same AdamW: captions of 20 words at 77
    tokens, and cut to 24 as the loader does."""
    import open_clip
    from open_clip.loss import ClipLoss

    import clip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    modes = (False, True) if args.compile else (False,)
    for name, compiled in itertools.product(("ViT-B-16", "ViT-B-32", "RN50"), modes):
        batch_size = args.batch_size or ROWS["clip"][-1]
        images = torch.randn(batch_size, 3, 224, 224, device=device)
        tokens = torch.zeros(batch_size, 77, dtype=torch.int64, device=device)
        tokens[:, 0], tokens[:, 1:21], tokens[:, 21] = 49406, torch.randint(300, 49000, (batch_size, 20)), 49407
        steps, times = {}, {"open_clip": [], "clip.py": [], "clip.py, 24 tokens": []}
        for kind in times:
            if kind == "open_clip":
                model, loss = open_clip.create_model(name), ClipLoss()
            else:
                model, loss = clip.build(name, quick_gelu=name == "RN50"), clip.clip_loss
                if name == "RN50":
                    model.visual.to(memory_format=torch.channels_last)
            model.to(device).train()
            if compiled:
                model.compile()
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
            steps[kind] = model, optimizer, loss, tokens[:, :24 if "24" in kind else 77]
        for _ in range(args.steps):
            for kind, (model, optimizer, loss, words) in steps.items():
                start = time.perf_counter()
                with torch.autocast(device, dtype, enabled=dtype is not None):
                    features = model(images, words)
                optimizer.zero_grad()
                loss(*features[:3]).backward()
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[kind].append(time.perf_counter() - start)
        for kind, seconds in times.items():
            ratio = median(a / b for a, b in zip(seconds[2:], times["open_clip"][2:]))
            mode, rate = "compiled" if compiled else "eager", batch_size / median(seconds[2:])
            say(f"{name}, {mode}, {kind}: {rate:.1f} pairs/s, {ratio:.2f} of open_clip's time")


def kmeans_seconds(rows=200_000, clusters=20_000, rounds=20):
    """Seconds of one restart of ProtoCLIP's K-means on random unit rows of 128."""
    import protoclip
    x = F.normalize(torch.randn(rows, 128, device="cuda" if torch.cuda.is_available() else "cpu"), dim=1)
    start = time.perf_counter()
    float(protoclip.kmeans(x, clusters, rounds, 1, 0)[2])  # waits for the device
    return time.perf_counter() - start


def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(ROWS)} (default: these), open_clip")
    parser.add_argument("--batch-size", type=int, default=None if cuda else 4,
                        help="pairs (default: 4 on a CPU, the row's on a GPU)")
    parser.add_argument("--steps", type=int, default=50 if cuda else 10)
    parser.add_argument("--rounds", type=int, default=1 if cuda else 2)
    parser.add_argument("--amp", choices=("bf16", "fp16", "off"), default="bf16" if cuda else "off")
    parser.add_argument("--compile", action="store_true", help="each row also compiled")
    peak = next((peak for name, peak in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    parser.add_argument("--peak", type=float, default=peak,
                        help="TFLOP/s of the device, for MFU (default: known of H100, H200, A100)")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - {*ROWS, "open_clip"}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)} and open_clip")
    return args


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = args.rows or ROWS
        make_inputs(Path(folder), (args.batch_size or 512) * args.steps, any("tinyclip" in name for name in rows),
                    "flame" in rows)
        for name in rows:
            against_open_clip(args) if name == "open_clip" else compare(name, Path(folder), args)


if __name__ == "__main__":
    main()
