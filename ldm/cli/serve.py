"""`ldm serve`: a server on this machine that draws what it is asked for over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.parser import count
from ldm.cli.provenance import add_mark_flags, marks
from ldm.cli.terminal import echo
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.serve.models import Shelf
    from ldm.serve.service import Service

KEY = "LDM_API_KEY"
STYLES = Path("styles.csv")
CONNECTIONS = 256  # at once


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen at; others than this machine need a key",
    )
    add("-p", "--port", type=int, default=7860, metavar="N", help="0: any that is free (default: 7860)")
    add(
        "--outdir",
        type=Path,
        default=Path("outputs/serve"),
        metavar="FOLDER",
        help="pictures, uploads and their index (default: outputs/serve)",
    )
    add(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="models that requests may name, safetensors only; VAEs in its vae/",
    )
    add(
        "--styles-file",
        type=Path,
        metavar="FILE",
        help="of texts that requests may name (default: styles.csv, where there is one)",
    )
    add(
        "--controlnet-dir",
        type=Path,
        metavar="FOLDER",
        help="ControlNets and IP-Adapters that requests may name, safetensors only; what encodes pictures "
        "in its image_encoder/",
    )
    add("--max-models", type=count, default=2, metavar="N", help="in memory at once (default: 2)")
    group = parser.add_argument_group("who may ask")
    add = group.add_argument
    add(
        "--api-key",
        metavar="KEY",
        help=f"bearer or basic password; {KEY} in the environment shows less of it",
    )
    add(
        "--allow-host", action="append", default=[], metavar="NAME", help="by which it is reached, repeatable"
    )
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may ask, e.g. https://a.example",
    )
    group = parser.add_argument_group("how much")
    add = group.add_argument
    add("--max-queue", type=count, default=64, metavar="N", help="requests that wait (default: 64)")
    add("--max-batch", type=count, default=8, metavar="N", help="pictures drawn together (default: 8)")
    add("--max-side", type=count, default=2048, metavar="PIXELS", help="of a picture (default: 2048)")
    add("--max-steps", type=count, default=150, metavar="N", help="of a request (default: 150)")
    add("--max-pictures", type=count, default=16, metavar="N", help="of a request (default: 16)")
    add("--max-body", type=count, default=32, metavar="MIB", help="of an HTTP request (default: 32)")
    add("--log-prompts", action="store_true", help="say in the log what was asked (default: that it was)")
    add_mark_flags(parser.add_argument_group("what pictures say of their origin").add_argument)
    add_model_flags(parser)
    add_common_flags(parser)


def serve(args: argparse.Namespace) -> int:
    """Load the model, then answer until Ctrl-C."""
    key = args.api_key or os.environ.get(KEY) or None
    check_host(args.host, key)
    try:
        import uvicorn

        from ldm.serve.app import create_app
        from ldm.serve.guard import Rules
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'ldm[server]'") from None
    level = logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", stream=sys.stderr)
    service = make_service(args)
    rules = Rules(
        key,
        tuple(name.lower() for name in (*args.allow_host, args.host)),
        tuple(args.cors),
        service.limits.body,
        secret=service.secret,
    )
    if service.store.interrupted:
        echo(args, f"{service.store.interrupted} jobs of before were interrupted: their status says so")
    # Its own log of requests would hold what is searched for.
    config = uvicorn.Config(
        create_app(service, rules),
        host=args.host,
        port=args.port,
        log_level="warning" if args.quiet else "info",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run()
    return 0


def check_host(host: str, key: str | None) -> None:
    """Raise UserError for listening to other machines without a key."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and key is None:
        raise UserError(
            f"--host {host} lets other machines ask: give a key (--api-key, or {KEY}), or leave --host out"
        )


def make_service(args: argparse.Namespace) -> Service:
    """The queue, the models of each device and the store. Raises UserError."""
    from ldm.prompts.styles import read_styles
    from ldm.serve.limits import Limits
    from ldm.serve.service import Service
    from ldm.serve.store import Store

    for flag, folder in (("models", args.models), ("controlnet-dir", args.controlnet_dir)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"--{flag} {folder} is no folder")
    store = Store(args.outdir, marks(args))
    limits = Limits(
        side=args.max_side,
        steps=args.max_steps,
        pictures=args.max_pictures,
        body=args.max_body * 2**20,
    )
    devices = [None] if args.device is None else args.device.split(",")
    shelves = [make_shelf(args, device) for device in devices]
    styles = read_styles(args.styles_file or STYLES) if args.styles_file or STYLES.exists() else {}
    return Service(shelves, store, limits, args.max_queue, args.max_batch, args.log_prompts, styles)


def make_shelf(args: argparse.Namespace, device: str | None) -> Shelf:
    """The models of one device: `--device cuda:0,cuda:1` names several."""
    from ldm.cli.models import load
    from ldm.runtime import apart
    from ldm.serve.models import Shelf

    def read(path: Path) -> Pipeline:
        import ldm

        pipe = ldm.load(path, device=device, dtype=args.dtype)
        return pipe if args.safety_checker is None else pipe.with_safety_checker(args.safety_checker or None)

    # The worker's thread draws, so this one is not to have computed anything.
    default = apart(lambda: load(argparse.Namespace(**{**vars(args), "device": device})))
    return Shelf(default, read, args.models, args.max_models, args.controlnet_dir)
