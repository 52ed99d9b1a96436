"""From conversations to packed rows: sources, chat rendering, loss masks, packing, the row plan."""
