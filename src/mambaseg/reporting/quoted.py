"""Published numbers that stand beside ours, always marked as quoted."""

from __future__ import annotations

from dataclasses import dataclass

_SCORES = ("accuracy", "precision", "sensitivity", "specificity", "hd95_vox", "asd_vox")
_HEART = ("RV", "MYO", "LV")
_UNITS = (
    "The paper does not say how classes are averaged, so our rows show both averages. Its code "
    "measures distances in {}; ours are in voxels."
)


@dataclass(frozen=True)
class Published:
    """A published table, and which runs may stand beside it.

    HD is the 95th percentile in all of them.
    """

    title: str
    source: str
    data: str  # title of the data set
    classes: tuple[str, ...]  # without the background
    supervision: str  # `RunData.supervision` of runs that learnt from as many labels
    columns: tuple[str, ...]  # columns of cases.csv
    rows: dict[str, str]  # name -> the numbers as printed
    caveat: str
    split: str = ""  # how its name begins
    networks: int = 1  # that a method trains, at least


_MAMBA_UNET = Published(
    "Beside the paper's table",
    "Quoted: Wang et al., Mamba-UNet: UNet-Like Pure Visual Mamba for Medical Image Segmentation, "
    "arXiv 2402.05079, Table 1 (ACDC)",
    "ACDC",
    _HEART,
    "all",
    # HD and ASD: the released code measures them in voxels, HD as the 95th percentile; the paper
    # names no unit. How classes are averaged is not stated either (docs/protocol.md).
    ("dice", "iou", *_SCORES),
    {
        "UNet": ".9248 .8645 .9969 .9157 .9364 .9883 2.7655 .8180",
        "AttentionUNet": ".9249 .8647 .9970 .9239 .9260 .9858 3.4156 .9765",
        "TransUNet": ".9196 .8561 .9968 .9187 .9207 .9846 2.7742 .8324",
        "Swin-UNet": ".9188 .8545 .9968 .9151 .9231 .9857 3.1817 .9932",
        "Mamba-UNet": ".9281 .8698 .9972 .9275 .9289 .9859 2.4645 .7677",
    },
    "The paper does not say how classes are averaged; its specificity and accuracy cannot be means "
    "over the foreground classes, so our rows show both averages. Its code measures distances "
    "in voxels; so do these rows. Its networks start from ImageNet weights where there are any and "
    "train 10 000 steps at 224²: only runs with that budget are comparable.",
    split="ssl4mis",
)
_SEMI = (
    "Quoted: Ma and Wang, Semi-Mamba-UNet: Pixel-level contrastive and cross-supervised visual "
    "Mamba-based UNet for semi-supervised medical image segmentation, arXiv 2402.07245, {}"
)
_SEMI_CAVEAT = (
    f"{_UNITS.format('voxels')} It does not say which of two networks its rows show, and has one "
    "seed. 30 000 steps at 224²: only runs with that budget are comparable."
)
_SEMI_7 = Published(
    "Beside the paper's table, 7 labelled patients",
    _SEMI.format("Table 3 (ACDC)"),
    "ACDC",
    _HEART,
    "7 of 70",
    ("dice", *_SCORES),
    {
        "Mean Teacher, UNet": ".8781 .9949 .8836 .8735 .9690 10.9691 3.3246",
        "Mean Teacher, Swin-UNet": ".8678 .9949 .8700 .8670 .9745 7.3576 2.1834",
        "DAN, UNet": ".8766 .9948 .8814 .8727 .9700 8.6977 2.4750",
        "DAN, Swin-UNet": ".8288 .9936 .8261 .8375 .9721 9.9132 2.7309",
        "ICT, UNet": ".8879 .9953 .8996 .8779 .9696 6.7011 1.9696",
        "ICT, Swin-UNet": ".8621 .9947 .8624 .8632 .9746 8.7211 2.5562",
        "ADVENT, UNet": ".8777 .9949 .8877 .8703 .9674 11.0979 2.9367",
        "ADVENT, Swin-UNet": ".8669 .9949 .8688 .8660 .9743 7.1383 2.2608",
        "UAMT, UNet": ".8798 .9949 .8778 .8821 .9726 10.2134 3.1926",
        "UAMT, Swin-UNet": ".8701 .9950 .8721 .8697 .9754 6.7226 2.0975",
        "DCN, UNet": ".8831 .9952 .8897 .8785 .9706 8.6978 2.7026",
        "DCN, Swin-UNet": ".8608 .9946 .8511 .8724 .9777 8.8474 2.6705",
        "CPS, UNet": ".8933 .9956 .8965 .8912 .9749 7.8319 2.2767",
        "CPS, Swin-UNet": ".8933 .9957 .8846 .9032 .9821 5.5661 1.6418",
        "Semi-Mamba-UNet": ".9114 .9964 .9088 .9146 .9821 3.9124 1.1698",
    },
    _SEMI_CAVEAT,
    "ssl4mis",
)
_SEMI_3 = Published(
    "Beside the paper's table, 3 labelled patients",
    _SEMI.format("Table 2 (ACDC)"),
    "ACDC",
    _HEART,
    "3 of 70",
    ("dice", *_SCORES),
    {
        "Mean Teacher, UNet": ".7256 .9885 .8217 .6670 .9044 24.0480 9.7662",
        "Mean Teacher, Swin-UNet": ".7506 .9910 .7918 .7178 .9394 10.4621 3.5301",
        "DAN, UNet": ".7657 .9905 .8296 .7152 .9199 21.1226 7.3434",
        "DAN, Swin-UNet": ".7252 .9901 .7695 .6903 .9337 12.9800 4.3823",
        "ICT, UNet": ".7490 .9906 .8827 .6633 .9013 11.2109 4.5181",
        "ICT, Swin-UNet": ".7504 .9910 .7923 .7180 .9392 9.8026 3.1055",
        "ADVENT, UNet": ".6656 .9833 .6487 .6900 .9190 42.8011 16.6207",
        "ADVENT, Swin-UNet": ".7489 .9910 .7964 .7128 .9373 11.1535 3.0907",
        "UAMT, UNet": ".7472 .9901 .8164 .6943 .9168 21.7492 7.7489",
        "UAMT, Swin-UNet": ".7442 .9909 .7902 .7108 .9393 10.2955 2.8222",
        "DCN, UNet": ".7312 .9894 .8316 .6626 .9022 24.6607 10.1996",
        "DCN, Swin-UNet": ".7603 .9914 .8118 .7207 .9376 10.1783 3.1478",
        "Semi-Mamba-UNet": ".8386 .9936 .8861 .7992 .9483 6.2139 1.6406",
    },
    _SEMI_CAVEAT,
    "ssl4mis",
)
_PAIRS = {  # networks -> Dice, HD, ASD with 3 and 7 labelled patients of ACDC
    "3 of 70": {
        "2 × Swin-UNet": ".7878 9.0240 2.3592", "2 × Mamba-UNet": ".8025 7.3952 2.1257",
        "UNet + Swin-UNet": ".8292 5.7014 1.7237", "UNet + Mamba-UNet": ".8386 6.2139 1.6406",
    },
    "7 of 70": {
        "2 × Swin-UNet": ".8899 5.9222 1.6960", "2 × Mamba-UNet": ".9006 6.7631 1.8349",
        "UNet + Swin-UNet": ".9105 5.4172 1.4506", "UNet + Mamba-UNet": ".9114 3.9124 1.1698",
    },
}  # fmt: skip
_PROMISE12 = {  # Dice with 8 and 12 labelled cases
    "8 of 35": {
        "Mean Teacher, UNet": ".5940", "Mean Teacher, Swin-UNet": ".7249", "ICT, UNet": ".7610",
        "ICT, Swin-UNet": ".6925", "CPS, UNet": ".7067", "CPS, Swin-UNet": ".7635",
        "Semi-Mamba-UNet": ".7627",
    },
    "12 of 35": {
        "Mean Teacher, UNet": ".6623", "Mean Teacher, Swin-UNet": ".7429", "ICT, UNet": ".7211",
        "ICT, Swin-UNet": ".7671", "CPS, UNet": ".7233", "CPS, Swin-UNet": ".8008",
        "Semi-Mamba-UNet": ".8216",
    },
}  # fmt: skip
_WEAK = Published(
    "Beside the paper's table, scribbles",
    "Quoted: Wang and Ma, Weak-Mamba-UNet: Visual Mamba Makes CNN and ViT Work Better for "
    "Scribble-based Medical Image Segmentation, arXiv 2402.10887, Tables 1 and 2 (ACDC, fold 1)",
    "ACDC",
    _HEART,
    "scribbles",
    ("dice", "hd95_vox", "asd_vox"),
    {
        "partial CE, UNet": ".7620 151.0593 54.6531",
        "partial CE, Swin-UNet": ".8935 24.4750 6.9108",
        "USTM, UNet": ".8592 99.8293 26.0185",
        "USTM, Swin-UNet": ".9044 6.5172 2.2319",
        "Mumford-Shah, UNet": ".8993 28.0604 7.3907",
        "Mumford-Shah, Swin-UNet": ".9051 6.0653 1.6482",
        "gated CRF, UNet": ".9046 7.4340 2.0753",
        "gated CRF, Swin-UNet": ".8995 6.6559 1.6222",
        "Weak-Mamba-UNet": ".9171 3.9597 .8810",
        "Weak-Mamba-UNet, 3 × UNet": ".9141 8.0566 2.8806",
        "Weak-Mamba-UNet, 3 × Mamba-UNet": ".9128 8.3386 2.7928",
    },
    f"{_UNITS.format('mm')} Which of the three networks its rows show is not said, the checkpoint "
    "was chosen on the test patients, and there is one seed. 30 000 steps at 224²: only runs with "
    "that budget are comparable.",
    "wsl4mis",
)
TABLES = (
    _MAMBA_UNET,
    _SEMI_7,
    _SEMI_3,
    *(
        Published(
            f"Beside the paper's pairs of networks, {told.partition(' ')[0]} labelled patients",
            _SEMI.format("Table 6 (ACDC, the method with other networks)"),
            "ACDC", _HEART, told, ("dice", "hd95_vox", "asd_vox"), rows, _SEMI_CAVEAT, "ssl4mis",
            networks=2,
        )
        for told, rows in _PAIRS.items()
    ),
    *(
        Published(
            f"Beside the paper's table, {told.partition(' ')[0]} labelled cases",
            _SEMI.format("Tables 4 and 5 (PROMISE12, the rows of four methods)"),
            "PROMISE12", ("prostate",), told, ("dice",), rows, _SEMI_CAVEAT,
        )
        for told, rows in _PROMISE12.items()
    ),
    _WEAK,
)  # fmt: skip
