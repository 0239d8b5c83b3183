"""Senders of groups who are slow, or fall silent: the hub reads so many at once, and no more."""

import asyncio
import time

import aiohttp
from aiohttp import web
from safetensors.torch import save
from test_hub import TOKEN, group_tensors, lease
from test_hub import hub as hub  # the fixture

from bridge.client import ask


def sent_at_once(hub, bodies, size):
    """The hub's answers to these bodies of `size` bytes, sent together, in the order of their ends;
    the last one once another waits for its turn."""
    ends = []

    async def scenario():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with asyncio.timeout(20), aiohttp.ClientSession(hub.url, headers=headers) as session:

            async def send(data):
                length = {"Content-Length": str(size)}
                async with session.post("/groups", data=data, headers=length) as response:
                    ends.append(response.status)

            first = [asyncio.create_task(send(data)) for data in bodies[:-1]]
            while len(hub.reading._waiters or ()) < 1:
                await asyncio.sleep(0.01)  # a short poll of another thread's state
            await asyncio.gather(send(bodies[-1]), *first)

    asyncio.run(scenario())
    return ends


async def half(body):
    yield body[:8]
    await asyncio.Event().wait()


def test_groups_wait_to_be_read_and_that_is_not_counted_against_them(hub):
    """Two that stall take the one place in turn; a group that came after them is read then, though
    it has waited for longer than a body may take."""
    hub.body_timeout_s, hub.reading = 0.2, asyncio.Semaphore(1)
    body = save(group_tensors(), metadata={"lease": lease(hub)[0]})
    assert sent_at_once(hub, [half(body), half(body), body], len(body)) == [408, 408, 200]


def test_who_falls_silent_gives_the_place_up_and_who_is_slow_keeps_it(hub):
    """Long before a body's time is over, which a steady sender may use up."""
    hub.silent_body_timeout_s, hub.reading = 0.5, asyncio.Semaphore(2)
    slow, fast = (save(group_tensors(), metadata={"lease": name}) for name in lease(hub, 2))

    async def steady():
        for i in range(8):
            await asyncio.sleep(0.15)
            yield slow[i * len(slow) // 8 : (i + 1) * len(slow) // 8]

    began = time.monotonic()
    assert len(slow) == len(fast)
    ends = sent_at_once(hub, [half(slow), steady(), half(slow), fast], len(slow))
    assert (
        sorted(ends) == [200, 200, 408, 408] and time.monotonic() - began < 10 < hub.body_timeout_s
    )


def test_what_came_too_slowly_is_sent_again_and_not_made_again():
    """408 says nothing against a group."""
    answers = [408, 408, 200]

    async def answer(request):
        return web.Response(status=answers.pop(0), text="taken")

    async def scenario():
        app = web.Application()
        app.add_routes([web.post("/groups", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            assert await ask(session, "POST", "/groups", 20.0, data=b"a group") == b"taken"
        await runner.cleanup()

    asyncio.run(scenario())
    assert not answers
