"""Whether the parts of a split hold what is to be learnt and scored."""

from collections.abc import Mapping, Sequence

from mambaseg.data.cache import VolumeCache
from mambaseg.data.case import Case
from mambaseg.data.splits import Split, listed
from mambaseg.data.validation import DataError


def require_foreground(
    parts: Mapping[str, Sequence[Case]],
    cache: VolumeCache,
    *,
    split: Split,
    class_names: Sequence[str],
) -> None:
    """Raise `UserError` unless each set has foreground, and the training set every class."""
    for part, cases in parts.items():
        entries = [cache.entries[cache.position(case.id)].class_voxels for case in cases]
        missing = [k for k in range(1, len(class_names)) if not any(one[k] for one in entries)]
        where = f"the {part} part of split {split.name} ({listed({c.patient for c in cases})})"
        if len(missing) == len(class_names) - 1:
            problem = f"{where} holds no foreground at all: every label is background"
        elif part == "train" and missing:
            names = ", ".join(f"{k} ({class_names[k]})" for k in missing)
            problem = f"class {names} occurs in no label of {where}, so it cannot be learnt"
        else:
            continue
        remedy = (
            "Look at the label files of these patients, choose another data.split, or leave the "
            "class out of data.class_names and data.num_classes."
        )
        raise DataError(problem, cases[0].label_path or cases[0].image_path, remedy)
