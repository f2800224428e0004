"""What a run folder is called: short, and never so that a phantom is taken for a data set."""

import pytest

from mambaseg.app.resolvers import data_name


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"name": "acdc", "root": "data/ACDC", "synthetic": False}, "acdc"),
        ({"name": "phantom", "root": "data/phantom", "synthetic": True}, "phantom"),
        ({"name": "haze_phantom", "root": "x", "synthetic": True}, "haze_phantom"),
        ({"name": "acdc", "root": "x", "synthetic": True}, "acdc-synthetic"),
        ({"name": "nnunet", "root": "/data/nnUNet_raw/Dataset027_ACDC"}, "Dataset027_ACDC"),
        ({"name": "nnunet", "root": "/data/Task 5=µ/"}, "Task-5-µ"),
        ({"name": "folder", "root": "data/polyps"}, "polyps"),
        ({"name": "nifti", "root": "data/livers"}, "livers"),
        ({"name": "heart", "root": "/data/nnUNet_raw/Dataset501_Heart"}, "heart"),
    ],
)
def test_the_data_have_a_short_name_of_their_own(data, name):
    assert data_name(data) == name
