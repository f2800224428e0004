"""Colours of classes, the same in every picture: of runs, reports, predictions and data sets."""

# Class 1, 2, 3, ... (0 stays clear). The first three are Okabe & Ito's, told apart by colour-blind
# readers. The others are far from them, from each other and from the colours of errors (CIELAB),
# also where they tint black, grey and white pixels.
CLASS_COLOURS = (
    "#56B4E9", "#009E73", "#E69F00", "#9600FF", "#00FF00", "#FF005A", "#3C69FF", "#FF5AF0",
    "#3CA50F", "#69690F", "#00FF96", "#FF0000", "#B4F096",
)  # fmt: skip
