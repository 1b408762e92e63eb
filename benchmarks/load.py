"""Requests per second of the HTTP service under load: python benchmarks/load.py BUNDLE [--clients 1 16 64]

Starts `serve.py` on this machine. Each client asks for ten recommendations for a history of 20 random items, again and
again, over one connection. Clients and service share the cores. A bundle without items needs `--items`.
"""

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTH = 20  # items of a history


def main() -> None:
    """Run the benchmark. It is described at the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", metavar="FOLDER")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], metavar="N")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default: 10)")
    options, further = parser.parse_known_args()  # further options are those of serve.py
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, os.path.join(PROJECT, "serve.py"), options.bundle, "--port", str(port), *further]
    service = subprocess.Popen(command)
    try:
        wait(service, port)
        ids = [item["id"] for item in call(connect(port), "GET", "/v1/items?limit=1000")["items"]]
        print("| clients | requests per second | p50 | p99 | errors |\n|---|---|---|---|---|")
        for clients in options.clients:
            print(measure(port, ids, clients, options.seconds), flush=True)
    finally:
        service.terminate()
        service.wait()


def connect(port: int) -> http.client.HTTPConnection:
    """A connection to the service."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def call(connection: http.client.HTTPConnection, method: str, path: str, body: dict | None = None) -> dict:
    """Send a request. Returns the answer.

    Raises:
        OSError: the answer is an error.
    """
    connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise OSError(f"{response.status}: {content[:200]!r}")
    return json.loads(content)


def wait(service: subprocess.Popen, port: int) -> None:
    """Wait until the service answers."""
    while service.poll() is None:
        try:
            call(connect(port), "GET", "/v1/model")
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the service has stopped")


def measure(port: int, ids: list[str], clients: int, seconds: float) -> str:
    """A row of the table."""
    end, milliseconds, errors, lock = time.perf_counter() + seconds, [], [], threading.Lock()

    def ask(number: int) -> None:
        draw, connection = random.Random(number), connect(port)
        while (start := time.perf_counter()) < end:
            try:
                call(connection, "POST", "/v1/recommend", {"history": draw.choices(ids, k=LENGTH)})
            except (OSError, http.client.HTTPException) as error:
                with lock:
                    errors.append(error)
                connection = connect(port)
                continue
            with lock:
                milliseconds.append(1000 * (time.perf_counter() - start))

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))
    rate = len(milliseconds) / (time.perf_counter() - start)
    milliseconds.sort()
    p50, p99 = (milliseconds[int(share * len(milliseconds))] for share in (0.5, 0.99))
    if errors:
        print(f"first error: {errors[0]}", file=sys.stderr)
    return f"| {clients} | {rate:,.0f} | {p50:.0f} ms | {p99:.0f} ms | {len(errors)} |"


if __name__ == "__main__":
    main()
