"""Models on the node's own disk: immutable bundles, named, checked, converted once when added."""
