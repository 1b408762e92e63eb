"""From the CSV files of a shop to recommendations: python examples/own_shop.py [FOLDER]

The shop is made up: 72 products with German titles, some of them missing, and 150 customers. FOLDER gets the data set
and the models. The text encoder was trained on English, but it knows some German words too.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that the script finds the project's modules from any working folder

import finetune  # noqa: E402
from dataset.preprocessing import process_custom  # noqa: E402
from serving.recommender import Recommender  # noqa: E402


def main(folder: pathlib.Path) -> None:
    """Process the files, fine-tune the pre-trained model, and recommend."""
    tables = ["--interactions", f"{HERE}/shop/clicks.csv", "--items", f"{HERE}/shop/items.csv"]
    columns = ["--user_column", "customer", "--item_column", "sku", "--timestamp_column", "clicked_at"]
    texts = ["--text_columns", "title,department", "--show_columns", "title", "--output_path", str(folder / "data")]
    process_custom.main(["--dataset", "Shop", *tables, *columns, *texts, "--plm_name", "minilm"])

    start = ["-d", "Shop", "-p", f"{HERE.parent}/saved/amazon-minilm", "--train_stage=inductive_ft", "--epochs=5"]
    finetune.main([*start, f"--data_path={folder}/data", f"--checkpoint_dir={folder}/saved"])

    bundle = next(path.parent for path in (folder / "saved").glob("*/model.safetensors"))
    recommender = Recommender.from_pretrained(str(bundle))
    recommender.add_items({"NEW-1": "Porzellantasse, gelb. Tasse."})  # nobody has clicked it yet
    history = ["TA-101", "TA-104"]
    print("history:", *(recommender.texts[item] for item in history), sep="\n    ")
    print(
        "recommended:",
        *(f"{item.score:.3f}  {item.columns.get('title', item.text)}" for item in recommender.recommend(history, k=5)),
        sep="\n    ",
    )
    print("near the new product:", *(item.text for item in recommender.similar("NEW-1", k=3)), sep="\n    ")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "saved/example"))
