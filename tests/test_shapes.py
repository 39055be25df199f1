"""The alphabet of dimensions holds every letter that the package's annotations use."""

import re
from pathlib import Path

import dsv3_jax
from dsv3_jax.shapes import AXES

ANNOTATION = re.compile(r'(?:Float|Int|Bool)\[Array, "([^"]*)"\]')


def letters_used() -> dict[str, str]:
    """Axis letter -> a file that uses it in an array annotation."""
    used = {}
    for path in Path(dsv3_jax.__file__).parent.rglob("*.py"):
        for annotation in ANNOTATION.findall(path.read_text()):
            used.update({axis: path.name for axis in annotation.split() if re.fullmatch("[A-Z]", axis)})
    return used


def test_every_axis_letter_in_an_annotation_is_defined_once():
    undefined = {letter: where for letter, where in letters_used().items() if letter not in AXES}
    assert not undefined, f"add these letters to dsv3_jax/shapes.py: {undefined}"


def test_no_letter_is_defined_that_nothing_uses():
    mentioned = set(letters_used())
    suffixes = set()
    for path in Path(dsv3_jax.__file__).parent.rglob("*.py"):
        suffixes |= set("".join(re.findall(r"\b[a-z]\w*_([A-Z]{1,6})\b", path.read_text())))
    assert set(AXES) <= mentioned | suffixes
