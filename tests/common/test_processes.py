"""One process without a group, and a group of one. tests/test_ddp.py has several processes."""

import datetime
import os
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from common.processes import (
    Preemption,
    any_process,
    broadcast,
    from_main,
    gather,
    gather_objects,
    is_main,
    process_group,
    rank,
    world_size,
)

CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch):
    """The environment that torchrun gives to a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def check_alone():
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert from_main({"a": 1}) == {"a": 1}
    assert any_process(True, CPU) is True and any_process(False, CPU) is False
    tensor = torch.arange(3)
    broadcast([tensor])
    assert tensor.tolist() == [0, 1, 2]


def test_without_torchrun_there_is_no_group(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_alone()
    with process_group() as first_start:
        assert first_start is None and not dist.is_initialized()
        check_alone()


def test_a_group_of_one_process(environment):
    with process_group() as first_start:
        assert first_start is None and dist.is_initialized()
        check_alone()
    assert not dist.is_initialized()


def test_a_restart_yields_the_time_of_the_first_start(environment):
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = datetime.datetime.now().timestamp()
    with process_group() as first_start:
        assert first_start is not None and before - 1 <= first_start <= datetime.datetime.now().timestamp()


def test_an_error_leaves_the_group_alone(environment):
    """Destroying it would wait for the other processes."""
    with pytest.raises(UserError, match="no such file"), process_group():
        raise UserError("no such file")
    assert dist.is_initialized()


def test_gathering_in_one_process_gives_the_tensors_and_their_gradients(environment):
    with process_group():
        keys = torch.randn(4, 3, requires_grad=True)
        numbers = torch.arange(4)
        (gathered, same), start, processes = gather(keys, numbers)
        assert torch.equal(gathered, keys) and torch.equal(same, numbers)
        assert (start, processes) == (0, 1)
        factors = torch.randn(4, 3)
        (gathered * factors).sum().backward()
        assert torch.equal(keys.grad, factors)


# -- preemption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_the_block_is_remembered(number):
    before, told = signal.getsignal(number), []
    with Preemption(lambda: told.append(1)) as preemption:
        assert not preemption.requested(CPU) and preemption.name is None
        for _ in range(2):  # within a second, they count as one
            os.kill(os.getpid(), number)
        assert preemption.requested(CPU) and preemption.name == number.name and told == [1]
    assert signal.getsignal(number) == before
    assert preemption.requested(CPU), "still true after the block"


def test_a_second_signal_stops_at_once(monkeypatch):
    monkeypatch.setattr("common.processes._ONE_SIGNAL", 0.0)
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ctrl_c_stays_ignored_in_a_background_job():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.requested(CPU)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_remembered_and_nothing_fails():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption:
            found.append(preemption.requested(CPU))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) == before
