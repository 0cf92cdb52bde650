"""The directory nnU-Net searches for trainers.

nnU-Net imports every module in here and forgets it again after each search, so there is exactly one, and the
classes it hands out live in `nnunet_dyn.trainers`.
"""
