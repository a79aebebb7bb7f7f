"""What a label is, and its way from an answer to the lake."""
