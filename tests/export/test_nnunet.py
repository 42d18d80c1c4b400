"""SegResMamba in nnU-Net: the data set it is given, its trainings, killed and resumed, and the comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from srlib import data
from srlib.export import nnunet
from srlib.files import ROOT
from srlib.net.model import FEATURES, SegResMamba
from srlib.run.captured import WARM_UP

CASES = 6
BUDGET = "_3epochs_2iterations"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of scans: hippocampus cases, or boxes in noise where those are not here."""
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv("nnUNet_extTrainer", str(nnunet.TRAINERS))
    for name in ("CACHE", "RESULTS"):
        monkeypatch.setenv(f"SRLIB_{name}", str(tmp_path / name.lower()))
    scans = tmp_path / "scans"
    for part in ("images", "labels"):
        (scans / part).mkdir(parents=True)
    if "hippocampus" in data.catalog.present():
        source = data.catalog.find(data.get("hippocampus"))
        for image in sorted((source / "imagesTr").glob("hippo*.nii.gz"))[:CASES]:
            (scans / "images" / image.name).symlink_to(image)
            (scans / "labels" / image.name).symlink_to(source / "labelsTr" / image.name)
        return scans
    for number in range(CASES):
        image = np.random.default_rng(number).normal(0, 0.1, (36, 50, 34)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[8:20, 10 + number : 30, 9:22], label[20:27, 10:30, 9:22] = 1, 2
        for part, array in (("images", image + label), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), scans / part / f"case{number}.nii.gz")
    return scans


def test_a_folder_becomes_a_data_set_with_the_same_folds(folder):
    name, splits = nnunet.convert(str(folder))
    raw, opened = nnunet.place("raw") / name, data.open(str(folder))
    about = json.loads((raw / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "label 1": 1, "label 2": 2}
    assert about["numTraining"] == CASES == len(list((raw / "imagesTr").iterdir()))
    assert [split["val"] for split in splits] == [opened.split(k).test for k in range(5)]
    assert sorted(case for split in splits for case in split["val"]) == sorted(
        case.id for case in opened.cases
    )
    for case in opened.cases:
        for part, ending, path in (("images", "_0000", case.images[0]), ("labels", "", case.label)):
            written = nib.load(raw / f"{part}Tr" / f"{case.id}{ending}.nii.gz")
            assert np.array_equal(written.get_fdata(), nib.load(path).get_fdata())
            np.testing.assert_allclose(written.affine, nib.load(path).affine, atol=1e-6)
    assert nnunet.convert(str(folder))[0] == name  # a second time nothing is written
    swapped = {"background": 0, "label 1": 2, "label 2": 1}  # of the same voxels
    (folder / "dataset.json").write_text(json.dumps({"labels": swapped}))
    with pytest.raises(ValueError, match="was made of other cases, channels or classes"):
        nnunet.convert(str(folder))
    (folder / "dataset.json").unlink()
    label = sorted((folder / "labels").iterdir())[0]
    loaded = nib.load(label.resolve())
    moved = np.roll(np.asarray(loaded.dataobj), 1, 0).astype(np.uint8)
    label.unlink()
    nib.save(nib.Nifti1Image(moved, loaded.affine), label)
    with pytest.raises(ValueError, match="was made of other cases"):
        nnunet.convert(str(folder))


def test_scores_are_nnunet_s_and_1_where_a_class_is_in_neither_mask(tmp_path):
    about = {"labels": {"background": 0, "left": 1, "right": 2}, "file_ending": ".nii.gz"}
    metrics = {"1": {"Dice": 0.5}, "2": {"Dice": float("nan")}}
    cases = [{"prediction_file": "x/a.nii.gz", "metrics": metrics}]
    (tmp_path / "fold_0" / "validation").mkdir(parents=True)
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    summary = tmp_path / "fold_0" / "validation" / "summary.json"
    summary.write_text(json.dumps({"metric_per_case": cases}))
    found = pd.DataFrame(nnunet.scores(tmp_path / "fold_0")).to_dict("list")
    assert found == {"case": ["a", "a"], "class": ["left", "right"], "dice": [0.5, 1.0]}


class Lazy(ModuleType):
    """A module that loads another one when it is asked for its path, as some packages have."""

    def __getattr__(self, name):
        sys.modules.setdefault(f"{self.__name__}_{name}", ModuleType("loaded"))
        raise ImportError("a package that is not installed")


def test_modules_that_load_others_when_they_are_asked_have_done_so(monkeypatch):
    monkeypatch.setattr(sys, "modules", sys.modules | {"lazy": Lazy("lazy")})
    nnunet.load_lazy_modules()
    before = dict(sys.modules)
    assert "lazy___file__" in before or "lazy___path__" in before
    nnunet.load_lazy_modules()
    assert sys.modules == before


def test_trainers_are_found_by_name_with_size_and_budget():
    find = pytest.importorskip("nnunetv2.utilities.find_objects")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(nnunet.TRAINERS))
        for name, tom, size in (
            ("nnUNetTrainerSegResMamba", "both", "paper"),
            ("nnUNetTrainerSegResMambaNoToM_small", "none", "small"),
            ("nnUNetTrainerSegResMambaConvForToM_tiny_7epochs_3iterations", "conv", "tiny"),
        ):
            trainer = find.recursive_find_trainer_class_by_name(name)
            assert (trainer.__name__, trainer.tom, trainer.size) == (name, tom, size)
        assert trainer.budget == ("7", "3")
        for name in ("nnUNetTrainerSegResMamba_huge", "nnUNetTrainerOwn_tiny", "nnUNetTrainerElse"):
            with pytest.raises(RuntimeError, match=name):
                find.recursive_find_trainer_class_by_name(name)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_nnunet_s(monkeypatch, scaled):
    """Captured on a GPU; the same bits on the CPU."""
    base = pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not scaled:
        pytest.skip("nnU-Net scales the loss on a GPU")

    def initialize(self):
        torch.manual_seed(0)
        self.network = SegResMamba(1, 3, FEATURES["tiny"]).to(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), 0.01, momentum=0.99, nesterov=True
        )
        self.loss = lambda y, target: 30 * F.cross_entropy(y, target[:, 0].long())  # to be clipped
        self.grad_scaler = torch.amp.GradScaler(device.type, 256.0) if scaled else None
        self.label_manager = SimpleNamespace(has_ignore_label=False, has_regions=False)
        self.device, self.is_ddp, self.enable_deep_supervision = device, False, False

    monkeypatch.setattr(base, "initialize", initialize)
    monkeypatch.setenv("nnUNet_extTrainer", str(nnunet.TRAINERS))
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

    nnunet.load_lazy_modules()
    ours = find("nnUNetTrainerSegResMamba_tiny")

    def trained(kind):
        trainer = object.__new__(ours)
        trainer.initialize()
        found = []
        for _ in range(WARM_UP + 3):
            scan = torch.randn(2, 1, 36, 16, 16)
            batch = {"data": scan, "target": (scan > 0).short() + (scan > 1).short()}
            found.append(kind.train_step(trainer, batch)["loss"].item())
            with torch.no_grad():
                found.append(kind.validation_step(trainer, batch)["loss"].item())
        captured = [each.graph is not None for each in (trainer.passes, trainer.outputs)]
        assert captured == 2 * [device.type == "cuda" and kind is ours]
        return torch.tensor(found), *(p.detach() for p in trainer.network.parameters())

    found, expected = trained(ours), trained(base)
    near = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **near)
    assert found[0][0] > found[0][-1]  # it learns


def test_one_process_trains_and_another_waits_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    fold = tmp_path / "Dataset007_X" / f"T__{nnunet.PLANS}__{nnunet.CONFIGURATION}" / "fold_0"
    calls = []

    def run_training(*args, **options):
        calls.append(options["continue_training"])
        time.sleep(0.5)
        (fold / "validation").mkdir()
        (fold / "validation" / "summary.json").write_text('{"metric_per_case": [{}]}')

    module = ModuleType("nnunetv2.run.run_training")
    module.run_training = run_training
    for name in ("nnunetv2", "nnunetv2.run", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: nnunet.train("Dataset007_X", "T", 0), range(2)))
    assert calls == [False]


def test_what_cannot_be_trained_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="size 'huge' is not one of paper, small, tiny"):
        nnunet.compare("7", [0], 1, size="huge")
    monkeypatch.setattr(nnunet, "find_spec", lambda name: True)
    monkeypatch.setattr(nnunet.machine, "device", lambda: torch.device("cuda:1"))
    with pytest.raises(ValueError, match=r"cuda:1.*expected CUDA_VISIBLE_DEVICES"):
        nnunet.compare("7", [0], 1)
    monkeypatch.undo()
    monkeypatch.setattr(nnunet, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match='extra "nnunet"'):
        nnunet.compare("7", [0], 1)


def test_a_fold_is_validated_again_where_its_summary_was_cut_off(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    fold = tmp_path / "Dataset007_X" / f"T__{nnunet.PLANS}__{nnunet.CONFIGURATION}" / "fold_0"
    file, asked = fold / "validation" / "summary.json", []
    file.parent.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    module = ModuleType("nnunetv2.run.run_training")
    module.run_training = lambda *_, **how: asked.append(how["only_run_validation"])
    for name in ("nnunetv2", "nnunetv2.run", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    for content in ("", '{"metric_per_case": [{"met', "{}"):
        file.write_text(content)
        nnunet.train("Dataset007_X", "T", 0)
    assert asked == [True, True, True]
    file.write_text('{"metric_per_case": [{}]}')
    nnunet.train("Dataset007_X", "T", 0)
    assert len(asked) == 3


@pytest.mark.parametrize("lacks", [False, True])
def test_trainings_of_a_fold_are_compared_on_the_same_cases(monkeypatch, tmp_path, lacks):
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setattr(nnunet, "find_spec", lambda name: True)
    monkeypatch.setattr(nnunet, "prepare", lambda dataset, folds: "Dataset007_X")
    about = {"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}

    def train(name, trainer, fold):
        own = tmp_path / "results" / name / f"{trainer}__{nnunet.PLANS}__{nnunet.CONFIGURATION}"
        (own / f"fold_{fold}" / "validation").mkdir(parents=True)
        (own / "dataset.json").write_text(json.dumps(about))
        for number, seconds in enumerate((30, 90)):
            log = own / f"fold_{fold}" / f"training_log_{number}.txt"
            log.write_text(f"2026: Epoch {number}\n2026: Epoch time: {seconds}.0 s\n")
        names = "ab" if lacks and "Own" in trainer else "abc"
        found = [
            {"prediction_file": f"{n}.nii.gz", "metrics": {"1": {"Dice": (len(trainer) + i) / 99}}}
            for i, n in enumerate(names)
        ]
        file = own / f"fold_{fold}" / "validation" / "summary.json"
        file.write_text(json.dumps({"metric_per_case": found}))

    monkeypatch.setattr(nnunet, "train", train)
    if lacks:
        with pytest.raises(ValueError, match="held out different cases"):
            nnunet.compare("7", [0], 2)
        return
    folder, cases, table = nnunet.compare("7", [0], 2)
    assert {*cases["minutes"]} == {2.0}
    assert len(table) == 3
    assert len(list(folder.glob("*_fold0.csv"))) == 2


def fake(monkeypatch, place):
    """Stand-ins for nnU-Net's preparation, and what they were asked for."""
    asked, cases = [], place / f"{nnunet.PLANS}_{nnunet.CONFIGURATION}"

    def preprocess(*_, **__):
        asked.append("preprocess")
        cases.mkdir(exist_ok=True)
        (cases / "a.pkl").touch(), (cases / "b.pkl").touch()

    def plan(*_):
        asked.append("plan")
        about = {"configurations": {nnunet.CONFIGURATION: {"data_identifier": cases.name}}}
        (place / f"{nnunet.PLANS}.json").write_text(json.dumps(about))

    api = SimpleNamespace(
        extract_fingerprints=lambda *_, **__: None, plan_experiments=plan, preprocess=preprocess
    )
    planning, names = ModuleType("planning"), ModuleType("names")
    planning.plan_and_preprocess_api, names.maybe_convert_to_dataset_name = api, lambda x: x
    for name, module in (
        ("nnunetv2", ModuleType("nnunetv2")),
        ("nnunetv2.utilities", ModuleType("utilities")),
        ("nnunetv2.experiment_planning", planning),
        ("nnunetv2.utilities.dataset_name_id_conversion", names),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_what_somebody_has_planned_and_preprocessed_is_kept(monkeypatch, tmp_path):
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    raw, place = (tmp_path / kind / "Dataset007_X" for kind in ("raw", "preprocessed"))
    (raw / "labelsTr").mkdir(parents=True), place.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps({"labels": {"a": 1}, "file_ending": ".nii.gz"}))
    for name in "ab":
        (raw / "labelsTr" / f"{name}.nii.gz").touch()
    asked = fake(monkeypatch, place)
    ready, cases = place / f"ready-{nnunet.CONFIGURATION}", place / "nnUNetPlans_3d_fullres"

    def prepared():
        asked.clear(), ready.unlink(missing_ok=True)
        assert nnunet.prepare("Dataset007_X") == "Dataset007_X"
        assert ready.is_file()
        return asked

    with pytest.raises(ValueError, match="Dataset007_X: fold 5 is not one of 0 to 4"):
        nnunet.prepare("Dataset007_X", [0, 5])
    assert asked == []  # refused before it takes time
    assert prepared() == ["plan", "preprocess"]
    (place / f"begun-{nnunet.CONFIGURATION}").unlink()  # as if by somebody else
    assert prepared() == []
    (cases / "b.pkl").unlink()
    with pytest.raises(ValueError, match=r"lacks b\).*nnUNetv2_preprocess"):
        prepared()
    (cases / "a.pkl").unlink(), cases.rmdir()
    assert prepared() == ["preprocess"]  # by the plans that are there
    assert prepared() == ["preprocess"]  # begun here, so it may be done again
    (place / "nnUNetPlans.json").write_text("{}")
    with pytest.raises(ValueError, match="expected plans with 3d_fullres"):
        prepared()


def test_regions_are_refused_before_anything_is_trained(folder):
    pytest.importorskip("nnunetv2")
    raw = nnunet.place("raw") / "Dataset007_Regions"
    raw.mkdir(parents=True)
    about = {"labels": {"background": 0, "both": [1, 2]}}
    (raw / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"dataset\.json: expected labels and file_ending"):
        nnunet.prepare("7")
    (raw / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz"}))
    with pytest.raises(ValueError, match="its classes overlap"):
        nnunet.prepare("7")


@pytest.mark.slow
def test_trainings_that_are_killed_go_on_and_are_compared(folder, tmp_path):
    """One fold of all four, a network of ours killed after an epoch; then masks of a new scan by nnU-Net."""
    pytest.importorskip("nnunetv2")
    budget = ["--fold", "0", "--epochs", "3", "--iterations", "2", "--size", "tiny"]
    command = [sys.executable, "-m", "srlib", "nnunet", str(folder), *budget]
    processes = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "PYTHONPATH": str(ROOT)}
    environment = os.environ | processes
    results = nnunet.place("results")
    ours = f"*/nnUNetTrainerSegResMamba_tiny{BUDGET}__*/fold_0"

    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 400
    while not list(results.glob(f"{ours}/checkpoint_latest.pth")):
        assert first.poll() is None, "ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (fold,) = results.glob(ours)
    assert not (fold / "validation" / "summary.json").is_file()

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *said, where = done.stdout.splitlines()[-8:]
    assert Path(where.removeprefix("tables: ")).is_dir()
    assert [line.partition(": Dice ")[0] for line in said[:4]] == list(nnunet.SYSTEMS)
    for system in ("nnU-Net", "no ToM", "convolution for ToM"):
        assert any(line.startswith(f"{system} minus SegResMamba, dice, mean") for line in said)
    logs = sorted(fold.glob("training_log_*.txt"), key=lambda log: log.stat().st_mtime_ns)
    assert len(logs) == 2
    assert "Epoch 0 " in logs[0].read_text()
    assert "Epoch 0 " not in logs[1].read_text()  # it went on
    assert "Epoch 2 " in logs[1].read_text()
    (own,) = results.glob(f"*/nnUNetTrainerOwn{BUDGET}__*/fold_0")
    assert len(list(own.glob("training_log_*.txt"))) == 1  # it was done before, and not again

    cases = pd.read_csv(next(results.glob(f"*/cases_tiny{BUDGET}_fold0.csv")), comment="#")
    held_out = data.open(str(folder)).split(0).test
    assert cases.groupby("system")["case"].unique().map(set).map(set(held_out).__eq__).all()
    assert cases["dice"].between(0, 1).all()
    assert (cases["minutes"] > 0).all()

    predict = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as p; p()"
    new, masks = tmp_path / "new", tmp_path / "masks"
    new.mkdir()
    scan = next((folder / "images").iterdir())
    (new / "scan_0000.nii.gz").symlink_to(scan)
    where = ["-i", str(new), "-o", str(masks), "-m", str(fold.parent), "-f", "0", "-device", "cpu"]
    options = ["--disable_tta", "-npp", "1", "-nps", "1"]
    command = [sys.executable, "-c", predict, *where, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert nib.load(masks / "scan.nii.gz").shape == nib.load(scan).shape
