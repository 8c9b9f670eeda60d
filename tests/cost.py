"""README's table of cost: each script against clip.py at its paper's model, by running both and reading their logs.

    python tests/cost.py                                                    on a CPU: two rounds of six steps, some minutes a row
    python tests/cost.py --batch-size 256 --steps 60 --workers 12 --peak 989 --flags=--compile      on a GPU of 989 TFLOP/s
    python tests/cost.py open_clip                                          its model and loss, if it is installed

Pictures are noise of 256 pixels in a tar, captions eight words. The two commands of a row run in turn; a step takes the median of a
run's steps but the first, and the least of the rounds' medians (on a CPU less the waiting for data, which nothing overlaps there).
"""
import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torchvision.io import encode_jpeg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
STUDENT = "tinyclip.py --model ViT-39M-16-Text-19M --teacher {teacher}"
ROWS = {  # script and flags, those of its baseline, GFLOP a pair of both, by README
    "declip": ("declip.py --model ViT-B-32", "clip.py --model ViT-B-32 --augment declip", 88, 44),
    "protoclip": ("protoclip.py --model RN50 --warmup-episodes 0 --episode-size 9999999", "clip.py --model RN50 --augment protoclip", 74, 55),
    "aclip": ("aclip.py --model ViT-B-16", "clip.py --model ViT-B-16 --augment aclip", 159, 123),
    "aclip-eff": ("aclip.py --model ViT-B-16 --ema-size 112", "clip.py --model ViT-B-16 --augment aclip", 133, 123),
    "tinyclip": (STUDENT, f"{STUDENT} --init none --alpha 0 --logit-scale 0", None, None),
    "tinyclip-cached": (f"{STUDENT} --cache-teacher-text", f"{STUDENT} --init none --alpha 0 --logit-scale 0", None, None),
}
WITH_MEMORY = """import atexit, resource, runpy, sys
sys.path.insert(0, '.')
sys.argv = sys.argv[1:]
atexit.register(lambda: print('RSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
runpy.run_path(sys.argv[0], run_name='__main__')"""


def run(command, folder, args):
    """Seconds a step, of which for data, and peak memory in GB (on a GPU its own, else the process's)."""
    out = folder / "out"
    done = subprocess.run([
        sys.executable, "-c", WITH_MEMORY, *command.format(teacher=folder / "teacher.pt").split(), *args.flags.split(),
        *f"--recipe cc3m --epochs 1 --warmup 1 --log-every 1 --eval= --restart --workers {args.workers} --batch-size {args.batch_size}".split(),
        "--data", folder, "--out", out], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-1000:]}")
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    steps = [row for row in rows if "loss" in row]
    waited = median(row["waited"] for row in steps[1:])
    seconds = median(args.batch_size / row["pairs_per_second"] for row in steps[1:]) - waited * (not torch.cuda.is_available())
    seconds += sum(row["extract_seconds"] + row["cluster_seconds"] for row in rows if "extract_seconds" in row) / len(steps)
    rss = int(done.stdout.split("RSS")[1]) / 2 ** (20 if sys.platform == "linux" else 30)
    return seconds, waited, steps[-1].get("memory_gb", rss)


def against_open_clip(args):
    """A step with 77 tokens, and with captions of 20 cut to 24 as the loader does; fp32, the same fused AdamW."""
    import open_clip
    from open_clip.loss import ClipLoss

    import clip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("ViT-B-32", "RN50", "ViT-B-16"):
        theirs, ours = open_clip.create_model(name).to(device).train(), clip.build(name, quick_gelu=name == "RN50").to(device)
        if name == "RN50":
            ours.visual.to(memory_format=torch.channels_last)
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for model in (theirs, ours)]
        images, tokens = torch.randn(args.batch_size, 3, 224, 224, device=device), torch.zeros(args.batch_size, 77, dtype=torch.int64)
        tokens[:, 0], tokens[:, 1:20], tokens[:, 20] = 49406, torch.randint(300, 49000, (args.batch_size, 19)), 49407
        times = {"open_clip": [], "clip.py": [], "clip.py cut": []}
        for _ in range(args.steps):
            for kind in times:
                start, optimizer = time.perf_counter(), optimizers[kind != "open_clip"]
                features = (ours if optimizer is optimizers[1] else theirs)(images, tokens[:, :24 if "cut" in kind else 77].to(device))
                loss = (clip.clip_loss if optimizer is optimizers[1] else ClipLoss())(*features[:3])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[kind].append(time.perf_counter() - start)
        print(name, {kind: f"{median(t[1:]):.3f} s, {median(t[1:]) / median(times['open_clip'][1:]):.2f}" for kind, t in times.items()}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", choices=[[], *ROWS, "open_clip"], help=f"{', '.join(ROWS)} (default: these), open_clip")
    for name, default in (("batch-size", 4), ("steps", 6), ("rounds", 2), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--flags", default="", help="for all scripts")
    args = parser.parse_args()
    if "open_clip" in args.rows:
        return against_open_clip(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i in range(args.batch_size * args.steps):
                picture = encode_jpeg(torch.randint(256, (3, 256, 256), dtype=torch.uint8)).numpy().tobytes()
                for ending, content in (("jpg", picture), ("txt", " ".join(f"word{i * j % 97}" for j in range(8)).encode())):
                    entry = tarfile.TarInfo(f"{i:06}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        import clip
        torch.save(clip.build("ViT-B-16").state_dict(), folder / "teacher.pt")
        for name in args.rows or ROWS:
            method, baseline, *gflop = ROWS[name]
            rounds = [(run(method, folder, args), run(baseline, folder, args)) for _ in range(args.rounds)]
            for command, (seconds, waited, memory), flop in zip((method, baseline), map(min, zip(*rounds)), gflop):
                mfu = f", MFU {flop * args.batch_size / seconds / args.peak / 10:.1f} %" if flop and args.peak else ""
                print(f"{command}: {seconds:.3f} s a step, {args.batch_size / seconds:.1f} pairs/s, waiting {waited:.3f} s, {memory:.1f} GB{mfu}")
            print(f"{name}: {min(r[0][0] for r in rounds) / min(r[1][0] for r in rounds):.2f}", flush=True)


if __name__ == "__main__":
    main()
