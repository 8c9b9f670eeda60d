"""flame.py"""
import torch
import flame
BORROW = {
    "gather_constant": lambda f: f(torch.rand(2, 3)),
    "sigmoid_loss": lambda f: f(torch.eye(4), torch.eye(4)[:, None], 10., -10.),
    "nce_loss": lambda f: f(torch.eye(4), torch.eye(4)[:, None], 10.),
    "facet_mask": lambda f: f(3, [2, 2]),
}
