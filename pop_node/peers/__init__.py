"""Bundles between nodes: giving what is here, bringing what is not."""
