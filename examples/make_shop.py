"""Make the CSV files of a shop to try the commands on: python examples/make_shop.py FOLDER

1,000 products with German titles, some of them missing, and 3,000 customers. FOLDER gets `items.csv` (item_id, title,
department, price, url) and `clicks.csv` (user_id, item_id, timestamp). The files are the same each time.
"""

import csv
import pathlib
import random
import sys

SHOP = {
    "Küche": "Pfanne Töpfchen Schüssel Müslischale Käsereibe Kochlöffel",
    "Büro": "Schreibtisch Bürostuhl Locher Füller Aktenschrank Leselampe",
    "Garten": "Gießkanne Heckenschere Blumenübertopf Hängematte Sonnenschirm",
    "Bad": "Handtuch Seifenschälchen Duschkopf Bürste Spiegel",
    "Mode": "Mütze Gürtel Wollpullover Regenjacke Übergangsmantel Söckchen",
}
STUFF = "Edelstahl Bambus Kunststoff Nussbaum Leinen Baumwolle Glas Gusseisen Kork".split()
COLORS = "rot blau grün weiß schwarz gelb türkis grau".split()


def main(folder: pathlib.Path) -> None:
    """Write both files."""
    draw = random.Random(1)
    kinds = [(kind, department) for department, names in SHOP.items() for kind in names.split()]
    chosen = draw.sample([(*kind, stuff, color) for kind in kinds for stuff in STUFF for color in COLORS], 1000)
    items = [(f"{product[1][:2].upper()}-{number:04}", product) for number, product in enumerate(chosen)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "items.csv", "w", encoding="utf-8", newline="") as file:
        write = csv.writer(file).writerow
        write(("item_id", "title", "department", "price", "url"))
        for number, (item, (kind, department, stuff, color)) in enumerate(items):
            title = "" if number % 25 == 0 else f"{kind} aus {stuff}, {color}"
            write((item, title, department, f"{draw.randint(3, 90)},90 €", f"https://shop.example/{item}"))
    with open(folder / "clicks.csv", "w", encoding="utf-8", newline="") as file:
        write = csv.writer(file).writerow
        write(("user_id", "item_id", "timestamp"))
        for customer in range(3000):  # each likes a kind of product and a color
            liked_kind, liked_color = draw.choice(kinds)[0], draw.choice(COLORS)
            weights = [1 + 60 * (kind == liked_kind) + 5 * (color == liked_color) for _, (kind, _, _, color) in items]
            for click, (item, _) in enumerate(draw.choices(items, weights, k=draw.randint(6, 15))):
                write((f"kunde{customer}", item, 1700000000 + 1000 * customer + 60 * click))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
