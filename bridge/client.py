"""How a rollout node asks the hub."""

import asyncio
import contextlib
from urllib.parse import urlsplit

import aiohttp

from bridge.processes import log
from bridge.vllm import NO_ANSWER
from bridge.waits import Wait, backoff_s
from bridge.weights import digest


def check_url(hub: str) -> None:
    """Raises: ValueError for what is no address of a hub."""
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(hub)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port:
            return
    raise ValueError(
        f"{hub!r} is not the trainer's address: expected http://HOST:PORT, or "
        "http://[ADDRESS]:PORT of IPv6"
    )


class RunOver(Exception):
    """The hub says that the run has ended."""


class RunChanged(Exception):
    """The trainer was started again: what this node holds is of the run before."""


class HubRefusal(RuntimeError):
    """The hub's answer is an error."""

    def __init__(self, route: str, status: int, text: str):
        super().__init__(f"hub refused {route} with {status}: {text[:300]}")
        self.status = status


async def ask(
    hub: aiohttp.ClientSession, method: str, route: str, patience_s: float, **kwargs
) -> bytes:
    """A request to the hub, repeated for patience_s while the network fails: the trainer may be
    starting again. Raises: RunOver, RunChanged, HubRefusal; WaitOver for its silence."""
    wait, attempt = Wait("hub", patience_s, whom=f"the hub's answer to {route}"), 0
    while True:
        try:
            async with hub.request(method, route, **kwargs) as response:
                body = await response.read()
                if (wanted := response.headers.get("X-Blake3")) and digest(body) != wanted:
                    raise aiohttp.ClientError("what arrived is damaged: its digest differs")
                if response.status == 410:
                    raise RunOver
                if response.status == 412:
                    raise RunChanged
                # 408: what was sent did not get there in time, which says nothing against it
                if response.status >= 500 or response.status == 408:
                    raise aiohttp.ClientError(f"status {response.status}")
                if response.status != 200:
                    raise HubRefusal(route, response.status, body.decode(errors="replace"))
                return body
        except NO_ANSWER as e:
            why = f"{type(e).__name__}: {e}"
            wait.check(why)
            if attempt > 3:
                log(f"hub does not answer {route}, asking again: {why}")
            await asyncio.sleep(
                min(backoff_s(attempt, most=5.0), max(0.05, patience_s - wait.waited_s))
            )
            attempt += 1
