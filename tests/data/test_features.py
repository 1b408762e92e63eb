"""Text features stay in their files; ids are ranges over the domains of a mixture."""

import json
import os

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import ItemFeatures
from data.catalogue import open_catalogue
from data.files import DOMAIN
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


def test_ids_are_consecutive_ranges_over_domains(mix):
    catalogue = open_catalogue(mix, "Mix", "auto", None, 24)[0]
    numbers = np.array([domain * DOMAIN + index for domain, count in enumerate(COUNTS) for index in range(count)])
    ids = catalogue.ids(numbers, "file", np.arange(len(numbers)))
    assert ids.tolist() == list(range(1, 30))
    tokens = catalogue.tokens()
    assert tokens[0] == "[PAD]" and len(tokens) == 30
    assert tokens[ids].tolist() == [f"{number // DOMAIN}-{number % DOMAIN}" for number in numbers]
    for wrong, words in ((1 * DOMAIN + 14, "1-14 .* holds 14 items"), (3 * DOMAIN, "3-0 .* names 3 domains")):
        with pytest.raises(UserError, match=rf"x.inter, line 12: item {words}"):
            catalogue.ids(np.array([0, wrong]), "x.inter", [11, 12])


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


# -- which items there are ----------------------------------------------------------------------------------------


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


def test_a_width_that_divides_the_file_but_gives_other_items_is_refused(tmp_path):
    write_downstream(tmp_path)
    with open(tmp_path / "Small" / "Small.item2index", "w") as file:
        file.writelines(f"raw{index}\t{index}\n" for index in range(40))
    open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24)
    with pytest.raises(UserError, match="holds 20 items of width 48, but .*item2index names 40"):
        open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 48)


def test_an_empty_feature_file_is_refused(tmp_path):
    write_downstream(tmp_path)
    open(tmp_path / "Small" / "Small.feat1CLS", "w").close()
    with pytest.raises(UserError, match="0 bytes"):
        open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24)


def test_domains_must_be_encoded_alike(mix):
    write_features(os.path.join(mix, "Domain1.feat2CLS"), 13)
    open_catalogue(mix, "Mix", "auto", None, 24)
    with pytest.raises(UserError, match="Domain1.feat2CLS: does not fit feat1CLS"):
        open_catalogue(mix, "Mix", "auto", "auto", 24)
    write_features(os.path.join(mix, "Domain1.feat1CLS"), 7, width=48)
    with open(os.path.join(mix, "Domain1.feat1CLS.json"), "w") as file:
        json.dump({"width": 48, "items": 7}, file)
    with pytest.raises(UserError, match="Domain1.feat1CLS: vectors of 48"):
        open_catalogue(mix, "Mix", "auto", None, 24)


def test_mean_pooled_features_are_found(mix):
    for domain in range(3):
        os.rename(os.path.join(mix, f"Domain{domain}.feat1CLS"), os.path.join(mix, f"Domain{domain}.feat1Mean"))
        os.rename(os.path.join(mix, f"Domain{domain}.feat2CLS"), os.path.join(mix, f"Domain{domain}.feat2Mean"))
    assert open_catalogue(mix, "Mix", "auto", "auto", 24)[1].augmented
    with pytest.raises(UserError, match="Domain0.feat1CLS: no such feature file"):
        open_catalogue(mix, "Mix", "feat1CLS", None, 24)


def test_models_that_need_no_text_need_no_features(tmp_path, mix):
    write_downstream(tmp_path, items=37)
    os.remove(tmp_path / "Small" / "Small.feat1CLS")
    catalogue, features = open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24, need_features=False)
    assert features is None and catalogue.counts == [37]
    with open(tmp_path / "Small" / "Small.item2index", "w") as file:
        file.writelines(f"raw{index}\t{index}\n" for index in range(41))  # some items occur in no row
    assert open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24, need_features=False)[0].counts == [41]
    found = open_catalogue(mix, "Mix", "auto", None, 24, need_features=False)[0].counts
    assert found == list(COUNTS)


def test_a_missing_folder_names_those_that_are_there(tmp_path):
    write_downstream(tmp_path)
    with pytest.raises(UserError, match="Smal: no such data set .found Small"):
        open_catalogue(str(tmp_path / "Smal"), "Smal", "auto", None, 24)


def test_features_of_other_texts_are_refused(tmp_path, mix):
    """Processed again, a data set may have as many items as before, but others."""
    write_downstream(tmp_path)
    for name, domain in (("Small", "Small"), ("Mix", "Domain1")):
        folder = tmp_path / name
        size = os.path.getsize(folder / f"{domain}.feat1CLS")
        about = {"width": 24, "items": size // 96, "dtype": "float32", "texts_sha256": "old"}
        (folder / f"{domain}.feat1CLS.json").write_text(json.dumps(about))
        stage = ("auto", None, 24)
        open_catalogue(str(folder), name, *stage)  # no description of the data set: taken as it is
        for told, fits in (("old", True), ("new", False)):
            part = {"name": domain, "texts_sha256": told}
            description = part if name == domain else {"name": name, "domains": [part]}
            (folder / f"{name}.json").write_text(json.dumps(description))
            if fits:
                open_catalogue(str(folder), name, *stage)
            else:
                with pytest.raises(UserError, match=f"{domain}.feat1CLS: was made from other .* -d {domain}"):
                    open_catalogue(str(folder), name, *stage)
        (folder / f"{name}.json").write_text("[]")
        with pytest.raises(UserError, match="expected a description"):
            open_catalogue(str(folder), name, *stage)
