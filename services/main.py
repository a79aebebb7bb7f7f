"""The entry of the `s2t` command. It says what to install when only the client is installed."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from services.cli.app import run
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("services", "s2t_shared"):
            raise
        sys.exit(
            f"s2t: {error.name} is not installed; the command needs the server extra: "
            "pip install 's2t[serve]'"
        )
    run()


if __name__ == "__main__":
    main()
