"""One fixed message of every type, for the golden frames."""

from __future__ import annotations

from wire.messages import (
    COLD_START,
    Accepted,
    Attach,
    Attached,
    CacheDelta,
    Cancel,
    ChatInput,
    ChatTurn,
    Detached,
    Draining,
    Drill,
    DrillReport,
    DrillStarted,
    EngineLoad,
    Failed,
    Finished,
    Giving,
    Goodbye,
    Hello,
    LinkRate,
    Load,
    Loading,
    Message,
    ModelOffer,
    Offers,
    Part,
    Ping,
    Pong,
    Refused,
    Retarget,
    Sampling,
    Step,
    StepEntry,
    Submit,
    TextInput,
    TokensInput,
    Transfer,
    TransferReport,
    Warm,
)

SAMPLING = Sampling(48, 0.7, 0.95, 2**64 - 1, ["\n\n", "Ende"], False)
LIMITED = Sampling(48, 0.7, 0.95, 1, [], True, 40, 0.05, -0.5, 0.25, 1.1)
OFFER = ModelOffer("smollm2-135m", "ab" * 32, 8192, 46080, 16, 1024, "bfloat16", "127.0.0.1:7101")


def submit(prompt: ChatInput | TextInput | TokensInput, **changed: object) -> Submit:
    fields: dict[str, object] = {
        "stream": 7,
        "request_id": "req-0123",
        "attempt": 2,
        "leg": "prefill",
        "model": "smollm2-135m",
        "tenant": "acme",
        "input": prompt,
        "sampling": SAMPLING,
        "forced_ids": [1, 300, 49151],
        "transfer": Transfer(bytes(range(16)), "lhr-1", "127.0.0.1:7101"),
        "chain": [b"\x01" * 16, b"\x02" * 16],
        "deadline_remaining_ms": 30_000,
    }
    return Submit(**(fields | changed))  # type: ignore[arg-type]


NODE_SAYS: dict[str, Message] = {
    "hello-node": Hello(
        1, 1, "demo", "node", "fra-1", "fra", "0badcafe", ["decode", "prefill"], [OFFER]
    ),
    "accepted": Accepted(7, 812, 256),
    "refused": Refused(7, "out_of_blocks", "no room for 9000 tokens", True, 250),
    "step": Step([StepEntry(7, 0, [42], b"H\\u00e9"), StepEntry(8, 15, [1, 2, 3], b"")]),
    "finished-handoff": Finished(
        7, "handoff", 1, 1.5, 320.25, TransferReport(46080, 46200, 40000, 320.0, 330.0, 12.5, 15.0)
    ),
    "finished-stop": Finished(8, "stop", 48, 0.0, 12.0, None),
    "failed": Failed(7, "engine_died", "the engine went away", True),
    "load": Load(
        [EngineLoad("smollm2-135m", True, 512, 3, 1, 900, 60, 1024, 1100.5, 28.25, 1, 2, 4)],
        [LinkRate("lhr-1", 15.2, 48e6)],
        False,
    ),
    "load-of-models-that-come-and-go": Load(
        [
            EngineLoad(
                "qwen3-0.6b",
                False,
                0,
                0,
                0,
                0,
                0,
                0,
                0.0,
                0.0,
                0,
                0,
                0,
                "disk",
                2400,
                3_700_000_000,
                "two others are answering",
                2350,
            ),
        ],
        [],
        False,
        4_000_000_000,
        1_250_000_000,
    ),
    "load-of-an-engine-that-guesses": Load(
        [
            EngineLoad(
                *("smollm2-135m", True, 0, 3, 1, 900, 60, 1024, 1100.5, 28.25, 1, 2, 4),
                drafted_tokens=700,
                accepted_tokens=350,
                kv_sent_bytes=23_592_960,
                kv_wire_bytes=15_851_520,
                kv_packed_pieces=119,
                kv_raw_pieces=1,
            )
        ],
        [],
        False,
    ),
    "load-of-a-node-that-gives": Load([], [], False, 0, 0, Giving(7_000_000_000, 3, 2, 48e6)),
    "cache-delta": CacheDelta("smollm2-135m", True, [(b"\x03" * 16, 64)], [b"\x04" * 16]),
    "draining": Draining(3),
    "pong": Pong(2**32),
    "detached": Detached(7, 2, "link_lost", "lhr-1 restarted"),
    "attached": Attached(
        9, submit(TextInput("Once"), leg="both", transfer=None), [5, 6, 7], b" upon", 12, 0, ""
    ),
    "drill-started": DrillStarted(4, ""),
    "offers": Offers([OFFER, ModelOffer("other", "cd" * 32, 4096, 20480, 16, 0, "float32")]),
    "loading": Loading(7, 2400),
    "drill-report": DrillReport(4, b'{"total_s":0.9}', ""),
    "goodbye": Goodbye("version_mismatch", "we speak 1-1"),
}

ROUTER_SAYS: dict[str, Message] = {
    "hello-router": Hello(1, 1, "demo", "router", "router-fra", "fra", "feed", [], []),
    "submit-chat": submit(
        ChatInput([ChatTurn("system", "Be brief."), ChatTurn("user", "Grüße 🌍")])
    ),
    "submit-text": submit(TextInput("Once"), leg="both", transfer=None, forced_ids=[], chain=[]),
    "submit-tokens": submit(TokensInput([0, 5, 49151]), leg="decode", attempt=1),
    "submit-limits": submit(TextInput("Once"), sampling=LIMITED),
    "cancel": Cancel(7),
    "retarget": Retarget(7, 3, Transfer(bytes(range(16)), "iad-1", "127.0.0.1:7102")),
    "attach": Attach(9, "req-0123", "acme", 2),
    "drill": Drill(4, "freeze-engine", "smollm2-135m", 10_000),
    "drill-cold-start": Drill(5, COLD_START, "smollm2-135m", 60_000, '{"from":"disk"}'),
    "warm": Warm("smollm2-135m", 300_000),
    "ping": Ping(2**32),
    "part": Part(3, True, b"tail of something large"),
}
