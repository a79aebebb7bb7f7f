"""Coverage-guided fuzzing of everything that reads outside bytes, one target after another:

    pip install atheris     # CPython 3.11
    nice -n 15 python -m tests.fuzz.atheris_targets --seconds 1800

--seconds: of all targets together. Each runs in a process of its own; one that crashes says with
which input, and is in the exit status. --target: this one only, in this process.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--target", default="")
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    if arguments.target:
        fuzz(arguments.target, arguments.seconds, arguments.corpus)
        return 0
    from tests.fuzz.targets import TARGETS

    each = max(1, arguments.seconds // len(TARGETS))
    failed = []
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as corpus:
            command = [sys.executable, "-m", "tests.fuzz.atheris_targets", "--target", name]
            command += ["--seconds", str(each), "--corpus", corpus]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.findall(r"stat::number_of_executed_units:\s*(\d+)", ended.stderr)
        print(f"{name}: {found[-1] if found else '?'} executions in {each} s", flush=True)
        if ended.returncode:
            failed.append(name)
            print(ended.stderr[-3000:], flush=True)
    print("crashed: " + (", ".join(failed) or "none"), flush=True)
    return len(failed)


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Run one target until the time is up; atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["s2t_shared", "services"]):
        from tests.fuzz.targets import TARGETS, seeds
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed{number}").write_bytes(seed)
    options = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        f"-artifact_prefix={tempfile.gettempdir()}/",
    ]
    atheris.Setup(options, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
