"""The paper's claims, re-tested: a graph of shipped commands, a CSV of figures, a page."""
