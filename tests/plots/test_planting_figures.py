"""Figures of a trial by lot."""

from hedgelab.plots.hedging import doses_and_responses, shares_against_theory


def test_every_width_has_its_place_in_the_legend():
    kinds, widths, doses = ("BatchTopK", "vanilla"), (64, 256, 1024), [0.0, 0.3]
    arms = [
        {"kind": kind, "width": width, "dose": dose, "share": 0.1, "share_low": 0.0, "share_high": 0.2, "predicted": 0.1}
        for kind in kinds for width in widths for dose in (*doses, "silent")
    ]  # fmt: skip
    pairs = [{"kind": kind, "width": width, "share": 0.1, "predicted": 0.2} for kind in kinds for width in widths]
    labels = [f"{width} latents" for width in widths]
    (legend,) = doses_and_responses(arms, doses).legends
    assert [text.get_text() for text in legend.get_texts()] == [*labels, "omitted-variable theory"]
    (legend,) = shares_against_theory(pairs).legends
    assert [text.get_text() for text in legend.get_texts()] == labels


def test_a_legend_is_no_wider_than_its_figure():
    share = {"share": 0.1, "share_low": 0.0, "share_high": 0.2, "predicted": 0.1}
    widths = 64, 256, 1024, 4096
    figure = doses_and_responses([{"kind": "BatchTopK", "width": width, "dose": 0.3, **share} for width in widths], [0.3])
    figure.canvas.draw()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
