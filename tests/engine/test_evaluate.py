"""The table of ranks of an evaluation: its rows, ties, NaN scores, sampled negatives, its file, groups.

Several processes find the same table: tests/test_ddp.py.
"""

import os

import numpy as np
import polars as pl
import pytest
import torch
from recbole.data.utils import data_preparation
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.trainer import Trainer
from recbole.utils import InputType

import finetune
import run_baseline
from baselines.sasrec import SASRec
from baselines.untrained import LastText, Popularity
from common.errors import UserError
from common.files import read_json
from data import UniSRecDataset
from engine.config import build_config
from engine.evaluate import Evaluation
from engine.metrics import METRICS, mean_metrics
from engine.ranks_file import read_ranks, user_names, write_ranks
from tests.conftest import SMALL
from tests.small_data import write_downstream, write_inter

ITEMS, USERS, WINDOW = 30, 25, 8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the data set Small, and its rows."""
    folder = str(tmp_path_factory.mktemp("downstream"))
    return folder, write_downstream(folder, users=USERS, items=ITEMS, cut_length=WINDOW, longest=14)


def opened(model_class, folder, **options):
    """(config, evaluation, model) of the data set Small."""
    settings = {"data_path": folder, "plm_size": 24, "show_progress": False, "MAX_ITEM_LIST_LENGTH": WINDOW, **options}
    config = build_config(model_class, "Small", "baseline", settings)
    evaluation = Evaluation(config, UniSRecDataset(config))
    return config, evaluation, model_class(config, evaluation.parts["train"])


class Scores(SequentialRecommender):
    """A stub with the score of each item, the same for all users: float [N + 1]."""

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.scores = -torch.arange(self.n_items, dtype=torch.float32)  # item 1 is the best, padding above it

    def full_sort_predict(self, interaction):
        return self.scores.repeat(len(interaction), 1)

    def predict(self, interaction):
        return self.scores[interaction["item_id"]]


def columns_of(table):
    return {name: column.tolist() for name, column in vars(table).items()}


def same(one, other):
    """Whether two tables are the same, row by row."""
    return columns_of(one) == columns_of(other)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_a_row_for_each_row_of_the_split(small, phase):
    folder, rows = small
    _, evaluation, model = opened(Scores, folder)
    table, metrics = evaluation.evaluate(model, phase)
    # an id is the number in the file + 1, and the target's rank is its id
    expected = sorted((user + 1, target + 1, len(history), target in history) for user, history, target in rows[phase])
    assert columns_of(table) == {
        "user": [row[0] for row in expected],
        "target": [row[1] for row in expected],
        "history_length": [row[2] for row in expected],
        "rank": [row[1] for row in expected],
        "candidates": [ITEMS] * USERS,
        "in_history": [row[3] for row in expected],
    }
    assert table.rank.dtype == np.float64 and 0 < table.in_history.sum() < USERS and max(table.history_length) == WINDOW
    assert metrics == mean_metrics(table, ["recall", "ndcg"], [10, 50]) and 0 < metrics["recall@10"] < 1
    assert evaluation(model, phase) == metrics


@pytest.mark.parametrize("users_at_a_time", [1, 7])
def test_the_table_does_not_depend_on_the_batches(small, users_at_a_time):
    folder, _ = small
    tables = []
    for size in (1024, users_at_a_time):
        _, evaluation, model = opened(Scores, folder, eval_batch_size=size)
        tables.append(evaluation.evaluate(model, "test").table)
    assert same(*tables)


def test_equal_scores_share_the_expected_rank(small):
    folder, _ = small
    _, evaluation, model = opened(Scores, folder, topk=[1, 10], valid_metric="NDCG@10")
    model.scores = torch.zeros(ITEMS + 1)
    table, metrics = evaluation.evaluate(model, "test")
    assert table.rank.tolist() == [(ITEMS + 1) / 2] * USERS and set(metrics.values()) == {0.0}


def test_ranks_of_the_instance_are_asked_and_inherited_ones_are_not(small):
    folder, _ = small

    class WithRanks(Scores):
        def ranks(self, interaction):
            return torch.full((len(interaction),), 3.0, dtype=torch.float64)

    class Derived(WithRanks):
        """Has scores of its own, so that the ranks of its parent are wrong."""

        def full_sort_predict(self, interaction):
            return torch.zeros(len(interaction), self.n_items)

    _, evaluation, model = opened(WithRanks, folder)
    assert evaluation.evaluate(model, "test").table.rank.tolist() == [3.0] * USERS
    _, evaluation, model = opened(Derived, folder)
    assert evaluation.evaluate(model, "test").table.rank.tolist() == [(ITEMS + 1) / 2] * USERS
    model.ranks = lambda interaction: torch.full((len(interaction),), 1.5, dtype=torch.float64)
    assert evaluation.evaluate(model, "test").table.rank.tolist() == [1.5] * USERS


def test_a_model_stays_in_training(small):
    folder, _ = small
    _, evaluation, model = opened(Scores, folder)
    for mode in (True, False):
        evaluation(model.train(mode), "valid")
        assert model.training is mode


# -- scores that are NaN ---------------------------------------------------------------------------------------------


class HalfNaN(Scores):
    """A stub whose scores are NaN for the users with these ids."""

    wrong = (5, 9)

    def full_sort_predict(self, interaction):
        scores = super().full_sort_predict(interaction)
        scores[torch.isin(interaction["user_id"], torch.tensor(self.wrong)), 3] = torch.nan
        return scores


def test_nan_scores_stop_the_evaluation_and_name_the_first_user(small, tmp_path):
    folder, _ = small
    _, evaluation, model = opened(HalfNaN, folder)
    with pytest.raises(
        UserError, match=r"^model HalfNaN: the scores of user 4 in test are NaN, expected numbers \(2 of 25 rows"
    ):
        evaluation(model, "test")
    # one NaN is enough for the ranks of a model's own
    model.ranks = lambda interaction: torch.where(interaction["user_id"] == 9, torch.nan, 1.0)
    with pytest.raises(UserError, match="user 8 in valid are NaN.*1 of 25 rows.*lower --learning_rate"):
        evaluation(model, "valid")


def test_the_raw_id_of_the_user_is_named(tmp_path):
    write_downstream(str(tmp_path), users=USERS, items=ITEMS, cut_length=WINDOW, longest=14)
    (tmp_path / "Small" / "Small.user2index").write_text("".join(f"user {n:02}\t{n}\n" for n in range(USERS)))
    _, evaluation, model = opened(HalfNaN, str(tmp_path))
    with pytest.raises(UserError, match="model HalfNaN: the scores of user user 04 in test are NaN"):
        evaluation(model, "test")


def test_a_nan_in_the_weights_ends_a_command_in_one_line(small, tmp_path, refused, monkeypatch):
    folder, _ = small
    monkeypatch.setattr(LastText, "predict", None)
    monkeypatch.setattr(LastText, "states", lambda self, interaction: torch.full((len(interaction), 24), torch.nan))
    message = refused(run_baseline.main, "-m", "LastText", "-d", "Small", f"--data_path={folder}", "--plm_size=24",
                      f"--checkpoint_dir={tmp_path}", "--show_progress=false")  # fmt: skip
    assert message.startswith("model LastText: the scores of user 0 in valid are NaN, expected numbers (25 of 25 rows")
    assert os.listdir(tmp_path) == []


# -- sampled negatives -----------------------------------------------------------------------------------------------

SAMPLED = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}


def test_ranks_among_sampled_negatives(small):
    folder, rows = small
    _, evaluation, model = opened(Scores, folder, eval_args=SAMPLED, eval_batch_size=40)
    table, _ = evaluation.evaluate(model, "test")
    assert len(evaluation.loaders["test"]) > 3
    assert table.user.tolist() == list(range(1, USERS + 1))
    assert dict(zip(table.user, table.target, strict=True)) == {user + 1: item + 1 for user, _, item in rows["test"]}
    assert table.candidates.min() >= 2 and table.candidates.max() == 6, "a negative may be drawn twice"
    assert (table.rank >= 1).all() and (table.rank <= table.candidates).all() and len(set(table.rank)) > 3
    model.scores = torch.zeros(ITEMS + 1)
    table, _ = evaluation.evaluate(model, "test")
    assert table.rank.tolist() == ((table.candidates + 1) / 2).tolist()


def test_each_row_of_a_user_has_negatives_of_its_own(tmp_path, monkeypatch):
    """RecBole's loader puts a user's rows together; each keeps its history and its negatives."""
    rows = write_downstream(str(tmp_path), users=6, items=ITEMS, cut_length=WINDOW, longest=14)["test"]
    more = [(2, [3, 4], 5), (4, [6], 7), (4, [8, 9], 1)]
    write_inter(tmp_path / "Small" / "Small.test.inter", [*rows, *more])

    class Seen(Scores):
        """A stub that scores the target of a row above all but one item, by what it saw last."""

        def predict(self, interaction):
            last = interaction["item_id_list"].gather(1, interaction["item_length"][:, None] - 1)[:, 0]
            self.pairs = [
                *zip(interaction["user_id"].tolist(), last.tolist(), interaction["item_id"].tolist(), strict=True)
            ]
            return self.scores[interaction["item_id"]]

    _, evaluation, model = opened(Seen, str(tmp_path), eval_args=SAMPLED)
    table, _ = evaluation.evaluate(model, "test")
    expected = sorted((user + 1, len(history), target + 1, history[-1] + 1) for user, history, target in [*rows, *more])
    assert [*zip(table.user, table.history_length, table.target, strict=True)] == [row[:3] for row in expected]
    for row, (user, _, target, last) in enumerate(expected):
        items = {item for *pair, item in model.pairs if pair == [user, last]}
        assert table.candidates[row] == len(items) and table.rank[row] == 1 + sum(item < target for item in items)


# -- RecBole's other metrics -----------------------------------------------------------------------------------------

OTHERS = ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage", "GAUC"]


@pytest.mark.parametrize("others", [OTHERS[:-1], OTHERS])
def test_other_metrics_are_recboles(small, tmp_path, others):
    folder, _ = small
    metrics = ["NDCG", *others[:3], "Recall", *others[3:], "MRR", "Hit", "MAP", "Precision"]
    options = dict(metrics=metrics, topk=[10, 3], valid_metric="NDCG@10", checkpoint_dir=str(tmp_path))
    config, evaluation, model = opened(SASRec, folder, **options)
    dataset = UniSRecDataset(config)
    train, valid, _ = data_preparation(config, dataset)
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(train)
    trainer.eval_collector.get_data_struct = lambda: trainer.eval_collector.data_struct  # its own fails on the numbers
    expected = trainer.evaluate(valid, load_best_model=False)
    found = evaluation(model, "valid")
    assert list(found) == list(expected) and found == pytest.approx(dict(expected), abs=1e-12)
    assert all(type(value) is float for value in found.values()) and 0 < found["itemcoverage@3"] < 1


def test_other_metrics_need_a_catalogue_of_k_items(small):
    folder, _ = small
    with pytest.raises(UserError, match="option --topk: found 31, expected at most 30 for giniindex, itemcoverage"):
        opened(Scores, folder, metrics=["NDCG", "ItemCoverage", "GiniIndex"], topk=[31], valid_metric="NDCG@31")
    _, evaluation, model = opened(Scores, folder, metrics=["NDCG", "Recall"], topk=[31], valid_metric="NDCG@31")
    assert evaluation(model, "test")["recall@31"] == 1.0


# -- the file, and the groups ----------------------------------------------------------------------------------------


def with_raw_ids(folder):
    """Name the users and items of the data set Small."""
    for kind, count in (("user", USERS), ("item", ITEMS)):
        with open(os.path.join(folder, "Small", f"Small.{kind}2index"), "w", encoding="utf-8") as file:
            file.writelines(f"{kind} ü{number}\t{number}\n" for number in reversed(range(count)))


def run_popularity(folder, saved, *options):
    run_baseline.main(["-m", "Popularity", "-d", "Small", f"--data_path={folder}", f"--checkpoint_dir={saved}",
                       "--show_progress=false", "--plm_size=24", *options])  # fmt: skip


def result_of(saved):
    """What the only result file of a folder holds."""
    (path,) = saved.glob("Popularity-Small-2020-*.json")
    return read_json(path)


@pytest.mark.parametrize("raw", [True, False])
def test_the_file_has_raw_ids(tmp_path, raw):
    rows = write_downstream(str(tmp_path), users=USERS, items=ITEMS, cut_length=WINDOW, longest=14)
    if raw:
        with_raw_ids(tmp_path)
    path = tmp_path / "new folder" / "ranks.parquet"
    run_popularity(tmp_path, tmp_path, f"--ranks_file={path}", "--topk=10")
    frame = pl.read_parquet(path)
    assert frame.schema == {
        "user": pl.String, "target": pl.String, "history_length": pl.Int32,
        "rank": pl.Float64, "candidates": pl.Int32, "in_history": pl.Boolean,
    }  # fmt: skip
    user, item = ("user ü", "item ü") if raw else ("", "")
    expected = sorted((f"{user}{u}", f"{item}{t}", len(history), t in history) for u, history, t in rows["test"])
    assert sorted(frame.select("user", "target", "history_length", "in_history").rows()) == expected
    assert frame["candidates"].unique().to_list() == [ITEMS] and (frame["rank"] % 1 == 0.5).any(), "ties"
    table, metrics = read_ranks(str(path)), result_of(tmp_path)["metrics"]["test"]
    assert table.user.tolist() == sorted(f"{user}{number}" for number in range(USERS))
    assert mean_metrics(table, ["recall", "ndcg"], [10]) == pytest.approx(metrics, abs=1e-12)
    assert os.listdir(path.parent) == ["ranks.parquet"]


def test_a_mixture_names_its_users_by_domain(mixture):
    config = build_config(Popularity, "Mix", "baseline", {"data_path": mixture, "show_progress": False})
    names = user_names(UniSRecDataset(config))
    assert names[0] == "[PAD]" and set(names[1:]) == {f"{domain}-{user}" for domain in (0, 1) for user in range(30)}


def test_no_file_unless_asked_for(small, tmp_path):
    run_popularity(small[0], tmp_path)
    assert result_of(tmp_path)["groups"] is None
    assert len(os.listdir(tmp_path)) == 1


def test_an_unwritable_path_is_found_before_training(small, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("engine.finetuning.Trainer.fit", lambda *_: pytest.fail("trained"))
    command = ["-d", "Small", f"--data_path={small[0]}", f"--checkpoint_dir={tmp_path}", *SMALL]
    (tmp_path / "taken").mkdir()
    message = refused(finetune.main, *command, f"--ranks_file={tmp_path / 'taken'}")
    assert message == f"{tmp_path / 'taken'}: cannot be written: it is a folder; choose a file name"
    assert refused(finetune.main, *command, "--ranks_file=[a, b]").startswith("option --ranks_file: found ['a', 'b']")


def test_a_malformed_user2index_is_named(small, tmp_path):
    write_downstream(str(tmp_path), users=USERS, items=ITEMS, cut_length=WINDOW, longest=14)
    (tmp_path / "Small" / "Small.user2index").write_text("A\t0\nB two\n")
    _, evaluation, model = opened(Scores, str(tmp_path))
    with pytest.raises(UserError, match=r"Small.user2index, line 2: found 'B two', expected USER<TAB>NUMBER"):
        write_ranks(str(tmp_path / "x"), evaluation.evaluate(model, "test").table, evaluation.dataset)
    assert not (tmp_path / "x").exists()


def test_groups_are_printed_and_stored(small, tmp_path, capsys):
    folder, rows = small
    options = [f"--data_path={folder}", f"--checkpoint_dir={tmp_path}", f"--ranks_file={tmp_path / 'ranks'}"]
    finetune.main(["-d", "Small", "--epochs=0", "--train_stage=inductive_ft", "--groups=true", *options, *SMALL])
    (name,) = [name for name in os.listdir(tmp_path) if name.endswith(".json")]
    result = read_json(tmp_path / name)
    assert list(result["groups"]) == ["popularity", "history length", "repetition"]
    frame = pl.read_parquet(tmp_path / "ranks")
    repeated = frame.filter(pl.col("in_history"))
    found = result["groups"]["repetition"]["in the history"]
    assert found["users"] == len(repeated) and found["recall@10"] == pytest.approx((repeated["rank"] <= 10).mean())
    for labels in result["groups"].values():
        assert sum(group["users"] for group in labels.values()) == USERS
        for metric, value in result["metrics"]["test"].items():
            mean = sum(group["users"] * group[metric] for group in labels.values()) / USERS
            assert mean == pytest.approx(value, abs=1e-12)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.split()[1:3] == ["by", "popularity"]]
    assert len(printed) == 1 and printed[0].split()[3:] == ["users", "recall@10", "recall@50", "ndcg@10", "ndcg@50"]
    seen = {item for _, history, target in rows["train"] for item in [*history, target]}
    never = sum(target not in seen for _, _, target in rows["test"])
    assert result["groups"]["popularity"].get("never seen", {"users": 0})["users"] == never


def test_a_metric_of_ones_own_is_a_function_with_a_name(small, monkeypatch):
    monkeypatch.setitem(METRICS, "inverse_square", lambda table, k: (table.rank <= k) / table.rank**2)
    _, evaluation, model = opened(
        Popularity, small[0], metrics=["Recall", "inverse_square"], topk=[3], valid_metric="inverse_square@3"
    )
    table, metrics = evaluation.evaluate(model, "test")
    assert list(metrics) == ["recall@3", "inverse_square@3"]
    expected = [1 / rank**2 if rank <= 3 else 0.0 for rank in table.rank]
    assert metrics["inverse_square@3"] == pytest.approx(sum(expected) / USERS) and any(expected)
