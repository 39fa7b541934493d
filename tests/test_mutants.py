"""The list of mutants fits the code: each is a fault that can be put in, and has its tests."""

import ast
from pathlib import Path
from queue import Queue

import pytest

from tests.commands import ROOT
from tests.mutants.mutate import Mutant, copy_code, read_mutants, report, try_mutant

MUTANTS = read_mutants()


def test_the_list_is_long_and_names_each_mutant_once() -> None:
    names = [(mutant.file, mutant.name) for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_another_program_and_has_tests(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    assert mutant.tests and all((ROOT / test).is_file() for test in mutant.tests)


def test_a_mutant_whose_place_is_gone_or_twice_there_is_refused() -> None:
    mutant = Mutant("none", "a.py", "old", "new", ("tests/test_mutants.py",))
    for source in ("", "old old"):
        with pytest.raises(ValueError, match="a.py holds 'old' [02] times: 'none'"):
            mutant.apply(source)


@pytest.mark.slow
def test_a_fault_is_killed_and_what_is_none_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, tests = "return self.crops + 1", ("tests/test_geometry.py",)
    mutants = [
        Mutant("fault", "phi3v/geometry.py", old, "return self.crops + 2", tests),
        Mutant("none", "phi3v/geometry.py", old, "return 1 + self.crops", tests),
        Mutant("blunder", "phi3v/geometry.py", old, "return self.crops +", tests),
    ]
    folders: Queue[Path] = Queue()
    folders.put(copy_code(tmp_path))
    ends = [try_mutant(mutant, folders) for mutant in mutants]
    assert ends == ["killed", "survived", "no test ran (4)"]
    assert report(mutants[:1], ends[:1]) == 0
    assert report(mutants, ends) == 1
    assert "survived: phi3v/geometry.py: none" in capsys.readouterr().out
    whole = ROOT / "phi3v/geometry.py"
    assert (tmp_path / "phi3v/geometry.py").read_bytes() == whole.read_bytes()
