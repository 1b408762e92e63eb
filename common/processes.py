"""The processes of a distributed run, and joining tensors over them with gradients."""

import os

import torch
import torch.distributed as dist


def rank():
    """This process's number, 0 for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process writes, logs and shows progress."""
    return rank() == 0


def start_process_group():
    """Join the group that torchrun's environment variables describe: NCCL on GPUs, else gloo."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(backend)


def gather_objects(value):
    """`value`, anything that can be pickled, of every process, in the order of their ranks. Returns list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(*tensors):
    """Join tensors over all processes along their first dimension, which may differ between processes.

    Args:
        tensors: float or integer, all with the same first dimension; float ones keep their gradients.

    Returns:
        (tuple of tensors, first row of ours, number of processes): as `losses.keep_local` for one process.
    """
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensors[0])], device=tensors[0].device))
    sizes = [int(size) for size in sizes]
    joined = tuple(_Gather.apply(tensor, sizes) for tensor in tensors)
    return joined, sum(sizes[: rank()]), world_size()


class _Gather(torch.autograd.Function):
    """All-gather of uneven parts; a part's gradient is the sum of what all processes say about it."""

    @staticmethod
    def forward(ctx, tensor, sizes):
        ctx.sizes = sizes
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = sum(ctx.sizes[: rank()])
        return gradient[start : start + ctx.sizes[rank()]], None
