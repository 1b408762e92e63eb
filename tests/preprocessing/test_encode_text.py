"""The command that encodes a data set: its files, going on after a kill, several processes, errors."""

import argparse
import errno
import glob
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from common.errors import UserError
from dataset.preprocessing import encode_text, encoder
from dataset.preprocessing.command_line import check_encoding_options, encode_if_requested
from dataset.preprocessing.encode_text import copy_split, encode_dataset, main
from dataset.preprocessing.encoding_options import add_encoding_options
from dataset.preprocessing.texts import drop_words
from tests.preprocessing.test_encoder import WORDS, reference, write_tiny_bert

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TEXTS = [" ".join(WORDS["ecabd".index(item) :] * 2) for item in "abcde"]  # of the items in the order of their numbers


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


def write_dataset(folder):
    """A data set A of five items whose index order is not the order of its texts."""
    folder.mkdir(parents=True)
    (folder / "A.item2index").write_text("c\t2\na\t0\nb\t1\nd\t3\ne\t4\n")
    (folder / "A.text").write_text(
        "item_id:token\ttext:token_seq\n"
        + "".join(f"{item}\t{' '.join(WORDS[i:] * 2)} \n" for i, item in enumerate("ecabd"))
    )
    for end in ("train.inter", "valid.inter", "test.inter", "user2index"):
        (folder / f"A.{end}").write_text(f"{end}\n")


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path / "A")
    return tmp_path


def encoded(folder):
    """All that encoding has written: name -> bytes, of a hidden folder the names in it."""
    names = [name for name in os.listdir(folder) if "feat" in name or name.startswith(".") or name == "A.json"]
    paths = {name: folder / name for name in names}
    return {name: os.listdir(path) if path.is_dir() else path.read_bytes() for name, path in paths.items()}


# -- files -----------------------------------------------------------------------------------------------------------


def test_features_and_descriptions(bert, dataset):
    before = {path.name: path.read_bytes() for path in (dataset / "A").iterdir()}
    (dataset / "A" / "A.json").write_text(
        '{"name": "A", "rules": {"user_k": 5}, "features": {"feat1CLS": {"width": 8}}}'
    )
    files = encode_dataset("A", str(dataset), bert, "Mean", word_drop_ratio=0.3, seed=11, gpu_id=-1, progress=False)
    folder = dataset / "A"
    assert files == [f"{folder}/A.feat1Mean", f"{folder}/A.feat2Mean"]
    for file, texts in zip(files, (TEXTS, drop_words(TEXTS, 0.3, 11)), strict=True):
        features = np.fromfile(file, dtype=np.float32).reshape(5, 16)
        np.testing.assert_allclose(features, reference(texts, bert, "Mean"), atol=1e-5)

    whole = json.loads((folder / "A.json").read_text())
    assert whole.keys() == {"name", "rules", "features"} and whole["rules"] == {"user_k": 5}
    assert whole["features"].keys() == {"feat1CLS", "feat1Mean", "feat2Mean"}
    for end, word_drop in (("feat1Mean", 0.0), ("feat2Mean", 0.3)):
        content = (folder / f"A.{end}").read_bytes()
        description = json.loads((folder / f"A.{end}.json").read_text())
        assert whole["features"][end] == description
        assert set(description.pop("versions")) == {"torch", "transformers", "numpy"}
        assert description == {
            "encoder": bert, "pooling": "Mean", "precision": encoder.Encoder(bert, gpu_id=-1).precision, "width": 16,
            "normalised": False, "dtype": "float32", "items": 5, "word_drop": word_drop, "seed": 11,
            "bytes": 5 * 16 * 4, "sha256": hashlib.sha256(content).hexdigest(),
            "texts_sha256": hashlib.sha256("\n".join(TEXTS).encode()).hexdigest(),
        }  # fmt: skip
    assert all((folder / name).read_bytes() == content for name, content in before.items()), "nothing else is touched"
    assert not [name for name in os.listdir(folder) if name.startswith(".")], "no working files are left"


def test_feat2_depends_on_the_seed_only(bert, dataset):
    def features(seed):
        encode_dataset("A", str(dataset), bert, seed=seed, progress=False)
        return [(dataset / "A" / f"A.{feature}CLS").read_bytes() for feature in ("feat1", "feat2")]

    first, again, other = features(1), features(1), features(2)
    assert first == again
    assert first[0] == other[0] != first[1] != other[1]


def test_variants_are_further_draws(bert, dataset):
    encode_dataset("A", str(dataset), bert, word_drop_ratio=0.3, progress=False)
    one = encoded(dataset / "A")
    encode_dataset("A", str(dataset), bert, word_drop_ratio=0.3, variants=3, progress=False)
    three = encoded(dataset / "A")
    assert [three[f"A.feat{number}CLS"] == one[f"A.feat{number}CLS"] for number in (1, 2)] == [True, True]
    assert len({three[f"A.feat{number}CLS"] for number in (1, 2, 3, 4)}) == 4
    assert json.loads(three["A.feat4CLS.json"])["word_drop"] == 0.3
    for name in ("feat2CLS", "feat3CLS", "feat4CLS"):
        os.unlink(dataset / "A" / f"A.{name}")
    encode_dataset("A", str(dataset), bert, variants=0, progress=False)
    assert sorted(path.name for path in (dataset / "A").glob("A.feat?CLS")) == ["A.feat1CLS"]


def test_word_drop_draws_are_those_of_one_call(monkeypatch):
    texts = TEXTS + ["", "alone"]
    whole = drop_words(texts, 0.5, 3)
    monkeypatch.setattr("dataset.preprocessing.texts._DRAWN_AT_ONCE", 7)
    assert drop_words(texts, 0.5, 3) == whole
    generator = np.random.default_rng(3)  # the draws of the first variant are a part of the format
    keep = generator.random(sum(len(text.split()) for text in texts)) >= 0.5
    assert whole[0] == " ".join(word for word, stays in zip(TEXTS[0].split(), keep, strict=False) if stays)
    assert len({" ".join(drop_words(texts, 0.5, 3, variant)) for variant in (1, 2, 3)}) == 3


def test_normalised_features_have_length_one(bert, dataset):
    encode_dataset("A", str(dataset), bert, normalise=True, progress=False)
    features = np.fromfile(dataset / "A" / "A.feat2CLS", dtype=np.float32).reshape(5, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert json.loads((dataset / "A" / "A.feat1CLS.json").read_text())["normalised"] is True
    plain = reference(TEXTS, bert, "CLS")
    features = np.fromfile(dataset / "A" / "A.feat1CLS", dtype=np.float32).reshape(5, 16)
    np.testing.assert_allclose(features, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("empty", ["", " ", "."])
def test_empty_text_is_named_and_encoded(bert, dataset, capsys, empty):
    lines = (dataset / "A" / "A.text").read_text().split("\n")
    lines[1] = f"e\t{empty}"
    (dataset / "A" / "A.text").write_text("\n".join(lines))
    encode_dataset("A", str(dataset), bert, progress=False)
    assert "1 items have an empty text and are encoded as 'unknown item.', the first: e" in capsys.readouterr().err
    features = np.fromfile(dataset / "A" / "A.feat1CLS", dtype=np.float32).reshape(5, 16)
    np.testing.assert_allclose(features[4:], reference(["unknown item."], bert, "CLS"), atol=1e-5)
    # the checksum is of the texts as they stand in the data set
    expected = hashlib.sha256("\n".join([*TEXTS[:4], empty.strip()]).encode()).hexdigest()
    assert json.loads((dataset / "A" / "A.feat1CLS.json").read_text())["texts_sha256"] == expected


def test_copy_from_copies_once_and_refuses_other_files(bert, dataset, tmp_path, capsys):
    source, path = str(dataset / "A"), tmp_path / "mine"
    for _ in range(2):  # the same files are welcome
        main(["-d", "A", "--copy_from", source, "--path", str(path), "--plm_name", bert, "--emb_type=Mean"])
    assert f"{path}/A/A.feat1Mean, {path}/A/A.feat2Mean written in " in capsys.readouterr().out
    assert len(list((path / "A").iterdir())) == 6 + 4 + 1
    (path / "A" / "A.test.inter").write_text("other")
    with pytest.raises(UserError, match="differs"):
        copy_split("A", source, str(path))
    assert (path / "A" / "A.test.inter").read_text() == "other"
    with pytest.raises(UserError, match=r"B\.train\.inter: no such file"):
        copy_split("B", source, str(path))


# -- errors --------------------------------------------------------------------------------------------------------


def test_errors_are_one_line_and_leave_nothing(bert, dataset, tmp_path):
    def fails(match, name="A", encoder=bert, **options):
        with pytest.raises(UserError, match=match) as failure:
            encode_dataset(name, str(dataset), encoder, progress=False, **options)
        assert "\n" not in str(failure.value)

    fails("no such data set folder", name="Nothing")
    (tmp_path / "Pantry").mkdir()
    fails("did you mean Pantry", name="Pantri")
    fails("no such folder", encoder=str(tmp_path / "no-encoder"))
    fails("--word_drop_ratio 1.5", word_drop_ratio=1.5)
    fails("--seed -1", seed=-1)
    fails("--variants -1", variants=-1)
    fails("did you mean Mean", pooling="mean")
    fails("--gpu_id -7", gpu_id=-7)
    (dataset / "A" / "A.json").write_text("[]")
    fails(r"A\.json: expected a JSON object")
    (dataset / "A" / "A.json").unlink()
    text = (dataset / "A" / "A.text").read_text().split("\n")
    (dataset / "A" / "A.text").write_text("\n".join(text[:3]))
    fails(r"no text for 3 of the 5 items in A\.item2index, the first: a, b, d")
    (dataset / "A" / "A.text").unlink()
    fails(r"A\.text: no such file")
    (dataset / "A" / "A.text").write_text("item_id:token\ttext:token_seq\n")
    (dataset / "A" / "A.item2index").write_text("")
    fails("holds no item")
    assert encoded(dataset / "A") == {}


def test_a_full_disk_keeps_the_finished_shards(bert, dataset, monkeypatch, refused):
    """Wherever the disk becomes full: one line, the old features stay, and the next run goes on."""
    monkeypatch.setattr(encoder, "SHARD_TEXTS", 2)
    command = ["-d", "A", "--path", str(dataset), "--plm_name", bert, "--gpu_id=-1"]
    main([*command, "--seed=1"])
    before = encoded(dataset / "A")
    plain, room = encoder.write_rows, [0]  # room: for how many files the disk has

    def write(path, blocks):
        def until_full():
            yield from blocks
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        plain(path, until_full())

    monkeypatch.setattr(encoder, "write_rows", write)
    monkeypatch.setattr(encode_text, "write_rows", write)
    for files, shards in ((2, 2), (4, 5)):  # the second time feat1 is there when the disk is full
        room[0] = files
        assert "cannot be written: the disk is full; free some space" in refused_after(refused, command)
        now = encoded(dataset / "A")
        assert len(glob.glob(f"{dataset}/A/.A.CLS.shards/???.f32")) == shards
        assert now.pop(".A.CLS.shards") and now == before
    room[0] = 99
    main(command)
    after = encoded(dataset / "A")
    assert after.keys() == before.keys() and after["A.feat2CLS"] != before["A.feat2CLS"]


def refused_after(refused, command):
    """The message of a run that ends in an error; what it says before on stderr is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "print", lambda *_, **__: None, raising=False)
        return refused(main, *command)


# -- going on --------------------------------------------------------------------------------------------------------

# Encodes in shards of two texts and stops within the third: it must be killed.
STANDS_STILL = """
import sys, time
from dataset.preprocessing import encoder
from dataset.preprocessing.encode_text import main

def write(path, blocks, plain=encoder.write_rows):
    def endless():
        yield from blocks
        time.sleep(600)
    plain(path, endless() if path.endswith("002.f32") else blocks)

encoder.SHARD_TEXTS = 2
encoder.write_rows = write
main(sys.argv[1:])
"""


def start(script, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)], cwd=ROOT, text=True,
        env=inherited | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(bert, tmp_path, monkeypatch, capsys):
    for place in ("killed", "undisturbed"):
        write_dataset(tmp_path / place / "A")
    options = ["-d", "A", "--plm_name", bert, "--variants=2", "--batch_tokens=48", "--gpu_id=-1"]
    run = start(STANDS_STILL, *options, "--path", tmp_path / "killed")
    shards = tmp_path / "killed" / "A" / ".A.CLS.shards"
    deadline = time.monotonic() + 60
    while not glob.glob(f"{shards}/.002.f32.*") and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    _, messages = run.communicate()
    assert run.returncode == -signal.SIGKILL, messages
    assert sorted(path.name for path in shards.glob("[0-9]*")) == ["000.f32", "001.f32"]
    assert (
        not list((tmp_path / "killed" / "A").glob("A.*feat*")) and not (tmp_path / "killed" / "A" / "A.json").exists()
    )

    monkeypatch.setattr(encoder, "SHARD_TEXTS", 2)
    done = []
    plain = encoder.encode_shards
    monkeypatch.setattr(encoder, "encode_shards", lambda *call: done.extend(call[2]) or plain(*call))
    main([*options, "--path", str(tmp_path / "killed")])
    assert "resuming: 2 of " in capsys.readouterr().err
    assert done == list(range(2, 2 + len(done))) and len(done) > 2, "only what was missing is encoded"
    main([*options, "--path", str(tmp_path / "undisturbed")])
    killed, undisturbed = (encoded(tmp_path / place / "A") for place in ("killed", "undisturbed"))
    assert killed == undisturbed and len(killed) == 3 * 2 + 1, "and no working file is left"


# First an error of the second process alone, then the command.
TOGETHER = """
import os, sys
import torch.distributed as dist
from common.errors import UserError, run_command
from dataset.preprocessing import encoder
from dataset.preprocessing.encode_text import main

def error():
    if dist.get_rank() == 1:
        raise UserError("the second cannot")

dist.init_process_group("gloo")
try:
    encoder.in_step(error)
except UserError as failure:
    print("raised:", failure)
assert encoder.in_step(dist.get_rank) == int(os.environ["RANK"])
dist.destroy_process_group()

done, plain = [], encoder.encode_shards
encoder.encode_shards = lambda *call: done.extend(call[2]) or plain(*call)
encoder.SHARD_TEXTS = 2
os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
run_command(main)
print("shards:", done)
if os.environ["THEN"]:
    os.environ["MASTER_PORT"] = os.environ["THIRD_PORT"]
    run_command(main, sys.argv[1:] + ["--variants=-1"])
"""


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.mark.slow
def test_two_processes_write_what_one_writes(bert, tmp_path, monkeypatch):
    for place in ("two", "one"):
        write_dataset(tmp_path / place / "A")
    options = ["-d", "A", "--plm_name", bert, "--gpu_id=-1"]
    first, second, third = free_ports(3)
    runs = [
        start(TOGETHER, *options, "--path", tmp_path / "two", RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
              MASTER_ADDR="127.0.0.1", MASTER_PORT=first, SECOND_PORT=second, THIRD_PORT=third, THEN="error")
        for number in (0, 1)
    ]  # fmt: skip
    outcomes = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [2, 2], outcomes
    assert [out.splitlines()[0] for out, _ in outcomes] == ["raised: the second cannot"] * 2
    assert ["shards: [0, 2, 4]" in outcomes[0][0], "shards: [1, 3]" in outcomes[1][0]] == [True, True], outcomes
    assert [out.count(" written in ") for out, _ in outcomes] == [1, 0], "one process tells"
    assert [err.count("error: --variants -1: expected") for _, err in outcomes] == [1, 0], outcomes

    monkeypatch.setattr(encoder, "SHARD_TEXTS", 2)
    main([*options, "--path", str(tmp_path / "one")])
    two, one = (encoded(tmp_path / place / "A") for place in ("two", "one"))
    assert two == one and len(one) == 5


# -- options ---------------------------------------------------------------------------------------------------------


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_encoding_options(parser, allow_none=True)
    return parser.parse_args(words)


def test_the_options_reach_the_encoder(bert, dataset):
    options = parsed(
        "--plm_name", bert, "--emb_type=Mean", "--word_drop_ratio=0.4", "--variants=2", "--seed=5", "--normalise",
        "--gpu_id=-1", "--precision=bf16", "--batch_tokens=40",
    )  # fmt: skip
    check_encoding_options(options)
    files = encode_if_requested("A", str(dataset), options)
    assert [os.path.basename(file) for file in files] == ["A.feat1Mean", "A.feat2Mean", "A.feat3Mean"]
    about = json.loads((dataset / "A" / "A.feat3Mean.json").read_text())
    expected = {"pooling": "Mean", "word_drop": 0.4, "seed": 5, "normalised": True, "precision": "bf16"}
    assert {key: about[key] for key in expected} == expected


def test_none_does_not_encode(dataset):
    options = parsed("--plm_name=none")
    check_encoding_options(options)
    assert encode_if_requested("A", str(dataset), options) == [] == list(encoded(dataset / "A"))
    with pytest.raises(UserError, match="--plm_name none: nothing to do"):
        main(["-d", "A", "--path", str(dataset), "--plm_name=none"])


def test_the_default_is_the_papers_encoder_in_commands_and_minilm_in_python():
    assert parsed().plm_name == "bert-base-uncased"
    assert encode_dataset.__defaults__[0] == encoder.encode.__defaults__[0] == "minilm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plm_name=minilmm"], "did you mean minilm"),
        (["--plm_name=./nowhere"], "no such folder"),
        (["--emb_type=cls"], "--emb_type cls"),
        (["--word_drop_ratio=1"], "--word_drop_ratio 1.0"),
        (["--batch_tokens=-4"], "--batch_tokens -4"),
        (["--gpu_id=-2"], "--gpu_id -2"),
        (["--precision=fp16"], "--precision fp16"),
    ],
)
def test_errors_show_before_long_work(bert, words, message):
    with pytest.raises(UserError, match=message):
        check_encoding_options(parsed(*([] if "plm_name" in words[0] else ["--plm_name", bert]), *words))


def test_asking_for_help_loads_no_language_model():
    script = "import sys, dataset.preprocessing.command_line; print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    out, err = start(script).communicate(timeout=60)
    assert out == "[]\n", err
