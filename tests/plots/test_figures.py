import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from hedgelab.plots import cosine_heatmaps, cosines_over_training, decoder_bias, firing_density, loss_terms


def texts(axes):
    return [text.get_text() for text in axes.texts]


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=30)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return figure.get_size_inches() * figure.dpi


def test_small_heatmaps_print_their_values_on_one_signed_scale():
    figure = cosine_heatmaps([[0.97, 0.24]], [[0.9, -0.001]])
    decoder, encoder, bar = figure.axes
    assert [decoder.get_title(), encoder.get_title(), bar.get_ylabel()] == ["decoder", "encoder", "cosine"]
    assert texts(decoder) == ["0.97", "0.24"]
    assert texts(encoder) == ["0.90", "0.00"]
    assert decoder.images[0].get_clim() == encoder.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in decoder.get_xticklabels()] == ["f0", "f1"]
    assert decoder.get_xlabel() == "true feature"


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (1, 40), (16, 16), (3, 60), (40, 20), (300, 450)])
def test_heatmaps_of_all_sizes_stay_within_a_page(rows, columns):
    cosines = np.random.default_rng(0).uniform(-1, 1, (rows, columns))
    width, height = pixels(cosine_heatmaps(cosines, cosines))
    assert 300 < width < 2600
    assert 150 < height < 2200


def test_large_heatmaps_order_latents_and_keep_the_strongest_of_each_block():
    order = np.random.default_rng(0).permutation(400)
    decoder = np.zeros((400, 400))
    decoder[np.arange(400), order] = -0.9
    shown = cosine_heatmaps(decoder, decoder).axes[0].images[0].get_array()
    assert shown.shape == (200, 200)
    np.testing.assert_allclose(np.diag(shown), -0.9)
    assert np.count_nonzero(shown) == 200


def test_decoder_bias_has_one_bar_a_feature():
    axes = decoder_bias([0.2, -0.03, 0.0], 0.21).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.2, -0.03, 0.0]
    assert texts(axes) == ["0.20", "-0.03", "0.00"]
    assert "0.21" in axes.get_title()
    assert texts(decoder_bias(np.full(500, 0.1), 1.0).axes[0]) == []


def test_loss_terms_are_logarithmic_only_where_they_can_be():
    steps = [0, 1, 2]
    figure = loss_terms({"mse": (steps, [1.0, 0.1, 0.01]), "loss": (steps, [1.1, 0.2, 0.1])})
    assert figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["loss (sum)", "mse"]
    assert figure.axes[0].get_xlabel() == "step"
    signed = loss_terms({"mse": (steps, [1.0, 0.1, 0.01]), "negative": (steps, [-1.0, float("nan"), 0.1])})
    assert signed.axes[0].get_yscale() == "linear"
    pixels(signed)


@pytest.mark.parametrize(("d_sae", "n", "panels"), [(1, 2, 2), (3, 4, 6), (1, 30, 2), (16, 20, 2)])
def test_cosines_over_training_follow_every_pair(d_sae, n, panels):
    cosines = np.random.default_rng(0).uniform(-1, 1, (5, d_sae, n))
    figure = cosines_over_training(range(5), cosines, -cosines)
    assert len(figure.axes) == panels
    drawn = [line.get_ydata() for axes in figure.axes for line in axes.lines if len(line.get_ydata()) == 5]
    drawn += [path.vertices[:, 1] for axes in figure.axes for group in axes.collections for path in group.get_paths()]
    assert len(drawn) == 2 * d_sae * n
    assert sorted(line[0] for line in drawn) == pytest.approx(sorted(np.r_[cosines[0], -cosines[0]].ravel()))


def test_firing_density_counts_the_dead_apart():
    axes = firing_density([0.5, 0.1, 0.1, 0.001, 0.0]).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert axes.get_title() == "5 latents, of which 1 never fired"
    assert texts(firing_density(np.zeros(3)).axes[0]) == ["no latent fires"]


def test_always_firing_latents_are_counted():
    assert sum(bar.get_height() for bar in firing_density(np.ones(7)).axes[0].patches) == 7


def test_pyplot_is_left_alone():
    import subprocess
    import sys

    code = "import sys, hedgelab.plots; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert isinstance(firing_density([0.1]), Figure)
