"""Batches of segments. One encoder pass over a segment trains several predictions.

A batch holds integers only: item ids, scored positions, targets. The model looks up the features.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data.augment import augment
from data.sequences import DOMAIN_STRIDE, Sequences, concatenated_ranges

# Upper bounds of the lengths of a bucket. The sequences of a bucket are padded to the longest of them. Only attention
# is computed bucket by bucket, so many buckets are cheap.
_BUCKET_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 50)


@dataclasses.dataclass
class SequenceBatch:
    """The input of one training step.

    Attributes:
        items: per bucket, int64 [S_b, L_b]: item ids, left-aligned, padded with 0 on the right.
        scored: per bucket, int64 [P_b]: which of the S_b * L_b positions are scored, ascending.
        targets: int64 [P], the item that follows each scored position, bucket after bucket.
        weights: float32 [P], how often each prediction counts. None if each counts once.
        users: int64 [P], the user of each prediction, as a number.
        augmented_items: the second view of `items`, same order and shapes. None without contrastive losses.
        augmented_scored: the scored positions in `augmented_items`, same order and shapes as `scored`.
    """

    items: list[torch.Tensor]
    scored: list[torch.Tensor]
    targets: torch.Tensor
    weights: torch.Tensor | None
    users: torch.Tensor
    augmented_items: list[torch.Tensor] | None = None
    augmented_scored: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """Copy the batch to a device."""

        def move(value):
            if isinstance(value, list):
                return [move(tensor) for tensor in value]
            return None if value is None else value.to(device, non_blocking=True)

        return SequenceBatch(*(move(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def split(self, count: int) -> list["SequenceBatch"]:
        """Split the batch, between rows and in order, into at most `count` parts with about equally many positions."""
        row_lengths = np.repeat([items.size(1) for items in self.items], [len(items) for items in self.items])
        positions = np.cumsum(row_lengths)
        cuts = np.searchsorted(positions, positions[-1] * np.arange(1, count) / count) + 1
        bounds = np.unique(np.minimum([0, *cuts, len(positions)], len(positions))).tolist()
        return [self._rows(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _rows(self, start: int, stop: int) -> "SequenceBatch":
        """The rows from `start` to `stop`, counted over all buckets."""
        columns: dict[str, list] = {"items": [], "scored": [], "augmented_items": [], "augmented_scored": []}
        rows_before = predictions_before = 0
        predictions = []  # slices of the columns with one entry per prediction
        for bucket, items in enumerate(self.items):
            low, high = max(0, start - rows_before), min(len(items), stop - rows_before)
            edges = torch.tensor([low, high]) * items.size(1)
            first, last = torch.searchsorted(self.scored[bucket], edges).tolist()
            if low < high:
                shift = low * items.size(1)
                columns["items"].append(items[low:high])
                columns["scored"].append(self.scored[bucket][first:last] - shift)
                predictions.append(slice(predictions_before + first, predictions_before + last))
                if self.augmented_items and self.augmented_scored:
                    columns["augmented_items"].append(self.augmented_items[bucket][low:high])
                    columns["augmented_scored"].append(self.augmented_scored[bucket][first:last] - shift)
            rows_before += len(items)
            predictions_before += len(self.scored[bucket])

        def select(column: torch.Tensor) -> torch.Tensor:
            return torch.cat([column[part] for part in predictions])

        return SequenceBatch(
            columns["items"],
            columns["scored"],
            select(self.targets),
            None if self.weights is None else select(self.weights),
            select(self.users),
            columns["augmented_items"] or None,
            columns["augmented_scored"] or None,
        )


@dataclasses.dataclass
class Segments:
    """Segments: parts of sequences, each of which is encoded in one pass.

    Every target with a weight belongs to exactly one segment. The items that two segments of a sequence read overlap.

    Attributes:
        starts, last_targets: int [G], segment g encodes `items[starts[g]:last_targets[g]]`.
        first_targets: int [G], segment g predicts those of `items[first_targets[g]]` to `items[last_targets[g]]` that
            have a weight, each from the items before it.
        sequences: int [G], the sequence that a segment belongs to.
        predictions: int [G], how many predictions a segment makes, at least 1.
    """

    starts: np.ndarray
    last_targets: np.ndarray
    first_targets: np.ndarray
    sequences: np.ndarray
    predictions: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)


def cut_segments(sequences: Sequences, max_history: int, predictions_per_row: int) -> Segments:
    """Cut sequences into segments with at most `max_history` items and `predictions_per_row` predictions.

    A segment reads the history of its last target: all items before it, or the newest `max_history`. Segments without a
    prediction are left out.
    """
    predictions_per_row = min(predictions_per_row, max_history)  # a segment predicts only what follows its own items
    begin, stop = sequences.offsets[:-1], sequences.offsets[1:]
    counts = -(-(stop - begin - 1) // predictions_per_row)
    sequence = np.repeat(np.arange(len(sequences)), counts)
    first_targets = begin[sequence] + 1 + concatenated_ranges(counts) * predictions_per_row
    last_targets = np.minimum(first_targets + predictions_per_row, stop[sequence]) - 1
    starts = np.maximum(begin[sequence], last_targets - max_history)
    targets_before = np.concatenate([[0], np.cumsum(sequences.weights > 0)])
    predictions = targets_before[last_targets + 1] - targets_before[first_targets]
    kept = predictions > 0
    # 32 bits where they suffice: each process holds these arrays
    small = np.int32 if len(sequences.items) < 1 << 31 else np.int64
    columns = (starts, last_targets, first_targets, sequence, predictions)
    return Segments(*(column[kept].astype(small) for column in columns))


class SequenceBatches:
    """The batches of an epoch, in an order that the seed and the number of the epoch determine.

    Args:
        sequences: the training sequences.
        batch_size: predictions per batch, over all processes. The size of a batch differs from it by less than the
            predictions of one segment.
        max_history: the most history items that a prediction sees.
        predictions_per_row: the most successive predictions of a segment. With 1, each history is encoded by itself, as
            in the published code. The states are the same for every value, except where a history is longer than
            `max_history`. There a prediction sees at least its newest `max_history - predictions_per_row + 1` items.
        seed: the seed of the order and of the augmentation.
        augment_ratios: `item_drop_ratio` and `item_drop_coefficient` of the second, augmented view. None: no second
            view.
        n_items: the size of the catalogue. The id of an item with a shortened text is its own id + `n_items`.
        rank, world_size: this process and the number of processes. Each takes every `world_size`-th segment of a batch.
        shuffle: whether the order is random.
        by_domain: whether all sequences of a batch are of the same domain.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        max_history: int,
        predictions_per_row: int,
        seed: int = 2020,
        augment_ratios: dict[str, float] | None = None,
        n_items: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        by_domain: bool = False,
    ):
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.augment_ratios, self.n_items = augment_ratios, n_items
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.segments = cut_segments(sequences, max_history, predictions_per_row)
        self._domains = self._domains_of_segments() if by_domain else None
        self._has_weights = bool((sequences.weights > 1).any())
        self._epoch = self._first_batch = 0

    def _domains_of_segments(self):
        return (self.sequences.users[self.segments.sequences] // DOMAIN_STRIDE).astype(np.int16)

    def _by_domain(self, segments: np.ndarray) -> list[np.ndarray]:
        """The segments of each domain in the given order. Without `by_domain`, all of them."""
        if self._domains is None:
            return [segments]
        domains = self._domains[segments]
        return [segments[domains == domain] for domain in np.unique(domains)]

    def __len__(self) -> int:
        return sum(map(self._count, self._by_domain(np.arange(len(self.segments)))))

    def _count(self, segments: np.ndarray) -> int:
        """The number of batches of some segments. A segment is never split, so it is at most their number."""
        return min(max(1, round(int(self.segments.predictions[segments].sum()) / self.batch_size)), len(segments))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose batches the next iteration yields."""
        self._epoch, self._first_batch = epoch, 0

    def skip(self, count: int) -> None:
        """Leave out the first `count` batches of the next iteration. Used to resume within an epoch."""
        self._first_batch = count

    def __iter__(self) -> Iterator[SequenceBatch]:
        order = np.arange(len(self.segments), dtype=self.segments.starts.dtype)
        shuffler = np.random.default_rng([self.seed, self._epoch])
        if self.shuffle:
            shuffler.shuffle(order)
        parts = [part for own in self._by_domain(order) for part in np.split(own, self._cuts(own))]
        if self.shuffle and self._domains is not None:
            parts = [parts[place] for place in shuffler.permutation(len(parts))]
        for number, part in enumerate(parts[self._first_batch :], start=self._first_batch):
            # each process has its own generator, so that no two sequences share random numbers
            generator = np.random.default_rng([self.seed, self._epoch, number, self.rank, 1])
            own = part[self.rank :: self.world_size]
            # Every process must take part in every step. If a small batch leaves nothing for this one, it encodes a
            # segment without scoring it.
            yield self.make_batch(own, generator) if len(own) else self.make_batch(part[:1], generator, scored=False)

    def _cuts(self, order: np.ndarray) -> np.ndarray:
        """Where to cut the shuffled segments into batches of about equally many predictions. No batch is empty."""
        predictions = np.cumsum(self.segments.predictions[order], dtype=np.int64)
        count = self._count(order)
        numbers = np.arange(1, count)
        cuts = np.searchsorted(predictions, predictions[-1] * numbers / count)
        cuts = np.maximum.accumulate(np.maximum(cuts - numbers, 0)) + numbers
        return np.minimum(cuts, len(order) - count + numbers)

    def make_batch(
        self, segments: np.ndarray, generator: np.random.Generator | None = None, scored: bool = True
    ) -> SequenceBatch:
        """Build the batch of some segments.

        Args:
            segments: int [G], the numbers of the segments.
            generator: for the augmentation.
            scored: if False, the segments are encoded without any prediction.
        """
        lengths = self.segments.last_targets[segments] - self.segments.starts[segments]
        by_length = np.argsort(lengths, kind="stable")
        segments, lengths = segments[by_length], lengths[by_length]
        cuts = np.unique(np.searchsorted(lengths, _BUCKET_LENGTHS[:-1], side="right"))
        buckets = [self._bucket(part, generator, scored) for part in np.split(segments, cuts) if len(part)]
        columns = {name: [torch.from_numpy(bucket[name]) for bucket in buckets] for name in buckets[0]}
        return SequenceBatch(
            columns["items"],
            columns["scored"],
            torch.cat(columns["targets"]),
            torch.cat(columns["weights"]).float() if self._has_weights else None,
            torch.cat(columns["users"]),
            columns["augmented_items"] if self.augment_ratios else None,
            columns["augmented_scored"] if self.augment_ratios else None,
        )

    def _bucket(self, segments: np.ndarray, generator: Any, scored: bool) -> dict:
        """The arrays of some segments of similar length."""
        items, weights = self.sequences.items, self.sequences.weights
        starts, last_targets = self.segments.starts[segments, None], self.segments.last_targets[segments, None]
        target = starts + 1 + np.arange(int((last_targets - starts).max()))  # [S, L]: each position's target, its index
        inside = target <= last_targets
        ids = np.where(inside, items[np.where(inside, target - 1, 0)], 0).astype(np.int64)
        is_scored = inside & (target >= self.segments.first_targets[segments, None]) & scored
        is_scored[is_scored] = weights[target[is_scored]] > 0
        positions = np.flatnonzero(is_scored)
        targets = target[is_scored]
        columns = {
            "items": ids,
            "scored": positions,
            "targets": items[targets].astype(np.int64),
            "weights": weights[targets].astype(np.int64),
            "users": self.sequences.users[self.segments.sequences[segments]][positions // ids.shape[1]],
        }
        if self.augment_ratios:
            columns["augmented_items"], columns["augmented_scored"] = augment(
                ids, positions, self.n_items, generator, **self.augment_ratios
            )
        return columns
