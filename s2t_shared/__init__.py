"""The Select-to-Think product: method, engine, labels, distillation. Runs without Ray or gRPC.

    from s2t_shared import Pair        an SLM and an LLM in this process, ready to generate

`README.md` beside this file says what the method is, which laws hold, what each package is about
and how a request lives. `tests/test_layout.py` says who may import whom.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2t_shared.pair import Pair

__all__ = ["Pair"]


def __getattr__(name: str) -> Any:
    """`Pair`, when it is asked for. The client imports this package and has no torch."""
    if name == "Pair":
        from s2t_shared.pair import Pair

        return Pair
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
