"""An option on the command line comes before the environment, the file uknowpan.toml and the built-in default."""

from pathlib import Path

import pytest
from running import MakePair, spawn


def test_order_of_defaults(make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    monkeypatch.chdir(tmp_path)
    words = ("sharpen", pair.pan, *pair.ms, "-o", "out.tif", "--dry-run")
    Path("uknowpan.toml").write_text('# für\n[sharpen]\nmethod = "gsa"\n', "utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "gsa" in spawn(*words, environment=ascii_locale).stdout
    variable = {"UKNOWPAN_SHARPEN_METHOD": "brovey"}
    assert "brovey" in spawn(*words, environment=variable).stdout
    assert "awlp" in spawn(*words, "--method", "awlp", environment=variable).stdout
    Path("uknowpan.toml").write_text("[sharpen]\nmethods = 3\n")
    spawn(*words).fails(2, "--help")
