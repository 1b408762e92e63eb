"""Experiments from end to end: what is missing runs, a kill loses nothing, locks, limits, failures.

Most tests replace the commands by a script that writes a result at once. One test runs the real commands.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import experiments.report
import experiments.run
import experiments.summary
from common.errors import run_command
from engine.ranks_file import read_ranks
from engine.settings import ROOT, parse_command_line
from experiments.job import option_words
from experiments.plan import plan_runs, read_experiment
from experiments.run import INCOMPLETE, Runner, duration, main
from experiments.store import Store
from tests.experiments.test_compare import write_ranks

# Takes the options of run_baseline.py. The file beside it says what the run of a seed does.
FAKE = """
import json, os, shutil, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
options = {key: json.loads(value) for key, value in options.items()}
here = os.path.dirname(__file__)
with open(os.path.join(here, "started"), "a") as file:
    file.write(f"{options['seed']}\\n")
with open(os.path.join(here, "todo.json")) as file:
    todo = json.load(file).get(str(options["seed"]), {})
while not set(todo.get("after", [])) <= set(open(os.path.join(here, "started")).read().split()):
    time.sleep(0.05)
time.sleep(todo.get("seconds", 0))
if "fail" in todo:
    print("a line", file=sys.stderr)
    raise SystemExit(todo["fail"])
shutil.copy(os.path.join(here, "ranks.parquet"), options["ranks_file"])
result = {
    "metrics": {split: {"recall@10": 0.1 * options["seed"]} for split in ("valid", "test")},
    "seconds": {"load": 1.0}, "versions": {}, "run": "id", "seed": options["seed"], "epochs": 1, "groups": {},
}
with open(options["result_file"], "w") as file:
    json.dump(result, file)
"""


class Fake:
    """An experiment of one row, whose command is `FAKE`."""

    def __init__(self, folder, data_path, monkeypatch):
        self.folder, self.data_path, self.output = folder, data_path, str(folder / "out")
        (folder / "fake.py").write_text(FAKE)
        write_ranks(folder / "ranks.parquet", [1, 20])
        self.write()
        self.todo()
        command = lambda run: [str(folder / "fake.py"), *option_words(run.options())]  # noqa: E731
        monkeypatch.setattr(experiments.run, "command_line", command)
        monkeypatch.setattr(experiments.report, "draw", lambda table, path: open(path, "w").close())  # it takes time

    def write(self, seeds="[1, 2, 3]", more=""):
        self.yaml = str(self.folder / "fake.yaml")
        with open(self.yaml, "w") as file:
            file.write(
                f"datasets: Tiny\nseeds: {seeds}\ncolumns: recall@10\nrows: {{Row: {{model: SASRec}}}}\n{more}\n"
            )

    def todo(self, **of_seed):
        (self.folder / "todo.json").write_text(json.dumps({key[1:]: value for key, value in of_seed.items()}))

    def runner(self, **options):
        runs = plan_runs(read_experiment(self.yaml), self.data_path)
        return Runner(read_experiment(self.yaml), runs, self.output, **options)

    def main(self, *options):
        """Run the command. Returns its exit code."""
        try:
            run_command(main, [self.yaml, "--output", self.output, "--data_path", self.data_path, *options])
        except SystemExit as end:
            return end.code
        return 0

    def started(self):
        """The seeds of the runs that were started, in order."""
        path = self.folder / "started"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def table(self):
        with open(f"{self.output}/table.json") as file:
            return json.load(file)

    def row(self):
        return self.table()["datasets"]["Tiny"]["rows"]["Row"]


@pytest.fixture
def fake(tmp_path, tiny, monkeypatch):
    return Fake(tmp_path, tiny, monkeypatch)


def test_only_what_is_missing_runs(fake, capsys):
    fake.write("[1, 2]")
    assert fake.main() == 0 and fake.started() == [1, 2]
    out = capsys.readouterr().out
    assert re.search(r"^fake: 2 runs, 2 to do\n\[1/2\] Row, Tiny, seed 1: started$", out, re.M)
    assert re.search(r"^\[1/2\] Row, Tiny, seed 1: \d s  recall@10 0.1000; about \d s left$", out, re.M)
    assert fake.row()["seeds"] == [1, 2] and fake.row()["metrics"]["test"]["recall@10"]["mean"] == pytest.approx(0.15)
    assert fake.main() == 0 and fake.started() == [1, 2], "everything is there"
    fake.write("[1, 2, 4]")
    assert fake.main() == 0 and fake.started() == [1, 2, 4]
    fake.write("[1, 2, 4]", "settings: {epochs: 5}")
    assert fake.main("--table") == 0 and fake.row()["seeds"] == [], "results with other settings do not count"
    assert fake.main() == 0 and fake.started() == [1, 2, 4, 1, 2, 4]
    fake.write("[1, 2, 4]")
    assert fake.main("--table") == 0 and fake.row()["seeds"] == [1, 2, 4], "the first results are still there"
    assert {"table.json", "table.md", "table.png", "runs"} <= set(os.listdir(fake.output))


def test_other_code_is_marked_until_it_is_run_again(fake, monkeypatch):
    fake.write("[1, 2]")
    assert fake.main() == 0 and fake.row()["runs_of_other_code"] == 0
    for module in (experiments.run, experiments.summary):
        monkeypatch.setattr(module, "code_hash", lambda run: "new")
    assert fake.main() == 0 and fake.started() == [1, 2], "a change of the code repeats nothing"
    assert fake.row()["runs_of_other_code"] == 2
    with open(f"{fake.output}/table.md") as file:
        text = file.read()
    assert "| Row† |" in text and "† with an earlier state of the code" in text
    assert fake.main("--rerun", "Row") == 0 and fake.started() == [1, 2, 1, 2]
    assert fake.row()["runs_of_other_code"] == 0
    assert fake.main("--rerun") == 0 and fake.started() == [1, 2, 1, 2], "all runs are of this code"
    assert fake.main("--rerun", "Raw") == 2


def test_a_failing_run_does_not_stop_the_others(fake, capfd):
    fake.todo(_2={"fail": "error: the second"})
    assert fake.main() == 1 and fake.started() == [1, 2, 3]
    out, err = capfd.readouterr()
    assert re.search(r"^\[2/3\] Row, Tiny, seed 2: FAILED: error: the second \(log: .*log.txt\)", out, re.M)
    assert "failed: Row, Tiny, seed 2" in err and fake.row()["seeds"] == [1, 3]
    log = re.search(r"log: (.*log.txt)", out)[1]
    with open(log) as file:
        assert file.read() == "a line\nerror: the second\n"
    fake.todo()
    assert fake.main() == 0 and fake.started() == [1, 2, 3, 2] and fake.row()["seeds"] == [1, 2, 3]


def test_a_run_without_its_files_has_failed(fake, capsys):
    (fake.folder / "fake.py").write_text("")
    assert fake.main() == 1
    assert re.search(r"seed 1: FAILED: .*result.json: no such file", capsys.readouterr().out)


def test_runs_of_several_workers_overlap(fake):
    fake.todo(_1={"seconds": 60}, _2={"seconds": 60}, _3={"after": ["1", "2"]})
    runner = fake.runner(workers=3)
    original = runner._end
    runner._end = lambda job: (original(job), [other.process.terminate() for other in runner.active])
    runner.work()  # the third run ends first, and then stops the others
    assert sorted(fake.started()) == [1, 2, 3] and [run.seed for run in runner.finished] == [3]
    assert sorted(run.seed for run in runner.failed) == [1, 2]


def test_the_time_limit(fake, capsys):
    fake.todo(_2={"seconds": 30})
    start = time.monotonic()
    assert fake.main("--minutes", "0.05") == INCOMPLETE and time.monotonic() - start < 20
    out = capsys.readouterr().out
    assert fake.started()[0] == 1 and fake.row()["seeds"] == [1], "the finished run is kept"
    assert "the time is up: 2 of 3 runs are left; start the same command again" in out
    assert not [name for name in os.listdir(f"{fake.output}/runs") if re.search(r"-1-\w+\.part", name)]


def test_no_run_starts_that_would_not_finish(fake, monkeypatch):
    runner = fake.runner(minutes=1)
    monkeypatch.setattr(runner, "estimate", lambda run: {1: 100, 2: 10, 3: None}[run.seed])
    runner.work()
    assert fake.started() == [2, 3] and [run.seed for run in runner.left] == [1]


def test_estimates(fake):
    runner = fake.runner()
    first, second, _ = runner.runs
    assert runner.estimate(first) is None and runner.seconds_left() is None
    runner._start(first)
    runner.active[0].process.wait()
    runner.active[0].start -= 100  # as if it had taken 100 seconds
    runner._end(runner.active[0])
    assert runner.estimate(second) == pytest.approx(100, abs=5)
    assert runner.seconds_left() == pytest.approx(200, abs=10)
    fake.write("[7]")
    fake.todo(_7={"seconds": 60})
    stopped = fake.runner()
    stopped._start(stopped.runs[0])
    stopped.active[0].start -= 50
    stopped._stop()
    assert stopped.estimate(stopped.runs[0]) == pytest.approx(100, abs=10), "twice as long as it had run"


def test_a_locked_run_is_left_to_the_other_process(fake, capsys):
    runner = fake.runner()
    name = experiments.run.run_name(runner.descriptions[runner.runs[1]])
    code = (
        "import sys, time; from experiments.store import Store; "
        f"lock = Store({runner.store.folder!r}).try_lock({name!r}); print(bool(lock), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "True\n"
        assert fake.main() == INCOMPLETE and fake.started() == [1, 3]
        assert "[2/3] Row, Tiny, seed 2: is running in another process" in capsys.readouterr().out
    finally:
        process.kill()  # the lock ends with the process
        process.communicate()
    assert fake.main() == 0 and fake.started() == [1, 3, 2]


def test_a_lock_lives_as_long_as_the_run(tmp_path):
    store = Store(str(tmp_path))
    lock, other = store.try_lock("a"), store.try_lock("b")
    assert lock and other and store.try_lock("a") is None
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    lock.close()
    assert store.try_lock("a") is None, "the process of the run still holds it"
    child.kill()
    child.wait()
    again = store.try_lock("a")
    assert again
    again.close()
    other.close()


def test_a_run_that_another_process_has_finished_is_not_repeated(fake):
    late = fake.runner()
    assert fake.main() == 0 and len(late.left) == 3
    late.write_table()
    assert fake.row()["seeds"] == [1, 2, 3], "the table holds it already"
    late.work()
    assert fake.started() == [1, 2, 3] and not late.left and len(late.finished) == 3


def test_two_rows_with_the_same_settings_share_their_runs(fake):
    with open(fake.yaml, "w") as file:
        file.write("datasets: Tiny\nseeds: 1\ncolumns: recall@10\nrows: {A: {model: SASRec}, B: {model: SASRec}}\n")
    fake.todo(_1={"seconds": 0.5})
    assert fake.main("--workers", "2") == 0 and fake.started() == [1] and fake.table()["finished"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs(fake, number, capsys):
    fake.todo(_2={"seconds": 60})
    original = Runner._start

    def start_and_signal(self, run):
        original(self, run)
        if run.seed == 2:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_start", start_and_signal)
        assert fake.main() == 130
    assert "seed 2: stopped after" in capsys.readouterr().out
    fake.todo()
    assert fake.main() == 0 and fake.row()["seeds"] == [1, 2, 3]


def test_options_are_checked(fake, refused):
    assert refused(main, fake.yaml, "--workers", 0) == "option --workers: found 0, expected 1 or more"
    assert refused(main, fake.yaml, "--minutes", 0) == "option --minutes: found 0.0, expected a number above 0"
    assert "Raw" in refused(main, fake.yaml, "--data_path", fake.data_path, "--rerun", "Raw")
    assert "Tiny.train.inter: no such file" in refused(main, fake.yaml, "--data_path", fake.folder / "none")


def test_the_commands_read_the_options_as_they_were():
    options = {"learning_rate": 1e-05, "text": "a: é, 'b'", "list": [1, "x"], "none": None, "flag": True, "number": 3}
    assert parse_command_line(option_words(options), str) == options


def test_durations():
    assert [duration(seconds) for seconds in (7.4, 61, 3600, 5400)] == ["7 s", "1 min", "1 h 0 min", "1 h 30 min"]


# -- the real commands ----------------------------------------------------------------------------------------------

REAL = """
datasets: Tiny
seeds: [1]
settings: {epochs: 2, hidden_size: 16, n_heads: 2}
compare_with: Popularity
rows:
  Popularity: {model: Popularity}
  SASRec: {model: SASRec}
"""


@pytest.mark.slow
def test_a_killed_experiment_goes_on(tmp_path, tiny):
    yaml, output = tmp_path / "real.yaml", tmp_path / "out"
    yaml.write_text(REAL)
    command = [str(yaml), "--output", str(output), "--data_path", tiny]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, f"{ROOT}/experiments/run.py", *command], env=environment)
    store = Store(str(output / "runs"))
    while process.poll() is None and not any(re.match(r"SASRec-Tiny-1-\w+\.part", n) for n in os.listdir(store.folder)):
        time.sleep(0.05)
    (popularity,) = store.finished()
    before = os.stat(f"{popularity.folder}/result.json")
    process.kill()
    process.wait()
    (name,) = [name[:-5] for name in os.listdir(store.folder) if name.startswith("SASRec") and name.endswith(".lock")]
    end = time.monotonic() + 10
    while not (lock := store.try_lock(name)):
        assert time.monotonic() < end, "the run goes on although run.py was killed"
        time.sleep(0.02)
    lock.close()
    assert not [each for each in store.finished() if each.record["description"]["model"] == "SASRec"]

    main(command)
    assert os.stat(f"{popularity.folder}/result.json") == before, "not run again"
    with open(output / "table.json") as file:
        rows = json.load(file)["datasets"]["Tiny"]["rows"]
    (sasrec,) = [each for each in store.finished() if each.result["model"] == "SASRec"]
    for row, found in (("Popularity", popularity), ("SASRec", sasrec)):
        assert rows[row]["seeds"] == [1] and rows[row]["run_ids"] == [found.result["run"]]
        mean = {name: about["mean"] for name, about in rows[row]["metrics"]["test"].items()}
        assert mean == found.result["metrics"]["test"] and rows[row]["runs_of_other_code"] == 0
    ranks = {row: read_ranks(found.ranks).rank for row, found in (("Popularity", popularity), ("SASRec", sasrec))}
    assert rows["SASRec"]["metrics"]["test"]["recall@10"]["mean"] == (ranks["SASRec"] <= 10).mean()
    difference = rows["SASRec"]["compared"]["metrics"]["recall@10"]["difference"]
    assert difference == pytest.approx((ranks["SASRec"] <= 10).mean() - (ranks["Popularity"] <= 10).mean())
    assert sum(group["users"] for group in rows["SASRec"]["groups"]["repetition"].values()) == 40
    assert sasrec.result["settings"]["hidden_size"] == 16 and sasrec.result["epochs"] == 2
    assert os.path.isfile(sasrec.result["checkpoint"]) and os.path.getsize(output / "table.png") > 5_000
    with open(f"{sasrec.folder}/log.txt") as file:
        assert "SASRec on Tiny; settings that differ from the defaults:" in file.read()
