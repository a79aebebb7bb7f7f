"""The bundled tiny pair: an SLM and an LLM small enough to live in the repository.

`problems` makes the task, `train` makes the weights; `slm/` and `llm/` beside this file are
what `python -m s2t_shared.bundled.train` wrote. Importing this package loads no torch.
"""

from pathlib import Path

BUNDLED = "bundled"  # names the pair wherever a model is named
PAIR_DIR = Path(__file__).parent
SLM_DIR = PAIR_DIR / "slm"
LLM_DIR = PAIR_DIR / "llm"
