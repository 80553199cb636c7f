"""Features that work without streaming only, or begin to stream and then say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.router_mesh import RouterMesh

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"name": "s", "schema": {"type": "object"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

FEATURES: dict[str, dict[str, Any]] = {
    "response_format": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    "tools": {"tools": [TOOL]},
    "tool_choice": {"tool_choice": "required"},
    "functions": {"functions": [TOOL["function"]]},
    "messages": {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
}


@pytest.mark.parametrize("param", FEATURES)
async def test_agents_1685_and_ai_396_and_6861_no_feature_depends_on_streaming(
    mesh: RouterMesh, param: str
) -> None:
    """cloudflare/agents 1685: a JSON schema was taken without streaming and refused with it;
    cloudflare/ai 396 and vercel/ai 6861: the arguments of a streamed tool call came at the end, or
    never. What this mesh does not know yet is refused by its name, alike either way, as a status
    and before any node hears of it."""
    refusals = []
    for stream in (False, True):
        response = await mesh.chat(stream=stream, **FEATURES[param])
        assert response.status == 400
        assert response.content_type == "application/json"
        refusals.append((await response.json())["error"])
    assert refusals[0] == refusals[1]
    assert refusals[0]["param"].startswith(param)
    assert not any(node.submits for node in mesh.nodes.values())
