"""What is certified about a head, on the page and in the text: with what its boxes contain, and escaped."""

import re

from bfpo.core.certificate import CLAIM, BoxResult, Certificate, HeadFile, RepairRound
from bfpo.report.html import write_report

from .fake_runs import HOSTILE, SCRIPT

HEAD = HeadFile("heads/cost.safetensors", "abc", (-1,), 64, 16)


def box(kind, outcome, *, inside, seen=True):
    return BoxResult(f"{kind}{HOSTILE}", kind, True, outcome, "milp", 0.5, None, 2.5, 2, inside, 0.75, seen)


def write_certificate(run, **changes):
    boxes = [box("hull", "certified", inside=1), box("hull", "counter-example", inside=0)]
    boxes += [box("radius", "undecided", inside=0)]
    certificate = Certificate(
        "m", "i", HEAD, None, 0.0, boxes, [], [], {}, {}, {}, [f"no box contains {HOSTILE}"], **changes
    )
    (run / "certificate").mkdir(exist_ok=True)
    return certificate.write(run / "certificate")


def test_a_certificate_in_the_run_folder_is_a_section(tmp_path, small_runs):
    write_certificate(small_runs[1])
    page = write_report(tmp_path / "report", small_runs).read_text()
    section = re.search(r'<section id="certificates".*?</section>', page, flags=re.DOTALL)[0]
    rows = re.findall(r"<tr><th scope=\"row\".*?</tr>", section, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    head = "heads/cost.safetensors (16 units, layer -1)"
    hull = ["hull, expected unsafe", "2", "1 (50.0%)", "1", "0", "2.5", "1 of 4 (25.0%)", "75.0%"]
    radius = ["radius, expected unsafe", "1", "0 (0.0%)", "0", "1", "2.5", "0 of 2 (0.0%)", "75.0%"]
    assert [row[1:] for row in cells] == [[head, *hull], [head, *radius]]
    assert CLAIM.replace("'", "&#39;") in section
    assert SCRIPT not in section
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Certified boxes of hidden states" in text
    assert "| 1 (50.0%) |" in text
    assert '<a href="#certificates">' in page


def test_without_a_certificate_there_is_no_section(tmp_path, small_runs):
    page = write_report(tmp_path / "report", small_runs).read_text()
    assert "certificates" not in page
    assert "Certified" not in (tmp_path / "report" / "report.md").read_text()


def test_boxes_that_the_repair_did_not_see_are_apart():
    boxes = [box("hull", "certified", inside=1), box("hull", "undecided", inside=0, seen=False)]
    rounds = [RepairRound(0, 0, 0.9, 0.3, True, 0, 1), RepairRound(1, 1, 0.9, 0.3, True, 1, 1)]
    certificate = Certificate("m", "i", HEAD, HEAD, 0.0, boxes, rounds, [], {}, {}, {})
    assert [(part.name, part.certified, part.boxes) for part in certificate.summaries()] == [
        ("hull, expected unsafe, seen by the repair", 1, 1),
        ("hull, expected unsafe, not seen by the repair", 0, 1),
    ]
