"""Networks: image `(B, C, H, W)` to logits `(B, K, H, W)`, one per file, usable on their own.

A new network needs no line here: a config names it by its own file.
"""

from mambaseg.models.any_size import AnySize
from mambaseg.models.attention_unet import AttentionUNet
from mambaseg.models.emcad import EMCAD
from mambaseg.models.encoder import encoder_depths
from mambaseg.models.gpu import (
    GraphedNetwork,
    channels_last,
    is_faster_channels_last,
    keep_layout,
)
from mambaseg.models.mamba1d import Mamba1d
from mambaseg.models.mamba_unet import MambaUNet
from mambaseg.models.mamba_unet_no_scan import MambaUNetNoScan
from mambaseg.models.mamba_unet_v2 import MambaUNetV2
from mambaseg.models.msvm_unet import MSVMUNet
from mambaseg.models.patch import PatchEmbed, PatchExpand, PatchMerging
from mambaseg.models.pretrained import LoadReport
from mambaseg.models.rwkv_unet import RWKVUNet
from mambaseg.models.selective import ScanBlock, names_without_decay
from mambaseg.models.stochastic import Dropout, DropPath, drawing, stochastic_layers
from mambaseg.models.swin_umamba import SwinUMamba
from mambaseg.models.swin_umamba_d import SwinUMambaD
from mambaseg.models.swin_unet import SwinUNet
from mambaseg.models.trans_unet import TransUNet
from mambaseg.models.u_mamba import UMamba
from mambaseg.models.ultralight_vm_unet import UltraLightVMUNet
from mambaseg.models.unet import UNet
from mambaseg.models.ushape import UShape
from mambaseg.models.uvm_net import UVMNet
from mambaseg.models.vm_unet import VMUNet
from mambaseg.models.vm_unet_v2 import VMUNetV2
from mambaseg.models.vss import SS2D, VSSBlock
from mambaseg.models.window_attention import SwinBlock, WindowAttention
