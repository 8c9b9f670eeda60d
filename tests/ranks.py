"""Several ranks on one machine, for tests."""
import os

import torch.multiprocessing as mp


def spawn(function, args, world):
    """Calls function(rank, *args) in `world` processes, and raises what one of them raises."""
    mp.spawn(_call, (function, args), world)


def _call(rank, function, args):
    function(rank, *args)
    # gloo's threads outlive a process group that DDP has used. If one of them drops its last tensor while the
    # interpreter ends, the process aborts (pytorch 190489). So this process ends at once.
    os._exit(0)
