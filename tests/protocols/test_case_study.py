"""The case study of one new latent: which latents moved, and the page that shows it."""

import math

import pytest
import torch

from hedgelab.protocols.case_study import Snippet, most_moved, page
from hedgelab.saes import TopKSAE, duplicate, widen


def test_most_moved_latents_come_first_with_their_angles():
    eye = torch.eye(6)
    angles = [0.1, -0.6, 0.3]
    control = torch.stack([math.cos(a) * eye[i] + math.sin(a) * eye[5] for i, a in enumerate(angles)])
    extended = torch.cat([eye[:3], 2 * eye[5:]])
    found = most_moved(3 * control, extended)
    assert [moved.latent for moved in found] == [1, 2, 0]
    assert found[0].toward == pytest.approx(math.sin(0.6), abs=1e-6)
    assert found[1].toward == pytest.approx(-math.sin(0.3), abs=1e-6)
    assert found[1].before == pytest.approx(math.sin(0.3), abs=1e-6)
    assert found[1].after == pytest.approx(0, abs=1e-6)
    assert found[1].cosine == pytest.approx(math.cos(0.3), abs=1e-6)
    assert len(most_moved(control, extended, count=2)) == 2


class Probe:
    def promoted(self, direction):
        return [f"<{float(direction.detach().norm()):.0f}>"]

    def contexts(self, sae, latents):
        return {latent: [Snippet("a & ", f"t{latent}", " b", 1.0 + latent)] if latent else [] for latent in latents}


def test_page_shows_every_moved_latent_before_and_after_and_escapes_text():
    control = TopKSAE(8, 4, k=2)
    extended = widen(duplicate(control), 1)
    text = page(control, extended, Probe())
    assert "<h2>New latent 4</h2>" in text
    assert all(f"<h2>Latent {latent}</h2>" in text for latent in range(4))
    assert text.count("before (control)") == text.count("after (extended)") == 4
    assert "&lt;1&gt;" in text
    assert "a &amp; " in text
    assert "fires nowhere" in text
    assert "promotes" not in page(control, extended)


def test_page_without_text_is_the_table_alone():
    control = TopKSAE(8, 4, k=2)
    text = page(control, widen(control, 1))
    assert text.count("<tr>") == 1 + 4
    assert "<h2>" not in text
