"""The noise study: shares of swapped captions x seeds, each cell trained by clip.py and probed by nmtune.py.

    python tests/noise.py runs/noise                                       the toy
    python tests/noise.py runs/noise-emoji --data emoji/train --everyday emoji/test/everyday --bpe train --epochs 4

One process a core. Finished cells stay in the folder, so the same command goes on after a kill. It ends with the table.
Flags that are not below go to clip.py. With --everyday the domains are artists: seven that pre-training knows, and one
that it does not. Half of the concepts train the classifiers, the others are in both test sets. The last digit of a
concept's first code point decides, so that a man, a woman and a person who do the same stay together. The digits are
such that each class has concepts on both sides, except the two classes with only one concept, which are not tested.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--data", default="toy")
parser.add_argument("--everyday", help="folder of the test set everyday")
parser.add_argument("--bpe")
parser.add_argument("--shares", default="0,.05,.1,.2,.3")
parser.add_argument("--seeds", default="0,1,2")
parser.add_argument("--jobs", type=int, default=os.cpu_count())
args, flags = parser.parse_known_args()
sets, bpe = [], ["--bpe", args.bpe] if args.bpe else []
if args.everyday:
    known, training, tests = (f"{args.everyday}@/(?!fluent|openmoji-black).*", "_[0-9a-f]*[1689abd](-|$)",
                              "_[0-9a-f]*[^1689abd](-|$)")
    sets = [f"--train={known}{training}", f"--test={known}{tests}", f"--ood={args.everyday}@/fluent.*{tests}"]
args.out.mkdir(parents=True, exist_ok=True)
settings, asked = args.out / "settings.txt", " ".join(["--data", args.data, *sets, *bpe, *flags])
if settings.exists() and settings.read_text() != asked:
    raise SystemExit(f"{args.out} holds cells with other flags: {settings.read_text()}")
settings.write_text(asked)
cells = [(share, seed) for seed in args.seeds.split(",") for share in args.shares.split(",")]


def table(share, seed):
    return args.out / f"swap{share}-{seed}.json"


def cell(job):
    share, seed = job
    if table(share, seed).exists():
        return
    name = str(table(share, seed)).removesuffix(".json")
    steps = [["nmtune.py", "--swap", share, "--data", args.data, "--seed", seed],
             ["clip.py", "--data", args.data, "--subset", f"{name}.tsv", "--seed", seed, "--workers", "0", "--eval", "",
              "--out", name, *bpe, *flags],
             ["nmtune.py", f"{name}/last.pt", *sets, "--seed", seed, "--workers", "0", "--out", f"{name}/features",
              "--json", f"{name}.tmp"]]
    for step, output in zip(steps, (f"{name}.tsv", f"{name}.log", f"{name}.txt")):
        with open(output, "w") as file, open(f"{name}.err", "w") as errors:
            subprocess.run([sys.executable, ROOT / step[0], *step[1:]], stdout=file, stderr=errors, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.replace(f"{name}.tmp", table(share, seed))
    print(f"{share} of the captions swapped, seed {seed}: {name}.txt", flush=True)


with ThreadPoolExecutor(args.jobs) as pool:
    list(pool.map(cell, cells))

metric = "mean_per_class" if args.everyday else "top1"
print(f"{metric} in per cent, SVE and LSVR in domain: mean and standard deviation over seeds {args.seeds}")
print(f"{'swapped':8}{'row':14}" + "".join(f"{head:>16}" for head in ("in domain", "out of domain", "SVE", "LSVR")))
for share in args.shares.split(","):
    results = [json.loads(table(share, seed).read_text()) for seed in args.seeds.split(",")]
    for row in results[0]:
        columns = [[100 * result[row]["tests"][i][metric] for result in results] for i in (0, 1)]
        columns += [[result[row]["tests"][0][key] for result in results] for key in ("sve", "lsvr")]
        print(f"{share:8}{row:14}" + "".join(
            f"{statistics.mean(values):9.2f}" + (f" +-{statistics.stdev(values):5.2f}" if values[1:] else " " * 8)
            for values in columns))
