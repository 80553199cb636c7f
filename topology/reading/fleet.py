"""The sections about what runs: models, nodes and routers."""

from __future__ import annotations

import os
from pathlib import Path

from topology.model import Backend, Device, Dtype, Model, Node, Role, Router, Site
from topology.reading.fields import Fields
from topology.reading.listeners import Listeners, read_address
from topology.reading.names import Names, check_hex
from topology.reading.yaml_nodes import Entry, shorten

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native")
ROLES: tuple[Role, ...] = ("prefill", "decode")

MAX_THREADS = 4096  # guess: more cores than any host has
MAX_TOKENS = 2**31 - 1  # slots and positions are 32-bit numbers somewhere in every engine

_MODEL = ("source", "digest", "dtype", "context_tokens", "regions")
_NODE = (
    "site",
    "roles",
    "models",
    "mesh",
    "kv",
    "device",
    "hardware",
    "store",
    "threads",
    "backend",
    "kv_tokens",
    "batch_invariant",
)
_ROUTER = ("site", "listen")


def read_models(names: Names) -> dict[str, Model]:
    """All models."""
    return {name: _model(name, entry, names) for name, entry in names.models.items()}


def _model(name: str, entry: Entry, names: Names) -> Model:
    fields = Fields(entry, _MODEL, names.problems)
    digest = fields.text_or_none("digest")
    if digest is not None and (found := fields.entry("digest")):
        check_hex("digest", digest, found.value.line, names.problems)
    return Model(
        name=name,
        source=fields.text_or_none("source"),
        digest=digest,
        dtype=fields.choice("dtype", DTYPES, "bfloat16"),
        context_tokens=fields.integer_or_none("context_tokens", 1, MAX_TOKENS),
        regions=names.regions_of(fields),
    )


def read_nodes(
    names: Names,
    sites: dict[str, Site],
    models: dict[str, Model],
    listeners: Listeners,
    folder: Path,
) -> dict[str, Node]:
    """All nodes; a relative store path is taken from ``folder``."""
    nodes: dict[str, Node] = {}
    for name, entry in names.nodes.items():
        fields = Fields(entry, _NODE, names.problems)
        site = sites.get(names.site_of(fields))
        nodes[name] = Node(
            name=name,
            site=site.name if site else "",
            roles=frozenset(fields.choices("roles", ROLES, ROLES)),
            models=_models_of(fields, names, site, models),
            mesh=read_address(fields, "mesh"),
            kv=read_address(fields, "kv"),
            device=fields.choice("device", DEVICES, "cpu"),
            hardware=fields.text("hardware", ""),
            store=_store(fields, folder),
            threads=fields.integer("threads", 1, MAX_THREADS, 1),
            backend=fields.choice("backend", BACKENDS, "auto"),
            kv_tokens=fields.integer("kv_tokens", 1, MAX_TOKENS, 16384),
            batch_invariant=fields.flag("batch_invariant", False),
        )
        listeners.claim(name, "mesh", nodes[name].mesh, fields)
        listeners.claim(name, "kv", nodes[name].kv, fields)
    return nodes


def _models_of(
    fields: Fields, names: Names, site: Site | None, models: dict[str, Model]
) -> tuple[str, ...]:
    """The named models, or all that may run in the site's region."""

    def admitted(model: str) -> bool:
        regions = models[model].regions if model in models else frozenset()
        return site is None or not regions or site.region in regions

    given = fields.texts("models")
    if given is None:
        every = tuple(model for model in models if admitted(model))
        if not every and models:
            fields.problems.add(fields.line, "residency rules keep every model off this node")
        return every
    for model, line in given:
        names.check_model(model, line)
        if site is not None and not admitted(model):
            allowed = ", ".join(sorted(models[model].regions))
            message = f"{model!r} may run in {allowed}, and site {site.name!r} is in {site.region}"
            fields.problems.add(line, message, "remove it here, or widen the model's regions")
    return tuple(model for model, _ in given)


def _store(fields: Fields, folder: Path) -> Path | None:
    text = fields.text_or_none("store")
    found = fields.entry("store")
    if text is None or found is None:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError as exc:  # ~somebody without a home
        message = f"store {shorten(text)!r} cannot be resolved: {exc}"
        fields.problems.add(found.value.line, message, "write the whole path")
        return None
    return Path(os.path.abspath(folder / path))


def read_routers(names: Names, listeners: Listeners) -> dict[str, Router]:
    """All routers."""
    routers: dict[str, Router] = {}
    for name, entry in names.routers.items():
        fields = Fields(entry, _ROUTER, names.problems)
        routers[name] = Router(name, names.site_of(fields), read_address(fields, "listen"))
        listeners.claim(name, "listen", routers[name].listen, fields)
    return routers
