"""Saved profiles, shown and compared: the numbers by hand, the figures by what is drawn, the command by what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import hostile
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from vlmattn import HeadProfile, InputError, SinkProfile, pages
from vlmattn.embedded import FOLDER
from vlmattn.inspection.atlas import MEANING, figures, page
from vlmattn.inspection.differences import compare_profiles
from vlmattn.inspection.listings import listings
from vlmattn.interventions.profiles import load_profile

LAYERS, HEADS = 6, 10  # three heads are 5 %


def heads(seed=0, names=("causal", "importance"), fingerprint="one", source="some/model", **scores):
    rng = np.random.default_rng(seed)
    made = {name: rng.exponential(1, (LAYERS, HEADS)) for name in names} | scores
    made = {name: tuple(map(tuple, np.asarray(table, dtype=float).tolist())) for name, table in made.items()}
    return HeadProfile(fingerprint=fingerprint, source=source, scores=made, prompts=("what?",), seed=seed)


def sinks(dims=(3, 9), tau=20.0, layers=(1, 5), levels=True, fingerprint="one", source="some/model"):
    levels = tuple((float(n), n / 2) for n in range(LAYERS)) if levels else ()
    return SinkProfile(fingerprint=fingerprint, source=source, dims=dims, tau=tau, layers=layers, levels=levels)


def spearman_by_hand(one, other):
    """Ranks by counting: how many are smaller, and half of those that are alike."""

    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    a, b = np.array(ranks(one)), np.array(ranks(other))
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5


def test_agreement_by_hand():
    rng = np.random.default_rng(5)
    one, other = rng.integers(0, 20, (2, LAYERS, HEADS))  # many are alike
    one[0, :3], other[0, 1:4] = (90, 80, 70), (95, 85, 75)  # the top three; two of them are the same heads
    found = compare_profiles(heads(names=(), x=one), heads(names=(), x=other)).scores["x"]
    assert found.spearman == pytest.approx(spearman_by_hand(one.ravel().tolist(), other.ravel().tolist()))
    assert found.overlap == pytest.approx(2 / 3)
    assert np.array_equal(found.change, other - one)


def test_the_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(3):
        one, other = np.random.default_rng(seed).integers(0, 9, (2, LAYERS, HEADS))
        found = compare_profiles(heads(names=(), x=one), heads(names=(), x=other)).scores["x"]
        assert found.spearman == pytest.approx(stats.spearmanr(one.ravel(), other.ravel()).statistic)


def test_profiles_agree_with_themselves_and_not_with_their_opposite():
    profile = heads()
    same = compare_profiles(profile, profile)
    assert all((s.spearman, s.overlap) == (pytest.approx(1), 1) and not s.change.any() for s in same.scores.values())
    opposite = heads(names=(), causal=-np.array(profile.scores["causal"]), new=np.zeros((LAYERS, HEADS)))
    found = compare_profiles(profile, opposite)
    assert (found.scores["causal"].spearman, found.scores["causal"].overlap) == (pytest.approx(-1), 0)
    assert (tuple(found.scores), found.only_first, found.only_second) == (("causal",), ("importance",), ("new",))
    flat = compare_profiles(opposite, opposite).scores["new"]
    assert np.isnan([flat.spearman, flat.overlap]).all()  # nothing is ranked


def test_sinks_are_compared():
    found = compare_profiles(sinks(dims=(9, 3, 5)), sinks(dims=(9, 12, 3), tau=25.0, layers=(0, 0)))
    assert (found.both, found.only_first, found.only_second) == ((3, 9), (5,), (12,))
    (facts, levels) = listings(found)
    assert {row[0]: row[1:] for row in facts.rows} == {
        "dimensions in both": ("3, 9", "3, 9"),
        "dimensions only here": ("5", "12"),
        "tau": ("20", "25"),
        "in layers": ("1 to 4", "none"),
    }
    assert levels.rows[3] == ("3", "3.00", "1.50", "3.00", "1.50")


def test_what_cannot_be_compared_is_said():
    for first, second, match in (
        (heads(), heads(fingerprint="two", source="other/model"), r"'some/model' \(one\) and 'other/model' \(two\)"),
        (heads(), sinks(), "one kind"),
        (sinks(), heads(), "one kind"),
        (heads(names=("a",)), heads(names=("b",)), "no score in common: a and b"),
        (heads(), heads(causal=[[1.0, 2.0]], names=()), "layers and heads"),
    ):
        with pytest.raises(InputError, match=match) as error:
            compare_profiles(first, second)
        assert "\n" not in str(error.value)


def frames(axis):
    """(layer, head) of the heads with a frame."""
    return {(round(r.get_y() + r.get_height() / 2), round(r.get_x() + r.get_width() / 2)) for r in axis.patches}


def test_maps_show_the_scores():
    signed = np.linspace(-1, 3, LAYERS * HEADS).reshape(LAYERS, HEADS)
    profile = heads(names=("causal",), importance=signed, retrieval=np.zeros((LAYERS, HEADS)))
    drawn = figures(profile)
    assert list(drawn) == ["causal", "importance", "retrieval"]
    for name, colours, limits in (
        ("causal", "cividis", (0, np.max(profile.scores["causal"]))),
        ("importance", "PuOr", (-3, 3)),  # 0 in the middle
        ("retrieval", "cividis", (0, 1)),
    ):
        axis = drawn[name].axes[0]
        (image,) = axis.images
        assert np.array_equal(image.get_array(), profile.scores[name])
        assert (image.get_cmap().name, image.get_clim()) == (colours, pytest.approx(limits))
        assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(loc="left")) == ("head", "layer", name)
        assert axis.get_ylim()[0] < axis.get_ylim()[1]  # the first layer is at the bottom
        assert frames(axis) == (set() if name == "retrieval" else set(profile.top(name, 0.05)))
        assert drawn[name].get_size_inches()[0] * 96 <= 364  # a phone's width without margins


def test_maps_of_differences_have_zero_in_the_middle():
    first, second = heads(0), heads(1)
    drawn = figures(compare_profiles(first, second))
    assert list(drawn) == ["causal-difference", "importance-difference"]
    (image,) = drawn["causal-difference"].axes[0].images
    change = np.array(second.scores["causal"]) - np.array(first.scores["causal"])
    assert np.array_equal(image.get_array(), change)
    assert image.get_cmap().name == "PuOr"
    assert image.get_clim() == pytest.approx((-abs(change).max(), abs(change).max()))
    (same,) = figures(compare_profiles(first, first))["causal-difference"].axes[0].images
    assert same.get_clim() == (-1, 1)


def test_numbers_that_are_none_are_left_out_of_the_colours():
    broken = heads(causal=np.where(np.eye(LAYERS, HEADS) > 0, np.nan, 2.0))
    assert figures(broken)["causal"].axes[0].images[0].get_clim() == (0, 2)


def test_sinks_are_drawn_by_layer():
    (axis,) = figures(sinks())["sinks"].axes
    bars = [patch for patch in axis.patches if to_rgba(pages.COLOURS[1]) == patch.get_facecolor()]
    above = [patch for patch in axis.patches if to_rgba(pages.COLOURS[2]) == patch.get_facecolor()]
    assert [bar.get_height() for bar in bars] == list(range(LAYERS))
    assert [(bar.get_y(), bar.get_height()) for bar in above] == [(n, n / 2) for n in range(LAYERS)]
    (span,) = (patch for patch in axis.patches if patch not in bars + above)
    assert (span.get_x(), span.get_width()) == (0.5, 4)  # layers 1 to 4
    both = figures(compare_profiles(sinks(), sinks(levels=False)))["sinks"].axes
    assert [axis.get_title(loc="left") for axis in both] == ["first", "second"]
    assert figures(sinks(levels=False)) == {}


def test_tables_rank_heads():
    profile = heads(retrieval=np.zeros((LAYERS, HEADS)))
    (listing,) = listings(profile, 4)
    assert listing.columns == ("", "causal", "importance", "retrieval")
    for rank, (layer, head) in enumerate(profile.top("causal", 1.0)[:4]):
        assert listing.rows[rank][:2] == (
            str(rank + 1),
            f"{layer}.{head}  {profile.scores['causal'][layer][head]:#.3g}",
        )
    assert [row[3] for row in listing.rows] == ["all alike", "", "", ""]
    for first, second in ((0, 1), (1, 0)):  # the largest change is a rise, then a fall
        (agreement, changed) = listings(compare_profiles(heads(first), heads(second)), 3)
        change = np.array(heads(second).scores["causal"]) - np.array(heads(first).scores["causal"])
        layer, head = np.unravel_index(np.abs(change).argmax(), change.shape)
        assert changed.rows[0][1] == f"{layer}.{head}  {change[layer, head]:+#.3g}"
    assert len(changed.rows) == 3
    assert [row[0] for row in agreement.rows] == ["causal", "importance"]


def test_a_page_needs_nothing_from_elsewhere_and_shows_names_as_they_are():
    profile = replace(heads(names=("causal", "<b>x</b>")), source="<script>alert(1)</script>")
    for shown in (profile, compare_profiles(profile, profile), sinks(), compare_profiles(sinks(), sinks())):
        text = page(shown, "A & <i>B</i>")
        assert text.count("A &amp; &lt;i&gt;B&lt;/i&gt;") == 2  # the title and the heading
        assert "<i>B" not in text
        assert "<script" not in text
        assert "<b>x</b>" not in text
        assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", text)
        assert text.count("<svg") == len(figures(shown))
    assert MEANING["causal"] in page(profile, "")


@pytest.mark.filterwarnings("ignore")  # letters that the font lacks
def test_names_are_text_on_the_page():
    def made(name):
        profile = heads(names=(name, "a"), source=name, fingerprint=name)
        return page(profile, name) + page(compare_profiles(profile, profile), name) + page(sinks(source=name), name)

    assert hostile.elements(made(hostile.ALL)) == hostile.elements(made("name"))


def test_every_score_of_the_library_has_a_meaning():
    assert set(MEANING) >= {"vhd", "visual", "retrieval", "causal", "needle", "importance"}
    assert set(HeadProfile.load(FOLDER).scores) <= set(MEANING)


def test_the_kind_is_recognised_by_content(tmp_path):
    for made in (heads(), sinks(), sinks(levels=False)):
        assert load_profile(made.save(tmp_path / "any.json")) == made
        assert load_profile(made.save(tmp_path / type(made).__name__).parent) == made
    (tmp_path / "least.json").write_text('{"fingerprint": "f", "dims": [1], "tau": 20}')
    assert load_profile(tmp_path / "least.json") == SinkProfile(fingerprint="f", dims=(1,), tau=20)
    for made in (heads(), sinks()):
        made.save(tmp_path / "both")
    with pytest.raises(InputError, match=r"two profiles; name one of them: .*heads.json or .*sinks.json"):
        load_profile(tmp_path / "both")


BROKEN = {
    "no JSON": "{",
    "no text": b"\xff\xfe\x00",
    "a list": "[1]",
    "another file": '{"recipe": "none"}',
    "no fingerprint": '{"scores": {"a": [[1]]}}',
    "scores without names": '{"fingerprint": "f", "scores": [[1]]}',
    "no scores": '{"fingerprint": "f", "scores": {}}',
    "ragged scores": '{"fingerprint": "f", "scores": {"a": [[1], [1, 2]]}}',
    "scores that are numbers": '{"fingerprint": "f", "scores": {"a": 1}}',
    "scores of text": '{"fingerprint": "f", "scores": {"a": [["x"]]}}',
    "levels of three": '{"fingerprint": "f", "dims": [1], "tau": 20, "levels": [[1, 2, 3]]}',
    "levels that are numbers": '{"fingerprint": "f", "dims": [1], "tau": 20, "levels": [1]}',
    "one layer": '{"fingerprint": "f", "dims": [1], "tau": 20, "layers": [1]}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_profile(run, tmp_path, name):
    path, content = tmp_path / "x.json", BROKEN[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("profile", str(path), "--html", str(tmp_path / "x.html"))
    assert (code, out) == (2, "")
    assert f"{path}: not a " in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x.html").exists()


def test_the_command_shows_the_bundled_model(run, tmp_path):
    target, folder = tmp_path / "new" / "page.html", tmp_path / "figures"
    code, out, err = run("profile", "embedded", "--top", "3", "--html", str(target), "--png", str(folder))
    assert (code, err) == (0, "")
    profile = HeadProfile.load(FOLDER)
    for layer, head in profile.top("causal", 1.0)[:3]:
        assert f"{layer}.{head}  {profile.scores['causal'][layer][head]:#.3g}" in out
    layer, head = profile.top("causal", 1.0)[3]
    assert f"{layer}.{head}  {profile.scores['causal'][layer][head]:#.3g}" not in out
    assert f"measured on {profile.source} ({profile.fingerprint})" in out
    assert target.read_text() == page(profile, "embedded", 3)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in profile.scores)
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.width > 600
    code, out, _ = run("profile", "embedded", "--score", "visual")
    assert code == 0
    assert "visual" in out
    assert "causal" not in out


def test_the_command_compares_two(run, tmp_path):
    one, other = heads(0).save(tmp_path / "a.json"), heads(1, names=("causal", "needle")).save(tmp_path / "b.json")
    target = tmp_path / "page.html"
    code, out, err = run("profile", str(one), str(other), "--html", str(target), "--png", str(tmp_path / "png"))
    assert (code, err) == (0, "")
    found = compare_profiles(heads(0), heads(1, names=("causal", "needle")))
    (line,) = (line for line in out.splitlines() if line.split()[:1] == ["causal"] and len(line.split()) == 3)
    assert line.split()[1:] == [f"{found.scores['causal'].spearman:.2f}", f"{found.scores['causal'].overlap:.2f}"]
    assert re.search(r"importance +only in the first", out)
    assert re.search(r"needle +only in the second", out)
    assert target.read_text() == page(found, f"{one} and {other}")
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["causal-difference.png"]
    code, out, _ = run("profile", str(sinks().save(tmp_path / "s.json")), str(sinks((3,)).save(tmp_path / "t.json")))
    assert code == 0
    assert re.search(r"dimensions only here +9 +none", out)


def test_names_of_scores_do_not_name_other_files(run, tmp_path):
    folder = tmp_path / "deep" / "png"
    assert run("profile", str(heads(names=("../../x",)).save(tmp_path / "a.json")), "--png", str(folder))[0] == 0
    assert [path.name for path in folder.iterdir()] == ["______x.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "deep"]


def test_errors_of_the_command_are_one_line(run, tmp_path):
    sink, head = sinks().save(tmp_path / "s.json"), heads().save(tmp_path / "h.json")
    other = heads(fingerprint="two", source="other/model").save(tmp_path / "o.json")
    (tmp_path / "empty").mkdir()
    for arguments, match in (
        ((tmp_path / "nothing.json",), "cannot read the profile"),
        ((tmp_path / "empty",), "cannot read the profile"),
        ((head, tmp_path / "nothing.json"), "cannot read the profile"),
        ((head, "--score", "nix"), "no score 'nix'; it has causal, importance"),
        ((sink, "--score", "causal"), "no scores; leave out --score"),
        ((head, sink), "one kind"),
        ((head, other), "'some/model' (one) and 'other/model' (two)"),
        (("embedded", head), "'the bundled model embedded'"),
        ((head, "--html", tmp_path), "give another --html"),
        ((head, "--html", head / "x.html"), "give another --html"),
        ((head, "--png", head), "give another --png"),
    ):
        code, _, err = run("profile", *map(str, arguments))
        assert code == 2, arguments
        assert match in err
        assert len(err.strip().splitlines()) == 1
    assert run("profile", str(head), "--top", "0")[0] == 2
    assert json.loads(head.read_text())["scores"]  # still there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "h.json", "o.json", "s.json"]
