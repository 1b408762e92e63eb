"""The processes of a distributed run: joining the group, exchanging values, gathering tensors with gradients."""

import contextlib
import datetime
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError

TIMEOUT = datetime.timedelta(hours=2)  # long: one process may evaluate or read files while the others wait
_ONE_SIGNAL = 1.0  # seconds
PREEMPTED = 75  # exit code of a run that was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)


def rank() -> int:
    """The number of this process, from 0. Without a process group, 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes. Without a process group, 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which writes, logs and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device | None = None, timeout: datetime.timedelta = TIMEOUT) -> Iterator[float | None]:
    """Join the process group for the duration of the block. Without torchrun this does nothing.

    `ddp_pretrain.py` starts processes with the same environment variables as torchrun. If the block raises an error,
    the group is not destroyed, because that would wait for the other processes.

    Args:
        device: the device of this process. GPUs communicate over NCCL, CPUs over gloo.
        timeout: how long a process waits for the others.

    Yields:
        None. After a restart, the time of the first start, in seconds since 1970. torchrun restarts the processes when
        one of them fails or a node joins.

    Raises:
        UserError: there are more processes than GPUs.
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
    restarted = start > 1 or any(gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    yield float(store.get("first start")) if restarted else None
    dist.destroy_process_group()


def _agree_on_start(store: dist.Store, number: int, count: int, timeout: datetime.timedelta) -> int:
    """Agree with the other processes on the number of this start, from 1. Each start uses its own part of the store.

    torchrun keeps its store after a restart. The store still has the addresses of the ended processes, and each node
    has its own count of restarts. So process 0 counts the starts, and every other process asks it for the number. A
    question has a random name, so that a process cannot read the answer to a question of an earlier start.

    Args:
        store: shared by all processes.
        number, count: the rank of this process, and the number of processes.
        timeout: how long to wait for the other processes.

    Raises:
        TimeoutError: a process did not start in time.
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
        for process in sorted(waiting):
            if store.check([f"known {start} {process}"]):
                waiting.remove(process)
            elif store.check([f"question {process}"]):
                store.set(f"answer {store.get(f'question {process}').decode()}", str(start))
        if time.monotonic() > end:
            raise TimeoutError(f"processes {', '.join(map(str, sorted(waiting)))} of {count} did not start in time")
        time.sleep(0.02)
    return start


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process. All processes must call this. They communicate on `device`."""
    if not dist.is_initialized():
        return bool(flag)
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def from_main(value: Any) -> Any:
    """The value of process 0, in every process. It must be picklable."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors of every process, in place, with those of process 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class Preemption:
    """Within its block, records whether this process has received SIGTERM or SIGINT (Ctrl-C).

    So all processes can stop after the same batch. A second signal raises KeyboardInterrupt. Signals within a second
    count as one, because a process may get the same Ctrl-C from the terminal and from its parent. Outside the main
    thread, Python receives no signals, and the block does nothing.

    Args:
        then: is called at the first signal.

    Attributes:
        name: the signal that was received, None before.
    """

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.name: str | None = None
        self._then, self._first = then, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, now
            self._then()
        elif now - self._first > _ONE_SIGNAL:
            raise KeyboardInterrupt

    def requested(self, device: torch.device) -> bool:
        """Whether any process has received the signal. All processes must call this. They get the same answer."""
        return any_process(self.name is not None, device)


def gather_objects(value: Any) -> list:
    """The values of all processes, ordered by rank. They must be picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int, int]:
    """Concatenate tensors over all processes along their first dimension. It may differ between processes.

    Args:
        tensors: float or integer [n, ...], with the same n. Gradients flow back to the float tensors.

    Returns:
        The concatenated tensors, the first row of this process in them, and the number of processes. This is what
        `layers.losses.keep_local` returns for one process.
    """
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensors[0])], device=tensors[0].device))
    lengths = [int(size) for size in sizes]
    return tuple(_Gather.apply(tensor, lengths) for tensor in tensors), sum(lengths[: rank()]), world_size()


class _Gather(torch.autograd.Function):
    """All-gather of parts of different lengths. The gradient of a part is summed over all processes."""

    @staticmethod
    def forward(ctx, tensor, lengths):
        ctx.lengths = lengths
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = sum(ctx.lengths[: rank()])
        return gradient[start : start + ctx.lengths[rank()]], None
