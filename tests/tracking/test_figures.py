from types import SimpleNamespace

from lth_diet.tracking.figures import ARM_STYLES, barrier_curves


def test_barriers_have_the_color_of_their_arm_and_arms_of_one_name_differ_in_their_lines():
    points = [SimpleNamespace(step=step, test=[20.0 - step, 22.0 - step]) for step in (0, 10)]
    labels = ["easy 256", "all", "easy 256, balanced", "all, 50 % noise"]
    (axes,) = barrier_curves(dict.fromkeys(labels, points), "title").axes
    lines = [container.lines[0] for container in axes.containers]
    assert [line.get_color() for line in lines] == [ARM_STYLES[name][0] for name in ("easy", "all", "easy", "all")]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"{label} (n = 2)" for label in labels]
