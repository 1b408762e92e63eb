"""ZESRec (Ding et al., 2021), as the ablation of UniSRec that the paper compares with (section 3.3)."""

from unisrec import UniSRec


class ZESRec(UniSRec):
    """UniSRec whose adaptor is one linear layer, without whitening and mixture. Only the settings differ."""

    def __init__(self, config, dataset):
        if config["n_exps"] != 1:  # taken from a checkpoint of another recipe
            raise ValueError(f"the adaptor must be one linear layer, found n_exps {config['n_exps']}")
        super().__init__(config, dataset)
