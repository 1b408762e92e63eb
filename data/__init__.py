"""The data set that a model is trained on: sequences, item features, augmentation, batches.

Letters in the shapes: R rows of a file, S sequences, T items of all sequences, G segments (parts of sequences that
are encoded in one pass), P predictions, N items of the catalogue, U distinct items, D width of the text features, L
length.
"""

from data.batches import SequenceBatches
from data.dataset import UniSRecDataset
from data.features import ItemFeatures
from data.sequences import Sequences, fold_rows

__all__ = ["ItemFeatures", "SequenceBatches", "Sequences", "UniSRecDataset", "fold_rows"]
