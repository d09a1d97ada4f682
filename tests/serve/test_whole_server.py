"""`ldm serve` as a program: started, killed, started again; and under load."""

import argparse
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from serve_server import ASK, embedded, running, wait

import ldm
from ldm.cli.serve import make_shelf
from ldm.images.png import read_request
from ldm.runtime import resident_memory
from ldm.serve.store import Store

ROOT = Path(__file__).parents[2]


def test_a_killed_server_leaves_whole_pictures_and_tells_of_the_rest(tmp_path):
    command = [sys.executable, "-m", "ldm", "serve", "--port", "0", "--outdir", str(tmp_path)]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        address = next(found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line)))
        with httpx2.Client(base_url=address, timeout=60) as client:
            done = wait(client, client.post("/api/jobs", json={**ASK, "n": 3}).json()["id"])
            slow = [{**ASK, "n": 16, "guidance_scale": 1 + k, "steps": 4} for k in range(4)]
            left = [client.post("/api/jobs", json=each).json()["id"] for each in slow]
            while client.get(f"/api/jobs/{left[0]}").json()["progress"] < 0.3:
                time.sleep(0.01)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stderr.close()
    store = Store(tmp_path)
    told = [store.job(name) for name in left]
    assert told[-1]["status"] == "interrupted"
    assert {each["status"] for each in told} <= {"interrupted", "completed"}
    found = {each.id: each for each in store.page(500)[0]}
    assert {*done["pictures"], *(name for each in told for name in each["pictures"])} == found.keys()
    for each in found.values():
        with Image.open(each.path) as image:
            image.load()
        assert read_request(each.path).prompt == ASK["prompt"]
    store.close()


@pytest.mark.slow
def test_under_load_nothing_is_lost_doubled_or_other(tmp_path):
    """200 requests of 20 clients, a third cancelled, some bad."""
    plans = [("bad" if k % 17 == 0 else "cancelled" if k % 3 == 0 else "drawn", k) for k in range(200)]
    results, before = dict[int, dict](), []

    def ask(client, kind, k):
        fields = {**ASK, "seed": k, "prompt": f"a house {k % 5}", "width": 64 if k % 4 else 96}
        while True:
            answer = client.post("/api/jobs", json=fields | ({"steps": 0} if kind == "bad" else {}))
            if answer.status_code != 429:
                break
            time.sleep(0.05)
        if kind == "bad":
            assert answer.status_code == 400
            return
        name = answer.json()["id"]
        if kind == "cancelled":
            time.sleep(random.Random(k).random() * 0.2)
            client.post(f"/api/jobs/{name}/cancel")
        results[k] = wait(client, name)

    with running(tmp_path, capacity=16) as (first, service):

        def work(mine):
            with httpx2.Client(base_url=first.base_url, timeout=60) as client:
                for kind, k in mine:
                    ask(client, kind, k)

        wait(first, first.post("/api/jobs", json={**ASK, "n": 8}).json()["id"])
        before.append(resident_memory())
        threads = [threading.Thread(target=work, args=(plans[k::20],)) for k in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = resident_memory()
        kinds = Counter(kind for kind, _ in plans)
        assert len(results) == kinds["drawn"] + kinds["cancelled"]
        names = [name for told in results.values() for name in told["pictures"]]
        assert len(names) == len(set(names))
        assert {each.id for each in service.store.page(500)[0]} >= set(names)
        pipe = ldm.load()
        for kind, k in plans:
            if kind != "drawn":
                continue
            told = results[k]
            assert (told["status"], len(told["pictures"])) == ("completed", 1), told
            if k % 10 == 1:
                request = told["request"]
                own = pipe(
                    request["prompt"], request["height"], request["width"], 2, seed=k, sampler="euler"
                ).images[0]
                levels = np.asarray(Image.open(service.path_of(told["pictures"][0])), int)
                assert abs(levels - np.asarray(own, int)).max() <= 1
        states = Counter(results[k]["status"] for kind, k in plans if kind == "cancelled")
        assert states["cancelled"] + states["completed"] == kinds["cancelled"]
        assert after - before[0] < 100 * 2**20
        assert not service.queue.waiting
        assert not service.queue.drawing


def test_the_model_is_read_in_a_thread_that_ends(monkeypatch):
    """What has computed keeps workers, and those of the thread that draws would no longer wait awake."""
    read_in = []
    monkeypatch.setattr(
        "ldm.cli.models.load", lambda args: read_in.append((threading.current_thread(), args)) or embedded()
    )
    args = argparse.Namespace(models=None, max_models=2, controlnet_dir=None, device=None)
    shelf = make_shelf(args, "cpu")
    ((thread, given),) = read_in
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    assert given.device == "cpu"
    assert shelf.default == embedded().name
