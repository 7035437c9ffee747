"""The watchdog names the rank that everyone waits for, and nobody while all move."""

from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.train.watchdog import Observation, updated, verdict

LIMIT = 10.0


def observation(beats: int, beat_at: float, tick_at: float, where: str = "step 3") -> Observation:
    return Observation(beats, 1, where, "node7", beat_at, tick_at)


def test_a_rank_without_ticks_is_dead_or_stopped():
    sentence = verdict({0: observation(9, 100, 100), 1: observation(9, 80, 80, "step 8")}, 100, LIMIT)
    assert sentence == "rank 1 on node7, last at 'step 8', is dead or stopped: it has not answered for 10 s"


def test_a_rank_that_ticks_but_is_behind_hangs():
    sentence = verdict(
        {0: observation(9, 85, 100), 1: observation(8, 80, 100, "step 7"), 2: observation(9, 86, 100)}, 100, LIMIT
    )
    assert sentence == "rank 1 on node7, last at 'step 7', hangs: it has not moved for 10 s"


def test_ranks_that_all_stand_still_at_one_point_are_reported_together():
    sentence = verdict({0: observation(9, 80, 100), 1: observation(9, 80, 100)}, 100, LIMIT)
    assert sentence == "all ranks have stood still after 'step 3' for 10 s"


def test_who_sees_one_rank_only_judges_its_ticks_only():
    assert verdict({0: observation(9, 0, 100)}, 100, LIMIT) is None
    assert verdict({0: observation(9, 0, 80)}, 100, LIMIT) is not None
    assert verdict({}, 100, LIMIT) is None


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=8))
def test_nobody_is_named_while_all_answer_and_one_moves(ranks):
    observations = {rank: observation(beats, beat, tick) for rank, (beats, beat, tick) in enumerate(ranks)}
    sentence = verdict(observations, 100, LIMIT)
    silent = [rank for rank, (_, _, tick) in enumerate(ranks) if 100 - tick > LIMIT]
    if silent:
        assert sentence is not None
        assert sentence.startswith(f"rank {silent[0]} ")
    elif any(100 - beat <= LIMIT for _, beat, _ in ranks):
        assert sentence is None


def test_times_are_those_of_the_watcher_and_move_with_the_counters():
    unheard = Observation(0, 0, "the start", "an unknown host", 90.0, 90.0)
    first = updated(unheard, "4|7|node7|step 1|2", 100.0)
    assert (first.where, first.beat_at, first.tick_at) == ("step 1|2", 100.0, 100.0)
    ticking = updated(first, "4|8|node7|step 1|2", 105.0)
    assert (ticking.beat_at, ticking.tick_at) == (100.0, 105.0)
    moving = updated(ticking, "5|8|node7|step 2", 107.0)
    assert (moving.beat_at, moving.tick_at) == (107.0, 105.0)
