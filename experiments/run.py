"""Run the missing runs of an experiment and write its table: python experiments/run.py experiments/scientific.yaml

The command can be stopped or killed at any moment. Started again, it goes on with the first run that is missing.
experiments/README.md describes the YAML file and the files that the command writes.
"""

import argparse
import contextlib
import datetime
import os
import signal
import sys
import time

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)  # so that the script finds the project's modules from any working folder

from common.errors import UserError, did_you_mean, run_command  # noqa: E402
from engine.settings import ROOT, Setting  # noqa: E402
from experiments.identity import code_hash, describe, run_name  # noqa: E402
from experiments.job import Job, command_line, machine, threads  # noqa: E402
from experiments.plan import Experiment, Run, plan_runs, read_experiment  # noqa: E402
from experiments.store import Finished, Store  # noqa: E402

INCOMPLETE = 75  # exit code: stopped before the end, start it again (EX_TEMPFAIL, as `common.processes.PREEMPTED`)
CLEAR = "\r\033[K"  # clears the line of a terminal
_POLL = 0.1  # seconds
_STOPPING = 20  # seconds until a process that does not react to SIGTERM is killed


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    options = _parser().parse_args(argv)
    Setting("workers", 1, "int", range="1 or more").check(options.workers, "option --workers")
    if options.minutes is not None:
        Setting("minutes", 1.0, "float", range="above 0").check(options.minutes, "option --minutes")
    experiment = read_experiment(options.experiment)
    runs = plan_runs(experiment, options.data_path and os.path.abspath(options.data_path))
    output = os.path.abspath(options.output or os.path.join(ROOT, "saved", "experiments", experiment.name))
    runner = Runner(experiment, runs, output, options.workers, options.minutes, _rerun(options.rerun, experiment))
    if not options.table:
        with _signals_as_interrupts():
            runner.work()
    runner.write_table()
    print(f"written: {output}/table.md, table.json, table.png")
    if runner.failed:
        raise SystemExit(1)
    if runner.left and not options.table:
        raise SystemExit(INCOMPLETE)


class Runner:
    """Runs what is missing of an experiment.

    Args:
        runs: all runs of the experiment.
        output: the folder of the experiment.
        workers: number of runs at the same time.
        minutes: time limit, None for no limit.
        rerun: labels of the rows whose runs are repeated if they were made with other code.

    Attributes:
        failed: the runs that failed.
        left: the missing runs, in order.
    """

    def __init__(
        self,
        experiment: Experiment,
        runs: list[Run],
        output: str,
        workers: int = 1,
        minutes: float | None = None,
        rerun: frozenset[str] = frozenset(),
    ):
        self.experiment, self.runs, self.output = experiment, runs, output
        self.workers, self.rerun = workers, rerun
        self.deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        self.store = Store(os.path.join(output, "runs"))
        self.descriptions = {run: describe(run) for run in runs}
        self.finished = {run: found for run in runs if (found := self._find(run))}
        self.left = [run for run in runs if self._is_missing(run)]
        self.failed: list[Run] = []
        self.active: list[Job] = []

    def _find(self, run: Run) -> Finished | None:
        return self.store.find(self.descriptions[run], code_hash(run))

    def _is_missing(self, run):
        found = self.finished.get(run)
        return not found or run.row.label in self.rerun and found.record["code"] != code_hash(run)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Run the missing runs. Returns when all have ended, or when the time is up."""
        print(f"{self.experiment.name}: {len(self.runs)} runs, {len(self.left)} to do", flush=True)
        waiting = list(self.left)
        progress = Progress(self)
        try:
            while True:
                for job in [job for job in self.active if job.process.poll() is not None]:
                    self._end(job)
                while len(self.active) < self.workers and (run := self._next(waiting)):
                    waiting.remove(run)
                    self._start(run)
                if not self.active:
                    break
                if self.deadline is not None and time.monotonic() > self.deadline:
                    break
                progress.show()
                time.sleep(_POLL)
        finally:
            progress.clear()
            self._stop()
        self._report(waiting)

    def _next(self, waiting: list[Run]) -> Run | None:
        """The first run that is expected to finish in time."""
        active = {job.name for job in self.active}
        for run in waiting:
            if run_name(self.descriptions[run]) in active:  # another row with the same settings
                continue
            estimate = self.estimate(run)
            if self.deadline is None or time.monotonic() + (estimate or 0) < self.deadline:
                return run
        return None

    def _start(self, run):
        description, code = self.descriptions[run], code_hash(run)
        name = run_name(description)
        lock = self.store.try_lock(name)
        if lock is None:
            self._say(run, "is running in another process")
            return
        found = self._find(run)  # another process may have finished it since
        if found and (run.row.label not in self.rerun or found.record["code"] == code):
            lock.close()
            self._done(run, found)
            return
        command = command_line(run)
        record = {
            "description": description,
            "code": code,
            "command": command,
            "started": datetime.datetime.now().isoformat(timespec="microseconds"),
            "machine": machine(),
            "threads": threads(),
        }
        part = self.store.begin(name, record)
        self._say(run, "started")
        checkpoints = os.path.join(self.output, "checkpoints")
        self.active.append(Job(run, name, lock, command, part, checkpoints))

    def _end(self, job):
        """Take the result of a process that has ended."""
        self.active.remove(job)
        try:
            if job.process.returncode != 0:
                raise UserError(job.last_line())
            found = self.store.finish(job.name, job.seconds())
        except UserError as error:
            self.failed.append(job.run)
            self._say(job.run, f"FAILED: {error} (log: {job.log})")
        else:
            self._done(job.run, found)
        finally:
            job.lock.close()

    def _done(self, run, found):
        self.finished[run] = found
        self.left.remove(run)
        test = found.result["metrics"]["test"]
        metrics = "  ".join(f"{name} {test[name]:.4f}" for split, name in self.experiment.columns if split == "test")
        self._say(run, f"{found.record['seconds']:.0f} s  {metrics}")
        with contextlib.suppress(UserError):  # the last write_table reports it
            self.write_table()

    def _stop(self):
        """Stop the processes that still run."""
        for job in self.active:
            job.process.terminate()
        for job in self.active:
            job.wait(_STOPPING)
            self.store.stop(job.name, job.seconds())
            job.lock.close()
            self._say(job.run, f"stopped after {job.seconds():.0f} s")
        self.active = []

    def write_table(self) -> None:
        """Write table.json, table.md and table.png of the finished runs."""
        from experiments.report import write_report  # imported here: these take seconds
        from experiments.summary import build_table

        for run in self.runs:
            if run not in self.finished and (found := self._find(run)):
                self.finished[run] = found  # another process of this experiment has finished it
        write_report(build_table(self.experiment, self.runs, self.finished), self.output)

    # -- progress ---------------------------------------------------------------------------------------------------

    def estimate(self, run: Run) -> float | None:
        """The seconds that a run is expected to take: the mean of the other seeds. None if nothing is known.

        If the run was stopped before it finished, it is expected to take twice as long as it had run then.
        """
        known = [
            found.record["seconds"]
            for other, found in self.finished.items()
            if other.row.label == run.row.label and other.dataset == run.dataset
        ]
        if known:
            return sum(known) / len(known)
        stopped = self.store.seconds_when_stopped(run_name(self.descriptions[run]))
        return 2 * stopped if stopped else None

    def seconds_left(self) -> float | None:
        """The seconds until all missing runs have finished. None if nothing is known."""
        estimates = {run: self.estimate(run) for run in self.left if run not in self.failed}
        known = [seconds for seconds in estimates.values() if seconds is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        elapsed = {job.run: job.seconds() for job in self.active}
        rest = [max((mean if s is None else s) - elapsed.get(run, 0), 0) for run, s in estimates.items()]
        return max(sum(rest) / self.workers, max(rest))

    def _say(self, run, text):
        number = f"{CLEAR if sys.stdout.isatty() else ''}[{self.runs.index(run) + 1}/{len(self.runs)}]"
        left = self.seconds_left() if self.left else None
        print(f"{number} {run}: {text}{f'; about {duration(left)} left' if left else ''}", flush=True)

    def _report(self, waiting):
        """Print what has failed, and why runs are left."""
        for run in self.failed:
            print(f"failed: {run}", file=sys.stderr)
        if waiting and self.deadline is not None:
            print(f"the time is up: {len(self.left)} of {len(self.runs)} runs are left; start the same command again")


class Progress:
    """Shows the active runs. In a terminal: one line that is written anew each second. Else: one line per minute."""

    def __init__(self, runner: Runner):
        self.runner, self.terminal = runner, sys.stdout.isatty()
        self.next = time.monotonic() + self._interval()

    def _interval(self):
        return 1 if self.terminal else 60

    def show(self) -> None:
        """Show a line if it is time."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self._interval()
        runner = self.runner
        active = "; ".join(f"{job.run} ({job.seconds():.0f} s)" for job in runner.active)
        left = runner.seconds_left()
        done = len(runner.runs) - len(runner.left)
        line = f"{done} of {len(runner.runs)} done; running: {active}{f'; about {duration(left)} left' if left else ''}"
        print(f"{CLEAR}{line[:110]}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def clear(self) -> None:
        """Clear the line."""
        if self.terminal:
            print(CLEAR, end="", flush=True)


def duration(seconds: float) -> str:
    """Seconds in words, such as `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _rerun(labels: list[str] | None, experiment: Experiment) -> frozenset[str]:
    """The rows that --rerun names. Without names: all rows."""
    known = [row.label for row in experiment.rows]
    for label in labels or []:
        if label not in known:
            near = did_you_mean(label, known)
            raise UserError(f"option --rerun: found {label!r}, expected rows of {experiment.path}{near}")
    return frozenset(known if labels == [] else labels or [])


@contextlib.contextmanager
def _signals_as_interrupts():
    """Treat SIGTERM and SIGHUP like Ctrl-C, also in a shell's background job, which ignores Ctrl-C."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in handlers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2])
    parser.add_argument("experiment", metavar="FILE.yaml", help="the experiment")
    parser.add_argument("--minutes", type=float, metavar="M", help="time limit; start no run that would take longer")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--data_path", metavar="DIR", help="folder of the data sets (default: as in the YAML file)")
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: saved/experiments/NAME)")
    parser.add_argument("--rerun", nargs="*", metavar="ROW", help="repeat runs of other code; without ROW: of all rows")
    parser.add_argument("--table", action="store_true", help="only write the table of the finished runs")
    return parser


if __name__ == "__main__":
    run_command(main)
