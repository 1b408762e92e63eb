"""After the training of a model: compute its item-to-item logits, and choose their factor and decay on valid."""

import itertools
import logging

from engine.evaluate import Evaluation
from engine.metrics import METRICS, mean_metrics

FACTORS = (2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
DECAYS = (1.0, 0.9, 0.8, 0.6)
ROWS = 20_000  # of valid are enough
logger = logging.getLogger(__name__)


def add_item_to_item(model, evaluation: Evaluation) -> None:
    """Fit `model.item_to_item` to the training sequences, and set its factor and decay.

    They are those with the best `valid_metric`, on at most `ROWS` rows of valid. The factor may be 0.

    Args:
        model: a UniSRec in the transductive stage, or another model with `item_to_item` and `temperature`. What it
            has learned stays as it is.
        evaluation: of the data set on which the model was trained.
    """
    part = model.item_to_item
    part.switch_off()
    part.fit(evaluation.dataset.sequences("train"))
    choices = list(itertools.product(DECAYS, FACTORS))

    def variants(batch):
        scores = model.full_sort_predict(batch)
        yield scores
        for decay in DECAYS:
            sums = part(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN], decay) * model.temperature
            for factor in FACTORS:
                changed = scores.clone()
                changed[:, 1:] += factor * sums
                yield changed

    best, told = best_variant(model, evaluation, variants, 1 + len(choices))
    logger.info("item to item: %s factor", told)
    if best:
        decay, factor = choices[best - 1]
        part.decay.fill_(decay)
        part.factor.fill_(factor)
        logger.info("item to item: factor %g, decay %g", factor, decay)


def best_variant(model, evaluation: Evaluation, variants, count: int) -> tuple[int, str]:
    """The variant of a model's scores with the best `valid_metric`, on at most `ROWS` rows of valid.

    Args:
        model: the model.
        evaluation: of its data set.
        variants: see `Evaluation.compare`. The first one leaves the scores as they are.
        count: the number of variants.

    Returns:
        The number of the variant, the first of equal ones, and in words what it gains.
    """
    tables = evaluation.compare(model, variants, count, "valid", ROWS)
    name, k = _metric(evaluation.config["valid_metric"])
    found = [mean_metrics(table, [name], [k])[f"{name}@{k}"] for table in tables]
    best = max(range(len(found)), key=found.__getitem__)
    return best, f"{name}@{k} on valid {found[0]:.4f} without, {found[best]:.4f} with the best"


def _metric(valid_metric):
    """The name and k of `valid_metric`; NDCG@10 if it does not follow from the ranks of the targets."""
    name, _, k = valid_metric.lower().partition("@")
    return (name, int(k)) if name in METRICS else ("ndcg", 10)
