"""Bulk drawing: a table of requests becomes a folder, or a bucket, of pictures, whatever dies on the way.

rows.py      a table -> rows: an id, and the fields of a request
plan.py      rows -> batches, by the table alone -> pieces, which workers share by rank and world
mapper.py    rows of a batch -> pictures, or why there is none
worker.py    pieces -> files (`storage.py`, `shards.py`) -> records in a log of its own (`records.py`)
finish.py    logs -> manifest.parquet and failed.parquet
on_ray.py    workers that are actors of Ray Data; on_slurm.py: jobs of Slurm

simulation.py, capacity.py: how long that takes on many workers, as a model
"""
