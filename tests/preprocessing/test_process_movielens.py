"""MovieLens-100k from the installed RecBole: titles, domains, disjoint items."""

import importlib.util
import os

import pytest

from common.errors import UserError
from dataset.preprocessing.process_movielens import (
    SOURCE_DOMAINS,
    TARGET_DOMAIN,
    domain_of,
    film_text,
    main,
    natural_title,
    process_movielens,
)


@pytest.mark.parametrize(
    ("title", "natural"),
    [
        ("Full Monty, The", "The Full Monty"),
        ("Toy Story", "Toy Story"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Enfer, L'", "L'Enfer"),
        ("Beans of Egypt, Maine, The", "The Beans of Egypt, Maine"),
        ("Paris, Texas", "Paris, Texas"),
        ("Hate (Haine, La)", "Hate (La Haine)"),
    ],
)
def test_titles_in_natural_order(title, natural):
    assert natural_title(title) == natural


def test_film_text_and_domain():
    assert film_text("Full Monty, The", "1997", "Comedy") == "The Full Monty, 1997, Comedy."
    assert film_text("Untold", "", "Drama War") == "Untold, Drama, War."
    assert domain_of("Action Drama") == "Action"
    assert domain_of("Western") == domain_of("unknown") == "Other"


def test_ties_in_time_follow_the_file_and_the_nameless_film_is_left_out(tmp_path):
    genres = ("Action", "Comedy", "War", "Drama")
    films = [(str(10 * g + i), f"Film {g}{i}", "1990", genre) for g, genre in enumerate(genres) for i in range(3)]
    films.append(("99", "unkonwn", "unkonwn", "unknown"))
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (tmp_path / "ml-100k.item").write_text(header + "".join("\t".join(film) + "\n" for film in films))
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    rows = "".join(f"u\t{film[0]}\t3\t5\n" for film in reversed(films))
    (tmp_path / "ml-100k.inter").write_text(header + rows)

    written = process_movielens(str(tmp_path / "out"), user_k=3, item_k=1, source=str(tmp_path))
    assert {domain: summary["items"] for domain, summary in written.items()} == dict.fromkeys(written, 3)
    assert (tmp_path / "out/downstream/Action/Action.item2index").read_text() == "2\t0\n1\t1\n0\t2\n"
    assert "\n99\t" not in (tmp_path / "out/downstream/Other/Other.text").read_text()


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="RecBole is not installed")
def test_the_installed_copy(tmp_path, capsys):
    main(["--output_path", str(tmp_path)])
    printed = capsys.readouterr().out
    items = {}
    for domain in (*SOURCE_DOMAINS, TARGET_DOMAIN):
        lines = (tmp_path / "downstream" / domain / f"{domain}.item2index").read_text().splitlines()
        items[domain] = {line.split("\t")[0] for line in lines}
        assert len(items[domain]) > 200
        assert domain in printed
    assert sum(map(len, items.values())) == len(set.union(*items.values()))
    assert "The Rainmaker, 1997, Drama." in (tmp_path / "downstream/Drama/Drama.text").read_text()


def test_another_folder_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="ml-100k.inter"):
        process_movielens(str(tmp_path), source=os.path.join(str(tmp_path), "none"))
