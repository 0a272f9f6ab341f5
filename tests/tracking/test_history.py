from hypothesis import given
from hypothesis import strategies as st

from hedgelab.tracking.history import ThinnedSeries


@given(st.integers(1, 2000), st.integers(2, 50))
def test_kept_steps_are_evenly_spread_from_the_first(offers, limit):
    series = ThinnedSeries(limit)
    for step in range(offers):
        series.offer(step, lambda step=step: -step)
    assert 0 < len(series.steps) <= limit
    stride = series.steps[1] if len(series.steps) > 1 else offers
    assert series.steps == list(range(0, offers, stride))
    assert series.values == [-step for step in series.steps]
    assert offers <= limit or len(series.steps) >= limit // 2


@given(st.integers(0, 300), st.integers(0, 300))
def test_resuming_changes_nothing(before, after):
    whole, first, second = (ThinnedSeries(10) for _ in range(3))
    for step in range(before):
        first.offer(step, lambda step=step: step)
    second.load_state_dict(first.state_dict())
    for step in range(before, before + after):
        second.offer(step, lambda step=step: step)
    for step in range(before + after):
        whole.offer(step, lambda step=step: step)
    assert second.state_dict() == whole.state_dict()


def test_values_that_are_not_kept_are_not_made():
    series, made = ThinnedSeries(4), []
    for step in range(100):
        series.offer(step, lambda step=step: made.append(step))
    assert len(made) < 25
