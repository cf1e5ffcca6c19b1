"""From a large language model to a small backbone: choose what stays, cut it out, write it."""
