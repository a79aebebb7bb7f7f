"""Generated from protos/ by `make protos`; committed, and compared by a test."""
