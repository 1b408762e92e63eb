"""A user's error ends in one line and exit code 2. A programming error keeps its traceback."""

import os
import signal
import time

import pytest

from common.errors import UserError, did_you_mean, run_command


def fail_with(error):
    def main(argv):
        raise error

    return main


def test_an_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(fail_with(UserError("a.inter: found\nthis,\nexpected that")), [])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err == "error: a.inter: found this, expected that\n"
    assert captured.out == ""


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 / 0, [])


def test_stopping_a_command_leaves_no_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(fail_with(KeyboardInterrupt()), [])
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped by a signal\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_command_with_one_line(capsys, number):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_command(lambda argv: os.kill(os.getpid(), number) or time.sleep(9), [])
    assert end.value.code == 130 and capsys.readouterr().err == "stopped by a signal\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_gets_its_arguments(monkeypatch):
    seen = []
    run_command(seen.append, ["--epochs", "3"])
    monkeypatch.setattr("sys.argv", ["finetune.py", "-d", "Tiny"])
    run_command(seen.append)
    assert seen == [["--epochs", "3"], ["-d", "Tiny"]]


@pytest.mark.parametrize(
    ("word", "hint"), [("temprature", "; did you mean temperature?"), ("xyz", ""), (17, ""), (None, "")]
)
def test_the_nearest_known_word_is_offered(word, hint):
    assert did_you_mean(word, ["epochs", "temperature", "topk"]) == hint
