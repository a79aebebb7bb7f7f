"""The harness's own command line, with `--model s2t` known: 0.4.13 reads no entry points yet."""

from lm_eval.__main__ import cli_evaluate

import services.harness.model  # noqa: F401 - registers it

cli_evaluate()
