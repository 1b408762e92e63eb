"""Evaluation: a table with the rank of each row's target among all items, and the metrics of that table."""

import collections
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.evaluator import Collector, Evaluator
from recbole.evaluator.register import metric_information
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import EvaluatorType
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.processes import from_main, gather, is_main, rank, world_size
from engine.metrics import METRICS, RankTable, mean_metrics
from engine.ranks_file import user_names
from layers.ranking import expected_ranks

if TYPE_CHECKING:
    from data import UniSRecDataset
    from engine.config import Config

_SCORES = 1 << 27  # most scores of a batch. With a large catalogue, a batch has fewer users


class Evaluated(NamedTuple):
    """The result of an evaluation: the table of ranks, and the metrics by RecBole's names, unrounded."""

    table: RankTable
    metrics: dict[str, float]


class Evaluation:
    """Evaluates models on the rows of valid and test.

    The metrics of `engine.metrics` are functions of the table of ranks. RecBole computes its other ranking metrics
    (ItemCoverage, GAUC, ...). Several processes share the rows. If a metric of RecBole needs all scores, or if
    negatives are sampled, the main process evaluates alone. All processes get the same result.

    Args:
        config: `eval_args`, `metrics`, `topk` and `eval_batch_size` are read.
        dataset: the whole data set. Its `build` is called here.

    Attributes:
        by_rank (list of str): the metrics that are functions of the table of ranks, in lower case.
        others (list of str): the metrics that RecBole computes.
        parts (dict): the data sets `train`, `valid`, `test`.
        loaders (dict): RecBole's loaders of `valid` and `test`.
        shared (bool): whether several processes share the rows.

    Raises:
        UserError: a metric is not a ranking metric, or a k is larger than the catalogue.
    """

    def __init__(self, config: "Config", dataset: "UniSRecDataset"):
        self.config, self.dataset = config, dataset
        if config["eval_type"] != EvaluatorType.RANKING:
            raise UserError(f"metrics {config['metrics']}: expected ranking metrics such as Recall, NDCG, MRR, Hit")
        names = [name.lower() for name in config["metrics"]]
        self.by_rank = [name for name in names if name in METRICS]
        self.others = [name for name in names if name not in METRICS]
        self.n_columns = dataset.item_num
        if self.others and max(config["topk"]) >= self.n_columns:
            raise UserError(
                f"option --topk: found {max(config['topk'])}, expected at most {self.n_columns - 1} for "
                f"{', '.join(sorted(self.others))}: the catalogue has no more items"
            )
        # RecBole's collector and evaluator read these settings: all of ours, but only the metrics that RecBole computes
        self._recbole_config = collections.ChainMap({"metrics": self.others}, config)
        needs = {need for name in self.others for need in metric_information[name] if need.startswith("rec.")}
        modes = config["eval_args"]["mode"]
        self.shared = world_size() > 1 and set(modes.values()) == {"full"} and needs <= {"rec.items"}

        config["eval_batch_size"] = min(config["eval_batch_size"], max(1, _SCORES // self.n_columns))
        self.parts = dict(zip(("train", "valid", "test"), dataset.build(), strict=True))
        samplers = dict(zip(self.parts, create_samplers(config, dataset, list(self.parts.values())), strict=True))
        self.sampler = samplers["train"]
        self.loaders = {}
        for phase in ("valid", "test"):
            if modes[phase] == "full":
                # histories of similar length need little padding. The table does not depend on the order
                self.parts[phase].sort(config["ITEM_LIST_LENGTH_FIELD"])
            if self.shared:
                self.parts[phase].share(rank(), world_size())
            self.loaders[phase] = get_dataloader(config, phase)(config, self.parts[phase], samplers[phase])

    def __call__(self, model: SequentialRecommender, phase: str, show_progress: bool = False) -> dict[str, float]:
        """The metrics of a model on `valid` or `test`; see `evaluate`."""
        return self.evaluate(model, phase, show_progress).metrics

    def evaluate(self, model: SequentialRecommender, phase: str, show_progress: bool = False) -> Evaluated:
        """Evaluate a model on `valid` or `test`.

        Raises:
            UserError: a score is NaN.
        """
        if world_size() > 1 and not self.shared:
            table, others = from_main(self._evaluate(model, phase, show_progress) if is_main() else None)
        else:
            table, others = self._evaluate(model, phase, show_progress)
        self._check_scores(table, phase)
        found = mean_metrics(table, self.by_rank, self.config["topk"]) | others
        order = [name.lower() for name in self.config["metrics"]]
        keys = sorted(found, key=lambda key: order.index(key.partition("@")[0]))  # stable: keeps the order of topk
        return Evaluated(table, {key: found[key] for key in keys})

    @torch.no_grad()
    def _evaluate(
        self, model: SequentialRecommender, phase: str, show_progress: bool
    ) -> tuple[RankTable, dict[str, float]]:
        """The table of all rows, and the metrics that RecBole computes."""
        was_training = model.training
        model.eval()
        collector = Collector(self._recbole_config) if self.others else None
        # the first part is empty, for a process without rows
        parts = [(torch.empty(0, 5, dtype=torch.int64), torch.empty(0, dtype=torch.float64))]
        for batch, users, positive_users, _ in tqdm(
            self.loaders[phase], desc=f"Evaluating {phase}", leave=False, disable=None if show_progress else True
        ):
            if users is None:
                parts.append(self._rank_all(model, batch, collector))
            else:
                parts.append(self._rank_sampled(model, batch, users, positive_users, collector))
        model.train(was_training)  # the model discards the item table that it made for the evaluation
        device = self.config["device"]
        columns, ranks = (torch.cat([part.to(device) for part in column]) for column in zip(*parts, strict=True))
        if self.shared:
            (columns, ranks), *_ = gather(columns, ranks)
        return _table(columns.cpu().numpy(), ranks.cpu().numpy()), self._recboles_metrics(collector)

    @torch.no_grad()
    def compare(
        self,
        model: SequentialRecommender,
        variants: Callable[[Interaction], Iterable[Tensor]],
        count: int,
        phase: str,
        most: int,
    ) -> list[RankTable]:
        """The ranks by several scores, among all items, whatever `eval_args` says.

        Args:
            model: is in evaluation mode while `variants` is called.
            variants: the scores of a batch of rows, float [B, N + 1], one tensor per variant. Column 0 is set to -inf.
            count: V, the number of variants.
            phase: `valid` or `test`.
            most: if there are more rows, about this many are ranked: every second, third, ... row.

        Returns:
            One table per variant.
        """
        was_training = model.training
        model.eval()
        part, size = self.parts[phase], self.config["eval_batch_size"]
        step = max(1, round(len(part) * (world_size() if self.shared else 1) / most))
        rows = np.arange(0, len(part), step)
        columns = [torch.empty(0, 5, dtype=torch.int64)]
        ranks = [torch.empty(0, count, dtype=torch.float64, device=self.config["device"])]  # of a batch: [B, V]
        for start in range(0, len(rows), size):
            batch = part[rows[start : start + size]]
            columns.append(self._columns(batch, self.n_columns - 1))
            batch = batch.to(self.config["device"])
            found = []
            for scores in variants(batch):
                scores[:, 0] = -torch.inf
                found.append(self._ranks(scores, batch, None))
            ranks.append(torch.stack(found, 1))
        model.train(was_training)
        by_variant, of_rows = torch.cat(ranks), torch.cat(columns).to(self.config["device"])
        if self.shared:
            (of_rows, by_variant), *_ = gather(of_rows, by_variant)
        return [_table(of_rows.cpu().numpy(), column) for column in by_variant.T.cpu().numpy()]

    def _rank_all(
        self, model: SequentialRecommender, batch: Interaction, collector: Collector | None
    ) -> tuple[Tensor, Tensor]:
        """Rank each row's target among all items. Returns the other columns, int64 [B, 5], and ranks, float64 [B]."""
        columns = self._columns(batch, self.n_columns - 1)
        batch = batch.to(self.config["device"])
        own_ranks = _own_ranks(model)
        if own_ranks and not collector:
            return columns, own_ranks(batch)
        scores = model.full_sort_predict(batch).view(-1, self.n_columns)  # [B, N + 1]
        scores[:, 0] = -torch.inf
        return columns, self._ranks(scores, batch, collector)

    def _rank_sampled(
        self,
        model: SequentialRecommender,
        batch: Interaction,
        users: Tensor,
        positive_users: Tensor,
        collector: Collector | None,
    ) -> tuple[Tensor, Tensor]:
        """Rank each row's target among its sampled negatives. Returns the same as `_rank_all`.

        For a user with m rows RecBole's loader yields the m targets, then the first negative of each row, then the
        second negatives, and so on. So pair i of the user belongs to row i mod m.

        Args:
            batch: P pairs of a row and a candidate.
            users: int64 [P], the user of each pair, counted from 0 in this batch, ascending.
            positive_users: int64 [B], the user of each row.
        """
        rows_of_user = positive_users.bincount()
        first_pair, first_row = (counts.cumsum(0) - counts for counts in (users.bincount(), rows_of_user))
        within = torch.arange(len(users)) - first_pair[users]  # the pair's place among those of its user
        row = first_row[users] + within % rows_of_user[users]  # [P]
        scores = torch.full((len(positive_users), self.n_columns), -torch.inf, device=self.config["device"])
        rows = batch[(within < rows_of_user[users]).nonzero()[:, 0]]
        batch = batch.to(self.config["device"])
        scores[row.to(scores.device), batch[self.dataset.iid_field]] = model.predict(batch)
        columns = self._columns(rows, (scores != -torch.inf).sum(1).cpu())
        return columns, self._ranks(scores, rows, collector)

    def _columns(self, rows: Interaction, candidates: int | Tensor) -> Tensor:
        """The columns of rows without the rank, int64 [B, 5], in the order in which `_table` reads them."""
        target = rows[self.dataset.iid_field]
        in_history = (rows[self.dataset.item_id_list_field] == target[:, None]).any(1)
        columns = torch.empty(len(target), 5, dtype=torch.int64)
        for place, column in enumerate(
            (rows[self.dataset.uid_field], target, rows[self.dataset.item_list_length_field], candidates, in_history)
        ):
            columns[:, place] = column
        return columns

    def _ranks(self, scores: Tensor, rows: Interaction, collector: Collector | None) -> Tensor:
        """The rank of each row's target, float64 [B], from scores, float [B, N + 1]; -inf for other than candidates."""
        targets = rows[self.dataset.iid_field].to(scores.device)
        if collector:
            collector.eval_batch_collect(scores, rows, torch.arange(len(targets), device=scores.device), targets)
        return expected_ranks(scores, targets)

    def _recboles_metrics(self, collector: Collector | None) -> dict[str, float]:
        """The metrics that RecBole computes, from the batches that its collector has seen in all processes."""
        if not collector:
            return {}
        if self.shared:
            none = torch.empty(0, max(self.config["topk"]), dtype=torch.int64)  # a process without rows
            own = collector.data_struct._data_dict.get("rec.items", none)
            (items,), *_ = gather(own.to(self.config["device"]))
            collector.data_struct.set("rec.items", items)
        collector.data_collect(_TrainingRows(self.parts["train"]))
        for name, value in collector.data_struct._data_dict.items():
            if isinstance(value, Tensor):  # the collector also holds plain numbers, on which RecBole's code fails
                collector.data_struct.set(name, value.cpu())
        values = Evaluator(self._recbole_config).evaluate(collector.data_struct)
        return {name: float(value) for name, value in values.items()}

    def _check_scores(self, table: RankTable, phase: str) -> None:
        """Raise a UserError about the first user with a NaN score, if there is one."""
        wrong = np.isnan(table.rank)
        if wrong.any():
            user = user_names(self.dataset)[table.user[wrong.argmax()]]
            raise UserError(
                f"model {self.config['model']}: the scores of user {user} in {phase} are NaN, expected numbers "
                f"({wrong.sum():,} of {len(table):,} rows have NaN scores); train again with a lower --learning_rate, "
                "or start from another checkpoint"
            )


def _own_ranks(model: SequentialRecommender) -> Callable[[Interaction], Tensor] | None:
    """The model's method `ranks`, which returns the rank of each target, float64 [B]. None if it has no valid one.

    If a derived class overrides `full_sort_predict`, an inherited `ranks` would still rank by the old scores. So
    `ranks` is used only if no class below the one that defines it overrides `full_sort_predict`.
    """
    for part in (model, *type(model).__mro__):
        if "ranks" in vars(part) or "full_sort_predict" in vars(part):
            return model.ranks if "ranks" in vars(part) else None
    return None


def _table(columns: np.ndarray, ranks: np.ndarray) -> RankTable:
    """The table, sorted by user, of columns int64 [R, 5] and ranks, float64 [R]."""
    user, target, length, candidates, in_history = columns.T
    order = np.lexsort((target, length, user))  # does not depend on which process ranked a row
    return RankTable(user, target, length, ranks, candidates, in_history.astype(bool))[order]


class _TrainingRows:
    """Stands in for the training loader. RecBole's collector reads only its data set."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
