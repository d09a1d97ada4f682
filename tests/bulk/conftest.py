"""A table of a few quick rows, the command on a tiny model, and an S3 server on this machine."""

import functools

import boto3
import pytest
from bulk_rows import ROWS, write_jsonl
from moto.server import ThreadedMotoServer

import ldm
from ldm.cli import main


@pytest.fixture
def table(tmp_path):
    return write_jsonl(tmp_path / "requests.jsonl", ROWS)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Reading a tiny model takes longer than a picture."""
    read = ldm.load
    ldm.load = functools.cache(read)
    yield
    ldm.load = read


@pytest.fixture
def bulk(tiny_folder, capsys):
    """The command on a tiny model: its exit code, and all that it said."""

    def run(*argv, model=tiny_folder, dtype="fp32"):
        code = main(["bulk", *map(str, argv), "-m", str(model), "--dtype", dtype])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture(scope="session")
def s3_server():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """The URL of a new bucket, over HTTP; what finds it is in the environment, as users have it."""
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3").create_bucket(Bucket="drawn")
    yield "s3://drawn"
    made.objects.all().delete()
    made.delete()
