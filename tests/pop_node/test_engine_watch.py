"""An engine that does not answer is given up, a slow one is not."""

from pop_node.engine_watch import MAX_MISSED, EngineWatch


def test_an_engine_that_never_answers_is_given_up():
    watch = EngineWatch()
    assert [watch.tick() for _ in range(MAX_MISSED + 1)] == ["probe"] * MAX_MISSED + ["hung"]


def test_any_answer_counts_for_all_before_it():
    watch = EngineWatch()
    for _ in range(50):
        for _ in range(MAX_MISSED):
            assert watch.tick() == "probe"
        watch.heard()
