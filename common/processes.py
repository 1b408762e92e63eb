"""The processes of a distributed run, and joining tensors over them with gradients."""

import contextlib
import datetime
import os
import signal
import time
import uuid

import torch
import torch.distributed as dist

from common.errors import UserError

PATIENCE = datetime.timedelta(hours=2)  # of a process with the others: one may evaluate or read alone for long
PREEMPTED = 75  # exit code of a run that was told to stop and can go on (EX_TEMPFAIL of sysexits.h)


def rank():
    """This process's number, 0 for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process writes, logs and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device=None, timeout=PATIENCE):
    """Be one of the processes that torchrun, or `ddp_pretrain.py`, has started while the block runs; else do nothing.

    Where torchrun has started them before, which it does when one fails or joins, yields when it first did, in seconds
    since 1970; else None. After a failure the group is left as it is: taking leave would wait for the others.

    Args:
        device (torch.device or None): of this process; on GPUs they talk over NCCL, else over gloo.
        timeout (datetime.timedelta): how long a process waits for the others.

    Raises:
        UserError: more processes than GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        yield None
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        backend = "nccl"
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local + 1} of this machine finds {gpus} GPUs; start as many processes as GPUs")
        torch.cuda.set_device(device)
    store, number, count = next(dist.rendezvous("env://"))
    start = _agree_on_start(store, number, count, timeout)
    own_store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(backend, timeout=timeout, store=own_store, rank=number, world_size=count)
    again = start > 1 or any(gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    yield float(store.get("first start")) if again else None
    dist.destroy_process_group()


def _agree_on_start(store, number, count, timeout):
    """The number of this start, from 1 on, the same in all its processes, so that they use a part of the store that is
    theirs alone.

    torchrun keeps its store when it starts the processes again, with the addresses of those that are gone, and counts
    the restarts on each node by itself. So the first process counts, and answers each other's question; an answer
    belongs to a question that no earlier process has asked.
    """
    if number:
        question = uuid.uuid4().hex
        store.set(f"question {number}", question)
        store.wait([f"answer {question}"], timeout)
        start = int(store.get(f"answer {question}"))
        store.set(f"known {start} {number}", "")
        return start
    start, waiting = store.add("starts", 1), set(range(1, count))
    store.compare_set("first start", "", str(time.time()))
    end = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"known {start} {other}"]):
                waiting.remove(other)
            elif store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", str(start))
        if time.monotonic() > end:
            raise TimeoutError(f"processes {', '.join(map(str, sorted(waiting)))} of {count} did not come")
        time.sleep(0.02)
    return start


def any_process(flag, device):
    """Whether `flag` is true in any process: bool, the same in all. They talk on `device`."""
    if not dist.is_initialized():
        return bool(flag)
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def from_main(value):
    """What the main process has, anything that can be pickled."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def broadcast(tensors):
    """Give all processes the main one's tensors, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class Preemption:
    """Notes in its block that a scheduler wants this process to stop (SIGTERM), so that all can stop at one place."""

    def __init__(self):
        self._told = False

    def __enter__(self):
        # Python takes signals in its main thread only; elsewhere there is nothing to note
        with contextlib.suppress(ValueError):
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number, frame):
        self._told = True

    def asked(self, device):
        """Whether any process has been told; all processes call it, and get the same answer."""
        return any_process(self._told, device)


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
        (tuple of tensors, first row of ours, number of processes): as `layers.losses.keep_local` for one process.
    """
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensors[0])], device=tensors[0].device))
    sizes = [int(size) for size in sizes]
    return tuple(_Gather.apply(tensor, sizes) for tensor in tensors), sum(sizes[: rank()]), world_size()


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
