"""What the server does under load: many clients at once, on this machine alone.

    python benchmarks/serve.py                # 50 clients for two minutes: make bench-serve
    python benchmarks/serve.py --seconds 20 --out /tmp/serve.md

Starts a server of its own at 127.0.0.1, and writes docs/benchmarks/serve.md. Each client sends a photo,
waits for the answer, and sends the next one; when told that the server is busy, it waits as long as
`Retry-After` says. Exits with 1 where anything else than an answer or 'busy' came back.
"""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import click
import httpx
import numpy as np

import howyouseeme as hysm

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ("cat", "coffee", "rocket")
CALLS = ("/v1/explain", "/v1/explain", "/v1/explain?target=tabby", "/v1/explain?target=top3",
         "/v1/detect", "/v1/propose")  # fmt: skip


@click.command()
@click.option("--clients", default=50, show_default=True)
@click.option("--seconds", default=120.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs/benchmarks/serve.md")
def main(clients: int, seconds: float, out: Path) -> None:
    """Load a server of its own, and write what happened."""
    code = "from howyouseeme.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--no-page"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith("howyouseeme is at http://127.0.0.1:"):
            raise click.ClickException(f"the server did not start: {line}")
        try:
            load = Load(line.split()[3], server.pid)
            asyncio.run(load.run(clients, seconds))
        finally:
            server.terminate()
    out.write_text(load.page(clients, seconds))
    click.echo(out.read_text())
    if load.failed:
        raise click.ClickException(f"{len(load.failed)} requests failed: {load.failed[:3]}")


class Load:
    """Many clients of one server, and what they saw."""

    def __init__(self, home: str, server: int) -> None:
        self.home, self.server = home, server
        self.took: dict[str, list[float]] = {call: [] for call in CALLS}
        self.busy: list[float] = []
        self.health: list[float] = []
        self.memory: list[float] = []  # MiB, as time passes
        self.failed: list[str] = []
        self.together = 0.0

    async def run(self, clients: int, seconds: float) -> None:
        limits = httpx.Limits(max_connections=clients + 2)
        async with httpx.AsyncClient(base_url=self.home, timeout=120, limits=limits) as http:
            for call in CALLS:  # what is made at the first request shall not count
                await self._ask(http, call, 0)
            self.__init__(self.home, self.server)  # type: ignore[misc]
            begun = time.monotonic()
            watching = [asyncio.create_task(one) for one in (self._watch(http), self._weigh())]
            await asyncio.gather(*(self._client(http, n, begun + seconds) for n in range(clients)))
            for one in watching:
                one.cancel()
            metrics = await self._metrics(http)
            count = metrics["howyouseeme_batch_size_count"]
            self.together = metrics["howyouseeme_batch_size_sum"] / count

    async def _client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        turn = number
        while time.monotonic() < until:
            pause = await self._ask(http, CALLS[turn % len(CALLS)], turn)
            turn += 1
            await asyncio.sleep(min(pause, max(0.0, until - time.monotonic())))

    async def _ask(self, http: httpx.AsyncClient, call: str, turn: int) -> float:
        """Seconds to wait before the next request."""
        name = SAMPLES[turn % len(SAMPLES)]
        files = {"photo": (f"{name}.jpg", PHOTOS[name])}
        begun = time.monotonic()
        try:
            answer = await http.post(call, files=files)
        except httpx.HTTPError as error:
            self.failed.append(f"{call}: {type(error).__name__}")
            return 1.0
        took = time.monotonic() - begun
        if answer.status_code == 200:
            self.took[call].append(took)
        elif answer.status_code == 503 and "retry-after" in answer.headers:
            self.busy.append(took)
            return float(answer.headers["retry-after"])
        else:
            self.failed.append(f"{call}: {answer.status_code} {answer.text[:200]}")
        return 0.0

    async def _watch(self, http: httpx.AsyncClient) -> None:
        while True:
            asked = time.monotonic()
            await http.get("/healthz")
            self.health.append(time.monotonic() - asked)
            await asyncio.sleep(1)

    async def _weigh(self) -> None:
        """Look often: what a batch takes comes and goes, and what stays is seen between two of them."""
        while True:
            pages = int(Path(f"/proc/{self.server}/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            await asyncio.sleep(0.02)

    async def _metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        lines = (await http.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def page(self, clients: int, seconds: float) -> str:
        """The page of the docs."""
        rows = [*self.took.items(), ("busy (503)", self.busy), ("GET /healthz", self.health)]
        answered = sum(map(len, self.took.values()))
        thirds = np.array_split(np.array(self.memory), 3)
        failed = Counter(self.failed)
        return "\n".join(
            [
                "# The server under load",
                "",
                "Written by `make bench-serve`.",
                "",
                f"{clients} clients at once for {seconds:g} s on {platform.machine()} with "
                f"{os.cpu_count()} cores, which ran the clients too; {date.today()}, howyouseeme "
                f"{hysm.__version__}, efficientnet-lite0 on the CPU. Each client sends the next photo "
                "once it has its answer; told that the server is busy, it waits as long as it is told.",
                "",
                "| | answers | median s | 95 % s | longest s |",
                "| --- | --- | --- | --- | --- |",
                *(_row(name, took) for name, took in rows),
                "",
                f"- Answered: {answered}, {answered / seconds:.1f} a second; on average "
                f"{self.together:.1f} were worked on together.",
                f"- Told that it is busy: {len(self.busy)}.",
                f"- Failed otherwise: {len(self.failed)}{f' ({dict(failed)})' if failed else ''}.",
                "",
                "Resident memory, MiB. Each batch takes some and gives it back when it is done: what stays is "
                "the least of each third of the time.",
                "",
                "| | least | average | most |",
                "| --- | --- | --- | --- |",
                *(
                    f"| {name} third | {part.min():.0f} | {part.mean():.0f} | {part.max():.0f} |"
                    for name, part in zip(("first", "second", "last"), thirds, strict=True)
                ),
                "",
            ]
        )


def _row(name: str, took: list[float]) -> str:
    if not took:
        return f"| {name} | 0 | | | |"
    middle, most = np.percentile(took, [50, 95])
    return f"| {name} | {len(took)} | {middle:.2f} | {most:.2f} | {max(took):.2f} |"


PHOTOS = {name: hysm.sample_photo(name).read_bytes() for name in SAMPLES}


if __name__ == "__main__":
    main()
