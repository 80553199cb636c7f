"""The sections about what runs: models, nodes and routers."""

from __future__ import annotations

import os
from pathlib import Path

from topology.model import (
    GIVE_MBPS,
    Backend,
    Device,
    Dtype,
    Model,
    Node,
    Placement,
    Role,
    Router,
    Site,
    WeightForm,
)
from topology.reading.fields import Fields
from topology.reading.listeners import Listeners, read_address
from topology.reading.names import Names, check_hex
from topology.reading.yaml_nodes import Entry, shorten

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native", "triton")
WEIGHT_FORMS: tuple[WeightForm, ...] = ("plain", "resident", "auto")
ROLES: tuple[Role, ...] = ("prefill", "decode")

MAX_THREADS = 4096  # guess: more cores than any host has
MAX_TOKENS = 2**31 - 1  # slots and positions are 32-bit numbers somewhere in every engine
MAX_GB = 1e6  # guess: a petabyte, more than a host has of memory or disk
MAX_WARM_PER_MIN = 1e6  # guess: more than one region asks for
MAX_COOL_S = 7 * 86_400.0  # guess: a week; what shall stay for ever is pinned
MAX_GIVE_MBPS = 1e6  # guess: 1 Tbit/s, more than a host's ports carry

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
    "weights",
    "memory_gb",
    "pinned",
    "disk_gb",
    "bundles",
    "give_mbps",
)
_ROUTER = ("site", "listen")
_PLACEMENT = ("warm_per_min", "cool_after_s")


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
        served = _models_of(fields, names, site, models)
        backend = fields.choice("backend", BACKENDS, "auto")
        nodes[name] = Node(
            name=name,
            site=site.name if site else "",
            roles=frozenset(fields.choices("roles", ROLES, ROLES)),
            models=served,
            mesh=read_address(fields, "mesh"),
            kv=read_address(fields, "kv"),
            device=fields.choice("device", DEVICES, "cpu"),
            hardware=fields.text("hardware", ""),
            store=_store(fields, folder),
            threads=fields.integer_or_none("threads", 1, MAX_THREADS),
            backend=backend,
            kv_tokens=fields.integer("kv_tokens", 1, MAX_TOKENS, 16384),
            batch_invariant=fields.flag("batch_invariant", False),
            weights=_weights(fields, backend),
            memory_gb=fields.number_or_none("memory_gb", 0, MAX_GB, above=True),
            pinned=_pinned(fields, names, served),
            disk_gb=fields.number_or_none("disk_gb", 0, MAX_GB, above=True),
            bundles=read_address(fields, "bundles"),
            give_mbps=fields.number("give_mbps", 0, MAX_GIVE_MBPS, GIVE_MBPS, above=True),
        )
        listeners.claim(name, "mesh", nodes[name].mesh, fields)
        listeners.claim(name, "kv", nodes[name].kv, fields)
        listeners.claim(name, "bundles", nodes[name].bundles, fields)
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


def _pinned(fields: Fields, names: Names, served: tuple[str, ...]) -> tuple[str, ...]:
    """Models that stay in memory; each is one that the node serves."""
    given = fields.texts("pinned", empty=True) or []
    for model, line in given:
        names.check_model(model, line)
        if model in names.models and model not in served:
            message = f"{model!r} is pinned here, and this node does not serve it"
            fields.problems.add(line, message, "add it to models, or remove it from pinned")
    return tuple(model for model, _ in given)


def _weights(fields: Fields, backend: str) -> WeightForm:
    """How weights lie in memory; the readable operations multiply plain ones only."""
    weights, found = fields.choice("weights", WEIGHT_FORMS, "auto"), fields.entry("weights")
    if found is not None and weights == "resident" and backend == "reference":
        message = "weights cannot be 'resident' with backend 'reference'"
        fields.problems.add(found.line, message, "leave one of them out")
    return weights


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


def read_placement(top: Fields) -> Placement:
    """When models follow demand; absent values keep the built-in ones."""
    usual = Placement()
    entry = top.entry("placement")
    if entry is None:
        return usual
    fields = Fields(entry, _PLACEMENT, top.problems)
    return Placement(
        warm_per_min=fields.number("warm_per_min", 0, MAX_WARM_PER_MIN, usual.warm_per_min),
        cool_after_s=fields.number("cool_after_s", 0, MAX_COOL_S, usual.cool_after_s),
    )
