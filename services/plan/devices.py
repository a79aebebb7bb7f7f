"""Devices as their makers publish them, and what is assumed about how well they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from s2t_shared.errors import ConfigError

# -- assumptions, said in every plan --------------------------------------------------------------

BANDWIDTH_SHARE = 0.75  # of the published memory bandwidth that reading weights and KV gets
FLOPS_SHARE = 0.5  # of the published dense bfloat16 rate that a forward of many tokens gets
CPU = "CPU core"


@dataclass(frozen=True)
class Device:
    """One GPU, or one CPU core.

    free_gib: memory before anything is loaded, less than the label says; None: not checked.
    bandwidth: published, bytes a second. flops: published, dense, of bfloat16 (a core: of float32),
    a second. price: dollars an hour, assumed until `--gpu-cost` says otherwise.
    """

    name: str
    free_gib: float | None
    bandwidth: float
    flops: float
    price: float

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU


# GPUs by Ray's names. A core's rates were measured once (services/bench/README.md). Prices are
# round figures of rented cards: give your own.
DEVICES = {
    device.name: device
    for device in (
        Device("H100", 78.0, 3.35e12, 989e12, 3.00),
        Device("H200", 139.0, 4.8e12, 989e12, 4.00),
        Device("A100-80G", 78.0, 2.04e12, 312e12, 1.80),
        Device("A100-40G", 39.0, 1.56e12, 312e12, 1.30),
        Device("L4", 22.0, 0.30e12, 121e12, 0.70),
        Device(CPU, None, 10e9, 70e9, 0.04),
    )
}
ALIASES = {"A100": "A100-40G", "cpu": CPU, "CPU": CPU}


def device_named(name: str, setting: str) -> Device:
    """Raises ConfigError: not in the table; `setting` says where the name came from."""
    found = DEVICES.get(ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            f"{setting}={name!r}: no specification of this device is known here; choose from "
            f"{', '.join(DEVICES)}, or measure it with `s2t bench capacity` and give the nearest"
        )
    return found


def priced(device: Device, prices: dict[str, float]) -> Device:
    """The device at the operator's price, where one is given."""
    return replace(device, price=prices.get(device.name, device.price))


def parse_prices(text: str) -> dict[str, float]:
    """ "H100=2.5,L4=0.6" -> dollars an hour, by device.

    Raises:
        ConfigError: not of this form, an unknown device or a price below zero.
    """
    prices: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, amount = part.partition("=")
        device = device_named(name.strip(), "--gpu-cost")
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if not 0 <= price < float("inf"):
            raise ConfigError(
                f"--gpu-cost={text!r}: give dollars an hour by device, as in H100=2.5,L4=0.6"
            )
        prices[device.name] = price
    return prices
