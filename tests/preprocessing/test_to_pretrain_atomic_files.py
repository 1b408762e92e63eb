"""Mixtures: ids, the list of domains, links to features, refusal to overwrite."""

import json
import os

import pytest

from common.errors import UserError
from dataset.preprocessing.to_pretrain_atomic_files import main, write_mixture
from tests.preprocessing.shops import sequence, write


@pytest.fixture
def downstream(tmp_path):
    """Three data sets of one user and four items each; the first two have features."""
    folder = tmp_path / "downstream"
    for name in ("Sports", "Toys", "Tools"):
        write(folder, sequence("u", "abcd"), name=name)
    for name in ("Sports", "Toys"):
        for end in ("feat1Mean", "feat2Mean", "feat1Mean.json", "feat2Mean.json"):
            (folder / name / f"{name}.{end}").write_text(f"{name} {end}")
    return str(folder)


def test_ids_and_domains(downstream, tmp_path):
    mixture = write_mixture(["Toys", "Sports"], downstream, str(tmp_path / "pretrain"))
    assert mixture["name"] == "TS"
    assert mixture["rows"] == {"train": 2, "valid": 2, "test": 2}
    stem = tmp_path / "pretrain" / "TS" / "TS"
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    assert stem.with_suffix(".pt_datasets").read_text() == "Toys,Sports\n"
    assert (tmp_path / "pretrain/TS/TS.train.inter").read_text() == f"{header}0-0\t0-0\t0-1\n1-0\t1-0\t1-1\n"
    assert (tmp_path / "pretrain/TS/TS.test.inter").read_text() == (
        f"{header}0-0\t0-0 0-1 0-2\t0-3\n1-0\t1-0 1-1 1-2\t1-3\n"
    )


def test_the_description_names_the_texts_of_every_domain(downstream, tmp_path):
    write_mixture(["Toys", "Sports"], downstream, str(tmp_path / "pretrain"))
    description = json.loads((tmp_path / "pretrain/TS/TS.json").read_text())
    assert [domain["name"] for domain in description["domains"]] == ["Toys", "Sports"]
    toys = json.loads((tmp_path / "downstream/Toys/Toys.json").read_text())
    assert description["domains"][0]["texts_sha256"] == toys["texts_sha256"]
    assert description["domains"][0]["items"] == 4


def test_damaged_rows_leave_nothing_behind(downstream, tmp_path):
    with open(os.path.join(downstream, "Toys", "Toys.test.inter"), "a") as file:
        file.write("only one field\n")
    with pytest.raises(UserError, match=r"Toys\.test\.inter: 1 of 2 rows are malformed, line 3: .*separated by tabs"):
        write_mixture(["Sports", "Toys"], downstream, str(tmp_path / "pretrain"))
    assert not (tmp_path / "pretrain" / "ST").exists()


def test_features_are_linked_and_the_folder_can_be_moved(downstream, tmp_path):
    mixture = write_mixture(["Sports", "Toys"], downstream, str(tmp_path / "pretrain"))
    assert len(mixture["features"]) == 8
    link = tmp_path / "pretrain" / "ST" / "Toys.feat1Mean"
    assert not os.path.isabs(os.readlink(link))
    assert link.read_text() == "Toys feat1Mean"
    write_mixture(["Sports", "Toys"], downstream, str(tmp_path / "pretrain"))  # again: the same mixture is welcome
    assert len(os.listdir(tmp_path / "pretrain" / "ST")) == 5 + 8


def test_features_are_copied_where_links_cannot_be_made(downstream, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no symbolic links here")

    monkeypatch.setattr(os, "symlink", no_links)
    write_mixture(["Sports", "Toys"], downstream, str(tmp_path / "pretrain"))
    copy = tmp_path / "pretrain" / "ST" / "Toys.feat1Mean"
    assert not copy.is_symlink()
    assert copy.read_text() == "Toys feat1Mean"


def test_another_mixture_of_the_same_name_is_left_alone(downstream, tmp_path, capsys):
    output = str(tmp_path / "pretrain")
    arguments = ["--input_path", downstream, "--output_path", output]
    main(["--datasets", "Sports,Toys", *arguments])
    before = (tmp_path / "pretrain/ST/ST.train.inter").read_bytes()
    with pytest.raises(UserError, match="found the mixture Sports,Toys"):
        main(["--datasets", "Sports,Tools", *arguments])
    assert (tmp_path / "pretrain/ST/ST.train.inter").read_bytes() == before
    assert (tmp_path / "pretrain/ST/ST.pt_datasets").read_text() == "Sports,Toys\n"

    main(["--datasets", "Sports,Tools", "--name", "SportsTools", *arguments])
    assert (tmp_path / "pretrain/SportsTools/SportsTools.pt_datasets").read_text() == "Sports,Tools\n"
    assert "no features of Tools" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a mixture"):  # a data set's own folder
        write_mixture(["Sports", "Tools"], downstream, downstream, name="Toys")


def test_missing_and_repeated_data_sets(downstream, tmp_path):
    with pytest.raises(UserError, match="did you mean Toys"):
        write_mixture(["Sports", "Toyz"], downstream, str(tmp_path / "pretrain"))
    with pytest.raises(UserError, match="Sports,Sports: expected different names"):
        write_mixture(["Sports", "Sports"], downstream, str(tmp_path / "pretrain"))
    os.remove(os.path.join(downstream, "Toys", "Toys.valid.inter"))
    with pytest.raises(UserError, match=r"Toys\.valid\.inter: no such file"):
        write_mixture(["Sports", "Toys"], downstream, str(tmp_path / "pretrain"))
    assert not os.path.exists(tmp_path / "pretrain")
