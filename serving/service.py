"""The HTTP service of a bundle. `serve.py` starts it."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import os
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from common.errors import UserError
from dataset.preprocessing.item_table import check_show_names
from serving.catalogue import Columns
from serving.comparison import load_beside
from serving.journal import Journal
from serving.recommender import Recommender

MAX_BODY = 1 << 20  # bytes of a request
MAX_HISTORY = 1000  # items of a history
MAX_K = 1000
MAX_ITEMS = 1000  # items of a request
MAX_TEXT = 10_000  # characters
MAX_COLUMNS = 20  # to show with an item
TOGETHER = 64  # requests that are encoded together
MAX_USERS = 200  # example users
_USERS_AT_ONCE = 25  # whose recommendations are computed before others may use the recommender

Id = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecommendRequest(_Strict):
    """A history, oldest item first, and what to recommend for it. `model`: one of `compare` of `/v1/model`."""

    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)]
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    exclude_history: bool = True
    allowed: Annotated[list[Id], Field(max_length=MAX_ITEMS)] | None = None
    on_unknown: Literal["error", "skip"] = "error"
    explain: bool = False
    model: str | None = None


class SimilarRequest(_Strict):
    """An item id or any text."""

    item: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10


class AudienceRequest(_Strict):
    """The text of a product that does not exist."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    k: Annotated[int, Field(ge=1, le=100)] = 10


class Item(_Strict):
    """An item of the catalogue, and columns to show with it, such as title, image and url."""

    id: Id
    text: Text
    columns: Annotated[dict[Name, Text], Field(max_length=MAX_COLUMNS)] = {}


class AddRequest(_Strict):
    """Items to add. They replace known items. Of an item that occurs twice, the last one counts."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


def _name_of(path):
    """The name of a model to compare with. Its path is nobody else's business."""
    return os.path.basename(os.path.abspath(path))


class Shop:
    """The recommender that is in use, and its changes on the disk.

    Only one thread at a time uses the recommender, and only one changes items. Others use the recommender while
    texts are encoded or a bundle is loaded.

    Args:
        folder: the bundle.
        load: loads the recommender of a bundle.
        compare: names of models to compare with, see `comparison.load_beside`.
        users: histories of example users, to show who would get a new product.
    """

    def __init__(
        self,
        folder: str,
        load: Callable[[str], Recommender] = Recommender.from_pretrained,
        compare: Sequence[str] = (),
        users: Sequence[list[str]] = (),
    ):
        if len(set(map(_name_of, compare))) < len(compare):
            raise UserError(f"--compare: found two models of one name in {', '.join(compare)}; rename a folder")
        self.folder, self._load, self._compare = folder, load, compare
        self.users = users
        self._using, self._changing = threading.Lock(), threading.Lock()
        self.journal, self.recommender, self.others = self._open()

    def _open(self):
        journal, recommender = Journal(self.folder), self._load(self.folder)
        journal.replay(recommender)
        others = {_name_of(path): load_beside(path, recommender) for path in self._compare}
        return journal, recommender, others

    def reload(self) -> None:
        """Take over the bundle as it is on the disk now. Until it is loaded, the old one answers."""
        with self._changing:
            opened = self._open()
            with self._using:
                self.journal, self.recommender, self.others = opened

    def recommend(self, requests: list[RecommendRequest]) -> list[Any]:
        """The answer to each request: a list of `Recommendation`, or a `UserError`."""
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            allowed = None if request.allowed is None else tuple(request.allowed)
            key = (request.model, request.k, request.exclude_history, allowed, request.on_unknown)
            groups.setdefault(key, []).append(number)
        answers: list[Any] = [None] * len(requests)
        with self._using:
            for (model, k, exclude, allowed, on_unknown), numbers in groups.items():
                options = {"k": k, "exclude_history": exclude, "allowed": allowed, "on_unknown": on_unknown}
                histories = [requests[number].history for number in numbers]
                for number, found in zip(numbers, self._together(model, histories, options), strict=True):
                    answers[number] = found
        return answers

    def _together(self, model, histories, options):
        try:
            return self._model(model).recommend(histories, **options)
        except UserError:  # find out which history it is
            return [self._alone(model, history, options) for history in histories]

    def _alone(self, model, history, options):
        try:
            return self._model(model).recommend([history], **options)[0]
        except UserError as error:
            return error

    def _model(self, name):
        if name is None:
            return self.recommender
        if name not in self.others:
            raise UserError(f"model: found {name!r}, expected one of {list(self.others)}, or none")
        return self.others[name]

    def explain(self, history: list[str], ids: list[str], model: str | None = None) -> list[str | None]:
        """See `Recommender.nearest_of`. An item that was removed meanwhile has no explanation."""
        with self._using:
            recommender = self._model(model)
            if all(item in recommender.texts for item in ids):
                return recommender.nearest_of(history, ids)
        return [None] * len(ids)

    def similar(self, item: str, k: int) -> list[Any]:
        """The items that are nearest to an item, or to any text."""
        recommender = self.recommender
        if item in recommender.texts:
            with self._using:
                return recommender.similar(item, k)
        vector = recommender.represent([item])[0]
        with self._using:
            return recommender.nearest(vector, k)

    def audience(self, text: str, k: int) -> dict[str, Any]:
        """The example users who would get a new product.

        Returns:
            dict: `total`: among whose first k recommendations it would be. `of`: the number of example users with a
            known item. `users`: those who would get it at the best ranks, at most 20 with a rank up to 100, with `user`
            (from 1), `rank` and `history`.
        """
        recommender = self.recommender
        vector = recommender.represent([text])[0]
        with self._using:
            known = [[item for item in history if item in recommender.texts] for history in self.users]
            numbers = [number for number, history in enumerate(known) if history]
            histories = [known[number] for number in numbers]
        ranks: list[int | None] = []
        for start in range(0, len(histories), _USERS_AT_ONCE):  # others may use the recommender in between
            with self._using:
                ranks += recommender.ranks_of(vector, histories[start : start + _USERS_AT_ONCE], 100)
        with self._using:
            found = sorted((rank, number) for rank, number in zip(ranks, numbers, strict=True) if rank)
            users = [
                {"user": number + 1, "rank": rank, "history": [_shown(recommender, item) for item in known[number]]}
                for rank, number in found[:20]
            ]
        return {"users": users, "total": sum(rank <= k for rank, _ in found), "of": len(numbers)}

    def add(self, items: Mapping[str, str], columns: Columns | None = None) -> int:
        """Add items. Returns the number of items afterwards. See `Recommender.add_items`."""
        columns = columns or {}
        check_show_names({name for each in columns.values() for name in each}, "columns")
        with self._changing:
            everyone = [self.recommender, *self.others.values()]
            vectors = [each.represent(list(items.values())) for each in everyone]
            _store(self.journal.add, items, columns)
            with self._using:
                for each, own in zip(everyone, vectors, strict=True):
                    each.add_items(items, columns, own)
                return len(self.recommender)

    def remove(self, ids: list[str]) -> int:
        """Remove items. Returns the number of items afterwards."""
        with self._changing:
            for item in ids:
                if item not in self.recommender.texts:
                    raise UserError(f"id: unknown item {item!r}; nothing is removed")
            _store(self.journal.remove, ids)
            with self._using:
                for each in (self.recommender, *self.others.values()):
                    each.remove_items(ids)
                return len(self.recommender)

    def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """The first items whose id, text or title contains all words of the query, without regard to case."""
        words, found = query.casefold().split(), []
        with self._using:
            for item, text in self.recommender.texts.items():
                title = self.recommender.columns.get(item, {}).get("title", "")
                content = f"{item} {text} {title}".casefold()
                if all(word in content for word in words):
                    found.append(_shown(self.recommender, item))
                    if len(found) == limit:
                        break
        return found


def _shown(recommender: Recommender, item: str) -> dict[str, Any]:
    return {"id": item, "text": recommender.texts[item], "columns": recommender.columns.get(item, {})}


def _store(act: Callable[..., None], *change: Any) -> None:
    """Write a change to the disk. If that fails, nothing is changed."""
    try:
        act(*change)
    except UserError as error:
        raise HTTPException(507, str(error)) from None


class Batcher:
    """Collects the requests that arrive while others are computed, and has them computed together."""

    def __init__(self, shop: Shop):
        self.shop, self._queue = shop, asyncio.Queue[tuple[RecommendRequest, asyncio.Future]]()

    async def recommend(self, request: RecommendRequest) -> list[Any]:
        """The recommendations for a request.

        Raises:
            UserError: see `Recommender.recommend`.
        """
        answer = asyncio.get_running_loop().create_future()
        await self._queue.put((request, answer))
        return await answer

    async def run(self) -> None:
        """Answer requests until the task is cancelled."""
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < TOGETHER and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            try:
                answers = await asyncio.to_thread(self.shop.recommend, [request for request, _ in waiting])
            except Exception as error:  # each of them is told
                answers = [error] * len(waiting)
            for (_, future), answer in zip(waiting, answers, strict=True):
                if future.done():  # the client has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


class Metrics:
    """The figures at /metrics."""

    def __init__(self, shop: Shop):
        self.registry = CollectorRegistry()
        self.requests = Counter("unisrec_requests", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("unisrec_request_seconds", "Seconds per request", ["path"], registry=self.registry)
        items = Gauge("unisrec_items", "Items in the catalogue", registry=self.registry)
        items.set_function(lambda: len(shop.recommender))


def create_app(shop: Shop, token: str | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        shop: the bundle in use.
        token: what a request needs to change items or to reload the bundle, as `Authorization: Bearer TOKEN`. None:
            nothing.
    """
    batcher, metrics = Batcher(shop), Metrics(shop)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="UniSRec", version="1", lifespan=lifespan, redoc_url=None)
    app.middleware("http")(_measure(metrics))
    app.add_middleware(_BodyLimit)
    if token is None:  # else any page in a browser of this machine could reach the service under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.exception_handler(UserError)
    async def _mistake(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # without the input, which may hold what JSON cannot
        return JSONResponse(
            {"detail": [{key: each[key] for key in ("type", "loc", "msg")} for each in error.errors()]}, 422
        )

    def may_write(request: Request, authorization: Annotated[str, Header()] = "") -> None:
        origin = request.headers.get("origin")
        if origin and urllib.parse.urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "a page of another site may not change items")
        if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "expected Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    _add_reading(app, shop, batcher)
    _add_writing(app, shop, Depends(may_write))
    _add_operations(app, shop, metrics)
    page = importlib.resources.files("serving") / "page"
    app.mount("/", StaticFiles(directory=str(page), html=True), name="page")
    return app


_ERRORS: dict[int | str, dict[str, Any]] = {400: {"description": "A mistake in the request"}}
_DENIED: dict[int | str, dict[str, Any]] = {401: {"description": "The token is missing or wrong"}}


def _add_reading(app: FastAPI, shop: Shop, batcher: Batcher) -> None:
    @app.post("/v1/recommend", responses=_ERRORS)
    async def recommend(request: RecommendRequest) -> dict[str, Any]:
        """Recommend items for a history. An empty history gets the most popular items.

        With `explain`, each item names the nearest item of the history (`because`).
        """
        items = [dataclasses.asdict(item) for item in await batcher.recommend(request)]
        if request.explain:
            ids = [item["id"] for item in items]
            names = await asyncio.to_thread(shop.explain, request.history, ids, request.model)
            items = [item | {"because": name} for item, name in zip(items, names, strict=True)]
        return {"items": items}

    @app.post("/v1/similar", responses=_ERRORS)
    def similar(request: SimilarRequest) -> dict[str, Any]:
        """The items that are nearest to an item, or to any text."""
        return {"items": shop.similar(request.item, request.k)}

    @app.post("/v1/audience")
    def audience(request: AudienceRequest) -> dict[str, Any]:
        """How many example users would get a product that does not exist among their first k, by its text, and who."""
        return shop.audience(request.text, request.k)

    @app.get("/v1/items")
    def search(
        query: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = 20
    ) -> dict[str, Any]:
        """Search the catalogue."""
        return {"items": shop.search(query, limit), "total": len(shop.recommender)}

    @app.get("/v1/model")
    def model() -> dict[str, Any]:
        """What is in use, and the limits of the service."""
        recommender = shop.recommender
        limits = {"history": MAX_HISTORY, "k": MAX_K, "items": MAX_ITEMS, "text": MAX_TEXT, "body": MAX_BODY}
        about = {"stage": recommender.model.train_stage, "encoder": recommender.encoding.get("encoder")}
        about |= {"compare": list(shop.others), "users": len(shop.users)}
        return about | {"items": len(recommender), "max_history": recommender.max_history, "limits": limits}


def _add_writing(app: FastAPI, shop: Shop, may_write: Any) -> None:
    @app.post("/v1/items", dependencies=[may_write], responses=_ERRORS | _DENIED)
    def add(request: AddRequest) -> dict[str, int]:
        """Add items, or replace known items. They survive a restart."""
        columns = {item.id: item.columns for item in request.items}
        return {"total": shop.add({item.id: item.text for item in request.items}, columns)}

    @app.delete("/v1/items", dependencies=[may_write], responses=_ERRORS | _DENIED)
    def remove(id: Annotated[list[Id], Query(min_length=1, max_length=MAX_ITEMS)]) -> dict[str, int]:
        """Remove items."""
        return {"total": shop.remove(id)}

    @app.post("/v1/model/reload", dependencies=[may_write], responses=_ERRORS | _DENIED)
    def reload() -> dict[str, int]:
        """Take over the bundle as it is on the disk now. Until it is loaded, the old one answers."""
        shop.reload()
        return {"total": len(shop.recommender)}


def _add_operations(app: FastAPI, shop: Shop, metrics: Metrics) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        """The bundle is loaded."""
        return f"ok, {len(shop.recommender)} items"

    @app.get("/metrics", response_class=PlainTextResponse)
    def show_metrics() -> Response:
        """Requests, seconds and items, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _measure(metrics: Metrics) -> Callable:
    """A middleware that counts requests, and sets the headers of a page that loads only images from elsewhere."""

    async def measure(request: Request, call_next: Callable) -> Response:
        start = time.perf_counter()
        status = 500
        try:
            response = await call_next(request)
            status = response.status_code
        finally:
            path = getattr(request.scope.get("route"), "path", "other") or "/"
            metrics.seconds.labels(path).observe(time.perf_counter() - start)
            metrics.requests.labels(path, str(status)).inc()
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if not request.url.path.startswith("/docs"):
            response.headers["Content-Security-Policy"] = (
                "default-src 'self'; img-src 'self' https: data:; frame-ancestors 'none'"
            )
        return response

    return measure


class _BodyLimit:
    """Refuses a request with a body above `MAX_BODY` bytes, also if its length is not announced."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                detail = f"the body has more than {MAX_BODY:,} bytes; send less at once"
                await JSONResponse({"detail": detail}, 413)(scope, receive, send)
                return
        sent = False

        async def replay():
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)
