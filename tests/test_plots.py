import sys

import pytest
from matplotlib.colors import same_color

from statprune.errors import ExperimentError
from statprune.experiments.plots import PICTURED, figure, plot
from statprune.results import Result


def measured(label, pattern, perplexity, model="tiny", samples=128, seed=0):
    return Result("perplexity", model, label, pattern, samples, seed, values={"perplexity": perplexity})


def dense(perplexity, model="tiny"):
    return Result("perplexity", model, "dense", values={"perplexity": perplexity})


def timed(label, statistics, pruning, model="tiny"):
    values = {"statistics": statistics, "pruning": pruning, "total": statistics + pruning}
    return Result("runtime", model, label, "50%", 128, 0, values=values)


SPARSITY = [
    dense(5.0),
    *(measured("wanda", pattern, value) for pattern, value in [("70%", 90.0), ("30%", 5.5), ("50%", 6.0)]),
    *(measured("wanda+energy", pattern, value) for pattern, value in [("30%", 5.25), ("50%", 5.75), ("70%", 20.0)]),
]
CALIBRATION = [
    dense(5.0),
    *(measured("wanda", "50%", 8.0 + seed, samples=4, seed=seed) for seed in range(3)),
    *(measured("wanda", "50%", 7.0 + seed / 2, samples=16, seed=seed) for seed in range(3)),
    *(measured("cvr", "50%", value, samples=samples) for samples, value in [(4, 7.0), (16, 6.5)]),
]
RUNTIME = [timed("magnitude", 0.0, 0.01), timed("wanda", 0.2, 0.05), timed("sparsegpt", 0.25, 0.75)]
CORRECTION = [
    dense(9.0),
    Result("perplexity", "tiny", "sparsegpt", "50%", 128, 0, values={"perplexity": 12.0, "pruning seconds": 4.0}),
]


def costly(label, pattern, perplexity, seconds, model="tiny", seed=0):
    values = {"perplexity": perplexity, "pruning seconds": seconds}
    return Result("perplexity", model, label, pattern, 128, seed, values=values)


FRONTIER = [
    dense(10.0),
    costly("sparsegpt", "2:4", 14.0, 4.0),
    costly("sparsegpt", "50%", 12.0, 4.0),
    costly("best", "2:4", 11.0, 16.0),
    costly("fast", "2:4", 12.0, 6.0),
    costly("best", "50%", 9.0, 16.0),
    costly("magnitude", "50%", 50.0, 0.1),
    dense(20.0, "other"),
    costly("sparsegpt", "50%", 30.0, 10.0, "other"),
    costly("fast", "50%", 25.0, 10.0, "other"),
    dense(20.0, "alone"),
    costly("fast", "50%", 25.0, 10.0, "alone"),
]
RESULTS = {
    "sparsity": SPARSITY, "calibration": CALIBRATION, "runtime": RUNTIME, "correction": CORRECTION, "frontier": FRONTIER,
}  # fmt: skip


def lines(axes):
    return {str(line.get_label()): line for line in axes.get_lines()}


def legend(drawn):
    return [text.get_text() for text in drawn.legends[0].get_texts()]


@pytest.mark.parametrize("experiment", PICTURED)
def test_the_picture_is_written(experiment, tmp_path):
    plot(experiment, RESULTS[experiment], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_no_global_state_is_touched(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot("sparsity", SPARSITY, tmp_path / "picture.png")
    assert dict(matplotlib.rcParams) == before


def test_sparsity_has_a_line_a_method_sorted_by_sparsity_and_dense():
    drawn = figure("sparsity", SPARSITY)
    (axes,) = drawn.axes
    found = lines(axes)
    assert list(found) == ["wanda", "wanda+energy", "dense"] == legend(drawn)
    assert list(found["wanda"].get_xdata()) == [30.0, 50.0, 70.0]
    assert list(found["wanda"].get_ydata()) == [5.5, 6.0, 90.0]
    assert list(found["dense"].get_ydata()) == [5.0, 5.0]
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == ("sparsity [%]", "perplexity", "tiny")


def test_compensation_has_the_colour_of_its_criterion_and_another_line():
    found = lines(figure("sparsity", SPARSITY).axes[0])
    plain, compensated = found["wanda"], found["wanda+energy"]
    assert same_color(plain.get_color(), compensated.get_color())
    assert plain.get_marker() == compensated.get_marker()
    assert plain.get_linestyle() != compensated.get_linestyle()


def test_methods_without_a_colour_of_their_own_get_different_ones():
    labels = ["wanda", "alpha 0", "alpha 0.5", "alpha 1"]
    found = lines(figure("sparsity", [measured(label, "50%", 6.0) for label in labels]).axes[0])
    assert len({(found[label].get_color(), found[label].get_marker()) for label in labels}) == 4


def test_a_method_looks_the_same_in_every_panel():
    results = [*SPARSITY, measured("mine", "50%", 6.0), measured("yours", "50%", 6.0)]
    results += [measured("yours", "50%", 6.0, "other"), measured("theirs", "50%", 6.0, "other")]
    drawn = figure("sparsity", results)
    first, second = map(lines, drawn.axes)
    assert first["yours"].get_color() == second["yours"].get_color()
    assert legend(drawn) == ["wanda", "wanda+energy", "mine", "yours", "theirs", "dense"]


def test_patterns_of_other_kinds_are_not_points_of_the_line():
    found = lines(figure("sparsity", [*SPARSITY, measured("wanda", "2:4", 7.0), measured("wanda", "odd", 7.0)]).axes[0])
    assert list(found["wanda"].get_xdata()) == [30.0, 50.0, 70.0]


def test_calibration_has_means_a_band_and_the_numbers_as_ticks():
    drawn = figure("calibration", CALIBRATION)
    (axes,) = drawn.axes
    found = lines(axes)
    assert list(found["wanda"].get_xdata()) == [4.0, 16.0]
    assert list(found["wanda"].get_ydata()) == [9.0, 7.5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "16"]
    assert axes.get_xscale() == "log"
    (band,) = axes.collections  # cvr has one seed
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(4.0, 8.0), (4.0, 10.0), (16.0, 7.0), (16.0, 8.0)} <= corners
    assert axes.get_title("left") == "tiny, 50%"


@pytest.mark.parametrize(("highest", "scale"), [(9.0, "linear"), (400.0, "log")])
def test_calibration_is_logarithmic_only_where_a_method_is_far_off(highest, scale):
    drawn = figure("calibration", [*CALIBRATION, measured("magnitude", "50%", highest, samples=4)])
    assert drawn.axes[0].get_yscale() == scale


def test_runtime_has_two_parts_a_bar_and_the_ratio_at_its_end():
    drawn = figure("runtime", RUNTIME)
    (axes,) = drawn.axes
    statistics, pruning = axes.containers
    assert [bar.get_width() for bar in statistics] == [0.0, 0.2, 0.25]
    assert [bar.get_width() for bar in pruning] == [0.01, 0.05, 0.75]
    assert [bar.get_x() for bar in pruning] == [0.0, 0.2, 0.25]
    assert [text.get_text() for text in axes.texts] == ["0.0100 s (100x)", "0.250 s (4.00x)", "1.00 s"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["magnitude", "wanda", "sparsegpt"]
    assert legend(drawn) == ["statistics", "pruning"]


def test_runtime_below_a_second_is_in_milliseconds_and_has_no_ratio_without_sparsegpt():
    (axes,) = figure("runtime", RUNTIME[:2]).axes
    assert [text.get_text() for text in axes.texts] == ["10.0 ms", "250 ms"]
    assert axes.get_xlabel() == "time [ms]"


@pytest.mark.parametrize(("experiment", "one"), [("sparsity", SPARSITY[1]), ("runtime", RUNTIME[0])])
def test_each_model_has_a_panel(experiment, one):
    results = [Result(one.measure, model, one.label, one.pattern, 128, 0, values=one.values) for model in "abc"]
    assert [axes.get_title("left")[0] for axes in figure(experiment, results).axes] == ["a", "b", "c"]


def test_failed_cells_and_infinite_perplexity_leave_a_gap(tmp_path):
    results = [*SPARSITY, measured("cvr", "30%", 5.0), measured("cvr", "70%", float("inf"))]
    results.append(Result("perplexity", "tiny", "cvr", "50%", 128, 0, error="out of memory"))
    assert list(lines(figure("sparsity", results).axes[0])["cvr"].get_xdata()) == [30.0, 70.0]
    plot("sparsity", results, tmp_path / "picture.png")


def test_an_experiment_without_a_picture_is_refused():
    with pytest.raises(ExperimentError, match=r"'ablation'.*Known: sparsity, calibration, runtime, correction"):
        figure("ablation", SPARSITY)


def test_nothing_to_show_is_refused():
    with pytest.raises(ExperimentError, match="no finished result"):
        figure("sparsity", [dense(5.0), Result("perplexity", "tiny", "cvr", "50%", error="out of memory")])


def test_without_matplotlib_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExperimentError, match=r"pip install 'statprune\[experiments\]'"):
        figure("sparsity", SPARSITY)


def test_correction_is_a_point_a_method_and_the_front_of_those_that_nothing_beats():
    def point(label, perplexity, seconds, seed=0):
        values = {"perplexity": perplexity, "pruning seconds": seconds}
        return Result("perplexity", "tiny", label, "50%", 128, seed, values=values)

    results = [
        dense(9.0),
        point("sparsegpt", 12.0, 4.0),
        point("cvr+energy", 13.0, 2.0),
        point("cvr+least-squares", 10.0, 3.0),
        point("cvr+least-squares", 12.0, 5.0, seed=1),
        point("wanda", 15.0, 2.5),
    ]
    drawn = figure("correction", results)
    (axes,) = drawn.axes
    places = {line.get_label(): tuple(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert places["cvr+least-squares"] == ((4.0, 11.0),)
    assert places["sparsegpt"] == ((4.0, 12.0),)
    (front,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert list(zip(*front.get_data(), strict=True)) == [(2.0, 13.0), (4.0, 11.0)]
    assert "dense" in legend(drawn)


def test_the_frontier_has_a_panel_a_model_and_shares_of_sparsegpts_loss_and_time():
    drawn = figure("frontier", FRONTIER)
    assert [axes.get_title("left") for axes in drawn.axes] == ["tiny", "other"]  # `alone` has nothing to stand beside
    points = {
        (axes.get_title("left"), label): (*line.get_xdata(), *line.get_ydata())
        for axes in drawn.axes
        for label, line in lines(axes).items()
        if not label.startswith("_")
    }
    assert points == {
        ("tiny", "best 2:4"): (4.0, 0.25),
        ("tiny", "fast 2:4"): (1.5, 0.5),
        ("tiny", "sparsegpt"): (1, 1),
        ("other", "fast 50%"): (1.0, 0.5),
        ("other", "sparsegpt"): (1, 1),
    }
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in drawn.axes)
    # What is at or below the dense model has no place on a logarithmic axis, magnitude would squeeze the rest: so in words.
    (text,) = drawn.axes[0].texts
    assert text.get_text() == "beyond the edges:\nbest 50%\nmagnitude 50%"
    assert not drawn.axes[1].texts
    assert legend(drawn) == ["best", "fast", "sparsegpt, any pattern", "50%", "2:4"]


def test_a_method_has_one_marker_and_a_pattern_one_colour_in_all_panels():
    tiny, other = (lines(axes) for axes in figure("frontier", FRONTIER).axes)
    assert tiny["fast 2:4"].get_marker() == other["fast 50%"].get_marker() != tiny["best 2:4"].get_marker()
    assert tiny["fast 2:4"].get_color() == tiny["best 2:4"].get_color() != other["fast 50%"].get_color()


def test_a_frontier_without_its_reference_is_refused():
    with pytest.raises(ExperimentError, match="got no finished result of a method beside sparsegpt's"):
        figure("frontier", [dense(20.0), costly("fast", "50%", 25.0, 10.0)])
