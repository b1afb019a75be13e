"""The picture of a run and the recording of a terminal: valid SVG, everything shown, nothing executed."""

from xml.etree import ElementTree as ET

import pytest

from isthmus.cluster.report.folder import read_folder
from isthmus.cluster.report.summary import held_out
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.picture import draw_picture
from isthmus.demo.recording import animation
from tests.run_folder import CAPTIONS, HOSTILE, write_run

pytestmark = pytest.mark.unit
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_shows_each_image_with_its_captions(tmp_path):
    config = write_run(str(tmp_path), ObjectStore())
    tree = ET.fromstring(draw_picture(read_folder(join(config.run.url, config.run.name), ObjectStore())))
    images = tree.findall(f".//{SVG}image")
    assert len(images) == 4
    assert all(image.get("href").startswith("data:image/jpeg;base64,") for image in images)
    texts = [text.text for text in tree.findall(f".//{SVG}text")]
    assert [text for text in texts if text.startswith("true: ")][:2] == [f"true: {caption}" for caption in CAPTIONS[:2]]
    assert f"finds: {CAPTIONS[0]}" in texts
    assert any(text.startswith(f"true: {HOSTILE[:5]}") for text in texts), "markup of a caption is shown, not obeyed"
    assert tree.findall(f".//{SVG}script") == []


def test_the_picture_leaves_out_what_it_is_told_to(tmp_path):
    config = write_run(str(tmp_path), ObjectStore())
    facts = read_folder(join(config.run.url, config.run.name), ObjectStore())
    first = next(held_out(facts))
    shown = draw_picture(facts, {first.key.rpartition("#")[2]})
    assert f"true: {first.caption}" not in shown
    assert shown.count("<image ") == draw_picture(facts).count("<image ") - 1


def test_the_recording_shows_one_frame_after_the_other(tmp_path):
    tree = ET.fromstring(animation(["$ one\n\x1b[32mrunning\x1b[0m <b>", "$ two", "$ three"]))
    frames = tree.findall(f".//{SVG}g[@class='frame']")
    texts = ["".join(text.text for text in frame.iter(f"{SVG}text")) for frame in frames]
    assert [text.split()[:2] for text in texts] == [["$", "one"], ["$", "two"], ["$", "three"]]
    assert "running" in texts[0]
    assert "<b>" in texts[0]
    style = tree.find(f"{SVG}style").text
    # 1.2 s of each, 8 s of the last
    assert (
        "@keyframes k1 { 0% { visibility: hidden }\n11.54% { visibility: visible } 23.08% { visibility: hidden } }"
        in style
    )
