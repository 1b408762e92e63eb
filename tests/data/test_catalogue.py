"""The items of a data set: which there are, their ids and names, and whether their features fit."""

import json
import os

import numpy as np
import pytest

from common.errors import UserError
from data.catalogue import Catalogue, item_names, open_catalogue
from data.sequences import DOMAIN_STRIDE
from tests.small_data import write_downstream, write_features, write_mixture

COUNTS = (9, 14, 6)


@pytest.fixture
def mix(tmp_path):
    write_mixture(tmp_path, counts=COUNTS)
    return str(tmp_path / "Mix")


@pytest.fixture
def small(tmp_path):
    write_downstream(tmp_path, items=3)
    return str(tmp_path / "Small")


# -- ids and names -------------------------------------------------------------------------------------------------


def test_items_of_one_domain_are_written_as_their_index():
    catalogue = Catalogue("Small", ["Small"], [3], False, "Small.feat1CLS")
    assert catalogue.n_items == 3 and catalogue.tokens().tolist() == ["[PAD]", "0", "1", "2"]
    ids = catalogue.ids(np.array([2, 0, 1, 2]), "x.inter", np.arange(4))
    assert ids.tolist() == [3, 1, 2, 3] and ids.dtype == np.int32
    with pytest.raises(UserError) as error:
        catalogue.ids(np.array([0, 3, 4]), "x.inter", np.array([5, 6, 7]))
    assert str(error.value) == (
        "x.inter, line 6: item 3 has no feature (Small.feat1CLS holds 3 items); encode the texts of all items again"
    )


def test_ids_are_consecutive_ranges_over_domains(mix):
    catalogue = open_catalogue(mix, "Mix", "auto", None, 24)[0]
    numbers = np.array(
        [domain * DOMAIN_STRIDE + index for domain, count in enumerate(COUNTS) for index in range(count)]
    )
    ids = catalogue.ids(numbers, "file", np.arange(len(numbers)))
    assert ids.tolist() == list(range(1, 30))
    tokens = catalogue.tokens()
    assert tokens[0] == "[PAD]" and len(tokens) == 30
    assert tokens[ids].tolist() == [f"{number // DOMAIN_STRIDE}-{number % DOMAIN_STRIDE}" for number in numbers]
    for number, words in (
        (1 * DOMAIN_STRIDE + 14, r"1-14 has no feature \(Domain1.feat1CLS holds 14 items\)"),
        (3 * DOMAIN_STRIDE, r"3-0 has no feature \(Mix.pt_datasets names 3 domains\)"),
    ):
        with pytest.raises(UserError, match=rf"x.inter, line 12: item {words}"):
            catalogue.ids(np.array([0, number]), "x.inter", np.array([11, 12]))


def test_an_empty_domain_takes_no_ids():
    catalogue = Catalogue("Mix", ["A", "B", "C"], [2, 0, 1], True, "A.feat1CLS")
    assert catalogue.ids(np.array([1, 2 * DOMAIN_STRIDE]), "x.inter", np.arange(2)).tolist() == [2, 3]
    assert catalogue.tokens().tolist() == ["[PAD]", "0-0", "0-1", "2-0"]
    with pytest.raises(UserError, match=r"item 1-0 has no feature \(B.feat1CLS holds 0 items\)"):
        catalogue.ids(np.array([DOMAIN_STRIDE]), "x.inter", np.array([2]))


def names_from(folder, lines):
    """The names of the three items of `Small` when `.item2index` holds some lines."""
    with open(os.path.join(folder, "Small.item2index"), "w", encoding="utf-8", newline="") as file:
        file.write(lines)
    return item_names(folder, Catalogue("Small", ["Small"], [3], False, "Small.feat1CLS"))


def test_items_are_named_by_their_raw_ids(small, mix):
    assert names_from(small, "a\t0\nb\t1\nc\t2\n") == ["[PAD]", "a", "b", "c"]
    assert names_from(small, "c\t2\r\n\na\t0\r\nb\tb\t1") == ["[PAD]", "a", "b\tb", "c"], "by index, not by line"
    os.remove(os.path.join(small, "Small.item2index"))
    catalogue = open_catalogue(small, "Small", "auto", None, 24)[0]
    assert item_names(small, catalogue) == ["[PAD]", "0", "1", "2"], "no raw ids known"
    catalogue = open_catalogue(mix, "Mix", "auto", None, 24)[0]
    assert item_names(mix, catalogue)[8:12] == ["0-7", "0-8", "1-0", "1-1"]


@pytest.mark.parametrize("line", ["b", "b\t", "b\tx", "b\t-1", "b\t3"])
def test_a_malformed_line_of_raw_ids_is_named(small, line):
    with pytest.raises(UserError, match=r"Small.item2index, line 2: found 'b.*', expected ITEM<TAB>INDEX .* below 3"):
        names_from(small, f"a\t0\n{line}\n")


@pytest.mark.parametrize("content", ["", "Domain0,", "Domain0,Domain0", "Domain0\tDomain1"])
def test_a_malformed_list_of_domains_is_refused(mix, content):
    with open(os.path.join(mix, "Mix.pt_datasets"), "w") as file:
        file.write(content)
    with pytest.raises(UserError, match="Mix.pt_datasets: found .*, expected the names of the domains"):
        open_catalogue(mix, "Mix", "auto", None, 24)


def test_blanks_around_the_names_of_domains_do_not_matter(mix):
    with open(os.path.join(mix, "Mix.pt_datasets"), "w") as file:
        file.write(" Domain2, Domain0 \n")
    catalogue = open_catalogue(mix, "Mix", "auto", None, 24)[0]
    assert (catalogue.domains, catalogue.counts) == (["Domain2", "Domain0"], [6, 9])


# -- which items there are, and whether their features fit -----------------------------------------------------------


def test_a_width_that_divides_the_file_but_gives_other_items_is_refused(tmp_path):
    write_downstream(tmp_path)
    with open(tmp_path / "Small" / "Small.item2index", "w") as file:
        file.writelines(f"raw{index}\t{index}\n" for index in range(40))
    open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 24)
    with pytest.raises(UserError, match="holds 20 items of width 48, but .*item2index names 40"):
        open_catalogue(str(tmp_path / "Small"), "Small", "auto", None, 48)


def test_domains_must_be_encoded_alike(mix):
    write_features(os.path.join(mix, "Domain1.feat2CLS"), 13)
    open_catalogue(mix, "Mix", "auto", None, 24)
    with pytest.raises(UserError, match="Domain1.feat2CLS: does not fit feat1CLS"):
        open_catalogue(mix, "Mix", "auto", "auto", 24)
    write_features(os.path.join(mix, "Domain1.feat1CLS"), 7, width=48)
    with open(os.path.join(mix, "Domain1.feat1CLS.json"), "w") as file:
        json.dump({"width": 48, "items": 7}, file)
    with pytest.raises(
        UserError, match="Domain1.feat1CLS: vectors of 48 float32 numbers, expected 24 float32 as in .*Domain0.feat1CLS"
    ):
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
        for checksum, fits in (("old", True), ("new", False)):
            part = {"name": domain, "texts_sha256": checksum}
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
