"""hub.py against whoever can reach its port: malformed, hostile, slow and many; the run goes on."""

import asyncio
import json
import random

import aiohttp
import psutil
import pytest
import torch
from safetensors.torch import save
from test_hub import NEW, TOKEN, VOCAB, G, group_tensors, lease, push
from test_hub import hub as hub  # the fixture

NASTY = [
    None,
    True,
    -1,
    2**80,
    1e308,
    float("nan"),
    "",
    "n",
    "\0",
    "x" * 5000,
    "é\ud800",
    [],
    [[]],
    {},
    {"a": {}},
    [1] * 50,
]


def hostile(rng: random.Random, held: str):
    """(method, route, headers, body) of a request that has to be refused. `held` is a lease that
    stays good."""
    good = {"Authorization": f"Bearer {TOKEN}"}
    kind = rng.randrange(9)
    if kind == 0:  # no token, a wrong one, one that is not even text
        token = rng.choice(
            [
                b"",
                b"Bearer",
                b"Bearer wrong",
                b"Bearer \xff\xfe\xed\xa0\x80",
                b"Basic " + TOKEN.encode(),
            ]
        )
        return (
            "GET",
            rng.choice(["/status", "/run", "/lease", "/x"]),
            {b"Authorization": token},
            b"",
        )
    if kind == 1:
        return (
            rng.choice(["GET", "PUT", "DELETE", "TRACE"]),
            rng.choice(["/lease", "/groups", "/nowhere"]),
            good,
            b"",
        )
    if kind == 2:
        version, name = (
            rng.choice(["0", "9" * 9, "9" * 400, "-1"]),
            rng.choice(["..%2fx", "manifest.json", "%00", "a" * 500]),
        )
        return "GET", f"/weights/{version}/{name}", good, b""
    if kind == 3:
        return (
            "GET",
            f"/weights/latest?after={rng.choice(['x', '1e9', '9' * 5000, '%00'])}",
            good,
            b"",
        )
    if kind == 4:
        return (
            "POST",
            "/groups",
            good,
            rng.choice(
                [b"[" * 20_000, b"{" * 100, rng.randbytes(rng.randrange(300)), b"\0" * (2 << 20)]
            ),
        )
    if kind == 5:  # JSON of any shape
        fields = {
            name: rng.choice(NASTY)
            for name in (
                "node",
                "max",
                "version",
                "digest",
                "timing",
                "leases",
                "lease",
                "why",
                "vllm",
            )
        }
        body = rng.choice(
            [
                json.dumps(fields).encode(),
                b"[" * 50_000,
                json.dumps(rng.choice(NASTY)).encode(),
                b'{"node":',
            ]
        )
        return "POST", rng.choice(["/lease", "/receipts", "/return", "/beat"]), good, body
    # a blob that was right until bits flipped in its header, for a lease that was never granted
    if kind == 6:
        blob = bytearray(
            save(
                group_tensors(),
                metadata={
                    "lease": rng.choice(["0-9", "9-1", "", held + "x"]),
                    "turns_per_sample": "NaN",
                },
            )
        )
        for _ in range(rng.randrange(4)):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        return (
            "POST",
            "/groups",
            good,
            bytes(blob[: rng.choice([len(blob), rng.randrange(len(blob))])]).replace(
                held.encode(), b"9-9"
            ),
        )
    if kind == 7:  # shapes, dtypes, values, for a lease that is good
        many = torch.ones(NEW * G + G)
        change = rng.choice(
            [
                {"lengths": torch.tensor([2**31 - 1, 7], dtype=torch.int32)},
                {"rewards": torch.tensor([0.0, torch.nan])},
                {"logprobs": torch.full((5,), -torch.inf)},
                {"versions": torch.full((5,), 7, dtype=torch.int32)},
                {"token_ids": torch.full((5,), VOCAB, dtype=torch.int32)},
                {"truncated": torch.zeros(0, dtype=torch.uint8)},
                {"lengths": many.int(), "token_ids": many.int(), "versions": many.int()},
                {"token_ids": None},
                {name: torch.zeros(0, dtype=t.dtype) for name, t in group_tensors().items()},
                {"logprobs": torch.zeros(5, dtype=torch.complex64)},
                {"x" * 50: torch.zeros(1)},
            ]
        )
        return "POST", "/groups", good, save(group_tensors(**change), metadata={"lease": held})
    return "POST", "/lease", {**good, "X-Run": "another"}, b'{"node": "n", "max": 1}'


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_requests_are_refused_with_a_reason_and_memory_stays_flat(hub, count):
    rng = random.Random(count)
    (held,) = lease(hub)
    process, sizes, reasons = psutil.Process(), [], set()

    async def attack():
        connector = aiohttp.TCPConnector(limit=50)
        async with aiohttp.ClientSession(
            hub.url, connector=connector, timeout=aiohttp.ClientTimeout(total=60)
        ) as session:

            async def one():
                method, route, headers, body = hostile(rng, held)
                headers = [
                    (
                        k if isinstance(k, str) else k.decode(),
                        v if isinstance(v, str) else v.decode("latin-1"),
                    )
                    for k, v in headers.items()
                ]
                try:
                    async with session.request(
                        method,
                        aiohttp.client.URL(hub.url + route, encoded=True),
                        data=body,
                        headers=headers,
                    ) as response:
                        text = await response.text(errors="replace")
                        assert 400 <= response.status < 500 and text, (
                            response.status,
                            method,
                            route,
                            body[:200],
                            text,
                        )
                        reasons.add((response.status, text[:40]))
                except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
                    assert len(body) > 1 << 20  # refused by its size alone, before it was all sent

            for done in range(0, count, 50):
                await asyncio.gather(*(one() for _ in range(50)))
                if done >= count // 4:
                    sizes.append(process.memory_info().rss)

    asyncio.run(attack())
    assert {status for status, _ in reasons} >= {400, 401, 404, 405, 409, 412, 413, 422}, sorted(
        reasons
    )
    assert sizes[-1] < 1.05 * sizes[0], [size >> 20 for size in sizes]
    assert set(hub.nodes) == {"n"} and push(hub, held)[0] == 200  # the run goes on
    hub.ledger.check()


def test_garbage_that_is_not_http_slow_clients_and_a_thousand_connections_leave_the_hub_serving(
    hub,
):
    # above what 1,000 honest requests at once wait for their turn on a busy machine
    hub.body_timeout_s = 3.0
    host, port = hub.url.removeprefix("http://").split(":")
    head = b"HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"

    async def say(first: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(first)
        answer = await asyncio.wait_for(reader.read(400), 60)
        writer.close()
        return answer

    async def scenario():
        for garbage in (
            b"\0\1\2\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"GET /status HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        ):
            assert (await say(garbage)).startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), garbage[:40]
        slow = [
            say(b"POST /groups " + head + b"Content-Length: 900\r\n\r\nabc") for _ in range(100)
        ]
        # never a whole request: the connection is closed
        silent = [say(b"GET /sta") for _ in range(100)]
        many = [
            say(b"GET /status " + head.replace(TOKEN.encode(), b"wrong") + b"\r\n")
            for _ in range(1000)
        ]
        answers = await asyncio.gather(*slow, *silent, *many)
        assert all(a.startswith(b"HTTP/1.1 408") for a in answers[:100])
        assert set(answers[100:200]) == {b""} and all(
            a.startswith(b"HTTP/1.1 401") for a in answers[200:]
        )

    asyncio.run(scenario())
    (lease_id,) = lease(hub)
    assert push(hub, lease_id)[0] == 200
