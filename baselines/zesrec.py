"""ZESRec (Ding et al., 2021), as the ablation of UniSRec that the paper compares with (section 3.3)."""

from unisrec import UniSRec


class ZESRec(UniSRec):
    """UniSRec whose adaptor is one linear layer, without whitening and mixture. Only the settings differ."""
