"""Item texts as the features of a baseline. U items, N items of the catalogue, D text width, H hidden size."""

from recbole.model.layers import MLPLayers
from torch import Tensor, nn

from layers.whitening import Whitening


class TextProjection(nn.Module):
    """Projects the text vectors of items to the hidden size, with the layers that `adapter_layers` gives.

    The text vectors are a buffer, not an embedding. So the initialization of the weights of a model does not overwrite
    them.

    Args:
        config: `adapter_layers` and `whiten_texts` are read.
        features (data.ItemFeatures): the text features of one domain.
        hidden_size: H.

    Raises:
        ValueError: `adapter_layers` does not lead from D to H.
    """

    table: Tensor

    def __init__(self, config, features, hidden_size: int):
        super().__init__()
        sizes = config["adapter_layers"] or [features.width, hidden_size]
        if len(sizes) < 2 or (sizes[0], sizes[-1]) != (features.width, hidden_size):
            raise ValueError(
                f"adapter_layers {sizes} must begin with the text width {features.width} and end with the hidden size "
                f"{hidden_size}"
            )
        self.layers = MLPLayers(sizes, activation="relu", last_activation=False)
        table = features.table()
        if config["whiten_texts"]:
            table = Whitening(table.size(1)).fit(table).whiten_table(table)
        self.register_buffer("table", table, persistent=False)  # [N, D]; features belong to the data

    def forward(self, ids: Tensor) -> Tensor:
        """The projected texts of items: ids int64 [U], 1..N -> float [U, H]."""
        return self.layers(self.table[ids - 1].float())
