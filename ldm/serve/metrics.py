"""`/metrics` in Prometheus's text format, version 0.0.4."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from ldm.runtime import resident_memory
from ldm.serve.service import Service
from ldm.serve.ticket import State


def exposition(service: Service, answers: Counter[str]) -> str:
    """All metrics, a line each; `answers` counts HTTP answers by status."""
    return "".join(f"{line}\n" for line in _lines(service, answers))


def _lines(service: Service, answers: Counter[str]) -> Iterator[str]:
    counts, queue = service.counts, service.queue
    yield from _metric(
        "ldm_jobs_accepted_total", "counter", "Jobs that were let into the queue.", counts["jobs"]
    )
    yield from _metric(
        "ldm_jobs_refused_total", "counter", "Jobs for which there was no room.", counts["refused"]
    )
    states = {state.value: counts[state.value] for state in State if state.is_over}
    yield from _labelled("ldm_jobs_finished_total", "Jobs that are over.", "status", states)
    yield from _metric("ldm_pictures_total", "counter", "Pictures drawn.", counts["pictures"])
    yield from _metric(
        "ldm_job_seconds_total",
        "counter",
        "From the beginning of jobs to their ends.",
        round(service.seconds, 3),
    )
    yield from _metric("ldm_queue_waiting", "gauge", "Jobs that wait.", len(queue.waiting))
    yield from _metric("ldm_queue_drawing", "gauge", "Jobs that are drawn.", len(queue.drawing))
    yield from _metric("ldm_queue_capacity", "gauge", "Jobs that may wait.", queue.capacity)
    yield from _metric("ldm_models_loaded", "gauge", "Models in memory.", len(service.shelf.loaded))
    yield from _metric("ldm_gallery_pictures", "gauge", "Pictures in the gallery.", service.store.count)
    yield from _metric("process_resident_memory_bytes", "gauge", "Memory of the server.", resident_memory())
    yield from _metric(
        "ldm_uptime_seconds", "gauge", "Since the server started.", round(time.time() - service.began, 3)
    )
    yield from _labelled("ldm_http_answers_total", "HTTP answers.", "status", dict(answers))


def _metric(name: str, kind: str, words: str, value: float) -> Iterator[str]:
    yield from (f"# HELP {name} {words}", f"# TYPE {name} {kind}", f"{name} {value}")


def _labelled(name: str, words: str, label: str, values: dict[str, int]) -> Iterator[str]:
    yield from (f"# HELP {name} {words}", f"# TYPE {name} counter")
    yield from (f'{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items()))
