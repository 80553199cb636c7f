"""Every kind of mistake in a topology file is refused on its own line, with a helpful word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topology_text import LINES, VALID, line_of, with_line

from topology.load import load_topology, parse_topology
from topology.reading.yaml_nodes import MAX_BYTES, MAX_VALUES
from wire.errors import ConfigError

IAD_SITE = line_of("iad:")
IAD_NODE_SITE = line_of("mesh: iad-1") - 1


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_topology(text, "mesh.yaml")
    return caught.value


def refusal_or_none(text: str) -> ConfigError | None:
    try:
        parse_topology(text, "mesh.yaml")
    except ConfigError as error:
        return error
    return None


def test_the_unbroken_text_loads() -> None:
    assert parse_topology(VALID, "mesh.yaml").mesh == "test"


# (line that is replaced, what it becomes, lines below it where the mistake is, words of the error)
MISTAKES = [
    # unknown keys, missing keys, duplicate keys
    ("mesh: test", ["mesh: test", "modles: {}"], 1, "unknown key 'modles'"),
    ("city:", ["citty: Frankfurt"], 0, "did you mean 'city'?"),
    ("threads:", ["zzz: 1"], 0, "known: site, roles, models"),
    ("lon: 8.57", ["# lon: 8.57"], -2, "'lon' is missing"),
    ("region: na", ["# region: na"], -3, "'region' is missing"),
    ("mesh: test", ["# nameless"], 0, "'mesh' is missing"),
    ("iad-1:", ["fra-1:"], 0, f"'fra-1' is given twice (first on line {line_of('fra-1:')})"),
    ("iad:", ["fra:"], 0, "'fra' is given twice"),
    ("lon: 8.57", ["lon: 8.57", "lon: 8.58"], 1, "'lon' is given twice"),
    ("router-1:", ["fra-1:"], 0, "'fra-1' is a node (line"),
    # wrong types, also those that only YAML sees
    ("mesh: test", ["mesh: 5"], 0, "mesh must be text, found the integer '5' (quote it: \"5\")"),
    ("region: na", ["region: no"], 0, 'found the boolean \'no\' (quote it: "no")'),
    ("region: na", ["region: 2026-01-01"], 0, "found the date"),
    ("region: na", ["region:"], 0, "found nothing (fill it in"),
    ("city:", ["city: [Frankfurt]"], 0, "city must be text, found a list"),
    ("city:", ['city: " Frankfurt"'], 0, "without spaces around it"),
    ("city:", [r'city: "Frank\nfurt"'], 0, "printable text"),
    ("city:", ['city: ""'], 0, "not empty"),
    ("city:", [f"city: {'x' * 2000}"], 0, "longer than 1024 characters"),
    ("threads:", ['threads: "2"'], 0, "found the text '2' (remove the quotes)"),
    ("threads:", ["threads: 1.5"], 0, "threads must be whole, found the number '1.5'"),
    ("threads:", ["threads: 010"], 0, "write a plain decimal number"),
    ("threads:", ["threads: 1:30"], 0, "write a plain decimal number"),
    ("threads:", ["threads: yes"], 0, "threads must be a number, found the boolean 'yes'"),
    ("threads:", ["threads: {}"], 0, "threads must be a number, found a map"),
    ("threads:", ["threads:"], 0, "threads must be a number, found nothing"),
    ("operator:", ['operator: "false"'], 0, "operator must be true or false, found the text"),
    ("operator:", ["operator: no"], 0, "operator must be true or false, found the boolean 'no'"),
    ("roles:", ["roles: prefill"], 0, "roles must be a list, found the text 'prefill'"),
    ("roles:", ["roles: prefill"], 0, "(write [prefill])"),
    ("router-1:", ["router-1: fra", "router-2:"], 0, "expected a map, found the text 'fra'"),
    ("- between:", ["- [fra, iad]", "- between: [fra, iad]"], 0, "expected a map, found a list"),
    ("iad:", ["5:"], 0, 'a key must be text, not the integer \'5\' (quote it: "5")'),
    ("iad:", ["[a]: {}", "iad:"], 0, "a key must be text, not a list"),
    ("iad:", ["!!str {a: b}: {}", "iad:"], 0, "the tag '!!str' is not read"),
    # impossible values
    ("lat: 50.03", ["lat: 90.0000001"], 0, "lat must be at least -90 and at most 90, found"),
    ("lat: 50.03", ["lat: -91"], 0, "found the integer '-91'"),
    ("lon: 8.57", ["lon: 180.5"], 0, "lon must be at least -180 and at most 180"),
    ("lon: 8.57", ["lon: .nan"], 0, "lon must be finite, found '.nan'"),
    ("lon: 8.57", ["lon: -.inf"], 0, "lon must be finite, found '-.inf'"),
    ("lon: 8.57", ["lon: 1e999"], 0, "lon must be finite, found '1e999'"),
    ("rtt_ms: 88", ["rtt_ms: -1"], 0, "rtt_ms must be at least 0"),
    ("rtt_ms: 88", ["rtt_ms: 70000"], 0, "at most 60000"),
    ("bandwidth_mbps: 200", ["bandwidth_mbps: 0"], 0, "bandwidth_mbps must be above 0"),
    ("bandwidth_mbps: 500", ["bandwidth_mbps: 0"], 0, "bandwidth_mbps must be above 0"),
    ("detour:", ["detour: 0.5"], 0, "detour must be at least 1"),
    ("local_rtt_ms:", ["local_rtt_ms: -0.1"], 0, "local_rtt_ms must be at least 0"),
    ("threads:", ["threads: 0"], 0, "threads must be at least 1"),
    ("kv_tokens:", ["kv_tokens: 0"], 0, "kv_tokens must be at least 1"),
    (
        "batch_invariant:",
        ["batch_invariant: yes"],
        0,
        "batch_invariant must be true or false",
    ),
    ("weights:", ["weights: packed"], 0, "weights cannot be 'packed'"),
    ("backend:", ["backend: reference"], 3, "weights cannot be 'resident' with backend"),
    ("context_tokens:", ["context_tokens: 9999999999"], 0, "context_tokens must be at least 1"),
    ("memory_gb:", ["memory_gb: 0"], 0, "memory_gb must be above 0"),
    ("disk_gb:", ["disk_gb: -1"], 0, "disk_gb must be above 0"),
    ("give_mbps:", ["give_mbps: 0"], 0, "give_mbps must be above 0"),
    ("pinned:", ["pinned: [smal]"], 0, "there is no model 'smal' (did you mean 'small'?)"),
    ("models: [small", ["models: [local]"], 12, "'small' is pinned here, and this node does not"),
    ("warm_per_min:", ["warm_per_min: -1"], 0, "warm_per_min must be at least 0"),
    ("cool_after_s:", ["cool_after_s: 1e7"], 0, "cool_after_s must be at least 0 and at most"),
    ("cool_after_s:", ["cool_after: 5"], 0, "(did you mean 'cool_after_s'?)"),
    ("roles:", ["roles: []"], 0, "roles is empty"),
    ("roles:", ["roles: [prefil]"], 0, "roles cannot be 'prefil' (write prefill or decode)"),
    ("roles:", ["roles: [prefill, prefill]"], 0, "roles names 'prefill' twice"),
    ("models: [small", ["models: []"], 0, "models is empty"),
    ("models: [small", ["models: [small, small]"], 0, "models names 'small' twice"),
    ("device:", ["device: gpu"], 0, "device cannot be 'gpu' (write cpu or cuda)"),
    ("backend:", ["backend: natve"], 0, "(write auto or reference or native or triton)"),
    ("dtype:", ["dtype: float16"], 0, "(write bfloat16 or float32)"),
    ("digest:", ["digest: abc"], 0, "digest must be 256 bits in hex, found 3 characters"),
    ("digest:", [f"digest: {'AB' * 32}"], 0, "(write it in lower case)"),
    ("digest:", [f"digest: {'xy' * 32}"], 0, "found other characters"),
    ("digest:", [f"digest: sha256:{'ab' * 32}"], 0, "a prefix such as sha256: is left out"),
    ("digest:", [f"digest: {'1' * 64}"], 0, "quote it"),
    ("- 0000", ["- abc"], 0, "key_sha256 must be 256 bits in hex"),
    ("store:", ["store: ~nobody-of-this-name/x"], 0, "write the whole path"),
    # addresses
    ("mesh: fra-1", ["mesh: fra-1.example"], 0, "is no address (write HOST:PORT)"),
    ("mesh: fra-1", ["mesh: fra-1.example:65536"], 0, "a port is at most 65535"),
    ("mesh: fra-1", [f"mesh: fra-1.example:{'9' * 900}"], 0, "a port is at most 65535"),
    ("mesh: fra-1", ["mesh: http://fra-1.example:80"], 0, "without a scheme"),
    ("mesh: fra-1", ['mesh: "2001:db8::2:7101"'], 0, "write [ADDRESS]:PORT for IPv6"),
    ("mesh: fra-1", ["mesh: fra_1!.example:7101"], 0, "names no host"),
    ("listen:", ["listen: :8443"], 0, "is no address"),
    ("mesh: iad-1", ["mesh: fra-1.example:7101"], 0, "iad-1 mesh and fra-1 mesh (line"),
    ("listen:", ["listen: FRA-1.example:7101"], 0, "give one of them another port"),
    ("kv:", ["kv: fra-1.example:7101"], 0, "fra-1 kv and fra-1 mesh (line"),
    ("bundles:", ["bundles: fra-1.example:7101"], 0, "fra-1 bundles and fra-1 mesh (line"),
    # names
    ("mesh: test", ["mesh: the test"], 0, "'the test' cannot be a name"),
    ("iad-1:", ["iad/1:"], 0, "'iad/1' cannot be a name"),
    ("region: na", ["region: n a"], 0, "'n a' cannot be a name"),
    ("site: fra", ["site: frr"], 0, "there is no site 'frr' (did you mean 'fra'?)"),
    ("models: [small", ["models: [smal]"], 0, "there is no model 'smal'"),
    ("- between:", ["- between: [fra, lhr]"], 0, "there is no site 'lhr'"),
    ("- between:", ["- between: [fra]"], 0, "a link is between two sites, found 1"),
    ("- between:", ["- between: [fra, fra]"], 0, "a link from 'fra' to itself"),
    ("- between:", ["- rtt_ms: 8", "- between: [fra, iad]"], 0, "'between' is missing"),
    ("- between:", ["- between: [iad, fra]", "- between: [fra, iad]"], 1, "a second link between"),
    ("regions: [eu]", ["regions: [eur]"], 0, "there is no region 'eur' (did you mean 'eu'?)"),
    ("key_sha256:", ["regions: [mars]", "key_sha256:"], 0, "there is no region 'mars'"),
    ("trusted", ["trusted_networks: [10.0.0.1/8]"], 0, "(did you mean 10.0.0.0/8?)"),
    ("trusted", ["trusted_networks: [ten]"], 0, "'ten' is no network"),
    ("detection_s", ["detection_s: 0.5"], 0, "must be at least 1 and at most 60, found the"),
    ("detection_s", ["detection_s: 61"], 0, "must be at least 1 and at most 60, found the"),
    ("detection_s", ["detection: 5"], 0, "unknown key 'detection' (did you mean 'detection_s'?)"),
    # YAML as such
    ("mesh: test", ["mesh: !!python/object:os.system test"], 0, "is not read (remove it)"),
    ("mesh: test", ["mesh: !secret test"], 0, "the tag '!secret' is not read"),
    ("iad:", ["<<: {}", "iad:"], 0, "merge keys (<<) are not read"),
    ("models: [small", ["models: *nowhere"], 0, "not YAML: found undefined alias"),
    ("models: [small", ["models: [small"], 1, "not YAML"),
    ("city:", ["\tcity: Frankfurt"], 0, "not YAML"),
    ("city:", ["city: Frank\x00furt"], 0, "U+0000 is not allowed"),
    ("city:", [r'city: "\UFFFFFFFF"'], 0, "out of range"),
    ("mesh: test", ["mesh: test", "--- # another"], 1, "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("beginning", "replacement", "below", "words"), MISTAKES)
def test_mistake_is_refused_on_its_line(
    beginning: str, replacement: list[str], below: int, words: str
) -> None:
    number = next(n for n, line in enumerate(LINES, 1) if line.lstrip().startswith(beginning))
    error = refusal(with_line(number, *replacement))
    assert error.where == f"mesh.yaml:{number + below}"
    first = str(error).splitlines()[0]
    assert first.startswith(f"{error.where}: ")
    assert words in first


def test_suggestion_is_an_attribute_with_one_mistake_and_with_several() -> None:
    one = with_line(line_of("city:"), "citty: Frankfurt")
    assert refusal(one).suggestion == "did you mean 'city'?"
    assert refusal(one.replace("threads: 2", "threads: 0")).suggestion == "did you mean 'city'?"


def test_residency_keeps_a_named_model_off_a_node() -> None:
    text = with_line(IAD_NODE_SITE, "site: iad", "models: [local]")
    error = refusal(text)
    assert error.where == f"mesh.yaml:{IAD_NODE_SITE + 1}"
    assert "'local' may run in eu, and site 'iad' is in na" in str(error)


def test_residency_that_leaves_a_node_nothing_to_serve() -> None:
    text = (
        with_line(line_of("models: [small"), "")
        .replace("dtype: float32", "dtype: float32\n    regions: [na]")
        .replace("regions: [eu]\nsites", "regions: [na]\nsites")
    )
    error = refusal(text)
    assert "residency rules keep every model off this node" in str(error)
    assert error.where == f"mesh.yaml:{line_of('fra-1:') + 1}"


def test_two_tenants_with_one_key() -> None:
    number = line_of("trusted_networks:")
    key = "00" * 31 + "bb"
    tenant = ["  other:", f"    key_sha256: [{key}]", LINES[number - 1]]
    error = refusal(with_line(number, *tenant))
    assert error.where == f"mesh.yaml:{number + 1}"
    assert "tenants 'acme' and 'other' share a key" in str(error)


@pytest.mark.parametrize("section", ["models", "sites", "nodes"])
@pytest.mark.parametrize(
    ("value", "words"),
    [("{}", "is empty"), ("[]", "must be a map from names"), ("", "found nothing")],
)
def test_sections_that_a_mesh_cannot_do_without(section: str, value: str, words: str) -> None:
    parts = {"mesh": "mesh: m", "models": "models: {m: {}}", "nodes": "nodes: {a: {site: s}}"}
    parts["sites"] = "sites: {s: {lat: 0, lon: 0, region: r}}"
    parts[section] = f"{section}: {value}"
    error = refusal("\n".join(parts.values()))
    assert error.where == f"mesh.yaml:{list(parts).index(section) + 1}"
    assert f"{section} {words}" in str(error) or words in str(error).splitlines()[0]
    assert len(str(error).splitlines()) == 1, "one mistake must not be followed by its echoes"
    del parts[section]
    assert f"'{section}' is missing" in str(refusal("\n".join(parts.values())))


def test_links_must_be_a_list() -> None:
    number = line_of("links:")
    text = "\n".join(LINES[: number - 1]) + "\nlinks: {fra: iad}\n"
    assert "links must be a list, found a map" in str(refusal(text))
    assert refusal(text).where == f"mesh.yaml:{number}"


def test_all_mistakes_are_told_in_the_order_of_their_lines() -> None:
    text = VALID.replace("rtt_ms: 88", "rtt_ms: -88").replace("lat: 50.03", "lat: 500")
    text = text.replace("threads: 2", "threads: two")
    told = [line.split(": ")[0] for line in str(refusal(text)).splitlines()]
    lines = [line_of("lat: 50.03"), line_of("threads:"), line_of("rtt_ms: 88")]
    assert told == [f"mesh.yaml:{n}" for n in lines]


def test_many_mistakes_are_counted_beyond_twenty() -> None:
    extra = "\n".join(f"key{n}: 1" for n in range(50))
    told = str(refusal(VALID + extra)).splitlines()
    assert len(told) == 21
    assert told[-1] == "and 30 more"


def test_wildcard_hosts_collide_only_within_one_node() -> None:
    wild = VALID.replace("fra-1.example", "0.0.0.0").replace("iad-1.example", "0.0.0.0")
    parse_topology(wild, "mesh.yaml")
    error = refusal(wild.replace('"[2001:db8::1]:7102"', "0.0.0.0:7101"))
    assert error.where == f"mesh.yaml:{line_of('kv:')}"


def test_empty_text_and_text_that_is_no_map() -> None:
    for text in ("", "# nothing\n", "---\n"):
        assert refusal(text).where == "mesh.yaml:1"
    assert "expected a map, found a list" in str(refusal("- a\n- b\n"))
    assert "expected a map, found the text" in str(refusal("hello"))


# ---- hostile files -----------------------------------------------------------------------------


def test_deep_nesting_is_refused_before_python_minds() -> None:
    assert "nested deeper" in str(refusal("mesh:\n  " + "[" * 100_000))
    assert refusal("mesh:\n  " + "[" * 100_000).where == "mesh.yaml:2"


def test_endless_lists_are_refused() -> None:
    text = "mesh: m\nmodels: [" + "a," * (MAX_VALUES + 1) + "]"
    error = refusal(text)
    assert error.where == "mesh.yaml:2"
    assert f"more than {MAX_VALUES} values" in str(error)


def test_alias_bomb_is_refused() -> None:
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert f"more than {MAX_VALUES} values" in str(refusal("\n".join(lines)))


def test_alias_to_itself_is_refused() -> None:
    assert "endless nesting" in str(refusal("mesh: &me [*me]"))


def test_oversized_text_is_refused_unparsed(tmp_path: Path) -> None:
    text = "#" * (MAX_BYTES + 1)
    assert "larger than 4 MiB" in str(refusal(text))
    path = tmp_path / "huge.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        load_topology(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as missing:
        load_topology(tmp_path / "none.yaml")
    assert missing.value.where == str(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_topology(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("mesh: m\n# São Paulo\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8") as not_utf8:
        load_topology(latin)
    assert not_utf8.value.where == f"{latin}:2"


@given(st.text(max_size=200))
def test_any_text_loads_or_is_a_config_error(text: str) -> None:
    if error := refusal_or_none(text):
        assert error.where is not None
        assert error.where.startswith("mesh.yaml:")


FRAGMENTS = st.sampled_from(
    ["&a", "*a", "<<", "!!", "!x!y", "%", "---", "...", "|", ">", "?", "[", "}", "- ", "'", '"',
     ": ", "\\U", "\t", "\n", "\ufeff", "\x85", "~", "0x", "1e400", "%YAML 9.9", "%TAG", "#"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.integers(0, len(VALID)), st.integers(0, 40), FRAGMENTS | st.text(max_size=5))
def test_any_edit_of_a_valid_text_loads_or_is_a_config_error(at: int, cut: int, new: str) -> None:
    text = VALID[:at] + new + VALID[at + cut :]
    if error := refusal_or_none(text):
        assert error.where is not None
        number = int(error.where.removeprefix("mesh.yaml:"))
        assert 1 <= number <= len(text.splitlines()) + 1
