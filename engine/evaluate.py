"""Evaluation with RecBole's loaders and metrics: full ranking over the catalogue."""

import torch
from recbole.data.utils import create_samplers, get_dataloader
from recbole.evaluator import Collector, Evaluator
from recbole.utils import EvaluatorType
from torch.nn import functional as F
from tqdm import tqdm

from common.errors import UserError
from common.processes import from_main, gather, is_main, rank, world_size

_SCORES = 1 << 27  # scores of a batch at most: with a large catalogue, fewer users at a time
_BY_TOP_K = {"rec.topk", "rec.items"}

# metrics that look at the targets' places alone, and so bear a catalogue smaller than k
_OF_TARGETS = {"recall", "ndcg", "hit", "mrr", "map", "precision"}


class TopKCollector(Collector):
    """RecBole's collector, quicker for the usual case of one target a row: one top-k, no matrix of targets."""

    def needs(self):
        """What the metrics want to know of a batch: set of str."""
        names = ("rec.topk", "rec.items", "rec.meanrank", "rec.score", "data.label")
        return {name for name in names if self.register.need(name)}

    def eval_batch_collect(self, scores_tensor, interaction, positive_u, positive_i):
        if not self.needs() <= _BY_TOP_K or len(positive_i) != len(scores_tensor):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        k = max(self.topk)
        top = scores_tensor.topk(min(k, scores_tensor.size(1)), dim=-1).indices  # [B, k]
        hits = (top == positive_i.to(top.device)[:, None]).int()
        self._collect_hits(F.pad(hits, (0, k - hits.size(1))))  # a catalogue smaller than k
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", top)

    def collect_ranks(self, ranks):
        """The same from the targets' places, int64 [B], for metrics that look at nothing else."""
        self._collect_hits((ranks[:, None] == torch.arange(max(self.topk), device=ranks.device)).int())

    def join_processes(self, device):
        """Put together what all processes have collected; one may have had no rows at all."""
        width = max(self.topk)
        for name, columns in (("rec.topk", width + 1), ("rec.items", width)):
            if self.register.need(name):
                none = torch.empty((0, columns), dtype=torch.int64 if name == "rec.items" else torch.int32)
                own = self.data_struct._data_dict.get(name, none)
                (joined,), *_ = gather(own.to(device))
                self.data_struct.set(name, joined)

    def _collect_hits(self, hits):
        """int32 [B, k]: where the target stands; RecBole's matrix has the number of targets behind it."""
        self.data_struct.update_tensor("rec.topk", torch.cat([hits, torch.ones_like(hits[:, :1])], dim=1))

    def get_data_struct(self):
        # RecBole's own calls .cpu() on everything collected, and so fails on the plain numbers of coverage metrics
        for key, value in self.data_struct._data_dict.items():
            if isinstance(value, torch.Tensor):
                self.data_struct._data_dict[key] = value.cpu()
        return self.data_struct


class Evaluation:
    """The loaders of valid and test, and RecBole's metrics on them.

    Several processes share the rows where the metrics look at the first places only, and all get the same metrics;
    else the main process does it alone.

    Args:
        config (Config): `eval_args`, `metrics`, `topk`, `eval_batch_size`.
        dataset (UniSRecDataset): before `build`.

    Raises:
        UserError: a metric that ranking does not have.
    """

    def __init__(self, config, dataset):
        self.config = config
        config["eval_batch_size"] = min(config["eval_batch_size"], max(1, _SCORES // dataset.item_num))
        self.parts = dict(zip(("train", "valid", "test"), dataset.build(), strict=True))
        samplers = dict(zip(self.parts, create_samplers(config, dataset, list(self.parts.values())), strict=True))
        self.loaders = {}
        modes = set(config["eval_args"]["mode"].values())
        self.shared = world_size() > 1 and modes == {"full"} and TopKCollector(config).needs() <= _BY_TOP_K
        for phase in ("valid", "test"):
            if config["eval_args"]["mode"][phase] == "full":
                # neighbours of like length need little padding, and no metric depends on the order
                self.parts[phase].sort(config["ITEM_LIST_LENGTH_FIELD"])
            if self.shared:
                self.parts[phase].share(rank(), world_size())
            self.loaders[phase] = get_dataloader(config, phase)(config, self.parts[phase], samplers[phase])
        if config["eval_type"] != EvaluatorType.RANKING:
            raise UserError(f"metrics {config['metrics']}: expected ranking metrics such as Recall, NDCG, MRR, Hit")
        self.sampler = samplers["train"]
        self.n_columns = dataset.item_num
        others = sorted({name.lower() for name in config["metrics"]} - _OF_TARGETS)
        if others and max(config["topk"]) >= self.n_columns:
            raise UserError(
                f"option --topk: found {max(config['topk'])}, expected at most {self.n_columns - 1} for "
                f"{', '.join(others)}: there are no more items"
            )

    def __call__(self, model, phase, show_progress=False):
        """Evaluate a model on `valid` or `test`.

        Returns:
            dict: metric -> float, RecBole's names, unrounded.
        """
        if world_size() > 1 and not self.shared:
            return from_main(self._metrics(model, phase, show_progress) if is_main() else None)
        return self._metrics(model, phase, show_progress)

    @torch.no_grad()
    def _metrics(self, model, phase, show_progress):
        was_training = model.training
        model.eval()
        collector = TopKCollector(self.config)
        collector.data_collect(_TrainSide(self.parts["train"]))
        by_ranks = collector.needs() == {"rec.topk"} and _ranks_by_itself(type(model))
        for batch, rows, positive_u, positive_i in tqdm(
            self.loaders[phase], desc=f"Evaluating {phase}", leave=False, disable=None if show_progress else True
        ):
            batch = batch.to(self.config["device"])
            if by_ranks and rows is None and len(positive_i) == len(batch):
                collector.collect_ranks(model.ranks(batch))
            else:
                scores = self._scores(model, batch, rows, positive_u)
                collector.eval_batch_collect(scores, batch, positive_u, positive_i)
        model.train(was_training)  # a table of all items that the model made for the evaluation goes
        if self.shared:
            collector.join_processes(self.config["device"])
        values = Evaluator(self.config).evaluate(collector.get_data_struct())
        return {name: float(value) for name, value in values.items()}

    def _scores(self, model, batch, rows, positive_u):
        """Scores [B, N + 1], -inf for padding; with sampled negatives, -inf for what was not sampled."""
        if rows is None:
            scores = model.full_sort_predict(batch).view(-1, self.n_columns)
            scores[:, 0] = -torch.inf
            return scores
        scores = torch.full((int(positive_u[-1]) + 1, self.n_columns), -torch.inf, device=self.config["device"])
        scores[rows, batch[self.config["ITEM_ID_FIELD"]]] = model.predict(batch)
        return scores


def _ranks_by_itself(model_class):
    """Whether `ranks` speaks for the model: not where a derived class has scores of its own."""
    for base in model_class.__mro__:
        if "ranks" in vars(base) or "full_sort_predict" in vars(base):
            return "ranks" in vars(base)
    return False


class _TrainSide:
    """RecBole's collector asks a training loader for its data set."""

    def __init__(self, dataset):
        self.dataset = dataset
