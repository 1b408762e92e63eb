"""A run as a process: its command line, its environment, its log."""

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import IO, Any

from engine.settings import ROOT
from experiments.plan import Run

CHILD = os.path.join(ROOT, "experiments", "child.py")


class Job:
    """A run in a process of its own, which starts at once.

    Args:
        name: name of the run, see `experiments.identity.run_name`.
        lock: open lock file. The process inherits it, so that the run stays locked as long as the process lives.
        command: from `command_line`.
        part: folder for the result, the ranks and the log.
        checkpoints: folder for the checkpoint.

    Attributes:
        start: time of the start, `time.monotonic()`.
        log: path of the log file.
    """

    def __init__(self, run: Run, name: str, lock: IO, command: list[str], part: str, checkpoints: str):
        self.run, self.name, self.lock = run, name, lock
        self.log = os.path.join(part, "log.txt")
        files = {"result_file": f"{part}/result.json", "ranks_file": f"{part}/ranks.parquet"}
        own = option_words(files | {"checkpoint_dir": checkpoints})
        self.start = time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, CHILD, str(os.getpid()), *command, *own],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches run.py only, which then stops its runs
            )

    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self.start

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process. Kill it if it has not ended after some seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_line(self) -> str:
        """The last line of the log."""
        with open(self.log, errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1] if lines else f"ended with code {self.process.returncode}, without a message"


def machine() -> str:
    """The processor of this machine and its number of cores."""
    model = "unknown processor"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def command_line(run: Run) -> list[str]:
    """The command line of a run, without the files that it writes."""
    options = run.options() | {"groups": True, "show_progress": False}
    options |= {"bundle": False} if "bundle" in run.settings else {}
    return [os.path.join(ROOT, run.command), *option_words(options)]


def option_words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line. JSON is also YAML, which the commands read."""
    return [f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items()]


def threads() -> int:
    """The number of threads of a run."""
    return int(_environment()["OMP_NUM_THREADS"])


def _environment() -> dict[str, str]:
    """The environment of a run: one thread, unless OMP_NUM_THREADS is set."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
