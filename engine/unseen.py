"""Choose how the scores of items without training data compare with those of other items."""

import logging

from engine.evaluate import Evaluation
from engine.item_to_item import best_variant

BIASES = (-0.25, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.25, 0.5, 1.0)  # logits
MOST_ITEMS = 100_000  # the scores of all items of a larger catalogue are never held at once
logger = logging.getLogger(__name__)


def choose_unseen_bias(model, evaluation: Evaluation) -> bool:
    """Set the bias of unseen items to the value with the best `valid_metric`, unless the user has given one.

    With the interactions of many users, an unseen item is a new one. With those of few, it is rather one that is not
    popular. Valid tells which.

    Args:
        model: a UniSRec whose `note_unseen` was called.
        evaluation: of the data set on which the model is trained.

    Returns:
        Whether a value was chosen.
    """
    unseen, bias = model.unseen, model.unseen_bias
    given = evaluation.config["unseen_bias"] is not None
    if bias is None or given or unseen is None or not unseen.any() or len(unseen) > MOST_ITEMS:
        return False
    bias.zero_()

    def variants(batch):
        scores = model.full_sort_predict(batch)
        yield scores
        for value in BIASES:
            changed = scores.clone()
            changed[:, 1:] += value * model.temperature * unseen
            yield changed

    best, told = best_variant(model, evaluation, variants, 1 + len(BIASES))
    if best:
        bias.fill_(BIASES[best - 1])
    logger.info("unseen items: %d, bias %g, %s", unseen.sum(), bias.item(), told)
    return True
