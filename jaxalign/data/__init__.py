"""From files to rows of tokens, in NumPy on the host: `sources` reads rows, `text` makes documents, `tables` lays them out."""
