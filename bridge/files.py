"""Files over HTTP, with a token."""

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
    """The file of a version that a node may fetch under this name, if it is there. Whatever is
    being written has another name."""
    path = root / f"v{version}" / name
    known = name in STATIC_FILES or re.fullmatch(r"model-\d{5}-of-\d{5}\.(safetensors|delta)", name)
    return path if known and version.isdigit() and path.is_file() else None


def has_token(request: web.Request, token: str) -> bool:
    """Whether the request carries the run's bearer token; compared in a time that does not depend
    on it."""
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class FileServer:
    """What a trainer node other than rank 0's serves, in a thread: the files of its ranks'
    shares."""

    def __init__(self, root: Path, token: str, host: str, port: int):
        self.root, self.token, started = root, token, threading.Event()
        serve = lambda: asyncio.run(self._serve(host, port, started))
        threading.Thread(target=serve, name="file server", daemon=True).start()
        if not started.wait(30):
            raise WeightsError(f"no file server on {host}: its thread has failed")

    async def _serve(self, host: str, port: int, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/weights/{version}/{name}", self._file)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:  # taken: any other will do, since the manifest names it
            await web.TCPSite(runner, host, 0).start()
        self.url = http_url(host, runner.addresses[0][1])
        started.set()
        await asyncio.Event().wait()  # for as long as the process lives

    async def _file(self, request: web.Request) -> web.StreamResponse:
        if not has_token(request, self.token):
            return web.json_response({"error": "missing or wrong bearer token"}, status=401)
        path = served_file(self.root, **request.match_info)
        return (
            web.FileResponse(path)
            if path
            else web.json_response({"error": "no such file"}, status=404)
        )


def own_address() -> str:
    """Where other hosts reach this one: the address of the connection to torchrun's store."""
    with socket.create_connection(
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30
    ) as s:
        return s.getsockname()[0]
