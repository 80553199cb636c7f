"""Names: how they are spelt, and which of them a file declares."""

from __future__ import annotations

import re
from collections.abc import Collection

from topology.reading.fields import Fields
from topology.reading.problems import Problems
from topology.reading.yaml_nodes import Entry, Mapping, describe, shorten

# Names travel in certificates, DNS labels of the registry, HTTP headers and metrics.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")  # clients say "org/Model-8B"
HEX_256 = re.compile(r"[0-9a-f]{64}")


class Names:
    """What the file declares: sites, models, nodes, routers, tenants by name, and the regions.

    A name counts as declared once its key is there, even if what follows is wrong, so that one
    mistake in a site is not followed by a dangling reference in each of its nodes.
    """

    def __init__(self, top: Fields) -> None:
        self.problems = top.problems
        self.sites = self._declared(top, "sites", NAME, required=True)
        self.models = self._declared(top, "models", MODEL_NAME, required=True)
        self.nodes = self._declared(top, "nodes", NAME, required=True)
        self.routers = self._declared(top, "routers", NAME)
        self.tenants = self._declared(top, "tenants", NAME)
        self.regions: tuple[str, ...] = ()  # sorted; filled in by reading the sites
        for name in self.nodes.keys() & self.routers.keys():
            message = f"{name!r} is a node (line {self.nodes[name].line}) and a router"
            self.problems.add(self.routers[name].line, message, "rename one of them")

    def _declared(
        self, top: Fields, section: str, pattern: re.Pattern[str], *, required: bool = False
    ) -> dict[str, Entry]:
        entry = top.entry(section, required=required)
        if entry is None:
            return {}
        if not isinstance(entry.value, Mapping):
            message = f"{section} must be a map from names, found {describe(entry.value)}"
            self.problems.add(entry.line, message, "write NAME: {...}")
            return {}
        if required and not entry.value.entries:
            self.problems.add(entry.line, f"{section} is empty", "a mesh needs at least one")
        for name, found in entry.value.entries.items():
            check_name(name, found.line, self.problems, pattern)
        return entry.value.entries

    def site_of(self, fields: Fields) -> str:
        """The declared site that ``fields`` names."""
        site = fields.text("site")
        if entry := fields.entry("site"):
            self.check_site(site, entry.value.line)
        return site

    def check_site(self, name: str, line: int) -> None:
        """Note a dangling site name."""
        _check_known(name, line, "site", self.sites, self.problems)

    def check_model(self, name: str, line: int) -> None:
        """Note a dangling model name."""
        _check_known(name, line, "model", self.models, self.problems)

    def regions_of(self, fields: Fields) -> frozenset[str]:
        """The residency rule in ``fields``; each region holds some site; empty means anywhere."""
        regions = fields.texts("regions") or []
        for region, line in regions:
            _check_known(region, line, "region", self.regions, self.problems)
        return frozenset(region for region, _ in regions)


def check_name(name: str, line: int, problems: Problems, pattern: re.Pattern[str] = NAME) -> None:
    """Note a name that certificates, headers or the registry could not carry."""
    if not pattern.fullmatch(name):
        extra = " . _ - : / @ +" if pattern is MODEL_NAME else " . _ -"
        hint = f"use letters, digits and{extra}, beginning with a letter or digit"
        problems.add(line, f"{shorten(name)!r} cannot be a name", hint)


def check_hex(key: str, text: str, line: int, problems: Problems) -> bool:
    """True for 256 bits as lower-case hex; anything else is noted."""
    if HEX_256.fullmatch(text):
        return True
    hint = "write 64 hex digits, lower case"
    if HEX_256.fullmatch(text.lower()):
        hint = "write it in lower case"
    elif not re.fullmatch(r"[0-9a-f]*", text):
        hint += "; a prefix such as sha256: is left out"
    found = f"{len(text)} characters" if len(text) != 64 else "other characters"
    problems.add(line, f"{key} must be 256 bits in hex, found {found}", hint)
    return False


def _check_known(
    name: str, line: int, what: str, known: Collection[str], problems: Problems
) -> None:
    # An empty name or an empty set follows from a mistake that is noted already.
    if name and known and name not in known:
        problems.add_misspelt(line, f"there is no {what} {shorten(name)!r}", name, known)
