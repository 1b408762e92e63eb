"""Recommendations from a bundle: the scores of the checkpoint, and items that come and go."""

import json
import pathlib
import shutil

import polars as pl
import pytest
import torch
from recbole.data.interaction import Interaction
from safetensors.torch import save_file

import finetune
import recommend
import serving.recommender
from common.errors import UserError
from engine.building import build_model, open_dataset
from engine.bundle import ITEMS, VECTORS
from engine.checkpoint import adopt_settings, load_weights, read_checkpoint
from engine.config import build_config
from serving import bundle
from serving.recommender import BLOCK, Recommender
from tests.conftest import SMALL
from tests.serving.conftest import ids
from unisrec import UniSRec


@pytest.fixture
def recommender(made):
    """The recommender of the transductive model."""
    return Recommender.from_pretrained(made["transductive_ft"][1])


def scores_of_checkpoint(made, stage, histories):
    """`full_sort_predict` of the model of a checkpoint, without the padding."""
    path, _ = made[stage]
    config = build_config(UniSRec, "Tiny", "finetune", {"train_stage": stage, "data_path": made["data"]})
    checkpoint = read_checkpoint(path)
    adopt_settings(config, checkpoint, path)
    dataset = open_dataset(config)
    model = build_model(UniSRec, config, dataset).eval()
    load_weights(model, checkpoint, path, dataset.item_names())
    rows = [torch.tensor(history) + 1 for history in histories]
    lengths = torch.tensor([len(row) for row in rows])
    columns = {model.ITEM_SEQ: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), model.ITEM_SEQ_LEN: lengths}
    with torch.no_grad():
        return model, model.full_sort_predict(Interaction(columns | {model.ITEM_ID: lengths}))[:, 1:]


@pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
def test_the_scores_are_those_of_the_checkpoint(made, stage):
    histories = [[3, 4, 6], [29], [1, 2, 1, 5, 7, 8, 8]]
    model, expected = scores_of_checkpoint(made, stage, histories)
    if stage == "transductive_ft":
        assert model.item_to_item.factor > 0, "else nothing tests these logits"
    recommender = Recommender.from_pretrained(made[stage][1])
    assert len(recommender) == 30 and recommender.texts["Tiny1007"] == "item number 7."
    for history, row in zip(histories, expected, strict=True):
        found = recommender.score(ids(*history), ids(*range(30)))
        torch.testing.assert_close(torch.tensor(found), row, atol=1e-5, rtol=0)
    everything = recommender.recommend(
        [ids(*history) for history in histories], k=30, exclude_history=False, batch_size=2
    )
    for row, best in zip(expected, everything, strict=True):
        assert [item.id for item in best] == ids(*row.argsort(descending=True).tolist())
        assert {item.source for item in best} == {"model"}


def test_what_is_recommended(recommender):
    history = ids(3, 4)
    best = recommender.recommend(history, k=30)
    assert len(best) == 28 and not {item.id for item in best} & set(history)
    assert [item.score for item in best] == sorted((item.score for item in best), reverse=True)
    assert recommender.recommend(history, k=5) == best[:5]
    allowed = [best[20].id, best[7].id, history[0]]
    assert recommender.recommend(history, allowed=allowed) == [best[7], best[20]]
    with_history = recommender.recommend(history, allowed=allowed, exclude_history=False)
    assert sorted(item.id for item in with_history) == sorted(allowed)
    assert recommender.recommend([history, history], k=3) == [best[:3], best[:3]]
    assert recommender.recommend([*history, "nobody"], on_unknown="skip") == best[:10]


def test_an_empty_history_gets_the_most_popular_items(recommender, made, caplog):
    counts = pl.read_parquet(f"{made['transductive_ft'][1]}/{ITEMS}").sort("count", descending=True)
    best = recommender.recommend([], k=3)
    assert [item.score for item in best] == counts["count"][:3].to_list() and {item.source for item in best} == {
        "popularity"
    }
    assert "a history is empty" in caplog.text
    several = recommender.recommend([ids(1), [], ids(2)], k=1)
    assert [item.source for (item,) in several] == ["model", "popularity", "model"]


def test_items_come_and_go_without_an_effect_on_the_others(recommender):
    history, all_ids = ids(3, 4), ids(*range(30))
    before, best = recommender.score(history, all_ids), recommender.recommend(history, k=30)
    recommender.add_items({f"new{number}": f"a new thing, number {number}" for number in range(2 * BLOCK)})
    assert recommender.score(history, all_ids) == before, "to the bit"
    assert len(recommender) == 30 + 2 * BLOCK
    assert recommender.recommend(["new7", *ids(3)], k=1)[0].source == "model"
    before_change = recommender.score(["new7"], all_ids)
    for number in range(5):
        recommender.add_items({"new7": f"another text, {number}"})
    recommender.add_items({"new7": "now another text"})
    assert len(recommender._ids) == 30 + 2 * BLOCK, "a known item keeps its row"
    assert recommender.score(["new7"], all_ids) != before_change
    assert recommender.texts["new7"] == "now another text" and len(recommender) == 30 + 2 * BLOCK
    recommender.remove_items([f"new{number}" for number in range(2 * BLOCK)] * 2)
    assert recommender.recommend(history, k=30) == best
    recommender.remove_items([best[0].id])
    assert recommender.recommend(history, k=30) == best[1:]
    with pytest.raises(UserError, match=f"history: unknown item '{best[0].id}'"):
        recommender.recommend([best[0].id])
    recommender.add_items({})


def test_a_known_item_with_a_new_text_keeps_what_was_learned_of_its_id(recommender, made):
    count = recommender._counts[recommender._slots["Tiny1003"]]
    other = Recommender.from_pretrained(made["transductive_ft"][1])
    other.add_items({"x": "one text"})
    recommender.add_items({"Tiny1003": "one text"})
    (with_id,), (alone,) = recommender.score(ids(5, 6), ["Tiny1003"]), other.score(ids(5, 6), ["x"])
    assert with_id != alone and recommender._counts[recommender._slots["Tiny1003"]] == count > 0
    vectors = [
        each._units[each._slots[item]] * each._lengths[each._slots[item]]
        for each, item in ((recommender, "Tiny1003"), (other, "x"))
    ]
    learned = recommender.model.item_embedding.weight[4]
    torch.testing.assert_close(vectors[0] - vectors[1], learned.detach(), atol=1e-5, rtol=1e-4)


def test_a_new_item_has_the_score_of_its_text(made):
    """In the inductive stage, two items with one text are equal."""
    recommender = Recommender.from_pretrained(made["inductive_ft"][1])
    recommender.add_items({"a": "the same", "b": "the same", "c": ""})
    a, b, c = recommender.score(ids(5, 6), ["a", "b", "c"])
    assert a == b != c
    assert [item.id for item in recommender.similar("a", k=1)] == ["b"]
    assert recommender.similar("the same", k=2)[0].score == pytest.approx(1)
    assert len(recommender.similar("Tiny1003", k=99)) == len(recommender) - 1, "all but the item itself"


def test_the_bias_of_unseen_items_is_for_new_items(recommender, made, tmp_path):
    biased = Recommender.from_pretrained(made["transductive_ft"][1], unseen_bias=2.0)
    old = ids(0, 3, 9)
    for each in (recommender, biased):
        each.add_items({"new": "something new"})
    plain, found = (each.score(ids(1, 2), [*old, "new"]) for each in (recommender, biased))
    assert found[:3] == plain[:3]
    assert found[3] == pytest.approx(plain[3] + 2.0 * recommender.model.temperature, abs=1e-6)
    ranks = biased.ranks_of(biased.represent(["a newer thing"])[0], [ids(1, 2), ids(5)], k=40)
    biased.add_items({"newer": "a newer thing"})
    for rank, history in zip(ranks, (ids(1, 2), ids(5)), strict=True):
        assert [item.id for item in biased.recommend(history, 40)][rank - 1] == "newer"
    recommender.model.unseen_bias.fill_(-3.0)  # of the items that nobody had chosen in training
    assert recommender.score(ids(1, 2), ["new"]) == plain[3:], "it was not there yet"
    recommender.save_pretrained(str(tmp_path / "saved"))
    again = Recommender.from_pretrained(str(tmp_path / "saved"))
    assert again.model.unseen_bias == -3 and again.score(ids(1, 2), ["new"]) == pytest.approx(plain[3:])
    untrained = Recommender.from_pretrained(made["pretrain"][1], {"a": "one", "b": "two"}, unseen_bias=2.0)
    without = Recommender.from_pretrained(made["pretrain"][1], {"a": "one", "b": "two"})
    assert untrained.score(["a"], ["b"]) == without.score(["a"], ["b"]), "all items are new"


def test_a_pretrained_bundle_recommends_from_a_new_catalogue(made):
    items = {f"sku{number}": f"thing number {number}" for number in range(12)}
    recommender = Recommender.from_pretrained(made["pretrain"][1], items)
    best = recommender.recommend(["sku3", "sku4"], k=20)
    assert len(best) == 10 and all(item.text == items[item.id] for item in best)
    with pytest.raises(UserError, match="knows no popular items"):
        recommender.recommend([])
    with pytest.raises(UserError, match="has no items of its own"):
        Recommender.from_pretrained(made["pretrain"][1])
    with pytest.raises(UserError, match="has items of its own"):
        Recommender.from_pretrained(made["inductive_ft"][1], items)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.recommend(["Tiny1003", "Tiny100x"]), "history: unknown item 'Tiny100x'; did you mean Tiny10"),
        (lambda r: r.recommend(["Tiny1003"], k=0), "k: found 0, expected 1 or more"),
        (lambda r: r.recommend("Tiny1003"), "history: found 'Tiny1003', expected a list of ids"),
        (lambda r: r.similar("Tiny1003", k=-1), "k: found -1, expected 1 or more"),
        (lambda r: r.recommend(["Tiny1003"], allowed=["x"]), "allowed: unknown item 'x'"),
        (
            lambda r: r.recommend(["Tiny1003"], on_unknown="ignore"),
            "on_unknown: found 'ignore', expected error or skip",
        ),
        (lambda r: r.score(["Tiny1003"], ["x"]), "ids: unknown item 'x'"),
        (lambda r: r.remove_items(["Tiny1003", "x"]), "remove_items: unknown item 'x'"),
    ],
)
def test_mistakes(recommender, call, message):
    with pytest.raises(UserError) as error:
        call(recommender)
    assert str(error.value).startswith(message)
    assert len(recommender) == 30, "nothing was removed"


def test_the_nearest_item_of_the_history_explains(recommender):
    recommender.add_items({"a": "one thing", "b": "one thing"})
    assert recommender.nearest_of(["Tiny1003", "a", "nobody"], ["b", "Tiny1003"]) == ["a", "Tiny1003"]
    assert recommender.nearest_of(["nobody"], ["b"]) == [None] and recommender.nearest_of([], []) == []


def test_a_long_history_counts_with_its_newest_items(recommender):
    long = ids(*[number % 30 for number in range(80)])
    assert recommender.score(long, ids(2)) == recommender.score(long[-50:], ids(2))
    recommender.add_items({f"old{number}": f"old {number}" for number in range(20)})
    best = recommender.recommend([*(f"old{number}" for number in range(20)), *ids(*range(20)), *ids(*range(30))], k=99)
    assert best == [], "also the items that the model does not see are not recommended again"


def test_damaged_items(made, tmp_path):
    folder = shutil.copytree(made["inductive_ft"][1], tmp_path / "bundle")
    (folder / VECTORS).write_bytes((folder / VECTORS).read_bytes()[:-10])
    with pytest.raises(UserError, match="its items cannot be read"):
        Recommender.from_pretrained(str(folder))
    shutil.copy(f"{made['inductive_ft'][1]}/{VECTORS}", folder / VECTORS)
    pl.read_parquet(folder / ITEMS).head(29).write_parquet(folder / ITEMS)
    with pytest.raises(UserError, match=r"29 rows, 30 vectors"):
        Recommender.from_pretrained(str(folder))
    shutil.copy(f"{made['inductive_ft'][1]}/{ITEMS}", folder / ITEMS)
    save_file({"vectors": torch.zeros(30, 7)}, folder / VECTORS)
    with pytest.raises(UserError, match="vectors of width 7, expected"):
        Recommender.from_pretrained(str(folder))
    (folder / ITEMS).unlink()
    with pytest.raises(UserError, match="items.parquet: no such file; the bundle is incomplete"):
        Recommender.from_pretrained(str(folder))


def test_a_saved_recommender_is_the_same(made, recommender, tmp_path):
    shown = {"b": {"title": "B"}, "a": {"title": "A"}, "c": {"price": "3 €"}}
    recommender.add_items({"a": "a new thing", "b": "another", "c": "more"}, shown)
    recommender.remove_items(["a", "Tiny1004"])
    recommender.save_pretrained(str(tmp_path / "saved"))
    again = Recommender.from_pretrained(str(tmp_path / "saved"))
    assert again.texts == recommender.texts and again.columns == {"b": shown["b"], "c": shown["c"]}
    assert {item.id: item.columns for item in again.recommend(ids(3), k=40) if item.columns} == again.columns
    again.add_items({"b": "another"})
    assert set(again.columns) == {"c"}, "an item that is added again is replaced"
    for history in (ids(3, 5), ["b"], ["b", *ids(7)]):
        best, expected = again.recommend(history, k=40), recommender.recommend(history, k=40)
        assert [item.id for item in best] == [item.id for item in expected] and len(best) >= 28
        torch.testing.assert_close(*(torch.tensor([item.score for item in each]) for each in (best, expected)))
    items = {f"sku{number}": f"thing number {number}" for number in range(12)}
    Recommender.from_pretrained(made["pretrain"][1], items).save_pretrained(str(tmp_path / "shop"))
    assert Recommender.from_pretrained(str(tmp_path / "shop")).texts == items


def test_the_hub_gets_and_gives_a_bundle(recommender, made, monkeypatch):
    """The hub is replaced by a dict of folders."""
    hub, calls = {}, []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            hub[repo_id] = {path.name: path.read_bytes() for path in pathlib.Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(serving.recommender, "HfApi", Hub)
    assert recommender.push_to_hub("me/my-shop", private=True, token="secret") == "https://hub/me/my-shop"
    assert calls == ["secret", ("me/my-shop", True, True)] and ITEMS in hub["me/my-shop"]
    assert b"secret" not in b"".join(hub["me/my-shop"].values()) and b"# my-shop" in hub["me/my-shop"]["README.md"]
    monkeypatch.setattr(serving.recommender, "snapshot_download", {"me/my-shop": made["inductive_ft"][1]}.__getitem__)
    assert len(Recommender.from_pretrained("me/my-shop")) == 30
    with pytest.raises(UserError, match="me/none: no such folder, and cannot be loaded from the Hugging Face hub"):
        Recommender.from_pretrained("me/none")


def test_finetuning_leaves_a_bundle_beside_its_checkpoint(made, tmp_path):
    data = shutil.copytree(made["data"], tmp_path / "data")
    command = ["-d", "Tiny", f"--data_path={data}", *SMALL, "--train_stage=inductive_ft"]

    def folders(where, *options):
        finetune.main([*command, f"--checkpoint_dir={tmp_path / where}", *options])
        return sorted(
            path.name for path in (tmp_path / where).iterdir() if path.is_dir() and path.name != "tensorboard"
        )

    assert folders("none", "--epochs=1", "--bundle=false") == []
    assert folders("evaluated", "--epochs=0") == []
    (name,) = folders("one", "--epochs=1")
    assert (tmp_path / "one" / f"{name}.pth").is_file()
    assert len(Recommender.from_pretrained(str(tmp_path / "one" / name)).recommend(ids(1), k=4)) == 4
    (data / "Tiny" / "Tiny.text").unlink()
    assert folders("without texts", "--epochs=1") == []


def test_a_bundle_keeps_to_the_data_of_its_training(made, tmp_path):
    """The features and the users that it was trained on, also if others are there."""
    command = ["-d", "Tiny", f"--data_path={made['data']}", f"--checkpoint_dir={tmp_path}", "--epochs=1", *SMALL]
    finetune.main([*command, "--train_stage=inductive_ft", "--plm_suffix=feat2CLS", "--train_fraction=0.1"])
    (items,) = tmp_path.glob(f"*/{ITEMS}")
    everyone = pl.read_parquet(f"{made['inductive_ft'][1]}/{ITEMS}")["count"].sum()
    assert 0 < pl.read_parquet(items)["count"].sum() < everyone / 4


def test_the_items_of_another_model_are_not_kept(made, tmp_path, refused):
    folder = shutil.copytree(made["inductive_ft"][1], tmp_path / "bundle")
    assert "holds the bundle of a fine-tuned model" in refused(bundle.main, "-p", made["pretrain"][0], "--out", folder)


def test_only_unisrec_itself_can_be_a_bundle(made, tmp_path, refused):
    content = torch.load(made["inductive_ft"][0], weights_only=True) | {"model": "Mine"}
    torch.save(content, tmp_path / "mine.pth")
    words = ["-p", tmp_path / "mine.pth", "-d", "Tiny", "--data_path", made["data"], "--out", tmp_path / "out"]
    assert "holds a Mine; only UniSRec itself can be a bundle" in refused(bundle.main, *words)


def test_a_finetuned_model_needs_its_data_and_a_pretrained_one_has_none(made, tmp_path, refused):
    assert "is fine-tuned; give its data set with -d" in refused(
        bundle.main, "-p", made["inductive_ft"][0], "--out", tmp_path
    )
    words = ["-p", made["pretrain"][0], "-d", "Tiny", "--data_path", made["data"], "--out", tmp_path]
    assert "is pre-trained and has no items of its own" in refused(bundle.main, *words)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_recommends_for_one_history(made, capsys):
    capsys.readouterr()
    recommend.main(["-m", made["inductive_ft"][1], "--history", "Tiny1003, Tiny1004", "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    best = Recommender.from_pretrained(made["inductive_ft"][1]).recommend(ids(3, 4), k=2)
    assert [line.split()[:2] for line in lines[:2]] == [["history", "Tiny1003"], ["history", "Tiny1004"]]
    assert [line.split() for line in lines[2:]] == [
        [str(rank), f"{item.score:.3f}", item.id, *item.text.split()] for rank, item in enumerate(best, start=1)
    ]


def test_the_command_reads_a_catalogue_and_new_items(made, tmp_path, capsys):
    table = "item_id,title,link\n a ,Blaue Tasse,\nb,Rote Tasse,https://x.example/b\nc,,\n"
    (tmp_path / "items.csv").write_text(table, encoding="utf-8")
    capsys.readouterr()
    recommend.main(["-m", made["pretrain"][1], "--items", f"{tmp_path}/items.csv", "--history", "a"])
    assert {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]} == {"b", "c"}
    recommend.main(
        ["-m", made["inductive_ft"][1], "--new_items", f"{tmp_path}/items.csv", "--history", "a,Tiny1001", "-k", "99"]
    )
    assert len(capsys.readouterr().out.splitlines()) == 2 + 31
    shown = ["--show_columns", "title,url=link"]
    recommend.main(["-m", made["pretrain"][1], "--items", f"{tmp_path}/items.csv", "--history", "a", *shown])
    lines = [line.split()[2:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(lines) == [["b", "Rote", "Tasse", "url:", "https://x.example/b"], ["c"]]


def test_the_command_recommends_for_a_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr(recommend, "AT_ONCE", 3)
    histories = [ids(number, number + 1) for number in range(7)]
    lines = [json.dumps(history if number % 2 else {"history": history}) for number, history in enumerate(histories)]
    (tmp_path / "histories.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "recommendations.parquet"
    model = made["inductive_ft"][1]
    recommend.main(["-m", model, "--histories", f"{tmp_path}/histories.jsonl", "--out", str(out), "-k", "4"])
    table = pl.read_parquet(out)
    assert table["line"].to_list() == [line for line in range(1, 8) for _ in range(4)]
    assert table["rank"].to_list() == [1, 2, 3, 4] * 7
    best = Recommender.from_pretrained(model).recommend(histories, k=4)
    assert table["id"].to_list() == [item.id for each in best for item in each]


def test_the_command_recommends_for_the_test_users_of_a_data_set(made, tmp_path):
    rows, model = f"{made['data']}/Tiny/Tiny.test.inter", made["inductive_ft"][1]
    recommend.main(["-m", model, "--histories", rows, "--out", f"{tmp_path}/out.parquet", "-k", "4"])
    table = pl.read_parquet(tmp_path / "out.parquet")
    lines = pathlib.Path(rows).read_text().splitlines()
    assert set(table["line"]) == set(range(2, len(lines) + 1)), "the numbers of the lines, without that of the header"
    numbers = map(int, lines[4].split("\t")[1].split())
    best = Recommender.from_pretrained(model).recommend(ids(*numbers), k=4)
    assert table.filter(line=5)["id"].to_list() == [item.id for item in best]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["Tiny1001", "x"]', "line 2: unknown item 'x'"),
        ("[1", "line 2: is not JSON"),
        ("[1]", "line 2: found '[1]', expected"),
        ('{"items": []}', "line 2: found"),
    ],
)
def test_mistakes_in_a_file(made, tmp_path, refused, line, message):
    (tmp_path / "histories.jsonl").write_text(f'["Tiny1001"]\n{line}\n')
    command = ["-m", made["inductive_ft"][1], "--histories", f"{tmp_path}/histories.jsonl"]
    assert message in refused(recommend.main, *command, "--out", f"{tmp_path}/out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    assert "give the file for the recommendations" in refused(recommend.main, *command)
    (tmp_path / "latin.jsonl").write_bytes('["Müsli"]'.encode("latin-1"))
    latin = [*command[:3], f"{tmp_path}/latin.jsonl", "--out", f"{tmp_path}/out.parquet"]
    assert "line 1: is not JSON" in refused(recommend.main, *latin)
    assert "--out: is for" in refused(
        recommend.main, *command[:2], "--history", "a", "--out", f"{tmp_path}/out.parquet"
    )
    assert "expected either --history or --histories" in refused(recommend.main, *command, "--history", "a")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("text", "a column to show cannot have the name 'text'"),
        ("title,", "a column to show cannot have the name ''"),
        ("title,title=name", "title occurs twice"),
        ("titel", "has no column titel"),
    ],
)
def test_mistakes_in_the_columns_to_show(made, tmp_path, refused, option, message):
    (tmp_path / "items.csv").write_text("item_id,title\na,Blaue Tasse\n", encoding="utf-8")
    command = ["-m", made["pretrain"][1], "--items", tmp_path / "items.csv", "--history", "a"]
    assert message in refused(recommend.main, *command, "--show_columns", option)
