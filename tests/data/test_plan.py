"""nnU-Net's plan in 2-D, as data-check proposes it."""

import json

import numpy as np
import pytest

from mambaseg.data.plan import features_of, plan_2d


def like(shape, spacing, count, seed=0):
    """Images about this shape (Z, H, W) and voxel size."""
    rng = np.random.default_rng(seed)
    shapes = [[int(side * rng.uniform(0.8, 1.2)) for side in shape] for _ in range(count)]
    spacings = [[float(side * rng.uniform(0.9, 1.1)) for side in spacing] for _ in range(count)]
    return shapes, spacings


DATA = {
    "hearts": (*like((10, 230, 220), (10.0, 1.5, 1.5), 40), 4),
    "abdomens": (*like((120, 512, 512), (3.0, 0.8, 0.8), 30, 1), 14),
    "oblong": (*like((30, 90, 400), (4.0, 2.5, 0.6), 12, 2), 2),
    "few": (*like((8, 64, 48), (8.0, 1.2, 1.4), 3, 3), 3),
}


def test_the_plan_of_hearts():
    plan = plan_2d(*DATA["hearts"][:2], num_classes=4)
    assert plan.patch == (256, 224)
    assert len(plan.strides) == 6 and features_of(6) == [32, 64, 128, 256, 512, 512]


@pytest.mark.parametrize("name", DATA)
def test_it_is_nnunets_own(name, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2", reason="the plan's oracle is not installed: make oracles")
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as own

    for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(key, str(tmp_path))
    shapes, spacings, classes = DATA[name]
    folder = "Dataset001_Made"
    for place in ("imagesTr", "labelsTr"):
        (tmp_path / folder / place).mkdir(parents=True)
    for case in range(len(shapes)):
        (tmp_path / folder / "imagesTr" / f"c{case:03d}_0000.nii.gz").touch()
        (tmp_path / folder / "labelsTr" / f"c{case:03d}.nii.gz").touch()
    about = {"channel_names": {"0": "MRI"}, "numTraining": len(shapes), "file_ending": ".nii.gz",
             "labels": {"background": 0} | {f"c{k}": k for k in range(1, classes)}}  # fmt: skip
    (tmp_path / folder / "dataset.json").write_text(json.dumps(about))
    numbers = {"spacings": spacings, "shapes_after_crop": shapes,
               "foreground_intensity_properties_per_channel": {},
               "median_relative_size_after_cropping": 1.0}  # fmt: skip
    (tmp_path / folder / "dataset_fingerprint.json").write_text(json.dumps(numbers))
    planner = own.ExperimentPlanner(1)
    spacing = planner.determine_fullres_target_spacing()
    order, _ = planner.determine_transpose()
    new = [own.compute_new_shape(s, p, spacing) for s, p in zip(shapes, spacings, strict=True)]
    median = np.median(new, 0)[order]
    theirs = planner.get_plans_for_configuration(
        spacing[order][1:], median[1:], "x", float(median.prod()) * len(shapes), {}
    )
    plan = plan_2d(shapes, spacings, num_classes=classes)
    kwargs = theirs["architecture"]["arch_kwargs"]
    assert plan.patch == tuple(int(side) for side in theirs["patch_size"])
    assert plan.batch == theirs["batch_size"]
    assert [list(one) for one in plan.strides] == [list(one) for one in kwargs["strides"]]
    assert [list(one) for one in plan.kernels] == [list(one) for one in kwargs["kernel_sizes"]]
    assert features_of(len(plan.strides)) == list(kwargs["features_per_stage"])
    assert plan.spacing == pytest.approx(tuple(theirs["spacing"]))
