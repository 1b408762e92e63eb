"""Checkpoints: read without running anything, every tensor accounted for, id embeddings tied to their items."""

import collections
import errno
import io
import logging
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import UniSRecDataset
from engine.checkpoint import (
    SHAPE,
    Inert,
    adopt_settings,
    changed_settings,
    check_features,
    from_published_layout,
    latest_of_run,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    to_published_layout,
)
from engine.config import build_config
from tests.conftest import PUBLISHED, small_config, write_mix, write_tiny
from unisrec import UniSRec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"pretrain": write_mix(folder / "pretrain"), "Tiny": write_tiny(folder / "downstream")}


def open_model(stage, data, **options):
    """A model of the published recipe with weights of its own, its data set and its configuration."""
    name = "Mix" if stage == "pretrain" else "Tiny"
    config = small_config(stage, name, data["pretrain" if stage == "pretrain" else "Tiny"], **PUBLISHED | options)
    dataset = UniSRecDataset(config)
    torch.manual_seed(len(stage))
    model = UniSRec(config, dataset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, dataset, config


def saved(model, config, path, dataset=None, **more):
    save_checkpoint(path, model, config, 3, dataset.item_names() if dataset else None, **more)
    return str(path)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# -- reading ---------------------------------------------------------------------------------------------------------


class Hostile:
    """Pickles to a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_calls(made):
    import builtins
    import subprocess

    yield Hostile(os.system, f"touch {made}")
    yield Hostile(subprocess.check_output, ["touch", made])
    yield Hostile(builtins.eval, f"open({made!r}, 'w').close()")
    yield Hostile(builtins.exec, f"open({made!r}, 'w').close()")
    yield Hostile(os.mkdir, made)
    yield Hostile(torch.save, 1, made)
    yield Hostile(torch.hub.download_url_to_file, "file:///dev/null", made)
    yield Hostile(getattr, Hostile(__import__, "os"), "system")


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["config", "state_dict", "top"])
def test_a_hostile_file_is_read_and_runs_nothing(tmp_path, number, zipped, place):
    made = str(tmp_path / "made")
    attack = list(hostile_calls(made))[number]
    tensors = {"LayerNorm.weight": torch.ones(3)}
    content = {"state_dict": tensors, "config": attack}
    if place == "state_dict":
        content["state_dict"] = {**tensors, "attack": attack}
    torch.save([attack] if place == "top" else content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    if place == "config":
        checkpoint = read_checkpoint(str(tmp_path / "a.pth"))
        assert torch.equal(checkpoint["state_dict"]["LayerNorm.weight"], torch.ones(3))
        assert isinstance(checkpoint["config"], Inert)
    else:
        with pytest.raises(UserError, match="a.pth: holds no state_dict with tensors"):
            read_checkpoint(str(tmp_path / "a.pth"))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_hostile_file_of_these_tests_is_hostile(tmp_path):
    """Were it read by pickle alone, it would run."""
    made = str(tmp_path / "made")
    pickle.loads(pickle.dumps(next(hostile_calls(made))))
    assert os.path.exists(made)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A checkpoint file of ours, bytes."""
    model, _, config = open_model("pretrain", data)
    path = saved(model, config, tmp_path_factory.mktemp("whole") / "a.pth")
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_file_is_named(tmp_path, whole, share):
    path = tmp_path / "a.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        UserError, match=f"a.pth: cannot be read as a checkpoint .{int(len(whole) * share)} bytes"
    ) as end:
        read_checkpoint(str(path))
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_file_is_read_or_named_and_never_crashes(tmp_path, legacy):
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(3)}}, buffer, _use_new_zipfile_serialization=not legacy)
    content, generator = buffer.getvalue(), torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(2):
            place, byte = torch.randint(0, 2**31, (2,), generator=generator).tolist()
            damaged[place % len(damaged)] = byte % 256
        (tmp_path / "a.pth").write_bytes(damaged)
        try:
            read_checkpoint(str(tmp_path / "a.pth"))
        except UserError:
            refused += 1
    assert refused > 50


def test_overwritten_bytes_are_noticed(tmp_path):
    """torch verifies no checksum. Only bytes that mean nothing, such as padding, may change without a word."""
    tensors = {f"layer.{number}": torch.randn(40, 30) for number in range(5)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.pth")
    whole, generator, refused = (tmp_path / "a.pth").read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(0, len(whole), generator.integers(1, 51))
        damaged[places] = generator.integers(0, 256, len(places))
        (tmp_path / "a.pth").write_bytes(damaged.tobytes())
        try:
            found = read_checkpoint(str(tmp_path / "a.pth"))
        except UserError as error:
            assert "a.pth: cannot be read as a checkpoint" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert found["epoch"] == 3
            assert_same(found["state_dict"], tensors)
    assert refused > 180


def test_a_damaged_tensor_is_named(tmp_path, whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size * ("/data/" in part.filename))
        content = parts.read(largest)
    place = whole.index(content) + len(content) // 2
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    (tmp_path / "a.pth").write_bytes(damaged)
    with pytest.raises(UserError, match=r"the checksum of its part \S+/data/\d+ is wrong\); it is damaged, truncated"):
        read_checkpoint(str(tmp_path / "a.pth"))


def test_a_compressed_file_is_refused_before_it_grows(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1 << 20)}}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth") as plain, zipfile.ZipFile(tmp_path / "a.pth", "w") as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="a.pth: cannot be read as a checkpoint .*a part of it is compressed"):
        read_checkpoint(str(tmp_path / "a.pth"))


class Placed:
    """Pickles to a tensor at any place of a storage."""

    def __init__(self, storage, *place):
        self.storage, self.place = storage, place

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.place, False, collections.OrderedDict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("offset", "size", "stride", "words"),
    [
        (5, (3,), (1,), "a tensor has 3 numbers up to place 7, its storage has 4"),
        (0, (2, 3), (3, 1), "a tensor has 6 numbers up to place 5, its storage has 4"),
        (0, (2, 2), (3, 1), "a tensor has 4 numbers up to place 4, its storage has 4"),
        (0, (1 << 40,), (1,), "up to place 1099511627775, its storage has 4"),
        (0, (1 << 40,), (0,), "a tensor has 1099511627776 numbers up to place 0, its storage has 4"),
        (2**62, (1,), (1,), "up to place 4611686018427387904"),
        (-1, (3,), (1,), "a tensor has the offset -1, the sizes (3,) and the strides (1,)"),
        (0, (3,), (-1,), "and the strides (-1,)"),
        (0, (1.0,), (1,), "the sizes (1.0,)"),
        (0, (3,), (1, 1), "the sizes (3,) and the strides (1, 1)"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, zipped, offset, size, stride, words):
    """Our own check refuses it. torch would enlarge the storage of a file in the old format, here to 4 TB."""
    storage = torch.ones(4).storage()
    content = {"state_dict": {"a": torch.zeros(2), "b": Placed(storage, offset, size, stride)}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"a.pth: cannot be read as a checkpoint .*{re.escape(words)}"):
        read_checkpoint(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_parts_of_tensors_are_read(tmp_path, zipped):
    whole = torch.arange(12.0).view(3, 4)
    state = {"column": whole[:, 1], "turned": whole.T, "corner": whole[1:, 2:], "one": whole[2, 3], "none": whole[:0]}
    torch.save({"state_dict": state}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(str(tmp_path / "a.pth"))["state_dict"], state)


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("epoch 1  train  loss 9.05\n" * 20)
    with pytest.raises(UserError, match="a.pth: cannot be read as a checkpoint"):
        read_checkpoint(str(path))
    for content in (
        [1, 2],
        {"epoch": 1},
        {"state_dict": {}},
        {"state_dict": {"a": 1}},
        {"state_dict": [torch.ones(1)]},
    ):
        torch.save(content, path)
        with pytest.raises(
            UserError, match="a.pth: holds no state_dict with tensors; expected a checkpoint of pretrain"
        ):
            read_checkpoint(str(path))
    torch.save({"state_dict": {1: torch.ones(1)}}, path)
    with pytest.raises(UserError, match="holds no state_dict"):
        read_checkpoint(str(path))


def test_a_missing_file_names_what_is_there(tmp_path):
    for name in ("b.pth", "a.pth", "notes.txt"):
        (tmp_path / name).touch()
    expected = r"c.pth: no such checkpoint \(found in .*: a.pth, b.pth\); create one with python pretrain.py"
    with pytest.raises(UserError, match=expected):
        read_checkpoint(str(tmp_path / "c.pth"))
    with pytest.raises(UserError, match="found in .*: none"):
        read_checkpoint(str(tmp_path / "nowhere" / "c.pth"))


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_plain_data_that_torch_reads_by_itself(data, tmp_path):
    model, dataset, config = open_model("transductive_ft", data)
    path = saved(model, config, tmp_path / "a.pth", dataset, progress={"epoch": 3})
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["model"], content["train_stage"]) == (3, "UniSRec", "transductive_ft")
    assert content["config"] == config.plain() and content["progress"] == {"epoch": 3}
    assert content["item_tokens"][:3] == ["[PAD]", "Tiny1000", "Tiny1001"] and len(content["item_tokens"]) == 31
    assert_same(content["state_dict"], state_of(model))
    assert not [name for name in content["state_dict"] if "plm" in name], "features belong to the data"


def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(data, tmp_path, monkeypatch):
    model, _, config = open_model("pretrain", data)
    saved(model, config, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()

    class FullDisk(io.BytesIO):
        def write(self, content):
            if self.tell() + len(content) > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr("engine.checkpoint.open", lambda path, mode: FullDisk(), raising=False)
    with pytest.raises(UserError, match="a.pth: cannot be written: the disk is full"):
        saved(model, config, tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == before


# -- the published layout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_the_published_layout_and_back(data, stage):
    model, _, _ = open_model(stage, data)
    state = state_of(model)
    published = to_published_layout(state)
    assert [name for name in published if "experts" in name] == [
        f"moe_adaptor.experts.{expert}.{part}" for expert in range(3) for part in ("bias", "lin.weight")
    ]
    assert published["moe_adaptor.experts.2.lin.weight"].shape == (16, 24)
    assert torch.equal(published["moe_adaptor.experts.1.bias"], state["moe_adaptor.experts.bias"][1])
    assert_same(from_published_layout(published), state)
    assert_same(from_published_layout(state), state)


def test_twelve_experts_come_back_in_their_order(data):
    model, _, _ = open_model("pretrain", data, n_exps=12)
    published = to_published_layout(state_of(model))
    shuffled = {name: published[name] for name in sorted(published)}  # as words: 0, 1, 10, 11, 2, ...
    assert_same(dict(sorted(from_published_layout(shuffled).items())), dict(sorted(state_of(model).items())))


def test_features_inside_a_published_checkpoint_and_the_prefix_of_ddp_go(data):
    model, _, _ = open_model("inductive_ft", data)
    published = {"plm_embedding.weight": torch.zeros(31, 24), **to_published_layout(state_of(model))}
    assert_same(
        from_published_layout({f"module.{name}": tensor for name, tensor in published.items()}), state_of(model)
    )


@pytest.mark.parametrize("lost", ["moe_adaptor.experts.1.bias", "moe_adaptor.experts.0.lin.weight", "both of expert 1"])
def test_a_published_checkpoint_that_lacks_a_part_of_an_expert_is_named(data, tmp_path, lost):
    model, _, _ = open_model("pretrain", data)
    state = to_published_layout(state_of(model))
    for name in [lost] if lost in state else ["moe_adaptor.experts.1.bias", "moe_adaptor.experts.1.lin.weight"]:
        del state[name]
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: its experts do not fit each other .*moe_adaptor.experts.[01]"):
        read_checkpoint(str(tmp_path / "a.pth"))


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ours", "published", "ddp"])
@pytest.mark.parametrize("stage", ["pretrain", "inductive_ft"])
def test_pretrained_weights_load_whole(data, tmp_path, layout, stage):
    source, _, config = open_model("pretrain", data)
    state = state_of(source)
    content = {"published": to_published_layout(state), "ours": state}.get(layout)
    content = content or {f"module.{name}": tensor for name, tensor in to_published_layout(state).items()}
    torch.save({"state_dict": content}, tmp_path / "a.pth")
    target, _, _ = open_model(stage, data)
    load_weights(target, read_checkpoint(str(tmp_path / "a.pth")), "a.pth")
    assert_same(state_of(target), state)


def test_on_top_of_pretrained_weights_only_the_id_embedding_is_new(data, tmp_path, caplog):
    source, _, config = open_model("pretrain", data)
    path = saved(source, config, tmp_path / "a.pth")
    target, dataset, _ = open_model("transductive_ft", data)
    own = state_of(target)
    with caplog.at_level(logging.INFO):
        load_weights(target, read_checkpoint(path), path, dataset.item_names())
    assert_same(state_of(target), {**state_of(source), "item_embedding.weight": own["item_embedding.weight"]})
    assert "loaded 39 tensors" in caplog.text and "new: item_embedding.weight" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 8}, "found hidden_size 8, expected 16"),
        ({"inner_size": 20}, "found inner_size 20, expected 12"),
        ({"n_exps": 5}, "found n_exps 5, expected 3"),
        ({"n_layers": 1}, "found n_layers 1, expected 2"),
        ({"n_layers": 3}, "found n_layers 3, expected 2"),
        ({"MAX_ITEM_LIST_LENGTH": 30}, "found MAX_ITEM_LIST_LENGTH 30, expected 50"),
        ({"n_exps": 5, "hidden_size": 8}, "found hidden_size 8, expected 16; found n_exps 5, expected 3"),
    ],
)
def test_another_architecture_is_named_by_its_settings(data, tmp_path, change, message):
    source, _, config = open_model("pretrain", data, **change)
    path = saved(source, config, tmp_path / "a.pth")
    target, _, _ = open_model("inductive_ft", data)
    before = state_of(target)
    with pytest.raises(UserError) as error:
        load_weights(target, read_checkpoint(path), path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}: has another architecture")
    assert "\n" not in str(error.value)
    assert_same(state_of(target), before)


def test_texts_of_another_encoder_are_named(data, tmp_path):
    source, _, config = open_model("pretrain", data)
    state = state_of(source)
    for name in ("moe_adaptor.experts.bias", "moe_adaptor.experts.weight"):
        state[name] = state[name][..., :20]
    for name in ("moe_adaptor.w_gate", "moe_adaptor.w_noise"):
        state[name] = state[name][:20]
    target, _, _ = open_model("inductive_ft", data)
    with pytest.raises(UserError, match=r"found text width \(encoder\) 20, expected 24"):
        load_weights(target, {"state_dict": state, "item_tokens": None}, "a.pth")


def test_missing_and_additional_tensors_are_named(data):
    target, _, _ = open_model("inductive_ft", data)
    state = state_of(target)
    lacking = {name: tensor for name, tensor in state.items() if name not in ("LayerNorm.bias", "moe_adaptor.w_gate")}
    with pytest.raises(UserError, match="a.pth: has another architecture: lacks .*LayerNorm.bias"):
        load_weights(target, {"state_dict": lacking, "item_tokens": None}, "a.pth")
    with pytest.raises(UserError, match="unexpected: surplus.weight"):
        load_weights(target, {"state_dict": {**state, "surplus.weight": torch.ones(1)}, "item_tokens": None}, "a.pth")
    with pytest.raises(UserError, match="other shapes: LayerNorm.bias"):
        load_weights(target, {"state_dict": {**state, "LayerNorm.bias": torch.ones(())}, "item_tokens": None}, "a.pth")
    with pytest.raises(UserError, match="lacks"):
        load_weights(target, {"state_dict": {"surplus": torch.ones(1)}, "item_tokens": None}, "a.pth")


# -- a checkpoint brings the settings that shape the model -----------------------------------------------------------


def config_without_sizes(data, **options):
    """A configuration of which the user gave no size."""
    return build_config(
        UniSRec, "Tiny", "finetune", {"data_path": data["Tiny"], "train_stage": "inductive_ft", **options}
    )


def scores_of(checkpoint, config):
    dataset = UniSRecDataset(config)
    model = UniSRec(config, dataset).eval()
    load_weights(model, checkpoint, "a.pth")
    with torch.no_grad():
        return model.full_sort_predict(dataset.build()[2][slice(None)])


OTHER_SHAPE = {
    "n_layers": 3, "n_heads": 4, "hidden_size": 8, "inner_size": 20, "hidden_act": "relu", "layer_norm_eps": 1e-2,
    "n_exps": 5, "MAX_ITEM_LIST_LENGTH": 20, "whiten_texts": True, "history_mean": True, "history_bias": 5,
    "item_to_item": 6,
}  # fmt: skip


def test_the_settings_that_shape_the_model_come_from_the_checkpoint(data, tmp_path, caplog):
    assert set(OTHER_SHAPE) == set(SHAPE)
    source, _, config = open_model("pretrain", data, **OTHER_SHAPE)
    checkpoint = read_checkpoint(saved(source, config, tmp_path / "a.pth"))
    adopting = config_without_sizes(data)
    with caplog.at_level(logging.INFO):
        adopt_settings(adopting, checkpoint, "a.pth")
    assert adopting["item_to_item"] == PUBLISHED["item_to_item"], "of the recipe: a pre-trained model has no such part"
    assert {key: adopting[key] for key in SHAPE if key != "item_to_item"} | {"item_to_item": 6} == OTHER_SHAPE
    assert "n_layers 3, n_heads 4, hidden_size 8, inner_size 20" in caplog.text and "does not say" not in caplog.text
    explicit = config_without_sizes(data, **OTHER_SHAPE)
    adopt_settings(explicit, checkpoint, "a.pth")
    expected = scores_of(checkpoint, explicit)
    assert torch.equal(scores_of(checkpoint, adopting), expected)
    for key, value in (("n_heads", 2), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-12)):
        other = config_without_sizes(data, **{**OTHER_SHAPE, key: value})
        assert not torch.allclose(scores_of(checkpoint, other), expected), f"{key} would change scores without a word"
        with pytest.raises(UserError, match=f"^option --{key}: found {value!r}, expected {OTHER_SHAPE[key]!r}, with w"):
            adopt_settings(config_without_sizes(data, **{key: value}), checkpoint, "a.pth")


def test_without_stored_settings_the_tensors_tell_what_they_can(data, tmp_path, caplog):
    sizes = {key: value for key, value in OTHER_SHAPE.items() if key not in PUBLISHED}
    source, _, _ = open_model("pretrain", data, **sizes)
    torch.save({"state_dict": to_published_layout(state_of(source))}, tmp_path / "a.pth")
    config = config_without_sizes(data)
    with caplog.at_level(logging.INFO):
        adopt_settings(config, read_checkpoint(str(tmp_path / "a.pth")), "a.pth")
    silent = {"n_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    silent |= {key: PUBLISHED[key] for key in ("whiten_texts", "history_mean", "history_bias", "item_to_item")}
    assert {key: config[key] for key in SHAPE} == {**OTHER_SHAPE, **silent}
    assert config["recipe"] == "published" and config["adaptor_start"] == "normal"
    assert "a.pth does not say n_heads, hidden_act, layer_norm_eps; this run uses its own values" in caplog.text


def test_a_window_from_the_checkpoint_limits_the_predictions_per_row(data, tmp_path):
    source, _, config = open_model("pretrain", data, **OTHER_SHAPE)
    checkpoint = read_checkpoint(saved(source, config, tmp_path / "a.pth"))
    with pytest.raises(UserError, match="--predictions_per_row: found 21, expected 1 to MAX_ITEM_LIST_LENGTH, 20"):
        adopt_settings(config_without_sizes(data, predictions_per_row=21), checkpoint, "a.pth")
    adopt_settings(config_without_sizes(data, predictions_per_row=20), checkpoint, "a.pth")


def test_a_published_checkpoint_brings_its_settings_too(golden_folder, data):
    checkpoint = read_checkpoint(os.path.join(golden_folder, "UniSRec-AB-300.pth"))
    config = config_without_sizes(data)
    adopt_settings(config, checkpoint, "a.pth")
    assert [config[key] for key in SHAPE] == [2, 2, 16, 12, "gelu", 1e-12, 3, 50, False, False, 0, 0]
    checkpoint["config"].state["final_config_dict"]["n_heads"] = 4
    adopt_settings(config, checkpoint, "a.pth")
    assert config["n_heads"] == 4
    with pytest.raises(UserError, match="--n_heads: found 2, expected 4, with which a.pth was trained"):
        adopt_settings(config_without_sizes(data, n_heads=2), checkpoint, "a.pth")


def test_a_checkpoint_is_used_with_its_recipe(data, tmp_path):
    default = config_without_sizes(data)
    assert default["recipe"] != "published" and default["whiten_texts"]
    for options, expected in ((PUBLISHED, PUBLISHED), ({}, {key: default[key] for key in PUBLISHED})):
        source, _, config = open_model("pretrain", data, **{key: default[key] for key in PUBLISHED} | options)
        adopting = config_without_sizes(data)
        adopt_settings(adopting, read_checkpoint(saved(source, config, tmp_path / "a.pth")), "a.pth")
        assert {key: adopting[key] for key in PUBLISHED} == expected
    with pytest.raises(UserError, match="--whiten_texts: found True, expected False, with which a.pth was trained"):
        source, _, config = open_model("pretrain", data)
        checkpoint = read_checkpoint(saved(source, config, tmp_path / "a.pth"))
        adopt_settings(config_without_sizes(data, whiten_texts=True), checkpoint, "a.pth")


def test_a_smoothing_of_the_users_own_stays(data, tmp_path):
    source, _, config = open_model("pretrain", data)
    adopting = config_without_sizes(data, label_smoothing=0.3)
    adopt_settings(adopting, read_checkpoint(saved(source, config, tmp_path / "a.pth")), "a.pth")
    assert adopting["label_smoothing"] == 0.3


def test_parts_that_are_added_to_a_checkpoint_start_without_effect(data, tmp_path, caplog):
    source, _, config = open_model("pretrain", data)
    checkpoint = read_checkpoint(saved(source, config, tmp_path / "a.pth"))
    found = []
    for options in ({}, {"history_mean": True, "history_bias": 4, "item_to_item": 9}):
        own = config_without_sizes(data, **options, train_stage="transductive_ft")
        adopt_settings(own, checkpoint, "a.pth")
        values = own["history_mean"], own["history_bias"], own["item_to_item"]
        assert values == ((True, 4, 9) if options else (False, 0, 0))
        torch.manual_seed(1)  # of the id embedding, which the checkpoint does not have
        with caplog.at_level(logging.INFO):
            found.append(scores_of(checkpoint, own))
    torch.testing.assert_close(*found)
    assert "new: history_bias.weight, history_mean.recency, history_mean.weight, item_embedding.weight" in caplog.text


def test_the_whitening_stays_that_of_the_data_set(data, tmp_path):
    source, _, config = open_model("pretrain", data, whiten_texts=True)
    checkpoint = read_checkpoint(saved(source, config, tmp_path / "a.pth"))
    assert "whitening.1.matrix" in checkpoint["state_dict"]
    target, _, _ = open_model("inductive_ft", data, whiten_texts=True)
    before = state_of(target)
    load_weights(target, checkpoint, "a.pth")
    after = state_of(target)
    assert torch.equal(after["whitening.0.matrix"], before["whitening.0.matrix"])
    assert torch.equal(after["moe_adaptor.w_gate"], source.moe_adaptor.w_gate)


# -- and says which text features it was trained on ------------------------------------------------------------------


def test_a_checkpoint_describes_its_features(data, tmp_path):
    for stage in ("pretrain", "transductive_ft"):
        source, dataset, config = open_model(stage, data)
        content = torch.load(saved(source, config, tmp_path / "a.pth", dataset), weights_only=True)
        assert content["features"] == {"encoder": "test", "pooling": "CLS", "width": 24}


class Features:
    paths = ("Tiny.feat1CLS",)

    def __init__(self, **description):
        self.description = description


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({"encoder": "minilm"}, {"encoder": "bert"}, "of encoder minilm; found encoder bert in Tiny.feat1CLS"),
        ({"pooling": "CLS"}, {"pooling": "Mean"}, "of pooling CLS; found pooling Mean"),
        ({"width": 384}, {"width": 768}, "of width 384; found width 768"),
        ({"normalised": False}, {"normalised": True}, "of normalised False; found normalised True"),
        (
            {"encoder": "a", "pooling": "CLS", "width": 8},
            {"encoder": "a", "pooling": "Mean", "width": 8},
            "of encoder a, pooling CLS, width 8; found encoder a, pooling Mean, width 8",
        ),
    ],
)
def test_features_of_another_kind_are_refused(then, now, words):
    checkpoint = {"state_dict": {}, "features": then}
    with pytest.raises(UserError, match=f"^a.pth: was trained on text features {words}"):
        check_features(checkpoint, Features(**now), "a.pth")
    check_features(checkpoint, Features(**then), "a.pth")
    check_features({"state_dict": {}, "features": None}, Features(**now), "a.pth")


def test_what_nobody_says_of_the_features_is_not_compared(caplog):
    with caplog.at_level(logging.INFO):
        check_features({"state_dict": {}}, Features(encoder="a", pooling="CLS", width=8), "a.pth")
        assert "a.pth does not say which encoder made its text features" in caplog.text
        check_features({"state_dict": {}, "features": {"encoder": "a"}}, Features(pooling="CLS", width=8), "b.pth")
        assert "Tiny.feat1CLS does not say which encoder made its text features" in caplog.text


def test_a_published_checkpoint_tells_its_pooling_and_width(golden_folder):
    checkpoint = read_checkpoint(os.path.join(golden_folder, "UniSRec-AB-300.pth"))
    check_features(checkpoint, Features(pooling="CLS", width=24), "a.pth")
    check_features(checkpoint, Features(encoder="bert-base-uncased", pooling="CLS", width=24), "a.pth")
    for now in ({"pooling": "Mean", "width": 24}, {"pooling": "CLS", "width": 12}):
        with pytest.raises(UserError, match="was trained on text features of pooling CLS, width 24; found pooling "):
            check_features(checkpoint, Features(**now), "a.pth")


def test_domains_of_different_encoders_are_refused(tmp_path):
    """They have the same width, so only the descriptions tell."""
    folder = write_mix(tmp_path)
    path = tmp_path / "Mix" / "B.feat1CLS.json"
    path.write_text(path.read_text().replace('"test"', '"other"'))
    with pytest.raises(UserError, match="B.feat1CLS: was made with encoder other, .*A.feat1CLS with encoder test; "):
        UniSRecDataset(small_config("pretrain", "Mix", folder))


# -- id embeddings belong to items -----------------------------------------------------------------------------------


def test_id_embeddings_load_on_the_same_items(data, tmp_path):
    source, dataset, config = open_model("transductive_ft", data)
    path = saved(source, config, tmp_path / "a.pth", dataset)
    target, dataset, _ = open_model("transductive_ft", data)
    with torch.no_grad():
        target.item_embedding.weight.zero_()
    load_weights(target, read_checkpoint(path), path, dataset.item_names())
    assert_same(state_of(target), state_of(source))


def test_id_embeddings_of_other_items_are_refused(data, tmp_path):
    source, dataset, config = open_model("transductive_ft", data)
    path, names = saved(source, config, tmp_path / "a.pth", dataset), dataset.item_names()
    swapped = names[:5] + [names[6], names[5]] + names[7:]
    expected = "a.pth: row 5 of its id embeddings is item 'Tiny1004', but in the data set it is 'Tiny1005'"
    with pytest.raises(UserError, match=expected):
        load_weights(source, read_checkpoint(path), path, swapped)
    with pytest.raises(UserError, match="a.pth: has id embeddings of 30 items, but the data set has 29"):
        load_weights(source, read_checkpoint(path), path, names[:-1])
    inductive, _, _ = open_model("inductive_ft", data)
    with pytest.raises(UserError, match="a.pth: has id embeddings, .*--train_stage=transductive_ft"):
        load_weights(inductive, read_checkpoint(path), path)


def test_id_embeddings_of_unknown_items_are_refused(data, tmp_path):
    """Published transductive checkpoints do not say what their rows stand for (RecBole orders by first occurrence)."""
    source, dataset, _ = open_model("transductive_ft", data)
    torch.save({"state_dict": to_published_layout(state_of(source))}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="has id embeddings, but not the ids of their items"):
        load_weights(source, read_checkpoint(str(tmp_path / "a.pth")), "a.pth", dataset.item_names())


def test_items_are_told_apart_by_their_raw_ids(data, tmp_path):
    """Where the data set was made again, an index may stand for another item."""
    config = small_config("transductive_ft", "Tiny", write_tiny(tmp_path))
    index_file = tmp_path / "Tiny" / "Tiny.item2index"
    assert UniSRecDataset(config).item_names()[:2] == ["[PAD]", "Tiny1000"]
    lines = index_file.read_text().splitlines()
    index_file.write_text("\n".join(reversed(lines)))
    assert UniSRecDataset(config).item_names()[:2] == ["[PAD]", "Tiny1000"], "by index, not by line"
    index_file.write_text("\n".join(f"other {line}" for line in lines))
    assert UniSRecDataset(config).item_names()[1] == "other Tiny1000"
    index_file.write_text("\n".join(["no index", *lines[1:]]))
    with pytest.raises(UserError, match="Tiny.item2index, line 1: found 'no index', expected ITEM<TAB>INDEX"):
        UniSRecDataset(config).item_names()
    index_file.unlink()
    assert UniSRecDataset(config).item_names()[:3] == ["[PAD]", "0", "1"]


def test_the_latest_checkpoint_of_a_run_is_the_one_of_these_settings_that_went_furthest(tmp_path, mixture):
    def config(**options):
        return small_config("pretrain", "Mix", mixture, checkpoint_dir=str(tmp_path), **options)

    def write(name, epoch, batch, config, **more):
        progress = {"epoch": epoch, "batch": batch}
        save_checkpoint(str(tmp_path / name), torch.nn.Linear(1, 1), config, epoch, progress=progress, **more)

    pattern = str(tmp_path / "run-{epoch}.pth")
    assert latest_of_run(pattern, config(), 0) is None
    write("run-2.pth", 2, 0, config(epochs=2), optimizer={})
    write("run-10.pth", 10, 0, config(), optimizer={})
    write("run-10-stopped.pth", 10, 3, config(), optimizer={})
    write("run-11.pth", 11, 0, config(learning_rate=0.5), optimizer={})
    write("run-12.pth", 12, 0, config())  # weights only
    write("run-300.pth", 300, 0, config(), optimizer={})  # nothing is left to do
    (tmp_path / "run-13.pth").write_bytes(b"half of a fi")
    newest = str(tmp_path / "run-10-stopped.pth")
    assert latest_of_run(pattern, config(), 0) == newest
    assert latest_of_run(pattern, config(epochs=7), 0) == str(tmp_path / "run-2.pth")
    assert latest_of_run(pattern, config(seed=1), 0) is None
    there = config()
    there["device"], there["checkpoint_dir"] = torch.device("cuda", 1), "as another node has it"
    assert latest_of_run(pattern, there, 0) == newest
    os.utime(newest, (500, 500))  # saved by an earlier run
    assert latest_of_run(pattern, config(), 1000) == str(tmp_path / "run-10.pth")


def test_changed_settings_are_those_that_matter(mixture):
    then, now = (small_config("pretrain", "Mix", mixture, epochs=n, learning_rate=n / 10) for n in (1, 2))
    assert changed_settings({"config": then.plain()}, then) == {}
    assert changed_settings({"config": then.plain()}, now) == {"learning_rate": (0.1, 0.2)}
