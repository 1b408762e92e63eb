"""The HTTP service: its answers, limits, token, and what survives a restart."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from fastapi.testclient import TestClient

import serve
import serving.journal
from serving.comparison import UNTRAINED
from serving.journal import NAME
from serving.recommender import Recommender
from serving.service import MAX_BODY, MAX_HISTORY, MAX_ITEMS, MAX_K, MAX_TEXT, RecommendRequest, Shop, create_app
from tests.conftest import ROOT
from tests.serving.conftest import ids

TOKEN = "0123456789abcdef-token"


@pytest.fixture
def folder(made, tmp_path):
    """A bundle of this test's own."""
    return str(shutil.copytree(made["transductive_ft"][1], tmp_path / "bundle"))


@pytest.fixture
def open_client(folder):
    """Start the service on the bundle; returns a client. Called again, it is a restart."""
    clients = []

    def start(token=None, where=folder, **options):
        client = TestClient(
            create_app(Shop(where, **options), token), "http://127.0.0.1:8000", raise_server_exceptions=False
        )
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def found(response):
    assert response.status_code == 200, response.text
    return [item["id"] for item in response.json()["items"]]


def test_recommendations_are_those_of_the_recommender(open_client, folder):
    client, recommender = open_client(), Recommender.from_pretrained(folder)
    response = client.post("/v1/recommend", json={"history": ids(3, 4), "k": 5})
    expected = recommender.recommend(ids(3, 4), k=5)
    assert found(response) == [item.id for item in expected]
    assert response.json()["items"][0] == {
        "id": expected[0].id, "score": pytest.approx(expected[0].score), "text": expected[0].text, "source": "model",
        "columns": {},
    }  # fmt: skip
    assert len(found(client.post("/v1/recommend", json={"history": ids(3)}))) == 10
    assert set(found(client.post("/v1/recommend", json={"history": ids(3), "allowed": ids(5, 6)}))) == set(ids(5, 6))
    kept = {"history": ids(3), "k": 30, "exclude_history": False}
    assert len(found(client.post("/v1/recommend", json=kept))) == 30
    skipped = {"history": ["x", *ids(3)], "on_unknown": "skip", "k": 5}
    assert found(client.post("/v1/recommend", json=skipped)) == [item.id for item in recommender.recommend(ids(3), k=5)]
    explained = client.post("/v1/recommend", json={"history": ids(3, 20), "explain": True}).json()["items"]
    assert {item["because"] for item in explained} == set(ids(3, 20))
    popular = client.post("/v1/recommend", json={"history": [], "explain": True}).json()["items"]
    assert {item["source"] for item in popular} == {"popularity"} and {item["because"] for item in popular} == {None}


def test_models_to_compare_with_recommend_the_same_items(open_client, folder, made, tmp_path):
    other = shutil.copytree(made["inductive_ft"][1], tmp_path / "other")
    recommender = Recommender.from_pretrained(str(other))
    recommender.remove_items(ids(7))
    recommender.add_items({"gone": "it is not in the shop"})
    recommender.save_pretrained(str(other))
    paths = [UNTRAINED, made["pretrain"][1], str(other)]
    client = open_client(compare=paths)
    names = [UNTRAINED, "pretrained", "other"]  # not where they lie
    assert client.get("/v1/model").json()["compare"] == names
    new = {"id": "new", "text": "a spoon", "columns": {"title": "Spoon"}}
    client.post("/v1/items", json={"items": [new]})
    client.delete("/v1/items", params={"id": ids(9)})
    answers = {}
    for name in [None, *names]:
        response = client.post("/v1/recommend", json={"history": ids(3, 4), "k": 40, "model": name})
        answers[name] = found(response)
        assert {item["id"]: item["columns"] for item in response.json()["items"] if item["columns"]} == {
            "new": {"title": "Spoon"}
        }
    expected = {*ids(*range(30)), "new"} - set(ids(3, 4, 9))
    assert all(set(answer) == expected for answer in answers.values())
    assert len({tuple(answer) for answer in answers.values()}) == 4, "each model has an order of its own"
    mistake = client.post("/v1/recommend", json={"history": ids(3), "model": "x"})
    assert mistake.status_code == 400 and f"expected one of {names}" in mistake.json()["detail"]


def test_example_users_who_would_get_a_new_product(open_client, folder):
    users = [ids(3, 4), ["unknown"], ["unknown", *ids(5)], ids(*range(30))]
    client = open_client(users=users)
    answer = client.post("/v1/audience", json={"text": "a spoon", "k": 10}).json()
    recommender = Recommender.from_pretrained(folder)
    recommender.add_items({"spoon": "a spoon"})
    ranks = {}
    for number, user in enumerate(users, start=1):
        known = [item for item in user if item in recommender.texts]
        best = [item.id for item in recommender.recommend(known, k=99)] if known else []
        ranks |= {number: best.index("spoon") + 1} if best else {}
    assert answer["of"] == 3 and {user["user"]: user["rank"] for user in answer["users"]} == ranks
    assert answer["total"] == sum(rank <= 10 for rank in ranks.values())
    assert [user["rank"] for user in answer["users"]] == sorted(ranks.values())
    assert [item["id"] for user in answer["users"] if user["user"] == 3 for item in user["history"]] == ids(5)
    assert open_client().post("/v1/audience", json={"text": "a spoon"}).json() == {"users": [], "total": 0, "of": 0}


def test_requests_that_arrive_together_get_their_own_answers(folder):
    shop = Shop(folder)
    requests = [RecommendRequest(history=ids(number), k=3 + number % 2) for number in range(8)]
    requests += [RecommendRequest(history=["x"]), RecommendRequest(history=ids(9), allowed=ids(1))]
    answers = shop.recommend(requests)
    for request, answer in zip(requests, answers, strict=True):
        if request.history == ["x"]:
            assert "unknown item 'x'" in str(answer)
        else:
            alone = shop.recommender.recommend(request.history, request.k, allowed=request.allowed)
            assert [item.id for item in answer] == [item.id for item in alone]


def test_many_clients_at_once(open_client, folder):
    client, recommender = open_client(), Recommender.from_pretrained(folder)
    expected = {number: [item.id for item in recommender.recommend(ids(number), k=4)] for number in range(10)}

    def ask(number):
        return found(client.post("/v1/recommend", json={"history": ids(number % 10), "k": 4}))

    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(ask, range(50))) == [expected[number % 10] for number in range(50)]


def test_items_survive_a_restart_and_a_cut_line(open_client, folder):
    client = open_client()
    shown = {"title": "<b>Suppe</b>", "url": "javascript:alert(1)"}
    texts = [{"id": "new", "text": "Ein Löffel <script>", "columns": shown}, {"id": "gone", "text": "a fork"}]
    assert client.post("/v1/items", json={"items": texts}).json() == {"total": 32}
    assert client.delete("/v1/items", params={"id": ["gone", "Tiny1004"]}).json() == {"total": 30}
    assert client.get("/v1/items", params={"query": "löffel"}).json() == {"items": texts[:1], "total": 30}
    assert found(client.get("/v1/items", params={"query": "suppe"})) == ["new"], "the title is searched as well"
    everything = {"history": ids(3), "k": 40}
    before = client.post("/v1/recommend", json=everything).json()["items"]
    assert {item["id"]: item["columns"] for item in before if item["columns"]} == {"new": shown}
    with open(f"{folder}/{NAME}", "ab") as file:
        file.write(b'{"add": {"never acknow')  # killed while writing
    again = open_client()
    assert again.get("/v1/items").json()["total"] == 30
    after = again.post("/v1/recommend", json=everything).json()["items"]
    assert [item | {"score": pytest.approx(item["score"], abs=1e-6)} for item in before] == after
    assert again.post("/v1/items", json={"items": [{"id": "gone", "text": "a fork"}]}).json() == {"total": 31}
    assert open_client().get("/v1/items", params={"query": "FORK gone"}).json()["total"] == 31
    lines = pathlib.Path(folder, NAME).read_text(encoding="utf-8").splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [["add", "columns"], ["remove"], ["add"]]


def test_a_change_that_cannot_be_stored_is_not_made(open_client, folder, monkeypatch):
    """The disk is full in the middle of a line. The next change is a line of its own."""
    client, write = open_client(), serving.journal.os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(serving.journal.os, "fsync", full)
    response = client.post("/v1/items", json={"items": [{"id": "lost", "text": "a knife"}]})
    assert response.status_code == 507 and "the disk is full" in response.text
    assert client.delete("/v1/items", params={"id": "Tiny1001"}).status_code == 507
    monkeypatch.setattr(serving.journal.os, "fsync", write)
    assert client.get("/v1/items").json()["total"] == 30
    assert client.post("/v1/items", json={"items": [{"id": "kept", "text": "a fork"}]}).json() == {"total": 31}
    again = open_client()
    assert again.get("/v1/items").json()["total"] == 31 and found(again.get("/v1/items?query=kept")) == ["kept"]


def test_an_item_that_the_new_bundle_was_trained_on_is_left_to_it(folder):
    shop, text = Shop(folder), "item number 3."
    before = shop.recommender.score(ids(5), ids(3))
    shop.journal.add({"Tiny1003": text, "new": "a fork"}, {"Tiny1003": {"title": "Three"}})
    again = Shop(folder)
    assert again.recommender.columns == {"Tiny1003": {"title": "Three"}}
    assert again.recommender.score(ids(5), ids(3)) == before and "new" in again.recommender.texts


def test_the_old_bundle_answers_while_the_new_one_is_loaded(folder):
    loading, go_on = threading.Event(), threading.Event()

    def load(where):
        if loading.is_set():
            go_on.wait(20)
        return Recommender.from_pretrained(where)

    shop = Shop(folder, load)
    loading.set()
    with ThreadPoolExecutor(1) as threads:
        old, reloaded = shop.recommender, threads.submit(shop.reload)
        assert len(shop.recommend([RecommendRequest(history=ids(3))])[0]) == 10 and shop.recommender is old
        assert shop.explain(ids(3), ids(4)) == ids(3)
        go_on.set()
        reloaded.result()
    assert shop.recommender is not old


def test_other_sites_cannot_reach_a_service_without_a_token(open_client):
    client = open_client()
    assert client.post("/v1/model/reload", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/v1/model/reload", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/v1/model/reload", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


def test_a_new_bundle_is_taken_over(open_client, folder, made):
    client = open_client()
    assert client.get("/v1/model").json()["stage"] == "transductive_ft"
    shutil.copytree(made["inductive_ft"][1], folder, dirs_exist_ok=True)
    assert client.get("/v1/model").json()["stage"] == "transductive_ft"
    assert client.post("/v1/model/reload").json() == {"total": 30}
    assert client.get("/v1/model").json()["stage"] == "inductive_ft"


@pytest.mark.parametrize("given", [None, "Bearer wrong-wrong-wrong", TOKEN, f"Bearer {TOKEN}x"])
def test_changes_need_the_token(open_client, given):
    client = open_client(TOKEN)
    headers = {"Authorization": given} if given else {}
    item = {"items": [{"id": "new", "text": "a spoon"}]}
    for response in (
        client.post("/v1/items", json=item, headers=headers),
        client.delete("/v1/items", params={"id": "Tiny1001"}, headers=headers),
        client.post("/v1/model/reload", headers=headers),
    ):
        assert response.status_code == 401 and TOKEN not in response.text
    assert client.get("/v1/items").json()["total"] == 30, "reading needs no token"
    assert client.post("/v1/items", json=item, headers={"Authorization": f"Bearer {TOKEN}"}).json() == {"total": 31}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"history": ["nobody"]}, 400, "history: unknown item 'nobody'"),
        ({"history": [], "allowed": ["nobody"]}, 400, "allowed: unknown item 'nobody'"),
        ({"history": ["x"] * (MAX_HISTORY + 1)}, 422, f"at most {MAX_HISTORY}"),
        ({"history": [], "allowed": ["x"] * (MAX_ITEMS + 1)}, 422, f"at most {MAX_ITEMS}"),
        ({"history": [], "k": 0}, 422, "greater than or equal to 1"),
        ({"history": [], "k": MAX_K + 1}, 422, f"less than or equal to {MAX_K}"),
        ({"history": [""]}, 422, "at least 1 character"),
        ({"history": [], "hist": 1}, 422, "Extra inputs are not permitted"),
        ({"history": "Tiny1001"}, 422, "valid list"),
        ({}, 422, "Field required"),
        (b"{", 422, "JSON decode error"),
        (b'{"history": ["\\ud800"]}', 422, "string_unicode"),
        (b'{"history": [], "k": NaN}', 422, "finite number"),
        (b"[" * 100_000, 400, "error parsing the body"),
        (b" " * (MAX_BODY + 1), 413, f"{MAX_BODY:,}"),
    ],
)
def test_mistakes_say_what_is_expected(open_client, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = open_client().post("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status and message in response.text


def test_mistakes_of_other_calls(open_client):
    client = open_client()
    long = client.post("/v1/items", json={"items": [{"id": "a", "text": "x" * (MAX_TEXT + 1)}]})
    assert long.status_code == 422 and f"at most {MAX_TEXT}" in long.text
    assert client.post("/v1/items", json={"items": []}).status_code == 422
    twice = [{"id": "a", "text": "x", "columns": {"title": "X"}}, {"id": "a", "text": "y"}]
    assert client.post("/v1/items", json={"items": twice}).json() == {"total": 31}
    assert client.get("/v1/items", params={"query": "a y"}).json()["items"] == [{"id": "a", "text": "y", "columns": {}}]
    client.delete("/v1/items", params={"id": "a"})
    name = client.post("/v1/items", json={"items": [{"id": "a", "text": "x", "columns": {"count": "1"}}]})
    assert name.status_code == 400 and "cannot have the name 'count'" in name.text
    missing = client.delete("/v1/items", params={"id": ["Tiny1001", "nobody"]})
    assert missing.status_code == 400 and "unknown item 'nobody'" in missing.text
    assert client.get("/v1/items").json()["total"] == 30, "nothing was removed"
    assert client.post("/v1/similar", json={"item": "a spoon", "k": 3}).status_code == 200
    assert client.post("/v1/similar", json={"item": ""}).status_code == 422
    assert client.get("/v1/nothing").status_code == 404


def test_operations_and_the_page(open_client):
    client = open_client()
    assert client.get("/healthz").text == "ok" and client.get("/readyz").text == "ok, 30 items"
    client.post("/v1/recommend", json={"history": ["nobody"]})
    text = client.get("/metrics").text
    assert 'unisrec_requests_total{path="/v1/recommend",status="400"} 1.0' in text and "unisrec_items 30.0" in text
    page = client.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'self'" in page.headers["content-security-policy"]
    )
    for name in ("app.js", "style.css"):
        assert name in page.text and client.get(f"/{name}").status_code == 200
    assert "http" not in page.text.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    script = client.get("/app.js").text
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script, "texts of a catalogue are no HTML"
    assert "/v1/recommend" in client.get("/openapi.json").json()["paths"]


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_refuses_what_is_unsafe_or_missing(refused, folder, tmp_path):
    assert "others could change the items" in refused(serve.main, folder, "--host", "0.0.0.0")
    (tmp_path / "short").write_text("secret\n")
    message = refused(serve.main, folder, "--token_file", tmp_path / "short")
    assert "expected at least 16 ASCII characters" in message and "secret" not in message
    assert "No such file" in refused(serve.main, folder, "--token_file", tmp_path / "none")
    assert "no such folder" in refused(serve.main, tmp_path / "none")
    assert "--compare none: no such folder; expected a bundle" in refused(serve.main, folder, "--compare", "none")
    assert "none.jsonl: no such file" in refused(serve.main, folder, "--histories", tmp_path / "none.jsonl")
    (tmp_path / "x.test.inter").write_text("header\n0\t7\t1\n")
    (tmp_path / "x.item2index").write_text("a\t0\n")
    assert "line 2: found" in refused(serve.main, folder, "--histories", tmp_path / "x.test.inter")


def test_one_service_for_a_bundle(refused, folder):
    with serve._only_service_of(folder):
        assert "another process serves it" in refused(serve.main, folder)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path):
    """The service is killed with SIGKILL while items are written, twice. What it has acknowledged is there again."""
    shipped, ignore = os.path.join(ROOT, "saved", "amazon-minilm"), shutil.ignore_patterns(NAME)
    bundle = shutil.copytree(shipped, tmp_path / "bundle", ignore=ignore)
    (tmp_path / "items.csv").write_text("item_id,title\na,Blaue Tasse\nb,Rote Tasse\nc,Gabel\n", encoding="utf-8")
    command = [sys.executable, os.path.join(ROOT, "serve.py"), str(bundle), "--items", f"{tmp_path}/items.csv"]
    acknowledged, sent = [], 0
    for writes in (3, 8, 0):  # a service that is killed after so many answers, another one, and one that is asked
        port = free_port()
        with subprocess.Popen([*command, "--port", str(port)], env=os.environ | {"OMP_NUM_THREADS": "1"}) as service:
            try:
                with contextlib.closing(wait_for(f"http://127.0.0.1:{port}", service)) as client:
                    present = {item["id"] for item in client.get("/v1/items", params={"limit": 1000}).json()["items"]}
                    assert {"a", "b", "c", *acknowledged} <= present <= {"a", "b", "c", *(f"n{i}" for i in range(sent))}
                    if not writes:
                        break
                    killer = threading.Timer(0.003, service.kill)
                    while True:
                        name, sent = f"n{sent}", sent + 1
                        try:
                            answer = client.post("/v1/items", json={"items": [{"id": name, "text": f"Tasse {sent}"}]})
                        except httpx2.TransportError:
                            break
                        assert answer.status_code == 200
                        acknowledged.append(name)
                        if len(acknowledged) == writes:
                            killer.start()  # the next writes are under way
            finally:
                service.kill()
    assert len(acknowledged) >= 8


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(address, service):
    """A client of a service, when it answers."""
    client = httpx2.Client(base_url=address, timeout=60)
    while service.poll() is None:
        try:
            client.get("/healthz")
            return client
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError("the service has stopped")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_command_serves(monkeypatch, folder, capsys, host):
    import uvicorn

    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append((app, options)))
    serve.main([folder, "--host", host, "--port", "8123"])
    ((app, options),) = served
    assert (options["host"], options["port"]) == (host, 8123) and app.title == "UniSRec"
    assert f"30 items: http://{host}:8123" in capsys.readouterr().out
