"""The multi-domain data set: sequences, item features, augmentation, batches.

Legend of the shapes: R rows of a file, S sequences, T items of all sequences, P predictions, N items of the
catalogue, U distinct items, D text-feature width, L sequence length.
"""

from data.batches import SequenceBatches
from data.dataset import UniSRecDataset
from data.features import ItemFeatures
from data.sequences import Sequences, fold_rows

__all__ = ["ItemFeatures", "SequenceBatches", "Sequences", "UniSRecDataset", "fold_rows"]
