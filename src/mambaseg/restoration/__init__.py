"""Image restoration, the own task of UVM-Net."""
