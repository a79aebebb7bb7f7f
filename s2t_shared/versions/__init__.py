"""Published local selectors: files, checks, the gate, and which one is live."""
