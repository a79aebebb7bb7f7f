"""A gateway, a proposer and a selector over the bundled pair, in one process without Ray:

    python -m tests.fuzz.server FOLDER TOKEN_FILE

Prints the gateway's and the selector's address, and runs until its input ends."""

from __future__ import annotations

import asyncio
import logging
import sys

from s2t_shared.config import load_config
from services.serve import build, build_gateway
from services.serve.garbage import spare_what_is_loaded


async def main(folder: str, token_file: str) -> None:
    settings = {
        "data_dir": folder,
        "gateway.port": 0,
        "gateway.max_requests_per_client": 0,
        "gateway.max_new_tokens": 64,
        "defaults.max_new_tokens": 32,
        "calibration.count": 8,
        "calibration.max_new_tokens": 8,
        "security.token_file": token_file,
    }
    config = load_config(overrides=settings, environment={})
    selector = build.selector_server(config)
    await selector.start()
    address = f"127.0.0.1:{selector.port}"
    config = load_config(overrides={**settings, "selector.addresses": [address]}, environment={})
    proposers = await build.proposer_service(config)
    gateway = build_gateway.gateway_server(config, proposers)
    spare_what_is_loaded()
    await gateway.start()
    print(f"127.0.0.1:{gateway.port} {address}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    asyncio.run(main(*sys.argv[1:]))
