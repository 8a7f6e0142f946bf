"""``cheapgrad doctor``: what is broken is found, and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from cheapgrad.cli import main
from cheapgrad.cli.doctor import compiling, examine, packages, processors, randomness
from cheapgrad.environment import BROKEN, NOTE, OK, SKIPPED, Examination, Finding


def install(monkeypatch, requires=(), **versions):
    """Let these packages, and no companions of torch besides, seem to be installed."""
    monkeypatch.setattr(packages, "find_version", lambda name: versions.get(name))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requires))


def test_this_environment_is_healthy(capsys):
    assert main(["doctor", "--no-compile", "--json"]) == 0
    examination = Examination.from_dict(json.loads(capsys.readouterr().out))
    found = {finding.name: finding.status for finding in examination.findings}
    assert found["torch"] == found["random generators"] == found["sketched layers"] == found["numpy"] == OK
    assert found["compile (inductor)"] == found["compile (aot_eager)"] == SKIPPED
    assert examination.environment["torch"] == torch.__version__


def test_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    examine(compile_too=False)
    assert torch.equal(torch.rand(4), expected)


def test_what_is_broken_is_an_exit_status(monkeypatch, capsys):
    finding = Finding("torch", BROKEN, "1.13", "pip install -U torch")
    monkeypatch.setattr("cheapgrad.cli.doctor.examination.check_torch", lambda: finding)
    assert main(["doctor", "--no-compile"]) == 1
    printed = capsys.readouterr().out
    assert "broken   torch" in printed
    assert "-> pip install -U torch" in printed
    assert "1 broken" in printed


def test_a_check_that_fails_finds_something_broken(monkeypatch):
    def fail():
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("cheapgrad.cli.doctor.examination.check_numpy", fail)
    examination = examine(compile_too=False)
    assert not examination.healthy
    (finding,) = [finding for finding in examination.findings if finding.status == BROKEN]
    assert finding.name == "numpy"
    assert "torchvision::nms" in finding.found


def test_torch_that_cannot_be_imported_is_named():
    # Python runs this with a torch that raises; no check but those of torch may depend on it.
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from cheapgrad.cli import main\n"
        "sys.exit(main(['doctor', '--no-compile', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["torch"]["status"] == BROKEN
    assert "cannot be imported" in findings["torch"]["found"]
    assert findings["python"]["status"] == OK


@pytest.mark.parametrize(
    ("version", "status"), [("2.5.1", BROKEN), ("1.13.1+cu117", BROKEN), ("2.6.0", OK), ("3.0", OK)]
)
def test_torch_has_to_be_new_enough(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    assert packages.check_torch().status == status


@pytest.mark.parametrize(
    ("version_info", "status"), [((3, 9, 1), BROKEN), ((3, 10, 0), OK), ((3, 13, 2), OK), ((3, 14, 0), NOTE)]
)
def test_python_has_to_be_tested(monkeypatch, version_info, status):
    monkeypatch.setattr(sys, "version_info", version_info)
    assert packages.check_python().status == status


def test_companion_of_another_torch(monkeypatch):
    install(monkeypatch, ["numpy", "torch==2.6.0"], torch="2.13.0+cpu", torchvision="0.21.0")
    finding = packages.check_companions()
    assert finding.status == BROKEN
    assert "torchvision 0.21.0 was built for torch 2.6.0, and torch is 2.13.0+cpu" in finding.found


def test_companion_of_another_build(monkeypatch):
    install(monkeypatch, ["torch (==2.13.0)"], torch="2.13.0+cpu", torchaudio="2.13.0+cu130")
    finding = packages.check_companions()
    assert finding.status == BROKEN
    assert "torchaudio is a cu130 build, and torch a cpu build" in finding.found


def test_companion_that_fits(monkeypatch):
    install(monkeypatch, ["torch==2.13.0"], torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    monkeypatch.setattr(packages, "_try_import", lambda name: "")
    assert packages.check_companions().status == OK
    monkeypatch.setattr(packages, "_try_import", lambda name: "RuntimeError: no nms")
    finding = packages.check_companions()
    assert finding.status == BROKEN
    assert "RuntimeError: no nms" in finding.found


def test_companion_is_imported_in_a_process_of_its_own():
    assert "No module named 'no_such_companion'" in packages._try_import("no_such_companion")


def test_missing_extras_are_a_note(monkeypatch):
    install(monkeypatch, matplotlib="3.9")
    finding = packages.check_extras()
    assert finding.status == NOTE
    assert "scikit-learn" in finding.found
    assert "cheapgrad[bench]" in finding.advice


@pytest.mark.parametrize(
    ("threads", "usable", "variable", "status"),
    [
        (4, 4, None, OK),
        (2, 4, "2", OK),
        (2, 4, None, NOTE),
        (8, 4, None, NOTE),
        (8, 4, "8", NOTE),
        (4, 4, "many", BROKEN),
        (4, 4, "0", BROKEN),
        (4, 4, "-1", BROKEN),
        (4, 4, "4,2", OK),
    ],
)
def test_threads_against_processors(monkeypatch, threads, usable, variable, status):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(processors, "count_processors", lambda: usable)
    finding = processors.check_threads()
    assert finding.status == status
    assert f"{threads} threads on {usable} usable" in finding.found


@pytest.mark.parametrize(
    ("quota", "processors_left"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("?", 8)]
)
def test_quota_of_a_container(monkeypatch, tmp_path, quota, processors_left):
    path = tmp_path / "cpu.max"
    path.write_text(quota + "\n")
    monkeypatch.setattr(processors, "_QUOTA", path)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert processors.count_processors() == processors_left


def test_driver_without_a_build_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processors.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    finding = processors.check_cuda()
    assert finding.status == NOTE
    assert "sees no GPU" in finding.found
    monkeypatch.setattr(processors.shutil, "which", lambda name: None)
    assert processors.check_cuda().status == OK


def test_device_is_tried():
    # The processor stands in for a GPU, so that the comparison itself is tested where there is none.
    assert processors._try_device("cpu") == ""
    assert "Error: " in processors._try_device("cuda:99")


@pytest.mark.gpu
def test_gpu_is_healthy():
    finding = processors.check_cuda()
    assert finding.status == OK
    assert torch.cuda.get_device_name(0) in finding.found


def test_generator_that_ignores_its_seed_is_found(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    finding = randomness.check_generators()
    assert finding.status == BROKEN
    assert "equal seeds draw different numbers" in finding.found


def test_generator_that_never_changes_is_found(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape))
    finding = randomness.check_generators()
    assert "different seeds draw equal numbers" in finding.found
    assert "two draws are equal" in finding.found


def test_rows_selected_anew_in_backward_are_found():
    class SelectsTwice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            kept = torch.randperm(len(x))[: len(x) // 2]
            ctx.save_for_backward(x[kept])
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return None, 2 * grad[torch.randperm(len(grad))[: len(x)]].T @ x

    assert randomness.try_sketch(lambda layer, x: layer(x)) == ""
    failure = randomness.try_sketch(lambda model, x: SelectsTwice.apply(x, next(model.parameters())))
    assert "did not select the same rows" in failure


def test_draws_that_do_not_follow_the_seed_are_found():
    def exact(model, x):
        return torch.nn.functional.linear(x, next(model.parameters()))

    assert "different seeds give equal gradients" in randomness.try_sketch(exact)
    scale = iter((1.0, 2.0, 3.0))
    assert "equal seeds give different gradients" in randomness.try_sketch(
        lambda model, x: exact(model, x) * next(scale)
    )
    assert "not finite" in randomness.try_sketch(lambda model, x: exact(model, x) * torch.inf)


def test_compiler_is_tried_in_a_process_of_its_own():
    finding = compiling.check_compile("aot_eager")
    assert finding.status == OK, finding.found


def test_compiler_that_fails_is_named(capsys):
    assert compiling.main("no_such_backend") == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "no_such_backend" in printed


def test_compiler_that_hangs_is_ended():
    finding = compiling.check_compile("aot_eager", seconds=0.05)
    assert finding.status == BROKEN
    assert "not done after 0.05 s" in finding.found


@pytest.mark.slow
def test_inductor_works_here():
    finding = compiling.check_compile("inductor")
    assert finding.status == OK, finding.found
