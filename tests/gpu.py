"""What only a GPU can show: that the scripts are right there (check) and fast (speed).

    python tests/gpu.py check [script ...]
    python tests/gpu.py speed [script ...]

Each result is a line, printed at once and appended to runs/gpu.txt (--results), so that a run that is cut off keeps
what it had. Each script's own `main` trains small models in this process. On a CPU the same checks run with gloo for
NCCL and with a compiler that only traces; what needs CUDA is named and skipped. The test suite does that.
"""
import argparse
import importlib
import math
import sys
import tempfile
import time
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import cost
import data
import eval as evaluator

CHECKS = {  # script: flags of its small runs (three epochs of three steps), the rows of cost.py that are its speed
    "clip": (["--augment declip", "--model RN50 --image-size 32"], ["clip"]),
    "declip": (["--augment declip"], ["declip", "declip-rn50"]),
    "protoclip": (["--augment protoclip --episode-size {episode} --prototypes 6 --warmup-episodes 1"], ["protoclip"]),
    "aclip": (["--model tiny-4 --augment aclip"], ["aclip", "aclip-eff"]),
    "tinyclip": (["--teacher {folder}/teacher.pt",
                  "--teacher {folder}/teacher.pt --auto .25 --prune-step 7 --sparsity-warmup 3"],
                 ["tinyclip", "tinyclip-cached"]),
    "slip": (["--augment slip"], ["slip"]),
    "flame": (["--augment declip", "--loss nce --centre"], ["flame"]),
}
# clusters and masks turn rounding into other choices; tinyclip has a scale of 50, slip divides by .1
LOOSE = {"protoclip": 10, "aclip": 10, "tinyclip": 30, "slip": 5}
LATER = {"protoclip", "episode", "rng"}  # in a checkpoint: what a bad step may change


def small_models(module):
    """For a CPU: the models of a script that are tiny anyway, and its RN50, with one layer of the least width."""
    least = dict(embed_dim=64, text_width=64, text_layers=1)
    tiny = {name: sizes for name, sizes in module.MODELS.items() if name.startswith("tiny")}
    found = {name: sizes | least | dict(vision_width=64, vision_layers=1) for name, sizes in tiny.items()}
    return found | {"RN50": least | dict(patch_size=None, vision_width=16, vision_layers=(1, 1, 1, 1))}


class Ranks(int):
    """The number 1, which passes for more than 1: main then wraps its model in DDP."""
    __hash__ = int.__hash__

    def __eq__(self, other):
        return other != 1 and int(self) == other

    def __ne__(self, other):
        return not self == other

    def __gt__(self, other):
        return other == 1 or int(self) > other


def tensors(state, path=""):
    """Yields (name, tensor) for all tensors of a checkpoint that a bad step must leave alone: no counts of batches."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, (dict, list, tuple)):
            yield from tensors(value, f"{path}{key}.")
        elif isinstance(value, torch.Tensor) and not str(key).endswith("num_batches_tracked"):
            yield f"{path}{key}", value.detach().cpu().clone()


class Checks:
    """Small runs of the scripts, compared. say: takes a line; failed: names of the checks that failed; steps: of the
    optimizer in the run so far."""

    def __init__(self, folder, say):
        self.folder, self.say, self.failed, self.cuda = Path(folder), say, [], torch.cuda.is_available()
        self.batch = 128 if self.cuda else 8

    def run(self, script, flags, out, *patches, loader=None, stop_after=None, cpu=False):
        """Rows of the log with a loss, gradients of the first two steps, checkpoints by step. stop_after: the step
        after whose checkpoint the run is killed."""
        module, gradients, states, self.steps = importlib.import_module(script), [], {}, 0
        keep = module.save_checkpoint

        def look(optimizer, *_):
            self.steps += 1
            if self.steps <= 2 and not loader:
                gradients.append(torch.cat([p.grad.detach().float().flatten().cpu() for group in optimizer.param_groups
                                            for p in group["params"] if p.grad is not None]))

        def save(path, **state):
            keep(path, **state)
            states.setdefault(state["step"], dict(tensors({k: v for k, v in state.items() if k not in LATER})))
            if state["step"] == stop_after:
                raise KeyboardInterrupt

        patches = [*patches, mock.patch.object(module, "save_checkpoint", save)]
        if cpu:
            patches.append(mock.patch.object(torch.cuda, "is_available", lambda: False))
        if not self.cuda:
            patches += [mock.patch.dict(module.MODELS, small_models(module)),
                        mock.patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager")),
                        mock.patch.object(torch, "compile", partial(torch.compile, backend="eager"))]
        flags = (f"--limit {3 * self.batch} --batch-size {self.batch} --epochs 3 --warmup 2 --eval= --eval-every 3 "
                 "--log-every 1 --workers 0 " + flags.format(folder=self.folder, episode=3 * self.batch)).split()
        hook = register_optimizer_step_pre_hook(look)
        try:
            rows = cost.run(script, flags, self.folder / out, loader, *patches)
        except KeyboardInterrupt:
            rows = []
        finally:
            hook.remove()
        return [row for row in rows if "loss" in row], gradients, states

    def verdict(self, what, good, numbers):
        self.say(f"{'ok  ' if good else 'FAIL'} {what}: {numbers}")
        if not good:
            self.failed.append(what)

    def agree(self, what, one, other, limit):
        """Losses of all steps and gradients of the first two of two runs agree."""
        losses = [[row["loss"] for row in rows] for rows, *_ in (one, other)]
        pairs = [(a, b) for a, b in zip(*losses) if None not in (a, b)]
        loss = max((abs(a - b) for a, b in pairs), default=math.inf)
        gradient = max((float((a - b).norm() / a.norm()) for a, b in zip(one[1], other[1])), default=0.)
        steps = [len(row) for row in losses]
        slope = min(10 * limit, .5)
        good = steps[0] == steps[1] and 2 * len(pairs) > steps[0] and loss <= limit and gradient <= slope
        self.verdict(what, good, f"losses differ by {loss:.1e} (at most {limit:.0e}), gradients by {gradient:.1e} of "
                     f"their length (at most {slope:.0e}), {steps[0]} and {steps[1]} steps")

    def attempt(self, what, check):
        """A check that breaks is a check that failed; the others go on."""
        try:
            check()
        except (Exception, SystemExit) as error:
            self.verdict(what, False, f"{type(error).__name__}: {error}".splitlines()[0][:300])

    def check(self, script, flags, name, only=None):
        """All checks of one script at one set of flags, or only that of this name."""
        loose, gates = LOOSE.get(script, 1), "--auto" in flags
        module = importlib.import_module(script)
        plain = self.run(script, f"{flags} --amp off", f"{name}-off")
        bf16 = self.run(script, f"{flags} --amp bf16", f"{name}-bf16")

        def same_as_cpu():
            if gates or not self.cuda:
                reason = "each device draws other gates" if gates else "there is no GPU"
                return self.say(f"skip {name} fp32 on a CPU and on a GPU: {reason}")
            cpu = self.run(script, f"{flags} --amp off", f"{name}-cpu", cpu=True)
            self.agree(f"{name} fp32 on a CPU and on a GPU", cpu, plain, 5e-3 * loose)

        def ddp():
            built, backend, init = [], "nccl" if self.cuda else "gloo", module.init_distributed

            class Wrapped(nn.parallel.DistributedDataParallel):
                def __init__(self, *args, **kwargs):
                    super().__init__(*args, **kwargs)
                    built.append(dist.get_backend())

            def one_of_many():
                _, _, device = init()
                dist.init_process_group(backend, init_method=f"file://{self.folder}/{name}-store", rank=0, world_size=1)
                return 0, Ranks(1), device

            try:
                found = self.run(script, f"{flags} --amp off", f"{name}-ddp",
                                 mock.patch.object(module, "init_distributed", one_of_many),
                                 mock.patch.object(module, "DistributedDataParallel", Wrapped))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            assert built and set(built) == {backend}, f"main built no DDP over {backend}"
            self.agree(f"{name} DDP over {backend} and plain", plain, found, 2e-3 * (loose if self.cuda else 1))

        def precision(amp, found):
            if gates:  # no comparison of numbers: gates at a copy of the teacher turn rounding into other choices
                losses = [row["loss"] for row in found[0]]
                good = None not in losses and len(losses) == len(plain[0])
                return self.verdict(f"{name} {amp}", good, f"{len(losses)} finite losses")
            self.agree(f"{name} {amp} and fp32", plain, found, .1 * max(1, loose / 3))

        def bad_epoch():
            """All steps of the second epoch see infinite pictures."""
            normalize = data.Preprocess.normalize

            def poisoned(preprocess, images):
                images = normalize(preprocess, images)
                return images * math.inf if 3 <= self.steps < 6 and not torch.is_inference_mode_enabled() else images

            patch = mock.patch.object(data.Preprocess, "normalize", poisoned)
            rows, _, states = self.run(script, f"{flags} --amp bf16", f"{name}-bad", patch)
            changed = [key for key, value in states[3].items() if not torch.equal(value, states[6][key])]
            losses = [row["loss"] for row in rows]
            skipped = losses[3:6] == [None] * 3 and None not in losses[:3] + losses[6:] and rows[-1]["bad_steps"] == 3
            found = f"{len(changed)} of {len(states[3])} tensors changed {changed[:3]}"
            self.verdict(f"{name} three bad steps", skipped and not changed,
                         f"{found}, losses {[loss and round(loss, 2) for loss in losses]}")

        def resume():
            self.run(script, f"{flags} --amp bf16", f"{name}-cut", stop_after=3)
            rest = self.run(script, f"{flags} --amp bf16", f"{name}-cut")
            limit = 2e-2 * loose if self.cuda else 0  # on a CPU it is exact
            self.agree(f"{name} killed after step 3 and resumed", (bf16[0], []), (rest[0], []), limit)

        def compiled():
            found = self.run(script, f"{flags} --amp off --compile", f"{name}-compiled")
            self.agree(f"{name} compiled and eager", plain, found, 2e-3 * (loose if self.cuda else 1))

        def no_wait():
            if not self.cuda:
                return self.say(f"skip {name} no wait for the device: there is no GPU")

            def each(i):
                if i == 2:  # libraries are loaded in the first steps
                    torch.cuda.set_sync_debug_mode("error")
                if i == 5:
                    torch.cuda.set_sync_debug_mode("default")

            late = "--prune-step 90" if gates else ""
            if script == "protoclip":
                late = "--warmup-episodes 99 --episode-size 99999"
            for amp in ("bf16", "fp16"):  # no log line and no end of an epoch within the five steps
                more = f"{flags} {late} --amp {amp} --log-every 99 --epochs 1 --limit {99 * self.batch}"
                try:
                    self.run(script, more, f"{name}-wait-{amp}", loader=cost.FixedBatch(5, 24, each))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                self.verdict(f"{name} {amp}, no wait for the device", self.steps == 5, f"steps 3 to 5 of {self.steps}")

        def workers():
            pinned, loader = [], data.loader

            def watched(*args, **kwargs):
                found = loader(*args, **kwargs)
                pinned.append(found.pin_memory)
                return found

            patch = mock.patch.object(data, "loader", watched)
            found = self.run(script, f"{flags} --amp off --workers 2", f"{name}-workers", patch)
            assert pinned and all(pinned) == self.cuda, "pages are pinned where there is a GPU"
            self.agree(f"{name} two worker processes and none", plain, found, 2e-3 * loose if self.cuda else 0)

        def evaluation():
            path, device = self.folder / f"{name}-off/last.pt", "cuda" if self.cuda else "cpu"
            model, tokenizer, preprocess = evaluator.load(str(path), device)
            test = data.ToyDataset(512 if self.cuda else 64, None, "test")
            with mock.patch.object(evaluator, "open_test", lambda *_, **__: test):
                full, half = (evaluator.evaluate(model, tokenizer, preprocess, ["toy"], amp)["toy"]["top1"]
                              for amp in (None, torch.bfloat16))
            self.verdict(f"{name} top-1 on toy in fp32 and bf16", abs(full - half) < .05, f"{full:.3f} {half:.3f}")

        def fp16():
            smaller = partial(torch.amp.GradScaler, init_scale=256.)  # the usual 65,536 overflows in the first steps
            scaler = mock.patch.object(torch.amp, "GradScaler", smaller)
            precision("fp16", self.run(script, f"{flags} --amp fp16", f"{name}-fp16", scaler))

        checks = {"cpu": same_as_cpu, "ddp": ddp, "bf16": lambda: precision("bf16", bf16), "fp16": fp16,
                  "bad steps": bad_epoch, "resume": resume, "compile": compiled, "wait": no_wait, "workers": workers,
                  "eval": evaluation}
        for what, check in checks.items():
            if only in (None, what):
                self.attempt(f"{name} {what}", check)


def check(names, say, folder):
    """Names of the checks that failed, for the scripts named."""
    torch.backends.cudnn.allow_tf32 = False
    checks = Checks(folder, say)
    tokenizer = data.find_tokenizer(None, "toy")
    with mock.patch.object(data, "find_tokenizer", lambda *_: tokenizer):  # also of the teacher, whose file has none
        import clip
        with mock.patch.dict(clip.MODELS, {} if checks.cuda else small_models(clip)):
            torch.manual_seed(0)
            teacher = clip.build("tiny", vocab=tokenizer.vocab_size, vision_layers=4, text_layers=4)
        torch.save(teacher.state_dict(), Path(folder) / "teacher.pt")
        for name in names:
            for number, flags in enumerate(CHECKS[name][0]):
                start = time.perf_counter()
                label = f"{name}{number or ''}"
                checks.attempt(label, lambda: checks.check(name, flags, label))
                say(f"     {label} {flags}: {time.perf_counter() - start:.0f} s")
    return checks.failed


def speed(names, say, folder, argv=()):
    """Speed, memory and MFU of the scripts named, eager and compiled; K-means; a profile of each script's first row."""
    cuda = torch.cuda.is_available()
    args = cost.parse_args(["--compile", *argv] if cuda else list(argv))
    cost.make_inputs(folder, (args.batch_size or 512) * args.steps, "tinyclip" in names, "flame" in names)
    for name in names:
        for row in CHECKS[name][1]:
            cost.compare(row, folder, args, say)
        say(cost.profile(cost.ROWS[CHECKS[name][1][0]][0], folder, args, args.batch_size or 128))
        if name == "protoclip":
            sizes = (200_000, 20_000, 20) if cuda else (2_000, 50, 3)
            say("K-means of {:,} rows, {:,} clusters, {} rounds: {:.1f} s".format(*sizes, cost.kmeans_seconds(*sizes)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "speed"))
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"default: {' '.join(CHECKS)}")
    parser.add_argument("--results", default="runs/gpu.txt", help="the lines are appended to it (default: %(default)s)")
    args, more = parser.parse_known_args(argv)  # speed hands the rest to cost.py
    if unknown := set(args.scripts) - {*CHECKS}:
        parser.error(f"there are no checks of {', '.join(sorted(unknown))}; there are those of {', '.join(CHECKS)}")
    if more and args.what == "check":
        parser.error(f"check takes no {more[0]}")
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)

    def say(line):
        print(line, flush=True)
        with open(args.results, "a") as file:
            file.write(line + "\n")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{args.what}, torch {torch.__version__}, {device}")
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "speed":
            return speed(args.scripts or CHECKS, say, Path(folder), more)
        failed = check(args.scripts or CHECKS, say, Path(folder))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))
    say("all checks passed")


if __name__ == "__main__":
    main()
