"""Pre-train on two shops, use the model in a third, and compare: python examples/transfer.py [FOLDER]

The shops come from MovieLens-100k, which RecBole includes: action films and comedies to pre-train on, dramas as the
third shop. No film is in two shops. Fine-tuning sees 2% of the users of the third shop.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # so that it runs from any working folder

from dataset.preprocessing.encode_text import encode_dataset  # noqa: E402
from dataset.preprocessing.process_movielens import process_movielens  # noqa: E402
from dataset.preprocessing.to_pretrain_atomic_files import write_mixture  # noqa: E402
from engine.config import build_config  # noqa: E402
from engine.finetuning import finetune  # noqa: E402
from pretrain import configure, pretrain  # noqa: E402
from unisrec import UniSRec  # noqa: E402


def main(folder: str) -> None:
    """Make the shops, pre-train, and print the NDCG@10 of four models for the test users of the third shop."""
    shops, mixtures = f"{folder}/downstream", f"{folder}/pretrain"
    process_movielens(folder)
    for shop in ("Action", "Comedy", "Drama"):
        encode_dataset(shop, shops)
    write_mixture(["Action", "Comedy"], shops, mixtures, "Films")
    small = {"checkpoint_dir": f"{folder}/saved", "hidden_size": 64, "train_batch_size": 1024}
    pretrained = pretrain(configure({"dataset": "Films", "data_path": mixtures, "epochs": 2, **small}))
    third = {"data_path": shops, "train_stage": "inductive_ft", "train_fraction": 0.02, **small}
    for epochs in (0, 5):
        for start, name in ((None, "new"), (pretrained, "pre-trained")):
            options = {**third, "pretrained": start, "epochs": epochs}
            result = finetune(build_config(UniSRec, "Drama", "finetune", options))
            print(f"{name} weights, {epochs} epochs: {result['metrics']['test']['ndcg@10']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "saved/transfer")
