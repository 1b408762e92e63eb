"""The page in a real browser."""

import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from serving.service import Shop, create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"


@pytest.fixture
def address(made, tmp_path):
    """The address of a running service whose catalogue has a hostile item."""
    shop = Shop(str(shutil.copytree(made["inductive_ft"][1], tmp_path / "bundle")))
    shop.add({"hostile": HOSTILE})
    server = uvicorn.Server(uvicorn.Config(create_app(shop), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_recommends_and_escapes_texts(address, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"{address}/#Tiny1003,hostile,unknown"]
    page = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lists = {
        name: page.partition(f'<ol id="{name}"')[2].partition("</ol>")[0]
        for name in ("catalogue", "history", "recommendations")
    }
    assert "31 items, text encoder test" in page
    assert lists["catalogue"].count("<li>") == 31 and "item number 7." in lists["catalogue"]
    assert lists["history"].count("<li>") == 2, "the unknown item is left out"
    assert lists["recommendations"].count("<li>") == 12 and "nearest in the history: " in lists["recommendations"]
    assert "<title>UniSRec</title>" in page and "&lt;script&gt;" in lists["history"] and "<img" not in page
