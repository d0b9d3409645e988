"""Puts the web together: `create_app`."""

import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import ModuleType

from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles

from app import queue, storage
from app.web import api, refusals, routes
from app.web.bodies import BodyLimit
from app.web.security import Guard


def create_app() -> FastAPI:
    """The studio's web application; it holds no state but its open streams and what wakes them."""
    app = FastAPI(
        title="Tuning Studio",
        openapi_url="/api/openapi.json",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    refusals.install(app)
    for router in _routers(routes):
        app.include_router(router, include_in_schema=False)
    for router in _routers(api):
        app.include_router(router, prefix="/api")
    app.mount("/static", StaticFiles(directory=storage.static_folder()))
    app.add_middleware(BodyLimit)
    app.add_middleware(Guard)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with queue.listening() as bells:
        app.state.bells = bells
        yield


def _routers(package: ModuleType) -> Iterator[APIRouter]:
    """The `router` of each file of the package: a new noun is one more file."""
    for module in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{module.name}").router
