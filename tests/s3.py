"""An S3 server on this machine, behind a proxy through which things can go wrong."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from shards import remote
from tests.prepare.proxy import Proxy

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """The proxy of a new server, to which every S3 client of this process talks meanwhile."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with (
        Proxy(server.get_host_and_port()) as proxy,
        mock.patch.dict(os.environ, CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.url}),
    ):
        yield proxy
        remote.client.cache_clear()
    server.stop()
