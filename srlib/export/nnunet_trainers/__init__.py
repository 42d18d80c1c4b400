"""The folder that nnU-Net is told of by `nnUNet_extTrainer`: it imports every module in here, and needs one."""
