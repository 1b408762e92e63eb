"""Text features stay in their files and are read where they are needed."""

import json
import os

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import ItemFeatures
from data.catalogue import open_catalogue
from tests.small_data import write_downstream, write_features, write_mixture

COUNTS = (9, 14, 6)


@pytest.fixture
def mix(tmp_path):
    write_mixture(tmp_path, counts=COUNTS)
    return str(tmp_path / "Mix")


def stored(folder, domain, view, dtype="float32", width=24):
    return np.fromfile(os.path.join(folder, f"Domain{domain}.feat{view}CLS"), dtype).reshape(-1, width)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lookup_gives_the_right_rows_of_all_domains_and_views(tmp_path, dtype):
    write_mixture(tmp_path, counts=COUNTS, dtype=dtype)
    folder = str(tmp_path / "Mix")
    if dtype == "float16":
        for domain, count in enumerate(COUNTS):
            for view in (1, 2):
                description = {"width": 24, "dtype": dtype, "items": count}
                with open(os.path.join(folder, f"Domain{domain}.feat{view}CLS.json"), "w") as file:
                    json.dump(description, file)
    catalogue, features = open_catalogue(folder, "Mix", "auto", "auto", 24)
    assert catalogue.domains == ["Domain0", "Domain1", "Domain2"] and catalogue.counts == list(COUNTS)
    assert catalogue.n_items == features.n_items == sum(COUNTS)
    assert features.width == 24 and features.augmented
    # id 0 is padding; 1..N the whole texts, domain after domain; N + 1..2N the shortened ones
    expected = np.concatenate([stored(folder, domain, view, dtype) for view in (1, 2) for domain in range(3)])
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 2 * sum(COUNTS) + 1, 300))
    vectors = features.lookup(ids)
    assert vectors.dtype == torch.float32
    np.testing.assert_array_equal(vectors.numpy(), expected[ids.numpy() - 1].astype(np.float32))
    np.testing.assert_array_equal(features.table().numpy(), expected[: sum(COUNTS)])
    assert features.lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


def test_ids_outside_the_catalogue_are_programming_errors(mix):
    with_views = open_catalogue(mix, "Mix", "auto", "auto", 24)[1]
    without = open_catalogue(mix, "Mix", "auto", None, 24)[1]
    assert not without.augmented
    for features, wrong in ((with_views, 0), (with_views, 59), (without, 30)):
        with pytest.raises(AssertionError):
            features.lookup(torch.tensor([1, wrong]))


def test_the_table_of_one_domain_is_the_file_itself(tmp_path):
    features = write_features(tmp_path / "a", 50)
    opened = ItemFeatures([str(tmp_path / "a")], [50], 24)
    table = opened.table()
    np.testing.assert_array_equal(table.numpy(), features)
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(tmp_path / "a"))]
        assert any(int(low, 16) <= table.data_ptr() < int(high, 16) for low, high in ranges)
    table[0, 0] = 77.0  # copy on write: whatever becomes of the table, the file stays
    assert np.fromfile(tmp_path / "a", np.float32)[0] == features[0, 0]


def resident_anonymous_bytes():
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), None)


@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="needs /proc")
def test_features_do_not_fill_the_memory(tmp_path):
    size, width = 300 << 20, 768
    items = size // (4 * width)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(items * width * 4)  # sparse: takes no room on the disk
    before = resident_anonymous_bytes()
    if before is None:
        pytest.skip("this kernel does not tell resident anonymous memory")
    features = ItemFeatures([str(tmp_path / "large")], [items], width)
    table = features.table()
    vectors = features.lookup(torch.randint(1, items + 1, (1000,)))
    assert vectors.shape == (1000, width) and table.shape == (items, width)
    assert resident_anonymous_bytes() - before < size / 10


# -- the size of a feature file -----------------------------------------------------------------------------------


def test_the_description_says_the_width(tmp_path):
    write_downstream(tmp_path)
    folder = str(tmp_path / "Small")
    assert open_catalogue(folder, "Small", "auto", None, 24)[0].counts == [40]
    assert open_catalogue(folder, "Small", "auto", None, 48)[1].width == 48, "nothing contradicts 20 items of 48"
    with open(os.path.join(folder, "Small.feat1CLS.json"), "w") as file:
        json.dump({"width": 24, "items": 40}, file)
    catalogue, features = open_catalogue(folder, "Small", "auto", None, 48)
    assert catalogue.counts == [40] and features.width == 24


@pytest.mark.parametrize(
    ("plm_size", "description", "message"),
    [
        (25, None, "3840 bytes do not fit plm_size 25"),
        (24, {"width": 24, "items": 39}, "do not fit .*feat1CLS.json"),
        (24, {"width": 25, "items": 40}, "do not fit .*feat1CLS.json"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(tmp_path, plm_size, description, message):
    write_downstream(tmp_path)
    if description:
        with open(tmp_path / "Small" / "Small.feat1CLS.json", "w") as file:
            json.dump(description, file)
    with pytest.raises(UserError, match=message):
        open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, plm_size)


def test_an_empty_feature_file_is_refused(tmp_path):
    write_downstream(tmp_path)
    open(tmp_path / "Small" / "Small.feat1CLS", "w").close()
    with pytest.raises(UserError, match="0 bytes"):
        open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path, monkeypatch, dtype, value):
    """In each of the files, wherever a block of rows ends."""
    monkeypatch.setattr("data.features._BYTES_AT_ONCE", 5 * 24 * 4)
    write_mixture(tmp_path, counts=COUNTS, dtype=dtype)
    folder = tmp_path / "Mix"
    (folder / "Domain1.item2index").write_text("".join(f"raw {row}\t{row}\n" for row in range(COUNTS[1])))
    description = {"width": 24, "dtype": dtype}
    for name, count in (("Domain0.feat1CLS", 9), ("Domain1.feat1CLS", 14), ("Domain2.feat1CLS", 6)):
        (folder / f"{name}.json").write_text(json.dumps(description | {"items": count}))
    for name, row, item in (("Domain0.feat1CLS", 0, ""), ("Domain1.feat1CLS", 13, ", item 'raw 13',")):
        features = np.fromfile(folder / name, dtype)
        features[row * 24 + 23] = value
        features.tofile(folder / name)
        with pytest.raises(UserError, match=f"{name}: row {row}{item} holds NaN or an infinite number; encode the"):
            open_catalogue(str(folder), "Mix", "auto", None, 24)
        features[row * 24 + 23] = 0
        features.tofile(folder / name)
        open_catalogue(str(folder), "Mix", "auto", None, 24)


def test_a_large_file_is_checked_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("data.features._BYTES_AT_ONCE", 100)
    features = write_features(tmp_path / "A.feat1CLS", 5)
    path, read = str(tmp_path / "A.feat1CLS"), []
    is_finite = np.isfinite
    monkeypatch.setattr("data.features.np.isfinite", lambda rows: read.append(len(rows)) or is_finite(rows))
    for _ in range(2):
        assert ItemFeatures([path], [5], 24).first_not_finite() is None
        assert read == [1] * 5
    status = os.stat(path)
    features[3, 3] = np.nan
    features.tofile(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a program that keeps the time would
    assert ItemFeatures([path], [5], 24).first_not_finite() == (path, 3)
    (cache,) = (tmp_path / ".unisrec-cache").iterdir()
    for content in (b"", b"\xff"):
        cache.write_bytes(content)
        assert ItemFeatures([path], [5], 24).first_not_finite() == (path, 3)
