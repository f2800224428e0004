import json
from collections import defaultdict

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion

from mambaseg.data.classes import IGNORED
from mambaseg.data.labelling import with_labels
from mambaseg.data.phantoms import phantom, synthetic
from mambaseg.data.phantoms.phantom import write_phantom
from mambaseg.data.phantoms.phantom_anatomy import (
    GROUPS,
    contours,
    draw_heart,
    tune_ejection,
    volumes,
)
from mambaseg.data.readers import acdc
from mambaseg.errors import UserError

RV, MYO, LV = 1, 2, 3
SQUARE = np.ones((3, 3), bool)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", patients=15)


@pytest.fixture(scope="module")
def patients(root):
    return [Patient(folder) for folder in sorted(root.glob("patient*"))]


class Patient:
    """Read with nibabel alone, so that the package's reader is no part of the judgement."""

    def __init__(self, folder):
        self.name = folder.name
        lines = (folder / "Info.cfg").read_text().splitlines()
        self.info = dict(line.split(": ") for line in lines)
        self.cine = nib.load(folder / f"{self.name}_4d.nii.gz")
        self.image, self.label = {}, {}
        for phase in ("ED", "ES"):
            stem = f"{self.name}_frame{int(self.info[phase]):02d}"
            self.image[phase] = nib.load(folder / f"{stem}.nii.gz")
            label = nib.load(folder / f"{stem}_gt.nii.gz")
            self.label[phase] = np.asarray(label.dataobj)
            self.affine = label.affine
            self.zooms = label.header.get_zooms()

    @property
    def group(self):
        return self.info["Group"]

    def millilitres(self, phase, structure):
        return (self.label[phase] == structure).sum() * np.prod(self.zooms) / 1000

    def ejection(self, structure):
        return 1 - self.millilitres("ES", structure) / self.millilitres("ED", structure)

    def slices(self):
        for label in self.label.values():
            yield from np.moveaxis(label, 2, 0)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files_of(folder)}


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# the files


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = write_phantom(tmp_path / "a", patients=2, seed=3)
    second = write_phantom(tmp_path / "b", patients=2, seed=3)
    other = write_phantom(tmp_path / "c", patients=2, seed=4)
    assert contents(first) == contents(second)
    image = "patient001/patient001_4d.nii.gz"
    assert (first / image).read_bytes() != (other / image).read_bytes()


def test_a_larger_dataset_begins_with_the_smaller_one(root, tmp_path):
    small = contents(write_phantom(tmp_path / "small", patients=2))
    large = contents(root)
    shared = [name for name in small if name.startswith("patient")]
    assert len(shared) == 16
    assert all(small[name] == large[name] for name in shared)


def test_the_reader_for_acdc_finds_both_phases_of_every_patient(root, patients):
    cases = {case.id: case for case in acdc.find_cases(root)}
    assert sorted(cases) == sorted(f"{p.name}_{phase}" for p in patients for phase in ("ED", "ES"))
    patient = patients[1]
    volume = cases[f"{patient.name}_ES"].read()
    assert cases[f"{patient.name}_ES"].group == patient.group
    assert volume.spacing == pytest.approx(patient.zooms[::-1])
    np.testing.assert_array_equal(volume.label, patient.label["ES"].T)


def test_the_cine_holds_the_annotated_frames(patients):
    for patient in patients:
        assert patient.cine.shape[3] == int(patient.info["NbFrame"]) >= 8
        cine = np.asarray(patient.cine.dataobj)
        for phase in ("ED", "ES"):
            frame = cine[..., int(patient.info[phase]) - 1]
            np.testing.assert_array_equal(frame, np.asarray(patient.image[phase].dataobj))


def test_some_patients_do_not_begin_at_end_diastole(patients):
    first = [int(patient.info["ED"]) for patient in patients]
    assert first.count(1) > len(first) / 2
    assert any(int(p.info["ES"]) < int(p.info["ED"]) for p in patients)
    for patient in patients:
        assert patient.millilitres("ES", LV) < patient.millilitres("ED", LV)


def test_headers_are_in_millimetres_and_agree_with_the_affine(patients):
    for patient in patients:
        for image in (patient.cine, *patient.image.values()):
            assert image.get_data_dtype() == np.int16
            assert image.header.get_xyzt_units() == ("mm", "sec")
            assert image.header["descrip"].item() == b"synthetic phantom, not ACDC"
            lengths = np.linalg.norm(image.affine[:3, :3], axis=0)
            np.testing.assert_allclose(lengths, patient.zooms, rtol=1e-5)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert 1.4 <= patient.zooms[0] == patient.zooms[1] <= 2.0
        assert 6 <= patient.label["ED"].shape[2] <= 10


def test_patients_differ_in_size_and_spacing(patients):
    assert len({patient.label["ED"].shape for patient in patients}) > 10
    assert len({patient.zooms for patient in patients}) > 10
    assert sum(p.label["ED"].shape[0] != p.label["ED"].shape[1] for p in patients) > 10


def test_the_folder_says_that_it_is_synthetic(root):
    assert "not ACDC" in (root / "SYNTHETIC.md").read_text(encoding="utf-8")


def test_every_five_patients_hold_every_group(patients):
    groups = [patient.group for patient in patients]
    blocks = [groups[start : start + 5] for start in range(0, 15, 5)]
    assert all(sorted(block) == sorted(GROUPS) for block in blocks)
    assert len({tuple(block) for block in blocks}) > 1


# the hearts


def test_ejection_fractions_resemble_those_of_acdc(patients):
    left, right, ratio = defaultdict(list), defaultdict(list), defaultdict(list)
    for patient in patients:
        left[patient.group].append(patient.ejection(LV))
        right[patient.group].append(patient.ejection(RV))
        ratio[patient.group].append(patient.millilitres("ED", RV) / patient.millilitres("ED", LV))
    expected = {"DCM": 0.184, "HCM": 0.674, "MINF": 0.310, "NOR": 0.603}
    assert {g: np.mean(left[g]) for g in expected} == pytest.approx(expected, abs=0.06)
    assert np.mean(right["RV"]) == pytest.approx(0.314, abs=0.05)
    assert np.mean(ratio["RV"]) == pytest.approx(2.0, abs=0.35)
    assert all(0.5 < np.mean(ratio[g]) < 1.3 for g in expected)


def test_myocardium_keeps_its_volume_while_it_contracts(patients):
    for patient in patients:
        change = patient.millilitres("ES", MYO) / patient.millilitres("ED", MYO)
        assert change == pytest.approx(1, abs=0.25), patient.name


def test_the_wall_thickens_where_it_contracts():
    heart = draw_heart("NOR", np.random.default_rng(0))
    ed, es = (contours(heart, 0.4 * heart.length, ejected) for ejected in (0.0, 1.0))
    assert ((es.epi - es.endo) > 1.25 * (ed.epi - ed.endo)).all()


def test_an_infarct_moves_less_than_the_rest_of_the_wall():
    for seed in range(5):
        least, most = wall_motion("MINF", seed)
        assert least < 0.05 < 0.1 < most
        least, most = wall_motion("NOR", seed)
        assert least > 0.2
        assert most - least < 0.02


def wall_motion(group, seed):
    """Least and most shortening of the cavity's radius over all angles, in a middle slice."""
    heart = draw_heart(group, np.random.default_rng(seed))
    depth = 0.6 * heart.length
    motion = 1 - contours(heart, depth, 1.0).endo / contours(heart, depth, 0.0).endo
    return motion.min(), motion.max()


def test_tuning_gives_the_asked_ejection_as_summed_over_thick_slices():
    heart = draw_heart("NOR", np.random.default_rng(2))
    depths = np.arange(-3.0, heart.length, 12.0)
    tuned = tune_ejection(heart, depths)
    ejection = 1 - volumes(tuned, depths, 1.0) / volumes(tuned, depths, 0.0)
    assert ejection == pytest.approx([heart.ef, heart.rv_ef], abs=0.01)


def test_every_volume_has_every_structure(patients):
    for patient in patients:
        for label in patient.label.values():
            assert set(np.unique(label)) == {0, RV, MYO, LV}, patient.name


def test_the_wall_closes_around_the_cavity(patients):
    for patient in patients:
        for label in patient.slices():
            around = label[binary_dilation(label == LV, SQUARE)]
            assert set(np.unique(around)) <= {MYO, LV}, patient.name


def test_the_right_ventricle_lies_against_the_septum(patients):
    for patient in patients:
        for label in patient.slices():
            if not (label == RV).any():
                continue
            touching = binary_dilation(label == RV, SQUARE) & (label == MYO)
            assert touching.sum() >= 3, patient.name
            rows, lv_rows = np.nonzero(label == RV)[0], np.nonzero(label == MYO)[0]
            assert rows.mean() < lv_rows.mean()  # x: on the left of the image


def test_the_heart_tapers_towards_the_apex_and_the_right_ventricle_ends_first(patients):
    without_rv = 0
    for patient in patients:
        label = patient.label["ED"]
        area = (label >= MYO).sum(axis=(0, 1))
        used = np.flatnonzero(area)
        below = area[used[len(used) // 3] : used[-1] + 1]
        assert (np.diff(below) < 0).all(), patient.name
        without_rv += not (label[:, :, used[-1]] == RV).any()
    assert without_rv > len(patients) / 2


def test_papillary_muscles_are_dark_and_belong_to_the_cavity(patients):
    for patient in patients:
        image, label = np.asarray(patient.image["ED"].dataobj), patient.label["ED"]
        middle = np.flatnonzero((label == LV).any(axis=(0, 1)))
        z = middle[len(middle) // 2]
        cavity = binary_erosion(label[:, :, z] == LV, SQUARE, iterations=2)
        muscle = np.median(image[:, :, z][label[:, :, z] == MYO])
        blood = np.median(image[:, :, z][cavity])
        assert muscle < 0.6 * blood
        assert (image[:, :, z][cavity] < (muscle + blood) / 2).sum() >= 4, patient.name


def test_intensity_alone_does_not_tell_the_structures(patients):
    for patient in patients:
        image, label = np.asarray(patient.image["ED"].dataobj), patient.label["ED"]
        bright = image > (np.median(image[label == MYO]) + np.median(image[label == LV])) / 2
        assert (bright & (label == 0)).sum() > (bright & (label == LV)).sum(), patient.name


# the folder


def test_scribbles_are_right_and_few(root):
    drawn, true = (
        np.concatenate([one.read(4).label.ravel() for one in cases])
        for cases in (
            [with_labels(case, "scribble") for case in acdc.find_cases(root)],
            acdc.find_cases(root),
        )
    )
    known = drawn != IGNORED
    assert np.array_equal(drawn[known], true[known])
    shares = np.bincount(drawn[known], minlength=4) / np.bincount(true, minlength=4)
    assert 0.005 < shares[0] < 0.03 and (shares[1:] > 0.02).all() and (shares[1:] < 0.25).all()


@pytest.fixture
def no_rendering(monkeypatch):
    def refuse(*_):
        raise AssertionError("rendered again")

    return lambda: monkeypatch.setattr(phantom, "render", refuse)


def test_a_complete_folder_is_reused(tmp_path, no_rendering):
    folder = write_phantom(tmp_path / "phantom", patients=1)
    before = contents(folder)
    no_rendering()
    assert write_phantom(folder, patients=1) == folder
    assert contents(folder) == before


@pytest.mark.parametrize("changed", [{"patients": 2}, {"seed": 1}, {"noise": 0.1}])
def test_a_folder_made_with_other_parameters_is_refused(tmp_path, no_rendering, changed):
    folder = write_phantom(tmp_path / "phantom", patients=1)
    no_rendering()
    with pytest.raises(UserError, match="move this one away") as error:
        write_phantom(folder, **{"patients": 1, **changed})
    assert str(folder) in str(error.value)
    assert next(iter(changed)) in str(error.value)


def test_a_folder_of_another_generator_version_is_refused(tmp_path, monkeypatch):
    folder = write_phantom(tmp_path / "phantom", patients=1)
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    with pytest.raises(UserError, match="version"):
        write_phantom(folder, patients=1)


def test_a_damaged_folder_is_refused(tmp_path):
    folder = write_phantom(tmp_path / "phantom", patients=1)
    image = folder / "patient001" / "patient001_4d.nii.gz"
    image.write_bytes(image.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"1 of \d+ files .*patient001_4d"):
        write_phantom(folder, patients=1)


@pytest.mark.parametrize("manifest", [None, "not json", "[]", json.dumps({"files": 3})])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, manifest):
    (tmp_path / "mine.txt").write_text("precious")
    if manifest is not None:
        (tmp_path / phantom.MANIFEST).write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="no synthetic data was written") as error:
        write_phantom(tmp_path, patients=1)
    assert "data=acdc" in str(error.value) and "elete" not in str(error.value)
    assert contents(tmp_path) == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    render, calls = phantom.render, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return render(*arguments)

    monkeypatch.setattr(phantom, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "phantom", patients=3)
    assert calls
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_at_a_time_the_second_takes_what_is_there(tmp_path, monkeypatch):
    folder, seal = tmp_path / "phantom", synthetic._seal

    def overtaken(work, *arguments):
        monkeypatch.setattr(synthetic, "_seal", seal)
        write_phantom(folder, patients=1)
        seal(work, *arguments)

    monkeypatch.setattr(synthetic, "_seal", overtaken)
    assert write_phantom(folder, patients=1) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (write_phantom(tmp_path / "empty", patients=1) / phantom.MANIFEST).is_file()
    assert (write_phantom(tmp_path / "a b" / "ü=1", patients=1) / phantom.MANIFEST).is_file()


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"patients": 1000}, {"seed": -1}])
def test_impossible_parameters_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        write_phantom(tmp_path / "phantom", **wrong)
    assert list(tmp_path.iterdir()) == []
