"""What a correct topology file says, the shipped examples, and the way back to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topology_text import VALID, with_line

import topology.model as tm
from topology.load import dump_topology, load_topology, parse_topology

EXAMPLES = Path(tm.__file__).parent / "examples"


def test_every_field_arrives() -> None:
    read = parse_topology(VALID, "/etc/mesh/mesh.yaml")
    assert read == tm.Topology(
        mesh="test",
        models={
            "small": tm.Model("small", "pypi:small", "00" * 31 + "aa", "float32", 2048),
            "local": tm.Model("local", regions=frozenset({"eu"})),
        },
        sites={
            "fra": tm.Site("fra", tm.Position(50.03, 8.57), "eu", "Frankfurt"),
            "iad": tm.Site("iad", tm.Position(38.95, -77.46), "na"),
        },
        nodes={
            "fra-1": tm.Node(
                name="fra-1",
                site="fra",
                roles=frozenset({"prefill"}),
                models=("small", "local"),
                mesh=tm.Address("fra-1.example", 7101),
                kv=tm.Address("2001:db8::1", 7102),
                device="cuda",
                hardware="one of them",
                store=Path("/etc/mesh/store"),
                threads=2,
                backend="native",
                kv_tokens=4096,
                batch_invariant=True,
                weights="resident",
                memory_gb=24.5,
                pinned=("small",),
                disk_gb=500.0,
                bundles=tm.Address("fra-1.example", 7103),
                give_mbps=250.0,
            ),
            "iad-1": tm.Node(
                name="iad-1",
                site="iad",
                roles=frozenset({"prefill", "decode"}),
                models=("small",),  # "local" may not leave eu
                mesh=tm.Address("iad-1.example", 7101),
                kv=tm.Address("127.0.0.1", 0),
            ),
        },
        routers={"router-1": tm.Router("router-1", "fra", tm.Address("router.example", 8443))},
        links={frozenset({"fra", "iad"}): tm.Link("fra", "iad", 88.0, 200.0)},
        tenants={"acme": tm.Tenant("acme", ("00" * 31 + "bb",), frozenset({"eu"}))},
        trusted_networks=("10.0.0.0/8",),
        defaults=tm.LinkDefaults(1.5, 1.0, 500.0, 0.1, 9000.0),
        detection_s=2.5,
        placement=tm.Placement(6.0, 90.0),
    )
    assert read.source == "/etc/mesh/mesh.yaml"
    assert list(read.nodes) == ["fra-1", "iad-1"]


def test_the_least_that_loads_gets_the_defaults() -> None:
    text = """
mesh: m
models: {a: {}}
sites: {fra: {lat: 0, lon: 0, region: eu}}
nodes: {n: {site: fra}}
"""
    least = parse_topology(text, "m.yaml")
    assert least.nodes["n"] == tm.Node(
        "n",
        "fra",
        frozenset({"prefill", "decode"}),
        ("a",),
        tm.Address("127.0.0.1", 0),
        tm.Address("127.0.0.1", 0),
    )
    assert least.routers == {}
    assert least.links == {}
    assert least.trusted_networks == tm.TRUSTED_BY_DEFAULT
    assert least.defaults == tm.LinkDefaults()
    assert least.detection_s == 5.0
    assert least.placement == tm.Placement()
    node = least.nodes["n"]
    assert (node.memory_gb, node.pinned, node.disk_gb) == (None, (), None)
    assert (node.bundles, node.give_mbps) == (tm.Address("127.0.0.1", 0), tm.GIVE_MBPS)


def test_an_empty_list_of_trusted_networks_trusts_nobody() -> None:
    text = VALID.replace("[10.0.0.0/8]", "[]")
    assert parse_topology(text, "m.yaml").trusted_networks == ()
    assert parse_topology(dump_topology(parse_topology(text, "")), "").trusted_networks == ()


@pytest.mark.parametrize(
    ("written", "resolved"),
    [("/nvme/store", "/nvme/store"), ("../store", "/etc/store"), ("~/store", "/home/op/store")],
)
def test_store_paths(monkeypatch: pytest.MonkeyPatch, written: str, resolved: str) -> None:
    monkeypatch.setenv("HOME", "/home/op")
    read = parse_topology(VALID.replace("store: store", f"store: {written}"), "/etc/mesh/m.yaml")
    assert read.nodes["fra-1"].store == Path(resolved)


def test_aliases_repeat_values() -> None:
    number = next(n for n, line in enumerate(VALID.splitlines(), 1) if "[small, local]" in line)
    text = with_line(number, "models: &both [small]").replace(
        "mesh: iad-1.example:7101", "models: *both"
    )
    assert parse_topology(text, "m.yaml").nodes["iad-1"].models == ("small",)


def test_numbers_may_be_written_in_any_decimal_way() -> None:
    for text in ("88", "88.0", "+88", "8.8e1", "880e-1"):
        read = parse_topology(VALID.replace("rtt_ms: 88", f"rtt_ms: {text}"), "m.yaml")
        assert read.links[frozenset({"fra", "iad"})].rtt_ms == 88.0


def test_a_file_with_a_byte_order_mark_loads(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    loaded = load_topology(path)
    assert loaded.source == str(path)
    assert loaded.nodes["fra-1"].store == tmp_path / "store"


# ---- examples ----------------------------------------------------------------------------------


def test_demo_example() -> None:
    demo = load_topology(EXAMPLES / "demo.yaml")
    roles = sorted(sorted(node.roles) for node in demo.nodes.values())
    assert roles == [["decode"], ["decode", "prefill"], ["decode", "prefill"], ["prefill"]]
    assert len({node.site for node in demo.nodes.values()}) == 3
    assert {demo.sites[node.site].region for node in demo.nodes.values()} == {"eu", "na"}
    assert list(demo.models) == ["smollm2-135m"]
    assert len(demo.routers) == 1
    listeners = [address for node in demo.nodes.values() for address in (node.mesh, node.kv)]
    listeners += [router.listen for router in demo.routers.values()]
    assert set(listeners) == {tm.Address("127.0.0.1", 0)}
    assert len(demo.links) == 3, "every pair of sites has a link"


def test_global_example() -> None:
    world = load_topology(EXAMPLES / "global.yaml")
    assert len(world.sites) == 30
    assert {node.site for node in world.nodes.values()} == set(world.sites)
    assert len(world.models) >= 3
    assert len(world.routers) >= 3
    assert {node.device for node in world.nodes.values()} == {"cpu", "cuda"}
    assert any(model.regions for model in world.models.values())
    assert any(tenant.regions for tenant in world.tenants.values())
    assert "health-eu-8b" in world.nodes["cdg-1"].models
    assert "health-eu-8b" not in world.nodes["lhr-1"].models
    for model in world.models:
        serving = [node for node in world.nodes.values() if model in node.models]
        assert {"prefill", "decode"} <= {role for node in serving for role in node.roles}


# ---- the way back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo.yaml", "global.yaml"])
def test_examples_survive_the_way_back(name: str) -> None:
    example = load_topology(EXAMPLES / name)
    assert parse_topology(dump_topology(example), "elsewhere/copy.yaml") == example


# Words that YAML likes to take for something else come first.
names = st.sampled_from(["no", "yes", "null", "1e3", "0x1F", "12", "3.5", "1.e", "2026-01-01"]) | (
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
)
free_text = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=30).map(
    str.strip
)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True) | st.just("1" * 64)
hosts = st.sampled_from(["127.0.0.1", "::1", "2001:db8::5", "a.example", "localhost"])
amounts = st.floats(1e-9, 6e4) | st.integers(1, 60_000)
tokens = st.integers(1, 2**31 - 1)


@st.composite
def topologies(draw: st.DrawFn) -> tm.Topology:
    """Any topology that could have been loaded."""
    site_names = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    sites = {
        name: tm.Site(
            name,
            tm.Position(draw(st.floats(-90, 90)), draw(st.floats(-180, 180))),
            draw(names),
            draw(free_text),
        )
        for name in site_names
    }
    regions = st.frozensets(st.sampled_from([site.region for site in sites.values()]))
    models = {
        name: tm.Model(
            name,
            draw(st.none() | free_text.filter(bool)),
            draw(st.none() | digests),
            draw(st.sampled_from(["bfloat16", "float32"])),
            draw(st.none() | tokens),
            draw(regions),
        )
        for name in draw(st.lists(names, max_size=3, unique=True))
    }
    models["anywhere"] = tm.Model("anywhere")
    process_names = draw(st.lists(names, min_size=2, max_size=5, unique=True))
    ports = iter(draw(st.permutations([0, 0, 0, *range(7100, 7110)])))

    def address() -> tm.Address:
        return tm.Address(draw(hosts), next(ports))

    def node(name: str) -> tm.Node:
        site = sites[draw(st.sampled_from(site_names))]
        allowed = [m.name for m in models.values() if not m.regions or site.region in m.regions]
        served = draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True))
        backend = draw(st.sampled_from(["auto", "reference", "native", "triton"]))
        weight_forms = st.sampled_from(["plain", "resident", "auto"])
        return tm.Node(
            name=name,
            site=site.name,
            roles=draw(st.sets(st.sampled_from(["prefill", "decode"]), min_size=1).map(frozenset)),
            models=tuple(served),
            mesh=address(),
            kv=address(),
            device=draw(st.sampled_from(["cpu", "cuda"])),
            hardware=draw(free_text),
            store=draw(st.none() | names.map(lambda name: Path("/nvme") / name)),
            threads=draw(st.integers(1, 4096)),
            backend=backend,
            kv_tokens=draw(tokens),
            batch_invariant=draw(st.booleans()),
            weights="plain" if backend == "reference" else draw(weight_forms),
            memory_gb=draw(st.none() | amounts),
            pinned=tuple(draw(st.lists(st.sampled_from(served), unique=True))),
            disk_gb=draw(st.none() | amounts),
            bundles=address(),
            give_mbps=draw(amounts),
        )

    pairs = st.lists(
        st.frozensets(st.sampled_from(site_names), min_size=2, max_size=2), unique=True
    )
    links = {
        pair: tm.Link(*sorted(pair), draw(st.none() | amounts), draw(st.none() | amounts))
        for pair in (draw(pairs) if len(site_names) > 1 else [])
    }
    keys = iter(draw(st.lists(digests, min_size=4, max_size=4, unique=True)))
    tenants = {
        name: tm.Tenant(name, (next(keys), next(keys)), draw(regions), draw(st.booleans()))
        for name in draw(st.lists(names, max_size=2, unique=True))
    }
    return tm.Topology(
        mesh=draw(names),
        models=models,
        sites=sites,
        nodes={name: node(name) for name in process_names[:-1]},
        routers={
            name: tm.Router(name, draw(st.sampled_from(site_names)), address())
            for name in process_names[-1:]
        },
        links=links,
        tenants=tenants,
        trusted_networks=draw(st.sampled_from([(), ("10.0.0.0/8",), ("::1/128", "127.0.0.1")])),
        defaults=tm.LinkDefaults(draw(st.floats(1, 100)), *(draw(amounts) for _ in range(4))),
        detection_s=draw(st.floats(1, 60)),
        placement=tm.Placement(draw(st.floats(0, 1e6)), draw(st.floats(0, 7 * 86_400))),
    )


@settings(max_examples=100)
@given(topologies())
def test_any_topology_survives_the_way_back(written: tm.Topology) -> None:
    read = parse_topology(dump_topology(written), "copy.yaml")
    assert read == written
    for section in ("models", "sites", "nodes", "routers", "links", "tenants"):
        assert list(getattr(read, section)) == list(getattr(written, section)), "order is kept"


def test_reading_topologies_needs_no_torch() -> None:
    script = (
        "import sys, topology.load, topology.geography;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
