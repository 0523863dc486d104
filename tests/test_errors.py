from __future__ import annotations

import pytest

from digseg.errors import DigSegError, nearest, run_main


def test_a_users_mistake_ends_with_its_text_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise DigSegError("x.yaml: no such key")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: x.yaml: no such key\n"


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_main(main)


def test_an_interrupt_ends_with_130() -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 130


def test_the_nearest_name_is_offered_and_all_where_none_is_near() -> None:
    assert nearest("camvit", ["camvid", "cwfid"]) == "; did you mean 'camvid'?"
    assert nearest("zzz", ["camvid", "cwfid"]) == "; valid names: camvid, cwfid"
    assert nearest("zzz", []) == ""
