"""The items of a data set. Their ids are 1..N, with one range per domain. Id 0 is padding."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from common.errors import UserError
from common.files import read_json
from data.features import ItemFeatures, feature_description, feature_shape, find_suffix, made_by
from data.files import count_items
from data.sequences import DOMAIN_STRIDE


@dataclasses.dataclass
class Catalogue:
    """The items of a data set.

    Attributes:
        name: the data set.
        domains: the names of the domains of a mixture, else the name of the data set.
        counts: the number of items of each domain. Item `index` of domain d has the id
            `1 + sum(counts[:d]) + index`.
        is_mixture: whether items are written `domain-index`.
        source: the name of the file that the counts come from, for error messages. In a mixture it is the file of the
            first domain.
    """

    name: str
    domains: list[str]
    counts: list[int]
    is_mixture: bool
    source: str

    @property
    def n_items(self) -> int:
        """N, the number of items."""
        return sum(self.counts)

    def ids(self, numbers: np.ndarray, path: str, lines: np.ndarray) -> np.ndarray:
        """Turn item numbers into item ids.

        Args:
            numbers: int64 [n], `domain * DOMAIN_STRIDE + index`.
            path: the file that the numbers come from.
            lines: int64 [n], the line of each number in that file.

        Returns:
            int32 [n].

        Raises:
            UserError: an item is not in the catalogue.
        """
        domain, index = numbers // DOMAIN_STRIDE, numbers % DOMAIN_STRIDE
        known = domain < len(self.counts)
        counts = np.array(self.counts)[np.where(known, domain, 0)]
        unknown = np.flatnonzero(~known | (index >= counts))
        if len(unknown):
            first = unknown[0]
            raise UserError(self._describe_unknown_item(int(domain[first]), int(index[first]), path, lines[first]))
        starts = np.cumsum([1, *self.counts[:-1]])
        return (starts[domain] + index).astype(np.int32)

    def _describe_unknown_item(self, domain: int, index: int, path: str, line: int) -> str:
        written = f"{domain}-{index}" if self.is_mixture else str(index)
        if domain < len(self.counts):
            file = f"{self.domains[domain]}{self.source.removeprefix(self.domains[0])}"
            reason = f"{file} holds {self.counts[domain]} items"
        else:
            reason = f"{self.name}.pt_datasets names {len(self.counts)} domains"
        return f"{path}, line {line}: item {written} has no feature ({reason}); encode the texts of all items again"

    def tokens(self) -> np.ndarray:
        """The item of each id as the `.inter` files write it: str [N + 1], `[PAD]`, then `index` or `domain-index`."""
        parts = [np.arange(count).astype(str) for count in self.counts]
        if self.is_mixture:
            parts = [np.char.add(f"{domain}-", part) for domain, part in enumerate(parts)]
        return np.concatenate([["[PAD]"], *parts])


def open_catalogue(
    folder: str,
    name: str,
    plm_suffix: str,
    augmented_suffix: str | None,
    plm_size: int,
    need_features: bool = True,
) -> tuple[Catalogue, ItemFeatures | None]:
    """Find out which items a data set has, and map their features into memory.

    Args:
        folder: the data set's folder.
        name: the data set.
        plm_suffix: the suffix of the feature files, or `auto`.
        augmented_suffix: the suffix of the features of shortened texts. `auto` stands for feat2 beside feat1. None if
            they are not needed.
        plm_size: the width of features that have no description beside them.
        need_features: False for models that read item ids only. They get no `ItemFeatures`.

    Raises:
        UserError: the folder or a feature file is missing, or the files do not fit each other.
    """
    if not os.path.isdir(folder):
        raise UserError(_describe_missing_folder(folder, name))
    domains, is_mixture = _read_domains(folder, name)
    if not need_features:
        counts = _count_items_without_features(folder, name, domains, is_mixture)
        return Catalogue(name, domains, counts, is_mixture, f"{name}.item2index"), None

    plm_suffix = find_suffix(folder, domains, plm_suffix)
    paths = [os.path.join(folder, f"{domain}.{plm_suffix}") for domain in domains]
    counts, width, dtype = _check_shapes(paths, plm_size)
    augmented = []
    if augmented_suffix:
        suffix = plm_suffix.replace("feat1", "feat2") if augmented_suffix == "auto" else augmented_suffix
        augmented = [os.path.join(folder, f"{domain}.{suffix}") for domain in domains]
        for path, count in zip(augmented, counts, strict=True):
            if feature_shape(path, plm_size) != (count, width, dtype):
                raise UserError(
                    f"{path}: does not fit {plm_suffix} ({count} items of width {width}); encode both again"
                )
    _check_texts(folder, name, is_mixture, paths + augmented)
    _check_item_count(folder, name, is_mixture, paths[0], counts[0], width)
    catalogue = Catalogue(name, domains, counts, is_mixture, os.path.basename(paths[0]))
    features = ItemFeatures(paths, counts, width, dtype, augmented)
    _check_finite(features)
    return catalogue, features


def _check_finite(features: ItemFeatures) -> None:
    """Check that the features hold neither NaN nor infinite numbers.

    Raises:
        UserError: a row does.
    """
    found = features.first_not_finite()
    if not found:
        return
    path, row = found
    index_file = f"{path.rpartition('.')[0]}.item2index"
    names = (
        [name for _, _, name, index in read_index(index_file) if index == str(row)]
        if os.path.isfile(index_file)
        else []
    )
    item = f", item {names[0]!r}," if names else ""
    raise UserError(f"{path}: row {row}{item} holds NaN or an infinite number; encode the texts again")


def _check_same_encoder(path: str, first: str) -> None:
    """Check that the features of two domains have the same encoder, pooling and normalization, as far as known.

    Raises:
        UserError: one of them differs.
    """
    own, other = made_by(path), made_by(first)
    for key in own.keys() & other.keys():
        if own[key] != other[key]:
            raise UserError(
                f"{path}: was made with {key} {own[key]}, {first} with {key} {other[key]}; "
                "encode all domains in the same way"
            )


def item_names(folder: str, catalogue: Catalogue) -> list[str]:
    """Names of the items that do not depend on how the data set numbers the items.

    They are the raw ids of `.item2index`. A mixture has no such file. Its names are the tokens of the `.inter` files.

    Returns:
        `[PAD]`, then the name of each item in the order of the ids.

    Raises:
        UserError: a line of the file is malformed.
    """
    path, names = _index_file(folder, catalogue.name, catalogue.is_mixture), list(catalogue.tokens())
    for number, line, name, index in read_index(path) if path else ():
        if index.isdecimal() and int(index) < catalogue.n_items:
            names[int(index) + 1] = name
        elif line:
            raise UserError(
                f"{path}, line {number}: found {line[:60]!r}, expected ITEM<TAB>INDEX with an index below "
                f"{catalogue.n_items}; process the data set again"
            )
    return names


def read_index(path: str) -> Iterator[tuple[int, str, str, str]]:
    """Read `.item2index` or `.user2index`.

    Yields:
        For each line: its number, the line without surrounding blanks, the raw id, and the text after the last tab.
    """
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            name, _, index = line.rstrip("\r\n").rpartition("\t")
            yield number, line.strip(), name, index


def _describe_missing_folder(folder: str, name: str) -> str:
    parent = os.path.dirname(os.path.abspath(folder))
    data_sets = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir()) if os.path.isdir(parent) else []
    found = f"found {', '.join(data_sets)}" if data_sets else "found no data set there"
    return (
        f"{folder}: no such data set ({found}); create {name} as dataset/README.md describes, "
        "or name another folder with --data_path"
    )


def _read_domains(folder: str, name: str) -> tuple[list[str], bool]:
    """The names of the domains, and whether the data set is a mixture of them."""
    path = os.path.join(folder, f"{name}.pt_datasets")
    if not os.path.isfile(path):
        return [name], False
    with open(path, encoding="utf-8", errors="replace") as file:
        written = file.read().strip()
    domains = [domain.strip() for domain in written.split(",")]
    if not all(domain.isprintable() and domain for domain in domains) or len(set(domains)) < len(domains):
        raise UserError(
            f"{path}: found {written[:60]!r}, expected the names of the domains, separated by commas; "
            "write the mixture again"
        )
    return domains, True


def _check_shapes(paths: Sequence[str], plm_size: int) -> tuple[list[int], int, str]:
    """The item count of each domain's feature file, and their width and dtype, which must be the same."""
    shapes = [feature_shape(path, plm_size) for path in paths]
    _, width, dtype = shapes[0]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != (width, dtype):
            raise UserError(
                f"{path}: vectors of {shape[1]} {shape[2]} numbers, expected {width} {dtype} as in {paths[0]}; "
                "encode all domains with the same encoder"
            )
        _check_same_encoder(path, paths[0])
    return [count for count, _, _ in shapes], width, dtype


def _check_texts(folder: str, name: str, is_mixture: bool, paths: Sequence[str]) -> None:
    """Check that features were made from the texts that NAME.json describes.

    A data set that was processed again may have as many items as before, but in another order. Features or data sets
    without a description are not checked.
    """
    source = os.path.join(folder, f"{name}.json")
    description = read_json(source) if os.path.isfile(source) else {}
    if not isinstance(description, dict):
        raise UserError(
            f"{source}: holds {type(description).__name__}, expected a description; process the data set again"
        )
    parts = description.get("domains", []) if is_mixture else [description | {"name": name}]
    expected = {part.get("name"): part.get("texts_sha256") for part in parts if isinstance(part, dict)}
    for path in paths:
        domain = os.path.basename(path).rpartition(".")[0]
        found = feature_description(path).get("texts_sha256")
        if found and expected.get(domain) and found != expected[domain]:
            raise UserError(
                f"{path}: was made from other item texts than {source} describes; encode them again: "
                f"python dataset/preprocessing/encode_text.py -d {domain}"
                + (", then write the mixture again" if is_mixture else "")
            )


def _check_item_count(folder: str, name: str, is_mixture: bool, path: str, count: int, width: int) -> None:
    """Check that a feature file holds as many items as `.item2index`, if there is such a file."""
    index_file = _index_file(folder, name, is_mixture)
    indexed = _count_lines(index_file) if index_file else count
    if indexed != count:
        raise UserError(
            f"{path}: holds {count} items of width {width}, but {index_file} names {indexed}; "
            "encode the texts again or set --plm_size to the encoder's width"
        )


def _count_items_without_features(folder: str, name: str, domains: Sequence[str], is_mixture: bool) -> list[int]:
    """Items per domain: the lines of `.item2index`, or else the largest item index of the `.inter` files."""
    index_file = _index_file(folder, name, is_mixture)
    if index_file:
        return [_count_lines(index_file)]
    paths = [os.path.join(folder, f"{name}.{split}.inter") for split in ("train", "valid", "test")]
    counts = [count_items(path, is_mixture, len(domains)) for path in paths if os.path.isfile(path)]
    return [max(column) for column in zip(*counts, strict=True)] or [0] * len(domains)


def _index_file(folder: str, name: str, is_mixture: bool) -> str | None:
    """The path of the file with the raw id of each item. None if the file is missing, as in a mixture."""
    path = os.path.join(folder, f"{name}.item2index")
    return path if not is_mixture and os.path.isfile(path) else None


def _count_lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
