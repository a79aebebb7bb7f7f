"""Reads Prometheus' text as tests want it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from services.metrics.registry import Registry

Series = tuple[str, frozenset[tuple[str, str]]]


@dataclass
class Scrape:
    """The samples of one look at one process or several."""

    samples: dict[Series, float] = field(default_factory=dict)

    @classmethod
    def of(cls, *texts: str) -> Scrape:
        found: dict[Series, float] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    found[sample.name, frozenset(sample.labels.items())] = sample.value
        return cls(found)

    @classmethod
    def now(cls, registry: Registry) -> Scrape:
        return cls.of(registry.text().decode())

    def sum(self, name: str, **labels: str) -> float:
        """Of all series of this name with these labels."""
        wanted = labels.items()
        return sum(v for (n, has), v in self.samples.items() if n == name and wanted <= has)

    @property
    def labels(self) -> Mapping[str, set[str]]:
        """The names of the labels of each metric."""
        found: dict[str, set[str]] = {}
        for name, has in self.samples:
            found.setdefault(name, set()).update(label for label, _ in has)
        return found
