"""What all verbs share: options, settings, progress, tables. Knows the terminal; does no work
itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from s2t_shared.config import EVERYWHERE, Config, load_config
from s2t_shared.errors import ConfigError

if TYPE_CHECKING:
    from s2t_shared.decode.vllm_options import VLLMOptions

Host = Annotated[str | None, typer.Option(help="gateway's address")]
HTTPPort = Annotated[
    int | None, typer.Option(help="of OpenAI's API and the playground; 0: any free one")
]
Port = Annotated[int | None, typer.Option(help="gateway's port; 0: any free one")]
SLM = Annotated[str | None, typer.Option(help="folder or hub id")]
LLM = Annotated[str | None, typer.Option(help="folder or hub id")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file; see cluster/laptop.yaml")
]
DataDir = Annotated[Path | None, typer.Option(help="labels, versions, Redis files")]
QUOTES = "'\""
VALUE = r"""'[^']*'|"[^"]*"|[^\s:,;]+"""
SETTING = re.compile(rf"(?<![\w.-])(--)?(?P<name>[a-z][\w-]*)=(?P<value>{VALUE})")
Json = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
Address = Annotated[str | None, typer.Option(help="host:port of a running service")]

# -- of a data set, and of models in this process --

PromptColumn = Annotated[
    str | None, typer.Option(help="default: prompt, messages, token_ids, question ...")
]
GroupColumn = Annotated[
    str | None,
    typer.Option(help="problems of one value are held out together; default: by template"),
]
PromptTemplate = Annotated[str | None, typer.Option(help="text with {column} in it")]
Chat = Annotated[bool, typer.Option("--chat", help="the text becomes a chat message")]
BatchSize = Annotated[int, typer.Option(help="with --slm: sequences in one batch")]
Dtype = Annotated[str, typer.Option(help="with --slm: float32 or bfloat16")]
Device = Annotated[str, typer.Option(help="with --slm: cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(help="with --slm: CPU threads (default: all cores)")]
TokenFile = Annotated[Path | None, typer.Option(help="file with the service's token")]


def settings(
    config: Path | None, base: Mapping[str, Any] | None = None, **overrides: Any
) -> Config:
    """The resolved settings. base: values instead of a file's; overrides: `section__name`."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(config, dotted, base=base)


def service_settings(
    config: Path | None,
    data_dir: Path | None,
    host: str | None,
    port: int | None,
    http_port: int | None,
    slm: str | None,
    llm: str | None,
) -> Config:
    """The settings of a verb that starts a service."""
    return settings(
        config,
        data_dir=data_dir,
        gateway__host=host,
        gateway__port=port,
        gateway__http_port=http_port,
        slm__model=slm,
        llm__model=llm,
    )


def settings_beside_service(
    config: Path | None, say: Callable[[str], None], **overrides: Any
) -> Config:
    """The settings of a verb that works on a service's labels and versions.

    Without a file of its own it takes the configuration of the service that runs on the data
    folder. With one it says in which shared settings the two differ.
    """
    from services.launch.service_record import find_service

    own = settings(config, **overrides)
    service = find_service(own.data_dir)
    if service is None:
        return own
    if config is None:
        say(f"using the configuration of the service at {service.address}")
        return settings(None, base=service.config, **overrides)
    for difference in service.differences(own):
        say(f"differs from the service at {service.address}: {difference}")
    return own


def as_typed(text: str, arguments: Sequence[str]) -> str:
    """An error's text, its settings as the options they were given by: mode='x' -> --mode x.

    A setting that came from a file or a default stays as it is.
    """
    given = {argument.partition("=")[0] for argument in arguments}

    def option(setting: re.Match[str]) -> str:
        name = "--" + setting["name"].replace("_", "-")
        return f"{name} {setting['value'].strip(QUOTES)}" if name in given else setting[0]

    return SETTING.sub(option, text)


def target(address: str | None, config: Path | None, token_file: Path | None) -> Any:
    from services.rpc import channels
    from services.rpc.ask_many import Target
    from services.rpc.tls import ClientTLS
    from services.rpc.tokens import Role

    resolved = settings(config)
    token = channels.read_token(token_file or resolved.security.token_file, Role.GENERATE)
    host = resolved.gateway.host
    if host in EVERYWHERE:  # where to listen; to connect, this machine's own address will do
        host = "127.0.0.1"
    address = address or f"{host}:{resolved.gateway.port}"
    return Target(address, token, ClientTLS.of(resolved.security))


def wide_console() -> Console:
    """For tables: a figure that is cut off is worse than a line that wraps."""
    return Console(width=max(150, Console().width), highlight=False)


def show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.4g}" for k, v in value.items())
        print(f"{key:>16}: {value:.4g}" if isinstance(value, float) else f"{key:>16}: {value}")


# -- the LLM's runtime ----------------------------------------------------------------------------

SLMRuntime = Annotated[str, typer.Option(help="what runs the SLM: torch, or vllm")]
LLMRuntime = Annotated[str, typer.Option(help="what runs the LLM: torch, or vllm")]
TensorParallel = Annotated[int, typer.Option(help="vllm: GPUs that share every layer of the LLM")]
Quantization = Annotated[
    str | None, typer.Option(help="of an LLM on vllm: as vLLM names it, as in fp8")
]


def slm_vllm_options(runtime: str, dtype: str) -> VLLMOptions | None:
    """How vLLM runs the SLM; None for torch.

    Raises:
        ConfigError: no such runtime.
    """
    from s2t_shared.decode.vllm_options import VLLMOptions

    _check_runtime("--slm-runtime", runtime)
    return VLLMOptions(dtype=dtype) if runtime == "vllm" else None


def llm_vllm_options(
    runtime: str, dtype: str, tensor_parallel: int, quantization: str | None
) -> VLLMOptions | None:
    """How vLLM runs the LLM; None for torch.

    Raises:
        ConfigError: no such runtime, or an option that torch does not have.
    """
    from s2t_shared.decode.vllm_options import VLLMOptions

    _check_runtime("--llm-runtime", runtime)
    if runtime == "vllm":
        return VLLMOptions(dtype=dtype, tensor_parallel=tensor_parallel, quantization=quantization)
    if tensor_parallel != 1 or quantization is not None:
        raise ConfigError("--tensor-parallel and --quantization need --llm-runtime vllm")
    return None


def _check_runtime(flag: str, runtime: str) -> None:
    if runtime not in ("torch", "vllm"):
        raise ConfigError(f"{flag}={runtime!r}: choose torch or vllm")
