"""Serve a bundle, add a product over HTTP, and ask for recommendations: python examples/serve_shop.py BUNDLE ID

BUNDLE is a folder that finetune.py or examples/own_shop.py has written, ID a product in it.
"""

import json
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

PROJECT = pathlib.Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:8765"


def call(path: str, body: dict | None = None) -> dict:
    """Send a request, with a JSON body if there is one. Returns the answer."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(ADDRESS + path, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def main(bundle: str, item: str) -> None:
    """Start the service, use it, stop it."""
    service = subprocess.Popen([sys.executable, PROJECT / "serve.py", bundle, "--port", "8765"])
    try:
        while True:
            try:
                print(call("/v1/model"))
                break
            except urllib.error.URLError:  # not ready yet
                assert service.poll() is None, "the service has stopped"
                time.sleep(0.2)
        print(call("/v1/items", {"items": [{"id": "NEW-2", "text": "Teekanne, weiß. Tasse."}]}))
        for found in call("/v1/recommend", {"history": [item, "NEW-2"], "k": 3})["items"]:
            print(f"{found['score']:.3f}  {found['text']}")
    finally:
        service.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
