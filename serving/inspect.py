"""Look into the model of a bundle: python -m serving.inspect FOLDER --out FOLDER

It shows what the adaptor makes of the item texts: which experts each domain uses, how evenly the vectors fill their
space before and after whitening and adaptor, a map of the items, and the nearest items of ten items before and after.
Writes inspection.json, experts.png and map.png.

The bundle of a fine-tuned model is inspected on its own items, whose texts are encoded again. A pre-trained model has
no items: give data sets with -d, whose stored text vectors are read.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, run_command
from common.files import atomic_path, write_json
from data.features import feature_shape, made_by
from dataset.preprocessing.texts import read_item_order, read_texts
from engine.bundle import ITEMS, read_bundle
from serving.model import build_model, shop_of
from serving.recommender import Recommender
from unisrec import UniSRec

STAGES = ("texts", "whitened", "adapted")
SHOWN = 10  # items whose neighbors are listed
NEIGHBORS = 5
ON_MAP = 1000  # items per domain
AT_MOST = 20_000  # items per domain whose vectors are compared


class Domain(NamedTuple):
    """A shop: texts of n items, their vectors by stage (unit vectors, float32 [n, D or H]), and gates [n, E]."""

    texts: list[str]
    vectors: dict[str, Tensor]
    gates: Tensor


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", metavar="FOLDER", help="the bundle")
    parser.add_argument("-d", "--datasets", metavar="A,B", help="data sets, for a bundle without items")
    parser.add_argument("--data_path", metavar="DIR", default="dataset/downstream", help="folder of the data sets")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder for inspection.json and the pictures")
    options = parser.parse_args(argv)
    content = read_bundle(options.bundle)
    has_items = os.path.isfile(os.path.join(options.bundle, ITEMS))
    if has_items == bool(options.datasets):
        found = "has items of its own; leave out -d" if has_items else "has no items; give data sets with -d A,B"
        raise UserError(f"{options.bundle}: {found}")
    names = [name.strip() for name in options.datasets.split(",")] if options.datasets else []
    if has_items:
        domains = {str(content["config"].get("dataset")): _own_domain(options.bundle)}
    else:
        domains = {name: _domain_of_dataset(name, options.data_path, content) for name in names}
    report = inspect(domains)
    write_json(os.path.join(options.out, "inspection.json"), report)
    _save_picture(os.path.join(options.out, "experts.png"), lambda pyplot: draw_experts(report, pyplot))
    _save_picture(os.path.join(options.out, "map.png"), lambda pyplot: draw_map(domains, pyplot))
    _print(report)
    print(f"\nwritten: {options.out} (inspection.json, experts.png, map.png)")


# -- reading ---------------------------------------------------------------------------------------------------------


def _own_domain(folder):
    recommender = Recommender.from_pretrained(folder, index=False)
    texts = _sample(list(recommender.texts.values()))
    return domain_of(recommender.model, texts, recommender.encode(texts))


def _domain_of_dataset(name, data_path, content):
    """A data set as a domain. Its whitening has the statistics of all its items."""
    path = os.path.join(data_path, name, f"{name}.feat1{content['features'].get('pooling', 'CLS')}")
    count, width, dtype = feature_shape(path, content["features"]["width"])
    own, expected = ({"encoder": "minilm"} | each for each in (made_by(path), content["features"]))
    if width != expected["width"] or own["encoder"] != expected["encoder"]:
        raise UserError(
            f"{path}: encoder {own['encoder']}, width {width}, expected {expected['encoder']}, {expected['width']}, as "
            "the bundle; encode the texts again"
        )
    vectors = torch.from_numpy(np.fromfile(path, dtype).reshape(count, width)).float()
    texts = read_texts(os.path.join(data_path, name, f"{name}.text"))
    order = read_item_order(os.path.join(data_path, name, f"{name}.item2index"))
    model = build_model(content, shop_of(count, width, vectors))
    return domain_of(model, _sample([texts.get(item, "") for item in order]), _sample(vectors))


def _sample(values):
    """At most `AT_MOST` values, at equal distances."""
    return values[:: -(-len(values) // AT_MOST)]


@torch.no_grad()
def domain_of(model: UniSRec, texts: list[str], vectors: Tensor) -> Domain:
    """The vectors of a domain at each stage.

    Args:
        model: with the whitening of the domain.
        texts: of n items.
        vectors: their text vectors, float32 [n, D].
    """
    whitened = vectors if model.whitening is None else model.whitening.whiten_table(vectors)
    stages = dict(zip(STAGES, (vectors, whitened, model.moe_adaptor(whitened)), strict=True))
    units = {stage: F.normalize(each, dim=-1) for stage, each in stages.items()}
    return Domain(texts, units, model.moe_adaptor.gates(whitened))


# -- what is computed ------------------------------------------------------------------------------------------------


def inspect(domains: dict[str, Domain]) -> dict[str, Any]:
    """What inspection.json holds: `experts`, `isotropy` and `neighbors`, each by domain."""
    found: dict[str, Any] = {"experts": {}, "isotropy": {}, "neighbors": {}}
    for name, domain in domains.items():
        found["experts"][name] = {
            "mean_gate": domain.gates.mean(0).tolist(),
            "standard_deviation": domain.gates.std(0, correction=0).tolist(),
        }
        found["isotropy"][name] = {
            stage: {"mean_cosine": mean_cosine(units), "effective_rank": effective_rank(units), "width": units.size(1)}
            for stage, units in domain.vectors.items()
        }
        found["neighbors"][name] = neighbors(domain)
    return found


def mean_cosine(units: Tensor) -> float:
    """The mean cosine of two different items, of unit vectors [n, D]. 0 if n is 1."""
    count, total = len(units), units.double().sum(0)
    return float((total @ total - count) / max(1, count * (count - 1)))


def effective_rank(units: Tensor) -> float:
    """exp(entropy of the shares of the variance along the principal axes), of vectors [n, D]. From 1 to D.

    Roy and Vetterli, EUSIPCO 2007. Equal vectors have the rank 1.
    """
    variances = torch.linalg.eigvalsh(units.double().T.cov(correction=0)).clamp(min=0)
    shares = variances / variances.sum().clamp(min=1e-30)
    return float(torch.special.entr(shares).sum().exp())


def neighbors(domain: Domain) -> list[dict[str, Any]]:
    """The nearest items of `SHOWN` items across the catalogue, before (by the text vectors) and after the adaptor."""
    count = len(domain.texts)
    rows = torch.linspace(0, count - 1, min(SHOWN, count)).long()
    lists = {"before": "texts", "after": "adapted"}
    found: list[dict[str, Any]] = [{"item": domain.texts[row]} for row in rows]
    for key, stage in lists.items():
        cosines = domain.vectors[stage][rows] @ domain.vectors[stage].T
        cosines[torch.arange(len(rows)), rows] = -torch.inf  # the item itself
        best = cosines.topk(min(NEIGHBORS, count - 1))
        for entry, values, columns in zip(found, best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(values, columns, strict=True)
            entry[key] = [{"item": domain.texts[column], "cosine": value} for value, column in pairs]
    return found


# -- what is shown ---------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    experts = len(next(iter(found["experts"].values()))["mean_gate"])
    width = max(map(len, ["mean gate", *found["experts"]])) + 2
    print(f"{'mean gate':<{width}}" + "".join(f"{f'expert {number}':>16}" for number in range(1, experts + 1)))
    for name, gates in found["experts"].items():
        pairs = zip(gates["mean_gate"], gates["standard_deviation"], strict=True)
        print(f"{name:<{width}}" + "".join(f"{f'{mean:.3f} ± {deviation:.3f}':>16}" for mean, deviation in pairs))
    print(f"\n{'isotropy':<{width}}{'vectors':<10}{'mean cosine':>12}{'effective rank':>22}")
    for name, stages in found["isotropy"].items():
        for stage, values in stages.items():
            rank = f"{values['effective_rank']:.1f} of {values['width']}"
            print(f"{name:<{width}}{stage:<10}{values['mean_cosine']:>12.3f}{rank:>22}")


def draw_experts(found: dict[str, Any], pyplot: Any) -> Any:
    """A heat map of the mean gates, one row per domain. Returns the figure."""
    names = list(found["experts"])
    gates = np.array([found["experts"][name]["mean_gate"] for name in names])
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.8 * gates.shape[1], 1.4 + 0.5 * len(names)))
    image = axes.imshow(gates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(gates.shape[1]), [str(number + 1) for number in range(gates.shape[1])])
    axes.set_xlabel("expert")
    for (row, column), gate in np.ndenumerate(gates):
        axes.text(column, row, f"{gate:.2f}", ha="center", va="center", color="white" if gate > 0.7 else "black")
    figure.colorbar(image, label="mean gate")
    return figure


def draw_map(domains: dict[str, Domain], pyplot: Any) -> Any:
    """A map of the items of all domains at each stage: their first two principal components. Returns the figure."""
    figure, columns = pyplot.subplots(1, len(STAGES), figsize=(5 * len(STAGES), 5))
    for stage, axes in zip(STAGES, columns, strict=True):
        parts = [domain.vectors[stage][:: -(-len(domain.texts) // ON_MAP)].numpy() for domain in domains.values()]
        points = np.concatenate(parts)
        points = points - points.mean(0)
        _, sizes, axes_of_space = np.linalg.svd(points, full_matrices=False)
        shares = 100 * sizes**2 / np.square(sizes).sum()
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for name, places in zip(domains, np.split(points @ axes_of_space[:2].T, ends), strict=True):
            axes.scatter(*places.T, s=5, alpha=0.5, label=name, linewidths=0)
        axes.set_title(stage)
        axes.set_xlabel(f"component 1 ({shares[0]:.1f}% of the variance)")
        axes.set_ylabel(f"component 2 ({shares[1]:.1f}%)")
    columns[0].legend(markerscale=3)
    return figure


def _save_picture(path: str, draw: Callable[[Any], Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_command(main)
