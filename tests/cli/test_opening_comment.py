"""A run describes itself with the first lines of its config."""

from hedgelab.config.tree import opening_comment


def test_opening_comment_is_the_last_files_first_comment_lines(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("# first\nx: 1\n")
    second.write_text("# shows hedging,\n# in one latent\nx: 1 # not this\n# nor this\n")
    assert opening_comment([first, second]) == "shows hedging, in one latent"
    first.write_text("x: 1\n")
    assert opening_comment([first]) is None
    assert opening_comment([]) is None
