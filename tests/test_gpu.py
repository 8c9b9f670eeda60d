"""tests/gpu.py and tests/cost.py on a CPU: small models, gloo in place of NCCL. What needs CUDA they skip by name."""
from unittest import mock

import cost
import data
import gpu
import pytest
import torch


@pytest.mark.slow
def test_check(tmp_path, capsys):
    gpu.main(["check", "--results", str(tmp_path / "results.txt")])
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("FAIL")] and lines[-1] == "all checks passed"
    for name in gpu.CHECKS:
        for what in ("DDP over gloo", "three bad steps", "killed after step 3", "compiled and eager", "two worker"):
            assert any(line.startswith(f"ok   {name} {what}") for line in lines), (name, what)
        assert any(line.startswith(f"skip {name} no wait for the device") for line in lines)


def test_check_notices_a_step_that_is_not_skipped(tmp_path):
    """A norm that always looks finite lets bad steps into the weights; a DDP that is not built is no success either."""
    checks = gpu.Checks(tmp_path, lambda line: None)
    with mock.patch.object(torch.nn.utils, "get_total_norm", lambda gradients: torch.ones(())):
        checks.check("clip", "", "clip", "bad steps")
    with mock.patch.object(gpu, "Ranks", int):
        checks.check("clip", "", "clip", "ddp")
    assert checks.failed == ["clip three bad steps", "clip ddp"]


@pytest.mark.slow
def test_speed(tmp_path, capsys):
    """The rows run. Their FLOPs are those of the matrices: two a weight and token forward, twice as many backward."""
    rows = {"clip": ("declip --model tiny --augment declip", "clip --model tiny --augment declip", None)}
    with mock.patch.object(cost, "ROWS", rows):
        gpu.main(["speed", "clip", "--results", str(tmp_path / "results.txt"), "--batch-size", "8", "--steps", "5",
                  "--rounds", "1", "--peak", "1"])
    lines = (tmp_path / "results.txt").read_text()
    counts = [line for line in lines.splitlines() if "GFLOP" in line]
    method, baseline = (float(line.split("pairs/s, ")[1].split(" GFLOP")[0]) for line in counts)
    block, width = 12 * 128 ** 2, 128  # weights of a block
    # four blocks a tower, 16 patches and a class token, 24 tokens
    weights = 4 * block * 17 + 3 * 8 * 8 * width * 16 + 4 * block * 24
    attention = 4 * 2 * width * (17 ** 2 + 24 ** 2)
    assert baseline == pytest.approx(6 * (weights + attention) / 1e9, rel=.05, abs=.05) and 1.9 < method / baseline < 4
    assert "MFU" in lines and "at 77 tokens" in lines and "of its baseline's time" in lines and "Self CPU" in lines


@pytest.mark.slow
def test_cost_makes_the_vectors_that_flame_reads(capsys):
    rows = {"flame": ("flame --model tiny --augment clip --texts {folder}/texts", "clip --model tiny", 4)}
    with mock.patch.object(cost, "ROWS", rows):
        cost.main(["flame", "--batch-size", "4", "--steps", "2", "--rounds", "1"])
    assert "flame, eager" in capsys.readouterr().out


def test_cost_names_a_wrong_row(capsys):
    with pytest.raises(SystemExit):
        cost.main(["declop"])
    assert "there is no row declop" in capsys.readouterr().err


def test_augment_keeps_its_numbers_and_is_one_graph():
    """Pixels that the first, slower version of data.augment gave; compiled, the function is a graph without breaks."""
    images = (torch.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6) * 37 % 256).byte()
    params = torch.tensor([[1, .7, 1.3, .6, .1, 0, 56, 0], [0, 1.2, .8, 1.4, -.2, 0, 0, 1]])
    expected = torch.tensor([[.27165008, .24776903, .46641958], [.46970963, .00853324, .37483919]])
    assert (data.augment(images, params)[:, :, 2, 1] - expected).abs().max() < 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(data.augment, backend="aot_eager", fullgraph=True)
    assert (compiled(images, params) - data.augment(images, params)).abs().max() < 1e-6
