"""Drawing for others: a queue, pictures kept on disk, and the HTTP APIs over them. `ldm serve` starts it."""
