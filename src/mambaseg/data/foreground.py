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
    """Make sure that each part has foreground, and the training part every class.

    Args:
        parts: `train`, `val` and `test`, or some of them.
        cache: Says which classes they hold.
        split: Named in the message.
        class_names: Background first.

    Raises:
        UserError: Naming the part or the classes, with a file.
    """
    for part, cases in parts.items():
        seen = _classes(cases, cache)
        paths = [case.label_path or case.image_path for case in cases]
        where = f"the {part} part of split {split.name} ({listed({c.patient for c in cases})})"
        if not seen - {0}:
            raise DataError(
                f"{where} holds no foreground at all: every label is background",
                paths[0],
                "Look at the label files of these patients, or choose another data.split.",
            )
        missing = [k for k in range(1, len(class_names)) if k not in seen]
        if part == "train" and missing:
            names = ", ".join(f"{k} ({class_names[k]})" for k in missing)
            raise DataError(
                f"class {names} occurs in no label of {where}, so it cannot be learnt",
                paths[0],
                "Look at the label files, choose another data.split, or leave the class out of "
                "data.class_names and data.num_classes.",
            )


def _classes(cases: Sequence[Case], cache: VolumeCache) -> set[int]:
    entries = (cache.entry(case.id) for case in cases)
    return {k for entry in entries for k, count in enumerate(entry.class_voxels) if count}
