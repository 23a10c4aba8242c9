"""From corpora to the rows of a run: order, packing, batches on the mesh."""
