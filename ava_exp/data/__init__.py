"""Documents, their split, token shards, and the order in which a run reads them."""
