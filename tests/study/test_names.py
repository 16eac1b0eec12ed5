"""Names of studies: the beginning of one is enough where no other name begins so."""

import pytest

from hybridnas.errors import StudyError
from hybridnas.study.folder import completed, full_name


def study(runs, name):
    (runs / name / "best").mkdir(parents=True)
    (runs / name / "study.json").write_text("{}")
    return runs / name


def test_a_beginning_leads_to_the_one_study_that_has_it(tmp_path):
    made = study(tmp_path, "mamba_moe-laptop-3f2a")
    assert completed(tmp_path / "mamba_moe-laptop") == made
    assert completed(tmp_path / "mamba") == made
    assert completed(tmp_path / "mamba_moe-laptop" / "best") == made / "best"
    assert completed(made) == made
    assert completed(tmp_path / "hybrid") == tmp_path / "hybrid"
    assert completed(tmp_path / "no" / "such" / "folder") == tmp_path / "no" / "such" / "folder"


def test_the_name_without_its_hash_is_meant_before_longer_names(tmp_path):
    names = ["a-laptop-3f2a", "a-laptop-3f2a-random", "a-laptop-own"]
    assert full_name("a-laptop", names) == "a-laptop-3f2a"
    assert full_name("a-laptop-own", names) == "a-laptop-own"


def test_several_studies_that_begin_alike_are_listed(tmp_path):
    one, two = study(tmp_path, "a-laptop-3f2a"), study(tmp_path, "a-laptop-77b0")
    with pytest.raises(StudyError) as caught:
        completed(tmp_path / "a-laptop" / "best")
    assert (caught.value.field, caught.value.got) == ("study", "a-laptop")
    assert caught.value.allowed == (one.name, two.name)
