"""The rate at the steps where one knows it."""

import pytest

from training.schedules import schedule


def test_a_constant_rate_is_reached_after_the_warm_up():
    assert [schedule("constant", 6, 0.5)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule("constant", 6, 0.0)(0) == 1.0


def test_a_part_of_a_step_is_a_step():
    assert schedule("constant", 10, 0.11)(1) == pytest.approx(2 / 3)
    assert schedule("constant", 100, 0.07)(7) == 1.0 > schedule("constant", 100, 0.07)(6)


@pytest.mark.parametrize(("lowest", "half_way"), [(0.0, 0.5), (0.1, 0.55)])
def test_cosine_falls_to_the_lowest_rate_and_stays(lowest, half_way):
    rate = schedule("cosine", 1000, 0.1, min_lr_ratio=lowest)
    assert rate(0) == pytest.approx(1 / 101)
    assert rate(99) < rate(100) == 1.0
    assert rate(550) == pytest.approx(half_way)
    assert rate(1000) == rate(5000) == pytest.approx(lowest)


def test_wsd_is_flat_and_then_falls():
    rate = schedule("wsd", 1000, 0.0, decay_ratio=0.2)
    assert [rate(step) for step in (0, 400, 800)] == pytest.approx([1.0, 1.0, 1.0])
    assert [rate(step) for step in (900, 1000)] == pytest.approx([0.5, 0.0])
    assert schedule("wsd", 1000, 0.0, min_lr_ratio=0.1, decay_ratio=0.2)(900) == pytest.approx(0.55)
    assert schedule("wsd", 1000, 0.0, decay_ratio=0.0)(1000) == 1.0


def test_inverse_square_root_peaks_at_the_last_step_of_the_warm_up():
    rate = schedule("inverse_sqrt", 1000, 0.1)
    assert [rate(step) for step in (0, 49, 99)] == pytest.approx([0.01, 0.5, 1.0])
    assert rate(399) == pytest.approx(0.5)  # four times the warm-up: half the rate
    assert schedule("inverse_sqrt", 1000, 0.0)(3) == pytest.approx(0.5)
