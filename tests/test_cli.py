"""The command line: usage, the doctor's report, and errors that are sentences."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nqkv_rs import _extras, cli, doctor


def test_doctor_tells_versions_cpu_gpu_and_what_runs_where(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "cpu", "gpu", "runs_on"}
    assert {"nqkv_rs", "python", "numpy", "torch", "transformers", "driver"} <= set(
        found["versions"]
    )
    assert found["versions"]["nqkv_rs"] and found["versions"]["numpy"]
    assert found["cpu"]["path"] and found["cpu"]["threads"] >= 1
    assert isinstance(found["gpu"]["devices"], list) and found["gpu"]["why"]
    assert found["runs_on"]["quantize, dequantize"].startswith("CPU")


def test_doctor_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("versions", "cpu", "gpu", "runs on", "why"):
        assert word in out


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "torch" else real(n))
    why = "no CUDA driver: libcuda.so.1 cannot be opened"
    monkeypatch.setattr(doctor._core, "cuda_status", lambda: (0, why))
    monkeypatch.setattr(doctor._core, "cuda_driver_version", lambda: None)
    found = doctor.report()
    assert found["versions"]["torch"] is None
    assert 'pip install "nqkv-rs[transformers]"' in found["runs_on"]["generation with transformers"]
    assert found["gpu"]["devices"] == []
    assert found["gpu"] == {"driver": None, "devices": [], "usable": False, "why": why}
    assert why in found["runs_on"]["CUDA tensors"]


def test_doctor_needs_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from nqkv_rs.cli import main; status = main(['doctor']); "
        "heavy = {'torch', 'transformers', 'rich'} & set(sys.modules); "
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["demo", "--scored", "0"], ["demo", "--context", "many"]]
)
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: nqkv-rs" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    assert "smollm2" in capsys.readouterr().out


def test_a_missing_package_names_its_install_command() -> None:
    with pytest.raises(ModuleNotFoundError, match=r'pip install "nqkv-rs\[demo\]"'):
        _extras.require("a_package_that_nobody_has", "demo")
    assert _extras.require("json", "demo") is json


def test_errors_are_sentences_not_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("rich")
    assert cli.main(["demo", "--scheme", "nqkv5"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("nqkv-rs demo: --scheme: expected one of")
    assert "'nqkv5'" in err
    assert cli.main(["demo", "--model", "./nowhere"]) == 1
    assert "./nowhere: no such file or folder" in capsys.readouterr().err
    # None in sys.modules is how Python marks a module as absent.
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["demo"]) == 1
    assert 'pip install "nqkv-rs[demo]"' in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from nqkv_rs.cli import main; sys.exit(main(['doctor']))"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout and command.stderr
        command.stdout.close()
        assert (command.wait(), command.stderr.read()) == (141, b"")
