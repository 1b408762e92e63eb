"""The gated experts of PWLayer with a hand-written backward pass. U items, D text width, H hidden size, E experts.

The experts are computed one after the other. For the backward pass, the plain version keeps several float arrays
[E, U, D]. This version keeps only the dropout mask of this size, with one byte per number. It also needs one matrix
product less.
"""

from typing import Any

import torch
from torch import Tensor

from layers.fast.dropout import keep_mask


def forward(module: Any, x: Tensor, gates: Tensor) -> Tensor:
    """`PWLayer.forward`: sum_e g_e W_e (dropout(x) - b_e), x [U, D] and gates [U, E] -> [U, H]."""
    kept, scale = None, 1.0
    if module.training and module.dropout > 0:
        kept = keep_mask((len(module.bias), *x.shape), module.dropout, x.device)
        scale = 1 / (1 - module.dropout)
    projected_bias = torch.einsum("ehd,ed->eh", module.weight, module.bias)
    weight = module.weight
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gates, weight = x.to(dtype), gates.to(dtype), weight.to(dtype)
    return _GatedExperts.apply(x, gates * scale, weight, kept) - gates @ projected_bias


class _GatedExperts(torch.autograd.Function):
    """sum_e g_e W_e (k_e x): x [U, D], g [U, E], W [E, H, D], k bool [E, U, D] or None -> [U, H]."""

    @staticmethod
    def forward(ctx, x, gates, weight, kept):
        outputs = x.new_empty(len(weight), len(x), weight.size(1))  # [E, U, H], not yet multiplied by the gates
        total = x.new_zeros(outputs.shape[1:])
        for expert, output in enumerate(outputs):
            torch.mm(_dropped(x, kept, expert), weight[expert].T, out=output)
            total.addcmul_(output, gates[:, expert, None])
        ctx.save_for_backward(x, gates, weight, kept, outputs)
        return total

    @staticmethod
    def backward(ctx, gradient):
        x, gates, weight, kept, outputs = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        x_gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # text features need none
        gates_gradient, weight_gradient = torch.empty_like(gates), torch.empty_like(weight)
        for expert, output in enumerate(outputs):
            gates_gradient[:, expert] = torch.linalg.vecdot(gradient, output)
            gated = gradient * gates[:, expert, None]  # [U, H]
            torch.mm(gated.T, _dropped(x, kept, expert), out=weight_gradient[expert])
            if x_gradient is not None:
                x_gradient += _dropped(gated @ weight[expert], kept, expert)
        return x_gradient, gates_gradient, weight_gradient, None


def _dropped(x, kept, expert):
    """x [U, D] after one expert's dropout, not yet rescaled."""
    if kept is None:
        return x
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # numpy multiplies floats by booleans in one pass, while torch converts the booleans first
        return torch.from_numpy(x.detach().numpy() * kept[expert].numpy())
    return x * kept[expert]
