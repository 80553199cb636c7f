"""From a topology to processes: addresses, link maps, probes."""

from __future__ import annotations

import itertools
import random
import socket
from pathlib import Path

import pytest

from popmesh.launcher.plan import LaunchPlan, Probe, make_plan, with_stores
from popmesh.launcher.ports import FIRST, LAST, FreePorts, is_free
from topology.load import parse_topology
from topology.model import Topology
from wire.errors import ConfigError

MESH = """
mesh: demo
models:
  small: {source: "pypi:x"}
  other: {source: "pypi:y"}
sites:
  fra: {lat: 50.0, lon: 8.6, region: eu}
  lhr: {lat: 51.5, lon: -0.5, region: eu}
nodes:
  p: {site: fra, roles: [prefill], models: [small, other], mesh: "10.0.0.1:7000", kv: "x:7100"}
  d: {site: lhr, roles: [decode], models: [other, small]}
  both: {site: lhr, roles: [prefill, decode], models: [small], kv: "127.0.0.1:7300"}
routers:
  r: {site: fra, listen: "0.0.0.0:8080"}
links:
  - {between: [fra, lhr], rtt_ms: 15, bandwidth_mbps: 400}
"""


def counting_ports():
    following = itertools.count(20_000)

    def take(count: int) -> int:
        first = next(following)
        for _ in range(count - 1):
            next(following)
        return first

    return take


def plan(text: str = MESH, *, cores: int = 1, **options) -> LaunchPlan:
    return planned(parse_topology(text, "mesh.yaml"), cores=cores, **options)


def planned(topology: Topology, *, cores: int = 1, **options) -> LaunchPlan:
    store, take = Path("/store"), counting_ports()
    return make_plan(topology, Path("/run/x"), store, take, cores=cores, **options)


def option(arguments: tuple[str, ...], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_everything_listens_on_loopback_and_nothing_twice():
    made = plan()
    topology = made.topology
    listeners = [child.listens for child in made.children]
    listeners += [node.kv for node in topology.nodes.values()]
    listeners += [node.bundles for node in topology.nodes.values()]
    assert {address.host for address in listeners} == {"127.0.0.1"}
    assert len({str(address) for address in listeners}) == len(listeners)
    assert all(address.port for address in listeners)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (4, 1), (5, 1), (10, 2), (64, 12)])
def test_engines_share_the_cores_of_the_machine(cores: int, threads: int):
    nodes = plan(cores=cores).topology.nodes  # five engines: two nodes of two models, one of one
    assert {node.threads for node in nodes.values()} == {threads}


def test_threads_of_the_file_are_kept_and_a_device_needs_one():
    text = MESH.replace("roles: [decode],", "roles: [decode], threads: 3,")
    text = text.replace("roles: [prefill],", "roles: [prefill], device: cuda,")
    nodes = plan(text, cores=12).topology.nodes
    assert {name: node.threads for name, node in nodes.items()} == {"p": 1, "d": 3, "both": 4}


def test_only_nodes_are_started_for_drills_and_only_when_asked():
    assert not [child for child in plan().children if "--drills" in child.arguments]
    children = plan(drills=True).children
    assert {c.kind for c in children if "--drills" in c.arguments} == {"node"}
    assert all("--drills" in c.arguments for c in children if c.kind == "node")


def test_a_loopback_address_of_the_file_is_kept_a_remote_one_is_not():
    nodes = plan().topology.nodes
    assert str(nodes["both"].kv) == "127.0.0.1:7300"
    assert nodes["p"].mesh.port != 7000


def test_the_ports_of_a_nodes_models_do_not_overlap_with_others():
    made = plan()
    kv = [
        node.kv.port + position
        for node in made.topology.nodes.values()
        for position in range(len(node.models))
    ]
    others = [child.listens.port for child in made.children]
    others += [int(port.listen.rpartition(":")[2]) for port in made.links.ports[:-1]]
    assert len({*kv, *others}) == len(kv) + len(others)


def test_the_order_is_registry_shaper_nodes_router():
    assert [child.kind for child in plan().children] == [
        "registry", "links", "node", "node", "node", "router",
    ]  # fmt: skip


def test_links_are_shaped_between_sites_and_only_there():
    made = plan()
    topology = made.topology
    p, d, both = (topology.nodes[name] for name in ("p", "d", "both"))
    assert [(link.rtt_ms, link.bandwidth_mbps) for link in made.links.links] == [(15, 400)]
    kv = {"d other": d.kv.port, "d small": d.kv.port + 1, "both small": both.kv.port}
    assert set(made.links.dial_map("fra")) == {
        str(d.mesh),
        str(both.mesh),
        *(f"127.0.0.1:{port}" for port in kv.values()),
    }
    assert str(p.mesh) not in made.links.dial_map("fra")  # the router is at the same site
    assert made.links.dial_map("lhr") == {}  # nobody there dials p: it does not decode


def test_children_are_told_their_sites_link_map():
    made = plan()
    arguments = {child.name: child.arguments for child in made.children}
    assert option(arguments["p"], "--link-map") == "/run/x/dial-fra.json"
    assert option(arguments["r"], "--link-map") == "/run/x/dial-fra.json"
    assert option(arguments["d"], "--link-map") is None


def test_routers_are_told_the_cache_key_and_nodes_are_not():
    arguments = {child.name: child.arguments for child in plan().children}
    assert option(arguments["r"], "--cache-key") == "/run/x/cache-key"
    assert option(arguments["p"], "--cache-key") is None


def test_without_emulation_nobody_is_shaped():
    made = plan(emulate_links=False)
    assert made.links is None
    assert all(child.kind != "links" for child in made.children)
    assert all("--link-map" not in child.arguments for child in made.children)


def test_a_given_registry_and_port_are_used():
    made = plan(registry_url="consul://127.0.0.1:8500", router_port=9999)
    assert made.router_url == "http://127.0.0.1:9999"
    assert made.registry_url == "consul://127.0.0.1:8500"
    assert all(child.kind != "registry" for child in made.children)


def test_every_node_and_model_is_probed_with_a_partner_where_it_needs_one():
    assert plan().probes == (
        Probe("p", "small", "p", "d"),
        Probe("p", "other", "p", "d"),
        Probe("d", "other", "p", "d"),
        Probe("d", "small", "p", "d"),
        Probe("both", "small", "both", "both"),
    )


APART = MESH.replace(
    "models: [other, small]", "models: [other, small], store: /nvme, disk_gb: 10, memory_gb: 2"
)


def test_a_node_with_a_bounded_disk_keeps_its_own_store_and_fetches_over_the_links():
    made = plan(APART)
    arguments = {child.name: child.arguments for child in made.children}
    assert option(arguments["d"], "--store") == "/nvme"
    assert option(arguments["p"], "--store") == "/store"
    givers = made.topology.nodes
    assert set(made.links.dial_map("lhr")) == {str(givers["p"].bundles)}
    assert str(givers["d"].bundles) not in made.links.dial_map("fra")


@pytest.mark.parametrize(("named", "kept"), [(False, "/nvme"), (True, "/store")])
def test_a_store_of_the_file_is_kept_unless_the_operator_names_one(named, kept):
    topology = parse_topology(APART.replace(", disk_gb: 10", ""), "mesh.yaml")
    made = planned(with_stores(topology, named))
    arguments = {child.name: child.arguments for child in made.children}
    assert option(arguments["d"], "--store") == kept
    assert option(arguments["both"], "--store") == "/store"
    bounded = with_stores(parse_topology(APART, "mesh.yaml"), named)
    assert bounded.nodes["d"].store == Path("/nvme")


def test_models_that_come_and_go_are_not_all_probed():
    def probed(text: str) -> list[str]:
        return [probe.model for probe in plan(text).probes if probe.node == "d"]

    assert probed(APART) == ["other"]
    assert probed(APART.replace("memory_gb: 2", "memory_gb: 2, pinned: [small]")) == ["small"]


def test_a_node_that_can_never_answer_is_refused():
    alone = MESH.replace("models: [other, small]", "models: [small]")
    with pytest.raises(ConfigError, match="node p serves other without the role decode"):
        plan(alone)


def test_one_site_needs_no_shaper():
    made = plan(MESH.replace("site: lhr", "site: fra"))
    assert made.links is None


def test_free_ports_are_free_consecutive_and_never_the_same():
    ports = FreePorts(random.Random(7))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not is_free(taken.getsockname()[1])
    firsts = [ports.take(3) for _ in range(20)]
    everyone = [first + n for first in firsts for n in range(3)]
    assert len(set(everyone)) == 60
    assert all(FIRST <= port < LAST for port in everyone)


def test_a_reserved_port_is_left_out():
    start = FreePorts(random.Random(7)).take()
    ports = FreePorts(random.Random(7))
    ports.reserve(start)
    assert ports.take() != start


def test_running_out_of_ports_is_said():
    with pytest.raises(ConfigError, match="no 12001 free ports"):
        FreePorts(random.Random(1)).take(LAST - FIRST + 1)
