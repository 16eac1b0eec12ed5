"""What a study notes of the process that opens it."""

import sys

import pytest

from hybridnas.search.session import _command

HERE = "/somewhere/site-packages/hybridnas"


@pytest.mark.parametrize(
    ("program", "first"),
    [(f"{HERE}/search/__main__.py", []), (f"{HERE}/__main__.py", ["search"]), ("bin/hybridnas", ["search"])],
)
def test_the_command_of_a_study_can_be_typed_again_however_it_was_started(program, first, monkeypatch):
    settings = ["space=hybrid", "data.path=my docs", "storage=postgresql://me:secret@host/db"]
    monkeypatch.setattr(sys, "argv", [program, *first, *settings])
    assert (
        _command() == "python -m hybridnas.search space=hybrid 'data.path=my docs' 'storage=postgresql://***@host/db'"
    )


@pytest.mark.parametrize("program", ["/opt/ipykernel_launcher.py", "own_search.py", ""])
def test_a_study_made_by_a_script_or_a_notebook_has_no_command(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "-f", "kernel.json"])
    assert _command() == ""
