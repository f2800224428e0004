"""Published numbers that stand beside ours, always marked as quoted."""

from __future__ import annotations

SOURCE = (
    "Quoted: Wang et al., Mamba-UNet: UNet-Like Pure Visual Mamba for Medical Image Segmentation, "
    "arXiv 2402.05079, Table 1 (ACDC)"
)
DATA, CLASSES = "ACDC", ("RV", "MYO", "LV")  # scores of other data do not belong beside them
COLUMNS = ("dice", "iou", "accuracy", "precision", "sensitivity", "specificity",
           "hd95_vox", "asd_vox")  # fmt: skip
# HD and ASD: the released code measures them in voxels, HD as the 95th percentile; the paper names
# no unit. How classes are averaged is not stated either (docs/protocol.md).
TABLE_1: dict[str, tuple[str, ...]] = {
    "UNet": (".9248", ".8645", ".9969", ".9157", ".9364", ".9883", "2.7655", ".8180"),
    "AttentionUNet": (".9249", ".8647", ".9970", ".9239", ".9260", ".9858", "3.4156", ".9765"),
    "TransUNet": (".9196", ".8561", ".9968", ".9187", ".9207", ".9846", "2.7742", ".8324"),
    "Swin-UNet": (".9188", ".8545", ".9968", ".9151", ".9231", ".9857", "3.1817", ".9932"),
    "Mamba-UNet": (".9281", ".8698", ".9972", ".9275", ".9289", ".9859", "2.4645", ".7677"),
}
CAVEAT = (
    "The paper does not say how classes are averaged; its specificity and accuracy cannot be means "
    "over the foreground classes, so our rows show both averages. Its code measures distances "
    "in voxels; so do these rows. Its networks start from ImageNet weights where there are any and "
    "train 10 000 steps at 224²: only runs with that budget are comparable."
)
