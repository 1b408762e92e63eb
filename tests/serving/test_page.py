"""The page in a real browser."""

import re
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from serving.comparison import UNTRAINED
from serving.service import Shop, create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"


@pytest.fixture
def address(made, tmp_path):
    """The address of a running service whose catalogue has a hostile item."""
    users = [["Tiny1003", "Tiny1004"], ["removed"], ["Tiny1005"]]
    shop = Shop(str(shutil.copytree(made["inductive_ft"][1], tmp_path / "bundle")), compare=[UNTRAINED], users=users)
    shop.add({"hostile": HOSTILE})
    links = {"Tiny1001": "javascript:alert(1)", "Tiny1002": "data:text/html,x", "Tiny1003": "https://x.example/a?b=<c>"}
    images = {"Tiny1001": "javascript:alert(1)", "Tiny1002": PIXEL, "Tiny1003": "http://x.example/a.png"}
    for item, link in links.items():
        columns = {"title": f"{item} {HOSTILE}", "url": link, "image": images[item], "price": "<b>3 €</b>"}
        shop.add({item: f"item number {item[-1]}."}, {item: columns})
    server = uvicorn.Server(uvicorn.Config(create_app(shop), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def opened(address, folder):
    """The page in Chromium: its HTML, and that of each of its lists."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command += ["--virtual-time-budget=10000", "--dump-dom", address]
    page = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    names = re.findall(r'<ol id="([\w-]+)"', page)
    return page, {name: page.partition(f'<ol id="{name}"')[2].partition("</ol>")[0] for name in names}


pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


def test_the_page_recommends_and_escapes_texts(address, tmp_path):
    page, lists = opened(f"{address}/#Tiny1003,hostile,unknown", tmp_path)
    assert "31 items, text encoder test" in page
    assert lists["catalogue"].count("<li>") == 31 and "item number 7." in lists["catalogue"]
    assert lists["history"].count("<li>") == 2, "the unknown item is left out"
    assert lists["recommendations"].count("<li>") == 12 and "nearest in the history: " in lists["recommendations"]
    assert "<title>UniSRec</title>" in page and "&lt;script&gt;" in lists["history"] and "<img src=x" not in page
    assert "<li>" not in lists["users"] and "hidden" in page.partition('id="comparison"')[2].partition(">")[0]


def test_titles_pictures_and_links_of_a_catalogue(address, tmp_path):
    page, lists = opened(address, tmp_path)
    rows = {row[:8]: row for row in re.findall(r"Tiny100\d .*?</li>", lists["catalogue"])}
    assert set(rows) == {"Tiny1001", "Tiny1002", "Tiny1003"}
    for row in rows.values():
        assert "&lt;script&gt;" in row and "price: &lt;b&gt;3 €&lt;/b&gt;" in row
    assert re.findall(r'href="([^"]*)"', lists["catalogue"]) == ["https://x.example/a?b=%3Cc%3E"]
    assert 'rel="noopener noreferrer"' in rows["Tiny1003"]
    assert set(re.findall(r'<img src="([^"]*)"', page)) == {PIXEL}, "neither javascript: nor http:"
    assert "<title>UniSRec</title>" in page and "javascript:" not in page


def test_two_models_side_by_side_and_who_would_get_a_new_product(address, tmp_path):
    page, lists = opened(f"{address}/?compare={UNTRAINED}&text=item number 3.#Tiny1004", tmp_path)
    assert lists["recommendations"].count("<li>") == lists["other-recommendations"].count("<li>") == 12
    assert lists["recommendations"] != lists["other-recommendations"]
    both = int(re.search(r"(\d+) of 12 are recommended by both", page)[1])
    assert lists["other-recommendations"].count("the other has it at rank ") == both
    assert lists["similar"].count("<li>") == 10 and "of 2 example users" in page, "one of three knows no item"
    assert set(re.findall(r"User \d", lists["users"])) == {"User 1", "User 3"}
