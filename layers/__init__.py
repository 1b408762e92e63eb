"""Parts of models: encoder, items, losses, ranking, and fast versions of plain parts."""
