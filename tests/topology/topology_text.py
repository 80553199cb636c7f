"""A small valid topology as lines, to be broken one line at a time."""

from __future__ import annotations

LINES = """\
mesh: test
models:
  small:
    source: "pypi:small"
    digest: 00000000000000000000000000000000000000000000000000000000000000aa
    dtype: float32
    context_tokens: 2048
  local:
    regions: [eu]
sites:
  fra:
    lat: 50.03
    lon: 8.57
    region: eu
    city: Frankfurt
  iad:
    lat: 38.95
    lon: -77.46
    region: na
nodes:
  fra-1:
    site: fra
    roles: [prefill]
    models: [small, local]
    mesh: fra-1.example:7101
    kv: "[2001:db8::1]:7102"
    device: cuda
    hardware: one of them
    store: store
    threads: 2
    backend: native
    kv_tokens: 4096
    batch_invariant: true
    weights: resident
    memory_gb: 24.5
    pinned: [small]
    disk_gb: 500
    bundles: fra-1.example:7103
    give_mbps: 250
  iad-1:
    site: iad
    mesh: iad-1.example:7101
routers:
  router-1:
    site: fra
    listen: router.example:8443
links:
  - between: [fra, iad]
    rtt_ms: 88
    bandwidth_mbps: 200
tenants:
  acme:
    key_sha256:
      - 00000000000000000000000000000000000000000000000000000000000000bb
    regions: [eu]
    operator: false
trusted_networks: [10.0.0.0/8]
defaults:
  detour: 1.5
  base_rtt_ms: 1
  bandwidth_mbps: 500
  local_rtt_ms: 0.1
  local_bandwidth_mbps: 9000
detection_s: 2.5
placement:
  warm_per_min: 6
  cool_after_s: 90
""".splitlines()

VALID = "\n".join(LINES) + "\n"


def line_of(beginning: str) -> int:
    """1-based number of the only line that begins with ``beginning`` after its indentation."""
    (found,) = [n for n, line in enumerate(LINES, 1) if line.lstrip().startswith(beginning)]
    return found


def with_line(number: int, *replacement: str) -> str:
    """The valid text with line ``number`` replaced, keeping its indentation."""
    old = LINES[number - 1]
    indent = old[: len(old) - len(old.lstrip())]
    new = [indent + line for line in replacement]
    return "\n".join([*LINES[: number - 1], *new, *LINES[number:]]) + "\n"
