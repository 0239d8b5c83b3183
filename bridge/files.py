"""Weights over HTTP: which files may be served, and to whom. The hub serves those of rank 0's node,
a `FileServer` those of every other trainer node."""

import asyncio
import hmac
import os
import re
import socket
import threading
from pathlib import Path

from aiohttp import web

from bridge.weights import STATIC_FILES, WeightsError


def served_file(root: Path, version: str, name: str) -> Path | None:
    """The file of a version that a node may fetch under this name, or None. A file that is still
    being written has another name."""
    path = root / f"v{version}" / name
    known = name in STATIC_FILES or re.fullmatch(r"model-\d{5}-of-\d{5}\.(safetensors|delta)", name)
    return path if known and version.isdigit() and path.is_file() else None


def has_token(request: web.Request, token: str) -> bool:
    """Whether the request carries the run's bearer token, compared in constant time."""
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class FileServer:
    """Serves the files of a trainer node's shares, in a thread, on the nodes without rank 0. A
    context manager; without one it serves for as long as the process lives."""

    def __init__(self, root: Path, token: str, host: str, port: int):
        """port: where it is taken, any other is used, since the manifest names it."""
        self.root, self.token, self._started = root, token, threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(host, port), name="file server", daemon=True
        )
        self._thread.start()
        if not self._started.wait(30):
            raise WeightsError(f"no file server on {host}: its thread has failed")

    def __enter__(self) -> "FileServer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self, host: str, port: int) -> None:
        asyncio.run(self._serve(host, port))

    async def _serve(self, host: str, port: int) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/weights/{version}/{name}", self._file)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:  # taken
            await web.TCPSite(runner, host, 0).start()
        self.url = http_url(host, runner.addresses[0][1])
        self._started.set()
        await self._end.wait()
        await runner.cleanup()

    async def _file(self, request: web.Request) -> web.StreamResponse:
        if not has_token(request, self.token):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        path = served_file(self.root, **request.match_info)
        if path is None:
            return web.json_response({"error": "no such file"}, status=404)
        return web.FileResponse(path)


def own_address() -> str:
    """The address at which other hosts reach this one: that of the connection to torchrun's
    store."""
    with socket.create_connection(
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30
    ) as s:
        return s.getsockname()[0]
