"""The items of a data set: one range of ids per domain, 1..N in all, 0 is padding."""

import dataclasses
import os

import numpy as np

from common.errors import UserError
from common.files import read_json
from data.features import ItemFeatures, feature_description, feature_shape, find_suffix, made_by
from data.files import DOMAIN, largest_numbers


@dataclasses.dataclass
class Catalogue:
    """Which items there are.

    Attributes:
        name (str): the data set.
        domains (list of str): one name, or those of the mixture.
        counts (list of int): the items of each domain; item `index` of a domain has the id start + index + 1.
        is_mixture (bool): items are written `domain-index`.
        source (str): what told the counts, for messages.
    """

    name: str
    domains: list
    counts: list
    is_mixture: bool
    source: str

    @property
    def n_items(self):
        return sum(self.counts)

    def ids(self, numbers, path, lines):
        """Turn item numbers (int64, domain * DOMAIN + index) into item ids (int32).

        Raises:
            UserError: an item that the catalogue does not hold; `lines` says where in `path` each stands.
        """
        domain, index = numbers // DOMAIN, numbers % DOMAIN
        known = domain < len(self.counts)
        limit = np.array(self.counts)[np.where(known, domain, 0)]
        bad = np.flatnonzero(~known | (index >= limit))
        if len(bad):
            first = bad[0]
            written = f"{domain[first]}-{index[first]}" if self.is_mixture else str(index[first])
            file = f"{self.domains[domain[first]]}{self.source.removeprefix(self.domains[0])}" if known[first] else None
            holds = (
                f"{file} holds {limit[first]} items"
                if known[first]
                else f"{self.name}.pt_datasets names {len(self.counts)} domains"
            )
            raise UserError(
                f"{path}, line {lines[first]}: item {written} has no feature ({holds}); "
                "encode the texts of all items again"
            )
        starts = np.cumsum([1] + self.counts[:-1])
        return (starts[domain] + index).astype(np.int32)

    def tokens(self):
        """What the files call each id: str array [N + 1], `[PAD]` first, then `index` or `domain-index`."""
        parts = [np.arange(n).astype(str) for n in self.counts]
        if self.is_mixture:
            parts = [np.char.add(f"{number}-", part) for number, part in enumerate(parts)]
        return np.concatenate([["[PAD]"], *parts])


def open_catalogue(folder, name, plm_suffix, augmented_suffix, plm_size, need_features=True):
    """Find out which items a data set has, and map their features.

    Args:
        folder (str): the data set's folder.
        name (str): the data set.
        plm_suffix (str): the suffix of the features, or `auto`.
        augmented_suffix (str or None): that of the features of shortened texts (`auto`: feat2 for feat1); None: none.
        plm_size (int): the width of features that have no description beside them.
        need_features (bool): False for models that read item ids only.

    Returns:
        (Catalogue, ItemFeatures or None)

    Raises:
        UserError: a missing folder or feature file, or one whose size does not fit.
    """
    if not os.path.isdir(folder):
        raise UserError(_missing_folder(folder, name))
    domains, is_mixture = _read_domains(folder, name)
    if not need_features:
        counts = _indexed_counts(folder, name, domains, is_mixture)
        return Catalogue(name, domains, counts, is_mixture, f"{name}.item2index"), None

    plm_suffix = find_suffix(folder, domains, plm_suffix)
    paths = [os.path.join(folder, f"{domain}.{plm_suffix}") for domain in domains]
    shapes = [feature_shape(path, plm_size) for path in paths]
    counts, (_, width, dtype) = [shape[0] for shape in shapes], shapes[0]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != (width, dtype):
            raise UserError(
                f"{path}: vectors of {shape[1]} {shape[2]} beside others of {width} {dtype}; "
                "encode all domains with one encoder"
            )
        _check_same_encoder(path, paths[0])
    augmented = []
    if augmented_suffix:
        suffix = plm_suffix.replace("feat1", "feat2") if augmented_suffix == "auto" else augmented_suffix
        augmented = [os.path.join(folder, f"{domain}.{suffix}") for domain in domains]
        for path, count in zip(augmented, counts, strict=True):
            if feature_shape(path, plm_size) != (count, width, dtype):
                raise UserError(f"{path}: does not fit {plm_suffix} ({count} items of {width}); encode both again")
    _check_made_from(folder, name, domains, is_mixture, paths + augmented)
    index_file = _index_file(folder, name, is_mixture)
    if index_file:
        indexed = _count_lines(index_file)
        if indexed != counts[0]:
            raise UserError(
                f"{paths[0]}: holds {counts[0]} items of width {width}, but {index_file} names {indexed}; "
                "encode the texts again or set --plm_size to the encoder's width"
            )
    catalogue = Catalogue(name, domains, counts, is_mixture, os.path.basename(paths[0]))
    return catalogue, ItemFeatures(paths, counts, width, dtype, augmented)


def _check_same_encoder(path, first):
    """The domains of a mixture must have features of one kind, as far as their descriptions tell."""
    own, other = made_by(path), made_by(first)
    for key in own.keys() & other.keys():
        if own[key] != other[key]:
            raise UserError(
                f"{path}: was made with {key} {own[key]}, {first} with {key} {other[key]}; "
                "encode all domains in the same way"
            )


def _check_made_from(folder, name, domains, is_mixture, paths):
    """Features must have been made from the texts that the data set's description, NAME.json, tells of.

    A data set that was processed again may have as many items as before in another order. What has no description is
    taken as it is.
    """
    source = os.path.join(folder, f"{name}.json")
    about = read_json(source) if os.path.isfile(source) else {}
    if not isinstance(about, dict):
        raise UserError(f"{source}: holds {type(about).__name__}, expected a description; process the data set again")
    parts = about.get("domains", []) if is_mixture else [about | {"name": name}]
    expected = {part.get("name"): part.get("texts_sha256") for part in parts if isinstance(part, dict)}
    for path in paths:
        domain = os.path.basename(path).rpartition(".")[0]
        found = feature_description(path).get("texts_sha256")
        if found and expected.get(domain) and found != expected[domain]:
            raise UserError(
                f"{path}: was made from other item texts than {source} tells of; encode them again: "
                f"python dataset/preprocessing/encode_text.py -d {domain}"
                + (", and write the mixture again" if is_mixture else "")
            )


def item_names(folder, catalogue):
    """What the items are, whatever number the data set gives them: raw ids of `.item2index`, where there is one.

    Returns:
        list of str: `[PAD]` first, then in the order of the ids.

    Raises:
        UserError: a line of the file is no `raw<TAB>index`.
    """
    path, names = _index_file(folder, catalogue.name, catalogue.is_mixture), list(catalogue.tokens())
    if not path:
        return names
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            name, _, index = line.rstrip("\r\n").rpartition("\t")
            if index.isdecimal() and int(index) < catalogue.n_items:
                names[int(index) + 1] = name
            elif line.strip():
                raise UserError(
                    f"{path}, line {number}: found {line.strip()[:60]!r}, expected ITEM<TAB>INDEX with an index below "
                    f"{catalogue.n_items}; process the data set again"
                )
    return names


def _read_domains(folder, name):
    """The domains' names, and whether the data set is a mixture of them."""
    path = os.path.join(folder, f"{name}.pt_datasets")
    if not os.path.isfile(path):
        return [name], False
    with open(path, encoding="utf-8", errors="replace") as file:
        written = file.read().strip()
    domains = [domain.strip() for domain in written.split(",")]
    if not all(domain.isprintable() and domain for domain in domains) or len(set(domains)) < len(domains):
        raise UserError(f"{path}: found {written[:60]!r}, expected the domains' names, comma separated")
    return domains, True


def _index_file(folder, name, is_mixture):
    """The file that names the raw id of each item; None where there is none, as in a mixture."""
    path = os.path.join(folder, f"{name}.item2index")
    return path if not is_mixture and os.path.isfile(path) else None


def _missing_folder(folder, name):
    parent = os.path.dirname(os.path.abspath(folder))
    there = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir()) if os.path.isdir(parent) else []
    found = f"found {', '.join(there)}" if there else "found no data set there"
    return (
        f"{folder}: no such data set ({found}); dataset/README.md says how to make {name}, "
        "and --data_path names another folder"
    )


def _indexed_counts(folder, name, domains, is_mixture):
    """Items per domain where no features are needed: from `.item2index`, else from the largest item number."""
    index_file = _index_file(folder, name, is_mixture)
    if index_file:
        return [_count_lines(index_file)]
    paths = [os.path.join(folder, f"{name}.{split}.inter") for split in ("train", "valid", "test")]
    highest = [largest_numbers(path, is_mixture, len(domains)) for path in paths if os.path.isfile(path)]
    return [max(column) for column in zip(*highest, strict=True)] or [0] * len(domains)


def _count_lines(path):
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
